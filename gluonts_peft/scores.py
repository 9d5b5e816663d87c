"""Scores of forecasts that do not depend on the unit of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVELS", "between", "quantile_scores", "scale"]

#: Quantile levels that are scored.
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Smallest scale of a series, relative to its mean size: what hardly ever changes is no measure of errors.
_FLOOR = 0.01

Floats = NDArray[np.float64]


def scale(history: NDArray[Any], season: int) -> Floats:
    """Return what errors of a series are measured in: how far values a season apart differ.

    Parameters
    ----------
    history
        Shape ``(steps,)`` or ``(steps, dimensions)``, all before the first label; NaN is missing.
    season
        Steps of a season. Where no two such values are known or none differ, neighbours are taken.

    Returns
    -------
    numpy.ndarray
        Of each dimension: the mean absolute difference, at least a hundredth of the mean size; 0 where nothing is known
        to differ from 0.
    """
    values = np.asarray(history, dtype=np.float64)
    values = values.reshape(len(values), -1)
    found = np.zeros(values.shape[1])
    for lag in dict.fromkeys((season, 1)):
        found = np.where(found > 0, found, _mean_size(values[lag:] - values[: max(len(values) - lag, 0)]))
    result: Floats = np.maximum(found, _FLOOR * _mean_size(values))
    return result


def _mean_size(values: Floats) -> Floats:
    known = np.isfinite(values)
    total: Floats = np.where(known, np.abs(values), 0.0).sum(axis=0)
    mean: Floats = total / np.maximum(known.sum(axis=0), 1)
    return mean


def quantile_scores(
    forecast: NDArray[Any],
    levels: Sequence[float] | None,
    label: NDArray[Any],
    observed: NDArray[Any],
    scales: NDArray[Any],
) -> Floats:
    """Return the scaled quantile loss (SQL) of windows: the mean of ``2 pinball / scale`` over what was observed.

    Of a point forecast, one level alone, it is the absolute error. It is averaged over the levels 0.1 to 0.9 and over
    dimensions; levels that are not forecast lie on a line between their neighbours, those of sample paths are
    empirical.

    Parameters
    ----------
    forecast
        Shape ``(windows, n, steps)`` or ``(windows, n, steps, dimensions)``.
    levels
        Of axis 1, ascending; None for sample paths.
    label, observed
        Shape ``(windows, steps)`` or ``(windows, steps, dimensions)``.
    scales
        Shape ``(windows, dimensions)``, see :func:`scale`.

    Returns
    -------
    numpy.ndarray
        Of each window; NaN where no dimension has a scale and an observed label.
    """
    values, truth = np.asarray(forecast, dtype=np.float64), np.asarray(label, dtype=np.float64)
    seen = np.asarray(observed) > 0
    if values.ndim == 3:
        values, truth, seen = values[..., None], truth[..., None], seen[..., None]
    if levels is None:
        at = np.moveaxis(np.quantile(values, LEVELS, axis=1), 0, 1)
    else:
        at = np.stack([between(values, levels, level) for level in LEVELS], axis=1)
    weight = np.asarray(LEVELS)[:, None, None]
    below = truth[:, None] - at
    pinball = 2.0 * np.maximum(weight * below, (weight - 1.0) * below).mean(axis=1)
    count = seen.sum(axis=1)
    good: Any = (count > 0) & (scales > 0)
    mean = np.where(seen, pinball, 0.0).sum(axis=1) / np.maximum(count, 1)
    scaled = np.divide(mean, scales, out=np.zeros_like(mean), where=good)
    result: Floats = np.where(good.any(axis=1), scaled.sum(axis=1) / np.maximum(good.sum(axis=1), 1), math.nan)
    return result


def between(values: Floats, levels: Sequence[float], level: float) -> Floats:
    """Return the quantile of a level from those of axis 1: on a line between its neighbours, at the ends the last."""
    position = float(np.interp(level, levels, range(len(levels))))
    low, share = int(position), position % 1.0
    high = min(low + 1, values.shape[1] - 1)
    result: Floats = (1.0 - share) * values[:, low] + share * values[:, high] if share else values[:, low]
    return result
