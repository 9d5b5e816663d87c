"""Which differences between methods are more than luck: paired tests over patients, and ranks over data sets.

The unit is what was never divided between training and test: the patient, the stay where the patients of an hourly
table are not known, or the series. Errors of windows are averaged within a unit and over seeds before any test, so that
neither many windows of one patient nor many seeds of one method look like much evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..vitals import patient_of
from .grid import trial_folder
from .identity import read_scores
from .run import windows_file
from .spec import TrialResult

__all__ = ["EXACT", "LEAST", "LEVEL", "Comparison", "compare", "holm", "mean_ranks", "patient_errors", "signed_ranks"]

#: Adjusted p-values below it are called a difference.
LEVEL = 0.05

#: Units with a difference that a test takes at least: with fewer no p-value could be below :data:`LEVEL`.
LEAST = 6

#: Up to so many units with a difference all assignments of signs are counted; beyond, their sum is taken as normal.
EXACT = 50


@dataclass(frozen=True)
class Comparison:
    """A method against a reference on the same units.

    Parameters
    ----------
    method, reference
        Their names.
    units
        Patients, stays or series that both have an error of.
    differing
        Those among them whose two errors differ; the others take no part in the test.
    change
        Mean difference of the error, in per cent of the reference's mean; below 0 is better than the reference.
    share_better
        Share of units with a smaller error than the reference's.
    ranks
        Matched-pairs rank correlation (Kerby 2014): the sum of signed ranks, relative to the largest that there could
        be. -1 if the method is better on each unit that differs, 1 if it is worse on each; its sign is the direction.
    p, adjusted
        Of the Wilcoxon signed-rank test, two-sided, see :func:`signed_ranks`; as it is, and with Holm's correction over
        all methods that are tested against the same reference on the same data. ``p`` is NaN without at least two
        units, ``adjusted`` with 1 to 5 units that differ: that is too few for a test.
    """

    method: str
    reference: str
    units: int
    differing: int
    change: float
    share_better: float
    ranks: float
    p: float
    adjusted: float

    @property
    def verdict(self) -> str:
        """``"better"``, ``"worse"``, ``"no different"`` or ``"too few"``, by ranks; empty without any unit."""
        if math.isnan(self.adjusted):
            return "too few" if self.units else ""
        if self.adjusted >= LEVEL:
            return "no different"
        return "better" if self.ranks < 0 else "worse"

    @property
    def note(self) -> str:
        """That the mean change has another direction than the ranks, if so: a few units outweigh most others."""
        return "mean and ranks disagree" if self.change * self.ranks < 0 else ""


def signed_ranks(differences: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Test by Wilcoxon's signed ranks whether differences lie around 0.

    Differences of 0 are dropped, equal sizes share the mean of their ranks. Up to :data:`EXACT` differences, the
    p-value is the share of all assignments of signs whose sum of signed ranks is as far from 0 as the one found, or
    farther: exact, with ties too. Beyond, the sum is taken as normal, with its variance corrected for ties.

    Parameters
    ----------
    differences
        One a unit, finite.

    Returns
    -------
    tuple[float, float]
        The sum of signed ranks relative to the largest possible, from -1 to 1, and the two-sided p-value; 0 and 1 if
        nothing differs.

    References
    ----------
    Wilcoxon (1945), Individual comparisons by ranking methods. Pratt and Gibbons (1981), Concepts of Nonparametric
    Theory, for the exact distribution with ties.

    Examples
    --------
    >>> signed_ranks([-0.3, -0.1, 0.0, -0.2, -0.4])
    (-1.0, 0.125)
    """
    from scipy.stats import norm, rankdata

    values = np.asarray(differences, dtype=float)
    values = values[values != 0]
    if not len(values):
        return 0.0, 1.0
    # Twice the ranks are integers, with ties too.
    ranks = np.rint(2 * rankdata(np.abs(values))).astype(int)
    total = int(ranks.sum())
    found = int((np.sign(values) * ranks).sum())
    if len(values) > EXACT:
        return found / total, float(2 * norm.sf(abs(found) / math.sqrt(float((ranks.astype(float) ** 2).sum()))))
    # shares[s]: of the assignments of signs, those in which the positive ranks sum to s. Multiples of 2**-50 are exact.
    shares = np.zeros(total + 1)
    shares[0] = 1.0
    for rank in ranks:
        shares /= 2
        shares[rank:] += shares[:-rank].copy()
    sums = 2 * np.arange(total + 1) - total
    return found / total, float(shares[np.abs(sums) >= abs(found)].sum())


def patient_errors(results: Iterable[TrialResult], folder: Path, metric: str, name: str = "") -> pd.Series:
    """Return the error of each patient, over its windows and over trials that differ in their seed.

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
        Patient -> mean error; empty where no trial has left its windows.
    """
    columns = []
    for result in results:
        path = trial_folder(folder, result.spec) / windows_file(name)
        data = result.spec.also[name] if name else result.spec.data
        if path.is_file():
            windows = read_scores(path, columns=["item_id", metric])
            items = windows["item_id"].astype(str)
            groups = items.map(patient_of) if data.group == "patient" else items
            columns.append(windows[metric].groupby(groups.to_numpy()).mean())
    if not columns:
        return pd.Series(dtype=float)
    mean: pd.Series = pd.concat(columns, axis=1).mean(axis=1, skipna=False)
    return mean.dropna()


def compare(errors: Mapping[str, pd.Series], references: Mapping[str, str]) -> list[Comparison]:
    """Test methods against their references, with one correction for each set of names of references.

    Parameters
    ----------
    errors
        Method -> error of each patient.
    references
        Method -> the method that it is compared with.

    Returns
    -------
    list[Comparison]
        In the order of ``references``, without methods of which one side has no errors.
    """
    found = []
    for method, reference in references.items():
        if method not in errors or reference not in errors:
            continue
        both = pd.concat([errors[method], errors[reference]], axis=1, join="inner").to_numpy(float)
        both = both[~np.isnan(both).any(axis=1)]
        difference = np.array([_difference(*pair) for pair in both])
        differing = int(np.count_nonzero(difference))
        ranks, p = signed_ranks(difference)
        base = float(both[:, 1].mean()) if len(both) else 0.0
        change = 100.0 * float(difference.mean()) / base if base else math.nan
        share = float((difference < 0).mean()) if len(difference) else math.nan
        p = p if len(difference) > 1 else math.nan
        found.append((method, reference, len(difference), differing, change, share, ranks, p))
    # What could not be rejected whatever was found is no hypothesis of the family.
    adjusted = holm([row[-1] if row[3] >= LEAST else math.nan for row in found])
    equal = [not row[3] and not math.isnan(row[-1]) for row in found]
    return [
        Comparison(*row, adjusted=1.0 if same else value)
        for row, value, same in zip(found, adjusted, equal, strict=True)
    ]


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
