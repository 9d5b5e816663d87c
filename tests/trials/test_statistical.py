from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gluonts_peft.backtesting import QUANTILE_LEVELS
from gluonts_peft.trials import TrialSpec, run_trial

pytest.importorskip("statsforecast", reason="the extra gluonts-peft[baselines] is not installed")

from gluonts_peft.trials.statistical import StatisticalPredictor

STEPS = np.arange(120)
METHODS = ("auto_ets", "auto_theta")


def entry(target: Any) -> dict[str, Any]:
    return {
        "item_id": "x",
        "start": pd.Period("2024-01-01 00:00", freq="h"),
        "target": np.asarray(target, np.float32),
        "info": {"ward": 3},
    }


def season(steps: Any, level: float = 50.0) -> Any:
    return level + 10 * np.sin(2 * np.pi * steps / 12) + 3 * np.cos(2 * np.pi * steps / 6)


def quantiles(predictor: StatisticalPredictor, target: Any) -> Any:
    (forecast,) = predictor.predict([entry(target)])
    values = np.stack([forecast.quantile(level) for level in QUANTILE_LEVELS])
    assert np.isfinite(values).all()
    assert (np.diff(values, axis=0) >= 0).all()
    return values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("missing", [[], [117, 118, 119], [0, 1, 2]], ids=["complete", "end", "start"])
def test_a_pure_season_goes_on(method: str, missing: list[int]) -> None:
    target = season(STEPS)
    target[missing] = np.nan
    predictor = StatisticalPredictor(20, method, season_length=12)
    values = quantiles(predictor, target)
    assert values == pytest.approx(np.tile(season(np.arange(120, 140)), (9, 1)), abs=1e-3)
    assert not predictor.simpler


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [50.0, 0.0], ids=["positive", "around zero"])
def test_quantiles_are_as_wide_as_the_noise(method: str, level: float) -> None:
    """Season and noise of deviation 1: so is half of what lies between the 0.1587 and 0.8413 quantiles."""
    widths, share = [], []
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(size=132)
        target = season(np.arange(132), level) + noise
        values = quantiles(StatisticalPredictor(12, method, season_length=12), target[:120])
        widths.append((values[8] - values[0]).mean() / (2 * 1.2816))
        share.append(((target[120:] >= values[0]) & (target[120:] <= values[8])).mean())
    assert 0.75 < np.mean(widths) < 1.35
    assert 0.65 < np.mean(share) < 0.93


@pytest.mark.parametrize("method", METHODS)
def test_gaps_are_interpolated_and_what_is_before_the_first_value_is_dropped(method: str) -> None:
    rng = np.random.default_rng(0)
    target = 20 + rng.normal(size=60).cumsum()
    predictor = StatisticalPredictor(6, method)
    filled, holes = target.copy(), target.copy()
    filled[30:33] = np.interp([30, 31, 32], [29, 33], target[[29, 33]].astype(np.float32))
    holes[30:33] = np.nan, np.inf, np.nan
    assert quantiles(predictor, holes) == pytest.approx(quantiles(predictor, filled), rel=1e-5)
    assert np.array_equal(quantiles(predictor, [np.nan] * 9 + list(target)), quantiles(predictor, target))


@pytest.mark.parametrize("method", METHODS)
def test_a_forecast_after_a_gap_is_the_end_of_a_longer_one(method: str) -> None:
    target = 20 + np.random.default_rng(1).normal(size=60).cumsum()
    short = quantiles(StatisticalPredictor(6, method), [*target, *[np.nan] * 4])
    assert np.array_equal(short, quantiles(StatisticalPredictor(10, method), target)[:, 4:])


@pytest.mark.parametrize("method", METHODS)
def test_the_same_series_gives_the_same_numbers(method: str) -> None:
    target = np.random.default_rng(2).gamma(2.0, size=70)
    one, other = (quantiles(StatisticalPredictor(8, method, season_length=7), target) for _ in range(2))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_too_short_for_a_model_is_a_random_walk_and_counted(method: str) -> None:
    predictor = StatisticalPredictor(4, method)
    values = quantiles(predictor, [1.0, 2.0, 4.0, 3.0])
    width = np.sqrt((1 + 4 + 1) / 3)
    assert values[4] == pytest.approx([3.0] * 4)
    assert values[8] == pytest.approx(3 + 1.2815515655446004 * width * np.sqrt([1, 2, 3, 4]))
    assert values[0] == pytest.approx(6 - values[8])
    assert predictor.simpler == {"random_walk": 1}
    # Nothing is simpler than a constant.
    for constant in ([5.0], [5.0] * 40):
        assert np.array_equal(quantiles(predictor, constant), np.full((9, 4), 5.0))
        assert not predictor.simpler


def test_a_season_needs_two_of_them_and_a_method_that_knows_it() -> None:
    target = season(STEPS) + np.random.default_rng(0).normal(size=120)
    for method, length, history, simpler in (
        ("auto_ets", 12, 23, True), ("auto_ets", 12, 24, False), ("auto_ets", 25, 120, True),
        ("auto_ets", 1, 20, False), ("auto_theta", 12, 23, True), ("auto_theta", 12, 24, False),
        ("auto_theta", 48, 120, False), ("auto_theta", 3, 120, True), ("auto_theta", 1, 20, False),
    ):  # fmt: skip
        predictor = StatisticalPredictor(6, method, season_length=length)
        quantiles(predictor, target[:history])
        assert predictor.simpler == ({"without_season": 1} if simpler else {}), (method, length, history)


def test_the_history_is_limited() -> None:
    target = np.random.default_rng(3).normal(size=90).cumsum()
    values = quantiles(StatisticalPredictor(5, "auto_ets", max_history=40), target)
    assert np.array_equal(values, quantiles(StatisticalPredictor(5, "auto_ets"), target[-40:]))
    assert not np.array_equal(values, quantiles(StatisticalPredictor(5, "auto_ets"), target))
    with pytest.raises(
        ValueError, match="^item_id 'x' has no observed value in its last 40 steps; leave the series out"
    ):
        quantiles(StatisticalPredictor(5, "auto_ets", max_history=40), [*target, *[np.nan] * 40])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [[0, 0, 1, 0, 0, 2, 0] * 6, season(STEPS) * 1e-9, -season(STEPS) * 1e9])
def test_zeros_and_tiny_and_huge_numbers_are_forecast(method: str, target: Any) -> None:
    predictor = StatisticalPredictor(6, method, season_length=12)
    values = quantiles(predictor, target)
    assert not predictor.simpler
    assert np.abs(values).max() <= 4 * np.abs(target).max()


def test_forecasts_carry_start_and_names() -> None:
    (forecast,) = StatisticalPredictor(6, "auto_theta").predict([entry(season(STEPS))], num_samples=7)
    assert (str(forecast.start_date), forecast.item_id, forecast.info) == ("2024-01-06 00:00", "x", {"ward": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ets"}, "^method 'ets' is unknown; known: auto_ets, auto_theta$"),
        ({"method": "auto_ets", "model": "ZZX"}, "^baseline 'auto_ets': model 'ZZX' is not error .A, M or Z., trend"),
        (
            {"method": "auto_theta", "model": "OTN"},
            "^baseline 'auto_theta': model 'OTN' is unknown; did you mean 'OTM'",
        ),
        ({"method": "auto_theta", "max_history": 0}, "max_history 0 is not a whole number, 1 or more$"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StatisticalPredictor(6, **arguments)


def test_several_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="^item_id 'x' has 2 dimensions; auto_ets takes one$"):
        quantiles(StatisticalPredictor(6, "auto_ets"), np.ones((2, 30)))


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statsforecast", None)
    with pytest.raises(
        ImportError, match=r"^baseline 'auto_ets' needs statsforecast .*; install gluonts-peft\[baselines\]"
    ):
        StatisticalPredictor(6, "auto_ets")


def test_a_trial_scores_it_and_counts_what_is_simpler(tmp_path: Path) -> None:
    trial = TrialSpec(
        family="baseline", checkpoint="auto_ets", adapter="none", prediction_length=6, context_length=24, seed=3,
        backbone_options={"model": "ANN"}, data={"patients": 10, "hours": 8, "vital": "hr", "windows": 1},
    )  # fmt: skip
    assert (trial.trains, trial.seed, trial.name()) == (False, 0, "auto_ets hr")
    result = run_trial(trial, tmp_path / "trial")
    assert all(value is not None and np.isfinite(value) for value in result.scores.values())
    assert result.scores["coverage[0.1]"] < result.scores["coverage[0.9]"]  # type: ignore[operator]
    # A day of 5 minutes has 288 steps, the stays have 96.
    assert result.counts["simpler_without_season"] == result.counts["windows"] == 2
    assert (result.trainable_parameters, result.seconds, result.device) == (None, None, "cpu")
    assert "statsforecast" in result.versions
