"""The windows of a store: random ones for training, the last ones for evaluation.

`Windows` plans with integers only and reads a batch with a single gather. A window is a pair (series, cut): the context
is ``[cut - context_length, cut)``, the label is ``[cut, cut + prediction_length)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import whole_number
from .batches import Batch, named, time_features_of
from .rows import Floats
from .store import SeriesStore

__all__ = ["LastWindows", "Skipped", "Windows"]

Integers = NDArray[np.int64]

# Elements gathered at once where the caller sets no batch size: a few MiB of indices.
_CHUNK = 1 << 18
# Windows tried for one batch before gaps are taken to leave none: under a second.
_MAX_DRAWS = 1 << 20


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
        self.context_length = whole_number("context_length", context_length, 1)
        self.prediction_length = whole_number("prediction_length", prediction_length, 1)
        self.min_context = whole_number("min_context", min_context, 1)
        self.holdout = holdout if isinstance(holdout, np.ndarray) else whole_number("holdout", holdout, 0)
        self.seed = whole_number("seed", seed, 0)

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

    def numbered(self, numbers: ArrayLike) -> Batch:
        """Read windows that `sample` draws from by their numbers.

        Parameters
        ----------
        numbers : array-like of integers, shape (N,)
            From 0 to ``len(self) - 1``, series by series, earlier cuts first.

        Returns
        -------
        dict of ndarray
            As `sample`, of N windows, less those that fall wholly into a gap.

        Raises
        ------
        IndexError
            There is no such number.
        """
        numbers = np.asarray(numbers, np.int64)
        wrong = (numbers < 0) | (numbers >= len(self))
        if wrong.any():
            raise IndexError(f"window {numbers[wrong][0]} does not exist: numbers go from 0 to {len(self) - 1}")
        series, cuts = self._place(numbers)
        values, observed = self._gather(series, cuts)
        if self.store.missing:
            good = self._admissible(observed)
            series, cuts, values, observed = series[good], cuts[good], values[good], observed[good]
        return self._batch(series, cuts, values, observed)

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
        count = whole_number("windows", windows, 1)
        distance = self.prediction_length if distance is None else whole_number("distance", distance, 1)
        batch_size = whole_number("batch_size", batch_size, 1)
        limit = None if max_windows is None else whole_number("max_windows", max_windows, 1)

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
            taken = _evenly(most, whole_number("count", count, 1))
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
        step, batch_size = whole_number("step", step, 0), whole_number("batch_size", batch_size, 1)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, step])))
        parts: list[tuple[Any, ...]] = []
        found = drawn = 0
        size = batch_size
        while True:
            tickets = generator.integers(0, len(self), size)
            series, cuts = self._place(tickets)
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

    def _place(self, tickets: Integers) -> tuple[Integers, Integers]:
        """Series and cuts of the windows of these numbers."""
        where = np.searchsorted(self._ends, tickets, side="right")
        return self._series[where], tickets + self._shifts[where]

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
        batch = named(values, observed, self.context_length, self.store.layout)
        if self.time_features:
            steps = cuts[:, None] + self._steps
            batch["time_feat"] = time_features_of(
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


def _known_time_features(names: Sequence[str], store: SeriesStore) -> tuple[str, ...]:
    if names and store.freq is None:
        raise ValueError("time features need series that start at periods of one frequency; give each a 'start'")
    return tuple(names)


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
