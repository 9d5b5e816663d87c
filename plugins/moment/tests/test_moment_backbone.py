"""MOMENT as a backbone: refuses to forecast untrained, learns a head, reconstructs, and is exported with its head."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.t5 import modeling_t5

import gluonts_peft
from gluonts_peft import PeftPredictor, load_backbone
from gluonts_peft.adapters.load import load_adapter
from gluonts_peft.backbone import SITES
from gluonts_peft.checkpoint import CheckpointError
from gluonts_peft.testing import (
    adapter_checks,
    backbone_checks,
    estimator_checks,
    make_batch,
    make_dataset,
    parametrize_with_checks,
)
from gluonts_peft_moment import MomentBackbone, MomentEstimator

NAN = float("nan")
# Forecasting hides no patch and does not reconstruct.
WITHOUT_EFFECT = r"^(head\.|patch_embedding\.mask_embedding$)"


def load(checkpoint: Any = "moment-nano", prediction_length: int = 8, **options: Any) -> MomentBackbone:
    return MomentBackbone.from_checkpoint(checkpoint, prediction_length=prediction_length, **options)


def short() -> MomentBackbone:
    return load(context_length=48)


def trained(prediction_length: int = 8, seed: int = 0) -> MomentBackbone:
    """A backbone whose head is at random numbers."""
    backbone = load(prediction_length=prediction_length)
    head = backbone.network.forecast_head
    assert head is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.linear.weight.normal_(0.0, 0.01, generator=generator)
        head.linear.bias.normal_(0.0, 0.1, generator=generator)
    return backbone


@cache
def exported(root: Path) -> Path:
    folder = root / "exported"
    folder.mkdir()
    trained().export(folder)
    return folder


@pytest.fixture(scope="session")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.getbasetemp())


def past(values: Tensor) -> dict[str, Tensor]:
    return {"past_target": values.nan_to_num(0.0), "past_observed_values": (~values.isnan()).float()}


def waves(size: int = 3, length: int = 100, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    step = torch.arange(length)
    phase, level = torch.rand(2, size, 1, generator=generator)
    return 50 + 50 * level + 5 * torch.sin(6.28 * (step / 24 + phase))


def point(backbone: MomentBackbone, batch: Mapping[str, Tensor]) -> Tensor:
    with backbone.inference():
        return backbone.forecast(batch).values[:, 4]


@parametrize_with_checks(
    [
        *backbone_checks(short, label="moment"),
        *(
            check
            for spec in (
                "lora",
                "bitfit",
                "layernorm",
                "vera",
                "fourierft",
                "full",
                "head",
                ["lora", "head"],
                ["vera", "bitfit", "head"],
                {"name": "lora", "sites": ["embedding", "ff_in", "ff_out"]},
            )
            for check in adapter_checks(spec, short, without_effect=WITHOUT_EFFECT)
        ),
        *estimator_checks(MomentEstimator, label="MomentEstimator", context_length=48),
    ]
)
def test_contract(check: Any) -> None:
    check()


def test_contract_with_a_trained_head(with_head: Path) -> None:
    """The checks of forecasts, which the bundled checkpoint has no head for."""
    results = gluonts_peft.testing.check_backbone(lambda: load(with_head, context_length=48))
    assert {r.status for r in results if r.name.startswith(("forecast_", "export"))} == {"passed"}


def test_untrained_it_refuses_to_forecast_and_says_what_to_do() -> None:
    backbone = load()
    assert backbone.untrained == ("head",)
    with pytest.raises(ValueError, match="untrained|not trained") as caught:
        backbone.forecast(past(waves()))
    assert str(caught.value) == (
        "the forecasting head on checkpoint 'moment-nano' is not trained: MOMENT has no zero-shot forecast; train the"
        ' head, alone (adapter="head") or with an adapter (adapter=["lora", "head"])'
    )
    with pytest.raises(ValueError, match="adapter 'none' trains nothing"):
        MomentEstimator(prediction_length=4, adapter="none").train(make_dataset())


def test_the_head_learns_from_zero_and_the_adapter_from_then_on() -> None:
    backbone = short()
    batch = make_batch(backbone)
    adapter = gluonts_peft.get_adapter(["lora", "head"]).attach(backbone)
    backbone.loss(batch).mean().backward()
    moving = {name for name, p in backbone.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert moving == {"forecast_head.linear.weight", "forecast_head.linear.bias"}

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    optimizer.step()
    optimizer.zero_grad()
    backbone.loss(batch).mean().backward()
    moving = {name for name, p in backbone.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.rpartition(".lora_")[2] for name in moving if ".lora_" in name} == {"B.default.weight"}
    assert point(backbone, batch).isfinite().all()


def test_an_adapter_around_the_head_counts_as_training_it() -> None:
    backbone = short()
    batch = make_batch(backbone)
    adapter = gluonts_peft.get_adapter({"name": "lora", "sites": ["head"]}).attach(backbone)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="is not trained"):
        backbone.forecast(batch)
    for _ in range(2):
        optimizer.zero_grad()
        backbone.loss(batch).mean().backward()
        optimizer.step()
    assert point(backbone, batch).isfinite().all()


def test_all_quantiles_are_the_point() -> None:
    found = trained().forecast(past(waves()))
    assert found.levels == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert found.values.shape == (3, 9, 8)
    assert torch.equal(found.values, found.values[:, :1].expand(-1, 9, -1))


def test_forecasts_move_with_level_and_scale() -> None:
    backbone, values = trained(), waves()
    torch.testing.assert_close(
        point(backbone, past(1000 + 7 * values)), 1000 + 7 * point(backbone, past(values)), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("length", [5, 8, 30, 100, 512])
def test_padding_on_the_left_changes_nothing(length: int) -> None:
    backbone, values = trained(), waves(length=length)
    padded = torch.cat([torch.full((3, min(32, 512 - length)), NAN), values], 1)

    torch.testing.assert_close(point(backbone, past(padded)), point(backbone, past(values)))


def test_gaps_are_bridged_in_a_straight_line() -> None:
    backbone, values = trained(), torch.arange(40.0).expand(2, -1).clone()
    gaps = values.clone()
    gaps[0, 10:15] = NAN
    gaps[1, 33] = NAN

    torch.testing.assert_close(point(backbone, past(gaps)), point(backbone, past(values)))


def test_a_history_longer_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="history of 520 steps exceeds the 512 steps of the network"):
        trained().forecast(past(waves(length=520)))
    with pytest.raises(ValueError, match="context_length 513 exceeds the 512 steps that checkpoint 'moment-nano'"):
        load(context_length=513)


def test_loss_is_the_squared_error_in_deviations_of_the_window() -> None:
    backbone = trained()
    batch = make_batch(short(), missing=0.2)
    with backbone.inference():
        found = backbone.loss(batch)
    predicted = point(backbone, batch)
    for i in range(len(found)):
        seen = batch["future_observed_values"][i] > 0
        label = batch["future_target"][i][seen]
        window = torch.cat([batch["past_target"][i][batch["past_observed_values"][i] > 0], label])
        expected = (predicted[i][seen] - label).square().mean() / (window.std(correction=0) + 1e-5) ** 2
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-6)


def test_loss_does_not_depend_on_scale_and_stays_finite_after_a_flat_history() -> None:
    backbone = trained()
    batch = make_batch(short(), missing=0.0)
    large = {name: 1e3 * value if name.endswith("target") else value for name, value in batch.items()}
    with backbone.inference():
        torch.testing.assert_close(backbone.loss(large), backbone.loss(batch), rtol=1e-3, atol=1e-4)
        flat = batch | {"past_target": torch.full((4, 48), 80.0)}
        assert backbone.loss(flat).max() < 1e2
        flat |= {"future_target": torch.full((4, 8), 80.0)}
        assert backbone.loss(flat).isfinite().all()


def test_missing_labels_do_not_count() -> None:
    backbone = trained()
    batch = make_batch(short(), missing=0.0)
    batch["future_observed_values"][:, 3:7] = 0.0
    changed = batch | {"future_target": batch["future_target"] + 50 * (1 - batch["future_observed_values"])}
    nothing = batch | {"future_observed_values": torch.zeros(4, 8)}
    with backbone.inference():
        torch.testing.assert_close(backbone.loss(changed), backbone.loss(batch))
        assert backbone.loss(nothing).tolist() == [0.0] * 4


def test_features_are_those_of_the_patches() -> None:
    backbone, values = load(), waves(length=100)
    with backbone.inference():
        features = backbone.features(past(values))
        again = backbone.features(past(torch.cat([torch.full((3, 9), NAN), values], 1)))
        other = backbone.features(past(values.flip(1)))

    assert features.shape == (3, 64, backbone.network.width)
    torch.testing.assert_close(again, features)
    assert not torch.allclose(other[:, -1], features[:, -1], atol=1e-2)


@pytest.mark.parametrize("length", [16, 61, 96, 512])
def test_reconstruction_is_nearer_than_the_mean(length: int) -> None:
    backbone, values = load(), waves(8, length)
    with backbone.inference():
        found = backbone.reconstruct(past(values))

    assert found.shape == values.shape
    assert (found - values).square().mean() < 0.5 * (values - values.mean(1, keepdim=True)).square().mean()


def test_missing_patches_are_filled_in_better_than_by_the_mean() -> None:
    backbone, values = load(), waves(8, 120)
    gaps = values.clone()
    gaps[:, 64:72] = NAN
    with backbone.inference():
        found = backbone.reconstruct(past(gaps))[:, 64:72]
    left = gaps.nanmean(1, keepdim=True)

    assert (found - values[:, 64:72]).square().mean() < 0.5 * (left - values[:, 64:72]).square().mean()


def test_an_anomaly_stands_out_of_the_reconstruction() -> None:
    backbone, values = load(), waves(4, 120)
    spoilt = values.clone()
    spoilt[:, 83] += 25.0
    with backbone.inference():
        errors = (backbone.reconstruct(past(spoilt)) - spoilt).abs()

    assert errors.argmax(1).tolist() == [83] * 4


def test_sites_are_places_of_the_network() -> None:
    backbone = load()
    network, sites = backbone.network, backbone.sites()
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    layers = network.config["t5_config"]["num_layers"]

    assert sites.keys() == SITES.keys()
    assert all(len(names) == len(set(names)) > 0 for names in sites.values())
    assert all(name in parameters for name in sites["bias"])
    for kind in ("q", "k", "v", "o", "ff_in", "ff_out", "embedding", "head"):
        assert all(type(modules[name]) is nn.Linear for name in sites[kind])
    assert [len(sites[kind]) for kind in ("q", "k", "v", "o", "ff_out", "attention_norm")] == [layers] * 6
    assert len(sites["ff_in"]) == 2 * layers
    assert set(sites["norm"]) == {n for n, m in modules.items() if isinstance(m, modeling_t5.T5LayerNorm)}
    assert sites["head"] == ("forecast_head.linear",)
    assert sites["bias"] == ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",)


def test_an_export_without_a_trained_head_is_the_checkpoint_itself(tmp_path: Path) -> None:
    load().export(tmp_path)
    again = load(tmp_path)
    config = json.loads((MomentBackbone.bundled()["moment-nano"] / "config.json").read_text())

    assert again.source.fingerprint == load().source.fingerprint
    assert again.untrained == ("head",)
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_an_exported_head_forecasts_again_and_may_be_cut(with_head: Path) -> None:
    batch = past(waves())
    expected = point(trained(), batch)
    whole, cut = load(with_head), load(with_head, prediction_length=3)

    assert whole.untrained == cut.untrained == ()
    assert torch.equal(point(whole, batch), expected)
    torch.testing.assert_close(point(cut, batch), expected[:, :3])
    with whole.inference():
        assert torch.equal(whole.reconstruct(batch), load().reconstruct(batch))


def test_an_exported_head_that_is_too_short_is_replaced_with_a_warning(
    with_head: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        longer = load(with_head, prediction_length=9)

    assert longer.untrained == ("head",)
    assert "brings a forecasting head for 8 steps, not 9: it is replaced by an untrained one" in caplog.text


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    load().export(tmp_path)
    state = {"x": torch.ones(1)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="are not read: convert them to safetensors"):
        load(tmp_path)


@pytest.fixture(scope="module")
def predictor() -> PeftPredictor:
    estimator = MomentEstimator(
        prediction_length=6, context_length=64, adapter="lora", max_epochs=3, num_batches_per_epoch=20, progress=False
    )
    data = make_dataset(12)
    for entry, values in zip(data, waves(12, 90), strict=True):
        entry["target"] = values.numpy()
    return estimator.train(data)


def test_the_estimator_trains_the_head_along_and_reports_no_zero_shot_score(predictor: PeftPredictor) -> None:
    assert predictor.backbone.adapter is not None
    assert predictor.backbone.adapter.spec == ["lora", "head"]
    assert predictor.gate is not None
    assert predictor.gate.zero_shot is None
    # A head at zero forecasts the mean of the history: its loss is about 1.
    assert predictor.gate.tuned < 0.5
    assert len(predictor.backbone.untrained) == 1


def test_a_stored_predictor_forecasts_the_same(predictor: PeftPredictor, tmp_path: Path) -> None:
    data = make_dataset(3, seed=1)
    predictor.serialize(tmp_path)
    again = PeftPredictor.deserialize(tmp_path)
    for left, right in zip(predictor.predict(data), again.predict(data), strict=True):
        assert np.array_equal(left.quantile(0.5), right.quantile(0.5))


def test_an_adapter_is_stored_without_the_base_and_loads_onto_it(predictor: PeftPredictor, tmp_path: Path) -> None:
    assert predictor.backbone.adapter is not None
    predictor.backbone.adapter.save(tmp_path)
    again = load(prediction_length=6)
    load_adapter(tmp_path, again)
    batch = past(waves(length=60))

    torch.testing.assert_close(point(again, batch), point(predictor.backbone, batch))  # type: ignore[arg-type]


def test_an_exported_predictor_opens_as_a_checkpoint_that_forecasts(predictor: PeftPredictor, tmp_path: Path) -> None:
    predictor.export(tmp_path / "merged")
    backbone = load_backbone("moment", checkpoint=tmp_path / "merged", prediction_length=6, context_length=64)
    data = make_dataset(3, seed=1)

    assert backbone.untrained == ()
    for left, right in zip(predictor.predict(data), PeftPredictor(backbone).predict(data), strict=True):
        np.testing.assert_allclose(left.quantile(0.5), right.quantile(0.5), rtol=1e-4)


def test_the_lora_of_a_hybrid_opens_with_plain_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    backbone = load()
    adapter = gluonts_peft.get_adapter(["lora", "head"]).attach(backbone)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, 0.0, 0.05, generator=generator)
    adapter.save(tmp_path)
    plain = MomentBackbone.load_network(MomentBackbone.bundled()["moment-nano"])
    values = waves(length=64)
    with torch.no_grad():
        before = plain(values)
        opened = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
        assert torch.equal(opened(values), backbone.network(values))
        assert not torch.allclose(opened(values), before, rtol=1e-3)
