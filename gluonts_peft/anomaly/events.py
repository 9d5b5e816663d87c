"""Stretches of a series whose scores lie above a threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..sweep import runs
from .scores import Scores

__all__ = ["Event", "find_events"]


@dataclass(frozen=True)
class Event:
    """A stretch above the threshold.

    Parameters
    ----------
    first, last
        Its first and its last step in the series.
    start, end
        The same as periods.
    peak
        Its highest score.
    """

    first: int
    last: int
    start: pd.Period
    end: pd.Period
    peak: float


def find_events(scores: Scores, limit: float, *, merge: int = 0, min_length: int = 1) -> list[Event]:
    """Return the stretches of scores above a limit.

    Parameters
    ----------
    scores
        Of one series.
    limit
        The threshold; a score equal to it is not above it.
    merge
        Stretches with at most so many steps between them are one event.
    min_length
        Fewest steps of an event, after merging.
    """
    if merge < 0 or min_length < 1:
        raise ValueError(f"merge {merge} and min_length {min_length}: give merge >= 0 and min_length >= 1")
    joined: list[tuple[int, int]] = []
    with np.errstate(invalid="ignore"):
        above = scores.values > limit
    for begin, end in runs(above).tolist():
        if joined and begin - joined[-1][1] <= merge:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return [
        Event(
            begin, end - 1, scores.start + begin, scores.start + (end - 1), float(np.nanmax(scores.values[begin:end]))
        )
        for begin, end in joined
        if end - begin >= min_length
    ]
