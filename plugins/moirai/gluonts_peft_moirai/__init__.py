"""Moirai 1.0/1.1, Moirai-MoE and Moirai-2 for gluonts-peft."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import MoiraiBackbone
    from .estimator import MoiraiEstimator
    from .quantiles import Moirai2Backbone
    from .sampling import Moirai1Backbone, MoiraiMoEBackbone

__all__ = ["Moirai1Backbone", "Moirai2Backbone", "MoiraiBackbone", "MoiraiEstimator", "MoiraiMoEBackbone"]

_MODULES = {
    "Moirai1Backbone": "sampling",
    "Moirai2Backbone": "quantiles",
    "MoiraiBackbone": "backbone",
    "MoiraiEstimator": "estimator",
    "MoiraiMoEBackbone": "sampling",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
