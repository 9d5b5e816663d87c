"""Pretrain the bundled checkpoints from scratch, on synthetic series only.

    python -m gluonts_peft_chronos.pretraining bolt-nano --out FOLDER

The folder is in the official layout (``config.json`` and ``model.safetensors``) and opens with
``chronos.BaseChronosPipeline.from_pretrained``. Sizes, data and schedule are our choice; the architectures are those of
Chronos-T5 (arXiv 2403.07815) and Chronos-Bolt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from gluonts_peft.pretraining import Loss, Recipe, run

__all__ = ["RECIPES", "build"]

_T5 = dict(
    feed_forward_proj="relu",
    initializer_factor=0.05,
    dropout_rate=0.0,
    decoder_start_token_id=0,
    pad_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=True,
)

RECIPES = {
    "bolt-nano": Recipe(
        model=dict(d_model=80, d_kv=20, d_ff=320, num_layers=3, num_decoder_layers=2, num_heads=4, **_T5),
        config=dict(
            context_length=504,
            prediction_length=72,
            input_patch_size=24,
            input_patch_stride=24,
            quantiles=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
            use_reg_token=True,
        ),
        horizon=72,
        contexts={504: 0.5, 240: 0.2, 120: 0.15, 72: 0.1, 36: 0.05},
        batch_size=128,
        steps=16_000,
        daily=0.5,
        learning_rate=3e-3,
    ),
    "t5-nano": Recipe(
        model=dict(
            d_model=64, d_kv=32, d_ff=512, num_layers=2, num_decoder_layers=2, num_heads=2, vocab_size=2048, **_T5
        ),
        config=dict(
            tokenizer_class="MeanScaleUniformBins",
            tokenizer_kwargs={"low_limit": -10.0, "high_limit": 10.0},
            n_tokens=2048,
            n_special_tokens=2,
            pad_token_id=0,
            eos_token_id=1,
            use_eos_token=True,
            model_type="seq2seq",
            context_length=256,
            prediction_length=64,
            num_samples=20,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
        ),
        horizon=64,
        contexts={256: 0.3, 128: 0.3, 64: 0.25, 32: 0.15},
        batch_size=64,
        steps=8_000,
        learning_rate=4e-3,
    ),
}


def build(recipe: Recipe) -> tuple[nn.Module, Loss]:
    """Return a freshly initialised network and its loss of ``(history, label)``."""
    return (_build_bolt if "input_patch_size" in recipe.config else _build_t5)(recipe)


def _build_bolt(recipe: Recipe) -> tuple[nn.Module, Loss]:
    from chronos.chronos_bolt import ChronosBoltModelForForecasting

    config = T5Config(
        **recipe.model,
        architectures=["ChronosBoltModelForForecasting"],
        chronos_pipeline_class="ChronosBoltPipeline",
        chronos_config=recipe.config,
    )
    network = ChronosBoltModelForForecasting(config)

    def quantile_loss(history: Tensor, label: Tensor) -> Tensor:
        loss: Tensor = network(context=history, target=label).loss
        return loss / recipe.horizon

    return network, quantile_loss


def _build_t5(recipe: Recipe) -> tuple[nn.Module, Loss]:
    from chronos.chronos import ChronosConfig

    config = T5Config(
        **recipe.model,
        architectures=["T5ForConditionalGeneration"],
        chronos_pipeline_class="ChronosPipeline",
        chronos_config=recipe.config,
    )
    network = T5ForConditionalGeneration(config)
    tokenizer = ChronosConfig(**recipe.config).create_tokenizer()
    _order_embedding(network.shared.weight, recipe.config)

    def cross_entropy(history: Tensor, label: Tensor) -> Tensor:
        tokens, observed, scale = tokenizer.context_input_transform(history)
        labels, label_observed = tokenizer.label_input_transform(label, scale)
        labels[~label_observed] = -100
        loss: Tensor = network(input_ids=tokens, attention_mask=observed, labels=labels).loss
        return loss

    return network, cross_entropy


@torch.no_grad()
def _order_embedding(weight: Tensor, config: dict[str, Any]) -> None:
    """Start from embeddings in which neighbouring bins are near: Fourier features of the bins' values.

    A vocabulary that starts in disorder spends most of a short training on learning that its tokens are numbers.
    """
    special, (vocabulary, width) = config["n_special_tokens"], weight.shape
    limits = config["tokenizer_kwargs"]
    value = torch.linspace(limits["low_limit"], limits["high_limit"], vocabulary - special)[:, None]
    frequency = torch.logspace(-1.0, 1.5, width // 2)
    weight[special:] = 3.0 * torch.cat([torch.cos(frequency * value), torch.sin(frequency * value)], 1)


if __name__ == "__main__":
    run(RECIPES, build)
