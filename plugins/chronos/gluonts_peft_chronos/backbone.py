"""Chronos-T5 and Chronos-Bolt as backbones, and what they share with Chronos-2 (``chronos2.py``).

The networks are those of ``transformers`` and ``chronos-forecasting``; with adapter ``"none"`` forecasts equal the
official pipelines': quantiles to float rounding for Bolt, the same law of sample paths for T5.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from chronos import chronos_bolt
from chronos.chronos import ChronosConfig
from chronos.chronos2 import Chronos2Model
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5ForConditionalGeneration
from transformers.models.t5 import modeling_t5
from transformers.utils import logging as transformers_logging

from gluonts_peft.backbone import Backbone, Source, Trajectories, find_sites
from gluonts_peft.checkpoint import CheckpointError, check_whole, read_config
from gluonts_peft.registry import unknown

from .sampling import sample_tokens

__all__ = ["BoltBackbone", "ChronosBackbone", "ChronosBoltModelForForecasting", "T5Backbone"]

logger = logging.getLogger(__name__)


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers within the context; its warnings are passed on."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


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


# The encoder and decoder of T5, which Chronos-Bolt has as well.
_T5_SITES = {
    modeling_t5.T5Attention: {"q": "q", "k": "k", "v": "v", "o": "o"},
    modeling_t5.T5DenseActDense: {"ff_in": "wi", "ff_out": "wo"},
    modeling_t5.T5DenseGatedActDense: {"ff_in": "wi_0 wi_1", "ff_out": "wo"},
    modeling_t5.T5LayerNorm: {"norm": "."},
    modeling_t5.T5LayerSelfAttention: {"attention_norm": "layer_norm"},
    modeling_t5.T5LayerCrossAttention: {"attention_norm": "layer_norm"},
}

_NETWORKS = {
    "ChronosPipeline": T5ForConditionalGeneration,
    "ChronosBoltPipeline": ChronosBoltModelForForecasting,
    "Chronos2Pipeline": Chronos2Model,
}


class ChronosBackbone(Backbone):
    """What the architectures share. :meth:`from_network` picks the class that fits the network."""

    family = "chronos"
    # Of the family; each architecture says its own.
    capabilities = frozenset({"samples", "quantiles", "features", "covariates", "multivariate"})
    own_prediction_length: int
    # Where the input comes in and the forecast goes out.
    ends: ClassVar[dict[str, tuple[str, ...]]]

    @classmethod
    def load_network(cls, folder: Path) -> nn.Module:
        config = read_config(folder)
        if "chronos_config" not in config:
            raise CheckpointError(
                f"checkpoint folder {str(folder)!r} is not of family 'chronos': its config.json has no chronos_config"
                f" (model_type {config.get('model_type')!r})"
            )
        check_whole(config, folder)
        # The official loader reads a folder without a pipeline class as T5.
        pipeline = config.get("chronos_pipeline_class", "ChronosPipeline")
        if pipeline not in _NETWORKS:
            raise CheckpointError(f"checkpoint folder {str(folder)!r}: " + unknown("pipeline", pipeline, _NETWORKS))
        try:
            with _without_bars():
                network, report = _NETWORKS[pipeline].from_pretrained(
                    folder,
                    dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
        except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"checkpoint folder {str(folder)!r} cannot be loaded: {error}") from error
        # transformers fills gaps with random numbers and goes on; a forecaster must not.
        for problem in ("missing_keys", "mismatched_keys"):
            if names := sorted(map(str, report[problem])):
                raise CheckpointError(
                    f"checkpoint folder {str(folder)!r} does not fit its config.json: {len(names)}"
                    f" {problem.replace('_', ' ')} (first: {names[0]})"
                )
        result: nn.Module = network
        return result

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        *,
        prediction_length: int,
        context_length: int | None = None,
        source: Source,
        **options: Any,
    ) -> ChronosBackbone:  # type: ignore[override]
        from .chronos2 import Chronos2Backbone

        kind: type[ChronosBackbone] = T5Backbone
        if isinstance(network, chronos_bolt.ChronosBoltModelForForecasting):
            kind = BoltBackbone
        elif isinstance(network, Chronos2Model):
            kind = Chronos2Backbone
        own = int(network.config.chronos_config["context_length"])  # type: ignore[union-attr, index]
        if context_length is not None and context_length > own:
            raise ValueError(
                f"context_length {context_length} exceeds the {own} steps that checkpoint {source.checkpoint!r} can see"
            )
        backbone = kind(
            network,
            prediction_length=prediction_length,
            context_length=own if context_length is None else context_length,
            source=source,
            **options,
        )
        if prediction_length > backbone.own_prediction_length:
            logger.warning(
                "prediction_length %d exceeds the %d steps of checkpoint %r: forecasts roll on from their own output,"
                " as the official pipeline does, and training uses the first %d steps of each label",
                prediction_length,
                backbone.own_prediction_length,
                source.checkpoint,
                backbone.own_prediction_length,
            )
        return backbone

    def sites(self) -> dict[str, tuple[str, ...]]:
        return self._sites

    @cached_property
    def _sites(self) -> dict[str, tuple[str, ...]]:
        # Chronos-T5 has no bias tensors; the tables of relative positions are biases of the attention scores.
        biases = (".bias", ".relative_attention_bias.weight")
        return find_sites(self.network, _T5_SITES, biases) | self.ends

    def export(self, folder: Path) -> None:
        with _without_bars():
            self.network.save_pretrained(folder)  # type: ignore[operator]


class BoltBackbone(ChronosBackbone):
    """Chronos-Bolt: patches in, quantiles of the whole horizon out."""

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
        levels = network.quantiles.view(1, -1, 1)  # type: ignore[union-attr, operator]
        pinball = torch.maximum(levels * difference, (levels - 1.0) * difference)
        return 2.0 * (pinball * observed).mean(1).sum(1)

    def _states(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return the states of encoder and decoder, and location and scale of the history."""
        network: Any = self.network
        hidden, norm, embedded, mask = network.encode(context=_with_gaps(batch))
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
        context = _with_gaps(batch)
        limit = self.network.chronos_config.context_length  # type: ignore[union-attr]
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


class T5Backbone(ChronosBackbone):
    """Chronos-T5: values become tokens, sample paths are drawn token by token.

    Parameters
    ----------
    num_samples, temperature, top_k, top_p
        Sampling; the checkpoint's own values by default.
    """

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
        boundaries: Tensor = self.boundaries.to(scaled.dtype)  # type: ignore[operator, assignment]
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


def _with_gaps(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the history with NaN where nothing was observed, as the official networks take it."""
    gap = batch["past_target"].new_tensor(float("nan"))
    return torch.where(batch["past_observed_values"] > 0, batch["past_target"], gap)
