from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from gluonts_peft.trials import (
    SpecError,
    StudySpec,
    TrialResult,
    TrialSpec,
    expand,
    load_results,
    print_table,
    run_study,
    sections,
    table,
    write_report,
)
from gluonts_peft.trials.figures import (
    Curve,
    draw_costs,
    draw_curve,
    draw_extremes,
    draw_forecasts,
    draw_parameters,
    html_figure,
)
from gluonts_peft.trials.report import _notes
from gluonts_peft.trials.sections import curves_of, footnote, sections_of
from gluonts_peft.trials.tables import rows_of

BASE = {"family": "chronos", "checkpoint": "bolt-nano", "prediction_length": 6, "context_length": 24}
SMALL = {"max_epochs": 1, "num_batches_per_epoch": 2, "batch_size": 4, "device": "cpu"}


def trial(adapter: Any, seed: int = 0, vital: str = "hr", **changes: Any) -> TrialSpec:
    return TrialSpec(**{**BASE, "adapter": adapter, "seed": seed, "data": {"vital": vital}, **changes})


def finished(adapter: Any, mae: float, seed: int = 0, *, passed: bool = True, **changes: Any) -> TrialResult:
    tuned = adapter != "none"
    return TrialResult(
        spec=trial(adapter, seed, **changes),
        status="finished",
        scores={"MAE[0.5]": mae, "MSE[0.5]": mae**2, "coverage[0.1]": 0.1, "coverage[0.9]": 0.85},
        gate={"zero_shot": 1.0, "tuned": 0.9, "windows": 3, "passed": passed} if tuned else None,
        trainable_parameters=100 if tuned else 0,
        seconds=1.0 + seed,
        peak_memory_mb=500.0,
    )


def baseline(mae: float) -> TrialResult:
    changes = {"family": "baseline", "checkpoint": "last_value"}
    return finished("none", mae, **changes).model_copy(update={"trainable_parameters": None, "seconds": None})


ZERO_SHOT = [finished("none", 5.0, seed) for seed in (0, 1, 2)]


def test_numbers_are_means_and_sample_deviations_over_seeds() -> None:
    maes = [4.0, 4.4, 4.9]
    row = table([*ZERO_SHOT, *(finished("lora", mae, seed) for seed, mae in enumerate(maes))]).loc["hr", "lora"]
    assert row["MAE"] == pytest.approx(sum(maes) / 3)
    assert row["MAE std"] == pytest.approx(math.sqrt(sum((mae - sum(maes) / 3) ** 2 for mae in maes) / 2))
    assert row["MSE"] == pytest.approx(np.mean(np.square(maes)))
    assert row["seconds"] == pytest.approx(2.0)
    assert row["coverage 80 %"] == pytest.approx(0.75)
    assert row["change %"] == pytest.approx(100 * (sum(maes) / 3 - 5) / 5)
    assert (row["trainable parameters"], row["finished"], row["handed over"]) == (100, 3, 3)
    assert math.isnan(row["MAPE"])


def test_changes_are_taken_between_equal_seeds() -> None:
    zero_shot = [finished("none", mae, seed) for seed, mae in enumerate([4.0, 5.0, 6.0])]
    tuned = [finished("lora", mae, seed) for seed, mae in enumerate([3.9, 4.9])]
    row = table([*zero_shot, *tuned]).loc[("hr", "lora")]
    assert row["change %"] == pytest.approx(-2.0)
    # Seeds are no units: without scores of windows there is no verdict.
    assert (row["verdict"], math.isnan(row["low %"])) == ("", True)
    assert math.isnan(table(tuned).loc[("hr", "lora"), "change %"])


def test_rows_come_in_order_and_ones_that_failed_or_are_missing_too() -> None:
    failed = TrialResult(spec=trial("dora"), status="failed", error="RuntimeError: no")
    results = [finished("full", 4.0), finished("lora", 4.0), failed, ZERO_SHOT[0], baseline(7.0)]
    frame = table(results, expected=[trial("vera"), trial("lora"), trial("lora", 1)])
    assert list(frame.index) == [
        ("hr", method) for method in ("last value", "zero-shot", "vera", "lora", "dora", "full")
    ]
    assert frame.loc[("hr", "dora"), "failed"] == 1
    assert frame.loc[("hr", "dora"), "error"] == "RuntimeError: no"
    assert frame.loc[("hr", "vera"), "missing"] == 1
    assert frame.loc[("hr", "lora"), "missing"] == 1
    assert math.isnan(frame.loc[("hr", "vera"), "MAE"])
    assert frame.loc[("hr", "last value"), "change %"] == pytest.approx(40.0)


def test_labels_say_what_differs() -> None:
    results = [
        finished({"name": "lora", "r": 4}, 1.0, training={"max_epochs": 3}),
        finished("lora", 1.0, training={"max_epochs": 4}),
        finished("none", 1.0),
        finished("none", 1.0, vital="map", prediction_length=12),
    ]
    assert list(table(results).index) == [
        ("hr, prediction_length=6", "zero-shot"),
        ("hr, prediction_length=6", "lora(r=4), max_epochs=3"),
        ("hr, prediction_length=6", "lora, max_epochs=4"),
        ("map, prediction_length=12", "zero-shot"),
    ]


def test_checkpoints_are_compared_with_their_own_zero_shot() -> None:
    results = [
        finished(a, mae, checkpoint=c) for a, c, mae in (("none", "x", 3.0), ("none", "y", 5.0), ("lora", "x", 4.0))
    ]
    frame = table(results)
    assert frame.loc[("hr", "lora, checkpoint=x"), "change %"] == pytest.approx(100 / 3)


def test_networks_trained_from_scratch_come_last_and_are_paired_by_seed() -> None:
    changes = {"family": "baseline", "checkpoint": "nhits"}
    scratch = [finished("none", mae, seed, **changes) for seed, mae in enumerate([4.5, 5.5, 6.5])]
    zero_shot = [finished("none", mae, seed) for seed, mae in enumerate([5.0, 6.0, 7.0])]
    frame = table([*scratch, *zero_shot, finished("full", 4.0), baseline(7.0)])
    assert list(frame.loc["hr"].index) == ["last value", "zero-shot", "full", "N-HiTS"]
    assert list(frame["kind"]) == ["naive baseline", "zero-shot", "full tuning", "trained from scratch"]
    assert frame.loc[("hr", "N-HiTS"), "change %"] == pytest.approx(-100 * 0.5 / 6.0)


def test_baselines_are_named_by_what_differs_among_their_own_kind() -> None:
    trees = [
        finished("none", 4.5, seed, family="baseline", checkpoint="lightgbm", backbone_options=options)
        for options in ({}, {"num_leaves": 7})
        for seed in (0, 1)
    ]
    network = finished("none", 4.5, family="baseline", checkpoint="nhits")
    ets = finished("none", 4.0, family="baseline", checkpoint="auto_ets", backbone_options={"model": "AZZ"})
    frame = table([*ZERO_SHOT, *trees, network, ets, baseline(7.0)])
    kinds = dict(frame.loc["hr"]["kind"])
    assert kinds == {
        "last value": "naive baseline",
        "AutoETS": "statistical baseline",
        "zero-shot": "zero-shot",
        "LightGBM": "trained from scratch",
        "LightGBM, num_leaves=7": "trained from scratch",
        "N-HiTS": "trained from scratch",
    }
    assert list(frame.loc["hr"].index) == list(kinds)
    # It has no seed, and is compared with zero-shot of each.
    assert frame.loc[("hr", "AutoETS"), "change %"] == pytest.approx(-20)
    assert frame.loc[("hr", "LightGBM, num_leaves=7"), "finished"] == 2


def test_windows_that_a_baseline_forecasts_more_simply_are_said() -> None:
    counts = {"windows": 9, "series": 3, "simpler_without_season": 9, "simpler_random_walk": 2}
    ets = finished("none", 4.0, family="baseline", checkpoint="auto_ets").model_copy(update={"counts": counts})
    (note,) = (note for note in _notes([ets], [ets.spec]) if note.startswith("Forecast more simply"))
    assert note == (
        "Forecast more simply, as the history or the season allowed no more: AutoETS 2 of 9 windows of hr as a random"
        " walk; AutoETS 9 of 9 windows of hr without a season."
    )
    assert not [note for note in _notes(ZERO_SHOT, []) if note.startswith("Forecast more simply")]


def test_a_point_has_no_interval() -> None:
    point = finished("lora", 4.0).model_copy(update={"scores": {"coverage[0.1]": 0.4, "coverage[0.9]": 0.4}})
    assert math.isnan(table([point]).loc[("hr", "lora"), "coverage 80 %"])


def test_limits_of_training_data_and_weights_belong_to_the_method() -> None:
    results = [
        finished("none", 5.0),
        finished("lora", 4.8, data={"vital": "hr", "train_series": 8}),
        finished("lora", 4.6, data={"vital": "hr"}),
        finished("lora", 4.5, ensemble=0.5),
        finished("full", 4.4, data={"vital": "hr", "train_series": 8}),
        finished("full", 4.2, data={"vital": "hr"}),
    ]
    rows = {row.method: row for row in rows_of(results, [])}
    full, few = "full, train_series=all", "full, train_series=8"
    assert list(rows) == [
        "zero-shot",
        "lora, train_series=8",
        "lora, train_series=all",
        "lora, train_series=all, ensemble=0.5",
        few,
        full,
    ]
    assert all(row.references["zero-shot"] == "zero-shot" for name, row in rows.items() if name != "zero-shot")
    # Each is compared with full tuning on as much data.
    assert rows["lora, train_series=8"].references["full tuning"] == few
    assert rows["lora, train_series=all, ensemble=0.5"].references["full tuning"] == full
    assert "full tuning" not in rows["zero-shot"].references


def curves(results: list[TrialResult]) -> list[Curve]:
    return curves_of(rows_of(results, []), table(results).droplevel("data"))


def test_a_change_is_drawn_against_what_varies() -> None:
    def lora(r: int, mae: float, seed: int) -> TrialResult:
        return finished({"name": "lora", "r": r, "lora_alpha": 8 * r}, mae, seed)

    results = [lora(r, 5.0 - 0.1 * r + 0.01 * seed, seed) for r in (1, 2, 4) for seed in (0, 1)]
    (curve,) = curves([*results, *ZERO_SHOT])
    assert (curve.option, curve.relative) == ("r of lora", True)
    (points,) = curve.lines.values()
    assert [point[0] for point in points] == [1.0, 2.0, 4.0]
    assert [point[1] for point in points] == pytest.approx([-1.9, -3.9, -7.9])
    # Without scores of windows no interval is known.
    assert all(math.isnan(end) for point in points for end in point[2:])
    # Without zero-shot it is the error, with one standard deviation.
    (curve,) = curves(results)
    assert not curve.relative
    (points,) = curve.lines.values()
    assert [point[1] for point in points] == pytest.approx([4.905, 4.805, 4.605])
    spread = 0.01 / math.sqrt(2)
    assert points[0][2:] == pytest.approx((4.905 - spread, 4.905 + spread))
    # Two values are no curve; those that differ in something else are lines of their own.
    assert curves(results[:4]) == []
    fourier = [
        finished({"name": "fourierft", "n_frequency": n, "random_loc_seed": place}, 4.0)
        for n, place in ((10, 0), (50, 0), (50, 1), (200, 0))
    ]
    (curve,) = curves(fourier)
    assert {name: [point[0] for point in points] for name, points in curve.lines.items()} == {
        "fourierft, random_loc_seed=0": [10.0, 50.0, 200.0],
        "fourierft, random_loc_seed=1": [50.0],
    }


def test_no_results_are_an_empty_table() -> None:
    assert len(table([])) == 0


@pytest.mark.parametrize("width", [40, 80, 120, 240])
def test_the_terminal_shows_every_number_whole(width: int) -> None:
    failed = TrialResult(spec=trial("dora"), status="failed", error="RuntimeError: [no]")
    results = [*ZERO_SHOT, *(finished("lora", 4.1234, seed, passed=seed > 0) for seed in range(3)), failed]
    console = Console(file=io.StringIO(), width=width)
    print_table(results, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "hr (simulated data)" in text
    for part in ("zero-shot", "lora", "dora (1 failed)", "4.123", "-17.53 %", "2/3", "17.00", "75.00"):
        assert part in text, part
    assert "…" not in text
    assert "failed: dora: RuntimeError: [no]" in " ".join(text.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "out"
    study = StudySpec(
        title="Vital <signs>",
        base={**BASE, "training": SMALL, "data": {"patients": 10, "hours": 8, "windows": 1}},
        baselines=["seasonal_naive", "last_value"],
        grid={
            "data.vital": ["hr", "map"],
            "adapter": ["none", "full", "lora", {"name": "c3a", "block_size": 7}, ["layernorm", "lora"]],
        },
    )
    run_study(study, folder, progress=False)
    missing = next(spec for spec in expand(study) if isinstance(spec.adapter, list))
    (folder / "trials" / missing.hash() / "result.json").unlink()
    return folder


class Reader(HTMLParser):
    """Collects text, addresses and whether all tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_report_is_one_file_with_every_row(folder: Path) -> None:
    path = write_report(folder)
    assert path == folder / "report.html"
    content = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(content)
    assert reader.open == []
    assert reader.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in reader.addresses)
    assert "http" not in content
    assert "@import" not in content
    assert "url(" not in content
    text = "".join(reader.texts)
    assert text.count("Vital <signs> (simulated data)") == 2
    assert "no patient ever had these values" in text
    frame = table(load_results(folder), expand(StudySpec.model_validate_json((folder / "study.json").read_text())))
    assert len(frame) == 2 * 7
    for (_, method), row in frame.iterrows():
        state = "".join(f" ({row[key]} {key})" for key in ("failed", "missing") if row[key])
        assert f"<td>{method}{state}</td>" in content
        if row["finished"]:
            assert f"{row['MAE']:.3f}" in content
    assert "c3a(block_size=7) (1 failed)" in text
    assert "AdapterError" in text
    assert "Missing: not run yet" in text
    for result in load_results(folder):
        assert result.spec.hash() in text
        assert result.base is None or str(result.base["fingerprint"]) in text
    assert "prefers-color-scheme: dark" in content
    assert "overflow-x: auto" in content


def test_figures_are_drawn_for_both_themes(folder: Path) -> None:
    content = write_report(folder).read_text(encoding="utf-8")
    figures = [base64.b64decode(part).decode() for part in re.findall(r"base64,([\w+/=]+)", content)]
    # Parameters, costs, forecasts, the best and worst windows; of two data sets; for two themes.
    assert len(figures) == 16
    assert sum("trainable parameters" in figure for figure in figures) == 4
    assert sum("#e6edf3" in figure for figure in figures) == 8


def test_the_report_tests_what_it_shows(folder: Path) -> None:
    content = write_report(folder).read_text(encoding="utf-8")
    tests = pd.read_csv(folder / "tests.csv")
    # Eight hours in steps of 5 minutes hold no day.
    naive = "seasonal naive (no season: last value)"
    assert list(tests[tests["data"] == "hr"]["method"]) == [
        naive, "last value", "lora", "full",
        naive, "last value", "zero-shot", "lora",
    ]  # fmt: skip
    row = tests[(tests["method"] == "lora") & (tests["against"] == "zero-shot") & (tests["data"] == "hr")].iloc[0]
    errors = []
    for result in load_results(folder):
        if (
            result.spec.adapter in ("none", "lora")
            and result.spec.family != "baseline"
            and result.spec.data.vital == "hr"
        ):
            windows = pd.read_parquet(folder / "trials" / result.spec.hash() / "windows.parquet")
            errors.append(windows.set_index("item_id")["MAE[0.5]"])
    zero_shot, lora = errors
    assert row["units"] == len(lora) == 2
    assert row["change %"] == pytest.approx(100 * (lora - zero_shot).mean() / zero_shot.mean())
    assert row["share_better"] == (lora < zero_shot).mean()
    text = (folder / "report.md").read_text(encoding="utf-8")
    for part in ("What the verdicts rest on", "Ranks over data sets", "changed most"):
        assert part in content
        assert part in text


@pytest.mark.parametrize("known", [True, False])
def test_units_have_the_name_of_what_was_divided(tmp_path: Path, known: bool) -> None:
    rng = np.random.default_rng(0)
    stays = [(stay, hour, 80 + rng.normal()) for stay in range(24) for hour in range(30)]
    frame = pd.DataFrame(stays, columns=["stay_id", "hour", "hr"])
    frame.assign(**{"patient": frame["stay_id"] // 2} if known else {}).to_parquet(tmp_path / "stays.parquet")
    data = {"source": "hourly", "path": str(tmp_path / "stays.parquet"), "vital": "hr", "min_hours": 24, "windows": 1}
    study = StudySpec(base={**BASE, "training": SMALL, "data": data}, grid={"adapter": ["none", "layernorm"]})
    results = run_study(study, tmp_path / "out", progress=False)
    rows = rows_of(results, expand(study))
    tests = sections.tests_of(rows, tmp_path / "out")
    frame = table(results, tests=tests)
    [section, *_] = sections_of("hr", frame, rows, tests, tmp_path / "out")
    text = "\n".join([*_notes(results, expand(study)), footnote(frame), *section.markdown()])
    if known:
        assert "Training, validation and test windows are of different patients." in text
        assert "of 3 test patients. Errors of windows are averaged within a patient, each seed alike" in text
        assert "patients better" in text
    else:
        assert "windows are of different stays; a patient may have several, in several parts." in text
        assert "of 5 test stays. Errors of windows are averaged within a stay, each seed alike" in text
        assert "stays better" in text
        assert "patients" not in text
    assert set(tests["unit"]) == {"patient" if known else "stay"}
    assert set(tests["units"]) == {3 if known else 5}


def test_forgetting_is_a_table_of_its_own(tmp_path: Path) -> None:
    data = {"patients": 12, "hours": 8, "vital": "hr", "windows": 1}
    also = {"synthetic": {"source": "synthetic", "series": 20, "steps": 60, "windows": 1}}
    study = StudySpec(
        base={**BASE, "training": {**SMALL, "learning_rate": 1e-2}, "data": data, "also": also},
        grid={"adapter": ["none", "full"]},
    )
    zero_shot, full = run_study(study, tmp_path, progress=False)
    frame = table([zero_shot, full])
    assert frame.loc[("hr", "full"), "MAE on synthetic"] == full.scores["synthetic/MAE[0.5]"]
    write_report(tmp_path)
    tests = pd.read_csv(tmp_path / "tests.csv")
    assert list(tests["scored on"].unique()) == ["hr", "synthetic"]
    there = tests[(tests["scored on"] == "synthetic") & (tests["against"] == "zero-shot")].iloc[0]
    assert there["units"] == 4
    assert "Forgetting: error on synthetic, which was not trained on" in (tmp_path / "report.md").read_text()


def test_the_same_results_give_the_same_report(folder: Path) -> None:
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_the_tables_beside_it_hold_the_same(folder: Path) -> None:
    write_report(folder)
    frame = pd.read_csv(folder / "report.csv", index_col=["data", "method"])
    expected = table(load_results(folder))
    for key in expected.index:
        assert frame.loc[key, "MAE"] == pytest.approx(expected.loc[key, "MAE"], nan_ok=True)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Vital <signs> (simulated data)\n")
    assert "| c3a(block_size=7) (1 failed) |" in text
    assert "| layernorm + lora (1 missing) |" in text
    assert re.search(
        r"\n- lora: (better, not proven|no evidence), MAE [+-][\d.]+ % against zero-shot \(2 patients, too few for a"
        r" proof: it takes 6\); MAE [\d.]+, 1 seed\. One seed cannot tell this training from others\.",
        text,
    )


def test_a_study_that_has_not_begun_has_a_report(tmp_path: Path) -> None:
    study = StudySpec(base=BASE, grid={"adapter": ["none", "lora"]})
    (tmp_path / "study.json").write_text(study.model_dump_json())
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "0 of 2 trials have finished, 0 have failed, 2 are missing." in text
    assert "<td>lora (1 missing)</td>" in text


def test_trials_of_different_weights_are_not_compared_in_silence(tmp_path: Path) -> None:
    study = StudySpec(base={**BASE, "data": {"vital": "hr"}}, grid={"adapter": ["none", "lora"]})
    (tmp_path / "study.json").write_text(study.model_dump_json())
    for adapter, fingerprint in (("none", "aa"), ("lora", "bb")):
        base = {"checkpoint": "bolt-nano", "fingerprint": fingerprint}
        result = finished(adapter, 4.0).model_copy(update={"base": base, "versions": {"torch": "2"}})
        result.write(tmp_path / "trials" / result.spec.hash())
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Caution: the trials were not run with the same weights of bolt-nano; see the end." in text


def test_names_are_no_formulas() -> None:
    name = r"s$\frac$1"
    example = {
        "kind": "best", "MAE": 1.0, "item_id": name, "start": "2024-01-01", "freq": "h", "history": [1.0, 2.0],
        "label": [1.0], "quantiles": {"0.1": [0.0], "0.5": [1.0], "0.9": [2.0]},
    }  # fmt: skip
    bars = {"parameters": [10.0, 1000.0], "value": [1.0, 2.0], "low": [0.9, 1.9], "high": [1.1, 2.1], "claimed": False}
    points = pd.DataFrame(bars, index=[name, "b"])
    curve = Curve(name, {name: [(1.0, 1.0, 0.9, 1.1)]})
    costs = pd.DataFrame({"seconds": [1.0]}, index=[name])
    # How often the name is in each picture.
    for count, draw in (
        (2, lambda theme: draw_forecasts({name: [example]}, theme)),
        (2, lambda theme: draw_extremes({name: [example]}, theme)),
        (1, lambda theme: draw_parameters(points, "MAE", theme, relative=False)),
        (2, lambda theme: draw_curve(curve, "MAE", theme)),
        (1, lambda theme: draw_costs(costs, theme)),
    ):
        picture = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', html_figure(draw, "caption"))
        assert picture is not None
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", base64.b64decode(picture[1]).decode())
        assert sum(name in text for text in texts) == count


@pytest.mark.parametrize(
    ("data", "title"),
    [
        ({"source": "synthetic"}, "synthetic data"),
        ({"source": "file", "path": "a/stays.parquet"}, "data: stays.parquet"),
    ],
)
def test_the_title_says_where_the_data_are_from(tmp_path: Path, data: dict[str, Any], title: str) -> None:
    study = StudySpec(title="tiny", base={**BASE, "data": data}, grid={"adapter": ["none", "lora"]})
    (tmp_path / "study.json").write_text(study.model_dump_json())
    assert f"<h1>tiny ({title})</h1>" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_folder_without_trials_is_refused(tmp_path: Path) -> None:
    message = f"folder '{tmp_path}' cannot be used: it holds neither a study nor trials; name the folder of a study"
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        load_results(tmp_path)
    message = f"folder '{tmp_path}' cannot be used: it has no study.json; name the folder of a study"
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        write_report(tmp_path)
