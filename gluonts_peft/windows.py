"""From any GluonTS dataset to batches of windows, by way of a memory-mapped store.

A dataset is read once into a `SeriesStore`: one flat float32 array and the offsets of its series, as files when a
folder is named, so that data larger than memory costs no memory. A `Windows` plans on it with integers only and reads
a batch with a single gather. A window is a pair (series, cut): the context is ``[cut - context_length, cut)``, the
label is ``[cut, cut + prediction_length)``. For prediction, `context_batches` walks over a dataset lazily.

Numbers are float32 for as long as that holds them. Series whose changes float32 would swallow, such as a counter of
seconds, keep what it drops in a second array, and their batches are float64.

Missing values are NaN in a dataset and in a store; in a batch they are 0 with an observed value of 0, and so is the
padding on the left of a context that reaches back beyond the start of its series.

Most data are univariate, and a store is then one flat array. With several dimensions or with dynamic features a step is
a row instead: the target's dimensions, then the features, in the order of its `Layout`.
"""

from __future__ import annotations

import hashlib
import io
import json
import operator
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .files import load_json, write_atomically

__all__ = ["FEATURES", "LastWindows", "Layout", "SeriesStore", "Skipped", "Windows", "context_batches", "narrowest"]

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]
Batch = dict[str, Floats]

FEATURES = {"feat_dynamic_real": True, "past_feat_dynamic_real": False}
"""GluonTS fields that hold dynamic features, and whether they are known in the future too."""

# Stores with a rest have a format of their own, so that versions without one refuse them.
_FORMAT, _WITH_REST = 2, 3
_VALUES, _REST, _OFFSETS, _EDGES, _INDEX = "values.bin", "rest.bin", "offsets.npy", "edges.npy", "series.json"
# Elements gathered at once where the caller sets no batch size: a few MiB of indices.
_CHUNK = 1 << 18
# Share of a change from step to step beyond which the rounding of float32 counts, and changes that are judged together.
_ROUNDED, _TOGETHER = 2.0**-12, 32
# Series without a larger number than this would lose digits in float32.
_SMALLEST = 2.0**-100
# As shares of the largest number: what a constant that was computed may change by, 16 roundings of float64, and the
# least range of numbers whose changes float64 holds.
_ROUNDING, _FARTHEST = 2.0**-48, 2.0**-38
# Windows tried for one batch before gaps are taken to leave none: under a second.
_MAX_DRAWS = 1 << 20


@dataclass(frozen=True)
class Layout:
    """What a step of a data set holds.

    Attributes
    ----------
    dimensions : int or None
        Dimensions of the target; None for univariate targets of shape (steps,).
    features : tuple of (str, int)
        Fields of `FEATURES` that there are, and how many features each holds.
    """

    dimensions: int | None = None
    features: tuple[tuple[str, int], ...] = ()

    @property
    def plain(self) -> bool:
        """Whether a step is a single number."""
        return self.dimensions is None and not self.features

    @property
    def target(self) -> int:
        """Columns of the target."""
        return self.dimensions or 1

    @property
    def width(self) -> int:
        """Columns of a step."""
        return self.target + sum(width for _, width in self.features)

    @classmethod
    def of(cls, entry: Mapping[str, Any], *, features: bool, multivariate: bool) -> Layout:
        """Layout of a data set, from its first entry."""
        dimensions = len(_numbers(entry, 0, "target", (1, 2))) if multivariate and _ndim(entry, "target") == 2 else None
        found = [name for name in FEATURES if features and entry.get(name) is not None]
        return cls(dimensions, tuple((name, len(np.atleast_2d(_numbers(entry, 0, name, (1, 2))))) for name in found))


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
            limit = _integer("max_memory", max_memory, 1)
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


@dataclass(frozen=True)
class Skipped:
    """How many series, or windows, were left out, and why.

    Attributes
    ----------
    total : int
        How many there were, with those left out.
    too_short : int
        Those without room for `min_context`, the label and the holdout.
    all_missing : int
        Those with room, but without an observed value on both sides of a cut: nothing observed in the context, or
        nothing in the label.
    unit : str
        What is counted.

    Examples
    --------
    >>> print(Skipped(total=10, too_short=2, all_missing=1))
    skipped 3 of 10 series: 2 too short, 1 without observed values in context and label
    """

    total: int
    too_short: int
    all_missing: int
    unit: str = "series"

    def __str__(self) -> str:
        reasons = [
            f"{count} {reason}"
            for count, reason in (
                (self.too_short, "too short"),
                (self.all_missing, "without observed values in context and label"),
            )
            if count
        ]
        if not reasons:
            return f"skipped none of {self.total} {self.unit}"
        return f"skipped {self.too_short + self.all_missing} of {self.total} {self.unit}: {', '.join(reasons)}"


class Windows:
    """The windows of a store: random ones for training, the last ones for evaluation.

    A window (series, cut) is admissible if ``cut >= min_context``, if ``cut + prediction_length <= length - holdout``,
    and if both its context and its label have an observed value. Cuts count steps from the start of their series.

    Parameters
    ----------
    store : SeriesStore
        The series.
    context_length : int
        Steps before the cut, C; where a series has fewer, the rest is padding on the left.
    prediction_length : int
        Steps from the cut on, H.
    min_context : int
        Fewest steps of a series, observed or missing, before a cut.
    holdout : int or ndarray of int64, shape (series,)
        Steps at the end of every series, or of each, that no window touches. To validate on the last window of each
        series, train on ``holdout=prediction_length`` and validate on `last` of windows without a holdout.
    seed : int
        Seed of `sample`.
    time_features : sequence of str
        Functions of `gluonts.time_feature` such as ``"hour_of_day"``; batches then hold their values as ``time_feat``.

    Attributes
    ----------
    skipped : Skipped
        The series that have no admissible window, as far as their length and their first and last observed value
        tell; long gaps inside a series are found when windows are read.

    Raises
    ------
    TypeError, ValueError
        A number is not an integer or too small, or no series is left.

    Examples
    --------
    >>> store = SeriesStore.from_dataset([{"target": range(10)}, {"target": [5.0, 6.0]}])
    >>> training = Windows(store, context_length=4, prediction_length=2, holdout=2)
    >>> print(training.skipped)
    skipped 1 of 2 series: 1 too short
    >>> len(training)
    6
    >>> {name: values.shape for name, values in training.sample(step=0, batch_size=8).items()}
    {'past_target': (8, 4), 'past_observed_values': (8, 4), 'future_target': (8, 2), 'future_observed_values': (8, 2)}
    >>> validation = Windows(store, context_length=4, prediction_length=2).last()
    >>> next(iter(validation))["future_target"]
    array([[8., 9.]], dtype=float32)
    """

    def __init__(
        self,
        store: SeriesStore,
        *,
        context_length: int,
        prediction_length: int,
        min_context: int = 1,
        holdout: int | Integers = 0,
        seed: int = 0,
        time_features: Sequence[str] = (),
    ) -> None:
        self.store = store
        self.time_features = _known_time_features(time_features, store)
        self.context_length = _integer("context_length", context_length, 1)
        self.prediction_length = _integer("prediction_length", prediction_length, 1)
        self.min_context = _integer("min_context", min_context, 1)
        self.holdout = holdout if isinstance(holdout, np.ndarray) else _integer("holdout", holdout, 0)
        self.seed = _integer("seed", seed, 0)

        last_cut = store.lengths - self.holdout - self.prediction_length
        # Cuts up to the first observed value have an empty context, those past the last one an empty label.
        low = np.maximum(self.min_context, store.edges[:, 0] + 1)
        counts: Integers = np.minimum(last_cut, store.edges[:, 1]) - low + 1
        self._series: Integers = np.flatnonzero(counts > 0)
        too_short = int((last_cut < self.min_context).sum())
        self.skipped = Skipped(len(store), too_short, len(store) - too_short - len(self._series))
        if not len(self._series):
            raise ValueError(f"no series is left, {self.skipped}; {self._remedy()}")
        self._counts = counts
        self._ends: Integers = np.cumsum(counts[self._series])
        # Cut = ticket + shift, where tickets number the windows of all series in one row.
        self._shifts: Integers = low[self._series] - self._ends + counts[self._series]
        self._steps: Integers = np.arange(-self.context_length, self.prediction_length)

    def left_out(self) -> list[tuple[int, str]]:
        """The series that have no admissible window, by number, and what each lacks."""
        needed = self.min_context + self.prediction_length + np.broadcast_to(self.holdout, len(self.store))
        out = np.setdiff1d(np.arange(len(self.store)), self._series)
        lacks = []
        for i in out.tolist():
            if self.store.lengths[i] < needed[i]:
                lack = f"{self.store.lengths[i]} steps, needed are {needed[i]}"
            elif self.store.edges[i, 1] < 0:
                lack = "no observed value"
            else:
                lack = "no observed value both in context and label of any window"
            lacks.append((i, lack))
        return lacks

    def __len__(self) -> int:
        """Number of windows that `sample` draws from, with those that fall wholly into a gap inside a series."""
        return int(self._ends[-1])

    def __repr__(self) -> str:
        return (
            f"Windows({len(self)} windows of {len(self._series)} series, context_length={self.context_length}, "
            f"prediction_length={self.prediction_length}, min_context={self.min_context}, holdout={self.holdout}, "
            f"seed={self.seed})"
        )

    def sample(self, step: int, batch_size: int) -> Batch:
        """Draw random windows, uniformly over all admissible ones, with replacement.

        The draw depends on the seed and on `step` alone: training that resumes at a step needs no state, and a smaller
        batch is the beginning of a larger one.

        Parameters
        ----------
        step : int
            Number of the batch, from 0.
        batch_size : int
            Number of windows, B.

        Returns
        -------
        dict of ndarray, float32, or float64 for values of a store with a rest
            ``past_target`` and ``past_observed_values`` of shape (B, C), ``future_target`` and
            ``future_observed_values`` of shape (B, H), or with D dimensions (B, C, D) and (B, H, D); missing values
            and padding are 0, with observed value 0. With features also ``feat_dynamic_real`` and
            ``observed_feat_dynamic_real`` of shape (B, C + H, F), ``past_feat_dynamic_real`` and
            ``past_observed_feat_dynamic_real`` of shape (B, C, K); with time features ``time_feat``, (B, C + H, T).

        Raises
        ------
        ValueError
            Gaps leave next to no admissible window.
        """
        return self._batch(*self._draw(step, batch_size))

    def pairs(self, step: int, batch_size: int) -> tuple[Integers, Integers]:
        """The series and the cuts of the windows that `sample` returns, int64, each of shape (B,).

        Raises
        ------
        ValueError
            As `sample`.
        """
        series, cuts, _, _ = self._draw(step, batch_size)
        return series, cuts

    def read(self, series: ArrayLike, cuts: ArrayLike) -> Batch:
        """Read the named windows, admissible or not, also from the holdout.

        Parameters
        ----------
        series, cuts : array-like of integers, shape (B,)
            Which series, and the step of it at which the label begins.

        Returns
        -------
        dict of ndarray, float32
            As `sample`.

        Raises
        ------
        IndexError
            A series does not exist, or a label reaches beyond its series.
        """
        series, cuts = np.asarray(series, np.int64), np.asarray(cuts, np.int64)
        wrong = (series < 0) | (series >= len(self.store))
        if wrong.any():
            raise IndexError(f"series {series[wrong][0]} does not exist: the store holds 0 to {len(self.store) - 1}")
        room = self.store.offsets[series + 1] - self.store.offsets[series] - self.prediction_length
        wrong = (cuts < 0) | (cuts > room)
        if wrong.any():
            raise IndexError(
                f"cut {cuts[wrong][0]} of series {series[wrong][0]} leaves no room for "
                f"prediction_length={self.prediction_length}: cuts go from 0 to {room[wrong][0]}"
            )
        return self._batch(series, cuts, *self._gather(series, cuts))

    def last(
        self,
        windows: int = 1,
        distance: int | None = None,
        max_windows: int | None = None,
        batch_size: int = 256,
    ) -> LastWindows:
        """The last windows of every series, always the same, for evaluation.

        Parameters
        ----------
        windows : int
            Windows a series; the label of the last one ends at length - holdout.
        distance : int, optional
            Steps between the cuts of neighbouring windows, `prediction_length` by default.
        max_windows : int, optional
            If there are more, take this many, evenly spaced over all.
        batch_size : int
            Windows a batch; the last batch may have fewer.

        Returns
        -------
        LastWindows
            An iterable of batches as those of `sample`, series by series, earlier cuts first. It counts the windows
            that do not fit into their series and those without observed values in context or label.

        Raises
        ------
        ValueError
            No window is left.
        """
        count = _integer("windows", windows, 1)
        distance = self.prediction_length if distance is None else _integer("distance", distance, 1)
        batch_size = _integer("batch_size", batch_size, 1)
        limit = None if max_windows is None else _integer("max_windows", max_windows, 1)

        last_cut = self.store.lengths - self.holdout - self.prediction_length
        cuts = (last_cut[:, None] - distance * np.arange(count)[::-1]).ravel()
        fits = np.flatnonzero(cuts >= self.min_context)
        series, cuts = fits // count, cuts[fits]
        if self.store.missing:
            rows = self._rows()
            good = np.ones(len(cuts), bool)
            for begin in range(0, len(cuts), rows):
                part = slice(begin, begin + rows)
                good[part] = self._admissible(self._gather(series[part], cuts[part])[1])
            series, cuts = series[good], cuts[good]
        total = count * len(self.store)
        skipped = Skipped(total, total - len(fits), len(fits) - len(cuts), unit="windows")
        if not len(cuts):
            raise ValueError(f"no window is left, {skipped}; {self._remedy()}")
        if limit is not None and limit < len(cuts):
            chosen = np.arange(limit) * (len(cuts) - 1) // max(limit - 1, 1)
            series, cuts = series[chosen], cuts[chosen]
        return LastWindows(self, series, cuts, skipped, batch_size)

    def hold_out(self, count: int, history: bool = False) -> tuple[Windows, LastWindows]:
        """Set windows apart at the ends of series, and return windows that do not touch them.

        No series loses all its windows. Each gives up at most a tenth of them, if that is not enough a quarter, at last
        half; long series give several that overlap by three quarters, and as many as each other where they can.

        Parameters
        ----------
        count : int
            How many to set apart; there are fewer where the series are too short.
        history : bool
            Whether the context is set apart as well as the label.

        Returns
        -------
        Windows, LastWindows
            What is left to draw from, and what was set apart; of this, windows with nothing observed are left out.
        """
        span = self.prediction_length + (self.context_length if history else 0)
        distance = max(1, span // 4)
        taken: Integers = np.zeros(len(self.store), np.int64)
        for share in (10, 4, 2):
            room = np.maximum(self._counts, 0) // share
            most = np.where(room >= span, 1 + (room - span) // distance, 0)
            taken = _evenly(most, _integer("count", count, 1))
            if taken.sum() == count:
                break
        held = np.where(taken > 0, span + (taken - 1) * distance, 0)
        series = np.repeat(np.arange(len(taken)), taken)
        turn = np.arange(len(series)) - np.repeat(np.cumsum(taken) - taken, taken)
        cuts = (self.store.lengths - self.holdout - self.prediction_length)[series]
        cuts = cuts - distance * (taken[series] - 1 - turn)
        good = self._admissible(self._gather(series, cuts)[1]) if len(cuts) else np.zeros(0, bool)
        skipped = Skipped(len(cuts), 0, len(cuts) - int(good.sum()), unit="windows")
        names = ("context_length", "prediction_length", "min_context", "seed", "time_features")
        rest = Windows(self.store, holdout=self.holdout + held, **{name: getattr(self, name) for name in names})
        return rest, LastWindows(self, series[good], cuts[good], skipped, 256)

    def _draw(self, step: int, batch_size: int) -> tuple[Integers, Integers, Floats, NDArray[np.bool_]]:
        step, batch_size = _integer("step", step, 0), _integer("batch_size", batch_size, 1)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, step])))
        parts: list[tuple[Any, ...]] = []
        found = drawn = 0
        size = batch_size
        while True:
            tickets = generator.integers(0, len(self), size)
            where = np.searchsorted(self._ends, tickets, side="right")
            series, cuts = self._series[where], tickets + self._shifts[where]
            values, observed = self._gather(series, cuts)
            good = self._admissible(observed) if self.store.missing else None
            if good is None or (not parts and good.all()):
                return series, cuts, values, observed
            parts.append((series[good], cuts[good], values[good], observed[good]))
            found, drawn = found + int(good.sum()), drawn + size
            if found >= batch_size:
                series, cuts, values, observed = (
                    np.concatenate(part)[:batch_size] for part in zip(*parts, strict=True)
                )
                return series, cuts, values, observed
            if drawn >= _MAX_DRAWS + 256 * batch_size:
                raise ValueError(
                    f"only {found} of {drawn} drawn windows have an observed value both in context_length="
                    f"{self.context_length} and in prediction_length={self.prediction_length} steps: fill the gaps of "
                    "the series, leave out those with long ones, or use longer windows"
                )
            size = min(2 * (batch_size - found) * drawn // max(found, 1), max(self._rows(), batch_size))

    def _gather(self, series: Integers, cuts: Integers) -> tuple[Floats, NDArray[np.bool_]]:
        """Values, 0 where not observed, and whether observed, of shape (B, C + H) or (B, C + H, columns)."""
        begins = self.store.offsets[series]
        index = (begins + cuts)[:, None] + self._steps
        # Out of bounds happens only before the first series, and is padding.
        values = self.store.take(index)
        observed = index >= begins[:, None]
        if values.ndim == 3:
            observed = np.repeat(observed[:, :, None], values.shape[2], axis=2)
        if self.store.missing:
            observed &= values == values
        np.copyto(values, 0, where=~observed)
        return values, observed

    def _admissible(self, observed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        if observed.ndim == 3:
            observed = np.asarray(observed[:, :, : self.store.layout.target].any(2))
        context, label = observed[:, : self.context_length], observed[:, self.context_length :]
        return np.asarray(context.any(1) & label.any(1))

    def _batch(self, series: Integers, cuts: Integers, values: Floats, observed: NDArray[np.bool_]) -> Batch:
        batch = _named(values, observed, self.context_length, self.store.layout)
        if self.time_features:
            steps = cuts[:, None] + self._steps
            batch["time_feat"] = _time_features(
                self.time_features, str(self.store.freq), self.store.ordinals[series], steps
            )
        return batch

    def _rows(self) -> int:
        return max(1, _CHUNK // len(self._steps))

    def _remedy(self) -> str:
        held = int(np.min(self.holdout))
        needed = self.min_context + self.prediction_length + held
        return (
            f"a window needs min_context={self.min_context} + prediction_length={self.prediction_length} + "
            f"holdout={held}, {needed} steps, and the longest series has {self.store.lengths.max()}: lower one "
            "of them or give longer series with observed values"
        )


def _evenly(most: Integers, wanted: int) -> Integers:
    """Return how many each gives: ``wanted`` in all if they can, at most ``most``, else as many as each other; of those
    that could give one more, every so many-th does.
    """
    level = 0
    while np.minimum(most, level + 1).sum() <= wanted and level < most.max(initial=0):
        level += 1
    taken: Integers = np.minimum(most, level)
    more = np.flatnonzero(most > level)
    rest = min(wanted - int(taken.sum()), len(more))
    if rest > 0:
        taken[more[np.arange(rest) * len(more) // rest]] += 1
    return taken


class LastWindows:
    """The windows that `Windows.last` chose; each iteration starts anew.

    Its length is the number of windows.

    Attributes
    ----------
    series, cuts : ndarray, int64, shape (windows,)
        Which windows, in order.
    skipped : Skipped
        Windows left out because they do not fit or have nothing observed; those that `max_windows` leaves out are
        not among them.
    batch_size : int
        Windows a batch.
    """

    def __init__(self, windows: Windows, series: Integers, cuts: Integers, skipped: Skipped, batch_size: int) -> None:
        self.windows = windows
        self.series = series
        self.cuts = cuts
        self.skipped = skipped
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.cuts)

    def __iter__(self) -> Iterator[Batch]:
        for begin in range(0, len(self), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            yield self.windows.read(self.series[part], self.cuts[part])

    def __repr__(self) -> str:
        return f"LastWindows({len(self)} windows in batches of {self.batch_size}, {self.skipped})"


def context_batches(
    dataset: Iterable[Mapping[str, Any]],
    *,
    context_length: int,
    batch_size: int,
    prediction_length: int = 0,
    features: bool = False,
    multivariate: bool = False,
    time_features: Sequence[str] = (),
    exact: bool = False,
) -> Iterator[tuple[list[Mapping[str, Any]], Batch]]:
    """The ends of all series of a dataset, in batches and in order, for prediction.

    The dataset is walked over lazily, a batch ahead at most; an empty one yields nothing.

    Parameters
    ----------
    dataset : iterable of mappings
        GluonTS entries, as for `SeriesStore.from_dataset`.
    context_length : int
        Most steps taken from the end of a series.
    batch_size : int
        Entries a batch, B; the last batch may have fewer.
    prediction_length : int
        Steps after the end of a series, H, that features and time features must cover too.
    features, multivariate
        As for `SeriesStore.from_dataset`; ``feat_dynamic_real`` must reach `prediction_length` steps beyond the target.
    time_features : sequence of str
        As for `Windows`.
    exact : bool
        Whether values are float64 wherever float32 does not hold one exactly, and not only where that is of account.

    Yields
    ------
    entries : list of mappings
        The entries themselves, B of them.
    batch : dict of ndarray, float32, or float64 where that cannot hold the values
        ``past_target`` and ``past_observed_values`` of shape (B, width), where the width is that of the longest
        context of the batch, at least 1 and at most `context_length`; shorter ones are padded on the left. Missing
        values and padding are 0, with observed value 0. Features and time features are as in
        `Windows.sample`. An entry without any observed value in its context, also an
        empty one, is yielded like the others, its observed values all 0: what to do with it is the caller's choice.

    Raises
    ------
    TypeError, ValueError
        For the arguments at the call, and for an entry when its batch is reached, as `SeriesStore.from_dataset`.

    Examples
    --------
    >>> dataset = [{"target": [1, 2, 3, 4]}, {"target": [5, float("nan")]}]
    >>> [(entries, batch)] = context_batches(dataset, context_length=3, batch_size=8)
    >>> batch["past_target"]
    array([[2., 3., 4.],
           [0., 5., 0.]], dtype=float32)
    >>> batch["past_observed_values"]
    array([[1., 1., 1.],
           [0., 1., 0.]], dtype=float32)
    """
    context_length = _integer("context_length", context_length, 1)
    batch_size = _integer("batch_size", batch_size, 1)
    horizon = _integer("prediction_length", prediction_length, 0)

    # A generator of its own, so that wrong arguments are reported by the call.
    def batches() -> Iterator[tuple[list[Mapping[str, Any]], Batch]]:
        layout = Layout()
        entries: list[Mapping[str, Any]] = []
        contexts: list[Floats] = []
        lengths: list[int] = []

        def batch() -> Batch:
            found = _pad_left(contexts, layout, horizon)
            if time_features:
                steps = np.arange(-found["past_target"].shape[1], horizon)
                found["time_feat"] = _time_features_after(time_features, entries, lengths, steps)
            return found

        for position, entry in enumerate(dataset):
            if position == 0 and (features or multivariate):
                layout = Layout.of(entry, features=features, multivariate=multivariate)
            rows = _rows(entry, position, layout, horizon, exact)
            lengths.append(len(rows) - (0 if layout.plain else horizon))
            contexts.append(rows[max(lengths[-1] - context_length, 0) :])
            entries.append(entry)
            if len(entries) == batch_size:
                yield entries, batch()
                entries, contexts, lengths = [], [], []
        if entries:
            yield entries, batch()

    return batches()


def _pad_left(contexts: list[Floats], layout: Layout, horizon: int) -> Batch:
    # Rows of a layout that is not plain go on for the horizon, for features that are known there.
    future = 0 if layout.plain else horizon
    width = max(1, *(len(context) - future for context in contexts))
    shape = (len(contexts), width + future) + (() if layout.plain else (layout.width,))
    values: Floats = np.full(shape, np.nan, np.result_type(*contexts))
    for row, context in zip(values, contexts, strict=True):
        row[len(row) - len(context) :] = context
    observed = ~np.isnan(values)
    np.copyto(values, 0, where=~observed)
    batch = _named(values, observed, width, layout)
    return {name: value for name, value in batch.items() if not name.startswith("future_")}


def _named(values: Floats, observed: NDArray[np.bool_], past: int, layout: Layout) -> Batch:
    """Name the parts of values and mask of shape (B, past + future) or (B, past + future, columns)."""

    def part(columns: Any, steps: slice) -> tuple[Floats, Floats]:
        where = (slice(None), steps) if layout.plain else (slice(None), steps, columns)
        return np.ascontiguousarray(values[where]), observed[where].astype(np.float32)

    target = slice(layout.dimensions) if layout.dimensions is not None else 0
    batch: Batch = {}
    batch["past_target"], batch["past_observed_values"] = part(target, slice(past))
    batch["future_target"], batch["future_observed_values"] = part(target, slice(past, None))
    begin = layout.target
    for name, width in layout.features:
        columns, begin = slice(begin, begin + width), begin + width
        steps, mask = (
            (slice(None), f"observed_{name}")
            if FEATURES[name]
            else (slice(past), name.replace("past", "past_observed", 1))
        )
        batch[name], batch[mask] = part(columns, steps)
    return batch


def _shaped(values: Floats, layout: Layout) -> Floats:
    return values if layout.plain else values.reshape(-1, layout.width)


def _known_time_features(names: Sequence[str], store: SeriesStore) -> tuple[str, ...]:
    if names and store.freq is None:
        raise ValueError("time features need series that start at periods of one frequency; give each a 'start'")
    return tuple(names)


def _time_features(names: Sequence[str], freq: str, starts: Integers, steps: Integers) -> Floats:
    """Values of functions of `gluonts.time_feature` so many steps (B, S) after periods (B,), shape (B, S, names)."""
    import pandas as pd
    from gluonts import time_feature

    # Ordinals of periods of 5 minutes count minutes.
    ordinals = starts[:, None] + pd.Period("2000-01-01", freq=freq).freq.n * steps
    # Some versions of the stubs do not know the method.
    periods: Any = pd.PeriodIndex
    index = periods.from_ordinals(ordinals.ravel(), freq=freq)
    columns = [np.asarray(getattr(time_feature, name)(index), np.float32) for name in names]
    return np.stack(columns, -1).reshape(*ordinals.shape, len(names))


def _time_features_after(
    names: Sequence[str], entries: list[Mapping[str, Any]], lengths: list[int], steps: Integers
) -> Floats:
    """Time features around the ends of series, whose frequencies may differ."""
    starts = [entry.get("start") for entry in entries]
    if any(not hasattr(start, "freqstr") for start in starts):
        raise ValueError("time features need a 'start' that is a pandas.Period in every entry")
    found = np.empty((len(entries), len(steps), len(names)), np.float32)
    for freq in {start.freqstr for start in starts}:  # type: ignore[union-attr]
        rows = [row for row, start in enumerate(starts) if start.freqstr == freq]  # type: ignore[union-attr]
        ordinals = np.array([starts[row].ordinal for row in rows], np.int64)  # type: ignore[union-attr]
        ends = np.array([lengths[row] for row in rows], np.int64)
        found[rows] = _time_features(names, freq, ordinals, ends[:, None] + steps)
    return found


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
        whole = _rows(entry, position, layout, exact=exact)
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


def _rows(entry: Mapping[str, Any], position: int, layout: Layout, horizon: int = 0, exact: bool = False) -> Floats:
    """The steps of an entry as a new array of shape (steps,); (steps + horizon, columns) if not plain."""
    if layout.plain:
        return _numbers(entry, position, "target", (1,), exact)
    target = _numbers(entry, position, "target", (1 if layout.dimensions is None else 2,), exact)
    steps = target.shape[-1]
    columns = [_of_width(target, layout.target, entry, position, "target")]
    for name, width in layout.features:
        values = _of_width(_numbers(entry, position, name, (1, 2), exact), width, entry, position, name)
        needed = steps + horizon if FEATURES[name] else steps
        if values.shape[1] < needed:
            raise ValueError(
                f"{name} of {_called(entry, position)} has {values.shape[1]} steps, needed are {needed}: the target's"
                f" {steps}" + (f" and the {horizon} to forecast" if horizon and FEATURES[name] else "")
            )
        columns.append(values[:, :needed])
    rows: Floats = np.full((steps + horizon, layout.width), np.nan, np.result_type(*columns))
    begin = 0
    for values in columns:
        rows[: values.shape[1], begin : begin + len(values)] = values.T
        begin += len(values)
    return rows


def _of_width(values: Floats, width: int, entry: Mapping[str, Any], position: int, name: str) -> Floats:
    values = np.atleast_2d(values)
    if len(values) != width:
        raise ValueError(
            f"{name} of {_called(entry, position)} has {len(values)} rows, that of the first entry {width}: give all"
            " entries the same"
        )
    return values


def _called(entry: Mapping[str, Any], position: int) -> str:
    item_id = entry.get("item_id")
    return f"entry {position}" if item_id is None else f"item_id {item_id!r}"


def _ndim(entry: Mapping[str, Any], name: str) -> int:
    return np.ndim(entry[name]) if isinstance(entry, Mapping) and name in entry else 1


def _numbers(
    entry: Mapping[str, Any], position: int, field: str, ndims: tuple[int, ...], exact: bool = False
) -> Floats:
    """A field of an entry as a new array without infinities: float32, or float64 where that cannot hold it."""
    if not isinstance(entry, Mapping):
        raise TypeError(f"entry {position} of the dataset is a {type(entry).__name__}: give a dict with a 'target'")
    name = _called(entry, position)
    shape = "(steps,)" if 1 in ndims else "(rows, steps)"
    if field not in entry:
        raise ValueError(f"{name} has no {field!r}, only {sorted(map(str, entry))}: give one of shape {shape}")
    try:
        raw = np.asarray(entry[field])
    except ValueError as error:
        raise ValueError(f"{field} of {name} is not an array ({error}): give one of shape {shape}") from None
    if ndims == (1,) and raw.ndim > 1:
        raise ValueError(
            f"multivariate targets are not supported, {field} of {name} has shape {raw.shape}: "
            "give each dimension as an entry of its own"
        )
    if raw.ndim == 0:
        raise ValueError(f"{field} of {name} is {entry[field]!r}, without a dimension: give one of shape {shape}")
    if raw.ndim not in ndims:
        raise ValueError(f"{field} of {name} has shape {raw.shape}, expected {shape} as in the first entry")
    if raw.dtype.kind not in "biuf":
        wrong = [value for value in raw.ravel().tolist() if not isinstance(value, (int, float))][:1]
        detail = f" with the value {wrong[0]!r}" if wrong else ""
        raise TypeError(f"{field} of {name} has type {raw.dtype}{detail}: give numbers, with NaN for missing values")
    with np.errstate(over="ignore", under="ignore"):
        values: Floats = raw.astype(np.float32)
    infinite = np.isinf(values)
    if infinite.any():
        at = int(infinite.any(0).argmax() if raw.ndim == 2 else infinite.argmax())
        value = raw[..., at] if raw.ndim == 1 else raw[int(infinite[:, at].argmax()), at]
        if np.isinf(value):
            raise ValueError(f"{field} of {name} has the value {value} at step {at}: give NaN for missing values")
        raise ValueError(f"{field} of {name} has the value {value} at step {at}, too large for float32: rescale it")
    if raw.dtype.kind != "b" and raw.dtype.itemsize >= 4 and raw.dtype != np.float32 and raw.size:
        whole = raw.astype(np.float64)
        # Without what is missing.
        low, high = float(np.fmin.reduce(whole, None)), float(np.fmax.reduce(whole, None))
        largest = max(-low, high)
        if 0.0 < largest < _SMALLEST:
            raise ValueError(
                f"{field} of {name} has no value beyond {largest:g}, too small for float32: rescale it, or give zeros"
            )
        if _ROUNDING * largest < high - low < _FARTHEST * largest:
            raise ValueError(
                f"{field} of {name} changes by {high - low:g} beside values of {largest:g}, of which float64 holds next"
                " to nothing: subtract what all have in common"
            )
        if _drops(whole, values, exact):
            values = whole
    # One bit pattern for missing, or equal data could have unequal fingerprints.
    values[np.isnan(values)] = np.nan
    return values


def narrowest(values: NDArray[np.float64]) -> Floats:
    """Values of shape (steps,) or (rows, steps) as a new array: float32 where that holds the changes from step to step,
    as `SeriesStore` judges it, or does not hold the values at all, which are infinite then; else float64.
    """
    with np.errstate(over="ignore", under="ignore"):
        held = values.astype(np.float32)
    return values.copy() if not np.isinf(held).any() and _drops(values, held, exact=False) else held


def _drops(whole: NDArray[np.float64], held: Floats, exact: bool) -> bool:
    """Whether float32 drops anything of values of shape (steps,) or (rows, steps); unless it must be exact, only what
    the changes from one observed step to the next suffer from.
    """
    differ = whole != held
    if differ.any():
        differ &= whole == whole
    if exact or not differ.any():
        return bool(differ.any())
    for row in np.atleast_2d(whole):
        known = row[row == row]
        change, rounded = np.diff(known), np.diff(known.astype(np.float32).astype(np.float64))
        moved = np.abs(change) > _ROUNDING * np.abs(known[1:])
        share = np.abs(rounded[moved] / change[moved] - 1.0)
        # The most of each stretch decide: one jump, or one change of next to nothing, says little.
        cut = len(share) // _TOGETHER * _TOGETHER
        if cut and np.median(share[:cut].reshape(-1, _TOGETHER), 1).max() > _ROUNDED:
            return True
        if cut < len(share) and np.median(share[cut:]) > _ROUNDED:
            return True
    return False


def _integer(name: str, value: int, minimum: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {number}")
    return number
