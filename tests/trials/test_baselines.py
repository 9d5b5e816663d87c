from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from gluonts_peft.predictor import PeftPredictor
from gluonts_peft.series.windows import Windows
from gluonts_peft.trials import TrialSpec, run_trial
from gluonts_peft.trials.baselines import BaselineBackbone, BaselineEstimator, _filled
from gluonts_peft.trials.baselinespec import TRAINED

DATA = {"patients": 10, "hours": 8, "vital": "hr", "windows": 1}
TRAINING = {"max_epochs": 1, "num_batches_per_epoch": 2, "batch_size": 4, "device": "cpu"}


def spec(name: str, **changes: Any) -> TrialSpec:
    form = {"family": "baseline", "checkpoint": name, "adapter": "none", "prediction_length": 6, "context_length": 24}
    return TrialSpec(**{**form, "training": TRAINING, "data": DATA, **changes})


def build(name: str, prediction_length: int = 36, context_length: int = 72, **options: Any) -> BaselineBackbone:
    estimator = BaselineEstimator(
        prediction_length=prediction_length, context_length=context_length, checkpoint=name, backbone_options=options
    )
    backbone = estimator.load_backbone()
    assert isinstance(backbone, BaselineBackbone)
    return backbone


def count(backbone: BaselineBackbone) -> int:
    return sum(parameter.numel() for parameter in backbone.network.parameters())


def test_the_n_hits_has_680680_parameters() -> None:
    """The sum that gives the figure, written out: pooled history in, three layers, coarse backcast and forecast out."""
    total = 0
    for pool, coarse in ((36, 18), (10, 6), (3, 2), (1, 1)):
        widths = [-(-72 // pool), 128, 128, 128, 72 // coarse + 36 // coarse]
        total += 4 * sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))
    assert total == 680_680
    assert count(build("nhits")) == total
    assert count(build("nhits", layer_width=64)) < total / 3


@pytest.mark.parametrize("name", TRAINED)
def test_a_baseline_trains_and_is_scored_as_any_trial(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    result = run_trial(spec(name), tmp_path / "trial")
    assert result.status == "finished"
    assert (result.epochs, result.steps, result.learning_rate, result.gate) == (1, 2, 1e-3, None)
    assert result.trainable_parameters == count(build(name, 6, 24, freq="5min"))
    assert result.counts["windows"] == 2
    assert all(value is not None and np.isfinite(value) for value in result.scores.values())
    assert ("neuralforecast" in result.versions) is (name in ("nbeats", "nhits"))
    # Neither Lightning's logs nor anything else, here or there.
    assert list(elsewhere.iterdir()) == []
    files = sorted(path.name for path in (tmp_path / "trial").iterdir())
    assert files == ["examples.json", "result.json", "windows.parquet"]
    # A point, an interval, or paths.
    point = result.scores["coverage[0.1]"] == result.scores["coverage[0.9]"]
    assert point is (name in ("nbeats", "nhits"))


@pytest.mark.parametrize("name", ["simple_feedforward", "deepar", "nhits"])
def test_the_same_seed_gives_the_same_scores(name: str, tmp_path: Path) -> None:
    one, same, other = (
        run_trial(spec(name, seed=seed), tmp_path / place).scores for seed, place in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert one == same
    assert one != other


def test_baselines_and_adapters_train_on_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Any]] = {"": []}
    sample = Windows.sample

    def remember(self: Windows, step: int, batch_size: int) -> Any:
        batch = sample(self, step, batch_size)
        seen[""].append(batch["future_target"])
        return batch

    monkeypatch.setattr(Windows, "sample", remember)
    for name in ("nhits", "deepar", "lora"):
        adapted = {"family": "chronos", "checkpoint": "bolt-nano", "adapter": "lora"} if name == "lora" else {}
        run_trial(spec(name, **adapted), tmp_path / name)
        seen[name], seen[""] = seen[""], []
    assert len(seen["lora"]) == 2
    for name in ("nhits", "deepar"):
        assert all(np.array_equal(one, other) for one, other in zip(seen[name], seen["lora"], strict=True))


@pytest.mark.parametrize("name", ["simple_feedforward", "nhits"])
def test_training_makes_them_better_than_the_last_value(name: str) -> None:
    steps = np.arange(200)
    data = [
        {
            "item_id": str(number),
            "start": pd.Period("2024-01-01", freq="h"),
            "target": (50 + 10 * np.sin(2 * np.pi * (steps + number) / 12)).astype(np.float32),
        }
        for number in range(12)
    ]
    estimator = BaselineEstimator(
        prediction_length=6, context_length=24, checkpoint=name, adapter="full", learning_rate=3e-3, max_epochs=4,
        num_batches_per_epoch=40, progress=False, gate="keep", device="cpu",
    )  # fmt: skip
    predictor = estimator.train(data)
    history = [{**entry, "target": entry["target"][:-6]} for entry in data]
    errors = [
        np.abs(forecast.quantile(0.5) - entry["target"][-6:]).mean()
        for forecast, entry in zip(predictor.predict(history), data, strict=True)
    ]
    last = [np.abs(entry["target"][-7] - entry["target"][-6:]).mean() for entry in data]
    assert np.mean(errors) < 0.5 * np.mean(last)


def test_forecasts_are_those_of_gluonts() -> None:
    """The same network in GluonTS's own predictor: quantiles of TFT equal, of PatchTST those of many samples."""
    from gluonts.torch import PatchTSTEstimator, TemporalFusionTransformerEstimator

    rng = np.random.default_rng(0)
    entry = {
        "item_id": "x",
        "start": pd.Period("2024-01-01", freq="h"),
        "target": (80 + rng.normal(0, 5, 24)).astype(np.float32),
    }
    for name, theirs in (
        ("tft", TemporalFusionTransformerEstimator(freq="h", prediction_length=6, context_length=24)),
        ("patch_tst", PatchTSTEstimator(prediction_length=6, context_length=24, patch_len=16)),
    ):
        backbone = build(name, 6, 24)
        module = theirs.create_lightning_module()
        module.model.load_state_dict(backbone.network.state_dict())
        reference = theirs.create_predictor(theirs.create_transformation(), module.eval())
        (expected,) = (
            reference.predict([entry], num_samples=20_000) if name == "patch_tst" else reference.predict([entry])
        )
        (forecast,) = PeftPredictor(backbone, device="cpu").predict([entry])
        for level in (0.1, 0.5, 0.9):
            tolerance = {"rel": 1e-5} if name == "tft" else {"rel": 0.1, "abs": 0.5}
            assert forecast.quantile(level) == pytest.approx(expected.quantile(level), **tolerance), (name, level)


def test_missing_values_are_the_last_value_before() -> None:
    rng = np.random.default_rng(0)
    values, observed = rng.normal(size=(5, 12)).astype(np.float32), (rng.random((5, 12)) < 0.5).astype(np.float32)
    observed[0], observed[1, :4] = 0.0, 0.0
    found = _filled(torch.tensor(values), torch.tensor(observed)).numpy()
    for row, seen, got in zip(values, observed, found, strict=True):
        known = np.flatnonzero(seen)
        for step in range(12):
            before = known[known <= step]
            if len(known):
                assert got[step] == row[before[-1] if len(before) else known[0]]


@pytest.mark.parametrize("name", ["simple_feedforward", "nhits", "deepar", "patch_tst", "tft"])
def test_what_is_missing_has_no_influence(name: str, make_batch: Callable[..., dict[str, torch.Tensor]]) -> None:
    backbone = build(name, 8, 48)
    batch = make_batch(missing=0.3)
    if backbone.time_features:
        batch["time_feat"] = torch.zeros(4, 56, len(backbone.time_features))
    other = {**batch, "past_target": torch.where(batch["past_observed_values"] > 0, batch["past_target"], 0.0)}
    with backbone.inference():
        assert torch.isfinite(backbone.loss(batch)).all()
        assert torch.equal(backbone.loss(batch), backbone.loss(other))
        shorter = {
            name: value[:, 10:] if name.startswith(("past_", "time")) else value for name, value in batch.items()
        }
        assert torch.isfinite(backbone.loss(shorter)).all()


def test_building_one_leaves_randomness_and_environment_alone() -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    expected = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), dict(os.environ)  # type: ignore[index, union-attr]  # noqa: NPY002
    build("nhits")
    build("deepar")
    assert random.getstate() == expected[0]
    assert np.random.get_state()[1].tolist() == expected[1]  # type: ignore[index, union-attr]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), expected[2])
    assert dict(os.environ) == expected[3]


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "neuralforecast", None)
    with pytest.raises(ImportError, match=r"need neuralforecast .*; install gluonts-peft\[baselines\]$"):
        run_trial(spec("nhits"), tmp_path / "trial")
    assert not (tmp_path / "trial" / "result.json").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deepar", {"hidden_sise": 8}, "^baseline 'deepar': option 'hidden_sise' is unknown; did you mean 'hidden_si"),
        ("tft", {"lr": 1.0}, "^baseline 'tft': option 'lr' is unknown"),
        ("nhits", {"num_layers": 1}, "^baseline 'nhits': options {'num_layers': 1} are too small"),
        ("nbeat", {}, "^baseline 'nbeat' is unknown; did you mean 'nbeats'"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)


def test_options_of_a_network_have_the_names_of_its_library() -> None:
    assert count(build("deepar", hidden_size=8)) < count(build("deepar"))
    assert count(build("nbeats", mlp_units=[[16, 16]] * 3)) < 0.1 * count(build("nbeats"))
    with pytest.raises(ValueError, match="^baseline 'tft' has no context_length of its own; name one$"):
        BaselineEstimator(prediction_length=6, checkpoint="tft").load_backbone()
