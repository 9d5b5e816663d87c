"""Studies: every cell of a grid, one after another or in several processes, each finished cell on disk."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import statistics
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import foreign, locked, record, write_atomically
from ..processes import end_with_parent, end_workers
from .identity import base_fingerprints, trial_folder
from .reading import from_record, read_record
from .spec import TrialResult, TrialSpec
from .strict import SpecError
from .studyspec import StudySpec

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..networks import Networks

#: Runs trials in a folder, and says which are running.
Executor = Callable[[list[TrialSpec], Path, Callable[[list[TrialSpec]], None]], Generator[TrialResult, None, None]]

__all__ = ["STUDY", "Estimate", "estimate", "expand", "read_study", "run_study", "trial_folder"]

STUDY = "study.json"


def expand(study: StudySpec) -> list[TrialSpec]:
    """Return the trials of a study, each once: baselines first, then the cells of the grid in its order."""
    trials = [TrialSpec(**form) for form in (*study.baseline_forms(), *study.forms())]
    return list({trial.hash(): trial for trial in trials}.values())


def run_study(
    study: StudySpec,
    folder: str | Path,
    *,
    jobs: int = 1,
    progress: bool = True,
    executor: Executor | None = None,
) -> list[TrialResult]:
    """Run the trials of a study that are not finished in its folder yet.

    A trial that fails becomes a failed result with its error and stops no other; it is tried again when the study is
    run again. An interrupted study goes on where it was, within an interrupted trial from its last epoch.

    Parameters
    ----------
    study
        The study.
    folder
        New, empty, or of the same study: ``study.json`` and ``trials/<hash>/result.json`` for each trial.
    jobs
        Trials at a time, each in a process of its own with its share of the CPU cores; 1 runs them in this process.
        The environment variable ``OMP_NUM_THREADS``, if set, decides the threads of a process instead.
    progress
        Show a progress bar with the trials that are running and the time that is left.
    executor
        Runs the trials elsewhere; see :func:`gluonts_peft.trials.on_ray`.

    Returns
    -------
    list[TrialResult]
        Of all trials, finished or failed, in the order of :func:`expand`.

    Raises
    ------
    ValueError
        If ``jobs`` is not positive, the folder holds anything else or is in use by a study that is running, or data or
        pretrained weights have changed since trials were run.
    SpecError
        If an option of an adapter is unknown or data cannot be read, before anything is run or written; or if a result
        in the folder is damaged.
    """
    if jobs < 1:
        raise ValueError(f"jobs {jobs} is not positive; name the number of trials at a time")
    folder = Path(folder)
    trials = expand(study)
    _check_claim(folder, trials)
    _check_usable(trials)
    with locked(folder, "study"):
        _claim(folder, study, trials)
        results = {trial.hash(): TrialResult.read(trial_folder(folder, trial)) for trial in trials}
        done = [result for result in results.values() if result is not None and result.status == "finished"]
        _check_unchanged(folder, done)
        finished = {result.spec.hash() for result in done}
        todo = [trial for trial in trials if trial.hash() not in finished]
        with _Bar(len(trials), len(done), enabled=progress) as bar:
            if executor is not None:
                running = executor(todo, folder, bar.show)
            else:
                running = _serial(todo, folder, bar) if jobs == 1 else _parallel(todo, folder, jobs, bar)
            # Closing it at once lets workers end before an exception goes further.
            with closing(running):
                for new in running:
                    results[new.spec.hash()] = new
                    bar.advance()
    return [result for trial in trials if (result := results[trial.hash()]) is not None]


def read_study(folder: str | Path) -> StudySpec:
    """Read which study a folder holds.

    Raises
    ------
    SpecError
        If it holds none, or ``study.json`` is damaged.
    """
    return from_record(StudySpec, Path(folder) / STUDY, read_record(folder, STUDY, "study"))


@dataclass(frozen=True)
class Estimate:
    """What is left of a study.

    Parameters
    ----------
    cells
        Every trial, and ``"finished"``, ``"failed"`` or ``"to run"``.
    seconds
        That the trials that are left take, one after another; early stopping may make it less.
    sources
        How each part of ``seconds`` was found.
    """

    cells: list[tuple[TrialSpec, str]]
    seconds: float
    sources: list[str]


def estimate(study: StudySpec, folder: str | Path) -> Estimate:
    """Say how long what is left of a study will take, without running it.

    Trials that are finished in the folder tell how long the others of their family and checkpoint take, those with the
    same adapter first. Where none is finished one trial is measured, with ten steps of training at most, and scaled to
    the steps of the whole; what it leaves is removed again.

    Parameters
    ----------
    study
        The study.
    folder
        As for :func:`run_study`; it need not exist.

    Raises
    ------
    ValueError
        If the folder holds anything else, or a trial that is measured cannot run.
    SpecError
        If an option of an adapter is unknown or data cannot be read.
    """
    folder = Path(folder)
    trials = expand(study)
    _check_claim(folder, trials)
    _check_usable(trials)
    results = {trial.hash(): TrialResult.read(trial_folder(folder, trial)) for trial in trials}
    cells: list[tuple[TrialSpec, str]]
    cells = [(trial, "to run" if (found := results[trial.hash()]) is None else found.status) for trial in trials]
    finished = [result for result in results.values() if result is not None and result.status == "finished"]
    left = [trial for trial, state in cells if state != "finished"]
    seconds, known, measured = 0.0, 0, dict[tuple[Any, ...], TrialResult]()
    for trial in left:
        alike = [
            result.seconds_total
            for narrow in (True, False)
            for result in finished
            if result.seconds_total is not None and _kind(result.spec, narrow) == _kind(trial, narrow)
        ]
        if alike:
            # Those with the same adapter come first; the first trial of a process loads for all.
            seconds += statistics.median(alike[:5])
            known += 1
            continue
        kind = _kind(trial, False)
        if kind not in measured:
            measured[kind] = _measure(trial, folder)
        seconds += _scaled(measured[kind], trial)
    sources = [f"{known} from {len(finished)} finished trials in the folder"] if known else []
    sources += [f"{result.spec.name()} measured with {result.steps or 0} steps" for result in measured.values()]
    return Estimate(cells, seconds, sources)


def _kind(trial: TrialSpec, narrow: bool) -> tuple[Any, ...]:
    kind = (trial.family, trial.checkpoint, trial.trains)
    return (*kind, json.dumps(trial.adapter)) if narrow else kind


def _measure(trial: TrialSpec, folder: Path) -> TrialResult:
    from .run import run_trial

    training = trial.training
    short = {"max_epochs": 1, "num_batches_per_epoch": min(10, training.num_batches_per_epoch)}
    form = trial.normal_form()
    if trial.trains:
        form["training"] |= short | {"time_limit": None}
    # The innermost first.
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".measured-", dir=folder) as place:
            # The first one of a process loads and compiles for all, so the second one counts.
            run_trial(TrialSpec(**form), Path(place) / "first")
            return run_trial(TrialSpec(**form), Path(place) / "second")
    finally:
        for each in made:
            each.rmdir()


def _scaled(measured: TrialResult, trial: TrialSpec) -> float:
    total, training = measured.seconds_total or 0.0, measured.seconds or 0.0
    if not measured.steps:
        return total
    steps = trial.training.max_epochs * trial.training.num_batches_per_epoch
    longest = math.inf if trial.training.time_limit is None else trial.training.time_limit
    return total - training + min(training * steps / measured.steps, longest)


def _claim(folder: Path, study: StudySpec, trials: list[TrialSpec]) -> None:
    _check_claim(folder, trials)
    write_atomically(folder / STUDY, json.dumps(record(study.normal_form()), indent=1) + "\n")


def _check_claim(folder: Path, trials: list[TrialSpec]) -> None:
    if (folder / STUDY).is_file():
        there = {trial.hash(): trial for trial in expand(read_study(folder))}
        here = {trial.hash(): trial for trial in trials}
        if there.keys() != here.keys():
            gone = [trial.name() for key, trial in there.items() if key not in here]
            new = [trial.name() for key, trial in here.items() if key not in there]
            examples = [
                f"{len(names)} only {where} (e.g. {names[0]!r})"
                for where, names in (("there", gone), ("here", new))
                if names
            ]
            raise ValueError(
                f"folder '{folder}' holds another study: of its trials {' and '.join(examples)}; name another folder"
            )
    elif folder.exists() and (not folder.is_dir() or foreign(folder)):
        raise ValueError(f"folder '{folder}' is in use and holds no study; name a new or empty one")


def _check_usable(trials: list[TrialSpec]) -> None:
    """Make sure of what a trial learns only when it runs: that adapters and baselines know their options, that packages
    are there, and that data can be read."""
    from ..adapters.load import get_adapter
    from .data import load_data
    from .run import check_baseline

    faults = []
    for adapter in {json.dumps(trial.adapter): trial.adapter for trial in trials}.values():
        try:
            get_adapter(adapter).require_trainable()
        except (ValueError, TypeError) as error:
            faults.append(str(error))
    for trial in trials:
        try:
            check_baseline(trial)
        except (ImportError, ValueError) as error:
            faults.append(str(error))
    for data in dict.fromkeys(data for trial in trials for data in (trial.data, *trial.also.values())):
        try:
            load_data(data)
        except (OSError, ValueError) as error:
            faults.append(f"data of source {data.source!r}: {error}")
    if faults:
        raise SpecError("study", faults)


def _check_unchanged(folder: Path, done: list[TrialResult]) -> None:
    from .data import load_data

    used = {(result.spec.data, result.data_fingerprint) for result in done}
    used |= {(data, result.also_fingerprints.get(name)) for result in done for name, data in result.spec.also.items()}
    for data, fingerprint in used:
        if load_data(data).fingerprint != fingerprint:
            raise ValueError(
                f"the data of trials in '{folder}' have changed since these were run; name another folder, or bring the"
                f" earlier data back: {data!r}"
            )
    weights = base_fingerprints(result.spec for result in done)
    for result in done:
        name = f"{result.spec.family} {result.spec.checkpoint}"
        if name in weights and (result.base or {}).get("fingerprint") != weights[name]:
            raise ValueError(
                f"the pretrained weights of trials in '{folder}' have changed since these were run ({name}); name"
                " another folder, or bring the earlier weights back"
            )


def run_cell(trial: TrialSpec, folder: Path, networks: Networks | None = None) -> TrialResult:
    from .run import run_trial

    try:
        return run_trial(trial, trial_folder(folder, trial), networks=networks)
    except Exception as error:
        return failed_cell(trial, folder, f"{type(error).__name__}: {error}")


def failed_cell(trial: TrialSpec, folder: Path, error: str) -> TrialResult:
    result = TrialResult(spec=trial, status="failed", error=error)
    result.write(trial_folder(folder, trial))
    return result


def _serial(todo: list[TrialSpec], folder: Path, bar: _Bar) -> Generator[TrialResult, None, None]:
    for trial in todo:
        bar.show([trial])
        yield run_cell(trial, folder)


def _parallel(todo: list[TrialSpec], folder: Path, jobs: int, bar: _Bar) -> Generator[TrialResult, None, None]:
    """Run in worker processes; a trial that kills its process fails alone."""
    waiting, suspects = deque(todo), deque[TrialSpec]()
    while waiting or suspects:
        if not suspects:
            suspects.extend((yield from _pool(waiting, folder, jobs, jobs, bar)))
        else:
            # Nobody knows which of those that were running killed the process: each gets one of its own.
            for trial in (yield from _pool(deque([suspects.popleft()]), folder, 1, jobs, bar)):
                yield failed_cell(trial, folder, "the process of the trial was killed; it may have run out of memory")


def _pool(
    waiting: deque[TrialSpec], folder: Path, workers: int, jobs: int, bar: _Bar
) -> Generator[TrialResult, None, list[TrialSpec]]:
    """Run what is waiting, and return what was running when a process died."""
    running: dict[Future[TrialResult], TrialSpec] = {}
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(max(1, _cores() // jobs),),
    )
    try:
        while waiting or running:
            # No more than can run at once, so that an interrupt leaves nothing queued behind it.
            while waiting and len(running) < workers:
                try:
                    running[executor.submit(run_cell, waiting[0], folder)] = waiting[0]
                except BrokenProcessPool:
                    return list(running.values())
                waiting.popleft()
            bar.show(list(running.values()))
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    result = future.result()
                except BrokenProcessPool:
                    return list(running.values())
                del running[future]
                yield result
        return []
    except BaseException:
        # Asked to end: what is running goes on from its last epoch the next time.
        end_workers(executor)
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(threads: int) -> None:
    end_with_parent()
    # Read when torch and numpy are imported, which is after this.
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(threads)))
    import torch

    torch.set_num_threads(threads)
    # Each trial would say again what is left out of its data; results and report have the counts.
    logging.getLogger("gluonts_peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Using `json`-module for json-handling")


class _Bar:
    """Progress over the trials of a study, or nothing."""

    def __init__(self, total: int, done: int, *, enabled: bool) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total, self._done, self._enabled = total, done, enabled

    def __enter__(self) -> _Bar:
        if self._enabled:
            from rich import progress as bar
            from rich.console import Console

            self._progress = bar.Progress(
                bar.TextColumn("trials"),
                bar.BarColumn(),
                bar.MofNCompleteColumn(),
                bar.TimeElapsedColumn(),
                bar.TextColumn("left"),
                bar.TimeRemainingColumn(),
                bar.TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
                # One slow trial should not make the estimate jump.
                speed_estimate_period=600,
            )
            self._task = self._progress.add_task("", total=self._total, completed=self._done)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, running: list[TrialSpec]) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=", ".join(trial.name() for trial in running))

    def advance(self) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)
