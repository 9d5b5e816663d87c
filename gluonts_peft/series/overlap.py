"""Which labels of validation lie inside the training data, and how much of these must be held out for it.

Scores of labels that were trained on flatter: they would choose the epoch, and the verdict, by memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .calendar import step_of
from .store import SeriesStore

__all__ = ["held_back"]

Integers = NDArray[np.int64]


def held_back(
    training: SeriesStore,
    validation: SeriesStore,
    names: tuple[Sequence[Any], Sequence[Any]],
    label_steps: int | None,
) -> Integers:
    """Return how many steps at the end of each training series must not be trained on, int64, shape ``(series,)``.

    Two series are of the same item if they have the same ``item_id`` (or, without one, the same place) and agree where
    they overlap, or if they are equal in start and values. What is held out begins with the first label of the item:
    what comes after it would give it away too.

    Parameters
    ----------
    training, validation
        What is trained on, and what is validated on.
    names
        The ``item_id`` of each training series and of each validation series; None where it has none.
    label_steps
        Steps at the end of each validation series that are labels; None means all.
    """
    found: Integers = np.zeros(len(training), np.int64)
    by_name: dict[Any, list[int]] = defaultdict(list)
    by_ends: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for other, name in enumerate(names[1]):
        by_name[_key(name, other)].append(other)
        by_ends[_ends(validation, other)].append(other)
    # Ordinals of periods of 5 minutes count minutes.
    step = 1 if training.freq is None else step_of(training.freq)
    for own, name in enumerate(names[0]):
        mine = training.series(own)
        for other in {*by_name.get(_key(name, own), ()), *by_ends.get(_ends(training, own), ())}:
            theirs = validation.series(other)
            count = len(theirs) if label_steps is None else min(label_steps, len(theirs))
            shift = int(validation.ordinals[other] - training.ordinals[own]) // step
            first, end = max(shift + len(theirs) - count, 0), min(shift + len(theirs), len(mine))
            # Labels that both have, and what comes before them.
            begin = max(shift, 0)
            if first < end and _agree(mine[begin:end], theirs[begin - shift : end - shift]):
                found[own] = max(found[own], len(mine) - first)
    return found


def _key(name: Any, position: int) -> Any:
    return ("position", position) if name is None else name


def _agree(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return bool(((one == other) | np.isnan(one) | np.isnan(other)).all())


def _ends(store: SeriesStore, i: int) -> tuple[Any, ...]:
    """What equal series have in common, at little cost."""
    own = store.series(i)
    return (int(store.ordinals[i]), len(own), own[:1].tobytes(), own[-1:].tobytes())
