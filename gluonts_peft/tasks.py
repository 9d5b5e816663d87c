"""Several tasks for one adapter: forecasts over long and short horizons, and reconstruction.

    MomentEstimator(
        prediction_length=96,
        adapter=["lora", "head"],
        tasks=[{"prediction_length": 96}, {"prediction_length": 24}, {"task": "reconstruct", "weight": 0.5}],
    )

A training step draws one of the tasks, so it costs what a step of a single task costs. A task of a short horizon sees
the first steps of a label, and is forecast by the first steps of what the model forecasts: one model serves all tasks.
TRACE (arXiv 2503.16991) is trained jointly over such tasks; how it mixes them is not known, the rule here is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .heads import forecast_error
from .registry import unknown
from .training import mean_loss

if TYPE_CHECKING:
    from .backbone import Backbone
    from .training import Loss

__all__ = ["ForecastLoss", "Joint", "Task", "parse_tasks"]

KINDS = ("forecast", "reconstruct")
_OPTIONS = {
    "forecast": ("task", "name", "weight", "rate", "prediction_length"),
    "reconstruct": ("task", "name", "weight", "rate", "mask_ratio"),
}


@dataclass(frozen=True)
class ForecastLoss:
    """The family's own loss of the first steps of a label; later steps count as not observed."""

    prediction_length: int

    def __call__(self, backbone: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
        return backbone.loss(self.shortened(batch))

    def shortened(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch in which nothing beyond the first steps of a label was observed."""
        observed = torch.as_tensor(batch["future_observed_values"]).clone()
        observed[:, self.prediction_length :] = 0.0
        return {**batch, "future_observed_values": observed}


@dataclass(frozen=True)
class Task:
    """One of the tasks.

    Parameters
    ----------
    name
        For people; unique.
    loss
        Of each window.
    weight
        Of the loss, after it was divided by `scale`.
    rate
        How often the task is drawn, relative to the others.
    scale
        Loss of the task before tuning, so that a weight means the same whatever the unit of a loss; 1 for forecasts by
        a head that is yet to be trained, whose errors count in standard deviations.
    """

    name: str
    loss: Loss
    weight: float = 1.0
    rate: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class Joint:
    """The loss of several tasks, for :func:`gluonts_peft.training.fit`.

    In training it is that of one task, drawn by the rates with torch's random numbers. Otherwise it is the mean over
    all tasks, weighted by weight x rate: 1 for the model before tuning, if it has its own head.
    """

    tasks: tuple[Task, ...]

    @property
    def forecasts(self) -> bool:
        """Whether any of the tasks needs a forecasting head."""
        return any(isinstance(task.loss, ForecastLoss) for task in self.tasks)

    def __call__(self, backbone: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
        if backbone.training:
            rates = torch.tensor([task.rate for task in self.tasks], dtype=torch.float64)
            task = self.tasks[int(torch.multinomial(rates, 1))]
            return task.loss(backbone, batch) * (task.weight / task.scale)
        shares = [task.weight * task.rate for task in self.tasks]
        terms = [
            task.loss(backbone, batch) * (share / (task.scale * math.fsum(shares)))
            for task, share in zip(self.tasks, shares, strict=True)
        ]
        return torch.stack(terms).sum(0)

    @property
    def judged(self) -> list[tuple[float, int | Loss]]:
        """What a :class:`gluonts_peft.verdict.Judge` scores of these tasks, and its weight."""
        return [
            (task.weight * task.rate, task.loss.prediction_length if isinstance(task.loss, ForecastLoss) else task.loss)
            for task in self.tasks
        ]

    @property
    def history(self) -> bool:
        """Whether any of the tasks judges the history of a window."""
        return any(getattr(task.loss, "history", False) for task in self.tasks)

    def scores(
        self,
        backbone: Backbone,
        validation: Sequence[Mapping[str, Any]],
        levels: Sequence[float] | None = None,
        *,
        forecasts: bool = True,
    ) -> dict[str, float]:
        """Return what each task scores over validation batches, lower is better: its mean loss.

        Parameters
        ----------
        backbone, validation
            What to score, and on what.
        levels
            Quantile levels of a new head, which may be attached or not: forecasts are then scored by
            :func:`gluonts_peft.heads.forecast_error`, the same for both.
        forecasts
            Whether there is a head to forecast with; else these tasks are left out.
        """
        found = {}
        for task in self.tasks:
            if isinstance(task.loss, ForecastLoss):
                if forecasts and levels is None:
                    found[task.name] = mean_loss(backbone, validation, task.loss)
                elif forecasts and levels is not None:
                    found[task.name] = forecast_error(backbone, [task.loss.shortened(b) for b in validation], levels)
            else:
                found[task.name] = mean_loss(backbone, validation, task.loss)
        return found

    def relative(self, scores: Mapping[str, float], before: Mapping[str, float]) -> float:
        """Return the mean over tasks of their scores relative to those before, weighted by weight x rate."""
        shares = {task.name: task.weight * task.rate for task in self.tasks if task.name in before}
        # A task that is solved already keeps its unit.
        terms = [share * scores[name] / (before[name] or 1.0) for name, share in shares.items()]
        return math.fsum(terms) / math.fsum(shares.values())

    def scaled(self, scores: Mapping[str, float], *, forecasts: bool = True) -> Joint:
        """Return the same tasks, with what they score before tuning as their scale, if they are among the scores; those
        that forecast only if wanted.

        Raises
        ------
        ValueError
            If a score is not finite.
        """
        for name, score in scores.items():
            if not math.isfinite(score):
                raise ValueError(f"task {name!r} has loss {score} before tuning; look for extreme values in the data")
        return Joint(
            tuple(
                replace(task, scale=scores.get(task.name) or 1.0)
                if forecasts or not isinstance(task.loss, ForecastLoss)
                else task
                for task in self.tasks
            )
        )


def parse_tasks(tasks: Sequence[Mapping[str, Any]], prediction_length: int) -> Joint:
    """Check a list of tasks.

    Parameters
    ----------
    tasks
        Mappings with ``task``, ``"forecast"`` (the default) or ``"reconstruct"``; ``name``, ``weight`` and ``rate``,
        both 1 by default; a forecast has a ``prediction_length``, by default that of the model, a reconstruction a
        ``mask_ratio``, see :func:`gluonts_peft.imputation.reconstruction_loss`.
    prediction_length
        Steps that the model forecasts: the longest horizon.

    Raises
    ------
    ValueError
        If there is no task, or one has an unknown option or a value that cannot be used.
    """
    from .imputation import Reconstruction

    if isinstance(tasks, str | Mapping) or not tasks:
        raise ValueError(f"tasks {tasks!r} is not a list of mappings; write e.g. [{{'prediction_length': 24}}]")
    found: list[Task] = []
    for item in tasks:
        if not isinstance(item, Mapping):
            raise ValueError(f"task {item!r} is not a mapping; write e.g. {{'prediction_length': 24}}")
        kind = item.get("task", "forecast")
        if kind not in KINDS:
            raise ValueError(unknown("task", kind, KINDS))
        for option in item:
            if option not in _OPTIONS[kind]:
                raise ValueError(f"task {kind!r}: {unknown('option', option, _OPTIONS[kind])}")
        loss: Loss
        if kind == "reconstruct":
            loss, name = Reconstruction(**{key: item[key] for key in ("mask_ratio",) if key in item}), "reconstruct"
            if not 0.0 < loss.mask_ratio < 1.0:
                raise ValueError(f"task {kind!r}: mask_ratio {loss.mask_ratio} is not a share between 0 and 1")
        else:
            steps = item.get("prediction_length", prediction_length)
            if not isinstance(steps, int) or not 0 < steps <= prediction_length:
                raise ValueError(
                    f"task {kind!r}: prediction_length {steps!r} is not from 1 to {prediction_length}, the"
                    " prediction_length of the model; give the model the longest horizon"
                )
            loss, name = ForecastLoss(steps), f"forecast {steps}"
        shares = {key: item.get(key, 1.0) for key in ("weight", "rate")}
        for key, value in shares.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"task {kind!r}: {key} {value!r} is not a positive number")
        found.append(Task(str(item.get("name", name)), loss, float(shares["weight"]), float(shares["rate"])))
        if found[-1].name in {task.name for task in found[:-1]}:
            raise ValueError(f"two tasks have the name {found[-1].name!r}; give one another name")
    return Joint(tuple(found))
