"""One trial: data, training, storing, backtest, and a result on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gluonts.dataset.common import Dataset
from gluonts.model.forecast import Forecast
from gluonts.model.predictor import Predictor
from gluonts.time_feature.seasonality import get_seasonality

from ..backtesting import SeasonalNaive, backtest
from ..data import DataEntry, read_dataset, split_by_item
from ..registry import get_estimator
from ..vitals import load_hourly, patient_of, simulate_vitals
from .spec import BASELINE, DataSpec, TrialResult, TrialSpec, write_atomically

__all__ = ["EXAMPLES", "WINDOWS", "Data", "load_data", "run_trial"]

EXAMPLES = "examples.json"
WINDOWS = "windows.parquet"
PREDICTOR = "predictor"
TRAINING = "training"

T = TypeVar("T")

_EXAMPLES = 3
_LEVELS = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Data:
    """The parts of the data, and the SHA-256 over all of them."""

    train: list[DataEntry]
    validation: list[DataEntry]
    test: list[DataEntry]
    fingerprint: str


def run_trial(spec: TrialSpec, folder: str | Path, *, progress: bool = False) -> TrialResult:
    """Tune, store and backtest as a spec says, and leave a result on disk.

    A trial that is finished there is read and not run again; one that was interrupted in training goes on from its last
    epoch. The tuned model is scored whatever the gate says, and the gate's verdict stands beside its scores.

    Parameters
    ----------
    spec
        The trial.
    folder
        Its folder: ``predictor/``, ``windows.parquet`` (the scores of each test window), ``examples.json`` (a few
        forecasts for plots) and, last of all, ``result.json``.
    progress
        Show a progress bar of the training.

    Returns
    -------
    TrialResult
        Its ``peak_memory_mb`` is, on a GPU, the most memory that torch had allocated since the start of the trial. On a
        CPU it is the highest resident memory of the whole process since the start of the trial on Linux, and since the
        start of the process elsewhere; Python, its libraries and what earlier trials have left are a part of it.
        Baselines have none.

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
    _reset_peak(device)
    data = load_data(spec.data)
    found: dict[str, Any] = {}
    if spec.family == BASELINE:
        predictor = _baseline(spec, data)
    else:
        predictor, found = _tune(spec, data, folder, progress)
    remembered = _Remembered(predictor)
    test = _visible(data.test, spec)
    with _counted_not_logged():
        scores = backtest(remembered, test, windows=spec.data.windows)
        windows = backtest(remembered, test, windows=spec.data.windows, per_window=True)
    windows = windows.reset_index()
    windows["forecast_start"] = windows["forecast_start"].astype(str)
    folder.mkdir(parents=True, exist_ok=True)
    windows.to_parquet(folder / WINDOWS, index=False)
    write_atomically(folder / EXAMPLES, json.dumps(_examples(remembered.forecasts, test)))
    skipped = {f"skipped_{reason}": count for reason, count in scores.attrs["skipped"].items()}
    skipped["skipped_nothing_seen"] = len(data.test) - len(test)
    result = TrialResult(
        spec=spec,
        status="finished",
        scores={str(name): _finite(value) for name, value in scores.iloc[0].items()},
        counts={**{name: scores.attrs[name] for name in ("series", "windows", "unscaled_windows")}, **skipped},
        seconds_forecast=remembered.seconds,
        seconds_total=time.perf_counter() - started,
        # A baseline needs next to nothing; the process may still hold what an earlier trial took.
        peak_memory_mb=None if spec.family == BASELINE else _peak_mb(device),
        device=device,
        data_fingerprint=data.fingerprint,
        versions=_versions(spec),
        **found,
    )
    result.write(folder)
    shutil.rmtree(folder / TRAINING, ignore_errors=True)
    return result


def load_data(spec: DataSpec) -> Data:
    """Read or simulate the series of a spec and divide them.

    Equal specs are loaded once a process: what is returned is shared and must not be changed.

    Raises
    ------
    ValueError
        If the data cannot be read, or nothing is left.
    """
    return _load(spec.model_dump_json())


@lru_cache(maxsize=8)
def _load(text: str) -> Data:
    spec = DataSpec(**json.loads(text))
    vitals = ("hr", "map") if spec.vital is None else (spec.vital,)
    if spec.source == "simulated":
        entries = simulate_vitals(_set(spec.patients), _set(spec.hours), seed=_set(spec.seed), vitals=vitals)
    elif spec.source == "hourly":
        entries = load_hourly(_set(spec.path), min_hours=_set(spec.min_hours), vitals=vitals)
    else:
        entries = read_dataset(_set(spec.path), freq=spec.freq)
        if spec.vital is not None:
            entries = [entry for entry in entries if entry["item_id"].endswith(f"/{spec.vital}")]
            if not entries:
                raise ValueError(
                    f"no item_id of '{spec.path}' ends in '/{spec.vital}'; name another data.vital, or none"
                )
    key = patient_of if spec.group == "patient" else None
    train, validation, test = split_by_item(entries, fractions=spec.fractions, seed=spec.split_seed, key=key)
    return Data(train, validation, test, _fingerprint(train, validation, test))


def _set(value: T | None) -> T:
    """Return an option that the normal form of its source has."""
    assert value is not None
    return value


def _fingerprint(*parts: list[DataEntry]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} series\n".encode())
        for entry in part:
            target = np.ascontiguousarray(entry["target"])
            start = entry["start"]
            digest.update(f"{entry['item_id']} {start} {start.freqstr} {target.dtype} {target.shape}\n".encode())
            digest.update(target.tobytes())
    return digest.hexdigest()


def _visible(test: list[DataEntry], spec: TrialSpec) -> list[DataEntry]:
    """Leave out series with a window before which the model would see no value: it could not forecast that."""
    steps, context = spec.prediction_length, spec.context_length
    kept = []
    for entry in test:
        observed = np.isfinite(entry["target"])
        starts = [len(observed) - (window + 1) * steps for window in range(spec.data.windows)]
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


def _baseline(spec: TrialSpec, data: Data) -> Predictor:
    steps = get_seasonality(data.test[0]["start"].freqstr) if spec.checkpoint == "seasonal_naive" else 1
    return SeasonalNaive(spec.prediction_length, season_length=steps)


def _tune(spec: TrialSpec, data: Data, folder: Path, progress: bool) -> tuple[Predictor, dict[str, Any]]:
    """Return the trained predictor and what the result says about it."""
    estimator = get_estimator(spec.family)(
        prediction_length=spec.prediction_length,
        context_length=spec.context_length,
        checkpoint=spec.checkpoint,
        adapter=spec.adapter,
        backbone_options=spec.backbone_options,
        **spec.training.model_dump(),
        seed=spec.seed,
        gate="keep",
        folder=str(folder / TRAINING),
        progress=progress,
    )
    predictor = estimator.train(data.train, data.validation or None, ckpt_path="last")
    # An attempt that ended after this point has left a predictor and no result.
    shutil.rmtree(folder / PREDICTOR, ignore_errors=True)
    predictor.serialize(folder / PREDICTOR)
    fit, gate = predictor.fit, predictor.fit.gate
    verdict = {
        "zero_shot": _finite(gate.zero_shot),
        "tuned": _finite(gate.tuned),
        "windows": gate.windows,
        "passed": bool(gate.passed),
    }
    parameters = predictor.backbone.adapter.num_parameters()
    return predictor, {
        # Zero-shot has nothing to pass.
        "gate": verdict if parameters else None,
        "trainable_parameters": parameters,
        "epochs": fit.epochs,
        "steps": fit.steps,
        "learning_rate": fit.learning_rate,
        "seconds": fit.seconds,
        "adapter": PREDICTOR,
        "base": asdict(predictor.backbone.source),
    }


class _Remembered(Predictor):  # type: ignore[misc]
    """Forecasts once, and gives the same forecasts to all who ask."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(prediction_length=predictor.prediction_length)
        self.predictor = predictor
        self.forecasts: list[Forecast] = []
        self.seconds = 0.0

    def predict(self, dataset: Dataset, **options: Any) -> Iterator[Forecast]:
        if not self.forecasts:
            started = time.perf_counter()
            self.forecasts = list(self.predictor.predict(dataset, **options))
            self.seconds = time.perf_counter() - started
        return iter(self.forecasts)


@contextmanager
def _counted_not_logged() -> Iterator[None]:
    """Keep what the backtest skips out of the log: it is in the result, and a study would say it hundreds of times."""
    logger = logging.getLogger("gluonts_peft.backtesting")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _examples(forecasts: list[Forecast], test: list[DataEntry]) -> list[dict[str, Any]]:
    """Return a few forecasts with their surroundings; which windows they are depends on the data alone."""
    entries = {str(entry["item_id"]): entry for entry in test}
    count = min(_EXAMPLES, len(forecasts))
    examples = []
    for number in range(count):
        forecast = forecasts[int((number + 0.5) * len(forecasts) / count)]
        entry = entries[str(forecast.item_id)]
        start, steps = entry["start"], forecast.prediction_length
        at = (forecast.start_date - start).n // start.freq.n
        target = entry["target"]
        examples.append(
            {
                "item_id": str(forecast.item_id),
                "start": str(forecast.start_date),
                "freq": start.freqstr,
                "history": [_finite(value) for value in target[max(0, at - 2 * steps) : at]],
                "label": [_finite(value) for value in target[at : at + steps]],
                "quantiles": {str(q): [_finite(value) for value in forecast.quantile(q)] for q in _LEVELS},
            }
        )
    return examples


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _versions(spec: TrialSpec) -> dict[str, str]:
    from ..adapters.base import versions
    from ..registry import families

    plugin = {entry.distribution: entry.version for entry in families.describe() if entry.name == spec.family}
    return {**versions(), **plugin, "python": platform.python_version()}


def _device(spec: TrialSpec) -> str:
    if spec.family == BASELINE:
        return "cpu"
    from ..training import resolve_device

    return str(resolve_device(spec.training.device))


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            # Some containers forbid it; then the peak is that of the process.
            return


def _peak_mb(device: str) -> float | None:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
