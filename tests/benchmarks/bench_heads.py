"""Ratios of one run: heads on features that are computed once, and gated LoRA against full tuning.

    python tests/benchmarks/bench_heads.py

The network has the size of MOMENT-small (eight layers, 512 features a patch) and random weights. What counts is the
processor time of the fastest of some rounds, so that whatever else the machine does matters little; only the ratios
mean anything.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from gluonts_peft import SeriesStore, Windows, get_adapter, load_backbone
from gluonts_peft.backbone import Source
from gluonts_peft.features import FeatureCache
from gluonts_peft.heads import KINDS
from gluonts_peft_moment import MomentBackbone
from gluonts_peft_moment.network import MomentNetwork

BATCH, HORIZON, STEPS = 32, 96, 2
T5 = dict(d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6)

# Spelt out so that a piped table is whole.
console = Console(width=110)


def small() -> MomentBackbone:
    """Return a MOMENT of the size of MOMENT-small with random weights."""
    nano: Any = load_backbone("moment", prediction_length=HORIZON)
    config = copy.deepcopy(nano.network.config)
    config["t5_config"] |= T5
    torch.manual_seed(0)
    source = Source("moment", "random", "memory", None, "0" * 64)
    return MomentBackbone.from_network(MomentNetwork(config), prediction_length=HORIZON, source=source)


def windows() -> Windows:
    """Return windows of random walks."""
    rng = np.random.default_rng(0)
    series = [{"item_id": str(i), "target": rng.normal(size=1000).cumsum().astype(np.float32)} for i in range(4)]
    return Windows(
        SeriesStore.from_dataset(series), context_length=512, prediction_length=HORIZON, min_context=512, seed=0
    )


def steps_of(spec: Any, cached: bool = False) -> tuple[Callable[[], None], int]:
    """Return a function that takes some training steps with an adapter, and its number of parameters."""
    backbone = small()
    adapter = get_adapter(spec).attach(backbone)
    adapter.prepare(10_000)
    source: Any = windows()
    if cached:
        source = FeatureCache(backbone, source, steps=STEPS, batch_size=BATCH)
    backbone.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)

    def run() -> None:
        for step in range(STEPS):
            batch = {name: torch.as_tensor(value) for name, value in source.sample(step, BATCH).items()}
            backbone.loss(batch).mean().backward()
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run, adapter.num_parameters()


def fastest(run: Callable[[], None], rounds: int = 3) -> float:
    """Return the milliseconds of processor time of a step in the fastest of some rounds."""
    run()
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return 1000 * best / STEPS


def main() -> None:
    """Measure and print."""
    from recorded import record

    table = Table(title="training step, MOMENT-small with random weights, batch 32, horizon 96", title_justify="left")
    for column in ("head", "parameters", "ms through the backbone", "ms on kept features", "times as fast"):
        table.add_column(column, justify="left" if column == "head" else "right")
    found: dict[str, float] = {}
    for kind in KINDS:
        spec = {"name": "head", "kind": kind}
        run, count = steps_of(spec)
        slow, quick = fastest(run), fastest(steps_of(spec, cached=True)[0])
        table.add_row(kind, f"{count:,}", f"{slow:.1f}", f"{quick:.1f}", f"{slow / quick:.0f}")
        found[f"{kind}, times as fast"] = slow / quick
    console.print(table)
    table = Table(title="training step relative to full tuning", title_justify="left")
    for column in ("adapter", "milliseconds", "relative to full"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    specs = {"full": "full", "trace + pooling": ["trace", {"name": "head", "kind": "pooling"}]}
    seconds = {name: fastest(steps_of(spec)[0]) for name, spec in specs.items()}
    for name, value in seconds.items():
        table.add_row(name, f"{value:.0f}", f"{value / seconds['full']:.2f}")
        found[f"{name}, relative to full"] = value / seconds["full"]
    console.print(table)
    record("heads", found, console)


if __name__ == "__main__":
    main()
