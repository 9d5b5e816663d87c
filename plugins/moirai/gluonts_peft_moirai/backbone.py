"""Moirai 1.0/1.1, Moirai-MoE and Moirai-2 as backbones: all architectures."""

from __future__ import annotations

from .base import MoiraiBackbone
from .quantiles import Moirai2Backbone
from .sampling import Moirai1Backbone, MoiraiMoEBackbone

__all__ = ["Moirai1Backbone", "Moirai2Backbone", "MoiraiBackbone", "MoiraiMoEBackbone"]
