"""The recipe that made the bundled checkpoints: seeded, synthetic, and in the official layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from chronos import BaseChronosPipeline
from safetensors.torch import load_file

from gluonts_peft.pretraining import Recipe, pretrain
from gluonts_peft_chronos import ChronosBackbone, pretraining


@pytest.mark.parametrize("name", sorted(pretraining.RECIPES))
def test_a_short_run_is_reproducible_and_opens_officially(name: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        pretraining.RECIPES[name], batch_size=16, contexts={72: 1.0}, average=0.5, learning_rate=3e-3
    )
    report = pretrain(recipe, pretraining.build, tmp_path / "a", steps=12)
    pretrain(recipe, pretraining.build, tmp_path / "b", steps=12)
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((tmp_path / "a" / "pretraining.json").read_text())["steps"] == report["steps"] == 12
    pipeline = BaseChronosPipeline.from_pretrained(tmp_path / "a")
    assert type(pipeline).__name__ == recipe_class(name)
    quantiles, _ = pipeline.predict_quantiles(torch.arange(40.0), prediction_length=5, quantile_levels=[0.1, 0.5, 0.9])
    assert quantiles.shape == (1, 5, 3)
    assert torch.isfinite(quantiles).all()


def recipe_class(name: str) -> str:
    return "ChronosBoltPipeline" if name.startswith("bolt") else "ChronosPipeline"


@pytest.mark.parametrize("name", sorted(pretraining.RECIPES))
def test_bundled_checkpoints_are_those_of_the_recipe(name: str) -> None:
    folder = ChronosBackbone.bundled()[name]
    log, recipe = json.loads((folder / "pretraining.json").read_text()), pretraining.RECIPES[name]
    # JSON has no integer keys.
    recorded = {**log["recipe"], "contexts": {int(length): p for length, p in log["recipe"]["contexts"].items()}}
    assert Recipe(**recorded) == recipe
    assert log["steps"] == recipe.steps
    config = json.loads((folder / "config.json").read_text())
    assert config["chronos_config"] == recipe.config
    assert config["chronos_pipeline_class"] == recipe_class(name)


def test_bundled_checkpoints_are_small() -> None:
    files = [path for folder in ChronosBackbone.bundled().values() for path in folder.iterdir()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert sum(path.stat().st_size for path in files) < 6_000_000
