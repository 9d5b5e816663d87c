"""Networks read from checkpoint folders: checked, aligned in memory, and kept where a process wants many of one."""

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
"""What libraries raise where a configuration makes no sense."""

# Of what torch allocates on the CPU.
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
        # Libraries believe what a configuration says, and fail in any way where it makes no sense.
        raise CheckpointError(
            f"checkpoint folder {str(folder)!r} cannot be loaded by family {family.family!r}: {type(error).__name__}:"
            f" {error}; fetch it again"
        ) from error
    return network, family.fingerprint(folder)


class Networks:
    """Networks by the folders that they came from, each read once as long as its files stay what they are."""

    def __init__(self) -> None:
        self._read: dict[Any, tuple[nn.Module, str]] = {}

    def get(self, family: type[Backbone], folder: Path) -> tuple[nn.Module, str]:
        """Return as :func:`read_network` does; networks of one folder share their values, which nobody may write to."""
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
    """Move tensors that lie at odd addresses, as in a file that is mapped, into memory of torch's own.

    On some processors products of matrices round differently there, so that a model and its copy would not agree bit
    for bit.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
    return network
