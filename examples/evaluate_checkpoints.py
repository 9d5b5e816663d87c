"""Score the bundled checkpoints zero-shot on real data that the repository does not hold.

    python examples/evaluate_checkpoints.py --ett ETTh1.csv.gz --vitals eicu_demo_hourly.parquet [bolt-nano ...]

Two questions, both answered by a ratio below 1: is the model better than seasonal naive on the seven channels of ETTh1
(geometric mean of MASE ratios, horizon 48, season 24), and better than the last value on hourly ICU vitals (MAE,
horizon 12)? The figures in the model cards come from this program.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
import pandas as pd
from gluonts.dataset.pandas import PandasDataset
from rich.console import Console
from rich.table import Table

from gluonts_peft import PeftPredictor, backtest, load_backbone
from gluonts_peft.backtesting import SeasonalNaive
from gluonts_peft.vitals import load_hourly

CHANNELS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")


def ett(predictor: Any, path: str, windows: int) -> float:
    """Return the geometric mean over the channels of MASE relative to seasonal naive's."""
    frame = pd.read_csv(path, parse_dates=["date"]).set_index("date")
    ratios = []
    for channel in CHANNELS:
        dataset = PandasDataset(frame[[channel]].rename(columns={channel: "target"}), freq="h")
        model = backtest(predictor, dataset, windows=windows, seasonality=24)
        naive = backtest(SeasonalNaive(48, 24), dataset, windows=windows, seasonality=24)
        ratios.append(model["MASE[0.5]"].iloc[0] / naive["MASE[0.5]"].iloc[0])
    return float(np.exp(np.mean(np.log(ratios))))


def recent(stays: list[Any], horizon: int = 12, windows: int = 2, hours: int = 48) -> list[Any]:
    """Leave out stays in which a model that sees 48 hours would see nothing before one of the last windows."""

    def seen(target: Any) -> bool:
        ends = [len(target) - horizon * window for window in range(1, windows + 1)]
        return all(np.isfinite(target[max(end - hours, 0) : end]).any() for end in ends if end > 0)

    return [stay for stay in stays if seen(stay["target"])]


def vitals(predictor: Any, path: str, vital: str) -> tuple[float, float]:
    """Return the MAE of the model and of the last value, over the last two windows of 12 hours of each stay."""
    dataset = recent(load_hourly(path, vitals=(vital,)))
    return tuple(  # type: ignore[return-value]
        backtest(each, dataset, windows=2)["MAE[0.5]"].iloc[0] for each in (predictor, SeasonalNaive(12))
    )


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=["bolt-nano", "t5-nano"])
    parser.add_argument("--family", default="chronos")
    parser.add_argument("--ett", help="ETTh1.csv or .csv.gz")
    parser.add_argument("--vitals", help="hourly vitals, wide parquet")
    parser.add_argument("--windows", type=int, default=20, help="rolling windows a channel of ETTh1")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    table = Table("checkpoint", "data", "score", "model", "baseline", "ratio")
    for checkpoint in arguments.checkpoints:
        if arguments.ett:
            backbone = load_backbone(arguments.family, checkpoint=checkpoint, prediction_length=48)
            ratio = ett(PeftPredictor(backbone), arguments.ett, arguments.windows)
            table.add_row(checkpoint, "ETTh1, 7 channels", "MASE, seasonal naive", "", "", f"{ratio:.3f}")
        for vital in ("hr", "map") if arguments.vitals else ():
            backbone = load_backbone(arguments.family, checkpoint=checkpoint, prediction_length=12)
            model, last = vitals(PeftPredictor(backbone), arguments.vitals, vital)
            table.add_row(
                checkpoint, f"ICU {vital}", "MAE, last value", f"{model:.3f}", f"{last:.3f}", f"{model / last:.3f}"
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
