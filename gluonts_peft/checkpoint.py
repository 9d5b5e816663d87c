"""Where pretrained weights come from, and what they are.

A checkpoint is named in one of three ways: a **bundled** name that a family ships (``"bolt-nano"``), a local
**folder** in the family's official layout, or a **hub** id with an optional revision (``"amazon/chronos-bolt-tiny"``,
``"amazon/chronos-bolt-tiny@<revision>"``). Whatever the name, :func:`resolve` ends at a folder of safetensors and JSON.

>>> parse("amazon/chronos-bolt-tiny@4b1b", bundled=["bolt-nano"])
Checkpoint(kind='hub', name='amazon/chronos-bolt-tiny', revision='4b1b')
>>> parse("bolt-nano", bundled=["bolt-nano"])
Checkpoint(kind='bundled', name='bolt-nano', revision=None)
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import check_regular, load_json

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "check_finite",
    "check_whole",
    "fingerprint",
    "first_nonfinite",
    "parse",
    "read_config",
    "resolve",
    "save_tensors",
]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, unsafe or of another family."""


@dataclass(frozen=True)
class Checkpoint:
    """The name of a set of pretrained weights.

    Parameters
    ----------
    kind
        ``"bundled"``, ``"folder"`` or ``"hub"``.
    name
        Bundled name, path or hub id.
    revision
        Hub revision (branch, tag or commit), if given.
    """

    kind: str
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def parse(name: str | Path | Checkpoint, *, bundled: Iterable[str]) -> Checkpoint:
    """Tell which kind of checkpoint is meant.

    A bundled name wins, then an existing folder, then the form of a hub id.

    Raises
    ------
    CheckpointError
        If ``name`` is none of the three.
    """
    if isinstance(name, Checkpoint):
        return name
    bundled = sorted(bundled)
    text = str(name)
    if text in bundled:
        return Checkpoint("bundled", text)
    path = Path(name).expanduser()
    if path.is_dir():
        return Checkpoint("folder", text)
    if path.exists():
        raise CheckpointError(f"checkpoint {text!r} is a file; name the folder that holds config.json and the weights")
    if isinstance(name, str) and _HUB_ID.fullmatch(text):
        identity, _, revision = text.partition("@")
        return Checkpoint("hub", identity, revision or None)
    raise CheckpointError(
        f"checkpoint {text!r} is neither a bundled name ({', '.join(bundled) or 'none'}), nor an existing folder,"
        " nor a hub id such as 'amazon/chronos-bolt-tiny'"
    )


def resolve(checkpoint: Checkpoint, *, bundled: dict[str, Path]) -> tuple[Path, str | None]:
    """Return the folder of a checkpoint and its exact revision, fetching it from the hub if need be.

    Only JSON and safetensors files are fetched. The hub's own cache and its environment variables apply.

    Raises
    ------
    CheckpointError
        If the bundled name is unknown, the folder is gone, or the hub cannot be reached.
    """
    if checkpoint.kind == "bundled":
        if checkpoint.name not in bundled:
            raise CheckpointError(
                f"bundled checkpoint {checkpoint.name!r} is unknown; known: {', '.join(sorted(bundled)) or 'none'}"
            )
        return bundled[checkpoint.name], None
    if checkpoint.kind == "folder":
        folder = Path(checkpoint.name).expanduser()
        if not folder.is_dir():
            raise CheckpointError(f"checkpoint folder {checkpoint.name!r} does not exist")
        return folder, None
    return _download(checkpoint, sorted(bundled))


def _download(checkpoint: Checkpoint, bundled: list[str]) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(checkpoint.name, revision=checkpoint.revision, allow_patterns=["*.json", "*.safetensors"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} cannot be fetched from the hub ({type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else 'no reason given'}); check the name and the network, name"
            f" a local folder, or use a bundled checkpoint: {', '.join(bundled) or 'none'}"
        ) from error
    # The hub's cache names the snapshot's folder by its commit.
    return folder, folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else checkpoint.revision


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint folder and check that its weights can be opened safely.

    Raises
    ------
    CheckpointError
        If a file is missing, is not what it says, or is cut short, or if there are pickled weights only.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"checkpoint folder {str(folder)!r} has no config.json")
    try:
        config = load_json(path)
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(config).__name__}, not a mapping")
    _check_others(folder)
    shapes = [shape for weights in weight_files(folder) for shape in _shapes(weights)]
    if fault := _too_large(config, shapes):
        raise CheckpointError(f"{str(path)!r} does not fit the weights beside it: {fault}; fetch the folder again")
    return config


def _check_others(folder: Path) -> None:
    """Refuse what the libraries that load a folder would open beside its config and weights."""
    if (folder / "adapter_config.json").exists():
        # They would load the model that it names in place of this one.
        raise CheckpointError(
            f"checkpoint folder {str(folder)!r} holds an adapter, adapter_config.json, beside the weights; name a"
            " folder with the pretrained model alone"
        )
    for path in (folder / "generation_config.json", folder / "model.safetensors.index.json"):
        try:
            if path.exists():
                load_json(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{str(path)!r} cannot be used: {error}; fetch it again, or remove it") from error


# Keys of official configurations, with what bounds them; others may hold what they like.
_LAYERS = re.compile(r"(num_(\w+_)?layers|n_layers?|num_blocks|depth)")
_WIDTHS = re.compile(r"(d_model|d_ff|d_kv|n_head|n_embd_per_head|num_heads|num_attention_heads|hidden_size)")
_LENGTHS = re.compile(r"(\w+_)?(length|seq_len|patch_len|patch_size|horizon|vocab_size|n_tokens|max_distance|patches)")
# What is allocated by a length that no tensor has: more steps than any model sees.
_LONGEST = 1 << 20
# A width that no network runs out of memory by.
_HARMLESS = 1 << 13


def _too_large(config: Mapping[str, Any], shapes: list[tuple[int, ...]]) -> str | None:
    """Say which size in a configuration cannot be that of the weights: building by it could take all memory."""
    # Some networks are built by a multiple of what is in the file, or do not use a width that they name; and they say
    # better what does not fit.
    side = max((side for shape in shapes for side in shape), default=0)
    limits = (
        (_LAYERS, len(shapes), f"there are {len(shapes)} tensors"),
        (_WIDTHS, max(4 * side, _HARMLESS), f"no tensor has a side above {side:,}"),
        (_LENGTHS, _LONGEST, f"at most {_LONGEST:,} is possible"),
    )
    for name, value in _sizes(config):
        for pattern, limit, words in limits:
            if isinstance(value, int) and pattern.fullmatch(name.rpartition(".")[2]) and value > limit:
                return f"{name} is {value:,}, but {words}"
    return None


def _sizes(config: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _sizes(value, f"{where}{key}.")
        elif value is not None and any(each.fullmatch(str(key)) for each in (_LAYERS, _WIDTHS, _LENGTHS)):
            yield f"{where}{key}", value


def check_whole(config: Mapping[str, Any], folder: Path) -> None:
    """Make sure that what names a size in a ``config.json`` is a whole number, for families that do not look.

    Raises
    ------
    CheckpointError
        With the key and its value.
    """
    for name, value in _sizes(config):
        # Of generated text, which nobody asks for, zero is a length.
        low = 0 if name.endswith("min_length") else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise CheckpointError(f"{str(folder / 'config.json')!r}: {name} is {value!r}, not a positive whole number")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder, sorted.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    found = sorted(path for path in folder.glob("*.safetensors") if path.name.startswith("model"))
    if not found:
        pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt")))
        hint = f"; pickled weights ({', '.join(pickled)}) are not read: convert them to safetensors" if pickled else ""
        raise CheckpointError(f"checkpoint folder {str(folder)!r} has no model.safetensors{hint}")
    return found


def _shapes(path: Path) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors of a safetensors file, which must be whole."""
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        with safe_open(path, framework="numpy") as file:
            return [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is truncated or damaged: {error}; fetch it again") from error


def first_nonfinite(tensors: Mapping[str, Any]) -> str | None:
    """Return the name of the first torch tensor that holds NaN or an infinity, if any does."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
            return name
    return None


def check_finite(network: Any, folder: Path) -> None:
    """Refuse a network that was read from a checkpoint folder if its weights are not all finite.

    Raises
    ------
    CheckpointError
        That names the file and the tensor.
    """
    if (name := first_nonfinite(network.state_dict())) is None:
        return
    files = sorted(folder.glob("model*.safetensors")) or [folder]
    place = files[0] if len(files) == 1 else next((path for path in files if name in _names(path)), folder)
    raise CheckpointError(f"{str(place)!r}: tensor {name!r} holds NaN or infinite numbers; fetch or train it again")


def _names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return set(file.keys())


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of the weights of a checkpoint folder.

    Any change of a weight changes it; a renamed or moved folder, or another ``config.json``, does not.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file of torch tensors.

    Raises
    ------
    OSError
        If the disk is full or the place cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} cannot be written: {error}") from error
    # The library leaves a file that only its owner can read; others of a group may be meant to.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
