"""Clauses of the contract of a model family, :class:`gluonts_peft.backbone.Backbone`."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

from ..adapters.base import AdapterError
from ..adapters.load import get_adapter
from ..backbone import CAPABILITIES, SITES
from ..checkpoint import CheckpointError
from ..errors import unknown
from ..registry import adapters
from ..units import EQUIVARIANCE
from .cases import (
    BackboneCase,
    apart,
    at_once,
    clone,
    differing,
    forecast_of,
    loss_of,
    make_batch,
    near,
    quiet,
    rows,
    same,
    traits,
    without_start,
)
from .contract import Clause, ContractError, clause_of, refusal, require

__all__ = ["BACKBONE_CHECKS"]

BACKBONE_CHECKS: dict[str, Clause] = {}
LINEAR = ("q", "k", "v", "o", "ff_in", "ff_out")


@clause_of(BACKBONE_CHECKS)
def declarations_are_known(case: BackboneCase) -> None:
    """What the class declares are names that the project knows."""
    from gluonts import time_feature

    base = case.base
    require(
        isinstance(getattr(base, "family", None), str) and base.family, "set the class attribute `family` to a name"
    )
    for name in base.capabilities:
        require(name in CAPABILITIES, f"capabilities: {unknown('capability', name, CAPABILITIES)}")
    require(
        {"samples", "quantiles"} & base.capabilities,
        f"capabilities {sorted(base.capabilities)} do not say how it forecasts: add 'samples' or 'quantiles'",
    )
    for name, reason in base.impossible.items():
        require(name in adapters.names(), f"impossible: {unknown('adapter', name, adapters.names())}")
        require(isinstance(reason, str) and reason.strip(), f"impossible[{name!r}] needs a reason that users can read")
    for name in base.untrained:
        require(name in SITES, f"untrained: {unknown('site', name, SITES)}")
    for name in base.time_features:
        require(hasattr(time_feature, name), f"time_features: {unknown('function', name, time_feature.__all__)}")


@clause_of(BACKBONE_CHECKS)
def sites_name_places_of_the_network(case: BackboneCase) -> None:
    """Each site is a module or parameter that the network has, of the type its kind asks for."""
    network, sites = case.base.network, case.base.sites()
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters(remove_duplicate=False))
    require(any(sites.values()), "sites() names no place at all: adapters have nowhere to go")
    for kind, names in sites.items():
        require(kind in SITES, f"sites(): {unknown('site', kind, SITES)}")
        require(not isinstance(names, str), f"sites()[{kind!r}] is a string; make it a tuple of names")
        require(len(set(names)) == len(names), f"sites()[{kind!r}] names a place twice")
        known: Mapping[str, Any] = parameters if kind == "bias" else modules
        for name in names:
            what = "parameter" if kind == "bias" else "module"
            require(name in known, f"sites()[{kind!r}] names {name!r}, which is no {what} of the network")
            if kind in LINEAR:
                require(
                    isinstance(known[name], nn.Linear),
                    f"sites()[{kind!r}] names {name!r}, a {type(known[name]).__name__}: places of kind {kind!r} must be"
                    " torch.nn.Linear, since adapters wrap their product",
                )
            elif kind != "bias":
                require(
                    any(True for _ in known[name].parameters()),
                    f"sites()[{kind!r}] names {name!r}, which has no parameters to train",
                )
    surplus = set(sites.get("attention_norm", ())) - set(sites.get("norm", ()))
    require(not surplus, f"attention_norm names {sorted(surplus)[:1]}, which norm lacks: norm means all of them")


@clause_of(BACKBONE_CHECKS)
def sites_stay_under_an_adapter(case: BackboneCase) -> None:
    """sites() goes on naming the places of the plain network when an adapter is attached."""
    kind = next((kind for kind in LINEAR if case.base.sites().get(kind)), None)
    if kind is None or "lora" in case.base.impossible:
        raise SkipTest("no linear layer that LoRA could wrap")
    backbone = case.fresh()
    before = {kind: tuple(names) for kind, names in case.base.sites().items()}
    get_adapter("lora", sites=[kind]).attach(backbone)
    after = {kind: tuple(names) for kind, names in backbone.sites().items()}
    require(
        before == after,
        "sites() changes when an adapter is attached; find the places once, in __init__, and return the same names",
    )


@clause_of(BACKBONE_CHECKS)
def every_adapter_has_a_place_or_a_reason(case: BackboneCase) -> None:
    """Each installed adapter finds something to train, or the family says why it cannot."""
    for name in adapters.names():
        if name in case.base.impossible:
            continue
        backbone = case.fresh()
        try:
            adapter = get_adapter(name).attach(backbone)
        except Exception as error:
            raise ContractError(
                f"adapter {name!r} does not attach ({type(error).__name__}: {error}); name places for it in sites(), or"
                f" declare impossible = {{{name!r}: 'why'}}"
            ) from error
        require(
            name == "none" or adapter.num_parameters() > 0,
            f"adapter {name!r} attaches and trains nothing; name places for it in sites(), or declare it impossible",
        )


@clause_of(BACKBONE_CHECKS)
def impossible_adapters_are_refused(case: BackboneCase) -> None:
    """An adapter that the family declares impossible is refused with the reason, alone and in a hybrid."""
    if not case.base.impossible:
        raise SkipTest("no adapter is declared impossible")
    for name, reason in case.base.impossible.items():
        partner = "bitfit" if name != "bitfit" else "layernorm"
        for spec in (name, [name, partner]):
            backbone = case.fresh()
            said = refusal(partial(get_adapter(spec).attach, backbone), AdapterError, f"attaching {spec!r}")
            others = [why for other, why in case.base.impossible.items() if other == partner]
            require(any(why in said for why in [reason, *others]), f"the refusal of {spec!r} does not say why: {said}")
            require(
                backbone.adapter is None and same(backbone.network.state_dict(), case.base.network.state_dict()),
                f"attaching {spec!r} was refused and changed the network all the same",
            )


@clause_of(BACKBONE_CHECKS)
def loaded_network_is_frozen_and_evaluates(case: BackboneCase) -> None:
    """A loaded backbone is float32, in evaluation mode, and nothing in it trains."""
    base = case.again()
    trainable = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    require(
        not trainable, f"{trainable[:1]} requires a gradient after loading; call super().__init__ last, on the network"
    )
    training = [name for name, module in base.named_modules() if module.training and name]
    require(not training, f"module {training[:1]} is in training mode after loading")
    wrong = [name for name, tensor in base.named_parameters() if tensor.dtype != torch.float32]
    require(not wrong, f"parameter {wrong[:1]} is not float32; load the network as float32")


@clause_of(BACKBONE_CHECKS)
def loading_again_gives_the_same_network(case: BackboneCase) -> None:
    """Nothing of a loaded network is random: not under another seed, and not what the checkpoint lacks."""
    torch.manual_seed(1)
    first = case.again()
    torch.manual_seed(2)
    second = case.again()
    require(
        same(first.state_dict(), second.state_dict()),
        f"two loads differ in {differing(first.state_dict(), second.state_dict())}; weights that the checkpoint does"
        " not bring must be refused, or start from constants or a seed of their own",
    )
    require(first.source == second.source, f"source differs between two loads: {first.source} and {second.source}")


@clause_of(BACKBONE_CHECKS)
def source_and_lengths_are_recorded(case: BackboneCase) -> None:
    """A backbone knows its checkpoint, its lengths and its options."""
    backbone = case.again()
    source = backbone.source
    require(source.family == backbone.family, f"source.family is {source.family!r}, family is {backbone.family!r}")
    require(source.kind in ("bundled", "folder", "hub"), f"source.kind is {source.kind!r}")
    require(
        re.fullmatch(r"[0-9a-f]{64}", source.fingerprint),
        f"source.fingerprint {source.fingerprint!r} is not a SHA-256 in hexadecimal",
    )
    for name in ("prediction_length", "context_length"):
        require(getattr(backbone, name) == getattr(case.base, name), f"{name} {getattr(case.base, name)} is not kept")
    require(
        isinstance(backbone.past_length, int) and backbone.past_length >= backbone.context_length,
        f"past_length {backbone.past_length!r} is less than context_length {backbone.context_length}: it is the steps"
        " of history in a batch, lags included",
    )
    require(
        json.loads(json.dumps(backbone.options)) == backbone.options,
        f"options {backbone.options!r} are not JSON values; a predictor could not be stored",
    )


@clause_of(BACKBONE_CHECKS)
def bundled_checkpoints_load(case: BackboneCase) -> None:
    """Every checkpoint that ships with the family loads by its name."""
    kind = type(case.base)
    if not kind.bundled():
        raise SkipTest("no checkpoint is bundled")
    for name, folder in kind.bundled().items():
        require(Path(folder).is_dir(), f"bundled()[{name!r}] is {folder}, not a folder; does the wheel contain it?")
        with quiet():
            backbone = kind.from_checkpoint(name, prediction_length=case.base.prediction_length)
        require(
            (backbone.source.checkpoint, backbone.source.kind) == (name, "bundled"),
            f"bundled checkpoint {name!r} is recorded as {backbone.source}",
        )


@clause_of(BACKBONE_CHECKS)
def missing_checkpoints_are_refused(case: BackboneCase) -> None:
    """A name that is nothing, and a folder without weights, are refused with CheckpointError."""
    refusal(partial(case.again, "no such checkpoint"), CheckpointError, "a checkpoint that does not exist")
    with tempfile.TemporaryDirectory() as folder:
        refusal(partial(case.again, folder), CheckpointError, "an empty checkpoint folder")


@clause_of(BACKBONE_CHECKS)
def damaged_checkpoints_are_refused(case: BackboneCase) -> None:
    """A checkpoint that is cut short, or lacks a tensor, is refused with CheckpointError, never filled up."""
    from safetensors.torch import load_file, save_file

    with case.exported() as folder:
        for path in sorted(folder.rglob("*")):
            weights = path.suffix != ".json"
            if not path.is_file() or not (weights or path.name == "config.json"):
                continue
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            refusal(partial(case.again, folder), CheckpointError, f"a checkpoint with half of its {path.name}")
            path.write_bytes(whole)
            if path.suffix == ".safetensors":
                tensors = load_file(path)
                largest = max(tensors, key=lambda name: tensors[name].numel())
                del tensors[largest]
                save_file(tensors, path, metadata={"format": "pt"})
                refusal(partial(case.again, folder), CheckpointError, f"a checkpoint without its tensor {largest!r}")
                path.write_bytes(whole)
        case.again(folder)


@clause_of(BACKBONE_CHECKS)
def foreign_checkpoints_are_refused(case: BackboneCase) -> None:
    """The folder of another kind of model is refused with CheckpointError."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8}
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"embeddings.weight": torch.zeros(4, 8)}, folder / "model.safetensors", metadata={"format": "pt"})
        refusal(partial(case.again, folder), CheckpointError, "a checkpoint of another kind of model")


class _Trap:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@clause_of(BACKBONE_CHECKS)
def pickled_code_is_not_run(case: BackboneCase) -> None:
    """A checkpoint whose weights are a pickle with code is refused before the code runs."""
    with case.exported() as folder, tempfile.TemporaryDirectory() as other:
        marker = Path(other) / "code was run"
        trap = Path(other) / "trap"
        torch.save({"state_dict": _Trap(marker), "model": _Trap(marker)}, trap)
        weights = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
        for path in weights:
            whole = path.read_bytes()
            shutil.copy(trap, path)
            refusal(
                partial(case.again, folder), CheckpointError, f"a checkpoint whose {path.name} is a pickle with code"
            )
            path.write_bytes(whole)
        for path in weights:
            path.unlink()
        for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
            shutil.copy(trap, folder / name)
        refusal(partial(case.again, folder), CheckpointError, "a checkpoint of pickles with code")
        require(
            not marker.exists(), "code in a checkpoint was run; read pickles with torch.load(weights_only=True) alone"
        )


@clause_of(BACKBONE_CHECKS)
def unknown_options_are_refused(case: BackboneCase) -> None:
    """An option that the family does not have is refused by name."""
    said = refusal(partial(case.again, no_such_option=1), ValueError, "the option no_such_option=1")
    require("no_such_option" in said, f"the refusal does not name the option: {said}")


@clause_of(BACKBONE_CHECKS)
def lengths_must_be_positive(case: BackboneCase) -> None:
    """A prediction_length or context_length below 1 is refused by name."""
    for name, value in (("prediction_length", 0), ("prediction_length", -1), ("context_length", 0)):
        said = refusal(partial(case.again, **{name: value}), ValueError, f"{name}={value}")
        require(name in said, f"the refusal of {name}={value} does not name it: {said}")


@clause_of(BACKBONE_CHECKS)
def copies_are_independent(case: BackboneCase) -> None:
    """copy.deepcopy gives a backbone with the same answers and weights of its own."""
    twin = case.fresh()
    before = loss_of(case.base, case.batch)
    require(torch.equal(loss_of(twin, case.batch), before), "a deep copy has another loss than the original")
    with torch.no_grad():
        for parameter in twin.network.parameters():
            parameter.add_(0.1)
    require(
        torch.equal(loss_of(case.base, case.batch), before), "changing the weights of a deep copy changes the original"
    )
    require(
        not torch.equal(loss_of(twin, case.batch), before),
        "changing the weights of a deep copy does not change its loss: the copy computes with other weights than its"
        " own",
    )


@clause_of(BACKBONE_CHECKS)
def loss_is_one_number_a_window(case: BackboneCase) -> None:
    """loss(batch) has shape (batch,), is finite and the same each time in evaluation mode."""
    for size in (4, 1):
        batch = make_batch(case.base, size=size)
        torch.manual_seed(1)
        found = loss_of(case.base, batch)
        torch.manual_seed(2)
        again = loss_of(case.base, batch)
        require(
            found.shape == (size,),
            f"loss of {size} windows has shape {tuple(found.shape)}; return one number a window, without a mean over"
            " them",
        )
        require(found.isfinite().all(), f"loss is not finite: {found.tolist()}")
        require(
            torch.equal(found, again),
            f"loss depends on torch's global seed in evaluation mode ({apart(found, again)}); the zero-shot gate"
            " compares losses, so decide by the batch, or draw only while training",
        )


@clause_of(BACKBONE_CHECKS)
def loss_is_differentiable(case: BackboneCase) -> None:
    """In training mode the loss has finite gradients that reach the network."""
    backbone = case.fresh()
    backbone.train()
    backbone.network.requires_grad_(True)
    found = backbone.loss(case.batch)
    require(
        found.shape == (4,) and found.requires_grad, "loss has no gradient in training mode; remove detach or no_grad"
    )
    found.mean().backward()
    gradients = {name: p.grad for name, p in backbone.network.named_parameters() if p.grad is not None}
    require(any(g.any() for g in gradients.values()), "no gradient reaches the network")
    broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    require(not broken, f"the gradient of {broken[:1]} is not finite; mask missing values before, not after, dividing")


@clause_of(BACKBONE_CHECKS)
def loss_of_a_window_is_its_own(case: BackboneCase) -> None:
    """The loss of a window does not depend on its place in the batch nor on the other windows."""
    found = loss_of(case.base, case.batch)
    order = torch.tensor([2, 0, 3, 1])
    permuted = loss_of(case.base, rows(case.batch, order))
    require(
        near(permuted, found[order]),
        f"permuting the windows does not permute their losses ({apart(permuted, found[order])})",
    )
    alone = torch.cat([loss_of(case.base, rows(case.batch, slice(i, i + 1))) for i in range(4)])
    require(
        near(alone, found),
        f"windows have another loss alone than in a batch ({apart(alone, found)}); take no mean or maximum over"
        " windows",
    )


@clause_of(BACKBONE_CHECKS)
def loss_takes_missing_labels(case: BackboneCase) -> None:
    """A label that is observed in part, or hardly at all, has a finite loss and finite gradients."""
    batch = dict(case.batch)
    observed = torch.zeros_like(batch["future_observed_values"])
    observed[:, 0] = 1.0
    observed[0] = batch["future_observed_values"][0]
    batch |= {"future_observed_values": observed, "future_target": batch["future_target"] * observed}
    backbone = case.fresh()
    backbone.network.requires_grad_(True)
    found = backbone.loss(batch)
    require(found.isfinite().all(), f"loss is not finite where one step of a label is observed: {found.tolist()}")
    found.mean().backward()
    broken = [n for n, p in backbone.network.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    require(not broken, f"the gradient of {broken[:1]} is not finite where most of a label is missing")
    whole = loss_of(case.base, case.batch)
    require(
        near(found[:1].detach(), whole[:1]),
        "what is missing in the labels of other windows changes the loss of the first",
    )


@clause_of(BACKBONE_CHECKS)
def masked_values_have_no_influence(case: BackboneCase) -> None:
    """Where the observed mask is 0, the value makes no difference: not to the loss, not to the forecast."""
    batch = make_batch(case.base, missing=0.3)
    changed = dict(batch)
    for values, mask in (("past_target", "past_observed_values"), ("future_target", "future_observed_values")):
        changed[values] = batch[values] + 1000.0 * (1.0 - batch[mask])
    found, expected = loss_of(case.base, changed), loss_of(case.base, batch)
    require(
        near(found, expected),
        f"loss changes with values that were not observed ({apart(found, expected)}); use the observed masks of the"
        " history and of the label",
    )
    if not case.base.untrained:
        found, expected = forecast_of(case.base, changed).values, forecast_of(case.base, batch).values
        require(
            near(found, expected),
            f"forecasts change with values that were not observed ({apart(found, expected)}); use past_observed_values",
        )


@clause_of(BACKBONE_CHECKS)
def missing_steps_have_an_influence(case: BackboneCase) -> None:
    """A step that is not observed is something else than a zero."""
    batch = make_batch(case.base, missing=0.3)
    seen = batch | {"past_observed_values": torch.ones_like(batch["past_observed_values"])}
    require(
        not torch.equal(loss_of(case.base, seen), loss_of(case.base, batch)),
        "loss is the same whether zeros were observed or are missing; past_observed_values is not used",
    )


@clause_of(BACKBONE_CHECKS)
def padding_has_no_influence(case: BackboneCase) -> None:
    """Leading steps that nobody observed change nothing, so a series does not depend on longer ones beside it."""
    steps = case.base.past_length // 3
    if steps == 0:
        raise SkipTest(f"past_length {case.base.past_length} leaves no room for padding")
    batch = make_batch(case.base, missing=0.0)
    mask = torch.ones_like(batch["past_observed_values"])
    mask[:, :steps] = 0.0
    padded = batch | {"past_observed_values": mask, "past_target": batch["past_target"] * mask}
    short = without_start(batch, steps)
    hint = "pad and mask every history alike, or drop leading steps that no window observes"
    found, expected = loss_of(case.base, padded), loss_of(case.base, short)
    require(near(found, expected, 1e-3), f"padding on the left changes the loss ({apart(found, expected)}); {hint}")
    if not case.base.untrained and not case.samples:
        found, expected = forecast_of(case.base, padded).values, forecast_of(case.base, short).values
        require(
            near(found, expected, 1e-3), f"padding on the left changes forecasts ({apart(found, expected)}); {hint}"
        )


@clause_of(BACKBONE_CHECKS)
def forecast_has_the_promised_shape(case: BackboneCase) -> None:
    """forecast(batch) gives finite float32 of shape (batch, n, prediction_length), and levels as declared."""
    case.forecasts()
    base = case.base
    for size in (4, 1):
        found = forecast_of(base, make_batch(base, size=size), count=5)
        values, levels = found.values, found.levels
        count = 5 if levels is None else len(levels)
        require(
            tuple(values.shape) == (size, count, base.prediction_length),
            f"forecast has shape {tuple(values.shape)}, expected {(size, count, base.prediction_length)}: (batch,"
            f" {'num_samples' if levels is None else 'levels'}, prediction_length)",
        )
        require(values.dtype == torch.float32, f"forecast has type {values.dtype}; make it float32")
        require(not values.requires_grad, "forecast carries gradients in inference mode")
        require(values.isfinite().all(), "forecast is not finite")
        kind = "samples" if levels is None else "quantiles"
        require(kind in base.capabilities, f"forecast returns {kind}, but capabilities are {sorted(base.capabilities)}")
        if levels is not None:
            require(
                list(levels) == sorted(set(levels)) and levels[0] > 0 and levels[-1] < 1,
                f"levels {levels} do not rise between 0 and 1",
            )
            low, high = values[:, 0].mean(), values[:, -1].mean()
            require(
                low <= high, f"the lowest quantile {low:.4g} lies above the highest {high:.4g} on average: order them"
            )


@clause_of(BACKBONE_CHECKS)
def forecast_takes_short_and_odd_histories(case: BackboneCase) -> None:
    """Histories of one step, of a few, with one observed step, and constant ones have finite forecasts."""
    case.forecasts()
    base = case.base
    batches = {
        f"histories of {steps} steps": make_batch(base, past=steps) for steps in (1, 2, 7) if steps <= base.past_length
    }
    whole = make_batch(base, missing=0.0)
    for name, step in (("only the last step observed", -1), ("only the first step observed", 0)):
        mask = torch.zeros_like(whole["past_observed_values"])
        mask[:, step] = 1.0
        batches[name] = whole | {"past_observed_values": mask, "past_target": whole["past_target"] * mask}
    for value in (0.0, 5.0):
        target = torch.full_like(whole["past_target"], value)
        batches[f"constant histories of {value:g}"] = whole | {"past_target": target}
    for name, batch in batches.items():
        try:
            found = forecast_of(base, batch).values
        except Exception as error:
            raise ContractError(f"{name} cannot be forecast: {type(error).__name__}: {error}; pad them") from error
        require(found.isfinite().all(), f"{name} have forecasts that are not finite; guard the scale against 0")
        loss = loss_of(base, batch)
        require(loss.isfinite().all(), f"{name} have a loss that is not finite; guard the scale against 0")


@clause_of(BACKBONE_CHECKS)
def forecast_of_a_window_is_its_own(case: BackboneCase) -> None:
    """The quantiles of a window do not depend on the other windows of the batch."""
    case.forecasts()
    if case.samples:
        raise SkipTest("sample paths share one stream of random numbers")
    found = forecast_of(case.base, case.batch).values
    alone = torch.cat([forecast_of(case.base, rows(case.batch, slice(i, i + 1))).values for i in range(4)])
    require(near(alone, found), f"windows have another forecast alone than in a batch ({apart(alone, found)})")


@clause_of(BACKBONE_CHECKS)
def forecast_does_not_see_the_label(case: BackboneCase) -> None:
    """The forecast is the same whatever the batch holds of the future."""
    case.forecasts()
    base, generator = case.base, torch.Generator()
    expected = forecast_of(base, case.batch).values
    for offset in (0.0, 50.0):
        batch = case.batch | {"future_target": case.batch["future_target"] + offset}
        with base.inference():
            found = base.forecast(batch, num_samples=2, generator=generator.manual_seed(3)).values
        require(
            torch.equal(found, expected),
            f"forecasts change with future_target in the batch ({apart(found, expected)}); use the history alone",
        )


@clause_of(BACKBONE_CHECKS)
def forecast_sees_the_history(case: BackboneCase) -> None:
    """Another history gives another forecast."""
    case.forecasts()
    other = make_batch(case.base, seed=1)
    require(
        not near(forecast_of(case.base, other).values, forecast_of(case.base, case.batch).values),
        "forecasts do not depend on past_target",
    )


@clause_of(BACKBONE_CHECKS)
def generator_decides_the_forecast(case: BackboneCase) -> None:
    """The same generator gives the same forecast, another seed other sample paths; torch's global state has no part."""
    case.forecasts()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = forecast_of(case.base, case.batch, seed=3).values
    require(
        torch.equal(torch.get_rng_state(), state),
        "forecast draws from torch's global generator; draw from the generator that it is given",
    )
    torch.manual_seed(2)
    again, other = (forecast_of(case.base, case.batch, seed=seed).values for seed in (3, 4))
    require(torch.equal(first, again), f"one seed gives two forecasts ({apart(first, again)}); use the generator alone")
    if case.samples:
        require(not torch.equal(first, other), "sample paths are the same under another seed; use the generator")
    else:
        require(torch.equal(first, other), "quantiles depend on the generator; declare 'samples' or compute them")


@clause_of(BACKBONE_CHECKS)
def forecast_changes_nothing(case: BackboneCase) -> None:
    """Forecasting leaves weights, buffers, modes and gradients as they were."""
    case.forecasts()
    backbone = case.fresh()
    backbone.network.train()
    state = clone(backbone.state_dict())
    modes = [module.training for module in backbone.modules()]
    batch = clone(case.batch)
    forecast_of(backbone, batch)
    require(
        same(backbone.state_dict(), state),
        f"forecast changes {differing(backbone.state_dict(), state)} of the state; keep what a call needs in variables",
    )
    require([module.training for module in backbone.modules()] == modes, "forecast changes the mode of modules")
    require(not any(p.requires_grad for p in backbone.parameters()), "forecast makes parameters trainable")
    require(same(batch, case.batch), "forecast changes the batch it is given; work on copies")
    torch.manual_seed(0)
    before = loss_of(backbone, case.batch)
    require(torch.equal(before, loss_of(case.base, case.batch)), "the loss is another one after a forecast")


@clause_of(BACKBONE_CHECKS)
def threads_forecast_the_same(case: BackboneCase) -> None:
    """Threads that forecast at once, each with its own reader and generator, get what one gets alone."""
    case.forecasts()
    backbone = case.fresh()
    before = traits(backbone)
    batches = [case.batch, make_batch(case.base, seed=1, past=max(1, case.base.past_length // 2))]

    def forecasts() -> list[Tensor]:
        with backbone.reading() as reader:
            return [forecast_of(reader, batch).values for batch in batches]

    alone = forecasts()
    for found in at_once(forecasts):
        require(
            all(torch.equal(left, right) for left, right in zip(found, alone, strict=True)),
            "threads that forecast at once get other forecasts than one alone; keep what a call needs in variables",
        )
    require(not (found := traits(backbone).differing(before)), f"a reader changes {found} of the model that it is of")


@clause_of(BACKBONE_CHECKS)
def untrained_head_refuses_to_forecast(case: BackboneCase) -> None:
    """Without a trained head there is no forecast, and the message says what to do."""
    if "head" not in case.base.untrained:
        raise SkipTest("the checkpoint brings a trained head")
    said = refusal(partial(forecast_of, case.fresh(), case.batch), ValueError, "a forecast without a trained head")
    require("head" in said, f"the refusal does not name the head that is to be trained: {said}")


@clause_of(BACKBONE_CHECKS)
def features_are_as_declared(case: BackboneCase) -> None:
    """features(batch) has shape (batch, patches, d_model) where declared, and is refused where not."""
    past = {name: value for name, value in case.batch.items() if not name.startswith("future_")}
    with case.base.inference():
        if "features" not in case.base.capabilities:
            refusal(partial(case.base.features, past), NotImplementedError, "features() without the capability")
            return
        found = case.base.features(past)
    require(
        found.ndim == 3 and len(found) == 4 and found.isfinite().all(),
        f"features have shape {tuple(found.shape)}; return finite numbers of shape (batch, patches, d_model)",
    )
    require(not near(found[0], found[1]), "features of two different windows are the same")


@clause_of(BACKBONE_CHECKS)
def reconstruction_is_as_declared(case: BackboneCase) -> None:
    """reconstruct(batch) has the shape of past_target where declared, and is refused where not."""
    past = {name: value for name, value in case.batch.items() if not name.startswith("future_")}
    with case.base.inference():
        if "reconstruct" not in case.base.capabilities:
            refusal(partial(case.base.reconstruct, past), NotImplementedError, "reconstruct() without the capability")
            return
        found = case.base.reconstruct(past)
        masked = past["past_target"] + 1000.0 * (1.0 - past["past_observed_values"])
        again = case.base.reconstruct(past | {"past_target": masked})
    require(
        found.shape == past["past_target"].shape and found.isfinite().all(),
        f"reconstruction has shape {tuple(found.shape)}; return finite numbers of shape"
        f" {tuple(past['past_target'].shape)}",
    )
    require(near(again, found), f"values that were not observed change the reconstruction ({apart(again, found)})")


@clause_of(BACKBONE_CHECKS)
def dynamic_features_are_used(case: BackboneCase) -> None:
    """Where the family takes covariates, they change loss and forecast, and what is masked in them does not."""
    if "covariates" not in case.base.capabilities:
        raise SkipTest("the family takes no covariates")
    base, batch = case.base, make_batch(case.base, features=True)
    found = loss_of(base, batch)
    require(found.shape == (4,) and found.isfinite().all(), f"loss with dynamic features is {found.tolist()}")
    for name, mask in (
        ("feat_dynamic_real", "observed_feat_dynamic_real"),
        ("past_feat_dynamic_real", "past_observed_feat_dynamic_real"),
    ):
        other = batch | {name: batch[name].flip(1)}
        require(not torch.equal(loss_of(base, other), found), f"the loss does not depend on {name}")
        hidden = batch | {name: batch[name] + 1000.0 * (1.0 - batch[mask])}
        require(near(loss_of(base, hidden), found), f"the loss depends on values of {name} that were not observed")
        if base.untrained:
            continue
        values = forecast_of(base, batch).values
        require(
            tuple(values.shape)[0::2] == (4, base.prediction_length) and values.isfinite().all(),
            f"forecast with dynamic features has shape {tuple(values.shape)} or is not finite",
        )
        require(not torch.equal(forecast_of(base, other).values, values), f"the forecast does not depend on {name}")


@clause_of(BACKBONE_CHECKS)
def multivariate_targets_are_taken(case: BackboneCase) -> None:
    """Where the family is multivariate, targets (batch, past, D) give values of shape (batch, n, horizon, D)."""
    if "multivariate" not in case.base.capabilities:
        raise SkipTest("the family is univariate")
    base, batch = case.base, make_batch(case.base, dimensions=3)
    found = loss_of(base, batch)
    require(
        found.shape == (4,) and found.isfinite().all(),
        f"loss of multivariate windows has shape {tuple(found.shape)} or is not finite; return one number a window",
    )
    alone = torch.cat([loss_of(base, rows(batch, slice(i, i + 1))) for i in range(4)])
    require(near(alone, found), f"multivariate windows have another loss alone than in a batch ({apart(alone, found)})")
    case.forecasts()
    values = forecast_of(base, batch).values
    shape = (4, values.shape[1], base.prediction_length, 3)
    require(
        tuple(values.shape) == shape and values.isfinite().all(),
        f"multivariate forecast has shape {tuple(values.shape)}, expected {shape}, or is not finite",
    )


# Pairs of scale and shift, the shift in spreads of the window, whose answers must agree once they are undone.
_ORDINARY, _FAR = (1.0, 0.0), (2.0**12, -1e6)
_SCALED = [(_ORDINARY, (scale, 0.0)) for scale in (0.25, 2.0**-30, 2.0**40)]
_MOVED = {
    "affine": [*_SCALED, (_ORDINARY, (1.0, 30.0)), (_ORDINARY, (1.0, 1e9)), (_ORDINARY, (1e-9, -1e7))],
    "scale": [*_SCALED, (_FAR, (1e-9, 1e9))],
    "none": [(_FAR, (1e-9, 1e9)), (_FAR, (2.0**40, 3.0))],
}


@clause_of(BACKBONE_CHECKS)
def scale_and_shift_are_followed(case: BackboneCase) -> None:
    """Forecasts, losses and reconstructions follow a window that is scaled and shifted, as `equivariance` declares."""
    base = case.base
    require(base.equivariance in EQUIVARIANCE, unknown("equivariance", str(base.equivariance), EQUIVARIANCE))
    batch = make_batch(base, missing=0.0)
    spread = batch["past_target"].double().std(1, keepdim=True, correction=0)

    def answers(scale: float, shift: float) -> Iterator[tuple[str, Tensor]]:
        given = dict(batch)
        for name in ("past_target", "future_target"):
            given[name] = (scale * (batch[name].double() + shift * spread)) * batch[
                name.replace("target", "observed_values")
            ]
        found = loss_of(base, given).double()
        yield "loss", found - (math.log(scale) if base.density else 0.0)
        if not base.untrained:
            values = forecast_of(base, given).values.double()
            yield "forecast", (values / scale / spread[:, None]) - shift
        if "reconstruct" in base.capabilities:
            with base.inference():
                values = base.reconstruct({k: v for k, v in given.items() if k.startswith("past_")}).double()
            yield "reconstruction", values / scale / spread - shift

    for first, second in _MOVED[base.equivariance]:
        for (what, expected), (_, found) in zip(answers(*first), answers(*second), strict=True):
            require(
                near(found, expected, 1e-3),
                f"with equivariance {base.equivariance!r}, the {what} of windows times {second[0]:g} and moved by"
                f" {second[1]:g} spreads is another than that of times {first[0]:g} and {first[1]:g}"
                f" ({apart(found, expected)}, in spreads); divide by a scale of the history, set density = True if the"
                " loss is minus a log density, or declare less",
            )


@clause_of(BACKBONE_CHECKS)
def exported_checkpoint_loads_again(case: BackboneCase) -> None:
    """export(folder) writes what from_checkpoint reads, and nothing is lost on the way."""
    with case.exported() as folder:
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        require(files, "export() writes no file")
        again = case.again(folder)
        require(again.source.kind == "folder", f"source.kind of an exported checkpoint is {again.source.kind!r}")
        require(
            same(again.network.state_dict(), case.base.network.state_dict()),
            "an exported checkpoint loads with other weights:"
            f" {differing(case.base.network.state_dict(), again.network.state_dict())}",
        )
        require(
            torch.equal(loss_of(again, case.batch), loss_of(case.base, case.batch)),
            "an exported checkpoint has another loss",
        )
        if not case.base.untrained:
            require(
                torch.equal(forecast_of(again, case.batch).values, forecast_of(case.base, case.batch).values),
                "an exported checkpoint has other forecasts",
            )
