"""One LightGBM for all series: trees that forecast each quantile of each step from the window before it.

Untuned, as a practitioner without a pretrained model would use it. There is one model for each quantile level, with
the objective ``quantile``, and one row for each step of a window: the number of the step is a feature (direct
forecasts). Our choices:

- Windows are those of the training series that networks see: the context and no more. All of them are taken if they fit
  into ``max_rows``; else as many as fit are drawn by the seed.
- Values are taken relative to the mean and the deviation of the context, which are features too. The deviation is at
  least a hundredth of the mean of absolute values, so that a constant context says something.
- Features: the last values; those of the same phase in the last three seasons, their mean, and their neighbours; means
  and deviations of the last steps; how long ago the last value was observed; the calendar of the step. What is missing
  is NaN, which LightGBM knows.
- The best number of trees of each level is that with the least quantile loss on the validation windows, the same that
  networks are validated on; training ends ``early_stopping_round`` trees after it.
- Quantiles are sorted afterwards.

The same seed gives the same trees: one thread, ``deterministic`` and ``force_row_wise``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from gluonts.core.component import validated
from gluonts.dataset import Dataset
from gluonts.model.forecast import QuantileForecast
from gluonts.model.predictor import RepresentablePredictor
from gluonts.time_feature import time_features_from_frequency_str
from numpy.typing import NDArray

from ..backtesting import QUANTILE_LEVELS
from ..errors import unknown
from ..series.batches import context_batches
from ..series.overlap import held_back
from ..series.store import SeriesStore
from ..series.windows import Windows

__all__ = ["OPTIONS", "LightGBMPredictor", "check_options", "train_trees"]

#: Options and their defaults, by LightGBM's names; ``max_rows`` is ours.
OPTIONS: dict[str, Any] = {
    "num_iterations": 300,
    "learning_rate": 0.1,
    "num_leaves": 31,
    "max_depth": -1,
    "min_data_in_leaf": 50,
    "feature_fraction": 1.0,
    "lambda_l1": 0.0,
    "lambda_l2": 0.0,
    "max_bin": 63,
    "early_stopping_round": 20,
    "max_rows": 50_000,
}

_RECENT, _SEASONS = 12, 3
_BATCH = 1024

Floats = NDArray[np.floating[Any]]


class LightGBMPredictor(RepresentablePredictor):  # type: ignore[misc, unused-ignore]
    """Forecasts of trees; made by :func:`train_trees`.

    It is stored as any predictor of GluonTS is, its trees as LightGBM's text.

    Parameters
    ----------
    prediction_length, context_length
        Steps to forecast, and steps before them that are looked at.
    season_length
        Steps in a season; 1 for none.
    time_features
        Names of functions of ``gluonts.time_feature``.
    trees
        A model for each of :data:`~gluonts_peft.backtesting.QUANTILE_LEVELS`, as text.

    Raises
    ------
    ImportError
        If LightGBM is not installed.
    """

    @validated()  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(
        self,
        prediction_length: int,
        context_length: int,
        season_length: int,
        time_features: list[str],
        trees: list[str],
    ) -> None:
        super().__init__(prediction_length=prediction_length)
        lightgbm = _lightgbm()
        self.context_length = context_length
        self.season_length = season_length
        self.time_features = time_features
        self.trees = trees
        self.boosters = [lightgbm.Booster(model_str=text) for text in trees]

    @property
    def leaves(self) -> int:
        """Leaves of all trees."""
        return sum(tree["num_leaves"] for booster in self.boosters for tree in booster.dump_model()["tree_info"])

    def predict(self, dataset: Dataset, **_: Any) -> Iterator[QuantileForecast]:
        """Forecast every series; options of other predictors, such as ``num_samples``, have no meaning here."""
        batches = context_batches(
            dataset,
            context_length=self.context_length,
            batch_size=_BATCH,
            prediction_length=self.prediction_length,
            time_features=self.time_features,
        )
        for entries, batch in batches:
            rows, loc, scale = _rows(batch, self.context_length, self.prediction_length, self.season_length)
            found = np.stack([booster.predict(rows, num_threads=1) for booster in self.boosters])
            shape = (len(QUANTILE_LEVELS), len(loc), self.prediction_length)
            values = np.sort(found.reshape(shape), axis=0) * scale[:, None] + loc[:, None]
            for entry, own in zip(entries, values.transpose(1, 0, 2), strict=True):
                yield QuantileForecast(
                    own,
                    forecast_keys=[str(level) for level in QUANTILE_LEVELS],
                    start_date=entry["start"] + np.shape(entry["target"])[-1],
                    item_id=entry.get("item_id"),
                    info=entry.get("info"),
                )


def train_trees(
    training: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]] | None,
    *,
    prediction_length: int,
    context_length: int,
    season_length: int = 1,
    min_context: int | None = None,
    validation_windows: int = 1,
    max_validation_windows: int = 1024,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> tuple[LightGBMPredictor, dict[str, int]]:
    """Train on the windows of some series.

    Parameters
    ----------
    training
        Entries with univariate targets, all of one frequency.
    validation
        Its last windows decide how many trees there are. If None, the labels of the last windows of the training series
        are held out for that.
    prediction_length, context_length
        Steps to forecast, and steps before them that are looked at.
    season_length
        Steps in a season; 1 for none.
    min_context, validation_windows, max_validation_windows
        As for :class:`gluonts_peft.PeftEstimator`.
    seed
        Draws windows, where there are more than are taken, and features, with ``feature_fraction`` below 1.
    options
        Some of :data:`OPTIONS`.

    Returns
    -------
    LightGBMPredictor, dict
        And how many series of each part had no window: ``"training"``, ``"validation"``.

    Raises
    ------
    ValueError
        If an option is unknown, or no window is left.
    ImportError
        If LightGBM is not installed.
    """
    check_options(options or {})
    lightgbm = _lightgbm()
    chosen = {**OPTIONS, **(options or {})}
    stores = [SeriesStore.from_dataset(part) for part in (training, validation or training)]
    names = [[entry.get("item_id") for entry in part] for part in (training, validation or training)]
    label = validation_windows * prediction_length
    held: Any = label if validation is None else held_back(stores[0], stores[1], (names[0], names[1]), label)
    features = _calendar(stores[0].freq)
    lengths: dict[str, Any] = {
        "context_length": context_length,
        "prediction_length": prediction_length,
        "min_context": min_context or min(context_length, prediction_length),
        "seed": seed,
        "time_features": features,
    }
    windows = Windows(stores[0], holdout=held, **lengths)
    held_out = Windows(stores[1], **lengths)
    last = held_out.last(windows=validation_windows, max_windows=max_validation_windows)
    shape = (context_length, prediction_length, season_length)
    rows, labels = _table(_batches(windows, max(1, chosen.pop("max_rows") // prediction_length), seed), *shape)
    seen, truth = _table(last, *shape)
    rounds, patience = chosen.pop("num_iterations"), chosen.pop("early_stopping_round")
    fixed = {"num_threads": 1, "deterministic": True, "force_row_wise": True, "seed": seed, "verbosity": -1}
    # All levels share the binned table.
    table = lightgbm.Dataset(rows, labels, params={**chosen, **fixed}, free_raw_data=False)
    judge = lightgbm.Dataset(seen, truth, reference=table, params={**chosen, **fixed}, free_raw_data=False)
    trees = []
    for level in QUANTILE_LEVELS:
        booster = lightgbm.train(
            {**chosen, **fixed, "objective": "quantile", "alpha": level, "metric": "quantile"},
            table,
            num_boost_round=rounds,
            valid_sets=[judge],
            callbacks=[lightgbm.early_stopping(patience, verbose=False)] if patience else [],
        )
        trees.append(booster.model_to_string(num_iteration=booster.best_iteration if patience else None))
    predictor = LightGBMPredictor(
        prediction_length=prediction_length,
        context_length=context_length,
        season_length=season_length,
        time_features=list(features),
        trees=trees,
    )
    skipped = {"training": len(windows.left_out())}
    if validation is not None:
        skipped["validation"] = len(held_out.left_out())
    return predictor, skipped


def check_options(options: Mapping[str, Any]) -> None:
    """Make sure that there are such options and that they are numbers.

    Raises
    ------
    ValueError
        If a name or a value is wrong.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError("baseline 'lightgbm': " + unknown("option", name, OPTIONS))
        whole = isinstance(OPTIONS[name], int)
        lowest = {"max_depth": -1, "num_leaves": 2, "max_bin": 2, "num_iterations": 1, "max_rows": 1}.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value >= lowest:
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"baseline 'lightgbm': {name} {value!r} is not {kind}, {lowest} or more")


def _batches(windows: Windows, most: int, seed: int) -> Iterator[Mapping[str, Floats]]:
    """Read all windows, or as many as are wanted, drawn without replacement."""
    chosen = np.arange(len(windows))
    if most < len(chosen):
        chosen = np.sort(np.random.default_rng([seed, 0]).choice(len(chosen), most, replace=False))
    for begin in range(0, len(chosen), _BATCH):
        yield windows.numbered(chosen[begin : begin + _BATCH])


def _table(batches: Iterable[Mapping[str, Floats]], context: int, steps: int, season: int) -> tuple[Floats, Floats]:
    """Return the rows of all observed steps and their labels, relative to the windows' contexts."""
    rows, labels = [], []
    for batch in batches:
        found, loc, scale = _rows(batch, context, steps, season)
        kept = batch["future_observed_values"].ravel() > 0
        rows.append(found[kept])
        labels.append(((batch["future_target"] - loc[:, None]) / scale[:, None]).ravel()[kept])
    return np.concatenate(rows), np.concatenate(labels)


def _rows(batch: Mapping[str, Floats], context: int, steps: int, season: int) -> tuple[Floats, Floats, Floats]:
    """Return features (windows * steps, features), float32, and the level and spread of each window."""
    past = np.where(batch["past_observed_values"] > 0, batch["past_target"].astype(np.float64), np.nan)
    size = len(past)
    past = np.concatenate([np.full((size, context - past.shape[1]), np.nan), past], axis=1)
    seen = ~np.isnan(past)
    count = np.maximum(seen.sum(1), 1)
    loc = np.nansum(past, 1) / count
    deviation = np.sqrt(np.nansum(np.square(past - loc[:, None]), 1) / count)
    scale = np.maximum(deviation, 0.01 * np.nansum(np.abs(past), 1) / count)
    scale[scale == 0] = 1.0
    scaled = (past - loc[:, None]) / scale[:, None]

    recent = min(_RECENT, context)
    window = [scaled[:, ::-1][:, :recent]]
    total, squares = (
        np.concatenate([np.zeros((size, 1)), np.nancumsum(values[:, ::-1], axis=1)], axis=1)
        for values in (scaled, np.square(scaled))
    )
    observed = np.concatenate([np.zeros((size, 1)), np.cumsum(seen[:, ::-1], axis=1)], axis=1)
    widths = [width for width in (3, 6, 12, 24, 48, 96, 192) if width < context]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = total[:, widths] / observed[:, widths]
        window += [means, np.sqrt(np.maximum(squares[:, widths] / observed[:, widths] - np.square(means), 0))]
    age = np.argmax(seen[:, ::-1], axis=1)
    window.append(np.stack([loc, scale, seen.mean(1), age], axis=1))

    step = np.arange(1, steps + 1)
    own: list[NDArray[Any]] = [np.broadcast_to(step, (size, steps))]
    if season > 1:
        # Position of the same phase in the last season before the forecast, counted from the end.
        back = season * -(-step // season) - step
        phases = [_at(scaled, back + number * season) for number in range(max(1, context // season))]
        filled = np.stack(phases)
        known = np.maximum((~np.isnan(filled)).sum(0), 1)
        mean = np.where(np.isnan(filled).all(0), np.nan, np.nansum(filled, 0) / known)
        own += [*phases[:_SEASONS], mean, _at(scaled, back + 1), _at(scaled, np.where(back > 0, back - 1, season - 1))]
    columns = [np.repeat(np.concatenate(window, 1)[:, None], steps, axis=1), np.stack(own, -1)]
    if "time_feat" in batch:
        columns.append(batch["time_feat"][:, -steps:])
    rows = np.concatenate([column.astype(np.float32) for column in columns], axis=2)
    return rows.reshape(size * steps, -1), loc, scale


def _at(values: Floats, back: NDArray[np.int64]) -> Floats:
    """Return the values so many steps before the last one, NaN where there is none."""
    there = back < values.shape[1]
    return np.where(there, values[:, values.shape[1] - 1 - np.where(there, back, 0)], np.nan)


def _calendar(freq: str | None) -> tuple[str, ...]:
    """Return the names of the calendar features of a frequency."""
    if freq is None:
        return ()
    try:
        features = time_features_from_frequency_str(freq)
    except RuntimeError:
        # GluonTS has none for steps below a second.
        return ()
    return tuple(feature.__name__ for feature in features)


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError as error:
        raise ImportError(f"baseline 'lightgbm' needs lightgbm ({error}); install gluonts-peft[baselines]") from error
    return lightgbm
