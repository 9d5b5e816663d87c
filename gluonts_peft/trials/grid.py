"""Studies: every cell of a grid, one after another or in several processes, each finished cell on disk."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from .spec import BASELINE, SpecError, StudySpec, TrialResult, TrialSpec, write_atomically

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["STUDY", "expand", "read_study", "run_study", "trial_folder"]

STUDY = "study.json"


def expand(study: StudySpec) -> list[TrialSpec]:
    """Return the trials of a study, each once: baselines first, then the cells of the grid in its order."""
    cells = [TrialSpec(**form) for form in study.forms()]
    # They have no context of their own, but it decides which windows are scored.
    baselines = [
        TrialSpec(
            family=BASELINE,
            checkpoint=name,
            adapter="none",
            prediction_length=cell.prediction_length,
            context_length=cell.context_length,
            data=cell.data,
        )
        for name in study.baselines
        for cell in cells
    ]
    return list({trial.hash(): trial for trial in (*baselines, *cells)}.values())


def run_study(study: StudySpec, folder: str | Path, *, jobs: int = 1, progress: bool = True) -> list[TrialResult]:
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

    Returns
    -------
    list[TrialResult]
        Of all trials, finished or failed, in the order of :func:`expand`.

    Raises
    ------
    ValueError
        If ``jobs`` is not positive, the folder holds anything else, or the data have changed since trials were run.
    SpecError
        If a result in the folder is damaged.
    """
    if jobs < 1:
        raise ValueError(f"jobs {jobs} is not positive; name the number of trials at a time")
    folder = Path(folder)
    trials = expand(study)
    _claim(folder, study, trials)
    results = {trial.hash(): TrialResult.read(trial_folder(folder, trial)) for trial in trials}
    done = [result for result in results.values() if result is not None and result.status == "finished"]
    _check_data(folder, done)
    finished = {result.spec.hash() for result in done}
    todo = [trial for trial in trials if trial.hash() not in finished]
    with _Bar(len(trials), len(done), enabled=progress) as bar:
        running = _serial(todo, folder, bar) if jobs == 1 else _parallel(todo, folder, jobs, bar)
        # Closing it at once lets workers end before an exception goes further.
        with closing(running):
            for new in running:
                results[new.spec.hash()] = new
                bar.advance()
    return [result for trial in trials if (result := results[trial.hash()]) is not None]


def trial_folder(folder: Path, trial: TrialSpec) -> Path:
    """Return where a trial of a study lies."""
    return folder / "trials" / trial.hash()


def read_study(folder: str | Path) -> StudySpec:
    """Read which study a folder holds.

    Raises
    ------
    SpecError
        If it holds none, or ``study.json`` is damaged.
    """
    path = Path(folder) / STUDY
    if not path.is_file():
        raise SpecError(f"folder '{folder}'", [f"it has no {STUDY}; name the folder of a study"])
    try:
        return StudySpec(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise SpecError(f"'{path}'", [str(error)]) from error


def _claim(folder: Path, study: StudySpec, trials: list[TrialSpec]) -> None:
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
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder '{folder}' is in use and holds no study; name a new or empty one")
    write_atomically(folder / STUDY, json.dumps(study.normal_form(), indent=1) + "\n")


def _check_data(folder: Path, done: list[TrialResult]) -> None:
    from .run import load_data

    for data, fingerprint in {(result.spec.data, result.data_fingerprint) for result in done}:
        if load_data(data).fingerprint != fingerprint:
            raise ValueError(
                f"the data of trials in '{folder}' have changed since these were run; name another folder, or bring the"
                f" earlier data back: {data!r}"
            )


def _run(trial: TrialSpec, folder: Path) -> TrialResult:
    from .run import run_trial

    try:
        return run_trial(trial, trial_folder(folder, trial))
    except Exception as error:
        return _failed(trial, folder, f"{type(error).__name__}: {error}")


def _failed(trial: TrialSpec, folder: Path, error: str) -> TrialResult:
    result = TrialResult(spec=trial, status="failed", error=error)
    result.write(trial_folder(folder, trial))
    return result


def _serial(todo: list[TrialSpec], folder: Path, bar: _Bar) -> Generator[TrialResult, None, None]:
    for trial in todo:
        bar.show([trial])
        yield _run(trial, folder)


def _parallel(todo: list[TrialSpec], folder: Path, jobs: int, bar: _Bar) -> Generator[TrialResult, None, None]:
    """Run in worker processes; a trial that kills its process fails alone."""
    waiting, suspects = deque(todo), deque[TrialSpec]()
    while waiting or suspects:
        if not suspects:
            suspects.extend((yield from _pool(waiting, folder, jobs, jobs, bar)))
        else:
            # Nobody knows which of those that were running killed the process: each gets one of its own.
            for trial in (yield from _pool(deque([suspects.popleft()]), folder, 1, jobs, bar)):
                yield _failed(trial, folder, "the process of the trial was killed; it may have run out of memory")


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
                trial = waiting.popleft()
                running[executor.submit(_run, trial, folder)] = trial
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
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(threads: int) -> None:
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
