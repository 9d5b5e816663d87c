"""Did tuning help, for whom, and how sure is that?

Zero-shot and tuned forecasts are scored on validation windows, see :mod:`gluonts_peft.scorer`, averaged within a unit
(a series, or a patient with several series), and compared unit by unit. What is handed over is chosen among candidates:
each training epoch, at several weights between the model before tuning (0) and after it (1). No candidate is judged on
the units that chose it: the units are divided into folds, and each fold scores the candidate that the other folds
choose (cross-fitting). So noise gets no credit for being the best of many.

To hand over is less than to claim. If the cross-fitted mean is below that of zero-shot, the candidate that all units
choose is handed over; it is called *proven* only if a sign-flip test confirms it, with enough units and a large enough
effect. Words and thresholds are in :mod:`gluonts_peft.words`; studies and backtests use the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scorer import (
    MOST_SAMPLED,
    MOST_WINDOWS,
    UNITS,
    Scorer,
    forecast_alike,
    history_scales,
    keys_of,
    season_of,
    unit_key,
    units_of,
)
from .scores import LEVELS, between, quantile_scores, scale
from .words import BETTER, LEAST_UNITS, LEVEL, NO_EVIDENCE, PROVEN, counted, evidence, word_of

__all__ = [
    "BETTER",
    "LEVELS",
    "MOST_SAMPLED",
    "MOST_WINDOWS",
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

#: With fewer units weights are chosen more cautiously.
MANY_UNITS = 40
#: Most folds in cross-fitting.
FOLDS = 5
# Rounding error of differences of scores, which are of the order of 1.
_ROUNDING = 1e-12
# All sign assignments are tried up to this many units, beyond it this many random ones.
_ALL_SIGNS, _FLIPS = 13, 9999
# Signs in memory at a time: 32 MiB.
_AT_ONCE = 2**22

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """A model that may be handed over.

    Parameters
    ----------
    epoch
        Training epoch, from 0.
    weight
        Share of the way from the adapter as it was attached (0, zero-shot) to what the epoch made of it (1).
    scores
        Score of each unit, shape ``(units,)``, lower is better.
    """

    epoch: int
    weight: float
    scores: Floats


@dataclass(frozen=True)
class ItemVerdict:
    """The verdict on weights that items choose for themselves, see :mod:`gluonts_peft.items`.

    Parameters
    ----------
    by
        What chose: ``"item"`` or ``"patients"``.
    word
        As in :class:`Verdict`, but against the common weight, which all items have unless it is ``"proven"``.
    change, low, high, p
        As in :class:`Verdict`, cross-fitted over the windows of each item, in per cent of the zero-shot score. None if
        nothing could be compared.
    units, unseen
        Number of items whose history was long enough, and of those whose history was too short.
    common
        The common weight.
    chosen
        Maps a weight to the number of items that chose it.
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
        """Whether items have weights of their own: only if that is proven, not merely better."""
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
    """The result of comparing tuned with zero-shot forecasts.

    Parameters
    ----------
    word
        ``"proven"``: one-sided p below 0.05, a change of at most -0.5 % and at least 6 units. ``"better, not proven"``:
        the mean over units is below that of zero-shot. ``"no evidence"``: neither; zero-shot is handed over.
    change
        Cross-fitted change of the mean score, in per cent of that of zero-shot; below 0 is better. None if nothing
        could be compared.
    low, high
        90 % confidence interval of the change by the chosen candidate, see :func:`flip_test`: it allows for the choice
        among many, and lies below 0 exactly if ``p < 0.05``. None with fewer than 6 units.
    p
        One-sided p-value: probability of as low a mean if the signs of all differences were random.
    units, unit
        Number of units, and what a unit is: ``"series"``, ``"patients"`` or ``"windows"`` (of a single series).
    windows, left_out
        Number of windows that were scored, and of those that were not, as their history has no scale.
    zero_shot
        Mean score of zero-shot.
    score
        Name of the score.
    epoch, weight
        Epoch and weight of the candidate that all units choose, see :func:`choose`; None if there is none.
    items
        The verdict on choices by item, if they were asked for.

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
        """Whether the tuned model is proven better, for users who want no less."""
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
        With scores of the same units in the same order; candidates with non-finite scores are left out.
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
    # If no candidate is better over all units, there is nothing to hand over.
    if change < 0 and choose(zero_shot, known) is not None:
        word = word_of(change, p, count)
    many = count >= LEAST_UNITS
    return Verdict(word, change, percent * low if many else None, percent * high if many else None, p, **facts)


def choose(zero_shot: Floats, candidates: Sequence[Candidate], units: Any = slice(None)) -> int | None:
    """Return the index of the candidate to hand over by the scores of some units, None for zero-shot.

    The lowest mean is partly noise, the more so the more candidates and the fewer units there are. So the choice is one
    nearer to zero-shot: of the same epoch, with a weight that is one step lower, or two steps with fewer than 40 units.
    We chose this rule on real data, see ``examples/verdict``.
    """
    means = [float(each.scores[units].mean()) for each in candidates]
    best = int(np.argmin(means)) if means else 0
    if not means or not means[best] < float(zero_shot[units].mean()):
        return None
    return _cautious(candidates, best, len(zero_shot[units]))


def _cautious(candidates: Sequence[Candidate], best: int, units: int) -> int:
    epoch = [number for number, each in enumerate(candidates) if each.epoch == candidates[best].epoch]
    order = sorted(epoch, key=lambda number: candidates[number].weight)
    return order[max(0, order.index(best) - (2 if units < MANY_UNITS else 1))]


def cross_fit(zero_shot: Floats, candidates: Sequence[Candidate], folds: int = FOLDS) -> Floats:
    """Return the cross-fitted difference to zero-shot of each unit: by the candidate that the other folds choose.

    Parameters
    ----------
    zero_shot
        Scores of all units, two or more, shape ``(units,)``.
    candidates
        With scores of the same units.
    folds
        Number of random folds, always the same ones; the number of units if that is smaller.
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
    """Test by sign flips whether the candidate that was chosen as the best of several is better than zero-shot.

    Under the null hypothesis that candidates differ from zero-shot by noise alone, all differences of a unit could as
    well have the opposite sign. So the choice is repeated for each assignment of signs to units, and the p-value is the
    share of assignments whose chosen candidate has at least as low a mean as the observed one. This controls the error
    rate for any number of candidates, however correlated (Westfall and Young 1993).

    Parameters
    ----------
    differences
        Differences to zero-shot, shape ``(candidates, units)``; below 0 is better.
    choices
        Index of the candidate that is chosen if the given one has the lowest mean, shape ``(candidates,)``; each
        candidate itself if None.

    Returns
    -------
    tuple[float, float, float]
        The one-sided p-value, and the bounds of a 90 % confidence interval of the mean difference of the chosen
        candidate. The upper bound inverts the same test, the lower one, which no choice can flatter, the test of that
        candidate alone. The interval lies below 0 exactly if ``p < 0.05``. Up to 13 units all sign assignments are
        tried, else 9,999 random ones, always the same.
    """
    count = differences.shape[1]
    choices = np.arange(len(differences)) if choices is None else choices
    chosen = int(choices[differences.mean(axis=1).argmin()])
    found = float(differences[chosen].mean())
    shares, rows = [], []
    # Means over all units after flipping some; shifting all differences shifts a mean by 1 - 2 share.
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
    """Yield all assignments that flip a sign, shape ``(flips, count)``; with many units in parts."""
    if count <= _ALL_SIGNS:
        yield (np.arange(1, 2**count)[:, None] >> np.arange(count)) & 1
        return
    rng, most = np.random.default_rng(0), max(1, _AT_ONCE // count)
    for begin in range(0, _FLIPS, most):
        flipped = rng.integers(0, 2, (min(most, _FLIPS - begin), count))
        yield flipped[flipped.any(axis=1)]


class Judge(Scorer):
    """Scores models on validation windows, unit by unit, and gives the verdict on them.

    See :class:`gluonts_peft.scorer.Scorer` for its parameters and attributes.
    """

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
