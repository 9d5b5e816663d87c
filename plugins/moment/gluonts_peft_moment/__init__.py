"""MOMENT for gluonts-peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import MomentBackbone
    from .estimator import MomentEstimator
    from .network import MomentNetwork

__all__ = ["MomentBackbone", "MomentEstimator", "MomentNetwork"]


def __getattr__(name: str) -> Any:
    if name == "MomentEstimator":
        from .estimator import MomentEstimator

        return MomentEstimator
    if name == "MomentBackbone":
        from .backbone import MomentBackbone

        return MomentBackbone
    if name == "MomentNetwork":
        from .network import MomentNetwork

        return MomentNetwork
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
