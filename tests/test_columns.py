from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gluonts_peft import registry
from gluonts_peft.backtesting import default_metrics
from gluonts_peft.columns import Column, score_columns
from gluonts_peft.trials.searchspec import metric_columns
from gluonts_peft.trials.tables import METRICS

# A distribution of somebody else's: one module and its metadata.
MODULE = """
from gluonts.ev.metrics import ND
from gluonts_peft.columns import Column

def definition():
    return ND("0.5")

normalised = Column("ND", "ND[0.5]", definition, header="ND per cent", scale=100.0, fev="ND")
"""
PROGRAM = """
import json, sys
from pathlib import Path
from gluonts_peft.backtesting import SeasonalNaive, backtest
from gluonts_peft.trials import export_fev, load_study, run_study, write_report
from gluonts_peft.trials.searchspec import SearchSpec
from gluonts_peft.trials.tables import table

folder = Path(sys.argv[1])
study = load_study(folder / "study.yaml")
(result,) = [each for each in run_study(study, folder / "out") if each.spec.family == "chronos"]
report = write_report(folder / "out").read_text()
search = SearchSpec(**json.loads((folder / "search.json").read_text()))
summary = export_fev(folder / "out", folder / "fev.csv").read_text()
print(json.dumps({
    "score": result.scores["ND[0.5]"],
    "mae": result.scores["MAE[0.5]"],
    "table": float(table([result])["ND"].iloc[0]),
    "report": report.split("ND per cent")[0] != report,
    "objective": search.objective,
    "fev": summary.splitlines()[0].split(","),
}))
"""


def test_a_metric_of_another_distribution_is_found_right_everywhere(tmp_path: Path) -> None:
    (tmp_path / "of_someone_else.py").write_text(MODULE)
    about = tmp_path / "of_someone_else-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: of-someone-else\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[gluonts_peft.metrics]\nnd = of_someone_else:normalised\n")
    base = {
        "family": "chronos",
        "checkpoint": "bolt-nano",
        "adapter": "none",
        "prediction_length": 6,
        "context_length": 24,
        "data": {"source": "simulated", "patients": 12, "hours": 48, "vital": "hr", "windows": 1},
    }
    # JSON is YAML.
    (tmp_path / "study.yaml").write_text(json.dumps({"base": base, "baselines": ["seasonal_naive"]}))
    search = {
        "base": base | {"adapter": "lora"},
        "space": {"training.learning_rate": {"space": "loguniform", "lower": 1e-4, "upper": 1e-3}},
    }
    (tmp_path / "search.json").write_text(json.dumps(search | {"objective": ["ND"], "num_samples": 1}))
    places = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": places},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["table"] == found["score"]
    # The sum of errors in units of the sum of values: heart rates lie between 40 and 180.
    assert found["mae"] / 180 < found["score"] < found["mae"] / 40
    assert found["report"]
    assert found["objective"] == ["ND"]
    assert "ND" in found["fev"]


def test_every_column_has_a_definition_of_its_own_name() -> None:
    names = {metric().name for metric in default_metrics()}
    assert {column.score for column in score_columns()} <= names
    assert set(METRICS.values()) < set(metric_columns().values()) == {column.score for column in score_columns()}


@pytest.mark.parametrize(
    ("column", "error", "words"),
    [
        (Column("MAE", "mine", list), ValueError, "name 'MAE' is taken"),
        (Column("mine", "MSE[0.5]", list), ValueError, r"score 'MSE\[0.5\]' is taken"),
        ("MAE", TypeError, "must name a gluonts_peft.columns.Column"),
    ],
)
def test_what_cannot_be_a_column_is_refused(
    column: object, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.metrics, "names", lambda: ["own"])
    monkeypatch.setattr(registry.metrics, "get", lambda name: column)
    score_columns.cache_clear()
    try:
        with pytest.raises(error, match=words):
            score_columns()
    finally:
        monkeypatch.undo()
        score_columns.cache_clear()
