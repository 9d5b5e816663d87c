"""Resuming a training run: where it starts, and whether a checkpoint belongs to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

# Re-exported: they were part of this module in 0.1.
from .checkpoint_io import SafeCheckpointIO, read_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from .adapters.base import Adapter
    from .backbone import Backbone
    from .series.windows import Windows
    from .training_options import TrainingOptions

__all__ = [
    "LAST",
    "SafeCheckpointIO",
    "describe_run",
    "digest",
    "read_checkpoint",
    "starting_point",
    "write_checkpoint",
]

#: Name of the checkpoint of a run in its folder.
LAST = "last.ckpt"


def describe_run(
    backbone: Backbone,
    adapter: Adapter,
    windows: Windows,
    validation: Iterable[Mapping[str, Any]],
    options: TrainingOptions,
    *,
    rate: float,
    device: str,
    **more: Any,
) -> dict[str, Any]:
    """Return everything that decides the numbers of a run; a checkpoint of another run is not resumed.

    Parameters
    ----------
    backbone, adapter
        What is trained.
    windows
        Where training windows are drawn from, before any were held out for scoring.
    validation
        Batches of validation windows.
    options
        How to train; of these, ``time_limit`` only decides how many numbers there are.
    rate
        Peak learning rate.
    device
        Type of the device.
    **more
        Further facts that decide numbers: JSON values.
    """
    decisive = {name: value for name, value in asdict(options).items() if name != "time_limit"}
    return {
        "adapter": adapter.spec,
        "base": asdict(backbone.source),
        "backbone_options": backbone.options,
        "data": windows.store.fingerprint(),
        "validation": digest(validation),
        "windows": {
            name: _plain(getattr(windows, name))
            for name in ("context_length", "prediction_length", "min_context", "holdout", "seed")
        },
        "options": decisive | {"learning_rate": rate, "device": device},
        **more,
    }


def starting_point(
    folder: Path | None, ckpt_path: str | Path | None, run: Mapping[str, Any]
) -> tuple[Path | None, Path | None, Mapping[str, Any]]:
    """Return where checkpoints are written, which one to start from, and the run that it belongs to.

    Parameters
    ----------
    folder
        Folder of checkpoints; None if none are written.
    ckpt_path
        A checkpoint to start from, or ``"last"``: that of `folder`, if there is one.
    run
        What :func:`describe_run` says of this run.

    Raises
    ------
    ValueError
        If the checkpoint belongs to another run, or the folder holds one that was not asked for.
    """
    path = None if folder is None else folder / LAST
    if ckpt_path == "last":
        if path is None:
            raise ValueError("ckpt_path 'last' needs the folder of the earlier run; name it as `folder`")
        start = path if path.is_file() else None
    else:
        start = None if ckpt_path is None else Path(ckpt_path)
        if path is not None and path.is_file() and not (start is not None and path.samefile(start)):
            raise ValueError(
                f"folder {str(folder)!r} already holds a training run; pass ckpt_path='last' to go on with it, or name"
                " another folder"
            )
    earlier: Any = {}
    if start is not None:
        states = read_checkpoint(start).get("callbacks", {})
        earlier = next((state["run"] for state in states.values() if isinstance(state, dict) and "run" in state), {})
        # Records of 0.1.0 have neither arguments of the trainer nor a verdict.
        compared = [name for name in run if name in earlier or name not in ("trainer", "verdict")]
        if differing := [name for name in compared if _plain(earlier.get(name)) != _plain(run[name])]:
            raise ValueError(
                f"checkpoint {str(start)!r} belongs to another run: {', '.join(differing)} differ"
                f" ({_first_difference(earlier, run, differing[0])})"
            )
    return path, start, earlier


def digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of batches of arrays."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(np.ascontiguousarray(batch[name]).data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _first_difference(earlier: Mapping[str, Any], run: Mapping[str, Any], name: str) -> str:
    left, right = earlier.get(name), run[name]
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        key = next(key for key in {**right, **left} if _plain(left.get(key)) != _plain(right.get(key)))
        return f"{key}: {left.get(key)!r} there, {right.get(key)!r} here"
    return f"{left!r} there, {right!r} here"
