"""Did tuning help, for whom, and how sure is that?

Zero-shot and tuned forecasts are scored window by window on series that were not trained on, averaged within a unit (a
series, or a patient with several), and compared unit by unit. What is handed over is chosen among candidates: each
epoch of the training, at several weights between the model before tuning (0) and after it (1). A candidate is never
judged on the units that chose it: the units are divided into folds, and on each fold that candidate is scored which all
others choose. So noise gets no credit for being the best of many.

Handing over and claiming are two things. Where the cross-fitted mean is below zero-shot's, the candidate that all units
choose is handed over; *proven* is only what a sign-flip test confirms, with an effect and with units enough.

The words, and what makes them true, are those of :mod:`gluonts_peft.words`, in which studies and backtests speak too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .scores import LEVELS, between, quantile_scores, scale
from .series.season import season_length
from .words import BETTER, LEAST_UNITS, LEVEL, NO_EVIDENCE, PROVEN, counted, evidence, word_of

if TYPE_CHECKING:
    from .backbone import Backbone, Trajectories
    from .series.store import SeriesStore
    from .series.windows import LastWindows
    from .training import Loss

__all__ = [
    "BETTER",
    "LEVELS",
    "NO_EVIDENCE",
    "PROVEN",
    "UNITS",
    "Candidate",
    "ItemVerdict",
    "Judge",
    "Verdict",
    "between",
    "choose",
    "cross_fit",
    "flip_test",
    "forecast_alike",
    "history_scales",
    "judge",
    "keys_of",
    "quantile_scores",
    "scale",
    "season_of",
    "unit_key",
    "units_of",
]

#: What may be counted.
UNITS = ("series", "patients")
#: With fewer units the choice among weights is more cautious.
MANY_UNITS = 40
#: Folds of the cross-fitting, at most.
FOLDS = 5
#: Windows that candidates are scored on, at most; of families that sample, whose forecasts cost a pass a step.
MOST_WINDOWS, MOST_SAMPLED = 256, 64
_BATCH, _SAMPLES = 64, 20
_NAMES = {True: "scaled quantile loss", False: "reconstruction loss"}
# Of differences of scores, which are of the order of 1: what rounding alone makes.
_ROUNDING = 1e-12
# Up to so many units all signs are tried, beyond so many random ones as these.
_ALL_SIGNS, _FLIPS = 13, 9999
# Signs at a time: 32 MiB.
_AT_ONCE = 2**22

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """A model that may be handed over.

    Parameters
    ----------
    epoch
        Of the training, from 0.
    weight
        Share of the way from the adapter as it was attached (0, zero-shot) to what the epoch made of it (1).
    scores
        Of each unit, lower is better.
    """

    epoch: int
    weight: float
    scores: Floats


@dataclass(frozen=True)
class ItemVerdict:
    """Is it worth it that items choose weights of their own? See :mod:`gluonts_peft.items`.

    Parameters
    ----------
    by
        What chose: ``"item"`` or ``"patients"``.
    word
        As of :class:`Verdict`, but against the common choice, which all take unless it is ``"proven"``.
    change, low, high, p
        As of :class:`Verdict`, cross-fitted over each item's own windows, in per cent of zero-shot's score. None if
        nothing could be compared.
    units, unseen
        Items whose history was long enough, and those that were seen and whose history was not.
    common
        The common weight.
    chosen
        Weight -> how many items chose it.
    """

    by: str
    word: str
    change: float | None
    low: float | None
    high: float | None
    p: float | None
    units: int
    unseen: int
    common: float
    chosen: dict[str, int]

    @property
    def helped(self) -> bool:
        """Whether items have weights of their own: where that is proven, and not merely better."""
        return self.word == PROVEN

    def __str__(self) -> str:
        if self.change is None:
            return f"by {self.by}: no history is long enough to choose by"
        interval = None if self.low is None or self.high is None else (self.low, self.high)
        unit, common = self.by.removesuffix("s") + "s", f"the common weight {self.common:g}"
        found = evidence("score", self.change, interval, self.units, unit, common)
        if not self.helped:
            return f"by {self.by}: not proven that own weights are better: {found}"
        return f"by {self.by}: {self.word}: {found}; " + ", ".join(
            f"{count} chose {weight}" for weight, count in self.chosen.items()
        )


@dataclass(frozen=True)
class Verdict:
    """What the comparison of tuned and zero-shot forecasts says.

    Parameters
    ----------
    word
        ``"proven"``: one-sided p below 0.05, a change of at most -0.5 % and at least 6 units. ``"better, not proven"``:
        the mean over units is below zero-shot's. ``"no evidence"``: neither; zero-shot is handed over.
    change
        Cross-fitted change of the mean score, in per cent of zero-shot's; below 0 is better. None if nothing could be
        compared.
    low, high
        90 % interval of the change by the candidate that is chosen, see :func:`flip_test`: the choice among many is
        allowed for, and it lies below 0 exactly if ``p < 0.05``. None with fewer than 6 units.
    p
        One-sided, of as low a mean if the signs of all differences were random.
    units, unit
        How many were compared, and what they are: ``"series"``, ``"patients"`` or ``"windows"`` (of a single series).
    windows, left_out
        Windows that were scored, and windows without a scale that were not.
    zero_shot
        Mean score of zero-shot.
    score
        What was scored.
    epoch, weight
        Of the candidate that all units choose, see :func:`choose`. None if there is none.
    items
        What comes of choices by item, if these were asked for.

    References
    ----------
    Westfall and Young (1993), Resampling-based multiple testing, for tests of the best of many. Wortsman et al. (2022),
    Robust fine-tuning of zero-shot models (WiSE-FT), for weights between two models.
    """

    word: str
    change: float | None
    low: float | None
    high: float | None
    p: float | None
    units: int
    unit: str
    windows: int
    left_out: int
    zero_shot: float | None
    score: str
    epoch: int | None
    weight: float | None
    items: ItemVerdict | None = None

    @property
    def proven(self) -> bool:
        """Whether the tuned model is proven better, for those who want no less."""
        return self.word == PROVEN

    @property
    def helped(self) -> bool:
        """Whether the tuned model is handed over."""
        return self.word in (PROVEN, BETTER)

    def __str__(self) -> str:
        return self._common() + ("" if self.items is None else f"; {self.items}")

    def _common(self) -> str:
        over = counted(self.units, self.unit)
        if self.epoch is None:
            return f"{self.word}: the training left no model with finite scores"
        if self.change is None:
            return f"{self.word}: {over} cannot tell; give more series, or more validation_windows"
        if self.change == 0:
            return f"{self.word}: zero-shot is the best of all candidates in each fold ({over})"
        interval = None if self.low is None or self.high is None else (self.low, self.high)
        return f"{self.word}: {evidence(self.score, self.change, interval, self.units, self.unit)}"


def judge(
    zero_shot: Floats,
    candidates: Sequence[Candidate],
    *,
    unit: str = "series",
    windows: int | None = None,
    left_out: int = 0,
    score: str = "scaled quantile loss",
) -> Verdict:
    """Compare candidates with zero-shot.

    Parameters
    ----------
    zero_shot
        Score of each unit, lower is better.
    candidates
        Their scores, of the same units in the same order; those that are not finite are left out.
    unit, windows, left_out, score
        For the record, see :class:`Verdict`.

    Raises
    ------
    ValueError
        If scores are not of the same units.

    Examples
    --------
    >>> tuned = Candidate(0, 1.0, np.array([0.8, 1.1, 1.2, 0.7, 0.6, 0.7]))
    >>> str(judge(np.array([1.0, 1.2, 1.5, 0.8, 0.7, 0.9]), [tuned]))
    'proven: scaled quantile loss -16.39 % against zero-shot (90 % interval -24.59 to -9.84 %, 6 series)'
    """
    zero_shot = np.asarray(zero_shot, dtype=np.float64)
    for each in candidates:
        if each.scores.shape != zero_shot.shape:
            raise ValueError(f"epoch {each.epoch} has scores of {each.scores.shape} units, not {zero_shot.shape}")
    known = [each for each in candidates if np.isfinite(each.scores).all()]
    count = len(zero_shot)
    facts: dict[str, Any] = {
        "units": count,
        "unit": unit,
        "windows": count if windows is None else windows,
        "left_out": left_out,
        "zero_shot": float(zero_shot.mean()) if count and np.isfinite(zero_shot).all() else None,
        "score": score,
    }
    best = None
    if known and count:
        lowest = int(np.argmin([each.scores.mean() for each in known]))
        best = known[_cautious(known, lowest, count)]
    facts |= {"epoch": best and best.epoch, "weight": best and best.weight}
    if best is None or count < 2 or not facts["zero_shot"]:
        return Verdict(NO_EVIDENCE, None, None, None, None, **facts)
    percent = 100.0 / facts["zero_shot"]
    change = percent * float(cross_fit(zero_shot, known).mean())
    differences = np.stack([each.scores for each in known]) - zero_shot
    choices = np.array([_cautious(known, number, count) for number in range(len(known))])
    p, low, high = flip_test(differences, choices)
    word = NO_EVIDENCE
    # Without a tuned candidate that is better on all units, there is nothing to hand over.
    if change < 0 and choose(zero_shot, known) is not None:
        word = word_of(change, p, count)
    many = count >= LEAST_UNITS
    return Verdict(word, change, percent * low if many else None, percent * high if many else None, p, **facts)


def choose(zero_shot: Floats, candidates: Sequence[Candidate], units: Any = slice(None)) -> int | None:
    """Return the position of the candidate to hand over by the scores of some units, None for zero-shot.

    That is not the one with the lowest mean, of which noise has a part that grows with the number of candidates and
    shrinks with that of units, but one nearer to zero-shot: of the same epoch, one step of the weight lower, two steps
    by fewer than 40 units. Chosen by us on real data, see ``examples/verdict``.
    """
    means = [float(each.scores[units].mean()) for each in candidates]
    best = int(np.argmin(means)) if means else 0
    if not means or not means[best] < float(zero_shot[units].mean()):
        return None
    return _cautious(candidates, best, len(zero_shot[units]))


def unit_key(name: str, unit: str) -> str:
    """Return which unit a series belongs to, by its item id: itself, or what comes before the first ``/``."""
    return name.partition("/")[0] if unit == "patients" else name


def _cautious(candidates: Sequence[Candidate], best: int, units: int) -> int:
    epoch = [number for number, each in enumerate(candidates) if each.epoch == candidates[best].epoch]
    order = sorted(epoch, key=lambda number: candidates[number].weight)
    return order[max(0, order.index(best) - (2 if units < MANY_UNITS else 1))]


def cross_fit(zero_shot: Floats, candidates: Sequence[Candidate], folds: int = FOLDS) -> Floats:
    """Return of each unit the difference to zero-shot of what the units of the other folds choose.

    Parameters
    ----------
    zero_shot
        Scores of all units, two or more.
    candidates
        Their scores of the same units.
    folds
        Parts of the units, dealt at random, always in the same way; as many as units if there are fewer.
    """
    count = len(zero_shot)
    part = np.random.default_rng(0).permutation(np.arange(count) % min(folds, count))
    difference = np.zeros(count)
    for fold in range(min(folds, count)):
        here = part == fold
        chosen = choose(zero_shot, candidates, ~here)
        if chosen is not None:
            difference[here] = candidates[chosen].scores[here] - zero_shot[here]
    return difference


def flip_test(differences: Floats, choices: NDArray[np.int_] | None = None) -> tuple[float, float, float]:
    """Test whether the candidate that is chosen as the best of several is better than zero-shot, by sign flips.

    If no candidate differs from zero-shot but by noise, the differences of a unit might as well have the other sign,
    all together. So the choice is made anew for each assignment of signs to the units, and the p-value is the share of
    those whose chosen candidate has as low a mean as the one that was found: however many candidates there are, however
    alike, noise is not taken for a proof more often than the level says (Westfall and Young 1993).

    Parameters
    ----------
    differences
        Shape ``(candidates, units)``, to zero-shot; below 0 is better.
    choices
        Of each candidate, which one is chosen where it has the lowest mean; itself if None.

    Returns
    -------
    tuple[float, float, float]
        The one-sided p-value, and a 90 % interval of the mean difference of the chosen candidate: all values that the
        same test does not reject on its upper side, and, where no choice can flatter, a test of that candidate alone on
        its lower side. It lies below 0 exactly if ``p < 0.05``. All signs are tried up to 13 units, else 9,999 random
        assignments, always the same.
    """
    count = differences.shape[1]
    choices = np.arange(len(differences)) if choices is None else choices
    chosen = int(choices[differences.mean(axis=1).argmin()])
    found = float(differences[chosen].mean())
    shares, rows = [], []
    # Means over all units after the flip of some; a shift of all differences shifts them by 1 - 2 share.
    for flipped in _flips(count):
        shares.append(flipped.mean(axis=1))
        rows.append(differences.mean(axis=1) - 2.0 / count * (flipped @ differences.T))
    share, means = np.concatenate(shares), np.concatenate(rows)
    again = means[np.arange(len(means)), choices[means.argmin(axis=1)]]
    # A flip counts against a shift exactly if it lies above the shift's value here.
    upper, lower = ((found - each) / (2.0 * share) for each in (again, means[:, chosen]))
    # The observed signs are one of the assignments.
    p = (1 + int((upper >= -_ROUNDING).sum())) / (1 + len(upper))
    out = max(0, math.ceil(LEVEL * (1 + len(upper))) - 2)
    low, high = float(np.sort(lower)[out]), float(np.sort(upper)[len(upper) - 1 - out])
    return p, low, 0.0 if abs(high) <= _ROUNDING else high


def _flips(count: int) -> Iterator[NDArray[Any]]:
    """Yield assignments of signs but that of none, shape ``(flips, count)``; of many units a part at a time."""
    if count <= _ALL_SIGNS:
        yield (np.arange(1, 2**count)[:, None] >> np.arange(count)) & 1
        return
    rng, most = np.random.default_rng(0), max(1, _AT_ONCE // count)
    for begin in range(0, _FLIPS, most):
        flipped = rng.integers(0, 2, (min(most, _FLIPS - begin), count))
        yield flipped[flipped.any(axis=1)]


class Judge:
    """Scores a model on validation windows, unit by unit.

    Parameters
    ----------
    windows
        What to score on. Of many windows some are chosen: see ``MOST_WINDOWS``.
    unit
        ``"series"``, or ``"patients"``: what comes before the first ``/`` of an item id. The windows of a single unit
        are units themselves.
    tasks
        What is scored: the forecast alone if None; else pairs (weight, what), where what is the number of steps to
        forecast or a loss of each window. Each is taken relative to zero-shot.
    every
        Score all windows, however many there are.

    Attributes
    ----------
    units, unit
        How many units there are, and what they are.
    windows, left_out
        Windows that are scored, and those that have no scale.
    forecasts, sampled, score_name
        Whether a forecast is needed, whether it is made of sample paths, and what is scored.
    """

    def __init__(
        self,
        windows: LastWindows,
        *,
        unit: str = "series",
        tasks: Sequence[tuple[float, int | Loss]] | None = None,
        every: bool = False,
    ) -> None:
        store = windows.windows.store
        self.parts: list[tuple[float, int | Loss]] = list(tasks or [(1.0, windows.windows.prediction_length)])
        self.joint = tasks is not None
        self.forecasts = any(isinstance(what, int) for _, what in self.parts)
        self.sampled = False
        self.score_name = "score of all tasks" if len(self.parts) > 1 else _NAMES[self.forecasts]
        keys = keys_of(store, windows.series, unit)
        self._every = every
        chosen = _spread(keys, len(keys) if every else MOST_WINDOWS)
        first: dict[int, int] = {}
        for series, cut in zip(windows.series.tolist(), windows.cuts.tolist(), strict=True):
            first[series] = min(cut, first.get(series, cut))
        self._series, self._cuts = windows.series[chosen], windows.cuts[chosen]
        numbers, places = np.unique(self._series, return_inverse=True)
        self._scales = history_scales(store, numbers, [first[number] for number in numbers.tolist()])[places]
        self._source = windows.windows
        self._keys, self.unit = units_of([keys[position] for position in chosen], unit)
        self._batches: list[Mapping[str, Any]] | None = None
        self._good: NDArray[np.bool_] | None = None
        self._before: list[float] = []

    @property
    def units(self) -> int:
        return len(set(self._known()))

    @property
    def windows(self) -> int:
        return len(self._known())

    @property
    def left_out(self) -> int:
        return len(self._keys) - self.windows

    def start(self, backbone: Backbone) -> Floats:
        """Score the model before tuning, which all others are compared with."""
        if self.forecasts:
            # Sample paths take a pass for each step, and a choice of fewer windows.
            self.sampled = self._forecast(backbone, self._read(slice(0, 1))).levels is None
            if self.sampled and len(self._keys) > MOST_SAMPLED and not self._every:
                kept = _spread(self._keys, MOST_SAMPLED)
                self._keys = [self._keys[position] for position in kept]
                self._series, self._cuts, self._scales = self._series[kept], self._cuts[kept], self._scales[kept]
        count = len(self._keys)
        self._batches = [self._read(slice(begin, begin + _BATCH)) for begin in range(0, count, _BATCH)]
        rows = self._rows(backbone)
        good = self._good = np.asarray(np.isfinite(rows).all(axis=0))
        self._before = [float(row[good].mean()) if good.any() else 1.0 for row in rows]
        return self._by_unit(rows)

    def score(self, backbone: Backbone) -> Floats:
        """Score the model as it is now; shape ``(units,)``, lower is better."""
        return self._by_unit(self._rows(backbone))

    def by_window(self, backbone: Backbone) -> Floats:
        """Score the model as it is now; shape ``(windows,)``, NaN for those that are left out."""
        total = self._total(self._rows(backbone))
        assert self._good is not None, "start() comes first"
        result: Floats = np.where(self._good, total, math.nan)
        return result

    def verdict(self, zero_shot: Floats, candidates: Sequence[Candidate]) -> Verdict:
        """Compare candidates with zero-shot."""
        return judge(
            zero_shot,
            candidates,
            unit=self.unit,
            windows=self.windows,
            left_out=self.left_out,
            score=self.score_name,
        )

    def _known(self) -> list[str]:
        assert self._good is not None, "start() comes first"
        return [key for key, good in zip(self._keys, self._good, strict=True) if good]

    def _read(self, part: slice) -> Mapping[str, Any]:
        return self._source.read(self._series[part], self._cuts[part])

    def _forecast(self, backbone: Backbone, batch: Mapping[str, Any]) -> Trajectories:
        with backbone.inference():
            return forecast_alike(backbone, batch, num_samples=_SAMPLES)

    def _rows(self, backbone: Backbone) -> Floats:
        """Return the score of each task and window."""
        import torch

        assert self._batches is not None, "start() comes first"
        columns, begin = [], 0
        for batch in self._batches:
            size = len(batch["past_target"])
            scales, begin = self._scales[begin : begin + size], begin + size
            label, seen = np.asarray(batch["future_target"]), np.asarray(batch["future_observed_values"])
            found = None
            rows = []
            for _, what in self.parts:
                if isinstance(what, int):
                    found = found or self._forecast(backbone, batch)
                    values = found.values.double().cpu().numpy()[:, :, :what]
                    rows.append(quantile_scores(values, found.levels, label[:, :what], seen[:, :what], scales))
                else:
                    tensors = {name: torch.as_tensor(value).to(backbone.device) for name, value in batch.items()}
                    with backbone.inference():
                        rows.append(what(backbone, tensors).double().cpu().numpy())
            columns.append(np.stack(rows))
        result: Floats = np.concatenate(columns, axis=1)
        return result

    def _total(self, rows: Floats) -> Floats:
        """Return the score of each window over all tasks."""
        if not self.joint:
            first: Floats = rows[0]
            return first
        shares = [weight / (before or 1.0) for (weight, _), before in zip(self.parts, self._before, strict=True)]
        total: Floats = np.asarray(shares) @ rows / math.fsum(weight for weight, _ in self.parts)
        return total

    def _by_unit(self, rows: Floats) -> Floats:
        total = self._total(rows)
        keys = self._known()
        places = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        index = [places[key] for key in keys]
        sums = np.bincount(index, weights=total[self._good], minlength=len(places))
        result: Floats = sums / np.bincount(index, minlength=len(places))
        return result


def keys_of(store: SeriesStore, series: NDArray[np.int64], unit: str) -> list[str]:
    """Return of each number of a series the unit that it belongs to."""
    if unit == "patients":
        return [unit_key(store.item_ids[number], unit) for number in series]
    return [str(number) for number in series]


def units_of(keys: list[str], unit: str) -> tuple[list[str], str]:
    """Return the units of windows, and what they are: the windows of a single unit are units themselves."""
    if len(set(keys)) == 1 and len(keys) > 1:
        return [str(position) for position in range(len(keys))], "windows"
    return keys, unit


def season_of(store: SeriesStore) -> int:
    """Return the steps of a season of the data, 1 if they have no frequency."""
    return 1 if store.freq is None else season_length(store.freq)


def history_scales(store: SeriesStore, series: Iterable[int], cuts: Iterable[int]) -> Floats:
    """Return what errors are measured in, by what lies before each cut, shape ``(cuts, dimensions)``.

    See :func:`gluonts_peft.scores.scale`.
    """
    season, target = season_of(store), store.layout.target
    pairs = zip(series, cuts, strict=True)
    return np.stack([scale(store.series(each)[:cut].reshape(cut, -1)[:, :target], season) for each, cut in pairs])


def forecast_alike(backbone: Backbone, batch: Mapping[str, Any], num_samples: int | None = None) -> Trajectories:
    """Forecast windows with the same random numbers for all models, so that they differ by their weights alone."""
    import torch

    past = {
        name: torch.as_tensor(value).to(backbone.device)
        for name, value in batch.items()
        if not name.startswith("future_")
    }
    generator = torch.Generator(device=backbone.device).manual_seed(0)
    return backbone.forecast(past, num_samples=num_samples, generator=generator)


def _spread(keys: Sequence[str], most: int) -> list[int]:
    """Return positions of at most so many windows: of as many units as can be, evenly spaced, as many of each."""
    if len(keys) <= most:
        return list(range(len(keys)))
    of: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        of.setdefault(key, []).append(position)
    units = list(of.values())
    if len(units) > most:
        units = [units[number] for number in np.linspace(0, len(units) - 1, most).astype(int)]
    each = max(1, most // len(units))
    # The last ones of each, and of those all that are evenly spaced.
    return sorted(
        those[number] for those in units for number in np.linspace(0, len(those) - 1, min(each, len(those))).astype(int)
    )
