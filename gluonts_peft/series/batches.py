"""Batches: named parts of rows, and the ends of all series of a dataset for prediction.

Missing values, NaN in a dataset, are 0 in a batch with an observed value of 0, and so is the padding on the left of a
context that reaches back beyond the start of its series.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import whole_number
from .rows import FEATURES, Floats, Layout, rows_of

__all__ = ["Batch", "context_batches", "named", "time_features_of"]

Integers = NDArray[np.int64]
Batch = dict[str, Floats]


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
    context_length = whole_number("context_length", context_length, 1)
    batch_size = whole_number("batch_size", batch_size, 1)
    horizon = whole_number("prediction_length", prediction_length, 0)

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
            rows = rows_of(entry, position, layout, horizon, exact)
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
    batch = named(values, observed, width, layout)
    return {name: value for name, value in batch.items() if not name.startswith("future_")}


def named(values: Floats, observed: NDArray[np.bool_], past: int, layout: Layout) -> Batch:
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


def time_features_of(names: Sequence[str], freq: str, starts: Integers, steps: Integers) -> Floats:
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
        found[rows] = time_features_of(names, freq, ordinals, ends[:, None] + steps)
    return found
