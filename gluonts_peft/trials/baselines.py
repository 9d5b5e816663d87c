"""What tuned models are compared with: repeated values, and networks trained from scratch.

    seasonal_naive, last_value                          :class:`gluonts_peft.backtesting.SeasonalNaive`
    deepar, patch_tst, simple_feedforward, tft          GluonTS's own, built by its estimators with their defaults
    nbeats, nhits                                       neuralforecast's (the extra ``[baselines]``)

Networks are trained by the loop that tunes adapters, on the windows that it draws for the same seed, with the same
validation windows, early stopping and optimiser. GluonTS's networks train on their own loss. Our choice is: those of
neuralforecast train on the absolute error of windows standardised by their history; networks that know no missing
values get the last value before instead; DeepAR's age counts from the start of the window, and it looks back no further
than the context.

The N-HiTS is the one of 680,680 parameters for 72 steps in and 36 out: 4 stacks of 4 blocks of 3 layers of width 128,
which pool and interpolate by geometric sequences, the last stack not at all. The count fixes that the backcast is
interpolated like the forecast; neuralforecast's own blocks leave it at full length.
"""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from gluonts.time_feature import get_lags_for_frequency
from torch import Tensor, nn
from torch.nn import functional

from ..backbone import Backbone, Source, Trajectories
from ..backtesting import QUANTILE_LEVELS
from ..errors import unknown
from ..estimator import PeftEstimator
from .baselinespec import BASELINE, TRAINED

__all__ = ["BaselineEstimator"]

LEARNING_RATE = 1e-3

# Arguments of GluonTS's estimators that say how to train, which is not theirs to say here, or what is not in a batch.
_NOT_OPTIONS = {
    "self", "freq", "prediction_length", "context_length", "lr", "weight_decay", "patience", "batch_size",
    "num_batches_per_epoch", "trainer_kwargs", "train_sampler", "validation_sampler", "time_features", "distr_output",
    "imputation_method", "quantiles", "use_feat_dynamic_real", "use_feat_static_cat", "use_feat_static_real",
    "num_feat_dynamic_real", "num_feat_static_cat", "num_feat_static_real", "cardinality", "embedding_dimension",
    "static_dims", "dynamic_dims", "past_dynamic_dims", "static_cardinalities", "dynamic_cardinalities",
    "past_dynamic_cardinalities",
}  # fmt: skip


@dataclass(frozen=True)
class _Lengths:
    prediction: int
    context: int
    freq: str


class BaselineBackbone(Backbone):
    """A network that starts from random weights.

    Parameters
    ----------
    time_features
        Names of functions of ``gluonts.time_feature`` that it takes.
    lags
        Steps that it looks back beyond the context.
    """

    family = BASELINE
    untrained = ("head",)

    def __init__(
        self, network: nn.Module, *, time_features: tuple[str, ...] = (), lags: int = 0, **options: Any
    ) -> None:
        super().__init__(network, **options)
        self.time_features = time_features
        self.lags = lags

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Any,
        *,
        prediction_length: int,
        context_length: int | None = None,
        freq: str = "h",
        **options: Any,
    ) -> BaselineBackbone:
        """Build one of the table.

        Parameters
        ----------
        checkpoint
            Its name.
        prediction_length, context_length
            Steps out and in; a context is needed.
        freq
            Frequency of the data, for calendar features.
        **options
            Of the network, under the names of its library.

        Raises
        ------
        ValueError
            If the name or an option is unknown, or there is no context.
        ImportError
            If neuralforecast is not installed.
        """
        if checkpoint not in TRAINED:
            raise ValueError(unknown("baseline", str(checkpoint), TRAINED))
        if context_length is None:
            raise ValueError(f"baseline {checkpoint!r} has no context_length of its own; name one")
        lengths = _Lengths(prediction_length, context_length, freq)
        source = Source(BASELINE, checkpoint, "scratch", None, "")
        common: dict[str, Any] = dict(prediction_length=prediction_length, context_length=context_length, source=source)
        if checkpoint in _GLUONTS:
            backbone: BaselineBackbone = _gluonts(checkpoint, lengths, options, common)
        else:
            backbone = _PointBackbone(_NEURALFORECAST[checkpoint](lengths, options), **common)
        backbone.options = {"freq": freq, **options}
        return backbone

    @classmethod
    def from_network(cls, network: nn.Module, **options: Any) -> BaselineBackbone:
        return cls(network, **options)

    @classmethod
    def load_network(cls, folder: Path) -> NoReturn:
        raise ValueError(f"'{folder}' cannot be loaded: a baseline is trained from scratch and has no checkpoints")

    def export(self, folder: Path) -> NoReturn:
        raise ValueError(f"nothing can be written to '{folder}': a baseline has no official layout")

    def sites(self) -> dict[str, tuple[str, ...]]:
        return {}

    @property
    def past_length(self) -> int:
        return self.context_length + self.lags

    def _inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all that a network may ask for, the history at its full length."""
        missing = self.past_length - batch["past_target"].shape[1]
        inputs = dict(batch)
        for name in ("past_target", "past_observed_values"):
            inputs[name] = functional.pad(batch[name], (missing, 0))
        return inputs


class _GluonTSBackbone(BaselineBackbone):
    """A network of GluonTS with its own loss; parametric forecasts become quantiles, DeepAR's are sample paths."""

    def __init__(self, network: nn.Module, **options: Any) -> None:
        super().__init__(network, **options)
        # Networks without a mask would take a missing value for a zero.
        self.masked = "past_observed_values" in inspect.signature(network.forward).parameters

    def _inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = super()._inputs(batch)
        past, observed = inputs["past_target"], inputs["past_observed_values"]
        size, steps = past.shape
        if not self.masked:
            inputs["past_target"] = _filled(past, observed)
        inputs["feat_static_real"] = past.new_zeros(size, 1)
        inputs["feat_static_cat"] = torch.zeros(size, 1, dtype=torch.long, device=past.device)
        begun = functional.pad(observed.cummax(1).values, (0, self.prediction_length), value=1.0)
        if "time_feat" in batch:
            calendar = batch["time_feat"]
            calendar = functional.pad(calendar, (0, 0, begun.shape[1] - calendar.shape[1], 0))
        else:
            calendar = past.new_zeros(size, begun.shape[1], 1)
        inputs["feat_dynamic_real"] = calendar
        age = torch.log10(1.0 + begun.cumsum(1))[..., None]
        features = torch.cat([calendar, age], -1) if "time_feat" in batch else age
        inputs["past_time_feat"], inputs["future_time_feat"] = features[:, :steps], features[:, steps:]
        return inputs

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = _call(self.network.loss, self._inputs(batch))
        return found

    def forecast(
        self, batch: Mapping[str, Tensor], *, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectories:
        inputs = self._inputs(batch)
        if "num_parallel_samples" in inspect.signature(self.network.forward).parameters:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                # GluonTS samples from torch's global generator; ours moves on by one number a batch.
                seed = 0 if generator is None else _draw(generator)
                torch.manual_seed(seed)
                return Trajectories(_call(self.network.forward, inputs, num_parallel_samples=num_samples), None)
        arguments, loc, scale = _call(self.network.forward, inputs)
        output: Any = self.network.distr_output
        if hasattr(output, "quantiles"):
            values = (arguments[0] * scale[..., None] + loc[..., None]).transpose(1, 2)
            return Trajectories(values, tuple(output.quantiles))
        distribution = output.distribution(arguments, loc=loc, scale=scale)
        shape = (len(scale), self.prediction_length)
        levels = [distribution.icdf(torch.full(shape, level, device=self.device)) for level in QUANTILE_LEVELS]
        return Trajectories(torch.stack(levels, 1), QUANTILE_LEVELS)


class _PointBackbone(BaselineBackbone):
    """A network of neuralforecast: one value a step, the last value before for what is missing."""

    equivariance = "affine"

    def _scaled(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self._inputs(batch)
        past, observed = inputs["past_target"], inputs["past_observed_values"]
        count = observed.sum(1, keepdim=True).clamp_min(1.0)
        loc = (past * observed).sum(1, keepdim=True) / count
        scale = (((past - loc) * observed).square().sum(1, keepdim=True) / count).sqrt()
        # A constant history says nothing about the spread: then the unit of the data is taken.
        scale = torch.where(scale > 1e-6 * (1.0 + loc.abs()), scale, torch.ones_like(scale))
        filled = (_filled(past, observed) - loc) / scale
        nothing: dict[str, Any] = dict.fromkeys(("futr_exog", "hist_exog", "stat_exog"))
        window = {"insample_y": filled[..., None], "insample_mask": torch.ones_like(filled)[..., None], **nothing}
        return self.network(window).squeeze(-1), loc, scale

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        values, loc, scale = self._scaled(batch)
        observed = batch["future_observed_values"]
        errors = (values - (batch["future_target"] - loc) / scale).abs() * observed
        return errors.sum(1) / observed.sum(1).clamp_min(1.0)

    def forecast(
        self, batch: Mapping[str, Tensor], *, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectories:
        values, loc, scale = self._scaled(batch)
        # One sample path: a point, as of the naive baselines.
        return Trajectories((values * scale + loc)[:, None], None)


class BaselineEstimator(PeftEstimator):
    """Trains a network of the table from scratch; ``checkpoint`` is its name."""

    backbone_class = BaselineBackbone
    default_checkpoint = "nhits"

    def load_backbone(self) -> Backbone:
        if self.checkpoint in _NEURALFORECAST:
            # Importing it sets up loggers, before they are made quiet.
            _neuralforecast()
        with _private_randomness(self.options.seed):
            return super().load_backbone()


_GLUONTS = {
    "deepar": "DeepAREstimator",
    "patch_tst": "PatchTSTEstimator",
    "simple_feedforward": "SimpleFeedForwardEstimator",
    "tft": "TemporalFusionTransformerEstimator",
}


def _gluonts(name: str, lengths: _Lengths, options: Mapping[str, Any], common: Mapping[str, Any]) -> _GluonTSBackbone:
    import gluonts.torch

    estimator_class = getattr(gluonts.torch, _GLUONTS[name])
    known = inspect.signature(estimator_class.__init__).parameters
    arguments: dict[str, Any] = {"prediction_length": lengths.prediction, "context_length": lengths.context}
    if "freq" in known:
        arguments["freq"] = lengths.freq
    if "patch_len" in known:
        # No default in GluonTS; 16 and 8 are those of the paper (arXiv 2211.14730) for its shorter context.
        patch = int(options.get("patch_len", min(16, lengths.context)))
        arguments |= {"patch_len": patch, "stride": max(1, patch // 2)}
    if "lags_seq" in known:
        lags = get_lags_for_frequency(lengths.freq)
        arguments["lags_seq"] = [lag for lag in lags if lag <= lengths.context]
    _check_options(name, options, [each for each in known if each not in _NOT_OPTIONS])
    estimator = estimator_class(**{**arguments, **options})
    module = estimator.create_lightning_module()
    features = tuple(_feature_name(feature) for feature in getattr(estimator, "time_features", None) or ())
    lags_seq = getattr(module.model, "lags_seq", None)
    return _GluonTSBackbone(module.model, time_features=features, lags=max(lags_seq) if lags_seq else 0, **common)


def _feature_name(feature: Any) -> str:
    return str(getattr(feature, "__name__", None) or feature.func.__name__)


def _nbeats(lengths: _Lengths, options: Mapping[str, Any]) -> nn.Module:
    """Build neuralforecast's N-BEATS with its defaults."""
    module = _neuralforecast().NBEATS
    names = ("n_harmonics", "n_basis", "basis", "stack_types", "n_blocks", "mlp_units", "activation", "shared_weights")
    _check_options("nbeats", options, names)
    network: nn.Module = module(h=lengths.prediction, input_size=lengths.context, **options, **_quietly())
    # Its bases are parameters that never train; all parameters here do.
    for part in network.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(part, name)
                part.register_buffer(name, parameter.detach())
    return network


def _nhits(lengths: _Lengths, options: Mapping[str, Any]) -> nn.Module:
    """Build an N-HiTS of neuralforecast's blocks."""
    module = _neuralforecast()
    sizes = {"num_stacks": 4, "num_blocks": 4, "num_layers": 3, "layer_width": 128}
    _check_options("nhits", options, sizes)
    stacks, blocks, layers, width = (int(options.get(name, size)) for name, size in sizes.items())
    if min(stacks, blocks, width) < 1 or layers < 2:
        raise ValueError(f"baseline 'nhits': options {dict(options)} are too small; a block has two layers or more")
    h, size = lengths.prediction, lengths.context
    # neuralforecast puts one layer before those that it is asked for.
    units = [[width, width]] * (layers - 1)
    network: Any = module.NHITS(
        h=h, input_size=size, stack_types=["identity"], n_blocks=[1], mlp_units=units, n_pool_kernel_size=[1],
        n_freq_downsample=[1], **_quietly(),
    )  # fmt: skip
    block_class = type(network.blocks[0])
    built = []
    for pool, coarse in zip(_falling(size, stacks), _falling(h, stacks), strict=True):
        for _ in range(blocks):
            backcast, forecast = max(1, size // coarse), max(1, h // coarse)
            built.append(
                block_class(
                    input_size=size,
                    h=h,
                    n_theta=backcast + forecast,
                    mlp_units=units,
                    basis=_Interpolation(backcast, size, h),
                    futr_input_size=0,
                    hist_input_size=0,
                    stat_input_size=0,
                    n_pool_kernel_size=pool,
                    pooling_mode="MaxPool1d",
                    dropout_prob=0.0,
                    activation="ReLU",
                )  # fmt: skip
            )
    network.blocks = nn.ModuleList(built)
    built_network: nn.Module = network
    return built_network


def _falling(length: int, stacks: int) -> list[int]:
    """Return how coarse each stack is, from half the length down to 1."""
    half = max(1, length // 2)
    return [int(half // step) for step in np.geomspace(1, half, stacks)]


class _Interpolation(nn.Module):
    """Linear interpolation of coarse backcasts and forecasts."""

    def __init__(self, knots: int, size: int, h: int) -> None:
        super().__init__()
        self.knots, self.size, self.h = knots, size, h

    def forward(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        backcast, forecast = theta[:, None, : self.knots], theta[:, None, self.knots :]
        backcast = functional.interpolate(backcast, size=self.size, mode="linear")
        return backcast[:, 0], functional.interpolate(forecast, size=self.h, mode="linear").transpose(1, 2)


_NEURALFORECAST = {"nbeats": _nbeats, "nhits": _nhits}


def _neuralforecast() -> Any:
    try:
        from neuralforecast import models
    except ImportError as error:
        raise ImportError(
            f"baselines 'nbeats' and 'nhits' need neuralforecast ({error}); install gluonts-peft[baselines]"
        ) from error
    return models


def _quietly() -> dict[str, Any]:
    """Return the arguments with which neuralforecast's models seed everything and make a trainer: unused here."""
    seed = torch.initial_seed() % 2**32
    return {"random_seed": seed, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}


def _check_options(name: str, options: Mapping[str, Any], known: Any) -> None:
    for option in options:
        if option not in known:
            raise ValueError(f"baseline {name!r}: " + unknown("option", option, list(known)))


def _call(function: Any, inputs: Mapping[str, Tensor], **further: Any) -> Any:
    names = inspect.signature(function).parameters
    return function(**{name: value for name, value in inputs.items() if name in names}, **further)


def _draw(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator, device=generator.device).item())


def _filled(past: Tensor, observed: Tensor) -> Tensor:
    """Put the last value before in place of what is missing, and the first one where none is before."""
    steps = torch.arange(past.shape[1], device=past.device).expand_as(past)
    last = torch.where(observed > 0, steps, -1).cummax(1).values
    first = (observed > 0).to(torch.int64).argmax(1, keepdim=True)
    return past.gather(1, torch.where(last < 0, first, last))


@contextmanager
def _private_randomness(seed: int) -> Iterator[None]:
    """Seed torch within the context, and undo what neuralforecast seeds for the whole process."""
    import logging

    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    environment = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning_fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        # What neuralforecast says of seeds is information.
        logger.setLevel(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
