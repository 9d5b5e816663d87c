"""Hourly stays: a generated file of the same layout, and the real one where it is at hand."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gluonts_peft.vitals import PLAUSIBLE, load_hourly, patient_of
from gluonts_peft.vitals.hourly import hourly_units

REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "vitals" / "eicu_demo_hourly.parquet"
TABLE = REAL.parents[1] / "eicu-crd-demo-2.0.1" / "patient.csv.gz"
NAN = float("nan")


def fails(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def stay(name, hours, **values):
    columns = {"stay_id": np.int32(name), "hour": np.asarray(hours)}
    for vital in PLAUSIBLE:
        columns[vital] = np.asarray(values.get(vital, np.full(len(hours), 60.0)), dtype=np.float32)
    return pd.DataFrame(columns)


def write(folder, *stays):
    path = folder / "hourly.parquet"
    pd.concat(stays).to_parquet(path, index=False)
    return path


def test_a_stay_gives_one_series_a_vital_sign_with_gaps_as_nan(tmp_path):
    late = stay(9, [7, 5, 9], hr=[72, 70, NAN], map=[NAN, 80, 81])
    path = write(tmp_path, late, stay(4, [0, 1, 2, 3], hr=[1 + 60, 62, 63, 64]))

    entries = load_hourly(path, min_hours=4)

    assert [entry["item_id"] for entry in entries] == ["4/hr", "4/map", "9/hr", "9/map"]
    assert [patient_of(entry["item_id"]) for entry in entries] == ["4", "4", "9", "9"]
    assert entries[0]["start"] == pd.Period("2000-01-01 00:00", "h")
    assert entries[2]["start"] == pd.Period("2000-01-01 05:00", "h")
    assert all(entry["target"].dtype == np.float32 for entry in entries)
    np.testing.assert_array_equal(entries[0]["target"], [61, 62, 63, 64])
    np.testing.assert_array_equal(entries[2]["target"], [70, NAN, 72, NAN, NAN])
    np.testing.assert_array_equal(entries[3]["target"], [80, NAN, NAN, NAN, 81])


def test_implausible_values_become_missing_unless_kept(tmp_path):
    path = write(tmp_path, stay(1, range(5), hr=[0, 20, 19, 250, 251], map=[200, 201, 19.5, 20, 90]))
    rate, pressure = load_hourly(path, min_hours=1)
    np.testing.assert_array_equal(rate["target"], [NAN, 20, NAN, 250, NAN])
    np.testing.assert_array_equal(pressure["target"], [200, NAN, NAN, 20, 90])
    rate, pressure = load_hourly(path, min_hours=1, plausible=False)
    np.testing.assert_array_equal(rate["target"], [0, 20, 19, 250, 251])
    np.testing.assert_array_equal(pressure["target"], [200, 201, 19.5, 20, 90])


def test_what_is_left_out_is_counted_in_the_log(tmp_path, caplog):
    path = write(
        tmp_path,
        stay(1, range(-9, 3)),
        stay(2, range(4), hr=[0, 70, 0, 70], map=[NAN] * 4),
        stay(3, range(5), hr=[0] * 5),
    )
    with caplog.at_level(logging.INFO, logger="gluonts_peft.vitals.hourly"):
        entries = load_hourly(path, min_hours=4)
    assert [entry["item_id"] for entry in entries] == ["2/hr", "3/map"]
    assert caplog.messages == [
        "9 rows before admission (hour below 0) are left out",
        "hr: 7 values outside 20 to 250 set to missing",
        "map: 0 values outside 20 to 200 set to missing",
        "1 of 3 stays are shorter than 4 hours and left out",
        "2 series without any value are left out, 2 are kept",
    ]


def test_every_vital_sign_of_the_table_can_be_read(tmp_path):
    path = write(tmp_path, stay(1, range(2)))
    entries = load_hourly(path, vitals=tuple(PLAUSIBLE), min_hours=2)
    assert [entry["item_id"] for entry in entries] == ["1/hr", "1/map", "1/sbp", "1/dbp", "1/resp", "1/o2sat"]


@pytest.mark.parametrize("name", ["gone.parquet", "other.parquet"])
def test_a_missing_file_is_named(tmp_path, name):
    with fails(f"path '{tmp_path / name}' does not exist; give the hourly Parquet file"):
        load_hourly(tmp_path / name)


@pytest.mark.parametrize(
    ("dropped", "argument", "hint"),
    [
        ("stay_id", "stay_id", ";"),
        ("hour", "hour", "; did you mean 'hr'?"),
        ("hr", "vital", "; did you mean 'hour'?"),
        ("map", "vital", ";"),
    ],
)
def test_a_missing_column_lists_those_there_are(tmp_path, dropped, argument, hint):
    path = tmp_path / "hourly.parquet"
    frame = stay(1, range(3)).drop(columns=dropped)
    frame.to_parquet(path)
    columns = ", ".join(frame.columns)
    with fails(f"{argument} '{dropped}' is not a column of '{path}'{hint} columns: {columns}"):
        load_hourly(path)


def test_wrong_arguments_are_named(tmp_path):
    path = write(tmp_path, stay(1, range(3)))
    columns = "stay_id, hour, hr, map, sbp, dbp, resp, o2sat"
    for options, message in [
        ({"min_hours": 0}, "min_hours is 0; give at least 1"),
        ({"min_hours": -5}, "min_hours is -5; give at least 1"),
        ({"vitals": ["spb"]}, f"vital 'spb' is not a column of '{path}'; did you mean 'sbp'? columns: {columns}"),
        ({"vitals": ["hour"]}, "vital 'hour' is unknown; known: hr, map, sbp, dbp, resp, o2sat"),
        ({"vitals": ()}, "vitals () must name each column once; known: hr, map, sbp, dbp, resp, o2sat"),
        (
            {"vitals": ("hr", "hr")},
            "vitals ('hr', 'hr') must name each column once; known: hr, map, sbp, dbp, resp, o2sat",
        ),
    ]:
        with fails(message):
            load_hourly(path, **options)


@pytest.mark.parametrize(("name", "hour"), [(3, 2), (8, 0)])
def test_an_hour_that_occurs_twice_is_named(tmp_path, name, hour):
    path = write(tmp_path, stay(1, range(3)), stay(name, range(4)), stay(name, [hour]))
    with fails(
        f"stay_id {name} has hour {hour} twice in '{path}' (1 rows too many in all); keep one row per stay and hour"
    ):
        load_hourly(path)


@pytest.mark.parametrize(("hour", "row"), [(1.5, 2), (NAN, 3)])
def test_an_hour_that_is_not_whole_is_named(tmp_path, hour, row):
    hours = [0.0, 1.0, 2.0]
    hours[row - 1] = hour
    path = write(tmp_path, stay(1, hours))
    with fails(
        f"hour of row {row} in '{path}' is '{hour}', which is not a whole number (1 such rows); correct or remove it"
    ):
        load_hourly(path)


@pytest.mark.parametrize(("vital", "hour"), [("hr", 1), ("map", 2)])
def test_infinity_is_missing_or_an_error(tmp_path, vital, hour):
    values = np.full(3, 70.0)
    values[hour] = np.inf
    path = write(tmp_path, stay(6, range(3), **{vital: values}))
    [entry] = load_hourly(path, vitals=[vital], min_hours=1)
    assert np.isnan(entry["target"]).tolist() == [k == hour for k in range(3)]
    with fails(
        f"{vital} of stay_id 6 at hour {hour} in '{path}' is infinite; "
        "give plausible=True, or leave missing values empty"
    ):
        load_hourly(path, vitals=[vital], min_hours=1, plausible=False)


def test_nothing_left_is_an_error_with_the_reasons(tmp_path):
    path = write(tmp_path, stay(1, range(3)), stay(2, range(4), hr=[0] * 4))
    with fails(
        f"no series of '{path}' is left: 1 of 2 stays are shorter than min_hours=4, 1 series have no value; "
        "lower min_hours or name other vitals"
    ):
        load_hourly(path, vitals=["hr"], min_hours=4)


def test_an_empty_table_is_refused(tmp_path):
    path = write(tmp_path, stay(1, []))
    with fails(f"path '{path}' holds no rows; give a table with at least one"):
        load_hourly(path)


def test_rows_before_admission_are_left_out(tmp_path):
    path = write(tmp_path, stay(1, range(-2, 3)), stay(2, [-1]))
    [entry] = load_hourly(path, vitals=["hr"], min_hours=3)
    assert (entry["start"], len(entry["target"])) == (pd.Period("2000-01-01 00:00", "h"), 3)
    path = write(tmp_path, stay(2, [-1]))
    with fails(f"no row of '{path}' is left: every hour is below 0, before admission; count from admission"):
        load_hourly(path)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize("columns", [("patientUnitStayID", "uniquepid"), ("stay_id", "Patient")])
def test_a_table_says_whose_the_stays_are(tmp_path, ending, columns):
    path = write(tmp_path, stay(1, range(2)), stay(2, range(1)), stay(3, range(2)))
    table = pd.DataFrame({columns[0]: [9, 3, 2, 1, 3], "age": 1, columns[1]: ["z", "NA", "b", "NA", "NA"]})
    patients = tmp_path / f"patient.{ending}"
    if ending == "parquet":
        table.to_parquet(patients)
    else:
        table.to_csv(patients, index=False)
    entries = load_hourly(path, min_hours=2, patients=patients)
    assert [entry["item_id"] for entry in entries] == ["NA/1/hr", "NA/1/map", "NA/3/hr", "NA/3/map"]
    # Also those of which nothing is left.
    assert hourly_units(path, patients) == ["NA", "b"]
    assert hourly_units(path) == ["1", "2", "3"]


def test_a_column_says_whose_the_stays_are(tmp_path):
    path = write(tmp_path, stay(1, range(2)).assign(patient="a"), stay(2, range(2)).assign(patient="a"))
    assert [entry["item_id"] for entry in load_hourly(path, vitals=["hr"], min_hours=2)] == ["a/1/hr", "a/2/hr"]
    assert hourly_units(path) == ["a"]
    path = write(tmp_path, stay(1, range(2)).assign(patient=["a", "b"]))
    with fails(f"stay_id 1 is of the patients 'a' and 'b' in '{path}'; keep one"):
        load_hourly(path)


def test_a_table_of_patients_that_cannot_be_used_is_refused(tmp_path):
    path, table = write(tmp_path, stay(1, range(2)), stay(7, range(2))), tmp_path / "patient.csv"
    for text, message in [
        (
            "stay_id,patient\n1,a\n",
            f"stay_id 7 is not in the table patients '{table}' (1 of 2 are not); give the table that belongs to the "
            "data",
        ),
        ("stay_id,patient\n1,a\n7,\n", f"the patient of stay_id 7 in '{table}' is ''; give a name without '/'"),
        ("stay_id,patient\n1,a\n7,b/c\n", f"the patient of stay_id 7 in '{table}' is 'b/c'; give a name without '/'"),
        ("stay_id,patient\n1,a\n7,a\n7,b\n", f"stay_id 7 is of the patients 'a' and 'b' in '{table}'; keep one"),
        (
            "stay_id,uniquepid\n1,a\n",
            f"patients '{table}' has neither the columns patientunitstayid and uniquepid nor stay_id and patient; give "
            "a table with a row for each stay",
        ),
    ]:
        table.write_text(text)
        with fails(message):
            load_hourly(path, min_hours=1, patients=table)
    for name, message in [
        ("gone.csv", "does not exist; give the table that maps stays to patients"),
        ("hourly.txt", "has an unknown ending; known: .csv, .csv.gz, .parquet"),
    ]:
        (tmp_path / "hourly.txt").touch()
        with fails(f"patients '{tmp_path / name}' {message}"):
            load_hourly(path, patients=tmp_path / name)


@pytest.mark.skipif(not TABLE.is_file(), reason="the real stays, ../shared/data, are not on this machine")
def test_the_real_stays_are_divided_by_patient():
    from gluonts_peft.trials import DataSpec, load_data

    def parts(**options):
        data = load_data(DataSpec(source="hourly", path=str(REAL), vital="hr", **options))
        return [
            {entry["item_id"].split("/")[-2] for entry in part} for part in (data.train, data.validation, data.test)
        ]

    ids = pd.read_csv(TABLE, dtype=str).set_index("patientunitstayid")["uniquepid"]
    by_patient = [set(ids[list(part)]) for part in parts(patients=str(TABLE))]
    by_stay = [set(ids[list(part)]) for part in parts()]
    assert by_patient[0].isdisjoint(by_patient[2])
    assert by_patient[0].isdisjoint(by_patient[1])
    assert by_patient[1].isdisjoint(by_patient[2])
    assert not by_stay[0].isdisjoint(by_stay[2])


@pytest.mark.skipif(not REAL.is_file(), reason="the real stays, ../shared/data/vitals, are not on this machine")
def test_the_real_stays_are_read():
    entries = load_hourly(REAL)
    # Of the 659 stays of 48 hours or longer, 9 have neither heart rate nor mean pressure.
    assert len({patient_of(entry["item_id"]) for entry in entries}) == 650
    for vital, (low, high) in {"hr": (70, 100), "map": (70, 95)}.items():
        series = [entry["target"] for entry in entries if entry["item_id"].endswith(f"/{vital}")]
        values = np.concatenate(series)
        assert min(map(len, series)) >= 48
        assert low < np.nanmedian(values) < high
        assert np.nanmin(values) >= PLAUSIBLE[vital][0]
        assert np.nanmax(values) <= PLAUSIBLE[vital][1]
        assert 0.01 < np.isnan(values).mean() < 0.3
