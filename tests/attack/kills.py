"""SIGKILL at the renames, syncs and folders that a run makes, and at moments between them; then the same command again.

Runs are forks of a process that has imported everything, so that a case takes a second or two.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from engine import LostError, StuckError, WrongError
from inputs import SEARCH, STUDY

#: What puts files in their places; a process may die before each, and after each.
CALLS = ("replace", "rename", "fsync", "mkdir", "rmdir", "unlink")
VERBS = ("fit", "study", "search")
#: Seconds after which a run is taken to be stuck.
LIMIT = 240
VOLATILE = {"seconds", "seconds_total", "peak_memory", "created", "versions", "python", "memory"}


def _forked(action: Callable[[], Any], log: Path) -> int:
    """Run something in a fork; returns its exit code, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(LIMIT)
            sink = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            action()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _count_down(moment: int, after: bool) -> None:
    """Kill this process at a call, counted over all of them."""
    left = [moment]

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    for name in CALLS:
        setattr(os, name, watched(getattr(os, name)))


def _run(*arguments: str) -> None:
    from gluonts_peft.cli import app

    app(list(arguments), prog_name="gluonts-peft")


@cache
def _preload() -> bool:
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401

    import gluonts_peft.cli
    import gluonts_peft.estimator
    import gluonts_peft.trials
    import gluonts_peft.trials.searching  # noqa: F401
    import gluonts_peft_chronos  # noqa: F401

    return True


def _arguments(verb: str, place: Path, out: Path) -> list[str]:
    if verb == "fit":
        given = "--horizon 4 --context 24 --epochs 2 --batches 2 --batch-size 4 --adapter layernorm --gate keep"
        return ["fit", str(place / "table.csv"), "--out", str(out), *given.split(), "--checkpoint", "bolt-nano"]
    options = ["--serial"] if verb == "search" else []
    return [verb, str(place / f"{verb}.yaml"), "--out", str(out), *options]


def _inputs(place: Path) -> None:
    generator = np.random.default_rng(0)
    stamps = pd.date_range("2024-01-01", periods=60, freq="h")
    tables = [
        pd.DataFrame({"item_id": f"i{item}", "timestamp": stamps, "target": 5 + generator.standard_normal(60)})
        for item in range(3)
    ]
    pd.concat(tables).to_csv(place / "table.csv", index=False)
    grid = {"adapter": ["layernorm", "bitfit"]}
    base = {name: value for name, value in STUDY["base"].items() if name != "adapter"}
    (place / "study.yaml").write_text(yaml.safe_dump({**STUDY, "base": base, "grid": grid}))
    serial = {name: value for name, value in SEARCH.items() if name != "scheduler"}
    serial = {**serial, "base": {**SEARCH["base"], "adapter": "layernorm"}}
    (place / "search.yaml").write_text(yaml.safe_dump(serial))


@cache
def _reference(verb: str, place: Path) -> dict[str, Any]:
    out = place / f"reference-{verb}"
    if not out.exists():
        _inputs(place)
        code = _forked(lambda: _run(*_arguments(verb, place, out)), place / "reference.log")
        if code != 0:
            raise RuntimeError(f"the undisturbed {verb} ends with {code}: {(place / 'reference.log').read_text()}")
    return _result(verb, out)


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(each) for key, each in value.items() if key not in VOLATILE}
    return [_steady(each) for each in value] if isinstance(value, list) else value


def _result(verb: str, out: Path) -> dict[str, Any]:
    """Return what has to be the same after an interruption: weights, scores, forecasts."""
    if verb == "fit":
        record = _steady(json.loads((out / "predictor.json").read_text()))
        return {"record": record, "weights": (out / "adapter" / "adapter_model.safetensors").read_bytes()}
    found = {}
    for file in sorted(out.glob("trials/*/result.json")):
        record = json.loads(file.read_text())
        found[file.parent.name] = {name: record.get(name) for name in ("status", "scores", "gate", "verdict", "epochs")}
    return {"trials": _steady(found)}


def _finished(out: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(file): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in out.glob("trials/*/result.json")
        if json.loads(file.read_text()).get("status") == "finished"
    }


def kills(number: int, generator: np.random.Generator, folder: Path) -> str:
    """Kill a run of a verb, run it again, and compare it with one that nothing happened to."""
    _preload()
    place = folder.parent
    verb = VERBS[number % len(VERBS)]
    wanted = _reference(verb, place)
    out, log = folder / "out", folder / "log"
    moment, after = number // len(VERBS) + 1, bool(generator.random() < 0.5)
    arguments = _arguments(verb, place, out)

    def dies() -> None:
        _count_down(moment, after)
        _run(*arguments)

    code = _forked(dies, log)
    if code == 0:
        # There are fewer calls than that: a moment between them.
        shutil.rmtree(out)
        delay = float(generator.random() * 1.5) + 0.01

        def ends() -> None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, delay)
            _run(*arguments)

        code = _forked(ends, log)
    if code not in (0, -signal.SIGKILL, -signal.SIGALRM):
        raise WrongError(f"{verb} at {moment}: ended with {code} before it was killed: {log.read_text()[-1500:]}")
    finished = _finished(out) if verb != "fit" else {}
    resumed = [*arguments, "--resume"] if verb == "fit" and code != 0 else arguments
    if verb == "fit" and code == 0:
        return "right"
    code = _forked(lambda: _run(*resumed), log)
    if code != 0:
        raise StuckError(
            f"{verb} killed at {moment} ({after=}) does not go on, exit code {code}: {log.read_text()[-1500:]}"
        )
    for file, (content, changed) in finished.items():
        if not Path(file).is_file() or Path(file).read_bytes() != content or os.stat(file).st_mtime_ns != changed:
            raise LostError(f"{verb} killed at {moment}: {Path(file).parent.name} was finished, and ran again")
    found = _result(verb, out)
    if found != wanted:
        raise WrongError(f"{verb} killed at {moment} ({after=}) ends otherwise than undisturbed")
    remains = [path.name for path in out.rglob("*") if "partial" in path.name]
    remains += [path.name for path in folder.iterdir() if path.name not in ("out", "log")]
    if remains:
        raise WrongError(f"{verb} killed at {moment} ({after=}) leaves {remains} behind")
    return "right"
