from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import wilcoxon

from gluonts_peft.trials import TrialResult, TrialSpec
from gluonts_peft.trials.statistics import compare, holm, mean_ranks, patient_errors

BASE = {"family": "chronos", "checkpoint": "bolt-nano", "prediction_length": 6, "data": {"vital": "hr"}}


def test_holm_is_the_step_down_rule() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 30):
        p = rng.random(size) ** 3
        expected = []
        for value in p:
            # The largest of all smaller ones, each times the number of those not smaller than it.
            expected.append(min(1.0, max(other * (p >= other).sum() for other in p[p <= value])))
        assert holm(list(p)) == pytest.approx(expected)
    assert holm([0.2, math.nan, 0.01])[::2] == [0.2, 0.02]
    assert holm([]) == []


def series(values: list[float]) -> pd.Series:
    return pd.Series(values, index=[f"p{number}" for number in range(len(values))])


def test_methods_are_compared_on_the_patients_of_both() -> None:
    rng = np.random.default_rng(0)
    base = rng.gamma(4.0, 2.0, 40)
    better, same = base * 0.9, base + rng.normal(0, 0.2, 40)
    errors = {"zero-shot": series(list(base)), "good": series(list(better)), "same": series(list(same))[:30]}
    good, luck = compare(errors, {"good": "zero-shot", "same": "zero-shot", "gone": "zero-shot"})
    assert (good.method, good.units, good.share_better, good.verdict) == ("good", 40, 1.0, "better")
    assert good.change == pytest.approx(-10.0)
    assert good.p == pytest.approx(wilcoxon(better - base).pvalue)
    assert good.adjusted == pytest.approx(2 * good.p)
    assert (luck.units, luck.verdict) == (30, "no different")
    assert luck.p == pytest.approx(wilcoxon(same[:30] - base[:30]).pvalue)
    (worse,) = compare({"a": series([2.0] * 9), "b": series([1.0] * 9)}, {"a": "b"})
    assert (worse.verdict, worse.change) == ("worse", pytest.approx(100.0))


def test_equal_errors_are_no_difference_and_one_patient_says_nothing() -> None:
    (equal,) = compare({"a": series([1.0, 2.0]), "b": series([1.0, 2.0])}, {"a": "b"})
    assert (equal.p, equal.verdict) == (1.0, "no different")
    (single,) = compare({"a": series([1.0]), "b": series([2.0])}, {"a": "b"})
    assert math.isnan(single.adjusted)
    assert single.verdict == ""


def trial(folder: Path, seed: int, errors: dict[str, list[float]], group: str = "patient") -> TrialResult:
    spec = TrialSpec(**{**BASE, "seed": seed, "data": {"vital": "hr", "group": group}})
    rows = [(item, error) for item, values in errors.items() for error in values]
    place = folder / "trials" / spec.hash()
    place.mkdir(parents=True)
    pd.DataFrame(rows, columns=["item_id", "MAE[0.5]"]).to_parquet(place / "windows.parquet")
    return TrialResult(spec=spec, status="finished")


def test_errors_are_means_over_windows_then_over_seeds(tmp_path: Path) -> None:
    results = [
        trial(tmp_path, 0, {"1/hr": [1.0, 3.0], "1/map": [5.0], "2/hr": [4.0]}),
        trial(tmp_path, 1, {"1/hr": [2.0, 2.0], "1/map": [2.0], "2/hr": [6.0]}),
    ]
    assert patient_errors(results, tmp_path, "MAE[0.5]").to_dict() == {"1": 2.5, "2": 5.0}
    item = trial(tmp_path, 2, {"1/hr": [1.0, 3.0], "1/map": [5.0]}, group="item")
    assert patient_errors([item], tmp_path, "MAE[0.5]").to_dict() == {"1/hr": 2.0, "1/map": 5.0}
    assert len(patient_errors([], tmp_path, "MAE[0.5]")) == 0


def test_ranks_are_averaged_over_data_sets() -> None:
    scores = pd.DataFrame({"hr": [1.0, 2.0, 2.0, 3.0], "map": [2.0, 1.0, 3.0, math.nan]}, index=list("abcd"))
    ranks = mean_ranks(scores)
    assert list(ranks.index) == ["a", "b", "c"]
    assert list(ranks["mean rank"]) == [1.5, 1.75, 2.75]
