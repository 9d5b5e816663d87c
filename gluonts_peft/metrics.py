"""
Dynamic time warping as plain functions and as GluonTS metrics.

A forecast that has the right shape an hour late scores as badly under MAE as one that misses the event. Dynamic time
warping (Sakoe and Chiba, 1978, doi:10.1109/TASSP.1978.1163055) aligns the two series first: a warping path starts at
the first step of both, ends at the last step of both, advances at each move by one step in the label, in the forecast
or in both, and never goes back. The optimal path is one of least summed cost between the aligned values.

:func:`dtw_distance` is the summed cost along that path, :func:`dtw_path_error` the mean absolute error along it. Both
work on whole batches. :class:`DTW` and :class:`DTWPathError` make them metric definitions for ``gluonts.ev``:

    evaluate_model(predictor, test_data=test_data, metrics=[DTW(), MAE()], axis=1)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
from gluonts.ev.aggregations import Mean
from gluonts.ev.metrics import BaseMetricDefinition, DirectMetric

__all__ = ["DTW", "DTWPathError", "dtw", "dtw_distance", "dtw_path", "dtw_path_error"]

Cost = Literal["absolute", "squared"]
Dims = Literal["independent", "dependent"]


class _Kernel(Protocol):
    def __call__(
        self,
        label: npt.NDArray[np.float64],
        observed: npt.NDArray[np.bool_],
        forecast: npt.NDArray[np.float64],
        window: int,
        squared: bool,
        out: npt.NDArray[np.float64],
    ) -> None: ...


def dtw_distance(
    label: npt.ArrayLike,
    forecast: npt.ArrayLike,
    *,
    window: int | None = None,
    cost: Cost = "absolute",
    dims: Dims = "independent",
) -> npt.NDArray[np.float64]:
    """
    Cost of the optimal warping path between labels and forecasts.

    Parameters
    ----------
    label
        True values, ``(..., label_time)``, plain or masked. Steps that are masked, NaN or infinite are missing: they
        are taken out before aligning, so that the path is over the observed steps only.
    forecast
        Forecast values, ``(..., forecast_time)`` with the leading shape of ``label``; the two lengths may differ.
    window
        Radius of the Sakoe-Chiba band in steps, ``0`` or more; ``None`` for no band. With ``n`` observed label steps
        and ``m`` forecast steps, label step ``i`` may meet forecast step ``j`` if
        ``-window - max(0, n - m) <= j - i <= window + max(0, m - n)``, that is ``|i - j| <= window`` for equal
        lengths; a path always exists. This is ``sakoe_chiba_radius=window`` in tslearn and ``window + 1`` in
        dtaidistance. Steps are counted after missing labels have been taken out.
    cost
        ``"absolute"``: the sum of ``|label - forecast|`` along the path, in the unit of the data. ``"squared"``: the
        square root of the sum of squares, also in the unit of the data, as tslearn and dtaidistance have it.
    dims
        ``"independent"``: each series along the last axis is aligned on its own. ``"dependent"``: the axis before time
        holds the dimensions of one multivariate series and all share one path; costs are summed over the dimensions,
        and a step is missing if any dimension of it is.

    Returns
    -------
    numpy.ndarray
        Distances ``(...)`` in double precision; ``dims="dependent"`` also removes the axis before time. NaN where no
        label is observed, or where the forecast is not finite.

    Raises
    ------
    ValueError
        If shapes do not fit, ``forecast`` has no time step, or ``window``, ``cost`` or ``dims`` is none of the above.

    Examples
    --------
    The forecast is one step late, which costs nothing but the end:

    >>> dtw_distance([0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0])
    array(0.)
    >>> dtw_distance([0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], window=0)
    array(2.)
    """
    total = _align(_kernels()[0], label, forecast, window=window, cost=cost, dims=dims)
    return np.sqrt(total, out=total) if cost == "squared" else total


def dtw_path_error(
    label: npt.ArrayLike,
    forecast: npt.ArrayLike,
    *,
    window: int | None = None,
    cost: Cost = "absolute",
    dims: Dims = "independent",
) -> npt.NDArray[np.float64]:
    """
    Mean absolute error along the optimal warping path.

    Unlike :func:`dtw_distance` it does not grow with the horizon. Several paths may have the same least cost and
    differ in length; then, going back from the last step, a move in both series is preferred to a move in the label
    alone, and that to a move in the forecast alone. tslearn's ``dtw_path`` decides ties in the same way.

    Parameters
    ----------
    label, forecast, window, dims
        As in :func:`dtw_distance`.
    cost
        What the path minimises, as in :func:`dtw_distance`; the error along the path is absolute in both cases.

    Returns
    -------
    numpy.ndarray
        Errors ``(...)`` in the unit of the data, double precision, NaN as in :func:`dtw_distance`. With
        ``dims="dependent"`` the mean is over the path and the dimensions.

    Raises
    ------
    ValueError
        As in :func:`dtw_distance`.

    Examples
    --------
    >>> dtw_path_error([0.0, 1.0, 3.0], [0.0, 1.0, 1.0, 2.0])
    array(0.25)
    """
    return _align(_kernels()[1], label, forecast, window=window, cost=cost, dims=dims)


def _align(
    kernel: _Kernel, label: npt.ArrayLike, forecast: npt.ArrayLike, *, window: int | None, cost: Cost, dims: Dims
) -> npt.NDArray[np.float64]:
    _check_options(window, cost)
    if dims not in get_args(Dims):
        raise ValueError(f"dims {dims!r} is unknown; known: 'independent', 'dependent'")
    truth = np.ma.masked_invalid(np.ma.asarray(label, dtype=np.float64))
    guess = np.ascontiguousarray(np.ma.filled(np.ma.asarray(forecast, dtype=np.float64), np.nan))
    core = 1 if dims == "independent" else 2
    if truth.ndim < core or guess.ndim < core or truth.shape[:-1] != guess.shape[:-1]:
        wanted = "(..., time)" if core == 1 else "(..., dim, time)"
        raise ValueError(
            f"label has shape {truth.shape} and forecast {guess.shape}; expected {wanted} for both with dims={dims!r}, "
            "equal in all axes but time"
        )
    if guess.shape[-1] == 0:
        raise ValueError(f"forecast has shape {guess.shape}; expected at least one time step on the last axis")

    batch_shape = truth.shape[:-core]
    batch = int(np.prod(batch_shape))
    dim = 1 if core == 1 else truth.shape[-2]
    values = np.ascontiguousarray(truth.data).reshape(batch, dim, truth.shape[-1])
    missing = np.ma.getmaskarray(truth).reshape(batch, dim, truth.shape[-1])
    observed = np.logical_not(np.logical_or.reduce(missing, axis=1))
    guess = guess.reshape(batch, dim, guess.shape[-1])
    radius = max(values.shape[-1], guess.shape[-1]) if window is None else operator.index(window)
    out = np.empty(batch)
    kernel(values, observed, guess, radius, cost == "squared", out)
    out[~np.isfinite(guess).all(axis=(1, 2))] = np.nan
    return out.reshape(batch_shape)


def _check_options(window: int | None, cost: str) -> None:
    if window is not None:
        try:
            radius = -1 if isinstance(window, bool) else operator.index(window)
        except TypeError:
            radius = -1
        if radius < 0:
            raise ValueError(f"window {window!r} is not a whole number of steps, 0 or more; None means no band")
    if cost not in get_args(Cost):
        raise ValueError(f"cost {cost!r} is unknown; known: 'absolute', 'squared'")


@cache
def _kernels() -> tuple[_Kernel, _Kernel]:
    # Here and not at the top: importing numba and compiling take seconds that only users of these metrics should pay.
    import numba

    @numba.njit(cache=False, parallel=False, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
    def distance(label, observed, forecast, window, squared, out):  # type: ignore[no-untyped-def]
        batch, dim, label_time = label.shape
        m = forecast.shape[2]
        truth = np.empty((dim, label_time))
        local = np.empty(m)
        previous = np.empty(m + 1)
        current = np.empty(m + 1)
        for item in range(batch):
            n = 0
            for step in range(label_time):
                if observed[item, step]:
                    for d in range(dim):
                        truth[d, n] = label[item, d, step]
                    n += 1
            if n == 0:
                out[item] = np.nan
                continue
            below = window + max(0, n - m)
            above = window + max(0, m - n)
            previous[:] = np.inf
            previous[0] = 0.0
            for i in range(n):
                first = max(0, i - below)
                last = min(m, i + above + 1)
                local[first:last] = 0.0
                for d in range(dim):
                    value = truth[d, i]
                    if squared:
                        for j in range(first, last):
                            local[j] += (value - forecast[item, d, j]) ** 2
                    else:
                        for j in range(first, last):
                            local[j] += abs(value - forecast[item, d, j])
                current[first] = np.inf
                left = np.inf
                for j in range(first, last):
                    best = previous[j]
                    if previous[j + 1] < best:
                        best = previous[j + 1]
                    if left < best:
                        best = left
                    left = best + local[j]
                    current[j + 1] = left
                # The next row's band reaches one cell further, into what is left of an older row.
                if last < m:
                    current[last + 1] = np.inf
                previous, current = current, previous
            out[item] = previous[m]

    @numba.njit(cache=False, parallel=False, nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
    def path_error(label, observed, forecast, window, squared, out):  # type: ignore[no-untyped-def]
        batch, dim, label_time = label.shape
        m = forecast.shape[2]
        truth = np.empty((dim, label_time))
        local = np.empty(m)
        gap = np.empty(m)
        previous = np.empty(m + 1)
        current = np.empty(m + 1)
        # The error and the length of the best path into a cell travel with its cost, so that no path is traced back.
        previous_error = np.zeros(m + 1)
        current_error = np.zeros(m + 1)
        previous_length = np.zeros(m + 1, dtype=np.int64)
        current_length = np.zeros(m + 1, dtype=np.int64)
        for item in range(batch):
            n = 0
            for step in range(label_time):
                if observed[item, step]:
                    for d in range(dim):
                        truth[d, n] = label[item, d, step]
                    n += 1
            if n == 0:
                out[item] = np.nan
                continue
            below = window + max(0, n - m)
            above = window + max(0, m - n)
            previous[:] = np.inf
            previous[0] = 0.0
            previous_error[0] = 0.0
            previous_length[0] = 0
            for i in range(n):
                first = max(0, i - below)
                last = min(m, i + above + 1)
                local[first:last] = 0.0
                gap[first:last] = 0.0
                for d in range(dim):
                    value = truth[d, i]
                    for j in range(first, last):
                        difference = abs(value - forecast[item, d, j])
                        gap[j] += difference
                        local[j] += difference * difference if squared else difference
                current[first] = np.inf
                left = np.inf
                left_error = 0.0
                left_length = 0
                for j in range(first, last):
                    best = previous[j]
                    error = previous_error[j]
                    length = previous_length[j]
                    if previous[j + 1] < best:
                        best = previous[j + 1]
                        error = previous_error[j + 1]
                        length = previous_length[j + 1]
                    if left < best:
                        best = left
                        error = left_error
                        length = left_length
                    left = best + local[j]
                    left_error = error + gap[j]
                    left_length = length + 1
                    current[j + 1] = left
                    current_error[j + 1] = left_error
                    current_length[j + 1] = left_length
                if last < m:
                    current[last + 1] = np.inf
                previous, current = current, previous
                previous_error, current_error = current_error, previous_error
                previous_length, current_length = current_length, previous_length
            out[item] = previous_error[m] / (previous_length[m] * dim)

    return distance, path_error


@dataclass
class _TimelessMean(Mean):  # type: ignore[misc, unused-ignore]
    """Mean of values whose time axis has length 1; says so where GluonTS would fail on the length of a column."""

    def step(self, values: npt.NDArray[np.float64]) -> None:
        time_axis = values.ndim - 1
        if self.axis is not None and time_axis not in self.axis:
            raise ValueError(
                f"axis {self.axis} keeps time, but DTW has one value per series, none per time step; "
                f"add the time axis, {time_axis}"
            )
        super().step(values)


@dataclass
class DTW(BaseMetricDefinition):  # type: ignore[misc, unused-ignore]
    """
    Mean of :func:`dtw_distance` over series, and over dimensions, each aligned on its own.

    The metric is called ``DTW[0.5]``, with ``window`` and ``cost`` added where they differ from the defaults.

    Parameters
    ----------
    forecast_type
        What to align with the labels: ``"mean"`` or a quantile level as in the other metrics of ``gluonts.ev``.
    window, cost
        As in :func:`dtw_distance`.

    Raises
    ------
    ValueError
        If ``window`` or ``cost`` is unknown; while evaluating, if ``axis`` leaves out the time axis: a warping path
        has no error per time step.

    Notes
    -----
    Series without any observed label are left out of a mean and are NaN where ``axis`` keeps them apart.
    """

    forecast_type: str = "0.5"
    window: int | None = None
    cost: Cost = "absolute"

    def __post_init__(self) -> None:
        _check_options(self.window, self.cost)

    def __call__(self, axis: int | tuple[int, ...] | None = None) -> DirectMetric:
        return _direct("DTW", dtw_distance, self, axis)


dtw = DTW()


@dataclass
class DTWPathError(BaseMetricDefinition):  # type: ignore[misc, unused-ignore]
    """
    Mean of :func:`dtw_path_error` over series, and over dimensions, each aligned on its own.

    The metric is called ``DTWPathError[0.5]``, with ``window`` and ``cost`` added where they differ from the defaults.

    Parameters
    ----------
    forecast_type
        What to align with the labels: ``"mean"`` or a quantile level as in the other metrics of ``gluonts.ev``.
    window, cost
        As in :func:`dtw_path_error`.

    Raises
    ------
    ValueError
        As for :class:`DTW`.

    Notes
    -----
    Missing labels are treated as by :class:`DTW`. The mean is over series: each counts once, however long its path.
    """

    forecast_type: str = "0.5"
    window: int | None = None
    cost: Cost = "absolute"

    def __post_init__(self) -> None:
        _check_options(self.window, self.cost)

    def __call__(self, axis: int | tuple[int, ...] | None = None) -> DirectMetric:
        return _direct("DTWPathError", dtw_path_error, self, axis)


# The idiom of gluonts.ev would call it dtw_path_error, which is the function.
dtw_path = DTWPathError()


class _Alignment(Protocol):
    def __call__(
        self, label: npt.ArrayLike, forecast: npt.ArrayLike, *, window: int | None, cost: Cost
    ) -> npt.NDArray[np.float64]: ...


def _direct(
    name: str, function: _Alignment, metric: DTW | DTWPathError, axis: int | tuple[int, ...] | None
) -> DirectMetric:
    parts = [metric.forecast_type]
    if metric.window is not None:
        parts.append(f"window={metric.window}")
    if metric.cost != "absolute":
        parts.append(f"cost={metric.cost}")
    stat = partial(
        _series_stat,
        function=partial(function, window=metric.window, cost=metric.cost),
        forecast_type=metric.forecast_type,
    )
    return DirectMetric(name=f"{name}[{', '.join(parts)}]", stat=stat, aggregate=_TimelessMean(axis=axis))


def _series_stat(data: Mapping[str, Any], *, function: Any, forecast_type: str) -> np.ma.MaskedArray[Any, Any]:
    """Value per series with time kept as an axis of length 1: ``(batch, [dim,] time) -> (batch, [dim,] 1)``."""
    label = np.ma.masked_invalid(data["label"])
    values = function(label, data[forecast_type])[..., np.newaxis]
    # Only missing labels are masked: a forecast that is not finite stays a visible NaN, as it does in MAE. The data
    # are NaN as well, because `Mean` heeds the mask when it aggregates over the batch and else may drop it.
    return np.ma.array(values, mask=np.ma.getmaskarray(label).all(axis=-1, keepdims=True))
