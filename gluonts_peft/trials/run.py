"""One trial: data, training, storing, backtest, and a result on disk."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib.metadata
import json
import logging
import math
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from gluonts.dataset.common import Dataset
from gluonts.model.forecast import Forecast, QuantileForecast
from gluonts.model.predictor import Predictor
from numpy.typing import NDArray

from ..backtesting import QUANTILE_LEVELS, SeasonalNaive, backtest, backtest_both
from ..files import replacing, write_atomically
from ..registry import get_estimator
from ..series.calendar import calendar_of, first_stamp
from ..series.entries import UnusableWarning
from ..series.season import season_length
from ..series.table import DataEntry
from .baselinespec import BASELINE, BOOSTED, NAIVE, PACKAGES, STATISTICAL, TRAINED, missing_package
from .data import Data, load_data
from .dataspec import DataSpec
from .spec import TrialResult, TrialSpec

if TYPE_CHECKING:
    from ..estimator import PeftEstimator
    from ..networks import Networks
    from ..predictor import PeftPredictor

__all__ = ["EXAMPLES", "WINDOWS", "check_baseline", "run_trial", "windows_file"]

EXAMPLES = "examples.json"
WINDOWS = "windows.parquet"
PREDICTOR = "predictor"
TRAINING = "training"

#: Called with the model, and the number of epochs that it was trained; None stands for the model that is kept.
Evaluate = Callable[[Predictor, int | None], None]

_EXAMPLES = 3
_LEVELS = (0.1, 0.5, 0.9)


@contextmanager
def _without_noise() -> Iterator[None]:
    """Ignore what DeepAR of GluonTS warns of at each step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using a non-tuple sequence for multidimensional indexing", UserWarning)
        yield


@_without_noise()
def run_trial(
    spec: TrialSpec,
    folder: str | Path,
    *,
    progress: bool = False,
    evaluate: Evaluate | None = None,
    visible_context: int | None = None,
    networks: Networks | None = None,
) -> TrialResult:
    """Tune, store and backtest as a spec says, and leave a result on disk.

    A trial that is finished there is read and not run again; one that was interrupted in training goes on from its last
    epoch. The tuned model is scored whatever its verdict, which stands beside its scores.

    Parameters
    ----------
    spec
        The trial.
    folder
        Its folder: ``predictor/``, ``windows.parquet`` (the scores of each test window), ``examples.json`` (a few
        forecasts for plots) and, last of all, ``result.json``.
    progress
        Show a progress bar of the training.
    evaluate
        Called between epochs, as ``evaluate(predictor, epochs)``, when the state after these epochs is on disk; and at
        last with the predictor that is stored, and None. It must not change the model. A trial that goes on after an
        interruption calls it again for the epoch that it goes on from.
    visible_context
        Score only test series in which a model with so long a context sees a value before each window, so that trials
        with other contexts are scored on the same windows; the context of the trial if None.
    networks
        Networks to share with other trials of this process, so that each base is read once.

    Returns
    -------
    TrialResult
        Its ``peak_memory_mb`` is, on a GPU, the most memory that torch had allocated in the trial. On a CPU it is how
        far the resident memory of the process rose in the trial above what it was at the start, when libraries and data
        were loaded and free memory had been given back; Linux tells that, elsewhere it is None, as for naive baselines.

    Raises
    ------
    SpecError
        If the result in the folder is damaged.
    ValueError
        If the folder holds another trial, or data, checkpoint or an option cannot be used.
    """
    folder = Path(folder)
    earlier = TrialResult.read(folder)
    if earlier is not None and earlier.spec != spec:
        raise ValueError(f"folder '{folder}' holds another trial, {earlier.spec.name()!r}; name another folder")
    if earlier is not None and earlier.status == "finished":
        return earlier
    started = time.perf_counter()
    device = _device(spec)
    data = load_data(spec.data)
    _warm_up()
    start_mb = _reset_peak(device)
    found: dict[str, Any] = {}
    network = spec.family != BASELINE or spec.checkpoint in TRAINED
    if spec.family == BASELINE and not spec.trains:
        predictor = _untrained(spec, data)
    elif not network:
        predictor, found = _boost(spec, data)
    elif spec.family == BASELINE:
        predictor, found = _train(spec, data, folder, progress)
    else:
        predictor, found = _tune(spec, data, folder, progress, evaluate, networks)
    if evaluate is not None:
        evaluate(predictor, None)
    remembered = _Remembered(predictor)
    test = visible(data.test, spec, spec.data, visible_context)
    scores, windows = _score(remembered, test, spec.data)
    simpler = {f"simpler_{reason}": count for reason, count in getattr(predictor, "simpler", {}).items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WINDOWS) as part:
        windows.to_parquet(part, index=False)
    examples = _examples(remembered.forecasts, test, windows["MAE[0.5]"].to_numpy())
    write_atomically(folder / EXAMPLES, json.dumps(examples))
    elsewhere: dict[str, float | None] = {}
    others = {name: load_data(other) for name, other in spec.also.items()}
    for name, other in spec.also.items():
        # Data of another kind were asked for.
        further = _Remembered(predictor, **({"any_freq": True} if network else {}))
        found_there, each = _score(further, visible(others[name].test, spec, other, visible_context), other)
        with replacing(folder / windows_file(name)) as part:
            each.to_parquet(part, index=False)
        elsewhere |= {f"{name}/{metric}": finite(value) for metric, value in found_there.iloc[0].items()}
    skipped = {f"skipped_{reason}": count for reason, count in scores.attrs["skipped"].items()}
    skipped["skipped_nothing_seen"] = len(data.test) - len(test)
    result = TrialResult(
        spec=spec,
        status="finished",
        scores={**{str(name): finite(value) for name, value in scores.iloc[0].items()}, **elsewhere},
        counts={
            **{name: scores.attrs[name] for name in ("series", "windows", "unscaled_windows", "seasonless_windows")},
            "train_series": len(data.train),
            **skipped,
            **simpler,
            **found.pop("counts", {}),
        },
        seconds_forecast=remembered.seconds,
        seconds_total=time.perf_counter() - started,
        peak_memory_mb=None if start_mb is None or _repeats(spec) else _peak_mb(device) - start_mb,
        device=device,
        data_fingerprint=data.fingerprint,
        also_fingerprints={name: other.fingerprint for name, other in others.items()},
        units={"": data.unit, **{name: other.unit for name, other in others.items()}},
        versions=_versions(spec),
        **found,
    )
    result.write(folder)
    shutil.rmtree(folder / TRAINING, ignore_errors=True)
    return result


def windows_file(name: str = "") -> str:
    """Return the name of the file with the scores of each window, of the trial's own data or of further ones."""
    return f"windows-{hashlib.sha256(name.encode()).hexdigest()[:8]}.parquet" if name else WINDOWS


def _score(predictor: Predictor, test: list[DataEntry], data: DataSpec) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the scores over all windows, one row, and those of each window."""
    options: dict[str, Any] = dict(windows=data.windows, seasonality=data.season, unusable="skip")
    with counted_not_logged():
        scores, windows = backtest_both(predictor, test, **options)
    windows = windows.reset_index()
    windows["forecast_start"] = windows["forecast_start"].astype(str)
    return scores, windows


def visible(
    test: list[DataEntry], spec: TrialSpec, data: DataSpec, visible_context: int | None = None
) -> list[DataEntry]:
    """Leave out series with a window before which the model would see no value: it could not forecast that."""
    steps, context = spec.prediction_length, visible_context or spec.context_length
    kept = []
    for entry in test:
        observed = np.isfinite(entry["target"])
        starts = [len(observed) - (window + 1) * steps for window in range(data.windows)]
        # Series without any value before their first window are left to the backtest, which counts them apart.
        scored = starts[-1] > 0 and observed[: starts[-1]].any()
        if not scored or all(
            observed[0 if context is None else max(0, at - context) : at].any()
            for at in starts
            if observed[at : at + steps].any()
        ):
            kept.append(entry)
    if not kept:
        raise ValueError(
            f"no test series is left: all {len(test)} have a window with no value in the {context} steps before it; use"
            " a longer context_length or fewer data.windows"
        )
    return kept


def _repeats(spec: TrialSpec) -> bool:
    return spec.family == BASELINE and spec.checkpoint in NAIVE


def _season(spec: TrialSpec, data: Data) -> int:
    return spec.data.season or season_length(data.test[0]["start"].freqstr)


def _untrained(spec: TrialSpec, data: Data) -> Predictor:
    """Return a baseline that learns nothing from other series."""
    if _repeats(spec):
        return SeasonalNaive(spec.prediction_length, _season(spec, data) if spec.checkpoint == "seasonal_naive" else 1)
    from .statistical import StatisticalPredictor

    return StatisticalPredictor(
        spec.prediction_length, spec.checkpoint, season_length=_season(spec, data), **spec.backbone_options
    )


def _boost(spec: TrialSpec, data: Data) -> tuple[Predictor, dict[str, Any]]:
    """Return trees and what the result says about them; they are not stored."""
    from .boosting import train_trees

    started = time.perf_counter()
    assert spec.context_length is not None
    predictor, skipped = train_trees(
        data.train,
        data.validation or None,
        prediction_length=spec.prediction_length,
        context_length=spec.context_length,
        season_length=_season(spec, data),
        min_context=spec.training.min_context,
        validation_windows=spec.training.validation_windows,
        max_validation_windows=spec.training.max_validation_windows,
        seed=spec.seed,
        options=spec.backbone_options,
    )
    counts = {"leaves": predictor.leaves, **{f"{name}_skipped": count for name, count in skipped.items()}}
    return predictor, {"seconds": time.perf_counter() - started, "counts": counts}


def check_baseline(spec: TrialSpec) -> None:
    """Make sure that the package of a baseline is there and that it knows its options; other trials are let through.

    Raises
    ------
    ValueError
        If an option is unknown or has a value that cannot be used.
    ImportError
        If the package is not installed.
    """
    if spec.family != BASELINE:
        return
    package = missing_package(spec.checkpoint)
    if package is not None:
        raise ImportError(f"baseline {spec.checkpoint!r} needs {package}; install gluonts-peft[baselines]")
    if spec.checkpoint in STATISTICAL:
        from . import statistical

        statistical.check_options(spec.checkpoint, spec.backbone_options)
    elif spec.checkpoint in BOOSTED:
        from . import boosting

        boosting.check_options(spec.backbone_options)
    elif spec.backbone_options:
        from .baselines import BaselineEstimator

        # Building it is quick, and nothing else knows its options.
        BaselineEstimator(
            prediction_length=spec.prediction_length,
            context_length=spec.context_length,
            checkpoint=spec.checkpoint,
            backbone_options=spec.backbone_options,
        ).load_backbone()


def _train(spec: TrialSpec, data: Data, folder: Path, progress: bool) -> tuple[Predictor, dict[str, Any]]:
    """Return a baseline trained from scratch and what the result says about it; it is not stored."""
    from .baselines import LEARNING_RATE, BaselineEstimator

    training = _training_options(spec)
    estimator = BaselineEstimator(
        prediction_length=spec.prediction_length,
        context_length=spec.context_length,
        checkpoint=spec.checkpoint,
        adapter="full",
        backbone_options={"freq": data.train[0]["start"].freqstr, **spec.backbone_options},
        **{**training, "learning_rate": training["learning_rate"] or LEARNING_RATE},
        seed=spec.seed,
        gate="keep",
        unusable="skip",
        folder=str(folder / TRAINING),
        progress=progress,
    )
    with counted_not_logged():
        predictor = estimator.train(data.train, data.validation or None, ckpt_path="last")
    return predictor, _training_facts(predictor) | {"counts": _skipped_counts(estimator)}


def _training_options(spec: TrialSpec) -> dict[str, Any]:
    """Return the options of the estimator that say how to train."""
    unit = spec.training.verdict_unit or ("series" if spec.data.group == "item" else "patients")
    return {**spec.training.model_dump(), "verdict_unit": unit}


def _skipped_counts(estimator: PeftEstimator) -> dict[str, int]:
    """Return how many series of each part the estimator left out, as it had no window in them."""
    return {f"{name}_skipped": count for name, count in estimator.skipped.items()}


def _training_facts(predictor: PeftPredictor) -> dict[str, Any]:
    fit = predictor.fit
    assert fit is not None
    if predictor.backbone.adapter is None:
        raise ValueError("training.time_limit left no time to train a single step and to judge it; give it more")
    return {
        "trainable_parameters": predictor.backbone.adapter.num_parameters(),
        "epochs": fit.epochs,
        "steps": fit.steps,
        "learning_rate": fit.learning_rate,
        "stopped": fit.stopped,
        "seconds": fit.seconds,
    }


def _tune(
    spec: TrialSpec,
    data: Data,
    folder: Path,
    progress: bool,
    evaluate: Evaluate | None,
    networks: Networks | None,
) -> tuple[Predictor, dict[str, Any]]:
    """Return the trained predictor and what the result says about it."""
    estimator = get_estimator(spec.family)(
        prediction_length=spec.prediction_length,
        context_length=spec.context_length,
        checkpoint=spec.checkpoint,
        adapter=spec.adapter,
        backbone_options=spec.backbone_options,
        **_training_options(spec),
        seed=spec.seed,
        gate="keep",
        unusable="skip",
        folder=str(folder / TRAINING),
        progress=progress,
        trainer_kwargs=None if evaluate is None else {"callbacks": [_evaluation(evaluate, spec)]},
    )
    estimator.networks = networks
    histories = None if spec.training.by is None else _histories(data.test, spec)
    with counted_not_logged():
        predictor = estimator.train(data.train, data.validation or None, ckpt_path="last", item_data=histories)
    # An attempt that ended after this point has left a predictor and no result.
    shutil.rmtree(folder / PREDICTOR, ignore_errors=True)
    predictor.serialize(folder / PREDICTOR)
    gate = predictor.fit.gate
    scores = {
        "zero_shot": finite(gate.zero_shot),
        "tuned": finite(gate.tuned),
        "windows": gate.windows,
        "passed": bool(gate.passed),
    }
    facts = _training_facts(predictor)
    facts |= {
        "counts": _skipped_counts(estimator),
        # Zero-shot has nothing to pass.
        "gate": scores if facts["trainable_parameters"] else None,
        "verdict": predictor.verdict,
        "calibration": predictor.calibration,
        "adapter": PREDICTOR,
        "base": asdict(predictor.backbone.source),
    }
    if spec.ensemble is None:
        return predictor, facts
    from ..predictor import PeftPredictor

    zero_shot = PeftPredictor(estimator.load_backbone(), seed=spec.seed, device=spec.training.device)
    return _Ensemble(predictor, zero_shot, spec.ensemble), facts


def _histories(test: list[DataEntry], spec: TrialSpec) -> list[DataEntry]:
    """Return test series as they are known before their first test window."""
    steps = spec.prediction_length * spec.data.windows
    cut = [{**entry, "target": entry["target"][..., : max(entry["target"].shape[-1] - steps, 0)]} for entry in test]
    return [entry for entry in cut if np.isfinite(entry["target"]).any()]


class _Ensemble(Predictor):  # type: ignore[misc]
    """The weighted mean of two predictors, quantile by quantile."""

    def __init__(self, tuned: Predictor, zero_shot: Predictor, weight: float) -> None:
        super().__init__(prediction_length=tuned.prediction_length)
        self.tuned, self.zero_shot, self.weight = tuned, zero_shot, weight

    def predict(self, dataset: Dataset, **options: Any) -> Iterator[Forecast]:
        pairs = zip(self.tuned.predict(dataset, **options), self.zero_shot.predict(dataset, **options), strict=True)
        for tuned, zero_shot in pairs:
            values = [
                self.weight * tuned.quantile(level) + (1 - self.weight) * zero_shot.quantile(level)
                for level in QUANTILE_LEVELS
            ]
            yield QuantileForecast(
                np.stack(values),
                forecast_keys=[str(level) for level in QUANTILE_LEVELS],
                start_date=tuned.start_date,
                item_id=tuned.item_id,
                info=tuned.info,
            )


def _evaluation(evaluate: Evaluate, spec: TrialSpec) -> Any:
    """Return a callback of Lightning that evaluates the model between two epochs."""
    from lightning.pytorch.callbacks import Callback

    from ..predictor import PeftPredictor

    class Evaluation(Callback):  # type: ignore[misc]
        # Not at the end of an epoch, where its checkpoint may not be written yet.
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch > 0:
                predictor = PeftPredictor(pl_module.backbone, seed=spec.seed, device=spec.training.device)
                evaluate(predictor, trainer.current_epoch)

    return Evaluation()


class _Remembered(Predictor):  # type: ignore[misc]
    """Forecasts once, and gives the same forecasts to all who ask."""

    def __init__(self, predictor: Predictor, **options: Any) -> None:
        super().__init__(prediction_length=predictor.prediction_length)
        self.predictor = predictor
        self.options = options
        self.forecasts: list[Forecast] = []
        self.seconds = 0.0

    def predict(self, dataset: Dataset, **options: Any) -> Iterator[Forecast]:
        if not self.forecasts:
            started = time.perf_counter()
            self.forecasts = list(self.predictor.predict(dataset, **self.options, **options))
            self.seconds = time.perf_counter() - started
        return iter(self.forecasts)


@contextmanager
def counted_not_logged() -> Iterator[None]:
    """Keep what is left out from being said: it is in the result, and a study would say it hundreds of times."""
    logger = logging.getLogger("gluonts_peft.backtesting")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnusableWarning)
            yield
    finally:
        logger.setLevel(level)


def _examples(forecasts: list[Forecast], test: list[DataEntry], errors: NDArray[Any]) -> list[dict[str, Any]]:
    """Return a few forecasts with their surroundings: some evenly spaced, which depend on the data alone, and those
    with the smallest and the largest errors."""
    entries = {str(entry["item_id"]): entry for entry in test}
    count = min(_EXAMPLES, len(forecasts))
    by_error = np.argsort(errors, kind="stable")
    chosen = [("spaced", int((number + 0.5) * len(forecasts) / count)) for number in range(count)]
    chosen += [("best", int(number)) for number in by_error[:count]]
    chosen += [("worst", int(number)) for number in by_error[::-1][:count]]
    examples = []
    for kind, number in chosen:
        forecast = forecasts[number]
        entry = entries[str(forecast.item_id)]
        start, steps = entry["start"], forecast.prediction_length
        at = (forecast.start_date - start).n // start.freq.n
        target = entry["target"]
        examples.append(
            {
                "kind": kind,
                "MAE": finite(errors[number]),
                "item_id": str(forecast.item_id),
                "start": str(first_stamp(forecast.start_date, calendar_of(entry))),
                "freq": start.freqstr,
                "history": [finite(value) for value in target[max(0, at - 2 * steps) : at]],
                "label": [finite(value) for value in target[at : at + steps]],
                "quantiles": {str(q): [finite(value) for value in forecast.quantile(q)] for q in _LEVELS},
            }
        )
    return examples


def finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _versions(spec: TrialSpec) -> dict[str, str]:
    from ..adapters.base import versions
    from ..registry import families

    if spec.family == BASELINE and spec.checkpoint in PACKAGES:
        package = PACKAGES[spec.checkpoint]
        return {**versions(), package: importlib.metadata.version(package), "python": platform.python_version()}
    plugin = {entry.distribution: entry.version for entry in families.describe() if entry.name == spec.family}
    return {**versions(), **plugin, "python": platform.python_version()}


def _device(spec: TrialSpec) -> str:
    if spec.family == BASELINE and spec.checkpoint not in TRAINED:
        return "cpu"
    from ..training import resolve_device

    return str(resolve_device(spec.training.device))


@lru_cache(maxsize=1)
def _warm_up() -> None:
    """Load and compile what a process does once, so that no trial seems to need it."""
    import lightning.pytorch  # noqa: F401
    import peft  # noqa: F401

    from ..training import fit  # noqa: F401

    start = pd.Period("2000-01-01 00:00", freq="h")
    with counted_not_logged():
        backtest(SeasonalNaive(1), [{"start": start, "target": np.ones(3, np.float32), "item_id": "0"}])


def _reset_peak(device: str) -> float | None:
    """Start measuring, and return the memory in use in MB, or None where it cannot be measured."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    try:
        # What earlier trials freed, and the allocator kept, would hide what this one takes.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status_mb("VmRSS")
    except (OSError, AttributeError, TypeError):
        # Not Linux, another C library, or a container that forbids it.
        return None


def _peak_mb(device: str) -> float:
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.max_memory_allocated(device)) / 1e6
    return _status_mb("VmHWM")


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))
