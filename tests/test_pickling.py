"""A backbone with any adapter and any head can be sent to another process, which forecasts the same bit by bit."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor

from gluonts_peft import Backbone, get_adapter, list_adapters, list_families, load_backbone
from gluonts_peft.heads import KINDS
from gluonts_peft.registry import adapter_names
from gluonts_peft.testing import make_batch
from gluonts_peft.testing.cases import label_of

HYBRIDS: list[Any] = [["lora", "bitfit"], ["layernorm", "vera", "ia3"]]
HEADS: list[Any] = [{"name": "head", "kind": kind} for kind in KINDS]

# What a worker does: read backbones from a file one after another, and forecast.
WORKER = """
import pickle, sys, torch
torch.set_num_threads(1)
count, source, target = sys.argv[1:]
found = []
with open(source, "rb") as file:
    for _ in range(int(count)):
        backbone, batch = pickle.load(file)
        with backbone.reading() as reader:
            generator = torch.Generator().manual_seed(0)
            found.append(reader.forecast(batch, num_samples=2, generator=generator).values)
torch.save(found, target)
"""


def specs(backbone: Backbone) -> Iterator[Any]:
    heads = [*HEADS, ["lora", HEADS[-1]]] if "features" in backbone.capabilities else []
    for spec in [*list_adapters(), *HYBRIDS, *heads]:
        names = adapter_names(spec)
        if names & set(backbone.impossible):
            continue
        if "head" not in backbone.untrained or names & {"head", "full"}:
            yield spec
        elif names != {"none"}:
            # Without one there is nothing to forecast with.
            yield [*(spec if isinstance(spec, list) else [spec]), "head"]


def attached(spec: Any, backbone: Backbone) -> Backbone:
    """The backbone with an adapter that changes its forecasts."""
    torch.manual_seed(0)
    adapter = get_adapter(spec).attach(backbone)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return backbone


def past_of(backbone: Backbone) -> dict[str, Tensor]:
    batch = make_batch(backbone, size=2)
    return {name: tensor for name, tensor in batch.items() if not name.startswith("future_")}


def forecast(backbone: Backbone, batch: dict[str, Tensor]) -> Tensor:
    with backbone.reading() as reader:
        return reader.forecast(batch, num_samples=2, generator=torch.Generator().manual_seed(0)).values


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Of each family and adapter, the forecasts here and those of one worker for all."""
    folder = tmp_path_factory.mktemp("worker")
    here: list[tuple[str, str, Tensor]] = []
    with (folder / "sent").open("wb") as file:
        for family in list_families():
            backbone = load_backbone(family, prediction_length=4, context_length=32)
            batch = past_of(backbone)
            for spec in specs(backbone):
                pickle.dump((attached(spec, backbone), batch), file)
                here.append((family, label_of(spec), forecast(backbone, batch)))
                assert backbone.adapter is not None
                backbone.adapter.detach()
    command = [sys.executable, "-c", WORKER, str(len(here)), str(folder / "sent"), str(folder / "back")]
    subprocess.run(command, check=True, timeout=1100)
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for (family, name, own), other in zip(here, torch.load(folder / "back"), strict=True):
        found.setdefault(family, {})[name] = (own, other)
    return found


@pytest.mark.parametrize("family", list_families())
def test_every_adapter_and_head_forecasts_the_same_in_another_process(family: str, answers: Any) -> None:
    found = answers[family]

    assert [name for name, pair in found.items() if not torch.equal(*pair)] == []
    # The adapters do change the forecasts, each in its own way.
    assert len({tuple(own.flatten().tolist()) for own, _ in found.values()}) >= len(found) - 3


@pytest.mark.parametrize("spec", ["dora", "trace", ["fourierft", HEADS[-1]]], ids=label_of)
def test_copies_are_independent_however_they_are_made(spec: Any) -> None:
    backbone = attached(spec, load_backbone("chronos", prediction_length=4, context_length=32))
    batch = past_of(backbone)
    before = forecast(backbone, batch)
    copies = [
        copy.deepcopy(backbone),
        pickle.loads(pickle.dumps(backbone)),
        cloudpickle.loads(cloudpickle.dumps(backbone)),
    ]
    for each in copies:
        assert torch.equal(forecast(each, batch), before)
        assert each.adapter is not None
        with torch.no_grad():
            for parameter in each.adapter.parameters():
                parameter.mul_(2.0)
        changed = forecast(each, batch)

        assert not torch.equal(changed, before)
        assert torch.equal(forecast(backbone, batch), before)
        each.adapter.detach()
        assert each.adapter is None
    assert backbone.adapter is not None
    backbone.adapter.detach()
    zero_shot = forecast(backbone, batch)
    assert all(torch.equal(forecast(each, batch), zero_shot) for each in copies)


def test_a_base_is_sent_once() -> None:
    backbone = load_backbone("chronos", prediction_length=4, context_length=32)
    plain = len(pickle.dumps(backbone))

    assert len(pickle.dumps(attached("lora", backbone))) < 1.2 * plain


def test_no_class_is_swapped() -> None:
    backbone = load_backbone("chronos", prediction_length=4, context_length=32)
    kinds = {type(module) for module in backbone.modules()}
    for spec in ("trace", "dora", "fourierft", HEADS[0]):
        new = {type(module) for module in attached(spec, backbone).modules()} - kinds
        assert backbone.adapter is not None
        backbone.adapter.detach()

        assert all(getattr(sys.modules[kind.__module__], kind.__qualname__) is kind for kind in new), new
