"""Ratios of one run: how fast adapters, forecasts, windows and warping distances are.

    python tests/benchmarks/bench.py            # all parts
    python tests/benchmarks/bench.py steps      # one part

Everything is measured in turns within one process, so that whatever else the machine does meets all sides alike; the
fastest turn of each counts. Absolute times are printed for orientation, only the ratios mean anything.
"""

from __future__ import annotations

import copy
import gc
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import T5Config, T5ForConditionalGeneration

from gluonts_peft import SeriesStore, Windows, get_adapter, list_adapters
from gluonts_peft.backbone import Source
from gluonts_peft.metrics import dtw_distance
from gluonts_peft_chronos import ChronosBackbone, T5Backbone

# width is spelt out so that a piped table is whole
console = Console(width=110)

TINY = dict(
    d_model=256,
    d_kv=64,
    d_ff=1024,
    num_layers=4,
    num_decoder_layers=4,
    num_heads=4,
    vocab_size=4096,
    feed_forward_proj="relu",
    initializer_factor=0.05,
    decoder_start_token_id=0,
    pad_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=True,
)
CHRONOS = dict(
    tokenizer_class="MeanScaleUniformBins",
    tokenizer_kwargs={"low_limit": -15.0, "high_limit": 15.0},
    n_tokens=4096,
    n_special_tokens=2,
    pad_token_id=0,
    eos_token_id=1,
    use_eos_token=True,
    model_type="seq2seq",
    context_length=512,
    prediction_length=64,
    num_samples=20,
    temperature=1.0,
    top_k=50,
    top_p=1.0,
)


def tiny(prediction_length: int = 36) -> T5Backbone:
    """Return Chronos-T5 Tiny with random weights."""
    torch.manual_seed(0)
    config = T5Config(**TINY, chronos_pipeline_class="ChronosPipeline", chronos_config=CHRONOS)
    source = Source("chronos", "random T5 Tiny", "memory", None, "0" * 64)
    network = T5ForConditionalGeneration(config)
    return T5Backbone.from_network(network, prediction_length=prediction_length, context_length=72, source=source)


def windows(batch: int, context: int, horizon: int) -> dict[str, torch.Tensor]:
    """Return a batch of random walks."""
    generator = torch.Generator().manual_seed(0)
    values = 20.0 + torch.randn(batch, context + horizon, generator=generator).cumsum(1)
    parts = {"past_target": values[:, :context], "future_target": values[:, context:]}
    observed = {name.replace("target", "observed_values"): torch.ones_like(value) for name, value in parts.items()}
    return parts | observed


def fastest(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the seconds of the fastest of some rounds for each run; the rounds go in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for turn in range(rounds):
        # Another order each time: a run is not always helped or hurt by the same neighbour.
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            runs[name]()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def step_of(spec: Any, batch: dict[str, torch.Tensor]) -> tuple[Callable[[], None], int]:
    """Return one training step with an adapter, and its number of trainable parameters."""
    backbone = tiny()
    adapter = get_adapter(spec).attach(backbone)
    adapter.prepare(10_000)
    backbone.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
    done = 0

    def step() -> None:
        nonlocal done
        loss = backbone.loss(batch).mean()
        penalty = adapter.penalty()
        (loss if penalty is None else loss + penalty).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        adapter.after_step(done)
        optimizer.zero_grad()
        done += 1

    return step, adapter.num_parameters()


def steps(rounds: int = 15) -> dict[str, float]:
    """Training step of each adapter relative to full tuning."""
    batch = windows(16, 72, 36)
    names = [name for name in list_adapters() if name != "none"]
    runs, sizes = {}, {}
    for name in names:
        runs[name], sizes[name] = step_of(name, batch)
    seconds = fastest(runs, rounds)
    table = Table(title="training step, T5 Tiny, batch 16, context 72, horizon 36", title_justify="left")
    for column in ("adapter", "parameters", "milliseconds", "relative to full"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for name in sorted(names, key=seconds.__getitem__):
        ratio = seconds[name] / seconds["full"]
        table.add_row(name, f"{sizes[name]:,}", f"{1000 * seconds[name]:.1f}", f"{ratio:.2f}")
    console.print(table)
    slow = [name for name in names if seconds[name] > seconds["full"]]
    console.print(f"slower than full tuning: {', '.join(slow) or 'none'}\n")
    return {name: seconds[name] / seconds["full"] for name in names}


def forecasts(rounds: int = 3) -> dict[str, float]:
    """Forecasts with adapter `none` and a folded LoRA relative to the official pipelines."""
    from chronos import BaseChronosPipeline, ChronosPipeline
    from chronos.chronos import ChronosConfig, ChronosModel

    table = Table(title="forecast, relative to the official pipeline (32 series)", title_justify="left")
    for column in ("model", "official, ms", "none", "lora"):
        table.add_column(column, justify="left" if column == "model" else "right")
    cases: list[tuple[str, Any, Any, int | None]] = []
    backbone = tiny()
    config = ChronosConfig(**CHRONOS)
    official = ChronosPipeline(config.create_tokenizer(), ChronosModel(config, backbone.network.eval()))
    cases.append(("T5 Tiny, random weights, 20 paths, 36 steps", backbone, official, 20))
    for name, folder in ChronosBackbone.bundled().items():
        bundled = ChronosBackbone.from_checkpoint(name, prediction_length=36)
        samples = 20 if "samples" in bundled.capabilities else None
        cases.append((f"{name}, 36 steps", bundled, BaseChronosPipeline.from_pretrained(folder), samples))
    found: dict[str, float] = {}
    for label, backbone, pipeline, samples in cases:
        batch = windows(32, 72, 36)
        options = {} if samples is None else {"num_samples": samples}

        def ours(backbone: Any = backbone, samples: int | None = samples, batch: Any = batch) -> None:
            with backbone.reading() as reader:
                reader.forecast(batch, num_samples=samples)

        def theirs(pipeline: Any = pipeline, options: Any = options, batch: Any = batch) -> None:
            # Chronos-2 takes several variates a series.
            several = type(pipeline).__name__ == "Chronos2Pipeline"
            pipeline.predict(batch["past_target"][:, None] if several else batch["past_target"], 36, **options)

        adapted = copy.deepcopy(backbone)
        get_adapter("lora").attach(adapted)
        runs = {"official": theirs, "none": ours, "lora": lambda run=ours, model=adapted: run(model)}
        # A quantile forecast takes milliseconds: many more turns find an undisturbed one.
        seconds = fastest(runs, rounds if samples else 30 * rounds)
        ratios = {name: seconds[name] / seconds["official"] for name in ("none", "lora")}
        found |= {f"{label}, {name}": ratio for name, ratio in ratios.items()}
        table.add_row(label, f"{1000 * seconds['official']:.0f}", *(f"{ratio:.2f}" for ratio in ratios.values()))
    console.print(table)
    return found


def sampling() -> dict[str, float]:
    """Windows a second, and pairs of series a second against dtaidistance's compiled code."""
    from dtaidistance import dtw

    rng = np.random.default_rng(0)
    store = SeriesStore.from_dataset(
        [{"target": rng.normal(size=1000).astype(np.float32), "item_id": str(i)} for i in range(1000)]
    )
    plan = Windows(store, context_length=72, prediction_length=36)
    count = iter(range(10**9))
    seconds = fastest({"windows": lambda: [plan.sample(next(count), 256) for _ in range(40)]}, 5)
    console.print(f"windows: {40 * 256 / seconds['windows']:,.0f} a second (context 72, horizon 36, batches of 256)")
    left, right = rng.normal(size=(2, 2000, 36))
    runs = {
        "ours": lambda: dtw_distance(left, right, cost="squared"),
        "dtaidistance": lambda: [dtw.distance_fast(a, b, use_pruning=False) for a, b in zip(left, right, strict=True)],
    }
    seconds = fastest(runs, 5)
    console.print(
        f"DTW: {2000 / seconds['ours']:,.0f} pairs a second (36 steps), {seconds['dtaidistance'] / seconds['ours']:.1f}"
        " times as fast as dtaidistance's compiled code called a pair at a time"
    )
    return {"DTW, times as fast": seconds["dtaidistance"] / seconds["ours"]}


def main() -> None:
    """Run the parts that are named, or all."""
    # The folder of a script is on the path, that of a module which is only read is not.
    from recorded import record

    warnings.simplefilter("ignore")
    parts = {"steps": steps, "forecasts": forecasts, "sampling": sampling}
    for name in sys.argv[1:] or parts:
        record(name, parts[name](), console)
        gc.collect()


if __name__ == "__main__":
    main()
