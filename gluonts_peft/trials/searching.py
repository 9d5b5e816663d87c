"""Searches: trials that are chosen one after another, on the nodes of a Ray cluster or in this process.

    ranking = search(load_search("ray_configs/searches/quick.yaml"), "/shared/runs/quick")

All that counts is in the folder, as JSON: what was proposed, how each trial was scored after which epoch, and the
result of each under the hash of its spec, data and code. So the same call goes on where it was, whatever has died in
between, with other nodes and even without Ray, whose own state is never read again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..files import foreign, locked, record, workshop, write_atomically
from .cluster import (
    check_nodes,
    code_versions,
    connected,
    quiet_worker,
    room,
    shared_folder,
    whereabouts,
)
from .identity import base_fingerprints
from .reading import read_record
from .records import (
    BEST,
    FAILED,
    FINISHED,
    MISSING,
    RANKING,
    SEARCH,
    STOPPED,
    Entry,
    Journal,
    Record,
    as_number,
    cell,
    not_helped,
    ranking,
    read_search,
    trial_folder,
    value_at,
)
from .space import Proposer, SearchSpec, metric_columns
from .spec import TrialResult, TrialSpec, merged
from .strict import SpecError

if TYPE_CHECKING:
    from gluonts.model.predictor import Predictor

    from ..networks import Networks

__all__ = ["run_and_report", "search", "trial_key"]

Report = Callable[[dict[str, Any]], None]

# Network file systems show what others wrote after a while.
_PATIENCE = 90.0
_SHOWN = 10


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
    with _claimed(folder, spec), _Board(spec, enabled=progress) as board:
        run = _Run(spec, folder, board)
        if serial:
            _serially(run)
        elif not run.is_done():
            with connected(address):
                check_nodes(folder, run.bases(), {"CPU": spec.resources.cpu, "GPU": spec.resources.gpu})
                _with_tune(run)
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


def trial_key(spec: TrialSpec, data: str, code: Mapping[str, str], *lineage: Any) -> str:
    """Return the name of a trial's folder: the hash of its spec, data and code, and of what else it goes on from."""
    form = [spec.normal_form(), data, dict(code), *lineage]
    return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()


class _Run:
    """A search while it runs: which trial is next, and what is known of the others."""

    def __init__(self, spec: SearchSpec, folder: Path, board: _Board) -> None:
        from .data import load_data

        self.spec, self.folder, self.board = spec, folder, board
        self.started = time.monotonic()
        base = TrialSpec(**spec.base)
        self.data = load_data(base.data).fingerprint
        self.also = {name: load_data(other).fingerprint for name, other in base.also.items()}
        self.weights = base_fingerprints(self.bases())
        self.code = code_versions(self.bases())
        self._check_unchanged()
        self.journal = Journal(folder)
        self.proposer = Proposer(spec, [entry.values for entry in self.journal.entries])
        self.reported: set[int] = set()
        self._waiting = list(self.journal.entries)
        # A scheduler compares a trial with the earlier ones, so that it has to hear of them again.
        self.settled = {entry.number for entry in self.journal.entries if self._settled(entry)}
        if spec.scheduler.name not in ("asha", "hyperband"):
            self._waiting = [entry for entry in self._waiting if entry.number not in self.settled]
        for entry in self.journal.entries:
            if entry.number in self.settled:
                scores = Record.read(trial_folder(folder, entry.key)).scores(spec.objective)
                self.proposer.tell(entry.values, [as_number(score) for score in scores])
                board.know(entry, FINISHED if entry.stopped is None else STOPPED, as_number(scores[0]))

    def _check_unchanged(self) -> None:
        path = self.folder / SEARCH
        form = {
            "spec": self.spec.normal_form(),
            "data": self.data,
            "also": self.also,
            "weights": self.weights,
            "code": self.code,
        }
        if path.is_file():
            there = read_record(self.folder, SEARCH, "search")
            for name in ("also", "weights", "code"):
                if not isinstance(there.get(name) or {}, dict):
                    raise SpecError(f"'{path}'", [f"{name} is {there[name]!r}, not a mapping"])
            if there.get("data") != self.data:
                raise ValueError(
                    f"the data of the search in '{self.folder}' have changed; name another folder, or bring the earlier"
                    " data back"
                )
            for what, mine in (("also", self.also), ("weights", self.weights)):
                earlier = there.get(what) or {}
                changed = [name for name in sorted({*mine, *earlier}) if mine.get(name) != earlier.get(name)]
                if changed:
                    which = "data of also" if what == "also" else "pretrained weights"
                    raise ValueError(
                        f"the {which} of the search in '{self.folder}' have changed ({', '.join(changed)}); name"
                        " another folder, or bring the earlier ones back"
                    )
            if there.get("code") != self.code:
                raise ValueError(
                    f"the search in '{self.folder}' was run with {_words(there.get('code'))}, here is"
                    f" {_words(self.code)}; name another folder, or install the earlier versions"
                )
        write_atomically(path, json.dumps(record(form), indent=1) + "\n")

    def _settled(self, entry: Entry) -> bool:
        result = TrialResult.read(trial_folder(self.folder, entry.key))
        return entry.status(result) in (FINISHED, STOPPED)

    def bases(self) -> list[TrialSpec]:
        """Return trials with all checkpoints and adapters that can come."""
        return [TrialSpec(**self.spec.base), *map(self.spec.trial, self.spec.corners())]

    def is_done(self) -> bool:
        """Whether no trial is left to run."""
        if len(self.settled) < len(self.journal.entries):
            return False
        entry = self._new()
        if entry is not None:
            self._waiting.append(entry)
        return entry is None

    def next(self) -> Entry | None:
        """Return the next trial to run, or None after the last."""
        return self._waiting.pop(0) if self._waiting else self._new()

    def _new(self) -> Entry | None:
        entries, most = self.journal.entries, self.spec.num_samples
        if most is not None and len(entries) >= most:
            return None
        values = self.proposer.propose()
        if values is None:
            return None
        number = len(entries)
        member = [number] if self.spec.scheduler.name == "pbt" else []
        entry = Entry(number, values, trial_key(self.spec.trial(values), self.data, self.code, *member))
        entries.append(entry)
        self.journal.write()
        return entry

    def more(self) -> int:
        """Return how many trials can still come."""
        if self.spec.num_samples is None:
            return len(self._waiting) + len(list(self.spec.grid())) + 1
        return len(self._waiting) + max(0, self.spec.num_samples - len(self.journal.entries))

    def observe(self, number: int, report: Mapping[str, Any]) -> None:
        """Take notice of what a trial reports."""
        entry = self.journal.entries[number]
        values = json.loads(report["values"])
        if (entry.key, entry.values) != (report["key"], values):
            entry.key, entry.values = report["key"], values
            self.journal.write()
        status = "running" if not report["finished"] else FAILED if report.get("error") else FINISHED
        if status == FINISHED:
            self.reported.add(number)
        self.board.know(entry, status, report["score"], report["epochs"])

    def ended(self, number: int, report: Mapping[str, Any] | None, error: str | None = None) -> None:
        """Take notice of a trial's end; its last report tells whether that was its own."""
        entry = self.journal.entries[number]
        if error is not None:
            self.fail(entry, error)
        elif report is not None and number not in self.settled and (report["finished"] or not self.out_of_time()):
            self.settled.add(number)
            self.proposer.tell(entry.values, json.loads(report["scores"]))
            if not report["finished"]:
                entry.stopped = int(report["epochs"])
                self.journal.write()
        if report is not None and report["finished"]:
            return
        status = FAILED if error is not None else STOPPED if entry.stopped is not None else MISSING
        self.board.know(entry, status)

    def fail(self, entry: Entry, error: str) -> None:
        """Write a failed result, which the next run tries again."""
        result = TrialResult(spec=self.spec.trial(entry.values), status="failed", error=error)
        result.write(trial_folder(self.folder, entry.key))

    def out_of_time(self) -> bool:
        """Whether the time budget is spent."""
        return self.spec.time_budget is not None and time.monotonic() - self.started >= self.spec.time_budget

    def settings(self) -> dict[str, Any]:
        """Return what a trial on another node needs to know."""
        return {
            "folder": str(self.folder),
            "columns": [metric_columns()[name] for name in self.spec.objective],
            "every": self.spec.evaluate_every,
            "data": self.data,
            "code": self.code,
            "context": self.spec.shortest_context(),
            "cpus": self.spec.resources.cpu,
            "scheduler": self.spec.scheduler.name,
        }

    def wait_until_visible(self) -> None:
        """Wait for results that were reported: a network file system may hide them for a while."""
        deadline = time.monotonic() + _PATIENCE
        for number in self.reported:
            entry = self.journal.entries[number]
            while not self._settled(entry) and time.monotonic() < deadline:
                time.sleep(0.5)


def _words(versions: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted((versions or {}).items()))


def run_and_report(
    spec: TrialSpec,
    folder: Path,
    report: Report,
    *,
    columns: Sequence[str],
    every: int = 1,
    reported: int = 0,
    replay: bool = False,
    where: Mapping[str, Any] | None = None,
    visible_context: int | None = None,
    networks: Networks | None = None,
) -> None:
    """Run a trial, or go on with it, and report the objectives as they become known.

    Parameters
    ----------
    spec
        The trial.
    folder
        Its folder; evaluations are stored there beside what :func:`gluonts_peft.trials.run_trial` leaves.
    report
        Called with ``score``, the first objective, ``scores``, all of them as JSON, ``epochs`` and ``finished``: after
        each evaluation, and at last, with the ``epochs`` of the last evaluation, for the weights that are kept.
    columns
        Scores of the backtest that are the objectives.
    every
        Epochs between two evaluations.
    reported
        Epochs up to which evaluations were reported before; the others that are stored are reported first.
    replay
        Report what is stored and run nothing.
    where
        Stored with each evaluation.
    visible_context
        See :func:`gluonts_peft.trials.run_trial`; of validation windows too.
    networks
        See :func:`gluonts_peft.trials.run_trial`.
    """
    from .run import PREDICTOR, run_trial

    record = Record.read(folder)

    def tell(scores: Mapping[str, float | None], epochs: int, finished: bool = False) -> None:
        objectives = [as_number(scores.get(column)) for column in columns]
        report({"score": objectives[0], "scores": json.dumps(objectives), "epochs": epochs, "finished": finished})

    begun = False

    def evaluate(predictor: Predictor, epochs: int | None) -> None:
        nonlocal begun
        if epochs is None:
            record.final = _validate(predictor, spec, visible_context)
            record.write()
            return
        if not begun:
            begun = True
            record.attempts.append({"epochs": epochs, **(where or {})})
        if epochs % every == 0 and epochs > record.last:
            scores = _validate(predictor, spec, visible_context, columns)
            record.evaluations.append({"epochs": epochs, "scores": scores, **(where or {})})
            record.write()
            tell(scores, epochs)

    for each in list(record.evaluations):
        if each["epochs"] > reported:
            tell(each["scores"], each["epochs"])
    if replay and record.final is None:
        return
    run_trial(spec, folder, evaluate=evaluate, visible_context=visible_context, networks=networks)
    if record.final is None:
        from gluonts.model.predictor import Predictor

        evaluate(Predictor.deserialize(folder / PREDICTOR), None)
    assert record.final is not None
    tell(record.final, max(record.last, reported), finished=True)


def _validate(
    predictor: Predictor, spec: TrialSpec, visible_context: int | None, columns: Sequence[str] | None = None
) -> dict[str, float | None]:
    """Return scores on the last windows of the validation part."""
    from ..backtesting import backtest, default_metrics
    from .data import load_data
    from .run import counted_not_logged, finite, visible

    if getattr(predictor, "calibration", None) is not None:
        # It was learnt on a part of these series, and epochs are scored without.
        predictor = copy.copy(predictor)
        predictor.calibration = None
    metrics = [metric for metric in default_metrics() if columns is None or metric(axis=None).name in columns]
    validation = visible(load_data(spec.data).validation, spec, spec.data, visible_context)
    with counted_not_logged():
        options: dict[str, Any] = dict(metrics=metrics, seasonality=spec.data.season, unusable="skip")
        scores = backtest(predictor, validation, windows=spec.data.windows, **options).iloc[0]
    return {str(name): finite(value) for name, value in scores.items()}


class _OutOfTime(Exception):  # noqa: N818
    pass


def _serially(run: _Run) -> None:
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


def _with_tune(run: _Run) -> None:
    """Let Ray Tune run the trials."""
    from ray import tune

    spec, scheduler = run.spec, run.spec.scheduler
    tuned = run.folder / "ray"
    # Of an earlier run; all that is needed of it lies with the trials.
    shutil.rmtree(tuned, ignore_errors=True)
    resources = tune.PlacementGroupFactory([_without_zeros({"CPU": spec.resources.cpu, "GPU": spec.resources.gpu})])
    slots = room({"CPU": spec.resources.cpu, "GPU": spec.resources.gpu})
    # Tune lets a population have no searcher, and all the trials of one must be there at once.
    everyone = list(iter(lambda: _proposal(run), None)) if scheduler.name == "pbt" else []
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trainable, settings=run.settings()), resources),
        param_space={"proposal": tune.grid_search(everyone)} if everyone else {},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="min",
            search_alg=None if everyone else _searcher(run),
            scheduler=_scheduler(spec),
            num_samples=1 if everyone else max(run.more(), 1),
            # Optuna should know as many scores as possible when it is asked.
            max_concurrent_trials=spec.max_concurrent or (slots if spec.searcher.name == "optuna" else None),
            time_budget_s=spec.time_budget,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(tuned),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=spec.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=3 if scheduler.name == "pbt" else 1),
            callbacks=[_watch(run)],
        ),
    )
    tuner.fit()


def _without_zeros(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if amount}


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['proposal']['number']}"


def _number(name: object) -> int:
    # From its name, since a member of a population takes over the whole configuration of another.
    return int(str(name).removeprefix("trial-"))


def _proposal(run: _Run) -> dict[str, Any] | None:
    """Return the next trial as its worker needs it; values that may change under way are apart."""
    entry = run.next()
    if entry is None:
        return None
    trial = run.spec.trial(entry.values)
    changing = run.spec.space if run.spec.scheduler.name == "pbt" else ()
    return {
        "number": entry.number,
        "key": entry.key,
        "spec": json.dumps(trial.normal_form()),
        "values": json.dumps(entry.values),
        "replay": entry.stopped is not None,
        "mutable": {path: value_at(trial, path) for path in changing},
    }


def _searcher(run: _Run) -> Any:
    from ray.tune.search import Searcher

    class Proposals(Searcher):  # type: ignore[misc]
        """Hands on what the search proposes; its state is in the folder."""

        def suggest(self, trial_id: str) -> Any:
            proposal = _proposal(run)
            return Searcher.FINISHED if proposal is None else {"proposal": proposal}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            pass

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).write_text("{}")

        def restore(self, checkpoint_path: str) -> None:
            pass

    return Proposals(metric="score", mode="min")


def _scheduler(spec: SearchSpec) -> Any:
    from ray import tune
    from ray.tune import schedulers

    options = {"time_attr": "epochs", **spec.scheduler.options()}
    if spec.scheduler.name == "asha":
        return schedulers.ASHAScheduler(max_t=max(spec.max_epochs(), options.get("grace_period", 1)), **options)
    if spec.scheduler.name == "hyperband":
        return schedulers.HyperBandScheduler(max_t=max(spec.max_epochs(), 2), **options)
    if spec.scheduler.name == "pbt":
        mutations = {path: getattr(tune, space.space)(**space.arguments()) for path, space in spec.space.items()}
        options.setdefault("perturbation_interval", 1)
        return schedulers.PopulationBasedTraining(hyperparam_mutations={"proposal": {"mutable": mutations}}, **options)
    return schedulers.FIFOScheduler()


def _watch(run: _Run) -> Any:
    from ray import tune

    class Watch(tune.Callback):  # type: ignore[misc]
        """Tells the search what happens to its trials."""

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            run.board.know(run.journal.entries[_number(trial)], "running")

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            if "score" in result:
                run.observe(_number(trial), result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            last = trial.last_result
            run.ended(_number(trial), last if last and "score" in last else None)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            error = trial.get_error()
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            run.ended(_number(trial), None, lines[-1] if lines else "its process died")

        def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
            run.board.refresh()

    return Watch()


def _trainable(config: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Run one trial in a worker process."""
    from ray import tune

    proposal = config["proposal"]
    networks = quiet_worker(settings["cpus"])
    folder, scheduler = Path(settings["folder"]), settings["scheduler"]
    number = _number(tune.get_context().get_trial_name())
    spec = TrialSpec(**merged(json.loads(proposal["spec"]), proposal["mutable"]))
    values = {**json.loads(proposal["values"]), **proposal["mutable"]}
    key, reported = proposal["key"], 0
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as state_folder:
            state = json.loads((Path(state_folder) / "state.json").read_text())
            key, reported = state["key"], state["epochs"]
            if (state["number"], state["trial"]) != (number, spec.hash()):
                # The state of a better trial: go on from there with other values.
                key = trial_key(spec, settings["data"], settings["code"], number, key, reported)
                _adopt(Path(state_folder) / "last.ckpt", spec, trial_folder(folder, key))

    def report(found: dict[str, Any]) -> None:
        found = {**found, "key": key, "values": json.dumps(values)}
        if scheduler not in ("hyperband", "pbt"):
            tune.report(found)
            return
        with tempfile.TemporaryDirectory() as state_folder:
            state = {"number": number, "trial": spec.hash(), "key": key, "epochs": found["epochs"]}
            (Path(state_folder) / "state.json").write_text(json.dumps(state))
            last = _last_checkpoint(trial_folder(folder, key))
            if scheduler == "pbt" and last.is_file():
                shutil.copy(last, state_folder)
            tune.report(found, checkpoint=tune.Checkpoint.from_directory(state_folder))

    try:
        run_and_report(
            spec,
            trial_folder(folder, key),
            report,
            columns=settings["columns"],
            every=settings["every"],
            reported=reported,
            replay=proposal["replay"],
            where=whereabouts(),
            visible_context=settings["context"],
            networks=networks,
        )
    except ValueError as error:
        # What is wrong with the trial itself would be wrong the next time too.
        text = f"{type(error).__name__}: {error}"
        TrialResult(spec=spec, status="failed", error=text).write(trial_folder(folder, key))
        worst = [math.inf] * len(settings["columns"])
        report({"score": math.inf, "scores": json.dumps(worst), "epochs": reported, "finished": True, "error": text})


def _last_checkpoint(folder: Path) -> Path:
    from ..training import LAST
    from .run import TRAINING

    return folder / TRAINING / LAST


def _adopt(donor: Path, spec: TrialSpec, folder: Path) -> None:
    """Make the training state of another trial one of this trial, which differs in rate or dropout."""
    from ..adapters.load import get_adapter
    from ..resume import read_checkpoint, write_checkpoint

    path = _last_checkpoint(folder)
    if path.is_file():
        # An attempt of this trial, which has died since.
        return
    adapter = get_adapter(spec.adapter)
    rate = adapter.learning_rate if spec.training.learning_rate is None else spec.training.learning_rate
    state = read_checkpoint(donor)
    for callback in state["callbacks"].values():
        if isinstance(callback, dict) and "run" in callback:
            run = callback["run"]
            # The estimator adds a head where the checkpoint has none.
            run["adapter"] = [adapter.spec, *run["adapter"][1:]] if isinstance(run["adapter"], list) else adapter.spec
            run["options"]["learning_rate"] = rate
    for optimizer in state["optimizer_states"]:
        for group in optimizer["param_groups"]:
            group["lr"] *= rate / group["initial_lr"]
            group["initial_lr"] = rate
    for schedule in state["lr_schedulers"]:
        pairs = zip(schedule["_last_lr"], schedule["base_lrs"], strict=True)
        schedule["_last_lr"] = [last * rate / base for last, base in pairs]
        schedule["base_lrs"] = [rate] * len(schedule["base_lrs"])
    write_checkpoint(state, path)


class _Board:
    """A live table of the best trials on a terminal, or nothing."""

    def __init__(self, spec: SearchSpec, *, enabled: bool) -> None:
        self.spec, self.enabled = spec, enabled
        self.rows: dict[int, dict[str, Any]] = {}
        self._live: Any = None
        self._started = time.monotonic()
        self._before = 0

    def __enter__(self) -> _Board:
        if self.enabled:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def know(self, entry: Entry, status: str, score: float | None = None, epochs: int | None = None) -> None:
        row = self.rows.setdefault(entry.number, {"score": math.inf, "epochs": 0})
        trial = self.spec.trial(entry.values)
        row.update(status=status, values={path: value_at(trial, path) for path in self.spec.space})
        if score is not None:
            row["score"] = score
        if epochs is not None:
            row["epochs"] = epochs
        self.refresh()

    def refresh(self) -> None:
        if self._live is not None:
            self._live.update(self.table(), refresh=True)

    def left(self) -> float | None:
        """Return the seconds that are left, by what the trials of this run took so far."""
        ended: int = sum(row["status"] != "running" for row in self.rows.values())
        if self.spec.num_samples is None or not ended:
            return None
        return (time.monotonic() - self._started) * (self.spec.num_samples - ended) / ended

    def table(self) -> Any:
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        counts = {name: sum(row["status"] == name for row in self.rows.values()) for name in (FINISHED, "running")}
        left = self.left()
        caption = f"{counts[FINISHED]} of {self.spec.num_samples or 'all'} finished, {counts['running']} running" + (
            "" if left is None else f", about {left / 60:.0f} min left"
        )
        table = Table(box=SIMPLE, title=self.spec.title, caption=caption)
        for name in ("trial", "status", "epochs", self.spec.objective[0], *self.spec.space):
            table.add_column(Text(name))
        for number, row in sorted(self.rows.items(), key=lambda item: item[1]["score"])[:_SHOWN]:
            values = [cell(value) for value in row["values"].values()]
            score = "–" if math.isinf(row["score"]) else f"{row['score']:.5g}"
            table.add_row(str(number), row["status"], str(row["epochs"]), score, *map(Text, values))
        return table
