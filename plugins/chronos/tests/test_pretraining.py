"""The recipe that made the bundled checkpoints: seeded, synthetic, and in the official layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from chronos import BaseChronosPipeline
from safetensors.torch import load_file

from gluonts_peft_chronos import ChronosBackbone, pretraining
from gluonts_peft_chronos.synthetic import sample_series


def draw(seed: int, **options: object) -> np.ndarray:
    return sample_series(np.random.default_rng(seed), 64, 200, **options)  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_series_and_another_seed_others() -> None:
    np.testing.assert_array_equal(draw(3), draw(3))
    assert not np.array_equal(draw(3), draw(4), equal_nan=True)


def test_series_are_finite_where_observed_and_gaps_lie_in_the_history_only() -> None:
    values = draw(0, history=150)
    assert values.shape == (64, 200)
    assert values.dtype == np.float32
    assert not np.isinf(values).any()
    assert np.isnan(values[:, :150]).any()
    assert not np.isnan(values[:, 150:]).any()


def test_daily_series_repeat_after_24_steps() -> None:
    def repetition(values: np.ndarray) -> float:
        scores = []
        for row in values:
            ahead, back = row[24:], row[:-24]
            seen = ~np.isnan(ahead) & ~np.isnan(back)
            if seen.sum() > 50 and ahead[seen].std() > 1e-6 and back[seen].std() > 1e-6:
                scores.append(np.corrcoef(ahead[seen], back[seen])[0, 1])
        return float(np.mean(scores))

    rng = np.random.default_rng
    assert repetition(sample_series(rng(1), 400, 240, daily=1.0)) > repetition(sample_series(rng(1), 400, 240)) + 0.1


@pytest.mark.parametrize("name", sorted(pretraining.RECIPES))
def test_a_short_run_is_reproducible_learns_and_opens_officially(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(
        pretraining.RECIPES[name], batch_size=16, contexts={72: 1.0}, average=0.5, learning_rate=3e-3
    )
    monkeypatch.setitem(pretraining.RECIPES, name, recipe)
    report = pretraining.pretrain(name, tmp_path / "a", steps=12)
    pretraining.pretrain(name, tmp_path / "b", steps=12)
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
    # A log may be older than a parameter whose default changes nothing. JSON has no integer keys.
    recorded = {**log["recipe"], "contexts": {int(length): p for length, p in log["recipe"]["contexts"].items()}}
    assert pretraining.Recipe(**recorded) == recipe
    assert log["steps"] == recipe.steps
    config = json.loads((folder / "config.json").read_text())
    assert config["chronos_config"] == recipe.chronos
    assert config["chronos_pipeline_class"] == recipe_class(name)


def test_bundled_checkpoints_are_small() -> None:
    files = [path for folder in ChronosBackbone.bundled().values() for path in folder.iterdir()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert sum(path.stat().st_size for path in files) < 6_000_000
