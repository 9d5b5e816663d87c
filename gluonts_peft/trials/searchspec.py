"""Searches as plain data: a trial, the space around it, and what decides which of its points are tried.

    space:
      training.learning_rate: {space: loguniform, lower: 1.0e-4, upper: 1.0e-2}
      adapter.name: {space: choice, categories: [lora, bitfit]}
      adapter.r: {space: choice, categories: [2, 4, 8], when: {adapter.name: lora}}

Spaces have the names and fields that Ludwig's and Ray Tune's have. Nothing here imports torch or Ray; Optuna, which
draws the points, is imported when the first one is drawn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from ..columns import score_columns
from ..errors import unknown
from .baselinespec import BASELINE
from .reading import mapping_of, read_yaml
from .space import Space, several
from .spec import TrialSpec, merged
from .strict import SpecError, StrictSpec

__all__ = [
    "ResourceSpec",
    "SchedulerSpec",
    "SearchSpec",
    "SearcherSpec",
    "is_mutable",
    "load_search",
    "metric_columns",
    "search_schema",
    "values_of",
]

# They decide what is scored, or name luck: trials that differ in them cannot be compared.
_FIXED = ("data", "also", "prediction_length", "seed", "ensemble")
# These may change between two runs in one folder: the trials stay what they are.
_FREE = ("title", "num_samples", "max_concurrent", "resources", "time_budget", "max_failures")


class SearcherSpec(StrictSpec):
    """What proposes trials.

    Parameters
    ----------
    name
        ``"random"``; ``"grid"``: every combination, of spaces ``choice`` only; or ``"optuna"``: its tree-structured
        Parzen estimator, which learns from the trials that are finished.
    n_startup_trials
        Of ``"optuna"``: random trials before it learns; 10 if not given.
    """

    name: Literal["random", "grid", "optuna"] = "random"
    n_startup_trials: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> SearcherSpec:
        if self.n_startup_trials is not None and self.name != "optuna":
            raise ValueError(f"n_startup_trials {self.n_startup_trials} belongs to searcher 'optuna'; drop it")
        return self


class SchedulerSpec(StrictSpec):
    """What stops trials early. Options are named, and preset, as those of the schedulers of ``ray.tune``.

    Parameters
    ----------
    name
        ``"fifo"`` (nothing), ``"asha"``, ``"hyperband"``, or ``"pbt"``: population-based training, where the worst
        trials go on from copies of the best with changed learning rates and dropouts; the only one that changes trials.
    grace_period, reduction_factor
        Of ``"asha"``: epochs that each trial gets, and the share, one in so many, that goes on.
        ``reduction_factor`` also of ``"hyperband"``.
    perturbation_interval, quantile_fraction, resample_probability
        Of ``"pbt"``: epochs between two exchanges, the share of the worst, and how often a value is drawn anew.
    """

    name: Literal["fifo", "asha", "hyperband", "pbt"] = "fifo"
    grace_period: int | None = Field(default=None, gt=0)
    reduction_factor: float | None = Field(default=None, gt=1)
    perturbation_interval: int | None = Field(default=None, gt=0)
    quantile_fraction: float | None = Field(default=None, gt=0, le=0.5)
    resample_probability: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> SchedulerSpec:
        own = {
            "asha": {"grace_period", "reduction_factor"},
            "hyperband": {"reduction_factor"},
            "pbt": {"perturbation_interval", "quantile_fraction", "resample_probability"},
        }.get(self.name, set())
        for name, value in self.model_dump(exclude={"name"}, exclude_none=True).items():
            if name not in own:
                raise ValueError(f"{name} {value} has no effect with scheduler {self.name!r}; drop it")
        return self

    def options(self) -> dict[str, Any]:
        """Return what was given besides the name."""
        return self.model_dump(exclude={"name"}, exclude_none=True)


class ResourceSpec(StrictSpec):
    """What one trial takes of a node.

    Parameters
    ----------
    cpu
        CPU cores; also the threads of torch, unless ``OMP_NUM_THREADS`` says otherwise.
    gpu
        GPUs; a fraction shares one, without a limit on memory.
    """

    cpu: float = Field(default=1, gt=0)
    gpu: float = Field(default=0, ge=0)


class SearchSpec(StrictSpec):
    """A search.

    Trials are chosen by backtests on the validation part of the data; on the test part they are scored once, at their
    end, for the ranking alone. That is our choice: a test score that was used to choose is no longer a test.

    Parameters
    ----------
    title
        Heading of tables.
    base
        A trial, see :class:`gluonts_peft.trials.TrialSpec`. As it stands it is the first trial.
    space
        Dotted path into the trial -> :class:`Space`.
    objective
        A metric of the backtest, ``"MAE"`` or ``"DTW"`` say, or several; lower is better in all. Several give a Pareto
        front; schedulers then follow the first.
    searcher, scheduler
        Names, or mappings with a name and options.
    num_samples
        Trials, the base included; None with searcher ``"grid"`` means all.
    evaluate_every
        Epochs between two evaluations of the objective.
    max_concurrent
        Trials at the same time; as many as the nodes have room for if None.
    resources
        Of one trial.
    time_budget
        Seconds after which the search stops; the same command goes on.
    seed
        Decides which trials are proposed.
    max_failures
        How often a trial is restarted when its node or process dies; at least 2.

    Raises
    ------
    SpecError
        If anything is unknown or cannot be used; all faults are listed.
    """

    title: str = "Search"
    base: dict[str, Any]
    space: dict[str, Space]
    objective: tuple[str, ...] = ("MAE",)
    searcher: SearcherSpec = Field(default_factory=SearcherSpec)
    scheduler: SchedulerSpec = Field(default_factory=SchedulerSpec)
    num_samples: int | None = Field(default=None, gt=0)
    evaluate_every: int = Field(default=1, gt=0)
    max_concurrent: int | None = Field(default=None, gt=0)
    resources: ResourceSpec = Field(default_factory=ResourceSpec)
    time_budget: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    max_failures: int = Field(default=3, ge=2)

    @field_validator("objective", mode="before")
    @classmethod
    def _one_objective(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("searcher", "scheduler", mode="before")
    @classmethod
    def _only_a_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> SearchSpec:
        faults = [*self._objective_faults(), *self._engine_faults(), *self._space_faults()]
        if not faults:
            try:
                base = TrialSpec(**self.base)
            except SpecError as error:
                raise SpecError("search", [f"base: {fault}" for fault in error.faults]) from None
            faults = [*_base_faults(base), *self._trial_faults(), *self._start_faults()]
        if faults:
            raise SpecError("search", faults)
        return self

    def _objective_faults(self) -> Iterator[str]:
        known = metric_columns()
        if not self.objective:
            yield f"objective names no metric; known: {', '.join(sorted(known))}"
        for name in self.objective:
            if name not in known:
                yield unknown("objective", name, known)
        if len(set(self.objective)) < len(self.objective):
            yield f"objective {list(self.objective)} names a metric more than once"

    def _engine_faults(self) -> Iterator[str]:
        if self.num_samples is None and self.searcher.name != "grid":
            yield f"num_samples is missing: searcher {self.searcher.name!r} never ends by itself"
        if self.scheduler.name == "pbt":
            if self.searcher.name != "random":
                yield f"searcher {self.searcher.name!r} does not go with scheduler 'pbt', which changes trials itself"
            for path, space in self.space.items():
                if not is_mutable(path) or space.when:
                    yield (
                        f"space {path!r} does not go with scheduler 'pbt': a copy of another trial's weights fits only"
                        " where training.learning_rate or a dropout differs, without conditions; drop it, or name"
                        " scheduler 'asha'"
                    )
        if self.searcher.name == "grid":
            for path, space in self.space.items():
                if space.space != "choice":
                    yield (
                        f"space {path!r} is {space.space!r}; searcher 'grid' tries every value, so write a 'choice' of"
                        " them, or name searcher 'random'"
                    )

    def _space_faults(self) -> Iterator[str]:
        if not self.space:
            yield "space is empty; name at least one path, as training.learning_rate, and its values"
        earlier: list[str] = []
        for path, space in self.space.items():
            if path.partition(".")[0] in _FIXED:
                yield f"space {path!r}: trials that differ there cannot be compared; a study can vary it"
            for name, allowed in space.when.items():
                if name not in earlier:
                    yield f"space {path!r}: when names {name!r}, which is not an earlier path of the space"
                    continue
                if not several(allowed):
                    yield f"space {path!r}: when has no value for {name!r}; name at least one"
                for value in several(allowed):
                    categories = self.space[name].categories
                    if categories is not None and value not in categories:
                        yield f"space {path!r}: when has {name!r} at {value!r}, which is none of its categories"
            earlier.append(path)

    def _trial_faults(self) -> Iterator[str]:
        for values in self.corners():
            try:
                self.trial(values)
            except SpecError as error:
                yield from (f"space with {json.dumps(values)}: {fault}" for fault in error.faults)

    def _start_faults(self) -> Iterator[str]:
        if self.scheduler.name == "pbt":
            for path in self.space.keys() - values_of(self).keys():
                yield f"base has no {path}, which scheduler 'pbt' changes step by step; name where it starts"

    def corners(self) -> Iterator[dict[str, Any]]:
        """Return points such that every path takes its smallest and largest value, or each of its categories."""
        for path, space in self.space.items():
            for value in space.corners():
                yield self._completed({path: value})

    def _completed(self, values: dict[str, Any]) -> dict[str, Any]:
        """Add what the conditions of some values need, and first values for what is left."""
        wanted = dict(values)
        for path in reversed(list(wanted)):
            self._want(path, wanted)
        completed: dict[str, Any] = {}
        for path, space in self.space.items():
            if space.applies(completed):
                completed[path] = wanted.get(path, space.corners()[0])
        return completed

    def _want(self, path: str, wanted: dict[str, Any]) -> None:
        for name, allowed in self.space[path].when.items():
            wanted.setdefault(name, several(allowed)[0])
            self._want(name, wanted)

    def trial(self, values: Mapping[str, Any]) -> TrialSpec:
        """Return the trial at a point; no values at all mean the base as it stands.

        Options whose condition is not met are taken out of the base too.

        Raises
        ------
        SpecError
            If there is no such trial.
        """
        form = merged({"adapter": TrialSpec.model_fields["adapter"].default, **self.base}, values)
        if values:
            for path, space in self.space.items():
                if path not in values and space.when:
                    _remove(form, path)
        return TrialSpec(**form)

    def grid(self) -> Iterator[dict[str, Any]]:
        """Return all combinations of the categories, the last path varying fastest."""
        points: list[dict[str, Any]] = [{}]
        for path, space in self.space.items():
            points = [
                point | added
                for point in points
                for added in ([{path: value} for value in space.categories or ()] if space.applies(point) else [{}])
            ]
        return iter(points)

    def max_epochs(self) -> int:
        """Return the most epochs that a trial can have."""
        base = TrialSpec(**self.base).training.max_epochs
        return max([base, *(self.trial(values).training.max_epochs for values in self.corners())])

    def shortest_context(self) -> int | None:
        """Return the shortest context that a trial can have: it decides for all of them which windows are scored."""
        trials = [TrialSpec(**self.base), *map(self.trial, self.corners())]
        return min((trial.context_length for trial in trials if trial.context_length is not None), default=None)

    def normal_form(self) -> dict[str, Any]:
        """Return the spec as JSON values, without what is not set."""
        form = self.model_dump(mode="json", exclude_none=True)
        form["base"] = self.base
        return form

    def same_trials(self, other: SearchSpec) -> bool:
        """Whether two specs propose the same trials, one perhaps more of them."""
        mine, theirs = self.normal_form(), other.normal_form()
        return all(mine.get(name) == theirs.get(name) for name in {*mine, *theirs} - {*_FREE})


def values_of(spec: SearchSpec) -> dict[str, Any]:
    """Return the values that the base has at the paths of the space."""
    form: Any = TrialSpec(**spec.base).normal_form()
    if isinstance(form["adapter"], str):
        form["adapter"] = {"name": form["adapter"]}
    found: dict[str, Any] = {}
    for path, space in spec.space.items():
        place = form
        for name in path.split("."):
            place = place.get(name) if isinstance(place, dict) else None
        if place is not None and space.applies(found):
            found[path] = place
    return found


def _base_faults(base: TrialSpec) -> Iterator[str]:
    if base.family == BASELINE:
        yield f"base: family {BASELINE!r} has nothing to adapt; name a model family"
    if base.ensemble is not None:
        yield f"base: ensemble {base.ensemble} is not searched over; drop it"
    if base.data.fractions[1] == 0:
        yield (
            f"base: data.fractions {base.data.fractions} have no validation part, and trials are not chosen by their"
            " test scores; name three shares above 0"
        )


def is_mutable(path: str) -> bool:
    """Whether a training can go on with another value there."""
    return path == "training.learning_rate" or path.endswith("dropout")


def metric_columns() -> dict[str, str]:
    """Return the names that an objective can have, and the scores of the backtest behind them."""
    known = score_columns()
    return {column.name: column.score for column in known} | {column.score: column.score for column in known}


def load_search(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> SearchSpec:
    """Read a search from a YAML file.

    Parameters
    ----------
    path
        The file.
    overrides
        Dotted paths and values that replace those of the file: ``num_samples`` or ``scheduler.name`` of the search; any
        other path, or one that begins with ``base.``, is one of the trial. A path of the space gets another space if
        the value is a mapping; any other value fixes it.

    Raises
    ------
    SpecError
        If the file is missing, is not YAML, or holds or gets anything that cannot be used; all faults are listed.
    """
    form = read_yaml(path, "search", "base, space, objective and num_samples")
    try:
        mapping_of(form, "space", "search", "paths and spaces")
        return SearchSpec(**_overridden(form, overrides or {}))
    except SpecError as error:
        raise SpecError(f"search '{path}'", error.faults) from None


def _overridden(form: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    space = dict(form.get("space") or {})
    own, trial = {}, {}
    for name, value in overrides.items():
        if name in space and isinstance(value, Mapping):
            space[name] = value
        elif name.partition(".")[0] in set(SearchSpec.model_fields) - {"base", "space"}:
            own[name] = value
        else:
            space.pop(name, None)
            trial[name.removeprefix("base.")] = value
    for name in ("searcher", "scheduler"):
        if isinstance(form.get(name), str) and any(path.startswith(f"{name}.") for path in own):
            form[name] = {"name": form[name]}
    return merged({**form, "space": space, "base": merged(form["base"], trial)}, own)


def search_schema() -> dict[str, Any]:
    """Return the JSON schema of a search, for editors and other programs; the trial in it included."""
    schema: dict[str, Any] = SearchSpec.model_json_schema()
    trial = TrialSpec.model_json_schema()
    schema["$defs"].update(trial.pop("$defs"))
    schema["$defs"]["TrialSpec"] = trial
    schema["$defs"]["DataSpec"] = trial["properties"]["data"]
    trial["properties"]["data"] = trial["properties"]["also"]["additionalProperties"] = {"$ref": "#/$defs/DataSpec"}
    properties = schema["properties"]
    properties["base"] = {"$ref": "#/$defs/TrialSpec"}
    properties["objective"] = {"anyOf": [{"type": "string"}, properties["objective"]], "default": "MAE"}
    for name, model in (("searcher", SearcherSpec), ("scheduler", SchedulerSpec)):
        names = list(get_args(model.model_fields["name"].annotation))
        properties[name] = {"anyOf": [{"enum": names}, {"$ref": f"#/$defs/{model.__name__}"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _remove(form: dict[str, Any], path: str) -> None:
    *parents, last = path.split(".")
    place: Any = form
    for name in parents:
        place = place.get(name) if isinstance(place, dict) else None
    if isinstance(place, dict):
        place.pop(last, None)


if __name__ == "__main__":
    print(json.dumps(search_schema(), indent=1))  # noqa: T201
