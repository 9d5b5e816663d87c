"""The simulator: reproducible, physiological, with structure that carries over from patient to patient."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from gluonts_peft.series.table import split_by_item
from gluonts_peft.vitals import patient_of, simulate_vitals

RANGES = {"hr": (40, 180), "map": (40, 140)}


def fails(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


@pytest.fixture(scope="module")
def simulated():
    return simulate_vitals(patients=300, hours=24, seed=5)


def matrix(entries, vital):
    """Values, shape (patients, time)."""
    return np.stack([entry["target"] for entry in entries if entry["item_id"].endswith(f"/{vital}")]).astype(float)


def clean(values, vital):
    low, high = RANGES[vital]
    return np.where((values < low) | (values > high), np.nan, values)


def test_there_is_one_series_per_patient_and_vital_sign():
    entries = simulate_vitals(patients=3, hours=5, seed=1)
    assert [entry["item_id"] for entry in entries] == [
        f"sim-{patient:04d}/{vital}" for patient in range(3) for vital in ("hr", "map")
    ]
    for entry in entries:
        assert entry["target"].shape == (60,)
        assert entry["target"].dtype == np.float32
        assert entry["start"].freqstr == "5min"
        assert entry["start"].minute == 0
    assert len({entry["start"] for entry in entries[::2]}) > 1
    assert [entry["start"] for entry in entries[::2]] == [entry["start"] for entry in entries[1::2]]


def test_same_seed_same_data_other_seed_other_data():
    one, two, other = (simulate_vitals(patients=2, hours=3, seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(one, two, other, strict=True):
        np.testing.assert_array_equal(a["target"], b["target"])
        assert not np.array_equal(a["target"], c["target"], equal_nan=True)


def test_a_series_does_not_depend_on_what_else_is_asked_for():
    both = simulate_vitals(patients=4, hours=3, seed=3)
    alone = simulate_vitals(patients=4, hours=3, seed=3, vitals=["map"])
    assert [entry["item_id"] for entry in alone] == [f"sim-{patient:04d}/map" for patient in range(4)]
    for a, b in zip(both[1::2], alone, strict=True):
        np.testing.assert_array_equal(a["target"], b["target"])


@pytest.mark.parametrize(("freq", "steps"), [("min", 120), ("5min", 24), ("15min", 8), ("h", 2)])
def test_the_step_can_be_chosen(freq, steps):
    entries = simulate_vitals(patients=40, hours=2, freq=freq)
    assert entries[0]["target"].shape == (steps,)
    assert {entry["start"].freqstr for entry in entries} == {freq}
    assert all(entry["start"].to_timestamp().normalize() == pd.Timestamp("2024-01-01") for entry in entries)
    assert 8 < np.nanstd(clean(matrix(entries, "hr"), "hr")) < 30


def test_values_are_physiological_with_some_artefacts_and_gaps(simulated):
    for vital, (low, high) in RANGES.items():
        values = matrix(simulated, vital)
        wrong = (values < low) | (values > high)
        assert 0.004 < wrong.mean() < 0.015
        assert 0.03 < np.isnan(values).mean() < 0.10
        assert np.nanmin(values) == 0
        assert np.nanmax(values) > 200
        observed = values[~np.isnan(values)]
        np.testing.assert_array_equal(observed, np.round(observed))
        assert 75 < np.nanmedian(clean(values, vital)) < 92


def test_gaps_are_single_and_in_runs(simulated):
    missing = np.isnan(matrix(simulated, "map"))
    edges = np.diff(np.pad(missing, ((0, 0), (1, 1))).astype(int), axis=1)
    lengths = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
    assert (lengths == 1).mean() > 0.4
    assert (lengths >= 6).mean() > 0.05


def test_patients_differ_more_than_a_patient_from_itself(simulated):
    for vital in RANGES:
        values = clean(matrix(simulated, vital), vital)
        halves = np.nanmean(values[:, :144], 1), np.nanmean(values[:, 144:], 1)
        assert np.corrcoef(*halves)[0, 1] > 0.5


def test_heart_rate_answers_pressure_with_the_opposite_sign(simulated):
    hr, pressure = (pd.DataFrame(clean(matrix(simulated, vital), vital).T) for vital in ("hr", "map"))
    # Two hours cancel the repositioning, which lifts both.
    correlation = (hr - hr.shift(24)).corrwith(pressure - pressure.shift(24))
    assert correlation.median() < -0.2


def test_a_deviation_is_half_gone_after_one_to_two_hours(simulated):
    values = clean(matrix(simulated, "map"), "map")
    values = values - np.nanmean(values, axis=1, keepdims=True)
    for minutes, low, high in [(60, 0.2, 0.6), (180, -0.1, 0.3)]:
        steps = minutes // 5
        now, later = values[:, :-steps].ravel(), values[:, steps:].ravel()
        kept = ~(np.isnan(now) | np.isnan(later)) & (np.abs(now) > 10)
        slope = (now[kept] * later[kept]).sum() / (now[kept] ** 2).sum()
        assert low < slope < high


def test_other_patients_teach_how_a_patient_goes_on(simulated):
    """A linear model of the papers' window (6 h in, 3 h out) beats last value, mean and fixed shrinkage on new ones."""
    train, test = split_by_item(simulated, fractions=(0.75, 0.25), key=patient_of)
    for vital in RANGES:
        past, future = windows(matrix(train, vital), vital)
        weights = np.linalg.solve(past.T @ past + 1000 * np.eye(72), past.T @ future)
        past, future = windows(matrix(test, vital), vital)

        def error(forecast, future=future):
            return ((forecast - future) ** 2).mean()

        naive = min(error(past[:, -1:]), error(0 * future), error(past[:, -6:].mean(1, keepdims=True) / 2))
        assert error(past @ weights) < 0.92 * naive


def windows(values, vital):
    """Windows around their own mean: (windows, 72) and (windows, 36)."""
    filled = pd.DataFrame(clean(values, vital).T).ffill().bfill().to_numpy().T
    cut = np.lib.stride_tricks.sliding_window_view(filled, 108, axis=1)[:, ::7].reshape(-1, 108)
    cut = cut - cut[:, :72].mean(1, keepdims=True)
    return cut[:, :72], cut[:, 72:]


@pytest.mark.parametrize(
    ("item_id", "patient"), [("sim-0007/hr", "sim-0007"), ("002-1039/141765/map", "002-1039"), ("12/34/0/hr", "12")]
)
def test_the_patient_is_all_before_the_first_slash(item_id, patient):
    assert patient_of(item_id) == patient


@pytest.mark.parametrize("item_id", ["sim-0007", "/hr", "sim-0007/"])
def test_an_item_id_without_a_patient_is_refused(item_id):
    with fails(f"item_id '{item_id}' is not of the form '<patient>/<vital>', as 'sim-0007/hr' is"):
        patient_of(item_id)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patients": 0}, "patients is 0; give at least 1"),
        ({"hours": -3}, "hours is -3; give at least 1"),
        ({"freq": "D"}, "freq 'D' is not a step of 1 to 60 minutes that divides an hour; give one like '5min'"),
        ({"freq": "7min"}, "freq '7min' is not a step of 1 to 60 minutes that divides an hour; give one like '5min'"),
        ({"freq": "M"}, "freq 'M' is not a step of 1 to 60 minutes that divides an hour; give one like '5min'"),
        ({"vitals": ["mpa"]}, "vital 'mpa' is unknown; did you mean 'map'? known: hr, map"),
        ({"vitals": ["hr", "temperature"]}, "vital 'temperature' is unknown; known: hr, map"),
        ({"vitals": ["hr", "hr"]}, "vitals ('hr', 'hr') must name each vital sign once; known: hr, map"),
        ({"vitals": []}, "vitals () must name each vital sign once; known: hr, map"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with fails(message):
        simulate_vitals(**{"patients": 2, "hours": 2, **options})


def test_the_modules_leave_torch_out():
    code = "import sys, gluonts_peft.series.table, gluonts_peft.vitals as v; v.load_hourly, v.simulate_vitals; "
    code += "sys.exit(sorted({'torch', 'ray', 'lightning'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
