"""The GluonTS estimator of the family."""

from __future__ import annotations

from gluonts_peft.estimator import PeftEstimator

from .backbone import MoiraiBackbone

__all__ = ["MoiraiEstimator"]


class MoiraiEstimator(PeftEstimator):
    """Tune a Moirai checkpoint.

    Parameters are those of :class:`gluonts_peft.PeftEstimator`; ``backbone_options`` takes ``patch_size``,
    ``num_samples`` and ``draws`` for Moirai 1.0/1.1 and Moirai-MoE. Source: Woo et al. 2024, arXiv 2402.02592; Liu et
    al. 2024, arXiv 2410.10469; Liu et al. 2025, arXiv 2511.11698.
    """

    backbone_class = MoiraiBackbone
    default_checkpoint = "moirai-nano"
