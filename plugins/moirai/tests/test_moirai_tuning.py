"""Adapters train on every architecture, those too that uni2ts's own fine-tuning refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import gluonts_peft
from gluonts_peft.adapters.base import Adapter, AdapterError
from gluonts_peft.adapters.load import load_adapter
from gluonts_peft.backbone import Backbone
from gluonts_peft_moirai import MoiraiEstimator

ARCHITECTURES = ("moirai-1", "moirai-moe", "moirai-2")

# Some of the 32 experts see no token of a small batch; far from its mean, a normal distribution a thousandth wide has
# no gradient; AdaLoRA takes ranks away.
MAY_STAY = {
    "moirai-1": re.compile(r"components\.1\.loc"),
    "moirai-moe": re.compile(r"components\.1\.loc|\.experts\."),
    "moirai-2": re.compile(r"(?!)"),
    "adalora": re.compile(r"\.lora_E$"),
}


def loss(model: Backbone, batch: dict[str, Tensor]) -> Tensor:
    with model.inference():
        return model.loss(batch)


def train(adapter: Adapter, batch: dict[str, Tensor], steps: int) -> list[float]:
    """Train at the adapter's own rate; return the loss before each step and after the last."""
    losses, optimizer = [], torch.optim.AdamW(adapter.parameters(), lr=adapter.learning_rate, weight_decay=0.0)
    adapter.prepare(steps)
    for step in range(steps):
        optimizer.zero_grad()
        value = adapter.attached.loss(batch).mean()
        value.backward()
        optimizer.step()
        adapter.after_step(step)
        losses.append(value.item())
    return [*losses, loss(adapter.attached, batch).mean().item()]


# The matrix of the core has them all, on the bundled checkpoint.
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "bitfit", "layernorm", "head", "full", "vera", "adalora"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_adapter_starts_at_the_base_learns_and_survives_saving_and_merging(
    kind: str, name: str, backbone: Any, walks: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    options = {} if kind == "moirai-2" else {"patch_size": 8}
    batch = walks(size=8, past=60, dims=2)
    base = backbone(kind, **options)
    model = deepcopy(base)
    adapter = gluonts_peft.get_adapter(name).attach(model)
    torch.testing.assert_close(loss(model, batch), loss(base, batch), rtol=1e-4, atol=1e-4)
    start = {key: tensor.detach().clone() for key, tensor in adapter.state_dict().items()}
    losses = train(adapter, batch, 12)
    still = [key for key, tensor in adapter.state_dict().items() if torch.equal(tensor, start[key])]

    assert losses[-1] < losses[0]
    assert [key for key in still if not MAY_STAY[name if name == "adalora" else kind].search(key)] == []
    adapter.save(tmp_path)
    again = deepcopy(base)
    load_adapter(tmp_path, again)
    after = loss(model, batch)
    assert torch.equal(loss(again, batch), after)
    with model.reading() as reader:
        torch.testing.assert_close(loss(reader, batch), after, rtol=1e-4, atol=1e-4)
    try:
        adapter.merge()
    except AdapterError:
        assert not adapter.mergeable
        return
    torch.testing.assert_close(loss(model, batch), after, rtol=1e-4, atol=1e-4)
    assert list(model.network.state_dict()) == list(base.network.state_dict())


def test_tuning_with_patch_sizes_of_its_own_choice(backbone: Any, walks: Callable[..., dict[str, Tensor]]) -> None:
    model = deepcopy(backbone("moirai-1", 12))
    batch = walks(size=16, past=108)
    sizes = model.choose_patch_size(batch)
    assert len(sizes.unique()) > 1
    fixed = torch.stack([loss(backbone("moirai-1", 12, patch_size=size), batch) for size in model.patch_sizes])
    torch.testing.assert_close(loss(model, batch), fixed[sizes, torch.arange(16)], rtol=1e-4, atol=1e-4)
    losses = train(gluonts_peft.get_adapter("lora").attach(model), batch, 10)

    assert losses[-1] < losses[0]


@pytest.mark.parametrize("site", ["embedding", "head"])
def test_lora_goes_to_both_ends_of_moirai_2(site: str, backbone: Any, walks: Callable[..., dict[str, Tensor]]) -> None:
    model = deepcopy(backbone("moirai-2"))
    adapter = gluonts_peft.get_adapter({"name": "lora", "sites": [site]}).attach(model)

    assert len(adapter.state_dict()) == 6
    losses = train(adapter, walks(size=8), 10)
    assert losses[-1] < losses[0]


def daily(count: int, length: int, seed: int, targets: int = 0) -> list[dict[str, Any]]:
    """Series whose days all have the same rugged shape."""
    rng, step = np.random.default_rng(seed), np.arange(length)
    shape = np.random.default_rng(99).normal(size=24)[step % 24]
    dataset = []
    for i in range(count):
        values = 50 + 3 * shape + 0.3 * rng.normal(size=(max(targets, 1), length))
        entry: dict[str, Any] = {"start": pd.Period("2021-01-01", freq="h"), "item_id": str(i)}
        dataset.append(entry | {"target": values if targets else values[0]})
    return dataset


def test_the_estimator_tunes_stores_and_forecasts(tmp_path: Path) -> None:
    estimator = MoiraiEstimator(
        prediction_length=24,
        context_length=36,
        adapter="lora",
        max_epochs=3,
        num_batches_per_epoch=20,
        learning_rate=5e-3,
        batch_size=16,
        device="cpu",
        progress=False,
    )
    predictor = estimator.train(daily(12, 240, 0))
    predictor.serialize(tmp_path / "model")
    again = gluonts_peft.PeftPredictor.deserialize(tmp_path / "model", device="cpu")
    test = daily(3, 200, 1)
    first, second = (list(each.predict(test)) for each in (predictor, again))
    predictor.export(tmp_path / "plain")
    plain = gluonts_peft.load_backbone("moirai", checkpoint=tmp_path / "plain", prediction_length=24, context_length=36)
    third = list(gluonts_peft.PeftPredictor(plain, device="cpu").predict(test))

    assert predictor.gate.passed
    assert predictor.gate.tuned < 0.95 * predictor.gate.zero_shot
    for left, right, merged in zip(first, second, third, strict=True):
        assert left.forecast_array.shape == (9, 24)
        np.testing.assert_array_equal(left.forecast_array, right.forecast_array)
        np.testing.assert_allclose(left.forecast_array, merged.forecast_array, rtol=1e-3, atol=1e-3)


def test_the_estimator_takes_several_targets_and_features() -> None:
    def dataset(count: int, length: int, ahead: int, seed: int) -> list[dict[str, Any]]:
        rng, entries = np.random.default_rng(seed), daily(count, length, seed, targets=2)
        for entry in entries:
            entry["feat_dynamic_real"] = rng.normal(size=(1, length + ahead))
            entry["past_feat_dynamic_real"] = rng.normal(size=(2, length))
        return entries

    estimator = MoiraiEstimator(
        prediction_length=12,
        context_length=48,
        adapter="layernorm",
        max_epochs=1,
        num_batches_per_epoch=3,
        batch_size=4,
        gate="keep",
        device="cpu",
        progress=False,
    )
    predictor = estimator.train(dataset(3, 120, 0, 0))
    test = dataset(1, 100, 12, 1)
    (forecast,) = predictor.predict(test)
    (without,) = predictor.predict([{k: v for k, v in entry.items() if "feat" not in k} for entry in test])

    assert forecast.forecast_array.shape == without.forecast_array.shape == (9, 12, 2)
    assert np.abs(forecast.forecast_array - 50).max() < 30
    assert np.abs(forecast.forecast_array - without.forecast_array).max() > 1e-3


def test_sample_paths_come_from_the_predictors_seed(backbone: Any) -> None:
    test = daily(2, 100, 1)
    paths = [
        np.stack(
            [f.samples for f in gluonts_peft.PeftPredictor(backbone("moirai-1"), seed=s, device="cpu").predict(test)]
        )
        for s in (1, 1, 2)
    ]

    assert paths[0].shape == (2, 100, 12)
    np.testing.assert_array_equal(paths[0], paths[1])
    assert not np.array_equal(paths[0], paths[2])
