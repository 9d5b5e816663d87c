from __future__ import annotations

import io
import json
import math
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
    expand,
    export_fev,
    fev_summaries,
    leaderboard,
    load_results,
    print_table,
    write_report,
)
from gluonts_peft.trials.grid import trial_folder
from gluonts_peft.trials.leaderboards import LEAST_TASKS

#: Of ``fev.analysis.RESULTS_DTYPES``, without which fev warns.
FEV_COLUMNS = {
    "dataset_path", "dataset_config", "horizon", "initial_cutoff", "min_context_length", "max_context_length",
    "seasonality", "eval_metric", "extra_metrics", "quantile_levels", "id_column", "timestamp_column", "target",
    "generate_univariate_targets_from", "known_dynamic_columns", "past_dynamic_columns", "static_columns", "model_name",
    "test_error", "training_time_s", "trained_on_this_dataset", "inference_time_s", "num_forecasts", "fev_version",
}  # fmt: skip


def random_errors(tasks: int, methods: str = "abcd") -> pd.DataFrame:
    rng = np.random.default_rng(tasks)
    columns = [f"task {number}" for number in range(tasks)]
    return pd.DataFrame(rng.gamma(2.0, 1.0, (len(methods), tasks)), index=list(methods), columns=columns)


def by_task(errors: pd.DataFrame, reference: str) -> dict[str, tuple[list[float], list[float]]]:
    """Logarithms of relative errors and shares of wins of each method on each data set, one after another."""
    found = {}
    for method in errors.index:
        logs, wins = [], []
        for task in errors.columns:

            def relative(name: Any, task: Any = task) -> float:
                return min(max(errors[task][name] / errors[task][reference], 0.01), 100.0)

            logs.append(math.log(relative(method)))
            others = [relative(other) for other in errors.index if other != method]
            won = [1.0 if relative(method) < other else 0.5 if relative(method) == other else 0.0 for other in others]
            wins.append(sum(won) / len(won))
        found[method] = (logs, wins)
    return found


def by_hand(errors: pd.DataFrame, reference: str) -> dict[str, tuple[float, float]]:
    """Skill score and win rate of each method."""
    count = errors.shape[1]
    parts = by_task(errors, reference)
    return {method: (1.0 - math.exp(sum(logs) / count), sum(wins) / count) for method, (logs, wins) in parts.items()}


@pytest.mark.parametrize("tasks", [1, 2, 9, 10, 25])
def test_skill_and_wins_are_those_of_a_loop(tasks: int) -> None:
    errors = random_errors(tasks)
    errors.loc["b", "task 0"] = errors.loc["a", "task 0"]
    errors.loc["c", "task 0"] *= 1e9
    board = leaderboard(errors, "a")
    wanted = by_hand(errors, "a")
    assert set(board.index) == set(errors.index)
    for method, row in board.iterrows():
        assert (row["skill score"], row["win rate"]) == pytest.approx(wanted[str(method)])
    assert list(board["win rate"]) == sorted(board["win rate"], reverse=True)
    assert board.loc["a", "skill score"] == 0.0
    known = board.filter(regex="low$|high$").notna()
    assert known.to_numpy().all() if tasks >= LEAST_TASKS else not known.to_numpy().any()


def test_intervals_are_quantiles_over_data_sets_drawn_again() -> None:
    errors = random_errors(12)
    board = leaderboard(errors, "a")
    draws = np.random.default_rng(123).integers(0, 12, size=(1000, 12))
    for method, (logs, wins) in by_task(errors, "a").items():
        skills = [1.0 - math.exp(sum(logs[task] for task in draw) / 12) for draw in draws]
        rates = [sum(wins[task] for task in draw) / 12 for draw in draws]
        for name, scores in (("skill score", skills), ("win rate", rates)):
            wanted = np.quantile(scores, [0.025, 0.975])
            assert list(board.loc[method, [f"{name} low", f"{name} high"]]) == pytest.approx(list(wanted))


def test_what_is_perfect_twice_is_a_tie_and_gaps_leave_a_method_out() -> None:
    errors = pd.DataFrame({"x": [0.0, 0.0, 1.0, 2.0], "y": [1.0, 1.0, 1.0, math.nan]}, index=list("abcd"))
    board = leaderboard(errors, "a")
    assert list(board.index) == ["a", "b", "c"]
    assert list(board["win rate"]) == [0.625, 0.625, 0.25]
    assert list(board["skill score"]) == pytest.approx([0.0, 0.0, 1 - math.sqrt(100.0)])
    assert math.isnan(leaderboard(errors.loc[["a"]], "a").loc["a", "win rate"])
    with pytest.raises(ValueError, match="^reference 'd' has no score on some data set; known: a, b, c$"):
        leaderboard(errors, "d")
    with pytest.raises(ValueError, match="^reference 'e' is not there; known: a, b, c$"):
        leaderboard(errors, "e")


MAE = {"seasonal_naive": 10.0, "none": 8.0, "lora": 6.0}


def mae(trial: Any) -> float:
    """What was written for a trial: lora is best on hr and worst on map, fold 1 is twice as hard."""
    name = trial.checkpoint if trial.family == "baseline" else trial.adapter
    worse = 3.0 if (name, trial.data.vital) == ("lora", "map") else 1.0
    return MAE[name] * worse * (1.0 + trial.data.fold) + 0.5 * trial.seed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of two data sets, two folds and two seeds; fold 0 has 30 windows, fold 1 has 10."""
    folder = tmp_path_factory.mktemp("study")
    study = StudySpec(
        base={
            "family": "chronos",
            "checkpoint": "bolt-nano",
            "prediction_length": 6,
            "context_length": 24,
            "data": {"folds": 2, "windows": 2},
        },
        grid={"data.vital": ["hr", "map"], "adapter": ["none", "lora"], "seed": [0, 1]},
        baselines=("seasonal_naive",),
    )
    (folder / "study.json").write_text(json.dumps(study.normal_form()))
    for trial in expand(study):
        place = trial_folder(folder, trial)
        place.mkdir(parents=True)
        TrialResult(
            spec=trial,
            status="finished",
            scores={"MAE[0.5]": mae(trial), "MASE[0.5]": 0.1 * mae(trial)},
            counts={"windows": 30 if trial.data.fold == 0 else 10, "series": 5},
            seconds=3.0 if trial.trains else None,
            seconds_forecast=1.5,
            data_fingerprint=f"{trial.data.vital} {trial.data.fold}",
        ).write(place)
        if trial.family == "baseline":
            (place / "examples.json").write_text(json.dumps([{"freq": "h"}]))
    return folder


def pooled(values: list[float]) -> float:
    return (30 * values[0] + 10 * values[1]) / 40


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_summary_for_fev_holds_what_its_leaderboard_needs(folder: Path, tmp_path: Path, ending: str) -> None:
    path = export_fev(folder, tmp_path / f"fev.{ending}")
    read = pd.read_csv(path) if ending == "csv" else pd.read_json(path, orient="records")
    assert set(read.columns) >= FEV_COLUMNS
    assert len(read) == 6
    assert sorted(set(read["model_name"])) == ["lora", "seasonal naive", "zero-shot"]
    rows = {(row["model_name"], row["dataset_config"]): row for _, row in read.iterrows()}
    # Pooled over folds by their windows, then over seeds.
    assert rows["lora", "hr"]["test_error"] == pytest.approx(pooled([6.0, 12.0]) + 0.25)
    assert rows["lora", "hr"]["MASE"] == pytest.approx(0.1 * rows["lora", "hr"]["MAE"])
    assert rows["seasonal naive", "map"]["test_error"] == pytest.approx(pooled([10.0, 20.0]))
    lora = rows["lora", "map"]
    assert (lora["horizon"], lora["num_windows"], lora["initial_cutoff"], lora["seasonality"]) == (6, 2, -12, 24)
    assert (lora["training_time_s"], lora["inference_time_s"], lora["num_forecasts"]) == (6.0, 3.0, 40)
    assert (bool(lora["trained_on_this_dataset"]), lora["eval_metric"], lora["dataset_path"]) == (
        True,
        "MAE",
        "simulated",
    )
    zero_shot = rows["zero-shot", "map"]
    assert not zero_shot["trained_on_this_dataset"]
    assert pd.isna(zero_shot["training_time_s"])
    assert zero_shot["dataset_fingerprint"] == lora["dataset_fingerprint"] != rows["lora", "hr"]["dataset_fingerprint"]

    # What defines a task is the same for all models, or fev would see other tasks.
    task = [name for name in FEV_COLUMNS if name in {"dataset_path", "dataset_config", "horizon", "max_context_length"}]
    assert len(read[task].drop_duplicates()) == 2
    errors = read.pivot(index="model_name", columns="dataset_config", values="test_error")
    wanted = by_hand(errors, "seasonal naive")
    board = leaderboard(errors, "seasonal naive")
    assert {method: (row["skill score"], row["win rate"]) for method, row in board.iterrows()} == {
        method: pytest.approx(both) for method, both in wanted.items()
    }
    assert board["win rate"].to_dict() == {"zero-shot": 0.75, "lora": 0.5, "seasonal naive": 0.25}


def test_the_report_says_skill_and_wins_over_its_data_sets(folder: Path) -> None:
    write_report(folder)
    section = (folder / "report.md").read_text().split("### Skill and wins over 2 data sets")[1]
    assert "2 data sets are too few for an interval, it takes 10" in section
    skill = 1 - math.sqrt((pooled([8.0, 16.0]) + 0.25) ** 2) / pooled([10.0, 20.0])
    assert f"| zero-shot | {skill:.3f} | 0.750 |" in section
    console = Console(width=200, record=True, file=io.StringIO())
    print_table(load_results(folder), console)
    assert "Skill and wins over 2 data sets" in console.export_text()


def test_rows_pool_folds_and_seeds_are_what_they_spread_over(folder: Path) -> None:
    table = pd.read_csv(folder / "report.csv", index_col=[0, 1])
    assert len(table) == 6
    lora = table.loc["hr", "lora"]
    assert lora["MAE"] == pytest.approx(pooled([6.0, 12.0]) + 0.25)
    assert lora["MAE std"] == pytest.approx(0.5 / math.sqrt(2))
    assert (lora["seeds"], lora["folds"], lora["finished"]) == (2, 2, 4)
    change = pooled([-2.0, -4.0])
    assert lora["change %"] == pytest.approx(100 * change / (pooled([8.0, 16.0]) + 0.25))


def test_nothing_finished_and_other_endings_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^path 'x\.parquet' must end in \.csv or \.json, which is what fev reads$"):
        export_fev(folder, "x.parquet")
    (tmp_path / "study.json").write_text((folder / "study.json").read_text())
    with pytest.raises(SpecError, match="no trial has finished; run the study first"):
        fev_summaries(tmp_path)
