"""The network is MOMENT's: same numbers as the reference implementation, same folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gluonts_peft.checkpoint import CheckpointError
from gluonts_peft_moment import MomentNetwork
from gluonts_peft_moment.network import bridge, normalise, positions

NAN = float("nan")
HORIZON = 5
# The keys of the official config.json, with small numbers.
CONFIG: dict[str, Any] = {
    "task_name": "reconstruction",
    "model_name": "MOMENT",
    "transformer_type": "encoder_only",
    "d_model": None,
    "seq_len": 64,
    "patch_len": 8,
    "patch_stride_len": 8,
    "device": "cpu",
    "transformer_backbone": "google/flan-t5-small",
    "model_kwargs": {},
    "t5_config": {
        "architectures": ["T5ForConditionalGeneration"],
        "d_ff": 24,
        "d_kv": 4,
        "d_model": 12,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512,
        "num_decoder_layers": 2,
        "num_heads": 3,
        "num_layers": 2,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 16,
        "relative_attention_num_buckets": 8,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 16,
    },
}


def fill(name: str, shape: Any) -> Tensor:
    """Weights that follow from their name alone."""
    phase = sum((i + 1) * byte for i, byte in enumerate(name.encode())) % 1000
    wave = 0.4 * torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float64) + phase)
    return wave.reshape(tuple(shape)).float() + (1.0 if "norm" in name else 0.0)


def windows() -> tuple[Tensor, Tensor, Tensor]:
    """Values, which are given and which are shown; whole, padded with 0, padded with NaN, with a gap."""
    step = torch.arange(64, dtype=torch.float64)
    values = torch.stack(
        [
            80 + 5 * torch.sin(step / 3) + 0.1 * step,
            -2 + 0.01 * step + 0.3 * torch.cos(step),
            1000 + (step % 7) * 20,
            0.5 * torch.sin(step * step / 50),
        ]
    ).float()
    given, shown = torch.ones(4, 64), torch.ones(4, 64)
    values[1, :21], given[1, :21] = 0.0, 0.0
    values[2, :30], given[2, :30] = NAN, 0.0
    values[3, 40:42], given[3, 40:42] = NAN, 0.0
    shown[0, 8:16], shown[2, 48:], shown[3, 56:60] = 0.0, 0.0, 0.0
    return values, given, shown


def folder_of(path: Path, config: dict[str, Any] | None = None, **changes: Tensor | None) -> Path:
    """Write an official folder with filled weights; a tensor that is changed to None is left out."""
    config = CONFIG if config is None else config
    network = MomentNetwork(config)
    state = {name: fill(name, tensor.shape) for name, tensor in network.state_dict().items()}
    state["encoder.embed_tokens.weight"] = fill("encoder.embed_tokens.weight", (16, 12))
    state["patch_embedding.position_embedding.pe"] = positions(5000, 12)[None]
    state |= {name: tensor for name, tensor in changes.items() if tensor is not None}
    path.mkdir()
    save_file(
        {k: v for k, v in state.items() if k not in changes or changes[k] is not None}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> MomentNetwork:
    found = MomentNetwork.from_pretrained(folder_of(tmp_path_factory.mktemp("moment") / "tiny"))
    head = found.set_horizon(HORIZON)
    with torch.no_grad():
        for name, tensor in head.named_parameters():
            # The reference's name for this head.
            tensor.copy_(fill(f"head.{name}", tensor.shape))
    return found


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    record = json.loads(Path(__file__).with_name("reference.json").read_text())
    return {name: torch.tensor(numbers) for name, numbers in record.items() if name != "source"}


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal within 1e-5 of the size of each window."""
    size = expected.flatten(1).abs().amax(1).reshape(-1, *[1] * (expected.ndim - 1))
    assert found.shape == expected.shape
    torch.testing.assert_close(found / size, expected / size, rtol=0, atol=1e-5)


@torch.no_grad()
def test_reconstruction_equals_the_reference(network: MomentNetwork, recorded: dict[str, Tensor]) -> None:
    assert_same(network.reconstruct(*windows()), recorded["reconstruction"])


@torch.no_grad()
def test_features_equal_the_reference_embeddings(network: MomentNetwork, recorded: dict[str, Tensor]) -> None:
    values, given, _ = windows()
    # The reference's `embed` puts the mask token where its `forecast` embeds what is not given as 0.
    assert_same(network.encode(values, given, given)[0], recorded["embeddings"])
    assert not torch.allclose(network.encode(values, given)[0], recorded["embeddings"], atol=0.1)


@torch.no_grad()
def test_forecast_equals_the_reference(network: MomentNetwork, recorded: dict[str, Tensor]) -> None:
    values, given, _ = windows()
    assert_same(network.predict(values, given), recorded["forecast"])


@torch.no_grad()
def test_a_part_of_the_window_is_enough_where_the_rest_is_padding(network: MomentNetwork) -> None:
    values, given, shown = windows()
    values, given, shown = values[1:3], given[1:3], shown[1:3]
    whole = network.reconstruct(values, given, shown)[:, -48:]
    part = network.reconstruct(values[:, -48:], given[:, -48:], shown[:, -48:])

    assert_same(part, whole)


@torch.no_grad()
def test_a_window_without_a_whole_patch_gives_numbers(network: MomentNetwork) -> None:
    values, given, _ = windows()
    given[:, :-5] = 0.0
    assert network.predict(values, given).isfinite().all()


@torch.no_grad()
def test_hidden_values_have_no_influence(network: MomentNetwork) -> None:
    values, given, shown = windows()
    changed = torch.where(shown > 0, values, 1e4)

    assert torch.equal(network.reconstruct(changed, given, shown)[0], network.reconstruct(values, given, shown)[0])
    assert not torch.equal(network.reconstruct(changed, given)[0], network.reconstruct(values, given)[0])


def test_normalisation_is_that_of_what_is_seen() -> None:
    values = torch.tensor([[1.0, 3.0, NAN, 100.0], [5.0, 5.0, 5.0, 5.0]])
    seen = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    scaled, mean, deviation = normalise(values, seen)

    assert mean.flatten().tolist() == [2.0, 5.0]
    torch.testing.assert_close(deviation.flatten(), torch.tensor([1.0 + 1e-5, 1e-5]))
    torch.testing.assert_close(scaled, torch.tensor([[-1.0, 1.0, 0.0, 98.0], [0.0] * 4]), rtol=1e-4, atol=0)


def test_gaps_are_bridged() -> None:
    values = torch.tensor([[0.0, 0, 0, 6, 0, 0, 9, 0], [1, 0, 3, 4, 5, 6, 7, 8], [0] * 8, [0, 0, 0, 0, 0, 0, 2, 0]])
    observed = torch.tensor([[0.0, 0, 0, 1, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1, 1, 1], [0] * 8, [0, 0, 0, 0, 0, 0, 1, 0]])
    bridged, given = bridge(values, observed, 2)

    assert given.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [0] * 8, [0, 0, 0, 0, 0, 0, 1, 1]]
    expected = [[NAN, NAN, 6, 6, 7, 8, 9, 9], [1, 2, 3, 4, 5, 6, 7, 8], [NAN] * 8, [*[NAN] * 6, 2, 2]]
    torch.testing.assert_close(bridged, torch.tensor(expected), equal_nan=True)


def test_a_folder_makes_a_round_trip(network: MomentNetwork, tmp_path: Path) -> None:
    values, given, shown = windows()
    plain = MomentNetwork.from_pretrained(folder_of(tmp_path / "first"))
    plain.save_pretrained(tmp_path / "plain")
    network.save_pretrained(tmp_path / "forecasting")
    first, second = (MomentNetwork.from_pretrained(tmp_path / name) for name in ("plain", "forecasting"))

    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == CONFIG
    config = json.loads((tmp_path / "forecasting" / "config.json").read_text())
    assert config == CONFIG | {"task_name": "forecasting", "forecast_horizon": HORIZON}
    assert (first.horizon, second.horizon) == (None, HORIZON)
    # The reference looks for the head of the task under this name.
    names = load_file(tmp_path / "forecasting" / "model.safetensors")
    assert names["head.linear.weight"].shape == (HORIZON, 8 * 12)
    with torch.no_grad():
        for each in (first, second):
            assert torch.equal(each.reconstruct(values, given, shown), network.reconstruct(values, given, shown))
        assert torch.equal(second.predict(values, given), network.predict(values, given))


def test_an_untrained_head_is_zero_and_is_not_written(tmp_path: Path) -> None:
    plain = MomentNetwork.from_pretrained(folder_of(tmp_path / "first"))
    state = torch.get_rng_state()
    plain.set_horizon(3)

    assert torch.equal(torch.get_rng_state(), state)
    assert not plain.can_forecast()
    values, given, _ = windows()
    with torch.no_grad():
        torch.testing.assert_close(plain.predict(values, given), normalise(values, given)[1].expand(-1, 3))
    plain.save_pretrained(tmp_path / "again")
    assert MomentNetwork.from_pretrained(tmp_path / "again").horizon is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.final_layer_norm.weight": None}, "1 tensors missing (first: encoder.final_layer_norm.weight)"),
        ({"more": torch.ones(2)}, "1 tensors without a place (first: more)"),
        ({"head.linear.bias": torch.ones(9)}, "1 tensors of another shape (first: head.linear.bias)"),
    ],
)
def test_tensors_must_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "bad", **changes)
    with pytest.raises(CheckpointError) as caught:
        MomentNetwork.from_pretrained(folder)

    assert str(caught.value) == f"checkpoint folder {str(folder)!r} does not fit its config.json: {message}"


def test_other_positions_are_refused(tmp_path: Path) -> None:
    table = positions(5000, 12)[None] + 0.01
    folder = folder_of(tmp_path / "bad", **{"patch_embedding.position_embedding.pe": table})
    with pytest.raises(CheckpointError, match="does not hold the sinusoidal positions"):
        MomentNetwork.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_name": "classification"}, "task_name 'classification' is not supported; it has to be 'reconstruction'"),
        ({"task_name": "forecasting"}, "forecast_horizon None is not supported; it has to be a positive number"),
        ({"transformer_type": "encoder_decoder"}, "transformer_type 'encoder_decoder' is not supported"),
        ({"patch_stride_len": 4}, "patch_stride_len 4 is not supported; it has to be patch_len (8)"),
        ({"seq_len": 60}, "seq_len 60 is not supported; it has to be a multiple of patch_len (8)"),
        ({"d_model": 16}, "d_model 16 is not supported; it has to be null or that of t5_config (12)"),
        ({"revin_affine": True}, "revin_affine True is not supported; it has to be false"),
    ],
)
def test_configurations_that_would_compute_something_else_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "bad")
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(CheckpointError) as caught:
        MomentNetwork.from_pretrained(folder)

    assert str(caught.value).startswith(f"checkpoint folder {str(folder)!r} cannot be used: config.json: {message}")


def test_folders_of_other_families_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "bad")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "chronos_config": {}}))
    with pytest.raises(CheckpointError, match="is not of family 'moment': .*model_type 't5'"):
        MomentNetwork.from_pretrained(folder)
