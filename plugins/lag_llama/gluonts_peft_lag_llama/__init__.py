"""Lag-Llama for gluonts-peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import LagLlamaBackbone
    from .estimator import LagLlamaEstimator
    from .network import LagLlamaConfig, LagLlamaNetwork

__all__ = ["LagLlamaBackbone", "LagLlamaConfig", "LagLlamaEstimator", "LagLlamaNetwork"]

_MODULES = {"LagLlamaBackbone": "backbone", "LagLlamaEstimator": "estimator"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES.get(name, 'network')}", __name__), name)
