"""What a study found: the table, the terminal's view of it, and the report as HTML, Markdown and CSV.

All of it is made from the folders of the trials alone. Failed trials are rows; what has not run is said to be missing.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..columns import score_columns
from ..files import write_atomically
from ..words import PROVEN, WORDS
from .dataspec import DataSpec, doubt
from .figures import draw_costs, draw_curve, draw_extremes, draw_forecasts, draw_parameters, html_figure
from .grid import expand, read_study, trial_folder
from .leaderboards import leaderboard_section
from .reading import read_json
from .sections import (
    Section,
    curves_of,
    footnote,
    html_table,
    markdown_table,
    plural,
    point_of,
    rank_section,
    sections_of,
    tests_of,
)
from .spec import TrialResult, TrialSpec
from .statistical import SIMPLER
from .studyspec import StudySpec
from .tables import (
    ADAPTER,
    BASELINES,
    CLAIMS,
    COVERAGE,
    FULL,
    INTERVAL,
    JUDGE,
    METRICS,
    SCRATCH,
    UNTRAINED,
    ZERO_SHOT,
    Row,
    counts_of,
    data_of,
    decimals_of,
    judged,
    load_results,
    mean_and_std,
    part_of,
    rows_of,
    table,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["METRICS", "load_results", "print_table", "table", "write_report"]

# What the terminal puts around a column.
_GAP = 3


def print_table(
    results: Iterable[TrialResult], console: Console | None = None, *, folder: str | Path | None = None
) -> None:
    """Print one table for each kind of data, its verdict before it.

    What is proven, or proven worse, is bold and coloured, and nothing else.

    Parameters
    ----------
    results
        Results of trials.
    console
        Where to print; standard output if None.
    folder
        Of the study: without it there are no verdicts, which need the scores of windows.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    results = list(results)
    rows = rows_of(results, [])
    frame = table(results, tests=None if folder is None else tests_of(rows, Path(folder)))
    for data in data_of(frame):
        view = _View(part_of(frame, data))
        console.print(Text(f"{data}: {_verdict_of(part_of(frame, data))}"))
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
    if board := leaderboard_section(frame, rows):
        printed = Table(*board.headers, title=board.title, title_justify="left", box=SIMPLE)
        for cells in board.cells:
            printed.add_row(*map(Text, cells))
        console.print(printed, Text(board.note, style="dim"))


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` (one file, nothing fetched), ``report.md``, ``report.csv`` and ``tests.csv`` of a study.

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
    rows = rows_of(results, expected)
    tests = tests_of(rows, folder)
    frame = table(results, expected, tests)
    write_atomically(folder / "report.csv", frame.to_csv())
    write_atomically(folder / "tests.csv", tests.to_csv(index=False))
    title = f"{study.title} ({_where(expected)})"
    sections = {data: sections_of(data, frame, rows, tests, folder) for data in data_of(frame)}
    overall = [rank_section(frame)] if len(data_of(frame)) > 1 else []
    overall += [board] if (board := leaderboard_section(frame, rows)) else []
    write_atomically(folder / "report.md", _markdown(title, frame, results, expected, sections, overall))
    path = folder / "report.html"
    write_atomically(path, _html(title, study, folder, frame, rows, results, expected, sections, overall))
    return path


def _where(trials: Iterable[TrialResult | TrialSpec]) -> str:
    """Say where the data are from, and whether anybody ever had them."""
    specs = [trial if isinstance(trial, TrialSpec) else trial.spec for trial in trials]
    sources = {spec.data.source: spec.data for spec in specs}
    made = sorted(name for name, data in sources.items() if data.made)
    if len(made) == len(sources):
        return f"{' and '.join(made)} data"
    names = sorted({_place(spec.data) for spec in specs if not spec.data.made})
    return "data: " + ", ".join([*names, *made])


def _place(data: DataSpec) -> str:
    """Return the name of the file that data are read from, first of all; of the source where there is none."""
    return next((Path(path).name for path in data.paths().values()), data.source)


class _View:
    """The rows of one kind of data as text."""

    COLUMNS = (*METRICS, COVERAGE, "seconds", "peak memory MB")
    ERRORS = (*(column.header or column.name for column in score_columns() if column.shown), "within 80 %")
    HEADERS = ("method", "verdict", f"{JUDGE} change", INTERVAL, *ERRORS, "parameters", "s", "MB", "handed over")

    def __init__(self, frame: pd.DataFrame) -> None:
        self.headers = list(self.HEADERS)
        self.basis = footnote(frame)
        self.errors = {method: row["error"] for method, row in frame.iterrows() if row["error"]}
        scaled = {
            **dict.fromkeys(self.COLUMNS, 1.0),
            **{each.name: each.scale for each in score_columns()},
            COVERAGE: 100.0,
        }
        columns = []
        for name in self.COLUMNS:
            mean, std = frame[name] * scaled[name], frame[f"{name} std"] * scaled[name]
            columns.append([mean_and_std(m, s, decimals_of(mean)) for m, s in zip(mean, std, strict=True)])
        self.cells = []
        self.claims: dict[tuple[int, int], str] = {}
        for i, (method, row) in enumerate(frame.iterrows()):
            parameters = row["trainable parameters"]
            state = "".join(f" ({row[key]:.0f} {key})" for key in ("failed", "missing") if row[key])
            over = "–" if math.isnan(row["handed over"]) else f"{row['handed over']:.0f}/{row['finished']:.0f}"
            self.cells.append(
                [
                    f"{method}{state}",
                    *judged(row),
                    *(column[i] for column in columns[:-2]),
                    "–" if math.isnan(parameters) else f"{parameters:,.0f}",
                    *(column[i] for column in columns[-2:]),
                    over,
                ]
            )
            if row["verdict"] in CLAIMS:
                self.claims |= {(i, j): row["verdict"] for j in (1, 2, 3)}

    def style(self, i: int, j: int) -> str:
        """Return how the terminal shows a cell."""
        word = self.claims.get((i, j))
        return "" if word is None else "bold green" if word == PROVEN else "bold red"

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

    def legend(self) -> str:
        """Explain the columns."""
        return (
            f"Verdict, change and interval are of {JUDGE} against zero-shot. {self.basis} Bold and coloured: proven and"
            " proven worse, nothing else. Errors: mean ± standard deviation over seeds, all windows alike."
            " Within 80 %: share of labels, in per cent, between the 0.1 and"
            " 0.9 quantiles. Handed over: trials whose own verdict, on the validation windows alone, is proven or"
            " better, not proven, so that the tuned model would be returned and not zero-shot. Point forecasts have no"
            " interval; their quantile loss takes the point for all levels."
        )


def _verdict_of(frame: pd.DataFrame) -> str:
    """Return the verdict on one kind of data in a sentence: that of the lowest error, and which the others have."""
    tuned = frame[frame["kind"].isin([ADAPTER, FULL])]
    known = tuned[tuned[JUDGE].notna()]
    if known.empty:
        return "no verdict, for no tuned model has finished."
    method = known[JUDGE].idxmin()
    sentence = f"{method}: {_judgement(known.loc[method])}"
    if len(known) == 1:
        return f"{sentence}."
    counts = known["verdict"].value_counts()
    others = "; ".join(f"{counts.get(word, 0)} {word}" for word in WORDS)
    return f"{sentence}; the lowest error of {len(known)} ways to tune, so its change flatters ({others})."


def _judgement(row: pd.Series) -> str:
    if row["sentence"]:
        return str(row["sentence"])
    if math.isnan(row["change %"]):
        return "no verdict, for there is no zero-shot to compare with"
    return f"no verdict, {JUDGE} {row['change %']:+.2f} % against zero-shot (the scores of its windows are not known)"


def _sentences(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Return what there is to say of each method, (method, sentence)."""
    found = []
    decimals = decimals_of(frame[JUDGE])
    for method, row in frame.iterrows():
        seeds = f"{row['seeds']:.0f} seed{'s' if row['seeds'] != 1 else ''}"
        score = f"{JUDGE} {mean_and_std(row[JUDGE], row[f'{JUDGE} std'], decimals)}"
        if not row["finished"]:
            sentence = "no trial has finished" + (f"; the first error: {row['error']}" if row["error"] else "") + "."
        elif row["kind"] == ZERO_SHOT:
            sentence = f"{score}; what the others are compared with."
        else:
            sentence = f"{_judgement(row)}; {score}, {seeds}."
            if row["seeds"] == 1 and row["kind"] not in UNTRAINED:
                sentence += " One seed cannot tell this training from others."
        if not math.isnan(row["handed over"]) and row["handed over"] < row["finished"]:
            sentence += (
                f" By their own verdicts, on the validation windows, zero-shot would have been handed over in"
                f" {row['finished'] - row['handed over']:.0f} of {row['finished']:.0f}."
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
    notes += dict.fromkeys(trial.data.caution for trial in expected if trial.data.caution)
    for unit in dict.fromkeys(result.unit() for result in finished):
        note = f"Training, validation and test windows are of different {plural(unit)}"
        again = f"; {why}, in several parts" if (why := doubt(unit)) else ""
        notes.append(f"{note}{again}.")
    counts = sorted(
        {
            f"{data}: {found.get('windows')} windows of {found.get('series')} series"
            + "".join(
                f", {count} {reason.removeprefix('skipped_').replace('_', ' ')} left out"
                for reason, count in found.items()
                if reason.startswith("skipped_") and count
            )
            for data, found in counts_of(finished)
        }
    )
    if counts:
        notes.append(f"Scored: {'; '.join(counts)}.")
    unused = sorted(
        {
            f"{count} {part} series of {result.spec.data.label() or 'all series'}"
            for result in finished
            for part in ("training", "validation")
            if (count := result.counts.get(f"{part}_skipped"))
        }
    )
    if unused:
        notes.append(f"Without a window to train or validate on, and left out: {'; '.join(unused)}.")
    notes += _calibrations(finished)
    notes += _simpler(finished)
    if cut := sum(result.stopped is not None for result in finished):
        notes.append(f"Ended by the clock (time_limit), so that a repetition may give other numbers: {cut} trials.")
    notes.append(
        "± is the spread over seeds on the same test windows: how much the luck of training matters, not what other"
        " series would give: that is what the intervals say. All scores are of the tuned model, also where its own"
        " verdict, on the validation windows, would hand over zero-shot; s is the time of training"
        " alone, MB how far the memory of the process rose in a trial above what libraries and data take (on a GPU: the"
        " most that torch had allocated)."
    )
    return notes


def _simpler(finished: list[TrialResult]) -> list[str]:
    """Return how many windows baselines forecast more simply than they were asked to, over all folds."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for result in finished:
        options = ", ".join(f"{name}={value}" for name, value in result.spec.backbone_options.items())
        for reason, how in SIMPLER.items():
            if count := result.counts.get(f"simpler_{reason}"):
                whose = " ".join(filter(None, [BASELINES[result.spec.checkpoint], options and f"({options})"]))
                key = f"{whose} {{}} windows of {result.spec.data.label() or 'all series'}", how
                found.setdefault(key, []).append((count, result.counts["windows"]))
    if not found:
        return []
    each = [
        f"{text.format(f'{sum(count for count, _ in pairs)} of {sum(of for _, of in pairs)}')} {how}"
        for (text, how), pairs in sorted(found.items())
    ]
    return [f"Forecast more simply, as the history or the season allowed no more: {'; '.join(each)}."]


def _calibrations(finished: list[TrialResult]) -> list[str]:
    """Return what calibration did, on the units that it was learnt on."""
    learnt = [(result.spec.name(), result.calibration) for result in finished if result.calibration is not None]
    if not learnt:
        return []
    return ["Calibrated, on units that chose nothing: " + "; ".join(f"{name}: {each}" for name, each in learnt) + "."]


def _markdown(
    title: str,
    frame: pd.DataFrame,
    results: list[TrialResult],
    expected: list[TrialSpec],
    sections: Mapping[str, list[Section]],
    overall: list[Section],
) -> str:
    lines = [f"# {title}", ""]
    lines += [f"**{data}**: {_verdict_of(part_of(frame, data))}\n" for data in data_of(frame)]
    lines += [f"- {note}" for note in _notes(results, expected)]
    for data in data_of(frame):
        view = _View(part_of(frame, data))
        lines += ["", f"## {data}", "", *markdown_table(view.headers, view.cells, view.claims)]
        lines += [
            "",
            view.legend(),
            "",
            *(f"- {method}: {text}" for method, text in _sentences(part_of(frame, data))),
        ]
        for section in sections[data]:
            lines += section.markdown()
    for section in overall:
        lines += section.markdown()
    return "\n".join(lines) + "\n"


_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #59636e; --line: #d1d9e0; --page: #ffffff; --head: #f6f8fa;
  --proven: #1a7f37; --worse: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117;
  --head: #151b23; --proven: #3fb950; --worse: #f85149; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.5rem; } h2, h3 { line-height: 1.25; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--head); font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
td.proven, td.worse { font-weight: 700; } td.proven { color: var(--proven); } td.worse { color: var(--worse); }
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
    rows: list[Row],
    results: list[TrialResult],
    expected: list[TrialSpec],
    sections: Mapping[str, list[Section]],
    overall: list[Section],
) -> str:
    text = html.escape
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{text(title)}</h1>",
        *(f"<p><b>{text(data)}</b>: {text(_verdict_of(part_of(frame, data)))}</p>" for data in data_of(frame)),
        '<ul class="notes">' + "".join(f"<li>{text(note)}</li>" for note in _notes(results, expected)) + "</ul>",
    ]
    for data in data_of(frame):
        part, own = part_of(frame, data), [row for row in rows if row.data == data]
        view = _View(part)
        table = html_table(view.headers, view.cells, view.claims)
        parts += [f"<h2>{text(data)}</h2>", table, f'<p class="note">{text(view.legend())}</p>', "<ul>"]
        parts += [f"<li>{text(method)}: {text(sentence)}</li>" for method, sentence in _sentences(part)]
        parts.append("</ul>")
        parts += [section.html() for section in sections[data]]
        parts += _html_figures(data, part, own, folder)
    parts += [section.html() for section in overall]
    parts += [*_html_appendix(study, results, expected), "</body></html>"]
    return "\n".join(parts) + "\n"


def _html_figures(data: str, frame: pd.DataFrame, rows: list[Row], folder: Path) -> list[str]:
    parts = []
    trained = frame[frame["trainable parameters"].gt(0) & frame[JUDGE].notna()]
    relative = bool(trained["change %"].notna().all())
    if len(trained):
        points = pd.DataFrame(
            [point_of(row, relative=relative) for _, row in trained.iterrows()],
            columns=["value", "low", "high"],
            index=trained.index,
        )
        points["parameters"] = trained["trainable parameters"]
        points["claimed"] = trained["verdict"].isin(CLAIMS)
        parts.append(
            html_figure(
                lambda theme: draw_parameters(points, JUDGE, theme, relative=relative),
                f"{_drawn(relative)} on {data} against the number of trainable parameters; filled: proven, or proven"
                " worse.",
            )
        )
    for curve in curves_of(rows, frame):
        parts.append(
            html_figure(
                lambda theme, curve=curve: draw_curve(curve, JUDGE, theme),  # type: ignore[misc]
                f"{_drawn(curve.relative)} on {data} against {curve.option}.",
            )
        )
    costs = frame[["seconds", "peak memory MB"]].dropna().set_axis(["seconds of training", "memory, MB"], axis=1)
    costs = costs[(costs > 0).all(axis=1)]
    if len(costs):
        parts.append(
            html_figure(lambda theme: draw_costs(costs, theme), f"What a trial on {data} takes, mean over seeds.")
        )
    shown = _shown(rows, folder)
    if shown:
        spaced = {method: [each for each in examples if each["kind"] == "spaced"] for method, examples in shown.items()}
        parts.append("<h3>Forecasts</h3>")
        parts.append(
            html_figure(
                lambda theme: draw_forecasts(spaced, theme),
                f"Test windows of {data}, evenly spaced, not chosen by their scores: what was observed (grey, then"
                " black or white), the median (blue), and the interval from the 0.1 to the 0.9 quantile. Outliers"
                " may lie outside the axes.",
            )
        )
    extremes = {
        method: [each for each in examples if each["kind"] != "spaced"]
        for method, examples in list(shown.items())[:2]
        if any(each["kind"] != "spaced" for each in examples)
    }
    if extremes:
        parts.append(
            html_figure(
                lambda theme: draw_extremes(extremes, theme),
                f"Each method's own best and worst windows of {data}, by their MAE, of one seed. The best tend to be"
                " those in which nothing happens.",
            )
        )
    return parts


def _drawn(relative: bool) -> str:
    if relative:
        return f"Change of {JUDGE} against zero-shot, with its 90 % interval over test units,"
    return f"{JUDGE}, with one standard deviation over seeds to either side,"


def _html_appendix(study: StudySpec, results: list[TrialResult], expected: list[TrialSpec]) -> list[str]:
    import yaml

    text = html.escape
    by_hash = {result.spec.hash(): result for result in results}
    lines = ["<h2>Exactly</h2>", "<details><summary>Every trial</summary>"]
    headers = [*["trial", "status", "MAE", "validation loss: zero-shot", "tuned", "rate", "epochs", "s in all"]]
    headers += ["verdict on the validation windows", "hash"]
    lines.append('<div class="scroll"><table><tr>' + "".join(f"<th>{name}</th>" for name in headers) + "</tr>")
    for trial in expected:
        result = by_hash.get(trial.hash())
        cells = [trial.name(), "missing" if result is None else result.status]
        if result is not None:
            gate = result.gate or {}
            score = result.scores.get(METRICS[JUDGE])
            numbers = [score, gate.get("zero_shot"), gate.get("tuned"), result.learning_rate, result.epochs]
            cells += ["–" if number is None else f"{number:.6g}" for number in [*numbers, result.seconds_total]]
            cells.append(str(result.verdict) if result.verdict else "–")
        else:
            cells += ["–"] * 7
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
        (
            "data",
            {f"{r.spec.data.label() or 'all series'}: {r.data_fingerprint}" for r in results if r.data_fingerprint},
        ),
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


def _shown(rows: list[Row], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return example forecasts of zero-shot, the best adapter, LoRA, full tuning and the best network trained from
    scratch, as far as they have run."""
    from .run import EXAMPLES

    def best(kind: str) -> list[Row]:
        of_kind = [row for row in rows if row.kind == kind and row.finished]
        return sorted(of_kind, key=lambda row: row.numbers()[JUDGE])[:1]

    chosen = [*best(ZERO_SHOT), *best(ADAPTER), *(row for row in rows if row.method == "lora" and row.finished)]
    shown = {}
    for row in [*chosen, *best(FULL), *best(SCRATCH)]:
        result = row.finished[0]
        path = trial_folder(folder, result.spec) / EXAMPLES
        if path.is_file():
            shown[row.method] = read_json(path)
    return shown
