"""Clauses of the contract of an adapter, :class:`gluonts_peft.adapters.base.Adapter`."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict
from functools import partial
from unittest import SkipTest

import torch
from torch import Tensor

from ..adapters.base import RECORD, AdapterError, unwrapped
from ..adapters.load import get_adapter, load_adapter
from .cases import (
    FEW,
    MORE,
    PLANNED,
    AdapterCase,
    apart,
    at_once,
    clone,
    differing,
    fail,
    forecast_of,
    loss_of,
    optimizer_of,
    read_answers,
    same,
    tensors_of,
    train_steps,
    traits,
)
from .contract import Clause, clause_of, refusal, require

__all__ = ["ADAPTER_CHECKS"]

ADAPTER_CHECKS: dict[str, Clause] = {}


def _close(found: list[Tensor], expected: list[Tensor], message: str, rtol: float, atol: float) -> None:
    for left, right in zip(found, expected, strict=True):
        require(torch.allclose(left, right, rtol=rtol, atol=atol), f"{message} ({apart(left, right)})")


@clause_of(ADAPTER_CHECKS)
def attaches_or_is_refused_with_the_reason(case: AdapterCase) -> None:
    """The adapter attaches; if the family declares it impossible, it is refused with the reason instead."""
    if not case.impossible:
        adapter = case.cell.adapter
        require(adapter.attached.adapter is adapter, "adapter and backbone do not know each other")
        return
    backbone = case.fresh()
    adapter = get_adapter(copy.deepcopy(case.spec))
    said = refusal(partial(adapter.attach, backbone), AdapterError, f"attaching {case.spec!r}")
    require(any(why in said for why in case.impossible.values()), f"the refusal does not say why: {said}")
    require(
        backbone.adapter is None and same(backbone.network.state_dict(), case.base.network.state_dict()),
        "attaching was refused and changed the network all the same",
    )


@clause_of(ADAPTER_CHECKS)
def output_is_unchanged_at_initialisation(case: AdapterCase) -> None:
    """An adapter that has just been attached changes neither loss nor forecast, unless it brings a new head."""
    if case.cell.adapter.head_levels is not None:
        raise SkipTest("a new head takes the place of the model's own")
    hint = "attaching changes the output; start the change at zero"
    _close(case.cell.initial_answers, case.answers(case.base), hint, rtol=1e-5, atol=1e-4)


@clause_of(ADAPTER_CHECKS)
def exactly_its_own_parameters_train(case: AdapterCase) -> None:
    """What requires a gradient is what parameter_names() says, and there is something."""
    cell = case.cell
    trainable = [name for name, parameter in cell.backbone.named_parameters() if parameter.requires_grad]
    mine = [f"network.{name}" for name in cell.adapter.parameter_names()]
    require(
        trainable == mine,
        f"{len(trainable)} parameters train, {len(mine)} are the adapter's (first that differs:"
        f" {next(iter(set(trainable) ^ set(mine)), 'their order')}); parameters() must list exactly what trains",
    )
    require(bool(mine) == case.trains, "the adapter has nothing to train; it should be refused, or declared impossible")


@clause_of(ADAPTER_CHECKS)
def parameters_are_counted_once(case: AdapterCase) -> None:
    """num_parameters() counts each trainable number once."""
    adapter, tensors = case.cell.adapter, tensors_of(case.cell.adapter)
    count = sum(tensor.numel() for tensor in tensors.values())
    require(
        adapter.num_parameters() == count, f"num_parameters() is {adapter.num_parameters()}, the tensors have {count}"
    )
    require(len(adapter.parameters()) == len(tensors), "parameters() lists a tensor twice")


@clause_of(ADAPTER_CHECKS)
def every_tensor_moves(case: AdapterCase) -> None:
    """A few steps of training move every tensor of the adapter."""
    cell = case.cell
    still = [name for name in cell.initial if torch.equal(cell.initial[name], cell.after_few[name])]
    still = [name for name in still if not any(pattern.search(name) for pattern in case.without_effect)]
    require(
        not still,
        f"training does not move {len(still)} of {len(cell.initial)} tensors (first: {', '.join(still[:3])}); if they"
        " have no influence on this network, name them in without_effect",
    )


@clause_of(ADAPTER_CHECKS)
def base_stays_untouched(case: AdapterCase) -> None:
    """Training moves no tensor of the base but those that the adapter has selected."""
    adapter, network = case.cell.adapter, case.cell.backbone.network
    mine, own = set(adapter.parameter_names()), {id(parameter) for parameter in adapter.parameters()}
    named = list(network.named_parameters(remove_duplicate=False))
    now = {unwrapped(name): tensor for name, tensor in (*named, *network.named_buffers()) if name not in mine}
    selected = {unwrapped(name) for name, parameter in named if id(parameter) in own}
    before = case.base.network.state_dict()
    lost = [name for name in before if name not in now and name not in selected]
    require(not lost, f"{lost[:1]} of the base is gone while the adapter is attached")
    moved = [name for name in before if name not in selected and not torch.equal(before[name], now[name])]
    require(not moved, f"training moved {len(moved)} tensors of the base (first: {moved[:1]}); freeze them")


@clause_of(ADAPTER_CHECKS)
def training_loss_falls(case: AdapterCase) -> None:
    """Fifteen steps on one batch, at the adapter's own learning rate, lower its loss."""
    losses = case.cell.losses
    if case.trains:
        require(
            losses[-1] < losses[0],
            f"the loss goes from {losses[0]:.6g} to {losses[-1]:.6g} in {len(losses)} steps; is the learning rate"
            f" {case.cell.adapter.learning_rate:g} of the adapter too large, or does its gradient not reach it?",
        )
    else:
        require(len(set(losses)) == 1, "the loss changes although nothing trains")


@clause_of(ADAPTER_CHECKS)
def saved_adapter_forecasts_the_same(case: AdapterCase) -> None:
    """What was saved gives bit for bit the same loss and forecast on a fresh base, under another seed."""
    cell = case.cell
    before, base = loss_of(cell.backbone, case.batch), loss_of(case.base, case.batch)
    require(torch.equal(before, base) != case.trains, "training did not change the loss, so saving cannot be checked")
    torch.manual_seed(1234)
    again, loaded = case.moved(cell.folder)
    found = loss_of(again, case.batch)
    require(
        torch.equal(found, before), f"a loaded adapter has another loss than the saved one ({apart(found, before)})"
    )
    if case.trains or not case.base.untrained:
        found, before = forecast_of(again, case.batch).values, forecast_of(cell.backbone, case.batch).values
        require(torch.equal(found, before), f"a loaded adapter has other forecasts ({apart(found, before)})")
    require(
        loaded.spec == cell.adapter.spec, f"a loaded adapter calls itself {loaded.spec!r}, not {cell.adapter.spec!r}"
    )
    require(again.adapter is loaded, "a loaded adapter is not attached")


@clause_of(ADAPTER_CHECKS)
def only_json_and_safetensors_are_written(case: AdapterCase) -> None:
    """A saved adapter is JSON and safetensors, and records its base."""
    folder = case.cell.folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in files}
    require(suffixes == {".json", ".safetensors"}, f"a saved adapter has files of type {sorted(suffixes)}")
    count = sum(path.name == "adapter_model.safetensors" for path in files)
    require(count == len(case.parts), f"{count} files adapter_model.safetensors are written for {case.parts}")
    record = json.loads((folder / RECORD).read_text())
    require(record["adapter"] == case.cell.adapter.spec, f"{RECORD} names adapter {record['adapter']!r}")
    require(
        record["base"] == asdict(case.base.source), f"{RECORD} names the base {record['base']}, not {case.base.source}"
    )


@clause_of(ADAPTER_CHECKS)
def parts_of_a_hybrid_open_by_themselves(case: AdapterCase) -> None:
    """Each part of a hybrid has a folder of its own, which loads as an adapter by itself."""
    cell, folders = case.cell, sorted(path.name for path in case.cell.folder.iterdir() if path.is_dir())
    if not isinstance(case.spec, list):
        require(not folders, f"a single adapter is saved in several folders: {folders}")
        return
    require(folders == sorted(case.parts), f"a hybrid of {case.parts} is saved in the folders {folders}")
    state = cell.adapter.state_dict()
    for name in case.parts:
        part = load_adapter(cell.folder / name, case.fresh())
        alone = {f"{name}/{key}": tensor for key, tensor in part.state_dict().items()}
        together = {key: tensor for key, tensor in state.items() if key.startswith(f"{name}/")}
        require(
            same(alone, together), f"part {name!r} loads by itself with other tensors: {differing(alone, together)}"
        )


@clause_of(ADAPTER_CHECKS)
def reading_gives_the_same_answers(case: AdapterCase) -> None:
    """What reads, with the adapter folded in where that can be, answers as the model itself."""
    cell = case.cell
    with cell.backbone.reading() as reader:
        inside = case.answers(reader)
    _close(inside, case.answers(cell.backbone), "reading() changes the answers", rtol=2e-4, atol=2e-4)


@clause_of(ADAPTER_CHECKS)
def reading_changes_nothing(case: AdapterCase) -> None:
    """Threads that read one model at once answer as one does alone; no tensor, module or mode of it changes."""
    backbone = case.cell.backbone
    # Earlier readers may already have changed something.
    backbone.weights.forget()
    before = traits(backbone)
    with backbone.reading() as reader:
        alone = case.answers(reader)
    for answers in at_once(lambda: read_answers(case, backbone)):
        _close(answers, alone, "threads that read at once get other answers", rtol=0.0, atol=0.0)
    require(
        not (found := traits(backbone).differing(before)),
        f"reading changes {found}; _fold_into() may write only into what folds() names",
    )


@clause_of(ADAPTER_CHECKS)
def failed_attach_leaves_nothing(case: AdapterCase) -> None:
    """If attaching fails, also at its very end, the backbone is what it was."""
    case.possible()
    backbone = case.fresh()
    before = traits(backbone)
    adapter = get_adapter(copy.deepcopy(case.spec))
    adapter._bind = partial(fail, adapter._bind)  # type: ignore[method-assign]
    refusal(partial(adapter.attach, backbone), AdapterError, "attaching what fails")
    require(
        backbone.adapter is None and not (found := traits(backbone).differing(before)),
        f"an attach that failed leaves {found or 'the adapter'} behind; do the work in _attach()",
    )


@clause_of(ADAPTER_CHECKS)
def detaching_gives_back_the_base(case: AdapterCase) -> None:
    """After detach() the backbone is bit by bit the base, whatever was trained."""
    backbone = case.fresh()
    before = traits(backbone)
    adapter = load_adapter(case.cell.folder, backbone)
    adapter.prepare(PLANNED)
    train_steps(adapter, case.batch, optimizer_of(adapter), range(2))
    adapter.detach()
    require(not (left := traits(backbone).differing(before)), f"detach() leaves {left} changed")
    state, plain = backbone.network.state_dict(), case.base.network.state_dict()
    require(same(state, plain), f"detach() leaves {differing(plain, state)} of the base changed")
    require(
        torch.equal(loss_of(backbone, case.batch), loss_of(case.base, case.batch)), "the loss differs after detach()"
    )
    if not case.base.untrained:
        found, expected = forecast_of(backbone, case.batch).values, forecast_of(case.base, case.batch).values
        require(torch.equal(found, expected), f"forecasts differ after detach() ({apart(found, expected)})")
    require(not any(p.requires_grad for p in backbone.parameters()), "something still trains after detach()")
    require(backbone.adapter is None and adapter.backbone is None, "adapter and backbone still know each other")


@clause_of(ADAPTER_CHECKS)
def merging_keeps_the_answers(case: AdapterCase) -> None:
    """merge() leaves a plain network with the same answers; a method that cannot be merged is refused."""
    backbone, adapter = case.moved(case.cell.folder)
    before = case.answers(backbone)
    shared = [(name, tensor.detach(), tensor.detach().clone()) for name, tensor in backbone.named_parameters()]
    if not adapter.mergeable:
        said = refusal(adapter.merge, AdapterError, "merging an adapter that is not mergeable")
        require("merged" in said, f"the refusal does not say what cannot be done: {said}")
        return
    adapter.merge()
    _close(case.answers(backbone), before, "merging changes the answers", rtol=2e-4, atol=2e-4)
    plain, state = case.base.network, backbone.network.state_dict()
    require(
        list(state) == list(plain.state_dict()), "a merged network has other tensors than the base; unwrap all layers"
    )
    types = [type(module) for module in backbone.network.modules()]
    require(types == [type(module) for module in plain.modules()], "a merged network has other modules than the base")
    require(same(state, plain.state_dict()) != case.trains, "merging changes no weight: the adapter's effect is lost")
    require(not any(p.requires_grad for p in backbone.parameters()), "something still trains after merge()")
    require(backbone.adapter is None, "the backbone still has an adapter after merge()")
    require(backbone.merged == case.trains, "the backbone does not know that it is merged")
    changed = [name for name, value, saved in shared if not torch.equal(value, saved)]
    require(not changed, f"merging writes into {changed[:1]}, which other backbones may share; give it a new value")


@clause_of(ADAPTER_CHECKS)
def pickling_keeps_the_answers(case: AdapterCase) -> None:
    """A backbone with the adapter can be pickled, to go to another process, and gives the same answers there."""
    cell = case.cell
    try:
        copied = pickle.loads(pickle.dumps(cell.backbone))
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        require(False, f"the backbone with the adapter cannot be pickled ({fault}); give classes and functions a name")
    same_answers = all(map(torch.equal, case.answers(copied), case.answers(cell.backbone)))
    require(same_answers, "pickling the backbone with the adapter changes the answers")


@clause_of(ADAPTER_CHECKS)
def seed_decides_the_numbers(case: AdapterCase) -> None:
    """Attaching and training again under the same seed gives the same numbers."""
    cell, twin = case.cell, case.attach(seed=1)
    require(same(tensors_of(twin), cell.initial), "the same seed initialises the adapter differently")
    losses = train_steps(twin, case.batch, optimizer_of(twin), range(FEW))
    require(losses == cell.losses[:FEW], "the same seed gives other losses")
    require(same(tensors_of(twin), cell.after_few), "the same seed trains other weights")


@clause_of(ADAPTER_CHECKS)
def state_makes_a_round_trip(case: AdapterCase) -> None:
    """load_state_dict takes over exactly what state_dict gave."""
    cell, other = case.cell, case.attach(seed=2)
    state = clone(cell.adapter.state_dict())
    require(same(clone(other.state_dict()), state) != case.trains, "state_dict() does not hold what was trained")
    other.load_state_dict(state)
    require(same(clone(other.state_dict()), state), "load_state_dict does not take over every tensor")
    require(same(tensors_of(other), tensors_of(cell.adapter)), "state_dict lacks tensors that train")
    require(torch.equal(loss_of(other.attached, case.batch), loss_of(cell.backbone, case.batch)), "the loss differs")


@clause_of(ADAPTER_CHECKS)
def interrupted_training_goes_on(case: AdapterCase) -> None:
    """State, training state and optimiser of an interrupted training lead to the same weights as an undisturbed one."""
    cell, other = case.cell, case.attach(seed=2)
    state, training, optimizer_state = cell.interruption
    other.load_state_dict(state)
    other.load_training_state(training)
    optimizer = optimizer_of(other)
    if optimizer is not None:
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    losses = train_steps(other, case.batch, optimizer, range(FEW, MORE))
    require(losses == cell.losses[FEW:MORE], "a resumed training has other losses; training_state() must hold the rest")
    require(same(tensors_of(other), cell.after_more), "a resumed training ends with other weights")


@clause_of(ADAPTER_CHECKS)
def evaluation_mode_survives_attaching(case: AdapterCase) -> None:
    """Attaching to a network in evaluation mode leaves no module in training mode."""
    training = case.cell.training
    require(not training, f"{training[:1]} is in training mode after attaching")


@clause_of(ADAPTER_CHECKS)
def second_adapter_is_refused(case: AdapterCase) -> None:
    """A backbone has one adapter at a time; a second one is refused and changes nothing."""
    cell = case.cell
    state = clone(cell.backbone.network.state_dict())
    for second in ("bitfit", "lora"):
        said = refusal(partial(get_adapter(second).attach, cell.backbone), AdapterError, f"a second adapter {second}")
        expected = (
            f"adapter {second} cannot be attached: {cell.adapter!r} already is; detach it, or attach a list of adapters"
            " as a hybrid"
        )
        require(said == expected, f"a second adapter is refused with another sentence: {said}")
    require(same(cell.backbone.network.state_dict(), state), "a refused second adapter changed the network")
