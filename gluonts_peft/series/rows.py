"""The numbers of an entry: what a step holds, what is refused, and in which precision they are kept.

Numbers are float32 for as long as that holds them. Series whose changes from step to step float32 would swallow, such
as a counter of seconds, are float64.

Most data are univariate, and a step is then a single number. With several dimensions or with dynamic features a step is
a row: the target's dimensions, then the features, in the order of its `Layout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEATURES", "Floats", "Layout", "narrowest", "rows_of"]

Floats = NDArray[np.floating[Any]]

FEATURES = {"feat_dynamic_real": True, "past_feat_dynamic_real": False}
"""GluonTS fields that hold dynamic features, and whether they are known in the future too."""

# Share of a change from step to step beyond which the rounding of float32 counts, and changes that are judged together.
_ROUNDED, _TOGETHER = 2.0**-12, 32
# Series without a larger number than this would lose digits in float32.
_SMALLEST = 2.0**-100
# As shares of the largest number: what a constant that was computed may change by, 16 roundings of float64, and the
# least range of numbers whose changes float64 holds.
_ROUNDING, _FARTHEST = 2.0**-48, 2.0**-38


@dataclass(frozen=True)
class Layout:
    """What a step of a data set holds.

    Attributes
    ----------
    dimensions : int or None
        Dimensions of the target; None for univariate targets of shape (steps,).
    features : tuple of (str, int)
        Fields of `FEATURES` that there are, and how many features each holds.
    """

    dimensions: int | None = None
    features: tuple[tuple[str, int], ...] = ()

    @property
    def plain(self) -> bool:
        """Whether a step is a single number."""
        return self.dimensions is None and not self.features

    @property
    def target(self) -> int:
        """Columns of the target."""
        return self.dimensions or 1

    @property
    def width(self) -> int:
        """Columns of a step."""
        return self.target + sum(width for _, width in self.features)

    @classmethod
    def of(cls, entry: Mapping[str, Any], *, features: bool, multivariate: bool) -> Layout:
        """Layout of a data set, from its first entry."""
        dimensions = len(_numbers(entry, 0, "target", (1, 2))) if multivariate and _ndim(entry, "target") == 2 else None
        found = [name for name in FEATURES if features and entry.get(name) is not None]
        return cls(dimensions, tuple((name, len(np.atleast_2d(_numbers(entry, 0, name, (1, 2))))) for name in found))


def rows_of(entry: Mapping[str, Any], position: int, layout: Layout, horizon: int = 0, exact: bool = False) -> Floats:
    """The steps of an entry as a new array of shape (steps,); (steps + horizon, columns) if not plain."""
    if layout.plain:
        return _numbers(entry, position, "target", (1,), exact)
    target = _numbers(entry, position, "target", (1 if layout.dimensions is None else 2,), exact)
    steps = target.shape[-1]
    columns = [_of_width(target, layout.target, entry, position, "target")]
    for name, width in layout.features:
        values = _of_width(_numbers(entry, position, name, (1, 2), exact), width, entry, position, name)
        needed = steps + horizon if FEATURES[name] else steps
        if values.shape[1] < needed:
            raise ValueError(
                f"{name} of {_called(entry, position)} has {values.shape[1]} steps, needed are {needed}: the target's"
                f" {steps}" + (f" and the {horizon} to forecast" if horizon and FEATURES[name] else "")
            )
        columns.append(values[:, :needed])
    rows: Floats = np.full((steps + horizon, layout.width), np.nan, np.result_type(*columns))
    begin = 0
    for values in columns:
        rows[: values.shape[1], begin : begin + len(values)] = values.T
        begin += len(values)
    return rows


def _of_width(values: Floats, width: int, entry: Mapping[str, Any], position: int, name: str) -> Floats:
    values = np.atleast_2d(values)
    if len(values) != width:
        raise ValueError(
            f"{name} of {_called(entry, position)} has {len(values)} rows, that of the first entry {width}: give all"
            " entries the same"
        )
    return values


def _called(entry: Mapping[str, Any], position: int) -> str:
    item_id = entry.get("item_id")
    return f"entry {position}" if item_id is None else f"item_id {item_id!r}"


def _ndim(entry: Mapping[str, Any], name: str) -> int:
    return np.ndim(entry[name]) if isinstance(entry, Mapping) and name in entry else 1


def _numbers(
    entry: Mapping[str, Any], position: int, field: str, ndims: tuple[int, ...], exact: bool = False
) -> Floats:
    """A field of an entry as a new array without infinities: float32, or float64 where that cannot hold it."""
    if not isinstance(entry, Mapping):
        raise TypeError(f"entry {position} of the dataset is a {type(entry).__name__}: give a dict with a 'target'")
    name = _called(entry, position)
    shape = "(steps,)" if 1 in ndims else "(rows, steps)"
    if field not in entry:
        raise ValueError(f"{name} has no {field!r}, only {sorted(map(str, entry))}: give one of shape {shape}")
    try:
        raw = np.asarray(entry[field])
    except ValueError as error:
        raise ValueError(f"{field} of {name} is not an array ({error}): give one of shape {shape}") from None
    if ndims == (1,) and raw.ndim > 1:
        raise ValueError(
            f"multivariate targets are not supported, {field} of {name} has shape {raw.shape}: "
            "give each dimension as an entry of its own"
        )
    if raw.ndim == 0:
        raise ValueError(f"{field} of {name} is {entry[field]!r}, without a dimension: give one of shape {shape}")
    if raw.ndim not in ndims:
        raise ValueError(f"{field} of {name} has shape {raw.shape}, expected {shape} as in the first entry")
    if raw.dtype.kind not in "biuf":
        wrong = [value for value in raw.ravel().tolist() if not isinstance(value, (int, float))][:1]
        detail = f" with the value {wrong[0]!r}" if wrong else ""
        raise TypeError(f"{field} of {name} has type {raw.dtype}{detail}: give numbers, with NaN for missing values")
    with np.errstate(over="ignore", under="ignore"):
        values: Floats = raw.astype(np.float32)
    infinite = np.isinf(values)
    if infinite.any():
        at = int(infinite.any(0).argmax() if raw.ndim == 2 else infinite.argmax())
        value = raw[..., at] if raw.ndim == 1 else raw[int(infinite[:, at].argmax()), at]
        if np.isinf(value):
            raise ValueError(f"{field} of {name} has the value {value} at step {at}: give NaN for missing values")
        raise ValueError(f"{field} of {name} has the value {value} at step {at}, too large for float32: rescale it")
    if raw.dtype.kind != "b" and raw.dtype.itemsize >= 4 and raw.dtype != np.float32 and raw.size:
        whole = raw.astype(np.float64)
        # Without what is missing.
        low, high = float(np.fmin.reduce(whole, None)), float(np.fmax.reduce(whole, None))
        largest = max(-low, high)
        if 0.0 < largest < _SMALLEST:
            raise ValueError(
                f"{field} of {name} has no value beyond {largest:g}, too small for float32: rescale it, or give zeros"
            )
        if _ROUNDING * largest < high - low < _FARTHEST * largest:
            raise ValueError(
                f"{field} of {name} changes by {high - low:g} beside values of {largest:g}, of which float64 holds next"
                " to nothing: subtract what all have in common"
            )
        if _drops(whole, values, exact):
            values = whole
    # One bit pattern for missing, or equal data could have unequal fingerprints.
    values[np.isnan(values)] = np.nan
    return values


def narrowest(values: NDArray[np.float64]) -> Floats:
    """Values of shape (steps,) or (rows, steps) as a new array: float32 where that holds the changes from step to step,
    as `SeriesStore` judges it, or does not hold the values at all, which are infinite then; else float64.
    """
    with np.errstate(over="ignore", under="ignore"):
        held = values.astype(np.float32)
    return values.copy() if not np.isinf(held).any() and _drops(values, held, exact=False) else held


def _drops(whole: NDArray[np.float64], held: Floats, exact: bool) -> bool:
    """Whether float32 drops anything of values of shape (steps,) or (rows, steps); unless it must be exact, only what
    the changes from one observed step to the next suffer from.
    """
    differ = whole != held
    if differ.any():
        differ &= whole == whole
    if exact or not differ.any():
        return bool(differ.any())
    for row in np.atleast_2d(whole):
        known = row[row == row]
        change, rounded = np.diff(known), np.diff(known.astype(np.float32).astype(np.float64))
        moved = np.abs(change) > _ROUNDING * np.abs(known[1:])
        share = np.abs(rounded[moved] / change[moved] - 1.0)
        # The most of each stretch decide: one jump, or one change of next to nothing, says little.
        cut = len(share) // _TOGETHER * _TOGETHER
        if cut and np.median(share[:cut].reshape(-1, _TOGETHER), 1).max() > _ROUNDED:
            return True
        if cut < len(share) and np.median(share[cut:]) > _ROUNDED:
            return True
    return False
