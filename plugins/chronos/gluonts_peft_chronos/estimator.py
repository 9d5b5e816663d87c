"""The GluonTS estimator of the family."""

from __future__ import annotations

from gluonts_peft.estimator import PeftEstimator

from .backbone import ChronosBackbone

__all__ = ["ChronosEstimator"]


class ChronosEstimator(PeftEstimator):
    """Tune a Chronos-T5 or Chronos-Bolt checkpoint.

    Parameters are those of :class:`gluonts_peft.PeftEstimator`; ``backbone_options`` takes ``num_samples``,
    ``temperature``, ``top_k`` and ``top_p`` for Chronos-T5. Source: Ansari et al. 2024, arXiv 2403.07815.
    """

    backbone_class = ChronosBackbone
    default_checkpoint = "bolt-nano"
