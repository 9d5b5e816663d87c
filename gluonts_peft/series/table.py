"""Reading datasets: long tables and GluonTS folders become lists of entries; `writing` is the inverse.

Data are validated once, here, so that all later code can rely on one frequency for all items, a regular grid with NaN
for missing values, no infinities and unique time stamps. Nothing is guessed that could silently be wrong: neither the
order of day and month, nor the separator, nor the purpose of an unknown column.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .folders import GLUONTS, DataEntry, files_of, read_gluonts, suffix_of
from .formats import ArrowTable, TableFormat, TextTable
from .frames import Roles, entries_of, from_dataframe, to_dataframe
from .parsing import named, require_columns
from .splitting import split_by_item
from .writing import TABLES, writable, write_forecasts, write_table

__all__ = [
    "DataEntry",
    "TableFormat",
    "from_dataframe",
    "read_dataset",
    "require_columns",
    "split_by_item",
    "to_dataframe",
    "writable",
    "write_forecasts",
    "write_table",
]

_log = logging.getLogger(__name__)

_KNOWN = (*TABLES, *GLUONTS)
_ARROW = (".parquet", ".arrow", ".feather")


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
    known: Sequence[str] = (),
    past: Sequence[str] = (),
    future: str | os.PathLike[str] | None = None,
) -> list[DataEntry]:
    """Read a dataset from a long table or from GluonTS files.

    A long table has one row per item and time. Missing rows inside an item and missing values become NaN on the regular
    grid. Time stamps are ISO 8601 unless `date_format` says otherwise (the order of day and month is never guessed).
    Steps of days and longer follow the local clock of the time zone, shorter ones have a fixed length; ``start`` is the
    period that contains the local time of the first stamp. What a period cannot express, such as the time zone, stamps
    at noon or on the last day of a month, is kept in the entry's `Calendar`, which stamps forecasts and imputed series.

    Parameters
    ----------
    path
        A long table (``.csv``, ``.csv.gz``, ``.parquet``, ``.arrow``, ``.feather``; a pandas index counts as columns),
        a GluonTS file (``.json``, ``.jsonl``, each also ``.gz``, or an Arrow or Parquet file with the columns
        ``start`` and ``target``) or a folder of GluonTS files.
    freq
        Frequency as pandas spells it, for offsets (``"MS"``) or periods (``"M"``). By default that of
        ``metadata.json`` in the folder or in its parent, and for tables the one inferred from the time stamps: that of
        items without gaps, else the smallest difference if it divides all differences. With the name of
        a period, stamps may lie anywhere within their periods.
    item_id
        Column with the ids of the series; None if the table holds a single series, which takes the name of the file.
    timestamp
        Column with the time stamps.
    target
        Column with the values.
    dtype
        Data type of the targets of a table: ``numpy.float64`` keeps all digits. By default, and for GluonTS files,
        float32 for items whose step-to-step changes it can represent, float64 for others, such as a counter of seconds.
    sep, decimal, date_format, encoding
        Format of a text table, see `TableFormat`.
    ignore
        Columns that are left out on purpose, or True for all others; a warning names columns that are not read.
    known, past
        Columns of features, of a table: numbers that are known in the future too, or in the past only.
    future
        Table with the `known` columns after the end of each series, see
        :func:`~gluonts_peft.series.frames.from_dataframe`.

    Returns
    -------
    list[DataEntry]
        In the order in which the items first appear: dictionaries with ``start`` (``pd.Period``), ``target``
        (``dtype``, shape ``(time,)``, NaN is missing) and ``item_id`` (of the table's type: whole numbers are ``int``,
        and text such as ``007`` stays text). Entries of GluonTS files keep their other fields. If a series has stamps
        other than the starts of its periods, all entries have an ``info`` with their calendars.

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
    source = ArrowTable(path, suffix) if suffix in _ARROW else TextTable(path, written)
    columns = source.columns
    if suffix in _ARROW and {"start", "target"} <= set(columns) and timestamp not in columns:
        return read_gluonts([path], path.parent, freq)
    roles = Roles(item_id, timestamp, target, tuple(known), tuple(past))
    wanted = roles.wanted()
    missing = [argument for argument, column in wanted.items() if column not in columns]
    if missing and ("timestamp" not in missing or len(missing) > 1):
        _refuse_wide(source, path, wanted, missing)
    roles.check(columns, path)
    _report_ignored(path, columns, wanted, ignore)
    later = None if future is None else _read_future(Path(future), roles, written)
    frame = source.read(wanted)
    options: dict[str, Any] = dict(freq=freq, dtype=dtype, date_format=written.date_format, decimal=written.decimal)
    return entries_of(frame, path, roles, later, **options)


def _read_future(path: Path, roles: Roles, written: TableFormat) -> Any:
    if not path.is_file():
        raise ValueError(f"future '{path}' does not exist; give a table ({', '.join(TABLES)})")
    suffix = suffix_of(path, TABLES)
    if suffix is None:
        raise ValueError(f"future '{path}' has an unknown ending; known: {', '.join(TABLES)}")
    source = ArrowTable(path, suffix) if suffix in _ARROW else TextTable(path, written)
    return source.read(roles.check(source.columns, path, future=True))


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
            named(others),
        )


def _refuse_wide(source: TextTable | ArrowTable, path: Path, wanted: dict[str, str], missing: Sequence[str]) -> None:
    """Refuse a wide table, which has one column per series, and say how to melt it."""
    numbers, texts = source.kinds()
    times = [wanted["timestamp"]] if wanted["timestamp"] in source.columns else texts
    values = [name for name in numbers if name not in times]
    if "target" not in missing or len(times) != 1 or len(texts) > 1 or len(values) < 2:
        return
    if ("item_id" in wanted and "item_id" not in missing) or not source.temporal(times[0]):
        return
    reader = (
        "read_csv" if isinstance(source, TextTable) else f"read_{'parquet' if path.suffix == '.parquet' else 'feather'}"
    )
    shown = ", ".join(map(repr, values[:3])) + (", ..." if len(values) > 3 else "")
    index = ".reset_index()" if isinstance(source, ArrowTable) and times[0] in source.indexed else ""
    own = times[0] != wanted["timestamp"]
    api, command = (f"timestamp={times[0]!r}, ", f"--timestamp {times[0]} ") if own else ("", "")
    renamed = f".rename(columns={{{times[0]!r}: 'timestamp'}})" if times[0] != "timestamp" else ""
    raise ValueError(
        f"'{path}' is a wide table, a column of time stamps ({times[0]!r}) and {len(values)} of numbers ({shown}), "
        f"where a long one is needed, with a row per series and time; melt it: pandas.{reader}({path.name!r}){index}"
        f".melt({times[0]!r}, var_name='item_id', value_name='target'){renamed}; or read one series: "
        f"item_id=None, {api}target={values[0]!r} (command line: --item-id '' {command}--target {values[0]})"
    )
