"""What a study found: the table, the terminal's view of it, and the report as HTML, Markdown and CSV.

All of it is made from the folders of the trials alone. Failed trials are rows; what has not run is said to be missing.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .grid import STUDY, expand, read_study, trial_folder
from .spec import BASELINE, SpecError, StudySpec, TrialResult, TrialSpec, describe_adapter, write_atomically

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["METRICS", "load_results", "print_table", "table", "write_report"]

#: Columns of the table and the scores of :func:`gluonts_peft.backtest` behind them; lower is better in all of them.
METRICS = {
    "MSE": "MSE[0.5]",
    "MAE": "MAE[0.5]",
    "MAPE": "MAPE[0.5]",
    "DTW": "DTW[0.5]",
    "DTW path error": "DTWPathError[0.5]",
    "quantile loss": "mean_weighted_sum_quantile_loss",
}
COVERAGE = "coverage 80 %"
JUDGE = "MAE"

# What the terminal puts around a column.
_GAP = 3

_BETTER, _TIE, _WORSE = "better", "tie", "worse"
_MARKS = {_BETTER: "▲", _TIE: "≈", _WORSE: "▼", "": ""}


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


def table(results: Iterable[TrialResult], expected: Iterable[TrialSpec] = ()) -> pd.DataFrame:
    """Return a row a method, with means and sample standard deviations over seeds.

    Parameters
    ----------
    results
        Results of trials.
    expected
        Trials that should be there; those without a result are counted as missing.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``data`` and ``method``: baselines, ``zero-shot``, adapters, ``full``. Columns: ``trainable
        parameters``, each of :data:`METRICS`, ``coverage 80 %`` (share of labels between the 0.1 and 0.9 quantiles),
        ``seconds`` of training and ``peak memory MB``, each with a column ``... std`` (NaN for a single seed); numbers
        of ``finished``, ``failed`` and ``missing`` trials and of those that ``gate passed``; ``change %``, the mean of
        the relative differences of the MAE to zero-shot with the same seed, and its ``verdict``: ``better`` or
        ``worse`` than zero-shot, or ``tie`` where the mean difference is within one standard deviation over seeds; and
        the ``error`` of the first failed trial. MSE, MAE and DTW have the unit of the data, MAPE is a fraction.
    """
    rows = _rows(list(results), list(expected))
    frame: pd.DataFrame = pd.DataFrame([row.numbers() for row in rows])
    if rows:
        frame.index = pd.MultiIndex.from_tuples([(row.data, row.method) for row in rows], names=["data", "method"])
    return frame


def print_table(results: Iterable[TrialResult], console: Console | None = None) -> None:
    """Print one table for each kind of data, the best value of a column in bold.

    Parameters
    ----------
    results
        Results of trials.
    console
        Where to print; standard output if None.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    results = list(results)
    frame = table(results)
    for data in _data(frame):
        view = _View(_part(frame, data))
        title: Text | None = Text(f"{data} ({_where(results)})")
        for columns in view.chunks(console.width):
            printed = Table(title=title, title_justify="left", box=SIMPLE)
            for j, width in columns.items():
                printed.add_column(view.headers[j], justify="right" if j else "left", width=width)
            for i, row in enumerate(view.cells):
                printed.add_row(*(Text(row[j], style=view.style(i, j)) for j in columns))
            console.print(printed)
            title = None
        console.print(Text(view.legend(), style="dim"))
        for method, error in view.errors.items():
            console.print(Text(f"failed: {method}: {error}", style="red"))


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` (one file, nothing fetched), ``report.md`` and ``report.csv`` of a study.

    Parameters
    ----------
    folder
        Folder of :func:`gluonts_peft.trials.run_study`; the study need not be finished.

    Returns
    -------
    Path
        ``report.html``.

    Raises
    ------
    SpecError
        If the folder holds no study, or a result is damaged.
    """
    folder = Path(folder)
    study = read_study(folder)
    expected = expand(study)
    results = load_results(folder)
    rows = _rows(results, expected)
    frame = table(results, expected)
    write_atomically(folder / "report.csv", frame.to_csv())
    title = f"{study.title} ({_where(expected)})"
    write_atomically(folder / "report.md", _markdown(title, frame, results, expected))
    path = folder / "report.html"
    write_atomically(path, _html(title, study, folder, frame, rows, results, expected))
    return path


@dataclass
class _Row:
    """The trials of one method on one kind of data."""

    data: str
    method: str
    expected: int = 0
    results: list[TrialResult] = field(default_factory=list)
    zero_shot: dict[int, float] = field(default_factory=dict)

    @property
    def finished(self) -> list[TrialResult]:
        return [result for result in self.results if result.status == "finished"]

    @property
    def failed(self) -> list[TrialResult]:
        return [result for result in self.results if result.status == "failed"]

    def _column(self, read: Callable[[TrialResult], float | None], name: str) -> dict[str, float]:
        values = np.array([_nan(read(result)) for result in self.finished])
        mean = float(values.mean()) if len(values) else math.nan
        std = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        return {name: mean, f"{name} std": std}

    def changes(self) -> list[float]:
        """Differences of the MAE to zero-shot of the same seed, or for a baseline to zero-shot of each seed."""
        found = []
        for result in self.finished:
            score = _nan(result.scores.get(METRICS[JUDGE]))
            seeds = list(self.zero_shot) if result.spec.family == BASELINE else [result.spec.seed]
            found += [score - self.zero_shot[seed] for seed in seeds if seed in self.zero_shot]
        return [change for change in found if math.isfinite(change)]

    def verdict(self) -> tuple[float, str]:
        """Return the mean change in per cent of zero-shot, and whether it is better, worse or a tie."""
        changes = self.changes()
        if self.method.startswith(_ZERO_SHOT) or not changes:
            return math.nan, ""
        mean = float(np.mean(changes))
        spread = float(np.std(changes, ddof=1)) if len(changes) > 1 else 0.0
        percent = 100 * mean / float(np.mean(list(self.zero_shot.values())))
        return percent, _TIE if abs(mean) <= spread else _BETTER if mean < 0 else _WORSE

    def numbers(self) -> dict[str, Any]:
        parameters = [
            result.trainable_parameters for result in self.finished if result.trainable_parameters is not None
        ]
        gates = [result.gate for result in self.finished if result.gate is not None]
        change, verdict = self.verdict()
        numbers: dict[str, Any] = {"trainable parameters": parameters[0] if parameters else math.nan}
        for name, metric in METRICS.items():
            numbers |= self._column(lambda result, metric=metric: result.scores.get(metric), name)  # type: ignore[misc]
        numbers |= self._column(_coverage, COVERAGE)
        numbers |= self._column(lambda result: result.seconds, "seconds")
        numbers |= self._column(lambda result: result.peak_memory_mb, "peak memory MB")
        return numbers | {
            "finished": len(self.finished),
            "failed": len(self.failed),
            "missing": max(0, self.expected - len(self.results)),
            "gate passed": sum(bool(gate["passed"]) for gate in gates) if gates else math.nan,
            "change %": change,
            "verdict": verdict,
            "error": self.failed[0].error if self.failed else "",
        }


_ZERO_SHOT = "zero-shot"
_BASELINES = {"seasonal_naive": "seasonal naive", "last_value": "last value"}


def _rows(results: list[TrialResult], expected: list[TrialSpec]) -> list[_Row]:
    """Group trials into rows; a label says what differs between the trials and nothing else."""
    trials = list({trial.hash(): trial for trial in (*expected, *(result.spec for result in results))}.values())
    forms = {trial.hash(): _flat(trial.normal_form()) for trial in trials}
    models = [forms[trial.hash()] for trial in trials if trial.family != BASELINE]
    tuned = [form for form in models if form["adapter"] != "none"]
    data_paths = _varying(list(forms.values()), lambda path: path.startswith("data.") or path in _LENGTHS)
    data_paths.sort(key=lambda path: path != "data.vital")
    model_paths = _varying(models, lambda path: path.split(".")[0] in _MODEL_PATHS)
    training_paths = _varying(tuned, lambda path: path.startswith("training."))

    rows: dict[tuple[str, str], _Row] = {}
    zero_shot: dict[tuple[str, str], dict[int, float]] = {}
    label_of = {}
    for trial in trials:
        form = forms[trial.hash()]
        data = _describe(form, data_paths, plain="data.vital") or trial.data.vital or "all series"
        model = "" if trial.family == BASELINE else _describe(form, model_paths)
        if trial.family == BASELINE:
            method = _BASELINES[trial.checkpoint]
        elif trial.adapter == "none":
            method = ", ".join(filter(None, [_ZERO_SHOT, model]))
        else:
            adapter = describe_adapter(trial.adapter)
            method = ", ".join(filter(None, [adapter, model, _describe(form, training_paths)]))
        label_of[trial.hash()] = (data, method, model)
        rows.setdefault((data, method), _Row(data, method))
    for trial in expected:
        data, method, _ = label_of[trial.hash()]
        rows[data, method].expected += 1
    for result in results:
        data, method, model = label_of[result.spec.hash()]
        rows[data, method].results.append(result)
        if result.spec.adapter == "none" and result.spec.family != BASELINE and result.status == "finished":
            score = _nan(result.scores.get(METRICS[JUDGE]))
            zero_shot.setdefault((data, model), {})[result.spec.seed] = score
    for trial in trials:
        data, method, model = label_of[trial.hash()]
        rows[data, method].zero_shot = zero_shot.get((data, model), {})

    order = list(dict.fromkeys(data for data, _ in rows))
    return sorted(rows.values(), key=lambda row: (order.index(row.data), _rank(row.method)))


_LENGTHS = ("prediction_length", "context_length")
_MODEL_PATHS = ("family", "checkpoint", "backbone_options")


def _rank(method: str) -> int:
    """Baselines, zero-shot, adapters, full tuning; each in the study's order."""
    if method in _BASELINES.values():
        return 0
    name = method.split(", ")[0]
    return 1 if name == _ZERO_SHOT else 3 if name == "full" else 2


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
    return ", ".join(
        str(form.get(path)) if path == plain else f"{path.rpartition('.')[2]}={form.get(path)}" for path in paths
    )


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _coverage(result: TrialResult) -> float | None:
    low, high = result.scores.get("coverage[0.1]"), result.scores.get("coverage[0.9]")
    # Of a point forecast both quantiles are the same; it has no interval.
    return None if low is None or high is None or result.spec.family == BASELINE else high - low


def _where(trials: Iterable[TrialResult | TrialSpec]) -> str:
    """Say whether the data are simulated."""
    specs = [trial if isinstance(trial, TrialSpec) else trial.spec for trial in trials]
    sources = sorted({spec.data.source for spec in specs})
    if sources == ["simulated"]:
        return "simulated data"
    names = sorted({Path(spec.data.path).name for spec in specs if spec.data.path})
    return "data: " + ", ".join([*names, *(["simulated"] if "simulated" in sources else [])])


class _View:
    """The rows of one kind of data as text."""

    COLUMNS = (*METRICS, COVERAGE, "seconds", "peak memory MB")
    HEADERS = ("MSE", "MAE", "MAPE %", "DTW distance", "DTW path error", "quantile loss", "within 80 %", "s", "MB")

    def __init__(self, frame: pd.DataFrame) -> None:
        self.headers = ["method", "parameters", *self.HEADERS, "vs zero-shot", "gate"]
        self.verdicts = [str(verdict) for verdict in frame["verdict"]]
        self.errors = {method: row["error"] for method, row in frame.iterrows() if row["error"]}
        scaled = {name: (100.0 if name in ("MAPE", COVERAGE) else 1.0) for name in self.COLUMNS}
        columns = []
        for name in self.COLUMNS:
            mean, std = frame[name] * scaled[name], frame[f"{name} std"] * scaled[name]
            columns.append([_pair(m, s, _decimals(mean)) for m, s in zip(mean, std, strict=True)])
        self.cells = []
        for i, (method, row) in enumerate(frame.iterrows()):
            parameters = row["trainable parameters"]
            state = "".join(f" ({row[key]:.0f} {key})" for key in ("failed", "missing") if row[key])
            change = "" if math.isnan(row["change %"]) else f"{row['change %']:+.1f} % {_MARKS[row['verdict']]}"
            gate = "–" if math.isnan(row["gate passed"]) else f"{row['gate passed']:.0f}/{row['finished']:.0f}"
            self.cells.append(
                [
                    f"{method}{state}",
                    "–" if math.isnan(parameters) else f"{parameters:,.0f}",
                    *(column[i] for column in columns),
                    change,
                    gate,
                ]
            )
        self.best = set()
        for j, name in enumerate((*METRICS, COVERAGE), start=2):
            distance = (frame[name] - 0.8).abs() if name == COVERAGE else frame[name]
            if distance.notna().any():
                self.best |= {(i, j) for i, value in enumerate(distance) if value == distance.min()}

    def style(self, i: int, j: int) -> str:
        """Return how the terminal shows a cell."""
        judged = j == self.headers.index("vs zero-shot")
        colour = {_BETTER: "green", _WORSE: "red"}.get(self.verdicts[i], "") if judged else ""
        return "bold" if (i, j) in self.best else colour

    def chunks(self, width: int) -> list[dict[int, int]]:
        """Return columns and their widths, as many at a time as fit side by side; the method is always there."""
        width -= 1
        texts = [[header, *(row[j] for row in self.cells)] for j, header in enumerate(self.headers)]
        whole = [max(map(len, column)) for column in texts]
        # A cell may break between its words only, and a method's name, which is what one looks for, nowhere.
        least = [max(len(word) for text in column for word in text.split() or [""]) for column in texts]
        least[0] = whole[0]
        chunks: list[dict[int, int]] = []
        for j in range(1, len(texts)):
            if not chunks or sum(chunks[-1].values()) + least[j] + _GAP * (len(chunks[-1]) + 1) > width:
                chunks.append({0: least[0]})
            chunks[-1][j] = least[j]
        for chunk in chunks:
            for j in chunk:
                room = width - sum(chunk.values()) - _GAP * len(chunk)
                if whole[j] - chunk[j] <= room:
                    chunk[j] = whole[j]
        return chunks

    @staticmethod
    def legend() -> str:
        """Explain the signs."""
        return (
            "Mean ± standard deviation over seeds, on the same test windows; bold: best of the column. Within 80 %:"
            " share of labels, in per cent, between the 0.1 and 0.9 quantiles. Vs zero-shot: change of MAE, ▲ better,"
            " ▼ worse, ≈ within one standard deviation over seeds. Gate: trials in which tuning beat zero-shot on the"
            " validation windows."
        )


def _decimals(values: pd.Series) -> int:
    """Return how many decimals show four digits of a typical value."""
    typical = float(values.abs().dropna().median()) if values.notna().any() else math.nan
    if not math.isfinite(typical) or typical == 0:
        return 0
    return max(0, 3 - math.floor(math.log10(typical)))


def _pair(mean: float, std: float, decimals: int) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.{decimals}f}" + ("" if math.isnan(std) else f" ±{std:.{decimals}f}")


def _sentences(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Return a verdict on each method, (method, sentence), about MAE alone."""
    found = []
    zero_shot = [method for method in frame.index if method.startswith(_ZERO_SHOT)]
    decimals = _decimals(frame[JUDGE])
    for method, row in frame.iterrows():
        score = f"MAE {_pair(row[JUDGE], row[f'{JUDGE} std'], decimals)}"
        seeds = f"{row['finished']:.0f} seed{'s' if row['finished'] != 1 else ''}"
        change = f"{abs(row['change %']):.1f} %"
        if not row["finished"]:
            sentence = "no trial has finished" + (f"; the first error: {row['error']}" if row["error"] else "") + "."
        elif method in zero_shot:
            sentence = f"{score}; what the others are measured against."
        elif not row["verdict"]:
            sentence = f"{score}; zero-shot has not run, so nothing can be said."
        elif row["verdict"] == _TIE:
            sentence = f"{score}: no different from zero-shot, {change} is within one standard deviation over {seeds}."
        else:
            direction = "better" if row["verdict"] == _BETTER else "worse"
            sentence = f"{score}: {change} {direction} than zero-shot ({seeds})."
            if row["finished"] == 1 and method not in _BASELINES.values():
                sentence += " One seed cannot tell this from luck."
        if not math.isnan(row["gate passed"]) and row["gate passed"] < row["finished"]:
            sentence += (
                f" The gate would have returned zero-shot in {row['finished'] - row['gate passed']:.0f} of"
                f" {row['finished']:.0f}."
            )
        if row["failed"] and row["finished"]:
            sentence += f" {row['failed']:.0f} failed: {row['error']}."
        if row["missing"]:
            sentence += f" {row['missing']:.0f} missing."
        found.append((str(method), sentence))
    return found


def _notes(results: list[TrialResult], expected: list[TrialSpec]) -> list[str]:
    """Return what must be known to read the numbers."""
    finished = [result for result in results if result.status == "finished"]
    notes = [
        f"{len(finished)} of {len(expected)} trials have finished, {len(results) - len(finished)} have failed, "
        f"{len(expected) - len(results)} are missing."
    ]
    mixed: dict[str, set[str]] = {}
    for result in finished:
        if result.base:
            mixed.setdefault(f"weights of {result.base['checkpoint']}", set()).add(str(result.base["fingerprint"]))
        for name, version in result.versions.items():
            mixed.setdefault(name, set()).add(version)
    if differing := [name for name, found in mixed.items() if len(found) > 1]:
        notes.append(f"Caution: the trials were not run with the same {', '.join(differing)}; see the end.")
    if any(trial.data.source == "simulated" for trial in expected):
        notes.append(
            "The data are simulated: no patient ever had these values, and nothing clinical follows from them."
        )
    if any(trial.data.group == "patient" for trial in expected):
        notes.append("Training, validation and test windows are of different patients.")
    counts = sorted(
        {
            f"{result.spec.data.vital or 'all series'}: {result.counts.get('windows')} windows of"
            f" {result.counts.get('series')} series"
            + "".join(
                f", {count} {reason.removeprefix('skipped_').replace('_', ' ')} left out"
                for reason, count in result.counts.items()
                if reason.startswith("skipped_") and count
            )
            for result in finished
        }
    )
    if counts:
        notes.append(f"Scored: {'; '.join(counts)}.")
    notes.append(
        "± is the spread over seeds on the same test windows: how much the luck of training matters, not what other"
        " series would give. All scores are of the tuned model, whatever the gate said; s is the time of training"
        " alone, MB the peak memory of the whole process (on a GPU: of torch), what earlier trials left included."
    )
    return notes


def _markdown(title: str, frame: pd.DataFrame, results: list[TrialResult], expected: list[TrialSpec]) -> str:
    lines = [f"# {title}", "", *(f"- {note}" for note in _notes(results, expected))]
    for data in _data(frame):
        view = _View(_part(frame, data))
        lines += ["", f"## {data}", "", "| " + " | ".join(view.headers) + " |", "|---" + "|--:" * 12 + "|"]
        for i, row in enumerate(view.cells):
            cells = [text.replace("|", "\\|") for text in row]
            cells = [f"**{text}**" if (i, j) in view.best else text for j, text in enumerate(cells)]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [
            "",
            view.legend(),
            "",
            *(f"- **{method}**: {text}" for method, text in _sentences(_part(frame, data))),
        ]
    return "\n".join(lines) + "\n"


def _part(frame: pd.DataFrame, data: str) -> pd.DataFrame:
    part: Any = frame.xs(data, level="data")
    assert isinstance(part, pd.DataFrame)
    return part


def _data(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame.index.get_level_values("data"))) if len(frame) else []


_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #59636e; --line: #d1d9e0; --page: #ffffff; --head: #f6f8fa;
  --better: #1a7f37; --worse: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117;
  --head: #151b23; --better: #3fb950; --worse: #f85149; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.5rem; } h2, h3 { line-height: 1.25; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--head); font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
td.best { font-weight: 700; } td.better { color: var(--better); } td.worse { color: var(--worse); }
tr.failed td { color: var(--soft); }
p.note, figcaption, .notes { color: var(--soft); font-size: 0.9rem; }
figure { margin: 1rem 0; } img { display: block; max-width: none; height: auto; }
pre { overflow-x: auto; padding: 0.75rem; background: var(--head); font-size: 0.8rem; }
code { overflow-wrap: anywhere; }
"""


def _html(
    title: str,
    study: StudySpec,
    folder: Path,
    frame: pd.DataFrame,
    rows: list[_Row],
    results: list[TrialResult],
    expected: list[TrialSpec],
) -> str:
    text = html.escape
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{text(title)}</h1>",
        '<ul class="notes">' + "".join(f"<li>{text(note)}</li>" for note in _notes(results, expected)) + "</ul>",
    ]
    for data in _data(frame):
        part, own = _part(frame, data), [row for row in rows if row.data == data]
        parts += [f"<h2>{text(data)}</h2>", _html_table(_View(part))]
        parts.append(f'<p class="note">{text(_View.legend())}</p>')
        sentences = _sentences(part)
        parts.append(f"<h3>What it says</h3><p>{text(_summary(part))}</p><ul>")
        parts += [f"<li><b>{text(method)}</b>: {text(sentence)}</li>" for method, sentence in sentences]
        parts.append("</ul>")
        if part["trainable parameters"].gt(0).any() and part[JUDGE].notna().any():
            parts.append(
                _html_figure(
                    lambda theme, part=part: _draw_parameters(part, theme),  # type: ignore[misc]
                    f"MAE on {data} against the number of trainable parameters; bars are one standard deviation over"
                    " seeds.",
                )
            )
        shown = _shown(own, folder)
        if shown:
            parts.append("<h3>Forecasts</h3>")
            parts.append(
                _html_figure(
                    lambda theme, shown=shown: _draw_forecasts(shown, theme),  # type: ignore[misc]
                    f"Test windows of {data}, evenly spaced, not chosen by their scores: what was observed (grey, then"
                    " black or white), the median (blue), and the interval from the 0.1 to the 0.9 quantile. Outliers"
                    " may lie outside the axes.",
                )
            )
    parts += [*_html_appendix(study, results, expected), "</body></html>"]
    return "\n".join(parts) + "\n"


def _summary(frame: pd.DataFrame) -> str:
    adapters = frame[[_rank(method) >= 2 for method in frame.index]]
    counts = adapters["verdict"].value_counts()
    return (
        f"Of {len(adapters)} ways to tune, {counts.get(_BETTER, 0)} are better than zero-shot in MAE,"
        f" {counts.get(_TIE, 0)} no different and {counts.get(_WORSE, 0)} worse;"
        f" {counts.get('', 0)} cannot be judged."
    )


def _html_table(view: _View) -> str:
    head = "".join(f"<th>{html.escape(header)}</th>" for header in view.headers)
    lines = [f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>']
    for i, row in enumerate(view.cells):
        cells = []
        for j, cell in enumerate(row):
            judged = view.verdicts[i] if j == len(row) - 2 else ""
            names = " ".join(filter(None, ["best" if (i, j) in view.best else "", judged]))
            cells.append(f'<td class="{names}">{html.escape(cell)}</td>' if names else f"<td>{html.escape(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _html_appendix(study: StudySpec, results: list[TrialResult], expected: list[TrialSpec]) -> list[str]:
    import yaml

    text = html.escape
    by_hash = {result.spec.hash(): result for result in results}
    lines = ["<h2>Exactly</h2>", "<details><summary>Every trial</summary>"]
    headers = ("trial", "status", "MAE", "validation loss: zero-shot", "tuned", "rate", "epochs", "s in all", "hash")
    lines.append('<div class="scroll"><table><tr>' + "".join(f"<th>{name}</th>" for name in headers) + "</tr>")
    for trial in expected:
        result = by_hash.get(trial.hash())
        cells = [trial.name(), "missing" if result is None else result.status]
        if result is not None:
            gate = result.gate or {}
            score = result.scores.get(METRICS[JUDGE])
            numbers = [score, gate.get("zero_shot"), gate.get("tuned"), result.learning_rate, result.epochs]
            cells += ["–" if number is None else f"{number:.6g}" for number in [*numbers, result.seconds_total]]
        else:
            cells += ["–"] * 6
        lines.append("<tr>" + "".join(f"<td>{text(str(cell))}</td>" for cell in [*cells, trial.hash()]) + "</tr>")
    lines.append("</table></div></details>")
    failures = [f"<li><b>{text(r.spec.name())}</b>: {text(r.error or '')}</li>" for r in results if r.error]
    if failures:
        lines += ["<h3>Failed trials</h3><ul>", *failures, "</ul>"]
    missing = [f"<li>{text(trial.name())}</li>" for trial in expected if trial.hash() not in by_hash]
    if missing:
        lines += ["<h3>Missing: not run yet</h3><ul>", *missing, "</ul>"]
    facts = [
        ("base weights", {f"{r.base['checkpoint']}: {r.base['fingerprint']}" for r in results if r.base}),
        ("data", {f"{r.spec.data.vital or 'all series'}: {r.data_fingerprint}" for r in results if r.data_fingerprint}),
        ("versions", {f"{name} {version}" for r in results for name, version in r.versions.items()}),
        ("devices", {r.device for r in results if r.device}),
    ]
    lines.append("<h3>Fingerprints and versions</h3><ul>")
    lines += [f"<li>{name}: <code>{text('; '.join(sorted(found)))}</code></li>" for name, found in facts if found]
    dumped = yaml.safe_dump(study.normal_form(), sort_keys=False, default_flow_style=None, width=110)
    lines += ["</ul>", f"<details><summary>The study</summary><pre>{text(dumped)}</pre></details>"]
    specs = [trial.normal_form() for trial in expected]
    dumped = "\n".join(json.dumps(spec) for spec in specs)
    lines.append(f"<details><summary>All specs in their normal form</summary><pre>{text(dumped)}</pre></details>")
    return lines


@dataclass(frozen=True)
class _Theme:
    text: str
    accent: str
    line: str


_LIGHT = _Theme(text="#1f2328", accent="#0969da", line="#9aa4af")
_DARK = _Theme(text="#e6edf3", accent="#58a6ff", line="#656c76")


def _html_figure(draw: Callable[[_Theme], Any], caption: str) -> str:
    light, dark = (_svg(draw(theme)) for theme in (_LIGHT, _DARK))
    return (
        '<figure><div class="scroll"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}"><img src="{light}" alt="{html.escape(caption)}">'
        f"</picture></div><figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _svg(figure: Any) -> str:
    import matplotlib

    file = io.BytesIO()
    # Text as text is a tenth of the size; the fixed salt makes equal figures equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gluonts-peft"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _figure(theme: _Theme, rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.patch.set_alpha(0)
        axis.tick_params(colors=theme.text, labelsize=8)
        for name, spine in axis.spines.items():
            spine.set_color(theme.line)
            spine.set_visible(name in ("left", "bottom"))
    return figure, axes


def _draw_parameters(frame: pd.DataFrame, theme: _Theme) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, axes = _figure(theme, 1, 1, 8.0, 4.5)
    axis = axes[0, 0]
    tuned = frame[frame["trainable parameters"].gt(0) & frame[JUDGE].notna()]
    x, y = tuned["trainable parameters"].to_numpy(float), tuned[JUDGE].to_numpy(float)
    axis.set_xscale("log")
    axis.set_xlim(x.min() / 2.5, x.max() * 4)
    axis.errorbar(x, y, yerr=tuned[f"{JUDGE} std"].fillna(0.0), fmt="o", color=theme.accent, ecolor=theme.line, ms=5)
    zero_shot = frame[[str(method).startswith(_ZERO_SHOT) for method in frame.index]]
    for method, row in zero_shot[zero_shot[JUDGE].notna()].iterrows():
        axis.axhline(row[JUDGE], color=theme.text, lw=1, ls="--")
        axis.annotate(
            str(method), (0.995, row[JUDGE]), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right",
            textcoords="offset points", fontsize=8, color=theme.text,
        )  # fmt: skip
    axis.set_xlabel("trainable parameters", color=theme.text, fontsize=9)
    axis.set_ylabel(JUDGE, color=theme.text, fontsize=9)
    FigureCanvasAgg(figure)
    _label_points(axis, list(map(str, tuned.index)), x, y, theme)
    return figure


def _label_points(axis: Any, names: list[str], x: Any, y: Any, theme: _Theme) -> None:
    """Write each name beside its point, where it hides neither a point nor another name, if there is such a place."""
    figure = axis.figure
    figure.draw_without_rendering()
    points = axis.transData.transform(np.column_stack([x, y]))
    taken: list[Any] = []
    places = [
        (dx * reach, dy * reach, side)
        for reach in (1, 2, 3.5)
        for dx, dy, side in ((6, 0, "left"), (-6, 0, "right"), (0, 8, "center"), (0, -8, "center"),
                             (6, 7, "left"), (6, -7, "left"), (-6, 7, "right"), (-6, -7, "right"))
    ]  # fmt: skip
    for name, a, b in sorted(zip(names, x, y, strict=True), key=lambda point: point[1]):
        best: tuple[int, Any] | None = None
        for dx, dy, side in places:
            note = axis.annotate(
                name, (a, b), xytext=(dx, dy), textcoords="offset points", ha=side, va="center", fontsize=8,
                color=theme.text,
            )  # fmt: skip
            box = note.get_window_extent()
            hidden = sum(box.overlaps(other) for other in taken) + sum(box.padded(2).contains(*p) for p in points)
            if best is None or hidden < best[0]:
                if best is not None:
                    best[1].remove()
                best = (hidden, note)
            else:
                note.remove()
            if hidden == 0:
                break
        if best is not None:
            taken.append(best[1].get_window_extent())


def _shown(rows: list[_Row], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return example forecasts of zero-shot, the best adapter, LoRA and full tuning, as far as they have run."""
    from .run import EXAMPLES

    tuned = [row for row in rows if _rank(row.method) >= 2 and row.finished]
    adapters = sorted((row for row in tuned if _rank(row.method) == 2), key=lambda row: row.numbers()[JUDGE])
    chosen = [row for row in rows if row.method.startswith(_ZERO_SHOT) and row.finished][:1] + adapters[:1]
    chosen += [row for row in tuned if row.method in ("lora", "full")]
    shown = {}
    for row in chosen:
        result = row.finished[0]
        path = trial_folder(folder, result.spec) / EXAMPLES
        if path.is_file():
            shown[row.method] = json.loads(path.read_text(encoding="utf-8"))
    return shown


def _draw_forecasts(shown: Mapping[str, list[dict[str, Any]]], theme: _Theme) -> Any:
    count = min(len(examples) for examples in shown.values())
    figure, axes = _figure(theme, count, len(shown), 2.7, 1.9, sharey="row", sharex=True)
    for column, (method, examples) in enumerate(shown.items()):
        for row, example in enumerate(examples[:count]):
            axis = axes[row, column]
            hours, unit = _step(example["freq"])
            history, label = (np.array(example[part], dtype=float) for part in ("history", "label"))
            low, median, high = (np.array(example["quantiles"][q], dtype=float) for q in ("0.1", "0.5", "0.9"))
            before, after = np.arange(-len(history), 0) * hours, np.arange(len(label)) * hours
            axis.fill_between(after, low, high, color=theme.accent, alpha=0.25, lw=0)
            axis.plot(after, median, color=theme.accent, lw=1.5)
            axis.plot(before, history, color=theme.line, lw=0.9)
            axis.plot(after, label, color=theme.text, lw=0.9)
            axis.axvline(0, color=theme.line, lw=0.8)
            if row == 0:
                axis.set_title(method, fontsize=9, color=theme.text)
            if row == count - 1:
                axis.set_xlabel(unit, fontsize=8, color=theme.text)
            if column == 0:
                axis.set_ylabel(example["item_id"], fontsize=8, color=theme.text)
                everything = [e["quantiles"][q] for name in shown for e in [shown[name][row]] for q in ("0.1", "0.9")]
                seen = np.concatenate([history, label])
                reach = np.concatenate([np.nanpercentile(seen, [3, 97]), *map(np.array, everything)]).astype(float)
                bottom, top = float(np.nanmin(reach)), float(np.nanmax(reach))
                margin = 0.08 * (top - bottom) or 1.0
                axis.set_ylim(bottom - margin, top + margin)
    return figure


def _step(freq: str) -> tuple[float, str]:
    """Return the length of a step and its unit."""
    try:
        offset: Any = pd.tseries.frequencies.to_offset(freq)
        return float(pd.Timedelta(offset) / pd.Timedelta(hours=1)), "hours"
    except ValueError:
        return 1.0, "steps"
