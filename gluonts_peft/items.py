"""Weights by item: each series, or patient, between zero-shot and tuned by its own history.

A verdict chooses one weight for all. Here each item may leave that common choice, as far as its own windows speak for
it. Let ``d_ij(w)`` be the score of window `j` of item `i` at weight `w`, less that at the common weight; below 0 is
better. With ``d_i(w)`` the mean over the item's ``n_i`` windows and ``m(w)`` that over all windows, an item expects

    e_i(w) = B_i(w) (d_i(w) - m(w)) + max(m(w), 0),        B_i(w) = t(w) / (t(w) + s(w) / n_i)

and takes the weight with the lowest ``e_i``, the common one (``e_i = 0``) if none is below 0. ``s`` is the variance of
windows within items and ``t`` that of items beyond what ``s`` makes of their means, both by the moments of a one-way
analysis of variance, ``t`` at least 0. So the less items differ beyond noise, and the fewer windows one has, the nearer
it stays to the common choice. What would be better for all, ``m(w) < 0``, is not for an item to say, and moves none:
histories are of another time than the windows that chose for all, and of another than those to come.

Whether that is worth it is asked as a verdict asks, and not of the windows that chose: the windows of each item are
dealt, in order of time, into five folds; all items choose on four and are scored on the fifth, less what the chosen
weight would do for all there, if that is a gain. Only what is *proven* so gives items weights of their own: on real
data less than that was worse than the common choice, see docs/verdict.md.

Efron and Morris (1975), Data analysis using Stein's estimator and its generalizations, for the shrinkage; Searle,
Casella and McCulloch (1992), Variance components, for the moments of unequal groups.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import unknown
from .scorer import Scorer, unit_key
from .series.calendar import step_of
from .verdict import FOLDS, ItemVerdict, flip_test
from .words import LEAST_UNITS, NO_EVIDENCE, word_of

if TYPE_CHECKING:
    from torch import Tensor

    from .adapters.base import Adapter
    from .backbone import Backbone
    from .series.windows import LastWindows
    from .training import Loss

__all__ = [
    "BY",
    "ItemJudge",
    "Items",
    "check_by",
    "choose_by_unit",
    "cross_fit_by_unit",
    "judge_items",
    "require_weights",
]

#: What may choose, and the unit of a verdict that it is.
BY = {"item": "series", "patients": "patients"}
ITEMS = "items.safetensors"
# Windows that it takes to choose by, since one says nothing of how sure it is; an item that is judged has one more.
LEAST_WINDOWS = 2

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def check_by(by: str, validation_windows: int, interpolate: bool, calibrate: bool) -> None:
    """Raise a ValueError for options that leave items no weights to choose from, or nothing to choose by."""
    if by not in BY:
        raise ValueError(unknown("by", by, BY))
    if validation_windows <= LEAST_WINDOWS:
        raise ValueError(
            f"by {by!r} needs more than {LEAST_WINDOWS} windows of an item to choose by, and validation_windows is"
            f" {validation_windows}; name {LEAST_WINDOWS + 1} or more"
        )
    if calibrate:
        raise ValueError(
            f"by {by!r} and calibrate do not go together: quantiles are calibrated for one weight; leave one out"
        )
    if not interpolate:
        raise ValueError(f"by {by!r} needs weights to choose from; leave interpolate=False out")


def require_weights(adapter: Adapter) -> None:
    """Raise a ValueError for adapters without weights between zero-shot and tuned for items to choose from."""
    if adapter.head_levels is not None or adapter.scoring_windows:
        why = "begins at random" if adapter.head_levels is not None else "changes its form while it trains"
        raise ValueError(f"adapter {adapter!r} {why}, so that by has no weights to choose from; leave by out")


def choose_by_unit(scores: Floats, units: Integers, common: int, count: int) -> Integers:
    """Return the position of the weight that each unit chooses, int64, shape ``(count,)``.

    Parameters
    ----------
    scores
        Of each weight and window, shape ``(weights, windows)``, lower is better.
    units
        Number of the unit of each window, from 0 to below `count`.
    common
        Position of the common weight, which units take that have fewer than two windows.
    count
        Number of units.
    """
    differences = scores - scores[common]
    windows = np.bincount(units, minlength=count).astype(float)
    known = windows > 0
    total, groups = float(len(units)), int(known.sum())
    if total <= groups or groups < 2:
        return np.full(count, common)
    sums = np.stack([np.bincount(units, weights=row, minlength=count) for row in differences])
    means = sums / np.maximum(windows, 1.0)
    grand = differences.mean(axis=1, keepdims=True)
    within = ((differences - means[:, units]) ** 2).sum(axis=1) / (total - groups)
    among = (windows * (means - grand) ** 2 * known).sum(axis=1) / (groups - 1)
    size = (total - (windows**2).sum() / total) / (groups - 1)
    between = np.maximum((among - within) / size, 0.0)
    noise = within[:, None] / np.maximum(windows, 1.0)
    spread = between[:, None] + noise
    share = np.divide(between[:, None], spread, out=np.zeros_like(spread), where=spread > 0)
    expected = share * (means - grand) + np.maximum(grand, 0.0)
    expected[common] = 0.0
    # Of equal ones the common weight.
    lowest = np.where(expected.min(axis=0) < 0, expected.argmin(axis=0), common)
    result: Integers = np.where(windows >= LEAST_WINDOWS, lowest, common)
    return result


def cross_fit_by_unit(
    scores: Floats, units: Integers, common: int, count: int, times: Integers | None = None
) -> Floats:
    """Return of each unit how its own choices score against the common one on windows that did not choose.

    Parameters
    ----------
    scores, units, common, count
        As of :func:`choose_by_unit`.
    times
        When each window begins, in any unit: those of one time, as of several series of a patient, are in one fold. If
        None, windows are in order of time, and no two of a unit begin together.

    Returns
    -------
    numpy.ndarray
        Shape ``(count,)``, below 0 is better. What a weight would gain for all windows of a fold is no one's own gain,
        and is taken off.
    """
    fold = np.zeros(len(units), np.int64)
    for unit in range(count):
        own = np.flatnonzero(units == unit)
        distinct, rank = np.unique(own if times is None else times[own], return_inverse=True)
        # Where there are few, each is a fold, and not always the first ones.
        fold[own] = (rank * FOLDS // max(len(distinct), FOLDS) + unit) % FOLDS
    differences = np.zeros(len(units))
    for number in range(FOLDS):
        here = fold == number
        if here.any():
            chosen = choose_by_unit(scores[:, ~here], units[~here], common, count)[units[here]]
            for_all = np.minimum((scores[:, here] - scores[common, here]).mean(axis=1), 0.0)
            differences[here] = scores[chosen, np.flatnonzero(here)] - scores[common, here] - for_all[chosen]
    total = np.bincount(units, weights=differences, minlength=count)
    result: Floats = total / np.maximum(np.bincount(units, minlength=count), 1)
    return result


def judge_items(
    scores: Floats,
    names: Sequence[str],
    weights: Sequence[float],
    common: float,
    by: str,
    times: Integers | None = None,
) -> tuple[ItemVerdict, dict[str, float]]:
    """Let items choose, and judge their choices.

    Parameters
    ----------
    scores
        Of each weight and window, shape ``(weights, windows)``. Windows whose scores are not all finite are left out.
    names
        Item of each window.
    weights
        From 0, zero-shot; 0 and the common one are among them.
    common
        The common weight.
    by
        For the record.
    times
        As of :func:`cross_fit_by_unit`.

    Returns
    -------
    verdict, chosen
        What it is worth, and the weight of each item that chose, empty if all take the common one.
    """
    good: NDArray[np.bool_] = np.asarray(np.isfinite(scores).all(axis=0))
    kept = [name for name, fine in zip(names, good, strict=True) if fine]
    scores = scores[:, good]
    order = list(dict.fromkeys(kept))
    place = {name: number for number, name in enumerate(order)}
    units = np.array([place[name] for name in kept], np.int64)
    count, at = len(order), list(weights).index(common)
    long = np.bincount(units, minlength=count) > LEAST_WINDOWS if count else np.zeros(0, bool)
    judged = int(long.sum())
    facts: dict[str, Any] = {"by": by, "units": judged, "unseen": len(set(names)) - judged, "common": common}
    if judged < 2:
        return ItemVerdict(word=NO_EVIDENCE, change=None, low=None, high=None, p=None, chosen={}, **facts), {}
    differences = cross_fit_by_unit(scores, units, at, count, None if times is None else times[good])[long]
    zero = np.bincount(units, weights=scores[list(weights).index(0.0)], minlength=count) / np.bincount(units)
    percent = 100.0 / float(zero[long].mean())
    change = percent * float(differences.mean())
    p, low, high = flip_test(differences[None])
    word = word_of(change, p, judged) if change < 0 else NO_EVIDENCE
    many = judged >= LEAST_UNITS
    choices = choose_by_unit(scores, units, at, count)
    chosen = {name: weights[choices[place[name]]] for name, fine in zip(order, long, strict=True) if fine}
    counts = Counter(chosen.values())
    found = ItemVerdict(
        word=word,
        change=change,
        low=percent * low if many else None,
        high=percent * high if many else None,
        p=p,
        chosen={f"{weight:g}": counts[weight] for weight in sorted(counts)},
        **facts,
    )
    return found, chosen if found.helped else {}


class Items:
    """Weights of items, and the adapter that they are weights of.

    Parameters
    ----------
    by
        ``"item"``, or ``"patients"``: what comes before the first ``/`` of an item id.
    weights
        Of each item that has one of its own.
    common
        Of all others: that at which the adapter stands.
    start, end
        The adapter at weight 0, where it changes nothing, and at 1: as ``state_dict()`` gives it.
    """

    def __init__(
        self,
        by: str,
        weights: Mapping[str, float],
        common: float,
        start: Mapping[str, Tensor],
        end: Mapping[str, Tensor],
    ) -> None:
        self.by = by
        self.weights = dict(weights)
        self.common = common
        self.start = dict(start)
        self.end = dict(end)
        self._lock = threading.Lock()
        self._of: list[int] = []
        self._kept: list[Any] = []
        self._variants: dict[float, Backbone] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def weight(self, item_id: Any) -> float:
        """Return the weight of an item, the common one if it has none of its own."""
        return self.weights.get(unit_key(str(item_id), BY[self.by]), self.common)

    def check(self, adapter: Adapter) -> None:
        """Make sure that the tensors fit an adapter; see :func:`gluonts_peft.adapters.base.check_fit`."""
        from .adapters.base import check_fit

        for state in (self.start, self.end):
            check_fit(adapter.state_dict(), state, adapter)

    def warn(self, what: str) -> None:
        """Say that items get the common weight where there can be only one."""
        count = sum(weight != self.common for weight in self.weights.values())
        warnings.warn(
            f"{count} items have weights of their own, by {self.by}: {what} the common weight {self.common:g} for all",
            stacklevel=3,
        )

    @contextmanager
    def reading(self, backbone: Backbone, weight: float) -> Iterator[Backbone]:
        """Hand out a reader of the backbone with its adapter at a weight, see :meth:`Backbone.reading`.

        Each weight has one set of folded matrices; all else is shared with the backbone.
        """
        if weight == self.common:
            with backbone.reading() as reader:
                yield reader
            return
        with self._variant(backbone, weight).reading() as reader:
            yield reader

    def _variant(self, backbone: Backbone, weight: float) -> Backbone:
        from .keeper import mixed
        from .weights import alive, key_of, variant

        with self._lock:
            key = key_of(backbone)
            if key != self._of:
                self._of, self._kept, self._variants = key, alive(backbone), {}
            if weight not in self._variants:
                self._variants[weight] = variant(backbone, mixed(self.start, self.end, weight))
            return self._variants[weight]

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the tensors into a folder, and return the rest as JSON values."""
        from .checkpoint import save_tensors

        tensors = {
            f"{name}/{key}": tensor.detach().cpu().contiguous().clone()
            for name, state in (("start", self.start), ("end", self.end))
            for key, tensor in state.items()
        }
        save_tensors(tensors, folder / ITEMS, {"format": "pt"})
        return {"by": self.by, "common": self.common, "weights": self.weights, "sha256": _digest(folder / ITEMS)}

    @classmethod
    def load(cls, folder: Path, content: Any) -> Items:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError, TypeError, KeyError
            If it is damaged.
        AdapterError
            If the tensors are missing or damaged.
        """
        from .adapters.base import read_tensors

        weights, common = dict(content["weights"]), content["common"]
        for name, weight in (*weights.items(), ("common", common)):
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
                raise ValueError(f"items: weight of {name!r} is {weight!r}, not from 0 to 1")
        if content["by"] not in BY:
            raise ValueError(f"items: by is {content['by']!r}, not one of {', '.join(BY)}")
        states: dict[str, dict[str, Tensor]] = {"start": {}, "end": {}}
        for name, tensor in read_tensors(folder / ITEMS).items():
            part, _, key = name.partition("/")
            states[part][key] = tensor
        if content["sha256"] != _digest(folder / ITEMS):
            raise ValueError(f"{ITEMS} is not what was saved; fetch it again")
        return cls(content["by"], weights, common, states["start"], states["end"])


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class ItemJudge:
    """Lets items choose after a training, see :func:`gluonts_peft.training.fit`.

    Parameters
    ----------
    windows
        The histories to choose by.
    names
        ``item_id`` of each series; None where it has none.
    by
        One of :data:`BY`.
    tasks
        As for :class:`gluonts_peft.scorer.Scorer`.
    keep
        Whether the tuned model is handed over whatever the verdict: then its weight is the common one, else 0 without
        evidence.

    Attributes
    ----------
    found
        The weights, if items have any of their own.

    Raises
    ------
    ValueError
        If a series has no ``item_id``.
    """

    def __init__(
        self,
        windows: LastWindows,
        names: Sequence[Any],
        *,
        by: str,
        tasks: Sequence[tuple[float, int | Loss]] | None = None,
        keep: bool = False,
    ) -> None:
        series = windows.series.tolist()
        if None in (unnamed := [names[number] for number in dict.fromkeys(series)]):
            raise ValueError(
                f"by {by!r} needs to know items again by their item_id, and the series at position"
                f" {unnamed.index(None)} has none; give each entry one"
            )
        self.names = [unit_key(str(names[number]), BY[by]) for number in series]
        self.by = by
        self.keep = keep
        self.found: Items | None = None
        self._scorer = Scorer(windows, tasks=tasks, every=True)
        store = windows.windows.store
        # Ordinals of periods of 5 minutes count minutes.
        self._times = store.ordinals[windows.series] + windows.cuts * (1 if store.freq is None else step_of(store.freq))

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.names)

    def decide(
        self,
        adapter: Adapter,
        start: Mapping[str, Tensor],
        end: Mapping[str, Tensor],
        weights: Sequence[float],
        common: float,
    ) -> ItemVerdict:
        """Score all windows at all weights, and let items choose. The adapter is left at another weight.

        Parameters
        ----------
        adapter
            Attached.
        start, end
            Its state at weight 0 and 1.
        weights
            Those in between.
        common
            The weight for all.
        """
        from .keeper import mixed

        every = sorted({0.0, *weights, 1.0})
        rows = []
        for weight in every:
            adapter.load_state_dict(mixed(start, end, weight))
            if weight == 0.0:
                self._scorer.start(adapter.attached)
            rows.append(self._scorer.by_window(adapter.attached))
        found, chosen = judge_items(np.stack(rows), self.names, every, common, self.by, self._times)
        if chosen:
            self.found = Items(self.by, chosen, common, start, end)
        return found
