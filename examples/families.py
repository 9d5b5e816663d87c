"""Zero-shot against LoRA for every bundled checkpoint of every installed family, on hourly ICU vitals.

    python examples/families.py eicu_demo_hourly.parquet --patients patient.csv.gz [--checkpoints bolt-nano] [--seeds 3]

Each checkpoint is tuned on 70 per cent of the patients (without --patients: of the stays), stops early on 10 per cent,
and is scored on the rest: mean absolute error, horizon 12, the last two windows of each stay. A ratio below 1 is better
than the last value. MOMENT has no zero-shot forecast; its forecasting head is trained along with LoRA, and alone
(linear probing) for comparison.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from typing import Any

import numpy as np
from evaluate_checkpoints import recent
from rich.console import Console
from rich.table import Table

from gluonts_peft import PeftPredictor, backtest, get_estimator, list_families
from gluonts_peft.backtesting import SeasonalNaive
from gluonts_peft.series.table import split_by_item
from gluonts_peft.vitals import load_hourly, patient_of

HORIZON = 12


def score(predictor: Any, dataset: Any) -> float:
    """Return the MAE over the last two windows of each series."""
    return float(backtest(predictor, dataset, windows=2)["MAE[0.5]"].iloc[0])


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vitals", help="hourly vitals, wide parquet")
    parser.add_argument("--patients", help="table that maps stays to patients, such as eICU's patient.csv.gz")
    parser.add_argument("--checkpoints", nargs="*", help="default: all that are bundled")
    parser.add_argument("--vital", nargs="*", default=["hr", "map"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batches", type=int, default=40, help="steps of an epoch")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    console = Console(width=130)
    table = Table(
        "family", "checkpoint", "vital", "last value", "adapter", "parameters", "zero-shot", "tuned", "seconds"
    )
    for vital in arguments.vital:
        stays = recent(load_hourly(arguments.vitals, vitals=(vital,), patients=arguments.patients))
        training, validation, test = split_by_item(stays, fractions=(0.7, 0.1, 0.2), key=patient_of)
        last = score(SeasonalNaive(HORIZON), test)
        for family in list_families():
            estimator_class = get_estimator(family)
            for checkpoint in estimator_class.backbone_class.bundled():
                if arguments.checkpoints and checkpoint not in arguments.checkpoints:
                    continue
                base = estimator_class(prediction_length=HORIZON, checkpoint=checkpoint).load_backbone()
                zero_shot = "none" if base.untrained else f"{score(PeftPredictor(base), test) / last:.3f}"
                for adapter in ("lora", "head") if base.untrained else ("lora",):
                    ratios, started = [], time.perf_counter()
                    for seed in range(arguments.seeds):
                        predictor = estimator_class(
                            prediction_length=HORIZON,
                            checkpoint=checkpoint,
                            adapter=adapter,
                            max_epochs=arguments.epochs,
                            num_batches_per_epoch=arguments.batches,
                            validation_windows=2,
                            gate="keep",
                            seed=seed,
                        ).train(training, validation)
                        ratios.append(score(predictor, test) / last)
                    tuned = f"{np.mean(ratios):.3f}" + (f" ±{np.std(ratios):.3f}" if len(ratios) > 1 else "")
                    seconds = (time.perf_counter() - started) / arguments.seeds
                    attached = predictor.backbone.adapter
                    table.add_row(
                        *(family, checkpoint, vital, f"{last:.3f}", repr(attached)),
                        *(f"{attached.num_parameters():,}", zero_shot, tuned, f"{seconds:.0f}"),
                    )
    console.print(table)


if __name__ == "__main__":
    main()
