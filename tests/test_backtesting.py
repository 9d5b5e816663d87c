from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gluonts.dataset.common import FileDataset
from gluonts.dataset.jsonl import JsonLinesWriter
from gluonts.dataset.pandas import PandasDataset
from gluonts.dataset.split import split
from gluonts.ev.metrics import MAE, MASE, MSE, Coverage
from gluonts.model.evaluation import evaluate_model
from gluonts.model.forecast import QuantileForecast, SampleForecast
from gluonts.model.predictor import Predictor
from gluonts.model.seasonal_naive import SeasonalNaivePredictor

from gluonts_peft.backtesting import QUANTILE_LEVELS, SeasonalNaive, backtest, backtest_both, default_metrics
from gluonts_peft.metrics import DTW, dtw_distance, dtw_path_error
from gluonts_peft.series.entries import UnusableWarning

START = pd.Period("2024-01-01", freq="D")
COLUMNS = [
    "MSE[0.5]",
    "MAE[0.5]",
    "MAPE[0.5]",
    "MASE[0.5]",
    "DTW[0.5]",
    "DTWPathError[0.5]",
    "mean_weighted_sum_quantile_loss",
    *(f"coverage[{q}]" for q in QUANTILE_LEVELS),
]


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def entry(item_id: str | None, target: Any) -> dict[str, Any]:
    named = {} if item_id is None else {"item_id": item_id}
    return {**named, "start": START, "target": np.asarray(target, dtype=np.float32)}


def dataset(count: int = 5, *, length: int = 40) -> list[dict[str, Any]]:
    rng = np.random.default_rng(21)
    return [entry(f"s{i}", 10 + rng.normal(size=length + i)) for i in range(count)]


class Noisy(Predictor):  # type: ignore[misc]
    """Last observed value plus noise drawn from the length of the history; counts how often it is asked."""

    def __init__(self, prediction_length: int, *, quantiles: bool = False) -> None:
        super().__init__(prediction_length=prediction_length)
        self.quantiles = quantiles
        self.calls: list[dict[str, Any]] = []

    def predict(self, dataset: Any, **kwargs: Any) -> Iterator[Any]:
        self.calls.append({**kwargs, "len": len(dataset)})
        for item in dataset:
            length = item["target"].shape[-1]
            last = item["target"][np.isfinite(item["target"])][-1]
            noise = np.random.default_rng(length).normal(size=(kwargs.get("num_samples", 20), self.prediction_length))
            forecast = SampleForecast(last + noise, item["start"] + length, item["item_id"])
            keys = [str(q) for q in QUANTILE_LEVELS]
            yield forecast.to_quantile_forecast(keys) if self.quantiles else forecast


class Fixed(Predictor):  # type: ignore[misc]
    """Yields what it was given."""

    def __init__(self, prediction_length: int, forecasts: list[Any]) -> None:
        super().__init__(prediction_length=prediction_length)
        self.forecasts = forecasts

    def predict(self, dataset: Any, **kwargs: Any) -> Iterator[Any]:
        return iter(self.forecasts)


def by_hand(predictor: Predictor, data: list[dict[str, Any]], windows: int, distance: int) -> pd.DataFrame:
    """Scores of each window, one at a time, with the season of a week; targets without gaps."""
    rows = []
    horizon = predictor.prediction_length
    for item in data:
        for window in reversed(range(windows)):
            end = len(item["target"]) - window * distance
            past, label = item["target"][: end - horizon], item["target"][end - horizon : end]
            (forecast,) = predictor.predict([{**item, "target": past}])
            median = forecast.quantile(0.5)
            error = np.abs(label - median)
            losses = [
                2 * np.sum(np.abs((label - forecast.quantile(q)) * ((forecast.quantile(q) >= label) - q)))
                for q in QUANTILE_LEVELS
            ]
            row = {
                "item_id": item["item_id"],
                "forecast_start": START + (end - horizon),
                "MSE[0.5]": np.mean(error**2),
                "MAE[0.5]": np.mean(error),
                "MAPE[0.5]": np.mean(error / np.abs(label)),
                "MASE[0.5]": np.mean(error) / np.mean(np.abs(past[7:] - past[:-7])),
                "mean_weighted_sum_quantile_loss": np.mean(losses) / np.sum(np.abs(label)),
                "DTW[0.5]": float(dtw_distance(label, median)),
                "DTWPathError[0.5]": float(dtw_path_error(label, median)),
            }
            row |= {f"coverage[{q}]": np.mean(label <= forecast.quantile(q)) for q in QUANTILE_LEVELS}
            row |= {"loss": np.mean(losses), "label": np.sum(np.abs(label))}
            rows.append(row)
    frame: pd.DataFrame = pd.DataFrame(rows).set_index(["item_id", "forecast_start"])
    return frame


@pytest.mark.parametrize("quantiles", [False, True], ids=["samples", "quantiles"])
@pytest.mark.parametrize(("windows", "distance"), [(1, None), (3, None), (3, 2), (2, 9)])
def test_scores_equal_a_loop_by_hand(windows: int, distance: int | None, quantiles: bool) -> None:
    predictor, data = Noisy(4, quantiles=quantiles), dataset()
    expected = by_hand(predictor, data, windows, distance or 4)
    predictor.calls.clear()
    frame = backtest(predictor, data, windows=windows, distance=distance, per_window=True)
    assert list(frame.columns) == COLUMNS
    assert frame.index.names == ["item_id", "forecast_start"]
    pd.testing.assert_frame_equal(frame, expected[COLUMNS], check_dtype=False, rtol=1e-5)
    assert predictor.calls == [{"len": 5 * windows}]

    total = backtest(predictor, data, windows=windows, distance=distance)
    assert total.shape == (1, len(COLUMNS))
    mean = expected[COLUMNS].mean()
    mean["mean_weighted_sum_quantile_loss"] = expected["loss"].sum() / expected["label"].sum()
    np.testing.assert_allclose(total.iloc[0], mean, rtol=1e-5)
    assert total.attrs == {
        "series": 5,
        "windows": 5 * windows,
        "skipped": {"too_short": 0, "all_missing": 0, "nothing_seen": 0, "windows_all_missing": 0},
        "unscaled_windows": 0,
        "seasonless_windows": 0,
    }


@pytest.mark.parametrize("seasonality", [None, 1])
def test_scores_equal_those_of_gluonts(seasonality: int | None) -> None:
    predictor, data = Noisy(4), dataset()
    data[1]["target"][-3:-1] = np.nan
    data[2]["target"][5:9] = np.nan
    test_data = split(data, offset=-8)[1].generate_instances(4, windows=2)
    options: dict[str, Any] = {"metrics": default_metrics(), "seasonality": seasonality}
    # GluonTS says that days have no season.
    theirs: dict[str, Any] = {**options, "seasonality": seasonality or 7}
    expected = evaluate_model(predictor, test_data=test_data, **theirs)
    pd.testing.assert_frame_equal(
        backtest(predictor, data, windows=2, **options), expected.reset_index(drop=True), rtol=1e-12, check_dtype=False
    )
    expected = evaluate_model(predictor, test_data=test_data, axis=1, **theirs)
    actual = backtest(predictor, data, windows=2, per_window=True, **options)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    assert [tuple(row) for row in expected.index] == list(actual.index)


@pytest.mark.parametrize("per_window", [False, True])
def test_numbers_do_not_depend_on_the_batch_size(per_window: bool) -> None:
    data = dataset()
    data[0]["target"][:-4] = 3.0
    data[3]["target"][-2:] = np.nan
    frames = [backtest(Noisy(4), data, windows=2, per_window=per_window, batch_size=b) for b in (1, 3, 100)]
    assert frames[0].attrs == frames[1].attrs == frames[2].attrs
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0], rtol=1e-12)


def test_both_tables_come_of_one_forecast() -> None:
    data, noisy = dataset(), Noisy(4)
    over_all, each = backtest_both(noisy, data, windows=2)
    assert len(noisy.calls) == 1
    pd.testing.assert_frame_equal(over_all, backtest(Noisy(4), data, windows=2))
    pd.testing.assert_frame_equal(each, backtest(Noisy(4), data, windows=2, per_window=True))
    assert over_all.attrs == each.attrs


def test_what_cannot_be_scored_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    good = dataset(2)
    no_history = entry("no-history", [*[np.nan] * 32, *range(8)])
    one_gap = entry("one-gap", [*range(30), *[np.nan] * 4, *range(4)])
    short = [entry("exact", range(8)), entry("shorter", range(3)), entry("empty", [])]
    missing = entry("missing", [*range(30), *[np.nan] * 8])
    data = [short[0], good[0], no_history, missing, short[1], one_gap, good[1], short[2]]
    named = (
        "item_id 'exact' (no observed value before its last 8 steps), item_id 'no-history' (no observed value before"
        " its last 8 steps), item_id 'missing' (no observed value in any window), item_id 'shorter' (no observed value"
        " before its last 8 steps), item_id 'empty' (no observed value before its last 8 steps)"
    )
    with pytest.raises(
        ValueError, match=f"^{re.escape('5 of 8 series cannot be scored: ' + named)}; leave them out, or"
    ):
        backtest(Noisy(4), data, windows=2)
    expected = f"^5 of 8 series are left out, they cannot be scored: {re.escape(named)}$"
    with caplog.at_level(logging.WARNING), pytest.warns(UnusableWarning, match=expected):
        frame = backtest(Noisy(4), data, windows=2, per_window=True, unusable="skip")
    assert frame.attrs["skipped"] == {"too_short": 4, "all_missing": 1, "nothing_seen": 0, "windows_all_missing": 1}
    assert (frame.attrs["series"], frame.attrs["windows"]) == (3, 5)
    assert list(frame.index.get_level_values("item_id")) == ["s0", "s0", "one-gap", "s1", "s1"]
    assert caplog.messages == ["backtest skips 1 windows of the series that it scores: they have no observed value"]
    rest = backtest(Noisy(4), [*good, one_gap], windows=2)
    with pytest.warns(UnusableWarning):
        again = backtest(Noisy(4), data, windows=2, unusable="skip")
    pd.testing.assert_frame_equal(again, rest, rtol=1e-12)
    caplog.clear()
    backtest(Noisy(4), good, windows=2)
    assert caplog.messages == []


def test_one_observed_step_of_history_is_enough() -> None:
    frame = backtest(SeasonalNaive(2), [entry("a", [1, 2, 4])])
    assert frame["MAE[0.5]"].item() == 2.0
    assert np.isnan(frame["MASE[0.5]"].item())
    assert frame.attrs["unscaled_windows"] == 1


def test_a_constant_history_is_left_out_of_mase_and_counted() -> None:
    data = [entry("flat", [5, 5, 5, 5, 7, 8]), entry("up", [1, 2, 3, 4, 6, 8])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = backtest(SeasonalNaive(2), data, seasonality=1, per_window=True)
        total = backtest(SeasonalNaive(2), data, seasonality=1, batch_size=1)
    np.testing.assert_array_equal(rows["MASE[0.5]"], [np.nan, 3.0])
    np.testing.assert_array_equal(rows["MAE[0.5]"], [2.5, 3.0])
    assert (total["MASE[0.5]"].item(), total["MAE[0.5]"].item()) == (3.0, 2.75)
    assert rows.attrs["unscaled_windows"] == total.attrs["unscaled_windows"] == 1


def test_mase_weighs_windows_by_their_observed_labels() -> None:
    """Errors of 1 and 4 seasonal errors, on four labels and on one."""
    history = [0.0, 1.0] * 4
    data = [
        entry("whole", [*history, 2.0, 2.0, 2.0, 2.0]),
        entry("one", [*history, np.nan, np.nan, np.nan, 5.0]),
    ]
    options: dict[str, Any] = {"metrics": [MASE("0.5")], "seasonality": 1}
    rows = backtest(SeasonalNaive(4), data, per_window=True, **options)["MASE[0.5]"]
    assert list(rows) == [1.0, 4.0]
    assert backtest(SeasonalNaive(4), data, **options)["MASE[0.5]"].item() == (4 * 1.0 + 1 * 4.0) / 5 != rows.mean()


def test_zero_labels_are_left_out_of_mape() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = backtest(SeasonalNaive(2), [entry("a", [1, 2, 0, 4]), entry("b", [1, 2, 0, 0])], per_window=True)
    np.testing.assert_array_equal(rows["MAPE[0.5]"], [0.5, np.nan])
    np.testing.assert_array_equal(rows["mean_weighted_sum_quantile_loss"], [1.0, np.inf])


def test_metrics_seasonality_and_num_samples_are_passed_on() -> None:
    data, predictor = dataset(), Noisy(4)
    metrics = [DTW("mean", window=2), MSE(), Coverage(0.95)]
    frame = backtest(predictor, data, metrics=metrics, num_samples=7)
    assert list(frame.columns) == ["DTW[mean, window=2]", "MSE[mean]", "coverage[0.95]"]
    assert predictor.calls == [{"num_samples": 7, "len": 5}]
    scaled = backtest(predictor, data[:1], metrics=[MAE(), MASE()], seasonality=3).iloc[0]
    past = data[0]["target"][:-4]
    assert scaled["MAE[0.5]"] / scaled["MASE[0.5]"] == pytest.approx(np.mean(np.abs(past[3:] - past[:-3])), rel=1e-5)


def test_every_kind_of_dataset_gives_the_same_scores(tmp_path: Path) -> None:
    data = dataset(3)
    expected = backtest(Noisy(4), data, windows=2, per_window=True)
    JsonLinesWriter(use_gzip=False).write_to_folder(data, tmp_path)
    frames = {
        item["item_id"]: pd.DataFrame(
            {"target": item["target"].astype(np.float64)},
            index=pd.period_range(START, periods=len(item["target"]), freq="D"),
        )
        for item in data
    }
    lists = [{**item, "target": item["target"].tolist()} for item in data]
    for other in (FileDataset(tmp_path, freq="D"), PandasDataset(frames), lists):
        actual = backtest(Noisy(4), other, windows=2, per_window=True)
        pd.testing.assert_frame_equal(actual, expected, rtol=1e-4, check_dtype=False)


def test_rows_are_named_by_position_where_items_have_no_name() -> None:
    data = [entry(None, [1, 2]), entry(None, [1, 2, 4, 3, 5]), {**entry("x", [1, 2, 4, 3, 5]), "item_id": 17}]
    with pytest.warns(UnusableWarning, match=r"^1 of 3 series are left out, they cannot be scored: entry 0 \(no obs"):
        rows = backtest(SeasonalNaive(2), data, per_window=True, unusable="skip")
    assert list(rows.index) == [(1, START + 3), (17, START + 3)]


def test_multivariate_targets_pass_through() -> None:
    rng = np.random.default_rng(5)
    data = [entry(f"m{i}", rng.normal(size=(3, 30))) for i in range(4)]
    data[0]["target"][1, -2] = np.nan
    naive = SeasonalNaive(6, season_length=4)
    rows = backtest(naive, data, windows=2, per_window=True)
    assert rows.shape == (8, len(COLUMNS))
    label = np.ma.masked_invalid(np.stack([item["target"][:, -6:] for item in data]))
    guess = np.stack([np.tile(item["target"][:, -10:-6], (1, 2))[:, :6] for item in data])
    error = np.ma.abs(label - guess)
    np.testing.assert_allclose(rows["MAE[0.5]"].iloc[1::2], error.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(rows["DTW[0.5]"].iloc[1::2], dtw_distance(label, guess).mean(axis=1), rtol=1e-5)
    total = backtest(naive, data)
    assert total["MAE[0.5]"].item() == pytest.approx(error.mean(), rel=1e-5)
    assert total["DTW[0.5]"].item() == pytest.approx(dtw_distance(label, guess).mean(), rel=1e-5)


def samples(start: int, length: int = 2, *, item_id: str | None = "a", value: float = 1.0) -> SampleForecast:
    return SampleForecast(np.full((3, length), value), START + start, item_id)


PAIR = [entry("a", [1, 2, 3, 4, 5]), entry("b", [1, 2, 3, 4, 5, 6])]
GOOD = [samples(3), samples(4, item_id="b")]
NOT_FINITE = (
    "forecast of item_id '{}' starting {} has {} of 2 values not finite for '{}'; check the predictor, and whether it "
    "stores this quantile and bears missing values in the history"
)
DUE = (
    "predictor gave a forecast of item_id {} starting {} where item_id {} starting {} was due; "
    "expected forecasts in the order of the dataset"
)


@pytest.mark.parametrize(
    ("forecasts", "message"),
    [
        ([], "predictor gave 0 forecasts for 2 windows; expected one for each"),
        (GOOD[:1], "predictor gave 1 forecasts for 2 windows; expected one for each"),
        ([*GOOD, samples(9)], "predictor gave more than 2 forecasts for 2 windows; expected one for each"),
        (GOOD[::-1], DUE.format("'b'", "2024-01-05", "'a'", "2024-01-04")),
        ([GOOD[0], samples(5, item_id=None)], DUE.format(None, "2024-01-06", "'b'", "2024-01-05")),
        ([samples(3, value=np.nan), GOOD[1]], NOT_FINITE.format("a", "2024-01-04", 2, "0.5")),
        ([GOOD[0], samples(4, item_id="b", value=np.inf)], NOT_FINITE.format("b", "2024-01-05", 2, "0.5")),
        (
            [QuantileForecast(np.ones((1, 2)), START + 3, ["0.5"]), GOOD[1]],
            NOT_FINITE.format("a", "2024-01-04", 2, "0.1"),
        ),
        (
            [samples(3, 1), GOOD[1]],
            "forecast of item_id 'a' starting 2024-01-04 has shape (1,) for '0.5', time last; its label has (2,)",
        ),
        (
            [GOOD[0], samples(4, 3, item_id="b")],
            "forecast of item_id 'b' starting 2024-01-05 has shape (3,) for '0.5', time last; its label has (2,)",
        ),
    ],
    ids=["none", "few", "many", "swapped", "late", "nan", "inf", "no-quantile", "short", "long"],
)
@pytest.mark.parametrize("batch_size", [1, 100])
def test_forecasts_that_do_not_fit_are_errors(forecasts: list[Any], message: str, batch_size: int) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        backtest(Fixed(2, forecasts), PAIR, batch_size=batch_size)


def test_forecasts_that_fit_are_accepted() -> None:
    assert backtest(Fixed(2, GOOD), PAIR)["MAE[0.5]"].item() == pytest.approx(4.0)
    unnamed = [samples(3, item_id=None), samples(4, item_id=None)]
    assert backtest(Fixed(2, unnamed), PAIR)["MAE[0.5]"].item() == pytest.approx(4.0)


LEFT = (
    "no series is left to score: {} of 2 series have no observed value before their last {} steps, {} have none in "
    "any window; use longer series, or fewer windows than {}"
)
TARGET = "item_id {} has a target of shape {}; expected (time,) or (dim, time), with the same dim for all series"


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (PAIR, {"windows": 0}, "windows is 0; expected a whole number, 1 or more"),
        (PAIR, {"windows": 1.5}, "windows is 1.5; expected a whole number, 1 or more"),
        (PAIR, {"distance": -2}, "distance is -2; expected a whole number, 1 or more"),
        (PAIR, {"seasonality": 0}, "seasonality is 0; expected a whole number, 1 or more"),
        (PAIR, {"num_samples": "9"}, "num_samples is '9'; expected a whole number, 1 or more"),
        (PAIR, {"batch_size": None}, "batch_size is None; expected a whole number, 1 or more"),
        (PAIR, {"metrics": []}, "metrics is []; expected a list of metric definitions such as [MAE(), DTW()]"),
        (PAIR, {"metrics": 3}, "metrics is 3; expected a list of metric definitions such as [MAE(), DTW()]"),
        (
            PAIR,
            {"metrics": [MAE(), DTW(), MAE(), MSE()]},
            "metrics has MAE[0.5] more than once; each needs a name of its own",
        ),
        ([], {}, "dataset is empty; expected at least one series"),
        (PAIR, {"windows": 4}, LEFT.format(2, 8, 0, 4)),
        (PAIR, {"windows": 3, "distance": 4}, LEFT.format(2, 10, 0, 3)),
        ([PAIR[0], entry("c", [1, 2, np.nan])], {"windows": 2}, None),
        ([entry("b", [1, 2]), entry("c", [1, np.nan, np.nan])], {}, LEFT.format(1, 2, 1, 1)),
        (
            [PAIR[0], entry("c", np.ones((2, 9)))],
            {},
            TARGET.format("'c'", (2, 9)),
        ),
        (
            [entry(None, np.ones((1, 2, 9)))],
            {},
            TARGET.format(0, (1, 2, 9)).replace("item_id", "entry"),
        ),
    ],
)
def test_wrong_arguments_are_named(data: Any, options: dict[str, Any], message: str | None) -> None:
    predictor = SeasonalNaive(2)
    if message is None:
        with pytest.warns(UnusableWarning):
            assert backtest(predictor, data, unusable="skip", **options).attrs["skipped"]["too_short"] == 1
        return
    with pytest.raises(ValueError, match=exactly(message)):
        backtest(predictor, data, **options)


def test_iterators_timestamps_and_lead_time_are_refused() -> None:
    with pytest.raises(
        TypeError, match=exactly("dataset is a list_iterator, which can be read only once; pass list(dataset)")
    ):
        backtest(SeasonalNaive(2), iter(PAIR))
    message = (
        "start of item_id 'a' is '2024-01-01', a str; a pandas.Period says the frequency too: give"
        " pd.Period('2024-01-01', freq='D'), or gluonts.dataset.common.ListDataset(entries, freq='D')"
    )
    with pytest.raises(TypeError, match=exactly(message)):
        backtest(SeasonalNaive(2), [{**PAIR[0], "start": "2024-01-01"}])
    predictor = SeasonalNaive(2)
    predictor.lead_time = 3
    message = "predictor has lead_time 3; only 0 can be scored, as windows start right after the history"
    with pytest.raises(ValueError, match=exactly(message)):
        backtest(predictor, PAIR)


def naive(target: Any, prediction_length: int, season_length: int) -> np.ndarray:
    (forecast,) = SeasonalNaive(prediction_length, season_length).predict([entry("a", target)])
    assert forecast.start_date == START + np.shape(target)[-1]
    assert forecast.item_id == "a"
    samples: np.ndarray = forecast.samples
    return samples


@pytest.mark.parametrize(
    ("target", "season", "expected"),
    [
        ([1, 2, 3], 1, [3, 3, 3, 3, 3]),
        ([1, 2, np.nan], 1, [2, 2, 2, 2, 2]),
        ([1, 2, 3, 4, 5], 3, [3, 4, 5, 3, 4]),
        ([1, 2, 3, np.nan, 5], 3, [3, 1, 5, 3, 1]),
        ([1, 2, np.nan, np.nan, 5, np.nan], 3, [1, 5, 5, 1, 5]),
        ([7], 3, [7, 7, 7, 7, 7]),
        ([4, 5], 3, [5, 4, 5, 5, 4]),
    ],
)
def test_seasonal_naive_repeats_what_was_last_seen(target: Any, season: int, expected: Any) -> None:
    np.testing.assert_array_equal(naive(target, 5, season), [expected])


def test_seasonal_naive_equals_gluonts_where_nothing_is_missing() -> None:
    data = dataset()
    ours = SeasonalNaive(prediction_length=9, season_length=7).predict(data)
    theirs = SeasonalNaivePredictor(prediction_length=9, season_length=7).predict(data)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)
        assert (one.item_id, one.start_date) == (other.item_id, other.start_date)


def test_seasonal_naive_keeps_dims_and_precision() -> None:
    target = np.array([[1.0, 2.0, np.nan], [2.0**40 + 1, 5.0, 6.0]])
    (forecast,) = SeasonalNaive(2, 2).predict([{"start": START, "target": target}])
    np.testing.assert_array_equal(forecast.samples, [[[2.0, 5.0], [1.0, 6.0]]])
    (forecast,) = SeasonalNaive(1, 3).predict([{"start": START, "target": target[1]}])
    assert forecast.samples.item() == 2.0**40 + 1


def test_seasonal_naive_survives_saving(tmp_path: Path) -> None:
    predictor = SeasonalNaive(prediction_length=3, season_length=4)
    predictor.serialize(tmp_path)
    again = Predictor.deserialize(tmp_path)
    assert (again.prediction_length, again.season_length) == (3, 4)
    assert again == predictor


def test_seasonal_naive_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=exactly("season_length is 0; expected a whole number, 1 or more")):
        SeasonalNaive(2, 0)
    with pytest.raises(ValueError, match=exactly("prediction_length is -1; expected a whole number, 1 or more")):
        SeasonalNaive(-1)
    for name, target in (("a", [np.nan, np.nan]), ("b", [[1.0, 2.0], [np.nan, np.nan]]), ("c", [])):
        message = f"item_id '{name}' has no observed value to repeat; leave the series out"
        with pytest.raises(ValueError, match=exactly(message)):
            list(SeasonalNaive(2).predict([entry(name, target)]))
