"""Callbacks of the fit loop: which weights are kept, when it is enough, and a progress bar."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from tqdm import tqdm

from .deadline import TIME_LIMIT, Deadline
from .verdict import Candidate

if TYPE_CHECKING:
    from .adapters.base import Adapter
    from .verdict import Floats, Judge

__all__ = ["Bar", "Keeper", "copied", "mixed"]

logger = logging.getLogger(__name__)

# What follows the last epoch; its verdict is on up to twice as many candidates as the last one that was timed.
_END = ("end", "verdict", "verdict")


class Keeper(Callback):  # type: ignore[misc]
    """Keeps the best weights in memory, and everything on disk after each epoch; says when it is enough.

    Lightning's own early stopping forgets, when a run is resumed, that the run had stopped.

    Under a `deadline` no step begins that would leave too little time for what comes after it: the epoch is cut there,
    validated and judged, and is the last. Where even that does not fit, since a step took longer than any before, the
    epoch is dropped. The checkpoint is that of the last whole epoch, so that the run can be gone on with. The deadline
    knows what is to come as ``"batch"``, ``"epoch's end"`` and ``"end"``, and here learns the cost of a ``"verdict"``.
    """

    def __init__(
        self,
        adapter: Adapter,
        path: Path | None,
        run: Mapping[str, Any],
        patience: int,
        judge: Judge | None = None,
        weights: Sequence[float] = (),
        deadline: Deadline | None = None,
        before: Floats | None = None,
    ) -> None:
        self.adapter = adapter
        self.judge = judge
        self.before = before
        # Where a path from zero-shot to what an epoch makes of the adapter begins, and its points before the end.
        self.start = copied(adapter) if weights else {}
        self.between = weights
        self.candidates: list[Candidate] = []
        self.chosen = self.score = math.inf
        self.path = path
        self.run = dict(run)
        self.patience = patience
        self.waited = 0
        self.stopped = False
        self.best = math.inf
        self.weights: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.deadline = deadline
        # Of this attempt alone: one that goes on with more time goes on with the epoch that was cut.
        self.out_of_time = False
        self.dropped = False
        self._clock = time.perf_counter if deadline is None else deadline.clock
        self._started = self._begun = 0.0
        self._batches = 0

    @property
    def state_key(self) -> str:
        # The name that checkpoints have known it by from the start.
        return "_Keeper"

    @property
    def why(self) -> str | None:
        """Why the training ended before it was done, if the clock ended it."""
        return TIME_LIMIT if self.out_of_time else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._clock() - self.seconds
        trainer.should_stop = trainer.should_stop or self.stopped
        if self.deadline is not None:
            self.deadline.earlier = self.seconds

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches = 0
        if not trainer.should_stop:
            self._ask(trainer)
        self._begun = self._clock()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._batches += 1
        if self.deadline is None:
            return
        # From the end of one to that of the next: what the adapter does after a step comes after this.
        now = self._clock()
        self.deadline.note("batch", now - self._begun)
        self._begun = now
        # After the last one of an epoch the validation comes in any case.
        if self._batches < trainer.num_training_batches:
            self._ask(trainer)

    def _ask(self, trainer: pl.Trainer) -> None:
        """Stop if there is no time for another batch, and for judging what it does."""
        if self.deadline is not None and not self.deadline.fits("batch", "epoch's end", *_END):
            trainer.should_stop = self.out_of_time = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = self._clock()
        if self.deadline is not None and not self.deadline.fits("epoch's end", *_END, margin=1.0):
            trainer.should_stop = self.out_of_time = self.dropped = pl_module.unjudged = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or self.dropped:
            return
        score = pl_module.validated.value
        if not math.isfinite(score):
            logger.warning("validation loss is %s after epoch %d: training stops", score, trainer.current_epoch)
            self.stopped = True
        elif not self.adapter.settled:
            # Its weights would be those of another adapter than the one that is kept.
            pass
        else:
            if self.judge is not None:
                self._judge(self.judge, trainer.current_epoch)
                self._time_verdict(self.judge, len({each.epoch for each in self.candidates}))
            if score < self.best:
                self.best, self.waited = score, 0
                if self.judge is None:
                    self.weights = copied(self.adapter)
            else:
                self.waited += 1
                self.stopped = self.waited == self.patience
        trainer.should_stop = trainer.should_stop or self.stopped

    def _judge(self, judge: Judge, epoch: int) -> None:
        """Score what the epoch has made of the adapter, and points on the way there; keep the best epoch so far."""
        state = copied(self.adapter)
        between = self.between if state.keys() == self.start.keys() else ()
        try:
            for weight in (1.0, *between):
                if weight != 1.0:
                    self.adapter.load_state_dict(mixed(self.start, state, weight))
                scores = judge.score(self.adapter.attached)
                self.candidates.append(Candidate(epoch, weight, scores))
                if weight == 1.0:
                    self.score = float(scores.mean())
                if scores.mean() < self.chosen:
                    self.chosen, self.weights = float(scores.mean()), state
        finally:
            if between:
                self.adapter.load_state_dict(state)

    def _time_verdict(self, judge: Judge, epochs: int) -> None:
        if self.deadline is not None and self.before is not None and epochs & (epochs - 1) == 0:
            with self.deadline.measuring("verdict"):
                judge.verdict(self.before, self.candidates)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = self._clock() - self._started
        if self.dropped or not self._batches:
            return
        cut = self.out_of_time and self._batches < trainer.num_training_batches
        self.history.append(
            {
                "epoch": trainer.current_epoch,
                "train_loss": float(trainer.callback_metrics["train_loss"]),
                "val_loss": pl_module.validated.value,
                **({} if self.judge is None else {"score": self.score}),
                **({"batches": self._batches} if cut else {}),
            }
        )
        if self.path is not None and not cut:
            trainer.save_checkpoint(self.path)
        if self.deadline is not None and not cut:
            self.deadline.note("epoch's end", self._clock() - self._begun)

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "waited": self.waited,
            "stopped": self.stopped,
            "weights": self.weights,
            "history": self.history,
            "seconds": self.seconds,
            "run": self.run,
            "chosen": self.chosen,
            "candidates": [[each.epoch, each.weight, torch.from_numpy(each.scores)] for each in self.candidates],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.weights = state_dict["best"], state_dict["weights"]
        self.waited, self.stopped = state_dict["waited"], state_dict["stopped"]
        self.history, self.seconds = state_dict["history"], state_dict["seconds"]
        self.chosen = state_dict.get("chosen", math.inf)
        self.candidates = [
            Candidate(epoch, weight, scores.numpy()) for epoch, weight, scores in state_dict.get("candidates", [])
        ]


def copied(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of an adapter as they are now, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in adapter.state_dict().items()}


def mixed(start: Mapping[str, Tensor], end: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Return tensors on the line between two states; tensors that cannot be interpolated are taken from the end."""
    return {
        name: torch.lerp(start[name].to(tensor.dtype), tensor, weight) if tensor.is_floating_point() else tensor
        for name, tensor in end.items()
    }


class Bar(Callback):  # type: ignore[misc]
    """One progress bar over all steps."""

    def __init__(self, total: int, name: str) -> None:
        self.total = total
        self.name = name
        self._bar: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar = tqdm(total=self.total, initial=trainer.global_step, desc=self.name, unit="step", leave=False)

    def on_train_batch_end(self, *_: Any) -> None:
        self._bar.update()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None and "val_loss" in trainer.callback_metrics:
            self._bar.set_postfix(val_loss=f"{float(trainer.callback_metrics['val_loss']):.4g}")

    def on_train_end(self, *_: Any) -> None:
        self._bar.close()

    def on_exception(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
