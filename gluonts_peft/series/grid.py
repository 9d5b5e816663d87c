"""From time stamps to regular grids: which frequency, which period each row is in, and the calendar back.

What comes in goes out: every row's stamp is what the calendar of its series says of its period, or the row is refused.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .calendar import (
    ANCHORS,
    DAY,
    DAYS,
    MONTHS,
    Calendar,
    Integers,
    Stamps,
    anchored,
    anchors_of,
    base_of,
    by_clock,
    localize,
    multiple,
    offset_name,
    offset_of,
    period_freq,
    quarter_end,
    step_of,
)

__all__ = ["Grid", "calendars", "calendars_of_starts", "lay"]

_log = logging.getLogger(__name__)

Flags = NDArray[np.bool_]

GIVE_FREQ = "give freq= (command line: --freq)"
# Calendar units are never shorter than February.
_SHORTEST_MONTH = 28
# A grid with fewer observed points than this is mostly missing.
_LEAST_OBSERVED = 0.5
# Usual distances of stamps, in seconds.
_USUAL = {"s": 1, "10s": 10, "30s": 30, "min": 60, "5min": 300, "10min": 600, "15min": 900, "30min": 1800, "h": 3600}
_USUAL |= {"2h": 7200, "3h": 10800, "6h": 21600, "12h": 43200, "D": 86400, "W": 604800, "M": 2629746, "Q": 7889238}
# So many rows of which none is at a weekend are no accident, nor are most of the weekdays of two weeks (our choice).
_LEAST_BUSINESS, _MOST_BUSINESS = 15, 0.7


@dataclass(frozen=True)
class Grid:
    """Where rows lie on the regular grids of their items.

    Attributes
    ----------
    freq
        Frequency of the periods.
    positions
        Step of each row from the first of its item, shape ``(rows,)``.
    lengths
        Steps of each item, observed or not, shape ``(items,)``.
    starts, calendars
        First period and calendar of each item.
    """

    freq: str
    positions: Integers
    lengths: Integers
    starts: list[pd.Period]
    calendars: list[Calendar]


class _Rows:
    """Sorted rows of items: what the clock shows, in days and time of day."""

    def __init__(self, codes: Any, items: Any, stamps: Stamps) -> None:
        self.codes: Integers = np.asarray(codes, np.int64)
        self.items = items
        self.stamps = stamps
        self.instants = stamps.instants
        self.firsts: Integers = np.flatnonzero(np.diff(self.codes, prepend=-1)).astype(np.int64)
        self.ends: Integers = np.append(self.firsts[1:], len(self.codes)).astype(np.int64)
        self.moves = stamps.offsets is not None and bool(np.ptp(stamps.offsets))
        self.inside: Flags = np.diff(self.codes) == 0
        self.walls = self._walls()
        self.times: Integers = self.walls % DAY
        # Steps follow the clock if an item has one time of day.
        self.daily = bool((np.diff(self.times)[self.inside] == 0).all())

    def _walls(self) -> Integers:
        """What the clock would show if it never went forward: midnight, on a day that begins at one o'clock."""
        walls, stamps = self.stamps.walls, self.stamps
        if stamps.offsets is None:
            return walls
        least = np.minimum.reduceat(walls % DAY, self.firsts)[self.codes]
        late = np.flatnonzero(walls % DAY != least)
        if not len(late):
            return walls
        usual = walls[late] // DAY * DAY + least[late]
        if stamps.zone is not None:
            meant = localize(usual, Calendar(zone=stamps.zone)).instants
        else:
            # By the offset of the day before.
            meant = usual - stamps.offsets[np.maximum(late - 1, self.firsts[self.codes[late]])]
        if not (meant == stamps.instants[late]).all():
            return walls
        found: Integers = walls.copy()
        found[late] = usual
        return found

    def item(self, row: int) -> Any:
        return self.items[self.codes[row]]


def lay(codes: Any, items: Any, stamps: Stamps, freq: str | None = None) -> Grid:
    """Lay rows on regular grids, one an item.

    Parameters
    ----------
    codes
        Number of the item of each row, from 0; rows are sorted by it and then by time, and differ.
    items
        Names of the items, for messages.
    stamps
        Time stamp of each row.
    freq
        Frequency of offsets or periods; inferred if None.

    Raises
    ------
    ValueError
        If the frequency cannot be inferred, is none of periods, does not fit a stamp, or would leave most of the grid
        missing.
    """
    rows = _Rows(codes, items, stamps)
    if freq is None:
        own, origin = _infer(rows)
        given = anchors_of(own) if by_clock(own) else ("start",)
    else:
        own, origin, given = period_freq(freq), "given", anchors_of(freq)
    if base_of(own).startswith("W"):
        weekday = pd.Timestamp(int(rows.walls[0])).weekday()
        own = f"{multiple(step_of(own))}W-{DAYS[(weekday - 1) % 7]}"
    insisted = freq is not None and given == ANCHORS
    positions, off = _positions(rows, own)
    found = _Calendars(rows, own, given, insisted)
    off |= found.off
    if off.any():
        _refuse(rows, off, freq or own, own, origin)
    lengths = positions[rows.ends - 1] + 1
    _check_observed(rows, freq, own, int(lengths.sum()))
    found.warn()
    return Grid(own, positions, lengths.astype(np.int64), _periods(rows.walls[rows.firsts], own), found.calendars)


def calendars(stamps: Stamps, freq: str) -> Calendar:
    """Return the calendar of a single series from its sorted stamps and the frequency of its periods."""
    rows = _Rows(np.zeros(len(stamps), np.int64), ["series"], stamps)
    return _Calendars(rows, freq, ANCHORS, True).calendars[0]


def calendars_of_starts(stamps: Stamps, freq: str) -> list[Calendar]:
    """Return the calendars of series of which the first stamps are known alone.

    A single stamp may fit several places of a month; what the frequency names comes first.
    """
    named, count = anchors_of(freq), len(stamps)
    anchors = (*named, *(anchor for anchor in ANCHORS if anchor not in named))
    rows = _Rows(np.arange(count), np.arange(count), stamps)
    return _Calendars(rows, period_freq(freq), anchors, True).calendars


def _refuse(rows: _Rows, off: Flags, freq: str, own: str, origin: str) -> None:
    first = int(np.flatnonzero(off)[0])
    suggested = _suggested(rows) if origin == "given" else None
    other = "give another freq=" if origin == "given" else GIVE_FREQ
    if suggested is not None and suggested[1] >= _LEAST_OBSERVED and suggested[0] != own:
        other += f" (the time stamps suggest {suggested[0]!r})"
    raise ValueError(
        f"timestamp {rows.stamps.at(first)} of item {rows.item(first)!r} is off the grid of freq {freq!r} "
        f"({origin}), which starts at {rows.stamps.at(int(rows.firsts[rows.codes[first]]))} ({int(off.sum())} such "
        f"rows); resample, or {other}"
    )


def _check_observed(rows: _Rows, freq: str | None, own: str, points: int) -> None:
    """Refuse a grid that would be mostly missing."""
    share = len(rows.codes) / points
    if share >= _LEAST_OBSERVED:
        return
    shown = f"{share:.2%} of the points of item {rows.items[0]!r} and the others would be observed"
    if freq is None:
        steps = np.diff(rows.instants)[rows.inside]
        # The usual frequency that is nearest to the usual distance.
        distance = np.log(np.median(steps) / 1e9)
        typical = min(_USUAL, key=lambda name: abs(np.log(_USUAL[name]) - distance))
        hint = f"the time stamps suggest about {typical!r}; " if typical != own else ""
        raise ValueError(
            f"the frequency cannot be inferred: at the smallest difference, {own!r}, only {shown}; {hint}{GIVE_FREQ}, "
            "or resample"
        )
    # Only if the stamps lie on a coarser grid: sparse data on the right one are as they are.
    if (suggested := _suggested(rows)) is not None and suggested[1] > 1.01 * share:
        raise ValueError(
            f"freq {freq!r} leaves most of the grid missing: only {shown}; the time stamps suggest {suggested[0]!r}: "
            "give that, or leave freq out"
        )


def _suggested(rows: _Rows) -> tuple[str, float] | None:
    """The frequency that stamps suggest, and the share of its grid that has a row."""
    try:
        freq = _infer(rows)[0]
    except ValueError:
        return None
    positions, off = _positions(rows, freq)
    return None if off.any() else (freq, len(rows.codes) / int((positions[rows.ends - 1] + 1).sum()))


def _positions(rows: _Rows, freq: str) -> tuple[Integers, Flags]:
    """Place of each row on the grid of its item, from 0, and which rows are between places."""
    base, step = base_of(freq), step_of(freq)
    off: Flags = np.zeros(len(rows.codes), bool)
    if isinstance(unit := offset_of(base), pd.offsets.Tick):
        number, size = rows.walls if by_clock(freq) else rows.instants, step * int(unit.nanos)
    elif base.startswith("W"):
        number, size = rows.walls, step * 7 * DAY
    else:
        number, size = _ordinals(rows.walls, base), step
        off = np.concatenate([[False], rows.inside & (np.diff(number) == 0)])
        if base == "B":
            off |= _weekdays(rows.walls) > 4
    since = number - number[rows.firsts][rows.codes]
    off |= since % size != 0
    return (since // size).astype(np.int64), off


def _ordinals(walls: Integers, base: str) -> Integers:
    with warnings.catch_warnings():
        # Periods of business days are deprecated in pandas, but GluonTS has nothing else.
        warnings.simplefilter("ignore", FutureWarning)
        found: Integers = pd.DatetimeIndex(walls.view("M8[ns]")).to_period(base).asi8
    return found


def _periods(walls: Integers, freq: str) -> list[pd.Period]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return list(pd.PeriodIndex.from_ordinals(_ordinals(walls, base_of(freq)), freq=freq))


class _Calendars:
    """The calendars of items whose rows lie on a grid, the rows that follow none, and what to warn of."""

    def __init__(self, rows: _Rows, freq: str, anchors: tuple[str, ...], insisted: bool) -> None:
        self.rows, self.freq = rows, freq
        self.off: Flags = np.zeros(len(rows.codes), bool)
        self.loose: list[Any] = []
        base, stamps = base_of(freq), rows.stamps
        clock = by_clock(freq)
        count = len(rows.firsts)
        anchor_of = np.full(count, "start", dtype=object)
        phase_of = np.zeros(count, np.int64)
        exceptions: dict[int, tuple[tuple[int, int], ...]] = {}
        if not clock or base == "D" or base.startswith("W"):
            first = rows.walls[rows.firsts]
            phase_of = first - anchored(_ordinals(first, base), freq, "start")
        else:
            ordinals = _ordinals(rows.walls, base)
            choices = [(anchor, DAY) for anchor in anchors if base != "B" or anchor == "start"] or [("start", DAY)]
            if set(anchors) == set(ANCHORS) and base != "B":
                # A day inside the month, such as the 15th.
                choices.append(("start", 28 * DAY))
            fits, phases = [], []
            for anchor, limit in choices:
                phase = rows.walls - anchored(ordinals, freq, anchor)
                own = phase[rows.firsts]
                same = (phase == own[rows.codes]) & (phase >= 0) & (phase < limit)
                fits.append(np.add.reduceat(~same, rows.firsts) == 0)
                phases.append(own)
            good, values = np.array(fits), np.array(phases)
            # One anchor for all items, if there is one: a few stamps may fit several.
            best = np.argmax(good, axis=0) if not good.all(1).any() else np.full(count, np.argmax(good.all(1)))
            anchor_of = np.array([anchor for anchor, _ in choices], dtype=object)[best]
            phase_of = values[best, np.arange(count)]
            for code in np.flatnonzero(~good.any(0)):
                part = slice(int(rows.firsts[code]), int(rows.ends[code]))
                if not insisted:
                    anchor_of[code], phase_of[code] = choices[0][0], 0
                    wrong = rows.walls[part] - anchored(ordinals[part], freq, choices[0][0])
                    self.off[part] = (wrong != wrong[0]) | (wrong < 0) | (wrong >= DAY)
                    continue
                anchor_of[code], phase_of[code], exceptions[int(code)] = self._loose(
                    ordinals[part], rows.walls[part], choices
                )
                self.loose.append(rows.items[code])
        ahead_of = None if clock or stamps.offsets is None else stamps.offsets[rows.firsts]
        zones, changes = self._zones()
        self.calendars = [
            Calendar(
                anchor=str(anchor_of[code]),
                phase=int(phase_of[code]),
                zone=zones[code],
                ahead=None if ahead_of is None else int(ahead_of[code]),
                changes=changes.get(code, ()),
                exceptions=exceptions.get(code, ()),
            )
            for code in range(count)
        ]
        if clock and stamps.zone is not None and rows.moves:
            # Of a time that comes twice the calendar means the first.
            self.off |= localize(rows.walls, Calendar(zone=stamps.zone)).instants != stamps.instants

    def _zones(self) -> tuple[list[str | None], dict[int, tuple[tuple[int, int], ...]]]:
        """Zone of each item; for items with several offsets and no zone, where they change."""
        stamps, rows = self.rows.stamps, self.rows
        if stamps.offsets is None or stamps.zone is not None:
            return [stamps.zone] * len(rows.firsts), {}
        zones: list[str | None] = []
        changes: dict[int, tuple[tuple[int, int], ...]] = {}
        for code, (first, end) in enumerate(zip(rows.firsts.tolist(), rows.ends.tolist(), strict=True)):
            own = stamps.offsets[first:end]
            if (own == own[0]).all():
                zones.append(offset_name(int(own[0])))
                continue
            new = np.flatnonzero(np.diff(own, prepend=own[0] - 1))
            instants = stamps.instants[first:end][new].tolist()
            changes[code] = tuple(zip(instants, own[new].tolist(), strict=True))
            zones.append(None)
        return zones, changes

    def _loose(
        self, ordinals: Integers, walls: Integers, choices: list[tuple[str, int]]
    ) -> tuple[str, int, tuple[tuple[int, int], ...]]:
        """Rule of an item whose stamps vary inside their periods, that of most of them, and what does not follow it."""
        best: tuple[int, str, int] = (0, "start", 0)
        for anchor, limit in choices:
            phases = walls - anchored(ordinals, self.freq, anchor)
            inside = phases[(phases >= 0) & (phases < limit)]
            if len(inside):
                values, counts = np.unique(inside, return_counts=True)
                most = int(np.argmax(counts))
                if counts[most] > best[0] and 2 * counts[most] > len(walls):
                    best = int(counts[most]), anchor, int(values[most])
        _, anchor, phase = best
        other = np.flatnonzero(walls - anchored(ordinals, self.freq, anchor) != phase)
        return anchor, phase, tuple(zip(ordinals[other].tolist(), walls[other].tolist(), strict=True))

    def warn(self) -> None:
        if self.loose:
            _log.warning(
                "time stamps of %d items vary inside their periods of freq %r (first: %r); they stay as they are, and"
                " forecasts are stamped by the rule that most of them follow, else with the starts of the periods",
                len(self.loose),
                self.freq,
                self.loose[0],
            )


def _infer(rows: _Rows) -> tuple[str, str]:
    """Common frequency of items and, in words, where it comes from."""
    if not rows.inside.any():
        raise ValueError(
            f"the frequency cannot be inferred: every item has a single row (first: {rows.items[0]!r}); "
            f"{GIVE_FREQ}, for example freq='h'"
        )
    regular: dict[str, int] = {}
    loose: list[int] = []
    for code, (first, end) in enumerate(zip(rows.firsts, rows.ends, strict=True)):
        if end - first > 1:
            found = _infer_one(rows, int(first), int(end))
            if found is None:
                loose.append(code)
            else:
                regular.setdefault(found, code)
    regular = _reconciled(rows, regular)
    if len(regular) > 1:
        (one, first_item), (other, second_item) = list(regular.items())[:2]
        raise ValueError(
            f"items have different frequencies: {rows.items[first_item]!r} has {one!r}, {rows.items[second_item]!r} "
            f"has {other!r}; keep items of one frequency in a file, or {GIVE_FREQ}"
        )
    if regular:
        [(freq, code)] = regular.items()
        return "B" if freq == "D" and _business(rows) else freq, f"inferred from item {rows.items[code]!r}"
    which = np.isin(rows.codes, loose)
    return _infer_loose(rows, which), "inferred from the smallest difference"


def _reconciled(rows: _Rows, regular: dict[str, int]) -> dict[str, int]:
    """One frequency for items that differ in their phase alone."""
    if set(regular) == {"B", "D"} and (_weekdays(rows.walls) < 5).all():
        return {"B": regular["B"]}
    # Quarters that begin in different months are three months each.
    lengths = {step_of(freq) * {"M": 1, "Q": 3, "Y": 12}.get(base_of(freq)[0], 0) for freq in regular}
    if len(regular) > 1 and len(lengths) == 1 and 0 not in lengths:
        return {f"{multiple(lengths.pop())}M": next(iter(regular.values()))}
    return regular


def _business(rows: _Rows) -> bool:
    """Whether days are business days: none is at a weekend, and that is no accident."""
    weekends = np.diff((rows.walls // DAY + 3) // 7)[rows.inside] > 0
    if int(weekends.sum()) < 2 or not (_weekdays(rows.walls) < 5).all():
        return False
    days = rows.walls.view("M8[ns]").astype("M8[D]")
    spans = np.busday_count(days[rows.firsts], days[rows.ends - 1]) + 1
    return len(rows.codes) >= min(_LEAST_BUSINESS, _MOST_BUSINESS * int(spans.sum()))


def _weekdays(walls: Integers) -> Integers:
    # The first day of 1970 was a Thursday.
    return np.asarray((walls // DAY + 3) % 7)


def _infer_one(rows: _Rows, first: int, end: int) -> str | None:
    """Frequency of one regular item; None if it has gaps or fewer than three rows."""
    if end - first < 3:
        return None
    part = slice(first, end)
    if not rows.daily:
        steps = np.diff(rows.instants[part])
        return _tick(int(steps[0]), rows.moves) if (steps == steps[0]).all() else None
    walls = rows.walls[part]
    steps = np.diff(walls) // DAY
    smallest = int(steps.min())
    if smallest >= _SHORTEST_MONTH:
        months = _months(rows, np.array([first]), np.array([end]))
        if months is not None and (np.diff(_month(walls)) == step_in_months(months)).all():
            return months
    if (steps == smallest).all():
        return _days(smallest)
    if smallest == 1 and (_weekdays(walls) < 5).all() and len(walls) > 4:
        days = walls.view("M8[ns]").astype("M8[D]")
        if (np.busday_count(days[:-1], days[1:]) == 1).all():
            return "B"
    return None


def _infer_loose(rows: _Rows, which: Flags) -> str:
    """Frequency of items with gaps."""
    pairs = np.flatnonzero(rows.inside & which[1:])
    steps = np.diff(rows.walls if rows.daily else rows.instants)[pairs]
    smallest = int(steps.min())
    if rows.daily and smallest >= _SHORTEST_MONTH * DAY:
        members = np.unique(rows.codes[which])
        if (months := _months(rows, rows.firsts[members], rows.ends[members])) is not None:
            return months
    uneven = np.flatnonzero(steps % smallest)
    if rows.daily and smallest == DAY and _business(rows):
        return "B"
    if len(uneven):
        raise ValueError(
            f"the frequency cannot be inferred: item {rows.item(int(pairs[uneven[0]]))!r} has time stamps "
            f"{pd.Timedelta(int(steps[uneven[0]]), unit='ns')} apart, not a multiple of the smallest difference, "
            f"{pd.Timedelta(smallest, unit='ns')}; {GIVE_FREQ}, or resample"
        )
    return _days(smallest // DAY) if rows.daily else _tick(smallest, rows.moves)


@lru_cache(maxsize=1024)
def _tick(step: int, moves: bool) -> str:
    """Nanoseconds of absolute length -> frequency."""
    if step % DAY == 0:
        # Where the clock moves, such steps are no days.
        return f"{step // (DAY // 24)}h" if moves else _days(step // DAY)
    return str(offset_of(pd.Timedelta(step, unit="ns")).freqstr)


def _days(days: int) -> str:
    """Days -> frequency."""
    return f"{multiple(days // 7)}W-SUN" if days % 7 == 0 else f"{multiple(days)}D"


def _month(walls: Integers) -> Integers:
    return walls.view("M8[ns]").astype("M8[M]").astype(np.int64)


def step_in_months(freq: str) -> int:
    """Months of a frequency of months, quarters or years."""
    return step_of(freq) * {"M": 1, "Q": 3, "Y": 12}[base_of(freq)[0]]


def _months(rows: _Rows, firsts: Integers, ends: Integers) -> str | None:
    """Months, quarters or years, if every item is at one place of a month, gaps allowed."""
    steps: list[int] = []
    end = None
    for first, last in zip(firsts.tolist(), ends.tolist(), strict=True):
        walls, months = rows.walls[first:last], _month(rows.walls[first:last])
        anchor = next(
            (
                anchor
                for anchor, limit in (*((anchor, DAY) for anchor in ANCHORS), ("start", 28 * DAY))
                if len(phases := np.unique(walls - anchored(months, "M", anchor))) == 1 and 0 <= phases[0] < limit
            ),
            None,
        )
        if anchor is None:
            return None
        if end is None:
            end = (anchor, int(months[0]))
        steps.extend(np.diff(months).tolist())
    if end is None or not steps or any(step % min(steps) for step in steps):
        return None
    step, (anchor, month) = min(steps), end
    # As in pandas, a step of three or twelve months starts (first day) or ends (last day) with the month given.
    last_month = month % 12 + 1 if anchor.endswith("end") else (month + step - 1) % 12 + 1
    if step % 12 == 0:
        return f"{multiple(step // 12)}Y-{MONTHS[last_month - 1]}"
    if step % 3 == 0:
        return f"{multiple(step // 3)}Q-{quarter_end(last_month)}"
    return f"{multiple(step)}M"
