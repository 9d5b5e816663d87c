from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gluonts.model.predictor import Predictor

from gluonts_peft.backtesting import QUANTILE_LEVELS
from gluonts_peft.trials import TrialSpec, run_trial

pytest.importorskip("lightgbm", reason="the extra gluonts-peft[baselines] is not installed")

from gluonts_peft.trials.boosting import LightGBMPredictor, _rows, train_trees

LENGTHS: dict[str, Any] = {"prediction_length": 6, "context_length": 24, "season_length": 12}
OPTIONS = {"num_iterations": 8, "learning_rate": 0.3, "num_leaves": 15, "min_data_in_leaf": 10}


def entry(target: Any, name: str = "x") -> dict[str, Any]:
    start = pd.Period("2024-01-01 00:00", freq="h")
    return {"item_id": name, "start": start, "target": np.asarray(target, np.float32)}


def waves(count: int, steps: int = 80, noise: float = 0.0, scale: float = 1.0) -> list[dict[str, Any]]:
    rng, time = np.random.default_rng(0), np.arange(steps)
    return [
        entry(
            scale * (50 + number + 10 * np.sin(2 * np.pi * (time + number) / 12) + noise * rng.normal(size=steps)),
            str(number),
        )
        for number in range(count)
    ]


def train(data: list[dict[str, Any]], validation: Any = None, **changes: Any) -> LightGBMPredictor:
    options = {**OPTIONS, **changes.pop("options", {})}
    return train_trees(data, validation, **{**LENGTHS, "options": options, **changes})[0]


def quantiles(predictor: Predictor, data: list[dict[str, Any]]) -> Any:
    forecasts = list(predictor.predict(data))
    values = np.stack([[forecast.quantile(level) for level in QUANTILE_LEVELS] for forecast in forecasts])
    assert np.isfinite(values).all()
    assert (np.diff(values, axis=1) >= 0).all()
    return values


@pytest.fixture(scope="module")
def trained() -> LightGBMPredictor:
    return train(waves(8, noise=1.0))


def test_a_season_is_learned_for_series_that_it_has_not_seen() -> None:
    data = waves(12, 92)
    predictor = train(data[:10], options={"num_iterations": 15})
    unseen = [{**each, "target": each["target"][:86]} for each in data[10:]]
    truth = np.stack([each["target"][86:] for each in data[10:]])
    assert np.abs(quantiles(predictor, unseen)[:, 4] - truth).mean() < 0.5
    last = np.stack([each["target"][85:86] for each in data[10:]])
    assert np.abs(last - truth).mean() > 5


def test_quantiles_hold_as_many_labels_as_they_say() -> None:
    rng = np.random.default_rng(0)
    data = [entry(rng.normal(100, 10, 60), str(number)) for number in range(60)]
    predictor = train(data[:40], options={"num_iterations": 20})
    inputs = [{**each, "target": each["target"][:54]} for each in data[40:]]
    labels = np.stack([each["target"][54:] for each in data[40:]])
    values = quantiles(predictor, inputs)
    for number, level in enumerate(QUANTILE_LEVELS):
        assert (labels <= values[:, number]).mean() == pytest.approx(level, abs=0.12)


def test_the_same_seed_gives_the_same_trees_and_another_draws_other_windows() -> None:
    data = waves(4, noise=1.0)
    few = {"num_iterations": 4, "max_rows": 300}
    one, same, other = (train(data, seed=seed, options=few).trees for seed in (1, 1, 2))
    assert one == same
    assert one != other
    # Where all windows are taken, nothing is left to the seed but its number in the text.
    one, other = ([text.partition("\nparameters:")[0] for text in train(data, seed=seed).trees] for seed in (1, 2))
    assert one == other


def test_another_unit_gives_the_same_forecasts_in_that_unit(trained: LightGBMPredictor) -> None:
    larger = train(waves(8, noise=1.0, scale=1024.0))
    assert np.array_equal(quantiles(larger, waves(3, 60, 1.0, 1024.0)), 1024 * quantiles(trained, waves(3, 60, 1.0)))


def test_it_is_stored_as_text_and_gives_the_same_forecasts(trained: LightGBMPredictor, tmp_path: Path) -> None:
    trained.serialize(tmp_path)
    assert all(path.suffix in (".json", ".txt") for path in tmp_path.iterdir())
    again = Predictor.deserialize(tmp_path)
    data = waves(3, 60, 1.0)
    assert np.array_equal(quantiles(again, data), quantiles(trained, data))


def test_missing_values_and_short_histories_are_forecast(trained: LightGBMPredictor) -> None:
    whole = waves(1, 60)[0]["target"]
    holes, end = whole.copy(), whole.copy()
    holes[[40, 47, 48]], end[-5:] = np.nan, np.nan
    flat = np.full(30, 7.0)
    values = quantiles(trained, [entry(part) for part in (whole, holes, end, whole[:3], whole[:1], flat)])
    assert np.abs(values[:3, 4] - values[0, 4]).max() < 12
    assert np.abs(values[5] - 7).max() < 1
    # What lies before the context does not count.
    other = np.concatenate([np.full(36, 1e6), holes[-24:]])
    assert np.array_equal(quantiles(trained, [entry(other)]), quantiles(trained, [entry(holes)]))


@pytest.mark.parametrize("kind", ["other series", "the same series", "none"])
def test_labels_of_the_validation_are_not_trained_on(kind: str) -> None:
    """Trees of a fixed number are the same whatever these labels are; those whose number they decide are not."""
    data, other = waves(4, noise=1.0), waves(4, noise=1.0)
    for each in other:
        each["target"] = np.concatenate([each["target"][:-6], np.zeros(6, np.float32)])
    parts = {
        "other series": ((data[:3], data[3:]), (data[:3], other[3:])),
        "the same series": ((data, data), (other, other)),
        "none": ((data, None), (other, None)),
    }[kind]
    fixed, changed = (train(*part, options={"early_stopping_round": 0, "num_iterations": 3}).trees for part in parts)
    assert fixed == changed
    one, two = (train(*part, options={"early_stopping_round": 1}).leaves for part in parts)
    assert one != two


def test_rows_look_at_the_same_phase_of_earlier_seasons() -> None:
    """Season 3 and 5 steps: written out for a context of 1 to 7, whose second value is missing."""
    past = np.array([[1.0, 0.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    seen = np.array([[1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    rows, loc, scale = _rows({"past_target": past, "past_observed_values": seen}, 8, 5, 3)
    values = np.array([1, 3, 4, 5, 6, 7.0])
    assert (loc[0], scale[0]) == pytest.approx((values.mean(), values.std()))
    unscaled = rows.astype(np.float64) * scale[0] + loc[0]
    recent, means, deviations = unscaled[0, :8], unscaled[0, 8:10], rows[0, 10:12]
    assert recent == pytest.approx([7, 6, 5, 4, 3, np.nan, 1, np.nan], nan_ok=True)
    assert means == pytest.approx([6, 5])
    assert deviations == pytest.approx([np.std([5, 6, 7]) / scale[0], np.std([3, 4, 5, 6, 7]) / scale[0]])
    assert rows[0, 12:16] == pytest.approx([loc[0], scale[0], 6 / 8, 0])
    assert list(rows[:, 16]) == [1, 2, 3, 4, 5]
    # The same phase one and two seasons back, their mean, and the neighbours of the first.
    expected = [[5, np.nan], [6, 3], [7, 4], [5, np.nan], [6, 3]]
    assert unscaled[:, 17:19] == pytest.approx(np.array(expected), nan_ok=True)
    assert unscaled[:, 19] == pytest.approx([5, 4.5, 5.5, 5, 4.5])
    assert unscaled[:, 20:] == pytest.approx(np.array([[4, 6], [5, 7], [6, 5], [4, 6], [5, 7]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_leafs": 3}, "^baseline 'lightgbm': option 'num_leafs' is unknown; did you mean 'num_leaves'"),
        ({"num_leaves": 1}, "^baseline 'lightgbm': num_leaves 1 is not a whole number, 2 or more$"),
        ({"num_leaves": 3.5}, "num_leaves 3.5 is not a whole number"),
        ({"learning_rate": "fast"}, "learning_rate 'fast' is not a number"),
        ({"max_rows": True}, "max_rows True is not a whole number, 1 or more"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(waves(2), options=options)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(
        ImportError, match=r"^baseline 'lightgbm' needs lightgbm .*; install gluonts-peft\[baselines\]$"
    ):
        train(waves(2))


def test_a_trial_trains_it(tmp_path: Path) -> None:
    trial = TrialSpec(
        family="baseline", checkpoint="lightgbm", adapter="none", prediction_length=6, context_length=24,
        backbone_options={**OPTIONS, "max_rows": 2000}, training={"max_epochs": 3, "validation_windows": 2},
        data={"patients": 10, "hours": 8, "vital": "hr", "windows": 1},
    )  # fmt: skip
    # Epochs are nothing to trees.
    assert (trial.trains, trial.training.max_epochs, trial.training.validation_windows) == (True, 10, 2)
    result = run_trial(trial, tmp_path / "trial")
    assert all(value is not None and np.isfinite(value) for value in result.scores.values())
    assert (result.trainable_parameters, result.epochs, result.gate, result.device) == (None, None, None, "cpu")
    assert result.seconds is not None
    assert result.counts["leaves"] > 9
    assert "lightgbm" in result.versions
    files = sorted(path.name for path in (tmp_path / "trial").iterdir())
    assert files == ["examples.json", "result.json", "windows.parquet"]
