"""Chronos-T5 and Chronos-Bolt for gluonts-peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import BoltBackbone, ChronosBackbone, T5Backbone
    from .estimator import ChronosEstimator

__all__ = ["BoltBackbone", "ChronosBackbone", "ChronosEstimator", "T5Backbone"]


def __getattr__(name: str) -> Any:
    if name == "ChronosEstimator":
        from .estimator import ChronosEstimator

        return ChronosEstimator
    if name in __all__:
        from . import backbone

        return getattr(backbone, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
