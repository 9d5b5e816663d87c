"""One adapter for several tasks, against the same adapter trained for each task alone: MOMENT on ETTh1.

    python examples/trace/joint.py --data ETTh1.csv.gz --out runs/joint

Tasks are forecasts over a long and a short horizon, and the reconstruction of hidden patches. `joint` trains on all
three with as many steps as each of the others; `joint, longer` with as many as they have together. What a model was not
trained for is scored all the same where it can do it, so that the price of the other tasks shows. Data as in
`etth1.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from etth1 import CONTEXT, TEST, TRAIN, VALIDATION, load, series, spread
from rich.console import Console
from rich.table import Table

from gluonts_peft import get_estimator
from gluonts_peft.objectives import reconstruction_loss

RECONSTRUCT = {"task": "reconstruct"}


def methods(long: int, short: int) -> dict[str, tuple[int, list[dict[str, Any]], int]]:
    """Return each method's model horizon, tasks, and how many times the steps it trains for."""
    every = [{"prediction_length": long}, {"prediction_length": short}, RECONSTRUCT]
    return {
        f"forecast {long} alone": (long, every[:1], 1),
        f"forecast {short} alone": (short, every[1:2], 1),
        "reconstruction alone": (long, every[2:], 1),
        "joint": (long, every, 1),
        "joint, longer": (long, every, 3),
    }


def run(frame: pd.DataFrame, start: pd.Period, name: str, seed: int, arguments: Any) -> dict[str, float]:
    """Train one model, and score it on every task that it can do."""
    horizon, tasks, times = methods(arguments.long, arguments.short)[name]
    estimator = get_estimator("moment")(
        prediction_length=horizon,
        context_length=CONTEXT,
        adapter=["lora", {"name": "head", "kind": "projection"}] if tasks != [RECONSTRUCT] else "lora",
        tasks=tasks,
        max_epochs=arguments.epochs * times,
        num_batches_per_epoch=arguments.steps,
        batch_size=16,
        learning_rate=arguments.rate,
        patience=0,
        min_context=CONTEXT,
        validation_windows=VALIDATION // horizon,
        seed=seed,
        gate="keep",
        progress=False,
    )
    predictor = estimator.train(series(frame, start, TRAIN), series(frame, start, TRAIN + VALIDATION))
    first = TRAIN + VALIDATION
    cuts = range(first, first + TEST - arguments.long + 1, arguments.stride)
    values = frame.to_numpy(np.float32)
    history = np.concatenate([values[cut - CONTEXT : cut].T for cut in cuts])
    label = np.concatenate([values[cut : cut + arguments.long].T for cut in cuts])
    scores = {}
    if tasks != [RECONSTRUCT]:
        windows = [{"item_id": str(i), "start": start, "target": past} for i, past in enumerate(history)]
        found = np.stack([forecast.quantile(0.5) for forecast in predictor.predict(windows)])
        for steps in {arguments.short, horizon}:
            scores[f"forecast {steps}"] = float(np.square(found[:, :steps] - label[:, :steps]).mean())
    generator, losses = torch.Generator().manual_seed(0), []
    with predictor.backbone.inference():
        for part in torch.from_numpy(history).split(64):
            batch = {"past_target": part, "past_observed_values": torch.ones_like(part)}
            losses.append(reconstruction_loss(predictor.backbone, batch, generator=generator))
    scores["reconstruction"] = float(torch.cat(losses).mean())
    return scores


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="ETTh1.csv, also compressed")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--long", type=int, default=96)
    parser.add_argument("--short", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=50, help="an epoch")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--stride", type=int, default=24, help="steps between test windows")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    frame, start = load(arguments.data)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "joint.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    finished = {(entry["name"], entry["seed"]) for entry in done}
    names = list(methods(arguments.long, arguments.short))
    for seed in range(arguments.seeds):
        for name in names:
            if (name, seed) in finished:
                continue
            done.append({"name": name, "seed": seed, **run(frame, start, name, seed, arguments)})
            with file.open("a") as handle:
                handle.write(json.dumps(done[-1]) + "\n")
            sys.stderr.write(f"{name}, seed {seed}\n")
    scores = [f"forecast {arguments.long}", f"forecast {arguments.short}", "reconstruction"]
    table = Table(title="ETTh1, moment-nano: mean squared error of each task", title_justify="left")
    for column in ("trained for", *scores):
        table.add_column(column, justify="right" if column in scores else "left", no_wrap=True)
    for name in names:
        own = [entry for entry in done if entry["name"] == name]
        table.add_row(name, *(spread([e[s] for e in own]) if s in own[0] else "" for s in scores))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
