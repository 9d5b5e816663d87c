"""Splitting a dataset by item, or by group of items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from .folders import DataEntry

__all__ = ["split_by_item"]


def split_by_item(
    dataset: Iterable[DataEntry],
    *,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    key: Callable[[str], str] | None = None,
) -> tuple[list[DataEntry], ...]:
    """Split a dataset into parts that share no item, or no group of items.

    The parts depend on the item ids, `fractions` and `seed`, not on the order of the dataset, which each part keeps.

    Parameters
    ----------
    dataset
        Entries with an ``item_id``.
    fractions
        Share of the groups in each part; they add up to 1. Every part with a positive share gets at least one group.
    seed
        Seed of the shuffle.
    key
        Maps an item id to its group, which is kept together, e.g. `gluonts_peft.vitals.patient_of`; by default every
        item is a group of its own.

    Returns
    -------
    tuple[list[DataEntry], ...]
        One list per fraction.

    Raises
    ------
    ValueError
        If the fractions are negative or do not add up to 1, an entry has no ``item_id``, or there are fewer groups than
        parts.

    Examples
    --------
    >>> train, test = split_by_item([{"item_id": name} for name in "abcd"], fractions=(0.75, 0.25))
    >>> len(train), len(test)
    (3, 1)
    """
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.ndim != 1 or not len(shares) or not np.all(shares >= 0) or abs(shares.sum() - 1.0) > 1e-6:
        raise ValueError(f"fractions {tuple(fractions)} must be at least 0 and add up to 1, as (0.8, 0.1, 0.1) do")
    entries = list(dataset)
    for position, entry in enumerate(entries):
        if entry.get("item_id") is None:
            raise ValueError(f"entry {position} of dataset has no 'item_id'; give every entry one before splitting")
    names = [str(entry["item_id"]) for entry in entries]
    groups = [name if key is None else key(name) for name in names]
    unique = sorted(set(groups))
    counts = _counts(len(unique), shares)
    order = np.random.default_rng(seed).permutation(len(unique))
    part_of_position = np.repeat(np.arange(len(shares)), counts)
    part_of = {unique[position]: int(part) for position, part in zip(order, part_of_position, strict=True)}
    parts: tuple[list[DataEntry], ...] = tuple([] for _ in shares)
    for group, entry in zip(groups, entries, strict=True):
        parts[part_of[group]].append(entry)
    return parts


def _counts(groups: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the number of groups in each part: largest remainders, but no wanted part is empty."""
    needed = int((shares > 0).sum())
    if groups < needed:
        raise ValueError(
            f"fractions {tuple(shares.tolist())} ask for {needed} parts, but there are {groups} groups of items; "
            "give fewer fractions or more items"
        )
    exact = shares * groups
    counts: NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    largest = np.argsort(-(exact - counts), kind="stable")
    counts[largest[: groups - int(counts.sum())]] += 1
    for part in np.flatnonzero((shares > 0) & (counts == 0)):
        counts[np.argmax(counts)] -= 1
        counts[part] += 1
    return counts
