"""CSV tables of a clinical download, read as a stream: found in any case, hashed and counted on the way."""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["NUMBER", "TEXT", "TIME", "Source", "Tables", "floats"]

# Kinds of columns, as pyarrow calls their types.
NUMBER, TEXT, TIME = "float64", "string", "timestamp[s]"

_ENDINGS = (".csv", ".csv.gz")
# Decompressed bytes at a time. Larger blocks were slower (they leave the caches) and take more memory.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """A file that was read to its end: its name, its size, its SHA-256 (as it lies on disk) and its data rows."""

    name: str
    bytes: int
    sha256: str
    rows: int


class Tables:
    """The tables of a folder; use it in a ``with`` statement, which ends the progress bar.

    Parameters
    ----------
    folder
        Folder of the download. Files are looked for in it and in `subfolders`.
    subfolders
        Folders inside it, in any case, such as ``"icu"`` of MIMIC-IV.
    progress
        Whether to show a bar over the bytes on stderr.
    """

    def __init__(self, folder: Path, *, subfolders: Sequence[str] = (), progress: bool = False) -> None:
        if not folder.is_dir():
            raise ValueError(f"folder '{folder}' does not exist; give the folder of the download")
        self.folder = folder
        self.sources: list[Source] = []
        self._progress = progress
        self._bar: Any = None
        inside = [path for path in folder.iterdir() if path.is_dir() and path.name.lower() in subfolders]
        self._files = sorted(path for place in (folder, *inside) for path in place.iterdir() if path.is_file())

    def __enter__(self) -> Tables:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def find(self, name: str) -> Path | None:
        """Return the file of a table, ``.csv`` or ``.csv.gz`` in any case; None if there is none."""
        wanted = [f"{name.lower()}{ending}" for ending in _ENDINGS]
        found = [path for path in self._files if path.name.lower() in wanted]
        if len(found) > 1:
            raise ValueError(
                f"folder '{self.folder}' holds the table {name!r} twice: {', '.join(path.name for path in found)}; "
                "keep one"
            )
        return found[0] if found else None

    def need(self, name: str, remedy: str = "; give the folder of the download") -> Path:
        """Return the file of a table, or raise a ValueError that says what there is."""
        path = self.find(name)
        if path is None:
            there = ", ".join(path.name for path in self._files) or "no files"
            raise ValueError(f"folder '{self.folder}' has no {name}.csv or {name}.csv.gz{remedy}; it holds: {there}")
        return path

    def columns(self, path: Path) -> list[str]:
        """Return the names of the columns, as they are spelt."""
        try:
            opened = gzip.open if path.name.lower().endswith(".gz") else open
            with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
                return next(csv.reader(file), [])
        except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"'{path}' cannot be read: {error}; download it again") from None

    def batches(self, path: Path, columns: Mapping[str, str]) -> Iterator[Any]:
        """Read columns of a table, a few thousand rows at a time.

        Parameters
        ----------
        path
            The file.
        columns
            Lower-case name -> kind; the case of the header does not matter.

        Yields
        ------
        pyarrow.RecordBatch
            With the names of `columns`, in their order.

        Raises
        ------
        ValueError
            If a column is missing, a cell is not of its kind, a row has too few or too many cells, or the file is cut
            off or damaged.
        """
        import pyarrow as pa
        import pyarrow.csv

        header = self.columns(path)
        spelt = {name.strip().lower(): name for name in header}
        for column in columns:
            if column not in spelt:
                near = difflib.get_close_matches(column, spelt, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ";"
                raise ValueError(
                    f"column {column!r} is missing in '{path}'{hint} columns: {', '.join(header) or 'none'}"
                )
        wanted = [spelt[column] for column in columns]
        convert = pyarrow.csv.ConvertOptions(
            include_columns=wanted,
            column_types={name: pa.type_for_alias(kind) for name, kind in zip(wanted, columns.values(), strict=True)},
            # A missing text is "", but a patient may well be called "NA".
            strings_can_be_null=False,
        )
        options = pyarrow.csv.ReadOptions(block_size=_BLOCK)
        # A charted text may hold a line break; without this the parser gives up there.
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        rows = 0
        with path.open("rb") as file:
            raw = _Hashed(file, self._advance(path))
            stream = pa.PythonFile(raw, mode="r")
            if path.name.lower().endswith(".gz"):
                stream = pa.CompressedInputStream(stream, "gzip")
            try:
                with pyarrow.csv.open_csv(stream, options, parse, convert) as reader:
                    for batch in reader:
                        rows += batch.num_rows
                        yield batch.rename_columns(list(columns))
                raw.drain()
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"'{path}' cannot be read: {_readable(error, header)}") from None
        self.sources.append(Source(path.name, raw.size, raw.digest.hexdigest(), rows))

    def whole(self, path: Path, columns: Mapping[str, str]) -> dict[str, NDArray[Any]]:
        """Read columns of a small table into memory: name -> array."""
        import pyarrow as pa

        schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
        table = pa.Table.from_batches(list(self.batches(path, columns)), schema)
        return {
            name: floats(table.column(name)) if kind != TEXT else table.column(name).to_numpy()
            for name, kind in columns.items()
        }

    def expect(self, *paths: Path) -> None:
        """Start the progress bar over files that will be read."""
        if self._progress:
            from tqdm import tqdm

            total = sum(path.stat().st_size for path in paths)
            self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="reading")

    def _advance(self, path: Path) -> Callable[[int], object]:
        if self._bar is None:
            return lambda count: None
        self._bar.set_description(path.name)
        return self._bar.update  # type: ignore[no-any-return]


def floats(column: Any) -> NDArray[np.float64]:
    """Return a column of numbers or times as float64, NaN where missing; times are seconds since 1970."""
    import pyarrow as pa

    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    values: NDArray[np.float64] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


class _Hashed:
    """A binary file that hashes and reports what is read from it."""

    closed = False

    def __init__(self, file: BinaryIO, advance: Callable[[int], object]) -> None:
        self._file = file
        self._advance = advance
        self.digest = hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self.size += len(data)
        self._advance(len(data))
        return data

    def drain(self) -> None:
        """Read what the parser had no use for, so that the hash is that of the whole file."""
        while self.read(_BLOCK):
            pass

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


def _readable(error: Exception, header: Sequence[str]) -> str:
    """Name the column, where pyarrow gives its number, and say what to do."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__

    def name(match: re.Match[str]) -> str:
        return f"column {header[int(match[1])]!r}"

    text = re.sub(r"In CSV column #(\d+)", name, text)
    if "conversion error" in text:
        return f"{text}; correct the cell, or leave it empty"
    return f"{text}; is it cut off or damaged? download it again"
