"""What the architectures of Moirai share: lengths, sites, scales, and means over labels.

The networks are those of ``uni2ts``. Their own ``forward`` scales, embeds, encodes and projects in one go, for any
mixture of series and patch sizes in one sequence; here the same weights are used piece by piece, on the rectangle of
:mod:`gluonts_peft_moirai.tokens`. With adapter ``"none"`` distributions and quantiles equal uni2ts's to float rounding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from uni2ts.module.attention import GroupedQueryAttention
from uni2ts.module.ffn import FeedForward
from uni2ts.module.norm import RMSNorm
from uni2ts.module.transformer import TransformerEncoderLayer
from uni2ts.module.ts_embed import ResidualBlock

from gluonts_peft.backbone import Backbone, Source, find_sites

from .loading import load, save_network
from .tokens import Tokens, Window, window

__all__ = ["MoiraiBackbone"]

logger = logging.getLogger(__name__)


_SITES = {
    GroupedQueryAttention: {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"},
    FeedForward: {"ff_in": "fc1 fc_gate", "ff_out": "fc2"},
    RMSNorm: {"norm": "."},
    TransformerEncoderLayer: {"attention_norm": "norm1"},
}


class MoiraiBackbone(Backbone):
    """What the architectures share. :meth:`from_network` picks the class that fits the network."""

    family = "moirai"
    # Of the family; each architecture says its own.
    capabilities = frozenset({"samples", "quantiles", "features", "covariates", "multivariate"})
    # "affine" for windows of whole patches without gaps: uni2ts fills patches up with zeros, wherever the data lie.
    equivariance = "scale"
    # Those whose modules were imported; `backbone` imports all.
    architectures: ClassVar[list[type[MoiraiBackbone]]] = []
    ends: ClassVar[dict[str, tuple[str, ...]]]

    def __init__(
        self,
        network: nn.Module,
        *,
        prediction_length: int,
        context_length: int | None,
        source: Source,
        patch_sizes: tuple[int, ...],
        **options: Any,
    ) -> None:
        smallest, largest = min(patch_sizes), max(patch_sizes)
        limit: int = network.max_seq_len  # type: ignore[assignment]
        horizon = math.ceil(max(prediction_length, 1) / smallest)
        if context_length is None:
            context_length = max(limit - horizon, 1) * smallest
            context_length = max(context_length // largest * largest, smallest)
        used = math.ceil(context_length / smallest) + horizon
        if used > limit:
            logger.warning(
                "context_length %d and prediction_length %d take %d patches of %d steps, but checkpoint %r was"
                " pretrained on at most %d",
                context_length,
                prediction_length,
                used,
                smallest,
                source.checkpoint,
                limit,
            )
        super().__init__(
            network, prediction_length=prediction_length, context_length=context_length, source=source, **options
        )
        for module in network.modules():
            if isinstance(module, GroupedQueryAttention):
                # uni2ts drops out attention in evaluation mode, too: forecasts would be random.
                module.attn_dropout_p = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "fits" in vars(cls):
            MoiraiBackbone.architectures.append(cls)

    @classmethod
    def fits(cls, network: nn.Module) -> bool:
        """Whether a network is of this architecture."""
        raise NotImplementedError

    @classmethod
    def load_network(cls, folder: Path) -> nn.Module:
        return load(folder)

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        *,
        prediction_length: int,
        context_length: int | None = None,
        source: Source,
        **options: Any,
    ) -> MoiraiBackbone:
        kind = next((kind for kind in cls.architectures if kind.fits(network)), None)
        if kind is None:
            raise ValueError(f"network {type(network).__name__} is no MoiraiModule, MoiraiMoEModule or Moirai2Module")
        return kind(
            network, prediction_length=prediction_length, context_length=context_length, source=source, **options
        )

    def sites(self) -> dict[str, tuple[str, ...]]:
        return self._sites

    @cached_property
    def _sites(self) -> dict[str, tuple[str, ...]]:
        # The tables of attention biases between variates are left out: on one variate they are a constant.
        ends = {kind: tuple(place for end in ends for place in self._linear(end)) for kind, ends in self.ends.items()}
        return find_sites(self.network, _SITES) | ends

    def _linear(self, name: str) -> list[str]:
        """Return the linear layers of a residual block, so that every adapter can go there."""
        module = self.network.get_submodule(name)
        if not isinstance(module, ResidualBlock):
            return [name]
        return [f"{name}.{part}" for part, child in module.named_children() if isinstance(child, nn.Linear)]

    def export(self, folder: Path) -> None:
        save_network(self.network, folder)

    def _window(self, batch: Mapping[str, Tensor], *, earlier: bool = False) -> Window:
        return window(batch, self.context_length, self.prediction_length, earlier=earlier)

    def _loc_scale(self, given: Tokens, known: int) -> tuple[Tensor, Tensor]:
        return given.loc_scale(known, bool(self.network.scaling))

    def _label_mean(self, losses: Tensor, given: Window) -> Tensor:
        """Mean over the observed steps of each target, then over targets: uni2ts's packed losses, by window.

        ``losses`` has shape ``(batch, targets, prediction_length)``.
        """
        observed = given.observed[:, : given.targets, -self.prediction_length :]
        counted = torch.where(observed, losses, 0.0).sum(-1)
        return (counted / observed.sum(-1).clamp_min(1)).mean(1)

    def _label(self, given: Window) -> Tensor:
        return given.values[:, : given.targets, -self.prediction_length :]

    def _forecast_axes(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """``(batch, n, targets, steps)`` to ``(batch, n, steps)``, or with targets last if the data have several."""
        return values[:, :, 0] if batch["past_target"].ndim == 2 else values.transpose(2, 3)
