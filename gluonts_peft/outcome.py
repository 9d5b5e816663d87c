"""The outcome of a training run: scores, verdict and history."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .verdict import Verdict
from .words import BETTER, PROVEN

__all__ = ["Fit", "Gate", "TuningDidNotHelp"]


class TuningDidNotHelp(UserWarning):  # noqa: N818
    """There is no evidence on the validation windows that the tuned model is better than the pretrained one."""


@dataclass(frozen=True)
class Gate:
    """Scores of zero-shot and of the weights that are kept, on the same validation windows.

    These windows chose the weights, so the tuned score is optimistic. Whether tuning helped is decided by the
    :class:`~gluonts_peft.verdict.Verdict`, whose word is repeated here.

    Parameters
    ----------
    zero_shot, tuned
        Mean score over the validation windows before and after tuning; lower is better. There is no score before if
        the checkpoint has no forecasting head.
    windows
        Number of validation windows.
    measure
        What is scored: ``"loss"``, the training loss of the family; ``"forecast error"`` if a new head replaced that of
        the model, whose loss is not comparable, see :func:`gluonts_peft.heads.forecast_error`;
        ``"score of all tasks"``, see :meth:`gluonts_peft.objectives.Joint.relative`.
    verdict
        The word of the verdict. None in records before version 0.2, and if there is nothing to compare with; then the
        two scores decide.
    """

    zero_shot: float | None
    tuned: float
    windows: int
    measure: str = "loss"
    verdict: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the tuned model is handed over."""
        if self.verdict is not None:
            return self.verdict in (PROVEN, BETTER)
        return math.isfinite(self.tuned) if self.zero_shot is None else self.tuned < self.zero_shot

    def __str__(self) -> str:
        if self.zero_shot is None:
            return (
                f"no zero-shot forecast to compare with: validation {self.measure} {self.tuned:.5g}"
                f" ({self.windows} windows)"
            )
        change = 100.0 * (self.tuned / self.zero_shot - 1.0) if self.zero_shot else math.nan
        return (
            f"{self.verdict or 'no verdict'}: validation {self.measure} {self.zero_shot:.5g} zero-shot,"
            f" {self.tuned:.5g} tuned ({change:+.2f} %, {self.windows} windows, which chose the epoch)"
        )


@dataclass(frozen=True)
class Fit:
    """The outcome of a training run, besides the weights of the adapter."""

    gate: Gate
    epochs: int
    steps: int
    seconds: float
    learning_rate: float
    history: list[dict[str, float]] = field(default_factory=list)
    # Findings of the adapter, see its report().
    report: dict[str, Any] = field(default_factory=dict)
    # Loss of each task before and after tuning, if there were several.
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    # None if there was nothing to compare with, and in records before version 0.2.
    verdict: Verdict | None = None
    # "time_limit" if it ended the training, so that a repetition may give other numbers.
    stopped: str | None = None
