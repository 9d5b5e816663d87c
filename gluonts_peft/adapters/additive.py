"""Adapters of HuggingFace PEFT: one row a method.

PEFT owns the mathematics and the file format; a row says where a method goes, how fast it trains, and which of its
defaults we change. Everything else in a method's PEFT configuration is an option under PEFT's own name. Papers:

    lora       W' = W + (alpha/r) B A                               Hu et al. 2021, arXiv 2106.09685
    dora       W' = m (W + (alpha/r) B A) / |W + (alpha/r) B A|     Liu et al. 2024, arXiv 2402.09353
    vera       W' = W + diag(b) B diag(d) A, A and B frozen         Kopiczko et al. 2023, arXiv 2310.11454
    fourierft  W' = W + s Re IDFT2(n coefficients)                  Gao et al. 2024, arXiv 2405.03003
    ia3        y' = l * y                                           Liu et al. 2022, arXiv 2205.05638
    layernorm  the weights of normalisation layers                  Zhao et al. 2023, arXiv 2312.11420

Learning rates and the choice of sites are ours, except where the docstring of a row's paper fixes them.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import load_json
from .adalora import AdaLora
from .base import Adapter, AdapterError
from .peft import EXTRA, OURS, Method, PeftAdapter

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = [
    "TABLE",
    "Method",
    "PeftAdapter",
    "adalora",
    "c3a",
    "dora",
    "fourierft",
    "from_peft",
    "hra",
    "ia3",
    "layernorm",
    "lora",
    "miss",
    "oft",
    "randlora",
    "vera",
    "waveft",
]

# VeRA: projections are drawn again from their seed instead of stored (kilobytes); their digest is stored and checked.
# FourierFT: PEFT's default starts away from zero; init_weights=True leaves the model unchanged at the start.
# VB-LoRA is left out: PEFT starts it away from zero, and zero is a point that it cannot leave.
# C3A: PEFT's named initialisations leave the model changed at the start; True means zeros there.
layernorm = Method("layernorm", "LNTuningConfig", 3e-3, sites=("norm",))
lora = Method("lora", "LoraConfig", 2e-3, defaults={"r": 2, "lora_alpha": 16})
dora = Method("dora", "LoraConfig", 2e-3, defaults={"r": 2, "lora_alpha": 16, "use_dora": True}, dense=True)
vera = Method("vera", "VeraConfig", 1e-2, defaults={"save_projection": False}, dense=True, innermost=True)
fourierft = Method("fourierft", "FourierFTConfig", 1e-1, defaults={"n_frequency": 50, "init_weights": True}, dense=True)
ia3 = Method("ia3", "IA3Config", 1e-2, sites=("k", "v"), feedforward=("ff_out",))
adalora = Method(
    "adalora", "AdaLoraConfig", 5e-3, defaults={"init_r": 4, "target_r": 2, "lora_alpha": 16}, kind=AdaLora
)
randlora = Method("randlora", "RandLoraConfig", 1e-3, defaults={"save_projection": False}, dense=True, innermost=True)
oft = Method("oft", "OFTConfig", 2e-3, divides=("oft_block_size", 16))
hra = Method("hra", "HRAConfig", 2e-3, defaults={"r": 2})
miss = Method("miss", "MissConfig", 2e-3, divides=("r", 8))
c3a = Method("c3a", "C3AConfig", 1e-2, defaults={"init_weights": True}, divides=("block_size", 16), dense=True)
waveft = Method("waveft", "WaveFTConfig", 1e-2, defaults={"n_frequency": 50}, dense=True)

TABLE = (layernorm, lora, dora, vera, fourierft, ia3, adalora, randlora, oft, hra, miss, c3a, waveft)


def from_peft(folder: Path, backbone: Backbone) -> Adapter:
    """Build the adapter that a folder written by plain PEFT describes; its weights are not loaded yet.

    Raises
    ------
    AdapterError
        If the configuration cannot be read, or its method is not in the table.
    """
    from peft import PeftConfig

    try:
        # As PEFT reads whatever it is given.
        if not isinstance(content := load_json(folder / "adapter_config.json"), dict):
            raise TypeError(f"it holds a {type(content).__name__}, not a mapping")
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise AdapterError(f"adapter_config.json in {str(folder)!r} cannot be read: {error}") from error
    rows = [method for method in TABLE if type(config) is method.config_class()]
    if not rows:
        raise AdapterError(
            f"adapter in {str(folder)!r} is of type {config.peft_type}, which is not supported; known:"
            f" {', '.join(method.name for method in TABLE)}"
        )
    method = next((row for row in rows if row.name == "dora"), rows[0]) if getattr(config, "use_dora", 0) else rows[0]
    # AdaLoRA's length is known when training starts, and PEFT makes no configuration without one.
    length = {"total_step": 1} if hasattr(config, "total_step") else {}
    plain = method.config_class()(**length)
    options = {}
    always = {*method.defaults, *(method.divides or ())[:1]}
    for item in fields(config):
        value = getattr(config, item.name)
        if getattr(config, "init_lora_weights", None) == "eva" and item.name in ("init_lora_weights", "eva_config"):
            # How an adapter started is of no matter once it is trained, if the base stayed what it was.
            continue
        if item.name in OURS - EXTRA or item.name in length:
            continue
        # An extra that is in use goes on, to be refused by name.
        if value != getattr(plain, item.name) or item.name in always:
            options[item.name] = sorted(value) if isinstance(value, set) else value
    return method(**options)
