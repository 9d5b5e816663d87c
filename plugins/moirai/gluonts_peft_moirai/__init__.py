"""Moirai 1.0/1.1, Moirai-MoE and Moirai-2 for gluonts-peft."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Moirai1Backbone, Moirai2Backbone, MoiraiBackbone, MoiraiMoEBackbone
    from .estimator import MoiraiEstimator

__all__ = ["Moirai1Backbone", "Moirai2Backbone", "MoiraiBackbone", "MoiraiEstimator", "MoiraiMoEBackbone"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".estimator" if name == "MoiraiEstimator" else ".backbone", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
