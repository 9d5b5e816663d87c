"""Reading networks from checkpoint folders: checked, aligned in memory, and shared by those who need many of one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .checkpoint import CheckpointError, check_finite

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["SENSELESS", "Networks", "read_network"]

SENSELESS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
)
"""Errors that libraries raise if a configuration makes no sense."""

# Alignment of memory that torch allocates on the CPU, in bytes.
_ALIGNMENT = 64


def read_network(family: type[Backbone], folder: Path) -> tuple[nn.Module, str]:
    """Return the network in a checkpoint folder, and the fingerprint of its weights.

    Raises
    ------
    CheckpointError
        If it cannot be loaded, or holds numbers that are not finite.
    """
    try:
        network = _aligned(family.load_network(folder))
        check_finite(network, folder)
    except (CheckpointError, ImportError, OSError):
        raise
    except Exception as error:
        # Libraries trust a configuration, and may raise anything if it makes no sense.
        raise CheckpointError(
            f"checkpoint folder {str(folder)!r} cannot be loaded by family {family.family!r}: {type(error).__name__}:"
            f" {error}; fetch it again"
        ) from error
    return network, family.fingerprint(folder)


class Networks:
    """Networks by the folders that they were read from, each read once as long as its files do not change.

    For processes that train one adapter after another on the same base: handed to
    :meth:`gluonts_peft.backbone.Backbone.from_checkpoint`, or set as the attribute ``networks`` of an estimator.
    """

    def __init__(self) -> None:
        self._read: dict[Any, tuple[nn.Module, str]] = {}

    def get(self, family: type[Backbone], folder: Path) -> tuple[nn.Module, str]:
        """Return the same as :func:`read_network`; networks of one folder share their values: change none in place."""
        files = sorted(path for path in folder.iterdir() if path.is_file())
        key = (family, *((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files))
        if key not in self._read:
            self._read[key] = read_network(family, folder)
        network, digest = self._read[key]
        # New parameters on the same memory: moving one to a GPU, or training it, leaves the kept network alone.
        shared: dict[int, Any] = {
            id(tensor): nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
            for tensor in network.parameters()
        }
        shared |= {id(tensor): tensor.detach() for tensor in network.buffers()}
        return copy.deepcopy(network, shared), digest


def _aligned(network: nn.Module) -> nn.Module:
    """Copy tensors at unaligned addresses, as in a memory-mapped file, into memory that torch allocates.

    On some processors matrix products round differently there, so that a model and its copy would not agree bit for
    bit.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
    return network
