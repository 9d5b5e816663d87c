"""What an adapter is trained for: forecasts, reconstruction, or several tasks at once.

A forecast is judged by the family's own loss; a reconstruction by the errors at patches of the history that were hidden
from the network; several tasks, over long and short horizons too, by what each scores relative to zero-shot:

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
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .errors import unknown
from .heads import forecast_error
from .sweep import require_reconstruct
from .training import mean_loss
from .units import to_units

if TYPE_CHECKING:
    from .backbone import Backbone
    from .training import Loss

__all__ = [
    "ForecastLoss",
    "Joint",
    "Reconstruction",
    "Task",
    "parse_tasks",
    "reconstruction_loss",
]

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


def reconstruction_loss(
    backbone: Backbone, batch: Mapping[str, Tensor], mask_ratio: float = 0.3, generator: torch.Generator | None = None
) -> Tensor:
    """Return how badly hidden patches of the history are filled in.

    A share of the patches of each window that hold an observed step is hidden at random, and the network reconstructs
    the window. The loss is the squared error at the hidden observed steps, in standard deviations of the whole window,
    as in the pretraining of MOMENT.

    Parameters
    ----------
    backbone
        Of a family with the capability ``"reconstruct"``; gradients reach its parameters.
    batch
        ``past_target`` and ``past_observed_values`` of shape ``(batch, time)``; what else it holds is not looked at.
    mask_ratio
        Share of the patches to hide, rounded down; one patch at least is hidden and one shown.
    generator
        Source of randomness; torch's own if None.

    Returns
    -------
    Tensor
        Shape ``(batch,)``; 0 for windows with fewer than two observed patches, and for constant ones.

    Raises
    ------
    ValueError
        If the family does not reconstruct, or `mask_ratio` is not between 0 and 1.
    """
    require_reconstruct(backbone)
    if not 0.0 < mask_ratio < 1.0:
        raise ValueError(f"mask_ratio {mask_ratio} is not a share between 0 and 1")
    batch, _ = to_units(batch, backbone.equivariance)
    target, observed = batch["past_target"], batch["past_observed_values"]
    patch, length = backbone.patch_length, target.shape[1]
    padded = torch.nn.functional.pad(observed, (-length % patch, 0)).reshape(len(observed), -1, patch)
    there = padded.amax(-1) > 0
    device = target.device if generator is None else generator.device
    order = torch.rand(there.shape, generator=generator, device=device).to(target.device)
    rank = order.masked_fill(~there, 2.0).argsort(1).argsort(1)
    count = there.sum(1, keepdim=True)
    wanted = torch.minimum((count * mask_ratio).floor().clamp(min=1), count - 1)
    hidden = (rank < wanted).repeat_interleave(patch, 1)[:, -length:].to(observed.dtype) * observed
    shown = observed - hidden
    found = backbone.reconstruct({**batch, "past_target": target * shown, "past_observed_values": shown})
    steps = observed.sum(1, keepdim=True).clamp(min=1.0)
    mean = (target * observed).sum(1, keepdim=True) / steps
    deviation = (((target - mean) * observed).square().sum(1, keepdim=True) / steps).sqrt()
    # Relative, so that the unit of the data is of no account.
    varies = deviation > 1e-6 * (target * observed).abs().amax(1, keepdim=True)
    errors = ((found - target) / torch.where(varies, deviation, 1.0)).square() * hidden * varies
    return errors.sum(1) / hidden.sum(1).clamp(min=1.0)


@dataclass(frozen=True)
class Reconstruction:
    """:func:`reconstruction_loss` as the ``loss`` of :func:`gluonts_peft.training.fit`.

    While it trains, the patches to hide follow from torch's random numbers; validation hides the same ones each time.
    """

    mask_ratio: float = 0.3
    # What it judges lies in the history of a window.
    history: ClassVar[bool] = True

    def __call__(self, backbone: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
        generator = None if backbone.training else torch.Generator().manual_seed(0)
        return reconstruction_loss(backbone, batch, self.mask_ratio, generator)


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
        ``mask_ratio``, see :func:`reconstruction_loss`.
    prediction_length
        Steps that the model forecasts: the longest horizon.

    Raises
    ------
    ValueError
        If there is no task, or one has an unknown option or a value that cannot be used.
    """
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
