"""Reading and writing checkpoints.

Two layouts are read. The published one is a single ``lag-llama.ckpt`` of Lightning: a pickle, opened with
``torch.load(weights_only=True)``, in which the two foreign classes that it names are replaced by inert stand-ins. Ours
is ``config.json`` and ``model.safetensors``. :func:`write` makes both, so that what is written opens anywhere; a folder
that holds both must hold the same weights twice.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gluonts_peft.checkpoint import Checkpoint, CheckpointError, fingerprint, read_config, save_tensors

from .network import LagLlamaConfig, LagLlamaNetwork

__all__ = ["CKPT", "fetch", "fingerprint_of", "read", "write"]

CKPT = "lag-llama.ckpt"
MODEL_TYPE = "lag-llama"
_PREFIX = "model."


class _StudentTOutput:
    """Stands for gluonts's description of the distribution: attributes without behaviour."""


class _NegativeLogLikelihood:
    """Stands for gluonts's loss, which gluonts itself no longer has."""

    def __setstate__(self, state: Any) -> None:
        """Its state is which are not needed here."""


_FOREIGN = {
    "gluonts.torch.distributions.studentT.StudentTOutput": _StudentTOutput,
    "gluonts.torch.modules.loss.NegativeLogLikelihood": _NegativeLogLikelihood,
}


def read(folder: Path) -> LagLlamaNetwork:
    """Build the network of a checkpoint folder.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated, changed, carries code, or does not hold a Lag-Llama.
    """
    published = (folder / CKPT).is_file()
    if (folder / "config.json").is_file() or not published:
        values, state = _read_safe(folder)
        if published:
            _check_same(state, _read_ckpt(folder / CKPT)[1], folder)
    else:
        values, state = _read_ckpt(folder / CKPT)
    known = LagLlamaConfig.names()
    sizes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known
    }
    try:
        config = LagLlamaConfig(**sizes)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint folder {str(folder)!r} does not describe a Lag-Llama: {error}") from error
    network = LagLlamaNetwork(config)
    own = network.state_dict()
    wrong = [
        name
        for name in sorted({*own, *state})
        if name not in own or name not in state or own[name].shape != state[name].shape
    ]
    if wrong:
        here, there = (
            str(tuple(tensors[wrong[0]].shape)) if wrong[0] in tensors else "none" for tensors in (own, state)
        )
        raise CheckpointError(
            f"checkpoint folder {str(folder)!r} does not fit its own sizes: {len(wrong)} tensors differ (first:"
            f" {wrong[0]}, shape {here} by the sizes, {there} in the file)"
        )
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return network


def _check_same(state: Mapping[str, Tensor], other: Mapping[str, Tensor], folder: Path) -> None:
    if state.keys() != other.keys() or not all(torch.equal(state[name], other[name]) for name in state):
        raise CheckpointError(
            f"checkpoint folder {str(folder)!r} holds other weights in {CKPT} than in model.safetensors; remove one"
        )


def _read_safe(folder: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    config = read_config(folder)
    if config.get("model_type") != MODEL_TYPE or not isinstance(config.get("model_kwargs"), dict):
        raise CheckpointError(
            f"checkpoint folder {str(folder)!r} is not of family 'lag-llama': its config.json has model_type"
            f" {config.get('model_type')!r} and {'' if 'model_kwargs' in config else 'no '}model_kwargs"
        )
    return config["model_kwargs"], load_file(folder / "model.safetensors")


def _read_ckpt(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    _check_archive(path)
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _FOREIGN.items()]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, IndexError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "Unsupported" in line or "Error" in line]
        reason = (lines or str(error).splitlines() or ["no reason given"])[-1].split(" was not an allowed")[0]
        raise CheckpointError(
            f"{str(path)!r} is damaged or holds more than weights, and nothing of it was run: {reason}; take the"
            " published file, or write a folder with gluonts_peft's export"
        ) from error
    try:
        values = dict(content["hyper_parameters"]["model_kwargs"])
        named = dict(content["state_dict"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not a Lag-Llama checkpoint: it has no state_dict or no hyper_parameters.model_kwargs"
        ) from error
    output = values.pop("distr_output", None)
    if not (output in (None, "studentT") or isinstance(output, _StudentTOutput)):
        raise CheckpointError(f"{str(path)!r} has distr_output {output!r}; only the Student-t distribution is known")
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in named.items()}
    if odd := [name for name, tensor in state.items() if type(tensor) is not Tensor]:
        raise CheckpointError(f"{str(path)!r}: {odd[0]} is a {type(state[odd[0]]).__name__}, not a tensor")
    return values, state


def _check_archive(path: Path) -> None:
    """Refuse what is not a whole archive: checksums tell a changed byte from a weight."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{str(path)!r} is truncated, damaged or no archive of torch.save ({error}); fetch it again"
        ) from error
    if bad is not None:
        raise CheckpointError(f"{str(path)!r} was changed or damaged: checksum of {bad} is wrong; fetch it again")


def fetch(checkpoint: Checkpoint, folder: Path, revision: str | None) -> Path:
    """Return the folder of a hub checkpoint with its ``lag-llama.ckpt``, fetched if it has no safetensors.

    Raises
    ------
    CheckpointError
        If the repository has neither, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    if (folder / "model.safetensors").is_file() or (folder / CKPT).is_file():
        return folder
    try:
        return Path(hf_hub_download(checkpoint.name, CKPT, revision=revision)).parent
    except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} has no model.safetensors, and its {CKPT} cannot be fetched"
            f" ({type(error).__name__}); check the name and the network, or name a local folder"
        ) from error


def fingerprint_of(folder: Path) -> str:
    """Return the SHA-256 of the weights of a folder: of the safetensors if it has any, else of the published file."""
    if (folder / "config.json").is_file() or not (folder / CKPT).is_file():
        return fingerprint(folder)
    digest = hashlib.sha256()
    with (folder / CKPT).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write(network: LagLlamaNetwork, folder: Path, *, ckpt: bool = True) -> None:
    """Write ``config.json`` and ``model.safetensors`` into an existing folder, and ``lag-llama.ckpt`` if wanted.

    The last opens with the official code, ``LagLlamaEstimator(ckpt_path=...)``, and holds plain values and tensors
    only; its distribution is named ``"studentT"`` instead of being an object of gluonts.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    values = asdict(network.config)
    values["lags_seq"] = list(values["lags_seq"])
    values["rope_scaling"] = None if network.rope_scaling is None else dict(network.rope_scaling)
    config = {"model_type": MODEL_TYPE, "model_kwargs": values}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_tensors(state, folder / "model.safetensors", {"format": "pt"})
    if not ckpt:
        return
    content = {
        "pytorch-lightning_version": "2.0.0",
        "epoch": 0,
        "global_step": 0,
        "state_dict": {f"{_PREFIX}{name}": tensor for name, tensor in state.items()},
        "hyper_parameters": {
            "context_length": network.config.context_length,
            "prediction_length": 1,
            "model_kwargs": {**values, "distr_output": "studentT"},
        },
    }
    torch.save(content, folder / CKPT)
