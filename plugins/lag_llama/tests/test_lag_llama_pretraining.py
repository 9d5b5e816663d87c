from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts import time_feature

from gluonts_peft.pretraining import pretrain
from gluonts_peft_lag_llama import LagLlamaBackbone
from gluonts_peft_lag_llama.network import TIME_FEATURES
from gluonts_peft_lag_llama.pretraining import RECIPES, build, calendar_features, save
from gluonts_peft_lag_llama.weights import read

NANO = "lag-llama-nano"


@pytest.mark.parametrize("freq", ["s", "7min", "h", "D"])
def test_calendar_features_equal_those_of_gluonts(freq: str) -> None:
    index = pd.date_range("2023-12-30 22:58:51", periods=500, freq=freq)
    expected = np.stack([getattr(time_feature, name)(index) for name in TIME_FEATURES], -1)

    found = calendar_features(index.to_numpy().astype("datetime64[s]").reshape(2, 250))
    np.testing.assert_allclose(found.reshape(500, 6), expected, atol=1e-6)


def test_each_use_of_a_series_has_a_size_and_a_level_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens hold level and spread, so those of the synthetic series, standardised with their labels, must not show."""
    network, loss = build(RECIPES[NANO])
    estimate = network.level_and_spread
    seen = []

    def spy(past: torch.Tensor, observed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(estimate(past, observed))
        return seen[-1]

    monkeypatch.setattr(network, "level_and_spread", spy)
    history = torch.randn(256, 68, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        loss(history, torch.zeros(256, 24))
    (first_level, first), (second_level, second) = seen

    # The difference of two normal numbers of standard deviation 2 has one of 2.83.
    assert 2.3 < float((first.log() - second.log()).std()) < 3.4
    assert float((first_level / first - second_level / second).abs().median()) > 0.5


def test_a_flat_history_does_not_count() -> None:
    _, loss = build(RECIPES[NANO])
    rough = torch.randn(4, 68, generator=torch.Generator().manual_seed(0))
    flat = torch.ones(1, 68)
    with torch.no_grad():
        value = loss(torch.cat([rough, flat]), torch.randn(5, 24))

    assert value.isfinite()
    assert 0 < value < 20


def test_a_seed_decides_the_weights_and_the_folder_opens(tmp_path: Path) -> None:
    recipe = replace(RECIPES[NANO], batch_size=8)
    for name in ("first", "second"):
        pretrain(recipe, build, tmp_path / name, name=NANO, steps=3, save=save)
    first, second = (read(tmp_path / name).state_dict() for name in ("first", "second"))

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [
        "config.json",
        "model.safetensors",
        "pretraining.json",
    ]
    assert LagLlamaBackbone.from_checkpoint(tmp_path / "first", prediction_length=2).past_length == 68


def test_the_bundled_checkpoint_is_of_its_recipe() -> None:
    folder = LagLlamaBackbone.bundled()[NANO]
    log = json.loads((folder / "pretraining.json").read_text())
    network = read(folder)
    recipe = RECIPES[NANO]

    assert log["steps"] == recipe.steps
    assert log["recipe"]["model"] == recipe.model
    assert {name: getattr(network.config, name) for name in ("scaling", "n_layer", "n_head")} == {
        name: recipe.model[name] for name in ("scaling", "n_layer", "n_head")
    }
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000
