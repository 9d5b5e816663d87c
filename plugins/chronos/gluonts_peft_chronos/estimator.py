"""The GluonTS estimator of the family."""

from __future__ import annotations

from gluonts_peft.estimator import PeftEstimator

from .backbone import ChronosBackbone

__all__ = ["ChronosEstimator"]


class ChronosEstimator(PeftEstimator):
    """Tune a Chronos-T5, Chronos-Bolt or Chronos-2 checkpoint.

    Parameters are those of :class:`gluonts_peft.PeftEstimator`; ``backbone_options`` takes ``num_samples``,
    ``temperature``, ``top_k`` and ``top_p`` for Chronos-T5, ``max_output_patches`` for Chronos-2. Chronos-2 alone takes
    targets of several dimensions, ``feat_dynamic_real`` and ``past_feat_dynamic_real``. Source: Ansari et al. 2024,
    arXiv 2403.07815; 2025, arXiv 2510.15821.
    """

    backbone_class = ChronosBackbone
    default_checkpoint = "bolt-nano"
