"""Clauses of the contract of a model family, :class:`gluonts_peft.backbone.Backbone`."""

from __future__ import annotations

from .computing import COMPUTING_CHECKS
from .contract import Clause
from .loading import LOADING_CHECKS

__all__ = ["BACKBONE_CHECKS"]

BACKBONE_CHECKS: dict[str, Clause] = {**LOADING_CHECKS, **COMPUTING_CHECKS}
