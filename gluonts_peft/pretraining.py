"""Pretrain small checkpoints from scratch, on synthetic series only: how the bundled ones are made.

    python -m gluonts_peft_chronos.pretraining bolt-nano --out FOLDER

A plug-in brings recipes and a function that builds a network and its loss; the data, the loop and the program are here.
A recipe is seeded: the same machine and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .files import write_atomically
from .synthetic import sample_series

__all__ = ["Recipe", "pretrain", "run"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one bundled checkpoint is made.

    Parameters
    ----------
    model
        Sizes of the network, in the words of the family's own configuration.
    config
        Whatever else its ``config.json`` holds.
    horizon
        Steps of a label.
    contexts
        Lengths of history with their probabilities: short ones cost little and are what short series need.
    batch_size, steps, learning_rate, warmup
        Optimisation: AdamW, linear warm-up, then half a cosine to zero.
    average
        Decay of the exponential moving average of the weights; the average is what is saved.
    daily
        Share of daily seasons at an hourly step, see :func:`gluonts_peft.synthetic.sample_series`.
    seed
        Decides weights and series.
    """

    model: dict[str, Any]
    config: dict[str, Any]
    horizon: int
    contexts: dict[int, float]
    batch_size: int
    steps: int
    learning_rate: float
    warmup: int = 500
    average: float = 0.999
    daily: float = 0.0
    seed: int = 0


def _batches(recipe: Recipe, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(recipe.seed)
    lengths, probabilities = list(recipe.contexts), list(recipe.contexts.values())
    longest = max(lengths)
    while True:
        pool = sample_series(rng, 4 * recipe.batch_size, longest + recipe.horizon, history=longest, daily=recipe.daily)
        for batch in torch.split(torch.from_numpy(pool), recipe.batch_size):
            history = batch[:, longest - int(rng.choice(lengths, p=probabilities)) : longest]
            label = batch[:, longest:]
            # A label far outside what its history shows (a step after a flat start) has no forecast to learn from,
            # yet would dominate the gradient of the whole batch.
            centre = history.nanmean(1, keepdim=True)
            spread = (history - centre).square().nanmean(1, keepdim=True).sqrt()
            kept = ((label - centre).abs() < 12.0 * spread).all(1)
            yield history[kept].to(device), label[kept].to(device)


def pretrain(
    recipe: Recipe,
    build: Callable[[Recipe], tuple[nn.Module, Loss]],
    out: Path,
    *,
    name: str = "",
    steps: int | None = None,
    device: str = "cpu",
    save: Callable[[Any, Path], None] | None = None,
) -> dict[str, Any]:
    """Train a network and write it as a checkpoint folder.

    Parameters
    ----------
    recipe
        What to do.
    build
        Makes a freshly initialised network and its loss, a function of history ``(batch, context)``, NaN where missing,
        and label ``(batch, horizon)`` that returns a scalar.
    out
        Folder to write; created if need be.
    name
        Name of the checkpoint.
    steps
        Fewer steps than the recipe's, for a try.
    device
        Any torch device.
    save
        Writes a network into a folder in the family's official layout; its ``save_pretrained`` by default.

    Returns
    -------
    dict
        The training log: recipe, seconds and smoothed loss, as written to ``pretraining.json``.
    """
    steps = steps or recipe.steps
    torch.manual_seed(recipe.seed)
    network, loss_of = build(recipe)
    network.to(device).train()
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.average)
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=decay)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
    )
    warmup = min(recipe.warmup, steps // 10 + 1)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    def write(**found: Any) -> dict[str, Any]:
        report = {"name": name, **found, "recipe": asdict(recipe), "log": log}
        out.mkdir(parents=True, exist_ok=True)
        (save or _save_pretrained)(average.module, out)
        write_atomically(out / "pretraining.json", json.dumps(report, indent=1) + "\n")
        return report

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, smoothed = time.perf_counter(), math.nan
    log: list[dict[str, float]] = []
    for step, (history, label) in enumerate(
        progress := tqdm(_batches(recipe, torch.device(device)), total=steps, desc=name, mininterval=5.0)
    ):
        if step == steps:
            break
        loss = loss_of(history, label)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        smoothed = loss.item() if step == 0 else 0.99 * smoothed + 0.01 * loss.item()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            log.append({"step": step + 1, "loss": round(smoothed, 5)})
            progress.set_postfix(loss=f"{smoothed:.4f}")
        if (step + 1) % 1000 == 0:
            write(steps=step + 1)
    return write(steps=steps, seconds=round(time.perf_counter() - start, 1))


def _save_pretrained(network: Any, folder: Path) -> None:
    network.save_pretrained(folder)


def run(
    recipes: Mapping[str, Recipe],
    build: Callable[[Recipe], tuple[nn.Module, Loss]],
    save: Callable[[Any, Path], None] | None = None,
) -> None:
    """Run as a program: ``NAME --out FOLDER [--steps N] [--device DEVICE]``."""
    parser = argparse.ArgumentParser(description="Pretrain a bundled checkpoint on synthetic series.")
    parser.add_argument("name", choices=recipes)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=None, help="fewer steps than the recipe's")
    parser.add_argument("--device", default="cpu", help="torch device")
    arguments = parser.parse_args()
    name: str = arguments.name
    report = pretrain(
        recipes[name], build, arguments.out, name=name, steps=arguments.steps, device=arguments.device, save=save
    )
    print(json.dumps(report["log"][-1:]))  # noqa: T201
