"""What the architectures of Chronos share: loading, the official layout, and the rule for long horizons."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.t5 import modeling_t5
from transformers.utils import logging as transformers_logging

from gluonts_peft.backbone import Backbone, Source, find_sites
from gluonts_peft.checkpoint import CheckpointError, check_whole, read_config
from gluonts_peft.errors import unknown

__all__ = ["ChronosBackbone", "with_gaps"]

logger = logging.getLogger(__name__)


# The encoder and decoder of T5, which Chronos-Bolt has as well.
_T5_SITES = {
    modeling_t5.T5Attention: {"q": "q", "k": "k", "v": "v", "o": "o"},
    modeling_t5.T5DenseActDense: {"ff_in": "wi", "ff_out": "wo"},
    modeling_t5.T5DenseGatedActDense: {"ff_in": "wi_0 wi_1", "ff_out": "wo"},
    modeling_t5.T5LayerNorm: {"norm": "."},
    modeling_t5.T5LayerSelfAttention: {"attention_norm": "layer_norm"},
    modeling_t5.T5LayerCrossAttention: {"attention_norm": "layer_norm"},
}


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


class ChronosBackbone(Backbone):
    """What the architectures share. :meth:`from_network` picks the class that fits the network."""

    family = "chronos"
    # Of the family; each architecture says its own.
    capabilities = frozenset({"samples", "quantiles", "features", "covariates", "multivariate"})
    own_prediction_length: int
    # Those whose modules were imported; `backbone` imports all.
    architectures: ClassVar[list[type[ChronosBackbone]]] = []
    # Of each: the name in config.json, the network that is loaded, and the official one that it may be as well.
    pipeline: ClassVar[str]
    loads: ClassVar[type[nn.Module]]
    wraps: ClassVar[type[nn.Module]]
    # Where the input comes in and the forecast goes out.
    ends: ClassVar[dict[str, tuple[str, ...]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "pipeline" in vars(cls):
            ChronosBackbone.architectures.append(cls)

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
        known: dict[str, Any] = {kind.pipeline: kind.loads for kind in cls.architectures}
        if pipeline not in known:
            raise CheckpointError(f"checkpoint folder {str(folder)!r}: " + unknown("pipeline", pipeline, known))
        try:
            with _without_bars():
                network, report = known[pipeline].from_pretrained(
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
    ) -> ChronosBackbone:
        kind = next((kind for kind in cls.architectures if isinstance(network, kind.wraps)), None)
        if kind is None:
            known = ", ".join(kind.wraps.__name__ for kind in cls.architectures)
            raise ValueError(f"network {type(network).__name__} is none of {known}")
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


def with_gaps(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the history with NaN where nothing was observed, as the official networks take it."""
    gap = batch["past_target"].new_tensor(float("nan"))
    return torch.where(batch["past_observed_values"] > 0, batch["past_target"], gap)
