"""The units in which a network sees a window: numbers of ordinary size, whatever those of the data are.

Networks compute in float32, and many add a constant to the variance or the deviation that they divide by. Windows whose
spread is tiny or huge, or that lie far from zero for their spread, are lost in either. So each window of that kind is
brought to ordinary numbers before the network sees it, and what comes out is brought back, both in float64:

    network(x)                                  while the numbers of a window are ordinary
    network((x - loc) / scale) * scale + loc    else

Ordinary windows are left as they are, bit for bit, so that a family gives what its own library gives. What is ordinary
follows from what a family declares to be equivariant to, :data:`EQUIVARIANCE`. Statistics are those of the observed
history, for each target and in each window; a label is counted in the units of its history. All of it happens in
:func:`in_units`, which :class:`gluonts_peft.backbone.Backbone` puts around the methods of every family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["EQUIVARIANCE", "Units", "in_units", "refuse_nonfinite", "to_units", "wrap_methods"]

EQUIVARIANCE: dict[str, str] = {
    "affine": "f(s x + c) = s f(x) + c: the network standardises each target of a window itself",
    "scale": "f(s x) = s f(x): the network divides by the size of the numbers, and their level matters to it",
    "none": "the network sees the size of the numbers, or it is not known",
}
"""What the forecast of a family follows, for a scale ``s > 0`` and a shift ``c`` of the whole window."""


class _Ordinary(NamedTuple):
    """Windows that a network takes as they are: the least and the largest spread, and the largest distance from zero in
    spreads.
    """

    least: float
    largest: float
    distance: float


# A constant of 1e-5 beside a variance of 1/16 moves a forecast by less than 1e-4 spreads, and so do the roundings of
# float32 at 256 spreads from zero. Tokens of Chronos-T5 no longer tell steps of one spread apart beyond some 128; a
# family that sees the size of numbers is left alone for as long as float32 holds them.
_ORDINARY = {
    "affine": _Ordinary(2.0**-2, 2.0**20, 256.0),
    "scale": _Ordinary(2.0**-2, 2.0**20, 128.0),
    "none": _Ordinary(2.0**-10, 2.0**30, 1024.0),
}

# Spread over mean below which a window is constant: some thousand roundings of float64.
_CONSTANT = 2.0**-40

_FEATURES = {
    "feat_dynamic_real": "observed_feat_dynamic_real",
    "past_feat_dynamic_real": "past_observed_feat_dynamic_real",
}


class _Batch(dict[str, Tensor]):
    """A batch that is in ordinary units already."""


@dataclass(frozen=True)
class Units:
    """Level and scale of each window and target.

    Parameters
    ----------
    loc, scale
        float64, shape ``(batch, 1)``, or ``(batch, 1, dimensions)``; 0 and 1 for windows that are ordinary.
    wide
        Whether float32 cannot hold what is counted in the units of the data.
    dtype
        Type of values in these units.
    """

    loc: Tensor
    scale: Tensor
    wide: bool
    dtype: torch.dtype = torch.float32

    def into(self, values: Tensor, *, paths: bool = False) -> Tensor:
        """Return values in these units; parameters as :meth:`back`."""
        loc, scale = self._like(paths)
        return ((values.double() - loc) / scale).to(self.dtype)

    def back(self, values: Tensor, *, paths: bool = False) -> Tensor:
        """Return values in the units of the data, float32 where that holds them, else float64.

        Parameters
        ----------
        values
            Shape ``(batch, steps[, dimensions])``.
        paths
            Whether there is an axis of sample paths or quantiles, ``(batch, n, steps[, dimensions])``.
        """
        loc, scale = self._like(paths)
        found = values.double() * scale + loc
        return found if self.wide else found.float()

    def _like(self, paths: bool) -> tuple[Tensor, Tensor]:
        return (self.loc[:, None], self.scale[:, None]) if paths else (self.loc, self.scale)


def to_units(
    batch: Mapping[str, Tensor], equivariance: str, dtype: torch.dtype = torch.float32
) -> tuple[Mapping[str, Tensor], Units | None]:
    """Return a batch in ordinary units.

    Parameters
    ----------
    batch
        As :class:`gluonts_peft.backbone.Backbone` describes it, float32 or float64.
    equivariance
        One of :data:`EQUIVARIANCE`. Dynamic features are treated like targets, by the history of each, unless it is
        ``"none"``, where they are left as they are.
    dtype
        Type of the values that are returned.

    Returns
    -------
    batch, units
        Units are None if all windows are ordinary; float32 values are then those of the batch.
    """
    found = _Batch(batch)

    def convert(names: Sequence[str], values: Tensor, mask: Tensor, measured: bool = True) -> Units | None:
        units = _measure(values, mask, equivariance, dtype) if measured else None
        for name in names:
            if name in batch:
                found[name] = batch[name].to(dtype) if units is None else units.into(batch[name])
        return units

    past = batch["past_target"].shape[1]
    for name, mask in _FEATURES.items():
        if name in batch:
            convert((name,), batch[name][:, :past], batch[mask][:, :past], equivariance != "none")
    return found, convert(("past_target", "future_target"), batch["past_target"], batch["past_observed_values"])


@torch.no_grad()
def _measure(values: Tensor, mask: Tensor, equivariance: str, dtype: torch.dtype) -> Units | None:
    """Return the units of windows, shape ``(batch, time[, dimensions])``; None if all are ordinary."""
    ordinary = _ORDINARY[equivariance]
    observed = mask > 0
    known = torch.where(observed, values, 0.0).double()
    count = observed.sum(1, keepdim=True).clamp(min=1)
    mean = known.sum(1, keepdim=True) / count
    spread = (torch.where(observed, known - mean, 0.0).square().sum(1, keepdim=True) / count).sqrt()
    level = mean.abs()
    varies = spread > _CONSTANT * level
    # A constant window has no spread: its size is that of its value.
    size = torch.where(varies, spread, level)
    far = varies & (level > ordinary.distance * spread)
    sized = ((size < ordinary.least) | (size > ordinary.largest)) & (size > 0)
    if not (far | sized).any():
        return None
    scale = size
    if equivariance == "none":
        # Any two such windows that differ by scale and shift are the same to the network.
        sized = sized | far
        far = sized & varies
    else:
        # A power of two, which changes no digit.
        scale = size / (2.0 * torch.frexp(size).mantissa)
    scale = torch.where(sized, scale, 1.0)
    extreme = (scale > 2.0**100) | (scale < 2.0**-100)
    return Units(torch.where(far, mean, 0.0), scale, bool((far | extreme).any()), dtype)


def _loss(found: Tensor, units: Units | None, batch: Mapping[str, Tensor], density: bool) -> Tensor:
    if units is None or not density:
        return found
    # The mean over targets, each of which counts if any of its label was observed.
    labelled = (batch["future_observed_values"] > 0).any(1, keepdim=True)
    return found + (units.scale.log() * labelled).flatten(1).mean(1).to(found.dtype)


def _forecast(found: Any, units: Units | None, batch: Mapping[str, Tensor], density: bool) -> Any:
    return found if units is None else replace(found, values=units.back(found.values, paths=True))


def _reconstruct(found: Tensor, units: Units | None, batch: Mapping[str, Tensor], density: bool) -> Tensor:
    return found if units is None else units.back(found)


def _features(found: Tensor, units: Units | None, batch: Mapping[str, Tensor], density: bool) -> Tensor:
    return found


_UNDO: dict[str, Callable[..., Any]] = {
    "loss": _loss,
    "forecast": _forecast,
    "reconstruct": _reconstruct,
    "features": _features,
}


def in_units(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a backbone that takes batches in any units: ``loss``, ``forecast``, ``reconstruct`` or
    ``features``, whose first argument is the batch.
    """
    undo = _UNDO[method.__name__]

    @wraps(method)
    def wrapped(self: Any, batch: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if isinstance(batch, _Batch):
            return method(self, batch, *args, **kwargs)
        own, units = to_units(batch, self.equivariance, self.batch_dtype)
        return undo(method(self, own, *args, **kwargs), units, batch, self.density)

    wrapped.in_units = True  # type: ignore[attr-defined]
    return wrapped


def wrap_methods(kind: type, base: type, inner: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `inner`, and around that :func:`in_units`, around the methods of a class that are not its abstract base's."""
    for name in _UNDO:
        method = getattr(kind, name)
        if method is not getattr(base, name) and not hasattr(method, "in_units"):
            setattr(kind, name, in_units(inner(method)))


def refuse_nonfinite(values: NDArray[Any], name: Callable[[int], Any], what: str) -> None:
    """Raise a ValueError that names the first series whose values, shape ``(series, ...)``, are not finite.

    Parameters
    ----------
    values
        Of a batch.
    name
        Gives the name of a row.
    what
        What the values are, such as ``"forecast"``.
    """
    # A sum is finite only if all of its terms are; that of float32 is taken in float64, where it cannot overflow.
    if np.isfinite(values.sum(dtype=np.float64)):
        return
    bad = ~np.isfinite(values).reshape(len(values), -1).all(1)
    if bad.any():
        raise ValueError(
            f"{what} of series {name(int(bad.argmax()))!r} is not finite: its values are too large to compute with, or"
            " the weights of model and adapter are; rescale the series, or train again"
        )
