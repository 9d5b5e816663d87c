"""Frequency, zone and phase: how the periods that models see become the time stamps that people wrote, and back.

A model sees ``start``, a ``pandas.Period``, and counts steps. What a period does not know, its `Calendar` does: the
zone, the time of day, the weekday of a week, whether a month is stamped on its first or its last day. A reader puts it
into the ``info`` of an entry (under ``"calendar"``, as numbers and text), from where GluonTS itself carries it through
splits and predictors to ``Forecast.info``; `calendar_of` finds it in an entry or a forecast. An entry without one is
stamped with the starts of its periods.

Two kinds of steps: those up to hours have an absolute length, and follow the clock of the zone only by name (a day of
23 or 25 hours has so many hourly steps); days and longer steps follow the clock on the wall, however long they are.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.tseries.frequencies import to_offset

__all__ = [
    "Calendar",
    "Stamps",
    "calendar_of",
    "first_stamp",
    "period_freq",
    "stamp_table",
    "stamps_of",
    "with_calendar",
]

Integers = NDArray[np.int64]

DAY = 86_400_000_000_000
ANCHORS = ("start", "end", "business start", "business end")
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
DAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
_FIELD = "calendar"


@dataclass(frozen=True)
class Calendar:
    """How the periods of a series become time stamps.

    Attributes
    ----------
    anchor
        What of a period the stamps are near: its first or last day, or first or last business day.
    phase
        Nanoseconds from the anchor to the stamp.
    zone
        Name of the time zone (``"Europe/Berlin"``, ``"+09:00"``); None for stamps without one.
    ahead
        For steps of absolute length in a zone: nanoseconds by which the clock of the periods is ahead of UTC, which is
        that of the zone at the first stamp. None: periods follow the clock of the zone.
    changes
        Where stamps had several UTC offsets and no zone was named: (instant, offset) in nanoseconds, from where on.
    exceptions
        Stamps that do not follow the rule: (ordinal of the period, clock) in nanoseconds.

    Examples
    --------
    >>> entry = with_calendar({"start": pd.Period("2023-03", "M")}, Calendar(anchor="end", zone="Asia/Tokyo"))
    >>> stamps_of(entry["start"], 2, calendar_of(entry))[0]
    Timestamp('2023-03-31 00:00:00+0900', tz='Asia/Tokyo')
    """

    anchor: str = "start"
    phase: int = 0
    zone: str | None = None
    ahead: int | None = None
    changes: tuple[tuple[int, int], ...] = ()
    exceptions: tuple[tuple[int, int], ...] = ()

    @property
    def plain(self) -> bool:
        """Whether time stamps are the starts of the periods, without a zone."""
        return self == _PLAIN

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from a plain calendar, as numbers, text and lists."""
        found = {name: value for name, value in vars(self).items() if value != getattr(_PLAIN, name)}
        return {name: [list(pair) for pair in value] if name in _PAIRS else value for name, value in found.items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Calendar:
        """Return the calendar that `to_dict` described; a ValueError if it is none."""
        # Arrow gives every entry all the fields that one of them has.
        given = {name: value for name, value in content.items() if value is not None}
        try:
            for name in _PAIRS & given.keys():
                given[name] = tuple((int(one), int(other)) for one, other in given[name])
            found = cls(**given)
            ok = found.anchor in ANCHORS and isinstance(found.phase, int) and isinstance(found.ahead, int | None)
            if found.zone is not None:
                _known_zone(found.zone)
        except Exception:
            ok = False
        if not ok:
            raise ValueError(f"info['calendar'] {dict(content)!r} is no calendar; leave it out, or as it was read")
        return found


@lru_cache(maxsize=256)
def _known_zone(name: str) -> None:
    pd.DatetimeIndex([], tz=name)


_PLAIN = Calendar()
_PAIRS = {"changes", "exceptions"}


def calendar_of(thing: Any) -> Calendar:
    """Return the calendar of an entry or a forecast; a plain one where it has none."""
    info = thing.get("info") if isinstance(thing, Mapping) else getattr(thing, "info", None)
    content = info.get(_FIELD) if isinstance(info, Mapping) else None
    return _PLAIN if not isinstance(content, Mapping) else Calendar.from_dict(content)


def with_calendar(entry: Mapping[str, Any], calendar: Calendar) -> dict[str, Any]:
    """Return an entry that carries a calendar, for `calendar_of`."""
    info = entry.get("info")
    kept = {} if info is None else dict(info) if isinstance(info, Mapping) else {"info": info}
    return {**entry, "info": {**kept, _FIELD: calendar.to_dict()}}


@dataclass(frozen=True, eq=False)
class Stamps:
    """Time stamps, of one series or of many.

    Attributes
    ----------
    walls
        What the clock shows, nanoseconds since 1970, shape ``(stamps,)``.
    offsets
        Nanoseconds by which that clock is ahead of UTC; None for stamps without a zone.
    zone
        The time zone that all share; None where there is none, or only offsets.
    """

    walls: Integers
    offsets: Integers | None = None
    zone: str | None = None

    @property
    def instants(self) -> Integers:
        """Nanoseconds since 1970 in UTC; without a zone, what the clock shows."""
        return self.walls if self.offsets is None else self.walls - self.offsets

    def __len__(self) -> int:
        return len(self.walls)

    def __getitem__(self, which: Any) -> Stamps:
        return Stamps(self.walls[which], None if self.offsets is None else self.offsets[which], self.zone)

    def at(self, position: int) -> pd.Timestamp:
        """Return one of them."""
        return self[position : position + 1].index()[0]

    def index(self) -> pd.Index:
        """Return them as pandas has them: in their zone, or as objects where they have offsets of several zones."""
        if self.offsets is None:
            return pd.DatetimeIndex(self.walls.view("M8[ns]"))
        utc = pd.DatetimeIndex(self.instants.view("M8[ns]")).tz_localize("UTC")
        zone = self.zone
        if zone is None and len(found := np.unique(self.offsets)) <= 1:
            zone = offset_name(int(found[0])) if len(found) else "UTC"
        if zone is not None:
            return utc.tz_convert(zone)
        names = {int(offset): offset_name(int(offset)) for offset in np.unique(self.offsets)}
        own = [when.tz_convert(names[int(offset)]) for when, offset in zip(utc, self.offsets, strict=True)]
        return pd.Index(own, dtype=object)

    def text(self) -> NDArray[np.str_]:
        """Return them as ISO 8601 with the offset from UTC, and the time of day unless all are at midnight."""
        if not len(self):
            return np.zeros(0, "U1")
        if self.offsets is None and not (self.walls % DAY).any():
            return np.datetime_as_string(self.walls.view("M8[ns]").astype("M8[D]"))
        units = (("s", 10**9), ("ms", 10**6), ("us", 10**3), ("ns", 1))
        unit: Any = next(unit for unit, size in units if not (self.walls % size).any())
        text = np.char.replace(np.datetime_as_string(self.walls.view("M8[ns]"), unit=unit), "T", " ")
        if self.offsets is None:
            return text
        different, which = np.unique(self.offsets, return_inverse=True)
        return np.char.add(text, np.array([offset_text(int(offset)) for offset in different])[which])

    @classmethod
    def of_index(cls, index: pd.DatetimeIndex) -> Stamps:
        """Return the stamps of an index."""
        if index.tz is None:
            return cls(_nanoseconds(index))
        zone = zone_name(index.tz)
        walls, instants = _nanoseconds(index.tz_localize(None)), _nanoseconds(index.tz_convert("UTC").tz_localize(None))
        return cls(walls, walls - instants, zone)

    @classmethod
    def concat(cls, parts: Sequence[Stamps]) -> Stamps:
        """Join stamps, all with or all without a zone."""
        walls = np.concatenate([part.walls for part in parts])
        if all(part.offsets is None for part in parts):
            return cls(walls)
        zones = {part.zone for part in parts}
        # Stamps without a zone among others are taken as UTC: there is nothing else that they could be.
        offsets = [np.zeros(len(part), np.int64) if part.offsets is None else part.offsets for part in parts]
        return cls(walls, np.concatenate(offsets), zones.pop() if len(zones) == 1 else None)


def stamps_of(start: pd.Period, count: int, calendar: Calendar = _PLAIN) -> pd.Index:
    """Return the time stamps of periods one after another.

    Parameters
    ----------
    start
        The first period.
    count
        How many.
    calendar
        That of the series; the starts of the periods, without a zone, by default.

    Returns
    -------
    pandas.DatetimeIndex
        In the zone of the calendar; an index of ``pandas.Timestamp`` where offsets differ without a zone.
    """
    return stamp_table([start], count, [calendar]).index()


def first_stamp(start: pd.Period, calendar: Calendar) -> pd.Period | pd.Timestamp:
    """Return when a period begins for people: a period still where the series has a plain calendar."""
    return start if calendar.plain else stamps_of(start, 1, calendar)[0]


def stamp_table(starts: Sequence[pd.Period], counts: int | Sequence[int], calendars: Sequence[Calendar]) -> Stamps:
    """Return the time stamps of many series, one after another, much faster than one by one."""
    each = np.full(len(starts), counts, np.int64) if isinstance(counts, int) else np.asarray(counts, np.int64)
    begins = np.concatenate([[0], np.cumsum(each)])
    walls = np.zeros(begins[-1], np.int64)
    offsets = np.zeros(begins[-1], np.int64)
    zones: set[str | None] = set()
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (start, calendar) in enumerate(zip(starts, calendars, strict=True)):
        alone = i if calendar.changes or calendar.exceptions else -1
        key = (start.freqstr, calendar.anchor, calendar.zone, calendar.ahead is None, alone)
        groups.setdefault(key, []).append(i)
    for (freq, anchor, zone, by_clock, _), members in groups.items():
        own, sizes = [calendars[i] for i in members], each[members]
        inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = np.repeat(begins[members], sizes) + inside
        ordinals = np.repeat(np.array([starts[i].ordinal for i in members], np.int64), sizes)
        ordinals += inside * step_of(freq)
        clock = anchored(ordinals, freq, anchor)
        clock += np.repeat(np.array([calendar.phase for calendar in own], np.int64), sizes)
        for ordinal, wall in own[0].exceptions:
            clock[ordinals == ordinal] = wall
        walls[rows] = clock
        zones.add(zone)
        if zone is not None or own[0].changes:
            if by_clock:
                found = localize(clock, own[0])
            else:
                ahead = np.array([calendar.ahead for calendar in own], np.int64)
                found = in_zone(clock - np.repeat(ahead, sizes), own[0])
            walls[rows], offsets[rows] = found.walls, found.offsets
            zones.add("" if own[0].changes else zone)
    if zones <= {None}:
        return Stamps(walls)
    return Stamps(walls, offsets, None if len(zones) > 1 or zones == {""} else zones.pop())


def localize(walls: Integers, calendar: Calendar) -> Stamps:
    """Return the stamps at which the clock of a zone shows so much.

    A time of day that is left out when clocks go forward becomes the next one that there is; of one that comes twice it
    is the first.
    """
    if calendar.changes:
        instants, offsets = np.array(calendar.changes, np.int64).T
        which = np.searchsorted(instants + offsets, walls, side="right") - 1
        # By way of the instant, as the clock may go forward over what it would show.
        return in_zone(walls - offsets[np.maximum(which, 0)], calendar)
    naive = pd.DatetimeIndex(walls.view("M8[ns]"))
    zoned = naive.tz_localize(calendar.zone, ambiguous=np.ones(len(walls), bool), nonexistent="shift_forward")
    return Stamps.of_index(zoned)


def in_zone(instants: Integers, calendar: Calendar) -> Stamps:
    """Return the stamps of instants in the zone of a calendar."""
    if calendar.changes:
        begins, offsets = np.array(calendar.changes, np.int64).T
        own = offsets[np.maximum(np.searchsorted(begins, instants, side="right") - 1, 0)]
        return Stamps(instants + own, own)
    return Stamps.of_index(pd.DatetimeIndex(instants.view("M8[ns]")).tz_localize("UTC").tz_convert(calendar.zone))


def anchored(ordinals: Integers, freq: str, anchor: str) -> Integers:
    """Return the anchors of periods, nanoseconds since 1970.

    Parameters
    ----------
    ordinals
        Those of ``pandas.Period``.
    freq
        Frequency of periods; its multiple does not count.
    anchor
        One of `ANCHORS`.
    """
    base = base_of(freq)
    if isinstance(offset := offset_of(base), pd.offsets.Tick):
        size = int(offset.nanos)
        if len(ordinals) and int(np.abs(ordinals).max()) > np.iinfo(np.int64).max // size:
            raise ValueError(
                f"a period of freq {freq!r} lies outside the years 1678 to 2261, which time stamps can have"
            )
        return ordinals * size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        days = pd.PeriodIndex.from_ordinals(ordinals, freq=base).asfreq("D", how="start").asi8
    if len(days) and int(np.abs(days).max()) > np.iinfo(np.int64).max // DAY:
        raise ValueError(f"a period of freq {freq!r} lies outside the years 1678 to 2261, which stamps can have")
    first = days.view("M8[D]")
    if anchor != "start":
        if anchor.endswith("end"):
            months = first.astype("M8[M]") + {"M": 1, "Q": 3, "Y": 12}.get(base[0], 0)
            first = months.astype("M8[D]") - 1
        if anchor.startswith("business"):
            first = np.busday_offset(first, 0, roll="forward" if anchor.endswith("start") else "backward")
    found: Integers = first.astype("M8[ns]").astype(np.int64)
    return found


def _nanoseconds(index: pd.DatetimeIndex) -> Integers:
    found: Integers = index.as_unit("ns").asi8
    return found


def zone_name(zone: Any) -> str:
    """Return the name of a time zone under which pandas knows it."""
    name = getattr(zone, "zone", None) or getattr(zone, "key", None)
    if name is not None:
        return str(name)
    delta = zone.utcoffset(None)
    if delta is not None:
        return offset_name(int(pd.Timedelta(delta).value))
    path = str(getattr(zone, "_filename", zone))
    return path.split("zoneinfo/")[-1]


def offset_name(offset: int) -> str:
    """Return the name of the zone that is always so many nanoseconds ahead of UTC."""
    return "UTC" if offset == 0 else offset_text(offset)


def offset_text(offset: int) -> str:
    """Return an offset from UTC, in nanoseconds, as ISO 8601 writes it."""
    minutes, rest = divmod(abs(offset) // 10**9, 60)
    sign = "-" if offset < 0 else "+"
    return f"{sign}{minutes // 60:02d}:{minutes % 60:02d}" + (f":{rest:02d}" if rest else "")


def offset_from(text: str) -> int:
    """Nanoseconds that ``Z``, ``+09``, ``-0430`` or ``+05:45`` are ahead of UTC."""
    if text.upper() in ("Z", "UTC"):
        return 0
    digits = text[1:].replace(":", "").ljust(6, "0")
    size = (int(digits[:2]) * 60 + int(digits[2:4])) * 60 + int(digits[4:])
    return (-size if text[0] == "-" else size) * 10**9


def offset_of(freq: str) -> Any:
    """Return a frequency of offsets or periods as pandas' offset; a ValueError if it is none."""
    with warnings.catch_warnings():
        # Period spellings such as "M" are deprecated for offsets, those of offsets forbidden for periods.
        warnings.simplefilter("ignore", FutureWarning)
        return to_offset(freq)


def period(time: Any, freq: str) -> pd.Period:
    """Return the period of a frequency that holds a time without a zone."""
    with warnings.catch_warnings():
        # Periods of business days are deprecated in pandas, but GluonTS has nothing else.
        warnings.simplefilter("ignore", FutureWarning)
        return pd.Period(time, freq)


@lru_cache(maxsize=256)
def base_of(freq: str) -> str:
    """Return the unit that ordinals of a frequency's periods count: ``"h"`` of ``"2h"``, ``"min"`` of ``"90min"``."""
    return str(period("2000-01-03", freq).freqstr.lstrip("0123456789"))


@lru_cache(maxsize=256)
def step_of(freq: str) -> int:
    """Return how many units (`base_of`) a period of a frequency is long."""
    return int(period("2000-01-03", freq).freq.n)


def by_clock(freq: str) -> bool:
    """Return whether steps of a frequency of periods follow the clock: days and longer ones."""
    return base_of(freq)[0] in "DBWMQY"


def quarter_end(month: int) -> str:
    """Quarters that end in March and in December are the same: the last month of that kind names them."""
    return MONTHS[(month - 1) % 3 + 9]


def multiple(n: int) -> str:
    """Return how a frequency writes its multiple."""
    return "" if n == 1 else str(n)


@lru_cache(maxsize=256)
def period_freq(freq: str) -> str:
    """Frequency of offsets or periods -> what ``pandas.Period`` takes.

    Raises
    ------
    ValueError
        If it is none, or one that no period has, such as half months.

    Examples
    --------
    >>> period_freq("2ME"), period_freq("QS"), period_freq("W-MON")
    ('2M', 'Q-DEC', 'W-MON')
    """
    try:
        offset = offset_of(freq)
    except ValueError:
        offset = None
    o: Any = pd.offsets
    if offset is not None and offset.n > 0:
        times = multiple(offset.n)
        if isinstance(offset, o.Tick):
            return str(offset.freqstr)
        if isinstance(offset, o.Week):
            return f"{times}W-{DAYS[6 if offset.weekday is None else offset.weekday]}"
        if type(offset) is o.BusinessDay:
            return f"{times}B"
        if isinstance(offset, (o.MonthBegin, o.MonthEnd, o.BusinessMonthBegin, o.BusinessMonthEnd)):
            return f"{times}M"
        if isinstance(offset, (o.QuarterBegin, o.BQuarterBegin)):
            return f"{times}Q-{quarter_end((offset.startingMonth + 1) % 12 + 1)}"
        if isinstance(offset, (o.QuarterEnd, o.BQuarterEnd)):
            return f"{times}Q-{quarter_end(offset.startingMonth)}"
        if isinstance(offset, (o.YearBegin, o.BYearBegin)):
            return f"{times}Y-{MONTHS[(offset.month - 2) % 12]}"
        if isinstance(offset, (o.YearEnd, o.BYearEnd)):
            return f"{times}Y-{MONTHS[offset.month - 1]}"
    raise ValueError(f"freq {freq!r} is not a frequency of periods; give one like 5min, h, D, W, M, Q or Y")


def anchors_of(freq: str) -> tuple[str, ...]:
    """Return the anchors that a frequency names: all where it is spelled as that of periods."""
    if re.fullmatch(r"\d*(M|Q|Y|A|Q-[A-Z]{3}|Y-[A-Z]{3}|A-[A-Z]{3})", freq):
        return ANCHORS
    name = type(offset_of(freq)).__name__
    if not name.endswith(("Begin", "End")):
        return ("start",)
    business = name.startswith(("B", "Business"))
    return (("business " if business else "") + ("start" if name.endswith("Begin") else "end"),)
