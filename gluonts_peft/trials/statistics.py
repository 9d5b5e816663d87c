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

from ..vitals import patient_of
from .grid import trial_folder
from .run import windows_file
from .spec import TrialResult

__all__ = ["LEVEL", "Comparison", "compare", "holm", "mean_ranks", "patient_errors"]

#: Adjusted p-values below it are called a difference.
LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """A method against a reference on the same units.

    Parameters
    ----------
    method, reference
        Their names.
    units
        Patients, stays or series that both have an error of.
    change
        Mean difference of the error, in per cent of the reference's mean; below 0 is better than the reference.
    share_better
        Share of units with a smaller error than the reference's.
    p, adjusted
        Of the Wilcoxon signed-rank test, two-sided; as it is, and with Holm's correction over all methods that are
        compared with the same reference on the same data. NaN without at least two units.
    """

    method: str
    reference: str
    units: int
    change: float
    share_better: float
    p: float
    adjusted: float

    @property
    def verdict(self) -> str:
        """``"better"``, ``"worse"``, ``"no different"``, or empty where nothing can be said."""
        if math.isnan(self.adjusted):
            return ""
        if self.adjusted >= LEVEL:
            return "no different"
        return "better" if self.change < 0 else "worse"


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
            windows = pd.read_parquet(path, columns=["item_id", metric])
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
    from scipy.stats import wilcoxon

    found = []
    for method, reference in references.items():
        if method not in errors or reference not in errors:
            continue
        both = pd.concat([errors[method], errors[reference]], axis=1, join="inner").to_numpy(float)
        difference = both[:, 0] - both[:, 1]
        if len(difference) < 2:
            p = math.nan
        elif not difference.any():
            p = 1.0
        else:
            p = float(wilcoxon(difference).pvalue)
        base = float(both[:, 1].mean()) if len(both) else math.nan
        change = 100.0 * float(difference.mean()) / base if base else math.nan
        share = float((difference < 0).mean()) if len(difference) else math.nan
        found.append((method, reference, len(difference), change, share, p))
    adjusted = holm([row[-1] for row in found])
    return [Comparison(*row, adjusted=value) for row, value in zip(found, adjusted, strict=True)]


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
