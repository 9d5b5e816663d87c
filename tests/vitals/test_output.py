"""Folders of Arrow files: what is in them, that they appear whole or not at all, the verbs, and the memory it takes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from gluonts_peft import cli
from gluonts_peft.series.table import read_dataset, split_by_item
from gluonts_peft.vitals import PLAUSIBLE, STEPS, convert, load_eicu, load_hourly, patient_of, prepare, write

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
SEARCHES = Path(__file__).parents[2] / "ray_configs" / "searches"
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "bench_vitals.py"
LOST = (
    "no series is left to write to '{}': of 30 stays 30 have values, 30 are left after 'plausibility', 30 are left "
    "after 'fill', 30 are left after 'scale', 30 are left after 'smooth', 0 are left after 'windows'"
)
SPLIT = {"fractions": [0.8, 0.1, 0.1], "seed": 42}


def fails(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="gluonts-peft")


@pytest.fixture
def folder(download):
    """Twenty patients with 30 stays of ten hours."""
    rng = np.random.default_rng(0)
    stays = {number: f"002-{number % 20}" for number in range(1, 31)}
    download(
        "patient",
        [
            {
                "patientunitstayid": number,
                "uniquepid": name,
                "unitdischargeoffset": 600,
                "apacheadmissiondx": "Sepsis, GI",
            }
            for number, name in stays.items()
        ],
    )
    rows = []
    for number in stays:
        for offset in rng.permutation(np.arange(0, 600, 5)):
            mean = int(rng.normal(80, 10))
            systolic = mean if rng.random() < 0.02 else mean + 40
            rows.append(
                {
                    "patientunitstayid": number,
                    "observationoffset": offset,
                    "heartrate": int(rng.normal(80, 10)),
                    "systemicsystolic": systolic,
                    "systemicmean": mean,
                    "systemicdiastolic": mean - 20,
                }
            )
    download("vitalAperiodic", [])
    return download("vitalPeriodic", rows)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_share_no_patient_and_are_read_back(folder, tmp_path):
    out = tmp_path / "out"
    manifest = convert(load_eicu, folder, out)
    parts = {part: read_dataset(out / part) for part in ("train", "validation", "test")}
    patients = {part: {patient_of(entry["item_id"]) for entry in entries} for part, entries in parts.items()}
    assert {part: len(found) for part, found in patients.items()} == {"train": 16, "validation": 2, "test": 2}
    assert len(set().union(*patients.values())) == 20
    # The very split of the core.
    names = [{"item_id": name} for name in sorted(set().union(*patients.values()))]
    for found, group in zip(patients.values(), split_by_item(names, seed=42), strict=True):
        assert found == {entry["item_id"] for entry in group}

    expected = {
        entry["item_id"]: entry for entry in prepare(load_eicu(folder), list(STEPS)[1:5] + ["windows"]).entries()
    }
    expected = {name: entry for name, entry in expected.items() if name.endswith(("/hr", "/map"))}
    found = {entry["item_id"]: entry for entries in parts.values() for entry in entries}
    assert sorted(found) == sorted(expected)
    for name, entry in found.items():
        assert re.fullmatch(r"002-\d+/\d+/0/(hr|map)", name)
        assert entry["start"] == expected[name]["start"]
        assert entry["target"].dtype == np.float32
        np.testing.assert_array_equal(entry["target"], expected[name]["target"])
        assert len(entry["target"]) == 108
        assert 0 <= entry["target"].min() <= entry["target"].max() <= 1

    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert set(manifest) == {
        *("dataset", "cohort", "cuff", "freq", "vitals", "sources", "steps", "counts", "split", "parts", "versions")
    }
    assert (manifest["dataset"], manifest["vitals"], manifest["split"]) == ("eicu", ["hr", "map"], SPLIT)
    for part, entries in parts.items():
        stays = {tuple(entry["item_id"].split("/")[:2]) for entry in entries}
        assert manifest["parts"][part] == {
            "patients": len(patients[part]),
            "stays": len(stays),
            "windows": len(stays),
            "series": len(entries),
            "points": 108 * len(entries),
            "missing": 0,
        }
    contradictions = manifest["counts"]["plausibility"]["map set to missing"]
    assert contradictions == manifest["counts"]["plausibility"]["systolic <= mean"] > 20
    assert manifest["counts"]["fill"]["filled forward"] + manifest["counts"]["fill"]["filled backward"] == (
        3 * contradictions
    )
    assert str(tmp_path) not in json.dumps(manifest)


def test_the_same_again_is_the_same_bytes_with_rows_in_memory_or_on_disk(folder, tmp_path):
    convert(load_eicu, folder, tmp_path / "one")
    (tmp_path / "two").mkdir()
    stays = prepare(load_eicu(folder))
    write(stays, tmp_path / "two", vitals=["hr", "map"])
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert set(files(tmp_path / "one")) == {
        *("metadata.json", "manifest.json", "train/data.arrow", "validation/data.arrow", "test/data.arrow")
    }
    write(stays, tmp_path / "three", vitals=["hr", "map"], seed=1)
    assert files(tmp_path / "one")["test/data.arrow"] != files(tmp_path / "three")["test/data.arrow"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download", "one", "three", "two"]


def test_one_part_for_trials_which_divide_by_patient(folder, tmp_path):
    from gluonts_peft.backtesting import SeasonalNaive, backtest
    from gluonts_peft.trials import DataSpec
    from gluonts_peft.trials.data import load_data

    convert(load_eicu, folder, tmp_path / "out", fractions=None)
    convert(load_eicu, folder, tmp_path / "parts")
    data = {"source": "file", "path": str(tmp_path / "out" / "all"), "vital": "map", "group": "patient", "windows": 1}
    found = load_data(DataSpec(**data, fractions=(0.8, 0.1, 0.1), split_seed=42))
    # With the same fractions and seed a trial's parts are those that are written by default.
    for part, entries in {"train": found.train, "validation": found.validation, "test": found.test}.items():
        written = [entry for entry in read_dataset(tmp_path / "parts" / part) if entry["item_id"].endswith("/map")]
        assert [entry["item_id"] for entry in entries] == [entry["item_id"] for entry in written]
    scores = backtest(SeasonalNaive(36, season_length=1), found.test, windows=1)
    assert scores.attrs["windows"] == len(found.test) > 0
    assert np.isfinite(scores["MSE[0.5]"]).all()


def test_trials_read_the_whole_folder_and_refuse_what_is_divided_or_would_divide_a_patient(folder, tmp_path):
    from gluonts_peft.trials import DataSpec, load_data

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    convert(load_eicu, folder, whole, fractions=None)
    convert(load_eicu, folder, parts)
    data = {"source": "file", "vital": "map", "windows": 1}
    found = [load_data(DataSpec(**data, group="patient", path=str(path))) for path in (whole, whole / "all")]
    assert found[0].fingerprint == found[1].fingerprint
    assert {entry["item_id"] for entry in read_dataset(whole)} == {
        entry["item_id"] for entry in read_dataset(whole / "all")
    }
    with fails(
        f"path '{parts}' holds vital signs that are divided already, into train, validation, test; trials divide by "
        "themselves: prepare them with --fractions '' and give the folder 'all'"
    ):
        load_data(DataSpec(**data, group="patient", path=str(parts)))
    for path in (whole, whole / "all", parts / "train", whole / "all" / "data.arrow"):
        top = whole if whole in (path, *path.parents) else parts
        with fails(
            f"path '{path}' holds prepared vital signs ('{top / 'manifest.json'}'), several series of a patient, who "
            "would be in several parts; write data.group: patient"
        ):
            load_data(DataSpec(**data, path=str(path)))


def test_a_prepared_patient_is_in_the_same_part_for_every_vital_sign(folder, tmp_path):
    from gluonts_peft.trials import DataSpec, load_data

    # Two patients without pressures, one without a heart rate.
    path = folder / "vitalPeriodic.csv.gz"
    frame = pd.read_csv(path)
    stay = frame["patientunitstayid"] % 20
    frame.loc[stay.isin([3, 4]), ["systemicsystolic", "systemicmean", "systemicdiastolic"]] = np.nan
    frame.loc[stay == 5, "heartrate"] = np.nan
    frame.to_csv(path, index=False)
    convert(load_eicu, folder, tmp_path / "out", fractions=None)
    convert(load_eicu, folder, tmp_path / "parts")
    options = {"source": "file", "path": str(tmp_path / "out" / "all"), "group": "patient", "split_seed": 42}
    for vital in ("hr", "map"):
        found = load_data(DataSpec(**options, vital=vital, fractions=(0.8, 0.1, 0.1)))
        for part in ("train", "validation", "test"):
            written = [entry["item_id"] for entry in read_dataset(tmp_path / "parts" / part)]
            assert [entry["item_id"] for entry in getattr(found, part)] == [
                item for item in written if item.endswith(f"/{vital}")
            ]


@pytest.mark.parametrize("name", ["lora_tsfm", "beyond_lora"])
def test_the_ready_searches_run_on_data_prepared_as_they_say(folder, tmp_path, name):
    pytest.importorskip("ray")
    from gluonts_peft.trials import load_search, search

    path = SEARCHES / f"{name}.yaml"
    [command] = re.findall(r"gluonts-peft (vitals eicu .*)", path.read_text())
    before = load_search(path)
    arguments = [
        str(folder) if word == "eicu-crd-2.0" else word.replace("/shared/data", str(tmp_path))
        for word in shlex.split(command)
    ]
    assert run(*arguments).exit_code == 0
    data = before.base["data"]["path"].replace("/shared/data", str(tmp_path))
    tiny = {"training.max_epochs": 1, "training.num_batches_per_epoch": 2, "training.device": "cpu"}
    if "adapter.n_frequency" in before.space:
        # Matrices of the bundled model are smaller than those of the paper's.
        tiny["adapter.n_frequency"] = {**before.space["adapter.n_frequency"].model_dump(), "categories": [10]}
    changes = {
        **tiny,
        "checkpoint": "bolt-nano",
        "data.path": data,
        "num_samples": 1,
        "scheduler": "fifo",
        "searcher": "random",
    }
    ranking = search(load_search(path, changes), tmp_path / "run", serial=True)
    assert ranking["status"].tolist() == ["finished"], ranking["error"].tolist()
    assert np.isfinite(ranking[["validation MSE", "validation DTW"]].to_numpy(float)).all()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("when", ["first", "late"])
def test_a_failed_run_leaves_nothing(folder, tmp_path, monkeypatch, kind, when):
    place = tmp_path / "place"
    place.mkdir()
    calls = []

    def fail(one):
        calls.append(list(place.iterdir()))
        if when == "first" or len(calls) == 25:
            raise kind("stop")
        return [one], {}

    monkeypatch.setitem(STEPS, "fill", fail)
    with pytest.raises(kind, match="stop"):
        convert(load_eicu, folder, place / "out")
    # While it ran there was something, hidden.
    assert calls[-1]
    assert all(path.name.startswith(".out.") for path in calls[-1])
    assert list(place.iterdir()) == []


def test_a_cut_off_table_leaves_nothing(folder, tmp_path):
    path = folder / "vitalPeriodic.csv.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=re.escape(f"'{path}' cannot be read: ")):
        convert(load_eicu, folder, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_in_use_is_left_alone(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for wrong, message in [
        (out, f"out '{out}' is in use; name a new folder"),
        (out / "notes.txt", f"out '{out / 'notes.txt'}' is in use; name a new folder"),
    ]:
        with fails(message):
            convert(load_eicu, folder, wrong)
        with fails(message):
            write(load_eicu(folder), wrong)
    assert files(out) == {"notes.txt": b"mine"}


def test_parents_of_the_folder_are_made_and_go_away_with_what_failed(folder, tmp_path):
    with pytest.raises(ValueError, match="no series is left"):
        convert(load_eicu, folder, tmp_path / "a" / "b" / "out", options={"windows": {"past": 20.0}})
    assert [path.name for path in tmp_path.iterdir()] == ["download"]
    convert(load_eicu, folder, tmp_path / "a" / "b" / "out", fractions=None)
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_what_cannot_be_used_is_refused_before_a_table_is_opened(tmp_path):
    """The folder of the download does not exist."""
    for options, message in [
        (["--fractions", "0.8,0.1"], "fractions (0.8, 0.1) must be three, of train, validation, test"),
        (["--fractions", "0.8,0.1,0.2"], "fractions (0.8, 0.1, 0.2) must be at least 0 and add up to 1, as"),
        (["--seed=-1"], "seed is -1; give at least 0"),
        (["--freq", "7min"], "freq '7min' is not a step of whole minutes that divides a day; give one like '5min'"),
        (["--freq", "48min"], "windows.past is 6 hours, which is not a number of steps of 48 minutes"),
        (["--set", "windows.past=0.51"], "windows.past is 0.51 hours, which is not a number of steps of 5 minutes"),
        (["--set", "windows.past=true"], "windows.past is True; give a number"),
        (["--set", "windows.stride=often"], "windows.stride is 'often'; give a number, or leave it out"),
        (["--set", "windows.max_missing=.nan"], "windows.max_missing is nan; give a number"),
        (["--set", "smooth.points=abc"], "smooth.points is 'abc'; give a whole number"),
        (["--set", "smooth.points=2.5"], "smooth.points is 2.5; give a whole number"),
        (["--set", "smooth.method=3"], "smooth.method is 3; give a name"),
        (["--set", "smooth.method=mena"], "smooth.method 'mena' is unknown; known: mean, butterworth"),
        (["--set", "smooth.cutoff=2"], "smooth.cutoff is 2; give a share of half the sampling rate, between 0 and 1"),
        (["--set", "smooth.order=0"], "smooth.order is 0; give at least 1"),
        (["--set", "fill.limit=[1]"], "fill.limit is [1]; give a whole number, or leave it out"),
        (["--set", "fill.limit=0"], "fill.limit is 0; give at least 1, or none"),
        (["--set", "fill.backward=maybe"], "fill.backward is 'maybe'; give true or false"),
        (["--set", "scale.ranges={map: [0, 1]}"], "scale.ranges has no range for 'hr'; known: map"),
        (["--set", "scale.ranges={hrr: [0, 1]}"], "scale.ranges names 'hrr', which is unknown; known: hr, map, sbp"),
        (["--set", "scale.ranges={hr: [20]}"], "scale.ranges of 'hr' is 20; give two values, the higher one last"),
        (["--set", "scale.ranges={hr: [9, 5]}"], "scale.ranges of 'hr' is 9 to 5; give two values, the higher one"),
        (["--set", "scale.ranges={hr: [a, 5]}"], "scale.ranges of 'hr' is 'a'; give a number"),
        (["--set", "scale.ranges=5"], "scale.ranges is 5; give a range for each vital sign, as {hr: [20, 250]}"),
    ]:
        result = run("vitals", "eicu", tmp_path / "gone", "--out", tmp_path / "out", *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: {message}"), result.stderr
    with fails("ranges.ranges names 'hrr', which is unknown; known: hr, map, sbp, dbp, resp, o2sat"):
        convert(
            load_eicu, tmp_path / "gone", tmp_path / "out", steps=["ranges"], options={"ranges": {"ranges": {"hrr": 1}}}
        )
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_leave_nothing(folder, tmp_path):
    out = tmp_path / "out"
    for options, message in [
        ({"steps": ["fil"]}, "step 'fil' is unknown; known: "),
        ({"vitals": ["hr", "pulse"]}, "vital 'pulse' is unknown; known: hr, map, sbp, dbp, resp, o2sat"),
        ({"fractions": (0.5, 0.5)}, "fractions (0.5, 0.5) must be three, of train, validation, test"),
        ({"fractions": (0.8, 0.1, 0.2)}, "fractions (0.8, 0.1, 0.2) must be at least 0 and add up to 1"),
        ({"options": {"windows": {"past": 20.0}}}, LOST.format(out)),
        ({"freq": "h", "options": {"windows": {"past": 0.5}}}, "windows.past is 0.5 hours, which is not a number"),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            convert(load_eicu, folder, out, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["download"]


def test_the_verb_says_what_it_did(folder, tmp_path):
    out = tmp_path / "out"
    result = run("vitals", "eicu", folder, "--out", out, "--vital", "hr", "--steps", "ranges,fill", "--seed", "7")
    assert (result.exit_code, result.stderr) == (0, "")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert ["vitalPeriodic", "rows", "3,600"] in cells
    assert ["grid", "points with a value", "3,600"] in cells
    assert ["fill", "stays out", "30"] in cells
    assert [row[:2] for row in cells[-3:]] == [["train", "16"], ["validation", "2"], ["test", "2"]]
    assert sum(int(row[2]) for row in cells[-3:]) == 30
    assert re.search(
        rf"^3,630 rows in \d+\.\d seconds, [\d,]+ rows a second: {re.escape(str(out))}$", result.stdout, re.M
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["split"] == {**SPLIT, "seed": 7}
    assert [step["name"] for step in manifest["steps"]] == ["ranges", "fill"]
    assert {entry["item_id"].rpartition("/")[2] for entry in read_dataset(out / "train")} == {"hr"}


def test_options_of_the_verb_reach_the_steps(folder, tmp_path):
    out = tmp_path / "out"
    windows = ["--set", "windows.past=2", "--set", "windows.future=1", "--set", "smooth.method=butterworth"]
    result = run(
        "vitals", "eicu", folder, "--out", out, *windows, "--fractions", "", "--cohort", "all", "--freq", "10min"
    )
    assert result.exit_code == 0, result.output
    entries = read_dataset(out / "all")
    assert {len(entry["target"]) for entry in entries} == {18}
    assert {entry["start"].freqstr for entry in entries} == {"10min"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["steps"][-1] == {"name": "windows", "options": {"past": 2, "future": 1}}
    assert (manifest["split"], manifest["cohort"]) == (None, "all")


def test_wrong_input_to_the_verb_is_one_sentence(folder, tmp_path):
    out = tmp_path / "out"
    for options, sentence in [
        (["--set", "smooth=3"], "--set smooth=3 is not step.option=value; write e.g. --set smooth.points=5"),
        (["--set", "smooth.points"], "--set 'smooth.points' is not path=value; write e.g. --set context_length=72"),
        (["--fractions", "most"], "--fractions 'most' are not numbers; write e.g. 0.8,0.1,0.1"),
        (
            ["--steps", "fill,fil"],
            "step 'fil' is unknown; known: ranges, plausibility, fill, scale, smooth, length, win",
        ),
        (["--vital", "pulse"], "vital 'pulse' is unknown; known: hr, map, sbp, dbp, resp, o2sat"),
    ]:
        result = run("vitals", "eicu", folder, "--out", out, *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: {sentence}")
        assert result.stderr.count("\n") == 1
        assert not out.exists()
    result = run("vitals", "mimic", folder, "--out", out)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: folder '{folder}' has no icustays.csv or icustays.csv.gz; give the folder")


@pytest.mark.skipif(not DATA.is_dir(), reason="the demos, ../shared/data, are not on this machine")
def test_the_demos_are_converted(tmp_path):
    result = run("vitals", "eicu", DATA / "eicu-crd-demo-2.0.1", "--out", tmp_path / "eicu", "--vital", "map")
    assert result.exit_code == 0, result.output
    result = run("vitals", "mimic", DATA / "mimic-iii-demo-1.4", "--out", tmp_path / "mimic")
    assert result.exit_code == 0, result.output
    for name, points in (("eicu", 108), ("mimic", 9)):
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        patients = []
        for part in ("train", "validation", "test"):
            entries = read_dataset(tmp_path / name / part)
            assert {len(entry["target"]) for entry in entries} == {points}
            patients.append({patient_of(entry["item_id"]) for entry in entries})
            assert manifest["parts"][part]["patients"] == len(patients[-1])
        assert sum(map(len, patients)) == len(set().union(*patients))
        assert len(patients[0]) / sum(map(len, patients)) == pytest.approx(0.8, abs=0.01)
    manifest = json.loads((tmp_path / "mimic" / "manifest.json").read_text())
    assert {source["name"]: source["rows"] for source in manifest["sources"]} == {
        "ICUSTAYS.csv": 136,
        "PATIENTS.csv": 100,
        "CHARTEVENTS.csv.gz": 94_557,
    }


@pytest.mark.skipif(not DATA.is_dir(), reason="the real stays, ../shared/data, are not on this machine")
def test_the_hourly_stays_have_the_counts_of_their_readme(caplog):
    with caplog.at_level("INFO", logger="gluonts_peft.vitals.hourly"):
        entries = load_hourly(DATA / "vitals" / "eicu_demo_hourly.parquet", vitals=tuple(PLAUSIBLE))
    # 1,616 stays, 659 of them 48 hours or longer.
    assert "957 of 1616 stays are shorter than 48 hours and left out" in caplog.messages
    assert len({patient_of(entry["item_id"]) for entry in entries}) <= 659


def measure(rows, folder):
    command = [sys.executable, str(BENCHMARK), "--rows", str(rows), "--json", "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["counts"]["vitalPeriodic"]["rows"] == found["generated"] >= rows
    assert found["counts"]["vitalPeriodic"]["kept"] > 0.98 * rows
    return found["peak"]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc, which is not here")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    small, large = measure(500_000, tmp_path), measure(2_000_000, tmp_path)
    # Kept in memory, the values of the larger table alone would take 36 MB more.
    assert large - small < 32 << 20
    assert large < 400 << 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_million_rows_take_less_than_two_gigabytes(tmp_path):
    assert measure(20_000_000, tmp_path) < 2 << 30
