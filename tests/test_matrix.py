"""Every adapter on every architecture keeps the same promises."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gluonts_peft
from gluonts_peft.adapters.base import Adapter, AdapterError, load_adapter
from gluonts_peft.backbone import Backbone

CHECKPOINTS = ("bolt-nano", "t5-nano")
VARIANTS: list[Any] = [
    {"name": "lora", "use_rslora": True},
    {"name": "layernorm", "sites": ["attention_norm"]},
    ["layernorm", "lora"],
    ["bitfit", "fourierft"],
    ["lora", "vera"],
    ["dora", "ia3"],
    ["oft", "lora"],
    ["vera", "oft", "lora", "bitfit"],
]
SPECS: list[Any] = [*gluonts_peft.list_adapters(), *VARIANTS]
CELLS = [(checkpoint, spec) for checkpoint in CHECKPOINTS for spec in SPECS]

# Methods that start from random numbers; all others start from constants, or from the seed in their configuration.
RANDOM = {"lora", "dora", "adalora", "hra"}
# Bolt decodes a single token, so the softmax of its self-attention is 1 whatever queries, keys and positions are.
WITHOUT_EFFECT = {
    "bolt-nano": re.compile(r"decoder\.block\.\d+\.layer\.0\.SelfAttention\.(q|k|relative_attention_bias)\."),
    "t5-nano": re.compile(r"(?!)"),
}

FEW, ALL = 4, 15


def label(spec: Any) -> str:
    if isinstance(spec, str):
        return spec
    if isinstance(spec, Mapping):
        options = [f"{k}={'+'.join(v) if isinstance(v, list) else v}" for k, v in spec.items() if k != "name"]
        return f"{spec['name']}({','.join(options)})"
    return "+".join(map(label, spec))


def names(spec: Any) -> set[str]:
    return set(re.findall(r"\w+", re.sub(r"\([^)]*\)", "", label(spec))))


@cache
def base(checkpoint: str) -> Backbone:
    return gluonts_peft.load_backbone("chronos", checkpoint=checkpoint, prediction_length=8, context_length=48)


def fresh(checkpoint: str) -> Backbone:
    return deepcopy(base(checkpoint))


def loss(backbone: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
    with backbone.inference():
        return backbone.loss(batch)


def forecast(backbone: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
    with backbone.inference():
        return backbone.forecast(batch, num_samples=2, generator=torch.Generator().manual_seed(3)).values


def answers(backbone: Backbone, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Loss, and the forecast where it is a smooth function of the weights; one other token makes another path."""
    return [loss(backbone, batch)] + ([forecast(backbone, batch)] if "quantiles" in backbone.capabilities else [])


def assert_close(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def clone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def unwrapped(name: str) -> str:
    """Name of a base tensor before adapters wrapped its module; PEFT calls what it wraps `base_layer`."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    everything = dict(adapter.attached.network.named_parameters())
    return clone({name: everything[name] for name in adapter.parameter_names()})


def train(adapter: Adapter, batch: Mapping[str, Tensor], steps: int) -> list[float]:
    """Train at the adapter's own rate, as the fit loop does, on one batch; return the loss before each step."""
    losses = []
    parameters = adapter.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=adapter.learning_rate, weight_decay=0.0) if parameters else None
    for step in range(steps):
        value = adapter.attached.loss(batch).mean()
        losses.append(value.item())
        if optimizer is None:
            continue
        penalty = adapter.penalty()
        optimizer.zero_grad()
        (value if penalty is None else value + penalty).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        adapter.after_step(step)
    return losses


def attach(checkpoint: str, spec: Any, seed: int) -> Adapter:
    torch.manual_seed(seed)
    adapter = gluonts_peft.get_adapter(spec).attach(fresh(checkpoint))
    # Far more than are trained: AdaLoRA must not take ranks away before the tests look.
    adapter.prepare(500)
    return adapter


@dataclass
class Cell:
    """One adapter on one checkpoint, trained; tests ask and change nothing."""

    checkpoint: str
    spec: Any
    batch: dict[str, Tensor]
    adapter: Adapter
    folder: Path
    initial_answers: list[Tensor]
    initial: dict[str, Tensor]
    after_few: dict[str, Tensor]
    losses: list[float]

    @property
    def backbone(self) -> Backbone:
        return self.adapter.attached

    @property
    def trains(self) -> bool:
        return self.spec != "none"


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: f"{cell[0]}-{label(cell[1])}")
def cell(request: pytest.FixtureRequest, make_batch: Callable[..., dict[str, Tensor]], tmp_path_factory: Any) -> Cell:
    checkpoint, spec = request.param
    batch = make_batch()
    adapter = attach(checkpoint, spec, seed=1)
    initial_answers, initial = answers(adapter.attached, batch), adapter_tensors(adapter)
    losses = train(adapter, batch, FEW)
    after_few = adapter_tensors(adapter)
    losses += train(adapter, batch, ALL - FEW)
    folder = tmp_path_factory.mktemp("adapter") / "saved"
    adapter.save(folder)
    return Cell(checkpoint, spec, batch, adapter, folder, initial_answers, initial, after_few, losses)


def test_output_is_unchanged_at_initialisation(cell: Cell) -> None:
    for mine, official in zip(cell.initial_answers, answers(base(cell.checkpoint), cell.batch), strict=True):
        torch.testing.assert_close(mine, official, rtol=1e-5, atol=1e-4)


def test_exactly_its_own_parameters_are_trainable(cell: Cell) -> None:
    trainable = [name for name, parameter in cell.backbone.named_parameters() if parameter.requires_grad]

    assert trainable == [f"network.{name}" for name in cell.adapter.parameter_names()]
    assert bool(trainable) == cell.trains


def test_parameters_are_counted_once_each(cell: Cell) -> None:
    tensors = adapter_tensors(cell.adapter)

    assert cell.adapter.num_parameters() == sum(tensor.numel() for tensor in tensors.values())
    assert len(cell.adapter.parameters()) == len(tensors)


def test_a_few_steps_move_every_tensor_of_the_adapter(cell: Cell) -> None:
    still = [name for name in cell.initial if torch.equal(cell.initial[name], cell.after_few[name])]

    assert [name for name in still if not WITHOUT_EFFECT[cell.checkpoint].search(name)] == []


def test_training_moves_no_tensor_of_the_base(cell: Cell) -> None:
    mine = set(cell.adapter.parameter_names())
    network = cell.backbone.network
    now = {
        unwrapped(name): tensor
        for name, tensor in (*network.named_parameters(remove_duplicate=False), *network.named_buffers())
        if name not in mine
    }
    own = {id(parameter) for parameter in cell.adapter.parameters()}
    selected = {
        unwrapped(name) for name, parameter in network.named_parameters(remove_duplicate=False) if id(parameter) in own
    }
    before = base(cell.checkpoint).network.state_dict()

    assert [name for name in before if name not in now and name not in selected] == []
    assert [name for name in before if name not in selected and not torch.equal(before[name], now[name])] == []


def test_training_loss_falls(cell: Cell) -> None:
    if cell.trains:
        assert cell.losses[-1] < cell.losses[0]
    else:
        assert set(cell.losses) == {cell.losses[0]}


def test_saved_adapter_gives_the_same_forecasts_under_another_seed(cell: Cell) -> None:
    moved = not torch.equal(loss(cell.backbone, cell.batch), loss(base(cell.checkpoint), cell.batch))
    assert moved == cell.trains
    torch.manual_seed(1234)
    again = fresh(cell.checkpoint)
    loaded = load_adapter(cell.folder, again)

    assert torch.equal(loss(again, cell.batch), loss(cell.backbone, cell.batch))
    assert torch.equal(forecast(again, cell.batch), forecast(cell.backbone, cell.batch))
    assert loaded.spec == cell.adapter.spec
    assert again.adapter is loaded


def test_only_json_and_safetensors_are_written(cell: Cell) -> None:
    files = [path for path in cell.folder.rglob("*") if path.is_file()]

    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.name == "adapter_model.safetensors" for path in files) == len(names(cell.spec))
    record = json.loads((cell.folder / "gluonts_peft.json").read_text())
    assert record["adapter"] == cell.adapter.spec
    assert record["base"]["fingerprint"] == cell.backbone.source.fingerprint


def test_parts_of_a_hybrid_open_by_themselves(cell: Cell) -> None:
    if not isinstance(cell.spec, list):
        assert not any(path.is_dir() for path in cell.folder.iterdir())
        return
    state = cell.adapter.state_dict()
    assert sorted(path.name for path in cell.folder.iterdir() if path.is_dir()) == sorted(cell.spec)
    for name in cell.spec:
        part = load_adapter(cell.folder / name, fresh(cell.checkpoint))
        assert same(
            {f"{name}/{key}": tensor for key, tensor in part.state_dict().items()},
            {k: t for k, t in state.items() if k.startswith(f"{name}/")},
        )


def test_fused_forecasts_are_the_same_and_the_weights_come_back_bit_by_bit(cell: Cell) -> None:
    before, state = answers(cell.backbone, cell.batch), clone(cell.backbone.network.state_dict())
    with cell.adapter.fused():
        assert_close(answers(cell.backbone, cell.batch), before)

    assert same(cell.backbone.network.state_dict(), state)
    for left, right in zip(answers(cell.backbone, cell.batch), before, strict=True):
        assert torch.equal(left, right)


def test_fused_restores_after_an_error(cell: Cell) -> None:
    state = clone(cell.backbone.network.state_dict())

    def stumble() -> None:
        with cell.adapter.fused():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stumble()

    assert same(cell.backbone.network.state_dict(), state)


def test_detaching_gives_back_the_base_bit_by_bit(cell: Cell) -> None:
    backbone = fresh(cell.checkpoint)
    adapter = load_adapter(cell.folder, backbone)
    adapter.prepare(500)
    train(adapter, cell.batch, 2)
    adapter.detach()

    assert same(backbone.network.state_dict(), base(cell.checkpoint).network.state_dict())
    assert torch.equal(loss(backbone, cell.batch), loss(base(cell.checkpoint), cell.batch))
    assert torch.equal(forecast(backbone, cell.batch), forecast(base(cell.checkpoint), cell.batch))
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.adapter is None
    assert adapter.backbone is None


def test_merging_keeps_the_forecasts_and_leaves_a_plain_network(cell: Cell) -> None:
    backbone = fresh(cell.checkpoint)
    adapter = load_adapter(cell.folder, backbone)
    before = answers(backbone, cell.batch)
    if not adapter.mergeable:
        with pytest.raises(AdapterError, match="cannot be merged: its effect is not a change of the weights$"):
            adapter.merge()
        return
    adapter.merge()

    assert_close(answers(backbone, cell.batch), before)
    plain = base(cell.checkpoint).network
    assert list(backbone.network.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in backbone.network.modules()] == [type(module) for module in plain.modules()]
    assert same(backbone.network.state_dict(), plain.state_dict()) == (not cell.trains)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.adapter is None


def test_the_seed_decides_initialisation_and_training(cell: Cell) -> None:
    twin, other = attach(cell.checkpoint, cell.spec, seed=1), attach(cell.checkpoint, cell.spec, seed=2)
    start = adapter_tensors(twin)
    losses = train(twin, cell.batch, FEW)

    assert same(start, cell.initial)
    assert same(adapter_tensors(other), cell.initial) == (not names(cell.spec) & RANDOM)
    assert losses == cell.losses[:FEW]
    assert same(adapter_tensors(twin), cell.after_few)


def test_state_dict_makes_a_round_trip(cell: Cell) -> None:
    state = clone(cell.adapter.state_dict())
    other = attach(cell.checkpoint, cell.spec, seed=2)
    assert (not same(clone(other.state_dict()), state)) == cell.trains
    other.load_state_dict(state)

    assert same(clone(other.state_dict()), state)
    assert same(adapter_tensors(other), adapter_tensors(cell.adapter))
    assert torch.equal(loss(other.attached, cell.batch), loss(cell.backbone, cell.batch))


def test_evaluation_mode_survives_attaching(cell: Cell) -> None:
    adapter = attach(cell.checkpoint, cell.spec, seed=1)

    assert not any(module.training for module in adapter.attached.network.modules())


@pytest.mark.parametrize("second", ["bitfit", "lora"])
def test_a_second_adapter_is_refused(cell: Cell, second: str) -> None:
    state = clone(cell.backbone.network.state_dict())
    message = (
        f"adapter {second} cannot be attached: {cell.adapter!r} already is; detach it, or attach a list of adapters"
        " as a hybrid"
    )
    with pytest.raises(AdapterError) as caught:
        gluonts_peft.get_adapter(second).attach(cell.backbone)

    assert str(caught.value) == message
    assert same(cell.backbone.network.state_dict(), state)


def adalora(checkpoint: str, total: int, **options: Any) -> Adapter:
    torch.manual_seed(5)
    adapter = gluonts_peft.get_adapter("adalora", **options).attach(fresh(checkpoint))
    adapter.prepare(total)
    return adapter


def ranks_left(adapter: Adapter) -> int:
    state = adapter.state_dict()
    return sum(int((tensor != 0).sum()) for name, tensor in state.items() if name.endswith("lora_E"))


@pytest.mark.parametrize(
    ("total", "options"),
    [(12, {}), (15, {"init_r": 3, "target_r": 1, "tinit": 2, "tfinal": 4})],
    ids=["defaults", "warm-up"],
)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_adalora_ends_with_its_budget_of_ranks(
    checkpoint: str, total: int, options: dict[str, int], make_batch: Callable[..., dict[str, Tensor]]
) -> None:
    adapter = adalora(checkpoint, total, **options)
    modules = sum(name.endswith("lora_E") for name in adapter.state_dict())
    train(adapter, make_batch(), total)

    assert modules == len(base(checkpoint).places(("q", "k", "v", "o")))
    assert ranks_left(adapter) == modules * options.get("target_r", 2)
    assert adapter.num_parameters() > 0


def test_adalora_goes_on_after_an_interruption(make_batch: Callable[..., dict[str, Tensor]]) -> None:
    batches = [make_batch(seed=step) for step in range(12)]
    total, cut = len(batches), 4

    def steps(adapter: Adapter, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            (adapter.attached.loss(batches[step]).mean() + adapter.penalty()).backward()
            optimizer.step()
            adapter.after_step(step)

    def optimizer_of(adapter: Adapter) -> torch.optim.Optimizer:
        return torch.optim.SGD(adapter.parameters(), lr=1.0)

    whole = adalora("t5-nano", total)
    steps(whole, optimizer_of(whole), 0, total)
    first = adalora("t5-nano", total)
    steps(first, optimizer_of(first), 0, cut)
    state, training = clone(first.state_dict()), clone(first.training_state())
    torch.manual_seed(77)
    second = gluonts_peft.get_adapter("adalora").attach(fresh("t5-nano"))
    second.prepare(total)
    second.load_state_dict(state)
    second.load_training_state(training)
    assert same(clone(second.training_state()), training)
    steps(second, optimizer_of(second), cut, total)

    assert same(adapter_tensors(second), adapter_tensors(whole))
    assert same(clone(second.training_state()), clone(whole.training_state()))
    # The state is not an ornament: without it the next step already judges the ranks differently.
    assert {name.partition("/")[0] for name in training} == {"ipt", "exp_avg_ipt", "exp_avg_unc", "ranks"}
    mindful, forgetful = (gluonts_peft.get_adapter("adalora").attach(fresh("t5-nano")) for _ in range(2))
    mindful.prepare(total)
    forgetful.prepare(total)
    mindful.load_training_state(training)
    for adapter in (mindful, forgetful):
        adapter.load_state_dict(state)
        steps(adapter, optimizer_of(adapter), cut, cut + 1)
    assert not same(mindful.training_state(), forgetful.training_state())
