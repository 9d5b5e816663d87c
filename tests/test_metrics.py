from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from dtaidistance import dtw as dtaidistance_dtw
from dtaidistance import dtw_ndim
from gluonts.dataset.split import split
from gluonts.ev.metrics import MAE, MASE
from gluonts.model.evaluation import evaluate_model
from gluonts.model.seasonal_naive import SeasonalNaivePredictor
from tslearn.metrics import dtw as tslearn_dtw
from tslearn.metrics import dtw_path_from_metric

from gluonts_peft import metrics
from gluonts_peft.metrics import DTW, DTWPathError, dtw_distance, dtw_path_error

LENGTHS = [(1, 1), (1, 5), (6, 1), (7, 7), (5, 9), (12, 8)]
WINDOWS = [None, 0, 1, 3, 50]


def naive(x: np.ndarray, y: np.ndarray, window: int | None, cost: str) -> tuple[float, float]:
    """Distance and path error of two series (time,) from a full matrix and a path traced back through it."""
    n, m = len(x), len(y)
    gap = np.abs(x[:, None] - y[None, :])
    local = gap if cost == "absolute" else gap**2
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    for i in range(n):
        for j in range(m):
            inside = window is None or -window - max(0, n - m) <= j - i <= window + max(0, m - n)
            if inside:
                total[i + 1, j + 1] = local[i, j] + min(total[i, j], total[i, j + 1], total[i + 1, j])
    i, j, errors = n, m, []
    while i > 0 and j > 0:
        errors.append(gap[i - 1, j - 1])
        before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = before[int(np.argmin([total[cell] for cell in before]))]
    distance = total[n, m] if cost == "absolute" else np.sqrt(total[n, m])
    return float(distance), float(np.mean(errors))


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def series(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("cost", ["absolute", "squared"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_functions_equal_a_naive_loop(n: int, m: int, window: int | None, cost: Any) -> None:
    x, y = series(4, n, seed=1), series(4, m, seed=2)
    expected = np.array([naive(a, b, window, cost) for a, b in zip(x, y, strict=True)])
    np.testing.assert_allclose(dtw_distance(x, y, window=window, cost=cost), expected[:, 0], rtol=1e-12)
    np.testing.assert_allclose(dtw_path_error(x, y, window=window, cost=cost), expected[:, 1], rtol=1e-12)


@pytest.mark.parametrize("cost", ["absolute", "squared"])
def test_ties_are_decided_as_in_the_naive_loop_and_tslearn(cost: Any) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 3, size=(50, 9)).astype(float), rng.integers(0, 3, size=(50, 7)).astype(float)
    actual = dtw_path_error(x, y, cost=cost)
    np.testing.assert_allclose(actual, [naive(a, b, None, cost)[1] for a, b in zip(x, y, strict=True)], rtol=1e-12)
    metric = "cityblock" if cost == "absolute" else "sqeuclidean"
    for a, b, value in zip(x, y, actual, strict=True):
        path, _ = dtw_path_from_metric(a, b, metric=metric)
        assert value == pytest.approx(np.mean([abs(a[i] - b[j]) for i, j in path]), rel=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_distance_equals_dtaidistance(n: int, m: int, window: int | None) -> None:
    x, y = series(n, seed=4), series(m, seed=5)
    options = {} if window is None else {"window": window + 1}
    squared = dtaidistance_dtw.distance_fast(x, y, use_pruning=False, **options)
    absolute = dtaidistance_dtw.distance_fast(x, y, use_pruning=False, inner_dist="euclidean", **options)
    assert float(dtw_distance(x, y, window=window, cost="squared")) == pytest.approx(squared, abs=1e-6)
    assert float(dtw_distance(x, y, window=window)) == pytest.approx(absolute, abs=1e-6)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_distance_and_path_error_equal_tslearn(n: int, m: int, window: int | None) -> None:
    x, y = series(n, seed=6), series(m, seed=7)
    options = {} if window is None else {"global_constraint": "sakoe_chiba", "sakoe_chiba_radius": window}
    squared = tslearn_dtw(x, y, **options)
    path, absolute = dtw_path_from_metric(x, y, metric="cityblock", **options)
    assert float(dtw_distance(x, y, window=window, cost="squared")) == pytest.approx(squared, abs=1e-6)
    assert float(dtw_distance(x, y, window=window)) == pytest.approx(absolute, abs=1e-6)
    error = np.mean([abs(x[i] - y[j]) for i, j in path])
    assert float(dtw_path_error(x, y, window=window)) == pytest.approx(error, abs=1e-6)


def test_dependent_dims_share_one_path_as_in_both_libraries() -> None:
    x, y = series(2, 3, 8, seed=8), series(2, 3, 6, seed=9)
    squared = dtw_distance(x, y, cost="squared", dims="dependent")
    absolute = dtw_distance(x, y, dims="dependent")
    errors = dtw_path_error(x, y, dims="dependent")
    assert squared.shape == absolute.shape == errors.shape == (2,)
    for item in range(2):
        a, b = np.ascontiguousarray(x[item].T), np.ascontiguousarray(y[item].T)
        assert squared[item] == pytest.approx(tslearn_dtw(a, b), abs=1e-6)
        assert squared[item] == pytest.approx(dtw_ndim.distance_fast(a, b), abs=1e-6)
        path, total = dtw_path_from_metric(a, b, metric="cityblock")
        assert absolute[item] == pytest.approx(total, abs=1e-6)
        assert errors[item] == pytest.approx(np.mean([np.abs(a[i] - b[j]) for i, j in path]), abs=1e-6)


def test_independent_dims_are_series_of_their_own() -> None:
    x, y = series(2, 3, 8, seed=8), series(2, 3, 8, seed=9)
    actual = dtw_distance(x, y)
    assert actual.shape == (2, 3)
    np.testing.assert_array_equal(actual.ravel(), dtw_distance(x.reshape(6, 8), y.reshape(6, 8)))


def test_missing_labels_are_taken_out_before_aligning() -> None:
    y = series(5, seed=2)
    full = np.array([1.0, 2.0, 4.0])
    gaps = np.array([1.0, np.nan, 2.0, np.inf, 4.0])
    hidden = np.ma.array([1.0, 7.0, 2.0, 9.0, 4.0], mask=[False, True, False, True, False])
    for function in (dtw_distance, dtw_path_error):
        for window in (None, 1):
            expected = function(full, y, window=window)
            assert function(gaps, y, window=window) == expected
            assert function(hidden, y, window=window) == expected
    np.testing.assert_array_equal(gaps, [1.0, np.nan, 2.0, np.inf, 4.0])


def test_dependent_dims_miss_a_step_together() -> None:
    x, y = series(2, 6, seed=1), series(2, 6, seed=2)
    gaps = x.copy()
    gaps[1, 2] = np.nan
    expected = dtw_distance(np.delete(x, 2, axis=1), y, dims="dependent")
    assert dtw_distance(gaps, y, dims="dependent") == expected


def test_all_missing_labels_and_forecasts_that_are_not_finite_give_nan() -> None:
    x, y = series(4, 5, seed=1), series(4, 5, seed=2)
    x[1] = np.nan
    y[2, 3] = np.nan
    y[3, 0] = np.inf
    for function in (dtw_distance, dtw_path_error):
        np.testing.assert_array_equal(np.isnan(function(x, y)), [False, True, True, True])
        assert np.isnan(function([], [1.0]))


def test_integers_lists_strides_and_empty_batches_are_fine() -> None:
    assert dtw_distance([0, 1, 5], [0, 1, 1]) == 4.0
    x, y = series(10, 6, seed=1).T, series(10, 6, seed=2).T
    np.testing.assert_array_equal(dtw_distance(x, y), dtw_distance(x.copy(), y.copy()))
    assert dtw_distance(np.empty((0, 4)), np.empty((0, 4))).shape == (0,)
    assert dtw_distance(np.empty((0, 2, 4)), np.empty((0, 2, 4)), dims="dependent").shape == (0,)


def test_window_zero_is_the_error_without_warping() -> None:
    x, y = series(3, 8, seed=1), series(3, 8, seed=2)
    np.testing.assert_allclose(dtw_distance(x, y, window=0), np.abs(x - y).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(dtw_path_error(x, y, window=0), np.abs(x - y).mean(axis=1), rtol=1e-12)


SHAPES = "label has shape {} and forecast {}; expected {} for both with dims={!r}, equal in all axes but time"


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((3,), (3,)), {"window": -1}, "window -1 is not a whole number of steps, 0 or more; None means no band"),
        (((3,), (3,)), {"window": 2.5}, "window 2.5 is not a whole number of steps, 0 or more; None means no band"),
        (((3,), (3,)), {"cost": "cubic"}, "cost 'cubic' is unknown; known: 'absolute', 'squared'"),
        (((3,), (3,)), {"cost": "l1"}, "cost 'l1' is unknown; known: 'absolute', 'squared'"),
        (((3,), (3,)), {"dims": "both"}, "dims 'both' is unknown; known: 'independent', 'dependent'"),
        (((3,), (3,)), {"dims": 2}, "dims 2 is unknown; known: 'independent', 'dependent'"),
        (((2, 3), (1, 3)), {}, SHAPES.format((2, 3), (1, 3), "(..., time)", "independent")),
        (((), (4,)), {}, SHAPES.format((), (4,), "(..., time)", "independent")),
        (((5,), (5,)), {"dims": "dependent"}, SHAPES.format((5,), (5,), "(..., dim, time)", "dependent")),
        (((0,), (0,)), {}, "forecast has shape (0,); expected at least one time step on the last axis"),
        (((2, 3), (2, 0)), {}, "forecast has shape (2, 0); expected at least one time step on the last axis"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
@pytest.mark.parametrize("function", [dtw_distance, dtw_path_error])
def test_wrong_arguments_are_named(function: Any, shapes: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        function(np.zeros(shapes[0]), np.zeros(shapes[1]), **options)


@pytest.mark.parametrize("definition", [DTW, DTWPathError])
def test_definitions_check_their_options(definition: Any) -> None:
    with pytest.raises(
        ValueError, match=exactly("window -3 is not a whole number of steps, 0 or more; None means no band")
    ):
        definition(window=-3)
    with pytest.raises(ValueError, match=exactly("cost 'euclid' is unknown; known: 'absolute', 'squared'")):
        definition(cost="euclid")


@pytest.mark.parametrize(
    ("definition", "name"),
    [
        (metrics.dtw, "DTW[0.5]"),
        (metrics.dtw_path, "DTWPathError[0.5]"),
        (DTW("mean", window=3), "DTW[mean, window=3]"),
        (DTW(window=0, cost="squared"), "DTW[0.5, window=0, cost=squared]"),
        (DTWPathError("0.9", cost="squared"), "DTWPathError[0.9, cost=squared]"),
    ],
)
def test_names_tell_metrics_apart(definition: Any, name: str) -> None:
    assert definition(axis=None).name == name


FUNCTIONS = [(DTW, dtw_distance), (DTWPathError, dtw_path_error)]


def batch(*shape: int) -> dict[str, Any]:
    label = np.ma.masked_invalid(series(*shape, seed=1))
    label[1, ..., 2] = np.ma.masked
    return {"label": label, "0.5": series(*shape, seed=2)}


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(("definition", "function"), FUNCTIONS)
def test_axes_of_univariate_and_multivariate_batches(definition: Any, function: Any, window: int | None) -> None:
    metric = definition(window=window)
    data = batch(4, 7)
    values = function(data["label"], data["0.5"], window=window)
    assert metric(axis=None).update(data).get() == pytest.approx(values.mean())
    assert metric(axis=(0, 1)).update(data).get() == pytest.approx(values.mean())
    np.testing.assert_allclose(metric(axis=1).update(data).get(), values)

    data = batch(4, 3, 7)
    values = function(data["label"], data["0.5"], window=window)
    assert values.shape == (4, 3)
    assert metric(axis=(0, 1, 2)).update(data).get() == pytest.approx(values.mean())
    np.testing.assert_allclose(metric(axis=2).update(data).get(), values)
    np.testing.assert_allclose(metric(axis=(1, 2)).update(data).get(), values.mean(axis=1))
    np.testing.assert_allclose(metric(axis=(0, 2)).update(data).get(), values.mean(axis=0))


@pytest.mark.parametrize(
    ("shape", "axis", "message"),
    [
        ((4, 7), 0, "axis (0,) keeps time, but DTW has one value per series, none per time step; add the time axis, 1"),
        ((4, 7), (), "axis () keeps time, but DTW has one value per series, none per time step; add the time axis, 1"),
        (
            (4, 3, 7),
            (0, 1),
            "axis (0, 1) keeps time, but DTW has one value per series, none per time step; add the time axis, 2",
        ),
    ],
)
@pytest.mark.parametrize("definition", [DTW, DTWPathError])
def test_keeping_the_time_axis_is_refused(definition: Any, shape: Any, axis: Any, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        definition()(axis=axis).update(batch(*shape))


@pytest.mark.parametrize(("definition", "function"), FUNCTIONS)
def test_series_without_label_are_left_out_and_bad_forecasts_are_not(definition: Any, function: Any) -> None:
    data = batch(4, 7)
    data["label"][3] = np.ma.masked
    values = function(data["label"], data["0.5"])
    assert np.isnan(values[3])
    assert definition()(axis=None).update(data).get() == pytest.approx(values[:3].mean())
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(definition()(axis=1).update(data).get(), values)
    data["0.5"][0, 0] = np.nan
    assert np.isnan(definition()(axis=None).update(data).get())


def dataset() -> list[dict[str, Any]]:
    rng = np.random.default_rng(11)
    entries: list[dict[str, Any]] = []
    for item in range(5):
        target = rng.normal(size=40).astype(np.float32)
        entries.append({"item_id": f"s{item}", "start": pd.Period("2024-01-01", freq="D"), "target": target})
    entries[2]["target"][-4:-2] = np.nan
    entries[3]["target"][-5:] = np.nan
    return entries


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_evaluate_model_gives_the_mean_of_the_functions(batch_size: int) -> None:
    predictor = SeasonalNaivePredictor(prediction_length=5, season_length=7)
    test_data = split(dataset(), offset=-10)[1].generate_instances(5, windows=2)
    pairs = list(zip(predictor.predict(test_data.input), test_data.label, strict=True))
    expected = np.array([dtw_distance(label["target"], forecast.quantile(0.5)) for forecast, label in pairs])
    errors = np.array([dtw_path_error(label["target"], forecast.quantile(0.5)) for forecast, label in pairs])
    assert np.isnan(expected).sum() == 1
    both = [DTW(), DTWPathError(), MAE(), MASE()]
    frame = evaluate_model(predictor, test_data=test_data, metrics=both, batch_size=batch_size)
    assert frame["DTW[0.5]"].item() == pytest.approx(np.nanmean(expected), rel=1e-12)
    assert frame["DTWPathError[0.5]"].item() == pytest.approx(np.nanmean(errors), rel=1e-12)
    frame = evaluate_model(predictor, test_data=test_data, metrics=both, batch_size=batch_size, axis=1)
    np.testing.assert_allclose(frame["DTW[0.5]"], expected, rtol=1e-12)
    np.testing.assert_allclose(frame["DTWPathError[0.5]"], errors, rtol=1e-12)


def test_importing_compiles_nothing() -> None:
    code = "import sys, gluonts_peft.metrics; sys.exit(int('numba' in sys.modules or 'torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=600).returncode == 0
