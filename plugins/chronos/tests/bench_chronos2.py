"""Measure the forecasting throughput of Chronos-2 here relative to ``Chronos2Pipeline.predict`` on the same data.

    python plugins/chronos/tests/bench_chronos2.py [CHECKPOINT] [--series 512] [--batch-size 64] [--repeats 5]

Both sides start from arrays in memory and end with all quantiles; ours goes through ``PeftPredictor.predict``, GluonTS
entries in and forecasts out. Runs alternate, and the median of the times is taken. Ends with an error if any ratio is
below 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from chronos import Chronos2Pipeline

from gluonts_peft import PeftPredictor, load_backbone
from gluonts_peft_chronos import ChronosBackbone

# (targets, covariates known in the past only, covariates known in the future), steps of history, horizon in patches.
CASES = {
    "univariate": ((1, 0, 0), 480, 1),
    "univariate, short history": ((1, 0, 0), 48, 1),
    "univariate, beyond own length": ((1, 0, 0), 480, 0),
    "4 targets": ((4, 0, 0), 480, 1),
    "1 target, 3 known covariates": ((1, 0, 3), 480, 1),
}


def data(group: tuple[int, int, int], count: int, past: int, horizon: int) -> tuple[list[Any], list[Any]]:
    """Return the same random walks as GluonTS entries and as the official pipeline takes them."""
    values = np.random.default_rng(0).standard_normal((count, sum(group), past + horizon)).cumsum(2).astype(np.float32)
    targets, known = group[0], group[2]
    start = pd.Period("2024-01-01 00:00", freq="h")
    ours, theirs = [], []
    for row in values:
        entry: dict[str, Any] = {"start": start, "target": row[0, :past] if targets == 1 else row[:targets, :past]}
        given: dict[str, Any] = {"target": row[:targets, :past]}
        if known:
            entry["feat_dynamic_real"] = row[-known:]
            given["past_covariates"] = {f"x{i}": x[:past] for i, x in enumerate(row[-known:])}
            given["future_covariates"] = {f"x{i}": x[past:] for i, x in enumerate(row[-known:])}
        ours.append(entry)
        theirs.append(given)
    return ours, theirs


def seconds(call: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="chronos2-nano", help="bundled name or folder")
    parser.add_argument("--series", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64, help="series at a time, on both sides")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = ChronosBackbone.bundled().get(arguments.checkpoint, arguments.checkpoint)
    pipeline = Chronos2Pipeline.from_pretrained(folder, device_map="cpu")
    own, patch = pipeline.model_prediction_length, pipeline.model_output_patch_size
    ratios = []
    print(f"{'case':32}{'official':>10}{'ours':>10}{'ratio':>8}   (series a second)")  # noqa: T201
    for name, (group, past, patches) in CASES.items():
        count = arguments.series // sum(group)
        horizon = patches * patch or own + patch
        entries, inputs = data(group, count, past, horizon)
        backbone = load_backbone("chronos", checkpoint=arguments.checkpoint, prediction_length=horizon)
        predictor = PeftPredictor(backbone, batch_size=arguments.batch_size // sum(group), device="cpu")

        def ours(predictor: PeftPredictor = predictor, entries: list[Any] = entries) -> list[Any]:
            return list(predictor.predict(entries))

        def theirs(inputs: list[Any] = inputs, horizon: int = horizon) -> list[Any]:
            return list(pipeline.predict(inputs, prediction_length=horizon, batch_size=arguments.batch_size))

        found, expected = ours()[0].forecast_array.astype(np.float64), theirs()[0].numpy()
        expected = expected[0] if group[0] == 1 else expected.transpose(1, 2, 0)
        # Quantiles beyond the own length are sensitive to the order of nearly equal samples.
        assert np.abs(found - expected)[:, :own].max() < 1e-4 * np.abs(expected).max()
        times = [(seconds(theirs), seconds(ours)) for _ in range(arguments.repeats)]
        official, mine = (count / statistics.median(side) for side in zip(*times, strict=True))
        ratios.append(mine / official)
        print(f"{name:32}{official:10.0f}{mine:10.0f}{mine / official:8.2f}")  # noqa: T201
    if min(ratios) < 1.0:
        raise SystemExit(f"slower than the official pipeline: {min(ratios):.2f}")


if __name__ == "__main__":
    main()
