"""Chronos-T5 as a backbone: the same law of sample paths as the official pipeline's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from chronos.chronos import ChronosConfig
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5ForConditionalGeneration

from gluonts_peft.backbone import Source, Trajectories
from gluonts_peft.checkpoint import CheckpointError

from .base import ChronosBackbone
from .sampling import sample_tokens

__all__ = ["T5Backbone"]


class T5Backbone(ChronosBackbone):
    """Chronos-T5: values become tokens, sample paths are drawn token by token.

    Parameters
    ----------
    num_samples, temperature, top_k, top_p
        Sampling; the checkpoint's own values by default.
    """

    pipeline = "ChronosPipeline"
    loads = T5ForConditionalGeneration
    wraps = T5ForConditionalGeneration
    capabilities = frozenset({"samples"})
    # Tokens are of values over their mean magnitude: in float32 another scale would round some of them to other tokens,
    # and one other token makes other paths. What tokens become is the official float32.
    equivariance = "scale"
    batch_dtype = torch.float64
    # The table that embeds tokens is also the output layer: training the head trains both.
    ends = {"embedding": ("shared",), "head": ("lm_head",)}
    max_rows: ClassVar[int] = 4096

    def __init__(
        self,
        network: nn.Module,
        *,
        source: Source,
        num_samples: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network, source=source, **options)
        config = ChronosConfig(**network.config.chronos_config)  # type: ignore[union-attr, arg-type]
        if config.model_type != "seq2seq":
            raise CheckpointError(
                f"checkpoint {source.checkpoint!r} has model_type {config.model_type!r}, not 'seq2seq'"
            )
        self.chronos_config = config
        self.own_prediction_length = config.prediction_length
        self.num_samples = config.num_samples if num_samples is None else num_samples
        self.temperature = config.temperature if temperature is None else temperature
        self.top_k = config.top_k if top_k is None else top_k
        self.top_p = config.top_p if top_p is None else top_p
        tokenizer = config.create_tokenizer()
        self.register_buffer("centers", tokenizer.centers, persistent=False)
        self.register_buffer("boundaries", tokenizer.boundaries, persistent=False)

    def tokens(self, values: Tensor, observed: Tensor, scale: Tensor) -> Tensor:
        """Return token ids of scaled values, shape of ``values``; missing values are the padding token."""
        config = self.chronos_config
        scaled = values / scale[:, None]
        boundaries: Tensor = self.boundaries.to(scaled.dtype)  # type: ignore[assignment]
        ids = torch.bucketize(scaled, boundaries, right=True) + config.n_special_tokens
        return torch.where(observed > 0, ids.clamp_(0, config.n_tokens - 1), config.pad_token_id)

    def encode(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids, attention mask ``(batch, context [+ 1])`` and scale ``(batch,)`` of the history."""
        values, observed = batch["past_target"], batch["past_observed_values"]
        ids, mask = self.tokens(values, observed, _size(values, observed)), observed > 0
        if self.chronos_config.use_eos_token:
            ids = functional.pad(ids, (0, 1), value=self.chronos_config.eos_token_id)
            mask = functional.pad(mask, (0, 1), value=True)
        return ids, mask, _size(values.float(), observed)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy of the label's tokens, mean over observed ones, shape ``(batch,)``.

        As in the official training, a label of the checkpoint's full length ends with the end token; a shorter one
        does not, since nothing ends there.
        """
        ids, mask, _ = self.encode(batch)
        horizon = self.own_prediction_length
        label, observed = batch["future_target"][:, :horizon], batch["future_observed_values"][:, :horizon]
        labels = self.tokens(label, observed, _size(batch["past_target"], batch["past_observed_values"]))
        if self.chronos_config.use_eos_token and label.shape[1] == horizon:
            labels = functional.pad(labels, (0, 1), value=self.chronos_config.eos_token_id)
            observed = functional.pad(observed, (0, 1), value=1.0)
        start = self.network.config.decoder_start_token_id  # type: ignore[union-attr]
        shifted = functional.pad(labels[:, :-1], (1, 0), value=start)  # type: ignore[arg-type]
        logits = self.network(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted, use_cache=False).logits
        entropy = functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        return (entropy * observed).sum(1) / observed.sum(1).clamp(min=1.0)

    def forecast(
        self, batch: Mapping[str, Tensor], *, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectories:
        """Draw sample paths. Beyond the checkpoint's own length the history goes on with the median of the paths:
        the official pipeline's rule.
        """
        count = self.num_samples if num_samples is None else num_samples
        history = dict(batch)
        blocks: list[Tensor] = []
        while (remaining := self.prediction_length - sum(block.shape[-1] for block in blocks)) > 0:
            limit = self.chronos_config.context_length
            history = {name: value[:, -limit:] for name, value in history.items()}
            ids, mask, scale = self.encode(history)
            drawn = sample_tokens(
                self.network,
                ids,
                mask,
                prediction_length=min(remaining, self.own_prediction_length),
                num_samples=count,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                generator=generator,
            )
            bins = (drawn - self.chronos_config.n_special_tokens - 1).clamp(0, len(self.centers) - 1)  # type: ignore[arg-type]
            blocks.append(self.centers[bins] * scale[:, None, None])  # type: ignore[index]
            middle = blocks[-1].median(1).values
            history = {
                "past_target": torch.cat([history["past_target"], middle], 1),
                "past_observed_values": torch.cat([history["past_observed_values"], torch.ones_like(middle)], 1),
            }
        return Trajectories(torch.cat(blocks, -1), None)


def _size(values: Tensor, observed: Tensor) -> Tensor:
    """Return the mean magnitude of what was observed of each window, 1 where that is 0, shape ``(batch,)``."""
    size = (values.abs() * observed).sum(1) / observed.sum(1)
    return torch.where(size > 0, size, torch.ones_like(size))
