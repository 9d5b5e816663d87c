"""eICU-CRD: generated downloads in its layout, and the real one where it is at hand."""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gluonts_peft.vitals import load_eicu, patient_of

REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "eicu-crd-demo-2.0.1"
NAN = float("nan")


def fails(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def patient(stay, name, diagnosis="Sepsis, GI", discharge=600):
    return {
        "patientunitstayid": stay,
        "uniquepid": name,
        "apacheadmissiondx": diagnosis,
        "unitdischargeoffset": discharge,
    }


def periodic(stay, offset, hr="", pressures=("", "", "")):
    systolic, mean, diastolic = pressures
    return {
        "patientunitstayid": stay,
        "observationoffset": offset,
        "heartrate": hr,
        "systemicsystolic": systolic,
        "systemicmean": mean,
        "systemicdiastolic": diastolic,
    }


def aperiodic(stay, offset, systolic="", mean="", diastolic=""):
    return {
        "patientunitstayid": stay,
        "observationoffset": offset,
        "noninvasivesystolic": systolic,
        "noninvasivemean": mean,
        "noninvasivediastolic": diastolic,
    }


def series(stays, *vitals):
    return {entry["item_id"]: entry["target"].tolist() for entry in stays.entries(vitals or None)}


@pytest.fixture
def folder(download):
    """Two patients, one of them with two stays; rows in no order, some of them of no use."""
    download("patient", [patient(9, "002-2"), patient(8, "002-1"), patient(5, "002-2"), patient(7, "002-3", "CABG")])
    download(
        "vitalPeriodic",
        [
            periodic(5, 13, 72),
            periodic(8, 4, 90, (120, 80, 60)),
            periodic(5, 3, 70),
            periodic(5, -2, 55),
            periodic(7, 3, 60),
            periodic(6, 3, 60),
            periodic(8, 601, 99),
            periodic(8, 600, 91),
            periodic(8, "", 92),
            periodic(9, 20),
            periodic(5, 3, 76),
            periodic("", 3, 76),
        ],
    )
    return download("vitalAperiodic", [aperiodic(8, 4, 150, 100, 90), aperiodic(8, 12, 140, 95, 85)])


def test_rows_in_any_order_become_series_on_the_grid(folder):
    stays = load_eicu(folder)

    found = list(stays.entries())
    assert [entry["item_id"] for entry in found] == [
        *("002-1/8/hr", "002-1/8/map", "002-1/8/sbp", "002-1/8/dbp"),
        "002-2/5/hr",
    ]
    assert [patient_of(entry["item_id"]) for entry in found] == ["002-1"] * 4 + ["002-2"]
    assert all(entry["target"].dtype == np.float32 and len(entry["target"]) == 121 for entry in found[:4])
    assert {entry["start"] for entry in found} == {pd.Period("2000-01-01 00:00", "5min")}
    np.testing.assert_array_equal(found[0]["target"], [90, *[NAN] * 119, 91])
    np.testing.assert_array_equal(found[1]["target"][:4], [80, NAN, 95, NAN])
    # Two values of minute 3: their median.
    np.testing.assert_array_equal(found[4]["target"], [73, NAN, 72])


def test_every_rule_is_counted(folder):
    stays = load_eicu(folder)
    assert stays.counts == {
        "stays": {"in the table": 4, "sepsis by admission diagnosis": 3, "in the cohort": 3},
        "vitalPeriodic": {
            "rows": 12,
            "of an unknown stay": 2,
            "of a stay outside the cohort": 1,
            "without a time": 1,
            "before admission": 1,
            "after discharge": 1,
            "without a value": 1,
            "kept": 5,
            "out of order": 3,
        },
        "vitalAperiodic": {
            "rows": 2,
            "of an unknown stay": 0,
            "of a stay outside the cohort": 0,
            "without a time": 0,
            "before admission": 0,
            "after discharge": 0,
            "without a value": 0,
            "kept": 2,
            "out of order": 0,
        },
    }
    first = list(stays.entries())
    grid = {
        "values at a minute that has one": 1,
        "values merged into a median": 2,
        "points from the cuff": 1,
        "stays without a value": 1,
        "series without a value": 3,
        "stays": 2,
        "series": 5,
        "points": 4 * 121 + 3,
        "points with a value": 2 + 3 * 2 + 2,
    }
    assert stays.counts["grid"] == grid
    # Counts begin anew with every iteration, and the series are the same.
    second = list(stays.entries())
    assert stays.counts["grid"] == grid
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one["target"], other["target"])


@pytest.mark.parametrize(
    ("cuff", "mean"), [("gaps", [80.0, 95.0]), ("stays", [80.0]), ("never", [80.0])], ids=["gaps", "stays", "never"]
)
def test_cuff_pressures_fill_gaps_or_whole_stays_or_nothing(download, cuff, mean):
    download("patient", [patient(1, "a"), patient(2, "b")])
    download("vitalPeriodic", [periodic(1, 0, "", ("", 80, "")), periodic(2, 0, 60)])
    # The cuff's systolic pressure of minute 0 must not be mixed with the mean of the artery.
    folder = download(
        "vitalAperiodic", [aperiodic(1, 0, 150, 100, 90), aperiodic(1, 5, 140, 95, 85), aperiodic(2, 0, 130, 90, 70)]
    )
    found = series(load_eicu(folder, cuff=cuff))
    assert found["a/1/map"] == mean
    if cuff == "gaps":
        np.testing.assert_array_equal(found["a/1/sbp"], [NAN, 140])
    else:
        assert "a/1/sbp" not in found
    assert ("b/2/map" in found) == (cuff != "never")


def test_without_the_cuff_its_table_is_not_needed(download):
    download("patient", [patient(1, "a")])
    folder = download("vitalPeriodic", [periodic(1, 0, 60, (120, 80, 70))])
    assert set(series(load_eicu(folder, cuff="never"))) == {"a/1/hr", "a/1/map", "a/1/sbp", "a/1/dbp"}
    assert set(series(load_eicu(folder, vitals=["hr"]))) == {"a/1/hr"}
    with fails(
        f"folder '{folder}' has no vitalAperiodic.csv or vitalAperiodic.csv.gz; it has the cuff pressures, to do "
        "without give cuff='never'; it holds: patient.csv.gz, vitalPeriodic.csv.gz"
    ):
        load_eicu(folder)


def test_sepsis_is_found_in_the_admission_diagnosis_and_in_the_diagnosis_table(download):
    admissions = ["Sepsis, pulmonary", "CABG", "sepsis, GI", "", "Arthritis, septic", "Sepsis, other", "CABG", "CABG"]
    download("patient", [patient(stay, f"p{stay}", text) for stay, text in enumerate(admissions, 1)])
    download("vitalPeriodic", [periodic(stay, 0, 60 + stay) for stay in range(1, 9)])
    without = load_eicu(download("vitalAperiodic", []), vitals=["hr"])
    assert [stay.name for stay in without] == ["1", "3", "6"]
    assert without.counts["stays"] == {"in the table": 8, "sepsis by admission diagnosis": 3, "in the cohort": 3}

    shock = "cardiovascular|shock / hypotension"
    rows = [
        (2, f"{shock}|sepsis|sepsis with multi-organ dysfunction"),
        (1, f"{shock}|sepsis"),
        (4, f"{shock}|septic shock"),
        (7, f"{shock}|signs and symptoms of sepsis (SIRS)|due to non-infectious process with organ dysfunction"),
        (8, "musculoskeletal|septic arthritis"),
    ]
    folder = download("diagnosis", [{"patientunitstayid": stay, "diagnosisstring": text} for stay, text in rows])
    both = load_eicu(folder, vitals=["hr"])
    assert [stay.name for stay in both] == ["1", "2", "3", "4", "6"]
    assert both.counts["stays"] == {
        "in the table": 8,
        "sepsis by admission diagnosis": 3,
        "sepsis by the diagnosis table": 3,
        "in the cohort": 5,
    }
    everyone = load_eicu(folder, vitals=["hr"], cohort="all")
    assert len(list(everyone)) == 8
    assert [source.name for source in everyone.sources] == ["patient.csv.gz", "vitalPeriodic.csv.gz"]


@pytest.fixture
def random_rows():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(4000):
        mean = int(rng.integers(50, 110))
        rows.append(
            periodic(
                int(rng.integers(1, 40)),
                int(rng.integers(-50, 700)),
                "" if rng.random() < 0.2 else int(rng.integers(40, 160)),
                (mean + 40, mean, mean - 20) if rng.random() < 0.3 else ("", "", ""),
            )
        )
    return rows


def test_agrees_with_a_table_in_memory_and_with_any_order(download, random_rows, tmp_path):
    download("patient", [patient(stay, f"p{stay % 7}") for stay in range(1, 40)])
    folder = download("vitalPeriodic", random_rows)
    stays = load_eicu(folder, cuff="never")
    found = list(stays.entries())

    frame = pd.DataFrame(random_rows).apply(pd.to_numeric)
    frame = frame[frame["observationoffset"].between(0, 600)]
    frame["step"] = frame["observationoffset"] // 5
    columns = {"hr": "heartrate", "map": "systemicmean", "sbp": "systemicsystolic", "dbp": "systemicdiastolic"}
    frame = frame.dropna(subset=list(columns.values()), how="all")
    assert len(found) == 4 * 39
    for entry in found:
        _, stay, vital = entry["item_id"].split("/")
        mine = frame[frame["patientunitstayid"] == int(stay)]
        middle = mine.groupby("step")[columns[vital]].median()
        steps = np.arange(mine["step"].min(), mine["step"].max() + 1)
        np.testing.assert_array_equal(entry["target"], middle.reindex(steps).to_numpy(dtype=np.float32))
        assert entry["start"] == pd.Period("2000-01-01 00:00", "5min") + int(steps[0])
    duplicates = frame.groupby(["patientunitstayid", "observationoffset"])[list(columns.values())].count()
    assert stays.counts["grid"]["values at a minute that has one"] == (duplicates - 1).clip(lower=0).to_numpy().sum()

    # The same rows in another order, their values on disk between.
    rows = np.random.default_rng(1).permutation(np.array(random_rows, dtype=object))
    download("vitalPeriodic", rows)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    other = load_eicu(folder, cuff="never", scratch=scratch)
    for one, again in zip(found, other.entries(), strict=True):
        assert (one["item_id"], one["start"]) == (again["item_id"], again["start"])
        np.testing.assert_array_equal(one["target"], again["target"])
    assert any(scratch.iterdir())
    for wrong in (scratch, tmp_path / "gone"):
        with fails(f"scratch '{wrong}' is no folder, or one that holds rows; name an empty one"):
            load_eicu(folder, cuff="never", scratch=wrong)
    in_memory, on_disk = (dict(one.counts["vitalPeriodic"]) for one in (stays, other))
    assert in_memory.pop("out of order") != on_disk.pop("out of order")
    assert in_memory == on_disk


def test_a_table_of_several_blocks_loses_no_row(download):
    download("patient", [patient(1, "a", discharge=40_000), patient(2, "b", discharge=40_000)])
    rows = [periodic(1 + k % 2, k // 2, 60 + k % 50) for k in range(60_000)]
    folder = download("vitalPeriodic", rows)
    stays = load_eicu(folder, vitals=["hr"], freq="1min")
    assert len(gzip.decompress((folder / "vitalPeriodic.csv.gz").read_bytes())) > 1 << 20
    found = series(stays)
    assert found["a/1/hr"] == [float(60 + k % 50) for k in range(0, 60_000, 2)]
    assert found["b/2/hr"] == [float(60 + k % 50) for k in range(1, 60_000, 2)]
    assert stays.counts["vitalPeriodic"]["out of order"] == 0


def test_names_and_headers_in_any_case_and_with_or_without_gzip(download, folder):
    expected = series(load_eicu(folder))
    for path in list(folder.iterdir()):
        header, rest = gzip.decompress(path.read_bytes()).split(b"\n", 1)
        path.unlink()
        (folder / path.name.upper().removesuffix(".GZ")).write_bytes(b"\xef\xbb\xbf" + header.upper() + b"\n" + rest)
    stays = load_eicu(folder)
    assert str(series(stays)) == str(expected)
    assert [source.name for source in stays.sources] == ["PATIENT.CSV", "VITALPERIODIC.CSV", "VITALAPERIODIC.CSV"]


def test_sources_are_hashed_whole(folder):
    sources = load_eicu(folder).sources
    assert [source.rows for source in sources] == [4, 12, 2]
    for source in sources:
        content = (folder / source.name).read_bytes()
        assert (source.bytes, source.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_file_of_several_gzip_members_is_read_to_its_end(folder):
    expected = series(load_eicu(folder))
    path = folder / "vitalPeriodic.csv.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(b"".join(gzip.compress(b"".join(lines[k : k + 5])) for k in range(0, len(lines), 5)))
    stays = load_eicu(folder)
    assert str(series(stays)) == str(expected)
    assert stays.sources[1].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_progress_counts_the_bytes(folder, capsys):
    load_eicu(folder, progress=True)
    assert "100%" in capsys.readouterr().err
    load_eicu(folder)
    assert capsys.readouterr().err == ""


def test_missing_tables_are_named(download, tmp_path):
    with fails(f"folder '{tmp_path / 'gone'}' does not exist; give the folder of the download"):
        load_eicu(tmp_path / "gone")
    folder = download("patient", [patient(1, "a")])
    with fails(
        f"folder '{folder}' has no vitalPeriodic.csv or vitalPeriodic.csv.gz; give the folder of the download; "
        "it holds: patient.csv.gz"
    ):
        load_eicu(folder)
    download("patient", [patient(1, "a")], ending=".CSV")
    with fails(f"folder '{folder}' holds the table 'patient' twice: patient.CSV, patient.csv.gz; keep one"):
        load_eicu(folder)


@pytest.mark.parametrize(
    ("table", "column", "wrong", "hint"),
    [
        ("vitalPeriodic", "heartrate", "heart_rate", "; did you mean 'heart_rate'?"),
        ("vitalPeriodic", "observationoffset", "zzz", ";"),
        ("vitalAperiodic", "noninvasivemean", "mean", ";"),
        ("patient", "uniquepid", "uniqepid", "; did you mean 'uniqepid'?"),
    ],
)
def test_a_missing_column_is_named(folder, table, column, wrong, hint):
    path = folder / f"{table}.csv.gz"
    text = gzip.decompress(path.read_bytes()).decode().replace(column, wrong, 1)
    path.write_bytes(gzip.compress(text.encode()))
    columns = ", ".join(text.splitlines()[0].split(","))
    if table == "vitalAperiodic":
        hint = re.search(r"in '.*'(; did.*\?|;) columns", _message(folder))[1]
    with fails(f"column {column!r} is missing in '{path}'{hint} columns: {columns}"):
        load_eicu(folder)


def _message(folder):
    with pytest.raises(ValueError, match="missing") as caught:
        load_eicu(folder)
    return str(caught.value)


def test_a_cell_that_is_no_number_is_named(download, folder):
    for column, value in (("heartrate", "fast"), ("observationoffset", "12:30")):
        row = {**periodic(5, 3, 70), column: value}
        download("vitalPeriodic", [periodic(8, 4, 80), row])
        path = re.escape(str(folder / "vitalPeriodic.csv.gz"))
        with pytest.raises(
            ValueError,
            match=f"^'{path}' cannot be read: column {column!r}: (Row #3: )?CSV conversion error to double: "
            f"invalid value '{value}'; correct the cell, or leave it empty$",
        ):
            load_eicu(folder)


def test_damaged_files_are_refused(folder):
    path = folder / "vitalPeriodic.csv.gz"
    whole = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 10**9, 20_000)
    long = gzip.compress(gzip.decompress(whole) + "".join(f"1,8,4,,,{n}{',' * 13}\n" for n in noise).encode())
    for content, part in (
        (long[:-5000], "cannot be read: "),
        (b"not gzip at all", "cannot be read: Not a gzipped file"),
        (b"", "is missing"),
        (gzip.compress(gzip.decompress(whole) + b"1,2,3\n"), "Expected 19 columns, got 3"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(part)) as caught:
            load_eicu(folder)
        assert f"'{path}'" in str(caught.value)


def test_stays_must_have_one_patient_each(download, folder):
    path = folder / "patient.csv.gz"
    for rows, message in [
        ([], f"'{path}' holds no rows; give a table with at least one stay"),
        (
            [patient(1, "a"), patient(3, "b"), patient(3, "c")],
            f"patientunitstayid 3 occurs 2 times in '{path}' (1 such stays); keep one row a stay",
        ),
        (
            [patient(1, "a"), patient(3, "")],
            f"uniquepid of patientunitstayid 3 in '{path}' is '', which cannot name a patient (1 such rows); without "
            "it stays cannot be divided by patient",
        ),
        (
            [patient(4, "a/b")],
            f"uniquepid of patientunitstayid 4 in '{path}' is 'a/b', which cannot name a patient (1 such rows); "
            "without it stays cannot be divided by patient",
        ),
        (
            [patient(1, "a"), patient("", "b")],
            f"patientunitstayid of row 2 in '{path}' is not a whole number (1 such rows)",
        ),
        (
            [patient(1, "a", "CABG")],
            f"no stay of '{path}' is in the cohort 'sepsis'; give cohort='all', or another file",
        ),
    ]:
        download("patient", rows)
        with fails(message):
            load_eicu(folder)


def test_a_patient_may_be_called_na(download):
    download("patient", [patient(1, "NA"), patient(2, "nan")])
    folder = download("vitalPeriodic", [periodic(1, 0, 60), periodic(2, 0, 61)])
    assert set(series(load_eicu(folder, vitals=["hr"]))) == {"NA/1/hr", "nan/2/hr"}


def test_a_wrong_time_makes_no_grid_of_centuries(download):
    download("patient", [patient(1, "a", discharge=""), patient(2, "b", discharge=10**15)])
    rows = [periodic(stay, offset, 60) for stay in (1, 2) for offset in (0, 525_600, 525_601, 10**12)]
    stays = load_eicu(download("vitalPeriodic", rows), vitals=["hr"], freq="h")
    assert {name: len(values) for name, values in series(stays).items()} == {"a/1/hr": 8761, "b/2/hr": 8761}
    assert stays.counts["vitalPeriodic"]["after discharge"] == 4


def test_infinite_values_are_missing(download):
    download("patient", [patient(1, "a")])
    rows = [periodic(1, 0, 60), periodic(1, 5, "inf"), periodic(1, 10, "1e39"), periodic(1, 15, 61)]
    stays = load_eicu(download("vitalPeriodic", rows), vitals=["hr"])
    np.testing.assert_array_equal(series(stays)["a/1/hr"], [60, NAN, NAN, 61])
    assert stays.counts["vitalPeriodic"]["without a value"] == 2


def test_wrong_options_are_named(folder):
    names = "hr, map, sbp, dbp, resp, o2sat"
    for options, message in [
        ({"vitals": ["pulse"]}, f"vital 'pulse' is unknown; known: {names}"),
        ({"vitals": []}, f"vitals () must name each vital sign once; known: {names}"),
        ({"vitals": ["hr", "hr"]}, f"vitals ('hr', 'hr') must name each vital sign once; known: {names}"),
        ({"cohort": "icu"}, "cohort 'icu' is unknown; known: sepsis, all"),
        ({"cuff": "yes"}, "cuff 'yes' is unknown; known: gaps, stays, never"),
        (
            {"freq": "7min"},
            "freq '7min' is not a step of whole minutes that divides a day; give one like '5min' or 'h'",
        ),
        ({"freq": "30s"}, "freq '30s' is not a step of whole minutes that divides a day; give one like '5min' or 'h'"),
        ({"freq": "M"}, "freq 'M' is not a step of whole minutes that divides a day; give one like '5min' or 'h'"),
    ]:
        with fails(message):
            load_eicu(folder, **options)
    with fails(f"vital 'resp' was not read; read: {'hr, map, sbp, dbp'}"):
        next(load_eicu(folder).entries(["resp"]))


@pytest.mark.skipif(not REAL.is_dir(), reason="the eICU-CRD demo, ../shared/data, is not on this machine")
def test_the_demo_has_the_counts_of_its_readme():
    stays = load_eicu(REAL, cohort="all")
    rows = {source.name: source.rows for source in stays.sources}
    assert rows == {"patient.csv.gz": 2520, "vitalPeriodic.csv.gz": 19, "vitalAperiodic.csv.gz": 274_088}
    assert stays.counts["stays"] == {"in the table": 2520, "in the cohort": 2520}
    # "Half of them out of time order"; the same number as by a group-wise difference in pandas.
    table = pd.read_csv(REAL / "vitalAperiodic.csv.gz")
    patients = pd.read_csv(REAL / "patient.csv.gz").set_index("patientunitstayid")
    offset, stay = table["observationoffset"], table["patientunitstayid"]
    unordered = int((table.groupby("patientunitstayid")["observationoffset"].diff() < 0).sum())
    pressures = table[["noninvasivemean", "noninvasivesystolic", "noninvasivediastolic"]]
    inside = (offset >= 0) & (offset <= stay.map(patients["unitdischargeoffset"]))
    assert stays.counts["vitalAperiodic"] == {
        "rows": 274_088,
        "of an unknown stay": 0,
        "of a stay outside the cohort": 0,
        "without a time": 0,
        "before admission": int((offset < 0).sum()),
        "after discharge": int((offset > stay.map(patients["unitdischargeoffset"])).sum()),
        "without a value": int((inside & pressures.isna().all(axis=1)).sum()),
        "kept": 242_448,
        "out of order": unordered,
    }
    assert 0.49 < unordered / 274_088 < 0.51
    assert stays.counts["vitalPeriodic"]["kept"] == 19

    sepsis = load_eicu(REAL)
    assert sepsis.counts["stays"]["in the cohort"] == 288
    patients_found = {stay.patient for stay in sepsis}
    assert patients_found <= set(patients["uniquepid"])
    values = np.concatenate([entry["target"] for entry in sepsis.entries(["map"])])
    assert 70 < np.nanmedian(values) < 85
