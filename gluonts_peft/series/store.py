"""A memory-mapped store of the series of any GluonTS dataset.

A dataset is read once: one flat float32 array and the offsets of its series, as files when a folder is named, so that
data larger than memory costs no memory. Series that float32 would spoil keep what it drops in a second array. Missing
values are NaN.
"""

from __future__ import annotations

import hashlib
import io
import json
from array import array
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import whole_number
from ..files import load_json, write_atomically
from .rows import Floats, Layout, rows_of

__all__ = ["SeriesStore"]

Integers = NDArray[np.int64]

# Stores with a rest have a format of their own, so that versions without one refuse them.
_FORMAT, _WITH_REST = 2, 3
_VALUES, _REST, _OFFSETS, _EDGES, _INDEX = "values.bin", "rest.bin", "offsets.npy", "edges.npy", "series.json"


class SeriesStore:
    """Series, end to end in one array.

    Made by `from_dataset` or `open`, not by calling the class.

    Attributes
    ----------
    values : ndarray, float32, shape (total steps,) or (total steps, columns)
        All series one after another, read-only, NaN where missing; backed by a `numpy.memmap` if there is a folder.
    rest : ndarray, float32, or None
        What float32 drops of `values`, of the same shape; None where nothing of account is dropped.
    layout : Layout
        What the columns are; a plain one for the flat array.
    offsets : ndarray, int64, shape (series + 1,)
        Series ``i`` is ``values[offsets[i]:offsets[i + 1]]``.
    edges : ndarray, int64, shape (series, 2)
        Position of the first and of the last observed value of each series; (length, -1) where there is none.
    missing : int
        Number of missing values in the store.
    ordinals : ndarray, int64, shape (series,)
        Ordinal of the first period of each series; 0 where it has no start.
    item_ids : list of str
        One a series; its position where the dataset has no ``item_id``.
    starts : list of (str or None)
        The first period of each series as text, for reports.
    freq : str or None
        The frequency that all starts share; None where they have none or not the same.
    folder : Path or None
        Where the files are; None for a store in memory.

    Examples
    --------
    >>> store = SeriesStore.from_dataset([{"target": [1, 2, 3]}, {"target": [4.0, float("nan")], "item_id": "b"}])
    >>> store
    SeriesStore(2 series of 2 to 3 steps, 5 values, 1 missing, in memory)
    >>> store.item_ids
    ['0', 'b']
    >>> store.series(1)
    array([ 4., nan], dtype=float32)
    """

    def __init__(
        self,
        values: Floats,
        offsets: Integers,
        edges: Integers,
        *,
        missing: int,
        layout: Layout,
        ordinals: Integers,
        item_ids: list[str],
        starts: list[str | None],
        freq: str | None,
        folder: Path | None = None,
        rest: Floats | None = None,
    ) -> None:
        self.values = values
        self.rest = rest
        self.offsets = offsets
        self.edges = edges
        self.missing = missing
        self.layout = layout
        self.ordinals = ordinals
        self.item_ids = item_ids
        self.starts = starts
        self.freq = freq
        self.folder = folder
        self._fingerprint: str | None = None

    @classmethod
    def from_dataset(
        cls,
        dataset: Iterable[Mapping[str, Any]],
        folder: str | Path | None = None,
        *,
        features: bool = False,
        multivariate: bool = False,
        max_memory: int = 1 << 30,
        exact: bool = False,
    ) -> SeriesStore:
        """Read a dataset once, from its first entry to its last, and keep its targets.

        Parameters
        ----------
        dataset : iterable of mappings
            GluonTS entries: ``target`` of shape (steps,), numbers with NaN for missing; ``item_id`` and ``start``
            are kept for reports and may be absent. Targets of any real type are stored as float32, with what that
            drops of the series if their changes from step to step would suffer, see `exact`.
        folder : path, optional
            Where to write the store, made if need be. One series at a time is in memory. Without it the store is in
            memory and nothing is written.
        features : bool
            Keep dynamic features as well, the fields of `FEATURES` that the first entry has; all entries must have
            the same. Their shape is (features, steps); steps beyond the target's are left out.
        multivariate : bool
            Take targets of shape (dimensions, steps) too.
        max_memory : int
            Most bytes of values that a store without a folder may take.
        exact : bool
            Keep what float32 drops of any value, however little.

        Raises
        ------
        FileExistsError
            `folder` holds a store already.
        TypeError
            An entry is not a mapping, or its target is not numbers.
        ValueError
            The dataset is empty or without values, does not fit into `max_memory`, or an entry has no target, a
            target of another shape, or one that is infinite, or all but zero, as float32; features too. The message
            names the entry.
        """
        if folder is None:
            limit = whole_number("max_memory", max_memory, 1)
            sink, rest = io.BytesIO(), io.BytesIO()
            index = _write_series(dataset, sink, lambda: rest, limit, features, multivariate, exact)
            arrays = [np.frombuffer(part.getbuffer(), np.float32) for part in (sink, rest)]
            for array_ in arrays:
                array_.flags.writeable = False
            values, left = (_shaped(array_, index["layout"]) for array_ in arrays)
            return cls(values, **index, rest=left if len(left) else None)
        folder = Path(folder)
        if (folder / _INDEX).exists():
            raise FileExistsError(
                f"folder '{folder}' holds a series store already: read it with SeriesStore.open(folder) "
                "or name another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        path, second = folder / _VALUES, folder / _REST
        second.unlink(missing_ok=True)
        try:
            with ExitStack() as files:
                file = files.enter_context(path.open("wb"))
                index = _write_series(
                    dataset, file, lambda: files.enter_context(second.open("wb")), None, features, multivariate, exact
                )
        except BaseException:
            path.unlink(missing_ok=True)
            second.unlink(missing_ok=True)
            raise
        found = _WITH_REST if second.exists() else _FORMAT
        np.save(folder / _OFFSETS, index.pop("offsets"))
        np.save(folder / _EDGES, index.pop("edges"))
        index["ordinals"] = index["ordinals"].tolist()
        index["layout"] = asdict(index["layout"])
        # The index comes last and at once, so a folder that has it is complete.
        write_atomically(folder / _INDEX, json.dumps({"format": found, **index}))
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> SeriesStore:
        """Map the files of a store that `from_dataset` wrote, without reading the values.

        Raises
        ------
        FileNotFoundError
            The folder holds no complete store.
        ValueError
            The store has another format, or its files do not belong together.
        """
        folder = Path(folder)
        again = "write it again with SeriesStore.from_dataset(dataset, folder)"
        if not (folder / _INDEX).exists():
            raise FileNotFoundError(f"folder '{folder}' holds no complete series store, {_INDEX} is missing: {again}")
        try:
            # It grows with the number of series.
            index = load_json(folder / _INDEX, limit=1 << 30)
            found = index.pop("format", None)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"series store '{folder}' is damaged, {_INDEX}: {error}: {again}") from error
        if found not in (_FORMAT, _WITH_REST):
            raise ValueError(f"series store '{folder}' has format {found}, this version reads {_FORMAT}: {again}")
        offsets = np.load(folder / _OFFSETS, allow_pickle=False)
        edges = np.load(folder / _EDGES, allow_pickle=False)
        count = len(index["item_ids"])
        if (len(offsets), len(edges)) != (count + 1, count):
            raise ValueError(
                f"series store '{folder}' is damaged, {_INDEX} lists {count} series, {_OFFSETS} has {len(offsets) - 1} "
                f"and {_EDGES} has {len(edges)}: {again}"
            )
        features = tuple((str(name), int(width)) for name, width in index["layout"]["features"])
        layout = index["layout"] = Layout(index["layout"]["dimensions"], features)
        index["ordinals"] = np.array(index["ordinals"], np.int64)
        expected, arrays = 4 * int(offsets[-1]) * layout.width, []
        for name in (_VALUES, _REST) if found == _WITH_REST else (_VALUES,):
            size = (folder / name).stat().st_size
            if size != expected:
                raise ValueError(
                    f"series store '{folder}' is damaged, {name} has {size} bytes instead of {expected}: {again}"
                )
            # A plain view of the map: numpy's own subclass makes each small operation slower.
            arrays.append(_shaped(np.asarray(np.memmap(folder / name, np.float32, mode="r")), layout))
        return cls(arrays[0], offsets, edges, folder=folder, rest=arrays[1] if len(arrays) > 1 else None, **index)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        low, high = int(self.lengths.min()), int(self.lengths.max())
        steps = f"{low}" if low == high else f"{low} to {high}"
        freq = f", freq {self.freq!r}" if self.freq else ""
        shape = "" if self.layout.plain else f", {self.layout}"
        place = "in memory" if self.folder is None else f"in '{self.folder}'"
        return (
            f"SeriesStore({len(self)} series of {steps} steps, {len(self.values)} values, "
            f"{self.missing} missing{freq}{shape}, {place})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the same files; pickling the map would copy every value.
        return self.__dict__ if self.folder is None else {"folder": self.folder.absolute()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state if "values" in state else SeriesStore.open(state["folder"]).__dict__)

    @property
    def lengths(self) -> Integers:
        """Number of steps of each series, int64, shape (series,)."""
        return np.diff(self.offsets)

    def series(self, i: int) -> Floats:
        """Series `i` as a read-only view of shape (steps,) or (steps, columns), NaN where missing.

        Raises
        ------
        IndexError
            `i` is not one of the series.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"series {i} does not exist: the store holds series 0 to {len(self) - 1}")
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def take(self, index: Integers) -> Floats:
        """Steps at some positions of the flat array, clipped to it, of shape (..., ) or (..., columns): a new array,
        float64 if there is a rest, else float32.
        """
        values: Floats = self.values.take(index, axis=0, mode="clip")
        return values if self.rest is None else values.astype(np.float64) + self.rest.take(index, axis=0, mode="clip")

    def fingerprint(self) -> str:
        """SHA-256 of offsets, layout and values as hexadecimal text; names and starts do not count, nor the place.

        The first call reads the whole store, a piece at a time.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(np.ascontiguousarray(self.offsets, "<i8").data)
            if not self.layout.plain:
                digest.update(json.dumps(asdict(self.layout)).encode())
            for begin in range(0, len(self.values), 1 << 20):
                digest.update(np.ascontiguousarray(self.values[begin : begin + (1 << 20)], "<f4").data)
            for begin in range(0, 0 if self.rest is None else len(self.rest), 1 << 20):
                digest.update(np.ascontiguousarray(self.rest[begin : begin + (1 << 20)], "<f4").data)  # type: ignore[index]
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _shaped(values: Floats, layout: Layout) -> Floats:
    return values if layout.plain else values.reshape(-1, layout.width)


def _write_series(
    dataset: Iterable[Mapping[str, Any]],
    sink: BinaryIO,
    open_rest: Callable[[], BinaryIO],
    max_memory: int | None,
    features: bool,
    multivariate: bool,
    exact: bool,
) -> dict[str, Any]:
    """Append all series to `sink`, and what float32 drops of them, if anything, to the file that `open_rest` gives;
    return what `SeriesStore` wants to know besides the values.
    """
    layout = Layout()
    offsets, edges, ordinals = array("q", [0]), array("q"), array("q")
    item_ids: list[str] = []
    starts: list[str | None] = []
    freqs: set[str | None] = set()
    missing = 0
    rest: BinaryIO | None = None
    for position, entry in enumerate(dataset):
        if position == 0 and (features or multivariate):
            layout = Layout.of(entry, features=features, multivariate=multivariate)
        whole = rows_of(entry, position, layout, exact=exact)
        values = whole.astype(np.float32, copy=False)
        if rest is None and whole.dtype != np.float32:
            rest = open_rest()
        total = offsets[-1] + len(values)
        size = total * layout.width * (4 if rest is None else 8)
        if max_memory is not None and size > max_memory:
            raise ValueError(
                f"the first {position + 1} series of the dataset take {size} bytes, more than "
                f"max_memory={max_memory}: name a folder, SeriesStore.from_dataset(dataset, folder), to keep them on "
                "disk, or raise max_memory"
            )
        known: NDArray[np.bool_] = np.asarray(~np.isnan(values))
        missing += values.size - int(known.sum())
        observed = known if layout.plain else np.asarray(known[:, : layout.target].any(1))
        count = int(observed.sum())
        first, last = (int(observed.argmax()), int(observed[::-1].argmax())) if count else (len(values), len(values))
        edges.extend((first, len(values) - 1 - last))
        sink.write(values.data)
        if rest is not None:
            # Zeros before the first series of which something is dropped.
            rest.seek(offsets[-1] * layout.width * 4)
            rest.write(np.nan_to_num(whole - values, copy=False).astype(np.float32).data)
        offsets.append(total)
        item_id, start = entry.get("item_id"), entry.get("start")
        item_ids.append(str(position if item_id is None else item_id))
        starts.append(None if start is None else str(start))
        freqs.add(getattr(start, "freqstr", None))
        ordinals.append(getattr(start, "ordinal", 0))
    if not item_ids:
        raise ValueError("dataset is empty: give at least one entry with a 'target'")
    if not offsets[-1]:
        raise ValueError(f"dataset has no values: all of its {len(item_ids)} targets have length 0")
    return {
        "offsets": np.array(offsets, np.int64),
        "edges": np.array(edges, np.int64).reshape(-1, 2),
        "missing": missing,
        "layout": layout,
        "ordinals": np.array(ordinals, np.int64),
        "item_ids": item_ids,
        "starts": starts,
        "freq": freqs.pop() if len(freqs) == 1 else None,
    }
