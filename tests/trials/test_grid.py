from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from gluonts_peft.registry import get_estimator
from gluonts_peft.trials import (
    SpecError,
    StudySpec,
    TrialResult,
    estimate,
    expand,
    grid,
    load_data,
    load_results,
    load_study,
    run_study,
    write_report,
)
from gluonts_peft.trials import data as data_module
from gluonts_peft.trials import run as run_module
from gluonts_peft.trials.identity import read_scores

TRAINING = {"max_epochs": 1, "num_batches_per_epoch": 2, "batch_size": 4, "device": "cpu"}
BASE = {
    "family": "chronos",
    "checkpoint": "bolt-nano",
    "prediction_length": 6,
    "context_length": 24,
    "training": TRAINING,
    "data": {"patients": 10, "hours": 8, "vital": "hr", "windows": 1},
}
# Accepted by itself, and no divisor of the widths of this model.
BROKEN = {"name": "c3a", "block_size": 7}


def study(**grid: Any) -> StudySpec:
    return StudySpec(base=BASE, grid=grid, baselines=["last_value"])


def traces(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("trials/*/result.json")}


def test_baselines_that_cannot_run_are_said_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "statsforecast", None)
    wrong = StudySpec(
        base=BASE, baselines=["auto_ets", {"name": "lightgbm", "leaves": 3}, {"name": "simple_feedforward", "depth": 3}]
    )
    with pytest.raises(SpecError) as caught:
        run_study(wrong, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    needs, trees, network = caught.value.faults
    assert needs == "baseline 'auto_ets' needs statsforecast; install gluonts-peft[baselines]"
    assert trees.startswith("baseline 'lightgbm'")
    assert network.startswith("baseline 'simple_feedforward': option 'depth' is unknown; known: ")


def test_cells_come_in_order_and_once() -> None:
    trials = expand(study(**{"data.vital": ["hr", "map"], "adapter": ["none", "lora", "lora"], "seed": [0, 1]}))
    names = [trial.name() for trial in trials]
    assert names[:2] == ["last_value hr", "last_value map"]
    assert names[2:] == [f"bolt-nano {a} {v} seed {s}" for v in ("hr", "map") for a in ("none", "lora") for s in (0, 1)]
    assert len({trial.hash() for trial in trials}) == len(trials)


def test_a_second_run_runs_only_what_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = study(adapter=["none", "lora"])
    results = run_study(cells, tmp_path, progress=False)
    assert [result.status for result in results] == ["finished"] * 3
    assert [result.spec for result in results] == expand(cells)
    before = traces(tmp_path)
    lost = tmp_path / "trials" / expand(cells)[2].hash() / "result.json"
    lost.unlink()
    ran = []
    run = grid.run_cell
    monkeypatch.setattr(grid, "run_cell", lambda trial, folder: (ran.append(trial.name()), run(trial, folder))[1])
    again = run_study(cells, tmp_path, progress=False)
    assert ran == ["bolt-nano lora hr seed 0"]
    after = traces(tmp_path)
    assert {path: after[path] for path in before if path != str(lost)} == {
        path: trace for path, trace in before.items() if path != str(lost)
    }
    assert [result.scores for result in again] == [result.scores for result in results]
    assert load_results(tmp_path) == again


def test_a_failed_cell_stops_no_other_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = study(adapter=[BROKEN, "none"])
    _, failed, zero_shot = run_study(cells, tmp_path, progress=False)
    assert (failed.status, zero_shot.status) == ("failed", "finished")
    assert failed.error is not None
    assert failed.error.startswith("AdapterError: adapter c3a(block_size=7) ")
    assert TrialResult.read(tmp_path / "trials" / failed.spec.hash()) == failed
    ran = []
    monkeypatch.setattr(grid, "run_cell", lambda trial, _: (ran.append(trial), failed)[1])
    run_study(cells, tmp_path, progress=False)
    assert ran == [failed.spec]


def test_workers_give_what_one_process_gives(tmp_path: Path) -> None:
    cells = study(adapter=[BROKEN, "bitfit"])
    alone = run_study(cells, tmp_path / "alone", progress=False)
    together = run_study(cells, tmp_path / "together", jobs=2, progress=False)
    assert [result.status for result in together] == ["finished", "failed", "finished"]
    for one, other in zip(alone, together, strict=True):
        assert one.spec == other.spec
        assert one.error == other.error
        assert one.scores == pytest.approx(other.scores, rel=1e-5)


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = study(adapter=["none", "bitfit"])
    run = grid.run_cell

    def interrupted(trial: Any, folder: Path) -> TrialResult:
        if trial.adapter == "bitfit":
            raise KeyboardInterrupt
        return run(trial, folder)

    monkeypatch.setattr(grid, "run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(cells, tmp_path, progress=False)
    before = traces(tmp_path)
    assert len(before) == 2
    monkeypatch.setattr(grid, "run_cell", run)
    assert [result.status for result in run_study(cells, tmp_path, progress=False)] == ["finished"] * 3
    assert before.items() <= traces(tmp_path).items()


MAIN = """
import sys
from gluonts_peft.trials import StudySpec, run_study

if __name__ == "__main__":
    study = StudySpec.model_validate_json(sys.argv[1])
    run_study(study, sys.argv[2], jobs=int(sys.argv[3]), progress=False)
"""


def test_a_study_that_was_killed_goes_on(tmp_path: Path) -> None:
    cells = study(adapter=["none", "bitfit"], seed=[0, 1, 2])
    out = tmp_path / "out"
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    process = subprocess.Popen([sys.executable, str(script), cells.model_dump_json(), str(out), "1"])
    deadline = time.monotonic() + 1100
    while len(traces(out)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = traces(out)
    assert 2 <= len(before) < 7
    results = run_study(cells, out, progress=False)
    assert [result.status for result in results] == ["finished"] * 7
    assert before.items() <= traces(out).items()


DEADLY = """
import os
from gluonts_peft.trials import TrialResult, grid

def run(trial, folder):
    if trial.adapter == "bitfit":
        os._exit(9)
    result = TrialResult(spec=trial, status="finished")
    result.write(grid.trial_folder(folder, trial))
    return result

def start(threads):
    pass

grid.run_cell, grid._start_worker = run, start
"""


def test_a_trial_that_kills_its_process_fails_alone(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(DEADLY + MAIN)
    cells = study(adapter=["none", "bitfit", "layernorm", "lora"])
    out = tmp_path / "out"
    subprocess.run([sys.executable, str(script), cells.model_dump_json(), str(out), "2"], check=True)
    results = load_results(out)
    assert [result.status for result in results] == ["finished", "finished", "failed", "finished", "finished"]
    assert results[2].error == "the process of the trial was killed; it may have run out of memory"


IDLE = """
import signal, time
from concurrent.futures import ProcessPoolExecutor

class Pool(ProcessPoolExecutor):
    count = 0

    def submit(self, *arguments):
        Pool.count += 1
        if Pool.count == 2:
            # A worker that waits for work dies, and whoever comes next finds the pool broken.
            for process in list(self._processes.values()):
                os.kill(process.pid, signal.SIGKILL)
            while not self._broken:
                time.sleep(0.01)
        return super().submit(*arguments)

grid.ProcessPoolExecutor = Pool
"""


def test_a_worker_that_is_killed_between_two_trials_costs_none(tmp_path: Path) -> None:
    script, out = tmp_path / "main.py", tmp_path / "out"
    script.write_text(DEADLY + IDLE + MAIN)
    cells = study(adapter=["none"])
    subprocess.run([sys.executable, str(script), cells.model_dump_json(), str(out), "2"], check=True)
    assert [result.status for result in load_results(out)] == ["finished"] * 2


def test_the_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    run_study(study(adapter=["none"]), tmp_path, progress=False)
    before = traces(tmp_path)
    message = (
        f"folder '{tmp_path}' holds another study: of its trials 1 only there (e.g. 'bolt-nano none hr seed 0') and 1"
        " only here (e.g. 'bolt-nano lora hr seed 0'); name another folder"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run_study(study(adapter=["lora"]), tmp_path, progress=False)
    assert traces(tmp_path) == before


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    message = f"folder '{tmp_path}' is in use and holds no study; name a new or empty one"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run_study(study(adapter=["none"]), tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_estimate_is_measured_or_taken_from_what_has_run(tmp_path: Path) -> None:
    cells = study(adapter=["none", "lora", "bitfit"], seed=[0, 1])
    out = tmp_path / "out"
    before = estimate(cells, out)
    assert not out.exists()
    assert [state for _, state in before.cells] == ["to run"] * 7
    assert before.seconds > 0
    assert before.sources == [
        "last_value hr measured with 0 steps",
        "bolt-nano none hr seed 0 measured with 0 steps",
        "bolt-nano lora hr seed 0 measured with 2 steps",
    ]
    run_study(cells, out, progress=False)
    (out / "trials" / expand(cells)[-1].hash() / "result.json").unlink()
    files = sorted(out.rglob("*"))
    after = estimate(cells, out)
    assert sorted(out.rglob("*")) == files
    assert [state for _, state in after.cells] == ["finished"] * 6 + ["to run"]
    assert after.sources == ["1 from 6 finished trials in the folder"]
    alike = TrialResult.read(out / "trials" / expand(cells)[-2].hash())
    assert alike is not None
    assert alike.seconds_total is not None
    assert 0 < after.seconds < 10 * alike.seconds_total
    with pytest.raises(ValueError, match="holds another study"):
        estimate(study(adapter=["dora"]), out)


def test_no_jobs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^jobs 0 is not positive; name the number of trials at a time$"):
        run_study(study(adapter=["none"]), tmp_path / "out", jobs=0)
    assert not (tmp_path / "out").exists()


def test_changed_data_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (result, _) = run_study(study(adapter=["none"]), tmp_path, progress=False)
    changed = result.model_copy(update={"data_fingerprint": "0" * 64})
    changed.write(tmp_path / "trials" / result.spec.hash())
    with pytest.raises(ValueError, match=re.escape(f"the data of trials in '{tmp_path}' have changed since these")):
        run_study(study(adapter=["none"]), tmp_path, progress=False)


def test_changed_data_of_also_are_noticed(tmp_path: Path) -> None:
    path, out = tmp_path / "other.csv", tmp_path / "out"

    def write(scale: float) -> None:
        times = pd.date_range("2024-01-01", periods=60, freq="h")
        rows = [
            pd.DataFrame({"item_id": f"s{item}", "timestamp": times, "target": scale * np.sin(np.arange(60) + item)})
            for item in range(10)
        ]
        pd.concat(rows).to_csv(path, index=False)
        data_module._load.cache_clear()
        data_module._series.cache_clear()

    write(1.0)
    also = {"other": {"source": "file", "path": str(path), "windows": 1}}
    cells = StudySpec(base={**BASE, "adapter": "none", "also": also}, grid={"seed": [0, 1]})
    first, _ = run_study(cells, out, progress=False)
    assert first.also_fingerprints == {"other": load_data(first.spec.also["other"]).fingerprint}
    (out / "trials" / first.spec.hash() / "result.json").unlink()
    write(3.0)
    with pytest.raises(ValueError, match=re.escape(f"the data of trials in '{out}' have changed since these")):
        run_study(cells, out, progress=False)
    write(1.0)
    assert [result.scores for result in run_study(cells, out, progress=False)][0] == first.scores


def test_changed_weights_are_noticed(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(get_estimator("chronos").backbone_class.bundled()["bolt-nano"], checkpoint)
    base = {**BASE, "checkpoint": str(checkpoint), "adapter": "none"}
    run_study(StudySpec(base=base, baselines=["last_value"]), out, progress=False)
    path = checkpoint / "model.safetensors"
    save_file({name: 1.3 * tensor for name, tensor in load_file(path).items()}, path)
    message = f"the pretrained weights of trials in '{out}' have changed since these were run (chronos {checkpoint})"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        run_study(StudySpec(base=base, baselines=["last_value"]), out, progress=False)


@pytest.mark.parametrize("start", [estimate, run_study])
def test_options_and_data_are_looked_at_before_anything_runs(tmp_path: Path, start: Any) -> None:
    lost = {"source": "file", "path": str(tmp_path / "typo.parquet")}
    cells = StudySpec(
        base={**BASE, "also": {"other": lost}},
        grid={"adapter": ["none", {"name": "lora", "rr": 4}], "data.patients": [10, 11]},
    )
    with pytest.raises(SpecError) as caught:
        start(cells, tmp_path / "out")
    assert len(caught.value.faults) == 2
    assert "option 'rr' is unknown; did you mean 'r'?" in caught.value.faults[0]
    assert caught.value.faults[1].startswith("data of source 'file': ")
    assert "typo.parquet" in caught.value.faults[1]
    assert not (tmp_path / "out").exists()


def test_an_estimate_leaves_no_folder_behind(tmp_path: Path) -> None:
    estimate(study(adapter=["none"]), tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []


def test_a_trial_is_finished_whatever_a_version_called_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that a version adds changes all hashes: results that do not have it are of its default."""
    cells = study(adapter=["none"], seed=[0])
    results = run_study(cells, tmp_path, progress=False)
    shown = load_results(tmp_path)
    for number, path in enumerate(sorted((tmp_path / "trials").iterdir())):
        content = json.loads((path / "result.json").read_text())
        del content["spec"]["ensemble"], content["spec"]["training"]["patience"], content["format"]
        (path / "result.json").write_text(json.dumps(content))
        path.rename(path.with_name(f"{number:064d}"))
    monkeypatch.setattr(run_module, "run_trial", lambda *_, **__: pytest.fail("a finished trial was run again"))
    assert run_study(cells, tmp_path, progress=False) == results
    assert load_results(tmp_path) == shown
    assert {result.status for result in results} == {"finished"}
    assert {state for _, state in estimate(cells, tmp_path).cells} == {"finished"}


def test_damaged_scores_of_windows_are_named(tmp_path: Path) -> None:
    run_study(study(adapter=["none"], seed=[0]), tmp_path, progress=False)
    path = min(tmp_path.glob("trials/*/windows.parquet"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SpecError, match=re.escape(f"'{path}' cannot be used: it is damaged: ")):
        read_scores(path)
    # A study that was killed as it began has left an unfinished file, and is no other's folder for that.
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".study.json.0123456789ab_1_00000000.partial").touch()
    assert len(run_study(study(adapter=["none"], seed=[0]), tmp_path / "new", progress=False)) == 2


def test_two_studies_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        grid.locked(out, "study"),
        pytest.raises(ValueError, match=re.escape(f"folder '{out}' is in use by a study that is running")),
    ):
        run_study(study(adapter=["none"]), out, progress=False)
    assert [path.name for path in out.iterdir()] == [".lock"]
    assert len(run_study(study(adapter=["none"]), out, progress=False)) == 2


def test_the_bar_says_what_is_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_study(study(adapter=["none"]), tmp_path)
    assert "2/2" in capsys.readouterr().err


def test_ray_and_torch_stay_out_of_what_needs_neither() -> None:
    code = (
        "import sys; from gluonts_peft.trials import load_study, run_study, write_report, print_table;"
        "assert not {'ray', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


READY = sorted((Path(__file__).parents[2] / "examples" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_studies_run(path: Path, tmp_path: Path) -> None:
    """Each with next to no training, few patients and one seed; of long grids the ends and the middle."""
    tiny = {
        "prediction_length": 6, "context_length": 24, "seed": [0], "data.patients": 20, "data.hours": 8,
        "data.windows": 1, "training.max_epochs": 1, "training.num_batches_per_epoch": 1, "training.batch_size": 4,
        "training.device": "cpu", "baselines": ["last_value", "simple_feedforward"], "baseline_training.max_epochs": 1,
        "baseline_training.num_batches_per_epoch": 1,
    }  # fmt: skip
    grid = load_study(path).grid
    adapters = grid["adapter"]
    tiny["adapter"] = [adapters[number] for number in sorted({0, 1, len(adapters) // 2, len(adapters) - 1})]
    if "data.vital" in grid:
        tiny["data.vital"] = ["hr"]
    if "data.train_series" in grid:
        tiny |= {"data.train_series": [4, None], "data.train_steps": [40]}
    if "ensemble" in grid:
        tiny["ensemble"] = [None, 0.5]
    if "folds" in load_study(path).base["data"]:
        tiny |= {"data.folds": 2, "adapter": ["none", adapters[-1]], "baselines": ["last_value"]}
    if "also" in load_study(path).base:
        tiny |= {"also.pressure.patients": 20, "also.pressure.hours": 8, "also.synthetic.series": 20}
    out = tmp_path / "out"
    results = run_study(load_study(path, tiny), out, progress=False)
    assert [result.error for result in results if result.status != "finished"] == []
    assert len(results) >= 5
    text = write_report(out).read_text(encoding="utf-8")
    assert f"{len(results)} of {len(results)} trials have finished" in text
