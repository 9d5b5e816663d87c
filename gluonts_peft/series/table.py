"""The one reader of tables: long tables and GluonTS folders to lists of entries; `writing` is the way back.

What is read is checked once, here, so that everything behind may trust it: one frequency for all items, a regular grid
with NaN for what is missing, no infinities, unique time stamps. Nothing is guessed that could be wrong without notice:
not day and month, not the separator, not what an unknown column is for.
"""

from __future__ import annotations

import codecs
import difflib
import logging
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .calendar import DAY, Stamps, offset_from, with_calendar
from .folders import GLUONTS, files_of, read_gluonts, suffix_of
from .grid import lay
from .rows import narrowest
from .writing import TABLES, writable, write_forecasts, write_table

__all__ = [
    "DataEntry",
    "TableFormat",
    "read_dataset",
    "require_columns",
    "split_by_item",
    "writable",
    "write_forecasts",
    "write_table",
]

DataEntry = dict[str, Any]

_log = logging.getLogger(__name__)

_CSV = (".csv", ".csv.gz")
_KNOWN = (*TABLES, *GLUONTS)
_ARROW = (".parquet", ".arrow", ".feather")
_MISSING = ("", "NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "null", "NULL", "None")
# So many names of columns are shown, and so many rows looked at to tell what a column holds.
_SHOWN, _SAMPLE = 20, 50
_SEPARATORS = {";": "';'", "\t": "'\\t'", "|": "'|'"}


@dataclass(frozen=True)
class TableFormat:
    """How a text table is written.

    Attributes
    ----------
    sep
        What is between fields; ``"\\t"`` is a tab.
    decimal
        The decimal mark of numbers.
    date_format
        How time stamps are written, for ``datetime.strptime``: ``"%d.%m.%Y %H:%M"``. None is ISO 8601.
    encoding
        That of the file, as Python spells it.
    """

    sep: str = ","
    decimal: str = "."
    date_format: str | None = None
    encoding: str = "utf-8"

    def checked(self) -> TableFormat:
        """Return it with the tab spelled out; a ValueError for what cannot be."""
        sep = "\t" if self.sep in ("\\t", "tab") else self.sep
        if len(sep) != 1 or sep in '"\r\n':
            raise ValueError(f"sep {self.sep!r} is not one character; give one like ',', ';' or '\\t'")
        if len(self.decimal) != 1 or self.decimal == sep or self.decimal.isalnum():
            raise ValueError(f"decimal {self.decimal!r} is not one mark other than sep {sep!r}; give '.' or ','")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(
                f"encoding {self.encoding!r} is unknown; give one like utf-8, latin-1, cp1252 or utf-16"
            ) from None
        if self.date_format is not None and "%" not in self.date_format:
            raise ValueError(f"date_format {self.date_format!r} has no '%'; write it like '%d.%m.%Y %H:%M'")
        return TableFormat(sep, self.decimal, self.date_format, self.encoding)


def read_dataset(
    path: str | os.PathLike[str],
    *,
    freq: str | None = None,
    item_id: str | None = "item_id",
    timestamp: str = "timestamp",
    target: str = "target",
    dtype: type[np.floating[Any]] | None = None,
    sep: str = ",",
    decimal: str = ".",
    date_format: str | None = None,
    encoding: str = "utf-8",
    ignore: bool | str | Sequence[str] = False,
) -> list[DataEntry]:
    """Read a dataset from a long table or from GluonTS files.

    A long table has one row per item and time. Missing rows inside an item and missing values become NaN on the regular
    grid. Time stamps are ISO 8601 unless `date_format` says otherwise (day and month are never guessed). Steps of days
    and longer follow the clock of the time zone, shorter ones have an absolute length; ``start`` is the period that
    holds what the clock showed at the first stamp. What a period does not say, such as the zone, noon, or the last day
    of a month, is the entry's `Calendar`, by which forecasts and filled series are stamped.

    Parameters
    ----------
    path
        A long table (``.csv``, ``.csv.gz``, ``.parquet``, ``.arrow``, ``.feather``; a pandas index counts as columns),
        a GluonTS file (``.json``, ``.jsonl``, each also ``.gz``, or an Arrow or Parquet file with the columns
        ``start`` and ``target``) or a folder of GluonTS files.
    freq
        Frequency as pandas spells it, for offsets (``"MS"``) or periods (``"M"``). By default that of
        ``metadata.json`` in the folder or in its parent, and for tables the one inferred from the time stamps: that of
        items without gaps, else the smallest difference if it divides all differences. The name of a period leaves
        open where in it the stamps are, and even lets them vary.
    item_id
        Column with the name of the series; None if the table holds a single series, which is then named after the file.
    timestamp
        Column with the time stamps.
    target
        Column with the values.
    dtype
        Type of the targets of a table: ``numpy.float64`` keeps its numbers as they are. By default, and of GluonTS
        files, float32 for items whose changes from step to step that holds, float64 for others, such as a counter of
        seconds.
    sep, decimal, date_format, encoding
        How a text table is written, see `TableFormat`.
    ignore
        Columns that are meant to be left out, or True for all; a warning names others that are not read.

    Returns
    -------
    list[DataEntry]
        In the order in which the items first appear: dictionaries with ``start`` (``pd.Period``), ``target``
        (``dtype``, shape ``(time,)``, NaN is missing) and ``item_id`` (of the table's type: whole numbers are ``int``,
        and text such as ``007`` stays text). Entries of GluonTS files keep their other fields. If a series is stamped
        otherwise than with the starts of its periods, all entries have an ``info`` with their calendars.

    Raises
    ------
    ValueError
        If the path is missing, damaged or of an unknown kind, a column is wrong, the table is empty, a time stamp is
        unreadable, duplicate or off the grid, a target is not a number or infinite, items have no or no common
        frequency, or most of the grid would be missing.

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
    optional = dict(freq=freq, item_id=item_id, date_format=date_format)
    needed = dict(timestamp=timestamp, target=target, sep=sep, decimal=decimal, encoding=encoding)
    for name, value in {**optional, **needed}.items():
        if not (isinstance(value, str) or value is None and name in optional):
            raise ValueError(f"{name} {value!r} is a {type(value).__name__}; give text, such as freq='h'")
    written = TableFormat(sep, decimal, date_format, encoding).checked()
    if not path.exists():
        raise ValueError(f"path '{path}' does not exist; give a table ({', '.join(TABLES)}) or a GluonTS folder")
    if path.is_dir():
        return read_gluonts(files_of(path), path, freq)
    if not path.is_file():
        raise ValueError(f"path '{path}' is not a file; give a table ({', '.join(TABLES)}) or a GluonTS folder")
    suffix = suffix_of(path, _KNOWN)
    if suffix is None:
        raise ValueError(f"path '{path}' has an unknown ending; known: {', '.join(_KNOWN)}, or a GluonTS folder")
    if suffix in GLUONTS and suffix not in _ARROW:
        return read_gluonts([path], path.parent, freq)
    source = _Arrow(path, suffix) if suffix in _ARROW else _Text(path, written)
    columns = source.columns
    if suffix in _ARROW and {"start", "target"} <= set(columns) and timestamp not in columns:
        return read_gluonts([path], path.parent, freq)
    wanted = {"timestamp": timestamp, "target": target}
    if item_id is not None:
        wanted = {"item_id": item_id, **wanted}
    missing = [argument for argument, column in wanted.items() if column not in columns]
    if missing:
        if "timestamp" not in missing or len(missing) > 1:
            _refuse_wide(source, path, wanted, missing)
        require_columns(path, columns, wanted)
    if len(set(wanted.values())) < len(wanted):
        pairs = ", ".join(f"{argument} {column!r}" for argument, column in wanted.items())
        raise ValueError(f"one column of '{path}' is asked for twice: {pairs}; give each its own column")
    _report_ignored(path, columns, wanted, ignore)
    frame = source.read(wanted)
    return _entries(frame, path, freq, item_id, timestamp, target, dtype, written)


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
            raise ValueError(f"{argument} {column!r} is not a column of '{path}'{hint} columns: {_named(columns)}")


def _named(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return ", ".join(columns[:_SHOWN]) + more


def _report_ignored(
    path: Path, columns: Sequence[str], wanted: dict[str, str], ignore: bool | str | Sequence[str]
) -> None:
    meant = [ignore] if isinstance(ignore, str) else [] if isinstance(ignore, bool) else list(ignore)
    require_columns(path, columns, {f"ignore[{i}]": column for i, column in enumerate(meant)})
    others = [column for column in columns if column not in {*wanted.values(), *meant}]
    if others and ignore is not True:
        _log.warning(
            "'%s': %d columns are not read: %s; if they are meant to be left out, say so with ignore= (command line: "
            "--ignore)",
            path,
            len(others),
            _named(others),
        )


def _refuse_wide(source: _Text | _Arrow, path: Path, wanted: dict[str, str], missing: Sequence[str]) -> None:
    """Refuse a table with one column a series, and say how to make it long."""
    numbers, texts = source.kinds()
    times = [wanted["timestamp"]] if wanted["timestamp"] in source.columns else texts
    values = [name for name in numbers if name not in times]
    if "target" not in missing or len(times) != 1 or len(texts) > 1 or len(values) < 2:
        return
    if ("item_id" in wanted and "item_id" not in missing) or not source.temporal(times[0]):
        return
    reader = (
        "read_csv" if isinstance(source, _Text) else f"read_{'parquet' if path.suffix == '.parquet' else 'feather'}"
    )
    shown = ", ".join(map(repr, values[:3])) + (", ..." if len(values) > 3 else "")
    index = ".reset_index()" if isinstance(source, _Arrow) and times[0] in source.indexed else ""
    own = times[0] != wanted["timestamp"]
    api, command = (f"timestamp={times[0]!r}, ", f"--timestamp {times[0]} ") if own else ("", "")
    renamed = f".rename(columns={{{times[0]!r}: 'timestamp'}})" if times[0] != "timestamp" else ""
    raise ValueError(
        f"'{path}' is a wide table, a column of time stamps ({times[0]!r}) and {len(values)} of numbers ({shown}), "
        f"where a long one is needed, with a row per series and time; melt it: pandas.{reader}({path.name!r}){index}"
        f".melt({times[0]!r}, var_name='item_id', value_name='target'){renamed}; or read one series: "
        f"item_id=None, {api}target={values[0]!r} (command line: --item-id '' {command}--target {values[0]})"
    )


@contextmanager
def _readable(path: Path, kind: str, encoding: str | None = None) -> Iterator[None]:
    """Turn what libraries say of a damaged file into one error that names it."""
    import pyarrow as pa

    try:
        yield
    except pd.errors.EmptyDataError:
        raise ValueError(f"path '{path}' is an empty file; give a table with a header and rows") from None
    except UnicodeError as error:
        # The position is one in a piece of the file, and says nothing.
        reason = getattr(error, "reason", None) or str(error)
        hint = "latin-1 or cp1252"
        with path.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                hint = "utf-16"
        raise ValueError(
            f"'{path}' is not written in {encoding} ({reason}); give its encoding, such as {hint}"
            f" (command line: --encoding {hint.split()[0]}), or write it again if it is damaged"
        ) from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, pa.ArrowException, EOFError, zlib.error, OSError) as error:
        if isinstance(error, PermissionError | FileNotFoundError):
            raise
        text = " ".join(str(error).split())
        longer = "saw" in text or isinstance(error, pd.errors.ParserWarning)
        remedy = "quote fields that hold the separator, such as 1,5" if longer else "write it again"
        raise ValueError(f"'{path}' cannot be read as {kind}: {text}; is it damaged or cut off? {remedy}") from None


class _Text:
    """A text table."""

    def __init__(self, path: Path, written: TableFormat) -> None:
        self.path, self.written = path, written
        self.columns = [str(name) for name in self._frame(nrows=0).columns]
        for sep, shown in _SEPARATORS.items():
            if sep != written.sep and len(self.columns) == 1 and sep in self.columns[0]:
                raise ValueError(
                    f"'{path}' has a single column, {self.columns[0]!r}; is it separated by {shown}? give sep={shown} "
                    f"(command line: --sep {shown})"
                )

    def _frame(self, **options: Any) -> Any:
        with _readable(self.path, "CSV", self.written.encoding), warnings.catch_warnings():
            # Rows longer than the header: without index_col=False their first field would be taken for an index.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            with self.path.open("rb") as file:
                begin = file.read(2)
            if self.written.encoding == "utf-8" and begin in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UnicodeError("it begins as UTF-16 does")
            return pd.read_csv(
                self.path,
                sep=self.written.sep,
                decimal=self.written.decimal,
                encoding=self.written.encoding,
                index_col=False,
                low_memory=False,
                # The default parser is off by a last digit now and then.
                float_precision="round_trip",
                **options,
            )

    def kinds(self) -> tuple[list[str], list[str]]:
        """Columns of numbers, and others, judged by the first rows."""
        frame = self._frame(nrows=_SAMPLE)
        numbers = [str(name) for name in frame.columns if pd.api.types.is_numeric_dtype(frame[name])]
        return numbers, [str(name) for name in frame.columns if str(name) not in numbers]

    def temporal(self, column: str) -> bool:
        """Whether the first rows of a column look like time stamps."""
        found = self._frame(nrows=_SAMPLE, dtype=str)[column].dropna()
        return bool(len(found) and found.str.match(r"\s*(\d{4}\D?\d\d|\d+[-/. ]\w+[-/. ]\d)").all())

    def read(self, wanted: dict[str, str]) -> Any:
        text = {column: str for argument, column in wanted.items() if argument != "target"}
        # An item may well be called "NA"; only an empty field is a missing name.
        missing = {**{column: [""] for column in text}, wanted["target"]: list(_MISSING)}
        # Not by usecols, which takes a row with a field too many, such as an unquoted 1,5, for the row without it.
        return self._frame(dtype=text, na_values=missing, keep_default_na=False)[list(wanted.values())]


def _is_temporal(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind) or "period" in str(kind).lower())


class _Arrow:
    """A Parquet, Arrow or Feather table; a pandas index is columns like others."""

    def __init__(self, path: Path, suffix: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        # Registers the type of columns of periods.
        import pandas.core.arrays.arrow.extension_types  # noqa: F401  # isort: skip

        self.path, self.kind = path, "Parquet" if suffix == ".parquet" else "Arrow"
        self.table: Any = None
        with _readable(path, self.kind):
            if suffix == ".parquet":
                self.schema = pyarrow.parquet.read_schema(path)
            else:
                with path.open("rb") as file:
                    stream = file.read(6) != b"ARROW1"
                opened = pa.ipc.open_stream(path) if stream else pa.ipc.open_file(path)
                self.schema = opened.schema
                self.opened = opened
        # An index without a name is the time if it holds times, else the name of the series.
        self.names = {str(name): str(name) for name in self.schema.names}
        self.indexed = list((self.schema.pandas_metadata or {}).get("index_columns", ()))
        for name in [name for name in self.names if re.fullmatch(r"__index_level_\d+__|level_\d+|index", name)]:
            kind = self.schema.field(name).type
            usual = "timestamp" if _is_temporal(kind) else "item_id"
            if usual not in self.names and (name.startswith("__") or _is_temporal(kind)):
                self.names[usual] = self.names.pop(name)

    @property
    def columns(self) -> list[str]:
        return [name for name in self.names if not name.startswith("__index_level_")]

    def temporal(self, column: str) -> bool:
        return _is_temporal(self.schema.field(self.names[column]).type)

    def kinds(self) -> tuple[list[str], list[str]]:
        import pyarrow as pa

        kinds = {name: self.schema.field(own).type for name, own in self.names.items() if name in self.columns}
        numbers = [name for name, kind in kinds.items() if pa.types.is_floating(kind) or pa.types.is_integer(kind)]
        return numbers, [name for name in kinds if name not in numbers]

    def read(self, wanted: dict[str, str]) -> Any:
        import pyarrow as pa
        import pyarrow.parquet

        own = [self.names[column] for column in wanted.values()]
        with _readable(self.path, self.kind):
            if self.kind == "Parquet":
                table = pyarrow.parquet.read_table(self.path, columns=own)
            else:
                table = self.opened.read_all().select(own)
            found = {}
            for column, name in zip(wanted.values(), own, strict=True):
                values = table.column(name)
                if pa.types.is_dictionary(values.type):
                    values = values.cast(values.type.value_type)
                if pa.types.is_date(values.type):
                    values = values.cast(pa.timestamp("ms"))
                if pa.types.is_decimal(values.type):
                    values = values.cast(pa.float64())
                found[column] = values.to_pandas().reset_index(drop=True)
        return pd.DataFrame(found)


def _entries(
    frame: Any,
    path: Path,
    freq: str | None,
    item_id: str | None,
    timestamp: str,
    target: str,
    dtype: Any,
    written: TableFormat,
) -> list[DataEntry]:
    if not len(frame):
        raise ValueError(f"path '{path}' holds no rows; give a table with at least one")
    if item_id is None:
        codes, items = np.zeros(len(frame), np.int64), [path.name.split(".")[0]]
    else:
        codes, items = _names(frame[item_id], path, item_id)
    rows = _RowNames(codes, items)
    column = frame[timestamp]
    if isinstance(column.dtype, pd.PeriodDtype):
        freq = freq or str(column.dtype.freq.freqstr if column.isna().all() else column.dropna().iloc[0].freqstr)
        column = column.dt.to_timestamp()
    stamps = _stamps(column, path, timestamp, rows, written.date_format)
    order = np.lexsort((stamps.instants, codes))
    codes, stamps = codes[order], stamps[order]
    _check_duplicates(codes, items, stamps, path)
    values = _values(frame[target].iloc[order], path, target, _RowNames(codes, items), stamps, written.decimal)

    grid = lay(codes, items, stamps, freq)
    offsets = np.concatenate([[0], np.cumsum(grid.lengths)])
    filled = np.full(offsets[-1], np.nan)
    filled[offsets[codes] + grid.positions] = values
    if len(filled) > len(values):
        _log.info("'%s': %d missing time stamps filled with NaN at freq %s", path, len(filled) - len(values), grid.freq)
    entries: list[DataEntry] = [
        # A copy, so that keeping one series does not keep them all.
        {"start": start, "target": _typed(filled[begin:end], dtype), "item_id": name}
        for start, begin, end, name in zip(grid.starts, offsets[:-1], offsets[1:], items, strict=True)
    ]
    if all(calendar.plain for calendar in grid.calendars):
        return entries
    # All or none: GluonTS takes the fields of a batch from its first entry.
    return [with_calendar(entry, calendar) for entry, calendar in zip(entries, grid.calendars, strict=True)]


def _typed(values: NDArray[np.float64], dtype: type[np.floating[Any]] | None) -> NDArray[np.floating[Any]]:
    return narrowest(values) if dtype is None else values.astype(dtype)


class _RowNames:
    """Name of the item of each row."""

    def __init__(self, codes: Any, items: Sequence[Any]) -> None:
        self.codes, self.items = codes, items

    def __getitem__(self, row: int) -> Any:
        return self.items[self.codes[row]]


def _names(column: Any, path: Path, name: str) -> tuple[NDArray[np.int64], list[Any]]:
    """Number of the item of each row, in order of appearance, and the items' names, in the type of the table."""
    missing = np.flatnonzero(column.isna().to_numpy())
    if len(missing):
        raise ValueError(f"item_id {name!r} is missing in row {missing[0] + 1} of '{path}'; name every item")
    codes, unique = pd.factorize(column)
    items = [value.item() if isinstance(value, np.generic) else value for value in unique]
    # Text is read as text: whole numbers are told by their look, which text such as "007" does not have.
    if all(isinstance(item, str) and re.fullmatch(r"0|-?[1-9]\d{0,17}", item) for item in items):
        items = [int(item) for item in items]
    return codes.astype(np.int64), items


def _stamps(column: Any, path: Path, name: str, items: _RowNames, date_format: str | None) -> Stamps:
    """Time stamps, in the order of the column."""
    if pd.api.types.is_numeric_dtype(column):
        raise ValueError(
            f"timestamp {name!r} of '{path}' holds numbers (first: {column.iloc[0]}), which have no unit; "
            "write ISO 8601 like 2024-01-31 13:00"
        )
    if isinstance(column.dtype, pd.DatetimeTZDtype) or pd.api.types.is_datetime64_dtype(column):
        _check_times(column, column, path, name, items, None)
        try:
            return Stamps.of_index(pd.DatetimeIndex(column))
        except pd.errors.OutOfBoundsDatetime as error:
            raise ValueError(
                f"timestamp {name!r} of '{path}' holds a time outside the years 1678 to 2261: {error}"
            ) from None
    # The stamps of many items are the same ones.
    codes, unique = pd.factorize(column)
    text = pd.Series([str(value) for value in unique], dtype=object)
    if date_format is not None:
        walls, offsets = _parsed(text, date_format)
    else:
        zoned = text.str.extract(_ZONED)
        has = zoned[1].notna()
        if has.any() and not has.all():
            rows = has.to_numpy()[codes]
            raise ValueError(
                f"timestamp {name!r} of '{path}' holds time stamps with a time zone (first: "
                f"{column[rows].iloc[0]}) and without (first: {column[~rows].iloc[0]}); write all the same way"
            )
        walls = pd.to_datetime(zoned[0] if has.any() else text, errors="coerce", format="ISO8601")
        offsets = np.array([offset_from(zone) for zone in zoned[1]], np.int64) if has.any() and len(text) else None
    parsed = pd.Series(walls).reindex(codes)
    _check_times(column, parsed, path, name, items, date_format)
    clock = pd.DatetimeIndex(parsed).as_unit("ns").asi8
    if offsets is None:
        return Stamps(clock)
    own = offsets[codes]
    return Stamps(clock, own)


# A time of day, then Z, -05, -0430 or +05:45; behind a date alone only what cannot be a part of it.
_ZONED = r"^(.*(?:T\d\d|:\d\d)\S*?|\d{4}-\d\d-\d\d(?=Z|[+-]\d\d:\d\d$))\s?(Z|z|UTC|[+-]\d\d(?::?\d\d){0,2})$"


def _parsed(text: Any, date_format: str) -> tuple[Any, NDArray[np.int64] | None]:
    """Clock times and offsets of texts of a format; NaT for what does not follow it."""
    if "%z" not in date_format:
        return pd.to_datetime(text, errors="coerce", format=date_format), None
    from datetime import datetime

    walls, offsets = [], []
    for one in text:
        try:
            found = datetime.strptime(one, date_format)
        except ValueError:
            walls.append(pd.NaT)
            offsets.append(0)
            continue
        delta = found.utcoffset()
        walls.append(pd.Timestamp(found.replace(tzinfo=None)))
        offsets.append(0 if delta is None else int(pd.Timedelta(delta).value))
    return pd.Series(walls, dtype="datetime64[ns]"), np.array(offsets, np.int64)


def _check_times(column: Any, parsed: Any, path: Path, name: str, items: _RowNames, date_format: str | None) -> None:
    bad = np.flatnonzero(pd.isna(parsed).to_numpy())
    if not len(bad):
        return
    text = column.iloc[bad[0]]
    wanted = "is not ISO 8601" if date_format is None else f"does not follow date_format {date_format!r}"
    year = re.match(r"\d{4}(?=-?\d\d-?\d\d)", str(text)) if date_format is None else None
    if year is not None and not 1678 <= int(year[0]) <= 2261:
        wanted = "lies outside the years 1678 to 2261"
    shown = "missing" if pd.isna(text) else f"{str(text)!r}, which {wanted}"
    remedy = "write it like 2024-01-31 13:00"
    if date_format is None and not pd.isna(text) and re.search(r"\d\D\d", str(text)):
        remedy += ", or say how it is written, e.g. date_format='%d.%m.%Y' (command line: --date-format)"
    raise ValueError(
        f"timestamp {name!r} of item {items[bad[0]]!r} in '{path}' is {shown} (row {bad[0] + 1}, {len(bad)} such "
        f"rows); {remedy}"
    )


def _check_duplicates(codes: Any, items: Sequence[Any], stamps: Stamps, path: Path) -> None:
    same = np.flatnonzero((np.diff(codes) == 0) & (np.diff(stamps.instants) == 0))
    if len(same):
        first = same[0]
        count = int(((codes == codes[first]) & (stamps.instants == stamps.instants[first])).sum())
        # When clocks go back an hour comes twice, at night.
        night = (
            stamps.offsets is None and (stamps.walls[same] % DAY).any() and (stamps.walls[same] % DAY < DAY // 6).all()
        )
        remedy = "; where clocks went back, write the offset too, like 2024-10-27 02:00+01:00" if night else ""
        raise ValueError(
            f"item {items[codes[first]]!r} has the timestamp {stamps.at(int(first))} {count} times in '{path}' "
            f"({len(same)} rows too many in all); keep one row per item and timestamp{remedy}"
        )


def _values(column: Any, path: Path, name: str, items: _RowNames, stamps: Stamps, decimal: str) -> NDArray[np.float64]:
    numbers = pd.to_numeric(column, errors="coerce")
    bad = np.flatnonzero((numbers.isna() & column.notna()).to_numpy())
    if pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_bool_dtype(column):
        bad = np.arange(len(column))
    if len(bad):
        text = str(column.iloc[bad[0]])
        other = "," if decimal == "." else "."
        mark = rf"\s*[-+]?\d*{re.escape(other)}\d+([eE][-+]?\d+)?\s*"
        hint = f"; a decimal {other!r}? give decimal={other!r} (command line: --decimal {other})"
        raise ValueError(
            f"target {name!r} of item {items[bad[0]]!r} at {stamps.at(int(bad[0]))} in '{path}' is "
            f"{text!r}, which is not a number ({len(bad)} such rows); "
            f"leave missing values empty, or name another column{hint if re.fullmatch(mark, text) else ''}"
        )
    values: NDArray[np.float64] = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    with np.errstate(over="ignore"):
        infinite = np.flatnonzero(np.isinf(values.astype(np.float32)))
    if len(infinite):
        first = int(infinite[0])
        raise ValueError(
            f"target {name!r} of item {items[first]!r} at {stamps.at(first)} in '{path}' is "
            f"{numbers.iloc[first]}, infinite as float32 ({len(infinite)} such rows); leave missing values empty"
        )
    return values


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
