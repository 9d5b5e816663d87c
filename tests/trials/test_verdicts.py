"""One verdict, in one language: what reports, tables, figures, searches and the command line say of built records."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from gluonts_peft.cli import app
from gluonts_peft.trials import SearchSpec, StudySpec, TrialResult, TrialSpec, print_ranking, print_table, write_report
from gluonts_peft.trials.figures import (
    _LIGHT,
    Curve,
    draw_costs,
    draw_curve,
    draw_extremes,
    draw_forecasts,
    draw_parameters,
)
from gluonts_peft.trials.records import SEARCH, Entry, Journal, not_helped, ranking, trial_folder, verdict_of
from gluonts_peft.verdict import Verdict
from gluonts_peft.words import WORDS

BASE = {"family": "chronos", "checkpoint": "bolt-nano", "prediction_length": 6, "context_length": 24}
BEFORE = np.full(40, 5.0)
ERRORS = {
    "none": BEFORE,
    # 2 % better, on each of 40 patients.
    "lora": BEFORE * 0.98,
    # 5 % better and worse by turns, in the mean 0.25 % better.
    "vera": BEFORE * (1 + np.where(np.arange(40) % 2, 0.05, -0.055)),
    # The same the other way round.
    "dora": BEFORE * (1 + np.where(np.arange(40) % 2, -0.05, 0.055)),
    # 3 % worse, on each.
    "full": BEFORE * 1.03,
}
WORD = {"lora": "proven", "vera": "better, not proven", "dora": "no evidence", "full": "proven worse"}
PROVEN = "proven, MAE -2.00 % against zero-shot (90 % interval -2.00 to -2.00 %, 40 patients)"
WORSE = "proven worse, MAE +3.00 % against zero-shot (90 % interval +3.00 to +3.00 %, 40 patients)"


def result_of(adapter: str, errors: np.ndarray, vital: str = "hr", **changes: Any) -> TrialResult:
    tuned = adapter != "none"
    return TrialResult(
        spec=TrialSpec(**{**BASE, "adapter": adapter, "data": {"vital": vital}}),
        status="finished",
        scores={"MAE[0.5]": errors.mean()},
        gate={"zero_shot": 1.0, "tuned": 0.9, "windows": 3, "passed": True} if tuned else None,
        trainable_parameters=100 * len(adapter) if tuned else 0,
        seconds=1.0,
        peak_memory_mb=500.0,
        **changes,
    )


def write(folder: Path, errors: Mapping[str, np.ndarray], vital: str = "hr", **changes: Any) -> list[TrialResult]:
    """Write finished trials with the errors of 40 patients, a window each."""
    results = []
    for adapter, values in errors.items():
        result = result_of(adapter, values, vital, **(changes if adapter != "none" else {}))
        place = folder / "trials" / result.spec.hash()
        result.write(place)
        items = [f"{number}/{vital}" for number in range(len(values))]
        windows = pd.DataFrame({"item_id": items, "forecast_start": "2024-01-01 00:00", "MAE[0.5]": values})
        windows.to_parquet(place / "windows.parquet")
        results.append(result)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heart rate with every verdict, and mean pressure with LoRA alone."""
    folder = tmp_path_factory.mktemp("study")
    study = StudySpec(base=BASE, grid={"data.vital": ["hr", "map"], "adapter": list(ERRORS)})
    (folder / "study.json").write_text(study.model_dump_json())
    write(folder, ERRORS)
    write(folder, {name: ERRORS[name] for name in ("none", "lora")}, "map")
    write_report(folder)
    return folder


def rows_of_html(content: str) -> list[tuple[list[str], list[str]]]:
    """The classes and the texts of the cells of each row."""
    rows = re.findall(r"<tr>(.*?)</tr>", content)
    cells = [re.findall(r"<t[dh](?: class=\"(\w+)\")?>(.*?)</t[dh]>", row) for row in rows]
    return [([name for name, _ in row], [html.unescape(text) for _, text in row]) for row in cells]


def test_the_verdict_comes_first_one_sentence_for_each_kind_of_data(folder: Path) -> None:
    first = (
        f"lora: {PROVEN}; the lowest error of 4 ways to tune, so its change flatters (1 proven; 1 better, not proven;"
        " 1 no evidence; 1 proven worse)."
    )
    content = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    body = content[content.index("</h1>") + len("</h1>") :].lstrip()
    # Of pressure, nothing else has finished.
    second = f"lora: {PROVEN}."
    assert body.startswith(f"<p><b>hr</b>: {first}</p>\n<p><b>map</b>: {second}</p>\n<ul")
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[2] == f"**hr**: {first}"
    assert lines[4] == f"**map**: {second}"
    # Each method has its own.
    for method, word in WORD.items():
        (said,) = {line for line in lines if line.startswith(f"- {method}: {word}, MAE ")}
        assert f"<li>{said[2:]}</li>" in content
    assert any(line.startswith(f"- lora: {PROVEN}; MAE 4.900, 1 seed.") for line in lines)
    assert any(line.startswith(f"- full: {WORSE}; MAE 5.150, 1 seed.") for line in lines)


def test_change_and_interval_are_the_first_columns_and_what_it_costs_the_last(folder: Path) -> None:
    firsts = ["verdict", "MAE change", "90 % interval"]
    order = ["method", *firsts, "MSE", "MAE", "MAPE %", "DTW distance", "DTW path error", "quantile loss",
             "within 80 %", "parameters", "s", "MB", "handed over"]  # fmt: skip
    rows = rows_of_html((folder / "report.html").read_text(encoding="utf-8"))
    assert rows[0][1] == order
    assert rows[2][1][:4] == ["lora", "proven", "-2.00 %", "-2.00 to -2.00 %"]
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    (header, _) = (line for line in lines if line.startswith("| method | verdict"))
    assert header == f"| {' | '.join(order)} |"
    frame = pd.read_csv(folder / "report.csv")
    assert list(frame.columns[:6]) == ["data", "method", "verdict", "change %", "low %", "high %"]
    tests = pd.read_csv(folder / "tests.csv")
    assert list(tests.columns[5:9]) == ["verdict", "change %", "low %", "high %"]
    printed = Console(file=io.StringIO(), width=300)
    print_table(write(folder, ERRORS), printed, folder=folder)
    text = printed.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith(f"hr: lora: {PROVEN}; ")
    assert re.search(r"\n +method +verdict +MAE change +90 % interval +MSE ", text)


def test_what_holds_0_is_not_emphasised(folder: Path) -> None:
    frame = pd.read_csv(folder / "report.csv").query("data == 'hr'").set_index("method")
    assert frame["verdict"].dropna().to_dict() == WORD
    held = [name for name in WORD if frame.loc[name, "low %"] < 0 < frame.loc[name, "high %"]]
    assert held == ["vera", "dora"]
    assert frame.loc["vera", "change %"] == pytest.approx(-0.25)
    content = (folder / "report.html").read_text(encoding="utf-8")
    seen = set()
    for classes, texts in rows_of_html(content):
        for at, text in enumerate(texts):
            if text in WORDS:
                named = {"proven": "proven", "proven worse": "worse"}.get(text, "")
                assert classes[at : at + 3] == [named] * 3, texts
                seen.add(text)
                if not named:
                    assert set(classes[:5]) == {""}
    assert seen == set(WORDS)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    for line in markdown.splitlines():
        bold = re.findall(r"\*\*(.+?)\*\*", line) if line.startswith("|") else []
        assert bool(bold) == bool(set(bold) & {"proven", "proven worse"})
        assert not line.startswith(("| vera |", "| dora |")) or "**better" not in line
    console = Console(file=io.StringIO(), width=300, force_terminal=True, color_system="standard")
    print_table(write(folder, ERRORS), console, folder=folder)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    row = {name: next(line for line in lines if line.startswith(f"  {name} ")) for name in WORD}
    assert len(re.findall(r"\x1b\[1;32m", row["lora"])) == len(re.findall(r"\x1b\[1;31m", row["full"])) == 3
    assert "\x1b[" not in row["vera"] + row["dora"]
    assert not re.search("[▲▼≈]", content + markdown + "".join(lines))


def test_the_footnote_says_units_level_and_seeds(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    for part in (
        "Verdicts and intervals are of 40 test patients.",
        "each seed alike",
        "Intervals are of the level 90 %",
        "at most -0.5 %, at least 6 patients, and one-sided p below 0.05",
    ):
        assert text.count(part) == 2, part  # Of two kinds of data.


def test_without_scores_of_windows_there_is_a_change_and_no_verdict() -> None:
    console = Console(file=io.StringIO(), width=300)
    print_table([result_of(name, errors) for name, errors in ERRORS.items()], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith(
        "hr: lora: no verdict, MAE -2.00 % against zero-shot (the scores of its windows are not known); the lowest"
    )
    assert re.search(r"\n +lora +– +-2\.00 % +– ", text)
    assert "there are no verdicts" in text


def test_a_proof_by_itself_that_many_methods_take_away_says_so(tmp_path: Path) -> None:
    """7 patients, all better: p is 1/128 alone, and 8/128 among eight."""
    many = ["lora", "dora", "vera", "bitfit", "layernorm", "ia3", "oft", "hra"]
    study = StudySpec(base={**BASE, "data": {"vital": "hr"}}, grid={"adapter": ["none", *many]})
    (tmp_path / "study.json").write_text(study.model_dump_json())
    # As errors of all eight are equal, so are their p.
    write(tmp_path, {"none": np.full(7, 5.0), **dict.fromkeys(many, np.full(7, 4.9))})
    text = write_report(tmp_path).with_name("report.md").read_text(encoding="utf-8")
    assert (
        "- vera: better, not proven, MAE -2.00 % against zero-shot (90 % interval -2.00 to -2.00 %, 7 patients, p 0.062"
        " with Holm's correction for all methods); "
    ) in text
    assert "**" not in "".join(line for line in text.splitlines() if line.startswith("|"))


def test_axes_start_where_they_must_or_say_that_they_are_cut(folder: Path) -> None:
    index = ["lora", "vera"]
    points = pd.DataFrame(
        {"parameters": [100.0, 900.0], "value": [-2.0, -1.0], "low": [-3.0, -4.0], "high": [-1.0, 2.0],
         "claimed": [True, False]}, index=index,
    )  # fmt: skip
    (axis,) = draw_parameters(points, "MAE", _LIGHT, relative=True).axes
    # 2 % is a tenth of the axis, and 0 in its middle.
    assert axis.get_ylim() == (-10.0, 10.0)
    assert axis.get_ylabel() == "change of MAE against zero-shot, %"
    bars = np.concatenate([np.array(lines.get_segments())[..., 1] for lines in axis.collections])
    assert bars.tolist() == [[-3.0, -1.0], [-4.0, 2.0]]
    filled = {
        tuple(line.get_ydata()): line.get_markerfacecolor()
        for line in axis.lines
        if line.get_marker() not in ("None", "")
    }
    assert filled == {(-2.0,): _LIGHT.accent, (-1.0,): "none"}
    far = points.assign(high=[-1.0, 20.0])
    assert draw_parameters(far, "MAE", _LIGHT, relative=True).axes[0].get_ylim() == pytest.approx((-22.0, 22.0))
    # Errors start at 0.
    errors = points.assign(value=[7.1, 7.3], low=[7.0, np.nan], high=[7.2, np.nan])
    (axis,) = draw_parameters(errors, "MAE", _LIGHT, relative=False).axes
    assert axis.get_ylim() == pytest.approx((0.0, 1.1 * 7.3))
    assert axis.get_ylabel() == "MAE"
    curve = Curve("r of lora", {"lora": [(1.0, -2.0, -3.0, -1.0), (2.0, -2.2, -3.1, 0.4)]}, relative=True)
    (axis,) = draw_curve(curve, "MAE", _LIGHT).axes
    assert axis.get_ylim() == (-10.0, 10.0)
    (axis,) = draw_curve(Curve("r", {"lora": [(1.0, 7.0, 6.9, 7.1)]}), "MAE", _LIGHT).axes
    assert axis.get_ylim()[0] == 0.0
    costs = draw_costs(pd.DataFrame({"seconds": [3.0, 4.0], "memory": [500.0, 510.0]}, index=index), _LIGHT)
    assert [axis.get_xlim()[0] for axis in costs.axes] == [0.0, 0.0]
    example = {
        "kind": "best", "MAE": 1.0, "item_id": "a", "freq": "h", "history": [70.0, 72.0], "label": [71.0],
        "quantiles": {"0.1": [69.0], "0.5": [71.0], "0.9": [73.0]},
    }  # fmt: skip
    for draw in (draw_forecasts, draw_extremes):
        figure = draw({"lora": [example]}, _LIGHT)
        assert figure.axes[0].get_ylim()[0] > 60
        assert "axes are cut" in figure.get_supylabel()
    # And so it is in the report.
    content = (folder / "report.html").read_text(encoding="utf-8")
    pictures = [base64.b64decode(part).decode() for part in re.findall(r"base64,([\w+/=]+)", content)]
    against = [picture for picture in pictures if "trainable parameters" in picture]
    assert len(against) == 4
    assert all("change of MAE against zero-shot, %" in picture for picture in against)


SCORE = "score of all tasks"
VERDICTS = [
    Verdict("proven", -1.6, -2.4, -0.8, 0.001, 117, "patients", 234, 0, 1.2, SCORE, 2, 0.75),
    Verdict("better, not proven", -1.6, -5.3, 2.1, 0.2, 20, "series", 20, 0, 1.2, SCORE, 2, 0.5),
    Verdict("better, not proven", -3.0, None, None, 0.06, 4, "series", 8, 0, 1.2, SCORE, 0, 0.5),
    Verdict("no evidence", 0.4, -0.9, 2.1, 0.7, 20, "series", 20, 0, 1.2, SCORE, 2, 0.5),
]


def trained(adapter: str, verdict: Verdict) -> TrialResult:
    gate: dict[str, Any] = {"zero_shot": 1.0, "tuned": 0.9, "windows": 3, "passed": verdict.helped}
    return result_of(adapter, ERRORS["lora"], verdict=verdict).model_copy(update={"gate": gate})


def search_of(folder: Path, verdicts: list[Verdict]) -> pd.DataFrame:
    """The ranking of finished trials with these verdicts."""
    space = {"training.learning_rate": {"space": "loguniform", "lower": 1.0e-4, "upper": 1.0e-2}}
    spec = SearchSpec(base={**BASE, "adapter": "lora"}, space=space, num_samples=len(verdicts))
    folder.mkdir()
    (folder / SEARCH).write_text(json.dumps({"spec": spec.normal_form()}))
    journal = Journal(folder)
    journal.entries = [Entry(i, {"training.learning_rate": 1e-3}, f"abc{i}") for i in range(len(verdicts))]
    journal.write()
    for entry, verdict in zip(journal.entries, verdicts, strict=True):
        trained("lora", verdict).write(trial_folder(folder, entry.key))
    return ranking(folder)


def test_one_verdict_is_the_same_words_everywhere(tmp_path: Path) -> None:
    """As the report of a study, the ranking of a search and ``show`` print it; ``fit`` prints what ``show`` does."""
    sentences = [str(verdict) for verdict in VERDICTS]
    assert sentences == [
        "proven: score of all tasks -1.60 % against zero-shot (90 % interval -2.40 to -0.80 %, 117 patients)",
        "better, not proven: score of all tasks -1.60 % against zero-shot (90 % interval -5.30 to +2.10 %, 20 series)",
        "better, not proven: score of all tasks -3.00 % against zero-shot (4 series, too few for a proof: it takes 6)",
        "no evidence: score of all tasks +0.40 % against zero-shot (90 % interval -0.90 to +2.10 %, 20 series)",
    ]
    adapters = ["lora", "dora", "vera", "ia3"]
    study = StudySpec(base={**BASE, "data": {"vital": "hr"}}, grid={"adapter": adapters})
    (tmp_path / "study.json").write_text(study.model_dump_json())
    for adapter, verdict in zip(adapters, VERDICTS, strict=True):
        result = trained(adapter, verdict)
        result.write(tmp_path / "trials" / result.spec.hash())
    content = write_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"<td>([^<]+: score of all tasks [^<]+)</td>", content) == sentences

    frame = search_of(tmp_path / "search", VERDICTS)
    assert frame["sentence"].tolist() == sentences
    assert list(frame.columns[:5]) == ["trial", "verdict", "change %", "low %", "high %"]
    console = Console(file=io.StringIO(), width=300)
    print_ranking(frame, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\n +rank +trial +verdict +change +90 % interval +status ", text)
    for i, verdict in enumerate(VERDICTS):
        held = "–" if verdict.low is None else f"{verdict.low:+.2f} to {verdict.high:+.2f} %"
        change = re.escape(f"{verdict.change:+.2f} %")
        assert re.search(rf"\n +{i + 1} +{i} +{verdict.word} +{change} +{re.escape(held)} ", text)

    for verdict, sentence in zip(VERDICTS, sentences, strict=True):
        fit = {"gate": {"zero_shot": 1.0, "tuned": 0.9, "windows": 3}, "epochs": 1, "steps": 1, "seconds": 1.0,
               "learning_rate": 1e-3, "verdict": asdict(verdict)}  # fmt: skip
        base = {"family": "chronos", "checkpoint": "bolt-nano", "kind": "bundled", "revision": None, "fingerprint": "a"}
        record = {"base": base, "fit": fit, "adapter": "lora", "versions": {}}
        (tmp_path / "predictor.json").write_text(json.dumps(record))
        shown = CliRunner().invoke(app, ["show", str(tmp_path)])
        assert re.search(rf"^verdict: +{re.escape(sentence)}$", shown.output, re.MULTILINE), shown.output


def test_the_verdict_on_a_winner_says_that_its_data_chose_it(tmp_path: Path) -> None:
    first, *_, last = VERDICTS
    said = f"the best trial, 0: {first}, on validation windows"
    frame = search_of(tmp_path / "three", [first, last, last])
    assert verdict_of(frame) == f"{said}, which chose it among 3 trials too"
    console = Console(file=io.StringIO(), width=80)
    print_ranking(frame, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith(f"{said}, which chose it among 3 trials too\n")
    assert verdict_of(search_of(tmp_path / "one", [first])) == said
    assert not_helped(frame) is None
    assert not_helped(search_of(tmp_path / "lost", [last])) == f"the best trial, 0: {last}, on validation windows"
