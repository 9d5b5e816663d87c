"""Lag-Llama as a backbone.

The network is our own (:mod:`gluonts_peft_lag_llama.network`); with the published weights it gives the same
distributions as the reference implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gluonts_peft.backbone import Backbone, Source, Trajectories, find_sites
from gluonts_peft.checkpoint import Checkpoint

from .network import (
    TIME_FEATURES,
    Attention,
    Block,
    FeedForward,
    LagLlamaNetwork,
    RMSNorm,
    StudentT,
    check_rope_scaling,
)
from .sampling import sample_paths, sample_paths_rescaled
from .weights import fetch, fingerprint_of, read, write

__all__ = ["LagLlamaBackbone"]

# Keys and values come from one projection, so a name stands under both kinds.
_SITES = {
    Attention: {"q": "q_proj", "k": "kv_proj", "v": "kv_proj", "o": "c_proj"},
    FeedForward: {"ff_in": "c_fc1 c_fc2", "ff_out": "c_proj"},
    RMSNorm: {"norm": "."},
    Block: {"attention_norm": "rms_1"},
}


class LagLlamaBackbone(Backbone):
    """Lag-Llama: lags in, sample paths of a Student-t decoder out.

    Parameters
    ----------
    num_samples
        Sample paths a series; the checkpoint's own number by default.
    rope_scaling
        How positions stretch beyond what the checkpoint was trained on, see :class:`LagLlamaConfig`; the checkpoint's
        own rule by default.
    rescale
        Forecast as the reference implementation does, which estimates level and spread anew after each sampled step
        and runs the whole network again. By default they stay those of the history, as in training, and a key/value
        cache saves the work. Both give the same distribution for the first step.
    context_loss
        Train on the steps of the context as well, as the reference implementation does, not on the label alone. Level
        and spread know the steps of the context, so that a decoder can learn to infer the last of them from those
        before: its loss falls, and its forecasts get worse, the more so the shorter the history.
    """

    family = "lag-llama"
    capabilities = frozenset({"samples"})
    # Tokens hold the logarithms of level and spread.
    equivariance = "none"
    density = True
    network: LagLlamaNetwork

    def __init__(
        self,
        network: LagLlamaNetwork,
        *,
        num_samples: int | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        rescale: bool = False,
        context_loss: bool = False,
        **options: Any,
    ) -> None:
        if num_samples is not None and num_samples <= 0:
            raise ValueError(f"num_samples {num_samples} is not positive")
        super().__init__(network, **options)
        if rope_scaling is not None:
            check_rope_scaling(rope_scaling)
            network.rope_scaling = dict(rope_scaling)
        self.num_samples = network.config.num_parallel_samples if num_samples is None else num_samples
        self.rescale = rescale
        self.context_loss = context_loss
        self.time_features = TIME_FEATURES if network.config.time_feat else ()

    @classmethod
    def fetch(cls, checkpoint: Checkpoint) -> tuple[Path, str | None]:
        # The published layout is one file that is neither JSON nor safetensors.
        folder, revision = super().fetch(checkpoint)
        return fetch(checkpoint, folder, revision) if checkpoint.kind == "hub" else folder, revision

    @classmethod
    def fingerprint(cls, folder: Path) -> str:
        return fingerprint_of(folder)

    @classmethod
    def load_network(cls, folder: Path) -> LagLlamaNetwork:
        return read(folder)

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        *,
        prediction_length: int,
        context_length: int | None = None,
        source: Source,
        **options: Any,
    ) -> LagLlamaBackbone:
        assert isinstance(network, LagLlamaNetwork)
        config = network.config
        if context_length is not None and context_length > config.max_context_length:
            raise ValueError(
                f"context_length {context_length} exceeds the {config.max_context_length} steps (max_context_length)"
                f" that checkpoint {source.checkpoint!r} can see"
            )
        return cls(
            network,
            prediction_length=prediction_length,
            context_length=config.context_length if context_length is None else context_length,
            source=source,
            **options,
        )

    @property
    def past_length(self) -> int:
        return self.context_length + self.network.config.max_lag

    def sites(self) -> dict[str, tuple[str, ...]]:
        return self._sites

    @cached_property
    def _sites(self) -> dict[str, tuple[str, ...]]:
        return find_sites(self.network, _SITES) | {"embedding": ("transformer.wte",), "head": ("param_proj",)}

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the negative log-likelihood of each window, mean over its observed steps, shape ``(batch,)``.

        Of the label, and with ``context_loss`` of all steps of the context but the first, as in the reference training;
        the reference weighs all steps of a batch alike, here each window counts once.
        """
        past, observed, calendar = self._history(batch)
        counted = batch["future_observed_values"]
        future = torch.where(counted > 0, batch["future_target"], 0.0)
        law, level, spread = self.network(past, observed, calendar, future)
        target = future
        if self.context_loss:
            first = past.shape[1] - self.context_length + 1
            target = torch.cat([past[:, first:], future], 1)
            counted = torch.cat([observed[:, first:], counted], 1)
        law = StudentT(*(part[:, -target.shape[1] :] for part in law))
        loss: Tensor = spread.log() - law.log_prob((target - level) / spread)
        return (loss * counted).sum(1) / counted.sum(1).clamp(min=1.0)

    def forecast(
        self, batch: Mapping[str, Tensor], *, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectories:
        past, observed, calendar = self._history(batch)
        sample = sample_paths_rescaled if self.rescale else sample_paths
        values = sample(
            self.network,
            past,
            observed,
            calendar,
            prediction_length=self.prediction_length,
            num_samples=self.num_samples if num_samples is None else num_samples,
            generator=generator,
        )
        return Trajectories(values, None)

    def _history(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return history and observed mask of exactly ``past_length`` steps, and the calendar features if any."""
        observed = batch["past_observed_values"]
        past = torch.where(observed > 0, batch["past_target"], 0.0)
        missing = self.past_length - past.shape[1]
        past, observed = (functional.pad(part, (missing, 0)) for part in (past, observed))
        if not self.time_features:
            return past, observed, None
        if "time_feat" not in batch:
            raise ValueError(f"batch has no time_feat; checkpoint {self.source.checkpoint!r} takes calendar features")
        calendar = functional.pad(batch["time_feat"], (0, 0, missing, 0))
        # Steps before the start of a series have no date in the reference implementation.
        begun = functional.pad(observed.cummax(1).values, (0, calendar.shape[1] - observed.shape[1]), value=1.0)
        return past, observed, calendar * begun[..., None]

    def export(self, folder: Path) -> None:
        write(self.network, folder)
