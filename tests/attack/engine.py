"""Run hostile cases by the thousand and count how each ends.

A section is a function of a number, a generator of random numbers and a folder of its own, which tries one case and
returns ``"refused"`` or ``"right"``, or raises :class:`WrongError`. Each section runs in a process of its own that is
watched: a case that ends the process, or makes no progress, is counted, and the rest goes on in a new process.
"""

from __future__ import annotations

import json
import linecache
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Section = Callable[[int, np.random.Generator, Path], str]

#: How a case may end; the last seven must not happen.
ENDS = ("right", "refused", "traceback", "hang", "died", "code run", "wrong", "lost", "stuck")
BAD = ENDS[2:]
#: Seconds without a finished case after which a process is taken to hang; the first case pays the imports.
PATIENCE = 120.0
OURS = (ValueError, TypeError, OSError, NotImplementedError)


class WrongError(Exception):
    """A case was accepted, and gave something else than what was put in."""


class LostError(Exception):
    """Something that was finished is gone, or differs."""


class StuckError(Exception):
    """What was interrupted cannot go on."""


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def refused(error: BaseException) -> bool:
    """Whether an error is one that a person can act on: raised on purpose, by this project, with words."""
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, OURS) or not str(error).strip():
        return False
    if type(error).__name__ == "ValidationError" and "PeftEstimatorModel" in str(error):
        # GluonTS's own words for an argument of the wrong type; they name it.
        return True
    last = frames[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return "gluonts_peft" in last.filename and line.startswith("raise")


def run(
    sections: dict[str, tuple[Section, int]], *, seed: int = 0, only: int | None = None
) -> dict[str, dict[str, Any]]:
    """Run all sections, two beside each other, and return counts and the first bad cases of each."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="attack-") as place:
        waiting = [(name, function, count) for name, (function, count) in sections.items()]
        running: dict[str, _Watched] = {}
        while waiting or running:
            while waiting and len(running) < 2:
                name, function, count = waiting.pop(0)
                running[name] = _Watched(context, name, function, count, seed, Path(place) / name, only)
            time.sleep(0.2)
            for name, watched in list(running.items()):
                if watched.done():
                    found[name] = watched.result()
                    del running[name]
                    say(line_of(name, found[name]))
    return found


def line_of(name: str, result: dict[str, Any]) -> str:
    """Return one line a section."""
    counts = result["counts"]
    return f"{name:<14}" + "".join(f"{counts.get(end, 0):>11}" for end in ENDS) + f"{result['seconds']:>9.0f} s"


class _Watched:
    def __init__(
        self, context: Any, name: str, function: Section, count: int, seed: int, folder: Path, only: int | None
    ) -> None:
        self.context, self.name, self.function, self.count, self.seed = context, name, function, count, seed
        self.folder = folder
        self.first = 0 if only is None else only
        self.last = count if only is None else only + 1
        folder.mkdir(parents=True)
        self.journal = folder / "journal"
        self.journal.touch()
        self.started = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.bad: list[tuple[int, str, str]] = []
        self.read = 0
        self._start()

    def _start(self) -> None:
        arguments = (self.function, self.seed, self.first, self.last, self.folder)
        self.process = self.context.Process(target=_work, args=arguments)
        self.process.start()
        self.progress = time.monotonic()

    def _collect(self) -> None:
        lines = self.journal.read_text().splitlines()
        for line in lines[self.read :]:
            number, end, about = json.loads(line)
            self.counts[end] += 1
            self.first = number + 1
            self.progress = time.monotonic()
            if end in BAD:
                self.bad.append((number, end, about))
                if len(self.bad) <= 20:
                    say(f"  {self.name} {number}: {end}: {about[:2000]}")
        self.read = len(lines)

    def done(self) -> bool:
        self._collect()
        alive = self.process.is_alive()
        if alive and time.monotonic() - self.progress > PATIENCE:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.join()
            self._append("hang", f"no progress in {PATIENCE:.0f} s")
        elif not alive:
            self._collect()
            if self.first >= self.last:
                return True
            self._append("died", f"exit code {self.process.exitcode}")
        else:
            return False
        self._collect()
        if self.first >= self.last:
            return True
        self._start()
        return False

    def _append(self, end: str, about: str) -> None:
        with self.journal.open("a") as file:
            file.write(json.dumps([self.first, end, about]) + "\n")

    def result(self) -> dict[str, Any]:
        return {"counts": self.counts, "bad": self.bad, "seconds": time.monotonic() - self.started}


def _work(function: Section, seed: int, first: int, last: int, folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    canary = folder / "canary"
    os.environ["ATTACK_CANARY"] = str(canary)
    with (folder / "journal").open("a", buffering=1) as journal:
        for number in range(first, last):
            place = folder / "case"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            about = ""
            try:
                end = function(number, np.random.default_rng([seed, number]), place)
            except WrongError as error:
                end, about = "wrong", str(error)
            except LostError as error:
                end, about = "lost", str(error)
            except StuckError as error:
                end, about = "stuck", str(error)
            except BaseException as error:
                end = "refused" if refused(error) else "traceback"
                about = "" if end == "refused" else "".join(traceback.format_exception(error)[-6:])
            if canary.exists():
                canary.unlink()
                end, about = "code run", f"case {number} ran code"
            journal.write(json.dumps([number, end, about]) + "\n")
