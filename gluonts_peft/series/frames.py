"""Data frames in and out: long frames, one row per item and time, become entries, and forecasts become frames.

Frames of pandas, and of any library that hands out Arrow data (polars, pyarrow, DuckDB).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..scores import LEVELS
from .calendar import with_calendar
from .folders import DataEntry
from .grid import lay
from .parsing import RowNames, check_duplicates, item_ids, parse_stamps, parse_values, require_columns
from .rows import narrowest
from .writing import forecast_columns

__all__ = ["Roles", "entries_of", "from_dataframe", "is_dataframe", "to_dataframe"]

_log = logging.getLogger(__name__)

_FRAME, _FUTURE = Path("data frame"), Path("future")


@dataclass(frozen=True)
class Roles:
    """Which column is what.

    Parameters
    ----------
    item_id
        Ids of the series; None if there is a single one.
    timestamp, target
        Time stamps and values.
    known
        Features that are known in the future too, as promotions: GluonTS's ``feat_dynamic_real``.
    past
        Features that are known in the past only, as temperatures: ``past_feat_dynamic_real``.
    """

    item_id: str | None = "item_id"
    timestamp: str = "timestamp"
    target: str = "target"
    known: tuple[str, ...] = ()
    past: tuple[str, ...] = ()

    def wanted(self, future: bool = False) -> dict[str, str]:
        """Return argument -> column, for the rows of the future those that are known there."""
        named = {} if self.item_id is None else {"item_id": self.item_id}
        named["timestamp"] = self.timestamp
        if not future:
            named["target"] = self.target
        named |= {f"known[{i}]": column for i, column in enumerate(self.known)}
        if not future:
            named |= {f"past[{i}]": column for i, column in enumerate(self.past)}
        return named

    def check(self, columns: Sequence[str], path: Path, future: bool = False) -> dict[str, str]:
        """Return argument -> column, or raise a ValueError if one is missing or named twice."""
        wanted = self.wanted(future)
        require_columns(path, columns, wanted)
        if len(set(wanted.values())) < len(wanted):
            pairs = ", ".join(f"{argument} {column!r}" for argument, column in wanted.items())
            raise ValueError(f"one column of '{path}' is asked for twice: {pairs}; give each its own column")
        return wanted


def is_dataframe(data: Any) -> bool:
    """Whether something is a frame of pandas, or of a library that hands out Arrow data."""
    return isinstance(data, pd.DataFrame) or hasattr(data, "__arrow_c_stream__")


def from_dataframe(
    frame: Any,
    *,
    item_id: str | None = "item_id",
    timestamp: str = "timestamp",
    target: str = "target",
    known: Sequence[str] = (),
    past: Sequence[str] = (),
    future: Any = None,
    freq: str | None = None,
    dtype: type[np.floating[Any]] | None = None,
) -> list[DataEntry]:
    """Return the series of a long data frame as GluonTS entries.

    Read as :func:`gluonts_peft.series.table.read_dataset` reads a table: missing rows and values become NaN on a
    regular grid, the zone and the phase of time stamps are kept. Other columns are left out.

    Parameters
    ----------
    frame
        One row per item and time, in any order; of pandas (named levels of an index count as columns, and an unnamed
        one with times is the timestamp), polars, pyarrow, or what else has ``__arrow_c_stream__``.
    item_id, timestamp, target
        Columns; ``item_id=None`` for a frame of a single series.
    known, past
        Columns of features: known in the future too, or in the past only. Numbers; encode categories first.
    future
        Frame with the `known` columns after the end of each series, the first row a step after it.
    freq
        Frequency as pandas spells it; inferred if None.
    dtype
        As for :func:`~gluonts_peft.series.table.read_dataset`.

    Returns
    -------
    list[DataEntry]
        In the order in which items first appear, with ``start``, ``target`` of shape ``(time,)``, ``item_id``, and
        ``feat_dynamic_real`` of shape ``(known, time)`` or, with `future`, ``(known, time + future)``, and
        ``past_feat_dynamic_real`` of shape ``(past, time)``, if there are such features.

    Raises
    ------
    ValueError
        If a column is missing, a stamp or value cannot be used, or `future` does not go on where a series ends, or is
        of other items; the message names the column, the item and what to do.

    Examples
    --------
    >>> import pandas as pd
    >>> days = pd.date_range("2024-01-01", periods=4, freq="D")
    >>> frame = pd.DataFrame({"shop": "a", "day": days, "sold": [3, 4, 2, 5], "promo": [0, 1, 0, 0]})
    >>> [entry] = from_dataframe(frame, item_id="shop", timestamp="day", target="sold", known=["promo"])
    >>> entry["target"].tolist(), entry["feat_dynamic_real"].shape
    ([3.0, 4.0, 2.0, 5.0], (1, 4))
    """
    for name, columns in (("known", known), ("past", past)):
        if isinstance(columns, str):
            raise ValueError(f"{name} {columns!r} is text; give a list of columns: [{columns!r}]")
    roles = Roles(item_id, timestamp, target, tuple(known), tuple(past))
    table = _pandas(frame, roles)
    later = None if future is None else _pandas(future, roles, future=True)
    return entries_of(table, _FRAME, roles, later, freq=freq, dtype=dtype)


def to_dataframe(
    forecasts: Iterable[Any],
    quantile_levels: Sequence[float] = LEVELS,
    *,
    item_id: str = "item_id",
    timestamp: str = "timestamp",
    target: str = "target",
) -> pd.DataFrame:
    """Return univariate forecasts as a long frame, with the columns of Chronos's ``predict_df``.

    Parameters
    ----------
    forecasts
        GluonTS forecasts, each with an ``item_id``.
    quantile_levels
        Levels between 0 and 1, each a column named like ``0.1``. Those that a quantile forecast does not hold are
        interpolated, and extrapolated by exponential tails, as ``gluonts.model.forecast.QuantileForecast`` does.
    item_id, timestamp
        Names of the columns.
    target
        What was forecast, in the column ``target_name``.

    Returns
    -------
    pandas.DataFrame
        ``item_id``, ``timestamp`` (in the zone and phase of the series), ``target_name``, ``predictions`` (the median),
        and the levels, one row per item and step.

    Raises
    ------
    ValueError
        If a level is not between 0 and 1 or given twice, or a forecast is multivariate or has no ``item_id``.
    """
    names, stamps, values = forecast_columns(forecasts, (0.5, *quantile_levels), given=quantile_levels)
    columns = {item_id: names.array(), timestamp: stamps.index(), "target_name": target, "predictions": values[0]}
    levels = {str(float(level)): row for level, row in zip(quantile_levels, values[1:], strict=True)}
    if taken := sorted({item_id, timestamp} & {"target_name", "predictions", *levels}):
        raise ValueError(f"column {taken[0]!r} is one of the forecast's own; give item_id and timestamp other names")
    return pd.DataFrame(columns | levels)


def _pandas(frame: Any, roles: Roles, future: bool = False) -> pd.DataFrame:
    """Return the columns that are asked for as a frame of pandas, with a plain index."""
    label = _FUTURE if future else _FRAME
    if isinstance(frame, pd.DataFrame):
        named = [name for name in frame.index.names if name is not None]
        table = frame.reset_index(level=named) if named else frame
        if not named and isinstance(frame.index, pd.DatetimeIndex | pd.PeriodIndex) and roles.timestamp not in table:
            table = frame.rename_axis(roles.timestamp).reset_index()
        table = table.reset_index(drop=True)
    elif hasattr(frame, "__arrow_c_stream__"):
        import pyarrow as pa

        table = pa.table(frame).to_pandas()
    else:
        raise ValueError(
            f"{label} is a {type(frame).__name__}; give a frame of pandas or polars, or a table of pyarrow"
        )
    doubled = table.columns[table.columns.duplicated()]
    if len(doubled):
        raise ValueError(f"'{label}' has the column {doubled[0]!r} more than once; give each column its own name")
    if not all(isinstance(name, str) for name in table.columns):
        table = table.rename(columns=str)
    return table[list(roles.check(list(table.columns), label, future).values())]


def entries_of(
    frame: pd.DataFrame,
    path: Path,
    roles: Roles,
    future: pd.DataFrame | None = None,
    *,
    freq: str | None = None,
    dtype: type[np.floating[Any]] | None = None,
    date_format: str | None = None,
    decimal: str = ".",
) -> list[DataEntry]:
    """Return the entries of a table, each on a regular grid from its first to its last stamp.

    Parameters
    ----------
    frame, future
        Columns of `roles`, see :func:`from_dataframe`.
    path
        Where they come from, for messages; its name is that of a series without an id.
    roles
        Which column is what.
    freq, dtype, date_format, decimal
        See :func:`gluonts_peft.series.table.read_dataset`.
    """
    if not len(frame):
        raise ValueError(f"path '{path}' holds no rows; give a table with at least one")
    if future is not None and not roles.known:
        raise ValueError("future has no effect without known: name the columns that are known in the future")
    history = len(frame)
    if future is not None:
        # Rows of the future have no target.
        frame = pd.concat([frame, future], ignore_index=True)
    if roles.item_id is None:
        codes, items = np.zeros(len(frame), np.int64), [path.name.split(".")[0]]
    else:
        codes, items = item_ids(frame[roles.item_id], path, roles.item_id)
    column = frame[roles.timestamp]
    if isinstance(column.dtype, pd.PeriodDtype):
        freq = freq or str(column.dtype.freq.freqstr if column.isna().all() else column.dropna().iloc[0].freqstr)
        column = column.dt.to_timestamp()
    stamps = parse_stamps(column, path, roles.timestamp, RowNames(codes, items), date_format)
    order = np.lexsort((stamps.instants, codes))
    later = order >= history
    codes, stamps = codes[order], stamps[order]
    check_duplicates(codes, items, stamps, path)

    def values_of(name: str, role: str) -> NDArray[np.float64]:
        return parse_values(frame[name].iloc[order], path, name, RowNames(codes, items), stamps, decimal, role)

    target = values_of(roles.target, "target")
    features = {
        field: [values_of(name, role) for name in names]
        for field, role, names in (
            ("feat_dynamic_real", "known", roles.known),
            ("past_feat_dynamic_real", "past", roles.past),
        )
        if names
    }
    grid = lay(codes, items, stamps, freq)
    offsets = np.concatenate([[0], np.cumsum(grid.lengths)])
    lengths = _histories(codes, items, later, grid.positions, grid.lengths) if future is not None else grid.lengths
    places = offsets[codes] + grid.positions

    def laid(values: NDArray[np.float64]) -> NDArray[np.float64]:
        filled = np.full(offsets[-1], np.nan)
        filled[places] = values
        return filled

    if missing := int(offsets[-1] - len(target)):
        _log.info("'%s': %d missing time stamps filled with NaN at freq %s", path, missing, grid.freq)
    rows = laid(target)
    tables = {field: np.stack([laid(each) for each in columns]) for field, columns in features.items()}
    entries: list[DataEntry] = []
    for number, (start, name) in enumerate(zip(grid.starts, items, strict=True)):
        begin, end = offsets[number], offsets[number] + lengths[number]
        # Copies, so that one series does not keep the memory of all alive.
        entry: DataEntry = {"start": start, "target": _typed(rows[begin:end], dtype), "item_id": name}
        for field, table in tables.items():
            last = offsets[number + 1] if field == "feat_dynamic_real" else end
            entry[field] = _typed(table[:, begin:last], dtype)
        entries.append(entry)
    if all(calendar.plain for calendar in grid.calendars):
        return entries
    # All or none: GluonTS infers the fields of a batch from its first entry.
    return [with_calendar(entry, calendar) for entry, calendar in zip(entries, grid.calendars, strict=True)]


def _histories(
    codes: NDArray[np.int64],
    items: Sequence[Any],
    later: NDArray[np.bool_],
    positions: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return how many steps of each item are history, or raise a ValueError if the future does not go on there."""
    known = np.full(len(items), -1)
    np.maximum.at(known, codes[~later], positions[~later])
    count = np.bincount(codes[later], minlength=len(items))
    first = np.full(len(items), np.iinfo(np.int64).max)
    np.minimum.at(first, codes[later], positions[later])
    for number in np.flatnonzero(known < 0)[:1]:
        raise ValueError(f"future has item {items[number]!r}, which has no history; leave it out, or give its history")
    for number, name in enumerate(items):
        if not count[number]:
            raise ValueError(f"future has no rows of item {name!r}; give the known columns after its end")
        if first[number] <= known[number]:
            raise ValueError(
                f"future of item {name!r} begins {known[number] + 1 - first[number]} steps before its history ends;"
                " give the steps after it alone"
            )
        if count[number] < (needed := lengths[number] - known[number] - 1):
            raise ValueError(
                f"future of item {name!r} has {count[number]} of the {needed} steps from the end of its history to its"
                " own last step; give all of them"
            )
    return known + 1


def _typed(values: NDArray[np.float64], dtype: type[np.floating[Any]] | None) -> NDArray[np.floating[Any]]:
    return narrowest(values) if dtype is None else values.astype(dtype)
