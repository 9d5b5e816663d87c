"""Recalibration: quantiles moved so that they hold as many labels as they say, learnt on units that chose nothing.

Split-conformal, a quantile at a time: the score of a label is how far it lies above the forecast quantile, in units of
its series (:func:`gluonts_peft.verdict.scale`), so that series of all sizes pool. The quantile of level q is moved by
the q-quantile of these scores, step by step of the horizon; that is the shift with the least scaled quantile loss. The
median stays, and with it all scores of points; afterwards the quantiles are put in order from the median outwards.

References
----------
Romano, Patterson and Candès (2019), Conformalized quantile regression. Their guarantee rounds outwards; here a quantile
lies between order statistics, at rank ``q (n + 1)``, which is right on average and not at least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .scorer import forecast_alike, history_scales, keys_of, season_of, units_of
from .scores import LEVELS, between, scale
from .verdict import FOLDS

if TYPE_CHECKING:
    from .backbone import Backbone
    from .series.windows import LastWindows, Windows

__all__ = ["LEAST_UNITS", "Calibration", "Calibrator", "learn", "require_quantiles", "set_apart"]

#: Units that a calibration rests on, at least: with fewer the share of labels below a quantile is hardly known.
LEAST_UNITS = 20
# Scores, one a unit and step, that the shift of a step rests on; with fewer units neighbouring steps are taken in.
_SCORES = 200
# Of all units, where no validation data are given: what is then not trained on either.
_SHARE = 5
_MEDIAN = 0.5
_BATCH = 64

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """What moves forecast quantiles.

    Parameters
    ----------
    levels
        Quantile levels, ascending, between 0 and 1; others lie on a line between their neighbours, beyond the ends the
        last one goes on.
    shifts
        Of each level and step of the horizon, in units of the series.
    season
        Steps of a season, for these units.
    before, after
        Share of the labels between the 0.1 and the 0.9 quantile, on the units that the shifts were learnt on: without
        them, and with those that the other folds of the units give. Units count alike.
    change
        Change of the scaled quantile loss, from the same folds, in per cent; below 0 is better.
    units, unit, windows, left_out
        How many were learnt from, what they are, their windows, and windows without a scale that were left out.

    Raises
    ------
    TypeError, ValueError
        If the shifts are no table of numbers, or levels do not rise from above 0 to below 1.
    """

    levels: tuple[float, ...]
    shifts: tuple[tuple[float, ...], ...]
    season: int
    before: float
    after: float
    change: float
    units: int
    unit: str
    windows: int
    left_out: int

    def __post_init__(self) -> None:
        levels = tuple(float(level) for level in self.levels)
        shifts = tuple(tuple(float(shift) for shift in row) for row in self.shifts)
        edges = (0.0, *levels, 1.0)
        if not levels or not all(low < high for low, high in zip(edges, edges[1:], strict=False)):
            raise ValueError(f"levels {levels} do not rise from above 0 to below 1")
        if len(shifts) != len(levels) or len({len(row) for row in shifts}) != 1 or not shifts[0]:
            raise ValueError(f"shifts are not a row for each of {len(levels)} levels, a column for each step")
        if not all(math.isfinite(shift) for row in shifts for shift in row):
            raise ValueError("shifts are not all finite")
        if self.season < 1:
            raise ValueError(f"season {self.season} is not positive")
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "shifts", shifts)

    @property
    def steps(self) -> int:
        """Steps of the horizon."""
        return len(self.shifts[0])

    @property
    def empty(self) -> bool:
        """Whether there was nothing to correct, so that forecasts are as they were."""
        return not self._table.any()

    @cached_property
    def _table(self) -> Floats:
        return np.array(self.shifts, dtype=np.float64)

    def __str__(self) -> str:
        change = f"scaled quantile loss {self.change:+.2f} %, {self.units} {self.unit}"
        if self.empty:
            return f"nothing to correct: the 80 % interval holds {100 * self.before:.1f} % ({self.units} {self.unit})"
        return f"80 % interval holds {100 * self.before:.1f} % before and {100 * self.after:.1f} % after ({change})"

    def scales(self, entries: Sequence[Mapping[str, Any]]) -> Floats:
        """Return the units of entries with ``target``, ``(time,)`` or ``(dim, time)``, shape ``(entries, dim)``."""
        return np.stack([scale(np.asarray(entry["target"], dtype=np.float64).T, self.season) for entry in entries])

    def apply(self, values: NDArray[Any], levels: Sequence[float] | None, scales: NDArray[Any]) -> NDArray[Any]:
        """Return calibrated forecasts; quantiles rise with their level.

        Parameters
        ----------
        values
            Shape ``(windows, n, steps)`` or ``(windows, n, steps, dim)``, of the first steps of the horizon.
        levels
            Of axis 1, ascending; None for sample paths. At each step the k-th smallest of n paths is moved as the
            quantile of level ``(k - 1) / (n - 1)`` is, so that paths keep their ranks.
        scales
            Of the windows, shape ``(windows, dim)``; where it is 0 the forecast stays.

        Returns
        -------
        numpy.ndarray
            Of the same shape and type.
        """
        if self.empty:
            return values
        found = np.asarray(values, dtype=np.float64)
        found = found[..., None] if values.ndim == 3 else found
        order = None
        if levels is None:
            order = found.argsort(axis=1, kind="stable")
            found, levels = np.take_along_axis(found, order, axis=1), _path_levels(found.shape[1])
        result = _moved(found, levels, _at(self._table, self.levels, levels)[:, : found.shape[2]], scales)
        if order is not None:
            np.put_along_axis(placed := np.empty_like(result), order, result, axis=1)
            result = placed
        return result.reshape(values.shape).astype(values.dtype)


def learn(
    values: NDArray[Any],
    levels: Sequence[float] | None,
    label: NDArray[Any],
    observed: NDArray[Any],
    scales: NDArray[Any],
    units: Sequence[Any],
    *,
    season: int = 1,
    unit: str = "series",
) -> Calibration:
    """Learn the shifts of quantiles.

    A shift rests on the scores of its step, one of each unit. Where these are fewer than 200, those of neighbouring
    steps are taken in, as many on each side as are needed. A pair of levels, q and 1 - q, is corrected only if that
    lowers their loss where the shifts come from other units: else the shifts are taken for noise, and are 0.

    Parameters
    ----------
    values, levels
        Forecasts, as in :meth:`Calibration.apply`; of sample paths the empirical quantiles 0.1 to 0.9 are learnt from.
    label, observed
        Shape ``(windows, steps)`` or ``(windows, steps, dim)``.
    scales
        Shape ``(windows, dim)``; windows without any are left out and counted.
    units
        Whose each window is: its scores count as one of each step, whatever their number.
    season, unit
        For the record, see :class:`Calibration`.
    """
    found, truth = np.asarray(values, dtype=np.float64), np.asarray(label, dtype=np.float64)
    seen = np.asarray(observed) > 0
    if found.ndim == 3:
        found, truth, seen = found[..., None], truth[..., None], seen[..., None]
    seen = seen & (scales > 0)[:, None]
    good: NDArray[np.bool_] = np.asarray(seen.any(axis=(1, 2)))
    if not good.any():
        raise ValueError("no window has an observed label and a scale: there is nothing to calibrate on")
    found, truth, seen, scales = found[good], truth[good], seen[good], np.asarray(scales, dtype=np.float64)[good]
    _, whose = np.unique([str(each) for each, kept in zip(units, good, strict=True) if kept], return_inverse=True)
    if levels is None:
        levels, found = LEVELS, np.moveaxis(np.quantile(found, LEVELS, axis=1), 0, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.where(seen[:, None], (truth[:, None] - found) / scales[:, None, None], np.nan)
    count = int(whose.max()) + 1
    part = np.random.default_rng(0).permutation(np.arange(count) % min(FOLDS, count))[whose]
    tables = {fold: _table(scores[part != fold], whose[part != fold], levels) for fold in set(part.tolist())}

    def crossed(kept: NDArray[np.bool_]) -> Floats:
        """Return quantiles of each fold that were moved by what the others say."""
        result: Floats = found.copy()
        for fold, table in tables.items():
            here = part == fold
            result[here] = _moved(found[here], levels, np.where(kept[:, None], table, 0.0), scales[here])
        return result

    def losses(quantiles: Floats) -> Floats:
        weight = np.asarray(levels)[:, None, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            below = np.where(seen[:, None], (truth[:, None] - quantiles) / scales[:, None, None], np.nan)
        return np.array(
            [_mean(each, whose) for each in np.moveaxis(np.maximum(weight * below, (weight - 1) * below), 1, 0)]
        )

    before = losses(found)
    gains = before - losses(crossed(np.ones(len(levels), bool)))
    pairs = np.round(np.abs(np.asarray(levels) - _MEDIAN), 9)
    kept = np.array([gains[pairs == pair].sum() > 0 for pair in pairs])
    table = np.where(kept[:, None], _table(scores, whose, levels), 0.0)
    after = crossed(kept)
    share = [_mean(np.where(seen, _inside(each, levels, truth), np.nan), whose) for each in (found, after)]
    return Calibration(
        levels=tuple(levels),
        shifts=tuple(map(tuple, table.tolist())),
        season=season,
        before=share[0],
        after=share[1],
        change=100.0 * (float(losses(after).mean() / before.mean()) - 1.0) if before.any() else 0.0,
        units=count,
        unit=unit,
        windows=len(found),
        left_out=len(good) - len(found),
    )


def _table(scores: Floats, whose: NDArray[np.int_], levels: Sequence[float]) -> Floats:
    """Return the shift of each level and step, from scores ``(windows, levels, steps, dim)``, NaN if unknown."""
    known = np.isfinite(scores[:, 0])
    steps = scores.shape[2]
    seen = np.zeros((int(whose.max()) + 1, steps), bool)
    np.logical_or.at(seen, whose, known.any(axis=2))
    total = np.concatenate([[0], np.cumsum(seen.sum(axis=0))])
    table = np.zeros((len(levels), steps))
    for step in range(steps):
        reach = next(
            reach
            for reach in range(steps)
            if total[min(steps, step + reach + 1)] - total[max(0, step - reach)] >= _SCORES or reach == steps - 1
        )
        near = slice(max(0, step - reach), step + reach + 1)
        here = known[:, near]
        owner = np.broadcast_to(whose[:, None, None], here.shape)[here]
        if not len(owner):
            continue
        counts = np.bincount(owner)
        weights = 1.0 / counts[owner]
        of_levels = np.moveaxis(scores[:, :, near], 1, 0)[:, here]
        order = of_levels.argsort(axis=1, kind="stable")
        weights = weights[order]
        # With one score a unit, the k-th of n lies at k / (n + 1): the level that it has on average.
        places = (weights.cumsum(axis=1) - weights / 2 + 0.5) / ((counts > 0).sum() + 1)
        ordered = np.take_along_axis(of_levels, order, axis=1)
        table[:, step] = [np.interp(*each) for each in zip(levels, places, ordered, strict=True)]
    table[np.asarray(levels) == _MEDIAN] = 0.0
    return table


def _at(table: Floats, levels: Sequence[float], wanted: Sequence[float]) -> Floats:
    """Return the shifts of other levels, shape ``(wanted, steps)``."""
    place = np.interp(wanted, levels, range(len(levels)))
    low = place.astype(int)
    share = (place - low)[:, None]
    result: Floats = (1.0 - share) * table[low] + share * table[np.minimum(low + 1, len(levels) - 1)]
    return result


def _path_levels(count: int) -> list[float]:
    """Return the levels of ordered paths; the middle two of an even number make the median together."""
    if count == 1:
        return [_MEDIAN]
    return [_MEDIAN if abs(2 * k - (count - 1)) <= 1 else k / (count - 1) for k in range(count)]


def _moved(values: Floats, levels: Sequence[float], shifts: Floats, scales: NDArray[Any]) -> Floats:
    """Return quantiles ``(windows, levels, steps, dim)`` after shifts ``(levels, steps)``, in order."""
    result = values + shifts[:, :, None] * scales[:, None, None]
    at = np.asarray(levels)
    upper, lower = np.flatnonzero(at > _MEDIAN), np.flatnonzero(at < _MEDIAN)[::-1]
    # Of an even number of paths two make the median.
    middle = np.flatnonzero(at == _MEDIAN)[[0, -1]] if _MEDIAN in levels else None
    ends = [between(result, levels, _MEDIAN)] * 2 if middle is None else [result[:, number] for number in middle]
    result[:, upper] = np.maximum.accumulate(np.maximum(result[:, upper], ends[1][:, None]), axis=1)
    result[:, lower] = np.minimum.accumulate(np.minimum(result[:, lower], ends[0][:, None]), axis=1)
    return np.where((scales > 0)[:, None, None], result, values)


def _inside(quantiles: Floats, levels: Sequence[float], truth: Floats) -> Floats:
    low, high = (between(quantiles, levels, level) for level in (LEVELS[0], LEVELS[-1]))
    return ((low <= truth) & (truth <= high)).astype(np.float64)


def _mean(values: Floats, whose: NDArray[np.int_]) -> float:
    """Return the mean over units of their mean over windows, steps and dimensions; NaN is unknown."""
    known = np.isfinite(values)
    index = np.broadcast_to(whose[:, None, None], values.shape)[known]
    counts = np.bincount(index)
    sums = np.bincount(index, weights=values[known])
    return float((sums[counts > 0] / counts[counts > 0]).mean())


def set_apart(last: LastWindows, unit: str, *, own: bool) -> tuple[LastWindows, LastWindows, NDArray[np.bool_]]:
    """Divide validation windows into those that choose epoch and weight, and those that calibrate.

    Half of the units calibrate, drawn at random, always in the same way. Without validation data it is a fifth of all
    units, at least 20 and at most half: these must not be trained on. Of a single unit the second half of the windows
    calibrates.

    Parameters
    ----------
    last
        Validation windows.
    unit
        ``"series"`` or ``"patients"``.
    own
        Whether they are of the training series.

    Returns
    -------
    tuple
        The windows that choose, those that calibrate, and which series of their store must not be trained on.

    Raises
    ------
    ValueError
        If fewer than 20 units can be set apart.
    """
    from .series.windows import LastWindows

    store = last.windows.store
    keys = keys_of(store, last.series, unit)
    names = list(dict.fromkeys(keys))
    untrained = np.zeros(len(store), bool)
    if len(names) == 1:
        count = len(keys) // 2
        apart = np.arange(len(keys)) >= len(keys) - count
        lack = f"half of the {len(keys)} validation windows of a single {unit.removesuffix('s')}"
        remedy = f"set validation_windows to {2 * LEAST_UNITS} or more"
    else:
        half = len(names) // 2
        count = min(half, max(LEAST_UNITS, math.ceil(len(names) / _SHARE))) if own else half
        chosen = {names[number] for number in np.random.default_rng(0).permutation(len(names))[:count]}
        apart = np.array([key in chosen for key in keys])
        lack = f"half of {len(names)} {unit} with validation windows"
        remedy = f"give validation_data of {2 * LEAST_UNITS} {unit} or more"
        if own:
            untrained = np.array([key in chosen for key in keys_of(store, np.arange(len(store)), unit)])
    if count < LEAST_UNITS:
        raise ValueError(
            f"calibrate needs {LEAST_UNITS} {unit if len(names) > 1 else 'windows'} that neither train nor choose, and"
            f" there are {count}, {lack}: {remedy}, or leave calibrate out"
        )
    parts = [
        LastWindows(last.windows, last.series[part], last.cuts[part], last.skipped, last.batch_size)
        for part in (~apart, apart)
    ]
    return parts[0], parts[1], untrained


def require_quantiles(backbone: Backbone, head_levels: Sequence[float] | None, last: LastWindows) -> None:
    """Refuse to calibrate what forecasts points.

    Parameters
    ----------
    backbone
        Before the adapter is attached.
    head_levels
        Of a head that comes with the adapter.
    last
        Windows; one is forecast where the model has its own head.

    Raises
    ------
    ValueError
        If there is but one value a step.
    """
    if head_levels is not None:
        if len(head_levels) == 1:
            raise ValueError(
                "calibrate has no part in points, and the head forecasts these: give it output 'quantile', as in"
                " {'name': 'head', 'kind': 'linear', 'output': 'quantile'}, or leave calibrate out"
            )
    elif not backbone.untrained:
        values, _ = _forecast(backbone, last.windows.read(last.series[:1], last.cuts[:1]))
        if values.shape[1] == 1:
            raise ValueError(
                f"calibrate has no part in points, which {backbone.source.checkpoint!r} forecasts: name a model with"
                " quantiles or sample paths, or leave calibrate out"
            )


class Calibrator:
    """Learns a calibration from windows that were set apart.

    Parameters
    ----------
    windows
        That neither trained nor chose.
    unit
        ``"series"`` or ``"patients"``; windows of a single one are units themselves.

    Raises
    ------
    ValueError
        If fewer than 20 units have a scale.
    """

    def __init__(self, windows: LastWindows, unit: str) -> None:
        store = windows.windows.store
        self._season = season_of(store)
        self._source: Windows = windows.windows
        self._series, self._cuts = windows.series, windows.cuts
        self._keys, self._unit = units_of(keys_of(store, windows.series, unit), unit)
        self._scales = history_scales(store, self._series, self._cuts)
        good: NDArray[np.bool_] = np.asarray((self._scales > 0).any(axis=1))
        count = len({key for key, kept in zip(self._keys, good, strict=True) if kept})
        if count < LEAST_UNITS:
            raise ValueError(
                f"calibrate needs {LEAST_UNITS} {self._unit} that neither train nor choose, and of those that are set"
                f" apart {count} have a history that differs from 0: give more validation data, or leave calibrate out"
            )

    def learn(self, backbone: Backbone) -> Calibration:
        """Learn the calibration of a model that is trained."""
        from .units import refuse_nonfinite

        values, labels, observed = [], [], []
        levels: Sequence[float] | None = None
        names = self._source.store.item_ids
        for begin in range(0, len(self._cuts), _BATCH):
            part = slice(begin, begin + _BATCH)
            batch = self._source.read(self._series[part], self._cuts[part])
            found, levels = _forecast(backbone, batch)
            refuse_nonfinite(found, [names[number] for number in self._series[part]].__getitem__, "forecast")
            values.append(found)
            labels.append(batch["future_target"])
            observed.append(batch["future_observed_values"])
        return learn(
            np.concatenate(values),
            levels,
            np.concatenate(labels),
            np.concatenate(observed),
            self._scales,
            self._keys,
            season=self._season,
            unit=self._unit,
        )


def _forecast(backbone: Backbone, batch: Mapping[str, Any]) -> tuple[NDArray[Any], tuple[float, ...] | None]:
    with backbone.reading() as reader:
        found = forecast_alike(reader, batch)
    return found.values.double().cpu().numpy(), found.levels
