"""Pretrained models against simple baselines in finding anomalies.

    python examples/anomaly/compare.py --out FOLDER                          simulated series
    python examples/anomaly/compare.py --out FOLDER --ucr FILE --nab FOLDER  a series of the UCR archive, those of NAB

Each series has a clean part at its start: the training part that the UCR archive names, and the probationary part of
the Numenta Anomaly Benchmark, 15 % of at most 5,000 rows. Adapters and the isolation forest learn on it alone,
thresholds come from it, and the points after it are scored. MOMENT scores by masked reconstruction, Chronos-Bolt by the
residual of rolling forecasts, each zero-shot and with LoRA; without evidence on held-out clean data that LoRA is
better, zero-shot stays. All scores are smoothed alike. Nothing was chosen by looking at the labels. Steps are rows of
the files.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]
PROBATION = 0.15
SMOOTHING = 16
HORIZON = 16
CONTEXT = 504
THRESHOLD = {"name": "extreme", "risk": 1e-4, "level": 0.9}


@dataclass
class Labelled:
    """A series, the length of its clean part, and the first and last step of each anomaly."""

    name: str
    entry: dict[str, Any]
    clean: int
    windows: list[tuple[int, int]]

    @property
    def labels(self) -> NDArray[np.bool_]:
        found = np.zeros(len(self.entry["target"]), bool)
        for first, last in self.windows:
            found[first : last + 1] = True
        return found

    @property
    def training(self) -> list[dict[str, Any]]:
        return [{**self.entry, "target": self.entry["target"][: self.clean]}]


def read_ucr(path: Path, rows: int | None) -> Labelled:
    """Read a file of the UCR anomaly archive: value and label a line, the clean part in the name."""
    found = re.search(r"_(\d+)_(\d+)_(\d+)\.", path.name)
    if found is None:
        raise ValueError(f"{path.name} does not end in the three numbers of the UCR archive: train, begin, end")
    table = pd.read_csv(path, header=None, names=["value", "label"])
    clean = int(found.group(1))
    begin, end = (int(table.index[table["label"] > 0][at]) for at in (0, -1))
    if rows is not None:
        # The same anomaly with less before and behind it.
        first = max(0, begin - rows // 2)
        table, clean, begin, end = table[first : end + rows // 4], rows // 3, begin - first, end - first
    target = table["value"].to_numpy(np.float32)
    name = re.split(r"_\d+_\d+_\d+\.", path.name)[0].split("_")[-1]
    return Labelled(
        name, {"start": pd.Period("2000-01-01", "s"), "target": target, "item_id": name}, clean, [(begin, end)]
    )


def read_nab(folder: Path) -> Iterator[Labelled]:
    """Read the series of a folder of NAB and their windows from ``windows.json``."""
    for name, windows in sorted(json.loads((folder / "windows.json").read_text()).items()):
        path = next(path for path in (folder / name, folder / f"{name}.gz") if path.exists())
        table = pd.read_csv(path, parse_dates=["timestamp"])
        times = table["timestamp"]
        spans = []
        for begin, end in windows:
            inside = np.flatnonzero((times >= pd.Timestamp(begin)) & (times <= pd.Timestamp(end)))
            spans.append((int(inside[0]), int(inside[-1])))
        step = times.diff().median()
        entry = {
            "start": pd.Period(times[0], pd.tseries.frequencies.to_offset(step)),
            "target": table["value"].to_numpy(np.float32),
            "item_id": path.name.split(".")[0],
        }
        yield Labelled(entry["item_id"], entry, int(min(len(table), 5000) * PROBATION), spans)


def simulate(rows: int) -> Iterator[Labelled]:
    """Daily seasons with noise; one stretch of each is strange."""
    rng = np.random.default_rng(0)
    hours = np.arange(rows)
    begin = rows * 2 // 3
    for name in ("spikes", "shift", "flat", "frequency"):
        values = 50 + 10 * np.sin(2 * np.pi * hours / 24) + 3 * np.sin(2 * np.pi * hours / 168) + rng.normal(size=rows)
        part = slice(begin, begin + 36)
        if name == "spikes":
            values[begin : begin + 36 : 12] += 25
        elif name == "shift":
            values[part] += 8
        elif name == "flat":
            values[part] = values[begin] + 0.1 * rng.normal(size=36)
        else:
            values[part] = 50 + 10 * np.sin(2 * np.pi * hours[part] / 12) + rng.normal(size=36)
        entry = {"start": pd.Period("2024-01-01", "h"), "target": values.astype(np.float32), "item_id": name}
        yield Labelled(name, entry, rows // 3, [(begin, begin + 35)])


def rolling_zscore(series: Labelled) -> Floats:
    """Distance from the mean of the steps before, in their standard deviations."""
    values = pd.Series(series.entry["target"].astype(float))
    before = values.shift().rolling(CONTEXT, min_periods=32)
    scores: Floats = ((values - before.mean()).abs() / before.std().clip(lower=0.05 * values.std())).to_numpy()
    return scores


def isolation_forest(series: Labelled) -> Floats:
    """Isolation of the windows that a point lies in, from those of the clean part."""
    from sklearn.ensemble import IsolationForest

    windows = np.lib.stride_tricks.sliding_window_view(series.entry["target"], HORIZON)
    forest = IsolationForest(n_estimators=100, random_state=0).fit(windows[: series.clean - HORIZON])
    found = -forest.score_samples(windows)
    padded = np.pad(found, HORIZON - 1, constant_values=np.nan)
    scores: Floats = np.nanmean(np.lib.stride_tricks.sliding_window_view(padded, HORIZON), axis=1)
    return scores


def model_scores(
    family: str, checkpoint: str, options: dict[str, Any] | None
) -> Callable[[Labelled], tuple[Floats, str]]:
    """Return a function that scores a series with a pretrained model, with LoRA if there are training options."""

    def scores(series: Labelled) -> tuple[Floats, str]:
        from gluonts_peft import PeftPredictor, TuningDidNotHelp, get_estimator, load_backbone
        from gluonts_peft.anomaly import score

        if options is None:
            backbone = load_backbone(family, prediction_length=HORIZON, checkpoint=checkpoint, context_length=CONTEXT)
            predictor, note = PeftPredictor(backbone), ""
        else:
            held_out = series.clean // 5
            kind = get_estimator(family)
            reconstructs = "reconstruct" in kind.backbone_class.capabilities
            estimator = kind(
                prediction_length=HORIZON,
                context_length=CONTEXT,
                checkpoint=checkpoint,
                adapter="lora",
                validation_windows=max(1, held_out // HORIZON),
                progress=False,
                task="reconstruct" if reconstructs else "forecast",
                **options,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TuningDidNotHelp)
                if reconstructs:
                    predictor = estimator.train(series.training)
                else:
                    [whole] = series.training
                    part = {**whole, "target": whole["target"][: series.clean - held_out]}
                    predictor = estimator.train([part], [whole])
            note = "tuned" if predictor.backbone.adapter is not None else "no evidence"
        return score(predictor, [series.entry])[0].values, note

    return scores


def compare(series: Labelled, methods: dict[str, Callable[[Labelled], Any]]) -> Iterator[dict[str, Any]]:
    """Score a series by each method; a row a method."""
    from gluonts_peft.anomaly import Scores, evaluate, find_events, smooth, threshold, window_hits

    late = np.arange(len(series.labels)) >= series.clean
    for name, method in methods.items():
        start = time.perf_counter()
        found = method(series)
        values, note = found if isinstance(found, tuple) else (found, "")
        # By itself: a mean over its end would look at what comes after.
        limit = threshold(smooth(values[: series.clean], SMOOTHING), THRESHOLD)
        values = np.where(late, smooth(values, SMOOTHING), np.nan)
        events = find_events(Scores(series.name, series.entry["start"], values), limit, merge=CONTEXT // 4)
        top = int(np.nanargmax(values))
        yield {
            "series": series.name,
            "method": name,
            **evaluate(values, series.labels),
            "top": any(first - 100 <= top <= last + 100 for first, last in series.windows),
            **window_hits(events, series.windows),
            "adapter": note,
            "seconds": time.perf_counter() - start,
        }


def table(frame: pd.DataFrame) -> str:
    """Return a table in Markdown."""
    text = frame.copy()
    for column in text.columns:
        if text[column].dtype.kind == "f":
            digits = 1 if column == "seconds" else 3
            text[column] = [f"{value:.{digits}f}" for value in text[column]]
    rows = [text.columns, ["---"] * len(text.columns), *text.astype(str).to_numpy()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder for the results")
    parser.add_argument("--ucr", type=Path, help="a file of the UCR anomaly archive")
    parser.add_argument("--nab", type=Path, help="a folder with series of NAB and their windows.json")
    parser.add_argument(
        "--rows", type=int, default=None, help="fewer rows: of simulated series, and around the UCR one"
    )
    parser.add_argument("--epochs", type=int, default=5, help="epochs of LoRA at most; 0 leaves it out")
    parser.add_argument("--batches", type=int, default=40, help="steps of an epoch")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    everything: list[Labelled] = []
    if arguments.ucr is not None:
        everything.append(read_ucr(arguments.ucr, arguments.rows))
    if arguments.nab is not None:
        everything.extend(read_nab(arguments.nab))
    everything = everything or list(simulate(arguments.rows or 3000))

    training = (
        {"max_epochs": arguments.epochs, "num_batches_per_epoch": arguments.batches} if arguments.epochs else None
    )
    methods: dict[str, Callable[[Labelled], Any]] = {
        "rolling z-score": rolling_zscore,
        "isolation forest": isolation_forest,
    }
    for label, family, checkpoint in (("MOMENT", "moment", "moment-nano"), ("Chronos-Bolt", "chronos", "bolt-nano")):
        methods[f"{label}, zero-shot"] = model_scores(family, checkpoint, None)
        if training is not None:
            methods[f"{label}, LoRA"] = model_scores(family, checkpoint, training)
    rows: list[dict[str, Any]] = []
    for series in everything:
        for row in compare(series, methods):
            rows.append(row)
            # What is done is done, should a long run be stopped.
            pd.DataFrame(rows).to_csv(arguments.out / "scores.csv", index=False)
    frame = pd.DataFrame(rows)
    print(table(frame))  # noqa: T201
    means = frame.drop(columns=["series", "adapter"]).groupby("method", sort=False)
    summary = means[["roc_auc", "average_precision", "best_f1", "adjusted_best_f1"]].mean()
    summary = summary.join(means[["top", "hit", "missed", "false"]].sum()).join(means["seconds"].sum()).reset_index()
    summary.to_csv(arguments.out / "summary.csv", index=False)
    print(f"\nMeans and sums over {len(everything)} series:\n\n{table(summary)}")  # noqa: T201


if __name__ == "__main__":
    main()
