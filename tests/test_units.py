"""Numbers of any scale and level: f(s x + c) = s f(x) + c as each family declares, and nothing that is not finite."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gluonts_peft import load_backbone
from gluonts_peft.adapters.base import AdapterError
from gluonts_peft.adapters.load import get_adapter, load_adapter
from gluonts_peft.anomaly import score
from gluonts_peft.backbone import Backbone, Trajectories
from gluonts_peft.backtesting import backtest
from gluonts_peft.checkpoint import CheckpointError
from gluonts_peft.imputation import impute
from gluonts_peft.objectives import reconstruction_loss
from gluonts_peft.predictor import PeftPredictor
from gluonts_peft.registry import get_estimator
from gluonts_peft.series.table import read_dataset, write_forecasts
from gluonts_peft.testing import make_batch
from gluonts_peft.units import EQUIVARIANCE, Units, refuse_nonfinite, to_units

HORIZON, LENGTH = 6, 96
# What may differ, in standard deviations of the series.
CLOSE = 1e-3

NETWORKS = {
    "bolt-nano": ("chronos", "affine"),
    "chronos2-nano": ("chronos", "affine"),
    "moment-nano": ("moment", "affine"),
    # Of whole patches without gaps; else level counts, as in uni2ts, which fills patches up with zeros.
    "moirai-nano": ("moirai", "affine"),
    "t5-nano": ("chronos", "scale"),
    "lag-llama-nano": ("lag-llama", "none"),
}


@lru_cache
def backbone(name: str) -> Backbone:
    context = 32 if name == "lag-llama-nano" else 48
    found = load_backbone(NETWORKS[name][0], checkpoint=name, prediction_length=HORIZON, context_length=context)
    if name == "moment-nano":
        generator = torch.Generator().manual_seed(0)
        head: Any = found.network.forecast_head
        head.linear.weight.data = 0.02 * torch.randn(head.linear.weight.shape, generator=generator)
        found.untrained = ()
    return found


def series(seed: int = 0, missing: bool = True) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    time, start = np.arange(LENGTH), pd.Period("2024-01-01", freq="h")
    targets = [
        20 * level + 5 * np.sin(time / 4 + level) + rng.normal(size=LENGTH).cumsum() / 4 + rng.normal(size=LENGTH)
        for level in range(3)
    ]
    if missing:
        targets[1][70:76] = targets[2][20] = np.nan
    return [{"item_id": f"s{i}", "start": start, "target": target} for i, target in enumerate(targets)]


def moved(dataset: list[dict[str, Any]], scale: float, shift: float) -> list[dict[str, Any]]:
    """s x + c, with the shift in standard deviations of each series."""
    return [{**entry, "target": scale * entry["target"] + shift * scale * deviation(entry)} for entry in dataset]


def deviation(entry: dict[str, Any]) -> float:
    return float(np.nanstd(entry["target"]))


def undone(values: np.ndarray, entry: dict[str, Any], scale: float, shift: float) -> np.ndarray:
    """What was said of s x + c, in standard deviations of x."""
    return np.asarray(values, np.float64) / scale / deviation(entry) - shift


def forecasts(name: str, dataset: list[dict[str, Any]], scale: float, shift: float) -> np.ndarray:
    predictor = PeftPredictor(backbone(name), device="cpu")
    found = predictor.predict(moved(dataset, scale, shift), num_samples=8)
    arrays = [f.samples if hasattr(f, "samples") else f.forecast_array for f in found]
    return np.stack([undone(a, e, scale, shift) for a, e in zip(arrays, dataset, strict=True)])


def scores(name: str, dataset: list[dict[str, Any]], scale: float, shift: float) -> np.ndarray:
    options: dict[str, Any] = {} if name == "moment-nano" else {"num_samples": 8}
    return np.stack([s.values for s in score(backbone(name), moved(dataset, scale, shift), stride=HORIZON, **options)])


def imputed(name: str, dataset: list[dict[str, Any]], scale: float, shift: float) -> np.ndarray:
    given = moved(dataset, scale, shift)
    filled = impute(backbone(name), given)
    for before, after in zip(given, filled, strict=True):
        seen = ~np.isnan(before["target"])
        assert before["target"][seen].tobytes() == after["target"][seen].tobytes()
        assert not np.isnan(after["target"]).any()
    return np.stack([undone(f["target"], e, scale, shift) for f, e in zip(filled, dataset, strict=True)])


scales = st.floats(-9, 12).map(lambda power: 10.0**power)
shifts = st.one_of(
    st.floats(-1e9, 1e9),
    st.floats(0, 9).map(lambda power: 10.0**power),
    st.floats(0, 9).map(lambda power: -(10.0**power)),
)
far = st.floats(4, 9).map(lambda power: 10.0**power)


def check(answer: Callable[..., np.ndarray], name: str, promise: str, dataset: Any, data: st.DataObject) -> None:
    """Compare the answer to some s x + c with that to x, or where level or size count with that to another s x + c."""
    first = (1.0, 0.0)
    second = (data.draw(scales), 0.0 if promise == "scale" else data.draw(shifts))
    if promise == "none":
        first, second = (data.draw(scales), data.draw(far)), (data.draw(scales), -data.draw(far))
    elif promise == "scale" and data.draw(st.booleans()):
        first, second = (data.draw(scales), data.draw(far)), (data.draw(scales), data.draw(far))
    expected, found = answer(name, dataset, *first), answer(name, dataset, *second)
    assert np.isfinite(found).any()
    np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=12, derandomize=True, deadline=None)
@given(st.data())
def test_forecasts_follow_scale_and_shift(name: str, data: st.DataObject) -> None:
    check(forecasts, name, NETWORKS[name][1], series(missing=name != "moirai-nano"), data)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=6, derandomize=True, deadline=None)
@given(st.data())
def test_anomaly_scores_follow_scale_and_shift(name: str, data: st.DataObject) -> None:
    # The first histories of a series are no whole patches.
    check(scores, name, "scale" if name == "moirai-nano" else NETWORKS[name][1], series()[:2], data)


@settings(max_examples=12, derandomize=True, deadline=None)
@given(st.data())
def test_filled_gaps_follow_scale_and_shift(data: st.DataObject) -> None:
    check(imputed, "moment-nano", "affine", series(), data)


@pytest.mark.parametrize("scale", [2.0**-30, 1e-9, 1e-3, 0.1, 1e4, 1e12])
def test_tokens_of_t5_are_those_of_any_scale(scale: float) -> None:
    """Not nearly: a single other token makes other paths."""
    expected = forecasts("t5-nano", series(), 1.0, 0.0)
    np.testing.assert_allclose(forecasts("t5-nano", series(), scale, 0.0), expected, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_ordinary_windows_reach_the_network_as_they_are(name: str) -> None:
    model = backbone(name)
    batch = make_batch(model)
    past = {key: value for key, value in batch.items() if not key.startswith("future_")}
    own, units = to_units(batch, model.equivariance)
    assert units is None
    assert all(torch.equal(own[key], batch[key]) and own[key].dtype == batch[key].dtype for key in batch)
    raw: Any = type(model).forecast
    with model.inference():
        expected = raw.__wrapped__(model, past, num_samples=3, generator=torch.Generator().manual_seed(0)).values
        found = model.forecast(past, num_samples=3, generator=torch.Generator().manual_seed(0)).values
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scale", [2.0**-30, 2.0**40])
def test_losses_follow_scale(name: str, scale: float) -> None:
    """A loss is free of units; minus a log density has log(s) more."""
    model = backbone(name)
    shift = 1e12 if model.equivariance == "none" else 0.0
    batch = make_batch(model)
    first, second = (
        {k: (v.double() + shift * s) * s if k.endswith("_target") else v for k, v in batch.items()}
        for s in (1.0, scale)
    )
    if model.equivariance == "none":
        second = {k: (first[k] * scale if k.endswith("_target") else v) for k, v in first.items()}
    for key in ("past", "future"):
        for each in (first, second):
            each[f"{key}_target"] = each[f"{key}_target"] * batch[f"{key}_observed_values"]
    with model.inference():
        expected, found = model.loss(first).double(), model.loss(second).double()
    added = math.log(scale) if model.density else 0.0
    torch.testing.assert_close(found, expected + added, rtol=1e-4, atol=1e-3)


class Recorder(Backbone):
    """Repeats the last value, and keeps the batches that it was given."""

    family = "recorder"
    capabilities = frozenset({"quantiles", "covariates", "multivariate"})
    equivariance = "affine"

    def __init__(self, equivariance: str = "affine", density: bool = False) -> None:
        nn.Module.__init__(self)
        self.network = nn.Linear(1, 1)
        self.seen: list[dict[str, Tensor]] = []
        self.equivariance, self.density = equivariance, density  # type: ignore[misc]

    load_network = from_network = sites = export = None  # type: ignore[assignment]

    def forecast(self, batch: Any, **options: Any) -> Trajectories:
        self.seen.append(dict(batch))
        last = batch["past_target"][:, -1:][:, None].repeat(1, 3, 2, *[1] * (batch["past_target"].ndim - 2))
        return Trajectories(last, (0.1, 0.5, 0.9))

    def loss(self, batch: Any) -> Tensor:
        self.seen.append(dict(batch))
        return (batch["future_target"] * batch["future_observed_values"]).flatten(1).sum(1)


def window(values: Any, mask: Any = None) -> dict[str, Tensor]:
    past = torch.as_tensor(np.atleast_2d(values))
    observed = torch.ones(past.shape) if mask is None else torch.as_tensor(np.atleast_2d(mask)).float()
    return {"past_target": past, "past_observed_values": observed}


@pytest.mark.parametrize("equivariance", EQUIVARIANCE)
@pytest.mark.parametrize("values", [[0.0] * 5, [5.0] * 5, [-1e-30] * 5, [3e38] * 5, [1.7e9 + 3] * 5])
@pytest.mark.parametrize("observed", [5, 1, 0])
def test_windows_without_a_spread_keep_their_value(equivariance: str, values: list[float], observed: int) -> None:
    model = Recorder(equivariance)
    found = model.forecast(window(np.array(values), [0.0] * (5 - observed) + [1.0] * observed)).values
    [seen] = model.seen
    assert seen["past_target"].dtype == torch.float32
    assert seen["past_target"].isfinite().all()
    if observed:
        assert seen["past_target"][:, -observed:].abs().max() <= 2.0**30
        np.testing.assert_allclose(found, values[0], rtol=1e-7)


def test_units_are_of_each_target_and_window_and_seen_in_the_history_alone() -> None:
    rng = np.random.default_rng(0)
    past = rng.normal(size=(2, 40, 3))
    past[0, :, 1] = 1e12 * past[0, :, 1]
    past[1, :, 2] = 1e9 + past[1, :, 2]
    batch = {
        "past_target": torch.as_tensor(past),
        "past_observed_values": torch.ones(2, 40, 3),
        "future_target": torch.full((2, 2, 3), 1e30, dtype=torch.float64),
        "future_observed_values": torch.zeros(2, 2, 3),
    }
    model = Recorder()
    found = model.forecast(batch)
    [seen] = model.seen
    assert found.values.dtype == torch.float64
    np.testing.assert_allclose(found.values, np.broadcast_to(past[:, None, -1:], (2, 3, 2, 3)), rtol=1e-6)
    for row, column in ((0, 0), (0, 2), (1, 0), (1, 1)):
        assert torch.equal(seen["past_target"][row, :, column], torch.as_tensor(past[row, :, column]).float())
    spread = seen["past_target"].std(1, correction=0)
    assert spread.min() > 0.25
    assert spread.max() < 2.0
    # A power of two changes no digit.
    factor = past[0, :, 1] / seen["past_target"][0, :, 1].double().numpy()
    assert np.log2(factor[0]) == pytest.approx(round(np.log2(factor[0])), abs=1e-6)


def test_features_are_counted_in_units_of_their_history() -> None:
    rng = np.random.default_rng(0)
    known, past_only = 1e15 + 1e9 * rng.normal(size=(1, 42, 2)), 1e-9 * rng.normal(size=(1, 40, 1))
    known[..., 1] = np.repeat([0.0, 1.0], [40, 2])
    batch = window(rng.normal(size=40)) | {
        "feat_dynamic_real": torch.as_tensor(known),
        "observed_feat_dynamic_real": torch.ones(1, 42, 2),
        "past_feat_dynamic_real": torch.as_tensor(past_only),
        "past_observed_feat_dynamic_real": torch.ones(1, 40, 1),
    }
    model, other = Recorder(), Recorder("none")
    model.forecast(batch), other.forecast(batch)
    seen = model.seen[0]
    assert 0.5 < seen["feat_dynamic_real"][..., 0].std() < 2.5
    assert seen["feat_dynamic_real"][..., 1].tolist() == known[..., 1].tolist()
    assert 0.5 < seen["past_feat_dynamic_real"].std() < 2.5
    # A network that sees the size of numbers sees that of features.
    assert torch.equal(other.seen[0]["feat_dynamic_real"], batch["feat_dynamic_real"].float())


def test_log_densities_of_several_targets_count_those_with_a_label() -> None:
    batch = {
        "past_target": torch.stack([1e9 * torch.arange(8.0), torch.arange(8.0)], -1)[None].double(),
        "past_observed_values": torch.ones(1, 8, 2),
        "future_target": torch.zeros(1, 2, 2, dtype=torch.float64),
        "future_observed_values": torch.zeros(1, 2, 2),
    }
    model, plain = Recorder(density=True), Recorder()
    assert model.loss(batch) == plain.loss(batch) == 0
    batch["future_observed_values"][0, 0, 0] = 1.0
    # A spread of 2.29e9, brought to one from 1 to 2 by 2 ** 31; the other target is ordinary.
    assert (model.loss(batch) - plain.loss(batch)).item() == pytest.approx(31 * math.log(2) / 2)


def test_values_come_back_as_float64_only_where_float32_cannot_hold_them() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    values = torch.tensor([[[0.1, 0.2]]])
    assert Units(0 * one, 2.0**30 * one, wide=False).back(values, paths=True).dtype == torch.float32
    assert Units(1e9 * one, one, wide=True).back(values, paths=True).tolist() == [
        [[1e9 + v for v in values[0, 0].tolist()]]
    ]


def small(values: np.ndarray) -> list[dict[str, Any]]:
    start = pd.Period("2024-01-01", freq="h")
    return [
        {"item_id": "plain", "start": start, "target": np.sin(np.arange(60.0))},
        {"item_id": "x", "start": start, "target": values},
    ]


def test_a_counter_is_filled_between_its_neighbours() -> None:
    counter = 1.7e9 + 3.0 * np.arange(120)
    given = np.where(np.isin(np.arange(120), [50, 51, 90]), np.nan, counter)
    [_, found] = impute(backbone("moment-nano"), small(given))
    assert found["target"][~np.isnan(given)].tolist() == given[~np.isnan(given)].tolist()
    # Bridged within patches that are seen; the network smooths.
    assert np.abs(found["target"] - counter).max() < 30
    assert all(len(repr(value).partition(".")[2]) <= 5 for value in found["target"][np.isnan(given)].tolist())


@pytest.mark.parametrize("name", ["bolt-nano", "t5-nano", "lag-llama-nano"])
@pytest.mark.parametrize("value", [3e38, 1e-30, -3e38])
def test_a_constant_of_any_size_is_forecast(name: str, value: float) -> None:
    found = list(PeftPredictor(backbone(name), device="cpu").predict(small(np.full(60, value)), num_samples=5))
    median = found[1].quantile(0.5)
    assert np.isfinite(median).all()
    np.testing.assert_allclose(median, value, rtol=0.2)


def test_what_is_not_finite_is_refused_by_name() -> None:
    model = load_backbone("chronos", checkpoint="bolt-nano", prediction_length=4, context_length=48)
    model.network.output_patch_embedding.output_layer.weight.data.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="forecast of series 'plain' is not finite"):
        list(PeftPredictor(model, device="cpu").predict(small(np.arange(60.0))))
    with pytest.raises(ValueError, match="forecast of series 'plain' is not finite"):
        score(model, small(np.arange(60.0)))
    moment = load_backbone("moment", prediction_length=4, context_length=48)
    moment.network.head.linear.weight.data.fill_(torch.nan)  # type: ignore[union-attr]
    gap = np.where(np.arange(60) == 30, np.nan, np.arange(60.0))
    with pytest.raises(ValueError, match="reconstruction of series 'x' is not finite"):
        impute(moment, small(gap))
    with pytest.raises(ValueError, match="reconstruction of series 'plain' is not finite"):
        score(moment, small(gap))
    refuse_nonfinite(np.full((2, 3), 3e38, np.float32), str, "sum beyond float32")


@pytest.mark.parametrize(
    ("name", "adapter"), [("bolt-nano", "lora"), ("chronos2-nano", {"name": "head", "kind": "pooling"})]
)
def test_training_on_other_numbers_gives_the_same_adapter(name: str, adapter: Any) -> None:
    def train(scale: float, shift: float) -> PeftPredictor:
        estimator = get_estimator(NETWORKS[name][0])(
            checkpoint=name,
            prediction_length=HORIZON,
            context_length=48,
            adapter=adapter,
            max_epochs=1,
            num_batches_per_epoch=4,
            batch_size=8,
            gate="keep",
            progress=False,
            device="cpu",
        )
        trained: PeftPredictor = estimator.train(moved(series(), scale, shift))
        return trained

    expected, found = train(1.0, 0.0), train(1e-9, 1e8)
    assert expected.gate is not None
    assert found.gate is not None
    assert found.gate.tuned == pytest.approx(expected.gate.tuned, rel=1e-3)
    states = [p.backbone.adapter.state_dict() for p in (expected, found)]  # type: ignore[union-attr]
    assert all((states[0][key] - states[1][key]).abs().max() < 1e-3 for key in states[0])


def test_reconstruction_is_judged_in_ordinary_units() -> None:
    model = backbone("moment-nano")
    batch = make_batch(model)
    other = batch | {"past_target": (1e-9 * batch["past_target"].double() + 1.0) * batch["past_observed_values"]}
    with model.inference():
        expected, found = (
            reconstruction_loss(model, each, generator=torch.Generator().manual_seed(0)) for each in (batch, other)
        )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_merged_and_folded_adapters_are_in_units_too() -> None:
    model = load_backbone("chronos", checkpoint="bolt-nano", prediction_length=HORIZON, context_length=48)
    adapter = get_adapter("lora").attach(model)
    for tensor in adapter.state_dict().values():
        tensor.data.normal_(generator=torch.Generator().manual_seed(0), std=0.05)
    for merge in (False, True):
        if merge:
            adapter.merge()
        with model.inference():
            batch = {k: v for k, v in make_batch(model).items() if k.startswith("past")}
            seen = batch["past_observed_values"]
            shifted = batch | {"past_target": (batch["past_target"].double() * 1e-9 + 1.0) * seen}
            expected, found = model.forecast(batch).values, model.forecast(shifted).values
        torch.testing.assert_close((found - 1.0) / 1e-9, expected.double(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_bases_that_are_not_finite_are_refused_with_file_and_tensor(name: str, value: float, tmp_path: Path) -> None:
    model = copy.deepcopy(backbone(name))
    model.export(tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    for other in tmp_path.glob("*.ckpt"):
        other.unlink()
    tensors = load_file(path)
    largest = max(tensors, key=lambda key: tensors[key].numel() * ("reconstruction" not in key))
    tensors[largest].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors.* tensor '[\w.]+' holds NaN or infinite numbers"):
        type(model).from_checkpoint(tmp_path, prediction_length=HORIZON, context_length=32)


@pytest.mark.parametrize("spec", ["lora", "layernorm", ["vera", "bitfit"], {"name": "head", "kind": "pooling"}])
def test_adapters_that_are_not_finite_are_refused_with_file_and_tensor(spec: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(backbone("bolt-nano"))
    adapter = get_adapter(spec).attach(model)
    next(iter(adapter.state_dict().values())).data.view(-1)[0] = torch.inf
    adapter.save(tmp_path)
    with pytest.raises(AdapterError, match=r"safetensors.* tensor '[\w.]+' holds NaN or infinite numbers"):
        load_adapter(tmp_path, copy.deepcopy(backbone("bolt-nano")))


COUNTER = 1.7e9 + 3.0 * np.arange(120)


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_files_are_read_as_float64_where_float32_would_swallow_changes(ending: str, tmp_path: Path) -> None:
    path, start = tmp_path / f"data.{ending}", pd.Period("2024-01-01", freq="h")
    series_of = {"counter": COUNTER, "decimals": np.round(98.6 + np.sin(np.arange(120)), 1)}
    if ending == "jsonl":
        rows = [
            {"item_id": name, "start": "2024-01-01", "target": values.tolist()} for name, values in series_of.items()
        ]
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        stamps = pd.period_range(start, periods=120, freq="h").to_timestamp()
        table = pd.concat(
            [pd.DataFrame({"item_id": n, "timestamp": stamps, "target": v}) for n, v in series_of.items()]
        )
        table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path)
    counter, decimals = read_dataset(path, freq="h")
    assert (counter["target"].dtype, decimals["target"].dtype) == (np.float64, np.float32)
    assert counter["target"].tolist() == COUNTER.tolist()
    forecast, _ = PeftPredictor(backbone("bolt-nano"), device="cpu").predict([counter, decimals])
    median = forecast.quantile(0.5)
    assert np.abs(median - (COUNTER[-1] + 3 * np.arange(1, HORIZON + 1))).max() < 30
    write_forecasts([forecast], tmp_path / "forecasts.csv")
    np.testing.assert_allclose(pd.read_csv(tmp_path / "forecasts.csv")["0.5"], median, rtol=1e-15)


def test_backtests_score_what_lies_far_from_zero() -> None:
    predictor = PeftPredictor(backbone("chronos2-nano"), device="cpu")
    near, far_off = (
        backtest(predictor, moved(series(missing=False), 1.0, shift), windows=2, seasonality=1) for shift in (0.0, 1e9)
    )
    # All but those that divide by the size of the labels.
    kept = [name for name in near if name not in ("MAPE[0.5]", "mean_weighted_sum_quantile_loss")]
    assert len(kept) == 14
    np.testing.assert_allclose(far_off[kept], near[kept], rtol=1e-3)


def test_covariates_of_any_scale_and_level_give_the_same_forecast() -> None:
    model = backbone("chronos2-nano")
    batch = {k: v for k, v in make_batch(model, features=True).items() if not k.startswith("future_")}
    names = ("feat_dynamic_real", "past_feat_dynamic_real")
    other = {
        k: (v.double() * 1e-9 + 1.0) * batch[k.replace("feat", "observed_feat")] if k in names else v
        for k, v in batch.items()
    }
    with model.inference():
        expected, found = model.forecast(batch).values, model.forecast(other).values
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["chronos2-nano", "moirai-nano"])
def test_each_dimension_has_its_own_scale_and_level(name: str) -> None:
    start = pd.Period("2024-01-01", freq="h")
    target = np.stack([entry["target"] for entry in series(missing=False)])
    scale, shift = np.array([[1e-9], [1.0], [1e12]]), np.array([[0.0], [1e9], [1e20]])
    expected, found = (
        next(iter(PeftPredictor(backbone(name), device="cpu").predict([{"item_id": "a", "start": start, "target": t}])))
        for t in (target, scale * target + shift)
    )
    difference = (found.forecast_array - shift.T) / scale.T - expected.forecast_array
    assert difference.shape == (len(expected.forecast_keys), HORIZON, 3)
    assert np.abs(difference / target.std(1)).max() < CLOSE
