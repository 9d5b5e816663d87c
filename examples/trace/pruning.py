"""Does DSIC know which LoRA modules matter? Prune a trained adapter, by DSIC and by others, and forecast.

    python examples/trace/pruning.py --data eicu_demo_hourly.parquet --patients patient.csv.gz

Trains `trace` with all modules on on mean arterial pressure (`bolt-nano`, horizon 12), and at the end keeps half or a
tenth of the modules, without a further step and after a short remainder of training (20 steps of 200). Windows for
scoring and those of the table are of other patients than the training's. Each choice is by the loss on scoring windows,
but for `oracle`, which looks at the table's. About three minutes on one core.

- dsic, all_on: the importance of a gate, under random masks and with everything on, as the adapter scores it
- leave-one-out: how much the loss grows without the module
- oracle: the same on the windows of the table, which no rule can know
- size of BA: the Frobenius norm of the change of the weights
- random: several draws; mean and standard deviation
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from gluonts_peft import get_adapter, get_estimator
from gluonts_peft.data import split_by_item
from gluonts_peft.series.store import SeriesStore
from gluonts_peft.series.windows import Windows
from gluonts_peft.training import mean_loss, to_device
from gluonts_peft.verdict import quantile_scores, scale
from gluonts_peft.vitals import load_hourly, patient_of

HORIZON, CONTEXT, BATCH = 12, 72, 32
LENGTHS: dict[str, Any] = dict(context_length=CONTEXT, prediction_length=HORIZON, min_context=HORIZON)
# Of a tenth of the modules a simulation has three on: as many simulations more, so that each is on about as often.
SIMULATIONS = {0.5: 8, 0.1: 40}


class _Last(Callback):  # type: ignore[misc]
    """Keeps the adapter as the training ends, gates and all."""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.state = {name: tensor.detach().clone() for name, tensor in module.adapter.state_dict().items()}


def parts_of(path: Path, patients: Path | None) -> list[list[Any]]:
    """Return stays to train on, to score modules on and to test on; no patient is in two of them."""
    entries = load_hourly(path, min_hours=36, vitals=("map",), patients=patients)
    units = [{"item_id": name} for name in sorted({patient_of(entry["item_id"]) for entry in entries})]
    divided = split_by_item(units, fractions=(0.4, 0.2, 0.4), seed=0)
    part = {each["item_id"]: number for number, those in enumerate(divided) for each in those}
    found: list[list[Any]] = [[] for _ in divided]
    for entry in entries:
        found[part[patient_of(entry["item_id"])]].append(entry)
    return found


class Experiment:
    """One trained adapter, with the names and states of its modules."""

    def __init__(self, parts: list[list[Any]], seed: int, steps: int) -> None:
        self.seed, last = seed, _Last()
        predictor = get_estimator("chronos")(
            **{"prediction_length": HORIZON, "context_length": CONTEXT, "checkpoint": "bolt-nano"},
            adapter={"name": "trace", "keep": 1.0},
            max_epochs=4,
            num_batches_per_epoch=steps // 4,
            batch_size=BATCH,
            patience=0,
            gate="keep",
            seed=seed,
            progress=False,
            trainer_kwargs={"callbacks": [last]},
            unusable="skip",
        ).train(parts[0], parts[1][:40])
        self.state, self.names = last.state, predictor.fit.report["modules"]
        stores = [SeriesStore.from_dataset(part) for part in parts]
        self.train = Windows(stores[0], seed=seed, **LENGTHS)
        scoring = Windows(stores[1], **LENGTHS).last(windows=4)
        order = np.random.default_rng(seed).permutation(len(scoring))
        self.scoring = [scoring.windows.read(*pair) for pair in self._batches(scoring, order)]
        test = Windows(stores[2], **LENGTHS).last()
        self.test = [test.windows.read(*pair) for pair in self._batches(test, np.arange(len(test)))]
        pairs = zip(test.series, test.cuts, strict=True)
        self.scales = np.stack([scale(stores[2].series(series)[:cut], 24) for series, cut in pairs])
        self.backbone, self.adapter = self._model(1.0)
        self.without = {name: self.alone_out(those) for name, those in (("scoring", self.scoring), ("test", self.test))}

    @staticmethod
    def _batches(windows: Any, order: Any) -> Iterable[tuple[Any, Any]]:
        for begin in range(0, len(order), 256):
            yield windows.series[order[begin : begin + 256]], windows.cuts[order[begin : begin + 256]]

    def _model(self, keep: float, **options: Any) -> tuple[Any, Any]:
        """Return a model with an adapter that is about to select, in the state at the end of the training."""
        backbone = get_estimator("chronos")(
            prediction_length=HORIZON, context_length=CONTEXT, checkpoint="bolt-nano"
        ).load_backbone()
        spec = {"name": "trace", "keep": keep, "schedule": 1, "alpha_steps": 1, **options}
        adapter = get_adapter(spec).attach(backbone)
        adapter.load_state_dict(self.state)
        return backbone, adapter

    def only(self, kept: Iterable[str]) -> dict[str, Any]:
        """Return the state in which the gates of all other modules are shut."""
        gates = {f"base_model.model.{name}.gate" for name in set(self.names) - set(kept)}
        return {name: torch.zeros_like(tensor) if name in gates else tensor for name, tensor in self.state.items()}

    def loss(self, kept: Iterable[str], batches: list[Any]) -> float:
        self.adapter.load_state_dict(self.only(kept))
        return mean_loss(self.backbone, batches)

    def score(self) -> tuple[float, float]:
        """Return the scaled quantile loss on the test windows and the loss of the family, of the model as it is."""
        values = []
        with self.backbone.reading() as reader:
            for batch in self.test:
                past = {name: value for name, value in batch.items() if not name.startswith("future_")}
                found = reader.forecast(to_device(past, reader.device))
                values.append(found.values.double().numpy())
        label, seen = (
            np.concatenate([b[name] for b in self.test]) for name in ("future_target", "future_observed_values")
        )
        scores = quantile_scores(np.concatenate(values), found.levels, label, seen, self.scales)
        return float(np.nanmean(scores)), mean_loss(self.backbone, self.test)

    def selected(self, selection: str, keep: float, draw: int = 0) -> tuple[list[str], list[float]]:
        """Return what the adapter keeps, and the importance of all modules."""
        simulations = SIMULATIONS[keep]
        _, adapter = self._model(keep, selection=selection, simulations=simulations)
        adapter.prepare(2)
        whole = {name: np.concatenate([batch[name] for batch in self.scoring]) for name in self.scoring[0]}
        # Another draw of masks sees other windows.
        those = slice(draw * 8 * simulations, (draw + 1) * 8 * simulations)
        batch = to_device({name: values[those] for name, values in whole.items()}, torch.device("cpu"))
        adapter.score_on([batch], adapter.attached.loss)
        torch.manual_seed(1000 * self.seed + draw)
        adapter.after_step(0)
        return adapter.kept, adapter.report()["rounds"][0]["importance"]

    def sizes(self) -> list[float]:
        def of(name: str) -> float:
            a, b, gate = (
                self.state[f"base_model.model.{name}.{part}"] for part in ("lora_A.weight", "lora_B.weight", "gate")
            )
            return float((gate * (b @ a)).norm())

        return [of(name) for name in self.names]

    def alone_out(self, batches: list[Any]) -> list[float]:
        """Return the loss without each module."""
        return [self.loss([other for other in self.names if other != name], batches) for name in self.names]

    def retrain(self, kept: Iterable[str], steps: int) -> None:
        """Train what is kept a little further, its gates fixed, at a rate that falls to 0."""
        self.adapter.load_state_dict(self.only(kept))
        parameters = [p for name, p in self.backbone.named_parameters() if ".lora_" in name and p.requires_grad]
        rate = self.adapter.learning_rate / 2
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        self.backbone.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            batch = to_device(self.train.sample(100_000 + step, BATCH), self.backbone.device)
            optimizer.zero_grad()
            self.backbone.loss(batch).mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        self.backbone.eval()

    def result(self, kept: Iterable[str], remainder: int) -> tuple[float, float]:
        if remainder:
            self.retrain(kept, remainder)
        else:
            self.adapter.load_state_dict(self.only(kept))
        return self.score()

    def choices(self, keep: float, draws: int) -> tuple[dict[str, list[list[str]]], float]:
        """Return of each rule what it keeps, once or in several draws, and how well two draws of DSIC agree."""
        count = max(1, round(keep * len(self.names)))

        def largest(values: list[float]) -> list[list[str]]:
            return [[self.names[number] for number in np.argsort(values)[::-1][:count]]]

        dsic, importance = self.selected("dsic", keep)
        _, again = self.selected("dsic", keep, draw=1)
        rng = np.random.default_rng(self.seed)
        found = {
            "dsic": [dsic],
            "all_on": [self.selected("all_on", keep)[0]],
            "leave-one-out": largest(self.without["scoring"]),
            "oracle": largest(self.without["test"]),
            "size of BA": largest(self.sizes()),
            "random": [list(rng.choice(self.names, count, replace=False)) for _ in range(draws)],
        }
        return found, float(spearmanr(importance, again).statistic)


def summary(results: Mapping[str, list[list[tuple[float, float]]]]) -> list[list[str]]:
    """Return a row a rule: means over seeds; of several draws their standard deviation within a seed."""
    rows = []
    chance = np.array(results["random"])[..., 0]
    for rule, found in results.items():
        values = np.array(found)
        spread = values[..., 0].std(axis=1, ddof=1).mean() if values.shape[1] > 1 else None
        score = f"{values[..., 0].mean():.4f}" + ("" if spread is None else f" ± {spread:.4f}")
        better = (chance.mean(axis=1) - values[..., 0].mean(axis=1)) / chance.std(axis=1, ddof=1)
        # The spread of a draw is known only of what was drawn.
        sds = "" if rule in ("random", "zero-shot", "all on") else f"{better.mean():+.1f}"
        rows.append([rule, score, f"{values[..., 1].mean():.3f}", sds])
    return rows


def one_seed(seed: int, options: argparse.Namespace) -> tuple[dict[Any, Any], dict[float, float], int, int]:
    """Return the scores of a seed by setting and rule, how well two draws of DSIC agree, and counts for the print."""
    torch.set_num_threads(1)
    one = Experiment(parts_of(options.data, options.patients), seed, options.steps)
    results: dict[Any, Any] = {}
    agreement = {}
    for keep in SIMULATIONS:
        choices, agreement[keep] = one.choices(keep, options.draws)
        for remainder in (0, options.remainder):
            rules = {"zero-shot": [[]], "all on": [one.names], **choices}
            results[keep, remainder] = {
                rule: [one.result(kept, 0 if rule == "zero-shot" else remainder) for kept in those]
                for rule, those in rules.items()
            }
    return results, agreement, len(one.names), len(one.scales)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="hourly vital signs, a Parquet table")
    parser.add_argument("--patients", type=Path, help="table that maps stays to patients, e.g. patient.csv.gz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of the training")
    parser.add_argument("--remainder", type=int, default=20, help="steps after pruning")
    parser.add_argument("--draws", type=int, default=8, help="of random modules")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at the same time")
    options = parser.parse_args()
    began = time.perf_counter()
    with ProcessPoolExecutor(options.jobs) as workers:
        done = list(workers.map(one_seed, range(options.seeds), [options] * options.seeds))
    results: dict[tuple[float, int], dict[str, list[Any]]] = {}
    for found, *_ in done:
        for setting, rules in found.items():
            for rule, scores in rules.items():
                results.setdefault(setting, {}).setdefault(rule, []).append(scores)
    _, _, modules, windows = done[0]
    console = Console(width=120)
    for (keep, remainder), found in results.items():
        after = f"after {remainder} more steps" if remainder else "without a further step"
        table = Table(title=f"{round(keep * modules)} of {modules} modules kept, {after}")
        table.add_column("kept by")
        for name in ("scaled quantile loss", "loss of the family", "better than random, sd"):
            table.add_column(name, justify="right")
        for row in summary(found):
            table.add_row(*row)
        console.print(table)
    for keep in SIMULATIONS:
        agree = np.mean([each[1][keep] for each in done])
        console.print(f"two draws of DSIC at {keep:.0%} agree with a rank correlation of {agree:.2f}")
    console.print(f"{options.seeds} seeds, {windows} test windows, {time.perf_counter() - began:.0f} seconds")


if __name__ == "__main__":
    main()
