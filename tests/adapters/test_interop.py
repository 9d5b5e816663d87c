"""What is saved here opens in plain PEFT, what plain PEFT saved opens here, and faster layers are PEFT's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from chronos import chronos_bolt
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

import gluonts_peft
from gluonts_peft.adapters.additive import TABLE
from gluonts_peft.adapters.dense import fourier_delta, make_dense
from gluonts_peft.adapters.load import load_adapter
from gluonts_peft.backbone import Backbone
from gluonts_peft_chronos import ChronosBackbone

METHODS = [method.name for method in TABLE]
CHECKPOINTS = ("bolt-nano", "t5-nano")
Batches = Callable[..., dict[str, Tensor]]


@cache
def base(checkpoint: str) -> Backbone:
    return gluonts_peft.load_backbone("chronos", checkpoint=checkpoint, prediction_length=8, context_length=48)


def fresh(checkpoint: str) -> Backbone:
    return deepcopy(base(checkpoint))


@torch.no_grad()
def output(network: nn.Module, checkpoint: str, batch: Mapping[str, Tensor]) -> Tensor:
    """What the network says, asked as anyone would who does not know this package."""
    network.eval()
    if checkpoint == "bolt-nano":
        quantiles: Tensor = network(context=batch["past_target"]).quantile_preds
        return quantiles
    ids = base(checkpoint).encode(batch)[0]  # type: ignore[operator]
    logits: Tensor = network(input_ids=ids, decoder_input_ids=ids[:, :7]).logits
    return logits


@torch.no_grad()
def perturb(parameters: Any) -> None:
    """Move off identity."""
    generator = torch.Generator().manual_seed(11)
    for parameter in parameters:
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def assert_same_but_not_base(left: Tensor, right: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    assert (left - plain).abs().max() > 30 * (left - right).abs().max()
    assert (left - plain).abs().max() > 1e-3


@pytest.fixture
def official() -> Callable[[str], nn.Module]:
    """Networks that were loaded without this package."""

    def load(checkpoint: str) -> nn.Module:
        folder = ChronosBackbone.bundled()[checkpoint]
        if checkpoint == "bolt-nano":
            return deepcopy(base(checkpoint).network)
        network: nn.Module = T5ForConditionalGeneration.from_pretrained(folder)
        return network

    return load


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", METHODS)
def test_saved_here_opens_in_plain_peft(
    name: str, checkpoint: str, official: Callable[[str], nn.Module], make_batch: Batches, tmp_path: Path
) -> None:
    batch = make_batch(missing=0.0)
    backbone = fresh(checkpoint)
    adapter = gluonts_peft.get_adapter(name).attach(backbone)
    perturb(adapter.parameters())
    adapter.save(tmp_path)
    torch.manual_seed(99)
    network = official(checkpoint)
    plain = output(network, checkpoint, batch)
    opened = peft.PeftModel.from_pretrained(network, tmp_path)

    assert_same_but_not_base(output(opened, checkpoint, batch), output(backbone.network, checkpoint, batch), plain)


@pytest.mark.parametrize("name", ["lora", "vera"])
def test_part_of_a_hybrid_opens_in_plain_peft(
    name: str, official: Callable[[str], nn.Module], make_batch: Batches, tmp_path: Path
) -> None:
    batch = make_batch(missing=0.0)
    adapter = gluonts_peft.get_adapter(["lora", "vera", "oft"]).attach(fresh("t5-nano"))
    perturb(adapter.parameters())
    adapter.save(tmp_path)
    alone = fresh("t5-nano")
    load_adapter(tmp_path / name, alone)
    network = official("t5-nano")
    plain = output(network, "t5-nano", batch)
    opened = peft.PeftModel.from_pretrained(network, tmp_path / name)

    assert_same_but_not_base(output(opened, "t5-nano", batch), output(alone.network, "t5-nano", batch), plain)


def test_the_official_bolt_class_lacks_what_peft_asks_for(make_batch: Batches, tmp_path: Path) -> None:
    """Why this package's subclass exists; once this fails, the subclass can go."""
    batch = make_batch(missing=0.0)
    backbone = fresh("bolt-nano")
    adapter = gluonts_peft.get_adapter("lora").attach(backbone)
    perturb(adapter.parameters())
    adapter.save(tmp_path)
    kind = chronos_bolt.ChronosBoltModelForForecasting
    network = kind.from_pretrained(ChronosBackbone.bundled()["bolt-nano"])
    plain = output(network, "bolt-nano", batch)
    with pytest.raises(NotImplementedError, match="`get_input_embeddings` not auto"):
        peft.PeftModel.from_pretrained(network, tmp_path)

    # One accessor is all that is missing.
    network = kind.from_pretrained(ChronosBackbone.bundled()["bolt-nano"])
    network.get_input_embeddings = lambda: network.shared
    opened = peft.PeftModel.from_pretrained(network, tmp_path)
    assert_same_but_not_base(output(opened, "bolt-nano", batch), output(backbone.network, "bolt-nano", batch), plain)


@pytest.mark.parametrize("name", ["vera", "randlora"])
def test_projections_are_checked_or_stored(
    name: str, official: Callable[[str], nn.Module], make_batch: Batches, tmp_path: Path
) -> None:
    import json

    from safetensors import safe_open

    batch = make_batch(missing=0.0)
    stored, frozen = {}, {}
    for save in (False, True):
        folder = tmp_path / str(save)
        backbone = fresh("t5-nano")
        adapter = gluonts_peft.get_adapter(name, save_projection=save).attach(backbone)
        perturb(adapter.parameters())
        if save:
            # As if another version of torch had drawn them.
            for key, tensor in adapter.state_dict().items():
                if f"{name}_A" in key:
                    tensor.data.mul_(1.5)
        adapter.save(folder)
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            stored[save] = any(f"{name}_A" in key for key in file.keys())  # noqa: SIM118
        frozen[save] = json.loads((folder / "gluonts_peft.json").read_text())["frozen"]
        again, network = fresh("t5-nano"), official("t5-nano")
        load_adapter(folder, again)
        assert torch.equal(output(again.network, "t5-nano", batch), output(backbone.network, "t5-nano", batch))
        opened = peft.PeftModel.from_pretrained(network, folder)
        torch.testing.assert_close(
            output(opened, "t5-nano", batch), output(again.network, "t5-nano", batch), rtol=1e-4, atol=1e-4
        )

    assert stored == {False: False, True: True}
    assert len(frozen[False]) == 64
    assert frozen[True] is None


FOREIGN = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"]),
    "lora, by pattern": peft.LoraConfig(r=3, target_modules=r".*SelfAttention\.(k|o)"),
    "lora, rslora": peft.LoraConfig(r=4, use_rslora=True, target_modules=["q"]),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=["q", "v"]),
    "vera": peft.VeraConfig(r=8, target_modules=["q", "k", "v", "o"]),
    "fourierft": peft.FourierFTConfig(n_frequency=20, scaling=30.0, target_modules=["q", "v"]),
    "ia3": peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"]),
    "layernorm": peft.LNTuningConfig(target_modules=["layer_norm"]),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=50, target_modules=["q", "v"]),
    "randlora": peft.RandLoraConfig(r=8, target_modules=["q", "v"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["q", "v"]),
    "hra": peft.HRAConfig(r=2, target_modules=["q", "v"]),
    "miss": peft.MissConfig(r=4, target_modules=["q", "v"]),
    "c3a": peft.C3AConfig(block_size=8, target_modules=["q", "v"]),
    "waveft": peft.WaveFTConfig(n_frequency=20, target_modules=["q", "v"]),
}


def test_every_method_is_tried_from_both_sides() -> None:
    assert {name.partition(",")[0] for name in FOREIGN} == set(METHODS)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_saved_by_plain_peft_opens_here(
    name: str, checkpoint: str, official: Callable[[str], nn.Module], make_batch: Batches, tmp_path: Path
) -> None:
    batch = make_batch(missing=0.0)
    network = official(checkpoint)
    plain = output(network, checkpoint, batch)
    foreign = peft.get_peft_model(network, deepcopy(FOREIGN[name]))
    perturb(parameter for parameter in foreign.parameters() if parameter.requires_grad)
    foreign.save_pretrained(tmp_path)
    expected = output(foreign, checkpoint, batch)
    trainable = sum(parameter.numel() for parameter in foreign.parameters() if parameter.requires_grad)
    torch.manual_seed(99)
    backbone = fresh(checkpoint)
    adapter = load_adapter(tmp_path, backbone)

    assert adapter.name == name.partition(",")[0]
    assert adapter.num_parameters() == trainable
    assert_same_but_not_base(output(backbone.network, checkpoint, batch), expected, plain)


def test_foreign_adapter_is_saved_again_and_opens(
    official: Callable[[str], nn.Module], make_batch: Batches, tmp_path: Path
) -> None:
    batch = make_batch(missing=0.0)
    foreign = peft.get_peft_model(official("t5-nano"), deepcopy(FOREIGN["lora, by pattern"]))
    perturb(parameter for parameter in foreign.parameters() if parameter.requires_grad)
    foreign.save_pretrained(tmp_path / "theirs")
    first, second = fresh("t5-nano"), fresh("t5-nano")
    load_adapter(tmp_path / "theirs", first).save(tmp_path / "ours")
    load_adapter(tmp_path / "ours", second)

    assert torch.equal(output(second.network, "t5-nano", batch), output(first.network, "t5-nano", batch))


class Toy(nn.Module):
    """Wide, tall and square layers, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Linear(24, 48)
        self.wide = nn.Linear(48, 16, bias=False)
        self.square = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.square(torch.tanh(self.wide(torch.tanh(self.tall(x)))))
        return out


TARGETS = ["tall", "wide", "square"]
DENSE = {
    "vera": peft.VeraConfig(r=6, target_modules=TARGETS, init_weights=False),
    "fourierft": peft.FourierFTConfig(n_frequency=40, scaling=50.0, target_modules=TARGETS),
    "randlora": peft.RandLoraConfig(r=5, target_modules=TARGETS),
    "c3a": peft.C3AConfig(block_size=8, target_modules=TARGETS, init_weights="xavier_uniform"),
    "waveft": peft.WaveFTConfig(n_frequency=30, target_modules=TARGETS),
    "dora": peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=TARGETS),
}


def toy(name: str, config: Any = None) -> nn.Module:
    torch.manual_seed(4)
    config = deepcopy(DENSE[name] if config is None else config)
    model: nn.Module = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](Toy(), config, "default").model
    perturb(parameter for parameter in model.parameters() if parameter.requires_grad)
    return model


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(6)).requires_grad_()
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert x.grad is not None
    return out.detach(), {"x": x.grad, **{name: grad for name, grad in gradients.items() if grad is not None}}


def test_every_dense_method_is_compared() -> None:
    assert {method.name for method in TABLE if method.dense} == set(DENSE)


@pytest.mark.parametrize("name", DENSE)
def test_dense_forward_and_gradients_are_those_of_peft(name: str) -> None:
    theirs, ours = toy(name), toy(name)
    for target in TARGETS:
        before = type(ours.get_submodule(target))
        make_dense(ours.get_submodule(target))
        assert type(ours.get_submodule(target)) is before
        assert ours.get_submodule(target).forward.func is not before.forward
    expected, expected_gradients = run(theirs)
    found, gradients = run(ours)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) > len(TARGETS)
    for key, gradient in gradients.items():
        scale = float(expected_gradients[key].abs().max())
        assert scale > 0
        # The backward pass of PEFT 0.21's C3A is wrong where the gradient goes on to the layer's input (next test).
        if name != "c3a" or key.startswith("square."):
            torch.testing.assert_close(gradient, expected_gradients[key], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", DENSE)
def test_dense_gradient_is_the_slope_of_the_output(name: str) -> None:
    model = toy(name).double()
    for target in TARGETS:
        make_dense(model.get_submodule(target))
    generator = torch.Generator().manual_seed(8)
    x, direction = (torch.randn(3, 24, dtype=torch.float64, generator=generator) for _ in range(2))
    weights = torch.randn(3, 16, dtype=torch.float64, generator=generator)
    variable = x.clone().requires_grad_()
    (model(variable) * weights).sum().backward()
    assert variable.grad is not None
    step = 1e-5
    with torch.no_grad():
        rise = ((model(x + step * direction) - model(x - step * direction)) * weights).sum() / (2 * step)

    torch.testing.assert_close((variable.grad * direction).sum(), rise, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", [777, 5])
def test_fourier_delta_is_the_inverse_transform(target: str, seed: int) -> None:
    config = peft.FourierFTConfig(n_frequency=40, scaling=50.0, target_modules=TARGETS, random_loc_seed=seed)
    layer: Any = toy("fourierft", config).get_submodule(target)
    with torch.no_grad():
        delta = fourier_delta(layer)

    torch.testing.assert_close(delta, layer.get_delta_weight("default").detach(), rtol=0, atol=1e-6)
    # And by the formula itself, one coefficient after the other.
    rows, columns = torch.arange(layer.out_features).double(), torch.arange(layer.in_features).double()
    expected = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    for (p, q), c in zip(
        layer.indices["default"].T.tolist(), layer.fourierft_spectrum["default"].tolist(), strict=True
    ):
        angle = p * rows[:, None] / layer.out_features + q * columns[None] / layer.in_features
        expected += c * torch.cos(2 * torch.pi * angle)
    expected *= 50.0 / expected.numel()
    torch.testing.assert_close(delta.double(), expected, rtol=0, atol=1e-6)
    assert expected.abs().max() > 1e-2


def test_fourier_delta_is_exact_for_long_sides() -> None:
    """The phases of a long side lose their digits in float32 unless they are reduced first."""
    model = peft.inject_adapter_in_model(
        peft.FourierFTConfig(n_frequency=16, scaling=1e4, target_modules=["0"]), nn.Sequential(nn.Linear(4096, 31))
    )
    layer: Any = model.get_submodule("0")
    with torch.no_grad():
        torch.testing.assert_close(fourier_delta(layer), layer.get_delta_weight("default"), rtol=0, atol=1e-6)


def test_dropout_keeps_the_forward_of_peft() -> None:
    model = toy("vera", peft.VeraConfig(r=6, target_modules=TARGETS, vera_dropout=0.5))
    layer = model.get_submodule("tall")
    before = type(layer)
    make_dense(layer)

    assert type(layer) is before
