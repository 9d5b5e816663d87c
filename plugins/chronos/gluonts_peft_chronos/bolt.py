"""Chronos-Bolt as a backbone: quantiles equal the official pipeline's to float rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from chronos import chronos_bolt
from torch import Tensor, nn

from gluonts_peft.backbone import Trajectories

from .base import ChronosBackbone, with_gaps

__all__ = ["BoltBackbone", "ChronosBoltModelForForecasting"]


class ChronosBoltModelForForecasting(chronos_bolt.ChronosBoltModelForForecasting):  # type: ignore[misc]
    """The official network with the accessors that ``get_peft_model`` asks for. The name goes into ``config.json``."""

    # The official class lets a checkpoint without its patch embeddings pass, and fills them with random numbers.
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = []

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the start and register tokens."""
        module: nn.Module = self.shared
        return module

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace that embedding."""
        self.shared = value


class BoltBackbone(ChronosBackbone):
    """Chronos-Bolt: patches in, quantiles of the whole horizon out."""

    pipeline = "ChronosBoltPipeline"
    loads = ChronosBoltModelForForecasting
    wraps = chronos_bolt.ChronosBoltModelForForecasting
    capabilities = frozenset({"quantiles", "features"})
    equivariance = "affine"
    ends = {"embedding": ("shared", "input_patch_embedding"), "head": ("output_patch_embedding",)}

    def __init__(self, network: nn.Module, **options: Any) -> None:
        super().__init__(network, **options)
        config = network.chronos_config
        self.own_prediction_length = int(config.prediction_length)  # type: ignore[union-attr, arg-type]
        self.levels = tuple(float(level) for level in config.quantiles)  # type: ignore[union-attr]
        # A single token is decoded: setting up a cache for more takes a fifth of the time of a forecast.
        network.decoder.config.use_cache = False  # type: ignore[union-attr]

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the quantile loss of the official network, before its mean over the batch, shape ``(batch,)``.

        Twice the pinball loss of the scaled label, mean over levels, sum over observed steps.
        """
        network, horizon = self.network, self.own_prediction_length
        _, decoded, (loc, scale) = self._states(batch)
        predicted = network.output_patch_embedding(decoded)  # type: ignore[operator]
        label = batch["future_target"][:, None, :horizon]
        observed = batch["future_observed_values"][:, None, :horizon]
        predicted = predicted.view(len(label), len(self.levels), -1)[..., : label.shape[-1]].float()
        difference = (label - loc[:, None]) / scale[:, None] - predicted
        levels = network.quantiles.view(1, -1, 1)  # type: ignore[operator]
        pinball = torch.maximum(levels * difference, (levels - 1.0) * difference)
        return 2.0 * (pinball * observed).mean(1).sum(1)

    def _states(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return the states of encoder and decoder, and location and scale of the history."""
        network: Any = self.network
        hidden, norm, embedded, mask = network.encode(context=with_gaps(batch))
        return hidden, network.decode(embedded, mask, hidden), norm

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the encoder's states of the patches of the history, and the decoder's state, which is all that the own
        head sees, shape ``(batch, patches + 1, d_model)``.
        """
        hidden, decoded, _ = self._states(batch)
        registers = int(self.network.chronos_config.use_reg_token)  # type: ignore[union-attr, arg-type]
        return torch.cat([hidden[:, : hidden.shape[1] - registers], decoded], 1)

    def forecast(
        self, batch: Mapping[str, Tensor], *, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectories:
        """Forecast quantiles. Beyond the checkpoint's own length, each quantile is taken as a path that goes on,
        and the quantiles of all that follows from it are kept: the official pipeline's rule.
        """
        context = with_gaps(batch)
        limit = int(self.network.chronos_config.context_length)  # type: ignore[union-attr, arg-type]
        levels = torch.tensor(self.levels, device=context.device)
        blocks = [self._quantiles(context)]
        paths = context[:, None]
        while sum(block.shape[-1] for block in blocks) < self.prediction_length:
            paths = torch.cat([paths.expand(-1, len(levels), -1), blocks[-1]], -1)[..., -limit:]
            count, width = paths.shape[1:]
            following = self._quantiles(paths.reshape(-1, width))
            following = following.reshape(len(context), count * len(levels), -1)
            blocks.append(torch.quantile(following, levels, dim=1).transpose(0, 1))
        return Trajectories(torch.cat(blocks, -1)[..., : self.prediction_length], self.levels)

    def _quantiles(self, context: Tensor) -> Tensor:
        result: Tensor = self.network(context=context).quantile_preds
        return result
