"""What a report says beyond the table of means: tests, ranks, windows that changed, and errors against options."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .figures import Curve
from .grid import trial_folder
from .identity import read_scores
from .run import WINDOWS
from .spec import BASELINE, TrialSpec, describe_adapter
from .statistics import LEAST, LEVEL, compare, mean_ranks, patient_errors
from .tables import (
    ADAPTER,
    BASELINES,
    BETTER,
    FULL,
    JUDGE,
    MARKS,
    METRICS,
    SCRATCH,
    TOO_FEW,
    WORSE,
    ZERO_SHOT,
    Row,
    decimals_of,
    mean_and_std,
    part_of,
)

__all__ = ["Section", "curves_of", "rank_section", "sections_of", "tests_of"]


def curves_of(rows: list[Row], levels: Mapping[str, float]) -> list[Curve]:
    """Return the error against each number that varies between trials and has three values or more."""
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
        curve = Curve(option, levels=dict(levels))
        for row, name, numbers in members:
            parts = [f"{other.partition(' of ')[0]}={_plain(numbers[other])}" for other in others if other in numbers]
            row_numbers = row.numbers()
            point = (numbers[option], row_numbers[JUDGE], row_numbers[f"{JUDGE} std"])
            curve.lines.setdefault(", ".join([name, *parts]), []).append(point)
        curves.append(curve)
    return curves


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
    """A table with a heading and what must be known to read it."""

    title: str
    note: str
    headers: list[str]
    cells: list[list[str]]

    def markdown(self) -> list[str]:
        lines = ["", f"### {self.title}", "", self.note, "", "| " + " | ".join(self.headers) + " |"]
        lines.append("|---" + "|--:" * (len(self.headers) - 1) + "|")
        return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.cells]

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(header)}</th>" for header in self.headers)
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self.cells)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return (
            f'<h3>{html.escape(self.title)}</h3><p class="note">{html.escape(self.note)}</p><div class="scroll">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )


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
                series = patient_errors(those, folder, METRICS[JUDGE], name)
                if len(series):
                    errors[row.method] = series
            for kind in (ZERO_SHOT, FULL):
                references = {row.method: row.references[kind] for row in own if kind in row.references}
                found += [
                    {
                        "data": data,
                        "scored on": name or data,
                        "against": kind,
                        "unit": unit,
                        **vars(each),
                        "verdict": each.verdict,
                        "note": each.note,
                    }
                    for each in compare(errors, references)
                ]
    columns = ["data", "scored on", "against", "method", "reference", "unit", "units", "differing", "change"]
    frame: pd.DataFrame = pd.DataFrame(
        found, columns=[*columns, "share_better", "ranks", "p", "adjusted", "verdict", "note"]
    )
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
        row = [method, mean_and_std(float(frame[column][method]), float(frame[f"{column} std"][method]), decimals)]
        for kind in (ZERO_SHOT, FULL):
            test = known.get((method, kind))
            if test is None:
                row += ["–", "–", "–"]
            else:
                change = f"{test['change']:+.1f} % {MARKS.get(test['verdict'], '')}".strip()
                change += f" ({test['note']})" if test["note"] and test["verdict"] in (BETTER, WORSE) else ""
                p = TOO_FEW if test["verdict"] == TOO_FEW else _p_value(test["adjusted"])
                row += [change, f"{100 * test['share_better']:.0f} %", p]
        cells.append(row)
    over = " or ".join(str(count) for count in sorted(set(tests["units"])))
    unit = next(iter(tests["unit"]), "patient")
    units = PLURAL[unit]
    caution = " A patient may have several: the test takes them to be independent." if unit == "stay" else ""
    return Section(
        f"Forgetting: error on {name}, which was not trained on" if name else "Is it more than luck?",
        f"Errors of windows are averaged within a {unit} and over seeds; then {over} {units} are compared in pairs"
        " by the Wilcoxon signed-rank test, two-sided, with Holm's correction over the methods of a column."
        f" ▲ better, ▼ worse by ranks, ≈ p of {LEVEL} or more; too few: fewer than {LEAST} {units} whose errors differ."
        f" The change is that of the mean; where a few {units} outweigh the others, it may have the other direction:"
        f" mean and ranks disagree. {units.capitalize()} better: share with a smaller error than the reference."
        f" One split into training and test {units} lies under all of it.{caution}",
        ["method", column, "vs zero-shot", f"{units} better", "p", "vs full tuning", f"{units} better", "p"],
        cells if len(tests) else [],
    )


#: Of what was never divided (``TrialResult.units``).
PLURAL = {"patient": "patients", "stay": "stays", "series": "series"}


def _p_value(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


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
