"""The GluonTS estimator of the family."""

from __future__ import annotations

from gluonts_peft.estimator import PeftEstimator

from .backbone import MomentBackbone

__all__ = ["MomentEstimator"]


class MomentEstimator(PeftEstimator):
    """Tune a MOMENT checkpoint.

    Parameters are those of :class:`gluonts_peft.PeftEstimator`. MOMENT was pretrained to reconstruct: its forecasting
    head starts untrained and trains along with any adapter, so ``adapter="lora"`` means ``["lora", "head"]``.
    Source: Goswami et al. 2024, arXiv 2402.03885.
    """

    backbone_class = MomentBackbone
    default_checkpoint = "moment-nano"
