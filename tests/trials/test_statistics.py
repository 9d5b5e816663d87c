from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gluonts_peft.trials import TrialResult, TrialSpec
from gluonts_peft.trials.statistics import against_zero_shot, compare, holm, mean_ranks, unit_errors
from gluonts_peft.verdict import Candidate, judge
from gluonts_peft.words import WORDS

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
    assert (good.method, good.units, good.share_better, good.verdict) == ("good", 40, 1.0, "proven")
    assert good.change == pytest.approx(-10.0)
    assert good.p == 1e-4
    assert good.adjusted == 2e-4
    assert luck.units == 30
    assert luck.low < 0 < luck.high
    assert luck.verdict == ("better, not proven" if luck.change < 0 else "no evidence")
    (worse,) = compare({"a": series([2.0] * 9), "b": series([1.0] * 9)}, {"a": "b"})
    assert (worse.verdict, worse.change, worse.p) == ("proven worse", pytest.approx(100.0), 2.0**-9)


@pytest.mark.parametrize("count", [6, 9, 40, 117])
@pytest.mark.parametrize("shift", [-0.04, -0.01])
def test_a_study_and_a_training_say_the_same_of_the_same_scores(count: int, shift: float) -> None:
    rng = np.random.default_rng(count)
    base = rng.gamma(4.0, 0.5, count)
    tuned = base * (1 + shift + 0.005 * rng.permutation(np.linspace(-1, 1, count)))
    (study,) = compare({"a": series(list(tuned)), "zero-shot": series(list(base))}, {"a": "zero-shot"})
    verdict = judge(base, [Candidate(0, 1.0, tuned)], unit="patients", score="MAE")
    assert (study.verdict, study.units, study.p) == (verdict.word, verdict.units, verdict.p)
    assert (study.change, study.low, study.high) == pytest.approx((verdict.change, verdict.low, verdict.high))
    assert f"{study.verdict}: {study.evidence('MAE', 'patients')}" == str(verdict)


def test_equal_errors_are_no_difference_and_one_patient_says_nothing() -> None:
    (equal,) = compare({"a": series([1.0, 2.0] * 4), "b": series([1.0, 2.0] * 4)}, {"a": "b"})
    assert (equal.p, equal.change, equal.low, equal.high, equal.verdict) == (1.0, 0.0, 0.0, 0.0, "no evidence")
    assert equal.evidence("MAE", "series") == "MAE equal to that of b (8 series)"
    (single,) = compare({"a": series([1.0]), "b": series([2.0])}, {"a": "b"})
    assert math.isnan(single.change)
    assert single.verdict == "no evidence"
    assert single.evidence("MAE", "patients") == "1 patient cannot tell"
    assert compare({"a": series([]), "b": series([])}, {"a": "b"}) == []


@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize(("change", "word"), [(-0.02, "proven"), (0.02, "proven worse")])
def test_six_units_are_the_least_for_a_proof(count: int, change: float, word: str) -> None:
    errors = {"b": series([1.0] * count), "a": series([1.0 + change] * count)}
    (found,) = compare(errors, {"a": "b"})
    if count < 6:
        assert found.verdict == ("better, not proven" if change < 0 else "no evidence")
        assert math.isnan(found.low)
        assert "too few for a proof: it takes 6" in found.evidence("MAE", "series")
    else:
        assert found.verdict == word
        assert found.p == 2.0**-count


def test_a_small_gain_is_no_proof_and_a_small_loss_is_one() -> None:
    base = np.linspace(1.0, 2.0, 50)
    errors = {"b": series(list(base)), "a": series(list(base * 0.996)), "c": series(list(base * 1.004))}
    gain, loss = compare(errors, {"a": "b", "c": "b"})
    assert gain.high < 0
    assert (gain.verdict, loss.verdict) == ("better, not proven", "proven worse")


def test_an_interval_that_holds_0_is_never_a_proof() -> None:
    rng = np.random.default_rng(0)
    words = set()
    for number in range(60):
        base = rng.gamma(4.0, 2.0, 12 + number)
        errors = {
            "b": series(list(base)),
            "a": series(list(base * rng.normal(1 + rng.normal(0, 0.03), 0.08, len(base)))),
        }
        (found,) = compare(errors, {"a": "b"})
        words.add(found.verdict)
        assert (found.low <= 0 <= found.high) == (found.p >= 0.05)
        if found.low <= 0 <= found.high:
            assert found.verdict in ("better, not proven", "no evidence")
    assert words == set(WORDS)


def test_the_correction_is_over_those_that_could_be_proven() -> None:
    base, ones = series([1.0] * 8), [0.9] * 8
    errors = {"base": base, "few": series([0.5] * 5), "some": series(ones[:7]), "more": series(ones)}
    found = {each.method: each for each in compare(errors, dict.fromkeys(["few", "some", "more"], "base"))}
    assert math.isnan(found["few"].adjusted)
    assert (found["more"].adjusted, found["some"].adjusted) == (2 * 2.0**-8, 2.0**-7)
    many = {f"m{number}": series(ones[:6]) for number in range(4)}
    lost = compare({"base": base, **many}, dict.fromkeys(many, "base"))
    assert {each.verdict for each in lost} == {"better, not proven"}
    assert all(each.high < 0 for each in lost)
    assert lost[0].evidence("MAE", "series").endswith("6 series, p 0.062 with Holm's correction for all methods)")


def test_rounding_makes_no_differences() -> None:
    """Errors that are equal on paper, at scales from 1e-9 to 1e9, and averaged in another order."""
    base = np.repeat([1e-9, 1e-3, 0.3, 7.1, 1e9], 2)
    (found,) = compare({"a": series(list((base * 3) / 3 * (1 + 3e-16))), "b": series(list(base))}, {"a": "b"})
    assert (found.change, found.share_better, found.verdict) == (0.0, 0.0, "no evidence")


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_verdicts_do_not_depend_on_the_unit_of_the_data(unit: float) -> None:
    rng = np.random.default_rng(1)
    base = rng.gamma(4.0, 2.0, 30)
    tuned = base * rng.normal(0.98, 0.05, 30)
    (found,) = compare({"a": series(list(unit * tuned)), "b": series(list(unit * base))}, {"a": "b"})
    (plain,) = compare({"a": series(list(tuned)), "b": series(list(base))}, {"a": "b"})
    assert (found.change, found.low, found.high) == pytest.approx((plain.change, plain.low, plain.high))
    assert (found.p, found.verdict) == (plain.p, plain.verdict)


def test_a_backtest_tests_the_model_by_itself_and_naive_ones_together() -> None:
    index = pd.MultiIndex.from_product([[f"s{number}" for number in range(7)], ["2024", "2025"]])
    ones = pd.Series(1.0, index=index)
    frame = against_zero_shot({"model": 0.9 * ones, "zero-shot": ones, "last value": 1.5 * ones}, "MAE")
    assert frame is not None
    assert list(frame.index) == ["model", "zero-shot", "last value"]
    assert list(frame["verdict"].fillna("")) == ["proven", "", "proven worse"]
    interval = "90 % interval -10.00 to -10.00 %, 7 series"
    assert frame["sentence"]["model"] == f"proven, MAE -10.00 % against zero-shot ({interval})"
    # The windows of a single series are units themselves.
    one = ones.loc[["s0"]]
    few = against_zero_shot({"model": 0.9 * one, "zero-shot": one}, "MAE")
    assert few is not None
    assert few["sentence"]["model"].endswith("(2 windows, too few for a proof: it takes 6)")
    assert against_zero_shot({"model": ones, "last value": ones}, "MAE") is None
    assert against_zero_shot({"zero-shot": ones}, "MAE") is None


def trial(folder: Path, seed: int, errors: dict[str, list[float]], group: str = "patient", **data: Any) -> TrialResult:
    spec = TrialSpec(**{**BASE, "seed": seed, "data": {"vital": "hr", "group": group, **data}})
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
    assert unit_errors(results, tmp_path, "MAE[0.5]").to_dict() == {"1": 2.5, "2": 5.0}
    item = trial(tmp_path, 2, {"1/hr": [1.0, 3.0], "1/map": [5.0]}, group="item")
    assert unit_errors([item], tmp_path, "MAE[0.5]").to_dict() == {"1/hr": 2.0, "1/map": 5.0}
    assert len(unit_errors([], tmp_path, "MAE[0.5]")) == 0


def test_folds_add_their_patients(tmp_path: Path) -> None:
    results = [
        trial(tmp_path, 0, {"1/hr": [1.0, 3.0], "2/hr": [4.0]}, folds=2, fold=0),
        trial(tmp_path, 1, {"1/hr": [4.0, 4.0], "2/hr": [6.0]}, folds=2, fold=0),
        trial(tmp_path, 0, {"3/hr": [7.0], "3/map": [8.0]}, folds=2, fold=1),
        trial(tmp_path, 1, {"3/hr": [9.0], "3/map": [10.0]}, folds=2, fold=1),
    ]
    assert unit_errors(results, tmp_path, "MAE[0.5]").to_dict() == {"1": 3.0, "2": 5.0, "3": 8.5}
    # A seed that has not finished everywhere counts where it has.
    assert unit_errors(results[:3], tmp_path, "MAE[0.5]").to_dict() == {"1": 3.0, "2": 5.0, "3": 7.5}


def test_ranks_are_averaged_over_data_sets() -> None:
    scores = pd.DataFrame({"hr": [1.0, 2.0, 2.0, 3.0], "map": [2.0, 1.0, 3.0, math.nan]}, index=list("abcd"))
    ranks = mean_ranks(scores)
    assert list(ranks.index) == ["a", "b", "c"]
    assert list(ranks["mean rank"]) == [1.5, 1.75, 2.75]
