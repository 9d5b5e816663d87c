"""Forecasts and series to tables: long ones, one row per item and time, stamped by the calendars of their series."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..files import replacing
from ..scores import LEVELS
from .calendar import Stamps, calendar_of, stamp_table

__all__ = ["TABLES", "Names", "forecast_columns", "writable", "write_columns", "write_forecasts", "write_table"]

TABLES = (".csv", ".csv.gz", ".parquet")
"""Endings of the tables that can be written."""

# What must be quoted in a CSV file, or would be taken for a missing value.
_special = re.compile(r'[",\r\n]|^$').search
# Rows formatted at a time, and forecasts gathered at a time.
_ROWS, _FORECASTS = 1 << 15, 1024


def write_forecasts(
    forecasts: Iterable[Any],
    path: str | os.PathLike[str],
    quantiles: Sequence[float] = LEVELS,
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
    levels = _check_levels(quantiles)
    names = (*columns, "mean", *map(str, levels))
    if len(set(names)) < len(names):
        raise ValueError(f"columns {tuple(columns)} are those of values too: {', '.join(names[2:])}; give other names")
    items, stamps, table = forecast_columns(forecasts, levels, mean=True, path=path)
    write_columns(dict(zip(names, (items, stamps, *table), strict=True)), path, suffix)


def forecast_columns(
    forecasts: Iterable[Any],
    levels: Sequence[float],
    *,
    given: Sequence[float] | None = None,
    mean: bool = False,
    path: Path | None = None,
) -> tuple[Names, Stamps, NDArray[Any]]:
    """Return the items, the time stamps and the values of forecasts one after another, step by step.

    Parameters
    ----------
    forecasts
        Univariate GluonTS forecasts, each with an ``item_id``.
    levels
        Quantiles between 0 and 1.
    given
        Those of them that the caller was given and that must differ; all if None.
    mean
        Whether the first row of values is the mean.
    path
        Where they are written to, for the message that there are none.

    Returns
    -------
    tuple
        Names and stamps of the rows, and values of shape ``([1 +] levels, rows)``.
    """
    _check_levels(levels if given is None else given)
    items: list[Any] = []
    starts: list[pd.Period] = []
    calendars: list[Any] = []
    lengths: list[int] = []
    values: list[NDArray[Any]] = []
    for batch in _batches(forecasts):
        for position, forecast in enumerate(batch, start=len(items)):
            if forecast.item_id is None:
                raise ValueError(f"forecast {position} has no item_id; give every entry of the dataset an 'item_id'")
        block, own = _values(batch, levels, mean)
        values.append(block)
        lengths.extend(own)
        items.extend(forecast.item_id for forecast in batch)
        starts.extend(forecast.start_date for forecast in batch)
        calendars.extend(map(calendar_of, batch))
    if not items:
        where = "" if path is None else f" to write to '{path}'"
        raise ValueError(f"there are no forecasts{where}; is the dataset, or an iterator, used up?")
    return Names(items, lengths), stamp_table(starts, lengths, calendars), np.concatenate(values, axis=1)


def _check_levels(quantiles: Sequence[float]) -> list[float]:
    levels = [float(level) for level in quantiles]
    for level in levels:
        if not 0.0 < level < 1.0:
            raise ValueError(f"quantiles holds {level}, which is not between 0 and 1; give levels like 0.1")
    if len(set(levels)) < len(levels):
        raise ValueError(f"quantiles {levels} holds a level twice; give each once")
    return levels


def _batches(forecasts: Iterable[Any]) -> Iterator[list[Any]]:
    batch = []
    for forecast in forecasts:
        batch.append(forecast)
        if len(batch) == _FORECASTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _values(forecasts: Sequence[Any], levels: Sequence[float], mean: bool) -> tuple[NDArray[Any], list[int]]:
    """Return quantiles of forecasts, after their mean if wanted, one after another, and the length of each."""
    from gluonts.model.forecast import QuantileForecast, SampleForecast

    first = forecasts[0]
    # By itself, for what is said once: that there is no mean, that a level is not known.
    blocks = [_one(first, levels, mean)]
    rest = forecasts[1:]
    # Only what is exactly of these types, and alike, is known to store its numbers alike.
    alike = bool(rest) and all(type(other) is type(first) for other in rest)
    if (
        alike
        and type(first) is QuantileForecast
        and all(other.forecast_keys == first.forecast_keys and other.forecast_array.ndim == 2 for other in rest)
    ):
        keys = first.forecast_keys
        wanted = [*(["mean" if "mean" in keys else "0.5"] if mean else []), *map(str, levels)]
        if set(wanted) <= set(keys):
            picked = [keys.index(key) for key in wanted]
            block = np.concatenate([other.forecast_array for other in rest], axis=1)[picked]
            if not np.isnan(block).any():
                return np.concatenate([*blocks, block], axis=1), [other.forecast_array.shape[1] for other in forecasts]
    elif alike and type(first) is SampleForecast and all(other.samples.shape == first.samples.shape for other in rest):
        # As GluonTS has it, forecast by forecast: means in another order differ in the last bit.
        means = [np.stack([np.mean(other.samples, axis=0) for other in rest])[None]] if mean else []
        ranked = np.sort(np.stack([other.samples for other in rest]), axis=1)
        ranks = [int(np.round((ranked.shape[1] - 1) * level)) for level in levels]
        block = np.concatenate([*means, ranked[:, ranks].transpose(1, 0, 2)]).reshape(len(blocks[0]), -1)
        return np.concatenate([*blocks, block], axis=1), [first.samples.shape[1]] * len(forecasts)
    blocks += [_one(other, levels, mean) for other in rest]
    return np.concatenate(blocks, axis=1), [block.shape[1] for block in blocks]


def _one(forecast: Any, levels: Sequence[float], mean: bool) -> NDArray[Any]:
    name = forecast.item_id
    first = np.asarray(forecast.mean if mean else forecast.quantile(0.5))
    if first.ndim != 1:
        raise ValueError(
            f"the forecast of item {name!r} has the shape {first.shape}; only univariate ones can be written, "
            "take forecast.copy_dim(0) and so on"
        )
    rows = [first] if mean else []
    for level in levels:
        values = np.asarray(forecast.quantile(level))
        if np.any(np.isnan(values) & ~np.isnan(first)):
            stored = ", ".join(getattr(forecast, "forecast_keys", ()))
            raise ValueError(f"the forecast of item {name!r} does not know the quantile {level}; it has: {stored}")
        rows.append(values)
    return np.stack(rows)


@dataclass(frozen=True)
class Names:
    """A column of names of series, each as many times as the series has rows."""

    items: Sequence[Any]
    counts: Sequence[int]

    def __len__(self) -> int:
        return int(sum(self.counts))

    def _unlike(self) -> NDArray[Any]:
        """The names: whole numbers if all are, text if they are of several types, else what they are."""
        kinds = {type(item) for item in self.items}
        names: list[Any] = [str(item) for item in self.items] if len(kinds) > 1 else list(self.items)
        whole = kinds == {int} and all(abs(item) < 1 << 63 for item in names)
        column = np.empty(len(names), dtype=np.int64 if whole else object)
        column[:] = names
        return column

    def array(self) -> NDArray[Any]:
        """Return the column as an array."""
        return np.repeat(self._unlike(), self.counts)

    def arrow(self, as_text: bool = False) -> Any:
        """Return the column as Arrow has it."""
        import pyarrow as pa

        names = self._unlike()
        if as_text and names.dtype == object:
            names = np.array([None if name is None else str(name) for name in names], dtype=object)
        return pa.array(names).take(pa.array(np.repeat(np.arange(len(names)), self.counts)))


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
    if suffix == ".parquet":
        with replacing(path) as part:
            _write_parquet(columns, part)
        return
    with replacing(path) as part, part.open("wb") as file:
        # Without a fixed time inside, equal tables would give different gzip files.
        out: Any = gzip.GzipFile("", "wb", 1, file, mtime=0) if suffix == ".csv.gz" else file
        _write_csv(columns, out)
        if out is not file:
            out.close()


def _write_parquet(columns: Mapping[str, Any], part: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    arrays = {}
    for name, column in columns.items():
        if isinstance(column, Names):
            arrays[name] = column.arrow()
            continue
        if isinstance(column, Stamps):
            index = column.index()
            # A column has one zone; several are written as the same instants in UTC.
            column = index if isinstance(index, pd.DatetimeIndex) else pd.to_datetime(index, utc=True)
        arrays[name] = pa.Array.from_pandas(pd.Series(column))
    pyarrow.parquet.write_table(pa.table(arrays), part)


def _write_csv(columns: Mapping[str, Any], out: Any) -> None:
    import pyarrow as pa
    import pyarrow.csv

    header = io.StringIO()
    csv.writer(header, lineterminator="\n").writerow(columns)
    out.write(header.getvalue().encode())
    table = pa.table([_text(column) for column in columns.values()], names=[str(i) for i in range(len(columns))])
    # Stamps hold nothing of the kind, and of names each is looked at once.
    texts = [column._unlike() if isinstance(column, Names) else column for column in columns.values()]
    special = any(
        _special(str(value))
        for column in texts
        if not isinstance(column, Stamps) and np.asarray(column).dtype == object
        for value in column
    )
    # What needs no quotes has none, as pandas writes it; pyarrow quotes all text or none.
    options = pyarrow.csv.WriteOptions(
        include_header=False, quoting_style="needed" if special else "none", batch_size=_ROWS
    )
    pyarrow.csv.write_csv(table, pa.PythonFile(out, "w"), options)


def _text(column: Any) -> Any:
    """A column for a text table; NaN is missing."""
    import pyarrow as pa

    if isinstance(column, Names):
        return column.arrow(as_text=True)
    if isinstance(column, Stamps):
        # The stamps of many series are the same ones.
        own = column.instants if column.offsets is None else np.stack([column.instants, column.offsets], axis=1)
        _, first, which = np.unique(own, axis=0, return_index=True, return_inverse=True)
        return pa.array(column[first].text().tolist(), pa.string()).take(pa.array(which.reshape(-1)))
    values: Any = np.asarray(column)
    if values.dtype == bool:
        return pa.array(["False", "True"]).take(pa.array(values.astype(np.int8)))
    if values.dtype == object:
        values = np.array([None if value is None or value != value else str(value) for value in values], dtype=object)
    return pa.Array.from_pandas(values)
