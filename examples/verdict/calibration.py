"""Do calibrated intervals hold as many labels as they say, on patients that nobody has seen?

    python examples/verdict/calibration.py --data eicu_demo_hourly.parquet --patients patient.csv.gz

Patients are divided into three parts. Each part in turn is unseen; a hundred stays of the others tune an adapter, the
rest of them are validation data, of which one half chooses epoch and weight and the other calibrates. The last twelve
hours of each unseen stay are scored with the calibration and without. Ends with an error if the 80 % interval of a
model holds less than 78 or more than 82 % of the labels afterwards.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from gluonts.ev.metrics import Coverage, MeanWeightedSumQuantileLoss

from gluonts_peft import get_estimator
from gluonts_peft.backtesting import QUANTILE_LEVELS, backtest
from gluonts_peft.data import split_by_item
from gluonts_peft.vitals import load_hourly, patient_of

FAMILIES = {
    "bolt-nano": "chronos",
    "chronos2-nano": "chronos",
    "moirai-nano": "moirai",
    "lag-llama-nano": "lag-llama",
}
PARTS, TRAINING = 3, 100
WQL = "mean_weighted_sum_quantile_loss"


def parts_of(entries: list[Any]) -> list[list[Any]]:
    """Return the stays in parts; no patient is in two of them."""
    patients = [{"item_id": name} for name in sorted({patient_of(entry["item_id"]) for entry in entries})]
    divided = split_by_item(patients, fractions=(1 / PARTS,) * PARTS, seed=0)
    part = {each["item_id"]: number for number, those in enumerate(divided) for each in those}
    found: list[list[Any]] = [[] for _ in divided]
    for entry in entries:
        found[part[patient_of(entry["item_id"])]].append(entry)
    return found


def scores(predictor: Any, test: list[Any], *, per_window: bool = False) -> pd.DataFrame:
    metrics = [MeanWeightedSumQuantileLoss(QUANTILE_LEVELS), *map(Coverage, QUANTILE_LEVELS)]
    return backtest(predictor, test, metrics=metrics, unusable="skip", per_window=per_window)


def inside(frame: Any) -> Any:
    return 100 * (frame[f"coverage[{QUANTILE_LEVELS[-1]}]"] - frame[f"coverage[{QUANTILE_LEVELS[0]}]"])


def measure(checkpoint: str, parts: list[list[Any]], seed: int) -> dict[str, Any]:
    """Tune, calibrate and score, with each part unseen in turn."""
    rows: list[dict[str, float]] = []
    windows: list[pd.DataFrame] = []
    for number, test in enumerate(parts):
        others = [entry for other, part in enumerate(parts) if other != number for entry in part]
        patients = sorted({patient_of(entry["item_id"]) for entry in others})
        order = np.random.default_rng(number).permutation(len(patients))
        first = {patients[position] for position in order[:TRAINING]}
        train = [entry for entry in others if patient_of(entry["item_id"]) in first]
        predictor = get_estimator(FAMILIES[checkpoint])(
            prediction_length=12,
            context_length=72,
            checkpoint=checkpoint,
            adapter="lora",
            max_epochs=2,
            num_batches_per_epoch=30,
            calibrate=True,
            verdict_unit="patients",
            gate="keep",
            unusable="skip",
            seed=seed,
            progress=False,
        ).train(train, [entry for entry in others if patient_of(entry["item_id"]) not in first])
        calibration = predictor.calibration
        after, each = scores(predictor, test).iloc[0], scores(predictor, test, per_window=True)
        predictor.calibration = None
        before = scores(predictor, test).iloc[0]
        windows.append(each.reset_index())
        rows.append(
            {
                "before": inside(before),
                "after": inside(after),
                "WQL before": before[WQL],
                "WQL after": after[WQL],
                "units": calibration.units,
                "windows": len(each),
            }
        )
    frame = pd.DataFrame(rows)
    mean = {name: float(np.average(frame[name], weights=frame["windows"])) for name in frame}
    every = pd.concat(windows)
    by_patient = inside(every).groupby(every["item_id"].map(patient_of)).mean()
    return {**mean, "error": float(by_patient.std() / np.sqrt(len(by_patient)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="hourly vital signs, a Parquet table")
    parser.add_argument("--patients", type=Path, help="table that maps stays to patients, e.g. patient.csv.gz")
    parser.add_argument("--checkpoints", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES)[:3])
    parser.add_argument("--vitals", nargs="+", default=["hr", "map"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    columns = "model | vital | calibrated by | inside before | inside after | WQL before | WQL after | seconds"
    print(f"| {columns} |\n|---|---|--:|--:|--:|--:|--:|--:|", flush=True)  # noqa: T201
    wrong = []
    for vital in options.vitals:
        entries = load_hourly(options.data, min_hours=36, vitals=(vital,), patients=options.patients)
        parts = parts_of(entries)
        for checkpoint in options.checkpoints:
            began = time.perf_counter()
            found = measure(checkpoint, parts, options.seed)
            print(  # noqa: T201
                f"| `{checkpoint}` | {vital} | {found['units']:.0f} | {found['before']:.1f} % | {found['after']:.1f} ±"
                f" {found['error']:.1f} % | {found['WQL before']:.5f} | {found['WQL after']:.5f} |"
                f" {time.perf_counter() - began:.0f} |",
                flush=True,
            )
            if not 78 <= found["after"] <= 82:
                wrong.append(f"{checkpoint} on {vital}: {found['after']:.1f} %")
    if wrong:
        sys.exit(f"the 80 % interval does not hold 78 to 82 % of the labels: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
