"""Datasets in and forecasts out: long tables and GluonTS folders to lists of entries, forecasts to long tables.

What is read is checked once, here, so that everything behind may trust it: one frequency for all items, a regular grid
with NaN for what is missing, no infinities, unique timestamps. Nothing is guessed that could be wrong without notice.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.tseries.frequencies import to_offset

from ..files import replacing

__all__ = ["DataEntry", "read_dataset", "split_by_item", "write_forecasts"]

DataEntry = dict[str, Any]

_log = logging.getLogger(__name__)

_CSV = (".csv", ".csv.gz")
_GLUONTS = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".arrow", ".feather")
_KNOWN = (*_CSV, ".parquet", *_GLUONTS)
# Files of a folder that say something about the data.
_ABOUT = ("metadata.json", "manifest.json")
_MISSING = ("", "NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "null", "NULL", "None")
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
_DAY_NS = 86_400_000_000_000
# Calendar units are never shorter than February.
_SHORTEST_MONTH_NS = 28 * _DAY_NS
# Below this share of observed points a step found in irregular data is an accident, not a frequency (our choice).
_LEAST_OBSERVED = 0.01
_GIVE_FREQ = "give freq= (command line: --freq)"


def read_dataset(
    path: str | os.PathLike[str],
    *,
    freq: str | None = None,
    item_id: str | None = "item_id",
    timestamp: str = "timestamp",
    target: str = "target",
    dtype: type[np.floating[Any]] = np.float32,
) -> list[DataEntry]:
    """Read a dataset from a long table or from GluonTS files.

    A long table has one row per item and time. Missing rows inside an item and missing values become NaN on the regular
    grid. Time stamps are ISO 8601 (day and month are never guessed); those with a time zone are converted to UTC. A
    period of GluonTS has no phase: ``10:17`` at freq ``"h"`` starts at ``10:00``, a month end at freq ``"M"`` belongs
    to its month. Weeks start on the weekday of the first time stamp.

    Parameters
    ----------
    path
        A long table (``.csv``, ``.csv.gz``, ``.parquet``), a GluonTS file (``.json``, ``.jsonl``, each also ``.gz``,
        ``.arrow``, ``.feather``, ``.parquet`` with the columns ``start`` and ``target``) or a folder of GluonTS files.
    freq
        Frequency as pandas spells it, for offsets (``"MS"``) or periods (``"M"``). By default that of
        ``metadata.json`` in the folder or in its parent, and for tables the one inferred from the time stamps: by
        ``pandas.infer_freq``, else the smallest difference if it divides all differences.
    item_id
        Column with the name of the series; None if the table holds a single series, which is then named after the file.
    timestamp
        Column with the time stamps.
    target
        Column with the values.
    dtype
        Type of the targets of a table: ``numpy.float64`` keeps its numbers as they are. Models work with float32, which
        GluonTS files are always read as.

    Returns
    -------
    list[DataEntry]
        Sorted by ``item_id`` as a string, then by ``start``: dictionaries with ``start`` (``pd.Period``), ``target``
        (``dtype``, shape ``(time,)``, NaN is missing) and ``item_id`` (str). Entries of GluonTS files keep their other
        fields.

    Raises
    ------
    ValueError
        If the path is missing or of an unknown kind, a column is wrong, the table is empty, a time stamp is unreadable,
        duplicate or off the grid, a target is not a number or infinite, or items have no or no common frequency.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "demand.csv"
    ...     rows = ["item_id,timestamp,target", "a,2024-01-01 00:00,1", "a,2024-01-01 01:00,2", "a,2024-01-01 03:00,4"]
    ...     _ = path.write_text("\\n".join(rows))
    ...     [entry] = read_dataset(path)
    >>> entry["start"].freqstr, entry["target"].tolist()
    ('h', [1.0, 2.0, nan, 4.0])
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"path '{path}' does not exist; give a table ({', '.join(_CSV)}, .parquet) or a GluonTS folder"
        )
    if path.is_dir():
        return _read_gluonts(_files_of(path), path, freq)
    suffix = _suffix(path, _KNOWN)
    if suffix is None:
        raise ValueError(f"path '{path}' has an unknown ending; known: {', '.join(_KNOWN)}, or a GluonTS folder")
    if suffix in _GLUONTS:
        return _read_gluonts([path], path.parent, freq)
    columns = _columns(path, suffix)
    if suffix == ".parquet" and {"start", "target"} <= set(columns) and timestamp not in columns:
        return _read_gluonts([path], path.parent, freq)
    wanted = {"timestamp": timestamp, "target": target}
    if item_id is not None:
        wanted = {"item_id": item_id, **wanted}
    require_columns(path, columns, wanted)
    if len(set(wanted.values())) < len(wanted):
        pairs = ", ".join(f"{argument} {column!r}" for argument, column in wanted.items())
        raise ValueError(f"one column of '{path}' is asked for twice: {pairs}; give each its own column")
    if suffix == ".parquet":
        frame = pd.read_parquet(path, columns=list(wanted.values()))
    else:
        text = {column: str for argument, column in wanted.items() if argument != "target"}
        # An item may well be called "NA"; only an empty field is a missing name.
        missing = {**{column: [""] for column in text}, target: list(_MISSING)}
        frame = pd.read_csv(
            path,
            usecols=list(wanted.values()),
            dtype=text,
            na_values=missing,
            keep_default_na=False,
            low_memory=False,
        )
    return _entries(frame, path, freq, item_id, timestamp, target, dtype)


def write_forecasts(
    forecasts: Iterable[Any],
    path: str | os.PathLike[str],
    quantiles: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    *,
    overwrite: bool = False,
) -> None:
    """Write univariate forecasts as a long table, one row per item and time.

    The file appears whole or not at all. Time stamps are the starts of the periods. ``mean`` is what
    ``Forecast.mean`` says: for a ``QuantileForecast`` without a stored mean GluonTS warns and gives the median.

    Parameters
    ----------
    forecasts
        GluonTS forecasts, each with an ``item_id``; consumed only after `path` and `quantiles` were found good.
    path
        File to write, ``.csv``, ``.csv.gz`` or ``.parquet``, in an existing folder.
    quantiles
        Levels between 0 and 1, each a column named like ``0.1``.
    overwrite
        Whether an existing file is replaced.

    Raises
    ------
    ValueError
        If the ending or a level is wrong, the folder is missing, the file exists, or a forecast is multivariate, has no
        ``item_id`` or does not know a level; or if there are no forecasts.
    """
    path, suffix = writable(path, overwrite)
    levels = [float(level) for level in quantiles]
    for level in levels:
        if not 0.0 < level < 1.0:
            raise ValueError(f"quantiles holds {level}, which is not between 0 and 1; give levels like 0.1")
    if len(set(levels)) < len(levels):
        raise ValueError(f"quantiles {levels} holds a level twice; give each once")
    tables = [_forecast_table(position, forecast, levels) for position, forecast in enumerate(forecasts)]
    if not tables:
        raise ValueError(f"there are no forecasts to write to '{path}'; is the dataset, or an iterator, used up?")
    table = pd.concat(tables, ignore_index=True)
    write_table(table, path, suffix)


def writable(path: str | os.PathLike[str], overwrite: bool) -> tuple[Path, str]:
    """Return the path of a table to write and its ending; a ValueError if it cannot be written."""
    path = Path(path)
    suffix = _suffix(path, (*_CSV, ".parquet"))
    if suffix is None:
        raise ValueError(f"path '{path}' has an unknown ending; known: {', '.join(_CSV)}, .parquet")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of path '{path}' does not exist; make it first")
    if path.exists() and not overwrite:
        raise ValueError(f"path '{path}' exists; give another one, or overwrite=True (command line: --overwrite)")
    return path, suffix


def write_table(table: Any, path: Path, suffix: str) -> None:
    """Write a table; the file appears whole or not at all."""
    with replacing(path) as part:
        if suffix == ".parquet":
            table.to_parquet(part, index=False)
        else:
            # Without a fixed time inside, equal forecasts would give different gzip files.
            compression = {"method": "gzip", "mtime": 0} if suffix == ".csv.gz" else None
            table.to_csv(part, index=False, compression=compression)


def split_by_item(
    dataset: Iterable[DataEntry],
    *,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    key: Callable[[str], str] | None = None,
) -> tuple[list[DataEntry], ...]:
    """Split a dataset so that no item, or no group of items, is in two parts.

    The parts depend on the keys, `fractions` and `seed`, not on the order of the dataset, which each part keeps.

    Parameters
    ----------
    dataset
        Entries with an ``item_id``.
    fractions
        Share of the groups for each part; they add up to 1. A part with a share above zero gets at least one group.
    seed
        Seed of the shuffle.
    key
        Item id -> group that must stay together, for example `gluonts_peft.vitals.patient_of`; by default every item id
        is its own group.

    Returns
    -------
    tuple[list[DataEntry], ...]
        One list per fraction.

    Raises
    ------
    ValueError
        If the fractions are negative or do not add up to 1, an entry has no ``item_id``, or there are fewer groups than
        parts.

    Examples
    --------
    >>> train, test = split_by_item([{"item_id": name} for name in "abcd"], fractions=(0.75, 0.25))
    >>> len(train), len(test)
    (3, 1)
    """
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.ndim != 1 or not len(shares) or not np.all(shares >= 0) or abs(shares.sum() - 1.0) > 1e-6:
        raise ValueError(f"fractions {tuple(fractions)} must be at least 0 and add up to 1, as (0.8, 0.1, 0.1) do")
    entries = list(dataset)
    for position, entry in enumerate(entries):
        if entry.get("item_id") is None:
            raise ValueError(f"entry {position} of dataset has no 'item_id'; give every entry one before splitting")
    names = [str(entry["item_id"]) for entry in entries]
    groups = [name if key is None else key(name) for name in names]
    unique = sorted(set(groups))
    counts = _counts(len(unique), shares)
    order = np.random.default_rng(seed).permutation(len(unique))
    part_of_position = np.repeat(np.arange(len(shares)), counts)
    part_of = {unique[position]: int(part) for position, part in zip(order, part_of_position, strict=True)}
    parts: tuple[list[DataEntry], ...] = tuple([] for _ in shares)
    for group, entry in zip(groups, entries, strict=True):
        parts[part_of[group]].append(entry)
    return parts


def require_columns(path: Path, columns: Sequence[str], wanted: dict[str, str]) -> None:
    """Raise a ValueError that names the argument if one of the wanted columns (argument -> column) is not there."""
    for argument, column in wanted.items():
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(f"{argument} {column!r} is not a column of '{path}'{hint} columns: {', '.join(columns)}")


def _suffix(path: Path, known: Sequence[str]) -> str | None:
    name = path.name.lower()
    return next((suffix for suffix in known if name.endswith(suffix)), None)


def _columns(path: Path, suffix: str) -> list[str]:
    if suffix == ".parquet":
        import pyarrow.parquet

        return [str(name) for name in pyarrow.parquet.read_schema(path).names]
    try:
        return [str(name) for name in pd.read_csv(path, nrows=0).columns]
    except pd.errors.EmptyDataError:
        raise ValueError(f"path '{path}' is an empty file; give a table with a header and rows") from None


def _entries(
    frame: Any, path: Path, freq: str | None, item_id: str | None, timestamp: str, target: str, dtype: Any
) -> list[DataEntry]:
    if not len(frame):
        raise ValueError(f"path '{path}' holds no rows; give a table with at least one")
    if item_id is None:
        names = np.full(len(frame), path.name.split(".")[0], dtype=object)
    else:
        missing = np.flatnonzero(frame[item_id].isna().to_numpy())
        if len(missing):
            raise ValueError(f"item_id {item_id!r} is missing in row {missing[0] + 1} of '{path}'; name every item")
        names = frame[item_id].astype(str).to_numpy(dtype=object)
    times = _times(frame[timestamp], path, timestamp, names)
    codes, items = pd.factorize(names, sort=True)
    order = np.lexsort((times, codes))
    codes, times = codes[order], times[order]
    _check_duplicates(codes, items, times, path)
    values = _values(frame[target].iloc[order], path, target, items[codes], times)

    if freq is None:
        freq, origin = _infer(codes, items, times)
    else:
        freq, origin = _period_freq(freq), "given"
    offset = _offset(freq)
    if isinstance(offset, pd.offsets.Week):
        freq = f"{_multiple(offset.n)}W-{_DAYS[(pd.Timestamp(times[0]).weekday() - 1) % 7]}"
    firsts = np.flatnonzero(np.diff(codes, prepend=-1))
    positions = _positions(codes, items, times, firsts, freq, origin)
    lengths = positions[np.append(firsts[1:], len(codes)) - 1] + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    grid = np.full(offsets[-1], np.nan, dtype=dtype)
    grid[offsets[codes] + positions] = values
    if len(grid) > len(values):
        _log.info("'%s': %d missing time stamps filled with NaN at freq %s", path, len(grid) - len(values), freq)
    return [
        {
            "start": _period(times[first], freq),
            # A copy, so that keeping one series does not keep them all.
            "target": grid[offsets[code] : offsets[code + 1]].copy(),
            "item_id": str(items[code]),
        }
        for code, first in enumerate(firsts)
    ]


def _times(column: Any, path: Path, name: str, items: Any) -> NDArray[np.datetime64]:
    """Time stamps as datetime64[ns] without a zone, in the order of the column."""
    if pd.api.types.is_numeric_dtype(column):
        raise ValueError(
            f"timestamp {name!r} of '{path}' holds numbers (first: {column.iloc[0]}), which have no unit; "
            "write ISO 8601 like 2024-01-31 13:00"
        )
    if not isinstance(column.dtype, pd.DatetimeTZDtype) and not pd.api.types.is_datetime64_dtype(column):
        zoned = column.astype(str).str.contains(r"\d(?:Z|[+-]\d\d:?\d\d)$", regex=True)
        if zoned.any() and not zoned.all():
            raise ValueError(
                f"timestamp {name!r} of '{path}' holds time stamps with a time zone (first: "
                f"{column[zoned].iloc[0]}) and without (first: {column[~zoned].iloc[0]}); write all the same way"
            )
        parsed = pd.to_datetime(column, errors="coerce", format="ISO8601", utc=bool(zoned.any()))
    else:
        parsed = column
    bad = np.flatnonzero(parsed.isna().to_numpy())
    if len(bad):
        text = column.iloc[bad[0]]
        shown = "missing" if pd.isna(text) else f"{str(text)!r}, which is not ISO 8601"
        raise ValueError(
            f"timestamp {name!r} of item {items[bad[0]]!r} in '{path}' is {shown} (row {bad[0] + 1}, {len(bad)} such "
            "rows); write it like 2024-01-31 13:00"
        )
    if parsed.dt.tz is not None:
        _log.info("'%s': time stamps converted from %s to UTC", path, parsed.dt.tz)
        parsed = parsed.dt.tz_convert("UTC").dt.tz_localize(None)
    times: NDArray[np.datetime64] = parsed.astype("datetime64[ns]").to_numpy()
    return times


def _check_duplicates(codes: Any, items: Any, times: Any, path: Path) -> None:
    same = np.flatnonzero((np.diff(codes) == 0) & (np.diff(times) == np.timedelta64(0)))
    if len(same):
        first = same[0]
        count = int(((codes == codes[first]) & (times == times[first])).sum())
        raise ValueError(
            f"item {items[codes[first]]!r} has the timestamp {pd.Timestamp(times[first])} {count} times in '{path}' "
            f"({len(same)} rows too many in all); keep one row per item and timestamp"
        )


def _values(column: Any, path: Path, name: str, items: Any, times: Any) -> NDArray[np.float64]:
    numbers = pd.to_numeric(column, errors="coerce")
    bad = np.flatnonzero((numbers.isna() & column.notna()).to_numpy())
    if pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_bool_dtype(column):
        bad = np.arange(len(column))
    if len(bad):
        raise ValueError(
            f"target {name!r} of item {items[bad[0]]!r} at {pd.Timestamp(times[bad[0]])} in '{path}' is "
            f"{str(column.iloc[bad[0]])!r}, which is not a number ({len(bad)} such rows); "
            "leave missing values empty, or name another column"
        )
    values: NDArray[np.float64] = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    with np.errstate(over="ignore"):
        infinite = np.flatnonzero(np.isinf(values.astype(np.float32)))
    if len(infinite):
        first = infinite[0]
        raise ValueError(
            f"target {name!r} of item {items[first]!r} at {pd.Timestamp(times[first])} in '{path}' is "
            f"{numbers.iloc[first]}, infinite as float32 ({len(infinite)} such rows); leave missing values empty"
        )
    return values


def _period(time: Any, freq: str) -> Any:
    with warnings.catch_warnings():
        # Periods of business days are deprecated in pandas, but GluonTS has nothing else.
        warnings.simplefilter("ignore", FutureWarning)
        return pd.Period(time, freq)


def _offset(freq: str) -> Any:
    with warnings.catch_warnings():
        # Period spellings such as "M" are deprecated for offsets, those of offsets forbidden for periods.
        warnings.simplefilter("ignore", FutureWarning)
        return to_offset(freq)


def _multiple(n: int) -> str:
    return "" if n == 1 else str(n)


def _quarter_end(month: int) -> str:
    """Quarters that end in March and in December are the same: the last month of that kind names them."""
    return _MONTHS[(month - 1) % 3 + 9]


def _period_freq(freq: str) -> str:
    """Frequency of offsets or periods -> what ``pd.Period`` takes."""
    try:
        offset = _offset(freq)
    except ValueError:
        offset = None
    o: Any = pd.offsets
    if offset is not None and offset.n > 0:
        times = _multiple(offset.n)
        if isinstance(offset, o.Tick):
            return str(offset.freqstr)
        if isinstance(offset, o.Week):
            return f"{times}W-{_DAYS[6 if offset.weekday is None else offset.weekday]}"
        if type(offset) is o.BusinessDay:
            return f"{times}B"
        if isinstance(offset, (o.MonthBegin, o.MonthEnd, o.BusinessMonthBegin, o.BusinessMonthEnd)):
            return f"{times}M"
        if isinstance(offset, (o.QuarterBegin, o.BQuarterBegin)):
            return f"{times}Q-{_quarter_end((offset.startingMonth + 1) % 12 + 1)}"
        if isinstance(offset, (o.QuarterEnd, o.BQuarterEnd)):
            return f"{times}Q-{_quarter_end(offset.startingMonth)}"
        if isinstance(offset, (o.YearBegin, o.BYearBegin)):
            return f"{times}Y-{_MONTHS[(offset.month - 2) % 12]}"
        if isinstance(offset, (o.YearEnd, o.BYearEnd)):
            return f"{times}Y-{_MONTHS[offset.month - 1]}"
    raise ValueError(f"freq {freq!r} is not a frequency of periods; give one like 5min, h, D, W, M, Q or Y")


def _step_freq(step: int) -> str:
    """Nanoseconds -> frequency."""
    if step % (7 * _DAY_NS) == 0:
        return f"{_multiple(step // (7 * _DAY_NS))}W-SUN"
    return str(to_offset(pd.Timedelta(step, unit="ns")).freqstr)


def _calendar_freq(codes: Any, times: Any) -> str | None:
    """Months, quarters or years, if all time stamps are the first or all the last day of a month, gaps allowed."""
    index = pd.DatetimeIndex(times)
    if not (index == index.normalize()).all() or not (index.is_month_start.all() or index.is_month_end.all()):
        return None
    months = index.year.to_numpy() * 12 + index.month.to_numpy() - 1
    steps = np.diff(months)[np.diff(codes) == 0]
    step = int(steps.min())
    if (steps % step).any():
        return None
    # As in pandas, a step of three or twelve months starts (first day) or ends (last day) with the month given.
    end = int(index[0].month) if index.is_month_end.all() else int((months[0] + step - 1) % 12 + 1)
    if step % 12 == 0:
        return f"{_multiple(step // 12)}Y-{_MONTHS[end - 1]}"
    if step % 3 == 0:
        return f"{_multiple(step // 3)}Q-{_quarter_end(end)}"
    return f"{_multiple(step)}M"


def _infer(codes: Any, items: Any, times: Any) -> tuple[str, str]:
    """Common frequency of sorted items and, in words, where it comes from."""
    within = np.diff(codes) == 0
    if not within.any():
        raise ValueError(
            f"the frequency cannot be inferred: every item has a single row (first: {items[0]!r}); "
            f"{_GIVE_FREQ}, for example freq='h'"
        )
    regular: dict[str, str] = {}
    loose = np.zeros(len(codes), dtype=bool)
    firsts = np.flatnonzero(np.diff(codes, prepend=-1))
    for first, last in zip(firsts, np.append(firsts[1:], len(codes)), strict=True):
        if last - first > 1:
            found = _infer_one(times[first:last])
            if found is None:
                loose[first:last] = True
            else:
                regular.setdefault(found, str(items[codes[first]]))
    if len(regular) > 1:
        (one, first_item), (other, second_item) = list(regular.items())[:2]
        raise ValueError(
            f"items have different frequencies: {first_item!r} has {one!r}, {second_item!r} has {other!r}; "
            f"keep items of one frequency in a file, or {_GIVE_FREQ}"
        )
    if regular:
        [(freq, item)] = regular.items()
        return freq, f"inferred from item {item!r}"

    codes, times = codes[loose], times[loose]
    pairs = np.flatnonzero(np.diff(codes) == 0)
    steps = np.diff(times).astype(np.int64)[pairs]
    smallest = int(steps.min())
    if smallest >= _SHORTEST_MONTH_NS and (calendar := _calendar_freq(codes, times)) is not None:
        return calendar, "inferred from the smallest difference"
    uneven = np.flatnonzero(steps % smallest)
    if len(uneven):
        raise ValueError(
            f"the frequency cannot be inferred: item {items[codes[pairs[uneven[0]]]]!r} has time stamps "
            f"{pd.Timedelta(int(steps[uneven[0]]), unit='ns')} apart, not a multiple of the smallest difference, "
            f"{pd.Timedelta(smallest, unit='ns')}; {_GIVE_FREQ}, or resample"
        )
    freq = _step_freq(smallest)
    observed = len(steps) / (int((steps // smallest).sum()))
    if observed < _LEAST_OBSERVED:
        raise ValueError(
            f"the frequency cannot be inferred: at the smallest difference, {freq!r}, only {observed:.2%} of the "
            f"points of item {items[codes[0]]!r} and the others would be observed; {_GIVE_FREQ}, or resample"
        )
    return freq, "inferred from the smallest difference"


def _infer_one(times: Any) -> str | None:
    """Frequency of one regular item; None if it has gaps or fewer than three rows."""
    if len(times) < 3:
        return None
    steps = np.diff(times).astype(np.int64)
    smallest = int(steps.min())
    if smallest < _SHORTEST_MONTH_NS and (steps == smallest).all():
        return _step_freq(smallest)
    # Only months, quarters, years and business days have steps of unequal length; asking pandas is slow.
    if smallest >= _SHORTEST_MONTH_NS or smallest == _DAY_NS:
        found = pd.infer_freq(pd.DatetimeIndex(times))
        if found is not None:
            try:
                return _period_freq(found)
            except ValueError:
                # Such as "the second Monday of a month", which no period is; the caller tries the differences.
                return None
    return None


def _positions(codes: Any, items: Any, times: Any, firsts: Any, freq: str, origin: str) -> NDArray[np.int64]:
    """Place of each row on the grid of its item, from 0."""
    offset = _offset(freq)
    off: NDArray[np.bool_]
    if isinstance(offset, (pd.offsets.Tick, pd.offsets.Week)):
        days = offset.n * 7 * _DAY_NS
        step = days if isinstance(offset, pd.offsets.Week) else int(pd.Timedelta(offset).value)
        number = times.astype(np.int64)
        off = np.zeros(len(times), dtype=bool)
    else:
        step = offset.n
        index = pd.DatetimeIndex(times)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            number = index.to_period(freq.lstrip("0123456789")).asi8
        off = np.concatenate([[False], (np.diff(codes) == 0) & (np.diff(number) == 0)])
        if freq.endswith("B"):
            off |= index.weekday.to_numpy() > 4
    since = number - number[firsts][codes]
    off |= since % step != 0
    if off.any():
        first = int(np.flatnonzero(off)[0])
        raise ValueError(
            f"timestamp {pd.Timestamp(times[first])} of item {items[codes[first]]!r} is off the grid of freq {freq!r} "
            f"({origin}), which starts at {pd.Timestamp(times[firsts[codes[first]]])} ({int(off.sum())} such rows); "
            f"resample, or {'give another freq=' if origin == 'given' else _GIVE_FREQ}"
        )
    positions: NDArray[np.int64] = (since // step).astype(np.int64)
    return positions


def _files_of(folder: Path) -> list[Path]:
    for part in ("train", "test"):
        if (folder / part).is_dir():
            raise ValueError(f"path '{folder}' holds the folder '{part}'; give one part, such as '{folder / part}'")
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and file.name not in _ABOUT and not file.name.startswith(".")
    )
    known = [file for file in files if _suffix(file, (".parquet", *_GLUONTS)) is not None]
    if len(known) < len(files):
        ignored = next(file for file in files if file not in known)
        _log.warning(
            "'%s': %d files of other kinds are ignored (first: '%s')", folder, len(files) - len(known), ignored
        )
    if not known:
        raise ValueError(f"path '{folder}' holds no GluonTS file; known endings: .parquet, {', '.join(_GLUONTS)}")
    return known


def _metadata_freq(folder: Path) -> tuple[str, Path] | None:
    for file in (folder / "metadata.json", folder.parent / "metadata.json"):
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"'{file}' is not JSON: {error}; repair it, or {_GIVE_FREQ} and remove it") from None
            if isinstance(content, dict) and isinstance(content.get("freq"), str):
                return content["freq"], file
    return None


def _read_gluonts(files: Sequence[Path], folder: Path, freq: str | None) -> list[DataEntry]:
    from gluonts.dataset.common import FileDataset
    from gluonts.exceptions import GluonTSDataError

    found = _metadata_freq(folder)
    if freq is not None:
        period_freq = _period_freq(freq)
        if found is not None and _period_freq(found[0]) != period_freq:
            raise ValueError(f"freq {freq!r} is not that of '{found[1]}', {found[0]!r}; leave freq out, or correct one")
    elif found is not None:
        period_freq = _period_freq(found[0])
    else:
        raise ValueError(f"'{folder}' has no metadata.json with a freq; {_GIVE_FREQ}, for example freq='h'")
    entries: list[DataEntry] = []
    for file in files:
        try:
            for entry in FileDataset(file, freq=period_freq):
                entries.append(_gluonts_entry(dict(entry), file, len(entries)))
        except KeyError as error:
            raise ValueError(f"entry {len(entries)} in '{file}' has no field {error}; GluonTS needs it") from None
        except (GluonTSDataError, TypeError) as error:
            raise ValueError(f"entry {len(entries)} in '{file}' is not a GluonTS entry: {error}") from None
    if not entries:
        raise ValueError(f"path '{folder}' holds no entries; give a dataset with at least one")
    return sorted(entries, key=lambda entry: (entry["item_id"], entry["start"]))


def _gluonts_entry(entry: DataEntry, file: Path, position: int) -> DataEntry:
    name = entry.get("item_id")
    entry["item_id"] = str(position) if name is None else str(name)
    # Arrow files hand out read-only views of a file that may go away.
    values = np.array(entry["target"], dtype=np.float32)
    entry["target"] = values
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        when = (entry["start"] + int(infinite[0])).to_timestamp()
        raise ValueError(
            f"target of item {entry['item_id']!r} at {when} in '{file}' is {values[infinite[0]]}, infinite as float32 "
            f"({len(infinite)} such values); write missing values as NaN"
        )
    return entry


def _forecast_table(position: int, forecast: Any, levels: Sequence[float]) -> Any:
    name = forecast.item_id
    if name is None:
        raise ValueError(f"forecast {position} has no item_id; give every entry of the dataset an 'item_id'")
    mean = np.asarray(forecast.mean)
    if mean.ndim != 1:
        raise ValueError(
            f"the forecast of item {name!r} has the shape {mean.shape}; only univariate ones can be written, "
            "take forecast.copy_dim(0) and so on"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        times = forecast.index.to_timestamp()
    columns: dict[str, Any] = {"item_id": str(name), "timestamp": times, "mean": mean}
    for level in levels:
        values = np.asarray(forecast.quantile(level))
        if np.any(np.isnan(values) & ~np.isnan(mean)):
            stored = ", ".join(getattr(forecast, "forecast_keys", ()))
            raise ValueError(f"the forecast of item {name!r} does not know the quantile {level}; it has: {stored}")
        columns[str(level)] = values
    return pd.DataFrame(columns)


def _counts(groups: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    needed = int((shares > 0).sum())
    if groups < needed:
        raise ValueError(
            f"fractions {tuple(shares.tolist())} ask for {needed} parts, but there are {groups} groups of items; "
            "give fewer fractions or more items"
        )
    exact = shares * groups
    counts: NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    largest = np.argsort(-(exact - counts), kind="stable")
    counts[largest[: groups - int(counts.sum())]] += 1
    for part in np.flatnonzero((shares > 0) & (counts == 0)):
        counts[np.argmax(counts)] -= 1
        counts[part] += 1
    return counts
