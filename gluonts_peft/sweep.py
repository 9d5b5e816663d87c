"""A model walks over the series of a store: what imputation and anomaly detection share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .backbone import Backbone
    from .predictor import PeftPredictor
    from .series.store import SeriesStore

__all__ = ["backbone_of", "batches", "gather", "reconstruct", "require_reconstruct", "runs"]

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]


def backbone_of(model: PeftPredictor | Backbone) -> Backbone:
    """Return the backbone of a predictor, or the backbone itself; warn where items lose weights of their own."""
    if (items := getattr(model, "items", None)) is not None:
        items.warn("what is computed here has")
    found: Backbone = getattr(model, "backbone", model)
    return found


def require_reconstruct(backbone: Backbone) -> None:
    """Raise a ValueError if the family does not reconstruct its input."""
    if "reconstruct" not in backbone.capabilities:
        raise ValueError(
            f"family {backbone.family!r} does not reconstruct its input; use one with the capability 'reconstruct',"
            " such as 'moment' (`gluonts-peft families` lists them)"
        )


def runs(mask: NDArray[np.bool_]) -> Integers:
    """Return begin and end (exclusive) of each run of true values, int64, shape ``(runs, 2)``.

    Examples
    --------
    >>> runs(np.array([True, False, True, True])).tolist()
    [[0, 1], [2, 4]]
    """
    edges = np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))
    return np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)], 1).astype(np.int64)


def batches(count: int, size: int, name: str, progress: bool) -> Iterable[slice]:
    """Return slices of at most ``size`` that cover ``range(count)``, with a progress bar on stderr if wanted."""
    if size <= 0:
        raise ValueError(f"batch_size {size} is not positive")
    parts = [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]
    if not progress:
        return parts
    from tqdm import tqdm

    bar: Iterable[slice] = tqdm(parts, desc=name, unit="batch", leave=False)
    return bar


def gather(store: SeriesStore, series: Integers, ends: Integers, width: int) -> tuple[Floats, Floats]:
    """Return the ``width`` steps of each series before ``ends`` (exclusive): values, 0 where they were not observed or
    lie before the start, and 1 where they were, both of shape ``(batch, width)``.
    """
    index = (store.offsets[series] + ends)[:, None] + np.arange(-width, 0)
    values = store.take(index)
    observed = (index >= store.offsets[series][:, None]) & ~np.isnan(values)
    return np.where(observed, values, values.dtype.type(0)), observed.astype(np.float32)


def reconstruct(backbone: Backbone, values: Floats, shown: Floats) -> Floats:
    """Return the windows as the network sees them, from what is shown of them, shape ``(batch, time)``."""
    from .training import to_device

    with backbone.reading() as reader:
        batch = to_device({"past_target": values * shown, "past_observed_values": shown}, backbone.device)
        found: Floats = reader.reconstruct(batch).cpu().numpy()
    return found
