"""Find anomalies with a pretrained model: a score a point, a threshold from a clean part, events.

    detections = detect(predictor, dataset, calibration=0.25)   scores, threshold and events of each series
    scores = score(predictor, dataset, method="reconstruction") scores alone
    evaluate(scores[0].values, labels)                          how good they are

A score is how far a value lies from what the model expected there, in standard deviations of its series
(``"reconstruction"``, ``"visible"``) or in units of the predicted spread (``"residual"``, ``"exceedance"``); see
:data:`METHODS`. A missing value, and one that comes too early to be expected, has none: NaN.

Range-based and VUS metrics are those of ``aeon.benchmarking.metrics.anomaly_detection``; its releases do not install
beside the numpy and pandas that this project needs, so it is not a dependency, and nothing of it is rewritten here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from .files import delivering
from .registry import unknown
from .series.calendar import Calendar, calendar_of, stamp_table, stamps_of
from .series.entries import Door, Unusable, called, in_step, nothing_seen
from .series.writing import Names, write_columns
from .windows import SeriesStore, Windows

if TYPE_CHECKING:
    from .backbone import Backbone, Trajectories
    from .predictor import PeftPredictor

__all__ = [
    "METHODS",
    "QUALITY",
    "THRESHOLDS",
    "Detection",
    "Event",
    "Scores",
    "adjusted_best_f1",
    "best_f1",
    "detect",
    "evaluate",
    "find_events",
    "score",
    "smooth",
    "threshold",
    "window_hits",
    "write_detections",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Fewest scores that a threshold can rest on (our choice): below it, a high quantile is the maximum.
LEAST_CALIBRATION = 50
# Fewest scores that a tail is fitted to (our choice).
LEAST_PEAKS = 20
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
class Event:
    """A stretch above the threshold.

    Parameters
    ----------
    first, last
        Its first and its last step in the series.
    start, end
        The same as periods.
    peak
        Its highest score.
    """

    first: int
    last: int
    start: pd.Period
    end: pd.Period
    peak: float


@dataclass(frozen=True)
class Detection:
    """What :func:`detect` says of a series: its scores, the threshold, the events above it, and the first step that was
    judged, behind the calibration part.
    """

    scores: Scores
    threshold: float
    events: list[Event]
    begin: int = 0


def check_calibration(calibration: Any) -> None:
    """Raise a ValueError for what :func:`detect` cannot calibrate on."""
    if calibration is None:
        raise ValueError(
            "calibration is missing: a threshold needs a part without anomalies; name its steps, its share of each"
            " series, or a clean dataset"
        )
    share = isinstance(calibration, float | np.floating)
    if isinstance(calibration, int | float | np.number) and (calibration <= 0 or share and calibration >= 1.0):
        raise ValueError(f"calibration {calibration} is neither a share between 0 and 1 nor a number of steps")


def detect(
    model: PeftPredictor | Backbone,
    dataset: Iterable[Mapping[str, Any]],
    *,
    calibration: int | float | Iterable[Mapping[str, Any]] | None = None,
    method: str = "auto",
    threshold: str | Mapping[str, Any] = "quantile",
    smoothing: int = 1,
    merge: int = 0,
    min_length: int = 1,
    unusable: str = "raise",
    **options: Any,
) -> list[Detection]:
    """Find the anomalies of each series.

    Parameters
    ----------
    model, dataset, method, smoothing, **options
        As :func:`score`.
    calibration
        What is known to be clean: an integer, the first steps of each series; a share below 1 of each; or a GluonTS
        dataset of clean series, whose scores are pooled. In a part of the series itself no events are looked for.
    threshold
        As :func:`threshold`.
    merge, min_length
        As :func:`find_events`.
    unusable
        As :func:`score`; a series of which the calibration part gives fewer than 50 scores, or only equal ones, is
        unusable too.

    Returns
    -------
    list of Detection
        One a series that can be used, in order. A constant series has the threshold 0 and no events.

    Raises
    ------
    EntryError
        As :func:`score`.
    ValueError
        If there is no calibration, or a calibration dataset gives fewer than 50 scores, or only equal ones, and as
        :func:`score`.
    """
    check_calibration(calibration)
    # Refused before the work rather than after it.
    smooth([], smoothing)
    _threshold_options(threshold)
    find_events(Scores("", pd.Period("2000", "D"), np.zeros(1)), 0.0, merge=merge, min_length=min_length)
    common: dict[str, Any] = dict(method=method, unusable=unusable, **options)
    limit = None
    if isinstance(calibration, np.integer):
        calibration = int(calibration)
    if isinstance(calibration, int | float):
        first: int | float = calibration

        def calibrated(length: int) -> int:
            return first if isinstance(first, int) else math.ceil(length * first)

        def lacks(target: NDArray[Any]) -> str | None:
            begin = calibrated(len(target))
            if begin >= len(target):
                return f"calibration {first} leaves nothing of its {len(target)} steps"
            seen = begin if target.dtype.kind != "f" else int((~np.isnan(target[:begin])).sum())
            return _too_few(seen, "observed values")
    else:
        clean = np.concatenate(
            [
                smooth(found.values, smoothing)
                for found in score(model, cast(Iterable[Mapping[str, Any]], calibration), **common)
            ]
        )
        limit = _threshold(clean, threshold, "the calibration dataset")

        def lacks(target: NDArray[Any]) -> str | None:
            return None

    detections = []
    useless = Unusable("judged", unusable)
    all_scores = _score(model, dataset, lacks, **common)
    for found in all_scores:
        begin, level = 0, limit
        if level is None:
            begin = calibrated(len(found.values))
            # By itself: a mean over its end would look at what comes after.
            clean = smooth(found.values[:begin], smoothing)
            count = int((~np.isnan(clean)).sum())
            if not np.nanmax(found.values):
                level = 0.0
            elif lack := _too_few(count, "scores") or _all_equal(clean):
                useless.add(f"item_id {found.item_id!r}", lack)
                continue
            else:
                level = _threshold(clean, threshold, f"the calibration part of series {found.item_id!r}")
        scores = replace(found, values=smooth(found.values, smoothing))
        late = scores.values.copy()
        late[:begin] = np.nan
        events = find_events(replace(scores, values=late), level, merge=merge, min_length=min_length)
        detections.append(Detection(scores, level, events, begin))
    useless.settle(len(all_scores))
    return detections


def _too_few(count: int, what: str) -> str | None:
    if count >= LEAST_CALIBRATION:
        return None
    return f"{count} {what} in its calibration part, a threshold needs {LEAST_CALIBRATION}"


def _all_equal(scores: Floats) -> str | None:
    clean = scores[~np.isnan(scores)]
    return f"all scores of its calibration part are {clean[0]:g}" if clean.min() == clean.max() else None


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
        If it is no dataset, or an entry is wrong. It is a ValueError and a TypeError.
    ValueError
        If the method or an option is unknown or the family cannot do it, an argument cannot be used, or a series is
        unusable; the message names it.
    """
    return _score(
        model,
        dataset,
        lambda _: None,
        method=method,
        stride=stride,
        smoothing=smoothing,
        unusable=unusable,
        any_freq=any_freq,
        batch_size=batch_size,
        progress=progress,
        **options,
    )


def _score(
    model: PeftPredictor | Backbone,
    dataset: Iterable[Mapping[str, Any]],
    lacks: Callable[[NDArray[Any]], str | None],
    *,
    method: str = "auto",
    stride: int | None = None,
    smoothing: int = 1,
    unusable: str = "raise",
    any_freq: bool = False,
    batch_size: int = 64,
    progress: bool = False,
    **options: Any,
) -> list[Scores]:
    """As :func:`score`, of series that do not lack anything more."""
    from .imputation import backbone_of, require_reconstruct

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
        return nothing_seen(target) or lacks(target)

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
    errors, counts = METHODS[method](backbone, store, scales, stride, batch_size, progress, **options)
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


def _reconstruction(
    backbone: Backbone,
    store: SeriesStore,
    scales: Floats,
    stride: int | None,
    batch_size: int,
    progress: bool,
    *,
    masks: int = 4,
    block: int = 1,
) -> tuple[Floats, Floats]:
    """Error at points that were hidden: pass k of ``masks`` hides every ``masks``-th block from the k-th on."""
    if masks < 2 or block < 1:
        raise ValueError(f"masks {masks} and block {block} hide everything or nothing; give masks >= 2 and block >= 1")
    return _passes(backbone, store, scales, stride, batch_size, progress, masks, block)


def _visible(
    backbone: Backbone, store: SeriesStore, scales: Floats, stride: int | None, batch_size: int, progress: bool
) -> tuple[Floats, Floats]:
    """Error at points that the network saw."""
    return _passes(backbone, store, scales, stride, batch_size, progress, 1, 1)


def _passes(
    backbone: Backbone,
    store: SeriesStore,
    scales: Floats,
    stride: int | None,
    batch_size: int,
    progress: bool,
    masks: int,
    block: int,
) -> tuple[Floats, Floats]:
    from .imputation import batches, gather, reconstruct, require_reconstruct
    from .units import refuse_nonfinite

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
    for rows in batches(len(flat) * masks, batch_size, "score", progress):
        window, turn = np.divmod(np.arange(rows.start, rows.stop), masks)
        values, observed = gather(store, series[window], flat[window], width)
        hidden = (blocks == turn[:, None]) & (observed > 0) if masks > 1 else np.zeros(values.shape, bool)
        # A window whose every observed point would be hidden cannot say anything of them.
        judged = hidden & (observed * ~hidden).any(1, keepdims=True) if masks > 1 else observed > 0
        found = reconstruct(backbone, values, observed * ~hidden)
        names = [store.item_ids[i] for i in series[window]]
        refuse_nonfinite(found, names.__getitem__, "reconstruction")
        error = np.abs(found - values) / scales[series[window], None]
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
    backbone: Backbone,
    store: SeriesStore,
    scales: Floats,
    stride: int | None,
    batch_size: int,
    progress: bool,
    *,
    distance: Callable[[Floats, Floats, Floats, Floats, Floats], Floats],
    quantiles: tuple[float, float] = (0.1, 0.9),
    num_samples: int | None = None,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Distances of rolling forecasts, by :func:`_residual` or :func:`_exceedance`."""
    import torch

    from .imputation import batches
    from .training import to_device
    from .units import refuse_nonfinite

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
    for rows in batches(len(flat), batch_size, "score", progress):
        batch = windows.read(series[rows], flat[rows])
        seen = batch["past_observed_values"].any(1, keepdims=True)
        past = {name: value for name, value in batch.items() if not name.startswith("future_")}
        with backbone.reading() as reader:
            result = reader.forecast(to_device(past, backbone.device), num_samples=num_samples, generator=generator)
        names = [store.item_ids[i] for i in series[rows]]
        refuse_nonfinite(result.values.cpu().numpy(), names.__getitem__, "forecast")
        low, middle, high = _quantiles(result, (quantiles[0], 0.5, quantiles[1]))
        least_spread = LEAST_SPREAD * scales[series[rows], None]
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


def threshold(scores: ArrayLike, spec: str | Mapping[str, Any] = "quantile") -> float:
    """Return the score above which a point is an anomaly, from scores of a clean part.

    Parameters
    ----------
    scores
        Scores of points that are known to be clean; NaN is left out.
    spec
        A name of :data:`THRESHOLDS`, or a mapping with its option: ``{"name": "quantile", "level": 0.999}``,
        ``{"name": "deviations", "k": 3}``, ``{"name": "extreme", "risk": 1e-4, "level": 0.95}``.

    Raises
    ------
    ValueError
        If the name or an option is unknown or out of range, there are fewer than 50 scores, or all are equal.
    """
    return _threshold(np.asarray(scores, float), spec, "the calibration part")


def _threshold_options(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a threshold, or raise a ValueError if they cannot be used on any scores."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in THRESHOLDS:
        raise ValueError(unknown("threshold", str(name), THRESHOLDS))
    known = THRESHOLDS[name].__kwdefaults__ or {}
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"threshold {name!r}: option", option, known))
        if isinstance(options[option], bool) or not isinstance(options[option], int | float):
            raise ValueError(f"threshold {name!r}: {option} {options[option]!r} is not a number")
    for share in ("level", "risk"):
        if share in options:
            _between(share, float(options[share]))
    return str(name), options


def _threshold(scores: Floats, spec: str | Mapping[str, Any], where: str) -> float:
    name, options = _threshold_options(spec)
    clean = scores[~np.isnan(scores)]
    if len(clean) < LEAST_CALIBRATION:
        raise ValueError(
            f"{where} has {len(clean)} scores, a threshold needs {LEAST_CALIBRATION}; give a longer one (the first"
            " steps of a series have no score from forecasts)"
        )
    if clean.min() == clean.max():
        raise ValueError(f"{where} is constant: all its scores are {clean[0]:g}, which says nothing about a threshold")
    return float(THRESHOLDS[name](clean, **options))


def _quantile(scores: Floats, *, level: float = 0.995) -> float:
    _between("level", level)
    return float(np.quantile(scores, level))


def _deviations(scores: Floats, *, k: float = 3.0) -> float:
    return float(scores.mean() + k * scores.std())


def _extreme(scores: Floats, *, risk: float = 1e-4, level: float = 0.95) -> float:
    from scipy.stats import genpareto

    _between("level", level)
    base = float(np.quantile(scores, level))
    peaks = scores[scores > base] - base
    if len(peaks) < LEAST_PEAKS:
        raise ValueError(
            f"level {level} leaves {len(peaks)} of {len(scores)} clean scores above it, a tail is fitted to"
            f" {LEAST_PEAKS} or more; lower it, or give a longer calibration part"
        )
    if not 0.0 < risk * len(scores) < len(peaks):
        raise ValueError(
            f"risk {risk} is not below {len(peaks) / len(scores):.4g}, the share of scores above the level {level}"
        )
    shape, _, scale = genpareto.fit(peaks, floc=0.0)
    return base + float(genpareto.isf(risk * len(scores) / len(peaks), shape, 0.0, scale))


THRESHOLDS: dict[str, Callable[..., float]] = {
    "quantile": _quantile,
    "deviations": _deviations,
    "extreme": _extreme,
}
"""Thresholds by name.

``"quantile"``: quantile ``level`` of the clean scores; ``"deviations"``: their mean plus ``k`` standard deviations;
``"extreme"``: the score that a clean point exceeds with probability ``risk``, from a generalised Pareto distribution
that is fitted to what exceeds their quantile ``level`` (peaks over threshold, as SPOT does: Siffer et al. 2017, KDD;
fitted by ``scipy.stats.genpareto``).
"""


def find_events(scores: Scores, limit: float, *, merge: int = 0, min_length: int = 1) -> list[Event]:
    """Return the stretches of scores above a limit.

    Parameters
    ----------
    scores
        Of one series.
    limit
        The threshold; a score equal to it is not above it.
    merge
        Stretches with at most so many steps between them are one event.
    min_length
        Fewest steps of an event, after merging.
    """
    from .imputation import runs

    if merge < 0 or min_length < 1:
        raise ValueError(f"merge {merge} and min_length {min_length}: give merge >= 0 and min_length >= 1")
    joined: list[tuple[int, int]] = []
    with np.errstate(invalid="ignore"):
        above = scores.values > limit
    for begin, end in runs(above).tolist():
        if joined and begin - joined[-1][1] <= merge:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return [
        Event(
            begin, end - 1, scores.start + begin, scores.start + (end - 1), float(np.nanmax(scores.values[begin:end]))
        )
        for begin, end in joined
        if end - begin >= min_length
    ]


def write_detections(
    detections: Sequence[Detection],
    dataset: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    plots: int = 6,
    columns: Sequence[str] = ("item_id", "timestamp", "target"),
) -> None:
    """Write ``scores.csv``, ``events.csv`` and ``plot.png`` into a folder, stamped as the data are.

    Parameters
    ----------
    detections, dataset
        What :func:`detect` gave, and was given; at least one detection.
    folder
        New or empty; made if need be.
    plots
        Most series in the plot, the first ones.
    columns
        Names of the columns for item, time and value in ``scores.csv``.

    Raises
    ------
    FileExistsError
        If the folder is in use.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder {str(folder)!r} is in use; name a new one")
    # Series that were left out are passed over.
    entries = list(in_step([(each.scores.item_id, each.scores.start) for each in detections], dataset))
    inside = [np.zeros(len(detection.scores.values), bool) for detection in detections]
    for marks, detection in zip(inside, detections, strict=True):
        for event in detection.events:
            marks[event.first : event.last + 1] = True
    lengths = [len(marks) for marks in inside]
    scores = [detection.scores for detection in detections]
    calendars = [own.calendar for own in scores]
    names = [entry.get("item_id", own.item_id) for own, entry in zip(scores, entries, strict=True)]
    points = {
        columns[0]: Names(names, lengths),
        columns[1]: stamp_table([own.start for own in scores], lengths, calendars),
        columns[2]: np.concatenate([np.asarray(entry["target"]) for entry in entries]),
        "score": np.concatenate([own.values for own in scores]),
        "threshold": np.repeat([detection.threshold for detection in detections], lengths),
        "event": np.concatenate(inside),
    }
    counts = [len(detection.events) for detection in detections]
    found = [event for detection in detections for event in detection.events]
    own_calendars = [calendar for calendar, count in zip(calendars, counts, strict=True) for _ in range(count)]
    events = {
        columns[0]: Names(names, counts),
        "start": stamp_table([event.start for event in found], 1, own_calendars),
        "end": stamp_table([event.end for event in found], 1, own_calendars),
        "steps": np.array([event.last - event.first + 1 for event in found], np.int64),
        "peak": np.array([event.peak for event in found], float),
        "threshold": np.repeat([detection.threshold for detection in detections], counts),
    }
    figure = _plot(detections[:plots], entries)
    with delivering(folder, "detect") as part:
        part.mkdir()
        write_columns(points, part / "scores.csv", ".csv")
        write_columns(events, part / "events.csv", ".csv")
        figure.savefig(part / "plot.png", dpi=100)


def _plot(detections: Sequence[Detection], entries: Sequence[Mapping[str, Any]]) -> Any:
    """Draw a series above its scores, events shaded."""
    from matplotlib.figure import Figure

    # Not by way of pyplot, which would take hold of the whole process's figures.
    figure = Figure(figsize=(10, 3 * len(detections)), layout="constrained")
    axes = figure.subplots(2 * len(detections), 1, squeeze=False, height_ratios=[2, 1] * len(detections))[:, 0]
    for detection, entry, above, below in zip(detections, entries, axes[::2], axes[1::2], strict=False):
        # What the clock shows; and one step more, where an event at the end ends.
        own = detection.scores
        times = stamp_table([own.start], len(own.values) + 1, [own.calendar]).walls.view("M8[ns]")
        above.plot(times[:-1], entry["target"], color="black", linewidth=0.7)
        above.set_title(detection.scores.item_id, loc="left", fontsize="medium", parse_math=False)
        below.plot(times[:-1], detection.scores.values, color="tab:blue", linewidth=0.7)
        below.axhline(detection.threshold, color="tab:red", linewidth=0.7, linestyle="--")
        below.set_ylabel("score")
        below.sharex(above)
        for axis in (above, below):
            for event in detection.events:
                axis.axvspan(times[event.first], times[event.last + 1], color="tab:red", alpha=0.25, linewidth=0)
    return figure


QUALITY = ("roc_auc", "average_precision", "best_f1", "adjusted_best_f1")
"""What :func:`evaluate` measures."""


def evaluate(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Score the scores.

    Parameters
    ----------
    scores
        Shape ``(time,)``; points without a score are left out.
    labels
        Shape ``(time,)``: 1 or True where there is an anomaly, else 0.

    Returns
    -------
    dict
        ``roc_auc`` and ``average_precision`` of scikit-learn, :func:`best_f1` and :func:`adjusted_best_f1`.

    Raises
    ------
    ValueError
        If lengths differ, a label is neither 0 nor 1, or there are no anomalies, or nothing else, where there is a
        score.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    values, truth = _checked(scores, labels)
    measures = (roc_auc_score, average_precision_score, _best_f1)
    found = [float(measure(truth, values)) for measure in measures]
    return dict(zip(QUALITY, (*found, adjusted_best_f1(scores, labels)), strict=True))


def best_f1(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the highest F1 over all thresholds: that of an oracle who knows the labels, an upper bound.

    Parameters and errors as :func:`evaluate`.
    """
    values, truth = _checked(scores, labels)
    return _best_f1(truth, values)


def adjusted_best_f1(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the highest F1 over all thresholds after point adjustment.

    Point adjustment counts a whole labelled stretch as found if one of its points is. It flatters: where anomalies are
    long, *random* scores reach values that papers report as progress (Kim et al. 2022, AAAI, arXiv 2109.05257), since
    by chance one point of a long stretch is high. It is here to compare with numbers that others report so; judge by
    the others.

    Parameters and errors as :func:`evaluate`.
    """
    from .imputation import runs

    _, truth = _checked(scores, labels)
    adjusted = np.array(scores, float)
    kept = ~np.isnan(adjusted)
    # Stretches of the whole series: a point without a score parts them all the same.
    for begin, end in runs(np.asarray(labels) == 1):
        part = slice(begin, end)
        if kept[part].any():
            adjusted[part][kept[part]] = adjusted[part][kept[part]].max()
    return _best_f1(truth, adjusted[kept])


def _best_f1(truth: NDArray[np.bool_], values: Floats) -> float:
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(truth, values)
    return float(np.max(2.0 * precision * recall / np.maximum(precision + recall, 1e-12)))


def window_hits(events: Sequence[Event], windows: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Count what the events of a series hit.

    Parameters
    ----------
    events
        From :func:`detect`.
    windows
        First and last step of each true anomaly, as the windows of the Numenta Anomaly Benchmark.

    Returns
    -------
    dict
        ``hit`` and ``missed`` windows, and ``false`` events, those that overlap none.
    """
    windows = list(windows)
    hit = sum(any(event.first <= last and event.last >= first for event in events) for first, last in windows)
    false = sum(not any(event.first <= last and event.last >= first for first, last in windows) for event in events)
    return {"hit": hit, "missed": len(windows) - hit, "false": false}


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    values: Floats = np.asarray(scores, float)
    truth: NDArray[Any] = np.asarray(labels)
    if values.shape != truth.shape or values.ndim != 1:
        raise ValueError(
            f"labels have shape {truth.shape}, scores {values.shape}: give one label a point of the series"
        )
    kept = ~np.isnan(values)
    values, truth = values[kept], truth[kept]
    if len(wrong := truth[(truth != 0) & (truth != 1)]):
        raise ValueError(f"labels hold {wrong[0]}; give 1 for an anomaly and 0 else")
    truth = truth.astype(bool)
    if truth.all() or not truth.any():
        raise ValueError(
            f"of the {len(truth)} points with a score {int(truth.sum())} are labelled as anomalies: there is nothing to"
            " tell apart"
        )
    return values, truth


def _between(name: str, share: float) -> None:
    if not 0.0 < share < 1.0:
        raise ValueError(f"{name} {share} is not between 0 and 1")


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
