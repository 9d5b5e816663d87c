"""Pretrain the bundled checkpoints from scratch, on synthetic series only.

    python -m gluonts_peft_chronos.pretraining bolt-nano --out FOLDER

The folder is in the official layout (``config.json`` and ``model.safetensors``) and opens with
``chronos.BaseChronosPipeline.from_pretrained``. Sizes, data and schedule are our choice; the architectures are those of
Chronos-T5 (arXiv 2403.07815), Chronos-Bolt and Chronos-2 (arXiv 2510.15821).
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
    "chronos2-nano": Recipe(
        model=dict(d_model=80, d_kv=20, d_ff=320, num_layers=3, num_heads=4, dropout_rate=0.0, initializer_factor=0.05),
        config=dict(
            context_length=504,
            input_patch_size=24,
            input_patch_stride=24,
            output_patch_size=24,
            max_output_patches=3,
            quantiles=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
            use_reg_token=True,
            use_arcsinh=True,
            time_encoding_scale=504,
        ),
        horizon=72,
        contexts={504: 0.15, 240: 0.2, 120: 0.25, 72: 0.25, 36: 0.15},
        batch_size=128,
        steps=6_000,
        daily=0.5,
        learning_rate=2e-3,
    ),
}

# Rows of a group of Chronos-2, with their probabilities.
_GROUPS = {1: 0.4, 2: 0.45, 4: 0.15}


def build(recipe: Recipe) -> tuple[nn.Module, Loss]:
    """Return a freshly initialised network and its loss of ``(history, label)``."""
    if "max_output_patches" in recipe.config:
        return _build_chronos2(recipe)
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


def _build_chronos2(recipe: Recipe) -> tuple[nn.Module, Loss]:
    from chronos.chronos2 import Chronos2CoreConfig, Chronos2Model

    from .chronos2 import predict_patches, quantile_loss

    config = Chronos2CoreConfig(
        **recipe.model,
        architectures=["Chronos2Model"],
        chronos_pipeline_class="Chronos2Pipeline",
        chronos_config=dict(recipe.config),
    )
    network = Chronos2Model(config)
    _initialise(network)
    patch = recipe.config["output_patch_size"]
    sizes, shares = torch.tensor(list(_GROUPS)), torch.tensor(list(_GROUPS.values()))

    def mean_quantile_loss(history: Tensor, label: Tensor) -> Tensor:
        rows = int(sizes[torch.multinomial(shares, 1)])
        # Short labels too: as few patches as they need, the last of them known in part.
        longest = patch if torch.rand(()) < 0.4 else recipe.horizon
        steps = longest if torch.rand(()) < 0.5 else int(torch.randint(6, longest, ()))
        past = history.shape[1]
        whole = torch.cat([history, label[:, :steps]], 1)
        whole = whole[: len(whole) // rows * rows].unflatten(0, (-1, rows))
        # The first row of a group is a target, the others are targets or covariates known in the future.
        known = torch.rand(whole.shape[:2], device=whole.device) < 0.7
        known[:, 0] = False
        if rows > 1:
            whole = entangle(whole, past)
        history, label = whole.split([past, steps], -1)
        future = torch.where(known[..., None], label, torch.nan) if rows > 1 else None
        predicted, norm = predict_patches(network, history, future, -(-steps // patch))
        # What is far outside the history, such as a first event, cannot be forecast.
        observed = ~known[..., None] & ((label - norm[0]).abs() < 12.0 * norm[1])
        losses = quantile_loss(network, predicted, norm, label, observed)
        return losses.sum() / (~known).sum() / len(recipe.config["quantiles"])

    return network, mean_quantile_loss


@torch.no_grad()
def _initialise(network: Any) -> None:
    """Start as the official code means to; since transformers 5 its own initialisation leaves all at one spread."""
    for name, parameter in network.named_parameters():
        if "layer_norm" in name:
            parameter.fill_(1.0)
        elif name.endswith(".bias"):
            parameter.zero_()
        elif "shared" in name:
            parameter.normal_(std=1.0)
        else:
            spread = parameter.shape[1] ** -0.5
            parameter.normal_(std=spread * network.config.d_kv**-0.5 if name.endswith(".q.weight") else spread)


def entangle(series: Tensor, past: int) -> Tensor:
    """Let the rows of each group drive each other, ``y_i = a_i x_i + sum_j w_ij x_j(t - lag_j)``.

    Parameters
    ----------
    series
        Independent series, shape ``(groups, rows, steps)``, NaN where missing.
    past
        Steps of history; the rest is the label.
    """
    groups, rows, steps = series.shape
    missing = series.isnan()
    centre = series[..., :past].nanmean(-1, keepdim=True)
    spread = (series[..., :past] - centre).square().nanmean(-1, keepdim=True).sqrt() + 1e-6
    x = ((series - centre) / spread).nan_to_num(0.0).clamp(-12.0, 12.0)

    def some(share: float, *shape: int) -> Tensor:
        return torch.rand((groups, rows, *shape), device=series.device) < share

    # Some rows are events, on or off.
    event = some(0.3, 1)
    x = torch.where(event, 2.0 * (x > torch.randn((groups, rows, 1), device=series.device)), x)
    lag = torch.randint(1, 25, (groups, rows, 1), device=series.device) * some(0.3, 1)
    at = torch.arange(steps, device=series.device) - lag
    late = torch.where(at < 0, 0.0, x.gather(-1, at.clamp(min=0).expand_as(x)))
    # More positive than negative weights: a sign that has to be read off the history is hard to learn from nothing.
    sign = torch.where(some(0.35, rows), -1.0, 1.0)
    weight = sign * torch.exp(0.7 * torch.randn((groups, rows, rows), device=series.device)) * some(0.85, rows)
    own = torch.exp(torch.randn((groups, rows, 1), device=series.device) - 1.0)
    # Later rows drive earlier ones, and nothing drives the last.
    own[:, -1] = 1.0
    return (own * x + weight.triu(1) @ late).masked_fill(missing, torch.nan)


if __name__ == "__main__":
    run(RECIPES, build)
