"""Tune many models and keep the scores of each, window by window, so that rules can be compared without a model.

18 models a vital sign (5, 20, 100 or all stays, two rates, two ranks; two on series whose hours were shuffled) and 16
sets of five tiny random changes of the weights, which mean nothing. Each is scored on two pools of stays of patients
that it was not tuned on: after each epoch, at weights between zero-shot and tuned, in three ways of mixing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from gluonts_peft import get_adapter, get_estimator
from gluonts_peft.data import split_by_item
from gluonts_peft.keeper import mixed as interpolated
from gluonts_peft.series.store import SeriesStore
from gluonts_peft.series.windows import Windows
from gluonts_peft.training import to_device
from gluonts_peft.verdict import LEVELS, quantile_scores, scale
from gluonts_peft.vitals import load_hourly, patient_of

HORIZON, CONTEXT, EPOCHS, STEPS = 12, 72, 5, 40
WEIGHTS = (0.25, 0.5, 0.75, 1.0)
MIXTURES = ("parameters", "scaled B", "quantiles")
NULLS = 16


def pools(path: Path, patients: Path | None, vital: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Return stays to tune on and two pools to score on; no patient is in two of them."""
    entries = load_hourly(path, min_hours=36, vitals=(vital,), patients=patients)
    units = [{"item_id": unit} for unit in sorted({patient_of(entry["item_id"]) for entry in entries})]
    part = {
        unit["item_id"]: number
        for number, those in enumerate(split_by_item(units, fractions=(0.3, 0.35, 0.35), seed=0))
        for unit in those
    }
    found: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for entry in entries:
        found[part[patient_of(entry["item_id"])]].append(entry)
    return found


def settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of each tuned model."""
    for stays in (5, 20, 100, None):
        for rate in (2e-3, 6e-3):
            for r in (2, 8):
                yield f"{stays or 'all'} stays, {rate:g}, r={r}", dict(stays=stays, rate=rate, r=r, shuffled=False)
    for r in (2, 8):
        yield f"shuffled, 0.0001, r={r}", dict(stays=None, rate=1e-4, r=r, shuffled=True)


class Scorer:
    """The last window of each stay: its scaled quantile loss, and what weighted quantile losses are made of."""

    def __init__(self, entries: list[Any]) -> None:
        store = SeriesStore.from_dataset(entries)
        last = Windows(store, context_length=CONTEXT, prediction_length=HORIZON, min_context=HORIZON).last()
        self.items = [store.item_ids[series] for series in last.series]
        self.batches = list(last)
        pairs = zip(last.series, last.cuts, strict=True)
        self.scales = np.stack([scale(store.series(series)[:cut], 24) for series, cut in pairs])

    def forecast(self, backbone: Any) -> np.ndarray:
        parts = []
        with backbone.inference():
            for batch in self.batches:
                past = {name: value for name, value in batch.items() if not name.startswith("future_")}
                parts.append(backbone.forecast(to_device(past, backbone.device)).values.double().numpy())
        return np.concatenate(parts)

    def loss(self, backbone: Any) -> np.ndarray:
        return losses(backbone, self.batches)

    def score(self, forecast: np.ndarray) -> np.ndarray:
        """Return scaled quantile loss, summed quantile loss and summed size of each window."""
        label = np.concatenate([batch["future_target"] for batch in self.batches]).astype(float)
        seen = np.concatenate([batch["future_observed_values"] for batch in self.batches]) > 0
        below, level = label[:, None] - forecast, np.asarray(LEVELS)[:, None]
        pinball = 2 * np.maximum(level * below, (level - 1) * below).mean(axis=1)
        sizes = np.where(seen, np.abs(label), 0).sum(axis=1)
        losses = np.where(seen, pinball, 0).sum(axis=1)
        return np.stack([quantile_scores(forecast, LEVELS, label, seen, self.scales), losses, sizes])


def losses(backbone: Any, batches: Iterable[Any]) -> np.ndarray:
    """Return the family's loss of each window."""
    with backbone.inference():
        return np.concatenate([backbone.loss(to_device(batch, backbone.device)).double().numpy() for batch in batches])


def mixed(start: Mapping[str, Any], end: Mapping[str, Any], weight: float, only: str) -> dict[str, Any]:
    """Return tensors between two states; those whose name lacks `only` are taken from the end."""
    return {**end, **{name: each for name, each in interpolated(start, end, weight).items() if only in name}}


class _Snapshots(Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def _keep(self, module: Any) -> None:
        self.states.append({name: tensor.detach().clone() for name, tensor in module.adapter.state_dict().items()})

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._keep(module)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._keep(module)


def tuned(
    entries: list[Any], options: Mapping[str, Any], horizon: int = HORIZON, context: int = CONTEXT
) -> tuple[Any, list[dict[str, Any]]]:
    """Return a backbone with its adapter, and the adapter's tensors at the start and after each epoch."""
    rng = np.random.default_rng(0)
    chosen = sorted(rng.permutation(len(entries))[: options["stays"]])
    data = [entries[number] for number in chosen]
    if options["shuffled"]:
        data = [{**entry, "target": rng.permutation(entry["target"])} for entry in data]
    estimator = get_estimator("chronos")(
        prediction_length=horizon,
        context_length=context,
        checkpoint="bolt-nano",
        adapter={"name": "lora", "r": options["r"]},
        learning_rate=options["rate"],
        max_epochs=EPOCHS,
        num_batches_per_epoch=STEPS,
        patience=0,
        gate="keep",
        device="cpu",
        progress=False,
        unusable="skip",
    )
    predictor, states = tuned_states(estimator, data, data[:1])
    return predictor.backbone, states


def tuned_states(estimator: Any, train: list[Any], validation: list[Any]) -> tuple[Any, list[dict[str, Any]]]:
    """Return the predictor, and the adapter's tensors at the start and after each epoch."""
    snapshots = _Snapshots()
    estimator.trainer_kwargs = {"callbacks": [snapshots]}
    return estimator.train(train, validation), snapshots.states


def scored(scorer: Scorer, backbone: Any, states: list[dict[str, Any]], before: np.ndarray) -> dict[str, np.ndarray]:
    """Return of each way of mixing the scores, shape (epochs, weights, 3, windows), and the family's loss."""
    adapter, found = backbone.adapter, {name: [] for name in (*MIXTURES, "loss")}
    for state in states[1:]:
        rows: dict[str, list[np.ndarray]] = {name: [] for name in MIXTURES}
        adapter.load_state_dict(state)
        found["loss"].append(scorer.loss(backbone))
        after = scorer.forecast(backbone)
        for weight in WEIGHTS:
            for name, only in (("parameters", ""), ("scaled B", "lora_B")):
                if weight < 1.0:
                    adapter.load_state_dict(mixed(states[0], state, weight, only))
                rows[name].append(scorer.score(after if weight == 1.0 else scorer.forecast(backbone)))
            rows["quantiles"].append(scorer.score((1 - weight) * before + weight * after))
        for name, row in rows.items():
            found[name].append(np.stack(row))
    return {name: np.stack(values) for name, values in found.items()}


def nulls(scorer: Scorer, load: Callable[[], Any], before: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Return scores of five random changes of all weights, each a thousandth of their deviation, 16 times."""
    found = []
    for number in range(NULLS):
        generator = torch.Generator().manual_seed(number)
        backbone = load()
        adapter = get_adapter("full").attach(backbone)
        start = {name: tensor.detach().clone() for name, tensor in adapter.state_dict().items()}
        states = [start]
        for _ in range(EPOCHS):
            noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}
            states.append({n: t + 1e-3 * (t.std(unbiased=False) + 1e-8) * noise[n] for n, t in start.items()})
        found.append(scored(scorer, backbone, states, before))
    return found


def make(path: Path, patients: Path | None, vital: str, file: Path) -> None:
    """Write the scores of all models on one vital sign."""
    started = time.perf_counter()
    train, first, second = pools(path, patients, vital)
    scorer = Scorer([*first, *second])
    second_items = {entry["item_id"] for entry in second}
    load = lambda: get_estimator("chronos")(  # noqa: E731
        prediction_length=HORIZON, context_length=CONTEXT, checkpoint="bolt-nano"
    ).load_backbone()
    base = load()
    before = scorer.forecast(base)
    arrays = {
        "pool": np.array([item in second_items for item in scorer.items]),
        "zero-shot": scorer.score(before),
        "zero-shot loss": scorer.loss(base),
    }
    for name, options in settings():
        for key, value in scored(scorer, *tuned(train, options), before).items():
            arrays[f"{name}/{key}"] = value
        print(f"{vital}, {name}: {time.perf_counter() - started:.0f} s", flush=True)  # noqa: T201
    for number, found in enumerate(nulls(scorer, load, before)):
        for key, value in found.items():
            arrays[f"null {number}/{key}"] = value
    print(f"{vital}: {time.perf_counter() - started:.0f} s", flush=True)  # noqa: T201
    np.savez_compressed(file, **arrays)
