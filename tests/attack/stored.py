"""What lies on disk: predictor folders, checkpoints of all formats, training checkpoints, some of it malicious."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from engine import WrongError
from values import damage, mutate

STORED = Path(__file__).parents[1] / "stored" / "0.1.0"
#: Fields of a predictor's record that may change a forecast: they say what is forecast, not with which weights.
MEANT = {"context_length", "prediction_length", "model_prediction_length", "backbone_options"}
CHECKPOINTS = (
    ("chronos", "t5-nano"),
    ("chronos", "bolt-nano"),
    ("chronos", "chronos2-nano"),
    ("moirai", "moirai-nano"),
    ("lag-llama", "lag-llama-nano"),
    ("moment", "moment-nano"),
)


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.system, ('touch "$ATTACK_CANARY"',))


@cache
def _data() -> list[dict[str, Any]]:
    return [
        {
            "item_id": entry["item_id"],
            "start": pd.Period(entry["start"], freq=entry["freq"]),
            "target": np.array([np.nan if value is None else value for value in entry["target"]], np.float32),
        }
        for entry in json.loads((STORED / "series.json").read_text())
    ]


@cache
def _wanted() -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(STORED / "forecasts.safetensors")


@cache
def _written(name: str, place: Path) -> Path:
    """Write a stored predictor as this version does: with a digest of its tensors, which 0.1.0 had none of."""
    from gluonts_peft import PeftPredictor

    folder = place / "written" / name
    if not folder.exists():
        PeftPredictor.deserialize(STORED / "predictors" / name, device="cpu").serialize(folder)
    return folder


def predictors(number: int, generator: np.random.Generator, folder: Path) -> str:
    """A predictor's folder in which one record is changed or one file is damaged."""
    from gluonts_peft import PeftPredictor

    name = str(generator.choice([name for name in _wanted() if name.startswith(("bolt", "chronos2"))]))
    place = folder / "predictor"
    shutil.copytree(_written(name, folder.parent), place)
    path: tuple[Any, ...] = ()
    if generator.random() < 0.6:
        files = sorted(place.rglob("*.json"))
        file = files[int(generator.integers(len(files)))]
        tree, path, way = mutate(json.loads(file.read_text()), generator)
        file.write_text(json.dumps(tree))
    else:
        files = sorted(each for each in place.rglob("*") if each.is_file())
        file = files[int(generator.integers(len(files)))]
        way = damage(file, generator)
    predictor = PeftPredictor.deserialize(place, device="cpu")
    found = np.stack([forecast.forecast_array for forecast in predictor.predict(_data())])
    wanted = _wanted()[name]
    if not np.isfinite(found).all():
        raise WrongError(f"{file.name} {path} {way}: forecasts are not finite")
    if path and path[0] in MEANT:
        return "right"
    if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-5, atol=1e-4):
        raise WrongError(f"{name} {file.name} {path} {way}: other forecasts, without a word")
    return "right"


def checkpoints(number: int, generator: np.random.Generator, folder: Path) -> str:
    """Base checkpoints in the official layouts, damaged or malicious, and training checkpoints."""
    import gluonts_peft
    from gluonts_peft.registry import get_estimator

    if number % 7 == 6:
        from gluonts_peft.checkpoint_io import read_checkpoint

        file = folder / "last.ckpt"
        shutil.copy(STORED / "training" / "last.ckpt", file)
        if generator.random() < 0.2:
            torch.save({"a": Malicious()}, file)
        else:
            damage(file, generator)
        read_checkpoint(file)
        return "right"
    family, checkpoint = CHECKPOINTS[number % 7]
    place = folder / checkpoint
    source = get_estimator(family).backbone_class.bundled()[checkpoint]
    shutil.copytree(source, place)
    way = str(generator.choice(["config", "damage", "pickle"], p=[0.5, 0.3, 0.2]))
    if way == "config":
        file = place / "config.json"
        tree, _, _ = mutate(json.loads(file.read_text()), generator)
        file.write_text(json.dumps(tree))
    elif way == "damage":
        files = sorted(place.glob("*.*"))
        damage(files[int(generator.integers(len(files)))], generator)
    else:
        (place / "model.safetensors").unlink()
        name = str(generator.choice(["pytorch_model.bin", "lag-llama.ckpt", "model.ckpt", "model.safetensors"]))
        if generator.random() < 0.5:
            torch.save({"state_dict": Malicious(), "hyper_parameters": Malicious()}, place / name)
        else:
            (place / name).write_bytes(pickle.dumps(Malicious()))
    backbone = gluonts_peft.load_backbone(family, checkpoint=place, prediction_length=4, context_length=24)
    if not all(torch.isfinite(parameter).all() for parameter in backbone.network.parameters()):
        raise WrongError("weights that are not finite were loaded")
    return "right"
