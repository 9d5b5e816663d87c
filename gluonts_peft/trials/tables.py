"""The rows of a report: the trials of one method on one kind of data, with means over seeds.

A label says what differs between the trials of a study and nothing else.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..columns import score_columns
from ..words import PROVEN, WORSE
from .baselinespec import BASELINE, NAIVE, STATISTICAL
from .grid import STUDY, expand, read_study, trial_folder
from .spec import TrialResult, TrialSpec, describe_adapter
from .strict import SpecError

__all__ = ["COVERAGE", "JUDGE", "KINDS", "METRICS", "Row", "load_results", "rows_of", "table"]

#: Columns of the table and the scores of :func:`gluonts_peft.backtest` behind them; lower is better in all of them.
METRICS = {column.name: column.score for column in score_columns() if column.shown}
COVERAGE = "coverage 80 %"
#: What verdicts are about.
JUDGE = "MAE"
#: Header of the intervals of changes.
INTERVAL = "90 % interval"
#: Words that a table may emphasise, and their class in a page. No interval of such a change holds 0.
CLAIMS = {PROVEN: "proven", WORSE: "worse"}


def load_results(folder: str | Path) -> list[TrialResult]:
    """Read the results of all trials that a folder holds, in the order of its study if it has one.

    Raises
    ------
    SpecError
        If the folder holds neither a study nor trials, or a result is damaged.
    """
    folder = Path(folder)
    if (folder / STUDY).is_file():
        places = [trial_folder(folder, trial) for trial in expand(read_study(folder))]
    else:
        places = sorted(path.parent for path in folder.glob("trials/*/result.json"))
        if not places:
            raise SpecError(f"folder '{folder}'", ["it holds neither a study nor trials; name the folder of a study"])
    return [result for place in places if (result := TrialResult.read(place)) is not None]


def table(
    results: Iterable[TrialResult], expected: Iterable[TrialSpec] = (), tests: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Return a row a method, with means and sample standard deviations over seeds; folds are pooled first.

    Parameters
    ----------
    results
        Results of trials.
    expected
        Trials that should be there; those without a result are counted as missing.
    tests
        Of :func:`gluonts_peft.trials.sections.tests_of`: what the verdicts rest on. Without them, and where the scores
        of windows are not known, there are none.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``data`` and ``method``: naive and statistical baselines, ``zero-shot``, adapters, ``full``, networks
        and trees trained from scratch. Columns: the ``verdict`` on the method against zero-shot, one of
        :data:`gluonts_peft.words.WORDS`, or empty; ``change %``, the change of the mean MAE over units, with its 90 %
        interval, ``low %`` to ``high %``, the number of ``units`` and what a ``unit`` is (without a verdict it is the
        mean change over seeds, and has no interval); each of :data:`METRICS`, ``coverage 80 %`` (share of labels
        between the 0.1 and 0.9 quantiles), ``trainable parameters``, ``seconds`` of training and ``peak memory MB``,
        each but the parameters with a column ``... std``, the standard deviation over seeds (NaN for a single seed);
        numbers of ``finished``, ``failed`` and ``missing`` trials, and of those whose own verdict ``handed over`` the
        tuned model; the ``sentence`` of the verdict; the ``error`` of the first failed trial; ``kind``: what the method
        is; and ``MAE on <name>`` for further data of ``TrialSpec.also``. MSE, MAE and DTW have the unit of the data,
        MAPE is a fraction.
    """
    rows = rows_of(list(results), list(expected))
    frame: pd.DataFrame = pd.DataFrame([row.numbers() for row in rows])
    if rows:
        frame.index = pd.MultiIndex.from_tuples([(row.data, row.method) for row in rows], names=["data", "method"])
    if rows and tests is not None:
        own = tests[(tests["against"] == ZERO_SHOT) & (tests["scored on"] == tests["data"])]
        for _, test in own.iterrows():
            key = (test["data"], test["method"])
            for name in ("verdict", "change %", "low %", "high %", "units", "unit", "sentence"):
                frame.loc[key, name] = test[name]
    return frame


def judged(row: pd.Series) -> list[str]:
    """Return verdict, change and interval of a row as they are printed: the first columns of every table."""
    change, low, high = row["change %"], row["low %"], row["high %"]
    return [
        "–" if pd.isna(row["verdict"]) or not row["verdict"] else row["verdict"],
        "–" if pd.isna(change) else f"{change:+.2f} %",
        "–" if pd.isna(low) else f"{low:+.2f} to {high:+.2f} %",
    ]


NAIVE_KIND, STATISTICAL_KIND, ZERO_SHOT, ADAPTER, FULL, SCRATCH = KINDS = (
    "naive baseline",
    "statistical baseline",
    "zero-shot",
    "adapter",
    "full tuning",
    "trained from scratch",
)
#: Kinds that have no seed.
UNTRAINED = (NAIVE_KIND, STATISTICAL_KIND)


@dataclass
class Row:
    """The trials of one method on one kind of data, and the methods that it is compared with."""

    data: str
    method: str
    kind: str
    model: str
    rest: str
    expected: int = 0
    references: dict[str, str] = field(default_factory=dict)
    results: list[TrialResult] = field(default_factory=list)
    # Of each seed and fold.
    zero_shot: dict[tuple[int, int | None], TrialResult] = field(default_factory=dict)

    @property
    def finished(self) -> list[TrialResult]:
        return [result for result in self.results if result.status == "finished"]

    @property
    def failed(self) -> list[TrialResult]:
        return [result for result in self.results if result.status == "failed"]

    def _column(self, read: Callable[[TrialResult], float | None], name: str) -> dict[str, float]:
        values = np.array(pooled((result, as_float(read(result))) for result in self.finished))
        mean = float(values.mean()) if len(values) else math.nan
        std = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        return {name: mean, f"{name} std": std}

    def change(self) -> float:
        """Return the change of the MAE in per cent of zero-shot, each seed against zero-shot of the same seed."""
        pairs = [
            (before, _judged(result) - _judged(before))
            for (seed, fold), before in self.zero_shot.items()
            for result in self.finished
            if result.spec.data.fold == fold and (self.kind in UNTRAINED or result.spec.seed == seed)
        ]
        found = [change for change in pooled(pairs) if math.isfinite(change)]
        if self.kind == ZERO_SHOT or not found:
            return math.nan
        before = float(np.mean(pooled((each, _judged(each)) for each in self.zero_shot.values())))
        return 100 * float(np.mean(found)) / before

    def numbers(self) -> dict[str, Any]:
        parameters = [
            result.trainable_parameters for result in self.finished if result.trainable_parameters is not None
        ]
        gates = [result.gate for result in self.finished if result.gate is not None]
        numbers: dict[str, Any] = {"verdict": "", "change %": self.change(), "low %": math.nan, "high %": math.nan}
        numbers |= {"units": math.nan, "unit": ""}
        for name, metric in METRICS.items():
            numbers |= self._column(lambda result, metric=metric: result.scores.get(metric), name)  # type: ignore[misc]
        numbers |= self._column(_coverage, COVERAGE)
        numbers["trainable parameters"] = parameters[0] if parameters else math.nan
        numbers |= self._column(lambda result: result.seconds, "seconds")
        numbers |= self._column(lambda result: result.peak_memory_mb, "peak memory MB")
        return numbers | {
            "folds": max((result.spec.data.folds or 0 for result in self.results), default=0),
            "seeds": len({result.spec.seed for result in self.finished}),
            "finished": len(self.finished),
            "failed": len(self.failed),
            "missing": max(0, self.expected - len(self.results)),
            "handed over": sum(bool(gate["passed"]) for gate in gates) if gates else math.nan,
            "sentence": "",
            "error": self.failed[0].error if self.failed else "",
            "kind": self.kind,
            **self._elsewhere(),
        }

    def also(self) -> list[str]:
        """Names of further data."""
        return list(dict.fromkeys(name for result in self.results for name in result.spec.also))

    def _elsewhere(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in self.also():
            metric = f"{name}/{METRICS[JUDGE]}"
            found |= self._column(lambda result, metric=metric: result.scores.get(metric), f"{JUDGE} on {name}")  # type: ignore[misc]
        return found


BASELINES = {
    "seasonal_naive": "seasonal naive",
    "last_value": "last value",
    "auto_ets": "AutoETS",
    "auto_theta": "AutoTheta",
    "lightgbm": "LightGBM",
    "deepar": "DeepAR",
    "patch_tst": "PatchTST",
    "simple_feedforward": "SimpleFeedForward",
    "tft": "TFT",
    "nbeats": "N-BEATS",
    "nhits": "N-HiTS",
}
# Data that only training sees are a part of the method, not of what is forecast.
_LIMITS = ("data.train_series", "data.train_steps")


def rows_of(results: list[TrialResult], expected: list[TrialSpec]) -> list[Row]:
    """Group trials into rows; a label says what differs between the trials and nothing else."""
    trials = list({trial.hash(): trial for trial in (*expected, *(result.spec for result in results))}.values())
    forms = {trial.hash(): _flat(trial.normal_form()) for trial in trials}
    models = [forms[trial.hash()] for trial in trials if trial.family != BASELINE]
    tuned = [form for form in models if form["adapter"] != "none"]
    baselines: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if trial.family == BASELINE:
            baselines.setdefault(trial.checkpoint, []).append(forms[trial.hash()])
    data_paths = _varying(
        list(forms.values()),
        lambda path: (path.startswith("data.") and path not in (*_LIMITS, "data.fold")) or path in _LENGTHS,
    )
    labels = {f"data.{trial.data.label_option}" for trial in trials}
    data_paths.sort(key=lambda path: path not in labels)
    model_paths = _varying(models, lambda path: path.split(".")[0] in _MODEL_PATHS)
    training_paths = _varying(tuned, lambda path: path.startswith("training.") or path in _LIMITS)
    # Each against its own kind: another's options, or its lack of them, say nothing.
    baseline_paths = {
        name: _varying(own, lambda path: path.startswith(("training.", "backbone_options.")) or path in _LIMITS)
        for name, own in baselines.items()
    }

    rows: dict[tuple[str, str], Row] = {}
    row_of: dict[str, Row] = {}
    for trial in trials:
        form = forms[trial.hash()]
        data = (
            _describe(form, data_paths, plain=f"data.{trial.data.label_option}") or trial.data.label() or "all series"
        )
        model, rest = ("" if trial.family == BASELINE else _describe(form, model_paths)), ""
        if trial.family == BASELINE:
            rest = _describe(form, baseline_paths[trial.checkpoint])
            kind = NAIVE_KIND if trial.checkpoint in NAIVE else SCRATCH
            kind = STATISTICAL_KIND if trial.checkpoint in STATISTICAL else kind
            names = [BASELINES[trial.checkpoint], rest]
        elif trial.adapter == "none":
            kind, names = ZERO_SHOT, [ZERO_SHOT, model]
        else:
            rest = _describe(form, training_paths)
            weight = "" if trial.ensemble is None else f"ensemble={trial.ensemble:g}"
            kind = FULL if trial.adapter == "full" and trial.ensemble is None else ADAPTER
            names = [describe_adapter(trial.adapter), model, rest, weight]
        method = ", ".join(filter(None, names))
        row_of[trial.hash()] = rows.setdefault((data, method), Row(data, method, kind, model, rest))
    for trial in expected:
        row_of[trial.hash()].expected += 1
    for result in results:
        row_of[result.spec.hash()].results.append(result)
    for row in rows.values():
        if row.method == BASELINES["seasonal_naive"] and row.finished and all(map(_seasonless, row.finished)):
            row.method = f"{row.method} (no season: last value)"

    order = list(dict.fromkeys(row.data for row in rows.values()))
    found = sorted(rows.values(), key=lambda row: (order.index(row.data), KINDS.index(row.kind)))
    for row in found:
        _refer(row, [other for other in found if other.data == row.data])
    return found


def _seasonless(result: TrialResult) -> bool:
    """Whether no window had a season before it, so that a seasonal naive forecast the last value."""
    return result.counts.get("seasonless_windows") == result.counts.get("windows", 0) > 0


def _refer(row: Row, rows: list[Row]) -> None:
    """Say what a row is compared with: zero-shot, and full tuning, of the same model and data for training."""
    for kind in (ZERO_SHOT, FULL):
        of_kind = [other for other in rows if other.kind == kind]
        same = [other for other in of_kind if other.model == row.model and other.rest in (row.rest, "")]
        chosen = same if len(same) == 1 else [other for other in same if other.rest == row.rest]
        # Baselines have no model of their own: a single one to compare with is the one.
        chosen = chosen or (of_kind if len(of_kind) == 1 else [])
        if len(chosen) == 1 and chosen[0] is not row:
            row.references[kind] = chosen[0].method
        if len(chosen) == 1 and kind == ZERO_SHOT:
            row.zero_shot = {(result.spec.seed, result.spec.data.fold): result for result in chosen[0].finished}


_LENGTHS = ("prediction_length", "context_length")
_MODEL_PATHS = ("family", "checkpoint", "backbone_options")


def _flat(form: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in form.items():
        if isinstance(value, dict) and key in ("training", "data", "backbone_options"):
            flat |= _flat(value, f"{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _varying(forms: list[dict[str, Any]], belongs: Callable[[str], bool]) -> list[str]:
    paths = [path for path in dict.fromkeys(path for form in forms for path in form) if belongs(path)]
    return [path for path in paths if len({json.dumps(form.get(path)) for form in forms}) > 1]


def _describe(form: Mapping[str, Any], paths: Sequence[str], plain: str | None = None) -> str:
    words = []
    for path in paths:
        if path.startswith("backbone_options.") and path not in form:
            # The default of its library.
            continue
        value = "all" if path in _LIMITS and form.get(path) is None else str(form.get(path))
        words.append(value if path == plain else f"{path.rpartition('.')[2]}={value}")
    return ", ".join(words)


def as_float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def pooled(values: Iterable[tuple[TrialResult, float]]) -> list[float]:
    """Return the mean over folds of the values of each seed, folds weighted by their windows."""
    of: dict[int, list[tuple[int, float]]] = {}
    for result, value in values:
        of.setdefault(result.spec.seed, []).append((result.counts.get("windows", 1), value))
    return [
        those[0][1] if len(those) == 1 else math.fsum(w * v for w, v in those) / sum(w for w, _ in those)
        for those in of.values()
    ]


def _judged(result: TrialResult) -> float:
    return as_float(result.scores.get(METRICS[JUDGE]))


def _coverage(result: TrialResult) -> float | None:
    low, high = result.scores.get("coverage[0.1]"), result.scores.get("coverage[0.9]")
    # Of a point forecast both quantiles are the same; it has no interval.
    return None if low is None or high is None or low == high else high - low


def decimals_of(values: pd.Series) -> int:
    """Return how many decimals show four digits of a typical value."""
    typical = float(values.abs().dropna().median()) if values.notna().any() else math.nan
    if not math.isfinite(typical) or typical == 0:
        return 0
    return max(0, 3 - math.floor(math.log10(typical)))


def mean_and_std(mean: float, std: float, decimals: int) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.{decimals}f}" + ("" if math.isnan(std) else f" ±{std:.{decimals}f}")


def counts_of(results: Iterable[TrialResult]) -> list[tuple[str, dict[str, int]]]:
    """Return what each trial counted, the folds of one added up, after the name of its kind of data."""
    of: dict[str, tuple[str, Counter[str]]] = {}
    for result in results:
        form = result.spec.normal_form()
        form["data"].pop("fold", None)
        name = result.spec.data.label() or "all series"
        of.setdefault(json.dumps(form), (name, Counter()))[1].update(result.counts)
    return [(name, dict(counts)) for name, counts in of.values()]


def part_of(frame: pd.DataFrame, data: str) -> pd.DataFrame:
    part: Any = frame.xs(data, level="data")
    assert isinstance(part, pd.DataFrame)
    return part


def data_of(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame.index.get_level_values("data"))) if len(frame) else []
