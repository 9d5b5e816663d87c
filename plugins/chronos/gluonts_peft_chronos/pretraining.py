"""Pretrain the bundled checkpoints from scratch, on synthetic series only.

    python -m gluonts_peft_chronos.pretraining bolt-nano --out FOLDER

The recipe is seeded: the same machine and number of threads give the same weights. The folder is in the official
layout (``config.json`` and ``model.safetensors``) and opens with ``chronos.BaseChronosPipeline.from_pretrained``.
Sizes, data and schedule are our choice; the architectures are those of Chronos-T5 (arXiv 2403.07815) and Chronos-Bolt.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration

from .synthetic import sample_series

__all__ = ["RECIPES", "Recipe", "pretrain"]

_T5 = dict(
    feed_forward_proj="relu",
    initializer_factor=0.05,
    dropout_rate=0.0,
    decoder_start_token_id=0,
    pad_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Recipe:
    """How one bundled checkpoint is made.

    Parameters
    ----------
    model
        Keyword arguments of ``transformers.T5Config``.
    chronos
        The ``chronos_config`` section of ``config.json``.
    contexts
        Lengths of history with their probabilities: short ones cost little and are what short series need.
    batch_size, steps, learning_rate, warmup
        Optimisation: AdamW, linear warm-up, then half a cosine to zero.
    daily
        Share of daily seasons at an hourly step, see :func:`sample_series`.
    average
        Decay of the exponential moving average of the weights; the average is what is saved.
    """

    model: dict[str, Any]
    chronos: dict[str, Any]
    contexts: dict[int, float]
    batch_size: int
    steps: int
    learning_rate: float
    warmup: int = 500
    average: float = 0.999
    daily: float = 0.0
    seed: int = 0


RECIPES = {
    "bolt-nano": Recipe(
        model=dict(d_model=80, d_kv=20, d_ff=320, num_layers=3, num_decoder_layers=2, num_heads=4, **_T5),
        chronos=dict(
            context_length=504,
            prediction_length=72,
            input_patch_size=24,
            input_patch_stride=24,
            quantiles=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
            use_reg_token=True,
        ),
        contexts={504: 0.5, 240: 0.2, 120: 0.15, 72: 0.1, 36: 0.05},
        batch_size=128,
        steps=9_000,
        daily=0.5,
        learning_rate=3e-3,
    ),
    "t5-nano": Recipe(
        model=dict(
            d_model=64, d_kv=32, d_ff=512, num_layers=2, num_decoder_layers=2, num_heads=2, vocab_size=2048, **_T5
        ),
        chronos=dict(
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
        contexts={256: 0.3, 128: 0.3, 64: 0.25, 32: 0.15},
        batch_size=64,
        steps=8_000,
        learning_rate=4e-3,
    ),
}

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _build(recipe: Recipe) -> tuple[torch.nn.Module, Loss]:
    """Return a freshly initialised model and its loss of ``(history, label)``, both ``(batch, time)``."""
    if "input_patch_size" in recipe.chronos:
        from chronos.chronos_bolt import ChronosBoltModelForForecasting

        config = T5Config(
            **recipe.model,
            architectures=["ChronosBoltModelForForecasting"],
            chronos_pipeline_class="ChronosBoltPipeline",
            chronos_config=recipe.chronos,
        )
        bolt = ChronosBoltModelForForecasting(config)

        def quantile_loss(history: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = bolt(context=history, target=label).loss
            return loss / recipe.chronos["prediction_length"]

        return bolt, quantile_loss

    from chronos.chronos import ChronosConfig

    config = T5Config(
        **recipe.model,
        architectures=["T5ForConditionalGeneration"],
        chronos_pipeline_class="ChronosPipeline",
        chronos_config=recipe.chronos,
    )
    t5 = T5ForConditionalGeneration(config)
    tokenizer = ChronosConfig(**recipe.chronos).create_tokenizer()
    _order_embedding(t5.shared.weight, recipe.chronos)

    def cross_entropy(history: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        tokens, observed, scale = tokenizer.context_input_transform(history)
        labels, label_observed = tokenizer.label_input_transform(label, scale)
        labels[~label_observed] = -100
        loss: torch.Tensor = t5(input_ids=tokens, attention_mask=observed, labels=labels).loss
        return loss

    return t5, cross_entropy


@torch.no_grad()
def _order_embedding(weight: torch.Tensor, chronos: dict[str, Any]) -> None:
    """Start from embeddings in which neighbouring bins are near: Fourier features of the bins' values.

    A vocabulary that starts in disorder spends most of a short training on learning that its tokens are numbers.
    """
    special, (vocabulary, width) = chronos["n_special_tokens"], weight.shape
    limits = chronos["tokenizer_kwargs"]
    value = torch.linspace(limits["low_limit"], limits["high_limit"], vocabulary - special)[:, None]
    frequency = torch.logspace(-1.0, 1.5, width // 2)
    weight[special:] = 3.0 * torch.cat([torch.cos(frequency * value), torch.sin(frequency * value)], 1)


def _batches(recipe: Recipe, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rng = np.random.default_rng(recipe.seed)
    lengths, probabilities = list(recipe.contexts), list(recipe.contexts.values())
    longest, horizon = max(lengths), recipe.chronos["prediction_length"]
    while True:
        pool = sample_series(rng, 4 * recipe.batch_size, longest + horizon, history=longest, daily=recipe.daily)
        for batch in torch.from_numpy(pool).split(recipe.batch_size):
            history = batch[:, longest - int(rng.choice(lengths, p=probabilities)) : longest]
            label = batch[:, longest:]
            # A label far outside what its history shows (a step after a flat start) has no forecast to learn from,
            # yet would dominate the gradient of the whole batch.
            centre = history.nanmean(1, keepdim=True)
            spread = (history - centre).square().nanmean(1, keepdim=True).sqrt()
            kept = ((label - centre).abs() < 12.0 * spread).all(1)
            yield history[kept].to(device), label[kept].to(device)


def pretrain(name: str, out: Path, *, steps: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """Train one bundled checkpoint and write it in the official layout.

    Parameters
    ----------
    name
        A key of :data:`RECIPES`.
    out
        Folder to write; created if need be.
    steps
        Fewer steps than the recipe's, for a try.
    device
        Any torch device.

    Returns
    -------
    dict
        The training log: recipe, seconds and smoothed loss, as written to ``pretraining.json``.
    """
    recipe = RECIPES[name]
    steps = steps or recipe.steps
    torch.manual_seed(recipe.seed)
    model, loss_of = _build(recipe)
    model.to(device).train()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.average)
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
    )
    warmup = min(recipe.warmup, steps // 10 + 1)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, smoothed, log = time.perf_counter(), float("nan"), []
    for step, (history, label) in enumerate(
        progress := tqdm(_batches(recipe, torch.device(device)), total=steps, desc=name, mininterval=5.0)
    ):
        if step == steps:
            break
        loss = loss_of(history, label)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        smoothed = loss.item() if step == 0 else 0.99 * smoothed + 0.01 * loss.item()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            log.append({"step": step + 1, "loss": round(smoothed, 5)})
            progress.set_postfix(loss=f"{smoothed:.4f}")
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            _write(average.module, out, {"name": name, "steps": step + 1, "recipe": asdict(recipe), "log": log})
    seconds = round(time.perf_counter() - start, 1)
    report = {"name": name, "steps": steps, "seconds": seconds, "recipe": asdict(recipe), "log": log}
    _write(average.module, out, report)
    return report


def _write(model: Any, out: Path, report: dict[str, Any]) -> None:
    model.save_pretrained(out)
    (out / "pretraining.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description="Pretrain a bundled checkpoint on synthetic series.")
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=None, help="fewer steps than the recipe's")
    parser.add_argument("--device", default="cpu", help="torch device")
    arguments = parser.parse_args()
    report = pretrain(arguments.name, arguments.out, steps=arguments.steps, device=arguments.device)
    print(json.dumps(report["log"][-1:]))  # noqa: T201


if __name__ == "__main__":
    main()
