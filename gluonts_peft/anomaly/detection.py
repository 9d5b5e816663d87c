"""Find the anomalies of each series: scores, a threshold from its clean part, and the events above it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..series.entries import Unusable
from .events import Event, find_events
from .scores import Scores, score, smooth
from .thresholds import LEAST_CALIBRATION, threshold_options
from .thresholds import threshold as threshold_of

if TYPE_CHECKING:
    from ..backbone import Backbone
    from ..predictor import PeftPredictor

__all__ = ["Detection", "check_calibration", "detect"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Detection:
    """What :func:`detect` says of a series: its scores, the threshold, the events above it, and the first step that was
    judged, behind the calibration part.
    """

    scores: Scores
    threshold: float
    events: list[Event]
    begin: int = 0


def check_calibration(calibration: Any) -> None:
    """Raise a ValueError for what :func:`detect` cannot calibrate on."""
    if calibration is None:
        raise ValueError(
            "calibration is missing: a threshold needs a part without anomalies; name its steps, its share of each"
            " series, or a clean dataset"
        )
    share = isinstance(calibration, float | np.floating)
    if isinstance(calibration, int | float | np.number) and (calibration <= 0 or share and calibration >= 1.0):
        raise ValueError(f"calibration {calibration} is neither a share between 0 and 1 nor a number of steps")


def detect(
    model: PeftPredictor | Backbone,
    dataset: Iterable[Mapping[str, Any]],
    *,
    calibration: int | float | Iterable[Mapping[str, Any]] | None = None,
    method: str = "auto",
    threshold: str | Mapping[str, Any] = "quantile",
    smoothing: int = 1,
    merge: int = 0,
    min_length: int = 1,
    unusable: str = "raise",
    **options: Any,
) -> list[Detection]:
    """Find the anomalies of each series.

    Parameters
    ----------
    model, dataset, method, smoothing, **options
        As :func:`score`.
    calibration
        What is known to be clean: an integer, the first steps of each series; a share below 1 of each; or a GluonTS
        dataset of clean series, whose scores are pooled. In a part of the series itself no events are looked for.
    threshold
        As :func:`threshold`.
    merge, min_length
        As :func:`find_events`.
    unusable
        As :func:`score`; a series of which the calibration part gives fewer than 50 scores, or only equal ones, is
        unusable too.

    Returns
    -------
    list of Detection
        One a series that can be used, in order. A constant series has the threshold 0 and no events.

    Raises
    ------
    EntryError
        As :func:`score`.
    ValueError
        If there is no calibration, or a calibration dataset gives fewer than 50 scores, or only equal ones, and as
        :func:`score`.
    """
    check_calibration(calibration)
    # Refused before the work rather than after it.
    smooth([], smoothing)
    threshold_options(threshold)
    find_events(Scores("", pd.Period("2000", "D"), np.zeros(1)), 0.0, merge=merge, min_length=min_length)
    common: dict[str, Any] = dict(method=method, unusable=unusable, **options)
    limit = None
    lacks: Callable[[NDArray[Any]], str | None] | None
    if isinstance(calibration, np.integer):
        calibration = int(calibration)
    if isinstance(calibration, int | float):
        first: int | float = calibration

        def calibrated(length: int) -> int:
            return first if isinstance(first, int) else math.ceil(length * first)

        def lacks_calibration(target: NDArray[Any]) -> str | None:
            begin = calibrated(len(target))
            if begin >= len(target):
                return f"calibration {first} leaves nothing of its {len(target)} steps"
            seen = begin if target.dtype.kind != "f" else int((~np.isnan(target[:begin])).sum())
            return _too_few(seen, "observed values")

        lacks = lacks_calibration
    else:
        clean = np.concatenate(
            [
                smooth(found.values, smoothing)
                for found in score(model, cast(Iterable[Mapping[str, Any]], calibration), **common)
            ]
        )
        limit = threshold_of(clean, threshold, where="the calibration dataset")
        lacks = None

    detections = []
    useless = Unusable("judged", unusable)
    all_scores = score(model, dataset, lacks=lacks, **common)
    for found in all_scores:
        begin, level = 0, limit
        if level is None:
            begin = calibrated(len(found.values))
            # By itself: a mean over its end would look at what comes after.
            clean = smooth(found.values[:begin], smoothing)
            count = int((~np.isnan(clean)).sum())
            if not np.nanmax(found.values):
                level = 0.0
            elif lack := _too_few(count, "scores") or _all_equal(clean):
                useless.add(f"item_id {found.item_id!r}", lack)
                continue
            else:
                level = threshold_of(clean, threshold, where=f"the calibration part of series {found.item_id!r}")
        scores = replace(found, values=smooth(found.values, smoothing))
        late = scores.values.copy()
        late[:begin] = np.nan
        events = find_events(replace(scores, values=late), level, merge=merge, min_length=min_length)
        detections.append(Detection(scores, level, events, begin))
    useless.settle(len(all_scores))
    return detections


def _too_few(count: int, what: str) -> str | None:
    if count >= LEAST_CALIBRATION:
        return None
    return f"{count} {what} in its calibration part, a threshold needs {LEAST_CALIBRATION}"


def _all_equal(scores: Floats) -> str | None:
    clean = scores[~np.isnan(scores)]
    return f"all scores of its calibration part are {clean[0]:g}" if clean.min() == clean.max() else None
