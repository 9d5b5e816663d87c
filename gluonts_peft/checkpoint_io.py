"""Training checkpoints without pickle: one safetensors file whose header holds the rest as JSON.

Lightning writes its checkpoints with ``torch.save``. This plugin writes the same nested state, tensors as tensors and
everything else as JSON, in one file that appears under its name only when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from .checkpoint import save_tensors
from .files import NewerFormat, check_regular, opened, parse_json, record, replacing

__all__ = ["SafeCheckpointIO", "read_checkpoint", "write_checkpoint"]

_KEY = "gluonts_peft_checkpoint"


def write_checkpoint(state: Mapping[str, Any], path: str | Path) -> None:
    """Write nested mappings, lists, tuples, numbers, strings and tensors to one file, atomically.

    Raises
    ------
    TypeError
        If the state holds anything else; the message says where.
    OSError
        If the disk is full or the folder cannot be written; an earlier file of that name stays whole.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, tensors, "state")
    with replacing(path) as partial:
        save_tensors(tensors, partial, {_KEY: json.dumps(record({"state": tree}))})


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged or is not such a checkpoint. Pickled checkpoints are not read.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists() or Path(path).is_dir():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    try:
        check_regular(Path(path))
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            if header is None:
                raise ValueError(f"{str(path)!r} is a safetensors file, but not a training checkpoint")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is not a training checkpoint of this project, or is damaged: {error}"
        ) from error
    try:
        tree = parse_json(header)
        if isinstance(tree, dict) and "format" in tree:
            tree = opened(tree)["state"]
        state: dict[str, Any] = _decode(tree, tensors)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}, not a mapping")
    except NewerFormat as error:
        raise ValueError(f"{str(path)!r} was {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is a damaged training checkpoint: {error!r}") from error
    return state


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {"dict": [[_encode(k, tensors, where), _encode(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings and containers")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "tuple":
            return tuple(_decode(item, tensors) for item in content)
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    return value


class SafeCheckpointIO(CheckpointIO):  # type: ignore[misc]
    """Lightning plugin: ``Trainer(plugins=[SafeCheckpointIO()])``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint. Tensors are on the CPU; Lightning moves them."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)
