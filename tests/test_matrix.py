"""Every adapter on every installed family keeps the same promises: the public checks, on each bundled checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gluonts_peft
from gluonts_peft.adapters.base import Adapter
from gluonts_peft.backbone import Backbone
from gluonts_peft.registry import families
from gluonts_peft.testing import Check, adapter_checks, parametrize_with_checks
from gluonts_peft.testing.cases import label_of

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
# Parts that select and parts that add, one that exchanges modules, one that must be innermost: enough elsewhere.
ELSEWHERE: list[Any] = [*gluonts_peft.list_adapters(), ["layernorm", "lora"], ["vera", "oft", "lora", "bitfit"]]

# Methods that start from random numbers; all others start from constants, or from the seed in their configuration.
RANDOM = {"lora", "dora", "adalora", "hra", "trace"}
# Parameters that cannot have an influence on the loss of these checkpoints, by regular expression.
WITHOUT_EFFECT = {
    # A single token is decoded, so the softmax of its self-attention is 1 whatever queries, keys and positions are.
    "bolt-nano": r"decoder\.block\.\d+\.layer\.0\.SelfAttention\.(q|k|relative_attention_bias)\.",
    # Attention over the group of a window, which has a single member here.
    "chronos2-nano": r"encoder\.block\.\d+\.layer\.1\.self_attention\.(q|k)\.",
    # The reconstruction head and the token of masked patches have no part in a forecast.
    "moment-nano": r"^(head\.linear\.|patch_embedding\.mask_embedding$)",
}


def checkpoints() -> Iterator[tuple[str, str]]:
    for family in families.names():
        yield from ((family, name) for name in families.get(family).backbone_class.bundled())


CHECKPOINTS = list(checkpoints())


@cache
def base(family: str, checkpoint: str) -> Backbone:
    return gluonts_peft.load_backbone(family, checkpoint=checkpoint, prediction_length=8, context_length=48)


def cells() -> Iterator[Check]:
    for family, checkpoint in CHECKPOINTS:
        for spec in SPECS if checkpoint in ("bolt-nano", "t5-nano") else ELSEWHERE:
            yield from adapter_checks(
                spec,
                partial(base, family, checkpoint),
                label=f"{family}-{checkpoint}-{label_of(spec)}",
                without_effect=WITHOUT_EFFECT.get(checkpoint, ()),
            )


@parametrize_with_checks(cells())
def test_adapter(check: Check) -> None:
    check()


def test_every_family_of_the_repository_takes_part() -> None:
    root = Path(__file__).parents[1] / "plugins"
    here = {line for path in root.glob("*/pyproject.toml") for line in path.read_text().splitlines()}
    offered = {line.split("=")[0].strip() for line in here if line.endswith('Estimator"')}

    assert offered >= {"chronos"}
    assert offered <= {family for family, _ in CHECKPOINTS}


def fresh(checkpoint: str) -> Backbone:
    return deepcopy(base("chronos", checkpoint))


def attach(spec: Any, seed: int, checkpoint: str = "t5-nano") -> Adapter:
    torch.manual_seed(seed)
    return gluonts_peft.get_adapter(spec).attach(fresh(checkpoint))


def clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    everything = dict(adapter.attached.network.named_parameters())
    return clone({name: everything[name] for name in adapter.parameter_names()})


@pytest.mark.parametrize("spec", SPECS, ids=label_of)
def test_only_some_methods_start_from_random_numbers(spec: Any) -> None:
    first, other = attach(spec, seed=1), attach(spec, seed=2)
    names = set(re.findall(r"\w+", re.sub(r"\([^)]*\)", "", label_of(spec))))

    assert same(tensors(first), tensors(other)) == (not names & RANDOM)


def adalora(checkpoint: str, total: int, **options: Any) -> Adapter:
    adapter = attach({"name": "adalora", **options}, 5, checkpoint)
    adapter.prepare(total)
    return adapter


def ranks_left(adapter: Adapter) -> int:
    state = adapter.state_dict()
    return sum(int((tensor != 0).sum()) for name, tensor in state.items() if name.endswith("lora_E"))


def steps(
    adapter: Adapter, optimizer: torch.optim.Optimizer, batches: list[dict[str, Tensor]], first: int, last: int
) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        penalty = adapter.penalty()
        assert penalty is not None
        (adapter.attached.loss(batches[step]).mean() + penalty).backward()
        optimizer.step()
        adapter.after_step(step)


@pytest.mark.parametrize(
    ("total", "options"),
    [(12, {}), (15, {"init_r": 3, "target_r": 1, "tinit": 2, "tfinal": 4})],
    ids=["defaults", "warm-up"],
)
@pytest.mark.parametrize("checkpoint", ["bolt-nano", "t5-nano"])
def test_adalora_ends_with_its_budget_of_ranks(
    checkpoint: str, total: int, options: dict[str, int], make_batch: Callable[..., dict[str, Tensor]]
) -> None:
    adapter = adalora(checkpoint, total, **options)
    modules = sum(name.endswith("lora_E") for name in adapter.state_dict())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=adapter.learning_rate, weight_decay=0.0)
    steps(adapter, optimizer, [make_batch()] * total, 0, total)

    assert modules == len(base("chronos", checkpoint).places(("q", "k", "v", "o")))
    assert ranks_left(adapter) == modules * options.get("target_r", 2)
    assert adapter.num_parameters() > 0


def test_adalora_goes_on_after_an_interruption(make_batch: Callable[..., dict[str, Tensor]]) -> None:
    batches = [make_batch(seed=step) for step in range(12)]
    total, cut = len(batches), 4

    def optimizer_of(adapter: Adapter) -> torch.optim.Optimizer:
        return torch.optim.SGD(adapter.parameters(), lr=1.0)

    whole = adalora("t5-nano", total)
    steps(whole, optimizer_of(whole), batches, 0, total)
    first = adalora("t5-nano", total)
    steps(first, optimizer_of(first), batches, 0, cut)
    state, training = clone(first.state_dict()), clone(first.training_state())
    second = attach("adalora", 77)
    second.prepare(total)
    second.load_state_dict(state)
    second.load_training_state(training)
    assert same(clone(second.training_state()), training)
    steps(second, optimizer_of(second), batches, cut, total)

    assert same(tensors(second), tensors(whole))
    assert same(clone(second.training_state()), clone(whole.training_state()))
    # The state is not an ornament: without it the next step already judges the ranks differently.
    assert {name.partition("/")[0] for name in training} == {"ipt", "exp_avg_ipt", "exp_avg_unc", "ranks"}
    mindful, forgetful = (gluonts_peft.get_adapter("adalora").attach(fresh("t5-nano")) for _ in range(2))
    mindful.prepare(total)
    forgetful.prepare(total)
    mindful.load_training_state(training)
    for adapter in (mindful, forgetful):
        adapter.load_state_dict(state)
        steps(adapter, optimizer_of(adapter), batches, cut, cut + 1)
    assert not same(mindful.training_state(), forgetful.training_state())
