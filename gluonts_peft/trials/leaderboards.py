"""Methods over data sets: skill score and win rate as the library ``fev`` defines them, and its summary format.

    relative error      error / error of the reference on the same data set, clipped to [0.01, 100]
    skill score         1 - geometric mean of the relative errors; the reference has 0, what is perfect has 0.99
    win rate            mean over the other methods of the share of data sets with a smaller relative error, ties count
                        a half

Intervals are 95 % bootstrap intervals over data sets: the quantiles of the score over data sets drawn with replacement.
They say how much depends on which data sets were taken, not on which units; of that, the verdicts tell.

References
----------
Shchur et al. (2025), fev-bench: a realistic benchmark for time series forecasting, arXiv 2509.26468, and
``fev.leaderboard``, whose numbers these are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..columns import score_columns
from ..files import write_atomically
from ..scores import LEVELS
from .grid import expand, read_study, trial_folder
from .reading import read_json
from .sections import Section
from .spec import TrialResult
from .strict import SpecError
from .tables import BASELINES, JUDGE, ZERO_SHOT, Row, as_float, load_results, pooled, rows_of

__all__ = [
    "FEV_VERSION",
    "LEAST_TASKS",
    "export_fev",
    "fev_summaries",
    "leaderboard",
    "leaderboard_section",
    "reference_of",
]

#: With fewer data sets there is no interval: a bootstrap over so few is far too narrow.
LEAST_TASKS = 10
#: The version of fev whose definitions and format these are.
FEV_VERSION = "0.9.0"

_CLIP = (1e-2, 1e2)
_LEVEL = 0.95
_RESAMPLES, _SEED = 1000, 123
#: Names of fev, and the scores behind them.
_FEV_METRICS = {column.fev: column.score for column in score_columns() if column.fev is not None}

Floats = NDArray[np.float64]


def leaderboard(errors: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Rank methods over data sets.

    Parameters
    ----------
    errors
        A row a method, a column a data set, above or equal to 0; lower is better. Methods that lack a score on one are
        left out.
    reference
        The method that errors are relative to.

    Returns
    -------
    pandas.DataFrame
        Methods, the best win rate first, with ``win rate`` and ``skill score``, each with ``... low`` and
        ``... high``, the 95 % interval, NaN with fewer than :data:`LEAST_TASKS` data sets; and ``data sets``. A method
        without another to win against has the win rate NaN.

    Raises
    ------
    ValueError
        If the reference is not there, or lacks a score.

    Examples
    --------
    >>> errors = pd.DataFrame({"hr": [2.0, 1.0], "map": [4.0, 1.0]}, index=["naive", "tuned"])
    >>> leaderboard(errors, "naive")["skill score"].round(3).to_dict()
    {'tuned': 0.646, 'naive': 0.0}
    """
    known = errors.dropna()
    if reference not in known.index:
        there = "has no score on some data set" if reference in errors.index else "is not there"
        raise ValueError(f"reference {reference!r} {there}; known: {', '.join(map(str, known.index))}")
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = (known / known.loc[reference]).to_numpy(float)
    # Two errors of 0 are equal.
    relative = np.clip(np.nan_to_num(relative, nan=1.0, posinf=math.inf), *_CLIP).T
    columns: dict[str, Any] = {}
    for name, score in (("win rate", _win_rates), ("skill score", _skill_scores)):
        columns[name] = score(relative)
        columns[f"{name} low"], columns[f"{name} high"] = _interval(relative, score)
    frame = pd.DataFrame({**columns, "data sets": len(relative)}, index=known.index)
    ordered: pd.DataFrame = frame.sort_values(["win rate", "skill score"], ascending=False, kind="stable")
    return ordered


def _win_rates(relative: Floats) -> Floats:
    """Return the win rate of each method; errors are ``(data sets, methods[, draws])``."""
    methods = relative.shape[1]
    if methods < 2:
        return np.full(relative.shape[1:], math.nan)
    rates = []
    for method in range(methods):
        others = np.delete(relative, method, axis=1)
        own = relative[:, [method]]
        rates.append(((own < others) + 0.5 * (own == others)).mean(axis=(0, 1)))
    return np.stack(rates)


def _skill_scores(relative: Floats) -> Floats:
    """Return the skill score of each method; errors are ``(data sets, methods[, draws])``."""
    score: Floats = 1.0 - np.exp(np.log(relative).mean(axis=0))
    return score


def _interval(relative: Floats, score: Callable[[Floats], Floats]) -> tuple[Any, Any]:
    count = len(relative)
    if count < LEAST_TASKS:
        return math.nan, math.nan
    # The draws of fev's own default seed, so that the numbers are the same to the last digits.
    drawn = np.random.default_rng(_SEED).integers(0, count, size=(_RESAMPLES, count))
    scores = score(relative[drawn].transpose(1, 2, 0))
    low, high = np.quantile(scores, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=-1)
    return low, high


def reference_of(rows: Iterable[Row]) -> str | None:
    """Return the method to which errors are relative: the seasonal naive one, else zero-shot, that all data sets have;
    None if there is none, or more than one zero-shot."""
    rows = [row for row in rows if row.finished]
    data = {row.data for row in rows}
    naive = [row for row in rows if row.method.startswith(BASELINES["seasonal_naive"])]
    for those in (naive, [row for row in rows if row.kind == ZERO_SHOT]):
        if {row.data for row in those} == data and len({row.method for row in those}) == 1:
            return those[0].method
    return None


def leaderboard_section(frame: pd.DataFrame, rows: Iterable[Row]) -> Section | None:
    """Return skill scores and win rates over the data sets of a table, None with one or without a reference."""
    reference = reference_of(rows)
    if reference is None:
        return None
    errors = frame[JUDGE].unstack("data")
    if errors.shape[1] < 2 or errors.loc[reference].isna().any():
        return None
    board = leaderboard(errors, reference)
    count = errors.shape[1]
    enough = count >= LEAST_TASKS
    cells = []
    for method, row in board.iterrows():
        cell = [str(method)]
        for name in ("skill score", "win rate"):
            interval = f" ({row[f'{name} low']:.3f} to {row[f'{name} high']:.3f})" if enough else ""
            cell.append("–" if math.isnan(row[name]) else f"{row[name]:.3f}{interval}")
        cells.append(cell)
    between = (
        "in brackets the 95 % bootstrap interval over data sets"
        if enough
        else f"{count} data sets are too few for an interval, it takes {LEAST_TASKS}"
    )
    return Section(
        f"Skill and wins over {count} data sets",
        f"By {JUDGE}, as fev defines them: skill score, 1 - geometric mean of the errors relative to {reference}, each"
        f" clipped to [0.01, 100]; win rate, the share of other methods and data sets with a larger error, ties a half;"
        f" {between}. Methods that have a score on all data sets.",
        ["method", "skill score", "win rate"],
        cells,
    )


def fev_summaries(folder: str | Path) -> pd.DataFrame:
    """Return the results of a study as ``fev`` summarises them: a row for each method on each data set.

    Parameters
    ----------
    folder
        Of the study. Methods without a finished trial have no row.

    Returns
    -------
    pandas.DataFrame
        The columns of ``fev.Task.evaluation_summary``: ``model_name``, what defines the task, ``test_error`` (the MAE),
        times, ``num_forecasts``, ``dataset_fingerprint``, ``trained_on_this_dataset``, ``fev_version``, and a column a
        metric. All numbers are means over seeds, after pooling folds; times and forecasts are those of all folds
        together. ``dataset_config`` is what tells the data sets of the study apart. ``trained_on_this_dataset`` says
        whether anything was trained on the training part, of which no test series is a part.
        ``fev`` averages over windows what it has averaged within the first, the second ... windows of all series; here
        all windows are averaged at once. That differs where labels are missing.

    Raises
    ------
    SpecError
        If the folder holds no study, or no trial of it has finished.
    """
    folder = Path(folder)
    rows = [row for row in rows_of(load_results(folder), expand(read_study(folder))) if row.finished]
    if not rows:
        raise SpecError(f"folder '{folder}'", ["no trial has finished; run the study first"])
    tasks: dict[str, dict[str, Any]] = {}
    for row in rows:
        tasks.setdefault(row.data, _task(row.data, [each for each in rows if each.data == row.data], folder))
    return pd.DataFrame([_summary(row, tasks[row.data]) for row in rows])


def export_fev(folder: str | Path, path: str | Path) -> Path:
    """Write :func:`fev_summaries` of a study to a file that ``fev.leaderboard`` and ``fev.pairwise_comparison`` read.

    Parameters
    ----------
    folder
        Of the study.
    path
        The file, ``.csv`` or ``.json``; it is replaced if it is there.

    Raises
    ------
    SpecError
        As :func:`fev_summaries`.
    ValueError
        If the file has another ending.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"path '{path}' must end in .csv or .json, which is what fev reads")
    frame = fev_summaries(folder)
    write_atomically(path, frame.to_csv(index=False) if path.suffix == ".csv" else frame.to_json(orient="records"))
    return path


def _task(data: str, rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """Return what defines a task of fev: the same for all methods on one kind of data."""
    results = [result for row in rows for result in row.finished]
    spec = results[0].spec
    contexts = {result.spec.context_length for result in results}
    horizon, windows = spec.prediction_length, spec.data.windows
    return {
        "dataset_path": next(iter(spec.data.paths().values()), spec.data.source),
        "dataset_config": data,
        "horizon": horizon,
        "num_windows": windows,
        "initial_cutoff": -windows * horizon,
        "window_step_size": horizon,
        "min_context_length": 1,
        "max_context_length": contexts.pop() if len(contexts) == 1 else None,
        "seasonality": spec.data.season or _season(results, folder),
        "eval_metric": JUDGE,
        "extra_metrics": str([name for name in _FEV_METRICS if name != JUDGE]),
        "quantile_levels": str(list(LEVELS)),
        "id_column": "item_id",
        "timestamp_column": "timestamp",
        "target": "target",
        "generate_univariate_targets_from": None,
        "known_dynamic_columns": "[]",
        "past_dynamic_columns": "[]",
        "static_columns": "[]",
        "task_name": data,
    }


def _season(results: Iterable[TrialResult], folder: Path) -> int | None:
    """Return the steps of a season by the frequency of the data, which the examples of forecasts say."""
    from ..series.season import season_length
    from .run import EXAMPLES

    for result in results:
        path = trial_folder(folder, result.spec) / EXAMPLES
        examples = read_json(path) if path.is_file() else []
        if examples:
            return int(season_length(examples[0]["freq"]))
    return None


def _summary(row: Row, task: dict[str, Any]) -> dict[str, Any]:
    finished = row.finished
    scores = {
        name: float(np.mean(pooled((result, as_float(result.scores.get(metric))) for result in finished)))
        for name, metric in _FEV_METRICS.items()
    }
    return {
        "model_name": row.method,
        **task,
        "test_error": scores[JUDGE],
        "training_time_s": _total(finished, lambda result: result.seconds if result.spec.trains else None),
        "inference_time_s": _total(finished, lambda result: result.seconds_forecast),
        "num_forecasts": _total(finished, lambda result: result.counts.get("windows"), whole=True),
        "dataset_fingerprint": _fingerprint(finished),
        "trained_on_this_dataset": any(result.spec.trains for result in finished),
        "fev_version": FEV_VERSION,
        **scores,
    }


def _total(
    results: Iterable[TrialResult], read: Callable[[TrialResult], float | None], whole: bool = False
) -> float | int | None:
    """Return a sum over folds, as a mean over seeds; None if a trial does not say."""
    of: dict[int, float] = {}
    for result in results:
        value = read(result)
        if value is None:
            return None
        of[result.spec.seed] = of.get(result.spec.seed, 0) + value
    mean = sum(of.values()) / len(of)
    return round(mean) if whole else mean


def _fingerprint(results: Iterable[TrialResult]) -> str | None:
    """Return the fingerprint of the data, of all folds together where there are several."""
    found = sorted({result.data_fingerprint for result in results if result.data_fingerprint})
    return found[0] if len(found) == 1 else hashlib.sha256(json.dumps(found).encode()).hexdigest() if found else None
