"""The steps of the preparation against slow loops, and that no patient sees another."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from scipy.signal import butter, filtfilt, lfilter, lfilter_zi

from gluonts_peft.vitals import PAPER_STEPS, STEPS, Stay, load_eicu, prepare

NAN = float("nan")


def fails(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def stay(freq="5min", **values):
    return Stay(
        "p", "7", pd.Period("2000-01-01 00:00", freq), {k: np.asarray(v, dtype=np.float32) for k, v in values.items()}
    )


def step(name, one, **options):
    """Run a step that returns one stay, which must not have changed the one given."""
    before = {vital: column.copy() for vital, column in one.values.items()}
    made, counts = STEPS[name](one, **options)
    for vital, column in before.items():
        np.testing.assert_array_equal(one.values[vital], column)
    [result] = made
    assert (result.patient, result.name, result.start) == (one.patient, one.name, one.start)
    assert all(column.dtype == np.float32 for column in result.values.values())
    return result.values, counts


def test_ranges_drop_what_cannot_be(random_column):
    values, counts = step("ranges", stay(hr=[0, 20, 19.9, 250, 251, NAN], resp=[1, 2, 80, 81, 3, 4]))
    np.testing.assert_array_equal(values["hr"], [NAN, 20, NAN, 250, NAN, NAN])
    np.testing.assert_array_equal(values["resp"], [NAN, 2, 80, NAN, 3, 4])
    assert counts == {"hr outside 20 to 250": 3, "resp outside 2 to 80": 2}
    values, counts = step("ranges", stay(hr=[0, 60], map=[0, 1]), ranges={"hr": (50, 70)})
    np.testing.assert_array_equal(values["hr"], [NAN, 60])
    np.testing.assert_array_equal(values["map"], [0, 1])
    assert counts == {"hr outside 50 to 70": 1}


@pytest.fixture
def random_column():
    rng = np.random.default_rng(3)

    def make(length=200, missing=0.3):
        return np.where(rng.random(length) < missing, NAN, np.round(rng.normal(80, 15, length))).astype(np.float32)

    return make


@pytest.mark.parametrize("margin", [4, 25])
def test_contradicting_pressures_become_missing_together(random_column, margin):
    hr, systolic, mean, diastolic = (random_column() for _ in range(4))
    values, counts = step("plausibility", stay(hr=hr, map=mean, sbp=systolic, dbp=diastolic), margin=margin)
    expected = dict.fromkeys(
        ["systolic <= diastolic", "systolic <= mean", "diastolic >= mean", f"systolic <= diastolic + {margin}"], 0
    )
    expected |= {f"{vital} set to missing": 0 for vital in ("map", "sbp", "dbp")}
    for k in range(len(hr)):
        s, m, d = float(systolic[k]), float(mean[k]), float(diastolic[k])
        hits = [s <= d, s <= m, d >= m, s <= d + margin]
        for rule, hit in zip(list(expected)[:4], hits, strict=True):
            expected[rule] += hit
        for vital, value in (("map", m), ("sbp", s), ("dbp", d)):
            expected[f"{vital} set to missing"] += any(hits) and not np.isnan(value)
            assert np.isnan(values[vital][k]) == (any(hits) or np.isnan(value))
    assert counts == expected
    assert min(counts.values()) > 0
    np.testing.assert_array_equal(values["hr"], hr)


def test_a_stay_without_pressures_has_none_to_contradict():
    values, counts = step("plausibility", stay(hr=[60, 70]))
    assert list(values) == ["hr"]
    assert set(counts.values()) == {0}


def test_gaps_are_filled_forward_then_backward(random_column):
    column = random_column(missing=0.6)
    column[:4] = [NAN, NAN, NAN, 80]
    values, counts = step("fill", stay(hr=column))
    series = pd.Series(column)
    np.testing.assert_array_equal(values["hr"], series.ffill().bfill())
    assert counts == {"filled forward": int(np.isnan(column[3:]).sum()), "filled backward": 3, "still missing": 0}
    values, counts = step("fill", stay(hr=column), limit=2, backward=False)
    np.testing.assert_array_equal(values["hr"], series.ffill(limit=2))
    assert counts["still missing"] == int(series.ffill(limit=2).isna().sum()) > 3
    values, _ = step("fill", stay(hr=column), limit=2)
    np.testing.assert_array_equal(values["hr"], series.ffill(limit=2).bfill(limit=2))
    with fails("fill.limit is 0; give at least 1, or none"):
        STEPS["fill"](stay(hr=column), limit=0)


def test_scaling_uses_fixed_ranges():
    values, counts = step("scale", stay(hr=[0, 150, 300, 330, NAN], map=[19, 190, 95, -1, 38], resp=[50] * 5))
    np.testing.assert_allclose(values["hr"], [0, 0.5, 1, 1.1, NAN], rtol=1e-6)
    np.testing.assert_allclose(values["map"], [0.1, 1, 0.5, -1 / 190, 0.2], rtol=1e-6)
    np.testing.assert_allclose(values["resp"], 0.5)
    assert counts == {"outside 0 to 1": 2}
    values, _ = step("scale", stay(hr=[60, 80]), ranges={"hr": [40, 80]})
    np.testing.assert_allclose(values["hr"], [0.5, 1])
    with fails("scale.ranges has no range for 'map'; known: hr"):
        STEPS["scale"](stay(map=[1]), ranges={"hr": [0, 1]})
    with fails("scale.ranges of 'hr' is 5 to 5; give two values, the higher one last"):
        STEPS["scale"](stay(hr=[1]), ranges={"hr": [5, 5]})


def test_the_trailing_mean_sees_only_the_past(random_column):
    for column in (random_column(), random_column(missing=0)):
        for points in (1, 3, 5):
            values, _ = step("smooth", stay(hr=column), points=points)
            expected = pd.Series(column).rolling(points, min_periods=1).mean().where(~np.isnan(column))
            np.testing.assert_allclose(values["hr"], expected, rtol=1e-5)
    values, _ = step("smooth", stay(hr=[3, 6, 9, 30]))
    np.testing.assert_allclose(values["hr"], [3, 4.5, 6, 15])


def test_butterworth_is_the_filter_of_scipy(random_column):
    column = random_column(missing=0)
    b, a = butter(2, 0.05)
    values, _ = step("smooth", stay(hr=column), method="butterworth")
    forward, _ = lfilter(b, a, column.astype(float), zi=lfilter_zi(b, a) * column[0])
    np.testing.assert_allclose(values["hr"], forward, rtol=1e-4)
    values, _ = step("smooth", stay(hr=column), method="butterworth", zero_phase=True)
    np.testing.assert_allclose(values["hr"], filtfilt(b, a, column.astype(float)), rtol=1e-4)
    # What follows changes nothing, unless the filter runs both ways.
    other = column.copy()
    other[100:] += 50
    for zero_phase in (False, True):
        one, two = (
            step("smooth", stay(hr=c), method="butterworth", zero_phase=zero_phase)[0]["hr"][:100]
            for c in (column, other)
        )
        assert np.array_equal(one, two) != zero_phase
    with fails(
        "smooth.method 'butterworth' needs values without gaps, but hr of stay 7 has some; put the step 'fill' "
        "(without a limit) before 'smooth', or use method 'mean'"
    ):
        STEPS["smooth"](stay(hr=[1, NAN]), method="butterworth")
    empty = step("smooth", stay(hr=[NAN, NAN]), method="butterworth")[0]
    assert np.isnan(empty["hr"]).all()
    for options, message in [
        ({"method": "median"}, "smooth.method 'median' is unknown; known: mean, butterworth"),
        ({"points": 0}, "smooth.points is 0; give at least 1"),
    ]:
        with fails(message):
            STEPS["smooth"](stay(hr=[1]), **options)


def test_short_stays_are_left_out():
    for length, kept in ((575, 0), (576, 1)):
        made, counts = STEPS["length"](stay(hr=np.ones(length)))
        assert (len(made), counts) == (kept, {"shorter than 48 hours": 1 - kept})


def test_windows_are_six_hours_in_and_three_out():
    made, counts = STEPS["windows"](stay(hr=np.arange(250), map=[NAN] * 120 + [1] * 130))
    assert [len(one) for one in made] == [108, 108]
    assert [one.name for one in made] == ["7/0", "7/1"]
    assert [one.start for one in made] == [pd.Period("2000-01-01 00:00", "5min"), pd.Period("2000-01-01 09:00", "5min")]
    np.testing.assert_array_equal(made[1].values["hr"], np.arange(108, 216))
    assert [list(one.values) for one in made] == [["hr"], ["hr", "map"]]
    assert counts == {
        "stays shorter than a window": 0,
        "points in no window": 34,
        "series with too much missing": 1,
        "windows without a series": 0,
    }
    made, counts = STEPS["windows"](stay(hr=np.ones(107)))
    assert (made, counts["stays shorter than a window"], counts["points in no window"]) == ([], 1, 107)
    made, counts = STEPS["windows"](stay("h", hr=[1, NAN, 3, NAN, NAN, 6]), past=2, future=1, stride=1, max_missing=0.5)
    assert [one.name for one in made] == ["7/0"]
    assert counts["windows without a series"] == 3
    for options, message in [
        ({"past": 0.51}, "windows.past is 0.51 hours, which is not a number of steps of 5 minutes"),
        ({"stride": 0}, "windows.stride is 0 hours, which is not a number of steps of 5 minutes"),
        ({"max_missing": 2}, "windows.max_missing is 2; give a share of 0 to 1"),
    ]:
        with fails(message):
            STEPS["windows"](stay(hr=[1]), **options)


@pytest.fixture
def make_stays(download):
    """Three patients, the first with two stays; `shift` adds to the values of one patient."""

    def make(**shift):
        rng = np.random.default_rng(0)
        stays = {1: "a", 2: "a", 3: "b", 4: "c"}
        download(
            "patient",
            [
                {"patientunitstayid": number, "uniquepid": name, "unitdischargeoffset": 9999}
                for number, name in stays.items()
            ],
        )
        rows = []
        for offset in range(0, 1200, 5):
            for number, name in stays.items():
                mean = rng.normal(80, 5) + shift.get(name, 0)
                pressures = {"systemicsystolic": mean + 40, "systemicmean": mean, "systemicdiastolic": mean - 20}
                some = rng.random() < 0.8
                rate = rng.normal(80, 10) + shift.get(name, 0)
                row = {"patientunitstayid": number, "observationoffset": offset, "heartrate": rate}
                rows.append({**row, **(pressures if some else {})})
        return load_eicu(download("vitalPeriodic", rows), cohort="all", cuff="never")

    return make


@pytest.mark.parametrize("smooth", [{}, {"method": "butterworth"}])
def test_no_patient_changes_another(make_stays, smooth):
    def run(**shift):
        stays = prepare(make_stays(**shift), options={"smooth": smooth, "windows": {"stride": 1}})
        return {entry["item_id"]: entry["target"] for entry in stays.entries()}

    before, after = run(), run(b=60)
    assert list(before) == list(after)
    for item, target in before.items():
        assert np.array_equal(target, after[item]) != item.startswith("b/")
        assert len(target) == 108
    # Nor does one stay of a patient change the other.
    assert {item.split("/")[1] for item in before if item.startswith("a/")} == {"1", "2"}


def test_a_step_is_given_one_stay_of_one_patient_at_a_time(make_stays, monkeypatch):
    seen = []

    def watch(one):
        seen.append((one.patient, one.name, len(one)))
        return [one], {"seen": 1}

    monkeypatch.setitem(STEPS, "fill", watch)
    stays = prepare(make_stays(), ["fill"])
    assert len(list(stays)) == 4
    assert seen == [("a", "1", 240), ("a", "2", 240), ("b", "3", 240), ("c", "4", 240)]
    assert stays.counts["fill"] == {"stays in": 4, "stays out": 4, "seen": 4}


@pytest.mark.parametrize("left_out", [*PAPER_STEPS, None])
def test_each_step_can_be_left_out(make_stays, left_out):
    stays = make_stays()
    steps = [name for name in PAPER_STEPS if name != left_out]
    prepared = prepare(stays, steps)
    # By hand, a step after the other.
    expected = list(stays)
    for name in steps:
        expected = [made for one in expected for made in STEPS[name](one)[0]]
    found = list(prepared)
    assert len(found) == len(expected) == (4 if left_out == "windows" else 8)
    for one, other in zip(found, expected, strict=True):
        assert (one.patient, one.name, one.start) == (other.patient, other.name, other.start)
        for vital in other.values:
            np.testing.assert_array_equal(one.values[vital], other.values[vital])
    assert [name for name in prepared.counts if name in STEPS] == steps
    assert stays.steps == []


def test_wrong_steps_and_options_are_named(make_stays):
    stays = make_stays()
    for steps, options, message in [
        (
            ["fil"],
            {},
            "step 'fil' is unknown; known: ranges, plausibility, fill, scale, smooth, length, windows",
        ),
        (["fill", "scale", "fill"], {}, "steps fill, scale, fill name one twice; name each once"),
        (
            ["fill"],
            {"smooth": {"points": 5}},
            "options are given for the step 'smooth', which does not run; steps: fill",
        ),
        (["fill"], {"fill": {"limits": 5}}, "option fill.limits is unknown; known: limit, backward"),
    ]:
        with fails(message):
            prepare(stays, steps, options)
    stays.vitals = ("hr", "map")
    with fails(
        "the step 'plausibility' compares map, sbp, dbp, but only map was read; read all three, or leave the step out"
    ):
        prepare(stays)
