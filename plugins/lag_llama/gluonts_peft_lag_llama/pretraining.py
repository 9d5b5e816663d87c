"""Pretrain the bundled checkpoint from scratch, on synthetic series only.

    python -m gluonts_peft_lag_llama.pretraining lag-llama-nano --out FOLDER

Sizes, data and schedule are our choice; architecture and loss are those of Lag-Llama (arXiv 2310.08278). Lags follow
the reference implementation's rule for its frequencies Q and M, because those reach back no further than 36 steps:
short histories are what this checkpoint is for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gluonts_peft.pretraining import Recipe, run

from .network import LagLlamaConfig, LagLlamaNetwork
from .weights import write

__all__ = ["RECIPES", "build", "calendar_features", "save"]

RECIPES = {
    "lag-llama-nano": Recipe(
        model=dict(
            context_length=32,
            max_context_length=2048,
            lags_seq=[0, 7, 8, 10, 11, 12, 22, 23, 24, 34, 35, 36],
            n_layer=4,
            n_head=5,
            n_embd_per_head=16,
            scaling="robust",
            time_feat=True,
        ),
        config={},
        horizon=24,
        contexts={68: 0.4, 56: 0.2, 48: 0.15, 36: 0.15, 24: 0.1},
        batch_size=64,
        steps=4_000,
        daily=0.5,
        learning_rate=3e-3,
        warmup=200,
    ),
}

# Weight of a step of the context in the loss.
_CONTEXT = 0.1
# Seconds a step: calendar features of minutes, hours and days occur, hours most.
_STEPS = np.array([60, 300, 900, 3600, 3600, 3600, 3600, 86400])


def build(recipe: Recipe) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Return a freshly initialised network and its loss of ``(history, label)``, both ``(batch, time)``."""
    config = LagLlamaConfig(**{**recipe.model, "lags_seq": tuple(recipe.model["lags_seq"])})
    network = LagLlamaNetwork(config)
    rng = np.random.default_rng(recipe.seed)
    past_length = config.context_length + config.max_lag

    def negative_log_likelihood(history: Tensor, label: Tensor) -> Tensor:
        history, label = _rescaled(rng, history, label)
        history = nn.functional.pad(history, (past_length - history.shape[1], 0), value=torch.nan)
        observed = (~history.isnan()).float()
        history = history.nan_to_num(nan=0.0)
        calendar = None
        if config.time_feat:
            calendar = _calendar(rng, len(history), past_length + label.shape[1]).to(history.device)
            calendar[:, :past_length] *= observed.cummax(1).values[..., None]
        law, level, spread = network(history, observed, calendar, label)
        context = config.context_length - 1
        target = torch.cat([history[:, -context:], label], 1)
        # The steps of the context are forecast with a level and a spread that know them; the label's are the real task.
        counted = torch.cat([_CONTEXT * observed[:, -context:], torch.ones_like(label)], 1)
        # A series that hardly ever moves has no spread to forecast by.
        counted = counted * (spread > 1e-3 * history.std(1, keepdim=True))
        loss = -law.log_prob((target - level) / spread)
        mean: Tensor = (loss * counted).sum() / counted.sum()
        return mean

    return network, negative_log_likelihood


def _rescaled(rng: np.random.Generator, history: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Give each series a size and a level of its own.

    Synthetic series are standardised with their labels, and tokens hold the size of the history: without this, a small
    spread of the history would tell of a large one to come.
    """
    size = np.exp(rng.normal(0.0, 2.0, (len(history), 1)))
    level = rng.choice([-1.0, 1.0], (len(history), 1), p=[0.15, 0.85]) * np.exp(rng.uniform(-3.0, 3.2, size.shape))
    factor, shift = (torch.from_numpy(part.astype(np.float32)).to(history.device) for part in (size, level))
    return factor * (history + shift), factor * (label + shift)


def _calendar(rng: np.random.Generator, batch: int, length: int) -> Tensor:
    """Return calendar features of random dates, shape ``(batch, length, len(TIME_FEATURES))``."""
    start = rng.integers(0, 2_000_000_000, (batch, 1))
    seconds = start + rng.choice(_STEPS, (batch, 1)) * np.arange(length)
    return torch.from_numpy(calendar_features(seconds.astype("datetime64[s]")))


def calendar_features(second: NDArray[np.datetime64]) -> NDArray[np.float32]:
    """Return the values of ``TIME_FEATURES`` at some times, with a last axis of features.

    The functions of ``gluonts.time_feature`` take one index at a time, which is slow for a batch of series.
    """
    minute, hour, day, month, year = (second.astype(f"datetime64[{unit}]") for unit in ("m", "h", "D", "M", "Y"))
    parts = [
        (second - minute) / np.timedelta64(59, "s"),
        (minute - hour) / np.timedelta64(59, "m"),
        (hour - day) / np.timedelta64(23, "h"),
        # 1 January 1970 was a Thursday.
        (day.astype(np.int64) + 3) % 7 / 6,
        (day - month.astype("datetime64[D]")) / np.timedelta64(30, "D"),
        (day - year.astype("datetime64[D]")) / np.timedelta64(365, "D"),
    ]
    return (np.stack(parts, -1) - 0.5).astype(np.float32)


def save(network: LagLlamaNetwork, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``."""
    write(network, folder, ckpt=False)


if __name__ == "__main__":
    run(RECIPES, build, save)
