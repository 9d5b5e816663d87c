"""What released versions wrote opens, and gives the numbers that they gave."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gluonts.model.predictor import Predictor
from safetensors.numpy import load_file

import gluonts_peft
from gluonts_peft import PeftPredictor
from gluonts_peft.adapters.load import load_adapter
from gluonts_peft.registry import get_estimator
from gluonts_peft.trials import (
    SearchSpec,
    StudySpec,
    load_results,
    ranking,
    run_study,
    search,
    write_report,
)
from gluonts_peft.trials.grid import read_study
from gluonts_peft.words import WORDS

HERE = Path(__file__).parent
RELEASED = sorted(folder for folder in HERE.iterdir() if folder.is_dir() and (folder / "series.json").is_file())
PREDICTORS = sorted(folder for release in RELEASED for folder in (release / "predictors").iterdir())


def _writer() -> Any:
    specification = importlib.util.spec_from_file_location("stored_write", HERE / "write.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["stored_write"] = module
    specification.loader.exec_module(module)
    return module


writer = _writer()


def _of(path: Path) -> str:
    return f"{path.parents[1].name}-{path.name}"


@pytest.fixture(params=RELEASED, ids=lambda path: path.name)
def release(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def _data(release: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = writer.dataset(json.loads((release / "series.json").read_text()))
    return found


def _equals(found: np.ndarray, wanted: np.ndarray) -> None:
    # Sums may have another order in a later version of torch; a forecast is of the size of the series.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("folder", PREDICTORS, ids=_of)
def test_a_predictor_opens_and_forecasts_what_it_forecast(folder: Path) -> None:
    release = folder.parents[1]
    wanted = load_file(release / "forecasts.safetensors")[folder.name]
    predictor = PeftPredictor.deserialize(folder, device="cpu")
    _equals(writer.forecasts(predictor, _data(release)), wanted)
    assert predictor.fit is not None
    assert predictor.gate is not None
    assert predictor.gate.windows == 3


@pytest.mark.parametrize("folder", [each for each in PREDICTORS if "bolt" in each.name], ids=_of)
def test_its_adapter_opens_by_itself_and_through_gluonts(folder: Path) -> None:
    release = folder.parents[1]
    wanted = load_file(release / "forecasts.safetensors")[folder.name]
    backbone = gluonts_peft.load_backbone("chronos", checkpoint="bolt-nano", prediction_length=6, context_length=24)
    load_adapter(folder / "adapter", backbone)
    _equals(writer.forecasts(PeftPredictor(backbone, device="cpu"), _data(release)), wanted)
    _equals(writer.forecasts(Predictor.deserialize(folder, device="cpu"), _data(release)), wanted)


def test_an_interrupted_training_goes_on(release: Path, tmp_path: Path) -> None:
    folder = tmp_path / "training"
    shutil.copytree(release / "training", folder)
    undisturbed = json.loads((folder / "undisturbed.json").read_text())
    estimator = get_estimator("chronos")(**writer.INTERRUPTED, folder=str(folder))
    history = estimator.train(_data(release), ckpt_path="last").fit.history
    assert len(history) == len(undisturbed) == 2
    for found, wanted in zip(history, undisturbed, strict=True):
        assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-5)
        assert found["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-5)


def _traces(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("trials/*/result.json")}


def test_a_study_is_finished_and_reported(release: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(release / "study", folder)
    before = _traces(folder)
    assert len(before) == 5
    wanted = {path.parent.name: json.loads(path.read_text())["scores"] for path in folder.glob("trials/*/result.json")}
    # Both as it is stored and as its author would write it again.
    for study in (read_study(folder), StudySpec(**writer.STUDY)):
        results = run_study(study, folder, progress=False)
        assert [result.status for result in results] == ["finished"] * 5
        assert _traces(folder) == before
    scores = [result.scores for result in load_results(folder)]
    assert sorted(map(str, scores)) == sorted(map(str, wanted.values()))
    assert write_report(folder).is_file()
    # In the words of today, though by the gate of 0.1.0 there was no verdict.
    tests = pd.read_csv(folder / "tests.csv")
    assert set(tests["verdict"]) <= set(WORDS)
    assert (folder / "report.md").read_text().splitlines()[2].startswith(f"**{tests['data'][0]}**: ")


def test_a_search_is_finished_and_ranked(release: Path, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    shutil.copytree(release / "search", folder)
    before = _traces(folder)
    assert len(before) == 2
    wanted = pd.read_csv(folder / "ranking.csv")
    with pytest.warns(gluonts_peft.TuningDidNotHelp, match=r"^the best trial, \d: no verdict: loss [\d.]+, zero-shot "):
        found = search(SearchSpec(**writer.SEARCH), folder, serial=True, progress=False)
    assert _traces(folder) == before
    shared = [name for name in wanted.columns if name in found.columns and wanted[name].dtype.kind == "f"]
    assert {"error", "test MAPE"} <= set(shared)
    np.testing.assert_allclose(found[shared].to_numpy(float), wanted[shared].to_numpy(float), rtol=1e-6)
    np.testing.assert_allclose(ranking(folder)[shared].to_numpy(float), wanted[shared].to_numpy(float), rtol=1e-6)
