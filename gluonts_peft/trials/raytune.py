"""Ray Tune runs the trials of a search: schedulers, workers on other nodes, and what becomes of those that die."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cluster import quiet_worker, room, whereabouts
from .records import trial_folder, value_at
from .searchrun import Run, trial_key
from .searchspec import SearchSpec
from .searchtrial import run_and_report
from .spec import TrialResult, TrialSpec, merged

__all__ = ["adopt", "with_tune"]


def with_tune(run: Run) -> None:
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


def _proposal(run: Run) -> dict[str, Any] | None:
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


def _searcher(run: Run) -> Any:
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


def _watch(run: Run) -> Any:
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
                adopt(Path(state_folder) / "last.ckpt", spec, trial_folder(folder, key))

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


def adopt(donor: Path, spec: TrialSpec, folder: Path) -> None:
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
