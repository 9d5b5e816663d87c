"""Processes that are asked to end, that are killed, and that meet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gluonts_peft.files import machine
from gluonts_peft.processes import Terminated, asked_to_end, keeping_handler, scratch, terminable

# One process imports everything, and each case is a fork of it: importing takes longer than all the cases.
FORKS = """
import contextlib, json, os, signal, sys, threading, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import gluonts_peft.predictor, gluonts_peft.trials.run
from gluonts_peft import cli, training
from gluonts_peft.registry import get_estimator

ChronosEstimator = get_estimator("chronos")

work = Path(sys.argv[1])
torch.set_num_threads(1)
values = np.random.default_rng(0).normal(size=(2, 90)).cumsum(1)
times = pd.date_range("2024-01-01", periods=90, freq="h")
rows = [(f"i{i}", at, value) for i, own in enumerate(values) for at, value in zip(times, own)]
pd.DataFrame(rows, columns=["item_id", "timestamp", "target"]).to_csv(work / "data.csv", index=False)


def fit(out, *more):
    return ["fit", str(work / "data.csv"), "--out", str(out), "--checkpoint", "bolt-nano", "--horizon", "6",
            "--context", "48", "--epochs", "2", "--batches", "2", "--batch-size", "4", "--gate", "keep",
            "--device", "cpu", *more]


def start(arguments, before=lambda: None):
    process = os.fork()
    if process:
        return process
    output = os.open(work / f"output-{os.getpid()}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        before()
        sys.argv = ["gluonts-peft", *map(str, arguments)]
        cli.main()
    except SystemExit as error:
        code = error.code or 0
    finally:
        os._exit(code)


def end(process):
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code, (work / f"output-{process}").read_text().strip()


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else None


def weights(out):
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()
"""


def forks(program: str, folder: Path, timeout: float = 300) -> Any:
    result = subprocess.run(
        [sys.executable, "-c", FORKS + program, str(folder)], capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


KILLED = """
def killed_at(moment):
    def before():
        count = iter(range(10_000))
        def killing(real):
            def call(*arguments, **options):
                if next(count) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)
            return call
        os.replace, os.rename = killing(os.replace), killing(os.rename)
    return before

code, output = end(start(fit(work / "undisturbed")))
assert code == 0, output
wanted, found = weights(work / "undisturbed"), []
for moment in range(100):
    out = work / f"model-{moment}"
    code, _ = end(start(fit(out), killed_at(moment)))
    if code == 0:
        break
    code, output = end(start(fit(out, "--resume")))
    same = code == 0 and weights(out) == wanted
    found.append((moment, code, same, names(out), [name for name in names(work) if name[0] == "."]))
print(json.dumps(found))
"""


def test_a_fit_that_is_killed_at_any_rename_is_resumed_to_the_same_predictor(tmp_path: Path) -> None:
    found = forks(KILLED, tmp_path)
    # The index of the series, a checkpoint an epoch, the adapter's two files, and the three parts of a predictor.
    assert len(found) >= 8
    for moment, code, same, left, beside in found:
        assert (moment, code, same, beside) == (moment, 0, True, [])
        assert left == ["adapter", "gluonts-config.json", "predictor.json"]


ASKED = """
def at_step(number, act):
    def before():
        real = training._Module.on_train_batch_end
        def step(module, *arguments):
            if module.global_step == number:
                act()
        training._Module.on_train_batch_end = step
    return before

def ask(number):
    return lambda: os.kill(os.getpid(), number)

found = {}
for name, number, step in (("term", signal.SIGTERM, 3), ("early", signal.SIGTERM, 1), ("hup", signal.SIGHUP, 3)):
    out = work / name
    found[name] = (*end(start(fit(out), at_step(step, ask(number)))), names(out))
found["resumed"] = end(start(fit(work / "term", "--resume")))[0], names(work / "term")

# A second fit into the folder of one that is running; the first one waits until the second is refused.
gate = work / "gate"
def wait():
    while not gate.exists():
        time.sleep(0.01)
out = work / "two"
first = start(fit(out), at_step(3, wait))
while not (out / "training" / "last.ckpt").exists():
    time.sleep(0.01)
found["second"] = [end(start(fit(out, *more))) for more in ([], ["--resume"])]
gate.touch()
found["first"] = end(first)[0], names(out)

# In a script of the user's, without the command line: her handler is called, and stays.
def script():
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    at_step(1, ask(signal.SIGTERM))()
    entries = [{"start": pd.Period("2024-01-01", "h"), "target": own} for own in values]
    predictor = ChronosEstimator(prediction_length=6, checkpoint="bolt-nano", max_epochs=1, num_batches_per_epoch=2,
                                 gate="keep", progress=False, device="cpu").train(entries)
    ask(signal.SIGTERM)()
    print(json.dumps([asked, predictor.fit.steps]))
    sys.stdout.flush()
    os._exit(0)
found["script"] = end(start([], script))
# Without a handler the signal ends the process as ever.
def plain():
    at_step(1, ask(signal.SIGTERM))()
    entries = [{"start": pd.Period("2024-01-01", "h"), "target": own} for own in values]
    ChronosEstimator(prediction_length=6, checkpoint="bolt-nano", max_epochs=1, num_batches_per_epoch=2,
                     progress=False, device="cpu").train(entries)
found["plain"] = end(start([], plain))[0]
print(json.dumps(found))
"""


def test_sigterm_says_how_to_go_on_and_two_fits_do_not_meet(tmp_path: Path) -> None:
    found = forks(ASKED, tmp_path)
    goes_on = "repeat the command with --resume to go on after the last epoch that was finished"
    code, output, left = found["term"]
    assert (code, output.splitlines()[-1], left) == (143, f"terminated (SIGTERM); {goes_on}", ["training"])
    code, output, left = found["hup"]
    assert (code, output.splitlines()[-1], left) == (129, f"terminated (SIGHUP); {goes_on}", ["training"])
    code, output, left = found["early"]
    assert (code, left) == (143, None)
    assert output.splitlines()[-1] == "terminated (SIGTERM); nothing was written: repeat the command"
    assert found["resumed"] == [0, ["adapter", "gluonts-config.json", "predictor.json"]]
    for code, output in found["second"]:
        assert (code, output) == (2, f"error: folder '{tmp_path / 'two'}' is in use by a fit that is running")
    assert found["first"] == [0, ["adapter", "gluonts-config.json", "predictor.json"]]
    assert found["script"] == [0, "[[1, 1], 2]"]
    assert found["plain"] == -signal.SIGTERM


STUDY = """
import os, sys, time
from pathlib import Path
from gluonts_peft.trials import StudySpec, grid

def run(trial, folder):
    (Path(folder) / f"worker-{os.getpid()}").touch()
    time.sleep(3000)

grid.run_cell = run
if __name__ == "__main__":
    from gluonts_peft.processes import terminable
    study = StudySpec(base={"family": "chronos", "checkpoint": "bolt-nano", "prediction_length": 6,
                            "data": {"source": "synthetic", "series": 8, "steps": 60, "windows": 1}},
                      grid={"seed": [0, 1, 2]})
    with terminable():
        grid.run_study(study, sys.argv[1], jobs=2, progress=False)
"""


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_of_a_study_end_with_their_driver(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(STUDY)
    started = {
        number: subprocess.Popen(
            [sys.executable, str(tmp_path / "main.py"), str(tmp_path / number.name)], stderr=subprocess.DEVNULL
        )
        for number in (signal.SIGKILL, signal.SIGTERM)
    }
    for number, driver in started.items():
        out, deadline = tmp_path / number.name, time.monotonic() + 1100
        while len(workers := list(out.glob("worker-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        found = [int(path.name.partition("-")[2]) for path in workers]
        assert len(found) == 2
        assert all(map(alive, found))
        driver.send_signal(number)
        driver.wait(timeout=600)
        deadline = time.monotonic() + 1100
        while any(map(alive, found)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, found)), f"workers outlive a driver that got {number.name}"


def test_a_verb_leaves_nothing_in_the_home_folder_nor_in_the_one_for_temporary_files(tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    (tmp_path / "data.csv").write_text(
        "timestamp,target\n" + "".join(f"2024-01-{day:02d},{day % 7}\n" for day in range(1, 31))
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("MPLCONFIGDIR", "XDG_CACHE_HOME")}
    # Importing what trains is enough to fill the caches.
    program = "import importlib\nfrom gluonts_peft import cli\n"
    program += "verb = importlib.import_module('gluonts_peft.cli.forecast')\nreal = verb.load_model\n"
    program += "def load_model(*given):\n    import gluonts_peft.training\n    return real(*given)\n"
    program += "verb.load_model = load_model; cli.main()"
    result = subprocess.run(
        [sys.executable, "-c", program, "forecast", "data.csv", "--item-id", "", "--horizon", "3", "--out", "f.csv"],
        cwd=tmp_path,
        env={**kept, "HOME": str(home), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert result.returncode == 0, result.stderr
    assert list(home.rglob("*")) == list(temporary.rglob("*")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "f.csv", "home", "temporary"]


def test_temporary_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    with scratch("mine-", str(tmp_path)) as folder:
        # No process has so large a number.
        for name, owner in (("mine-dead0000", f"2000000000 {machine()}"), ("mine-other000", "2000000000 elsewhere")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "owner").write_text(owner)
        (tmp_path / "mine-notours0").mkdir()
        with scratch("mine-", str(tmp_path)):
            assert folder.exists()
            assert not (tmp_path / "mine-dead0000").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine-notours0", "mine-other000"]


@pytest.fixture
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_only_what_would_end_the_process_is_replaced() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with pytest.raises(Terminated) as caught, terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert (str(caught.value), caught.value.exit_code) == ("SIGTERM", 143)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with terminable(), keeping_handler(signal.SIGTERM):
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        ours = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert ours is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("_handlers")
def test_another_thread_touches_no_handler() -> None:
    found = []

    def elsewhere() -> None:
        with terminable(), keeping_handler(signal.SIGTERM):
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before]


def test_an_interruption_is_found_behind_another_error() -> None:
    def compiled() -> None:
        try:
            raise Terminated(signal.SIGTERM)
        except Terminated as error:
            raise SystemError("returned a result with an exception set") from error

    with pytest.raises(SystemError) as caught:
        compiled()
    assert isinstance(asked_to_end(caught.value), Terminated)
    assert asked_to_end(ValueError("wrong")) is None
