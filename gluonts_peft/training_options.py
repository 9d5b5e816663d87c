"""How to train: options of a training run, checked when they are given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .deadline import parse_time_limit
from .trainer_kwargs import check_precision

if TYPE_CHECKING:
    import torch

__all__ = ["TrainingOptions", "resolve_device"]


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Parameters
    ----------
    max_epochs
        Most epochs; each ends with a validation.
    num_batches_per_epoch
        Steps per epoch; fewer if there are fewer windows than they would draw, so that small data are passed over at
        most ``max_epochs`` times, with a validation after each pass.
    batch_size
        Windows per step.
    learning_rate
        Peak rate of AdamW; the adapter's own if None.
    weight_decay
        Weight decay of AdamW on the parameters of the adapter.
    warmup
        Share of all steps in which the rate rises linearly; after it, cosine decay to zero.
    gradient_clip_val
        Maximum norm of the gradient; 0 means no clipping.
    patience
        Epochs without a better validation loss after which training stops; 0 means never.
    seed
        Seed of initialisation, sampled windows and dropout.
    device
        ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
    precision
        A precision of Lightning, or ``"auto"``: bfloat16 on GPUs that support it, else float32. ``"16-mixed"`` needs a
        GPU.
    time_limit
        Time for training and verdict, see :func:`gluonts_peft.deadline.parse_time_limit`; stored in seconds, None means
        no limit. It decides when training ends but no number before that: the learning rate decays as if all
        ``max_epochs`` were trained.
    """

    max_epochs: int = 10
    num_batches_per_epoch: int = 50
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    gradient_clip_val: float = 1.0
    patience: int = 5
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    time_limit: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            # It would count as 0 or 1.
            if isinstance(value, bool) and name != "time_limit":
                raise ValueError(f"{name} {value!r} is not a {'name' if name in ('device', 'precision') else 'number'}")
        object.__setattr__(self, "time_limit", parse_time_limit(self.time_limit))
        for name in ("max_epochs", "num_batches_per_epoch", "batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        for name in ("weight_decay", "gradient_clip_val", "patience", "seed"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} {value} is negative")
            if not value < math.inf:
                raise ValueError(f"{name} {value} is not finite")
        if self.seed >= 2**63:
            raise ValueError(f"seed {self.seed} is too large; name one below 2**63")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate} is not positive")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup {self.warmup} is not a share of the training; name a number from 0 to below 1")
        check_precision(self.precision)

    @property
    def total_steps(self) -> int:
        """Number of steps of a run without early stopping."""
        return self.max_epochs * self.num_batches_per_epoch


def resolve_device(device: str) -> torch.device:
    """Return the device that was asked for.

    Raises
    ------
    ValueError
        If it does not exist here; there is no fall-back to another one.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown; name 'auto', 'cpu', 'cuda' or 'cuda:1'") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} does not exist; this machine has {torch.cuda.device_count()} CUDA devices")
    return found
