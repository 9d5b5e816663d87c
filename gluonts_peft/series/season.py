"""Steps in a season: one rule for scores, seasonal naive, trials, reports and the command line.

    season_length("D") -> 7        season_length("h") -> 24        season_length("5min") -> 288

``gluonts.time_feature.get_seasonality`` says 1 for days and weeks: a seasonal naive of daily data is then the last
value, and MASE is divided by the error of that.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import pandas as pd
from pandas.tseries.frequencies import to_offset

__all__ = ["season_length", "unit_of"]

_SECOND = 1_000_000_000
_MINUTE, _HOUR, _DAY = 60 * _SECOND, 3600 * _SECOND, 86_400 * _SECOND
_MONTHS: dict[str, int] = {"Month": 1, "Quarter": 3, "Year": 12}
# The units of `unit_of` -> how many of them are a season: a week of business days, a year of months.
_SEASONS = {"business day": 5, "month": 12}


@lru_cache(maxsize=256)
def unit_of(freq: Any) -> tuple[str, int]:
    """Return what a step of a frequency is made of: a unit and how many of it.

    Equal for frequencies that are the same but for their anchor or spelling: ``60min`` and ``h``, ``W-MON`` and
    ``W-SUN``, ``MS`` and ``M``, ``Q-DEC`` and ``Q-JAN``.

    Parameters
    ----------
    freq
        A frequency of pandas, of periods or offsets, as text or as an offset.

    Returns
    -------
    tuple of (str, int)
        ``("nanosecond", n)`` for all steps up to weeks, ``("month", n)`` for months, quarters and years,
        ``("business day", n)``, or ``(name, n)`` for what pandas calls by another name.

    Raises
    ------
    ValueError
        If it is not a frequency.
    """
    try:
        with warnings.catch_warnings():
            # The spellings of periods are deprecated for offsets.
            warnings.simplefilter("ignore", FutureWarning)
            offset: Any = to_offset(freq)
    except ValueError:
        offset = None
    if offset is None:
        raise ValueError(f"freq {freq!r} is not a frequency; give one like 5min, h, D, W, M, Q or Y")
    if isinstance(offset, pd.offsets.Tick):
        return "nanosecond", int(offset.nanos)
    if isinstance(offset, pd.offsets.Week):
        return "nanosecond", 7 * _DAY * offset.n
    name = type(offset).__name__
    if name in ("BusinessDay", "CustomBusinessDay"):
        return "business day", offset.n
    months = next((count for part, count in _MONTHS.items() if part in name.removeprefix("Semi")), None)
    if months is not None and "Semi" not in name:
        return "month", months * offset.n
    return name, offset.n


def season_length(freq: Any) -> int:
    """Return how many steps make a season.

    An hour for steps below a minute, a day for steps below a day, a week for days and business days, a year for weeks
    (52), months and quarters. 1, no season, for years, for steps below a second, and where a season is not a whole
    number of steps.

    Parameters
    ----------
    freq
        As for :func:`unit_of`.

    Raises
    ------
    ValueError
        If it is not a frequency.

    Examples
    --------
    >>> [season_length(freq) for freq in ("10s", "5min", "30min", "h", "D", "B", "W-SUN", "M", "Q-DEC", "Y-DEC")]
    [360, 288, 48, 24, 7, 5, 52, 12, 4, 1]
    """
    unit, step = unit_of(freq)
    if unit != "nanosecond":
        season = _SEASONS.get(unit, 1)
    elif step < _SECOND:
        return 1
    elif step < _MINUTE:
        season = _HOUR
    elif step < _DAY:
        season = _DAY
    elif step % (7 * _DAY):
        season = 7 * _DAY
    else:
        season = 52 * 7 * _DAY
    return season // step if season % step == 0 else 1
