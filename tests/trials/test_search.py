"""Searches without Ray: what a trial reports and stores, how trials are ranked, and how a search goes on."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gluonts.model.predictor import Predictor
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gluonts_peft import PeftPredictor, TuningDidNotHelp, backtest
from gluonts_peft.checkpoint_io import read_checkpoint
from gluonts_peft.cli import app
from gluonts_peft.estimator import PeftEstimator
from gluonts_peft.registry import get_estimator
from gluonts_peft.trials import (
    ClusterError,
    SearchSpec,
    SpecError,
    TrialResult,
    TrialSpec,
    load_data,
    load_search,
    print_ranking,
    ranking,
    run_trial,
    search,
    searching,
)
from gluonts_peft.trials.raytune import adopt
from gluonts_peft.trials.records import Entry, Record, _fronts
from gluonts_peft.trials.searchrun import trial_key
from gluonts_peft.trials.searchtrial import run_and_report

BASE: dict[str, Any] = {
    "family": "chronos",
    "checkpoint": "bolt-nano",
    "adapter": "lora",
    "prediction_length": 6,
    "context_length": 24,
    "training": {"max_epochs": 3, "num_batches_per_epoch": 2, "batch_size": 4, "device": "cpu"},
    "data": {"patients": 20, "hours": 8, "vital": "hr", "windows": 2},
}
SPACE = {
    "adapter.name": {"space": "choice", "categories": ["lora", "bitfit"]},
    "training.learning_rate": {"space": "loguniform", "lower": 1.0e-4, "upper": 1.0e-2},
}
MAE = "MAE[0.5]"
# What does not depend on the machine.
TIMES = ["seconds"]


def spec(**changes: Any) -> SearchSpec:
    return SearchSpec(**{"base": BASE, "space": SPACE, "num_samples": 4, **changes})


def serially(wanted: SearchSpec, folder: Path) -> pd.DataFrame:
    return search(wanted, folder, serial=True, progress=False)


def traces(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = [*folder.glob("trials/*/result.json"), *folder.glob("trials/*/evaluations.json")]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_a_trial_reports_after_each_epoch_and_at_its_end(tmp_path: Path) -> None:
    trial, reports = TrialSpec(**BASE), []
    run_and_report(trial, tmp_path, reports.append, columns=[MAE, "DTW[0.5]"], where={"node": "n"})
    assert [(each["epochs"], each["finished"]) for each in reports] == [(1, False), (2, False), (2, True)]
    assert [json.loads(each["scores"])[0] for each in reports] == [each["score"] for each in reports]
    record = Record.read(tmp_path)
    assert [(each["epochs"], each["node"]) for each in record.evaluations] == [(1, "n"), (2, "n")]
    assert [list(each["scores"]) for each in record.evaluations] == [[MAE, "DTW[0.5]"]] * 2

    # What was kept is scored on the validation part, and on the test part apart.
    predictor = Predictor.deserialize(tmp_path / "predictor")
    data = load_data(trial.data)
    assert record.final is not None
    assert record.final[MAE] == pytest.approx(backtest(predictor, data.validation, windows=2)[MAE].item(), rel=1e-5)
    result = TrialResult.read(tmp_path)
    assert result is not None
    assert result.scores[MAE] == pytest.approx(backtest(predictor, data.test, windows=2)[MAE].item(), rel=1e-5)
    assert reports[-1]["score"] == record.final[MAE] != result.scores[MAE]


def test_evaluating_changes_no_number(tmp_path: Path) -> None:
    trial = TrialSpec(**BASE)
    run_and_report(trial, tmp_path / "watched", lambda _: None, columns=[MAE])
    watched = TrialResult.read(tmp_path / "watched")
    assert watched is not None
    assert watched.scores == run_trial(trial, tmp_path / "alone").scores


def test_epochs_between_evaluations(tmp_path: Path) -> None:
    reports: list[dict[str, Any]] = []
    run_and_report(TrialSpec(**BASE), tmp_path, reports.append, columns=[MAE], every=2)
    assert [(each["epochs"], each["finished"]) for each in reports] == [(2, False), (2, True)]


class Stop(Exception):  # noqa: N818
    pass


def test_an_interrupted_trial_evaluates_no_epoch_twice(tmp_path: Path) -> None:
    trial, reports = TrialSpec(**BASE), []

    def interrupt(report: dict[str, Any]) -> None:
        reports.append(report)
        if report["epochs"] == 1:
            raise Stop

    with pytest.raises(Stop):
        run_and_report(trial, tmp_path, interrupt, columns=[MAE], where={"pid": 1})
    run_and_report(trial, tmp_path, reports.append, columns=[MAE], where={"pid": 2})
    # The first epoch is told again, since whoever asks may not have heard of it, but not scored again.
    assert [(each["epochs"], each["finished"]) for each in reports] == [(1, False), (1, False), (2, False), (2, True)]
    assert reports[0] == reports[1]
    record = Record.read(tmp_path)
    assert [(each["epochs"], each["pid"]) for each in record.evaluations] == [(1, 1), (2, 2)]
    undisturbed = run_trial(trial, tmp_path / "undisturbed")
    result = TrialResult.read(tmp_path)
    assert result is not None
    assert result.scores == pytest.approx(undisturbed.scores, rel=1e-5)


def test_a_finished_trial_is_told_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[dict[str, Any]] = []
    run_and_report(TrialSpec(**BASE), tmp_path, first.append, columns=[MAE])
    monkeypatch.setattr(PeftEstimator, "train", lambda *_, **__: pytest.fail("was run again"))
    again: list[dict[str, Any]] = []
    run_and_report(TrialSpec(**BASE), tmp_path, again.append, columns=[MAE])
    assert again == first
    rest: list[dict[str, Any]] = []
    run_and_report(TrialSpec(**BASE), tmp_path, rest.append, columns=[MAE], reported=1)
    assert rest == first[1:]


def test_zero_shot_has_a_final_score_only(tmp_path: Path) -> None:
    reports: list[dict[str, Any]] = []
    run_and_report(TrialSpec(**{**BASE, "adapter": "none"}), tmp_path, reports.append, columns=[MAE])
    assert [(each["epochs"], each["finished"]) for each in reports] == [(0, True)]


def test_a_stopped_trial_is_replayed_and_not_run(tmp_path: Path) -> None:
    scores = [{"epochs": n, "scores": {MAE: 1.0 / n}} for n in (1, 2)]
    tmp_path.joinpath("evaluations.json").write_text(json.dumps({"evaluations": scores, "final": None}))
    reports: list[dict[str, Any]] = []
    run_and_report(TrialSpec(**BASE), tmp_path, reports.append, columns=[MAE], replay=True)
    assert [(each["epochs"], each["score"]) for each in reports] == [(1, 1.0), (2, 0.5)]
    assert not (tmp_path / "training").exists()


def test_a_search_ranks_by_validation_scores_and_keeps_the_best(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    frame = serially(spec(), folder)
    assert list(frame.index) == [1, 2, 3, 4]
    assert frame["trial"].sort_values().tolist() == [0, 1, 2, 3]
    assert frame["status"].tolist() == ["finished"] * 4
    assert frame["validation MAE"].is_monotonic_increasing
    assert not frame["test MAE"].is_monotonic_increasing or frame["test MAE"].nunique() == 4
    first = frame[frame["trial"] == 0].iloc[0]
    assert first["adapter.name"] == "lora"
    assert first["training.learning_rate"] is None or math.isnan(first["training.learning_rate"])
    for _, row in frame.iterrows():
        result = TrialResult.read(folder / row["folder"])
        assert result is not None
        assert result.scores[MAE] == row["test MAE"]
        assert Path(row["folder"]).name == trial_key(
            result.spec, str(result.data_fingerprint), json.loads((folder / "search.json").read_text())["code"]
        )

    best = Predictor.deserialize(folder / "best")
    assert isinstance(best, PeftPredictor)
    assert best.fit is not None
    data = load_data(TrialSpec(**BASE).data).validation
    assert backtest(best, data, windows=2)[MAE].item() == pytest.approx(frame["validation MAE"].iloc[0], rel=1e-5)
    stored = pd.read_csv(folder / "ranking.csv", index_col="rank")
    assert stored["validation MAE"].tolist() == pytest.approx(frame["validation MAE"].tolist())
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "best",
        "proposals.json",
        "ranking.csv",
        "search.json",
        "trials",
    ]


def test_a_second_run_runs_nothing_and_more_samples_only_what_is_new(tmp_path: Path) -> None:
    first = serially(spec(), tmp_path)
    before = traces(tmp_path)
    pd.testing.assert_frame_equal(serially(spec(), tmp_path), first)
    assert traces(tmp_path) == before
    more = serially(spec(num_samples=6), tmp_path)
    assert len(more) == 6
    assert before.items() < traces(tmp_path).items()
    alone = serially(spec(num_samples=6), tmp_path / "alone")
    pd.testing.assert_frame_equal(more.drop(columns=TIMES), alone.drop(columns=TIMES))


def test_optuna_goes_on_with_what_it_had_learnt(tmp_path: Path) -> None:
    wanted = spec(searcher={"name": "optuna", "n_startup_trials": 2})
    serially(wanted, tmp_path / "parts")
    parts = serially(spec(searcher={"name": "optuna", "n_startup_trials": 2}, num_samples=6), tmp_path / "parts")
    whole = serially(spec(searcher={"name": "optuna", "n_startup_trials": 2}, num_samples=6), tmp_path / "whole")
    pd.testing.assert_frame_equal(parts.drop(columns=TIMES), whole.drop(columns=TIMES))


KILL = """
import json, os, signal, sys
from gluonts_peft.trials import SearchSpec, search, searchrun

report, counts = searchrun.Run.observe, []

def die(self, number, found):
    report(self, number, found)
    counts.append(number)
    if len(counts) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

searchrun.Run.observe = die
search(SearchSpec(**json.loads(sys.argv[1])), sys.argv[2], serial=True, progress=False)
"""


@pytest.mark.parametrize("reports", [1, 5])
def test_a_search_that_was_killed_goes_on(tmp_path: Path, reports: int) -> None:
    killed, form = tmp_path / "killed", json.dumps(spec(num_samples=3).normal_form())
    done = subprocess.run([sys.executable, "-c", KILL, form, str(killed), str(reports)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    before = traces(killed)
    assert sum(path.endswith("result.json") for path in before) == reports // 3
    frame = serially(spec(num_samples=3), killed)
    after = traces(killed)
    assert {path: trace for path, trace in before.items() if path.endswith("result.json")}.items() <= after.items()
    undisturbed = serially(spec(num_samples=3), tmp_path / "undisturbed")
    exact = ["trial", "status", "adapter.name", "folder"]
    pd.testing.assert_frame_equal(frame[exact], undisturbed[exact])
    pd.testing.assert_series_equal(frame["validation MAE"], undisturbed["validation MAE"], rtol=1e-5)


def test_a_trial_that_fails_is_reported_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = searching.run_and_report

    def broken(trial: TrialSpec, *arguments: Any, **options: Any) -> None:
        if trial.adapter == "bitfit":
            raise RuntimeError("out of luck")
        run(trial, *arguments, **options)

    monkeypatch.setattr(searching, "run_and_report", broken)
    frame = serially(spec(), tmp_path)
    failed = frame[frame["status"] == "failed"]
    assert 0 < len(failed) < 4
    assert set(failed["adapter.name"]) == {"bitfit"}
    assert set(failed["error"]) == {"RuntimeError: out of luck"}
    assert frame["status"].tolist() == ["finished"] * (4 - len(failed)) + ["failed"] * len(failed)
    monkeypatch.setattr(searching, "run_and_report", run)
    assert serially(spec(), tmp_path)["status"].tolist() == ["finished"] * 4


def test_a_budget_ends_a_search_which_then_goes_on(tmp_path: Path) -> None:
    frame = serially(spec(time_budget=1e-3), tmp_path)
    assert frame["status"].tolist() == ["missing"]
    assert serially(spec(), tmp_path)["status"].tolist() == ["finished"] * 4


def test_a_grid_without_a_number_runs_every_cell(tmp_path: Path) -> None:
    cells = {"adapter.name": SPACE["adapter.name"], "training.batch_size": {"space": "choice", "categories": [4, 6]}}
    frame = serially(spec(searcher="grid", num_samples=None, space=cells), tmp_path)
    # The base has the adapter under its plain name and batches of 4: it is a cell of the grid.
    assert len(frame) == 4
    assert {(row["adapter.name"], row["training.batch_size"]) for _, row in frame.iterrows()} == {
        (name, size) for name in ("lora", "bitfit") for size in (4, 6)
    }


def test_several_objectives_give_a_front(tmp_path: Path) -> None:
    frame = serially(spec(objective=["MAE", "MAPE"]), tmp_path)
    scores = frame[["validation MAE", "validation MAPE"]].to_numpy()
    for (_, row), point in zip(frame.iterrows(), scores, strict=True):
        assert row["pareto"] == (not ((scores <= point).all(axis=1) & (scores < point).any(axis=1)).any())
    assert frame["pareto"].iloc[0]
    assert frame["pareto"].is_monotonic_decreasing


def test_fronts() -> None:
    points = [(1.0, 4.0), (2.0, 2.0), (4.0, 1.0), (3.0, 3.0), None, (5.0, 5.0), (1.0, 4.0)]
    assert _fronts(points) == [0, 0, 0, 1, 7, 2, 0]


def test_a_ranking_prints(tmp_path: Path) -> None:
    frame = serially(spec(num_samples=2), tmp_path)
    console = Console(width=300, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_ranking(frame, console, limit=1)
    text = console.export_text()
    assert re.search(
        r"rank +trial +verdict +change +90 % interval.* validation MAE +adapter.name +training.learning_rate +test MAE",
        text,
    )
    assert re.search(rf"1 +\d +{frame['verdict'].iloc[0]} .* {frame['validation MAE'].iloc[0]:.4g} ", text)
    assert "1 more in ranking.csv" in text


def test_what_a_search_refuses(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"folder 'runs/x' cannot be used: it is relative, and nodes have other"):
        search(spec(), "runs/x", serial=True)
    with pytest.raises(SpecError, match=r"scheduler 'asha' needs Ray; leave serial out, or name 'fifo'"):
        serially(spec(scheduler="asha"), tmp_path / "new")
    rank = {"adapter.rr": {"space": "choice", "categories": [2]}}
    with pytest.raises(SpecError, match=r"option 'rr' is unknown; did you mean 'r'\?"):
        serially(spec(space=rank), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=re.escape(f"folder '{tmp_path}' is in use and holds no search; name a new")):
        serially(spec(), tmp_path)


def test_a_folder_is_of_one_search_one_data_and_one_code(tmp_path: Path) -> None:
    serially(spec(num_samples=1), tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"folder '{tmp_path}' holds another search; name another folder")):
        serially(spec(num_samples=1, seed=1), tmp_path)
    path = tmp_path / "search.json"
    good = path.read_text()
    for name, other, message in (
        ("data", "0", "the data of the search in "),
        ("also", {"other": "0"}, "the data of also of the search in "),
        ("weights", {"chronos bolt-nano": "0"}, "the pretrained weights of the search in "),
        ("code", {"gluonts-peft": "0.0"}, "the search in "),
    ):
        path.write_text(json.dumps({**json.loads(good), name: other}))
        with pytest.raises(ValueError, match=f"^{message}"):
            serially(spec(num_samples=1), tmp_path)
    path.write_text(good)
    assert len(serially(spec(num_samples=1), tmp_path)) == 1
    path.write_text("{")
    with pytest.raises(SpecError, match=re.escape(f"'{path}' cannot be used: ")):
        ranking(tmp_path)


def quick(**changes: Any) -> dict[str, Any]:
    return {**BASE, "training": {**BASE["training"], "max_epochs": 1}, **changes}


def test_a_search_is_of_one_set_of_weights(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(get_estimator("chronos").backbone_class.bundled()["bolt-nano"], checkpoint)
    base = quick(checkpoint=str(checkpoint))
    serially(spec(base=base, num_samples=1), out)
    path = checkpoint / "model.safetensors"
    good = path.read_bytes()
    save_file({name: 1.3 * tensor for name, tensor in load_file(path).items()}, path)
    message = f"the pretrained weights of the search in '{out}' have changed (chronos {checkpoint}); name another"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        serially(spec(base=base, num_samples=2), out)
    path.write_bytes(good)
    assert len(serially(spec(base=base, num_samples=2), out)) == 2


def test_a_winner_that_is_no_better_than_zero_shot_is_said_to_be_so(tmp_path: Path) -> None:
    base = quick(training={**BASE["training"], "max_epochs": 1, "learning_rate": 1.0})
    path, out = tmp_path / "search.yaml", tmp_path / "out"
    path.write_text(json.dumps(spec(base=base, num_samples=1).normal_form()))
    with pytest.warns(TuningDidNotHelp, match=r"^the best trial, 0: no evidence: "):
        frame = serially(load_search(path), out)
    result = TrialResult.read(out / frame["folder"].iloc[0])
    assert result is not None
    assert result.gate is not None
    losses = frame[["zero-shot loss", "tuned loss"]].iloc[0].tolist()
    assert losses == [result.gate["zero_shot"], result.gate["tuned"]]
    assert losses[0] < losses[1]
    assert not pd.read_csv(out / "ranking.csv")["handed over"].item()
    done = cli(path, "--out", out, "--serial")
    assert result.verdict is not None
    assert result.verdict.word == "no evidence"
    sentence = str(result.verdict)
    assert frame["sentence"].item() == sentence
    assert f"the best trial, 0: {sentence}, on validation windows; '{out}/best' holds it" in done.output
    assert f"best predictor: {out}/best (no evidence)\n" in done.output
    assert (out / "best").is_dir()
    console = Console(width=300, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_ranking(frame, console)
    table = console.export_text()
    assert re.search(rf" zero-shot loss +tuned loss +handed over .*\n.*\n.* {losses[1]:.4g} +no ", table)
    assert re.search(r"\n +rank +trial +verdict +change +90 % interval +status ", table)


def test_the_shortest_context_decides_what_all_trials_are_scored_on(tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), []
    for item in range(12):
        values = rng.normal(size=60)
        if item % 2:
            # The last window is 6 steps: 20 of history see the gap's other side, and 10 do not.
            values[40:54] = np.nan
        times = pd.date_range("2024-01-01", periods=60, freq="h")
        rows.append(pd.DataFrame({"item_id": f"s{item}", "timestamp": times, "target": values}))
    path = tmp_path / "gaps.csv"
    pd.concat(rows).to_csv(path, index=False)
    data = {"source": "file", "path": str(path), "windows": 1, "fractions": (0.5, 0.25, 0.25)}
    contexts = {"context_length": {"space": "choice", "categories": [20, 10]}}
    wanted = spec(base=quick(adapter="none", context_length=20, data=data), space=contexts, searcher="grid")
    assert wanted.shortest_context() == 10
    frame = serially(wanted, tmp_path / "out")
    assert frame["context_length"].sort_values().tolist() == [10, 20]
    results = [TrialResult.read(tmp_path / "out" / folder) for folder in frame["folder"]]
    counts = [result.counts for result in results if result is not None]
    assert counts[0] == counts[1]
    assert 0 < counts[0]["skipped_nothing_seen"] < 3
    alone = run_trial(wanted.trial({}), tmp_path / "alone")
    assert alone.counts["skipped_nothing_seen"] == 0
    # Validation windows decide, and are chosen likewise.
    record = Record.read(tmp_path / "out" / frame[frame["context_length"] == 20]["folder"].item())
    assert record.final is not None
    entries = load_data(wanted.trial({}).data).validation
    seen = [entry for entry in entries if np.isfinite(entry["target"][-16:-6]).any()]
    assert 0 < len(seen) < len(entries)
    zero_shot = Predictor.deserialize(tmp_path / "out" / "best")
    assert frame["context_length"].iloc[0] in (10, 20)
    best = frame["validation MAE"].iloc[0]
    assert backtest(zero_shot, seen, windows=1)[MAE].item() == pytest.approx(best, rel=1e-5)


def test_two_searches_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        searching._claimed(tmp_path / "out", spec()),
        pytest.raises(ValueError, match="is in use by a search that is running"),
    ):
        serially(spec(), tmp_path / "out")


def test_stopped_trials_rank_behind_finished_ones(tmp_path: Path) -> None:
    serially(spec(num_samples=3), tmp_path)
    journal = tmp_path / "proposals.json"
    entries = json.loads(journal.read_text())
    entries[0]["stopped"] = 1
    journal.write_text(json.dumps(entries))
    (tmp_path / "trials" / entries[0]["key"] / "result.json").unlink()
    stale = Record.read(tmp_path / "trials" / entries[0]["key"])
    stale.final = None
    stale.evaluations = [{"epochs": 1, "scores": {MAE: 1e-9}}]
    stale.write()
    (tmp_path / "trials" / entries[1]["key"] / "result.json").unlink()
    frame = ranking(tmp_path)
    assert frame["trial"].tolist() == [2, 0, 1]
    assert frame["status"].tolist() == ["finished", "stopped", "missing"]
    assert frame["epochs"].tolist()[:2] == [3, 1]
    assert frame["validation MAE"].iloc[1] == 1e-9
    assert Entry(**entries[0]).status(None) == "stopped"


def test_the_state_of_another_trial_is_taken_over_with_a_new_rate_and_dropout(tmp_path: Path) -> None:
    def trial(rate: float, dropout: float) -> TrialSpec:
        training = {**BASE["training"], "learning_rate": rate}
        return TrialSpec(**{**BASE, "adapter": {"name": "lora", "lora_dropout": dropout}, "training": training})

    def interrupt(report: dict[str, Any]) -> None:
        if report["epochs"] == 2:
            raise Stop

    donor = tmp_path / "donor"
    with pytest.raises(Stop):
        run_and_report(trial(1e-3, 0.1), donor, interrupt, columns=[MAE])
    checkpoint = donor / "training" / "last.ckpt"
    before = read_checkpoint(checkpoint)
    adopt(checkpoint, trial(4e-3, 0.2), tmp_path / "heir")
    after = read_checkpoint(tmp_path / "heir" / "training" / "last.ckpt")
    for name, tensor in before["state_dict"].items():
        assert tensor.equal(after["state_dict"][name]), name
    old, new = (state["optimizer_states"][0]["param_groups"][0] for state in (before, after))
    assert (old["initial_lr"], new["initial_lr"]) == (1e-3, 4e-3)
    assert new["lr"] == pytest.approx(4 * old["lr"])
    reports: list[dict[str, Any]] = []
    run_and_report(trial(4e-3, 0.2), tmp_path / "heir", reports.append, columns=[MAE])
    result = TrialResult.read(tmp_path / "heir")
    assert result is not None
    assert (result.epochs, result.steps, result.learning_rate) == (3, 6, 4e-3)
    # It has the donor's two epochs behind it: the same rate from the start gives something else.
    scratch = run_trial(trial(4e-3, 0.2), tmp_path / "scratch")
    assert result.scores[MAE] != scratch.scores[MAE]
    # An attempt that died later is further than the donor was.
    adopt(checkpoint, trial(4e-3, 0.2), donor)
    assert read_checkpoint(checkpoint)["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 1e-3


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["search", *map(str, arguments)])


def test_the_command(tmp_path: Path) -> None:
    path, out = tmp_path / "search.yaml", tmp_path / "out"
    path.write_text(json.dumps(spec().normal_form()))
    done = cli(path, "--out", out, "--serial", "--set", "num_samples=2")
    assert done.exit_code == 0, done.output
    assert f"ranking: {out}/ranking.csv\nbest predictor: {out}/best\n" in done.output
    assert len(pd.read_csv(out / "ranking.csv")) == 2

    for arguments, message in [
        ((path, "--out", "relative", "--serial"), "error: folder 'relative' cannot be used: it is relative"),
        ((path, "--out", out, "--set", "objective=MAR"), "objective 'MAR' is unknown; did you mean 'MAE'?"),
        ((path, "--out", out, "--serial", "--address", "auto"), "--serial does not go with --address auto"),
        ((tmp_path / "none.yaml", "--out", out), "it cannot be read: No such file or directory"),
        ((path, "--out", out, "--serial", "--set", "objective=DTW"), "holds another search; name another folder"),
    ]:
        refused = cli(*arguments)
        assert refused.exit_code == 2, refused.output
        assert message in refused.output


def test_the_command_says_when_scores_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(json.dumps(spec(num_samples=2).normal_form()))

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(searching, "run_and_report", broken)
    done = cli(path, "--out", tmp_path / "out", "--serial")
    assert done.exit_code == 1
    message = "error: 2 of 2 trials have no final score (RuntimeError: out of luck); run it again to try these again"
    assert message in done.output
    assert "best predictor" not in done.output


def test_a_search_imports_no_ray_unless_it_needs_it(python: Any) -> None:
    program = "import sys; from gluonts_peft.trials import search, load_search; print('ray' in sys.modules)"
    assert python(program).strip() == "False"


SHARED = """
import json, sys
from pathlib import Path
from gluonts_peft.networks import Networks
from gluonts_peft.trials import TrialSpec, run_trial
from gluonts_peft_chronos import ChronosEstimator

backbone, loads = ChronosEstimator.backbone_class, []
load = backbone.load_network.__func__
backbone.load_network = classmethod(lambda cls, folder: (loads.append(folder), load(cls, folder))[1])
networks = Networks() if sys.argv[1] == "kept" else None
scores = []
for adapter in ("full", "bitfit", ["layernorm", "lora"], "fourierft", "none"):
    trial = TrialSpec(**{**json.loads(sys.argv[2]), "adapter": adapter})
    scores.append(run_trial(trial, Path(sys.argv[3]) / str(adapter), networks=networks).scores["MAE[0.5]"])
print(json.dumps({"loads": len(loads), "scores": scores}))
"""


def test_a_worker_reads_the_base_once_and_no_trial_changes_it(tmp_path: Path) -> None:
    def run(mode: str) -> dict[str, Any]:
        arguments = [mode, json.dumps(BASE), str(tmp_path / mode)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", SHARED, *arguments], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    fresh, kept = run("fresh"), run("kept")
    assert (fresh["loads"], kept["loads"]) == (5, 1)
    assert kept["scores"] == fresh["scores"]
    assert len(set(fresh["scores"])) == 5


def test_the_example_runs(tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "examples" / "search.py"
    done = subprocess.run(
        [sys.executable, str(program), "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=1100
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"the next hour: (\d+, ){11}\d+$", done.stdout)
    assert len(ranking(tmp_path / "out")) == 4
