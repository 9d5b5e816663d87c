"""Stays in intensive care on a regular grid, built from rows in any order without holding them all in memory.

A loader adds values as they come in the file. They are kept apart in buckets of neighbouring stays, in memory or in
files, and only one bucket at a time is put into order: that is how a table larger than memory passes through.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .hourly import PLAUSIBLE
from .tables import Source

__all__ = ["PRESSURES", "Stay", "Stays"]

DataEntry = dict[str, Any]
Array = NDArray[np.float32]
Step = Callable[["Stay"], tuple[list["Stay"], Mapping[str, int]]]

#: The vital signs that are measured together, in mmHg.
PRESSURES = ("map", "sbp", "dbp")

_BUCKETS = 128
_RECORD = np.dtype([("key", "<i4"), ("minute", "<i4"), ("value", "<f4")])
# A stay has minutes since admission, not dates.
_ADMISSION = "2000-01-01 00:00"
# Where the time of discharge is missing or wrong, a grid of centuries must not be made.
_LONGEST_MINUTES = 365 * 24 * 60


@dataclass(frozen=True)
class Stay:
    """One stay of one patient, or a window of it.

    Parameters
    ----------
    patient
        Name of the patient, who may have several stays.
    name
        Name of the stay; of a window ``"<stay>/<number>"``.
    start
        First step; admission is midnight of 2000-01-01, an arbitrary date.
    values
        Vital sign -> float32 array of shape ``(time,)``, NaN is missing, all of one length; vital signs without any
        value are left out.
    """

    patient: str
    name: str
    start: pd.Period
    values: dict[str, Array]

    def __len__(self) -> int:
        return len(next(iter(self.values.values()), ()))

    def with_values(self, values: Mapping[str, Array]) -> Stay:
        """Return the same stay with other values."""
        return Stay(self.patient, self.name, self.start, dict(values))


class Stays:
    """Stays of a download: iterate over them as often as you like, patient by patient.

    Made by `load_eicu` and `load_mimic`; `prepare` adds steps to a copy.

    Attributes
    ----------
    vitals : tuple[str, ...]
        Vital signs that were read.
    freq : str
        Step of the grid.
    counts : dict[str, dict[str, int]]
        What the rules kept and removed, by table and rule. Those of the grid and of the steps are complete after an
        iteration to the end, and begin anew with the next.
    sources : list[Source]
        Files that were read.
    options : dict[str, Any]
        How they were read.
    steps : list[tuple[str, dict[str, Any], Step]]
        Name, options and function of each step.
    """

    def __init__(
        self,
        patients: NDArray[Any],
        names: NDArray[Any],
        discharge: NDArray[np.float64],
        *,
        vitals: Sequence[str],
        freq: str,
        cuff: str,
        scratch: Path | None = None,
    ) -> None:
        if not vitals or len(set(vitals)) < len(vitals):
            raise ValueError(f"vitals {tuple(vitals)} must name each vital sign once; known: {', '.join(PLAUSIBLE)}")
        if cuff not in ("gaps", "stays", "never"):
            raise ValueError(f"cuff {cuff!r} is unknown; known: gaps, stays, never")
        self.vitals = tuple(vitals)
        self.freq, self.minutes = freq, step_minutes(freq)
        self.sources: list[Source] = []
        self.options: dict[str, Any] = {}
        self.steps: list[tuple[str, dict[str, Any], Step]] = []
        self.counts: dict[str, dict[str, int]] = {}
        self.patients, self.names = patients, names
        self.discharge = np.fmin(discharge, _LONGEST_MINUTES)
        self.cuff = cuff
        pressures = [vital for vital in vitals if vital in PRESSURES] if cuff != "never" else []
        #: Names of what can be added: the vital signs, and pressures taken with a cuff.
        self.channels = [*vitals, *(f"{vital} cuff" for vital in pressures)]
        self._rows = _Buckets(len(names), len(self.channels), scratch)

    def begin(self, table: str) -> Counter[str]:
        """Begin to add the rows of a table; return its counts, to which every rule adds."""
        self._rows.forget_order()
        counts: Counter[str] = Counter()
        self.counts[table] = counts
        return counts

    def add(
        self,
        stays: NDArray[np.int64],
        minutes: NDArray[np.float64],
        values: Mapping[str, NDArray[np.floating[Any]]],
        counts: Counter[str],
    ) -> None:
        """Add rows of the table that was begun last.

        Parameters
        ----------
        stays
            Position of each row's stay, shape ``(rows,)``.
        minutes
            Minutes since admission, NaN where missing, shape ``(rows,)``.
        values
            Channel -> values, not finite where missing, shape ``(rows,)`` each.
        counts
            Of the table: gets the rows that were kept and those that each rule removed; and how many were earlier than
            the row before them of the same stay, which does no harm.
        """
        with np.errstate(over="ignore"):
            # What is too large for float32 is infinite from here on, and what is infinite counts as missing.
            columns = {channel: column.astype(np.float32) for channel, column in values.items()}
        some = np.zeros(len(stays), dtype=bool)
        for column in columns.values():
            some |= np.isfinite(column)
        keep = np.ones(len(stays), dtype=bool)
        with np.errstate(invalid="ignore"):
            for rule, removed in (
                ("without a time", ~np.isfinite(minutes)),
                ("before admission", minutes < 0),
                ("after discharge", minutes > self.discharge[stays]),
                ("without a value", ~some),
            ):
                counts[rule] += int(np.count_nonzero(removed & keep))
                keep &= ~removed
        counts["kept"] += int(np.count_nonzero(keep))
        order = np.flatnonzero(np.isfinite(minutes))
        order = order[np.argsort(stays[order], kind="stable")]
        counts["out of order"] += self._rows.unordered(stays[order], minutes[order])
        order = order[keep[order]]
        stays, minutes = stays[order], minutes[order]
        for channel, column in columns.items():
            self._rows.add(stays, self.channels.index(channel), minutes, column[order])

    def __iter__(self) -> Iterator[Stay]:
        self.counts["grid"] = grid = Counter(dict.fromkeys(_GRID_COUNTS, 0))
        per_step = []
        for name, _, function in self.steps:
            self.counts[name] = Counter({"stays in": 0, "stays out": 0})
            per_step.append((function, self.counts[name]))
        self._rows.flush()
        for bucket in range(_BUCKETS):
            for stay in self._grid(bucket, grid):
                yield from _through(stay, per_step)

    def __len__(self) -> int:
        """Stays of the cohort, whether or not they have values."""
        return len(self.names)

    def entries(self, vitals: Sequence[str] | None = None) -> Iterator[DataEntry]:
        """Iterate over the series of all stays as GluonTS entries.

        Parameters
        ----------
        vitals
            Those that are wanted; by default all that were read.

        Yields
        ------
        DataEntry
            ``start`` (``pd.Period``), ``target`` (float32, shape ``(time,)``, NaN is missing) and ``item_id``
            (``"<patient>/<stay>/<vital>"``).
        """
        wanted = self.vitals if vitals is None else tuple(vitals)
        for vital in wanted:
            if vital not in self.vitals:
                raise ValueError(f"vital {vital!r} was not read; read: {', '.join(self.vitals)}")
        for stay in self:
            for vital in wanted:
                if vital in stay.values:
                    yield {
                        "start": stay.start,
                        "target": stay.values[vital],
                        "item_id": f"{stay.patient}/{stay.name}/{vital}",
                    }

    def with_step(self, name: str, options: dict[str, Any], function: Step) -> Stays:
        """Return a copy, which shares the rows, with one more step."""
        more = copy.copy(self)
        more.counts = dict(self.counts)
        more.steps = [*self.steps, (name, options, function)]
        return more

    def _grid(self, bucket: int, counts: Counter[str]) -> Iterator[Stay]:
        """Put the rows of one bucket on the grid."""
        first_stay, end_stay = self._rows.bounds[bucket : bucket + 2]
        number, channels = int(end_stay - first_stay), len(self.channels)
        records = self._rows.read(bucket)
        key = records["key"] - int(first_stay) * channels
        stay, channel = key // channels, key % channels
        # Of the type of `first` and `last`, without which the lines with `at` are ten times slower.
        place = (records["minute"] // self.minutes).astype(np.int64)
        present = np.bincount(stay, minlength=number) > 0
        counts["stays without a value"] += number - int(present.sum())
        first = np.full(number, np.iinfo(np.int64).max)
        last = np.full(number, -1, dtype=np.int64)
        np.minimum.at(first, stay, place)
        np.maximum.at(last, stay, place)
        length = np.where(present, last - first + 1, 0)
        ends = np.cumsum(length * channels)
        cell = (ends - length * channels)[stay] + channel * length[stay] + place - first[stay]

        grid = np.full(ends[-1] if number else 0, np.nan, dtype=np.float32)
        alone = np.bincount(cell, minlength=len(grid))[cell] == 1
        grid[cell[alone]] = records["value"][alone]
        cell, records = cell[~alone], records[~alone]
        if len(cell):
            order = np.lexsort((records["minute"], cell))
            same = (np.diff(cell[order]) == 0) & (np.diff(records["minute"][order]) == 0)
            counts["values at a minute that has one"] += int(same.sum())
            cells, medians = _medians(cell, records["value"])
            counts["values merged into a median"] += len(cell)
            grid[cells] = medians
        admission = pd.Period(_ADMISSION, self.freq)
        for local in np.flatnonzero(present):
            values = grid[ends[local] - length[local] * channels : ends[local]].reshape(channels, -1)
            found = {vital: values[position] for position, vital in enumerate(self.vitals)}
            counts["points from the cuff"] += self._fall_back(found, values)
            missing: NDArray[np.bool_] = np.isnan(np.stack(list(found.values())))
            observed = np.flatnonzero(~missing.all(0))
            if not len(observed):
                counts["stays without a value"] += 1
                continue
            # Cuff values that were not used may have been the first or the last.
            begin, end = int(observed[0]), int(observed[-1]) + 1
            kept = {vital: column[begin:end].copy() for vital, column in found.items() if not np.isnan(column).all()}
            counts["series without a value"] += len(found) - len(kept)
            counts["stays"] += 1
            counts["series"] += len(kept)
            counts["points"] += len(kept) * (end - begin)
            counts["points with a value"] += sum(int((~np.isnan(column)).sum()) for column in kept.values())
            position = int(first_stay) + int(local)
            yield Stay(
                str(self.patients[position]),
                str(self.names[position]),
                admission + (int(first[local]) + begin),
                kept,
            )

    def _fall_back(self, found: dict[str, Array], values: Array) -> int:
        """Take pressures from the cuff where there is none from the artery; all at a time, so that they agree."""
        pressures = [channel.removesuffix(" cuff") for channel in self.channels[len(self.vitals) :]]
        if not pressures:
            return 0
        arterial: NDArray[np.bool_] = np.any([~np.isnan(found[vital]) for vital in pressures], axis=0)
        free = ~arterial if self.cuff == "gaps" else np.full(len(arterial), not arterial.any())
        cuff = values[len(self.vitals) :]
        for vital, column in zip(pressures, cuff, strict=True):
            found[vital] = np.where(free, column, found[vital])
        return int((free & ~np.isnan(cuff).all(0)).sum())


class Positions:
    """From the number of a stay to its position in the cohort: -1 if it is not in it, -2 if nobody knows it."""

    def __init__(self, ids: NDArray[np.float64], chosen: NDArray[np.int64]) -> None:
        order = np.argsort(ids)
        self._ids = ids[order]
        self._position = np.full(len(ids), -1)
        self._position[chosen] = np.arange(len(chosen))
        self._position = self._position[order]

    def __call__(self, ids: NDArray[np.float64]) -> NDArray[np.int64]:
        place = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[place] == ids, self._position[place], -2)


def known_stays(
    ids: NDArray[np.float64], patients: NDArray[Any], stay: str, patient: str, path: Path
) -> NDArray[np.int64]:
    """Return the rows of a table of stays, sorted by patient and stay, after checking that each has both, once."""
    if not len(ids):
        raise ValueError(f"'{path}' holds no rows; give a table with at least one stay")
    bad = np.flatnonzero(~np.isfinite(ids) | (ids != np.round(ids)))
    if len(bad):
        raise ValueError(f"{stay} of row {bad[0] + 1} in '{path}' is not a whole number ({len(bad)} such rows)")
    nameless = np.flatnonzero([not name or "/" in name for name in patients.astype(str)])
    if len(nameless):
        row = nameless[0]
        raise ValueError(
            f"{patient} of {stay} {ids[row]:.0f} in '{path}' is {str(patients[row])!r}, which cannot name a patient "
            f"({len(nameless)} such rows); without it stays cannot be divided by patient"
        )
    order: NDArray[np.int64] = np.lexsort((ids, patients.astype(str)))
    values, times = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        raise ValueError(
            f"{stay} {values[times > 1][0]:.0f} occurs {times[times > 1][0]} times in '{path}' "
            f"({(times > 1).sum()} such stays); keep one row a stay"
        )
    return order


_GRID_COUNTS = (
    "values at a minute that has one",
    "values merged into a median",
    "points from the cuff",
    "stays without a value",
    "series without a value",
    "stays",
    "series",
    "points",
    "points with a value",
)


def step_minutes(freq: str) -> int:
    """Return the minutes of a step."""
    try:
        step: Any = pd.Period(_ADMISSION, freq).freq
        minutes = pd.Timedelta(step) / pd.Timedelta(minutes=1)
    except ValueError:
        minutes = 0.0
    if minutes < 1 or minutes != int(minutes) or (24 * 60) % minutes:
        raise ValueError(
            f"freq {freq!r} is not a step of whole minutes that divides a day; give one like '5min' or 'h'"
        )
    return int(minutes)


def _through(stay: Stay, steps: Sequence[tuple[Step, dict[str, int]]]) -> Iterator[Stay]:
    if not steps:
        yield stay
        return
    (function, counts), rest = steps[0], steps[1:]
    made, found = function(stay)
    counts["stays in"] += 1
    counts["stays out"] += len(made)
    for rule, count in found.items():
        counts[rule] = counts.get(rule, 0) + int(count)
    for one in made:
        yield from _through(one, rest)


def _medians(cell: NDArray[np.int64], values: Array) -> tuple[NDArray[np.int64], Array]:
    """Medians of groups of at least one value each."""
    order = np.lexsort((values, cell))
    cell, values = cell[order], values[order]
    starts = np.flatnonzero(np.diff(cell, prepend=cell[0] - 1))
    sizes = np.diff(np.append(starts, len(cell)))
    low, high = values[starts + (sizes - 1) // 2], values[starts + sizes // 2]
    return cell[starts], (low + high) / np.float32(2)


class _Buckets:
    """Values of neighbouring stays, in the order in which they came; in memory, or in one file a bucket."""

    def __init__(self, stays: int, channels: int, scratch: Path | None) -> None:
        if stays * channels > np.iinfo(np.int32).max:
            raise ValueError(f"{stays} stays with {channels} channels each are too many")
        self.bounds = np.linspace(0, stays, _BUCKETS + 1).astype(np.int64)
        self._channels = channels
        self._latest = np.empty(stays)
        self._chunks: list[list[NDArray[Any]]] = [[] for _ in range(_BUCKETS)]
        self._paths = None if scratch is None else [scratch / f"rows-{bucket:03d}" for bucket in range(_BUCKETS)]
        if scratch is not None and (not scratch.is_dir() or any(path.exists() for path in self._paths or ())):
            raise ValueError(f"scratch '{scratch}' is no folder, or one that holds rows; name an empty one")
        # Few large writes: this many bytes of all buckets together wait in memory before they are written.
        self._waiting, self._limit = 0, 8 << 20

    def forget_order(self) -> None:
        self._latest[:] = -np.inf

    def unordered(self, stays: NDArray[np.int64], minutes: NDArray[np.float64]) -> int:
        """Count rows that are earlier than the row of the same stay before them; `stays` is sorted."""
        if not len(stays):
            return 0
        begins: NDArray[np.bool_] = np.diff(stays, prepend=-1) != 0
        before = np.where(begins, self._latest[stays], np.roll(minutes, 1))
        ends = np.append(begins[1:], True)
        self._latest[stays[ends]] = minutes[ends]
        return int(np.count_nonzero(minutes < before))

    def add(self, stays: NDArray[np.int64], channel: int, minutes: NDArray[np.float64], values: Array) -> None:
        observed = np.isfinite(values)
        stays = stays[observed]
        records = np.empty(len(stays), dtype=_RECORD)
        records["key"] = stays * self._channels + channel
        records["minute"] = np.floor(minutes[observed])
        records["value"] = values[observed]
        edges = np.searchsorted(stays, self.bounds)
        for bucket in np.flatnonzero(np.diff(edges)):
            self._chunks[bucket].append(records[edges[bucket] : edges[bucket + 1]])
        self._waiting += records.nbytes
        if self._paths is not None and self._waiting > self._limit:
            self.flush()

    def flush(self) -> None:
        if self._paths is None:
            return
        for path, chunks in zip(self._paths, self._chunks, strict=True):
            if chunks:
                with path.open("ab") as file:
                    file.writelines(chunk.tobytes() for chunk in chunks)
                chunks.clear()
        self._waiting = 0

    def read(self, bucket: int) -> NDArray[Any]:
        if self._paths is None:
            return np.concatenate([np.empty(0, dtype=_RECORD), *self._chunks[bucket]])
        path = self._paths[bucket]
        return np.fromfile(path, dtype=_RECORD) if path.exists() else np.empty(0, dtype=_RECORD)
