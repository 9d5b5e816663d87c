"""Whether methods are better than what they are compared with: verdicts over units, and ranks over data sets.

The unit is what was never divided between training and test: a group of series, as those of a patient, or the
series. Errors of windows are averaged within a unit and over seeds, each seed alike, before
any test, so that neither many windows of one unit nor many seeds of one method look like much evidence. Test,
thresholds and words are those of :mod:`gluonts_peft.verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..verdict import Floats, flip_test
from ..words import LEAST_UNITS, LEVEL, counted, evidence, word_of
from .grid import trial_folder
from .identity import read_scores
from .run import windows_file
from .spec import TrialResult

__all__ = ["Comparison", "against_zero_shot", "compare", "holm", "mean_ranks", "p_value", "unit_errors"]


@dataclass(frozen=True)
class Comparison:
    """A method against a reference on the same units.

    Parameters
    ----------
    method, reference
        Their names.
    units
        Units that both have an error of.
    change
        Mean difference of the error over units, in per cent of the reference's mean; below 0 is better. NaN if that
        mean is 0, or with fewer than two units.
    low, high
        90 % interval of the change, of this comparison alone, see :func:`gluonts_peft.verdict.flip_test`; NaN with
        fewer than 6 units.
    share_better
        Share of units with a smaller error than the reference's.
    p, adjusted
        One-sided, in the direction of the change, by flips of the units' signs; as it is, and with Holm's correction
        over all methods that are compared with the same reference on the same data. NaN with fewer than 6 units.
    """

    method: str
    reference: str
    units: int
    change: float
    low: float
    high: float
    share_better: float
    p: float
    adjusted: float

    @property
    def verdict(self) -> str:
        """One of :data:`gluonts_peft.words.WORDS`."""
        return word_of(self.change, self.adjusted, self.units)

    def evidence(self, score: str, unit: str) -> str:
        """Return what the verdict rests on, see :func:`gluonts_peft.words.evidence`; the unit is in the plural."""
        if math.isnan(self.change):
            return f"{counted(self.units, unit)} cannot tell"
        if self.change == 0:
            return f"{score} equal to that of {self.reference} ({counted(self.units, unit)})"
        interval = None if math.isnan(self.low) else (self.low, self.high)
        # The interval is of one comparison, the word of all.
        lost = self.p < LEVEL <= self.adjusted
        note = f"p {p_value(self.adjusted)} with Holm's correction for all methods" if lost else ""
        return evidence(score, self.change, interval, self.units, unit, self.reference, note)


def p_value(p: float) -> str:
    """Return a p-value as it is printed."""
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def unit_errors(results: Iterable[TrialResult], folder: Path, metric: str, name: str = "") -> pd.Series:
    """Return the error of each unit, over its windows and over trials that differ in their seed or fold.

    Parameters
    ----------
    results
        Finished trials.
    folder
        Of the study.
    metric
        Column of the windows' scores.
    name
        Of further data in ``TrialSpec.also``; empty for the trial's own.

    Returns
    -------
    pandas.Series
        Unit -> mean error; empty where no trial has left its windows.
    """
    of: dict[int | None, list[pd.Series]] = {}
    for result in results:
        path = trial_folder(folder, result.spec) / windows_file(name)
        data = result.spec.also[name] if name else result.spec.data
        if path.is_file():
            windows = read_scores(path, columns=["item_id", metric])
            items = windows["item_id"].astype(str)
            groups = items.map(data.group_of).to_numpy()
            of.setdefault(data.fold, []).append(windows[metric].groupby(groups).mean())
    if not of:
        return pd.Series(dtype=float)
    # Nobody is tested on two folds.
    mean: pd.Series = pd.concat([pd.concat(those, axis=1).mean(axis=1, skipna=False) for those in of.values()])
    return mean.dropna()


def compare(errors: Mapping[str, pd.Series], references: Mapping[str, str]) -> list[Comparison]:
    """Compare methods with their references, with one correction over all of them.

    Parameters
    ----------
    errors
        Method -> error of each unit.
    references
        Method -> the method that it is compared with.

    Returns
    -------
    list[Comparison]
        In the order of ``references``, without methods that have no unit in common with their reference.
    """
    found: list[dict[str, Any]] = []
    for method, reference in references.items():
        if method not in errors or reference not in errors:
            continue
        both = pd.concat([errors[method], errors[reference]], axis=1, join="inner").to_numpy(float)
        both = both[~np.isnan(both).any(axis=1)]
        if not len(both):
            continue
        difference = np.array([_difference(*pair) for pair in both])
        row = {"method": method, "reference": reference, "units": len(both)}
        row |= {"share_better": float((difference < 0).mean()), **_tested(difference, float(both[:, 1].mean()))}
        found.append(row)
    # A family of hypotheses for each direction: that methods are better, and that they are worse.
    better, worse = (holm([row.pop(name) for row in found]) for name in ("better", "worse"))
    return [
        Comparison(**row, adjusted=up if row["change"] > 0 else down)
        for row, down, up in zip(found, better, worse, strict=True)
    ]


def _tested(difference: Floats, base: float) -> dict[str, float]:
    """Return change and interval in per cent, p in its direction, and p of either direction."""
    known = len(difference) > 1 and base > 0
    change = 100.0 * float(difference.mean()) / base if known else math.nan
    low = high = better = worse = math.nan
    if known and len(difference) >= LEAST_UNITS:
        # In units of the reference, so that rounding is what it is for scores of the order of 1.
        relative = difference / base
        better, low, high = flip_test(relative[None])
        worse = flip_test(-relative[None])[0]
    p = worse if change > 0 else better
    return {"change": change, "low": 100 * low, "high": 100 * high, "p": p, "better": better, "worse": worse}


def against_zero_shot(scores: Mapping[str, pd.Series], score: str) -> pd.DataFrame | None:
    """Compare the models of a backtest with the one that is called ``"zero-shot"``.

    Parameters
    ----------
    scores
        Model -> error of each window, indexed by item and start. Units are the series, or the windows of a single one.
        ``"model"`` is tested by itself, all others, naive ones, together.
    score
        Name of the error.

    Returns
    -------
    pandas.DataFrame
        A row a model, with ``verdict``, ``change %``, ``low %``, ``high %``, ``units`` and ``sentence``, missing for
        zero-shot itself. None if there is nothing to compare.
    """
    if "zero-shot" not in scores or len(scores) < 2:
        return None
    errors, unit = dict(scores), "windows"
    if errors["zero-shot"].index.get_level_values(0).nunique() > 1:
        errors, unit = {name: each.groupby(level=0, sort=False).mean() for name, each in errors.items()}, "series"
    families = [["model"], [name for name in scores if name not in ("zero-shot", "model")]]
    rows = {
        each.method: {
            "verdict": each.verdict,
            "change %": each.change,
            "low %": each.low,
            "high %": each.high,
            "units": each.units,
            "sentence": f"{each.verdict}, {each.evidence(score, unit)}",
        }
        for family in families
        for each in compare(errors, dict.fromkeys(family, "zero-shot"))
    }
    frame: pd.DataFrame = pd.DataFrame.from_dict(rows, orient="index").reindex(list(scores))
    return frame


def _difference(error: float, reference: float) -> float:
    """Return a difference to 12 digits of the larger error: what is equal but for rounding is a zero, or a tie."""
    larger = max(abs(error), abs(reference))
    if not 0 < larger < math.inf:
        return error - reference
    return round(error - reference, 12 - math.ceil(math.log10(larger)))


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values with Holm's step-down correction (Holm 1979); NaN stays NaN and does not count.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(values, dtype=float)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(len(p), math.nan)
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return [float(value) for value in adjusted]


def mean_ranks(scores: pd.DataFrame) -> pd.DataFrame:
    """Rank methods on each data set and average.

    Parameters
    ----------
    scores
        A row a method, a column a data set; lower is better.

    Returns
    -------
    pandas.DataFrame
        Of the methods that have all scores: their rank on each data set (1 is best, ties share the mean of their
        ranks) and ``mean rank``, best first.
    """
    ranks = scores.dropna().rank(axis=0)
    ranks["mean rank"] = ranks.mean(axis=1)
    ordered: pd.DataFrame = ranks.sort_values("mean rank", kind="stable")
    return ordered
