"""The family in the project: lengths, calendar, options, sites, adapters, training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts.model.predictor import Predictor
from peft import PeftModel
from torch import Tensor, nn

import gluonts_peft
from gluonts_peft.testing import Check, adapter_checks, make_batch, make_dataset, parametrize_with_checks
from gluonts_peft_lag_llama import LagLlamaBackbone, LagLlamaConfig, LagLlamaEstimator, LagLlamaNetwork
from gluonts_peft_lag_llama.network import TIME_FEATURES
from gluonts_peft_lag_llama.weights import write

NANO = "lag-llama-nano"
ADAPTERS: list[Any] = ["lora", "bitfit", "layernorm", "vera", "fourierft", "full", "head", ["layernorm", "lora"]]


@cache
def nano(**options: Any) -> LagLlamaBackbone:
    return LagLlamaBackbone.from_checkpoint(NANO, prediction_length=8, **options)


def loss(backbone: LagLlamaBackbone, batch: Mapping[str, Tensor]) -> Tensor:
    with backbone.inference():
        return backbone.loss(batch)


def forecast(backbone: LagLlamaBackbone, batch: Mapping[str, Tensor], samples: int | None = 3) -> Tensor:
    with backbone.inference():
        return backbone.forecast(batch, num_samples=samples, generator=torch.Generator().manual_seed(3)).values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small network without calendar features, in a folder."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(context_length=12, n_layer=1, n_head=2, n_embd_per_head=8, max_context_length=40)
    write(LagLlamaNetwork(LagLlamaConfig(lags_seq=(0, 5), time_feat=False, **sizes)), tmp_path)
    return tmp_path


def test_the_past_is_the_context_and_the_longest_lag() -> None:
    backbone = nano()
    lags = backbone.network.config.lags_seq

    assert (backbone.context_length, max(lags), backbone.past_length) == (32, 36, 68)
    assert nano(context_length=50).past_length == 86
    assert backbone.time_features == TIME_FEATURES


def test_lags_are_those_of_the_reference_for_its_frequencies() -> None:
    from gluonts.time_feature import get_lags_for_frequency

    lags = {lag - 1 for freq in ("QE", "ME") for lag in get_lags_for_frequency(freq, num_default_lags=1)}
    assert nano().network.config.lags_seq == tuple(sorted(lags))


def test_calendar_features_are_those_of_the_reference() -> None:
    from gluonts.time_feature import time_features_from_frequency_str

    assert tuple(feature.__name__ for feature in time_features_from_frequency_str("s")) == TIME_FEATURES


def test_a_longer_context_than_the_network_knows_is_refused(folder: Path) -> None:
    longest = LagLlamaBackbone.from_checkpoint(folder, prediction_length=4, context_length=40)
    assert loss(longest, make_batch(longest)).isfinite().all()
    message = r"context_length 41 exceeds the 40 steps \(max_context_length\) that checkpoint"
    with pytest.raises(ValueError, match=message):
        LagLlamaBackbone.from_checkpoint(folder, prediction_length=4, context_length=41)


def test_options(folder: Path) -> None:
    assert forecast(nano(num_samples=5), make_batch(nano()), samples=None).shape == (4, 5, 8)
    assert nano().num_samples == nano().network.config.num_parallel_samples == 100
    stretched = LagLlamaBackbone.from_checkpoint(
        folder, prediction_length=4, rope_scaling={"type": "linear", "factor": 8.0}
    )
    plain = LagLlamaBackbone.from_checkpoint(folder, prediction_length=4)
    assert not torch.equal(loss(stretched, make_batch(plain)), loss(plain, make_batch(plain)))
    for options, message in (
        ({"num_sample": 3}, "num_sample"),
        ({"num_samples": 0}, "num_samples 0 is not positive"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling"),
    ):
        with pytest.raises(ValueError, match=message):
            LagLlamaBackbone.from_checkpoint(folder, prediction_length=4, **options)


def test_rescaled_forecasts_begin_alike() -> None:
    batch = make_batch(nano())
    held, rescaled = (forecast(nano(rescale=choice), batch) for choice in (False, True))

    torch.testing.assert_close(held[..., 0], rescaled[..., 0], rtol=1e-5, atol=1e-4)
    assert not torch.equal(held[..., 1:], rescaled[..., 1:])


def test_calendar_features_count_and_must_be_there() -> None:
    batch = make_batch(nano())
    moved = {**batch, "time_feat": batch["time_feat"].roll(1, dims=-1)}
    assert not torch.equal(loss(nano(), batch), loss(nano(), moved))
    del moved["time_feat"]
    with pytest.raises(ValueError, match=f"batch has no time_feat; checkpoint '{NANO}' takes calendar features"):
        loss(nano(), moved)


def test_steps_before_a_series_have_no_date() -> None:
    """As in the reference, which pads calendar features with zeros; the window itself holds extrapolated dates."""
    batch = make_batch(nano())
    for name in ("past_target", "past_observed_values"):
        batch[name][:, :50] = 0
    other = {**batch, "time_feat": batch["time_feat"].clone()}
    other["time_feat"][:, :50] = 7.0
    short = {name: part[:, 50:] if not name.startswith("future") else part for name, part in batch.items()}

    assert torch.equal(loss(nano(), batch), loss(nano(), other))
    torch.testing.assert_close(loss(nano(), batch), loss(nano(), short), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forecast(nano(), batch), forecast(nano(), short), rtol=1e-5, atol=1e-4)


def test_only_context_loss_counts_the_steps_of_the_context() -> None:
    batch = make_batch(nano(), missing=0.0)
    nothing = {**batch, "future_observed_values": torch.zeros_like(batch["future_observed_values"])}
    whole = nano(context_loss=True)

    assert loss(nano(), nothing).tolist() == [0.0] * 4
    assert (loss(whole, nothing) != 0.0).all()
    # 31 steps of the context and 8 of the label.
    parts = 31 * loss(whole, nothing) + 8 * loss(nano(), batch)
    torch.testing.assert_close(39 * loss(whole, batch), parts, rtol=1e-4, atol=1e-3)


def test_sites_are_places_of_the_network() -> None:
    network, sites = nano().network, nano().sites()
    layers = network.config.n_layer
    count = {kind: len(names) for kind, names in sites.items()}

    assert count == {
        "q": layers,
        "k": layers,
        "v": layers,
        "o": layers,
        "ff_in": 2 * layers,
        "ff_out": layers,
        "norm": 2 * layers + 1,
        "attention_norm": layers,
        "embedding": 1,
        "head": 1,
        "bias": 4,
    }
    assert sites["k"] == sites["v"] == tuple(f"transformer.h.{i}.attn.kv_proj" for i in range(layers))
    assert sites["ff_out"] == tuple(f"transformer.h.{i}.mlp.c_proj" for i in range(layers))
    assert sites["bias"] == tuple(f"param_proj.proj.{i}.bias" for i in range(3)) + ("transformer.wte.bias",)
    assert all(type(network.get_submodule(name)) is nn.Linear for kind in "qkvo" for name in sites[kind])


@parametrize_with_checks(
    check
    for spec in ADAPTERS
    for check in adapter_checks(spec, nano, label="+".join(spec) if isinstance(spec, list) else spec)
)
def test_adapters_keep_the_contract(check: Check) -> None:
    check()


def test_an_adapter_of_ours_opens_with_plain_peft(tmp_path: Path) -> None:
    backbone = LagLlamaBackbone.from_checkpoint(NANO, prediction_length=8)
    batch = make_batch(backbone)
    adapter = gluonts_peft.get_adapter("lora", r=4).attach(backbone)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05)
    adapter.save(tmp_path)
    plain = LagLlamaBackbone.from_checkpoint(NANO, prediction_length=8)
    PeftModel.from_pretrained(plain.network, str(tmp_path))

    assert not torch.equal(loss(backbone, batch), loss(nano(), batch))
    torch.testing.assert_close(loss(plain, batch), loss(backbone, batch), rtol=1e-5, atol=1e-5)


def test_zero_shot_beats_the_last_value_on_series_with_a_level_of_their_own() -> None:
    from gluonts_peft.backtesting import SeasonalNaive

    dataset = make_dataset(20, 72)
    model = LagLlamaEstimator(prediction_length=8, adapter="none", progress=False).train(dataset)
    scores = [gluonts_peft.backtest(each, dataset, windows=1)["MAE[0.5]"].iloc[0] for each in (model, SeasonalNaive(8))]

    assert scores[0] < 0.95 * scores[1]


def test_training_helps_on_series_unlike_those_of_the_pretraining(tmp_path: Path) -> None:
    """A saw of period 5, which no synthetic series of the pretraining is made of."""
    start = pd.Period("2024-01-01 00:00", freq="h")
    rng = np.random.default_rng(0)
    saw = np.arange(120) % 5
    dataset = [
        {"item_id": str(i), "start": start, "target": (60 + 4.0 * np.roll(saw, i) + rng.normal(0, 0.3, 120))}
        for i in range(12)
    ]
    estimator = LagLlamaEstimator(
        prediction_length=8,
        adapter="lora",
        max_epochs=3,
        num_batches_per_epoch=20,
        batch_size=16,
        progress=False,
        backbone_options={"num_samples": 20},
    )
    predictor = estimator.train(dataset)
    assert predictor.gate is not None
    assert predictor.gate.zero_shot is not None
    assert predictor.gate.tuned < predictor.gate.zero_shot - 0.1

    predictor.serialize(tmp_path / "stored")
    again = Predictor.deserialize(tmp_path / "stored")
    for left, right in zip(predictor.predict(dataset), again.predict(dataset), strict=True):
        assert left.samples.shape == (20, 8)
        assert np.array_equal(left.samples, right.samples)
        assert left.start_date == start + 120
    predictor.export(tmp_path / "exported")
    merged = LagLlamaBackbone.from_checkpoint(tmp_path / "exported", prediction_length=8)
    assert not torch.equal(loss(merged, make_batch(merged)), loss(nano(), make_batch(merged)))


def test_estimators_of_any_frequency_take_the_checkpoint() -> None:
    for freq in ("D", "15min", "M"):
        start = pd.Period("2020-01-01", freq=freq)
        dataset = [{"start": start, "target": np.sin(np.arange(60.0)) + 5}]
        predictor = LagLlamaEstimator(prediction_length=3, adapter="none", progress=False).train(dataset)
        (found,) = predictor.predict(dataset, num_samples=4)
        assert found.samples.shape == (4, 3)
        assert np.isfinite(found.samples).all()


def test_each_checkpoint_is_named_in_the_registry() -> None:
    backbone = gluonts_peft.load_backbone("lag-llama", prediction_length=3)

    assert backbone.source.checkpoint == NANO
    assert list(LagLlamaBackbone.bundled()) == [NANO]
