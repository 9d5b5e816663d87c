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
    found, _ = pipeline.predict_quantiles([torch.arange(40.0)], prediction_length=5, quantile_levels=[0.1, 0.5, 0.9])
    # Chronos-2 returns a list of series.
    quantiles = found[0] if isinstance(found, list) else found
    assert quantiles.shape == (1, 5, 3)
    assert torch.isfinite(quantiles).all()


def recipe_class(name: str) -> str:
    return {"bolt-nano": "ChronosBoltPipeline", "chronos2-nano": "Chronos2Pipeline"}.get(name, "ChronosPipeline")


def test_rows_of_a_group_drive_the_earlier_ones_and_keep_their_gaps() -> None:
    torch.manual_seed(0)
    series = torch.randn(200, 2, 120).cumsum(2)
    series[0, 1, 10:20] = torch.nan
    found = pretraining.entangle(series, 96)
    driver, driven = found[1:, 1, :96], found[1:, 0, :96]
    related, apart = (
        torch.stack([torch.corrcoef(torch.stack(pair))[0, 1].abs() for pair in zip(other, driven, strict=True)])
        for other in (driver, driver.roll(1, 0))
    )

    assert torch.equal(found.isnan(), series.isnan())
    # Nothing drives the last row: it is standardised, or an event of 0 and 2.
    events = torch.tensor([set(row.unique().tolist()) <= {0.0, 2.0} for row in found[1:, 1]])
    assert driver[~events].std(1, correction=0).allclose(torch.ones(()), atol=1e-3)
    assert 30 < events.sum() < 90
    assert related.nanmedian() > apart.nanmedian() + 0.2


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
    assert sum(path.stat().st_size for path in files) < 8_000_000
