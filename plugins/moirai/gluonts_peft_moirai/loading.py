"""Open a checkpoint folder in the layout of uni2ts: ``config.json`` and ``model.safetensors``.

The three architectures share the layout and do not name themselves: they are told apart by the keys of ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from gluonts_peft.checkpoint import CheckpointError, read_config

__all__ = ["Architecture", "architecture", "load", "save_network"]


@dataclass(frozen=True)
class Architecture:
    """One of the family's networks.

    Parameters
    ----------
    name
        For messages.
    module, network
        Where uni2ts defines it.
    required, optional
        Keys of ``config.json`` that its constructor takes.
    """

    name: str
    module: str
    network: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ("scaling",)


_COMMON = ("d_model", "num_layers", "max_seq_len", "attn_dropout_p", "dropout_p")
MOIRAI_1 = Architecture(
    "Moirai 1.x", "uni2ts.model.moirai.module", "MoiraiModule", ("distr_output", "patch_sizes", *_COMMON)
)
MOIRAI_MOE = Architecture(
    "Moirai-MoE",
    "uni2ts.model.moirai_moe.module",
    "MoiraiMoEModule",
    ("distr_output", "patch_sizes", "d_ff", *_COMMON),
)
MOIRAI_2 = Architecture(
    "Moirai-2",
    "uni2ts.model.moirai2.module",
    "Moirai2Module",
    ("patch_size", "d_ff", *_COMMON),
    ("scaling", "num_predict_token", "quantile_levels"),
)


def architecture(config: Mapping[str, Any], folder: Path) -> Architecture:
    """Tell by its keys whose ``config.json`` it is.

    Raises
    ------
    CheckpointError
        If it is of none.
    """
    if "distr_output" in config:
        return MOIRAI_MOE if "d_ff" in config else MOIRAI_1
    if "patch_size" in config and {"num_predict_token", "quantile_levels"} & set(config):
        return MOIRAI_2
    raise CheckpointError(
        f"checkpoint folder {str(folder)!r} is not of family 'moirai': its config.json has neither distr_output"
        " (Moirai 1.x, Moirai-MoE) nor patch_size with num_predict_token or quantile_levels (Moirai-2)"
    )


def load(folder: Path) -> nn.Module:
    """Build the network of a checkpoint folder.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged or refused, or the weights do not fit the configuration.
    """
    config = read_config(folder)
    found = architecture(config, folder)
    arguments = {key: config[key] for key in (*found.required, *found.optional) if key in config}
    _check(arguments, found, folder)
    if "distr_output" in arguments:
        from .distributions import decode

        try:
            arguments["distr_output"] = decode(arguments["distr_output"])
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint folder {str(folder)!r}: {error}") from error
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"checkpoint folder {str(folder)!r} has no model.safetensors")
    try:
        network: nn.Module = getattr(import_module(found.module), found.network)(**arguments)
        missing, unexpected = network.load_state_dict(load_file(weights), strict=False)
    except (RuntimeError, MemoryError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint folder {str(folder)!r} cannot be loaded as {found.name}: {error}") from error
    for problem, names in (("missing from", missing), ("unknown to", unexpected)):
        if names:
            side = "its weights" if problem == "missing from" else "its configuration"
            raise CheckpointError(
                f"checkpoint folder {str(folder)!r} does not fit {found.name}: {len(names)} tensors are {problem}"
                f" {side} (first: {sorted(names)[0]})"
            )
    return network


def save_network(network: Any, folder: Path) -> None:
    """Write a network in the layout of uni2ts."""
    network.save_pretrained(folder)
    # A page for the hub, about nothing but the names of classes.
    (folder / "README.md").unlink(missing_ok=True)


def _check(config: Mapping[str, Any], found: Architecture, folder: Path) -> None:
    """Check keys and values before anything is built from them."""

    def refuse(message: str) -> None:
        raise CheckpointError(f"config.json of {str(folder)!r}: {message} ({found.name})")

    if missing := [key for key in found.required if key not in config]:
        refuse(f"{', '.join(missing)} missing")
    for key in ("d_model", "d_ff", "num_layers", "max_seq_len", "patch_size", "num_predict_token"):
        if key in config and not _positive(config[key]):
            refuse(f"{key} is {config[key]!r}, not a positive integer")
    if config["d_model"] % 64:
        refuse(f"d_model is {config['d_model']}, not a multiple of 64, the width of a head")
    for key in ("attn_dropout_p", "dropout_p"):
        if not isinstance(config[key], int | float) or not 0 <= config[key] < 1:
            refuse(f"{key} is {config[key]!r}, not a probability")
    if "patch_sizes" in config:
        sizes = config["patch_sizes"]
        if not isinstance(sizes, list) or not sizes or not all(map(_positive, sizes)) or len(set(sizes)) < len(sizes):
            refuse(f"patch_sizes is {sizes!r}, not a list of different positive integers")
    if "quantile_levels" in config:
        levels = config["quantile_levels"]
        numbers = isinstance(levels, list) and levels and all(isinstance(x, float) and 0 < x < 1 for x in levels)
        if not numbers or sorted(set(levels)) != levels:
            refuse(f"quantile_levels is {levels!r}, not a rising list of numbers between 0 and 1")


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
