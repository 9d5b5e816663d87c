"""The recipe makes what is bundled."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from uni2ts.model.moirai2 import Moirai2Module

from gluonts_peft.pretraining import pretrain
from gluonts_peft_moirai import MoiraiBackbone
from gluonts_peft_moirai.loading import save_network
from gluonts_peft_moirai.pretraining import RECIPES, build, related


def test_a_few_steps_learn_and_write_a_folder_that_opens(tmp_path: Path) -> None:
    recipe = replace(RECIPES["moirai-nano"], steps=30, batch_size=16, contexts={120: 1.0}, warmup=3)
    report = pretrain(recipe, build, tmp_path, name="moirai-nano", save=save_network)
    torch.manual_seed(recipe.seed)
    network, loss = build(recipe)
    generator = torch.Generator().manual_seed(0)
    batch = 50 + torch.randn(32, 192, generator=generator)
    opened = MoiraiBackbone.load_network(tmp_path)
    fresh, trained = [], []
    with torch.no_grad():
        for values, state in ((fresh, None), (trained, opened.state_dict())):
            if state is not None:
                network.load_state_dict(state)
            torch.manual_seed(1)
            values.extend(loss(batch[:, :120], batch[:, 120:]).item() for _ in range(8))

    assert report["steps"] == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "pretraining.json"]
    assert sum(trained) < 0.97 * sum(fresh)


def test_gaps_and_missing_starts_give_a_finite_loss_and_gradient() -> None:
    torch.manual_seed(0)
    network, loss = build(RECIPES["moirai-nano"])
    history, label = torch.randn(8, 120), torch.randn(8, 72)
    history[0, :100] = torch.nan
    history[1, ::2] = torch.nan
    history[2] = 5.0
    for _ in range(12):
        network.zero_grad()
        value = loss(history, label)
        value.backward()
        assert torch.isfinite(value)
        assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_pairs_of_variates_keep_their_own_level_and_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([10.0, 100.0] * 32)[:, None, None] + torch.randn(64, 1, 400, generator=generator)
    pairs = related(values)

    assert pairs.shape == (32, 2, 400)
    assert torch.equal(pairs[:, 0], values[:32, 0])
    torch.testing.assert_close(pairs[:, 1].mean(1), values[32:, 0].mean(1), rtol=0.02, atol=0.02)
    correlations = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs])
    assert (correlations > 0.5).any()
    assert (correlations < -0.5).any()
    assert (correlations.abs() < 0.2).any()


def test_the_bundled_checkpoint_is_what_its_recipe_makes() -> None:
    folder = MoiraiBackbone.bundled()["moirai-nano"]
    made, recipe = json.loads((folder / "pretraining.json").read_text()), RECIPES["moirai-nano"]
    config = json.loads((folder / "config.json").read_text())
    theirs = Moirai2Module.from_pretrained(str(folder))

    assert made["recipe"] == json.loads(json.dumps(asdict(recipe)))
    assert made["steps"] == recipe.steps
    assert {name: config[name] for name in recipe.model | recipe.config} == recipe.model | recipe.config
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4e6
    assert sum(parameter.numel() for parameter in theirs.parameters()) < 0.9e6
