"""Every option of the estimator changes something, or is refused by name."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gluonts_peft import PeftEstimator, TuningDidNotHelp, get_estimator
from gluonts_peft.checkpoint_io import read_checkpoint
from gluonts_peft.training import LAST
from gluonts_peft.trials.spec import TrainingSpec

DATA = [
    {
        "item_id": f"s{i}",
        "start": pd.Period("2024-01-01", "h"),
        "target": np.random.default_rng(i).normal(20, 1, 120).astype(np.float32),
    }
    for i in range(4)
]
OPTIONS: dict[str, Any] = dict(
    prediction_length=6,
    context_length=32,
    max_epochs=2,
    num_batches_per_epoch=3,
    batch_size=4,
    learning_rate=0.01,
    gate="keep",
    device="cpu",
    progress=False,
)
NAMES = [name for name in inspect.signature(PeftEstimator.__init__).parameters if name != "self"]


def outcome(folder: Path, data: Any = DATA, family: str = "chronos", **options: Any) -> dict[str, Any]:
    """What a training leaves behind: what it recorded of itself, its losses, its forecasts."""
    given = {**OPTIONS, "folder": str(folder), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningDidNotHelp)
        predictor = get_estimator(family)(**given).train(data)
    forecasts = [forecast.quantile(0.5).tolist() for forecast in predictor.predict(data[:1], num_samples=3)]
    return {"history": predictor.fit.history, "windows": predictor.gate.windows, "forecasts": forecasts}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcome(tmp_path_factory.mktemp("plain"))


CHANGES: dict[str, Any] = {
    "prediction_length": 5,
    "context_length": 48,
    "adapter": "bitfit",
    "max_epochs": 3,
    "num_batches_per_epoch": 4,
    "batch_size": 3,
    "learning_rate": 0.02,
    "weight_decay": 0.9,
    "warmup": 0.9,
    "gradient_clip_val": 1e-6,
    "min_context": 90,
    "validation_windows": 2,
    "max_validation_windows": 2,
    "seed": 1,
    "precision": "bf16-mixed",
    "trainer_kwargs": {"accumulate_grad_batches": 3},
    "tasks": [{"prediction_length": 3}],
}
ELSEWHERE = {
    "checkpoint": "test_a_checkpoint_is_the_one_that_was_named",
    "backbone_options": "test_options_of_a_family_are_refused_where_it_has_none",
    "patience": "test_patience_ends_a_training",
    "gate": "test_the_gate_decides_what_is_handed_over",
    "device": "test_a_device_that_is_not_there_is_refused",
    "folder": "test_a_folder_gets_the_checkpoint",
    "progress": "test_progress_is_shown",
    "time_limit": "test_deadline.py",
    "by": "test_items.py",
    "unusable": "test_entries.py",
    "any_freq": "test_entries.py",
    "interpolate": "test_verdict.py",
    "calibrate": "test_calibration.py",
    "verdict_unit": "test_the_unit_of_a_verdict",
    "task": "test_imputation.py",
}


def test_every_option_has_a_test() -> None:
    assert sorted(NAMES) == sorted([*CHANGES, *ELSEWHERE])
    for name in ELSEWHERE.values():
        assert name.endswith(".py") or name in globals()


def test_options_of_trials_are_those_of_the_estimator_and_have_its_defaults() -> None:
    parameters = inspect.signature(PeftEstimator.__init__).parameters
    for name, field in TrainingSpec.model_fields.items():
        # Trials know of what their units are from their data.
        assert parameters[name].default == field.default or name == "verdict_unit"


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_changes_what_is_trained(name: str, plain: dict[str, Any], tmp_path: Path) -> None:
    found = outcome(tmp_path, **{name: CHANGES[name]})
    assert found != plain


def test_equal_options_change_nothing(plain: dict[str, Any], tmp_path: Path) -> None:
    assert outcome(tmp_path) == plain


def test_a_checkpoint_is_the_one_that_was_named(plain: dict[str, Any], tmp_path: Path) -> None:
    assert outcome(tmp_path, checkpoint="chronos2-nano") != plain
    with pytest.raises(ValueError, match="^checkpoint './bolt-nan'"):
        outcome(tmp_path, checkpoint="./bolt-nan")


@pytest.mark.parametrize("family", ["chronos", "moirai", "lag-llama", "moment"])
def test_options_of_a_family_are_refused_where_it_has_none(family: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^backbone option 'patch' is unknown"):
        outcome(tmp_path, family=family, backbone_options={"patch": 3})


def test_patience_ends_a_training(tmp_path: Path) -> None:
    harmful = dict(learning_rate=5.0, warmup=0.0, max_epochs=6)
    lengths = [len(outcome(tmp_path / str(p), patience=p, **harmful)["history"]) for p in (1, 0)]
    assert lengths[0] < lengths[1] == 6


def test_the_gate_decides_what_is_handed_over() -> None:
    def handed(gate: str) -> Any:
        return get_estimator("chronos")(**{**OPTIONS, "gate": gate, "learning_rate": 5.0}).train(DATA)

    assert handed("keep").backbone.adapter is not None
    with pytest.warns(TuningDidNotHelp):
        assert handed("fallback").backbone.adapter is None
    with pytest.raises(TuningDidNotHelp):
        handed("raise")


def test_the_unit_of_a_verdict() -> None:
    names = ["a/hr", "a/map", "b/hr", "b/map"]
    data = [{**entry, "item_id": name} for name, entry in zip(names, DATA, strict=True)]

    def judged(**options: Any) -> tuple[int, str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TuningDidNotHelp)
            verdict = get_estimator("chronos")(**{**OPTIONS, **options}).train(data).verdict
        return verdict.units, verdict.unit

    assert judged() == (4, "series")
    assert judged(verdict_unit="patients") == (2, "patients")
    with pytest.raises(ValueError, match="^verdict_unit 'patient' is unknown; did you mean 'patients'"):
        judged(verdict_unit="patient")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "3"])
def test_a_device_that_is_not_there_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = get_estimator("chronos")(**{**OPTIONS, "device": device})
    monkeypatch.setattr(type(estimator), "load_backbone", lambda _: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=f"^device '{device}' (does not exist|is unknown)"):
        estimator.train(DATA)


def test_a_folder_gets_the_checkpoint(tmp_path: Path) -> None:
    outcome(tmp_path)
    assert read_checkpoint(tmp_path / LAST)
    with pytest.raises(ValueError, match="^folder '' is no folder; name one"):
        get_estimator("chronos")(prediction_length=6, folder="")


def test_progress_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome(tmp_path / "quiet")
    assert capfd.readouterr().err == ""
    outcome(tmp_path / "shown", progress=True)
    assert "lora" in capfd.readouterr().err


WHOLE = [
    "prediction_length",
    "context_length",
    "max_epochs",
    "num_batches_per_epoch",
    "batch_size",
    "patience",
    "min_context",
    "validation_windows",
    "max_validation_windows",
    "seed",
]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [2.5, True, math.nan, math.inf])
def test_a_number_that_is_not_whole_is_refused_and_not_cut(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} {re.escape(repr(value))} is not a whole number$"):
        get_estimator("chronos")(**{"prediction_length": 6, name: value})
    if name == "prediction_length":
        with pytest.raises(ValueError, match="^prediction_length 2.5 is not a whole number$"):
            get_estimator("chronos")(2.5)


@pytest.mark.parametrize("name", ["weight_decay", "gradient_clip_val", "learning_rate", "warmup"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_number_that_is_no_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} {value} is "):
        get_estimator("chronos")(**{"prediction_length": 6, name: value})


@pytest.mark.parametrize("name", ["weight_decay", "gradient_clip_val", "learning_rate", "warmup"])
@pytest.mark.parametrize("value", [True, False, np.bool_(True)])
def test_true_is_no_number(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} {re.escape(repr(value))} is not a number$"):
        get_estimator("chronos")(**{"prediction_length": 6, name: value})


METHODS: dict[str, Callable[[Any], Any]] = {
    "train": lambda estimator: estimator.train(DATA, validation=DATA),
    "predict": lambda estimator: estimator.train(DATA).predict(DATA, samples=3),
}


@pytest.mark.parametrize("name", METHODS)
def test_unknown_arguments_of_verbs_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        METHODS[name](get_estimator("chronos")(**{**OPTIONS, "max_epochs": 1, "num_batches_per_epoch": 1}))
