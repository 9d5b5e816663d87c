"""How well gaps are filled: a pretrained model against a line and the last value.

    python examples/anomaly/gaps.py                                  a simulated series with a daily season
    python examples/anomaly/gaps.py --data TABLE --target COLUMN     a column of a table with a column of time stamps

Gaps of one length are cut out of the last part of the series, far enough apart that each is filled from its own
window; the error is the mean absolute one at what was cut out, over the standard deviation of the series.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

GAPS = (1, 4, 8, 16, 32, 96)


def simulate(steps: int) -> Any:
    noise = np.random.default_rng(0).normal(0, 0.3, steps)
    return (10 + 3 * np.sin(2 * np.pi * np.arange(steps) / 24) + noise).astype(np.float32)


def main() -> None:
    from gluonts_peft import impute, load_backbone

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="table (.csv, .parquet) with a series")
    parser.add_argument("--timestamp", default="timestamp", help="column with the time stamps")
    parser.add_argument("--target", default="target", help="column with the values")
    parser.add_argument("--checkpoint", default="moment-nano", help="of MOMENT")
    parser.add_argument("--steps", type=int, default=6000, help="how much of the series to use, from its end")
    arguments = parser.parse_args()
    if arguments.data is None:
        truth = simulate(arguments.steps)
    else:
        from gluonts_peft.series.table import read_dataset

        columns = dict(item_id=None, timestamp=arguments.timestamp, target=arguments.target)
        [series] = read_dataset(arguments.data, **columns)
        truth = series["target"][-arguments.steps :]
    backbone = load_backbone("moment", prediction_length=1, checkpoint=arguments.checkpoint)
    print("| steps missing | model | line | last value |\n|---|---|---|---|")  # noqa: T201
    steps, rng = np.arange(len(truth)), np.random.default_rng(0)
    for gap in GAPS:
        target = truth.copy()
        for begin in range(300, len(truth) - 300, 300):
            first = begin + int(rng.integers(0, 8))
            target[first : first + gap] = np.nan
        missing = np.isnan(target)
        entry = {"start": pd.Period("2024-01-01", "h"), "target": target}
        fills = (
            impute(backbone, [entry])[0]["target"],
            np.interp(steps, steps[~missing], target[~missing]),
            target[np.maximum.accumulate(np.where(missing, 0, steps))],
        )
        scored = missing & ~np.isnan(truth)
        errors = [np.abs(fill - truth)[scored].mean() / np.nanstd(truth) for fill in fills]
        print(f"| {gap} | {' | '.join(f'{error:.3f}' for error in errors)} |")  # noqa: T201


if __name__ == "__main__":
    main()
