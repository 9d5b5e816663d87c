"""Measure what weights by item are worth: choose by the first part of each history, score on what comes after.

For hourly vital signs the first part of each stay of one pool of patients chooses, and the other pool the common
weight; for ETTh1 the columns choose. Compared are zero-shot, the common weight, and weights by item: where they are
proven better, as they are handed over, where they are better at all, in any case, and without shrinkage. Takes two
minutes of processor time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from models import pools, tuned

from gluonts_peft.items import choose_by_unit, judge_items
from gluonts_peft.keeper import mixed
from gluonts_peft.series.store import SeriesStore
from gluonts_peft.series.windows import Windows
from gluonts_peft.verdict import Candidate, Judge, judge

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
CONTEXT = {"stays": 72, "ETTh1": 336}


def last(entries: list[Any], horizon: int, context: int, windows: int) -> Any:
    store = SeriesStore.from_dataset(entries)
    return Windows(store, context_length=context, prediction_length=horizon, min_context=horizon).last(windows)


def cut(entries: list[Any], steps: int, least: int) -> list[Any]:
    """Leave the last steps of each series out, and series that have fewer than so many left."""
    found = [{**entry, "target": entry["target"][:-steps]} for entry in entries]
    return [entry for entry in found if len(entry["target"]) >= least and np.isfinite(entry["target"]).any()]


def by_window(found: Any, backbone: Any, states: list[Any], epoch: int) -> tuple[list[str], np.ndarray]:
    """Return the item of each window, and its score at each weight of an epoch."""
    scorer, rows = Judge(found, every=True), []
    for weight in WEIGHTS:
        backbone.adapter.load_state_dict(mixed(states[0], states[epoch + 1], weight))
        if weight == 0.0:
            scorer.start(backbone)
        rows.append(scorer.by_window(backbone))
    return [found.windows.store.item_ids[number] for number in found.series], np.stack(rows)


def common(found: Any, backbone: Any, states: list[Any]) -> tuple[int, float, str]:
    """Return epoch, weight and word of the verdict for all."""
    scorer = Judge(found)
    backbone.adapter.load_state_dict(states[0])
    zero, candidates = scorer.start(backbone), []
    for epoch, state in enumerate(states[1:]):
        for weight in WEIGHTS[1:]:
            backbone.adapter.load_state_dict(mixed(states[0], state, weight))
            candidates.append(Candidate(epoch, weight, scorer.score(backbone)))
    verdict = judge(zero, candidates)
    return verdict.epoch or 0, (verdict.weight or 0.0) if verdict.helped else 0.0, verdict.word


def compare(names: list[str], scores: np.ndarray, weight: float, later: tuple[list[str], np.ndarray]) -> dict[str, Any]:
    """Return what the items' windows say, and what it gives on later ones."""
    found, chosen = judge_items(scores, names, WEIGHTS, weight, "item")
    good = np.isfinite(scores).all(axis=0)
    order = list(dict.fromkeys(name for name, fine in zip(names, good, strict=True) if fine))
    units = np.array([order.index(name) for name, fine in zip(names, good, strict=True) if fine])
    windows = np.bincount(units)
    forced = choose_by_unit(scores[:, good], units, WEIGHTS.index(weight), len(order))
    means = np.stack([np.bincount(units, weights=row[good]) / windows for row in scores])
    own = {name: WEIGHTS[forced[number]] for number, name in enumerate(order)}
    rules = {
        "zero-shot": {},
        "common": dict.fromkeys(order, weight),
        "own if proven": {**dict.fromkeys(order, weight), **chosen},
        "own if better": own if (found.change or 0.0) < 0 else dict.fromkeys(order, weight),
        "own always": own,
        "unshrunk": {name: WEIGHTS[int(means[:, number].argmin())] for number, name in enumerate(order)},
    }
    totals: dict[str, dict[str, list[float]]] = {rule: {} for rule in rules}
    for column, name in enumerate(later[0]):
        row = later[1][:, column]
        if name in order and np.isfinite(row).all():
            for rule, weights in rules.items():
                at = WEIGHTS.index(weights.get(name, 0.0))
                totals[rule].setdefault(name, []).append(float(row[at]))
    result = {rule: float(np.mean([np.mean(those) for those in of.values()])) for rule, of in totals.items()}
    base = result["zero-shot"]
    left = float(np.mean([own[name] != weight for name in order]))
    return {
        "items": found.units,
        "windows": float(np.median(windows[windows > 2])) if found.units else 0.0,
        "word": found.word,
        "expected": found.change,
        "left": 100 * left,
        **{rule: 100 * (value / base - 1) for rule, value in result.items() if rule != "zero-shot"},
    }


def stays(options: Any) -> Iterator[tuple[str, Any]]:
    horizon = options.horizon
    for vital in ("hr", "map"):
        train, first, second = pools(options.data, options.patients, vital)
        for count in (20, None):
            backbone, states = tuned(train, dict(stays=count, rate=2e-3, r=2, shuffled=False), horizon)
            for validation, others in ((first, second), (second, first)):
                found = last(validation, horizon, CONTEXT["stays"], 1)
                epoch, weight, word = common(found, backbone, states)
                histories = cut(others, 2 * horizon, 4 * horizon)
                names, scores = by_window(last(histories, horizon, CONTEXT["stays"], 8), backbone, states, epoch)
                later = by_window(last(others, horizon, CONTEXT["stays"], 2), backbone, states, epoch)
                yield f"{vital}, {count or 'all'} stays ({word}, {weight:g})", compare(names, scores, weight, later)


def columns(path: Path) -> Iterator[tuple[str, Any]]:
    horizon, months = 24, 24 * 30
    frame = pd.read_csv(path)
    start = pd.Period(frame["date"][0], "h")
    series = {name: frame[name].to_numpy(np.float32)[: 20 * months] for name in frame.columns[1:]}
    until = {"train": 12 * months, "validation": 13 * months, "history": 16 * months, "test": 20 * months}
    parts = {
        part: [{"item_id": name, "start": start, "target": values[:end]} for name, values in series.items()]
        for part, end in until.items()
    }
    for rate in (5e-4, 2e-3):
        backbone, states = tuned(
            parts["train"], dict(stays=None, rate=rate, r=2, shuffled=False), horizon, CONTEXT["ETTh1"]
        )
        epoch, weight, word = common(last(parts["validation"], horizon, CONTEXT["ETTh1"], 30), backbone, states)
        names, scores = by_window(last(parts["history"], horizon, CONTEXT["ETTh1"], 90), backbone, states, epoch)
        later = by_window(last(parts["test"], horizon, CONTEXT["ETTh1"], 120), backbone, states, epoch)
        yield f"ETTh1, rate {rate:g} ({word}, {weight:g})", compare(names, scores, weight, later)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="hourly vital signs, a Parquet table")
    parser.add_argument("--patients", type=Path, help="table that maps stays to patients, e.g. patient.csv.gz")
    parser.add_argument("--ett", type=Path, help="ETTh1.csv.gz")
    parser.add_argument("--horizon", type=int, default=6, help="hours to forecast of a stay")
    parser.add_argument("--out", type=Path, required=True, help="file for the table, in Markdown")
    options = parser.parse_args()
    rules = ("common", "own if proven", "own if better", "own always", "unshrunk")
    header = ("data (verdict and weight for all)", "items", "windows each", "by item", "expected", "leave", *rules)
    lines = [" | ".join(header), "|".join(["---", *["--:"] * (len(header) - 1)])]
    rows = []
    for name, row in (*stays(options), *(columns(options.ett) if options.ett else ())):
        rows.append((name, row))
        print(name, row, flush=True)  # noqa: T201
        expected = "" if row["expected"] is None else f"{row['expected']:+.2f} %"
        cells = [name, str(row["items"]), f"{row['windows']:g}", row["word"], expected, f"{row['left']:.0f} %"]
        lines.append(" | ".join([*cells, *(f"{row[rule]:+.2f} %" for rule in rules)]))
    means = {rule: np.mean([row[rule] for _, row in rows]) for rule in rules}
    lines.append(" | ".join(["mean", *[""] * 5, *(f"{means[rule]:+.2f} %" for rule in rules)]))
    text = "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)  # noqa: T201
    if means["own if proven"] > means["common"] + 0.1:
        raise SystemExit("weights by item are worse than the common one")


if __name__ == "__main__":
    main()
