"""Heads that take the place of a model's own: shapes, losses, the gate, and features that are computed once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import gluonts_peft
import gluonts_peft.features
from gluonts_peft import PeftPredictor, SeriesStore, Windows, get_adapter, get_estimator
from gluonts_peft.adapters.base import AdapterError
from gluonts_peft.backbone import Backbone, Source, Trajectories
from gluonts_peft.checkpoint_io import read_checkpoint
from gluonts_peft.features import FeatureCache
from gluonts_peft.heads import KINDS, LEVELS, Head, forecast_error, standardise
from gluonts_peft.testing import Check, adapter_checks, parametrize_with_checks
from gluonts_peft.testing.cases import label_of

Batches = Callable[..., dict[str, Tensor]]


@cache
def base(family: str, checkpoint: str | None = None) -> Backbone:
    return gluonts_peft.load_backbone(family, checkpoint=checkpoint, prediction_length=8, context_length=48)


def fresh(family: str, checkpoint: str | None = None) -> Backbone:
    return deepcopy(base(family, checkpoint))


def make_dataset(count: int = 8, length: int = 120) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    steps = np.arange(length)
    start = pd.Period("2024-01-01", freq="h")
    return [
        {
            "item_id": f"s{i}",
            "start": start,
            "target": (20 + 3 * np.sin(steps / 4 + i) + generator.standard_normal(length)).astype(np.float32),
        }
        for i in range(count)
    ]


def train(family: str, adapter: Any, data: Any = None, **options: Any) -> PeftPredictor:
    defaults: dict[str, Any] = dict(
        prediction_length=8,
        context_length=48,
        max_epochs=3,
        num_batches_per_epoch=5,
        batch_size=8,
        gate="keep",
        progress=False,
    )
    estimator = get_estimator(family)(adapter=adapter, **{**defaults, **options})
    predictor: PeftPredictor = estimator.train(make_dataset() if data is None else data)
    return predictor


def losses(predictor: PeftPredictor) -> list[float]:
    assert predictor.fit is not None
    return [epoch[name] for epoch in predictor.fit.history for name in ("train_loss", "val_loss")]


@pytest.mark.parametrize(
    ("kind", "short", "long"),
    [
        ("linear", 4_718_688, 35_390_160),
        ("projection", 442_528, 2_999_056),
        ("decomposition", 443_337, 3_491_830),
        ("truncation", 393_312, 2_949_840),
        ("pooling", 393_312, 2_949_840),
        ("convolution", 248_992, 1_527_568),
    ],
)
def test_parameters_on_moment_base(kind: str, short: int, long: int) -> None:
    counts = []
    for horizon in (96, 720):
        head = Head(kind, patches=64, d_model=768, prediction_length=horizon)
        counts.append(sum(parameter.numel() for parameter in head.parameters()))
        if kind != "linear":
            assert counts[-1] <= 0.1 * {96: 4_718_688, 720: 35_390_160}[horizon]

    assert counts == [short, long]


@pytest.mark.parametrize("output", ["point", "quantile"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_maps_any_features_to_the_horizon(kind: str, output: str) -> None:
    for patches, d_model in ((1, 5), (7, 30), (64, 64)):
        torch.manual_seed(1)
        head = Head(kind, patches=patches, d_model=d_model, prediction_length=11, output=output)
        head.eval()
        features = torch.randn(3, patches, d_model)
        torch.nn.init.normal_(head.last.weight)
        found = head(features)

        assert found.shape == (3, 1 if output == "point" else 9, 11)
        # One linear map of the features: none of the kinds bends them.
        doubled = head(2 * features) - head(torch.zeros_like(features))
        torch.testing.assert_close(doubled, 2 * (found - head(torch.zeros_like(features))), rtol=1e-3, atol=1e-3)


def test_pooling_takes_averages_and_truncation_the_first() -> None:
    features = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    pooled = Head("pooling", patches=3, d_model=8, prediction_length=1, width=2).body(features)
    cut = Head("truncation", patches=3, d_model=8, prediction_length=1, width=2).body(features)

    assert torch.equal(pooled, features.view(2, 3, 2, 4).mean(-1).flatten(1))
    assert torch.equal(cut, features[..., :2].flatten(1))


CASES: list[tuple[str, str | None, Any]] = [
    ("moment", None, {"name": "head", "kind": "convolution", "output": "quantile"}),
    ("moment", None, ["trace", {"name": "head", "kind": "pooling"}]),
    ("chronos", "bolt-nano", {"name": "head", "kind": "linear"}),
    ("chronos", "bolt-nano", ["lora", {"name": "head", "kind": "projection", "output": "quantile"}]),
    ("chronos", "chronos2-nano", {"name": "head", "kind": "decomposition"}),
    ("moirai", None, ["lora", {"name": "head", "kind": "truncation"}]),
]
# A single token is decoded, and the only row of a group looks at itself alone.
WITHOUT_EFFECT = (
    r"decoder\.block\.\d+\.layer\.0\.SelfAttention\.(q|k)\.",
    r"encoder\.block\.\d+\.layer\.1\.self_attention\.(q|k)\.",
)


def checks() -> list[Check]:
    return [
        check
        for family, checkpoint, spec in CASES
        for check in adapter_checks(
            spec,
            lambda family=family, checkpoint=checkpoint: base(family, checkpoint),
            label=f"{checkpoint or family}-{label_of(spec)}",
            without_effect=WITHOUT_EFFECT if checkpoint else (),
        )
    ]


@parametrize_with_checks(checks())
def test_contract(check: Check) -> None:
    check()


@pytest.mark.parametrize("cached", [True, False])
def test_the_linear_head_is_moments_own(cached: bool) -> None:
    """On whole histories, where MOMENT has nothing to fill in, both learn the same and forecast the same."""
    own = train("moment", "head", learning_rate=1e-3, min_context=48)
    new = train("moment", {"name": "head", "kind": "linear", "cache": cached}, learning_rate=1e-3, min_context=48)

    np.testing.assert_allclose(losses(new), losses(own), rtol=1e-4)
    assert own.backbone.adapter.num_parameters() == new.backbone.adapter.num_parameters() == 64 * 64 * 8 + 8
    for left, right in zip(own.predict(make_dataset()), new.predict(make_dataset()), strict=True):
        np.testing.assert_allclose(left.quantile(0.5), right.quantile(0.5), rtol=1e-4)
    # Their losses agree, and yet they are of different kinds to the gate.
    assert (own.fit.gate.measure, new.fit.gate.measure) == ("loss", "forecast error")
    assert own.fit.gate.zero_shot is new.fit.gate.zero_shot is None


@pytest.mark.parametrize("pool", [None, 20])
def test_features_that_are_kept_change_no_number(pool: int | None) -> None:
    spec = {"name": "head", "kind": "projection", "output": "quantile", **({} if pool is None else {"windows": pool})}
    kept, computed = (train("chronos", {**spec, "cache": cache}, learning_rate=0.03) for cache in (True, False))

    np.testing.assert_allclose(losses(kept), losses(computed), rtol=1e-5)
    for name, tensor in kept.backbone.adapter.state_dict().items():
        torch.testing.assert_close(tensor, computed.backbone.adapter.state_dict()[name], rtol=1e-3, atol=1e-5)
    assert losses(kept)[0] > 1.05 * losses(kept)[-1]


def cache_of(backbone: Backbone, **options: Any) -> FeatureCache:
    windows = Windows(SeriesStore.from_dataset(make_dataset()), context_length=48, prediction_length=8, seed=3)
    return FeatureCache(backbone, windows, **{"steps": 10, "batch_size": 8, **options})


def test_windows_are_drawn_as_without_features_or_from_a_pool() -> None:
    backbone = fresh("chronos", "bolt-nano")
    drawn, pooled = cache_of(backbone), cache_of(backbone, pool=30)
    for step in range(10):
        plain = drawn.windows.sample(step, 8)
        batch = drawn.sample(step, 8)
        assert all(np.array_equal(batch[name], plain[name]) for name in plain)
        tensors = {name: torch.as_tensor(value) for name, value in plain.items()}
        with backbone.inference():
            expected = backbone.features(tensors)
        torch.testing.assert_close(torch.as_tensor(batch["features"]), expected, rtol=1e-4, atol=1e-4)
    seen = {row.tobytes() for step in range(40) for row in pooled.sample(step, 8)["future_target"]}

    assert len(drawn) == len({tuple(pair) for step in range(10) for pair in np.stack(drawn.windows.pairs(step, 8), 1)})
    assert 25 < len(seen) == len(pooled) <= 30
    assert not np.array_equal(pooled.sample(0, 8)["features"], pooled.sample(1, 8)["features"])
    np.testing.assert_array_equal(pooled.sample(5, 8)["features"], cache_of(backbone, pool=30).sample(5, 8)["features"])


def test_large_features_go_to_the_named_folder_and_are_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"name": "head", "kind": "pooling"}
    in_memory = train("chronos", spec)
    monkeypatch.setattr(gluonts_peft.features, "_TO_DISK", 100)
    seen = []
    sample = FeatureCache.sample

    def spy(self: FeatureCache, step: int, batch_size: int) -> Any:
        seen.append((tmp_path / "features.npy").stat().st_size)
        return sample(self, step, batch_size)

    monkeypatch.setattr(FeatureCache, "sample", spy)
    on_disk = train("chronos", spec, folder=str(tmp_path))

    # Three patches and the state of the decoder, of 80 numbers each.
    assert len(set(seen)) == 1
    assert 100 * 3 * 80 * 4 < seen[0] < 121 * 4 * 80 * 4
    assert not (tmp_path / "features.npy").exists()
    assert losses(on_disk) == losses(in_memory)
    assert (
        read_checkpoint(tmp_path / "last.ckpt")["state_dict"].keys() == in_memory.backbone.adapter.state_dict().keys()
    )
    monkeypatch.setattr(gluonts_peft.features, "_IN_MEMORY", 100)
    with pytest.raises(ValueError, match="name a folder to keep them in, or give the head fewer `windows`, or cache"):
        train("chronos", spec)


def test_a_step_on_kept_features_is_many_times_as_fast_as_one_through_the_backbone() -> None:
    """A random network of the size of MOMENT-small's half; both sides in turns, the fastest turn of each counts."""
    from gluonts_peft_moment import MomentBackbone
    from gluonts_peft_moment.network import MomentNetwork

    config = deepcopy(base("moment").network.config)
    config["t5_config"] |= {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 4, "num_heads": 4}
    source = Source("moment", "random", "memory", None, "0" * 64)
    torch.manual_seed(0)
    backbone = MomentBackbone.from_network(MomentNetwork(config), prediction_length=24, source=source)
    adapter = get_adapter({"name": "head", "kind": "projection"}).attach(backbone)
    windows = Windows(SeriesStore.from_dataset(make_dataset(2, 700)), context_length=512, prediction_length=24)
    cache = FeatureCache(backbone, windows, steps=3, batch_size=8)
    optimizer = torch.optim.AdamW(adapter.parameters())

    def seconds(source: Any) -> float:
        start = time.process_time()
        for step in range(3):
            batch = {name: torch.as_tensor(value) for name, value in source.sample(step, 8).items()}
            backbone.loss(batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - start

    best = dict.fromkeys(("kept", "computed"), math.inf)
    for _ in range(4):
        best["kept"] = min(best["kept"], seconds(cache))
        best["computed"] = min(best["computed"], seconds(windows))

    assert best["computed"] / best["kept"] > 3


def test_an_untrained_head_refuses_to_forecast(make_batch: Batches) -> None:
    backbone = fresh("chronos", "bolt-nano")
    own = backbone.forecast(make_batch()).values
    adapter = get_adapter({"name": "head", "kind": "linear"}).attach(backbone)
    with pytest.raises(ValueError, match="the new forecasting head is not trained: there is nothing to forecast with"):
        backbone.forecast(make_batch())
    with pytest.raises(ValueError, match="not trained"):
        next(PeftPredictor(backbone).predict(make_dataset()))
    adapter.detach()
    assert type(backbone) is type(base("chronos", "bolt-nano"))
    assert torch.equal(backbone.forecast(make_batch()).values, own)


def test_quantiles_are_in_order_and_points_have_no_spread(make_batch: Batches) -> None:
    for output in ("point", "quantile"):
        backbone = fresh("moment")
        adapter: Any = get_adapter({"name": "head", "kind": "pooling", "output": output}).attach(backbone)
        torch.nn.init.normal_(adapter.head.last.weight)
        found = backbone.eval().forecast(make_batch())
        assert found.values.shape == (4, 9, 8)
        assert found.levels == LEVELS
        spread = found.values.diff(dim=1)
        assert bool((spread == 0).all()) == (output == "point")
        assert bool((spread >= 0).all())


def test_the_losses_are_those_of_their_definition(make_batch: Batches) -> None:
    batch = make_batch(missing=0.3)
    whole = np.concatenate([batch["past_target"], batch["future_target"]], 1)
    seen = np.concatenate([batch["past_observed_values"], batch["future_observed_values"]], 1) > 0
    for output in ("point", "quantile"):
        torch.manual_seed(0)
        head = Head("linear", patches=3, d_model=4, prediction_length=8, output=output).eval()
        torch.nn.init.normal_(head.last.weight, std=0.3)
        features = torch.randn(4, 3, 4)
        predicted = head.predict(features, batch).detach().numpy()
        expected = []
        for row in range(4):
            label, observed = batch["future_target"][row].numpy(), batch["future_observed_values"][row].numpy() > 0
            error = (label - predicted[row])[:, observed] / (whole[row][seen[row]].std() + 1e-5)
            levels = np.array(head.levels)[:, None]
            pinball = 2 * np.maximum(levels * error, (levels - 1) * error)
            expected.append((error**2).mean() if output == "point" else pinball.mean())
        np.testing.assert_allclose(head.loss(features, batch).detach(), expected, rtol=1e-4)
    short = {**batch, "future_target": batch["future_target"][:, :3]}
    short["future_observed_values"] = batch["future_observed_values"][:, :3]
    assert head.loss(features, short).shape == (4,)


def test_standardising_looks_at_what_was_observed() -> None:
    values = torch.tensor([[1.0, 99.0, 3.0], [5.0, 5.0, 5.0]])
    observed = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    mean, deviation = standardise(values * observed, observed)

    assert mean.tolist() == [[2.0], [5.0]]
    np.testing.assert_allclose(deviation, [[1.00001], [0.00001]], rtol=1e-5)


class Fixed:
    """Forecasts what it was given."""

    def __init__(self, values: Tensor, levels: tuple[float, ...] | None) -> None:
        self.found = Trajectories(values, levels)
        self.device = torch.device("cpu")

    def reading(self) -> Any:
        return nullcontext(self)

    def forecast(self, batch: Any, **_: Any) -> Trajectories:
        assert not any(name.startswith("future_") for name in batch)
        return self.found


def test_the_gate_scores_forecasts_of_all_kinds_alike(make_batch: Batches) -> None:
    """Sample paths, and quantiles at other levels, of one distribution."""
    batch = {name: value.numpy() for name, value in make_batch(missing=0.0).items()}
    normal = torch.distributions.Normal(50.0, 10.0)
    torch.manual_seed(0)
    samples = normal.sample((4, 20_000, 8))
    dense = tuple(round(0.01 * k, 2) for k in range(1, 100))
    sparse = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

    def at(levels: tuple[float, ...]) -> Tensor:
        return normal.icdf(torch.tensor(levels))[None, :, None].expand(4, -1, 8)

    for levels in ((0.5,), LEVELS):
        scores = [
            forecast_error(model, [batch], levels)  # type: ignore[arg-type]
            for model in (Fixed(samples, None), Fixed(at(dense), dense), Fixed(at(sparse), sparse))
        ]
        assert scores == pytest.approx([scores[0]] * 3, rel=0.01)
    # At the median it is the absolute error.
    whole = np.concatenate([batch["past_target"], batch["future_target"]], 1).std(1, keepdims=True) + 1e-5
    expected = (np.abs(batch["future_target"] - 50.0) / whole).mean()
    assert forecast_error(Fixed(at(sparse), sparse), [batch], (0.5,)) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]
    between = forecast_error(Fixed(at((0.4, 0.6)), (0.4, 0.6)), [batch], (0.5,))  # type: ignore[arg-type]
    assert between == pytest.approx(expected, rel=1e-5)


def test_the_gate_compares_forecasts_where_the_losses_differ_in_kind() -> None:
    """Bolt's own loss is a sum over the horizon; that of a head is a mean."""
    data = make_dataset()
    predictor = train("chronos", {"name": "head", "kind": "linear", "output": "quantile"}, data, learning_rate=1e-5)
    gate = predictor.fit.gate
    windows = Windows(SeriesStore.from_dataset(data), context_length=48, prediction_length=8).last()

    assert gate.zero_shot == pytest.approx(
        forecast_error(fresh("chronos", "bolt-nano"), list(windows), LEVELS), rel=0.05
    )
    assert gate.tuned == pytest.approx(forecast_error(predictor.backbone, list(windows), LEVELS), rel=1e-5)
    # A head that has hardly begun is worse than the pretrained one, and the gate says so.
    assert not gate.passed
    assert "validation forecast error" in str(gate)
    with pytest.warns(gluonts_peft.TuningDidNotHelp):
        kept = train("chronos", {"name": "head", "kind": "linear"}, data, learning_rate=1e-5, gate="fallback")
    assert kept.backbone.adapter is None
    assert len(list(kept.predict(data))) == len(data)


def test_a_head_with_an_adapter_is_stored_and_swapped_as_any_other(tmp_path: Path) -> None:
    data = make_dataset()
    predictor = train("chronos", ["lora", {"name": "head", "kind": "pooling", "output": "quantile"}], data)
    expected = [forecast.forecast_array for forecast in predictor.predict(data)]
    predictor.serialize(tmp_path / "stored")
    again = PeftPredictor.deserialize(tmp_path / "stored")
    other = train("chronos", "bitfit", data, max_epochs=1)
    other.swap(tmp_path / "stored")

    for model in (again, other):
        np.testing.assert_array_equal([forecast.forecast_array for forecast in model.predict(data)], expected)
    assert again.fit.gate == predictor.fit.gate
    assert sorted(path.name for path in (tmp_path / "stored" / "adapter").iterdir()) == [
        "gluonts_peft.json",
        "head",
        "lora",
    ]
    with pytest.raises(AdapterError, match="cannot be merged: its effect is not a change of the weights"):
        predictor.merge()
    with pytest.raises(AdapterError, match="cannot be merged"):
        predictor.export(tmp_path / "exported")


@pytest.mark.parametrize(("family", "checkpoint"), [("moment", None), ("chronos", "bolt-nano")])
def test_a_history_shorter_than_the_context_is_forecast(family: str, checkpoint: str | None) -> None:
    predictor = train(family, {"name": "head", "kind": "linear"}, max_epochs=1)
    short = [{**entry, "target": entry["target"][-20:]} for entry in make_dataset()]
    padded = [
        {**entry, "start": entry["start"] - 28, "target": np.r_[np.full(28, np.nan), entry["target"]]}
        for entry in short
    ]
    for left, right in zip(predictor.predict(short), predictor.predict(padded), strict=True):
        np.testing.assert_allclose(left.forecast_array, right.forecast_array, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "linaer"}, "kind of a head 'linaer' is unknown; did you mean 'linear'? known: convolution, "),
        ({"kind": "linear", "output": "mean"}, "output of a head 'mean' is unknown; known: point, quantile"),
        ({"kind": "pooling", "width": 0}, "width 0 of a head is not a positive whole number"),
        ({"kind": "decomposition", "rank": 1.5}, "rank 1.5 of a head is not a positive whole number"),
        ({"kind": "linear", "windows": -1}, "windows -1 of a head is not a positive whole number"),
        ({"kind": "linear", "dropout": 1.0}, "dropout 1.0 of a head is not a share in [0, 1)"),
        ({"kind": "linear", "depth": 2}, "option 'depth' is unknown; did you mean 'width'? known: cache, dropout, "),
        ({"output": "point"}, "a new head needs its kind, one of linear, projection, decomposition, truncation,"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError) as caught:
        get_adapter({"name": "head", **options})
    assert str(caught.value).startswith(f"adapter 'head': {message}")


@pytest.mark.parametrize(("family", "checkpoint"), [("chronos", "t5-nano"), ("lag-llama", None)])
def test_a_family_without_features_is_refused(family: str, checkpoint: str | None) -> None:
    backbone = fresh(family, checkpoint)
    message = "does not offer them; train the model's own head with adapter 'head', or take a family with the capab"
    with pytest.raises(AdapterError, match=message):
        get_adapter(["lora", {"name": "head", "kind": "linear"}]).attach(backbone)
    assert list(backbone.network.state_dict()) == list(base(family, checkpoint).network.state_dict())


def test_a_width_beyond_the_features_is_refused() -> None:
    backbone = fresh("moment")
    with pytest.raises(AdapterError, match="width 65 of head 'pooling' exceeds the 64 features of a patch"):
        get_adapter({"name": "head", "kind": "pooling", "width": 65}).attach(backbone)
    assert backbone.adapter is None
    assert type(backbone) is type(base("moment"))


def test_several_targets_are_refused(make_batch: Batches) -> None:
    backbone = fresh("chronos", "chronos2-nano")
    get_adapter({"name": "head", "kind": "linear"}).attach(backbone)
    batch = {name: value[..., None].expand(-1, -1, 2) for name, value in make_batch().items()}
    with pytest.raises(ValueError, match="a new head forecasts one target, and these data have 2; give each a series"):
        backbone.loss(batch)
