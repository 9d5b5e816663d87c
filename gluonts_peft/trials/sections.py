"""What a report says beyond the table of means: tests, ranks, windows that changed, and errors against options."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from ..words import LEAST_CHANGE, LEAST_UNITS, LEVEL
from .baselinespec import BASELINE
from .dataspec import doubt
from .figures import Curve
from .grid import trial_folder
from .identity import read_scores
from .run import WINDOWS
from .spec import TrialSpec, describe_adapter
from .statistics import compare, mean_ranks, p_value, unit_errors
from .tables import (
    ADAPTER,
    BASELINES,
    CLAIMS,
    FULL,
    INTERVAL,
    JUDGE,
    METRICS,
    SCRATCH,
    ZERO_SHOT,
    Row,
    decimals_of,
    judged,
    mean_and_std,
    part_of,
)

__all__ = ["Section", "curves_of", "rank_section", "sections_of", "tests_of"]


def curves_of(rows: list[Row], frame: pd.DataFrame) -> list[Curve]:
    """Return the change against zero-shot, or without one the error, against each number that has three values or more.

    Parameters
    ----------
    rows
        Of one kind of data.
    frame
        Their table, indexed by method.
    """
    found: dict[str, list[tuple[Row, str, dict[str, float]]]] = {}
    for row in rows:
        if row.finished and row.kind in (ADAPTER, FULL, SCRATCH):
            name, numbers = _numbers(row.finished[0].spec)
            name = ", ".join(filter(None, [name, row.model]))
            for option in numbers:
                found.setdefault(option, []).append((row, name, numbers))
    curves = []
    seen: list[set[tuple[str, ...]]] = []
    # A rank comes before what changes with it.
    for option in sorted(found, key=lambda option: (not option.startswith("r of "), option)):
        members = found[option]
        values = {numbers[option] for _, _, numbers in members}
        # What follows from the option makes no line of its own.
        others = [
            other
            for other in dict.fromkeys(other for _, _, numbers in members for other in numbers if other != option)
            if any(
                len({numbers.get(other) for _, _, numbers in members if numbers[option] == value}) > 1
                for value in values
            )
        ]
        partition = {tuple(row.method for row, _, numbers in members if numbers[option] == value) for value in values}
        if len(values) < 3 or partition in seen:
            continue
        seen.append(partition)
        curve = Curve(option, relative=bool(frame.loc[[row.method for row, _, _ in members], "change %"].notna().all()))
        for row, name, numbers in members:
            parts = [f"{other.partition(' of ')[0]}={_plain(numbers[other])}" for other in others if other in numbers]
            point = point_of(frame.loc[row.method], relative=curve.relative)
            curve.lines.setdefault(", ".join([name, *parts]), []).append((numbers[option], *point))
        curves.append(curve)
    return curves


def point_of(row: pd.Series, *, relative: bool) -> tuple[float, float, float]:
    """Return what is drawn of a method, and from where to where its bar reaches.

    That is the change in per cent of zero-shot with its 90 % interval, or the error with one standard deviation over
    seeds to either side. NaN where there is no bar.
    """
    if relative:
        return row["change %"], row["low %"], row["high %"]
    return row[JUDGE], row[JUDGE] - row[f"{JUDGE} std"], row[JUDGE] + row[f"{JUDGE} std"]


def _numbers(spec: TrialSpec) -> tuple[str, dict[str, float]]:
    """Return what is tuned and how, without its numbers, and the numbers."""
    name, numbers = BASELINES.get(spec.checkpoint, "") if spec.family == BASELINE else "", {}
    if isinstance(spec.adapter, dict):
        words = []
        for key, value in spec.adapter.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                numbers[f"{key} of {spec.adapter['name']}"] = float(value)
            elif key != "name":
                words.append(f"{key}={value}")
        name = " ".join([spec.adapter["name"], *words])
    elif spec.family != BASELINE:
        name = describe_adapter(spec.adapter)
        # The tuned model alone has all the weight.
        numbers["ensemble"] = 1.0 if spec.ensemble is None else spec.ensemble
    for limit in ("train_series", "train_steps"):
        value = getattr(spec.data, limit)
        numbers[limit] = math.inf if value is None else float(value)
    return name, numbers


def _plain(value: float) -> str:
    return "all" if math.isinf(value) else f"{value:g}"


@dataclass
class Section:
    """A table with a heading and what must be known to read it.

    ``claims`` has the cells, by row and column, that may be emphasised, and the word of the verdict they belong to.
    """

    title: str
    note: str
    headers: list[str]
    cells: list[list[str]]
    claims: dict[tuple[int, int], str] = field(default_factory=dict)

    def markdown(self) -> list[str]:
        return ["", f"### {self.title}", "", self.note, "", *markdown_table(self.headers, self.cells, self.claims)]

    def html(self) -> str:
        table = html_table(self.headers, self.cells, self.claims)
        return f'<h3>{html.escape(self.title)}</h3><p class="note">{html.escape(self.note)}</p>{table}'


def markdown_table(headers: list[str], cells: list[list[str]], claims: Mapping[tuple[int, int], str]) -> list[str]:
    """Return the lines of a table; claims are bold."""
    lines = ["| " + " | ".join(headers) + " |", "|---" + "|--:" * (len(headers) - 1) + "|"]
    for i, row in enumerate(cells):
        texts = [text.replace("|", "\\|") for text in row]
        lines.append("| " + " | ".join(f"**{t}**" if (i, j) in claims else t for j, t in enumerate(texts)) + " |")
    return lines


def html_table(headers: list[str], cells: list[list[str]], claims: Mapping[tuple[int, int], str]) -> str:
    """Return a table; claims are bold and coloured."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    lines = [f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>']
    for i, row in enumerate(cells):
        names = [f' class="{CLAIMS[claims[i, j]]}"' if (i, j) in claims else "" for j in range(len(row))]
        texts = (f"<td{name}>{html.escape(text)}</td>" for name, text in zip(names, row, strict=True))
        lines.append(f"<tr>{''.join(texts)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def tests_of(rows: list[Row], folder: Path) -> pd.DataFrame:
    """Compare every method with zero-shot and with full tuning, on the trials' own data and on further ones."""
    found = []
    for data in dict.fromkeys(row.data for row in rows):
        own = [row for row in rows if row.data == data]
        for name in ["", *dict.fromkeys(name for row in own for name in row.also())]:
            errors, unit = {}, ""
            for row in own:
                those = [result for result in row.finished if not name or name in result.spec.also]
                unit = those[0].unit(name) if those else unit
                series = unit_errors(those, folder, METRICS[JUDGE], name)
                if len(series):
                    errors[row.method] = series
            for kind in (ZERO_SHOT, FULL):
                references = {row.method: row.references[kind] for row in own if kind in row.references}
                for each in compare(errors, references):
                    test = vars(each) | {"change %": each.change, "low %": each.low, "high %": each.high}
                    where = {"data": data, "scored on": name or data, "against": kind, "unit": unit}
                    score = f"{JUDGE} on {name}" if name else JUDGE
                    sentence = f"{each.verdict}, {each.evidence(score, plural(unit))}"
                    found.append(where | test | {"verdict": each.verdict, "sentence": sentence})
    columns = ["data", "scored on", "against", "method", "reference", "verdict", "change %", "low %", "high %", "units"]
    frame: pd.DataFrame = pd.DataFrame(found, columns=[*columns, "unit", "share_better", "p", "adjusted", "sentence"])
    return frame


def sections_of(data: str, frame: pd.DataFrame, rows: list[Row], tests: pd.DataFrame, folder: Path) -> list[Section]:
    own = [row for row in rows if row.data == data]
    sections = []
    for name in ["", *dict.fromkeys(name for row in own for name in row.also())]:
        part = tests[(tests["data"] == data) & (tests["scored on"] == (name or data))]
        section = _test_section(name, part_of(frame, data), part)
        if section.cells:
            sections.append(section)
    changes = _changed_windows(own, folder)
    return [*sections, changes] if changes is not None else sections


def _test_section(name: str, frame: pd.DataFrame, tests: pd.DataFrame) -> Section:
    column = f"{JUDGE} on {name}" if name else JUDGE
    known = {(test["method"], test["against"]): test for _, test in tests.iterrows()}
    methods = [
        str(method)
        for method, kind in frame["kind"].items()
        if kind == ZERO_SHOT or any((method, against) in known for against in (ZERO_SHOT, FULL))
    ]
    decimals = decimals_of(frame[column])
    cells = []
    for method in methods:
        row = [method]
        for kind in (ZERO_SHOT, FULL):
            test = known.get((method, kind))
            if test is None:
                row += ["–"] * 5
            else:
                row += [*judged(test), f"{100 * test['share_better']:.0f} %", p_value(test["adjusted"])]
        row.append(mean_and_std(float(frame[column][method]), float(frame[f"{column} std"][method]), decimals))
        cells.append(row)
    over = " or ".join(str(count) for count in sorted(set(tests["units"])))
    units = plural(next(iter(tests["unit"]), "series"))
    headers = [f"{JUDGE} change", INTERVAL, f"{units} better", "p"]
    return Section(
        f"Forgetting: error on {name}, which was not trained on" if name else "What the verdicts rest on",
        f"Of {over} test {units}, as said above. {units.capitalize()} better: share with a smaller error"
        " than the reference. p: one-sided, in the direction of the change, with Holm's correction over the column.",
        ["method", "against zero-shot", *headers, "against full tuning", *headers, column],
        cells if len(tests) else [],
        {(i, j + k): row[j] for i, row in enumerate(cells) for j in (1, 6) if row[j] in CLAIMS for k in range(3)},
    )


def footnote(frame: pd.DataFrame) -> str:
    """Say what verdicts and intervals of a table are, and of how many units."""
    known = frame[frame["verdict"] != ""]
    if known.empty:
        return "Without the scores of windows, and zero-shot's beside them, there are no verdicts."
    over, unit = " or ".join(f"{count:.0f}" for count in sorted(set(known["units"]))), known["unit"].iloc[0]
    units = plural(unit)
    folds = max(frame["folds"])
    split = (
        f"Each of the {units} is tested once, in one of {folds:.0f} folds, by models that were not trained on it."
        if folds
        else f"One split into training and test {units} lies under all of it."
    )
    caution = f" {why.capitalize()}: the test takes them to be independent." if (why := doubt(unit)) else ""
    return (
        f"Verdicts and intervals are of {over} test {units}. Errors of windows are averaged within a {unit}, each seed"
        f" alike; the change is that of the mean over {units}. Proven: at most {LEAST_CHANGE:g} %, at least"
        f" {LEAST_UNITS} {units}, and one-sided p below {LEVEL} by flips of the {units}' signs, with Holm's correction"
        " over the methods that are compared with the same reference. Proven worse: above 0 by the same test."
        " Better, not proven: below 0 all the same. No evidence: the rest. Intervals are of the level 90 %, each by"
        f" itself, without the correction. {split}{caution}"
    )


def plural(unit: str) -> str:
    """Return the plural of what was never divided (``TrialResult.units``)."""
    return unit if unit.endswith("s") else f"{unit}s"


def _changed_windows(rows: list[Row], folder: Path) -> Section | None:
    """Return the windows in which the best adapter gains and loses most against zero-shot."""
    adapters = [row for row in rows if row.kind in (ADAPTER, FULL) and row.finished and ZERO_SHOT in row.references]
    if not adapters:
        return None
    best = min(adapters, key=lambda row: row.numbers()[JUDGE])
    zero_shot = next(row for row in rows if row.method == best.references[ZERO_SHOT])

    def errors(row: Row) -> pd.Series:
        paths = [trial_folder(folder, result.spec) / WINDOWS for result in row.finished]
        frames = [
            read_scores(path).set_index(["item_id", "forecast_start"])[METRICS[JUDGE]]
            for path in paths
            if path.is_file()
        ]
        if not frames:
            return pd.Series(dtype=float)
        mean: pd.Series = pd.concat(frames, axis=1).mean(axis=1)
        return mean

    tuned, before = errors(best), errors(zero_shot)
    if not len(tuned) or not len(before):
        return None
    both = pd.DataFrame({"before": before, "tuned": tuned}).dropna()
    both["change"] = both["tuned"] - both["before"]
    both = both.sort_values("change", kind="stable")
    count = min(5, len(both) // 2)
    ends = pd.concat([both[:count], both[len(both) - count :]])
    decimals = decimals_of(both["before"])
    cells = [
        [str(item), str(start), *(f"{row[name]:.{decimals}f}" for name in ("before", "tuned")),
         f"{row['change']:+.{decimals}f}"]
        for (item, start), row in ends.iterrows()
    ]  # fmt: skip
    return Section(
        f"Where {best.method} changed most",
        f"The test windows with the largest gains and losses of MAE against {zero_shot.method}, means over seeds.",
        ["item", "forecast from", f"{JUDGE} {zero_shot.method}", f"{JUDGE} {best.method}", "change"],
        cells,
    )


def rank_section(frame: pd.DataFrame) -> Section:
    ranks = mean_ranks(frame[JUDGE].unstack("data"))
    names = [str(name) for name in ranks.columns]
    return Section(
        "Ranks over data sets",
        f"By {JUDGE}, 1 is best; methods that have a score on all data sets. A mean over so few data sets is no test.",
        ["method", *names],
        [
            [str(method), *(f"{value:g}" for value in row)]
            for method, row in zip(ranks.index, ranks.to_numpy(), strict=True)
        ],
    )
