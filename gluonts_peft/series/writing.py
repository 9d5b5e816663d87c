"""Forecasts and series to tables: long ones, one row per item and time, stamped by the calendars of their series."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..files import replacing
from .calendar import Stamps, calendar_of, stamp_table

__all__ = ["TABLES", "writable", "write_columns", "write_forecasts", "write_table"]

TABLES = (".csv", ".csv.gz", ".parquet")
"""Endings of the tables that can be written."""

# Rows written at a time, and forecasts gathered at a time.
_ROWS, _FORECASTS = 1 << 16, 512


def write_forecasts(
    forecasts: Iterable[Any],
    path: str | os.PathLike[str],
    quantiles: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    *,
    overwrite: bool = False,
    columns: Sequence[str] = ("item_id", "timestamp"),
) -> None:
    """Write univariate forecasts as a long table, one row per item and time.

    The file appears whole or not at all. Time stamps go on from those of the data, in their zone and at their time of
    day, where the entries knew them (`read_dataset`, ``PandasDataset``); else they are the starts of the periods.
    Values are those of the forecasts, to the last bit. ``mean`` is what ``Forecast.mean`` says: for a
    ``QuantileForecast`` without a stored mean GluonTS warns and gives the median.

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
    columns
        Names of the columns for item and time.

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
    names = (*columns, "mean", *map(str, levels))
    if len(set(names)) < len(names):
        raise ValueError(f"columns {tuple(columns)} are those of values too: {', '.join(names[2:])}; give other names")
    items: list[Any] = []
    starts: list[pd.Period] = []
    calendars: list[Any] = []
    lengths: list[int] = []
    values: list[NDArray[Any]] = []
    for batch in _batches(forecasts):
        for position, forecast in enumerate(batch, start=len(items)):
            if forecast.item_id is None:
                raise ValueError(f"forecast {position} has no item_id; give every entry of the dataset an 'item_id'")
        for forecast, own in zip(batch, _values(batch, levels), strict=True):
            items.append(forecast.item_id)
            starts.append(forecast.start_date)
            calendars.append(calendar_of(forecast))
            lengths.append(own.shape[1])
            values.append(own)
    if not items:
        raise ValueError(f"there are no forecasts to write to '{path}'; is the dataset, or an iterator, used up?")
    table = np.concatenate(values, axis=1)
    stamps = stamp_table(starts, lengths, calendars)
    write_columns(dict(zip(names, (repeated(items, lengths), stamps, *table), strict=True)), path, suffix)


def _batches(forecasts: Iterable[Any]) -> Iterator[list[Any]]:
    batch = []
    for forecast in forecasts:
        batch.append(forecast)
        if len(batch) == _FORECASTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _values(forecasts: Sequence[Any], levels: Sequence[float]) -> list[NDArray[Any]]:
    """Mean and quantiles of each forecast, shape ``(1 + levels, time)``."""
    from gluonts.model.forecast import QuantileForecast, SampleForecast

    found: list[Any] = [None] * len(forecasts)
    groups: dict[Any, list[int]] = {}
    for i, forecast in enumerate(forecasts):
        # Only what is exactly of these types is known to store its numbers like this.
        if type(forecast) is QuantileForecast and forecast.forecast_array.ndim == 2:
            groups.setdefault((tuple(forecast.forecast_keys), forecast.forecast_array.shape), []).append(i)
        elif type(forecast) is SampleForecast and forecast.samples.ndim == 2:
            groups.setdefault((None, forecast.samples.shape), []).append(i)
        else:
            found[i] = _one(forecast, levels)
    for (keys, _), members in groups.items():
        # By itself, for what is said once: that there is no mean, that a level is not known.
        found[members[0]] = _one(forecasts[members[0]], levels)
        rest = members[1:]
        if not rest:
            continue
        if keys is None:
            samples = np.sort(np.stack([forecasts[i].samples for i in rest]), axis=1)
            picked = [int(np.round((samples.shape[1] - 1) * level)) for level in levels]
            for row, i in enumerate(rest):
                found[i] = np.concatenate([np.mean(forecasts[i].samples, axis=0)[None], samples[row, picked]])
            continue
        rows = [keys.index(name) if name in keys else None for name in ("mean", *map(str, levels))]
        if rows[0] is None and "0.5" in keys:
            rows[0] = keys.index("0.5")
        for i in rest:
            forecast = forecasts[i]
            found[i] = forecast.forecast_array[rows] if None not in rows else _one(forecast, levels)
            if np.isnan(found[i]).any():
                found[i] = _one(forecast, levels)
    return found


def _one(forecast: Any, levels: Sequence[float]) -> NDArray[Any]:
    name = forecast.item_id
    mean = np.asarray(forecast.mean)
    if mean.ndim != 1:
        raise ValueError(
            f"the forecast of item {name!r} has the shape {mean.shape}; only univariate ones can be written, "
            "take forecast.copy_dim(0) and so on"
        )
    rows = [mean]
    for level in levels:
        values = np.asarray(forecast.quantile(level))
        if np.any(np.isnan(values) & ~np.isnan(mean)):
            stored = ", ".join(getattr(forecast, "forecast_keys", ()))
            raise ValueError(f"the forecast of item {name!r} does not know the quantile {level}; it has: {stored}")
        rows.append(values)
    return np.stack(rows)


def repeated(items: Sequence[Any], counts: Sequence[int]) -> NDArray[Any]:
    """Return a column of names, each so many times: of whole numbers if all are, else of what they are."""
    kinds = {type(item) for item in items}
    names: list[Any] = [str(item) for item in items] if len(kinds) > 1 else list(items)
    whole = kinds == {int} and all(abs(item) < 1 << 63 for item in names)
    column = np.empty(len(names), dtype=np.int64 if whole else object)
    column[:] = names
    return np.repeat(column, counts)


def writable(path: str | os.PathLike[str], overwrite: bool) -> tuple[Path, str]:
    """Return the path of a table to write and its ending; a ValueError if it cannot be written."""
    path = Path(path)
    suffix = next((suffix for suffix in TABLES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"path '{path}' has an unknown ending; known: {', '.join(TABLES)}")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of path '{path}' does not exist; make it first")
    if path.exists() and not overwrite:
        raise ValueError(f"path '{path}' exists; give another one, or overwrite=True (command line: --overwrite)")
    return path, suffix


def write_table(table: Any, path: Path, suffix: str) -> None:
    """Write a data frame without its index; the file appears whole or not at all."""
    columns: dict[str, Any] = {}
    for name, column in table.items():
        stamped = isinstance(column.dtype, pd.DatetimeTZDtype) or pd.api.types.is_datetime64_dtype(column)
        columns[str(name)] = Stamps.of_index(pd.DatetimeIndex(column)) if stamped else column.to_numpy()
    write_columns(columns, path, suffix)


def write_columns(columns: Mapping[str, Any], path: Path, suffix: str) -> None:
    """Write columns of equal length, arrays or time stamps; the file appears whole or not at all.

    Numbers are written with as many digits as tell them from all others of their type; NaN is missing.
    """
    count = len(next(iter(columns.values())))
    if suffix == ".parquet":
        with replacing(path) as part:
            _write_parquet(columns, count, part)
        return
    with replacing(path) as part, part.open("wb") as file:
        # Without a fixed time inside, equal tables would give different gzip files.
        out: Any = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if suffix == ".csv.gz" else file
        _write_csv(columns, count, out)
        if out is not file:
            out.close()


def _write_parquet(columns: Mapping[str, Any], count: int, part: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    arrays = {}
    for name, column in columns.items():
        if isinstance(column, Stamps):
            index = column.index()
            # A column has one zone; several are written as the same instants in UTC.
            column = index if isinstance(index, pd.DatetimeIndex) else pd.to_datetime(index, utc=True)
        arrays[name] = pa.Array.from_pandas(pd.Series(column))
    table = pa.table(arrays)
    with pyarrow.parquet.ParquetWriter(part, table.schema) as writer:
        writer.write_table(table, row_group_size=_ROWS * 8)


def _write_csv(columns: Mapping[str, Any], count: int, out: Any) -> None:
    import pyarrow as pa
    import pyarrow.csv

    header = io.StringIO()
    csv.writer(header, lineterminator="\n").writerow(columns)
    out.write(header.getvalue().encode())
    whole = [column.text() if isinstance(column, Stamps) else np.asarray(column) for column in columns.values()]
    for begin in range(0, count, _ROWS):
        parts, special = [], False
        for column in whole:
            values: Any = column[begin : begin + _ROWS]
            if values.dtype == bool:
                values = np.where(values, "True", "False")
            if values.dtype == object:
                values = pd.Series(values, dtype=object)
                values = values.where(values.isna(), values.astype(str))
                special = special or any(re.search(r'[",\r\n]', str(value)) for value in values.unique())
                values = values.to_numpy(object)
            parts.append(pa.Array.from_pandas(values))
        options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="needed" if special else "none")
        sink = io.BytesIO()
        pyarrow.csv.write_csv(pa.table(parts, names=[str(i) for i in range(len(parts))]), sink, options)
        out.write(sink.getvalue())
