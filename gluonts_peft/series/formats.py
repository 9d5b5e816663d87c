"""Tables as files: text, Parquet, Arrow and Feather, each opened as named columns."""

from __future__ import annotations

import codecs
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

__all__ = ["ArrowTable", "TableFormat", "TextTable"]

_MISSING = ("", "NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "null", "NULL", "None")
# Rows that are read to tell what a column holds.
_SAMPLE = 50
_SEPARATORS = {";": "';'", "\t": "'\\t'", "|": "'|'"}


@dataclass(frozen=True)
class TableFormat:
    """How numbers, dates and fields are written in a text table.

    Attributes
    ----------
    sep
        Field separator; ``"\\t"`` is a tab.
    decimal
        Decimal mark.
    date_format
        Format of time stamps as in ``datetime.strptime``, e.g. ``"%d.%m.%Y %H:%M"``; None is ISO 8601.
    encoding
        Name of the encoding in Python.
    """

    sep: str = ","
    decimal: str = "."
    date_format: str | None = None
    encoding: str = "utf-8"

    def checked(self) -> TableFormat:
        """Return a copy with the tab as a character.

        Raises
        ------
        ValueError
            If a field cannot be used.
        """
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


@contextmanager
def _readable(path: Path, kind: str, encoding: str | None = None) -> Iterator[None]:
    """Turn errors that libraries raise on a damaged file into a ValueError that names it."""
    import pyarrow as pa

    try:
        yield
    except pd.errors.EmptyDataError:
        raise ValueError(f"path '{path}' is an empty file; give a table with a header and rows") from None
    except UnicodeError as error:
        # Its position refers to a chunk of the file and would mislead.
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


class TextTable:
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
            # Rows longer than the header: without index_col=False their first field would become an index.
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
                # The default parser is sometimes wrong in the last digit.
                float_precision="round_trip",
                **options,
            )

    def kinds(self) -> tuple[list[str], list[str]]:
        """Return the numeric columns and the others, judged by the first rows."""
        frame = self._frame(nrows=_SAMPLE)
        numbers = [str(name) for name in frame.columns if pd.api.types.is_numeric_dtype(frame[name])]
        return numbers, [str(name) for name in frame.columns if str(name) not in numbers]

    def temporal(self, column: str) -> bool:
        """Return whether the first rows of a column look like time stamps."""
        found = self._frame(nrows=_SAMPLE, dtype=str)[column].dropna()
        return bool(len(found) and found.str.match(r"\s*(\d{4}\D?\d\d|\d+[-/. ]\w+[-/. ]\d)").all())

    def read(self, wanted: dict[str, str]) -> Any:
        text = {column: str for argument, column in wanted.items() if argument in ("item_id", "timestamp")}
        # An item may be called "NA"; only an empty field is a missing id.
        missing = {column: [""] if column in text else list(_MISSING) for column in wanted.values()}
        # Not by usecols, which silently drops a surplus field, such as that of an unquoted 1,5.
        return self._frame(dtype=text, na_values=missing, keep_default_na=False)[list(wanted.values())]


def _is_temporal(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind) or "period" in str(kind).lower())


class ArrowTable:
    """A Parquet, Arrow or Feather table; the levels of a pandas index count as columns."""

    def __init__(self, path: Path, suffix: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        # Importing it registers the extension type of period columns.
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
        # An unnamed index level is the timestamp if it holds times, else the item id.
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
