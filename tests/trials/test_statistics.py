from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from gluonts_peft.trials import TrialResult, TrialSpec
from gluonts_peft.trials.statistics import compare, holm, mean_ranks, patient_errors, signed_ranks

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
    assert single.verdict == "too few"
    (none,) = compare({"a": series([]), "b": series([])}, {"a": "b"})
    assert (none.units, none.verdict) == (0, "")


def test_the_direction_is_that_of_the_ranks_and_a_mean_that_disagrees_is_said() -> None:
    """38 of 40 patients better by 0.1, two worse by 30 and 40."""
    base = np.random.default_rng(0).uniform(50.0, 90.0, 40)
    method = base - 0.1
    method[:2] = base[:2] + [30.0, 40.0]
    (found,) = compare({"a": series(list(method)), "b": series(list(base))}, {"a": "b"})
    assert found.change > 0
    assert (found.verdict, found.note, found.differing) == ("better", "mean and ranks disagree", 40)
    # The 38 ties share the rank 19.5.
    assert found.ranks == pytest.approx((39 + 40 - 38 * 19.5) / 820)
    assert found.p < 1e-4
    (turned,) = compare({"a": series(list(2 * base - method)), "b": series(list(base))}, {"a": "b"})
    assert (turned.verdict, turned.note, turned.p) == ("worse", "mean and ranks disagree", found.p)
    (agreeing,) = compare({"a": series(list(base - 0.1)), "b": series(list(base))}, {"a": "b"})
    assert (agreeing.verdict, agreeing.note, agreeing.ranks) == ("better", "", -1.0)


def test_equal_units_are_dropped_and_few_that_differ_are_too_few() -> None:
    """4 better, 26 equal: 2 of 16 assignments of signs are as extreme."""
    base = np.arange(10.0, 40.0)
    method = base.copy()
    method[:4] -= [0.1, 0.2, 0.3, 0.4]
    (found,) = compare({"a": series(list(method)), "b": series(list(base))}, {"a": "b"})
    assert (found.units, found.differing, found.p, found.verdict) == (30, 4, 0.125, "too few")
    assert math.isnan(found.adjusted)


@pytest.mark.parametrize("differing", range(1, 9))
def test_six_units_that_differ_are_the_least(differing: int) -> None:
    errors = {"b": series([1.0] * 20), "a": series([0.5] * differing + [1.0] * (20 - differing))}
    (found,) = compare(errors, {"a": "b"})
    assert found.p == 2.0 ** (1 - differing)
    assert found.verdict == ("too few" if differing < 6 else "better")


def test_what_is_not_tested_does_not_count_in_the_correction() -> None:
    base = [1.0] * 20
    errors = {
        "base": series(base),
        "equal": series(base),
        "few": series([0.5] * 5 + base[5:]),
        "some": series([0.5] * 7 + base[7:]),
        "more": series([0.5] * 8 + base[8:]),
    }
    found = {each.method: each for each in compare(errors, dict.fromkeys(["equal", "few", "some", "more"], "base"))}
    assert (found["more"].adjusted, found["some"].adjusted) == (2 * 2.0**-7, 2.0**-6)
    assert (found["equal"].adjusted, found["equal"].verdict) == (1.0, "no different")
    assert found["few"].verdict == "too few"


def test_rounding_makes_neither_differences_nor_ranks() -> None:
    """Errors that are equal on paper, at scales from 1e-9 to 1e9, and averaged in another order."""
    base = np.repeat([1e-9, 1e-3, 0.3, 7.1, 1e9], 2)
    (found,) = compare({"a": series(list((base * 3) / 3 * (1 + 3e-16))), "b": series(list(base))}, {"a": "b"})
    assert (found.differing, found.verdict) == (0, "no different")
    rng = np.random.default_rng(1)
    start = rng.uniform(1.0, 100.0, 12)
    for change in (0.1, -0.7):
        (tied,) = compare({"a": series(list(start + change)), "b": series(list(start))}, {"a": "b"})
        assert tied.p == 2.0**-11
    signs = np.where(np.arange(12) < 3, 1, -1)
    (mixed,) = compare({"a": series(list(start + 0.1 * signs)), "b": series(list(start))}, {"a": "b"})
    assert mixed.p == pytest.approx(signed_ranks(0.1 * signs)[1], abs=0)


def by_hand(differences: np.ndarray) -> tuple[float, float]:
    """Mean ranks by counting, and every assignment of signs."""
    sizes = [abs(value) for value in differences if value]
    ranks = np.array([sum(o < size for o in sizes) + (sum(o == size for o in sizes) + 1) / 2 for size in sizes])
    found = sum(rank if value > 0 else -rank for rank, value in zip(ranks, differences[differences != 0], strict=True))
    sums = np.array([np.dot(signs, ranks) for signs in itertools.product([-1, 1], repeat=len(sizes))])
    return found / ranks.sum() if len(ranks) else 0.0, (np.abs(sums) >= abs(found) - 1e-9).mean()


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.one_of(
        st.lists(st.integers(-4, 4), max_size=12),  # Ties and zeros.
        st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), max_size=12),
    )
)
def test_p_values_count_the_assignments_of_signs(values: list[float]) -> None:
    differences = np.array(values, dtype=float)
    direction, p = signed_ranks(differences)
    expected = by_hand(differences)
    assert direction == pytest.approx(expected[0], abs=1e-12)
    assert p == pytest.approx(expected[1], abs=1e-12)
    assert signed_ranks(-differences) == pytest.approx((-direction, p))


@pytest.mark.parametrize("count", [6, 13, 30, 49, 50, 51, 80, 400])
@pytest.mark.parametrize("shift", [0.0, -0.4])
def test_p_values_are_those_of_scipy_where_it_is_exact_or_normal(count: int, shift: float) -> None:
    rng = np.random.default_rng(count)
    values = rng.normal(shift, 1.0, count)
    with_zeros = np.r_[values, np.zeros(7)]
    _, p = signed_ranks(with_zeros)
    assert p == pytest.approx(wilcoxon(values, method="exact" if count <= 50 else "asymptotic").pvalue)
    if count > 100:
        tied = np.round(values * 2) / 2
        assert signed_ranks(tied)[1] == pytest.approx(wilcoxon(tied[tied != 0], method="asymptotic").pvalue)


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
