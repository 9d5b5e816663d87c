"""Checkpoints: the published layout, ours, and everything that must not be read."""

from __future__ import annotations

import json
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from gluonts.model.predictor import Predictor
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor

from gluonts_peft import PeftPredictor
from gluonts_peft.checkpoint import CheckpointError
from gluonts_peft.testing import make_batch, make_dataset
from gluonts_peft_lag_llama import LagLlamaBackbone, LagLlamaConfig, LagLlamaEstimator, LagLlamaNetwork
from gluonts_peft_lag_llama.weights import CKPT, read, write

CONFIG: dict[str, Any] = dict(
    context_length=8, lags_seq=(0, 1, 6), n_layer=1, n_head=2, n_embd_per_head=8, scaling="robust"
)


@pytest.fixture
def network() -> LagLlamaNetwork:
    torch.manual_seed(0)
    return LagLlamaNetwork(LagLlamaConfig(**CONFIG)).eval()


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """The classes that the published file names, as gluonts 0.14 had them: importable while a file is written."""
    found = {}
    for module, name in (
        ("gluonts.torch.distributions.studentT", "StudentTOutput"),
        ("gluonts.torch.modules.loss", "NegativeLogLikelihood"),
        ("gluonts.torch.distributions.negative_binomial", "NegativeBinomialOutput"),
    ):
        found[name] = type(name, (), {"__module__": module})
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, found[name])
        monkeypatch.setitem(sys.modules, module, stand_in)
    return found


def published(network: LagLlamaNetwork, foreign: dict[str, type], output: str = "StudentTOutput") -> dict[str, Any]:
    """What Lightning wrote: weights, arguments, and the state of the training."""
    distribution, loss = foreign[output](), foreign["NegativeLogLikelihood"]()
    distribution.__dict__["__init_args__"] = OrderedDict()
    loss.__dict__.update({"__dict__": {"beta": 0.0}, "__fields_set__": set(), "__private_attribute_values__": {}})
    values = {**CONFIG, "lags_seq": list(CONFIG["lags_seq"]), "input_size": 1, "max_context_length": 2048}
    values |= {"rope_scaling": None, "time_feat": True, "dropout": 0.0, "num_parallel_samples": 100}
    return {
        "epoch": 3,
        "global_step": 400,
        "pytorch-lightning_version": "2.0.4",
        "state_dict": OrderedDict((f"model.{name}", tensor) for name, tensor in network.state_dict().items()),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.tensor(1.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "model_kwargs": {**values, "distr_output": distribution},
            "context_length": 8,
            "prediction_length": 4,
            "loss": loss,
            "window_warp_scales": [0.5, 2.0],
        },
    }


def as_folder(content: Any, folder: Path) -> Path:
    folder.mkdir()
    torch.save(content, folder / CKPT)
    return folder


def same(left: LagLlamaNetwork, right: LagLlamaNetwork) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return left.config == right.config and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_published_layout_opens_without_gluonts_own_classes(
    network: LagLlamaNetwork, foreign: dict[str, type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = as_folder(published(network, foreign), tmp_path / "published")
    with zipfile.ZipFile(folder / CKPT) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        pickled = archive.read(names[0])
    assert b"gluonts.torch.modules.loss NegativeLogLikelihood".replace(b" ", b"\n") in pickled
    for module in list(sys.modules):
        if module in ("gluonts.torch.modules.loss", "gluonts.torch.distributions.studentT"):
            monkeypatch.setitem(sys.modules, module, None)

    assert same(read(folder), network)


def test_the_published_layout_is_a_checkpoint_like_any_other(
    network: LagLlamaNetwork, foreign: dict[str, type], tmp_path: Path
) -> None:
    folder = as_folder(published(network, foreign), tmp_path / "published")
    dataset = make_dataset(4, 40)
    predictor = LagLlamaEstimator(
        prediction_length=4, checkpoint=str(folder), adapter="lora", gate="keep", max_epochs=1, num_batches_per_epoch=2,
        progress=False,
    ).train(dataset)  # fmt: skip
    predictor.serialize(tmp_path / "stored")
    again = Predictor.deserialize(tmp_path / "stored")
    left, right = (next(iter(each.predict(dataset, num_samples=3))).samples for each in (predictor, again))

    assert (left == right).all()
    assert len(predictor.backbone.source.fingerprint) == 64
    # Other weights under the same name are noticed.
    with torch.no_grad():
        network.param_proj.proj[0].bias.add_(1.0)
    torch.save(published(network, foreign), folder / CKPT)
    with pytest.raises(ValueError, match="fingerprint"):
        Predictor.deserialize(tmp_path / "stored")


def test_what_is_written_opens_everywhere(network: LagLlamaNetwork, tmp_path: Path) -> None:
    write(network, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", CKPT, "model.safetensors"]
    assert same(read(tmp_path), network)
    # Neither file needs the others.
    (tmp_path / "config.json").rename(tmp_path / "config.away")
    assert same(read(tmp_path), network)
    # Plain values: nothing has to be allowed to open it.
    content = torch.load(tmp_path / CKPT, weights_only=True)
    assert content["hyper_parameters"]["model_kwargs"]["distr_output"] == "studentT"
    assert list(content["state_dict"]) == [f"model.{name}" for name in network.state_dict()]
    (tmp_path / "config.away").rename(tmp_path / "config.json")
    (tmp_path / CKPT).unlink()
    assert same(read(tmp_path), network)


def test_two_layouts_that_disagree_are_refused(network: LagLlamaNetwork, tmp_path: Path) -> None:
    write(network, tmp_path)
    content = torch.load(tmp_path / CKPT, weights_only=True)
    content["state_dict"]["model.transformer.wte.bias"] += 1.0
    torch.save(content, tmp_path / CKPT)
    with pytest.raises(CheckpointError, match="holds other weights in lag-llama.ckpt than in model.safetensors"):
        read(tmp_path)


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["top", "hyper_parameters", "state_dict", "callbacks"])
def test_code_is_refused_and_not_run(
    network: LagLlamaNetwork, foreign: dict[str, type], tmp_path: Path, where: str
) -> None:
    content = published(network, foreign)
    (content if where == "top" else content[where])["extra"] = _Touch(tmp_path / "proof")
    folder = as_folder(content, tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"nothing of it was run: .*GLOBAL"):
        read(folder)

    assert not (tmp_path / "proof").exists()
    # The proof works: an unrestricted unpickle would have run it.
    torch.load(folder / CKPT, weights_only=False)
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize("call", ["functools.partial", "builtins.getattr", "builtins.eval", "os.system"])
def test_allowed_names_open_no_way_to_others(tmp_path: Path, call: str) -> None:
    """A pickle that names a function and calls it, written by hand."""
    module, name = call.split(".")
    payload = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X\x02\x00\x00\x001\n\x85R."
    with zipfile.ZipFile(tmp_path / CKPT, "w") as archive:
        archive.writestr("lag-llama/data.pkl", payload)
        archive.writestr("lag-llama/version", "3\n")
        archive.writestr("lag-llama/byteorder", "little")
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        read(tmp_path)


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / CKPT).write_bytes(pickle.dumps({"state_dict": {}, "touch": _Touch(tmp_path / "proof")}))
    with pytest.raises(CheckpointError, match="truncated, damaged or no archive of torch.save"):
        read(tmp_path)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(network: LagLlamaNetwork, tmp_path: Path, share: float) -> None:
    write(network, tmp_path)
    (tmp_path / "config.json").unlink()
    whole = (tmp_path / CKPT).read_bytes()
    (tmp_path / CKPT).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="truncated, damaged or no archive of torch.save"):
        read(tmp_path)


def test_a_changed_byte_is_refused(network: LagLlamaNetwork, tmp_path: Path) -> None:
    write(network, tmp_path)
    (tmp_path / "config.json").unlink()
    whole = bytearray((tmp_path / CKPT).read_bytes())
    weights = network.transformer["wte"].weight.detach().numpy().tobytes()
    at = bytes(whole).find(weights)
    assert at > 0
    whole[at + 7] ^= 0x40
    (tmp_path / CKPT).write_bytes(bytes(whole))
    with pytest.raises(CheckpointError, match="checksum of .* is wrong"):
        read(tmp_path)


def test_other_distributions_are_refused(network: LagLlamaNetwork, foreign: dict[str, type], tmp_path: Path) -> None:
    folder = as_folder(published(network, foreign, "NegativeBinomialOutput"), tmp_path / "negative-binomial")
    with pytest.raises(CheckpointError, match="Unsupported global: GLOBAL gluonts.*NegativeBinomialOutput"):
        read(folder)
    content = published(network, foreign)
    content["hyper_parameters"]["model_kwargs"]["distr_output"] = "iqn"
    with pytest.raises(CheckpointError, match="distr_output 'iqn'; only the Student-t distribution is known"):
        read(as_folder(content, tmp_path / "iqn"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("state_dict"), "has no state_dict or no hyper_parameters.model_kwargs"),
        (lambda c: c["hyper_parameters"].pop("model_kwargs"), "has no state_dict or no hyper_parameters.model_kwargs"),
        (lambda c: c["state_dict"].pop("model.transformer.wte.bias"), "1 tensors differ .first: transformer.wte.bias"),
        (lambda c: c["state_dict"].update(more=torch.zeros(2)), "first: more, shape none by the sizes"),
        (lambda c: c["state_dict"].update({"model.transformer.wte.bias": torch.zeros(3)}), r"shape \(16,\) by the"),
        (lambda c: c["state_dict"].update({"model.transformer.wte.bias": 3}), "transformer.wte.bias is a int"),
        (lambda c: c["hyper_parameters"]["model_kwargs"].pop("n_layer"), "does not describe a Lag-Llama: .*n_layer"),
        (lambda c: c["hyper_parameters"]["model_kwargs"].update(n_head=-1), "n_head -1 is not a positive integer"),
        (lambda c: c["hyper_parameters"]["model_kwargs"].update(n_head="2"), "n_head '2' is not a positive integer"),
    ],
)
def test_what_does_not_fit_is_refused(
    network: LagLlamaNetwork, foreign: dict[str, type], tmp_path: Path, damage: Any, message: str
) -> None:
    content = published(network, foreign)
    damage(content)
    with pytest.raises(CheckpointError, match=message):
        read(as_folder(content, tmp_path / "odd"))


def test_folders_of_other_families_are_refused(network: LagLlamaNetwork, tmp_path: Path) -> None:
    write(network, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(CheckpointError, match="not of family 'lag-llama': its config.json has model_type 't5' and no"):
        read(tmp_path)


def test_half_precision_weights_become_float32(
    network: LagLlamaNetwork, foreign: dict[str, type], tmp_path: Path
) -> None:
    content = published(network, foreign)
    content["state_dict"] = {name: tensor.half() for name, tensor in content["state_dict"].items()}
    found = read(as_folder(content, tmp_path / "half"))

    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32}


def test_the_published_file_is_fetched_from_the_hub(
    network: LagLlamaNetwork, foreign: dict[str, type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The project's own look-up fetches JSON and safetensors, of which the published repository has none."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    asked = []

    def snapshot(name: str, **options: Any) -> str:
        (tmp_path / commit).mkdir(exist_ok=True)
        return str(tmp_path / commit)

    def single(name: str, file: str, revision: str | None) -> str:
        asked.append((name, file, revision))
        torch.save(published(network, foreign), tmp_path / commit / file)
        return str(tmp_path / commit / file)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", single)
    for _ in range(2):
        backbone = LagLlamaBackbone.from_checkpoint("someone/Lag-Llama", prediction_length=4)
        assert same(backbone.network, network)
        assert (backbone.source.kind, backbone.source.revision) == ("hub", commit)

    assert asked == [("someone/Lag-Llama", CKPT, commit)]


def test_a_hub_repository_without_either_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, file: str, revision: str | None) -> str:
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(CheckpointError, match="'a/b' has no model.safetensors, and its lag-llama.ckpt cannot be"):
        LagLlamaBackbone.from_checkpoint("a/b", prediction_length=4)


def test_forecasts_survive_export(network: LagLlamaNetwork, tmp_path: Path) -> None:
    write(network, tmp_path)
    first = LagLlamaBackbone.from_checkpoint(tmp_path, prediction_length=4)
    PeftPredictor(first).export(tmp_path / "exported")
    second = LagLlamaBackbone.from_checkpoint(tmp_path / "exported", prediction_length=4)

    def paths(backbone: LagLlamaBackbone) -> Tensor:
        with backbone.inference():
            return backbone.forecast(
                make_batch(first), num_samples=3, generator=torch.Generator().manual_seed(0)
            ).values

    assert torch.equal(paths(first), paths(second))
