"""Parsing the columns of a long table: item ids, time stamps and values, with errors that name the row."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .calendar import DAY, Stamps, offset_from

__all__ = ["RowNames", "check_duplicates", "item_ids", "named", "parse_stamps", "parse_values", "require_columns"]

# Column names that a message lists at most.
_SHOWN = 20


class RowNames:
    """Maps each row to the id of its item."""

    def __init__(self, codes: Any, items: Sequence[Any]) -> None:
        self.codes, self.items = codes, items

    def __getitem__(self, row: int) -> Any:
        return self.items[self.codes[row]]


def require_columns(path: Path, columns: Sequence[str], wanted: dict[str, str]) -> None:
    """Raise a ValueError that names the argument if one of the wanted columns (argument -> column) is missing."""
    for argument, column in wanted.items():
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(f"{argument} {column!r} is not a column of '{path}'{hint} columns: {named(columns)}")


def named(columns: Sequence[str]) -> str:
    """Return the names of columns for a message."""
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return ", ".join(columns[:_SHOWN]) + more


def item_ids(column: Any, path: Path, name: str) -> tuple[NDArray[np.int64], list[Any]]:
    """Return an integer code for each row, shape ``(rows,)``, and the item ids in order of first appearance.

    Raises
    ------
    ValueError
        If an id is missing.
    """
    missing = np.flatnonzero(column.isna().to_numpy())
    if len(missing):
        raise ValueError(f"item_id {name!r} is missing in row {missing[0] + 1} of '{path}'; name every item")
    codes, unique = pd.factorize(column)
    items = [value.item() if isinstance(value, np.generic) else value for value in unique]
    # Text is read as text: whole numbers are told by their look, which text such as "007" does not have.
    if all(isinstance(item, str) and re.fullmatch(r"0|-?[1-9]\d{0,17}", item) for item in items):
        items = [int(item) for item in items]
    return codes.astype(np.int64), items


def parse_stamps(column: Any, path: Path, name: str, items: RowNames, date_format: str | None) -> Stamps:
    """Return the time stamps of a column, in its order; without a `date_format` text is read as ISO 8601.

    Raises
    ------
    ValueError
        If a stamp is missing, unreadable or out of range, or only some of them have a time zone.
    """
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
    # Items often share their stamps, so each distinct text is parsed once.
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


# A time of day, then Z, -05, -0430 or +05:45; after a bare date only an offset that cannot be part of the date.
_ZONED = r"^(.*(?:T\d\d|:\d\d)\S*?|\d{4}-\d\d-\d\d(?=Z|[+-]\d\d:\d\d$))\s?(Z|z|UTC|[+-]\d\d(?::?\d\d){0,2})$"


def _parsed(text: Any, date_format: str) -> tuple[Any, NDArray[np.int64] | None]:
    """Return wall-clock times, NaT where a text does not match the format, and UTC offsets if the format has them."""
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


def _check_times(column: Any, parsed: Any, path: Path, name: str, items: RowNames, date_format: str | None) -> None:
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


def check_duplicates(codes: Any, items: Sequence[Any], stamps: Stamps, path: Path) -> None:
    """Raise a ValueError if an item has a time stamp twice; rows are sorted by item and time."""
    same = np.flatnonzero((np.diff(codes) == 0) & (np.diff(stamps.instants) == 0))
    if len(same):
        first = same[0]
        count = int(((codes == codes[first]) & (stamps.instants == stamps.instants[first])).sum())
        # When clocks go back, at night, an hour occurs twice.
        night = (
            stamps.offsets is None and (stamps.walls[same] % DAY).any() and (stamps.walls[same] % DAY < DAY // 6).all()
        )
        remedy = "; where clocks went back, write the offset too, like 2024-10-27 02:00+01:00" if night else ""
        raise ValueError(
            f"item {items[codes[first]]!r} has the timestamp {stamps.at(int(first))} {count} times in '{path}' "
            f"({len(same)} rows too many in all); keep one row per item and timestamp{remedy}"
        )


def parse_values(
    column: Any, path: Path, name: str, items: RowNames, stamps: Stamps, decimal: str, role: str = "target"
) -> NDArray[np.float64]:
    """Return the values of a column, shape ``(rows,)``, NaN where one is missing; its role is named by messages.

    Raises
    ------
    ValueError
        If a value is not a number, or is infinite as float32.
    """
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
            f"{role} {name!r} of item {items[bad[0]]!r} at {stamps.at(int(bad[0]))} in '{path}' is "
            f"{text!r}, which is not a number ({len(bad)} such rows); "
            f"leave missing values empty, or name another column{hint if re.fullmatch(mark, text) else ''}"
        )
    values: NDArray[np.float64] = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    with np.errstate(over="ignore"):
        infinite = np.flatnonzero(np.isinf(values.astype(np.float32)))
    if len(infinite):
        first = int(infinite[0])
        raise ValueError(
            f"{role} {name!r} of item {items[first]!r} at {stamps.at(first)} in '{path}' is "
            f"{numbers.iloc[first]}, infinite as float32 ({len(infinite)} such rows); leave missing values empty"
        )
    return values
