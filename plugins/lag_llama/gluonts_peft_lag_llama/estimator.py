"""The GluonTS estimator of the family."""

from __future__ import annotations

from gluonts_peft.estimator import PeftEstimator

from .backbone import LagLlamaBackbone

__all__ = ["LagLlamaEstimator"]


class LagLlamaEstimator(PeftEstimator):
    """Tune a Lag-Llama checkpoint.

    Parameters are those of :class:`gluonts_peft.PeftEstimator`; ``backbone_options`` takes ``num_samples``,
    ``rope_scaling``, ``rescale`` and ``context_loss`` (see :class:`LagLlamaBackbone`). Source: Rasul et al. 2023, arXiv
    2310.08278.
    """

    backbone_class = LagLlamaBackbone
    default_checkpoint = "lag-llama-nano"
