"""A score for every point of a series: how far it lies from what a model expected there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from ..errors import unknown
from ..series.calendar import Calendar, calendar_of, stamps_of
from ..series.entries import Door, Unusable, called, nothing_seen
from ..series.store import SeriesStore
from ..series.windows import Windows
from ..sweep import backbone_of, batches, gather, reconstruct, require_reconstruct

if TYPE_CHECKING:
    from ..backbone import Backbone, Trajectories
    from ..predictor import PeftPredictor

__all__ = ["METHODS", "Scores", "Walk", "score", "smooth"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Predicted spreads are taken to be at least this share of the series' standard deviation (our choice): without a floor
# a flat stretch, where the model is all but certain, makes an anomaly of any rounding.
LEAST_SPREAD = 0.05


@dataclass(frozen=True)
class Scores:
    """Anomaly scores of a series.

    Parameters
    ----------
    item_id
        Name of the series, as its entry has it; its position as text where it has none.
    start
        First period.
    values
        Shape ``(time,)``, float64, larger is stranger; NaN where there is no score.
    calendar
        How its periods are stamped.
    """

    item_id: Any
    start: pd.Period
    values: Floats
    calendar: Calendar = Calendar()

    @property
    def index(self) -> pd.PeriodIndex:
        """Periods of the values."""
        return pd.period_range(self.start, periods=len(self.values), freq=self.start.freq)

    @property
    def stamps(self) -> pd.Index:
        """Time stamps of the values, as those of the data."""
        return stamps_of(self.start, len(self.values), self.calendar)


@dataclass(frozen=True)
class Walk:
    """What a method of :data:`METHODS` scores, and how it goes about it.

    Parameters
    ----------
    backbone, store
        Model and series.
    scales
        Standard deviation of each series, 1 of a constant one, shape ``(series,)``.
    stride
        Steps from one window to the next; the method's own if None.
    batch_size, progress
        Windows at a time, and whether a progress bar is shown.
    """

    backbone: Backbone
    store: SeriesStore
    scales: Floats
    stride: int | None
    batch_size: int
    progress: bool


def score(
    model: PeftPredictor | Backbone,
    dataset: Iterable[Mapping[str, Any]],
    *,
    method: str = "auto",
    stride: int | None = None,
    smoothing: int = 1,
    unusable: str = "raise",
    any_freq: bool = False,
    batch_size: int = 64,
    progress: bool = False,
    lacks: Callable[[NDArray[Any]], str | None] | None = None,
    **options: Any,
) -> list[Scores]:
    """Score every point of each series.

    Parameters
    ----------
    model
        Predictor or backbone, tuned or not.
    dataset
        GluonTS dataset, univariate; NaN is missing.
    method
        A name of :data:`METHODS`; ``"auto"`` is ``"reconstruction"`` where the family has this capability, else
        ``"residual"``.
    stride
        Steps from one window to the next; points in several windows get the mean. Half the context for reconstruction,
        the prediction length for forecasts if None.
    smoothing
        Width of a centred moving mean over the scores, in steps; 1 means none. A late part of it lies in the future.
    unusable
        What becomes of series without an observed value, or too short to be scored: ``"raise"``, or ``"skip"``, which
        leaves them out of what is returned and warns with their names.
    any_freq
        Take data of another frequency than the model was tuned on.
    batch_size
        Windows at a time.
    progress
        Show a progress bar.
    lacks
        Says of a target, shape ``(time,)``, why its series is unusable besides, or returns None.
    **options
        ``masks=4`` and ``block=1`` for ``"reconstruction"``: a patch is hidden in one of so many passes, so many
        neighbouring patches at once. ``quantiles=(0.1, 0.9)`` for ``"residual"`` and ``"exceedance"``, and
        ``num_samples=None`` and ``seed=0`` for families that sample.

    Returns
    -------
    list of Scores
        One a series that can be used, in order. All scores of a constant series are 0: nothing in it is stranger than
        the rest.

    Raises
    ------
    EntryError
        If it is not a dataset, or an entry is wrong. It is a ValueError and a TypeError.
    ValueError
        If the method or an option is unknown or the family cannot do it, an argument cannot be used, or a series is
        unusable; the message names it.
    """
    backbone = backbone_of(model)
    if method == "auto":
        method = "reconstruction" if "reconstruct" in backbone.capabilities else "residual"
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    if stride is not None and stride <= 0:
        raise ValueError(f"stride {stride} is not positive")
    known = inspect.signature(METHODS[method]).parameters.values()
    names = [each.name for each in known if each.kind is each.KEYWORD_ONLY and each.name != "distance"]
    for option in options:
        if option not in names:
            raise ValueError(f"method {method!r}: " + unknown("option", option, names))
    smooth([], smoothing)
    least = 1
    if method in ("reconstruction", "visible"):
        require_reconstruct(backbone)
    else:
        least = _least_history(backbone) + backbone.prediction_length

    def all_lacks(target: NDArray[Any]) -> str | None:
        if len(target) < least:
            return f"{len(target)} steps, method {method!r} needs {least}"
        return nothing_seen(target) or (lacks(target) if lacks is not None else None)

    door = Door(
        "scored",
        backbone=backbone,
        multivariate=False,
        lacks=all_lacks,
        unusable=unusable,
        freq=getattr(model, "freq", None),
        any_freq=any_freq,
    )
    entries = door.read(dataset)
    if not entries and door.found_freq is not None:
        return []
    store = SeriesStore.from_dataset(entries, features="covariates" in backbone.capabilities, exact=True)
    deviations = np.array([_deviation(store, i) for i in range(len(store))])
    scales = np.where(deviations > 0, deviations, 1.0)
    errors, counts = METHODS[method](Walk(backbone, store, scales, stride, batch_size, progress), **options)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.where(np.isnan(_targets(store)), np.nan, errors / counts)
    found = []
    useless = Unusable("scored", unusable)
    for i, (entry, position) in enumerate(zip(entries, door.positions, strict=True)):
        own = values[store.offsets[i] : store.offsets[i + 1]]
        if not deviations[i]:
            own = np.where(np.isnan(_targets(store)[store.offsets[i] : store.offsets[i + 1]]), np.nan, 0.0)
        name = entry.get("item_id")
        if np.isnan(own).all():
            useless.add(called(name, position), "no window with an observed value before one that can be judged")
        else:
            own_name = str(position) if name is None else name
            found.append(Scores(own_name, entry["start"], smooth(own, smoothing), calendar_of(entry)))
    useless.settle(len(entries))
    return found


def _least_history(backbone: Backbone) -> int:
    """Return the fewest steps of history of a forecast (our choice), that as much as possible of a short series has a
    score."""
    return min(backbone.context_length, 2 * backbone.prediction_length)


def _reconstruction(walk: Walk, *, masks: int = 4, block: int = 1) -> tuple[Floats, Floats]:
    """Error at points that were hidden: pass k of ``masks`` hides every ``masks``-th block from the k-th on."""
    if masks < 2 or block < 1:
        raise ValueError(f"masks {masks} and block {block} hide everything or nothing; give masks >= 2 and block >= 1")
    return _passes(walk, masks, block)


def _visible(walk: Walk) -> tuple[Floats, Floats]:
    """Error at points that the network saw."""
    return _passes(walk, 1, 1)


def _passes(walk: Walk, masks: int, block: int) -> tuple[Floats, Floats]:
    from ..units import refuse_nonfinite

    backbone, store, stride = walk.backbone, walk.store, walk.stride
    require_reconstruct(backbone)
    width = min(backbone.context_length, int(store.lengths.max()))
    stride = max(width // 2, 1) if stride is None else stride
    if stride > width:
        raise ValueError(f"stride {stride} exceeds the {width} steps of a window: points between them have no score")
    ends = [_tiles(min(width, length), length, stride) for length in store.lengths.tolist()]
    series = np.repeat(np.arange(len(ends)), [len(own) for own in ends])
    flat = np.concatenate(ends)
    errors, counts = np.zeros(len(store.values)), np.zeros(len(store.values))
    # Blocks count from the end of the window, as the patches of the network do.
    blocks = (np.arange(width)[::-1] // (backbone.patch_length * block)) % masks
    for rows in batches(len(flat) * masks, walk.batch_size, "score", walk.progress):
        window, turn = np.divmod(np.arange(rows.start, rows.stop), masks)
        values, observed = gather(store, series[window], flat[window], width)
        hidden = (blocks == turn[:, None]) & (observed > 0) if masks > 1 else np.zeros(values.shape, bool)
        # A window whose every observed point would be hidden cannot say anything of them.
        judged = hidden & (observed * ~hidden).any(1, keepdims=True) if masks > 1 else observed > 0
        found = reconstruct(backbone, values, observed * ~hidden)
        names = [store.item_ids[i] for i in series[window]]
        refuse_nonfinite(found, names.__getitem__, "reconstruction")
        error = np.abs(found - values) / walk.scales[series[window], None]
        steps = (store.offsets[series[window]] + flat[window])[:, None] + np.arange(-width, 0)
        np.add.at(errors, steps[judged], error[judged])
        np.add.at(counts, steps[judged], 1.0)
    return errors, counts


def _residual(target: Floats, low: Floats, middle: Floats, high: Floats, least: Floats) -> Floats:
    """Distance from the median forecast, in units of the predicted spread."""
    return np.asarray(np.abs(target - middle) / np.maximum(high - low, least))


def _exceedance(target: Floats, low: Floats, middle: Floats, high: Floats, least: Floats) -> Floats:
    """Distance from the interval between two quantiles, in units of its width; 0 inside."""
    outside = np.maximum(np.maximum(low - target, target - high), 0.0)
    return np.asarray(outside / np.maximum(high - low, least))


def _forecasts(
    walk: Walk,
    *,
    distance: Callable[[Floats, Floats, Floats, Floats, Floats], Floats],
    quantiles: tuple[float, float] = (0.1, 0.9),
    num_samples: int | None = None,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Distances of rolling forecasts, by :func:`_residual` or :func:`_exceedance`."""
    import torch

    from ..training import to_device
    from ..units import refuse_nonfinite

    backbone, store, stride = walk.backbone, walk.store, walk.stride
    horizon = backbone.prediction_length
    stride = horizon if stride is None else stride
    if stride > horizon:
        raise ValueError(f"stride {stride} exceeds the {horizon} steps of a forecast: points between have no score")
    if not 0.0 < quantiles[0] < 0.5 < quantiles[1] < 1.0:
        raise ValueError(f"quantiles {quantiles} do not lie on both sides of 0.5, between 0 and 1")
    least = _least_history(backbone)
    windows = Windows(
        store,
        context_length=backbone.past_length,
        prediction_length=horizon,
        min_context=least,
        time_features=backbone.time_features,
    )
    cuts = [
        _tiles(least, length - horizon, stride) if length >= least + horizon else np.zeros(0, np.int64)
        for length in store.lengths.tolist()
    ]
    series = np.repeat(np.arange(len(cuts)), [len(own) for own in cuts])
    flat = np.concatenate(cuts)
    errors, counts = np.zeros(len(store.values)), np.zeros(len(store.values))
    generator = torch.Generator(device=backbone.device).manual_seed(seed)
    for rows in batches(len(flat), walk.batch_size, "score", walk.progress):
        batch = windows.read(series[rows], flat[rows])
        seen = batch["past_observed_values"].any(1, keepdims=True)
        past = {name: value for name, value in batch.items() if not name.startswith("future_")}
        with backbone.reading() as reader:
            result = reader.forecast(to_device(past, backbone.device), num_samples=num_samples, generator=generator)
        names = [store.item_ids[i] for i in series[rows]]
        refuse_nonfinite(result.values.cpu().numpy(), names.__getitem__, "forecast")
        low, middle, high = _quantiles(result, (quantiles[0], 0.5, quantiles[1]))
        least_spread = LEAST_SPREAD * walk.scales[series[rows], None]
        error = distance(batch["future_target"].astype(float), low, middle, high, least_spread)
        judged = (batch["future_observed_values"] > 0) & seen
        steps = (store.offsets[series[rows]] + flat[rows])[:, None] + np.arange(horizon)
        np.add.at(errors, steps[judged], error[judged])
        np.add.at(counts, steps[judged], 1.0)
    return errors, counts


METHODS: dict[str, Callable[..., tuple[Floats, Floats]]] = {
    "reconstruction": _reconstruction,
    "visible": _visible,
    "residual": partial(_forecasts, distance=_residual),
    "exceedance": partial(_forecasts, distance=_exceedance),
}
"""How a point is scored.

``"reconstruction"``: error where it was hidden; ``"visible"``: error where it was seen, as a model that only compresses
gives it; both for families that reconstruct, in standard deviations of the series. ``"residual"``: distance from the
median of rolling forecasts; ``"exceedance"``: distance from the interval between two quantiles, 0 inside; both for all
families, over the width of that interval, which is taken to be at least 0.05 standard deviations of the series.
"""


def smooth(values: ArrayLike, width: int) -> Floats:
    """Return the centred moving mean of scores over ``width`` steps; NaN is left out, and stays NaN.

    Examples
    --------
    >>> smooth([0.0, 3.0, 0.0, float("nan")], 3)
    array([1.5, 1. , 1.5, nan])
    """
    if width <= 0:
        raise ValueError(f"smoothing {width} is not positive; 1 means none")
    raw = np.asarray(values, float)
    if width == 1:
        return raw
    mean = pd.Series(raw).rolling(width, center=True, min_periods=1).mean().to_numpy()
    return np.where(np.isnan(raw), np.nan, mean)


def _tiles(first: int, last: int, stride: int) -> Integers:
    """Return ``first``, then every ``stride`` steps, and ``last``."""
    return np.unique(np.append(np.arange(first, last, stride), last)).astype(np.int64)


def _targets(store: SeriesStore) -> NDArray[np.floating[Any]]:
    return store.values if store.layout.plain else store.values[:, 0]


def _deviation(store: SeriesStore, i: int) -> float:
    """Standard deviation of a series that has an observed value; 0 of a constant one."""
    steps = store.take(np.arange(store.offsets[i], store.offsets[i + 1])).astype(float)
    own = steps if store.layout.plain else steps[:, 0]
    own = own[~np.isnan(own)]
    return 0.0 if own.min() == own.max() else float(own.std())


def _quantiles(result: Trajectories, levels: tuple[float, ...]) -> list[Floats]:
    """Return quantiles of forecasts, each of shape ``(batch, prediction_length)``."""
    values = result.values.double().cpu().numpy()
    if result.levels is None:
        return list(np.quantile(values, levels, axis=1))
    known = np.array(result.levels)
    if levels[0] < known[0] or levels[-1] > known[-1]:
        raise ValueError(
            f"quantiles {levels[0]} to {levels[-1]} exceed what the family forecasts, {known[0]} to {known[-1]}"
        )
    right = np.clip(np.searchsorted(known, levels), 1, len(known) - 1)
    share = (np.array(levels) - known[right - 1]) / (known[right] - known[right - 1])
    return [values[:, at - 1] * (1.0 - part) + values[:, at] * part for at, part in zip(right, share, strict=True)]
