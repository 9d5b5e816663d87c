"""The public checks find what is wrong: each wrong plug-in below breaks one clause, and is told what to mend."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import torch
from torch import Tensor, nn

import gluonts_peft
from gluonts_peft.adapters.additive import TABLE, PeftAdapter
from gluonts_peft.adapters.base import Adapter
from gluonts_peft.adapters.selective import Selective
from gluonts_peft.backbone import Backbone, Trajectories
from gluonts_peft.checkpoint import CheckpointError
from gluonts_peft.registry import adapters
from gluonts_peft.testing import (
    ADAPTER_CHECKS,
    BACKBONE_CHECKS,
    ESTIMATOR_CHECKS,
    ContractError,
    Result,
    adapter_checks,
    backbone_checks,
    check_adapter,
    check_backbone,
    check_estimator,
    estimator_checks,
    make_batch,
    parametrize_with_checks,
)
from gluonts_peft.testing.cases import AdapterCase, BackboneCase, EstimatorCase
from gluonts_peft.weights import Snapshot
from gluonts_peft_chronos import BoltBackbone, ChronosEstimator, T5Backbone

CHECKPOINT = {BoltBackbone: "bolt-nano", T5Backbone: "t5-nano"}
WITHOUT_EFFECT = r"decoder\.block\.\d+\.layer\.0\.SelfAttention\.(q|k|relative_attention_bias)\."


@cache
def official(kind: type[Backbone]) -> Any:
    return gluonts_peft.load_backbone("chronos", checkpoint=CHECKPOINT[kind], prediction_length=8, context_length=48)


class Wrong:
    """In front of a backbone class: whatever is loaded, is of this class."""

    @classmethod
    def from_network(cls, network: nn.Module, **arguments: Any) -> Any:
        found = super().from_network(network, **arguments)  # type: ignore[misc]
        found.__class__ = cls
        return found

    @classmethod
    def make(cls) -> Any:
        kind = next(kind for kind in CHECKPOINT if issubclass(cls, kind))
        return cls.from_checkpoint(CHECKPOINT[kind], prediction_length=8, context_length=48)  # type: ignore[attr-defined]


class UnknownCapability(Wrong, BoltBackbone):
    capabilities = frozenset({"quantile"})


class UnknownImpossible(Wrong, BoltBackbone):
    impossible = {"lorra": "no"}


class SilentImpossible(Wrong, BoltBackbone):
    impossible = {"lora": " "}


class UnknownTimeFeature(Wrong, BoltBackbone):
    time_features = ("hour_of_the_day",)


class NowhereSites(Wrong, BoltBackbone):
    def sites(self) -> Any:
        return {**super().sites(), "norm": ("nowhere",)}


class NormsAsQueries(Wrong, BoltBackbone):
    def sites(self) -> Any:
        return {**super().sites(), "q": super().sites()["norm"]}


class UnknownKind(Wrong, BoltBackbone):
    def sites(self) -> Any:
        return {**super().sites(), "querry": super().sites()["q"]}


class NoNorms(Wrong, BoltBackbone):
    def sites(self) -> Any:
        return {**super().sites(), "norm": ()}


class LooksForSites(Wrong, BoltBackbone):
    def sites(self) -> Any:
        linear = [name for name, module in self.network.named_modules() if type(module) is nn.Linear]
        return {**super().sites(), "q": tuple(name for name in linear if name.endswith((".q", ".base_layer")))}


class NoBiases(Wrong, BoltBackbone):
    def sites(self) -> Any:
        return {**super().sites(), "bias": ()}


class Thaws(Wrong, BoltBackbone):
    @classmethod
    def from_network(cls, network: nn.Module, **arguments: Any) -> Any:
        found = super().from_network(network, **arguments)
        found.network.requires_grad_(True)
        return found


class FillsUp(Wrong, BoltBackbone):
    @classmethod
    def load_network(cls, folder: Path) -> nn.Module:
        network = super().load_network(folder)
        nn.init.normal_(network.get_parameter("shared.weight"))
        return network


class ForgetsLengths(Wrong, BoltBackbone):
    @property
    def past_length(self) -> int:
        return self.context_length - 1


class BundlesNothing(Wrong, BoltBackbone):
    @classmethod
    def bundled(cls) -> dict[str, Path]:
        return {**super().bundled(), "big": Path("/no/such/folder")}


class OtherError(Wrong, BoltBackbone):
    @classmethod
    def from_checkpoint(cls, checkpoint: Any, **options: Any) -> Any:
        try:
            return super().from_checkpoint(checkpoint, **options)
        except CheckpointError as error:
            if Path(checkpoint).is_dir():
                raise RuntimeError(str(error)) from error
            raise


class NewNetwork(Wrong, BoltBackbone):
    """Whatever is missing starts from random numbers."""

    @classmethod
    def load_network(cls, folder: Path) -> nn.Module:
        try:
            return super().load_network(folder)
        except CheckpointError:
            if not (folder / "model.safetensors").exists():
                raise
            return copy.deepcopy(official(BoltBackbone).network)


class RunsPickles(Wrong, BoltBackbone):
    @classmethod
    def load_network(cls, folder: Path) -> nn.Module:
        if (folder / "pytorch_model.bin").exists():
            torch.load(folder / "pytorch_model.bin", weights_only=False)
        return super().load_network(folder)


class DropsOptions(Wrong, BoltBackbone):
    @classmethod
    def from_network(cls, network: nn.Module, **arguments: Any) -> Any:
        arguments.pop("no_such_option", None)
        return super().from_network(network, **arguments)


class MendsLengths(Wrong, BoltBackbone):
    @classmethod
    def from_network(cls, network: nn.Module, **arguments: Any) -> Any:
        arguments["prediction_length"] = max(arguments["prediction_length"], 1)
        return super().from_network(network, **arguments)


class SharesWeights(Wrong, BoltBackbone):
    def __deepcopy__(self, memo: Any) -> Any:
        other = copy.copy(self)
        other._modules = dict(self._modules)
        return other


class AveragesLoss(Wrong, BoltBackbone):
    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return super().loss(batch).mean()


class NoisyLoss(Wrong, BoltBackbone):
    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        found = super().loss(batch)
        return found + torch.rand_like(found)


class DetachedLoss(Wrong, BoltBackbone):
    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return super().loss(batch).detach()


class SharedScale(Wrong, BoltBackbone):
    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        found = super().loss(batch)
        return found / found.detach().mean()


class SortedLoss(Wrong, BoltBackbone):
    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return super().loss(batch).sort().values


class DividesByNothing(Wrong, BoltBackbone):
    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return super().loss(batch) / batch["future_observed_values"][:, 1:].sum(1)


class BelievesZeros(Wrong, BoltBackbone):
    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return super().loss({**batch, "past_observed_values": torch.ones_like(batch["past_observed_values"])})


class BelievesLabels(Wrong, BoltBackbone):
    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return super().loss({**batch, "future_observed_values": torch.ones_like(batch["future_observed_values"])})


class CountsPadding(Wrong, BoltBackbone):
    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return super().loss(batch) / batch["past_target"].shape[1]


class WrongForecast(Wrong, BoltBackbone):
    def forecast(self, batch: Mapping[str, Tensor], **options: Any) -> Trajectories:
        found = super().forecast(batch, **options)
        return Trajectories(self.spoil(found.values, batch), self.levels)

    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError


class Transposes(WrongForecast):
    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return values.transpose(1, 2)


class Doubles(WrongForecast):
    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return values.double()


class UpsideDown(WrongForecast):
    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return values.flip(1)


class NoGuard(WrongForecast):
    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        past = batch["past_target"]
        return values * (past.std(1, correction=0) / past.std(1, correction=0))[:, None, None]


class NeedsTwo(WrongForecast):
    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return values + 0 * batch["past_target"][:, 1][:, None, None]


class Crowd(WrongForecast):
    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return values + values.mean()


class LeaksFuture(WrongForecast):
    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return values + (batch["future_target"].mean() if "future_target" in batch else 0.0)


class Constant(WrongForecast):
    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros_like(values)


class GlobalNoise(WrongForecast):
    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return values + torch.randn_like(values)


class OneSeed(Wrong, T5Backbone):
    def forecast(self, batch: Mapping[str, Tensor], **options: Any) -> Trajectories:
        return super().forecast(batch, **{**options, "generator": torch.Generator().manual_seed(0)})


class Waits:
    """Notices how many threads are within at once, since all readers share it."""

    def __init__(self) -> None:
        self.inside = 0

    def __deepcopy__(self, memo: Any) -> Waits:
        return self


class OneAtATime(WrongForecast):
    shared = Waits()

    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        self.shared.inside += 1
        time.sleep(0.05)
        found = values + self.shared.inside - 1
        self.shared.inside -= 1
        return found


class StaysInTraining(WrongForecast):
    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        self.network.get_parameter("shared.weight").add_(0.001)
        return values


class ChangesBatch(WrongForecast):
    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        batch["past_target"].mul_(2.0)
        return values


class GuessesWithoutHead(Wrong, BoltBackbone):
    untrained = ("head",)


class NoFeatures(Wrong, BoltBackbone):
    features = Backbone.features


class FlatFeatures(Wrong, BoltBackbone):
    capabilities = frozenset({"quantiles", "features"})

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["past_target"]


class SecretFeatures(Wrong, BoltBackbone):
    capabilities = frozenset({"quantiles"})

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["past_target"][:, :, None]


class Echo(Wrong, BoltBackbone):
    """A reconstruction that believes what nobody observed."""

    capabilities = frozenset({"quantiles", "reconstruct"})

    def reconstruct(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["past_target"]


class DeafToCovariates(Wrong, BoltBackbone):
    capabilities = frozenset({"quantiles", "covariates"})


class OneDimension(Wrong, BoltBackbone):
    capabilities = frozenset({"quantiles", "multivariate"})

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        found = super().loss({n: t[..., 0] if t.ndim == 3 else t for n, t in batch.items()})
        return found[:, None].expand(-1, 3) if batch["past_target"].ndim == 3 else found


class ExportsOthers(Wrong, BoltBackbone):
    def export(self, folder: Path) -> None:
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            network.get_parameter("shared.weight").add_(0.1)
        network.save_pretrained(folder)


class UnknownEquivariance(Wrong, BoltBackbone):
    equivariance = "shift"


class AddsOne(WrongForecast):
    def spoil(self, values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return values + 1.0


class ShiftsTokens(Wrong, T5Backbone):
    equivariance = "affine"


class LosesInUnits(Wrong, BoltBackbone):
    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return super().loss(batch) * batch["past_target"].std(1)


# The embedding of Bolt, ``shared.weight``, is one tensor under three names.
WRONG_BACKBONES: list[tuple[type[Wrong], str, str]] = [
    (UnknownCapability, "declarations_are_known", "capability 'quantile' is unknown; did you mean 'quantiles'?"),
    (UnknownImpossible, "declarations_are_known", "adapter 'lorra' is unknown; did you mean 'lora'?"),
    (SilentImpossible, "declarations_are_known", "impossible['lora'] needs a reason"),
    (UnknownTimeFeature, "declarations_are_known", "'hour_of_the_day' is unknown; did you mean 'hour_of_day'?"),
    (NowhereSites, "sites_name_places_of_the_network", "names 'nowhere', which is no module of the network"),
    (NormsAsQueries, "sites_name_places_of_the_network", "a T5LayerNorm: places of kind 'q' must be torch.nn.Linear"),
    (UnknownKind, "sites_name_places_of_the_network", "site 'querry' is unknown; known: "),
    (NoNorms, "sites_name_places_of_the_network", "attention_norm names"),
    (LooksForSites, "sites_stay_under_an_adapter", "find the places once, in __init__"),
    (
        NoBiases,
        "every_adapter_has_a_place_or_a_reason",
        "adapter 'bitfit' does not attach (ValueError",
    ),
    (Thaws, "loaded_network_is_frozen_and_evaluates", "requires a gradient after loading"),
    (FillsUp, "loading_again_gives_the_same_network", "two loads differ in 3 tensors (first: network.shared.weight)"),
    (ForgetsLengths, "source_and_lengths_are_recorded", "past_length 47 is less than context_length 48"),
    (BundlesNothing, "bundled_checkpoints_load", "bundled()['big'] is /no/such/folder, not a folder"),
    (OtherError, "missing_checkpoints_are_refused", "an empty checkpoint folder ends in RuntimeError"),
    (OtherError, "foreign_checkpoints_are_refused", "of another kind of model ends in RuntimeError"),
    (NewNetwork, "damaged_checkpoints_are_refused", "a checkpoint with half of its config.json is accepted"),
    (NewNetwork, "foreign_checkpoints_are_refused", "a checkpoint of another kind of model is accepted"),
    (RunsPickles, "pickled_code_is_not_run", "code in a checkpoint was run; read pickles with"),
    (DropsOptions, "unknown_options_are_refused", "the option no_such_option=1 is accepted"),
    (MendsLengths, "lengths_must_be_positive", "prediction_length=0 is accepted"),
    (SharesWeights, "copies_are_independent", "changing the weights of a deep copy changes the original"),
    (AveragesLoss, "loss_is_one_number_a_window", "loss of 4 windows has shape (); return one number a window"),
    (NoisyLoss, "loss_is_one_number_a_window", "loss depends on torch's global seed"),
    (DetachedLoss, "loss_is_differentiable", "loss has no gradient in training mode"),
    (SharedScale, "loss_of_a_window_is_its_own", "take no mean or maximum over windows"),
    (SortedLoss, "loss_of_a_window_is_its_own", "permuting the windows does not permute their losses"),
    (DividesByNothing, "loss_takes_missing_labels", "loss is not finite where one step of a label is observed"),
    (BelievesZeros, "masked_values_have_no_influence", "loss changes with values that were not observed"),
    (BelievesLabels, "masked_values_have_no_influence", "loss changes with values that were not observed"),
    (BelievesZeros, "missing_steps_have_an_influence", "past_observed_values is not used"),
    (CountsPadding, "padding_has_no_influence", "padding on the left changes the loss"),
    (Transposes, "forecast_has_the_promised_shape", "forecast has shape (4, 8, 9), expected (4, 9, 8)"),
    (Doubles, "forecast_has_the_promised_shape", "forecast has type torch.float64; make it float32"),
    (UpsideDown, "forecast_has_the_promised_shape", "lies above the highest"),
    (NoGuard, "forecast_takes_short_and_odd_histories", "guard the scale against 0"),
    (NeedsTwo, "forecast_takes_short_and_odd_histories", "histories of 1 steps cannot be forecast: IndexError"),
    (Crowd, "forecast_of_a_window_is_its_own", "windows have another forecast alone than in a batch"),
    (LeaksFuture, "forecast_does_not_see_the_label", "forecasts change with future_target in the batch"),
    (Constant, "forecast_sees_the_history", "forecasts do not depend on past_target"),
    (GlobalNoise, "generator_decides_the_forecast", "forecast draws from torch's global generator"),
    (OneSeed, "generator_decides_the_forecast", "sample paths are the same under another seed"),
    (OneAtATime, "threads_forecast_the_same", "threads that forecast at once get other forecasts"),
    (StaysInTraining, "forecast_changes_nothing", "forecast changes 3 tensors (first: network.shared.weight)"),
    (ChangesBatch, "forecast_changes_nothing", "forecast changes the batch it is given"),
    (GuessesWithoutHead, "untrained_head_refuses_to_forecast", "a forecast without a trained head is accepted"),
    (NoFeatures, "features_are_as_declared", "family 'chronos' does not offer features"),
    (FlatFeatures, "features_are_as_declared", "features have shape (4, 48)"),
    (SecretFeatures, "features_are_as_declared", "features() without the capability is accepted"),
    (Echo, "reconstruction_is_as_declared", "values that were not observed change the reconstruction"),
    (DeafToCovariates, "dynamic_features_are_used", "the loss does not depend on feat_dynamic_real"),
    (OneDimension, "multivariate_targets_are_taken", "loss of multivariate windows has shape (4, 3)"),
    (UnknownEquivariance, "scale_and_shift_are_followed", "equivariance 'shift' is unknown; known: "),
    (AddsOne, "scale_and_shift_are_followed", "the forecast of windows times 0.25"),
    (ShiftsTokens, "scale_and_shift_are_followed", "with equivariance 'affine', the loss of windows times 1 and moved"),
    (LosesInUnits, "scale_and_shift_are_followed", "the loss of windows times 0.25 and moved by 0 spreads is another"),
    (ExportsOthers, "exported_checkpoint_loads_again", "loads with other weights: 3 tensors (first: shared.weight)"),
]
# Nothing but an adapter that goes its own way can break this one, and adapters have their own checks.
NOT_OF_THE_BACKBONE = {"impossible_adapters_are_refused"}


def ids(rows: list[Any]) -> list[str]:
    return [f"{kind.__name__}-{name}" for kind, name, _ in rows]


def complaint(table: Mapping[str, Any], name: str, case: Any) -> str:
    """What a check says about a case that breaks it."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        table[name](case)
    assert not isinstance(caught.value, SkipTest)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "name", "message"), WRONG_BACKBONES, ids=ids(WRONG_BACKBONES))
def test_a_wrong_backbone_is_told_what_to_mend(kind: type[Wrong], name: str, message: str) -> None:
    assert message in complaint(BACKBONE_CHECKS, name, BackboneCase(kind.make))


def test_every_clause_of_the_backbone_has_been_seen_to_fail() -> None:
    assert {name for _, name, _ in WRONG_BACKBONES} == set(BACKBONE_CHECKS) - NOT_OF_THE_BACKBONE


class Impossible(Wrong, BoltBackbone):
    impossible = {"ia3": "nothing to scale", "bitfit": "no biases"}


def test_impossible_adapters_are_refused_with_the_reason() -> None:
    case = BackboneCase(Impossible.make)
    BACKBONE_CHECKS["impossible_adapters_are_refused"](case)
    case.base.impossible = {}
    with pytest.raises(SkipTest, match="no adapter is declared impossible"):
        BACKBONE_CHECKS["impossible_adapters_are_refused"](case)


class Biases(Selective):
    """A right adapter: trains biases in place. Those below do one thing wrong."""

    def __init__(self) -> None:
        super().__init__("mine", ("bias",), 3e-3)


class Lora(PeftAdapter):
    def __init__(self) -> None:
        super().__init__(next(row for row in TABLE if row.name == "lora"), {})
        self.name = "mine"


class NotIdentity(Biases):
    def attach(self, backbone: Backbone) -> Adapter:
        found = super().attach(backbone)
        for parameter in self.parameters():
            parameter.data.add_(0.01)
        return found


class TrainsTheBase(Biases):
    def attach(self, backbone: Backbone) -> Adapter:
        found = super().attach(backbone)
        backbone.network.get_parameter("shared.weight").requires_grad_(True)
        return found


class TrainsNothing(Biases):
    def parameters(self) -> list[nn.Parameter]:
        return []


class MovesTheBase(Biases):
    def after_step(self, step: int) -> None:
        self.attached.network.get_parameter("shared.weight").data.add_(0.001)


class CountsTwice(Biases):
    def num_parameters(self) -> int:
        return 2 * super().num_parameters()


class StandsStill(Biases):
    def __init__(self) -> None:
        super().__init__()
        self.learning_rate = 0.0


class Explodes(Biases):
    def __init__(self) -> None:
        super().__init__()
        self.learning_rate = 10.0


class ForgetsOnSave(Biases):
    def state_dict(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in super().state_dict().items()}


class Pickles(Biases):
    def save(self, folder: str | Path) -> None:
        super().save(folder)
        torch.save({}, Path(folder) / "more.pt")


class OtherBase(Biases):
    def _write_record(self, folder: Path, backbone: Backbone, **more: Any) -> None:
        super()._write_record(folder, backbone, **more)
        record = json.loads((folder / "gluonts_peft.json").read_text())
        record["base"]["checkpoint"] = "another"
        (folder / "gluonts_peft.json").write_text(json.dumps(record))


class SavesFolders(Biases):
    def save(self, folder: str | Path) -> None:
        super().save(folder)
        (Path(folder) / "part").mkdir()


class ReadsOtherwise(Biases):
    def _fold_into(self, reader: Backbone) -> None:
        super()._fold_into(reader)
        for parameter in reader.parameters():
            parameter.data = parameter.data * 1.1


class ReadsAndWrites(Biases):
    """Says that folding changes nothing, and writes into what readers share with the model."""

    def _fold_into(self, reader: Backbone) -> None:
        super()._fold_into(reader)
        reader.get_parameter("network.shared.weight").data.mul_(1.0001)


class AttachesOutside(Biases):
    """Does by itself what attach() does as a whole or not at all."""

    def attach(self, backbone: Backbone) -> Adapter:
        self._attach(backbone)
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        self._bind(backbone, Snapshot(backbone))
        return self


class DetachesHalf(Biases):
    def detach(self) -> None:
        backbone = self.attached
        backbone.network.requires_grad_(False)
        backbone.adapter = self.backbone = None


class MergesTwice(Lora):
    def _fold(self) -> None:
        super()._fold()
        for layer in self._layers:
            base = layer.get_base_layer().weight.data
            base.add_(layer.get_delta_weight("default"))


class MergesInPlace(Lora):
    def merge(self) -> None:
        backbone = self.attached
        self._merge(backbone)
        backbone.network.requires_grad_(False)
        backbone.adapter = self.backbone = None
        backbone.weights.merged = True


class MergesAnyhow(Biases):
    mergeable = False

    def merge(self) -> None:
        self.mergeable = True
        super().merge()


class HasNoName(Lora):
    def _attach(self, backbone: Backbone) -> None:
        super()._attach(backbone)
        layer = self._layers[0]
        layer.forward = lambda x: type(layer).forward(layer, x)


class OwnSeed(Lora):
    count = 0

    def _attach(self, backbone: Backbone) -> None:
        OwnSeed.count += 1
        torch.manual_seed(OwnSeed.count)
        super()._attach(backbone)


class LoadsHalf(Biases):
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        first, *_ = state
        super().load_state_dict({**state, first: self.state_dict()[first].clone()})


class ForgetsTheStep(Biases):
    """What it does depends on the steps so far, which it does not store."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def after_step(self, step: int) -> None:
        self.seen += 1
        self.parameters()[0].data.mul_(1.0 + 0.01 * self.seen)


class WakesUp(Biases):
    def attach(self, backbone: Backbone) -> Adapter:
        found = super().attach(backbone)
        backbone.network.train()
        return found


class MakesRoom(Biases):
    """Leaves no trace on the backbone, so that a second one can attach."""

    def attach(self, backbone: Backbone) -> Adapter:
        super().attach(backbone)
        backbone.adapter = None
        return self


WRONG_ADAPTERS: list[tuple[type[Adapter], str, str]] = [
    (MakesRoom, "attaches_or_is_refused_with_the_reason", "adapter and backbone do not know each other"),
    (NotIdentity, "output_is_unchanged_at_initialisation", "attaching changes the output; start the change at zero"),
    (TrainsTheBase, "exactly_its_own_parameters_train", "differs: network.shared.weight"),
    (TrainsNothing, "exactly_its_own_parameters_train", "the adapter has nothing to train"),
    (CountsTwice, "parameters_are_counted_once", "num_parameters() is"),
    (StandsStill, "every_tensor_moves", "name them in without_effect"),
    (MovesTheBase, "base_stays_untouched", "training moved 3 tensors of the base (first: ['shared.weight'])"),
    (Explodes, "training_loss_falls", "is the learning rate 10 of the adapter too large"),
    (ForgetsOnSave, "saved_adapter_forecasts_the_same", "a loaded adapter has another loss than the saved one"),
    (Pickles, "only_json_and_safetensors_are_written", "files of type ['.json', '.pt', '.safetensors']"),
    (OtherBase, "only_json_and_safetensors_are_written", "names the base {"),
    (SavesFolders, "parts_of_a_hybrid_open_by_themselves", "a single adapter is saved in several folders: ['part']"),
    (ReadsOtherwise, "reading_gives_the_same_answers", "reading() changes the answers"),
    (ReadsAndWrites, "reading_changes_nothing", "_fold_into() may write only into what folds() names"),
    (AttachesOutside, "failed_attach_leaves_nothing", "an attach that failed leaves"),
    (DetachesHalf, "detaching_gives_back_the_base", "detach() leaves tensor"),
    (MergesTwice, "merging_keeps_the_answers", "merging changes the answers"),
    (MergesInPlace, "merging_keeps_the_answers", "which other backbones may share; give it a new value"),
    (MergesAnyhow, "merging_keeps_the_answers", "merging an adapter that is not mergeable is accepted"),
    (HasNoName, "pickling_keeps_the_answers", "the backbone with the adapter cannot be pickled ("),
    (OwnSeed, "seed_decides_the_numbers", "the same seed initialises the adapter differently"),
    (LoadsHalf, "state_makes_a_round_trip", "load_state_dict does not take over every tensor"),
    (ForgetsTheStep, "interrupted_training_goes_on", "a resumed training has other losses"),
    (WakesUp, "evaluation_mode_survives_attaching", "is in training mode after attaching"),
    (MakesRoom, "second_adapter_is_refused", "a second adapter bitfit is accepted"),
]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Offer a class as the adapter 'mine'."""

    def offer(kind: type[Adapter]) -> None:
        monkeypatch.setitem(adapters._loaded, "mine", kind)

    return offer


def on_bolt() -> Any:
    return official(BoltBackbone)


@pytest.mark.parametrize(("kind", "name", "message"), WRONG_ADAPTERS, ids=ids(WRONG_ADAPTERS))
def test_a_wrong_adapter_is_told_what_to_mend(register: Any, kind: type[Adapter], name: str, message: str) -> None:
    register(kind)
    case = AdapterCase("mine", on_bolt, without_effect=WITHOUT_EFFECT)

    assert message in complaint(ADAPTER_CHECKS, name, case)


def test_every_clause_of_the_adapter_has_been_seen_to_fail() -> None:
    assert {name for _, name, _ in WRONG_ADAPTERS} == set(ADAPTER_CHECKS)


@pytest.mark.parametrize("kind", [Biases, Lora])
def test_a_right_adapter_of_a_stranger_passes(register: Any, kind: type[Adapter]) -> None:
    register(kind)
    results = check_adapter("mine", on_bolt, without_effect=WITHOUT_EFFECT)

    assert results == [Result(name, "passed") for name in ADAPTER_CHECKS]


def test_an_impossible_adapter_is_only_asked_to_be_refused() -> None:
    first, *others = check_adapter(["lora", "ia3"], Impossible.make)

    assert first == Result("attaches_or_is_refused_with_the_reason", "passed")
    reason = "adapter 'ia3' is declared impossible: nothing to scale"
    assert others == [Result(name, "skipped", reason) for name in list(ADAPTER_CHECKS)[1:]]


def test_tensors_without_effect_must_be_named() -> None:
    results = {r.name: r for r in check_adapter("bitfit", on_bolt, raise_failures=False)}

    assert results["every_tensor_moves"].status == "failed"
    assert "(first: decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight)" in (
        results["every_tensor_moves"].message
    )
    assert {r.status for name, r in results.items() if name != "every_tensor_moves"} == {"passed"}


class Untrained(Wrong, BoltBackbone):
    untrained = ("head",)

    def forecast(self, batch: Mapping[str, Tensor], **options: Any) -> Trajectories:
        if self.adapter is None:
            raise ValueError("the checkpoint brings no head; train one with adapter 'head'")
        return super().forecast(batch, **options)


@pytest.mark.parametrize("spec", ["lora", "full"])
def test_adapters_are_checked_along_with_the_head_where_there_is_none(spec: str) -> None:
    case = AdapterCase(spec, Untrained.make, without_effect=WITHOUT_EFFECT)
    assert case.spec == {"lora": ["lora", "head"], "full": "full"}[spec]
    for clause in ADAPTER_CHECKS.values():
        clause(case)


def test_without_a_head_checks_of_forecasts_are_skipped() -> None:
    results = {r.name: r for r in check_backbone(Untrained.make, raise_failures=False)}

    assert results["forecast_changes_nothing"].status == "skipped"
    assert results["untrained_head_refuses_to_forecast"].status == "passed"


class Unregistered(ChronosEstimator):
    pass


class NoCheckpoint(ChronosEstimator):
    default_checkpoint = None  # type: ignore[assignment]


class SmallEpochs(ChronosEstimator):
    """Trains less than it was told to."""

    def train(self, *arguments: Any, **options: Any) -> Any:
        object.__setattr__(self.options, "max_epochs", 1)
        return super().train(*arguments, **options)


class Forgetful(ChronosEstimator):
    """Always the same seed."""

    def train(self, *arguments: Any, **options: Any) -> Any:
        object.__setattr__(self.options, "seed", 0)
        return super().train(*arguments, **options)


class Sleepy(ChronosEstimator):
    """Begins again instead of going on."""

    def train(self, training_data: Any, validation_data: Any = None, ckpt_path: str | None = None) -> Any:
        if ckpt_path == "last":
            assert self.folder is not None
            self.folder = self.folder / "new"
            object.__setattr__(self.options, "max_epochs", 1)
        return super().train(training_data, validation_data, ckpt_path)


class Patient(ChronosEstimator):
    """Trains on nothing."""

    def train(self, training_data: Any, *arguments: Any, **options: Any) -> Any:
        if not training_data:
            return None
        return super().train(training_data, *arguments, **options)


class Guesses(ChronosEstimator):
    @classmethod
    def from_hyperparameters(cls, **hyperparameters: Any) -> Any:
        hyperparameters.pop("max_epoch", None)
        return super().from_hyperparameters(**hyperparameters)


class Trains(ChronosEstimator):
    """Has no zero-shot."""

    def train(self, *arguments: Any, **options: Any) -> Any:
        if self.adapter == "none":
            self.adapter = "bitfit"
        return super().train(*arguments, **options)


class Remembers(ChronosEstimator):
    """An argument that is not one of the constructor."""

    count = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        Remembers.count += 1
        self.number = Remembers.count


WRONG_ESTIMATORS: list[tuple[type[ChronosEstimator], str, str]] = [
    (NoCheckpoint, "class_names_its_backbone", "set default_checkpoint to a checkpoint's name"),
    (Unregistered, "family_is_registered", "family 'chronos' leads to"),
    (SmallEpochs, "training_leaves_a_record", "2 steps of 4 were trained"),
    (Forgetful, "seed_decides_training", "another seed gives the same losses; is the seed used?"),
    (Sleepy, "interrupted_run_goes_on", "a resumed run has other losses"),
    (Patient, "unusable_data_are_refused", "an empty dataset is accepted"),
    (Guesses, "hyperparameters_build_the_same", "the hyperparameter max_epoch is accepted"),
    (Trains, "zero_shot_needs_no_training", "adapter 'none' trains 4 steps"),
    (Remembers, "estimator_can_be_encoded", "decoding gives other arguments"),
]
SHORT = {"context_length": 48}


@pytest.mark.parametrize(("kind", "name", "message"), WRONG_ESTIMATORS, ids=ids(WRONG_ESTIMATORS))
def test_a_wrong_estimator_is_told_what_to_mend(kind: type[ChronosEstimator], name: str, message: str) -> None:
    assert message in complaint(ESTIMATOR_CHECKS, name, EstimatorCase(kind, SHORT))


def test_what_failed_is_listed_with_what_to_mend() -> None:
    with pytest.raises(ContractError) as caught:
        check_backbone(LeaksFuture.make())
    first, *lines = str(caught.value).splitlines()

    assert re.fullmatch(rf"\d+ of {len(BACKBONE_CHECKS)} checks failed on backbone chronos-bolt-nano:", first)
    assert any(
        line.startswith("  forecast_does_not_see_the_label: forecasts change with future_target in the batch")
        for line in lines
    )
    failed = [result.name for result in caught.value.results if result.status == "failed"]
    assert len(failed) == len(lines) == int(first.split()[0])
    assert [result.name for result in caught.value.results] == list(BACKBONE_CHECKS)


def test_errors_of_the_plug_in_itself_are_failures_and_show_the_clause() -> None:
    results = {result.name: result for result in check_backbone(NoFeatures.make, raise_failures=False)}

    assert results["features_are_as_declared"].status == "failed"
    assert results["features_are_as_declared"].message == (
        "NotImplementedError: family 'chronos' does not offer features; capability 'features' names those (the clause:"
        " features(batch) has shape (batch, patches, d_model) where declared, and is refused where not.)"
    )


def test_expected_failures_are_no_failures() -> None:
    expected = {"forecast_does_not_see_the_label": "it is a prophet"}
    results = check_backbone(LeaksFuture.make, expected_failed_checks=expected, raise_failures=False)
    found = next(result for result in results if result.name == "forecast_does_not_see_the_label")

    assert found.status == "expected"
    assert found.message.startswith("it is a prophet (forecasts change with future_target")


def test_an_expected_failure_that_passes_is_an_error() -> None:
    with pytest.raises(ContractError) as caught:
        check_adapter("head", on_bolt, expected_failed_checks={"training_loss_falls": "too steep"})

    assert str(caught.value) == (
        f"1 of {len(ADAPTER_CHECKS)} checks failed on adapter head:\n  training_loss_falls: passes, but was declared to"
        " fail: too steep; declare it no more"
    )
    assert [result.status for result in caught.value.results].count("unexpected") == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: check_backbone(on_bolt, expected_failed_checks={"loss_is_diferentiable": "no"}),
            "check 'loss_is_diferentiable' is unknown; did you mean 'loss_is_differentiable'? known: ",
        ),
        (
            lambda: adapter_checks("lora", on_bolt, expected_failed_checks={"x": "no"}),
            "check 'x' is unknown; known: ",
        ),
        (
            lambda: check_estimator(ChronosEstimator, expected_failed_checks={"family_is_registred": "no"}),
            "check 'family_is_registred' is unknown; did you mean 'family_is_registered'? known: ",
        ),
    ],
)
def test_expected_failures_of_unknown_checks_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call()


def test_a_backbone_with_an_adapter_is_refused() -> None:
    backbone = copy.deepcopy(on_bolt())
    gluonts_peft.get_adapter("bitfit").attach(backbone)
    with pytest.raises(ValueError, match="has an adapter; give a backbone without one$"):
        BACKBONE_CHECKS["copies_are_independent"](BackboneCase(backbone))


def test_checking_changes_nothing() -> None:
    backbone = copy.deepcopy(on_bolt())
    state = torch.get_rng_state()
    check_adapter("head", backbone)

    assert torch.equal(torch.get_rng_state(), state)
    before, after = on_bolt().state_dict(), backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert backbone.adapter is None
    assert not backbone.training


def test_each_check_is_a_test_of_pytest() -> None:
    def never() -> Any:
        raise AssertionError("collecting must load nothing")

    checks = [
        *backbone_checks(never, expected_failed_checks={"padding_has_no_influence": "counts steps"}),
        *adapter_checks(["layernorm", {"name": "lora", "r": 4}], never),
        *estimator_checks(ChronosEstimator, label="short"),
    ]

    @parametrize_with_checks(checks)
    def contract(check: Any) -> None:
        check()

    (mark,) = contract.pytestmark
    names, values = mark.args

    assert names == "check"
    assert [value.values[0] for value in values] == checks
    ids = [value.id for value in values]
    assert ids[0] == "backbone-declarations_are_known"
    assert "layernorm+lora(r=4)-training_loss_falls" in ids
    assert "short-family_is_registered" in ids
    assert len(ids) == len(set(ids)) == len(BACKBONE_CHECKS) + len(ADAPTER_CHECKS) + len(ESTIMATOR_CHECKS)
    marked = {value.id: value.marks for value in values if value.marks}
    assert marked.keys() == {"backbone-padding_has_no_influence"}
    (expected,) = marked["backbone-padding_has_no_influence"]
    assert (expected.name, expected.kwargs) == ("xfail", {"reason": "counts steps", "strict": True})


@pytest.mark.parametrize(
    ("adapter", "label"),
    [
        ("lora", "lora"),
        ({"name": "lora", "r": 1}, "lora(r=1)"),
        (gluonts_peft.get_adapter("lora", r=1), "lora(r=1)"),
        (("layernorm", {"name": "lora", "sites": ["q", "v"]}), "layernorm+lora(sites=q+v)"),
        (gluonts_peft.get_adapter(["bitfit", "lora"]), "bitfit+lora"),
    ],
    ids=["name", "mapping", "object", "tuple", "hybrid"],
)
def test_adapters_are_named_in_every_way_that_they_can_be_built(adapter: Any, label: str) -> None:
    case = AdapterCase(adapter, on_bolt)

    assert str(case) == label
    assert case.attach(seed=1).num_parameters() > 0
    assert case.parts == re.sub(r"\([^)]*\)", "", label).split("+")


@pytest.mark.parametrize(
    ("table", "name"),
    [(table, name) for table in (BACKBONE_CHECKS, ADAPTER_CHECKS, ESTIMATOR_CHECKS) for name in table],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_check_states_its_clause_in_a_line(table: Mapping[str, Any], name: str) -> None:
    text = table[name].__doc__

    assert text is not None
    assert text.endswith(".")
    assert "\n" not in text


def test_batches_are_what_the_contract_says() -> None:
    backbone = on_bolt()
    batch = make_batch(backbone, size=3, past=20, seed=5, missing=0.5, features=True)

    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "past_target": (3, 20),
        "past_observed_values": (3, 20),
        "future_target": (3, 8),
        "future_observed_values": (3, 8),
        "feat_dynamic_real": (3, 28, 2),
        "observed_feat_dynamic_real": (3, 28, 2),
        "past_feat_dynamic_real": (3, 20, 1),
        "past_observed_feat_dynamic_real": (3, 20, 1),
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.float32}
    for values, mask in (("past_target", "past_observed_values"), ("future_target", "future_observed_values")):
        assert not batch[values][batch[mask] == 0].any()
        assert 0.2 < float((batch[mask] == 0).float().mean()) < 0.8
    # Something to see and something to forecast in every window.
    assert batch["past_observed_values"][:, -2:].all()
    assert batch["future_observed_values"][:, 0].all()
    again, other = make_batch(backbone, seed=1), make_batch(backbone, seed=2)
    assert torch.equal(make_batch(backbone, seed=1)["past_target"], again["past_target"])
    assert not torch.equal(other["past_target"], again["past_target"])
    assert again["past_target"].shape == (4, 48)
    assert make_batch(backbone, dimensions=2)["future_target"].shape == (4, 8, 2)


def test_time_features_of_a_batch_are_those_of_the_hours() -> None:
    backbone = copy.deepcopy(on_bolt())
    backbone.time_features = ("hour_of_day", "day_of_week")
    batch = make_batch(backbone, past=30)

    assert batch["time_feat"].shape == (4, 38, 2)
    # The forecast begins at five in the morning of a Friday, whatever the history.
    assert batch["time_feat"][0, 30].tolist() == pytest.approx([5 / 23 - 0.5, 4 / 6 - 0.5])
    assert torch.equal(make_batch(backbone, past=10)["time_feat"], batch["time_feat"][:, 20:])
