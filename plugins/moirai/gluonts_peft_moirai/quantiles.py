"""Moirai-2: quantiles."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gluonts_peft.backbone import Source, Trajectories

from .base import MoiraiBackbone
from .tokens import Tokens, encode, impute, tokens

__all__ = ["Moirai2Backbone"]

logger = logging.getLogger(__name__)

# Scales from the mean of the history beyond which a label is measured in its own distance.
_FAR = 10.0


class Moirai2Backbone(MoiraiBackbone):
    """Moirai-2: causal patches in, quantiles of the next few patches out."""

    capabilities = frozenset({"quantiles", "features", "covariates", "multivariate"})
    ends = {"embedding": ("in_proj",), "head": ("out_proj",)}

    @classmethod
    def fits(cls, network: nn.Module) -> bool:
        return hasattr(network, "quantile_levels")

    def __init__(self, network: nn.Module, *, prediction_length: int, source: Source, **options: Any) -> None:
        self.patch_size: int = network.patch_size  # type: ignore[assignment]
        self.own_patches: int = network.num_predict_token  # type: ignore[assignment]
        super().__init__(
            network,
            prediction_length=prediction_length,
            source=source,
            patch_sizes=(self.patch_size,),
            **options,
        )
        self.levels = tuple(float(level) for level in network.quantile_levels)  # type: ignore[union-attr]
        own = self.own_patches * self.patch_size
        if prediction_length > own:
            logger.warning(
                "prediction_length %d exceeds the %d steps that checkpoint %r forecasts at once: forecasts roll on from"
                " their own quantiles, as uni2ts's do",
                prediction_length,
                own,
                source.checkpoint,
            )

    def predict(self, cut: Tokens, loc: Tensor, scale: Tensor, positions: range) -> Tensor:
        """Return scaled quantiles of the patches that follow some positions.

        Parameters
        ----------
        cut
            Patches; the network sees those up to the last position.
        loc, scale
            Shape ``(batch, variates, 1, 1)``.
        positions
            Patches after which to look ahead.

        Returns
        -------
        Tensor
            Shape ``(batch, targets, positions, patches ahead, levels, patch_size)``.
        """
        network: Any = self.network
        states = self._states(cut, loc, scale, positions[-1] + 1)
        found: Tensor = network.out_proj(states[:, : cut.targets, positions.start :: positions.step])
        apart: Tensor = found.float().unflatten(-1, (self.own_patches, len(self.levels), self.patch_size))
        return apart

    def _states(self, cut: Tokens, loc: Tensor, scale: Tensor, stop: int) -> Tensor:
        """Return the states of the first ``stop`` patches, shape ``(batch, variates, stop, d_model)``."""
        scaled = (cut.values[:, :, :stop] - loc) / scale
        network: Any = self.network
        embedded = network.in_proj(torch.cat([scaled, cut.observed[:, :, :stop].to(scaled.dtype)], -1))
        return encode(network, embedded, cut, causal=True)

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the states of the patches of the history, shape ``(batch, patches, d_model)``; of several targets,
        those of the first. The own head sees the last of them.
        """
        cut = tokens(impute(self._window(batch)), self.patch_size)
        return self._states(cut, *self._loc_scale(cut, cut.history), cut.history)[:, 0]

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the quantile loss of the label in the scale of the history, shape ``(batch,)``.

        Mean over levels of the pinball loss (uni2ts's ``PackedQuantileMAELoss``), over the label's observed steps, over
        targets. The history sees nothing of the label, in its scale neither; where the horizon takes several passes,
        each is given the label of those before. A flat history has next to no scale: where the label goes further than
        ten scales from the history's mean, a tenth of that distance is the measure, or one such window would outweigh
        a thousand others.
        """
        given = impute(self._window(batch))
        cut = tokens(given, self.patch_size)
        loc, scale = self._loc_scale(cut, cut.history)
        positions = range(cut.history - 1, cut.values.shape[2] - 1, self.own_patches)
        predicted = self.predict(cut, loc, scale, positions).transpose(-1, -2).flatten(2, 4)
        loc, scale = loc[:, : given.targets, 0], scale[:, : given.targets, 0]
        label = (self._label(given) - loc) / scale
        seen = given.observed[:, : given.targets, -self.prediction_length :]
        weight = _FAR / torch.where(seen, label.abs(), 0.0).amax(-1, keepdim=True).clamp_min(_FAR)
        difference = label[..., None] - predicted[:, :, : self.prediction_length]
        levels = torch.tensor(self.levels, device=label.device)
        pinball = torch.maximum(levels * difference, (levels - 1.0) * difference).mean(-1)
        return self._label_mean(weight * pinball, given)

    def forecast(
        self, batch: Mapping[str, Tensor], *, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectories:
        """Forecast quantiles. Beyond the patches that the network forecasts at once, each quantile is taken as a path
        that goes on, and the quantiles of all that follows are the next ones: uni2ts's rule.
        """
        given = impute(self._window(batch))
        cut = tokens(given, self.patch_size)
        rows, end = len(given.values), cut.values.shape[2]
        levels = torch.tensor(self.levels, device=given.values.device)
        blocks: list[Tensor] = []
        for start in range(cut.history, end, self.own_patches):
            width = min(self.own_patches, end - start)
            loc, scale = self._loc_scale(cut, start)
            found = self.predict(cut, loc, scale, range(start - 1, start))[:, :, 0, :width]
            # (rows, targets, patches, levels, steps of a patch)
            found = found * scale[:, : given.targets, None] + loc[:, : given.targets, None]
            if blocks:
                ahead = found.unflatten(0, (rows, -1)).movedim(1, -2).flatten(3, 4)
                found = torch.quantile(ahead, levels, dim=-2).movedim(0, -2)
            blocks.append(found)
            if start + width < end:
                cut = cut.repeat(len(levels)) if start == cut.history else cut
                cut = cut.fill(found.movedim(-2, 1).flatten(0, 1), start)
        # (rows, targets, patches, levels, steps of a patch) -> (rows, levels, targets, steps)
        quantiles = torch.cat(blocks, 2).movedim(3, 1).flatten(3, 4)[..., : self.prediction_length]
        return Trajectories(self._forecast_axes(quantiles, batch).float(), self.levels)
