"""Measure forecast throughput against the reference implementation's own predictor: a program, not a test.

    python bench_lag_llama.py CHECKOUT [--small] [--series 8] [--samples 20] [--horizon 24]

CHECKOUT is a clone of github.com/time-series-foundation-models/lag-llama. Both get the same weights through an export
of ours, the same series and the same number of paths; the reference runs without and with its own cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from gluonts_peft import PeftPredictor
from gluonts_peft_lag_llama import LagLlamaBackbone, LagLlamaConfig, LagLlamaNetwork
from gluonts_peft_lag_llama.weights import write

SIZES = {
    "small": dict(n_layer=2, n_head=4, n_embd_per_head=16),
    "published": dict(n_layer=8, n_head=9, n_embd_per_head=16),
}


def best(predictor: Any, dataset: list[dict[str, Any]], repeats: int) -> tuple[float, np.ndarray]:
    """Return the least seconds of some runs, and the paths, shape ``(series, samples, horizon)``."""
    seconds = []
    for _ in range(repeats):
        torch.manual_seed(0)
        start = time.perf_counter()
        samples = np.stack([forecast.samples for forecast in predictor.predict(dataset)])
        seconds.append(time.perf_counter() - start)
    return min(seconds), samples


def describe(step: str, paths: np.ndarray) -> str:
    """Return mean quartiles of the paths of a step, shape ``(series, samples)``: the tails are too heavy for means."""
    return step + " " + " ".join(f"{value:.2f}" for value in np.quantile(paths, [0.25, 0.5, 0.75], axis=1).mean(1))


def main() -> None:
    """Run as a program."""
    # Neighbours in this folder, which is on the path of a program but not of a test run.
    from record_reference import import_reference
    from test_lag_llama_network import PUBLISHED_LAGS, fill

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout")
    parser.add_argument("--small", action="store_true", help="2 layers of width 64 instead of the published size")
    parser.add_argument("--series", type=int, default=8)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--horizon", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    import_reference(arguments.checkout)
    from lag_llama.gluon.estimator import LagLlamaEstimator

    size = SIZES["small" if arguments.small else "published"]
    config = LagLlamaConfig(context_length=32, lags_seq=PUBLISHED_LAGS, scaling="robust", **size)
    network = LagLlamaNetwork(config).eval()
    fill(network)
    rng = np.random.default_rng(0)
    start = pd.Period("2024-01-01 00:00", freq="h")
    dataset = [
        {"start": start, "target": (50 + rng.standard_normal(1500).cumsum()).astype(np.float32)}
        for _ in range(arguments.series)
    ]
    times, paths = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        write(network, Path(folder))
        for name, cache in (("reference", False), ("reference, own cache", True)):
            estimator = LagLlamaEstimator(
                ckpt_path=str(Path(folder) / "lag-llama.ckpt"),
                prediction_length=arguments.horizon,
                context_length=32,
                scaling="robust",
                time_feat=True,
                num_parallel_samples=arguments.samples,
                batch_size=arguments.series,
                **size,
            )
            module = estimator.create_lightning_module(use_kv_cache=cache)
            predictor = estimator.create_predictor(estimator.create_transformation(), module)
            times[name], paths[name] = best(predictor, dataset, arguments.repeats)
        for name, rescale in (("ours", False), ("ours, rescale=True", True)):
            backbone = LagLlamaBackbone.from_checkpoint(
                folder, prediction_length=arguments.horizon, num_samples=arguments.samples, rescale=rescale
            )
            predictor = PeftPredictor(backbone, batch_size=arguments.series)
            times[name], paths[name] = best(predictor, dataset, arguments.repeats)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {arguments}")  # noqa: T201
    for name, seconds in times.items():
        rate = arguments.series * arguments.samples / seconds
        print(  # noqa: T201
            f"{name:22} {seconds:8.3f} s  {rate:9.1f} paths/s  {times['reference'] / seconds:7.1f} x reference"
            f"   {describe('first step', paths[name][:, :, 0])}   {describe('last step', paths[name][:, :, -1])}"
        )


if __name__ == "__main__":
    main()
