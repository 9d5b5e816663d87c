"""MIMIC-III and MIMIC-IV: generated downloads in their layouts, and the real demo where it is at hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gluonts_peft.vitals import load_mimic
from gluonts_peft.vitals.mimic import ITEMS

REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "mimic-iii-demo-1.4"
NAN = float("nan")


def fails(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def clock(minutes):
    return str(pd.Timestamp("2150-03-01 10:20:00") + pd.Timedelta(minutes=minutes))


def three(stay, item, minutes, value, error=""):
    row = {"icustay_id": stay, "itemid": item, "charttime": clock(minutes), "value": value, "valuenum": value}
    return {**row, "subject_id": 1, "error": error}


@pytest.fixture
def folder(download):
    """MIMIC-III: two adults, one of them with two stays, and a newborn."""
    download(
        "ICUSTAYS",
        [
            {"subject_id": subject, "icustay_id": stay, "intime": clock(0), "outtime": clock(600)}
            for subject, stay in [(30, 301), (4, 42), (4, 41), (5, 51)]
        ],
        ending=".csv",
    )
    ages = {30: 40, 4: 300, 5: 0}
    download(
        "PATIENTS",
        [{"subject_id": subject, "dob": f"{2150 - age}-03-01 00:00:00"} for subject, age in ages.items()],
        ending=".csv",
    )
    return download(
        "CHARTEVENTS",
        [
            three(301, 211, 61, "80.0"),
            three(301, 211, 5, 70, 0),
            three(301, 220045, 20, 74),
            three(301, 211, 25, 99, 1),
            three(301, 211, 30, 0),
            three(301, 211, 31, 300),
            three(301, 211, 32, ""),
            three(301, 198, 33, 15),
            three(301, 52, 5, 75),
            three(301, 456, 5, 60),
            three(301, 456, 65, 62.5),
            three(301, 211, -1, 71),
            three(301, 211, 601, 71),
            three(51, 211, 5, 150),
            three(99, 211, 5, 70),
            three("", 211, 5, 70),
            {"icustay_id": 301, "itemid": 211, "valuenum": 70},
            three(41, 225312, 125, 90),
        ],
    )


def test_mimic_iii_is_read_and_every_rule_counted(folder):
    stays = load_mimic(folder, vitals=["hr", "map"])
    found = {entry["item_id"]: entry for entry in stays.entries()}
    # Sorted by patient, as a string.
    assert list(found) == ["30/301/hr", "30/301/map", "4/41/map"]
    np.testing.assert_array_equal(found["30/301/hr"]["target"], [72, 80])
    # The cuff where there is no arterial value, and only there.
    np.testing.assert_array_equal(found["30/301/map"]["target"], [75, 62.5])
    np.testing.assert_array_equal(found["4/41/map"]["target"], [90])
    assert found["4/41/map"]["start"] == pd.Period("2000-01-01 02:00", "h")
    assert found["30/301/hr"]["target"].dtype == np.float32
    assert stays.options == {"dataset": "mimic-iii", "min_age": 16, "cuff": "gaps"}
    assert stays.counts["stays"] == {
        "in the table": 4,
        "of a patient whose age is unknown": 0,
        "of a patient younger than 16": 1,
        "in the cohort": 3,
    }
    assert stays.counts["chartevents"] == {
        "rows": 18,
        "of other items": 1,
        "of an unknown stay": 2,
        "of a stay outside the cohort": 1,
        "marked as an error": 1,
        "without a number": 1,
        "not between 0 and 300": 2,
        "without a time": 1,
        "before admission": 1,
        "after discharge": 1,
        "without a value": 0,
        "kept": 7,
        "out of order": 3,
    }
    assert stays.counts["grid"]["stays without a value"] == 1


def test_newborns_are_kept_if_asked_for_and_then_no_ages_are_needed(folder):
    (folder / "PATIENTS.csv").unlink()
    with fails(
        f"folder '{folder}' has no patients.csv or patients.csv.gz; it has the ages, to do without give min_age=None "
        "(--min-age 0); it holds: CHARTEVENTS.csv.gz, ICUSTAYS.csv"
    ):
        load_mimic(folder)
    assert "5/51/hr" in {entry["item_id"] for entry in load_mimic(folder, min_age=None).entries()}


def test_patients_of_unknown_age_are_left_out_and_counted(download, folder):
    download("PATIENTS", [{"subject_id": 30, "dob": "2100-01-01 00:00:00"}, {"subject_id": 5}], ending=".csv")
    counts = load_mimic(folder).counts["stays"]
    assert counts["of a patient whose age is unknown"] == 3
    assert counts["in the cohort"] == 1
    download("PATIENTS", [], ending=".csv")
    with fails(f"no stay of '{folder / 'ICUSTAYS.csv'}' is left: none has a patient of at least min_age=16"):
        load_mimic(folder)


def test_a_charted_text_may_hold_commas_and_line_breaks(download, folder):
    rows = [{**three(301, 211, 5 * k, 70 + k % 9), "value": "sinus,\nregular,\n\nno ectopy" * 9} for k in range(3, 9)]
    download("CHARTEVENTS", rows * 2000)
    stays = load_mimic(folder, vitals=["hr"])
    assert [entry["target"].tolist() for entry in stays.entries()] == [[75.5]]
    assert stays.counts["chartevents"]["kept"] == 12_000


@pytest.mark.parametrize("flat", [False, True])
def test_mimic_iv_is_told_by_its_tables(download, flat):
    stay = {"subject_id": 10, "stay_id": 30000153, "intime": clock(0), "outtime": clock(600)}
    download("icu/icustays", [stay, {**stay, "stay_id": 30000154, "subject_id": 11}])
    ages = [(10, 50), (11, 15)]
    download("hosp/patients", [{"subject_id": who, "anchor_age": age, "anchor_year": 2150} for who, age in ages])
    items = {"hr": (220045, 70), "map": (225312, 80), "sbp": (220050, 120), "dbp": (225310, 60)}
    rows = [
        {"stay_id": name, "itemid": item, "charttime": clock(5), "valuenum": value, "warning": 1}
        for name in (30000153, 30000154)
        for item, value in items.values()
    ]
    folder = download("icu/chartevents", rows)
    if flat:
        for path in (*(folder / "icu").iterdir(), *(folder / "hosp").iterdir()):
            path.rename(folder / path.name)
    stays = load_mimic(folder)
    assert stays.options["dataset"] == "mimic-iv"
    assert {entry["item_id"]: entry["target"].tolist() for entry in stays.entries()} == {
        f"10/30000153/{vital}": [value] for vital, (_, value) in items.items()
    }
    assert stays.counts["stays"]["of a patient younger than 16"] == 1
    assert stays.counts["chartevents"]["marked as an error"] == 0


def test_no_item_is_in_two_channels_and_those_of_the_readme_are_there():
    ids = [item for items in ITEMS.values() for item in items]
    assert len(set(ids)) == len(ids)
    assert set(ITEMS["hr"]) == {211, 220045}
    assert set(ITEMS["map"]) == {52, 6702, 220052, 225312}
    assert set(ITEMS["map cuff"]) == {456, 443, 220181}


def test_bad_tables_are_refused(download, folder):
    stays, events = folder / "ICUSTAYS.csv", folder / "CHARTEVENTS.csv.gz"
    text = stays.read_text()
    stays.write_text(text.replace("icustay_id", "icu_id"))
    columns = ", ".join(text.splitlines()[0].replace("icustay_id", "icu_id").split(","))
    with fails(f"'{stays}' must have the column 'icustay_id' (MIMIC-III) or 'stay_id' (MIMIC-IV); columns: {columns}"):
        load_mimic(folder)
    stays.write_text(text.replace(clock(0), "", 1))
    with fails(f"icustay_id 301 in '{stays}' has no intime (1 such stays); minutes since admission need one"):
        load_mimic(folder)
    stays.write_text(text.replace(",30,", ",,", 1))
    with pytest.raises(ValueError, match="^subject_id of icustay_id 301 in .* is '', which cannot name a patient"):
        load_mimic(folder)
    stays.write_text(text)
    download("CHARTEVENTS", [{**three(301, 211, 5, 70), "charttime": "yesterday"}])
    with pytest.raises(ValueError, match="column 'charttime': .*invalid value 'yesterday'; correct the cell"):
        load_mimic(folder)
    download("CHARTEVENTS", [], header="icustay_id,itemid,charttime,num")
    with fails(f"column 'valuenum' is missing in '{events}'; columns: icustay_id, itemid, charttime, num"):
        load_mimic(folder)
    with fails("vital 'map cuff' is unknown; known: hr, map, sbp, dbp, resp, o2sat"):
        load_mimic(folder, vitals=["map cuff"])


@pytest.mark.skipif(not REAL.is_dir(), reason="the MIMIC-III demo, ../shared/data, is not on this machine")
def test_the_demo_has_the_counts_of_its_readme():
    stays = load_mimic(REAL, vitals=["hr", "map"])
    assert {source.name: source.rows for source in stays.sources} == {
        "ICUSTAYS.csv": 136,
        "PATIENTS.csv": 100,
        "CHARTEVENTS.csv.gz": 94_557,
    }
    assert stays.counts["stays"]["in the cohort"] == 136

    # The same rules in pandas, on the whole table at once.
    events = pd.read_csv(REAL / "CHARTEVENTS.csv.gz", parse_dates=["charttime"], low_memory=False)
    icu = pd.read_csv(REAL / "ICUSTAYS.csv", parse_dates=["intime", "outtime"]).set_index("icustay_id")
    channels = ("hr", "map", "map cuff")
    events = events[events["itemid"].isin([item for channel in channels for item in ITEMS[channel]])]
    counts = {"rows": 94_557, "of other items": 94_557 - len(events), "of an unknown stay": 0}
    counts["of a stay outside the cohort"] = 0
    rules = {
        "marked as an error": lambda rows: rows["error"] == 1,
        "without a number": lambda rows: rows["valuenum"].isna(),
        "not between 0 and 300": lambda rows: (rows["valuenum"] <= 0) | (rows["valuenum"] >= 300),
        "without a time": lambda rows: rows["charttime"].isna(),
        "before admission": lambda rows: rows["charttime"] < rows["icustay_id"].map(icu["intime"]),
        "after discharge": lambda rows: rows["charttime"] > rows["icustay_id"].map(icu["outtime"]),
        "without a value": lambda rows: rows["valuenum"].isna(),
    }
    for rule, removed in rules.items():
        counts[rule] = int(removed(events).sum())
        if rule == "before admission":
            unordered = events.groupby("icustay_id", sort=False)["charttime"].diff() < pd.Timedelta(0)
        events = events[~removed(events)]
    counts["kept"] = len(events)
    found = dict(stays.counts["chartevents"])
    assert found.pop("out of order") == int(unordered.sum())
    assert found == counts

    hours = (events["charttime"] - events["icustay_id"].map(icu["intime"])) // pd.Timedelta(hours=1)
    for entry in stays.entries(["hr"]):
        stay = int(entry["item_id"].split("/")[1])
        mine = (events["icustay_id"] == stay) & events["itemid"].isin(ITEMS["hr"])
        medians = events.loc[mine, "valuenum"].groupby(hours[mine]).median()
        first = (entry["start"] - pd.Period("2000-01-01 00:00", "h")).n
        expected = medians.reindex(range(first, first + len(entry["target"]))).to_numpy(dtype=np.float32)
        np.testing.assert_array_equal(entry["target"], expected)
    assert stays.counts["grid"]["stays"] + stays.counts["grid"]["stays without a value"] == 136
