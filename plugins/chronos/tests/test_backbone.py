"""The backbones are the official models: same forecasts, same losses, same folders."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from chronos import BaseChronosPipeline, ChronosBoltPipeline, ChronosPipeline
from torch import Tensor, nn
from transformers.models.t5 import modeling_t5

import gluonts_peft
from gluonts_peft.backbone import SITES, Backbone
from gluonts_peft_chronos import BoltBackbone, ChronosBackbone, ChronosEstimator, T5Backbone

NAN = float("nan")
CHECKPOINTS = ("bolt-nano", "t5-nano")


@cache
def backbone(checkpoint: str, prediction_length: int = 12, **options: Any) -> Any:
    return gluonts_peft.load_backbone("chronos", checkpoint=checkpoint, prediction_length=prediction_length, **options)


@cache
def official(checkpoint: str) -> Any:
    return BaseChronosPipeline.from_pretrained(ChronosBackbone.bundled()[checkpoint], device_map="cpu")


def walks(size: int = 4, length: int = 100, seed: int = 0, missing: float = 0.0) -> Tensor:
    """Random walks on a level, NaN where missing."""
    generator = torch.Generator().manual_seed(seed)
    level = 20 + 80 * torch.rand(size, 1, generator=generator)
    values = level + torch.randn(size, length, generator=generator).cumsum(1)
    return values.masked_fill(torch.rand(values.shape, generator=generator) < missing, NAN)


def past(values: Tensor) -> dict[str, Tensor]:
    return {"past_target": values.nan_to_num(0.0), "past_observed_values": (~values.isnan()).float()}


def future(values: Tensor) -> dict[str, Tensor]:
    return {"future_target": values.nan_to_num(0.0), "future_observed_values": (~values.isnan()).float()}


def forecast(model: Backbone, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    with model.inference():
        return model.forecast(batch, **options).values


def loss(model: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
    with model.inference():
        return model.loss(batch)


def assert_equal_in_scale(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def gaps(case: str) -> Tensor:
    if case == "short":
        return walks(length=7)
    values = walks(length=100)
    if case == "holes":
        return walks(length=100, missing=0.3)
    if case == "padded":
        values[0, :60] = NAN
        values[1, :99] = NAN
    if case == "ends-missing":
        values[:, -5:] = NAN
    if case == "long":
        return walks(length=700)
    return values


@pytest.mark.parametrize("horizon", [1, 12, 72, 73, 150])
def test_bolt_quantiles_equal_the_official_pipeline_at_every_horizon(horizon: int) -> None:
    values = walks(length=100, missing=0.1)
    found = forecast(backbone("bolt-nano", horizon), past(values))
    expected = official("bolt-nano").predict(values, prediction_length=horizon)

    assert found.shape == (4, 9, horizon)
    assert_equal_in_scale(found, expected.float())


@pytest.mark.parametrize("case", ["whole", "short", "holes", "padded", "ends-missing", "long"])
def test_bolt_quantiles_equal_the_official_pipeline_on_gaps(case: str) -> None:
    values = gaps(case)
    result = backbone("bolt-nano").forecast(past(values))
    expected = official("bolt-nano").predict(values, prediction_length=12)

    assert_equal_in_scale(result.values.detach(), expected.float())
    assert result.levels == tuple(official("bolt-nano").quantiles)


def test_bolt_takes_series_of_different_lengths_as_the_pipeline_does() -> None:
    values = walks(length=100)
    lengths = (100, 61, 17, 3)
    padded = values.clone()
    for row, length in enumerate(lengths):
        padded[row, : 100 - length] = NAN
    expected = official("bolt-nano").predict(
        [values[i, 100 - n :] for i, n in enumerate(lengths)], prediction_length=12
    )

    assert_equal_in_scale(forecast(backbone("bolt-nano"), past(padded)), expected.float())


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("length", [64, 20])
def test_bolt_loss_equals_the_official_forward(length: int, missing: float) -> None:
    history, label = walks(length=90, missing=missing), walks(length=length, seed=2, missing=missing)
    network = official("bolt-nano").inner_model
    with torch.no_grad():
        expected = network(context=history, target=label, target_mask=~label.isnan()).loss
    found = loss(backbone("bolt-nano", length), past(history) | future(label))

    assert found.shape == (4,)
    torch.testing.assert_close(found.mean(), expected, rtol=1e-5, atol=1e-6)


def test_bolt_decodes_one_token_so_that_some_of_its_places_have_no_effect() -> None:
    model = gluonts_peft.load_backbone("chronos", checkpoint="bolt-nano", prediction_length=12)
    model.network.requires_grad_(True)
    model.loss(past(walks()) | future(walks(length=12, seed=1))).mean().backward()
    without = {name for name, p in model.network.named_parameters() if p.grad is None or not p.grad.any()}
    layers = model.network.config.num_decoder_layers
    attention = [f"decoder.block.{i}.layer.0.SelfAttention.{kind}.weight" for i in range(layers) for kind in "qk"]

    assert without == {*attention, "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"}


@pytest.mark.parametrize("case", ["whole", "short", "holes", "padded"])
def test_t5_tokens_and_scale_equal_the_official_tokenizer(case: str) -> None:
    values = gaps(case)
    expected_ids, expected_mask, expected_scale = official("t5-nano").tokenizer.context_input_transform(values)
    ids, mask, scale = backbone("t5-nano").encode(past(values))

    assert torch.equal(ids, expected_ids)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, NAN])
def test_t5_scale_of_a_series_without_size_is_one(value: float) -> None:
    values = torch.stack([torch.full((20,), value), torch.full((20,), 3.0)])
    ids, mask, scale = backbone("t5-nano").encode(past(values))
    expected_ids, expected_mask, expected_scale = official("t5-nano").tokenizer.context_input_transform(values)

    assert scale.tolist() == [1.0, 3.0]
    assert torch.equal(scale, expected_scale)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(mask, expected_mask)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_t5_loss_equals_that_of_the_official_labels(missing: float) -> None:
    """On one window; the official loss of several weighs windows by their observed labels."""
    history, label = walks(length=90, missing=missing), walks(length=64, seed=2, missing=missing)
    tokenizer, network = official("t5-nano").tokenizer, official("t5-nano").model.model
    ids, mask, scale = tokenizer.context_input_transform(history)
    labels, labels_mask = tokenizer.label_input_transform(label, scale)
    assert labels.shape == (4, 65)
    found = loss(backbone("t5-nano", 64), past(history) | future(label))
    for i in range(4):
        with torch.no_grad():
            expected = network(
                input_ids=ids[i : i + 1],
                attention_mask=mask[i : i + 1],
                decoder_input_ids=network._shift_right(labels[i : i + 1]),
                labels=labels[i : i + 1].masked_fill(~labels_mask[i : i + 1], -100),
            ).loss
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)


def test_t5_loss_of_a_short_label_has_no_end_token() -> None:
    history, label = walks(length=90), walks(length=10, seed=2)
    tokenizer, network = official("t5-nano").tokenizer, official("t5-nano").model.model
    ids, mask, scale = tokenizer.context_input_transform(history)
    labels = backbone("t5-nano").tokens(label, torch.ones_like(label), scale)
    assert not (labels == 1).any()
    with torch.no_grad():
        expected = network(input_ids=ids, attention_mask=mask, labels=labels).loss

    torch.testing.assert_close(
        loss(backbone("t5-nano", 10), past(history) | future(label)).mean(), expected, rtol=1e-4, atol=1e-5
    )


def test_t5_paths_follow_the_official_law() -> None:
    values, horizon, count = walks(size=2, length=64, missing=0.1), 4, 1500
    torch.manual_seed(0)
    expected = official("t5-nano").predict(values, prediction_length=horizon, num_samples=count)
    generator = torch.Generator().manual_seed(1)
    found = forecast(backbone("t5-nano", horizon), past(values), num_samples=count, generator=generator)

    assert found.shape == expected.shape == (2, count, horizon)
    spread = expected.std(1)
    assert (spread > 0).all()
    # Standard error of the difference of two means: sqrt(2 / 1500) = 0.037 spreads.
    assert ((found.mean(1) - expected.mean(1)).abs() < 5 * 0.037 * spread).all()
    # Distance of two empirical distributions: 1.36 * sqrt(2 / 1500) = 0.05 is exceeded once in twenty.
    grid = torch.cat([found, expected], 1)
    below = [(paths[:, :, None] <= grid[:, None]).float().mean(1) for paths in (found, expected)]
    assert (below[0] - below[1]).abs().max() < 0.09


def test_t5_beyond_its_own_length_goes_on_with_the_median() -> None:
    values = walks(size=2, length=64)
    expected = official("t5-nano").predict(values, prediction_length=70, num_samples=30)
    found = forecast(backbone("t5-nano", 70), past(values), num_samples=30, generator=torch.Generator().manual_seed(0))
    first = forecast(backbone("t5-nano", 64), past(values), num_samples=30, generator=torch.Generator().manual_seed(0))

    assert found.shape == expected.shape
    assert torch.equal(found[..., :64], first)
    longer = torch.cat([values, first.median(1).values], 1)
    generator = torch.Generator().manual_seed(0)
    # The generator stands where the first 64 steps left it.
    torch.rand((2, 30, 64), dtype=torch.float64, generator=generator)
    last = forecast(backbone("t5-nano", 6), past(longer), num_samples=30, generator=generator)
    assert torch.equal(found[..., 64:], last)


def test_t5_seed_and_options_decide_the_paths() -> None:
    batch = past(walks(size=2))
    first, again, other = (
        forecast(backbone("t5-nano"), batch, num_samples=5, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Nothing to choose from: one path, whatever the seed.
    greedy = backbone("t5-nano", num_samples=3, top_k=1)
    left, right = (forecast(greedy, batch, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    assert left.shape == (2, 3, 12)
    assert torch.equal(left, right)
    assert torch.equal(left[:, 0], left[:, 2])


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_answers_do_not_depend_on_the_batch(checkpoint: str) -> None:
    model = backbone(checkpoint)
    values, label = walks(size=5, missing=0.1), walks(size=5, length=12, seed=1)
    batch = past(values) | future(label)
    rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(5)]

    torch.testing.assert_close(loss(model, batch), torch.cat([loss(model, row) for row in rows]), rtol=1e-4, atol=1e-4)
    if checkpoint == "bolt-nano":
        assert_equal_in_scale(forecast(model, batch), torch.cat([forecast(model, row) for row in rows]))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_padding_on_the_left_changes_nothing(checkpoint: str) -> None:
    model, values, label = backbone(checkpoint), walks(length=64), future(walks(length=12, seed=1))
    padded = torch.cat([torch.full((4, 32), NAN), values], 1)

    if checkpoint == "bolt-nano":
        assert_equal_in_scale(forecast(model, past(padded)), forecast(model, past(values)))
    torch.testing.assert_close(
        loss(model, past(padded) | label), loss(model, past(values) | label), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_missing_labels_do_not_count(checkpoint: str) -> None:
    model, history, label = backbone(checkpoint), past(walks()), future(walks(length=12, seed=1))
    label["future_observed_values"][:, 3:7] = 0.0
    first = loss(model, history | label)
    changed = label | {"future_target": label["future_target"] + 50 * (1 - label["future_observed_values"])}
    if checkpoint == "bolt-nano":
        torch.testing.assert_close(loss(model, history | changed), first)
    assert torch.isfinite(first).all()
    nothing = label | {"future_observed_values": torch.zeros(4, 12)}
    assert loss(model, history | nothing).tolist() == [0.0] * 4


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_sites_are_places_of_the_network(checkpoint: str) -> None:
    model = backbone(checkpoint)
    network, sites = model.network, model.sites()
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters(remove_duplicate=False))
    attentions = [name for name, module in modules.items() if isinstance(module, modeling_t5.T5Attention)]
    blocks = network.config.num_layers + network.config.num_decoder_layers

    assert sites.keys() <= SITES.keys()
    assert all(len(names) == len(set(names)) > 0 for names in sites.values())
    assert all(name in parameters for name in sites["bias"])
    assert all(name in modules for kind, names in sites.items() if kind != "bias" for name in names)
    # Self-attention of each block, and cross-attention of each block of the decoder.
    assert len(attentions) == blocks + network.config.num_decoder_layers
    for kind in ("q", "k", "v", "o"):
        assert sites[kind] == tuple(f"{name}.{kind}" for name in attentions)
    assert len(sites["ff_in"]) == len(sites["ff_out"]) == blocks
    assert all(type(modules[name]) is nn.Linear for kind in ("q", "ff_in", "ff_out") for name in sites[kind])
    assert set(sites["norm"]) == {n for n, m in modules.items() if isinstance(m, modeling_t5.T5LayerNorm)}
    assert len(sites["attention_norm"]) == len(attentions)
    assert set(sites["attention_norm"]) < set(sites["norm"])
    biases = {name for name in parameters if name.endswith(".bias")}
    assert {name for name in sites["bias"] if name.endswith(".bias")} == biases
    assert bool(biases) == (checkpoint == "bolt-nano")
    assert sum(name.endswith("relative_attention_bias.weight") for name in sites["bias"]) == 2
    assert sites["head"] == (("output_patch_embedding",) if checkpoint == "bolt-nano" else ("lm_head",))
    # No projection or norm is left out.
    linear = {name for name, module in modules.items() if type(module) is nn.Linear and ".block." in name}
    assert linear == {name for kind in ("q", "k", "v", "o", "ff_in", "ff_out") for name in sites[kind]}


def test_places_are_in_the_order_of_the_network() -> None:
    model = backbone("t5-nano")
    places = model.places(["v", "q"])
    order = [name for name, _ in model.network.named_modules()]

    assert [order.index(name) for name in places] == sorted(order.index(name) for name in places)
    assert model.places(["q", "v", "q"]) == places


@pytest.mark.parametrize(
    ("checkpoint", "kind", "pipeline", "capabilities"),
    [
        ("bolt-nano", BoltBackbone, ChronosBoltPipeline, {"quantiles", "features"}),
        ("t5-nano", T5Backbone, ChronosPipeline, {"samples"}),
    ],
)
def test_exported_folder_opens_with_the_official_library(
    checkpoint: str, kind: type, pipeline: type, capabilities: set[str], tmp_path: Path
) -> None:
    model = gluonts_peft.load_backbone("chronos", checkpoint=checkpoint, prediction_length=12)
    adapter = gluonts_peft.get_adapter("layernorm").attach(model)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.1)
    adapter.merge()
    model.export(tmp_path)
    opened = BaseChronosPipeline.from_pretrained(tmp_path, device_map="cpu")
    again = gluonts_peft.load_backbone("chronos", checkpoint=tmp_path, prediction_length=12)
    batch = past(walks()) | future(walks(length=12, seed=1))

    assert type(model) is type(again) is kind
    assert model.capabilities == capabilities
    assert type(opened) is pipeline
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert torch.equal(loss(again, batch), loss(model, batch))
    assert not torch.equal(loss(model, batch), loss(backbone(checkpoint), batch))
    if checkpoint == "bolt-nano":
        assert_equal_in_scale(opened.predict(walks(), prediction_length=12).float(), forecast(model, batch))
        architectures = json.loads((tmp_path / "config.json").read_text())["architectures"]
        assert architectures == ["ChronosBoltModelForForecasting"]
    else:
        theirs, ours = opened.model.model.state_dict(), model.network.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        (
            "t5-nano",
            {"num_sample": 3},
            "backbone option 'num_sample' is unknown; did you mean 'num_samples'? known: num_samples, temperature,"
            " top_k, top_p",
        ),
        (
            "t5-nano",
            {"zzz": 3},
            "backbone option 'zzz' is unknown; known: num_samples, temperature, top_k, top_p",
        ),
        ("bolt-nano", {"top_k": 3}, "backbone option 'top_k' is unknown; known: (none)"),
        ("t5-nano", {"prediction_length": 0}, "prediction_length 0 is not positive; name the steps to forecast"),
        ("bolt-nano", {"prediction_length": -3}, "prediction_length -3 is not positive; name the steps to forecast"),
        ("t5-nano", {"context_length": 0}, "context_length 0 is not positive; name the steps of history to use"),
        (
            "t5-nano",
            {"context_length": 257},
            "context_length 257 exceeds the 256 steps that checkpoint 't5-nano' can see",
        ),
        (
            "bolt-nano",
            {"context_length": 1000},
            "context_length 1000 exceeds the 504 steps that checkpoint 'bolt-nano' can see",
        ),
    ],
)
def test_options_that_cannot_be_used(checkpoint: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        gluonts_peft.load_backbone("chronos", checkpoint=checkpoint, **({"prediction_length": 4} | options))

    assert str(caught.value) == message


@pytest.mark.parametrize(("checkpoint", "own"), [("bolt-nano", 72), ("t5-nano", 64)])
@pytest.mark.parametrize("beyond", [1, 50])
def test_long_horizons_are_announced(checkpoint: str, own: int, beyond: int, caplog: pytest.LogCaptureFixture) -> None:
    horizon = own + beyond
    with caplog.at_level(logging.WARNING):
        gluonts_peft.load_backbone("chronos", checkpoint=checkpoint, prediction_length=own)
        assert caplog.messages == []
        gluonts_peft.load_backbone("chronos", checkpoint=checkpoint, prediction_length=horizon)

    assert caplog.messages == [
        f"prediction_length {horizon} exceeds the {own} steps of checkpoint {checkpoint!r}: forecasts roll on from"
        f" their own output, as the official pipeline does, and training uses the first {own} steps of each label"
    ]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_loaded_backbone_is_frozen_and_knows_where_it_came_from(checkpoint: str) -> None:
    model = backbone(checkpoint)

    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.network.training
    assert model.source.family == "chronos"
    assert model.source.checkpoint == checkpoint
    assert model.source.kind == "bundled"
    assert model.context_length == model.network.config.chronos_config["context_length"]
    assert repr(model).endswith(", adapter=None)")


def test_default_checkpoint_is_bundled() -> None:
    assert ChronosEstimator.default_checkpoint in ChronosBackbone.bundled()
    assert gluonts_peft.load_backbone("chronos", prediction_length=4).source.checkpoint == "bolt-nano"
