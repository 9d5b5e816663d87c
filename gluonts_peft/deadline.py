"""A limit of time: what it may be written as, and what is left of it.

Nothing here stops anything. Who works under a limit measures what its parts cost as it goes, keeps enough in reserve
for those that are still to come, and asks before each further step whether that fits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from numbers import Real
from typing import Any

__all__ = ["TIME_LIMIT", "Deadline", "parse_time_limit", "spelled"]

#: Why a training ended, see :attr:`gluonts_peft.training.Fit.stopped`.
TIME_LIMIT = "time_limit"
# What has been measured may take somewhat longer the next time.
_MARGIN = 1.1


def parse_time_limit(value: Any) -> float | None:
    """Return a limit of time in seconds, None for none.

    Parameters
    ----------
    value
        A number of seconds, text such as ``"90s"``, ``"10min"``, ``"1h30min"`` or ``"0:10:00"``, as
        :class:`pandas.Timedelta` reads it, or a :class:`datetime.timedelta`.

    Raises
    ------
    ValueError
        If it is anything else, or not above 0.

    Examples
    --------
    >>> parse_time_limit("1h30min"), parse_time_limit(90), parse_time_limit("90")
    (5400.0, 90.0, 90.0)
    """
    if value is None:
        return None
    seconds = math.nan
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, Real) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        seconds = _read(value)
    if not 0.0 < seconds < math.inf:
        raise ValueError(
            f"time_limit {value!r} is not a time above 0; write e.g. '90s', '10min', '1h30min' or a number of seconds,"
            " or leave it out for none"
        )
    return seconds


def _read(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    import pandas as pd

    try:
        # pandas would warn of the spelling "1H".
        return float(pd.Timedelta(text.strip().lower()).total_seconds())
    except ValueError:
        return math.nan


def spelled(seconds: float) -> str:
    """Return a time as :func:`parse_time_limit` reads it.

    >>> spelled(5400.0), spelled(90.0), spelled(0.5)
    ('1h30min', '1min30s', '0.5s')
    """
    minutes, rest = divmod(seconds, 60.0)
    hours, minutes = divmod(int(minutes), 60)
    parts = (f"{hours}h" if hours else "", f"{minutes}min" if minutes else "", f"{rest:g}s" if rest else "")
    return "".join(parts)


class Deadline:
    """What is left of a limit that began when this was made.

    Parameters
    ----------
    limit
        Seconds.
    clock
        Gives seconds and never goes back.

    Attributes
    ----------
    earlier
        Seconds that were spent before it was made, by a run that is gone on with.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.clock = clock
        self.earlier = 0.0
        self._start = clock()
        self._expected: dict[str, float] = {}
        self._measured: dict[str, float] = {}

    def left(self) -> float:
        """Return the seconds that are left; below 0 if the limit is over."""
        return self.limit - self.earlier - (self.clock() - self._start)

    def expect(self, part: str, seconds: float) -> None:
        """Say what a part will probably cost, until it is measured."""
        self._expected[part] = seconds

    def note(self, part: str, seconds: float) -> None:
        """Say what a part has cost; the most that was ever measured counts."""
        self._measured[part] = max(self._measured.get(part, 0.0), seconds)

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Note what is done within the context."""
        begin = self.clock()
        yield
        self.note(part, self.clock() - begin)

    def cost(self, part: str) -> float:
        """Return what a part costs, as far as that is known."""
        return self._measured.get(part, self._expected.get(part, 0.0))

    def fits(self, *parts: str, margin: float = _MARGIN) -> bool:
        """Return whether there is time for these parts, one after the other."""
        return self.left() > margin * math.fsum(self.cost(part) for part in parts)
