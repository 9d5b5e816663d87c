"""Searches: trials that are chosen one after another, on the nodes of a Ray cluster or in this process.

    ranking = search(load_search("ray_configs/searches/quick.yaml"), "/shared/runs/quick")

All that counts is in the folder, as JSON: what was proposed, how each trial was scored after which epoch, and the
result of each under the hash of its spec, data and code. So the same call goes on where it was, whatever has died in
between, with other nodes and even without Ray, whose own state is never read again.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import foreign, locked, workshop, write_atomically
from ..moved import moved
from .cluster import check_nodes, connected, shared_folder, whereabouts
from .raytune import with_tune
from .records import BEST, FINISHED, RANKING, SEARCH, Entry, not_helped, ranking, read_search, trial_folder
from .searchboard import Board
from .searchrun import Run
from .searchspec import SearchSpec
from .searchtrial import run_and_report
from .strict import SpecError

__all__ = ["search"]


def search(
    spec: SearchSpec,
    folder: str | Path,
    *,
    address: str | None = None,
    serial: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Run a search, or go on with it, and rank its trials.

    Parameters
    ----------
    spec
        The search.
    folder
        Absolute, new, empty, or of the same search, on storage that all nodes share: ``search.json``,
        ``proposals.json``, ``trials/<hash>/`` for each trial with ``result.json`` and ``evaluations.json``,
        ``ranking.csv``, and ``best/``, the predictor of the best trial.
    address
        Ray cluster, see :func:`gluonts_peft.trials.cluster.connected`; by default Ray is started on this machine.
    serial
        Run one trial after another in this process, without Ray, for scheduler ``"fifo"`` only. The ranking is the same
        as with Ray; with searcher ``"optuna"``, if ``max_concurrent`` is 1.
    progress
        Show a live table of the best trials.

    Returns
    -------
    pandas.DataFrame
        See :func:`ranking`.

    Raises
    ------
    ClusterError
        If the folder is relative or not shared, or a node is not fit, before anything is run.
    SpecError, ValueError
        If the folder holds anything else, an option of an adapter cannot be used, the data cannot be read, or data or
        pretrained weights have changed since trials were run.

    Warns
    -----
    TuningDidNotHelp
        If there is no evidence on the validation windows of its training that the best trial is better than zero-shot;
        ``best/`` is it all the same.
    """
    if serial and spec.scheduler.name != "fifo":
        raise SpecError("search", [f"scheduler {spec.scheduler.name!r} needs Ray; leave serial out, or name 'fifo'"])
    folder = shared_folder(folder)
    _check_adapters(spec)
    with _claimed(folder, spec), Board(spec, enabled=progress) as board:
        run = Run(spec, folder, board)
        if serial:
            _serially(run)
        elif not run.is_done():
            with connected(address):
                check_nodes(folder, run.bases(), {"CPU": spec.resources.cpu, "GPU": spec.resources.gpu})
                with_tune(run)
        run.wait_until_visible()
    frame = ranking(folder)
    write_atomically(folder / RANKING, frame.to_csv())
    _keep_best(frame, folder)
    return frame


def _keep_best(frame: pd.DataFrame, folder: Path) -> None:
    """Copy the predictor of the first trial to where it is easily found, and warn without evidence for it."""
    from ..training import TuningDidNotHelp
    from .run import PREDICTOR

    best = frame[frame["status"] == FINISHED].head(1)
    if best.empty:
        return
    with workshop(folder / BEST, "partial", "search") as hidden:
        shutil.copytree(folder / best["folder"].iloc[0] / PREDICTOR, hidden / BEST)
        shutil.rmtree(folder / BEST, ignore_errors=True)
        os.replace(hidden / BEST, folder / BEST)
    message = not_helped(frame)
    if message is not None:
        warnings.warn(TuningDidNotHelp(f"{message}; '{folder / BEST}' holds it all the same"), stacklevel=3)


def _check_adapters(spec: SearchSpec) -> None:
    """Make sure that adapters know the options that are searched over, which a trial learns only when it runs."""
    from ..adapters.load import get_adapter

    faults = []
    for values in ({}, *spec.corners()):
        try:
            get_adapter(spec.trial(values).adapter)
        except (ValueError, TypeError) as error:
            faults.append(f"{'space with ' + json.dumps(values) if values else 'base'}: {error}")
    if faults:
        raise SpecError("search", faults)


@contextmanager
def _claimed(folder: Path, spec: SearchSpec) -> Iterator[None]:
    """Make sure that a folder is of this search, and of no other process, for the time of the context."""
    if (folder / SEARCH).is_file():
        if not spec.same_trials(read_search(folder)):
            raise ValueError(f"folder '{folder}' holds another search; name another folder")
    elif folder.exists() and (not folder.is_dir() or foreign(folder)):
        raise ValueError(f"folder '{folder}' is in use and holds no search; name a new or empty one")
    with locked(folder, "search"):
        yield


class _OutOfTime(Exception):  # noqa: N818
    pass


def _serially(run: Run) -> None:
    settings = run.settings()
    while (entry := run.next()) is not None and not run.out_of_time():
        last: dict[str, Any] = {}

        def report(found: dict[str, Any], entry: Entry = entry, last: dict[str, Any] = last) -> None:
            last.update(found, key=entry.key, values=json.dumps(entry.values))
            run.observe(entry.number, last)
            if run.out_of_time() and not found["finished"]:
                raise _OutOfTime

        run.board.know(entry, "running")
        error = None
        try:
            run_and_report(
                run.spec.trial(entry.values),
                trial_folder(run.folder, entry.key),
                report,
                columns=settings["columns"],
                every=settings["every"],
                where=whereabouts(),
                visible_context=settings["context"],
            )
        except _OutOfTime:
            return
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        run.ended(entry.number, last or None, error)


__getattr__ = moved(__name__, {"trial_key": "gluonts_peft.trials.searchrun"})
