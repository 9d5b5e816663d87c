"""What a study is, as plain data: read from YAML, expanded to trials, and checked at once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from ..files import opened
from .baselinespec import BASELINE, FROM_SCRATCH, normal_baseline, parts_of
from .dataspec import MOST_FOLDS
from .reading import mapping_of, read_yaml
from .spec import SHARED_TRAINING, TrainingSpec, TrialSpec, merged
from .strict import SpecError, StrictSpec

__all__ = ["StudySpec", "load_study"]


class StudySpec(StrictSpec):
    """Many trials from a grid.

    Parameters
    ----------
    title
        Heading of the report.
    base
        What all trials share.
    grid
        Dotted path into the trial -> values; every combination is a trial.
    baselines
        Names, or mappings with a name and options, as ``{name: lightgbm, num_leaves: 15}``. Of :data:`NAIVE` and
        :data:`STATISTICAL`: run once on each combination of data and horizon; the others: once for each seed.
    baseline_training
        Options of :class:`TrainingSpec` for the networks among them, beside :data:`FROM_SCRATCH`. Batch size,
        validation windows and device are those of the trials.

    Raises
    ------
    SpecError
        If a path or value cannot be used in any of the trials; all faults are listed.
    """

    title: str = "Study"
    base: dict[str, Any]
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    baselines: tuple[Any, ...] = ()
    baseline_training: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _without_format(cls, values: Any) -> Any:
        # As stored on disk, for callers who read the file themselves.
        return opened(values)

    @field_validator("baselines")
    @classmethod
    def _normal_baselines(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map(normal_baseline, values))

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        faults = [
            f"grid path {path!r} has no values; name at least one" for path, each in self.grid.items() if not each
        ]
        if not faults:
            try:
                TrainingSpec(**self.baseline_training)
            except SpecError as error:
                faults = [f"baseline_training: {fault}" for fault in error.faults]
        if not faults:
            for form in (*self.forms(), *self.baseline_forms()):
                try:
                    TrialSpec(**form)
                except SpecError as error:
                    faults.extend(error.faults)
        if faults:
            raise SpecError("study", faults)
        return self

    def baseline_forms(self) -> Iterator[dict[str, Any]]:
        """Return the baselines of every combination of the grid's values; equal ones more than once."""
        # Naive baselines have no context of their own, but it decides which windows are scored.
        shared = ("prediction_length", "context_length", "data", "seed", "also")
        for baseline in self.baselines:
            name, options = parts_of(baseline)
            for form in self.forms():
                # A value that is not a mapping is reported by the trials themselves.
                training = form["training"] if isinstance(form.get("training"), dict) else {}
                kept = {key: training[key] for key in SHARED_TRAINING if key in training}
                yield {
                    "family": BASELINE,
                    "checkpoint": name,
                    "adapter": "none",
                    "backbone_options": options,
                    **{key: form[key] for key in shared if key in form},
                    "training": {**kept, **FROM_SCRATCH, **self.baseline_training},
                }

    def forms(self) -> Iterator[dict[str, Any]]:
        """Return the base with each combination of the grid's values in it, the last path varying fastest.

        One that names ``data.folds`` and no fold of them comes once for each.
        """
        for values in itertools.product(*self.grid.values()):
            form = merged(self.base, dict(zip(self.grid, values, strict=True)))
            data = form.get("data")
            folds = data.get("folds") if isinstance(data, dict) and data.get("fold") is None else None
            # An invalid number of folds is reported by the trial.
            if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= MOST_FOLDS:
                yield form
                continue
            for fold in range(folds):
                yield {**form, "data": {**form["data"], "fold": fold}}


def load_study(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> StudySpec:
    """Read a study from a YAML file.

    Parameters
    ----------
    path
        The file.
    overrides
        Dotted paths and values that replace those of the file: ``title``, ``baselines`` and ``baseline_training`` of
        the study; any other path is one of the trial, as ``"training.max_epochs"``. A path that the grid varies gets
        these values instead, a list of them or a single one. With another ``data.source`` the options of the file's own
        source are dropped.

    Raises
    ------
    SpecError
        If the file is missing, is not YAML, or holds or gets anything that cannot be used; all faults are listed.
    """
    form = read_yaml(path, "study", "base, grid, baselines and title")
    grid = mapping_of(form, "grid", f"study '{path}'", "paths and lists of values")
    changes = {}
    for name, value in (overrides or {}).items():
        if name in ("title", "baselines", "baseline_training"):
            form[name] = value
        elif name.startswith("baseline_training."):
            form["baseline_training"] = {**(form.get("baseline_training") or {}), name.partition(".")[2]: value}
        elif name in grid:
            grid[name] = list(value) if isinstance(value, list | tuple) else [value]
        else:
            changes[name] = value
    try:
        return StudySpec(**{**form, "grid": grid, "base": merged(form["base"], changes)})
    except SpecError as error:
        raise SpecError(f"study '{path}'", error.faults) from None
