"""Chronos-T5, Chronos-Bolt and Chronos-2 as backbones: all architectures.

The networks are those of ``transformers`` and ``chronos-forecasting``; with adapter ``"none"`` forecasts equal the
official pipelines': quantiles to float rounding for Bolt and Chronos-2, the same law of sample paths for T5.
"""

from __future__ import annotations

from .base import ChronosBackbone
from .bolt import BoltBackbone, ChronosBoltModelForForecasting
from .chronos2 import Chronos2Backbone
from .t5 import T5Backbone

__all__ = ["BoltBackbone", "Chronos2Backbone", "ChronosBackbone", "ChronosBoltModelForForecasting", "T5Backbone"]
