"""
Rolling-window scores of any GluonTS predictor.

    backtest(predictor, dataset, windows=3)                     one row: the scores over all series and windows
    backtest(predictor, dataset, windows=3, per_window=True)    one row for each series and window

The numbers are those of ``gluonts.model.evaluation.evaluate_model`` with the same metrics and seasonality, and so are
the names of the columns; only where a derived metric of GluonTS divides by zero in a single window, and shows the
number that a mask hid, there is NaN or infinity here. What GluonTS leaves to luck is checked: series that are too
short are set aside before splitting (``gluonts.dataset.split`` makes a wrong pair of them), every forecast must
belong to its window in number, order, start and shape (GluonTS broadcasts one forecast over a batch of labels), and a
forecast with NaN is an error that names it.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from gluonts.core.component import validated
from gluonts.dataset import DataEntry, Dataset
from gluonts.dataset.split import TestData, split
from gluonts.dataset.util import forecast_start
from gluonts.ev.metrics import (
    Coverage,
    DerivedMetric,
    DirectMetric,
    Metric,
)
from gluonts.ev.ts_stats import seasonal_error
from gluonts.itertools import batcher
from gluonts.model.forecast import Forecast, SampleForecast
from gluonts.model.predictor import Predictor, RepresentablePredictor

from .columns import score_columns
from .scores import LEVELS as QUANTILE_LEVELS
from .series.calendar import calendar_of, first_stamp
from .series.dated import dated
from .series.entries import Door, EntryError, Unusable, as_array, called
from .series.season import season_length

__all__ = ["QUANTILE_LEVELS", "SeasonalNaive", "backtest", "backtest_both", "default_metrics"]

logger = logging.getLogger(__name__)


def default_metrics() -> list[Any]:
    """
    Metric definitions that :func:`backtest` uses unless told otherwise.

    All point scores are of the median, ``"0.5"``, MSE too, where GluonTS would take the mean: a quantile forecast has
    no mean, and GluonTS then puts the median in its place, so that the two kinds of forecast would be scored on
    different things.

    Returns
    -------
    list
        Definitions of ``MSE[0.5]`` (squared unit of the data), ``MAE[0.5]`` (unit of the data), ``MAPE[0.5]`` (a
        fraction, not percent), ``MASE[0.5]``, ``DTW[0.5]`` and ``DTWPathError[0.5]`` (unit of the data),
        ``mean_weighted_sum_quantile_loss`` over ``QUANTILE_LEVELS``, what other distributions add
        (:mod:`gluonts_peft.columns`), and ``coverage[0.1]`` to ``coverage[0.9]``.
    """
    return [*(column.metric() for column in score_columns()), *(Coverage(q) for q in QUANTILE_LEVELS)]


def backtest(
    predictor: Predictor,
    dataset: Dataset,
    *,
    windows: int = 1,
    distance: int | None = None,
    metrics: Sequence[Any] | None = None,
    seasonality: int | None = None,
    per_window: bool = False,
    num_samples: int | None = None,
    unusable: str = "raise",
    any_freq: bool = False,
    visible_context: int | None = None,
    batch_size: int = 100,
) -> pd.DataFrame:
    """
    Score a predictor on the last windows of every series.

    The last window of a series ends where the series ends, each earlier one starts ``distance`` steps before the next;
    the history of a window is everything before it. The predictor is asked once, for all windows, and its forecasts
    are scored as they come.

    Parameters
    ----------
    predictor
        Any GluonTS predictor with ``lead_time`` 0; its ``prediction_length`` is the length of a window in steps.
    dataset
        Any GluonTS dataset that can be read more than once: a list of data entries, a ``PandasDataset``, a
        ``FileDataset``. Targets are ``(time,)``, or ``(dim, time)`` with one ``dim`` for all series; NaN is missing.
    windows
        Number of windows a series, 1 or more.
    distance
        Steps from one window to the next; default: ``prediction_length``, windows that touch and do not overlap.
    metrics
        Metric definitions of ``gluonts.ev`` with different names; default: :func:`default_metrics`.
    seasonality
        Steps in a season for the seasonal error that scales MASE; default: that of the frequency
        (:func:`gluonts_peft.series.season.season_length`: 7 for days, where GluonTS has 1).
    per_window
        Whether to give each window a row of its own.
    num_samples
        Passed on to ``predictor.predict`` if given.
    unusable
        What becomes of series that cannot be scored: ``"raise"``, or ``"skip"``, which leaves them out, counts them and
        warns with their names. Windows without an observed value are left out and counted in any case.
    any_freq
        Take data of another frequency than the model was tuned on.
    visible_context
        Steps before a window that the model sees: a series with a window before which it would see no observed value
        cannot be scored. By default those of the predictor, if it says so; name them to score others on the same
        series.
    batch_size
        Number of windows scored at a time; a question of memory alone, the numbers do not depend on it.

    Returns
    -------
    pandas.DataFrame
        A column a metric. One row; with ``per_window`` a row a window in the order of the dataset, indexed by
        ``item_id`` (or the position in the dataset, from 0, where an entry has none) and ``forecast_start``, a period,
        or a time stamp where the entries' calendars say more than that.
        ``frame.attrs`` says what was scored:

        - ``"series"`` and ``"windows"``: how many were scored;
        - ``"skipped"``: ``"too_short"`` series, with no observed value before their first window; ``"all_missing"``
          series, with no observed value in any window; ``"nothing_seen"`` series, with no observed value in the
          context of a window; and ``"windows_all_missing"``, windows without observed value in the series that were
          scored, of which the log says the number. None of them is forecast;
        - ``"unscaled_windows"``: scored windows whose seasonal error is zero, as the history is constant, or unknown,
          as no two observed values are a season apart. Scaled metrics such as MASE leave them out of a mean, and are
          NaN in their rows;
        - ``"seasonless_windows"``: scored windows whose history is shorter than a season, or all where the frequency
          has none. There a seasonal naive is the last value.

    Raises
    ------
    ValueError
        If an argument is out of range, the dataset is empty, no series is left to score, one cannot be scored and the
        policy is to raise, or the forecasts do not fit the windows in number, start, item or shape, or are not finite.
    EntryError
        If it is not a dataset, can be read only once, or an entry is wrong. It is a ValueError and a TypeError.

    Notes
    -----
    Missing labels count in no metric. MAPE leaves out labels that are zero. ``mean_weighted_sum_quantile_loss`` divides
    by the sum of absolute labels, over all windows or, with ``per_window``, over one; where that is 0 it is not finite.

    ``MASE[0.5]``, like the other means, is one over observed labels, as in ``gluonts.ev``: windows count by how many of
    their labels are observed. The plain mean of its rows ``per_window`` counts them alike and is another number.
    """
    options: dict[str, Any] = dict(
        windows=windows,
        distance=distance,
        metrics=metrics,
        seasonality=seasonality,
        num_samples=num_samples,
        unusable=unusable,
        any_freq=any_freq,
        visible_context=visible_context,
        batch_size=batch_size,
    )
    return _scored(predictor, dataset, (per_window,), **options)[0]


def backtest_both(predictor: Predictor, dataset: Dataset, **options: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what :func:`backtest` does without and with ``per_window``, of the same forecasts, made once."""
    over_all, each = _scored(predictor, dataset, (False, True), **options)
    return over_all, each


def _scored(
    predictor: Predictor,
    dataset: Dataset,
    per_window: Sequence[bool],
    *,
    windows: int = 1,
    distance: int | None = None,
    metrics: Sequence[Any] | None = None,
    seasonality: int | None = None,
    num_samples: int | None = None,
    unusable: str = "raise",
    any_freq: bool = False,
    visible_context: int | None = None,
    batch_size: int = 100,
) -> list[pd.DataFrame]:
    _positive("windows", windows)
    _positive("batch_size", batch_size)
    for name, value in (("distance", distance), ("seasonality", seasonality), ("num_samples", num_samples)):
        if value is not None:
            _positive(name, value)
    lead_time = getattr(predictor, "lead_time", 0)
    if lead_time != 0:
        raise ValueError(
            f"predictor has lead_time {lead_time}; only 0 can be scored, as windows start right after the history"
        )
    definitions = default_metrics() if metrics is None else metrics
    if not isinstance(definitions, Sequence) or not definitions:
        raise ValueError(f"metrics is {definitions!r}; expected a list of metric definitions such as [MAE(), DTW()]")

    length = predictor.prediction_length
    distance = length if distance is None else distance
    dataset = dated(dataset)
    backbone = getattr(predictor, "backbone", None)
    door = Door(
        "scored",
        backbone=backbone,
        unusable=unusable,
        freq=getattr(predictor, "freq", None),
        any_freq=any_freq,
        complete=True,
    )
    context = getattr(backbone, "past_length", None) if visible_context is None else visible_context
    survey = _survey(dataset, door, length, windows, distance, context)
    _, template = split(_Kept(dataset, survey.series), offset=-survey.span)
    test = _Windows(
        template.generate_instances(length, windows=windows, distance=distance), survey.windows, survey.items
    )

    axes = [tuple(range(1 if each else 0, survey.ndim + 1)) for each in per_window]
    evaluators = [[metric(axis=axis) for metric in definitions] for axis in axes]
    names = [evaluator.name for evaluator in evaluators[0]]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"metrics has {', '.join(twice)} more than once; each needs a name of its own")

    options: dict[str, Any] = {} if num_samples is None else {"num_samples": num_samples}
    if any_freq and backbone is not None:
        options["any_freq"] = True
    forecasts = iter(predictor.predict(test.inputs, **options))
    index: list[tuple[Any, pd.Period | pd.Timestamp]] = []
    unscaled = seasonless = 0
    for batch in batcher(_pair(test, forecasts), batch_size):
        seasons = [seasonality or season_length(history["start"].freqstr) for history, _, _ in batch]
        histories = [history["target"] for history, _, _ in batch]
        seasonless += sum(m == 1 or target.shape[-1] < m for m, target in zip(seasons, histories, strict=True))
        scales = [_seasonal_error(target, m) for m, target in zip(seasons, histories, strict=True)]
        scale = np.ma.masked_equal(np.ma.masked_invalid(np.stack(scales)), 0.0)
        unscaled += int(np.ma.getmaskarray(scale).reshape(len(batch), -1).any(axis=1).sum())
        label = np.ma.masked_invalid(np.stack([label["target"] for _, label, _ in batch]))
        index.extend(
            (forecast.item_id, first_stamp(forecast.start, calendar_of(history))) for history, _, forecast in batch
        )
        data = _Batch(label, scale, [forecast for _, _, forecast in batch])
        # A score that divides by zero is masked, NaN or infinite as documented; numpy's warnings would add nothing.
        with np.errstate(divide="ignore", invalid="ignore"):
            for evaluator in itertools.chain.from_iterable(evaluators):
                evaluator.update(data)

    frames = []
    for each, some in zip(per_window, evaluators, strict=True):
        for evaluator in some:
            _unmask(evaluator)
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = {evaluator.name: np.ma.filled(np.ma.atleast_1d(evaluator.get()), np.nan) for evaluator in some}
        rows = pd.MultiIndex.from_tuples(index, names=["item_id", "forecast_start"]) if each else None
        frame: pd.DataFrame = pd.DataFrame(columns, index=rows)
        frame.attrs = {
            "series": sum(survey.series),
            "windows": len(test),
            "skipped": survey.skipped,
            "unscaled_windows": unscaled,
            "seasonless_windows": seasonless,
        }
        frames.append(frame)
    return frames


class SeasonalNaive(RepresentablePredictor):  # type: ignore[misc, unused-ignore]
    """
    Repeat the last season; with ``season_length=1`` repeat the last value.

    Unlike ``gluonts.model.seasonal_naive.SeasonalNaivePredictor`` it looks for a missing value one season earlier, and
    earlier still, before it takes the last observed one; it also forecasts multivariate targets and keeps their
    precision.

    Parameters
    ----------
    prediction_length
        Number of steps to forecast.
    season_length
        Number of steps in a season.

    Raises
    ------
    ValueError
        If a length is below 1; while predicting, if a series, or a dimension of it, has no observed value.
    """

    @validated()  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(self, prediction_length: int, season_length: int = 1) -> None:
        _positive("prediction_length", prediction_length)
        _positive("season_length", season_length)
        super().__init__(prediction_length=prediction_length)
        self.season_length = season_length

    def predict_item(self, item: DataEntry) -> SampleForecast:
        """
        Forecast one series.

        Parameters
        ----------
        item
            Data entry with ``target`` ``(time,)`` or ``(dim, time)``; NaN and infinite values are missing.

        Returns
        -------
        SampleForecast
            One sample: ``(1, prediction_length)`` or ``(1, prediction_length, dim)``.
        """
        target = _as_float(item["target"])
        rows = np.atleast_2d(np.where(np.isfinite(target), target, np.nan))
        seen = ~np.isnan(rows)
        if not seen.any(axis=1).all():
            raise ValueError(f"item_id {item.get('item_id')!r} has no observed value to repeat; leave the series out")
        last = rows[np.arange(len(rows)), _last(seen)]
        # Aligned at the end, column p of (dim, seasons, season_length) is phase p of every season.
        pad = -rows.shape[1] % self.season_length
        seasons = np.pad(rows, ((0, 0), (pad, 0)), constant_values=np.nan).reshape(len(rows), -1, self.season_length)
        latest = _last(np.moveaxis(~np.isnan(seasons), 1, -1))
        season = np.take_along_axis(seasons, latest[:, np.newaxis], axis=1)[:, 0]
        season = np.where(np.isnan(season), last[:, np.newaxis], season)
        future = season[:, np.arange(self.prediction_length) % self.season_length]
        return SampleForecast(
            samples=future[:1] if target.ndim == 1 else future.T[np.newaxis],
            start_date=forecast_start(item),
            item_id=item.get("item_id"),
            info=item.get("info"),
        )


def _last(seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Position of the last true value on the last axis; of the last one at all where none is true."""
    last: npt.NDArray[np.intp] = seen.shape[-1] - 1 - np.argmax(seen[..., ::-1], axis=-1)
    return last


def _positive(name: str, value: Any) -> None:
    try:
        fits = not isinstance(value, bool) and operator.index(value) >= 1
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} is {value!r}; expected a whole number, 1 or more")


def _as_float(target: npt.ArrayLike) -> npt.NDArray[np.floating[Any]]:
    array = as_array(target)
    return array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float64)


@dataclass
class _Survey:
    span: int
    ndim: int = 0
    series: list[bool] = field(default_factory=list)
    windows: list[bool] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    skipped: dict[str, int] = field(
        default_factory=lambda: {"too_short": 0, "all_missing": 0, "nothing_seen": 0, "windows_all_missing": 0}
    )


def _survey(dataset: Dataset, door: Door, length: int, windows: int, distance: int, context: int | None) -> _Survey:
    """Decide which series, and which windows of these, can be scored, before anything is forecast."""
    if isinstance(dataset, Iterator):
        raise EntryError(f"dataset is a {type(dataset).__name__}, which can be read only once; pass list(dataset)")
    survey = _Survey(span=length + (windows - 1) * distance)
    unusable = Unusable(door.verb, door.policy)
    for position, entry in enumerate(door.open(dataset)):
        item_id = position if entry.get("item_id") is None else entry["item_id"]
        target = _as_float(entry["target"])
        survey.ndim = target.ndim
        observed = ~np.isnan(target) if target.ndim == 1 else ~np.isnan(target).all(axis=0)
        first = len(observed) - survey.span
        starts = [first + w * distance for w in range(windows)] if first > 0 else []
        labels = [bool(observed[start : start + length].any()) for start in starts]
        reason = lack = None
        if first <= 0 or not observed[:first].any():
            reason, lack = "too_short", f"no observed value before its last {survey.span} steps"
        elif not any(labels):
            reason, lack = "all_missing", "no observed value in any window"
        elif context is not None and not all(
            observed[max(0, start - context) : start].any()
            for start, label in zip(starts, labels, strict=True)
            if label
        ):
            reason, lack = "nothing_seen", f"no observed value in the {context} steps before a window"
        survey.series.append(lack is None)
        if reason is not None and lack is not None:
            survey.skipped[reason] += 1
            unusable.add(called(entry.get("item_id"), position), lack)
        else:
            survey.windows.extend(labels)
            survey.items.extend([item_id] * labels.count(True))
            survey.skipped["windows_all_missing"] += labels.count(False)

    if not survey.series:
        raise ValueError("dataset is empty; expected at least one series")
    if not any(survey.series):
        counts = (
            f"{survey.skipped['too_short']} of {len(survey.series)} series have no observed value before their last "
            f"{survey.span} steps, {survey.skipped['all_missing']} have none in any window"
        )
        if survey.skipped["nothing_seen"]:
            counts += f", {survey.skipped['nothing_seen']} none in the {context} steps before a window"
        raise ValueError(f"no series is left to score: {counts}; use longer series, or fewer windows than {windows}")
    unusable.settle(len(survey.series))
    if survey.skipped["windows_all_missing"]:
        logger.warning(
            "backtest skips %d windows of the series that it scores: they have no observed value",
            survey.skipped["windows_all_missing"],
        )
    return survey


@dataclass
class _Kept:
    """The chosen series, their targets as arrays, read anew each time."""

    dataset: Dataset
    keep: list[bool]

    def __len__(self) -> int:
        return sum(self.keep)

    def __iter__(self) -> Iterator[DataEntry]:
        for entry, keep in zip(self.dataset, self.keep, strict=True):
            if keep:
                yield {**entry, "target": _as_float(entry["target"])}


@dataclass
class _Windows:
    """The chosen pairs of history and label, and the names of their series."""

    test_data: TestData
    keep: list[bool]
    items: list[Any]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[DataEntry, DataEntry]]:
        return itertools.compress(self.test_data, self.keep)

    @property
    def inputs(self) -> _Inputs:
        return _Inputs(self)


@dataclass
class _Inputs:
    windows: _Windows

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[DataEntry]:
        return (history for history, _ in self.windows)


@dataclass
class _CheckedForecast:
    """A forecast of a known window; what is read from it has the right shape and is finite."""

    forecast: Forecast
    item_id: Any
    start: pd.Period
    shape: tuple[int, ...]
    read: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self.read:
            values = np.asarray(self.forecast[name]).T
            whose = f"forecast of item_id {self.item_id!r} starting {self.start}"
            if values.shape != self.shape:
                raise ValueError(
                    f"{whose} has shape {values.shape} for {name!r}, time last; its label has {self.shape}"
                )
            bad = int(np.sum(~np.isfinite(values)))
            if bad:
                raise ValueError(
                    f"{whose} has {bad} of {values.size} values not finite for {name!r}; check the predictor, and "
                    "whether it stores this quantile and bears missing values in the history"
                )
            self.read[name] = values
        return self.read[name]


@dataclass
class _Batch(Mapping[str, npt.NDArray[Any]]):
    """What a metric of gluonts.ev reads: arrays ``(batch, [dim,] time)`` by name."""

    label: npt.NDArray[Any]
    scale: npt.NDArray[Any]
    forecasts: list[_CheckedForecast]

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name == "label":
            return self.label
        if name == "seasonal_error":
            return self.scale
        return np.stack([forecast[name] for forecast in self.forecasts])

    def __iter__(self) -> Iterator[str]:
        return iter(("label", "seasonal_error"))

    def __len__(self) -> int:
        return 2


def _pair(test: _Windows, forecasts: Iterator[Forecast]) -> Iterable[tuple[DataEntry, DataEntry, _CheckedForecast]]:
    """Put each forecast to its window, and make sure that it is its own."""
    for position, ((history, label), item_id) in enumerate(zip(test, test.items, strict=True)):
        forecast = next(forecasts, None)
        if forecast is None:
            raise ValueError(f"predictor gave {position} forecasts for {len(test)} windows; expected one for each")
        start = forecast_start(history)
        # Forecasts turn any item_id into a string, and need not carry one.
        known = history.get("item_id") is not None and forecast.item_id is not None
        if forecast.start_date != start or (known and str(forecast.item_id) != str(item_id)):
            raise ValueError(
                f"predictor gave a forecast of item_id {forecast.item_id!r} starting {forecast.start_date} where "
                f"item_id {item_id!r} starting {start} was due; expected forecasts in the order of the dataset"
            )
        yield history, label, _CheckedForecast(forecast, item_id, start, label["target"].shape)
    if next(forecasts, None) is not None:
        raise ValueError(
            f"predictor gave more than {len(test)} forecasts for {len(test)} windows; expected one for each"
        )


def _unmask(evaluator: Metric) -> None:
    """Turn masked results into NaN: derived metrics of GluonTS drop the mask and show the number that was under it."""
    if isinstance(evaluator, DerivedMetric):
        for part in evaluator.metrics.values():
            _unmask(part)
    elif isinstance(evaluator, DirectMetric) and isinstance(evaluator.aggregate.partial_result, list):
        results = evaluator.aggregate.partial_result
        evaluator.aggregate.partial_result = [np.ma.filled(np.ma.asarray(r, np.float64), np.nan) for r in results]


def _seasonal_error(target: npt.NDArray[Any], season: int) -> npt.NDArray[Any]:
    """Scale of MASE, ``([dim,] 1)``, NaN where the history does not tell."""
    error = seasonal_error(np.ma.masked_invalid(target), seasonality=season, time_axis=-1)
    return np.ma.filled(np.ma.asarray(error, dtype=np.float64), np.nan)
