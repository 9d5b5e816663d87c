"""Which arguments of ``lightning.pytorch.Trainer`` a user may add to ours, and which change numbers.

What is refused has a reason here: it is an option of ours, or the loop would not do what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import unknown

if TYPE_CHECKING:
    import torch

__all__ = ["ACCEPTED", "REFUSED", "check_precision", "check_trainer_kwargs", "deciding", "resolve_precision"]

ACCEPTED: dict[str, bool] = {
    "accumulate_grad_batches": True,
    "gradient_clip_algorithm": True,
    "deterministic": True,
    "benchmark": True,
    "callbacks": False,
    "detect_anomaly": False,
    "enable_model_summary": False,
    "inference_mode": False,
    "log_every_n_steps": False,
    "logger": False,
    "profiler": False,
}
"""Arguments that work -> whether they change numbers, so that a run that is resumed must have the same."""

_OURS = "it is an option of the estimator: {}"
_EPOCHS = "each epoch of num_batches_per_epoch steps ends with a validation, which chooses the weights: {}"
_ONE = "training runs in one process on one device: {}"
_NOTHING = "there is nothing that it would do here: {}"

REFUSED: dict[str, str] = {
    "max_epochs": _OURS.format("max_epochs"),
    "gradient_clip_val": _OURS.format("gradient_clip_val"),
    "limit_train_batches": _OURS.format("num_batches_per_epoch"),
    "precision": _OURS.format("precision"),
    "accelerator": _OURS.format("device, e.g. 'cpu' or 'cuda:1'"),
    "devices": _OURS.format("device, e.g. 'cpu' or 'cuda:1'; training runs on one"),
    "enable_progress_bar": _OURS.format("progress"),
    "default_root_dir": _OURS.format("folder"),
    "enable_checkpointing": _OURS.format("folder; checkpoints are written there"),
    "max_steps": _EPOCHS.format("name max_epochs and num_batches_per_epoch"),
    "min_steps": _EPOCHS.format("name max_epochs and patience"),
    "min_epochs": _EPOCHS.format("name max_epochs and patience"),
    "max_time": _EPOCHS.format("name time_limit, which leaves time for the verdict"),
    "limit_val_batches": _EPOCHS.format("name max_validation_windows"),
    "val_check_interval": _EPOCHS.format("name num_batches_per_epoch"),
    "check_val_every_n_epoch": _EPOCHS.format("name num_batches_per_epoch"),
    "num_sanity_val_steps": _EPOCHS.format("zero-shot is scored before the first"),
    "fast_dev_run": _EPOCHS.format("name max_epochs=1 and num_batches_per_epoch=1"),
    "overfit_batches": _EPOCHS.format("windows are drawn in each step; train on fewer series"),
    "reload_dataloaders_every_n_epochs": _NOTHING.format("windows are drawn in each step"),
    "use_distributed_sampler": _NOTHING.format("windows are drawn in each step"),
    "limit_test_batches": _NOTHING.format("there is no test loop; see backtest"),
    "limit_predict_batches": _NOTHING.format("predictors forecast without Lightning"),
    "enable_autolog_hparams": _NOTHING.format("options are recorded with the predictor"),
    "model_registry": _NOTHING.format("name folder, and serialize the predictor"),
    "strategy": _ONE.format("name device; studies run trials on several"),
    "num_nodes": _ONE.format("name device; studies run trials on several"),
    "sync_batchnorm": _ONE.format("there is nothing to synchronise"),
    "plugins": "checkpoints are written by a plugin of ours, which another could displace: leave it out",
    "barebones": "it switches off what finds the best epoch: leave it out",
}
"""Arguments that do not -> why, and what to name instead."""

_PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
_SHORT = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def check_trainer_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise a ValueError if an argument is unknown to Lightning or does not go with our loop; the message names it."""
    for name, value in kwargs.items():
        if name in REFUSED:
            raise ValueError(f"trainer_kwargs: {name}={value!r} cannot be used, {REFUSED[name]}")
        if name not in ACCEPTED:
            raise ValueError("trainer_kwargs: " + unknown("argument of the trainer", name, ACCEPTED))
    steps = kwargs.get("accumulate_grad_batches", 1)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"trainer_kwargs: accumulate_grad_batches={steps!r} is not a whole number, 1 or more")
    algorithm = kwargs.get("gradient_clip_algorithm")
    if algorithm not in (None, "norm", "value"):
        raise ValueError("trainer_kwargs: " + unknown("gradient_clip_algorithm", str(algorithm), ("norm", "value")))


def deciding(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that change numbers, without those that say what is the default."""
    given = {name: value for name, value in kwargs.items() if ACCEPTED.get(name)}
    defaults = {
        "accumulate_grad_batches": (1,),
        "gradient_clip_algorithm": (None, "norm"),
        "deterministic": (None, False),
        "benchmark": (None, False),
    }
    return {name: value for name, value in given.items() if value not in defaults[name]}


def check_precision(precision: Any) -> str:
    """Return a precision as Lightning spells it, or ``"auto"``; a ValueError if there is none of that name."""
    found = _SHORT.get(str(precision), str(precision))
    if found not in _PRECISIONS:
        raise ValueError(unknown("precision", str(precision), _PRECISIONS))
    return found


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return what a precision is on a device.

    Raises
    ------
    ValueError
        If the device does not have it; Lightning would take another in its place.
    """
    import torch

    found = check_precision(precision)
    if found == "auto":
        return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"
    if found == "16-mixed" and device.type == "cpu":
        raise ValueError(
            f"precision {precision!r} is not for the CPU, which mixes with bfloat16: name 'bf16-mixed', or a GPU as"
            " device"
        )
    return found
