"""TRACE on ETTh1 with the bundled MOMENT: heads and adapters, and the selection against its controls.

    python examples/trace/etth1.py heads --data ETTh1.csv.gz --out runs/etth1        # adapters and heads, two horizons
    python examples/trace/etth1.py selection --data ETTh1.csv.gz --out runs/etth1    # DSIC and its controls

ETTh1 (Zhou et al. 2021, https://github.com/zhouhaoyi/ETDataset): seven channels, hourly. Train, validation and test are
12, 4 and 4 months of 30 days; every channel is a series of its own, standardised by its mean and deviation in the
training part; errors are those of standardised values. Heads alone train at their own default rate; an adapter with a
head at that, of three, which has the least validation loss with the first seed at the method's first horizon. TRACE has
the small head of least validation loss at a horizon. A run is a line of OUT/heads.jsonl or OUT/selection.jsonl; started
again, the program skips the runs that are there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from gluonts_peft import get_adapter, get_estimator
from gluonts_peft.heads import KINDS

CONTEXT = 512
# Hours of 12, 4 and 4 months of 30 days.
TRAIN, VALIDATION, TEST = 12 * 720, 4 * 720, 4 * 720
SMALL = [kind for kind in KINDS if kind != "linear"]
SELECTIONS = ("dsic", "random", "all_on", "magnitude")


def load(path: Path) -> tuple[pd.DataFrame, pd.Period]:
    """Return the standardised channels and the first hour."""
    frame = pd.read_csv(path, parse_dates=["date"]).set_index("date")
    if len(frame) < TRAIN + VALIDATION + TEST:
        sys.exit(f"{path} has {len(frame)} rows, and the three parts take {TRAIN + VALIDATION + TEST}")
    train = frame.iloc[:TRAIN]
    return (frame - train.mean()) / train.std(ddof=0), pd.Period(frame.index[0], freq="h")


def series(frame: pd.DataFrame, start: pd.Period, end: int) -> list[dict[str, Any]]:
    """Return every channel up to a step as a series."""
    return [
        {"item_id": name, "start": start, "target": column.to_numpy(np.float32)[:end]} for name, column in frame.items()
    ]


def head(kind: str, pool: int | None = None) -> dict[str, Any]:
    """Return a head; one that trains alone does so on a fixed pool of windows, whose features are computed once."""
    return {"name": "head", "kind": kind, **({} if pool is None else {"windows": pool})}


def plan(arguments: argparse.Namespace, done: list[dict[str, Any]]) -> Iterator[tuple[str, int, int, float, Any]]:
    """Yield name, horizon, seed, learning rate and adapter of each run, in an order in which later ones can depend on
    what earlier ones reached.
    """
    if arguments.table == "selection":
        for seed in range(arguments.seeds):
            for keep in arguments.keep:
                for selection in SELECTIONS:
                    options = {"name": "trace", "keep": keep, "selection": selection}
                    for horizon in arguments.horizons:
                        spec = [options, head(arguments.head)]
                        yield f"{selection} {keep:.0%}", horizon, seed, arguments.rates[0], spec
        return
    for horizon in arguments.horizons:
        for seed in range(arguments.seeds):
            for kind in KINDS:
                adapter = head(kind, arguments.pool)
                yield f"head {kind}", horizon, seed, get_adapter(adapter).learning_rate, adapter
        small = min(SMALL, key=lambda kind: best(done, f"head {kind}", horizon)["validation"])
        both = {
            "LoRA + linear": ["lora", head("linear")],
            "AdaLoRA + linear": ["adalora", head("linear")],
            f"TRACE + {small}": ["trace", head(small)],
        }
        for name, adapter in both.items():
            yield from searched(name, adapter, horizon, arguments, done)


def searched(
    name: str, adapter: Any, horizon: int, arguments: argparse.Namespace, done: list[dict[str, Any]]
) -> Iterator[tuple[str, int, int, float, Any]]:
    """Yield the search for a learning rate with seed 0, if there was none at an earlier horizon, then all seeds at the
    best.
    """
    if not any(entry["name"] == name and entry["horizon"] != horizon for entry in done):
        for rate in arguments.rates:
            yield name, horizon, 0, rate, adapter
    for seed in range(arguments.seeds):
        yield name, horizon, seed, best(done, name)["rate"], adapter


def best(done: list[dict[str, Any]], name: str, horizon: int | None = None) -> dict[str, Any]:
    """Return the run with the least validation loss, of a method's runs with seed 0 at a horizon, its first if None."""
    runs = [entry for entry in done if entry["name"] == name and entry["seed"] == 0]
    wanted = horizon or min(entry["horizon"] for entry in runs)
    return min((entry for entry in runs if entry["horizon"] == wanted), key=lambda entry: entry["validation"])


def run(
    frame: pd.DataFrame, start: pd.Period, horizon: int, seed: int, rate: float, adapter: Any, arguments: Any
) -> dict[str, Any]:
    """Train and score once."""
    reset_peak()
    estimator = get_estimator("moment")(
        prediction_length=horizon,
        context_length=CONTEXT,
        adapter=adapter,
        max_epochs=arguments.epochs,
        num_batches_per_epoch=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=rate,
        patience=0,
        min_context=CONTEXT,
        validation_windows=VALIDATION // horizon,
        seed=seed,
        gate="keep",
        progress=False,
    )
    began = time.process_time()
    predictor = estimator.train(series(frame, start, TRAIN), series(frame, start, TRAIN + VALIDATION))
    seconds = time.process_time() - began
    peak = peak_mb()
    first = TRAIN + VALIDATION
    cuts = range(first, first + TEST - horizon + 1, arguments.stride)
    windows = [
        {**entry, "start": start + cut - CONTEXT, "target": entry["target"][cut - CONTEXT : cut]}
        for entry in series(frame, start, first + TEST)
        for cut in cuts
    ]
    labels = np.stack([frame[name].to_numpy()[cut : cut + horizon] for name in frame for cut in cuts])
    found = np.stack([forecast.quantile(0.5) for forecast in predictor.predict(windows)])
    trained = predictor.backbone.adapter
    report = predictor.fit.report.get("trace", {})
    return {
        "mse": float(np.square(found - labels).mean()),
        "mae": float(np.abs(found - labels).mean()),
        "validation": min(epoch["val_loss"] for epoch in predictor.fit.history[arguments.epochs // 2 :]),
        "parameters": trained.num_parameters(),
        "seconds": seconds,
        "selection": report.get("cost", {}),
        "rounds": report.get("rounds", []),
        "peak_mb": peak,
    }


def reset_peak() -> None:
    """Let the highest resident memory count from now on, where Linux can do that."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float | None:
    """Return the highest resident memory of the process since then."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM:"))


def spread(values: list[float], digits: int = 4) -> str:
    """Return mean and deviation over seeds."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def report(done: list[dict[str, Any]], horizon: int, console: Console) -> None:
    """Print what each kind of run reached at a horizon."""
    table = Table(title=f"ETTh1, moment-nano, horizon {horizon}", title_justify="left")
    columns = ("", "rate", "seeds", "MSE", "MAE", "parameters", "against linear", "CPU s", "peak MB")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    runs = [entry for entry in done if entry["horizon"] == horizon]
    linear = next((entry["parameters"] for entry in runs if entry["name"] == "head linear"), None)
    for name in dict.fromkeys(entry["name"] for entry in runs):
        rate = best(done, name)["rate"]
        own = [entry for entry in runs if entry["name"] == name and entry["rate"] == rate]
        count = float(np.mean([entry["parameters"] for entry in own]))
        table.add_row(
            name,
            f"{rate:g}",
            str(len(own)),
            spread([entry["mse"] for entry in own]),
            spread([entry["mae"] for entry in own]),
            f"{count:,.0f}",
            "" if linear is None else f"{100 * (count / linear - 1):+.1f} %",
            f"{np.median([entry['seconds'] for entry in own]):.0f}",
            "" if own[0]["peak_mb"] is None else f"{max(entry['peak_mb'] for entry in own):.0f}",
        )
    console.print(table)


def compare(done: list[dict[str, Any]], horizon: int, keeps: list[float], console: Console) -> None:
    """Print what DSIC gains over each control, seed by seed."""
    table = Table(title=f"MSE of the control less MSE of DSIC, horizon {horizon}", title_justify="left")
    for column in ("kept", "control", "difference", "standard error", "larger than noise"):
        table.add_column(column, justify="left" if column == "control" else "right")
    scores = {(run["name"], run["seed"]): run["mse"] for run in done if run["horizon"] == horizon}
    for keep in keeps:
        for control in SELECTIONS[1:]:
            pairs = [
                scores[f"{control} {keep:.0%}", seed] - scores[f"dsic {keep:.0%}", seed]
                for name, seed in scores
                if name == f"dsic {keep:.0%}" and (f"{control} {keep:.0%}", seed) in scores
            ]
            if len(pairs) > 1:
                error = float(np.std(pairs, ddof=1) / np.sqrt(len(pairs)))
                verdict = "yes" if abs(np.mean(pairs)) > 2 * error else "no"
                table.add_row(f"{keep:.0%}", control, f"{np.mean(pairs):+.5f}", f"{error:.5f}", verdict)
    console.print(table)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("heads", "selection"), help="which table")
    parser.add_argument("--data", type=Path, required=True, help="ETTh1.csv, also compressed")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--horizons", type=int, nargs="+", help="96 336 for heads, 96 for selection")
    parser.add_argument("--seeds", type=int, help="3 for heads, 5 for selection")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="learning rates: 3e-4 1e-3 3e-3 for heads, 3e-3 for selection"
    )
    parser.add_argument("--epochs", type=int, help="6 for heads, 4 for selection")
    parser.add_argument("--steps", type=int, help="an epoch: 50 for heads, 30 for selection")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pool", type=int, default=2048, help="training windows of a head that trains alone")
    parser.add_argument("--stride", type=int, default=24, help="steps between test windows")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="shares kept, for selection")
    parser.add_argument("--head", choices=KINDS, default="projection", help="head, for selection")
    arguments = parser.parse_args()
    heads = arguments.table == "heads"
    arguments.horizons = arguments.horizons or ([96, 336] if heads else [96])
    arguments.seeds = arguments.seeds or (3 if heads else 5)
    arguments.steps = arguments.steps or (50 if heads else 30)
    arguments.epochs = arguments.epochs or (6 if heads else 4)
    arguments.rates = arguments.rates or ([3e-4, 1e-3, 3e-3] if heads else [3e-3])
    warnings.simplefilter("ignore", UserWarning)
    frame, start = load(arguments.data)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{arguments.table}.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    finished = {(entry["name"], entry["horizon"], entry["seed"], entry["rate"]) for entry in done}
    for name, horizon, seed, rate, adapter in plan(arguments, done):
        if (name, horizon, seed, rate) in finished:
            continue
        finished.add((name, horizon, seed, rate))
        found = run(frame, start, horizon, seed, rate, adapter, arguments)
        done.append({"name": name, "horizon": horizon, "seed": seed, "rate": rate, **found})
        with file.open("a") as handle:
            handle.write(json.dumps(done[-1]) + "\n")
        sys.stderr.write(f"{name}, horizon {horizon}, seed {seed}, rate {rate:g}: MSE {found['mse']:.4f}\n")
    # Spelt out, so that a piped table is whole.
    console = Console(width=130)
    for horizon in arguments.horizons:
        report(done, horizon, console)
        if not heads:
            compare(done, horizon, arguments.keep, console)


if __name__ == "__main__":
    main()
