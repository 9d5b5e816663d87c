"""Clauses about loading: what a family declares, its sites, and how it treats checkpoints, options and lengths."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from torch import nn

from ..adapters.base import AdapterError
from ..adapters.load import get_adapter
from ..backbone import CAPABILITIES, SITES
from ..checkpoint import CheckpointError
from ..errors import unknown
from ..registry import adapters
from .cases import (
    BackboneCase,
    differing,
    forecast_of,
    loss_of,
    quiet,
    same,
)
from .contract import Clause, ContractError, clause_of, refusal, require

__all__ = ["LOADING_CHECKS"]

LOADING_CHECKS: dict[str, Clause] = {}
LINEAR = ("q", "k", "v", "o", "ff_in", "ff_out")


@clause_of(LOADING_CHECKS)
def declarations_are_known(case: BackboneCase) -> None:
    """Everything that the class declares is a known name."""
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


@clause_of(LOADING_CHECKS)
def sites_name_places_of_the_network(case: BackboneCase) -> None:
    """Each site is an existing module or parameter of the network, of the type that its kind requires."""
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


@clause_of(LOADING_CHECKS)
def sites_stay_under_an_adapter(case: BackboneCase) -> None:
    """sites() still names the places of the plain network after an adapter was attached."""
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


@clause_of(LOADING_CHECKS)
def every_adapter_has_a_place_or_a_reason(case: BackboneCase) -> None:
    """Each installed adapter finds something to train, or the family declares why it cannot."""
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


@clause_of(LOADING_CHECKS)
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


@clause_of(LOADING_CHECKS)
def loaded_network_is_frozen_and_evaluates(case: BackboneCase) -> None:
    """A loaded backbone is float32, in evaluation mode, and frozen."""
    base = case.again()
    trainable = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    require(
        not trainable, f"{trainable[:1]} requires a gradient after loading; call super().__init__ last, on the network"
    )
    training = [name for name, module in base.named_modules() if module.training and name]
    require(not training, f"module {training[:1]} is in training mode after loading")
    wrong = [name for name, tensor in base.named_parameters() if tensor.dtype != torch.float32]
    require(not wrong, f"parameter {wrong[:1]} is not float32; load the network as float32")


@clause_of(LOADING_CHECKS)
def loading_again_gives_the_same_network(case: BackboneCase) -> None:
    """Loading is deterministic: no weight depends on the seed, not even one that the checkpoint lacks."""
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


@clause_of(LOADING_CHECKS)
def source_and_lengths_are_recorded(case: BackboneCase) -> None:
    """A backbone records its checkpoint, its lengths and its options."""
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


@clause_of(LOADING_CHECKS)
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


@clause_of(LOADING_CHECKS)
def missing_checkpoints_are_refused(case: BackboneCase) -> None:
    """An unknown name and a folder without weights are refused with CheckpointError."""
    refusal(partial(case.again, "no such checkpoint"), CheckpointError, "a checkpoint that does not exist")
    with tempfile.TemporaryDirectory() as folder:
        refusal(partial(case.again, folder), CheckpointError, "an empty checkpoint folder")


@clause_of(LOADING_CHECKS)
def damaged_checkpoints_are_refused(case: BackboneCase) -> None:
    """A checkpoint that is truncated or lacks a tensor is refused with CheckpointError, never completed."""
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


@clause_of(LOADING_CHECKS)
def foreign_checkpoints_are_refused(case: BackboneCase) -> None:
    """The checkpoint of another architecture is refused with CheckpointError."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8}
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"embeddings.weight": torch.zeros(4, 8)}, folder / "model.safetensors", metadata={"format": "pt"})
        refusal(partial(case.again, folder), CheckpointError, "a checkpoint of another kind of model")


class _Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@clause_of(LOADING_CHECKS)
def pickled_code_is_not_run(case: BackboneCase) -> None:
    """A checkpoint whose weights are a pickle with code is refused, and the code is never run."""
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


@clause_of(LOADING_CHECKS)
def unknown_options_are_refused(case: BackboneCase) -> None:
    """An option that the family does not have is refused by name."""
    said = refusal(partial(case.again, no_such_option=1), ValueError, "the option no_such_option=1")
    require("no_such_option" in said, f"the refusal does not name the option: {said}")


@clause_of(LOADING_CHECKS)
def lengths_must_be_positive(case: BackboneCase) -> None:
    """A prediction_length or context_length below 1 is refused by name."""
    for name, value in (("prediction_length", 0), ("prediction_length", -1), ("context_length", 0)):
        said = refusal(partial(case.again, **{name: value}), ValueError, f"{name}={value}")
        require(name in said, f"the refusal of {name}={value} does not name it: {said}")


@clause_of(LOADING_CHECKS)
def exported_checkpoint_loads_again(case: BackboneCase) -> None:
    """export(folder) writes what from_checkpoint reads, without loss."""
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
