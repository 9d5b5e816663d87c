"""Chronos-2 is the official model: same forecasts with targets and covariates, same losses, same folders."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline
from chronos.chronos2 import Chronos2CoreConfig, Chronos2Model
from chronos.chronos2.layers import MHA, Chronos2LayerNorm
from peft import PeftModel
from torch import Tensor, nn

import gluonts_peft
from gluonts_peft.adapters.load import load_adapter
from gluonts_peft.backbone import SITES, Backbone
from gluonts_peft.checkpoint import CheckpointError
from gluonts_peft_chronos import ChronosBackbone, ChronosEstimator, chronos2
from gluonts_peft_chronos.chronos2 import Chronos2Backbone

NAN = float("nan")
PATCH, OWN, CONTEXT = 8, 24, 64
LEVELS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
# (targets, covariates known in the past only, covariates known in the future)
GROUPS = [(1, 0, 0), (3, 0, 0), (1, 2, 0), (1, 0, 2), (2, 1, 3)]


def make_checkpoint(folder: Path, dropout: float = 0.0, **changes: Any) -> Path:
    """Write a tiny Chronos-2 of random weights, large enough that every part of it shows in the forecast."""
    chronos = dict(
        context_length=CONTEXT,
        input_patch_size=PATCH,
        input_patch_stride=PATCH,
        output_patch_size=PATCH,
        max_output_patches=OWN // PATCH,
        quantiles=LEVELS,
        use_reg_token=True,
        use_arcsinh=True,
    )
    config = Chronos2CoreConfig(
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=dropout,
        architectures=["Chronos2Model"],
        chronos_pipeline_class="Chronos2Pipeline",
        chronos_config=chronos | changes,
    )
    network = Chronos2Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
            if "layer_norm" in name:
                parameter.add_(1.0)
            if "output_patch_embedding" in name:
                parameter.mul_(0.3)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("chronos2-tiny"))


@pytest.fixture(scope="session")
def official(tiny: Path) -> Chronos2Pipeline:
    pipeline = BaseChronosPipeline.from_pretrained(tiny, device_map="cpu")
    assert type(pipeline) is Chronos2Pipeline
    return pipeline


def load(checkpoint: str | Path, prediction_length: int = 12, **options: Any) -> Chronos2Backbone:
    model = gluonts_peft.load_backbone("chronos", checkpoint=checkpoint, prediction_length=prediction_length, **options)
    assert type(model) is Chronos2Backbone
    return model


def walks(rows: int, length: int, *, size: int = 4, seed: int = 0, missing: float = 0.0) -> Tensor:
    """Random walks on a level, shape (size, rows, length), NaN where missing."""
    generator = torch.Generator().manual_seed(seed)
    level = 20 + 80 * torch.rand(size, rows, 1, generator=generator)
    values = level + torch.randn(size, rows, length, generator=generator).cumsum(2)
    return values.masked_fill(torch.rand(values.shape, generator=generator) < missing, NAN)


def series(
    group: tuple[int, int, int], past: int, horizon: int, *, missing: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return targets, covariates known in the past only, covariates known in the future: (size, rows, steps)."""
    targets, only_past, known = group
    everything = walks(sum(group), past + horizon, missing=missing, seed=seed)
    return tuple(everything.split([targets, only_past, known], 1))  # type: ignore[return-value]


def batch_of(parts: tuple[Tensor, Tensor, Tensor], past: int, *, label: bool = False) -> dict[str, Tensor]:
    """Return the batch that the core makes of such series."""
    target, only_past, known = (part.transpose(1, 2) for part in parts)
    if target.shape[2] == 1:
        target = target[..., 0]
    found = {
        "past_target": target[:, :past].nan_to_num(0.0),
        "past_observed_values": (~target[:, :past].isnan()).float(),
    }
    if label:
        found["future_target"] = target[:, past:].nan_to_num(0.0)
        found["future_observed_values"] = (~target[:, past:].isnan()).float()
    if only_past.shape[2]:
        found["past_feat_dynamic_real"] = only_past[:, :past].nan_to_num(0.0)
        found["past_observed_feat_dynamic_real"] = (~only_past[:, :past].isnan()).float()
    if known.shape[2]:
        found["feat_dynamic_real"] = known.nan_to_num(0.0)
        found["observed_feat_dynamic_real"] = (~known.isnan()).float()
    return found


def inputs_of(parts: tuple[Tensor, Tensor, Tensor], past: int) -> list[dict[str, Any]]:
    """Return the same series as the official pipeline takes them."""
    found = []
    for target, only_past, known in zip(*(part.numpy() for part in parts), strict=True):
        entry: dict[str, Any] = {"target": target[:, :past]}
        covariates = {f"a{i}": row[:past] for i, row in enumerate(only_past)}
        covariates |= {f"b{i}": row[:past] for i, row in enumerate(known)}
        if covariates:
            entry["past_covariates"] = covariates
        if len(known):
            entry["future_covariates"] = {f"b{i}": row[past:] for i, row in enumerate(known)}
        found.append(entry)
    return found


def expected_values(pipeline: Chronos2Pipeline, inputs: Any, horizon: int) -> Tensor:
    """Return the pipeline's quantiles in the layout of ours."""
    found = torch.stack(pipeline.predict(inputs, prediction_length=horizon))
    return found[:, 0] if found.shape[1] == 1 else found.permute(0, 2, 3, 1)


def forecast(model: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
    with model.inference():
        return model.forecast(batch).values


def loss(model: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
    with model.inference():
        return model.loss(batch)


def assert_equal_in_scale(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 0
    # Beyond the own length, quantiles of weighted samples jump a little where two samples change places.
    own, after = (found - expected).abs()[:, :, :OWN], (found - expected).abs()[:, :, OWN:]
    assert own.max() < tolerance * scale
    assert (after > tolerance * scale).sum() <= 1e-3 * after.numel()
    assert not after.numel() or after.max() < 1e-3 * scale


def gaps(case: str) -> Tensor:
    if case == "short":
        return walks(1, 7)
    values = walks(1, 60, missing=0.3 if case == "holes" else 0.0)
    if case == "padded":
        values[0, :, :40] = NAN
        values[1, :, :59] = NAN
    if case == "ends-missing":
        values[..., -5:] = NAN
    if case == "constant":
        values[:] = 3.0
    return walks(1, 100) if case == "long" else values


@pytest.mark.parametrize("horizon", [1, 8, 12, 24, 25, 60])
def test_quantiles_equal_the_official_pipeline_at_every_horizon(
    horizon: int, tiny: Path, official: Chronos2Pipeline
) -> None:
    values = walks(1, 60, missing=0.1)
    result = load(tiny, horizon).forecast(batch_of((values, values[:, :0], values[:, :0]), 60))

    assert result.values.shape == (4, len(LEVELS), horizon)
    assert result.levels == tuple(LEVELS)
    assert_equal_in_scale(result.values.detach(), expected_values(official, values, horizon))


@pytest.mark.parametrize("case", ["whole", "short", "holes", "padded", "ends-missing", "long", "constant"])
def test_quantiles_equal_the_official_pipeline_on_gaps(case: str, tiny: Path, official: Chronos2Pipeline) -> None:
    values = gaps(case)
    batch = batch_of((values, values[:, :0], values[:, :0]), values.shape[2])

    assert_equal_in_scale(forecast(load(tiny), batch), expected_values(official, values, 12))


def test_series_of_different_lengths_are_taken_as_the_pipeline_does(tiny: Path, official: Chronos2Pipeline) -> None:
    values = walks(1, 60)
    lengths = (60, 41, 17, 3)
    for row, length in enumerate(lengths):
        values[row, :, : 60 - length] = NAN
    whole = [values[i, 0, 60 - n :] for i, n in enumerate(lengths)]

    found = forecast(load(tiny), batch_of((values, values[:, :0], values[:, :0]), 60))
    assert_equal_in_scale(found, expected_values(official, whole, 12))


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("horizon", [12, 24, 70])
@pytest.mark.parametrize("group", GROUPS[1:], ids=str)
def test_targets_and_covariates_equal_the_official_pipeline(
    group: tuple[int, int, int], horizon: int, missing: float, tiny: Path, official: Chronos2Pipeline
) -> None:
    """Gaps lie in the histories and in the known future."""
    parts = series(group, 50, horizon, missing=missing)
    found = forecast(load(tiny, horizon), batch_of(parts, 50))

    assert found.shape == (4, len(LEVELS), horizon) + ((group[0],) if group[0] > 1 else ())
    assert_equal_in_scale(found, expected_values(official, inputs_of(parts, 50), horizon))


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_how_many_rows_attend_together_makes_no_difference(
    chunk: int, group: tuple[int, int, int], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = series(group, 50, 12, missing=0.1)
    expected = forecast(load(tiny), batch_of(parts, 50))
    monkeypatch.setattr(chronos2, "_CHUNK", chunk)
    model = load(tiny)

    assert_equal_in_scale(forecast(model, batch_of(parts, 50)), expected)
    with torch.enable_grad():
        assert_equal_in_scale(model.forecast(batch_of(parts, 50)).values.detach(), expected)


@pytest.mark.parametrize("rows", [1, 2], ids=["univariate", "multivariate"])
def test_covariates_that_are_missing_altogether_are_taken_as_the_pipeline_does(
    rows: int, tiny: Path, official: Chronos2Pipeline
) -> None:
    parts = series((rows, 1, 1), 50, 12)
    parts[1][0] = NAN
    parts[2][1, :, :50] = NAN
    parts[2][2, :, 50:] = NAN

    found = forecast(load(tiny), batch_of(parts, 50))
    assert_equal_in_scale(found, expected_values(official, inputs_of(parts, 50), 12))


def test_rows_of_a_group_see_each_other_and_other_groups_do_not(tiny: Path) -> None:
    model = load(tiny)
    parts = series((2, 1, 1), 50, 12)
    before = forecast(model, batch_of(parts, 50))
    for kind, steps in ((0, slice(0, 50)), (1, slice(0, 50)), (2, slice(0, 50)), (2, slice(50, 62))):
        changed = tuple(part.clone() for part in parts)
        changed[kind][1, -1, steps] = changed[kind][1, -1, steps].flip(0) ** 2
        after = forecast(model, batch_of(changed, 50))  # type: ignore[arg-type]

        # The first target's own history is what it was.
        assert (after[1, ..., 0] - before[1, ..., 0]).abs().max() > 1e-3
        torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("horizon", [24, 20, 3])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_loss_equals_the_official_forward(
    group: tuple[int, int, int], horizon: int, missing: float, tiny: Path, official: Chronos2Pipeline
) -> None:
    """The official mean is over all rows, of which covariates cost nothing; ours is over the targets."""
    rows = sum(group)
    parts = series(group, 50, horizon, missing=missing)
    everything = torch.cat(parts, 1)
    label, future = everything[..., 50:].clone(), everything[..., 50:].clone()
    label[:, group[0] :] = NAN
    future[:, : rows - group[2]] = NAN
    with torch.no_grad():
        expected = official.model(
            context=everything[..., :50].flatten(0, 1),
            group_ids=torch.arange(4).repeat_interleave(rows),
            future_covariates=future.flatten(0, 1),
            future_target=label.flatten(0, 1),
            num_output_patches=-(-horizon // PATCH),
        ).loss
    found = loss(load(tiny, horizon), batch_of(parts, 50, label=True))

    assert found.shape == (4,)
    torch.testing.assert_close(found.mean(), expected * rows / group[0], rtol=1e-5, atol=1e-6)


def test_dropout_in_training_follows_the_law_of_the_official_network(tmp_path: Path) -> None:
    folder, count = make_checkpoint(tmp_path, dropout=0.2), 200
    model, network = load(folder), Chronos2Model.from_pretrained(folder).train()
    target, *covariates = (part[:1].repeat(count, 1, 1) for part in series((1, 0, 0), 48, 12))
    batch = batch_of((target, covariates[0], covariates[1]), 48, label=True)
    torch.manual_seed(1)
    found = model.train().loss(batch).detach()
    # The official loss is a mean over the batch.
    kwargs = {"group_ids": torch.arange(1), "num_output_patches": 2}
    one = [network(context=target[i, :, :48], future_target=target[i, :, 48:], **kwargs).loss for i in range(count)]
    expected = torch.stack(one).detach()

    assert (found.mean() - expected.mean()).abs() < 4 * found.std() * (2 / count) ** 0.5
    assert found.std() == pytest.approx(expected.std().item(), rel=0.3)
    assert len(set(loss(model.eval(), batch).tolist())) == 1


def test_missing_labels_do_not_count(tiny: Path) -> None:
    model, batch = load(tiny), batch_of(series((2, 0, 0), 50, 12), 50, label=True)
    batch["future_observed_values"][:, 3:7, 1] = 0.0
    changed = batch | {"future_target": batch["future_target"] + 50 * (1 - batch["future_observed_values"])}

    torch.testing.assert_close(loss(model, changed), loss(model, batch))
    nothing = batch | {"future_observed_values": torch.zeros(4, 12, 2)}
    assert loss(model, nothing).tolist() == [0.0] * 4


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_group_attention_of_one_row_has_queries_and_keys_without_effect(
    group: tuple[int, int, int], tiny: Path
) -> None:
    model = load(tiny)
    model.network.requires_grad_(True)
    model.loss(batch_of(series(group, 50, 12), 50, label=True)).mean().backward()
    without = {name for name, p in model.network.named_parameters() if p.grad is None or not p.grad.any()}
    across = {f"encoder.block.{i}.layer.1.self_attention.{kind}.weight" for i in range(2) for kind in "qk"}

    assert without == (across if sum(group) == 1 else set())


def test_what_is_trained_is_what_is_forecast(tiny: Path) -> None:
    """A group of one row is cut short where no gradient is needed; the numbers are the same."""
    model, batch = load(tiny), batch_of(series((1, 0, 0), 50, 12), 50, label=True)

    torch.testing.assert_close(model.loss(batch), loss(model, batch), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.forecast(batch).values, forecast(model, batch), rtol=1e-6, atol=1e-6)


def test_sites_are_places_of_the_network(tiny: Path) -> None:
    model = load(tiny)
    sites, modules = model.sites(), dict(model.network.named_modules())
    attentions = [name for name, module in modules.items() if isinstance(module, MHA)]

    assert sites.keys() == SITES.keys()
    assert len(attentions) == 4
    for kind in "qkvo":
        assert sites[kind] == tuple(f"{name}.{kind}" for name in attentions)
    assert len(sites["ff_in"]) == len(sites["ff_out"]) == 2
    assert set(sites["norm"]) == {name for name, module in modules.items() if isinstance(module, Chronos2LayerNorm)}
    assert len(sites["norm"]) == 7
    assert len(sites["attention_norm"]) == 4
    assert set(sites["attention_norm"]) < set(sites["norm"])
    assert sites["bias"] == tuple(name for name, _ in model.network.named_parameters() if name.endswith(".bias"))
    assert len(sites["bias"]) == 6
    linear = {name for name, module in modules.items() if type(module) is nn.Linear and ".block." in name}
    assert linear == {name for kind in ("q", "k", "v", "o", "ff_in", "ff_out") for name in sites[kind]}
    ends = {*sites["embedding"], *sites["head"]}
    assert ends == {"shared", "input_patch_embedding", "output_patch_embedding"}


def entries(
    group: tuple[int, int, int], *, count: int = 5, length: int = 70, horizon: int = 12
) -> list[dict[str, Any]]:
    """Return a GluonTS dataset in which the target follows its covariates."""
    generator = np.random.default_rng(0)
    targets, only_past, known = group
    found = []
    for index in range(count):
        driver = generator.standard_normal((1, length + horizon)).cumsum(1)
        noise = generator.standard_normal((sum(group), length + horizon))
        values = (30 + 10 * index + 3 * driver + noise).astype(np.float32)
        entry: dict[str, Any] = {"item_id": f"item-{index}", "start": pd.Period("2024-01-01 00:00", freq="h")}
        entry["target"] = values[0, :length] if targets == 1 else values[:targets, :length]
        if only_past:
            entry["past_feat_dynamic_real"] = values[targets : targets + only_past, :length]
        if known:
            entry["feat_dynamic_real"] = values[targets + only_past :]
        found.append(entry)
    return found


def without_future(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry for training, whose features end with its target."""
    steps = np.shape(entry["target"])[-1]
    return {**entry, **{name: entry[name][:, :steps] for name in ("feat_dynamic_real",) if name in entry}}


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_fields_of_gluonts_go_into_training_and_forecasting(
    group: tuple[int, int, int], tiny: Path, official: Chronos2Pipeline
) -> None:
    targets, only_past, known = group
    dataset = entries(group)
    options = dict(prediction_length=12, checkpoint=str(tiny), max_epochs=2, num_batches_per_epoch=5, gate="keep")
    zero = ChronosEstimator(**options, adapter="none", progress=False).train(map(without_future, dataset))
    tuned = ChronosEstimator(**options, adapter="full", learning_rate=1e-3, progress=False).train(
        list(map(without_future, dataset))
    )
    parts = tuple(
        torch.from_numpy(np.stack(rows))
        for rows in (
            [np.pad(np.atleast_2d(e["target"]), ((0, 0), (0, 12))) for e in dataset],
            [
                np.pad(e.get("past_feat_dynamic_real", np.zeros((0, 70), np.float32)), ((0, 0), (0, 12)))
                for e in dataset
            ],
            [e.get("feat_dynamic_real", np.zeros((0, 82), np.float32)) for e in dataset],
        )
    )
    expected = expected_values(official, inputs_of(parts, 70), 12)  # type: ignore[arg-type]
    forecasts = list(zero.predict(dataset))

    found = torch.from_numpy(np.stack([forecast.forecast_array for forecast in forecasts]))
    assert_equal_in_scale(found, expected)
    assert forecasts[0].start_date == dataset[0]["start"] + 70
    assert forecasts[0].quantile(0.5).shape == ((12,) if targets == 1 else (12, targets))
    assert tuned.gate is not None
    assert tuned.gate.tuned < tuned.gate.zero_shot
    assert zero.gate is not None
    assert zero.gate.zero_shot == pytest.approx(tuned.gate.zero_shot)


@pytest.mark.parametrize("mode", ["univariate", "covariates"])
def test_a_lora_of_the_official_training_opens_here(
    mode: str, tiny: Path, official: Chronos2Pipeline, tmp_path: Path
) -> None:
    parts = series((1, 0, 0) if mode == "univariate" else (1, 1, 1), 80, 12)
    inputs = inputs_of(parts, 80)
    theirs = official.fit(
        inputs,
        prediction_length=12,
        finetune_mode="lora",
        learning_rate=1e-2,
        num_steps=5,
        batch_size=4,
        output_dir=tmp_path,
        disable_tqdm=True,
        remove_printer_callback=True,
    )
    folder = tmp_path / "finetuned-ckpt"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".md"}
    model, base = load(tiny), load(tiny)
    adapter = load_adapter(folder, model)
    batch = batch_of(parts, 80)

    assert adapter.name == "lora"
    assert adapter.num_parameters() == sum(p.numel() for n, p in theirs.model.named_parameters() if "lora_" in n)
    assert_equal_in_scale(forecast(model, batch), expected_values(theirs, inputs, 12))
    assert (forecast(model, batch) - forecast(base, batch)).abs().max() > 1e-2


def test_a_checkpoint_of_the_official_training_opens_here(official: Chronos2Pipeline, tmp_path: Path) -> None:
    """It was widened to the horizon of its training."""
    parts = series((1, 0, 1), 80, 40)
    inputs = inputs_of(parts, 80)
    quiet = {"disable_tqdm": True, "remove_printer_callback": True}
    theirs = official.fit(
        inputs, prediction_length=40, learning_rate=1e-3, num_steps=2, batch_size=4, output_dir=tmp_path, **quiet
    )
    model = load(tmp_path / "finetuned-ckpt", 40)

    assert model.own_prediction_length == 40
    assert_equal_in_scale(forecast(model, batch_of(parts, 80)), expected_values(theirs, inputs, 40))


def shaken(adapter: Any) -> Any:
    """Move an adapter away from its start, where it changes nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "vera"])
def test_an_adapter_of_ours_opens_in_the_official_pipeline(name: str, tiny: Path, tmp_path: Path) -> None:
    model = load(tiny)
    shaken(gluonts_peft.get_adapter(name).attach(model)).save(tmp_path)
    parts = series((2, 1, 1), 50, 12)
    opened = Chronos2Pipeline.from_pretrained(tmp_path)

    assert type(opened.model) is Chronos2Model
    assert_equal_in_scale(forecast(model, batch_of(parts, 50)), expected_values(opened, inputs_of(parts, 50), 12))
    found, base = forecast(model, batch_of(parts, 50)), forecast(load(tiny), batch_of(parts, 50))
    assert (found - base).abs().max() > 1e-2


def test_an_adapter_of_ours_opens_in_plain_peft(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny)
    shaken(gluonts_peft.get_adapter("lora").attach(model)).save(tmp_path)
    opened = PeftModel.from_pretrained(Chronos2Model.from_pretrained(tiny), tmp_path)
    parts = series((1, 0, 1), 50, 12)
    pipeline = Chronos2Pipeline(opened.merge_and_unload())

    assert_equal_in_scale(forecast(model, batch_of(parts, 50)), expected_values(pipeline, inputs_of(parts, 50), 12))


def test_exported_folder_opens_with_the_official_library(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny)
    shaken(gluonts_peft.get_adapter("layernorm").attach(model)).merge()
    model.export(tmp_path)
    opened = BaseChronosPipeline.from_pretrained(tmp_path, device_map="cpu")
    parts = series((2, 1, 1), 50, 12)

    assert type(opened) is Chronos2Pipeline
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert_equal_in_scale(forecast(model, batch_of(parts, 50)), expected_values(opened, inputs_of(parts, 50), 12))
    again = load(tmp_path)
    assert torch.equal(forecast(again, batch_of(parts, 50)), forecast(model, batch_of(parts, 50)))


def test_more_output_patches_put_training_and_forecast_on_the_whole_length(
    tiny: Path, official: Chronos2Pipeline
) -> None:
    parts = series((1, 0, 1), 50, 40)
    batch = batch_of(parts, 50, label=True)
    wide, narrow = load(tiny, 40, max_output_patches=5), load(tiny, 40)
    expected = torch.stack(official.predict(inputs_of(parts, 50), prediction_length=40, max_output_patches=5))[:, 0]

    assert wide.options == {"max_output_patches": 5}
    assert_equal_in_scale(forecast(wide, batch), expected)
    assert not torch.allclose(forecast(narrow, batch), expected)
    late = batch["future_observed_values"].clone()
    late[:, :OWN] = 0.0
    assert loss(narrow, batch | {"future_observed_values": late}).tolist() == [0.0] * 4
    assert (loss(wide, batch | {"future_observed_values": late}) > 0).all()


@pytest.mark.parametrize("beyond", [1, 50])
def test_long_horizons_are_announced(beyond: int, tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(tiny, OWN)
        assert caplog.messages == []
        load(tiny, OWN + beyond)

    assert caplog.messages == [
        f"prediction_length {OWN + beyond} exceeds the {OWN} steps of checkpoint {str(tiny)!r}: forecasts roll on from"
        f" their own output, as the official pipeline does, and training uses the first {OWN} steps of each label"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_patches": 3},
            "backbone option 'max_patches' is unknown; did you mean 'max_output_patches'? known: max_output_patches",
        ),
        ({"max_output_patches": 0}, "max_output_patches 0 is not positive; name the patches of a forecast"),
        ({"max_output_patches": -2}, "max_output_patches -2 is not positive; name the patches of a forecast"),
        ({"context_length": 65}, "context_length 65 exceeds the 64 steps that checkpoint {name!r} can see"),
        ({"prediction_length": 0}, "prediction_length 0 is not positive; name the steps to forecast"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str, tiny: Path) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        gluonts_peft.load_backbone("chronos", checkpoint=tiny, **({"prediction_length": 4} | options))

    assert str(caught.value) == message.format(name=str(tiny))


def test_a_checkpoint_without_the_quantiles_that_go_on_refuses_long_horizons(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, quantiles=[0.1, 0.5, 0.9])

    assert load(folder, OWN).levels == (0.1, 0.5, 0.9)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load(folder, OWN + 1)
    assert str(caught.value) == (
        f"prediction_length 25 exceeds the 24 steps of checkpoint {str(folder)!r}, and forecasts roll on from quantiles"
        " that it does not have (0.2); name a shorter one, or more max_output_patches"
    )
    assert load(folder, OWN + 1, max_output_patches=4).own_prediction_length == 32


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_weights_are_refused(damage: str, tiny: Path, tmp_path: Path) -> None:
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        message = "is truncated or damaged"
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        config["num_layers"] = 3
        (tmp_path / "config.json").write_text(json.dumps(config))
        message = "does not fit its config.json: 13 missing keys"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_loaded_backbone_is_frozen_and_says_what_it_can(tiny: Path) -> None:
    model = load(tiny)

    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.context_length == model.past_length == CONTEXT
    assert model.capabilities == {"quantiles", "features", "covariates", "multivariate"}
    assert model.capabilities <= ChronosBackbone.capabilities
