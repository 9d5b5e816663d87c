"""The steps between charted values and training windows; a stay goes through them alone, so no patient sees another.

What is known of the preparation of *LoRA-TSFM* (arXiv 2405.10216) and *Beyond LoRA* (arXiv 2409.11302) comes from
earlier public code of the same authors: pressures that contradict each other become missing, gaps are filled forward
and then backward, values are scaled by fixed ranges and smoothed per patient, windows are six hours in and three out.
That the papers use it unchanged is an inference; what else is decided here is our choice, and said to be.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .hourly import PLAUSIBLE
from .stays import PRESSURES, Stay, Stays, step_minutes

__all__ = [
    "PAPER_STEPS",
    "SCALES",
    "STEPS",
    "cut_windows",
    "drop_outside",
    "drop_short",
    "fill_gaps",
    "plausible_pressures",
    "prepare",
    "scale",
    "smooth",
]

Array = NDArray[np.float32]
Made = tuple[list[Stay], dict[str, int]]

#: Ranges that become 0 to 1. map, hr and resp are the authors'; sbp, dbp and o2sat are our choice.
SCALES: dict[str, tuple[float, float]] = {
    "hr": (0.0, 300.0),
    "map": (0.0, 190.0),
    "sbp": (0.0, 300.0),
    "dbp": (0.0, 190.0),
    "resp": (0.0, 100.0),
    "o2sat": (0.0, 100.0),
}


def drop_outside(stay: Stay, *, ranges: Mapping[str, Sequence[float]] | None = None) -> Made:
    """Set values outside fixed ranges to missing. Our choice, no step of the papers'.

    Parameters
    ----------
    stay
        A stay.
    ranges
        Vital sign -> lowest and highest value kept; by default `PLAUSIBLE`.
    """
    bounds = PLAUSIBLE if ranges is None else ranges
    values, counts = dict(stay.values), {}
    for vital, column in stay.values.items():
        if vital in bounds:
            low, high = bounds[vital]
            with np.errstate(invalid="ignore"):
                outside = (column < low) | (column > high)
            counts[f"{vital} outside {low:g} to {high:g}"] = int(outside.sum())
            values[vital] = np.where(outside, np.float32(np.nan), column)
    return [stay.with_values(values)], counts


def plausible_pressures(stay: Stay, *, margin: float = 4.0) -> Made:
    """Set pressures that contradict each other to missing: all three, as nobody knows which is wrong (our choice).

    The rules are systolic <= diastolic, systolic <= mean, diastolic >= mean, and systolic <= diastolic + `margin`. A
    rule says nothing where one of its two pressures is missing.

    Parameters
    ----------
    stay
        A stay.
    margin
        mmHg; 4 in the authors' code.
    """
    missing = np.full(len(stay), np.nan, dtype=np.float32)
    mean, systolic, diastolic = (stay.values.get(vital, missing) for vital in PRESSURES)
    with np.errstate(invalid="ignore"):
        rules = {
            "systolic <= diastolic": systolic <= diastolic,
            "systolic <= mean": systolic <= mean,
            "diastolic >= mean": diastolic >= mean,
            f"systolic <= diastolic + {margin:g}": systolic <= diastolic + np.float32(margin),
        }
    wrong = np.any(list(rules.values()), axis=0)
    counts = {rule: int(hits.sum()) for rule, hits in rules.items()}
    values = dict(stay.values)
    for vital in PRESSURES:
        if vital in values:
            counts[f"{vital} set to missing"] = int((wrong & ~np.isnan(values[vital])).sum())
            values[vital] = np.where(wrong, np.float32(np.nan), values[vital])
    return [stay.with_values(values)], counts


def fill_gaps(stay: Stay, *, limit: int | None = None, backward: bool = True) -> Made:
    """Fill missing values forward, then backward.

    Parameters
    ----------
    stay
        A stay.
    limit
        Most steps that a value is carried; None, as in the authors' code, is for ever.
    backward
        Whether steps before a value take it as well, where there is none before them. That looks ahead.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"fill.limit is {limit}; give at least 1, or none")
    values, counts = {}, {"filled forward": 0, "filled backward": 0, "still missing": 0}
    for vital, column in stay.values.items():
        filled = _carried(column, limit)
        counts["filled forward"] += int((np.isnan(column) & ~np.isnan(filled)).sum())
        if backward:
            before = filled
            filled = _carried(before[::-1], limit)[::-1].copy()
            counts["filled backward"] += int((np.isnan(before) & ~np.isnan(filled)).sum())
        counts["still missing"] += int(np.isnan(filled).sum())
        values[vital] = filled
    return [stay.with_values(values)], counts


def scale(stay: Stay, *, ranges: Mapping[str, Sequence[float]] | None = None) -> Made:
    """Scale by fixed ranges, the same for all patients, so that nothing is learnt from the data.

    Values outside their range are kept as they are, below 0 or above 1, and counted.

    Parameters
    ----------
    stay
        A stay.
    ranges
        Vital sign -> value that becomes 0 and value that becomes 1; by default `SCALES`.
    """
    bounds = SCALES if ranges is None else ranges
    values, counts = {}, {"outside 0 to 1": 0}
    for vital, column in stay.values.items():
        if vital not in bounds:
            raise ValueError(f"scale.ranges has no range for {vital!r}; known: {', '.join(bounds)}")
        low, high = bounds[vital]
        if not high > low:
            raise ValueError(f"scale.ranges of {vital!r} is {low:g} to {high:g}; give two values, the higher one last")
        values[vital] = (column - np.float32(low)) / np.float32(high - low)
        with np.errstate(invalid="ignore"):
            counts["outside 0 to 1"] += int(((values[vital] < 0) | (values[vital] > 1)).sum())
    return [stay.with_values(values)], counts


def smooth(
    stay: Stay,
    *,
    method: str = "mean",
    points: int = 3,
    order: int = 2,
    cutoff: float = 0.05,
    zero_phase: bool = False,
) -> Made:
    """Smooth each vital sign of a stay; what was missing stays missing.

    Parameters
    ----------
    stay
        A stay.
    method
        ``"mean"``: trailing mean of `points` (of those observed among them, our choice). ``"butterworth"``: low-pass
        filter, for values without gaps.
    points
        Steps of the trailing mean, the present one included.
    order, cutoff
        Of the Butterworth filter; the cut-off as a share of half the sampling rate.
    zero_phase
        Filter forward and backward. It does not delay, but lets the future into the past. The default filters forward,
        from a state at rest at the first value.
    """
    if method not in ("mean", "butterworth"):
        raise ValueError(f"smooth.method {method!r} is unknown; known: mean, butterworth")
    for name, number in (("points", points), ("order", order)):
        if number < 1:
            raise ValueError(f"smooth.{name} is {number}; give at least 1")
    if not 0 < cutoff < 1:
        raise ValueError(f"smooth.cutoff is {cutoff:g}; give a share of half the sampling rate, between 0 and 1")
    if method == "mean":
        return [stay.with_values({vital: _trailing(column, points) for vital, column in stay.values.items()})], {}
    values = {}
    for vital, column in stay.values.items():
        if np.isnan(column).any() and not np.isnan(column).all():
            raise ValueError(
                f"smooth.method 'butterworth' needs values without gaps, but {vital} of stay {stay.name} has some; "
                "put the step 'fill' (without a limit) before 'smooth', or use method 'mean'"
            )
        values[vital] = column if np.isnan(column).all() else _low_pass(column, order, cutoff, zero_phase)
    return [stay.with_values(values)], {}


def drop_short(stay: Stay, *, hours: float = 48.0) -> Made:
    """Leave out stays that are shorter than a number of hours. Our choice, no step of the papers'."""
    enough = len(stay) * _minutes(stay) >= hours * 60
    return [stay] if enough else [], {f"shorter than {hours:g} hours": int(not enough)}


def cut_windows(
    stay: Stay, *, past: float = 6.0, future: float = 3.0, stride: float | None = None, max_missing: float = 1.0
) -> Made:
    """Cut a stay into windows of history and horizon, which become stays of their own: ``"<stay>/<number>"``.

    At steps of 5 minutes the default is 108 points, 72 in and 36 out.

    Parameters
    ----------
    stay
        A stay.
    past, future
        Hours of history and of horizon.
    stride
        Hours from one window to the next; by default they do not overlap (our choice).
    max_missing
        Vital signs of a window with more than this share of missing points are left out.
    """
    minutes = _minutes(stay)
    stride = past + future if stride is None else stride
    steps = []
    for name, hours in (("past", past), ("future", future), ("stride", stride)):
        exact = hours * 60 / minutes
        if exact < 1 or abs(exact - round(exact)) > 1e-9:
            raise ValueError(f"windows.{name} is {hours:g} hours, which is not a number of steps of {minutes} minutes")
        steps.append(round(exact))
    if not 0 <= max_missing <= 1:
        raise ValueError(f"windows.max_missing is {max_missing:g}; give a share of 0 to 1")
    length = steps[0] + steps[1]
    counts = {"stays shorter than a window": int(len(stay) < length), "points in no window": 0}
    counts |= {"series with too much missing": 0, "windows without a series": 0}
    made, end = [], 0
    for number, first in enumerate(range(0, len(stay) - length + 1, steps[2])):
        end = first + length
        values = {vital: column[first:end].copy() for vital, column in stay.values.items()}
        # A window without any value is dropped, whatever the share.
        kept = {
            vital: column
            for vital, column in values.items()
            if np.isnan(column).mean() <= max_missing and not np.isnan(column).all()
        }
        counts["series with too much missing"] += len(values) - len(kept)
        if kept:
            made.append(Stay(stay.patient, f"{stay.name}/{number}", stay.start + first, kept))
        else:
            counts["windows without a series"] += 1
    counts["points in no window"] = len(stay) - end
    return made, counts


#: Name -> step: a function of one stay and options, which returns stays and counts.
STEPS: dict[str, Callable[..., Made]] = {
    "ranges": drop_outside,
    "plausibility": plausible_pressures,
    "fill": fill_gaps,
    "scale": scale,
    "smooth": smooth,
    "length": drop_short,
    "windows": cut_windows,
}

#: The steps of the authors' code, in its order.
PAPER_STEPS = ("plausibility", "fill", "scale", "smooth", "windows")


def prepare(
    stays: Stays, steps: Sequence[str] = PAPER_STEPS, options: Mapping[str, Mapping[str, Any]] | None = None
) -> Stays:
    """Add steps to stays; they run, stay by stay, when the stays are iterated over.

    Parameters
    ----------
    stays
        What a loader returned.
    steps
        Names of `STEPS`, in the order in which they run, each at most once.
    options
        Step -> its options, as ``{"smooth": {"points": 5}}``.

    Returns
    -------
    Stays
        A copy with the steps. Their counts stand in ``counts`` under their names after an iteration.

    Raises
    ------
    ValueError
        If a step or an option is unknown or cannot be used, a step is named twice, options are given for a step that
        does not run, or the pressures are to be compared but not all three were read.
    """
    options = {} if options is None else options
    check_steps(steps, options, stays.vitals, stays.freq)
    pressures = [vital for vital in PRESSURES if vital in stays.vitals]
    if "plausibility" in steps and 0 < len(pressures) < len(PRESSURES):
        raise ValueError(
            f"the step 'plausibility' compares {', '.join(PRESSURES)}, but only {', '.join(pressures)} was read; "
            "read all three, or leave the step out"
        )
    for step in steps:
        given = dict(options.get(step, {}))
        stays = stays.with_step(step, given, partial(STEPS[step], **given))
    return stays


def check_steps(
    steps: Sequence[str], options: Mapping[str, Mapping[str, Any]], vitals: Sequence[str], freq: str
) -> None:
    """Raise a ValueError if a step or an option is unknown, of no effect, or cannot be used."""
    for step in steps:
        if step not in STEPS:
            raise ValueError(f"step {step!r} is unknown; known: {', '.join(STEPS)}")
    if len(set(steps)) < len(steps):
        raise ValueError(f"steps {', '.join(steps)} name one twice; name each once")
    for step, given in options.items():
        if step not in steps:
            raise ValueError(f"options are given for the step {step!r}, which does not run; steps: {', '.join(steps)}")
        known = [name for name in inspect.signature(STEPS[step]).parameters if name != "stay"]
        hints = get_type_hints(STEPS[step])
        for name in given:
            if name not in known:
                raise ValueError(f"option {step}.{name} is unknown; known: {', '.join(known) or 'none'}")
            _check_kind(f"{step}.{name}", given[name], hints.get(name, Any))
    step_minutes(freq)
    # What a step refuses, it refuses of any stay: better now than after hours of reading.
    column = {vital: np.ones(1, dtype=np.float32) for vital in vitals if vital in PLAUSIBLE}
    one = Stay("", "", pd.Period("2000-01-01 00:00", freq), column)
    for step in steps:
        # The horizon by default may not fit the freq.
        if step in options or step == "windows":
            STEPS[step](one, **options.get(step, {}))


def _check_kind(name: str, value: Any, hint: Any) -> None:
    """Raise a ValueError if a value is not of the kind that a step's option has."""
    kinds = get_args(hint) if NoneType in get_args(hint) else (hint,)
    if value is None and NoneType in kinds:
        return
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    wanted = {
        bool: ("true or false", isinstance(value, bool)),
        int: ("a whole number", number and isinstance(value, Integral)),
        float: ("a number", number),
        str: ("a name", isinstance(value, str)),
    }
    if kinds[0] in wanted:
        what, right = wanted[kinds[0]]
        if not right:
            raise ValueError(f"{name} is {value!r}; give {what}{', or leave it out' if NoneType in kinds else ''}")
        return
    if get_origin(kinds[0]) is not Mapping:
        return
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{name} is {value!r}; give a range for each vital sign, as {{hr: [20, 250]}}")
    for vital, pair in value.items():
        if vital not in PLAUSIBLE:
            raise ValueError(f"{name} names {vital!r}, which is unknown; known: {', '.join(PLAUSIBLE)}")
        pair = list(pair) if isinstance(pair, Sequence) and not isinstance(pair, str) else [pair]
        for bound in pair:
            _check_kind(f"{name} of {vital!r}", bound, float)
        if len(pair) != 2 or not pair[0] < pair[1]:
            found = " to ".join(f"{bound:g}" for bound in pair)
            raise ValueError(f"{name} of {vital!r} is {found}; give two values, the higher one last")


def _minutes(stay: Stay) -> int:
    return step_minutes(stay.start.freqstr)


def _carried(column: Array, limit: int | None) -> Array:
    """Last observed value, up to `limit` steps old; NaN where there is none."""
    places = np.arange(len(column))
    latest = np.maximum.accumulate(np.where(np.isnan(column), -1, places))
    filled: Array = np.where(latest >= 0, column[latest], np.float32(np.nan))
    if limit is not None:
        filled = np.where(places - latest > limit, np.float32(np.nan), filled)
    return filled


def _trailing(column: Array, points: int) -> Array:
    observed = ~np.isnan(column)
    padded = np.concatenate([np.zeros(points - 1), np.where(observed, column, 0.0)])
    there = np.concatenate([np.zeros(points - 1), observed])
    window = np.ones(points)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.convolve(padded, window, "valid") / np.convolve(there, window, "valid")
    smoothed: Array = np.where(observed, mean, np.nan).astype(np.float32)
    return smoothed


def _low_pass(column: Array, order: int, cutoff: float, zero_phase: bool) -> Array:
    from scipy.signal import butter, sosfilt, sosfilt_zi, sosfiltfilt

    sections = butter(order, cutoff, output="sos")
    values = column.astype(np.float64)
    if zero_phase:
        smoothed: Array = sosfiltfilt(sections, values, padlen=min(len(values) - 1, 3 * (2 * len(sections) + 1)))
    else:
        smoothed, _ = sosfilt(sections, values, zi=sosfilt_zi(sections) * values[0])
    return smoothed.astype(np.float32)
