"""MOMENT as a backbone.

MOMENT sees a window of ``seq_len`` (512) steps in patches of 8; a patch counts only if it is given as a whole. What a
batch brings is fitted to that: shorter history is padded on the left, and gaps are bridged (:func:`.network.bridge`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.t5 import modeling_t5

from gluonts_peft.backbone import Backbone, Source, Trajectories, find_sites

from .network import MomentNetwork, bridge, normalise

__all__ = ["MomentBackbone"]

logger = logging.getLogger(__name__)

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


_SITES = {
    modeling_t5.T5Attention: {"q": "q", "k": "k", "v": "v", "o": "o"},
    modeling_t5.T5DenseActDense: {"ff_in": "wi", "ff_out": "wo"},
    modeling_t5.T5DenseGatedActDense: {"ff_in": "wi_0 wi_1", "ff_out": "wo"},
    modeling_t5.T5LayerNorm: {"norm": "."},
    modeling_t5.T5LayerSelfAttention: {"attention_norm": "layer_norm"},
}


class MomentBackbone(Backbone):
    """MOMENT with a forecasting head: one linear map from the features of all patches to the whole horizon.

    The head is a point forecaster that learns by squared error. All quantiles of a forecast are that point, as those of
    a single sample path are: scores of the median mean what they say, the spread is none.
    Checkpoints bring a head for reconstruction only, so the forecasting head starts at zero and is ``untrained``,
    unless the folder is one that :meth:`export` wrote with a head for at least ``prediction_length`` steps.
    """

    family = "moment"
    capabilities = frozenset({"quantiles", "features", "reconstruct"})
    equivariance = "affine"

    network: MomentNetwork

    def __init__(self, network: MomentNetwork, **options: Any) -> None:
        super().__init__(network, **options)
        self.untrained = () if network.can_forecast() else ("head",)
        self.patch_length = network.patch_len

    @classmethod
    def load_network(cls, folder: Path) -> MomentNetwork:
        return MomentNetwork.from_pretrained(folder)

    @classmethod
    def from_network(
        cls,
        network: MomentNetwork,  # type: ignore[override]
        *,
        prediction_length: int,
        context_length: int | None = None,
        source: Source,
        **options: Any,
    ) -> MomentBackbone:
        if context_length is not None and context_length > network.seq_len:
            raise ValueError(
                f"context_length {context_length} exceeds the {network.seq_len} steps that checkpoint"
                f" {source.checkpoint!r} can see"
            )
        horizon = network.horizon
        if horizon is not None and horizon < prediction_length:
            logger.warning(
                "checkpoint %r brings a forecasting head for %d steps, not %d: it is replaced by an untrained one",
                source.checkpoint,
                horizon,
                prediction_length,
            )
        if prediction_length > 0:
            if horizon is None or horizon < prediction_length:
                network.set_horizon(prediction_length)
            else:
                network.cut_horizon(prediction_length)
        return cls(
            network,
            prediction_length=prediction_length,
            context_length=network.seq_len if context_length is None else context_length,
            source=source,
            **options,
        )

    def sites(self) -> dict[str, tuple[str, ...]]:
        return self._sites

    @cached_property
    def _sites(self) -> dict[str, tuple[str, ...]]:
        # The encoder of T5 has no bias tensors; its table of relative positions is a bias of the attention scores. The
        # biases of the heads are left out: the forecasting head trains as a whole, the other has no part in forecasts.
        found = find_sites(self.network, _SITES, (".relative_attention_bias.weight",))
        return found | {"embedding": ("patch_embedding.value_embedding",), "head": ("forecast_head.linear",)}

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the squared error of each window, mean over observed labels, shape ``(batch,)``.

        The error is measured in standard deviations of the window, history and label together. (The reference trains
        on data that were standardised before; in raw units, large series would outweigh small ones. The deviation of
        the history alone is near zero where it is flat.)
        """
        forecast = self._point_forecast(batch)
        label, observed = batch["future_target"], batch["future_observed_values"]
        whole = torch.cat([batch["past_target"], label], 1)
        seen = torch.cat([batch["past_observed_values"], observed], 1)
        errors = ((forecast - label) / normalise(whole, seen)[2]).square() * observed
        return errors.sum(1) / observed.sum(1).clamp(min=1.0)

    def forecast(
        self, batch: Mapping[str, Tensor], *, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectories:
        """Forecast points: quantiles 0.1 to 0.9 that are all the same.

        Raises
        ------
        ValueError
            If the forecasting head was not trained.
        """
        if not self.network.can_forecast():
            raise ValueError(
                f"the forecasting head on checkpoint {self.source.checkpoint!r} is not trained: MOMENT has no zero-shot"
                ' forecast; train the head, alone (adapter="head") or with an adapter (adapter=["lora", "head"])'
            )
        return Trajectories(self._point_forecast(batch)[:, None].expand(-1, len(LEVELS), -1), LEVELS)

    def _point_forecast(self, batch: Mapping[str, Tensor]) -> Tensor:
        values, given, _ = self._window(batch, self.network.seq_len)
        return self.network.predict(values, given)

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the forecasting head sees, shape ``(batch, seq_len / patch_len, d_model)``: the last patches are
        the history's, those before stand for padding.
        """
        values, given, _ = self._window(batch, self.network.seq_len)
        return self.network.encode(values, given)[0]

    def reconstruct(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the history as the network sees it, shape and units of ``past_target``.

        Patches without any observed step are hidden and filled in; single gaps are bridged first.
        """
        length = batch["past_target"].shape[1]
        patch = self.network.patch_len
        # Padding is not attended to, and positions count from the end of the window: the rest of it has no effect.
        values, given, observed = self._window(batch, -(-length // patch) * patch)
        seen = observed.reshape(len(observed), -1, patch).amax(-1).repeat_interleave(patch, 1)
        return self.network.reconstruct(values, given, seen)[:, -length:]

    def _window(self, batch: Mapping[str, Tensor], length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the history as the last steps of a window: values without gaps and 1 where they are given, both as
        :func:`bridge` makes them, and 1 where they were observed, each of shape ``(batch, length)``.
        """
        target, observed = batch["past_target"], batch["past_observed_values"]
        if target.shape[1] > length:
            raise ValueError(f"history of {target.shape[1]} steps exceeds the {length} steps of the network")
        padding = (length - target.shape[1], 0)
        target, observed = functional.pad(target, padding), functional.pad(observed, padding)
        return *bridge(target, observed, self.network.patch_len), observed

    def export(self, folder: Path) -> None:
        self.network.save_pretrained(folder)
