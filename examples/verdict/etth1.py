"""Ask on ETTh1 whether the verdict turns down models whose gain on later months is real.

    python examples/verdict/etth1.py --data ETTh1.csv.gz

ETTh1 (Zhou et al. 2021, https://github.com/zhouhaoyi/ETDataset): seven channels, hourly, each a series of its own;
``bolt-nano``, context 336, horizon 24. Twelve months of 30 days to tune on, then four to judge by, whose windows are 24
hours apart, then four to test on. Five ways to tune, each with several seeds. A gain on the test months is called real
if the 90 % interval of the mean change of the scaled quantile loss lies below 0, by resampling weeks (a week is one
observation: its days and channels go together). The gate of version 0.1, the lowest family loss of any epoch, stands
beside the verdict. Takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from models import losses, tuned_states
from rich.console import Console
from rich.table import Table

from gluonts_peft import get_estimator
from gluonts_peft.keeper import mixed
from gluonts_peft.series.store import SeriesStore
from gluonts_peft.series.windows import Windows
from gluonts_peft.verdict import Judge

HORIZON, CONTEXT, DAYS = 24, 336, 120
MONTH = 720
SETTINGS: dict[str, tuple[Any, float]] = {
    "lora, r=2, 5e-4": ({"name": "lora", "r": 2}, 5e-4),
    "lora, r=2, 2e-3": ({"name": "lora", "r": 2}, 2e-3),
    "lora, r=8, 2e-3": ({"name": "lora", "r": 8}, 2e-3),
    "layernorm": ("layernorm", 2e-3),
    "fourierft": ("fourierft", 1e-2),
}


def channels(path: Path, months: int) -> list[dict[str, Any]]:
    """Return the first months of each channel."""
    frame = pd.read_csv(path, parse_dates=["date"]).set_index("date")
    start = pd.Period(frame.index[0], freq="h")
    return [
        {"item_id": name, "start": start, "target": column.to_numpy(np.float32)[: months * MONTH]}
        for name, column in frame.items()
    ]


class Months:
    """The windows of the last four months of each channel, and what models lose on them."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        store = SeriesStore.from_dataset(entries)
        windows = Windows(store, context_length=CONTEXT, prediction_length=HORIZON, min_context=CONTEXT)
        self.windows = windows.last(windows=DAYS, max_windows=DAYS * len(entries))
        self.judge = Judge(self.windows, every=True)

    def loss(self, backbone: Any) -> float:
        return float(losses(backbone, self.windows).mean())

    def score(self, backbone: Any, *, first: bool = False) -> np.ndarray:
        """Return the scaled quantile loss of each day, over all channels; zero-shot comes first."""
        if first:
            self.judge.start(backbone)
        days = np.unique(self.windows.cuts, return_inverse=True)[1]
        scores: np.ndarray = np.bincount(days, self.judge.by_window(backbone)) / np.bincount(days)
        return scores


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the 90 % interval of the mean by resampling weeks."""
    weeks = differences[: len(differences) // 7 * 7].reshape(-1, 7).mean(axis=1)
    draws = np.random.default_rng(0).integers(len(weeks), size=(10_000, len(weeks)))
    low, high = np.quantile(weeks[draws].mean(axis=1), (0.05, 0.95))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="ETTh1.csv or ETTh1.csv.gz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="steps an epoch")
    options = parser.parse_args()
    validation, test = Months(channels(options.data, 16)), Months(channels(options.data, 20))
    base = get_estimator("chronos")(HORIZON, CONTEXT, checkpoint="bolt-nano").load_backbone()
    base_loss, before = validation.loss(base), test.score(base, first=True)
    table = Table(title="ETTh1, horizon 24: changes against zero-shot, scaled quantile loss")
    for column in ("model", "tuned: test", "real?", "gate of 0.1", "verdict", "handed over: test"):
        table.add_column(column, justify="left" if column in ("model", "verdict") else "right")
    real = {"verdict": [0, 0], "gate of 0.1": [0, 0]}
    for name, (adapter, rate) in SETTINGS.items():
        for seed in range(options.seeds):
            estimator = get_estimator("chronos")(
                HORIZON,
                CONTEXT,
                checkpoint="bolt-nano",
                adapter=adapter,
                learning_rate=rate,
                max_epochs=options.epochs,
                num_batches_per_epoch=options.steps,
                validation_windows=DAYS,
                patience=0,
                gate="keep",
                seed=seed,
                device="cpu",
                progress=False,
            )
            predictor, states = tuned_states(estimator, channels(options.data, 12), channels(options.data, 16))
            backbone, verdict = predictor.backbone, predictor.verdict
            found = []
            for state in states[1:]:
                backbone.adapter.load_state_dict(state)
                found.append(validation.loss(backbone))
            best = int(np.argmin(found))
            backbone.adapter.load_state_dict(states[1 + best])
            change = 100 * (test.score(backbone) - before) / before.mean()
            handed = 0.0
            if verdict.helped:
                backbone.adapter.load_state_dict(mixed(states[0], states[1 + verdict.epoch], verdict.weight))
                handed = float(100 * (test.score(backbone) - before).mean() / before.mean())
            low, high = interval(change)
            passed = found[best] < base_loss
            if high < 0:
                for rule, kept in (("verdict", verdict.helped), ("gate of 0.1", passed)):
                    real[rule][0] += not kept
                    real[rule][1] += 1
            table.add_row(
                f"{name}, seed {seed}",
                f"{change.mean():+.2f} ({low:+.2f} to {high:+.2f}) %",
                "gain" if high < 0 else "loss" if low > 0 else "",
                f"{100 * (found[best] / base_loss - 1):+.2f} %, {'passed' if passed else 'rejected'}",
                str(verdict).replace("scaled quantile loss ", "").replace(" against zero-shot", ""),
                f"{handed:+.2f} %",
            )
    console = Console(width=200)
    console.print(table)
    for rule, (rejected, count) in real.items():
        console.print(f"{rule}: {rejected} of {count} models whose test gain is real are turned down")


if __name__ == "__main__":
    main()
