"""The recipe of the bundled checkpoint: seeded, synthetic, 30 % hidden, in the official layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from gluonts_peft.pretraining import Recipe, pretrain
from gluonts_peft_moment import MomentBackbone, MomentNetwork, pretraining

RECIPE = pretraining.RECIPES["moment-nano"]


def test_a_short_run_is_reproducible_and_opens(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, batch_size=16, contexts={72: 1.0}, average=0.5)
    report = pretrain(recipe, pretraining.build, tmp_path / "a", steps=12)
    pretrain(recipe, pretraining.build, tmp_path / "b", steps=12)
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")

    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((tmp_path / "a" / "pretraining.json").read_text())["steps"] == report["steps"] == 12
    network = MomentNetwork.from_pretrained(tmp_path / "a")
    assert network(torch.randn(2, 40)).isfinite().all()


def test_the_loss_falls_on_one_batch() -> None:
    torch.manual_seed(0)
    network, loss_of = pretraining.build(RECIPE)
    step = torch.arange(64)
    series = torch.sin(step / torch.rand(16, 1).add(1.0)) * torch.rand(16, 1) * 9
    series[3, 10:20] = torch.nan
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = loss_of(series[:, :56], series[:, 56:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.7 * losses[0]


def test_hidden_patches_are_as_many_as_the_reference_hides() -> None:
    given = torch.ones(4, 80)
    given[1, :48] = 0.0
    given[2, :72] = 0.0
    given[3] = 0.0
    patches = pretraining.hide(given, 8, 0.3).reshape(4, 10, 8)

    assert (patches.amin(-1) == patches.amax(-1)).all()
    # Rounded in favour of what is shown; padding is never hidden.
    assert (1 - patches[..., 0]).sum(1).tolist() == [3, 1, 0, 0]
    assert patches[1, :6].all()


def test_every_patch_is_hidden_in_its_turn() -> None:
    hidden = 1 - torch.stack([pretraining.hide(torch.ones(1, 80), 8, 0.3) for _ in range(200)]).mean((0, 1))
    assert ((hidden > 0.15) & (hidden < 0.45)).all()


def test_the_bundled_checkpoint_is_that_of_the_recipe() -> None:
    folder = MomentBackbone.bundled()["moment-nano"]
    log = json.loads((folder / "pretraining.json").read_text())
    # JSON has no integer keys.
    recorded = {**log["recipe"], "contexts": {int(length): p for length, p in log["recipe"]["contexts"].items()}}

    assert Recipe(**recorded) == RECIPE
    assert log["steps"] == RECIPE.steps
    assert json.loads((folder / "config.json").read_text()) == {**RECIPE.config, "t5_config": RECIPE.model}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
