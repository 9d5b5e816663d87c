from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gluonts.model.predictor import Predictor

from gluonts_peft import PeftPredictor, backtest
from gluonts_peft.backtesting import SeasonalNaive
from gluonts_peft.estimator import PeftEstimator
from gluonts_peft.series.entries import UnusableWarning
from gluonts_peft.trials import DataSpec, TrialSpec, load_data, run_trial
from gluonts_peft.trials.run import windows_file
from gluonts_peft.vitals import load_hourly, patient_of

DATA = {"patients": 12, "hours": 12, "vital": "hr", "windows": 2}
TRAINING = {"max_epochs": 2, "num_batches_per_epoch": 3, "batch_size": 8, "device": "cpu"}


def spec(adapter: Any = "lora", **changes: Any) -> TrialSpec:
    form = {"family": "chronos", "checkpoint": "bolt-nano", "prediction_length": 12, "context_length": 36}
    return TrialSpec(**{**form, "adapter": adapter, "training": TRAINING, "data": DATA, **changes})


def test_a_trial_leaves_scores_predictor_and_windows(tmp_path: Path) -> None:
    trial = spec()
    result = run_trial(trial, tmp_path)
    data = load_data(trial.data)

    assert result.status == "finished"
    assert result.spec == trial
    assert result.counts["windows"] == 2 * len(data.test)
    assert result.data_fingerprint == data.fingerprint
    assert result.gate is not None
    assert result.verdict is not None
    assert result.gate["passed"] is (result.verdict.word != "no evidence")
    assert (result.verdict.unit, result.verdict.units) == ("patients", len(data.validation))
    assert (result.epochs, result.steps) == (2, 6)
    assert result.trainable_parameters
    assert result.peak_memory_mb
    assert result.base is not None
    assert result.base["checkpoint"] == "bolt-nano"
    assert {"gluonts-peft", "gluonts-peft-chronos", "torch", "python"} <= set(result.versions)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "examples.json",
        "predictor",
        "result.json",
        "windows.parquet",
    ]

    # The stored predictor is the one that was scored, whatever the gate said.
    predictor = Predictor.deserialize(tmp_path / "predictor")
    assert isinstance(predictor, PeftPredictor)
    again = backtest(predictor, data.test, windows=2).iloc[0]
    for name, value in result.scores.items():
        assert value == pytest.approx(again[name], rel=1e-5), name

    windows = pd.read_parquet(tmp_path / "windows.parquet")
    assert len(windows) == result.counts["windows"]
    assert set(windows["item_id"]) == {entry["item_id"] for entry in data.test}
    assert np.isfinite(windows["MAE[0.5]"]).all()


def test_examples_are_what_surrounds_the_forecast(tmp_path: Path) -> None:
    trial = spec("none")
    run_trial(trial, tmp_path)
    entries = {entry["item_id"]: entry for entry in load_data(trial.data).test}
    examples = json.loads((tmp_path / "examples.json").read_text())
    assert [example["kind"] for example in examples] == ["spaced"] * 3 + ["best"] * 3 + ["worst"] * 3
    assert len({(example["item_id"], example["start"]) for example in examples[:3]}) == 3
    errors = np.sort(pd.read_parquet(tmp_path / "windows.parquet")["MAE[0.5]"])
    assert [example["MAE"] for example in examples[3:]] == [*errors[:3], *errors[:-4:-1]]
    for example in examples:
        entry = entries[example["item_id"]]
        at = next(i for i in range(len(entry["target"])) if str(entry["start"] + i) == example["start"])
        target = [None if math.isnan(value) else float(value) for value in entry["target"]]
        assert example["label"] == target[at : at + 12]
        assert example["history"] == target[at - 24 : at]
        low, median, high = (np.array(example["quantiles"][level]) for level in ("0.1", "0.5", "0.9"))
        assert np.all(low <= median)
        assert np.all(median <= high)


def test_zero_shot_trains_nothing_and_has_no_gate(tmp_path: Path) -> None:
    result = run_trial(spec("none"), tmp_path)
    assert (result.trainable_parameters, result.steps, result.gate) == (0, 0, None)


def test_a_baseline_is_scored_on_the_same_windows(tmp_path: Path) -> None:
    trial = spec("none", family="baseline", checkpoint="last_value")
    result = run_trial(trial, tmp_path)
    expected = backtest(SeasonalNaive(12, 1), load_data(trial.data).test, windows=2)
    assert result.scores["MAE[0.5]"] == expected["MAE[0.5]"].item()
    assert (result.trainable_parameters, result.adapter, result.peak_memory_mb) == (None, None, None)


def test_the_same_seed_gives_the_same_scores(tmp_path: Path) -> None:
    one, same, other = (run_trial(spec(seed=seed), tmp_path / name) for seed, name in ((1, "a"), (1, "b"), (2, "c")))
    assert one.scores == same.scores
    assert one.scores != other.scores


def test_a_finished_trial_is_read_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_trial(spec(), tmp_path)
    before = (tmp_path / "result.json").read_bytes()
    monkeypatch.setattr(PeftEstimator, "train", lambda *_, **__: pytest.fail("was run again"))
    assert run_trial(spec(), tmp_path) == first
    assert (tmp_path / "result.json").read_bytes() == before


def test_the_folder_of_another_trial_is_refused(tmp_path: Path) -> None:
    run_trial(spec("none"), tmp_path)
    message = f"folder '{tmp_path}' holds another trial, 'bolt-nano none hr seed 0'; name another folder"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run_trial(spec(), tmp_path)


KILL = """
import json, os, signal, sys
from gluonts_peft import keeper
from gluonts_peft.trials import TrialSpec, run_trial

save = keeper.Keeper.on_train_epoch_end

def die(self, trainer, module):
    save(self, trainer, module)
    os.kill(os.getpid(), signal.SIGKILL)

keeper.Keeper.on_train_epoch_end = die
run_trial(TrialSpec(**json.loads(sys.argv[1])), sys.argv[2])
"""


def test_a_trial_that_was_killed_in_training_goes_on(tmp_path: Path) -> None:
    trial = spec()
    undisturbed = run_trial(trial, tmp_path / "undisturbed")
    killed = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILL, json.dumps(trial.normal_form()), str(killed)], capture_output=True
    )
    assert done.returncode == -9, done.stderr.decode()
    assert not (killed / "result.json").exists()
    assert (killed / "training" / "last.ckpt").is_file()
    resumed = run_trial(trial, killed)
    assert (resumed.epochs, resumed.steps) == (2, 6)
    for name, value in undisturbed.scores.items():
        assert resumed.scores[name] == pytest.approx(value, rel=1e-5), name
    assert not (killed / "training").exists()


def test_an_attempt_that_ended_before_its_result_is_no_obstacle(tmp_path: Path) -> None:
    result = run_trial(spec(), tmp_path)
    (tmp_path / "result.json").unlink()
    assert run_trial(spec(), tmp_path).scores == result.scores


def test_an_option_the_adapter_does_not_know_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"option 'rr' is unknown; did you mean 'r'\?"):
        run_trial(spec({"name": "lora", "rr": 2}), tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_patients_are_never_in_two_parts_and_equal_specs_are_loaded_once() -> None:
    both = DataSpec(patients=12, hours=6)
    data = load_data(both)
    parts = [{patient_of(entry["item_id"]) for entry in part} for part in (data.train, data.validation, data.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 12
    assert load_data(DataSpec(patients=12, hours=6)) is data


def _write(path: Path, shift: float) -> None:
    stamps = pd.date_range("2024-01-01", periods=40, freq="D").strftime("%Y-%m-%d")
    rows = [f"{item},{stamp},{shift + number}" for item in "abcdefghij" for number, stamp in enumerate(stamps)]
    path.write_text("\n".join(["item_id,timestamp,target", *rows]) + "\n")


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path, where: str) -> None:
    data = {"fractions": (0.6, 0.2, 0.2)}
    if where == "file":
        path, first, second = tmp_path / "data.csv", 1.0, 2.0
        wanted = DataSpec(source="file", path=str(path), **data)
        write = _write
    else:
        folder = tmp_path / "folder"
        folder.mkdir()
        wanted, path, first, second = DataSpec(source="file", path=str(folder), **data), folder / "data.json", 1.0, 2.0
        (folder / "metadata.json").write_text('{"freq": "D"}')

        def write(path: Path, shift: float) -> None:
            lines = [{"item_id": i, "start": "2024-01-01", "target": [shift] * 9} for i in "abcdefghij"]
            path.write_text("\n".join(map(json.dumps, lines)) + "\n")

    # Of equal length, so that sizes do not tell.
    write(path, first)
    before = load_data(wanted)
    assert load_data(wanted) is before
    write(path, second)
    after = load_data(wanted)
    assert after.test[0]["target"][0] == before.test[0]["target"][0] + 1.0
    assert after.fingerprint != before.fingerprint


def test_a_season_of_the_data_is_used_and_earlier_specs_keep_their_hash() -> None:
    plain = spec()
    assert "season" not in plain.normal_form()["data"]
    assert plain.hash() == spec(data={**DATA, "season": None}).hash() != spec(data={**DATA, "season": 12}).hash()
    assert DataSpec(**{**DATA, "season": 12}).normal_form()["season"] == 12


def test_seasonal_naive_follows_the_frequency_and_the_option(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    stamps = pd.date_range("2024-01-01", periods=40, freq="D").strftime("%Y-%m-%d")
    rows = [f"{i},{stamp},{number % 7 + 1}" for i in "abcdefghij" for number, stamp in enumerate(stamps)]
    path.write_text("\n".join(["item_id,timestamp,target", *rows]) + "\n")
    naive = {"family": "baseline", "checkpoint": "seasonal_naive", "adapter": "none", "prediction_length": 10}
    data = {"source": "file", "path": str(path), "fractions": (0.6, 0.2, 0.2), "windows": 1}
    weekly = run_trial(TrialSpec(**naive, data=data), tmp_path / "weekly")
    assert weekly.scores["MAE[0.5]"] == 0.0
    assert weekly.counts["seasonless_windows"] == 0
    shifted = run_trial(TrialSpec(**naive, data={**data, "season": 5}), tmp_path / "five")
    assert shifted.scores["MAE[0.5]"]
    last = run_trial(TrialSpec(**naive, data={**data, "season": 39}), tmp_path / "none")
    assert last.counts["seasonless_windows"] == last.counts["windows"] == 2


def test_the_fingerprint_follows_the_data() -> None:
    base = load_data(DataSpec(patients=12, hours=6)).fingerprint
    for changed in ({"seed": 1}, {"split_seed": 1}, {"vital": "hr"}, {"hours": 7}):
        assert load_data(DataSpec(**{"patients": 12, "hours": 6, **changed})).fingerprint != base
    assert load_data(DataSpec(patients=12, hours=6, windows=2)).fingerprint == base


def test_fewer_training_series_are_a_part_of_more_and_nothing_else_changes() -> None:
    base = {"patients": 20, "hours": 6, "vital": "hr"}
    whole, six, three, short = (
        load_data(DataSpec(**base, **limits))
        for limits in ({}, {"train_series": 6}, {"train_series": 3}, {"train_steps": 10})
    )
    names = [{entry["item_id"] for entry in data.train} for data in (three, six, whole)]
    assert [len(each) for each in names] == [3, 6, 14]
    assert names[0] < names[1] < names[2]
    for data in (six, three, short):
        for part in ("validation", "test"):
            assert [e["item_id"] for e in getattr(data, part)] == [e["item_id"] for e in getattr(whole, part)]
    ends = {entry["item_id"]: entry for entry in short.train}
    for full in whole.train:
        end = full["target"][-10:]
        # Where nothing was observed in them there is no series.
        assert (full["item_id"] in ends) is bool(np.isfinite(end).any())
        if full["item_id"] in ends:
            entry = ends[full["item_id"]]
            assert np.array_equal(entry["target"], end, equal_nan=True)
            assert entry["start"] + 10 == full["start"] + len(full["target"])
    with pytest.raises(ValueError, match="^train_series 15 is more than the 14 training series that there are$"):
        load_data(DataSpec(**base, train_series=15))


def test_an_ensemble_is_the_weighted_mean_of_quantiles(tmp_path: Path) -> None:
    quantiles = []
    for name, changes in (("zero", {}), ("tuned", {}), ("both", {"ensemble": 0.25})):
        result = run_trial(spec("none" if name == "zero" else "lora", **changes), tmp_path / name)
        examples = json.loads((tmp_path / name / "examples.json").read_text())
        quantiles.append(np.array([list(example["quantiles"].values()) for example in examples[:3]]))
    zero_shot, tuned, both = quantiles
    assert not np.allclose(zero_shot, tuned)
    assert both == pytest.approx(0.25 * tuned + 0.75 * zero_shot, rel=1e-5)
    # What is stored, and its parameters, are the tuned model's.
    assert result.trainable_parameters
    assert (tmp_path / "both" / "predictor").is_dir()


def test_further_data_are_scored_as_if_they_were_a_trials_own(tmp_path: Path) -> None:
    other = {"source": "synthetic", "series": 20, "steps": 60, "windows": 1}
    result = run_trial(spec("none", also={"other": other}), tmp_path / "also")
    alone = run_trial(spec("none", data=other), tmp_path / "alone")
    assert alone.counts["series"] == 4
    for name, value in alone.scores.items():
        assert result.scores[f"other/{name}"] == pytest.approx(value, rel=1e-6)
    own = pd.read_parquet(tmp_path / "also" / windows_file())
    there = pd.read_parquet(tmp_path / "also" / windows_file("other"))
    pd.testing.assert_frame_equal(there, pd.read_parquet(tmp_path / "alone" / windows_file()), rtol=1e-5)
    assert set(own["item_id"]).isdisjoint(there["item_id"])
    tuned = run_trial(spec("full", also={"other": other}), tmp_path / "tuned")
    assert tuned.scores["other/MAE[0.5]"] != result.scores["other/MAE[0.5]"]


def test_memory_is_what_a_trial_adds(tmp_path: Path) -> None:
    """The ballast of an earlier trial is not counted, and a larger trial needs more."""
    ballast = np.ones(40_000_000)
    small = run_trial(spec("none"), tmp_path / "small").peak_memory_mb
    del ballast
    large = run_trial(spec("none", data={**DATA, "patients": 400, "hours": 48}), tmp_path / "large").peak_memory_mb
    assert small is not None
    assert large is not None
    assert small < 200 < 320
    assert large > small


def long_table(path: Path) -> Path:
    times = pd.date_range("2024-01-01", periods=80, freq="h")
    rows = [
        {"item_id": f"p{p}/{vital}", "timestamp": time, "target": float(i % 7 + p)}
        for p in range(10)
        for vital in ("hr", "map")
        for i, time in enumerate(times)
    ]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_a_file_is_a_source_too(tmp_path: Path) -> None:
    path = str(long_table(tmp_path / "long.csv"))
    data = load_data(DataSpec(source="file", path=path, vital="map", group="patient"))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [7, 1, 2]
    assert {entry["item_id"].split("/")[1] for entry in data.train} == {"map"}
    with pytest.raises(ValueError, match=re.escape(f"no item_id of '{path}' ends in '/resp'; name another data.vital")):
        load_data(DataSpec(source="file", path=path, vital="resp"))


def test_the_hourly_table_is_a_source_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hours = [(stay, hour, 80 + rng.normal(), 75 + rng.normal()) for stay in range(12) for hour in range(60)]
    path = tmp_path / "stays.parquet"
    pd.DataFrame(hours, columns=["stay_id", "hour", "hr", "map"]).to_parquet(path)
    trial = spec("none", data={"source": "hourly", "path": str(path), "vital": "map", "windows": 1})
    assert run_trial(trial, tmp_path / "trial").counts["series"] == len(load_data(trial.data).test) == 3


@pytest.fixture
def stays(tmp_path: Path) -> dict[str, Any]:
    """Forty patients with two stays each; every fifth patient has no pressure, every seventh stay is short."""
    rng = np.random.default_rng(0)
    rows = [
        (stay, hour, 80 + rng.normal(), np.nan if stay // 2 % 5 == 0 else 75 + rng.normal())
        for stay in range(80)
        for hour in range(20 if stay % 7 == 0 else 50)
    ]
    pd.DataFrame(rows, columns=["stay_id", "hour", "hr", "map"]).to_parquet(tmp_path / "stays.parquet")
    whose = pd.DataFrame({"patientunitstayid": range(80), "uniquepid": [f"p{stay // 2}" for stay in range(80)]})
    whose.to_csv(tmp_path / "patient.csv", index=False)
    path, patients = str(tmp_path / "stays.parquet"), str(tmp_path / "patient.csv")
    return {"source": "hourly", "path": path, "patients": patients, "windows": 1}


def owners(entries: list[dict[str, Any]]) -> set[str]:
    return {patient_of(entry["item_id"]) for entry in entries}


def test_stays_of_a_patient_are_in_one_part_where_a_table_says_whose_they_are(stays: dict[str, Any]) -> None:
    known = load_data(DataSpec(**stays))
    assert known.unit == "patient"
    assert len(owners(known.train) | owners(known.validation) | owners(known.test)) == 40
    assert owners(known.train).isdisjoint(owners(known.test) | owners(known.validation))
    assert owners(known.validation).isdisjoint(owners(known.test))
    unknown = load_data(DataSpec(**{**stays, "patients": None}))
    assert unknown.unit == "stay"
    whose = [{int(stay) // 2 for stay in owners(part)} for part in (unknown.train, unknown.test)]
    assert not whose[0].isdisjoint(whose[1])
    # What the table says is part of the data.
    table = pd.read_csv(stays["patients"])
    other = stays["patients"].replace("patient.csv", "other.csv")
    table.assign(uniquepid=table["uniquepid"].replace("p7", "q7")).to_csv(other, index=False)
    prints = {load_data(DataSpec(**{**stays, "patients": each})).fingerprint for each in (None, other)}
    assert known.fingerprint not in prints
    assert len(prints) == 2
    assert load_data(DataSpec(**{**stays, "group": "item"})).unit == "series"


@pytest.mark.parametrize("source", ["hourly", "file"])
def test_a_patient_is_in_the_same_part_for_every_vital_sign(stays: dict[str, Any], source: str, tmp_path: Path) -> None:
    if source == "file":
        rows = [
            {"item_id": entry["item_id"], "timestamp": time, "target": 1.0}
            for entry in load_hourly(stays["path"], patients=stays["patients"])
            for time in pd.date_range("2024-01-01", periods=4, freq="h")
        ]
        pd.DataFrame(rows).to_csv(tmp_path / "long.csv", index=False)
        stays = {"source": "file", "path": str(tmp_path / "long.csv"), "group": "patient"}
    rate, pressure = (load_data(DataSpec(**stays, vital=vital)) for vital in ("hr", "map"))
    for part, others in (("test", ("train", "validation")), ("validation", ("train", "test"))):
        there = owners(getattr(pressure, part))
        assert there < owners(getattr(rate, part))
        for other in others:
            assert there.isdisjoint(owners(getattr(rate, other)))
    if source == "hourly":
        # Nor do shorter stays, of which the other set may have more, move anybody.
        more = load_data(DataSpec(**stays, vital="map", min_hours=1))
        assert len(more.test) > len(pressure.test)
        assert owners(more.test).isdisjoint(owners(rate.train) | owners(rate.validation))


def test_further_data_of_the_same_file_share_no_patient_with_training(stays: dict[str, Any], tmp_path: Path) -> None:
    also = {"pressure": {**stays, "patients": None, "vital": "map"}}
    trial = spec("none", data={**stays, "vital": "hr"}, also=also)
    # The table is that of the same file.
    assert trial.also["pressure"].patients == stays["patients"]
    result = run_trial(trial, tmp_path / "trial")
    assert result.units == {"": "patient", "pressure": "patient"}
    there = set(pd.read_parquet(tmp_path / "trial" / windows_file("pressure"))["item_id"].map(patient_of))
    data = load_data(trial.data)
    assert there.isdisjoint(owners(data.train) | owners(data.validation))
    assert there < owners(data.test)


def test_a_part_without_a_series_is_an_error(stays: dict[str, Any]) -> None:
    frame = pd.read_parquet(stays["path"])
    frame.loc[frame["stay_id"] > 3, "map"] = np.nan
    frame.to_parquet(stays["path"])
    with pytest.raises(ValueError, match=r"no series is left in the \w+ part: [12] of 40 groups have one; use"):
        load_data(DataSpec(**stays, vital="map", min_hours=1))


def test_series_in_which_the_model_would_see_nothing_are_left_out_for_all(tmp_path: Path) -> None:
    path = tmp_path / "gap.csv"
    frame = pd.read_csv(long_table(path))
    frame = frame[frame["item_id"].str.endswith("/hr")].reset_index(drop=True)
    changes = {
        "data": {"source": "file", "path": str(path), "windows": 1},
        "prediction_length": 6,
        "context_length": 12,
    }
    frame.to_csv(path, index=False)
    gap = load_data(DataSpec(**changes["data"])).test[0]["item_id"]  # type: ignore[arg-type]
    steps = frame.groupby("item_id").cumcount()
    path = tmp_path / "holes.csv"
    frame.loc[(frame["item_id"] == gap) & steps.between(60, 73), "target"] = np.nan
    frame.to_csv(path, index=False)
    changes["data"] = {"source": "file", "path": str(path), "windows": 1}
    zero_shot = run_trial(spec("none", **changes), tmp_path / "zero-shot")
    last = run_trial(spec("none", family="baseline", checkpoint="last_value", **changes), tmp_path / "last")
    for result in (zero_shot, last):
        assert (result.counts["series"], result.counts["skipped_nothing_seen"]) == (1, 1)


def test_series_of_no_use_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    stamps = pd.date_range("2024-01-01", periods=80, freq="h")
    rng = np.random.default_rng(0)
    parts = [
        pd.DataFrame({"item_id": f"s{i}", "timestamp": stamps[-steps:], "target": rng.normal(size=steps)})
        for i, steps in enumerate([80] * 16 + [9] * 4)
    ]
    pd.concat(parts).to_csv(path, index=False)
    data = {"source": "file", "path": str(path), "fractions": (0.5, 0.2, 0.3), "windows": 1, "split_seed": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusableWarning)
        result = run_trial(spec(data=data), tmp_path / "trial")
    short = {f"s{i}" for i in range(16, 20)}
    found = load_data(spec(data=data).data)
    for name, part in (("training", found.train), ("validation", found.validation)):
        assert result.counts[f"{name}_skipped"] == sum(each["item_id"] in short for each in part)
    assert result.counts["skipped_too_short"] == sum(each["item_id"] in short for each in found.test)
    assert sum(result.counts[key] for key in ("training_skipped", "validation_skipped", "skipped_too_short")) == 4
