"""Write artefacts of the version that is installed: what later versions must open, with the same numbers.

    python tests/stored/write.py tests/stored/0.1.0

Run once, by the version that the folder is named after; ``test_stored.py`` beside it opens what is there. Each family's
bundled checkpoints with adapters of every way of being stored, a training run that was interrupted, a finished study
and a finished search, and the forecasts, in float32, that the version gave.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from gluonts_peft.registry import get_estimator
from gluonts_peft.trials import SearchSpec, StudySpec, run_study, search

TRAINING = {"max_epochs": 1, "num_batches_per_epoch": 4, "batch_size": 4, "seed": 3, "device": "cpu"}
ADAPTERS: dict[str, Any] = {
    "lora": {"name": "lora", "r": 1, "sites": ["q", "v"]},
    "trace": {"name": "trace", "r": 1, "sites": ["q", "v"], "schedule": 1, "alpha_steps": 2, "simulations": 2},
    "layernorm": "layernorm",
    "hybrid": ["layernorm", "bitfit"],
    "head": {"name": "head", "kind": "projection", "width": 4},
    "lora-head": [{"name": "lora", "r": 1, "sites": ["q"]}, {"name": "head", "kind": "pooling"}],
}
# A head of MOMENT trains along with any adapter; a short horizon keeps it small.
CHECKPOINTS = {
    "bolt-nano": ("chronos", 6),
    "t5-nano": ("chronos", 6),
    "chronos2-nano": ("chronos", 6),
    "moirai-nano": ("moirai", 6),
    "lag-llama-nano": ("lag-llama", 6),
    "moment-nano": ("moment", 2),
}
# Families without features have no other heads.
FEATURES = {"bolt-nano", "chronos2-nano", "moirai-nano", "moment-nano"}
TRIAL = {
    "family": "chronos",
    "checkpoint": "bolt-nano",
    "prediction_length": 6,
    "context_length": 24,
    "training": {"max_epochs": 1, "num_batches_per_epoch": 2, "batch_size": 4, "device": "cpu"},
    "data": {"patients": 10, "hours": 8, "vital": "hr", "windows": 1},
}
STUDY = {"base": TRIAL, "grid": {"adapter": ["none", "layernorm"], "seed": [0, 1]}, "baselines": ["last_value"]}
SEARCH = {
    "base": {**TRIAL, "adapter": "layernorm"},
    "space": {"training.learning_rate": {"space": "loguniform", "lower": 1.0e-4, "upper": 1.0e-2}},
    "num_samples": 2,
}


class KilledError(Exception):
    """Ends a training as a crash would."""


def series() -> list[dict[str, Any]]:
    """Return three series of 64 hours, some of it missing, as JSON values."""
    generator = np.random.default_rng(7)
    found = []
    for position, level in enumerate((20.0, 50.0, 80.0)):
        steps = np.arange(64)
        values = level + 5 * np.sin(2 * np.pi * steps / 24) + generator.standard_normal(64).cumsum() / 4
        target: list[float | None] = [round(float(value), 3) for value in values]
        target[10 + position] = None
        found.append({"item_id": f"item-{position}", "start": "2024-01-01 00:00", "freq": "h", "target": target})
    return found


def dataset(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return stored series as GluonTS entries."""
    import pandas as pd

    return [
        {
            "item_id": entry["item_id"],
            "start": pd.Period(entry["start"], freq=entry["freq"]),
            "target": np.array([np.nan if value is None else value for value in entry["target"]], np.float32),
        }
        for entry in entries
    ]


def forecasts(predictor: Any, data: list[dict[str, Any]]) -> np.ndarray:
    """Return the numbers of all forecasts, shape (series, quantiles or samples, steps)."""
    found = list(predictor.predict(data, num_samples=4))
    return np.stack(
        [getattr(each, "samples", None) if hasattr(each, "samples") else each.forecast_array for each in found]
    )


#: Of the training that is interrupted.
INTERRUPTED = {
    **TRAINING,
    "max_epochs": 2,
    "prediction_length": 6,
    "context_length": 24,
    "checkpoint": "bolt-nano",
    "adapter": "layernorm",
    "gate": "keep",
    "progress": False,
}


def interrupted(folder: Path, data: list[dict[str, Any]]) -> None:
    """Leave the checkpoint of a training that died after the first of two epochs, and how it ends undisturbed."""
    from lightning.pytorch.callbacks import Callback

    class Kill(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                raise KilledError

    undisturbed = get_estimator("chronos")(**INTERRUPTED).train(data)
    options = {**INTERRUPTED, "folder": str(folder), "trainer_kwargs": {"callbacks": [Kill()]}}
    with suppress(KilledError):
        get_estimator("chronos")(**options).train(data)
    shutil.rmtree(folder / "series")
    (folder / "undisturbed.json").write_text(json.dumps(undisturbed.fit.history, indent=1) + "\n")


def discreet(folder: Path) -> None:
    """Take the paths of this machine out of the configurations for plain PEFT, which hold that of the base."""
    for file in folder.rglob("adapter_config.json"):
        config = json.loads(file.read_text())
        base = Path(config["base_model_name_or_path"])
        config["base_model_name_or_path"] = str(Path("/elsewhere", *base.parts[-2:]))
        file.write_text(json.dumps(config, indent=2) + "\n")


def main(out: Path) -> None:
    """Write everything below a new folder."""
    torch.set_num_threads(1)
    out.mkdir(parents=True)
    entries = series()
    (out / "series.json").write_text(json.dumps(entries) + "\n")
    data = dataset(entries)
    found: dict[str, np.ndarray] = {}
    for checkpoint, (family, horizon) in CHECKPOINTS.items():
        for name, spec in ADAPTERS.items():
            if "head" in name and checkpoint not in FEATURES:
                continue
            estimator = get_estimator(family)(
                prediction_length=horizon,
                context_length=24,
                checkpoint=checkpoint,
                adapter=spec,
                gate="keep",
                progress=False,
                **TRAINING,
            )
            predictor = estimator.train(data)
            predictor.serialize(out / "predictors" / f"{checkpoint}-{name}")
            found[f"{checkpoint}-{name}"] = forecasts(predictor, data)
    interrupted(out / "training", data)
    run_study(StudySpec(**STUDY), out / "study", progress=False)
    search(SearchSpec(**SEARCH), out / "search", serial=True, progress=False)
    discreet(out)
    save_file(
        {name: np.ascontiguousarray(values, np.float32) for name, values in found.items()},
        out / "forecasts.safetensors",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
