from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gluonts_peft.trials import DataSpec, load_data
from gluonts_peft.trials.data import deal
from gluonts_peft.vitals import patient_of


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(2, 9), st.integers(0, 40), st.integers(0, 5), st.randoms(use_true_random=False))
def test_units_are_dealt_evenly_whatever_their_order(folds: int, more: int, seed: int, random: Any) -> None:
    units = [f"p{number}" for number in range(folds + more)]
    fold = deal(units, folds, seed)
    assert sorted(fold) == sorted(units)
    sizes = [list(fold.values()).count(number) for number in range(folds)]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == len(units)
    shuffled = random.sample(units, len(units))
    assert deal(shuffled, folds, seed) == fold
    # One more hardly moves the others.
    grown = deal([*units, "new"], folds, seed)
    assert sum(grown[unit] != fold[unit] for unit in units) < folds


def test_another_seed_deals_otherwise() -> None:
    units = [str(number) for number in range(50)]
    assert deal(units, 5, 0) != deal(units, 5, 1)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(2, 6), st.integers(0, 9), st.integers(0, 3), st.sampled_from([(0.7, 0.1, 0.2), (0.5, 0.0, 0.5)]))
def test_every_series_is_tested_exactly_once(
    folds: int, more: int, split_seed: int, fractions: tuple[float, float, float]
) -> None:
    count = max(4, folds + more)
    form: dict[str, Any] = {"source": "synthetic", "series": count, "steps": 8, "windows": 1, "folds": folds}
    form |= {"split_seed": split_seed, "fractions": fractions}
    tested: list[str] = []
    for fold in range(folds):
        data = load_data(DataSpec(**form, fold=fold))
        train, validation, test = (
            [entry["item_id"] for entry in part] for part in (data.train, data.validation, data.test)
        )
        assert len({*train, *validation, *test}) == len(train) + len(validation) + len(test) == count
        assert bool(validation) is (fractions[1] > 0)
        assert train
        tested += test
    assert len(tested) == count
    assert len(set(tested)) == count


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """23 patients with one to three stays each, of whom every fifth has no pressure."""
    folder = tmp_path_factory.mktemp("sources")
    owners = [patient for patient in range(23) for _ in range(1 + patient % 3)]
    rng = np.random.default_rng(0)
    rows = [
        (stay, f"p{patient}", hour, 80 + rng.normal(), np.nan if patient % 5 == 0 else 75 + rng.normal())
        for stay, patient in enumerate(owners)
        for hour in range(6)
    ]
    hourly = pd.DataFrame(rows, columns=["stay_id", "patient", "hour", "hr", "map"])
    hourly.to_parquet(folder / "stays.parquet")
    long = hourly.melt(["stay_id", "patient", "hour"], ["hr", "map"]).dropna()
    long["item_id"] = long["patient"] + "/" + long["stay_id"].astype(str) + "/" + long["variable"]
    long["timestamp"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(long["hour"], unit="h")
    long[["item_id", "timestamp", "value"]].rename(columns={"value": "target"}).to_csv(folder / "a.csv", index=False)
    return {
        "simulated": {"patients": 23, "hours": 8},
        "hourly": {"source": "hourly", "path": str(folder / "stays.parquet"), "min_hours": 6},
        "file": {"source": "file", "path": str(folder / "a.csv"), "group": "patient"},
    }


@pytest.mark.parametrize("source", ["simulated", "hourly", "file"])
def test_patients_are_tested_once_and_in_the_same_fold_for_every_vital_sign(
    sources: dict[str, dict[str, Any]], source: str
) -> None:
    tested: dict[str, list[set[str]]] = {"hr": [], "map": []}
    for vital, fold in [(vital, fold) for vital in tested for fold in range(5)]:
        data = load_data(DataSpec(**sources[source], vital=vital, folds=5, fold=fold, windows=1))
        assert data.unit == "patient"
        parts = [{patient_of(entry["item_id"]) for entry in part} for part in (data.train, data.validation, data.test)]
        assert all(one.isdisjoint(other) for one, other in combinations(parts, 2))
        tested[vital].append(parts[2])
    assert [len(patients) for patients in tested["hr"]] == [5, 5, 4, 5, 4]
    for folds in tested.values():
        assert len(set.union(*folds)) == sum(map(len, folds))
    assert len(set.union(*tested["hr"])) == 23
    assert all(pressure <= rate for rate, pressure in zip(tested["hr"], tested["map"], strict=True))


def test_fewer_groups_than_folds_are_refused() -> None:
    few = {"source": "synthetic", "series": 4, "steps": 8, "windows": 1}
    with pytest.raises(ValueError, match="^data.folds 5 is more than the 4 groups that there are; name fewer$"):
        load_data(DataSpec(**few, folds=5, fold=0))
    message = "data.folds 2 leaves 1 group to train and to validate on; give more series, or data.fractions without"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        load_data(DataSpec(**{**few, "series": 2}, folds=2, fold=1))
    alone = load_data(DataSpec(**{**few, "series": 2}, folds=2, fold=1, fractions=(0.5, 0, 0.5)))
    assert [len(part) for part in (alone.train, alone.validation, alone.test)] == [1, 0, 1]


def test_a_fold_in_which_nobody_has_the_vital_sign_is_refused(tmp_path: Path) -> None:
    rows = [(stay, hour, 80.0 + hour, 75.0 + hour if stay < 2 else np.nan) for stay in range(10) for hour in range(6)]
    pd.DataFrame(rows, columns=["stay_id", "hour", "hr", "map"]).to_parquet(tmp_path / "stays.parquet")
    form = {"source": "hourly", "path": str(tmp_path / "stays.parquet"), "min_hours": 6, "vital": "map", "folds": 5}
    found = []
    for fold in range(5):
        try:
            load_data(DataSpec(**form, fold=fold))
        except ValueError as error:
            found.append(str(error))
    assert found
    assert all(
        re.fullmatch(
            r"no series is left in the (training|validation|test) part of fold \d: 2 of 10 groups have one; use fewer"
            r" data.folds than 5, or another data.split_seed than 0",
            each,
        )
        for each in found
    )


def test_the_folds_of_a_study_share_their_series() -> None:
    form = {"source": "synthetic", "series": 6, "steps": 8, "windows": 1, "folds": 2}
    first, second = (load_data(DataSpec(**form, fold=fold)) for fold in (0, 1))
    assert {id(entry) for entry in first.test} <= {id(entry) for entry in second.train + second.validation}
    assert first.fingerprint != second.fingerprint
