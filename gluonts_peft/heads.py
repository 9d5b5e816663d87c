"""Forecasting heads that take the place of a model's own.

A head maps the features of a backbone, ``patches`` vectors of ``d_model`` numbers, to the whole horizon in one step.
The history is standardised by its own mean and deviation as in MOMENT, and the head forecasts in these units. Kinds,
with their parameters on MOMENT-base (64 patches of 768 features) at horizons 96 and 720:

    linear          flatten, linear                                              4,718,688    35,390,160
    projection      linear to ``width`` features, flatten, linear                  442,528     2,999,056
    decomposition   flatten, linear to ``rank``, linear                            443,337     3,491,830
    truncation      first ``width`` features, flatten, linear                      393,312     2,949,840
    pooling         averages of features, ``width`` of them, flatten, linear       393,312     2,949,840
    convolution     depth-wise over patches (kernel 3, stride 2), linear to
                    ``width`` features, flatten, linear                            248,992     1,527,568

Replacing the linear head by a smaller one of these kinds is the idea of TRACE (arXiv 2503.16991), which names the kinds
and a reduction by about 90 per cent; the shapes are ours, sized to that. ``width`` is a twelfth of ``d_model`` by
default (64 of 768), ``rank`` the largest with which the two steps have a tenth of the parameters of ``linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .adapters.base import Adapter, AdapterError, copy_into
from .adapters.selective import head as own_head
from .backbone import NEW_HEAD, Trajectories
from .errors import unknown
from .features import FeatureCache, shape_of_features
from .scores import LEVELS
from .units import to_units

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["KINDS", "OUTPUTS", "FeatureCache", "Head", "NewHead", "forecast_error", "head", "standardise"]

OUTPUTS: dict[str, tuple[float, ...]] = {"point": (0.5,), "quantile": LEVELS}


class _Truncation(nn.Module):
    """The first features of each patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, features: Tensor) -> Tensor:
        return features[..., : self.width]


class _AcrossPatches(nn.Conv1d):
    """Depth-wise convolution along the patches: every second patch is left."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, d_model, 3, stride=2, padding=1, groups=d_model)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.transpose(1, 2)).transpose(1, 2)


def _linear(patches: int, d_model: int, width: int, rank: int) -> tuple[list[nn.Module], int]:
    return [nn.Flatten()], patches * d_model


def _projection(patches: int, d_model: int, width: int, rank: int) -> tuple[list[nn.Module], int]:
    return [nn.Linear(d_model, width), nn.Flatten()], patches * width


def _decomposition(patches: int, d_model: int, width: int, rank: int) -> tuple[list[nn.Module], int]:
    return [nn.Flatten(), nn.Linear(patches * d_model, rank)], rank


def _truncation(patches: int, d_model: int, width: int, rank: int) -> tuple[list[nn.Module], int]:
    return [_Truncation(width), nn.Flatten()], patches * width


def _pooling(patches: int, d_model: int, width: int, rank: int) -> tuple[list[nn.Module], int]:
    return [nn.AdaptiveAvgPool1d(width), nn.Flatten()], patches * width


def _convolution(patches: int, d_model: int, width: int, rank: int) -> tuple[list[nn.Module], int]:
    layers = [_AcrossPatches(d_model), nn.Linear(d_model, width), nn.Flatten()]
    return layers, (patches + 1) // 2 * width


# What comes before the last linear layer, and how many numbers it hands over.
KINDS: dict[str, Callable[[int, int, int, int], tuple[list[nn.Module], int]]] = {
    "linear": _linear,
    "projection": _projection,
    "decomposition": _decomposition,
    "truncation": _truncation,
    "pooling": _pooling,
    "convolution": _convolution,
}


class Head(nn.Module):
    """Features of all patches become a forecast. The last layer starts at zero: untrained.

    Parameters
    ----------
    kind
        One of :data:`KINDS`.
    patches, d_model
        Of the features.
    prediction_length
        Steps to forecast.
    output
        ``"point"`` learns by squared error, ``"quantile"`` the quantiles 0.1 to 0.9 by the quantile loss.
    width
        Features a patch that are left, for the kinds that reduce them.
    rank
        Width between the two steps of a decomposition.
    dropout
        On the features.

    Raises
    ------
    ValueError
        If an option is unknown or has a value that cannot be used.
    """

    def __init__(
        self,
        kind: str,
        *,
        patches: int,
        d_model: int,
        prediction_length: int,
        output: str = "point",
        width: int | None = None,
        rank: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        _check(kind=kind, output=output, width=width, rank=rank, dropout=dropout)
        self.levels = OUTPUTS[output]
        self.point = output == "point"
        outputs = prediction_length * len(self.levels)
        width = max(1, round(d_model / 12)) if width is None else width
        if width > d_model:
            raise ValueError(f"width {width} of head {kind!r} exceeds the {d_model} features of a patch")
        if rank is None:
            inputs = patches * d_model
            rank = max(1, ((inputs + 1) * outputs // 10 - outputs) // (inputs + 1 + outputs))
        layers, inputs = KINDS[kind](patches, d_model, width, rank)
        self.dropout = nn.Dropout(dropout)
        self.body = nn.Sequential(*layers)
        # Without the usual initialisation, which would move the state of the random numbers.
        self.last: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @property
    def trained(self) -> bool:
        """Whether the head has left its start."""
        return bool(self.last.weight.any() or self.last.bias.any())

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(batch, patches, d_model)`` to ``(batch, levels, prediction_length)``, in standardised units."""
        steps: Tensor = self.last(self.body(self.dropout(features)))
        return steps.view(len(steps), len(self.levels), -1)

    def predict(self, features: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return forecasts in the units of the data, shape ``(batch, levels, prediction_length)``."""
        mean, deviation = standardise(batch["past_target"], batch["past_observed_values"])
        scaled: Tensor = self(features)
        return scaled * deviation[:, None] + mean[:, None]

    def loss(self, features: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each window, shape ``(batch,)``: mean over the observed labels.

        Errors count in standard deviations of the window, history and label together. Labels may be shorter than the
        head's horizon.
        """
        label = batch["future_target"]
        predicted = self.predict(features, batch)[..., : label.shape[1]]
        if not self.point:
            return _quantile_loss(predicted, self.levels, batch)
        errors = ((predicted[:, 0] - label) / _unit(batch)).square()
        return _mean_observed(errors, batch["future_observed_values"])

    def forecast(self, features: Tensor, batch: Mapping[str, Tensor]) -> Trajectories:
        """Forecast quantiles; those of a point are all the same.

        Raises
        ------
        ValueError
            If the head was not trained.
        """
        if not self.trained:
            raise ValueError(
                "the new forecasting head is not trained: there is nothing to forecast with; train it, alone or with an"
                " adapter, or detach it for the forecasts of the model's own head"
            )
        values = self.predict(features, batch)
        if self.point:
            return Trajectories(values.expand(-1, len(LEVELS), -1), LEVELS)
        # Quantiles that cross are put in order.
        return Trajectories(values.sort(1).values, self.levels)


def _check(**options: Any) -> None:
    """Refuse options of a head that cannot be used."""
    for name, known in (("kind", KINDS), ("output", OUTPUTS)):
        if not isinstance(options[name], str) or options[name] not in known:
            raise ValueError(unknown(f"{name} of a head", str(options[name]), known))
    for name in ("width", "rank", "windows"):
        value = options.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} {value!r} of a head is not a positive whole number")
    dropout = options["dropout"]
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout!r} of a head is not a share in [0, 1)")


def standardise(values: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (biased, plus 1e-5) of what is observed of windows, each of shape ``(batch, 1)``."""
    count = observed.sum(1, keepdim=True).clamp(min=1)
    mean = (values * observed).sum(1, keepdim=True) / count
    variance = ((values - mean).square() * observed).sum(1, keepdim=True) / count
    return mean, variance.sqrt() + 1e-5


def _unit(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the deviation of history and label together: that of the history alone is near zero where it is flat."""
    whole = torch.cat([batch["past_target"], batch["future_target"]], 1)
    return standardise(whole, torch.cat([batch["past_observed_values"], batch["future_observed_values"]], 1))[1]


def _mean_observed(errors: Tensor, observed: Tensor) -> Tensor:
    return (errors * observed).sum(1) / observed.sum(1).clamp(min=1.0)


def _quantile_loss(predicted: Tensor, levels: Sequence[float], batch: Mapping[str, Tensor]) -> Tensor:
    """Return twice the pinball loss in units of the window, mean over levels and observed labels."""
    label, unit = batch["future_target"], _unit(batch)
    difference = (label[:, None] - predicted) / unit[:, None]
    weight = torch.tensor(levels, device=label.device)[:, None]
    pinball = 2.0 * torch.maximum(weight * difference, (weight - 1.0) * difference).mean(1)
    return _mean_observed(pinball, batch["future_observed_values"])


def forecast_error(backbone: Backbone, batches: Sequence[Mapping[str, Any]], levels: Sequence[float]) -> float:
    """Return the mean scaled quantile loss of forecasts, which compares heads of any kind.

    Parameters
    ----------
    backbone
        That can forecast.
    batches
        Windows with labels, univariate.
    levels
        Levels that count; with the median alone this is the absolute error, in standard deviations of the window.
    """
    total, count = 0.0, 0
    generator = torch.Generator(device=backbone.device).manual_seed(0)
    with backbone.reading() as reader:
        for arrays in batches:
            tensors = {name: torch.as_tensor(value).to(backbone.device) for name, value in arrays.items()}
            batch, _ = to_units(tensors, getattr(backbone, "equivariance", "none"))
            past = {name: value for name, value in batch.items() if not name.startswith("future_")}
            found = _at_levels(reader.forecast(past, generator=generator), levels)
            losses = _quantile_loss(found, levels, batch)
            total += losses.double().sum().item()
            count += len(losses)
    return total / count


def _at_levels(found: Trajectories, levels: Sequence[float]) -> Tensor:
    """Return the quantiles at some levels, shape ``(batch, levels, prediction_length)``; between levels, by a line."""
    values = found.values.float()
    if found.levels is None:
        return torch.quantile(values, torch.tensor(levels, device=values.device), dim=1).transpose(0, 1)
    parts = []
    for level in levels:
        position = float(np.interp(level, found.levels, range(len(found.levels))))
        low, share = int(position), position % 1.0
        high = min(low + 1, len(found.levels) - 1)
        parts.append(torch.lerp(values[:, low], values[:, high], share) if share else values[:, low])
    return torch.stack(parts, 1)


class NewHead(Adapter):
    """A forecasting head that takes the place of the model's own; the backbone stays as it is.

    Works on every family with the capability ``"features"``, alone or in a list with other adapters. Alone, the
    features of a window are computed once.

    Parameters
    ----------
    options
        ``kind``, and ``output``, ``width``, ``rank`` and ``dropout`` as for :class:`Head`. Of a head that trains alone:
        ``cache`` (true by default), whether features are kept; ``windows``, how many training windows to draw once and
        train on again and again, None for all that the training would draw.

    Raises
    ------
    AdapterError
        If an option is unknown or has a value that cannot be used.
    """

    name = "head"
    mergeable = False
    frozen_features = True
    known = ("kind", "output", "width", "rank", "dropout", "cache", "windows")
    alone = ("cache", "windows")

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        for option in options:
            if option not in self.known:
                raise AdapterError("adapter 'head': " + unknown("option", option, self.known))
        if "kind" not in options:
            raise AdapterError(f"adapter 'head': a new head needs its kind, one of {', '.join(KINDS)}")
        given = {"output": "point", "dropout": 0.1, **options}
        try:
            _check(**given)
        except ValueError as error:
            raise AdapterError(f"adapter 'head': {error}") from None
        self.caches = bool(given.pop("cache", True))
        self.pool = given.pop("windows", None)
        self.head_levels = OUTPUTS[given["output"]]
        # Its last layer sums over far more inputs.
        self.learning_rate = 3e-4 if given["kind"] == "linear" else 3e-3
        self._made: dict[str, Any] = given
        self._head: Head | None = None

    def _attach(self, backbone: Backbone) -> None:
        if "features" not in backbone.capabilities:
            raise AdapterError(
                f"adapter {self!r} needs the features of the backbone, and {backbone.source.checkpoint!r} of family"
                f" {backbone.family!r} does not offer them; train the model's own head with adapter 'head', or take a"
                " family with the capability 'features'"
            )
        patches, d_model = shape_of_features(backbone)
        try:
            made = Head(
                **self._made, patches=patches, d_model=d_model, prediction_length=backbone.prediction_length
            ).to(backbone.device)
        except ValueError as error:
            raise AdapterError(f"adapter {self!r} cannot be attached to {backbone!r}: {error}") from None
        self._head = made
        backbone.network.add_module(NEW_HEAD, made)

    def _detach(self, backbone: Backbone) -> None:
        delattr(backbone.network, NEW_HEAD)
        self._head = None

    def folds(self) -> list[nn.Parameter] | None:
        return []

    def _fold(self) -> None:
        """There is no place in the base for it."""

    def _unwrap(self, backbone: Backbone) -> None:
        self._detach(backbone)

    @property
    def head(self) -> Head:
        """The head.

        Raises
        ------
        AdapterError
            If it is not attached.
        """
        if self._head is None:
            raise AdapterError(f"adapter {self!r} is not attached; call attach(backbone) first")
        return self._head

    def parameters(self) -> list[nn.Parameter]:
        return [] if self._head is None else list(self._head.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.head.named_parameters())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        copy_into(self.state_dict(), state, self)


def head(**options: Any) -> Adapter:
    """Build the adapter: the model's own head, or with ``kind`` a new one."""
    return NewHead(options) if options else own_head()
