"""Limits of time: how they are written, and a training that ends within one, verdict included."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch.callbacks import Callback
from typer.testing import CliRunner

from gluonts_peft import TuningDidNotHelp, get_estimator, training
from gluonts_peft import estimator as estimator_module
from gluonts_peft.cli import app
from gluonts_peft.deadline import Deadline, parse_time_limit, spelled
from gluonts_peft.training import TrainingOptions
from gluonts_peft.trials import TrialSpec, run_trial
from gluonts_peft.trials.spec import TrainingSpec
from gluonts_peft.trials.strict import SpecError
from gluonts_peft.verdict import Judge

DATA = [
    {
        "item_id": f"s{i}",
        "start": pd.Period("2024-01-01", "h"),
        "target": np.random.default_rng(i).normal(20, 1, 90).astype(np.float32),
    }
    for i in range(10)
]


class Clock:
    """Time passes by what happens: a step takes a second, a validation two, a score half of one."""

    STEP, VALIDATION, SCORE = 1.0, 2.0, 0.5

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes by looking at the clock, a hundredth of a second each time."""
    looks = itertools.count()
    monkeypatch.setattr(estimator_module, "time", SimpleNamespace(monotonic=lambda: next(looks) / 100))


class Ticks(Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.now += Clock.STEP

    def on_validation_batch_end(self, *_: Any) -> None:
        self.clock.now += Clock.VALIDATION


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train under a clock of its own; returns the predictor and the seconds that have passed."""
    clock = Clock()
    for name in ("start", "score"):
        method = getattr(Judge, name)

        def timed(self: Judge, backbone: Any, method: Any = method) -> Any:
            clock.now += Clock.SCORE
            return method(self, backbone)

        monkeypatch.setattr(Judge, name, timed)

    def loss(*arguments: Any, method: Any = training.mean_loss) -> float:
        clock.now += Clock.VALIDATION
        return float(method(*arguments))

    monkeypatch.setattr(training, "mean_loss", loss)

    def run(data: Any = DATA, ckpt_path: str | None = None, **options: Any) -> tuple[Any, float]:
        defaults: dict[str, Any] = dict(
            prediction_length=6,
            context_length=24,
            max_epochs=3,
            num_batches_per_epoch=5,
            batch_size=8,
            gate="keep",
            device="cpu",
            progress=False,
        )
        estimator = get_estimator("chronos")(**{**defaults, "trainer_kwargs": {"callbacks": [Ticks(clock)]}, **options})
        estimator.clock, began = clock, clock.now
        predictor = estimator.train(data, ckpt_path=ckpt_path)
        return predictor, clock.now - began

    return run


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("10min", 600.0),
        ("90s", 90.0),
        ("1h30min", 5400.0),
        ("1H", 3600.0),
        ("1.5 hours", 5400.0),
        ("0:10:00", 600.0),
        ("90", 90.0),
        (90, 90.0),
        (0.5, 0.5),
        (np.float32(2), 2.0),
        (timedelta(minutes=2), 120.0),
        (pd.Timedelta("1d"), 86400.0),
        (None, None),
    ],
)
def test_ways_to_write_a_limit(value: Any, seconds: float | None) -> None:
    assert parse_time_limit(value) == seconds
    assert TrainingSpec(time_limit=value).time_limit == seconds
    assert TrainingOptions(time_limit=value).time_limit == seconds
    assert seconds is None or parse_time_limit(spelled(seconds)) == seconds


@pytest.mark.parametrize(
    "value",
    [0, -1, math.nan, math.inf, True, False, "0s", "-5min", "soon", "", "nan", "inf", "10 parsecs", timedelta(0), [10]],
)
def test_what_is_no_limit_is_refused(value: Any) -> None:
    message = f"^time_limit {re.escape(repr(value))} is not a time above 0; write e.g. '90s', '10min'"
    with pytest.raises(ValueError, match=message):
        parse_time_limit(value)
    with pytest.raises(ValueError, match=message):
        get_estimator("chronos")(prediction_length=6, time_limit=value)
    with pytest.raises(SpecError, match="time_limit|neither a number nor a name"):
        TrainingSpec(time_limit=value)


def test_what_is_left() -> None:
    clock = Clock()
    deadline = Deadline(10.0, clock)
    deadline.expect("step", 8.0)
    assert deadline.fits("step")
    assert not deadline.fits("step", "step")
    with deadline.measuring("step"):
        clock.now += 2.0
    deadline.note("step", 1.0)
    # What was measured counts and not what was expected; of that the most.
    assert (deadline.cost("step"), deadline.left()) == (2.0, 8.0)
    assert deadline.fits("step", "step", "step")
    assert not deadline.fits("step", "step", "step", "step")
    assert not deadline.fits("step", "step", "step", "step", margin=1.0)
    assert deadline.fits("unknown")
    deadline.earlier = 8.0
    assert not deadline.fits("unknown")


# Zero-shot takes 2.5 seconds, an epoch 5 for its steps and 4 for its validation and scores, the end 2. A step needs a
# tenth more than 7 seconds, with what comes after it; the first one, by a guess, than 10.8.
@pytest.mark.parametrize(
    ("limit", "batches", "passed"),
    [
        (32, [5, 5, 4], 30.5),  # All but the last step.
        (28, [5, 5], 22.5),  # The third epoch would not get a step and its verdict done.
    ],
)
def test_a_training_ends_in_time(train: Any, limit: float, batches: list[int], passed: float) -> None:
    predictor, took = train(time_limit=limit)
    fit = predictor.fit
    assert took == passed <= limit
    assert [epoch.get("batches", 5) for epoch in fit.history] == batches
    assert (fit.epochs, fit.steps) == (len(batches), sum(batches))
    assert fit.stopped == "time_limit"
    # What was judged is what can be handed over.
    assert fit.verdict.epoch in range(len(batches))
    assert fit.verdict.units == 10
    assert math.isfinite(fit.gate.tuned)


@pytest.mark.parametrize("limit", [0.1, 14])
def test_without_time_for_a_step_and_its_score_it_is_zero_shot(train: Any, limit: float) -> None:
    message = f"time_limit {limit:g}s left no time to train it"
    with pytest.warns(TuningDidNotHelp, match=f"{re.escape(message)}; the zero-shot predictor is returned$"):
        predictor, took = train(time_limit=limit)
    assert took == 2.5
    assert predictor.backbone.adapter is None
    assert (predictor.fit.stopped, predictor.fit.history) == ("time_limit", [])
    assert (predictor.verdict.word, predictor.verdict.epoch) == ("no evidence", None)
    assert predictor.gate.zero_shot > 0
    with pytest.raises(TuningDidNotHelp, match=f"{re.escape(message)}; give it more time$"):
        train(time_limit=limit, gate="raise")


def test_a_limit_changes_no_number_and_more_time_goes_on(train: Any, tmp_path: Path) -> None:
    whole, took = train(time_limit=33)
    assert (took, whole.fit.stopped, whole.fit.steps) == (31.5, None, 15)
    first, took = train(time_limit=30, folder=str(tmp_path))
    # After two steps of the third epoch a next one would come too late.
    assert (took, first.fit.epochs, first.fit.steps) == (28.5, 3, 12)
    assert first.fit.history[:2] == whole.fit.history[:2]
    assert first.fit.history[2]["val_loss"] != whole.fit.history[2]["val_loss"]
    # The checkpoint is that of two epochs, 18 seconds; what zero-shot takes counts in each attempt.
    again, took = train(time_limit=30, folder=str(tmp_path), ckpt_path="last")
    assert (took, again.fit.stopped) == (4.5, "time_limit")
    assert again.fit.history == whole.fit.history[:2]
    on, took = train(folder=str(tmp_path), ckpt_path="last")
    assert (on.fit.history, on.fit.gate, on.fit.stopped) == (whole.fit.history, whole.fit.gate, None)


def test_a_step_that_takes_too_long_drops_its_epoch(train: Any) -> None:
    """The third epoch has a step that nothing foresaw; the best of the first two is handed over."""

    class Slow(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 11:
                for callback in trainer.callbacks:
                    if isinstance(callback, Ticks):
                        callback.clock.now += 50.0

    clock = Clock()
    estimator_callbacks = [Ticks(clock), Slow()]
    estimator = get_estimator("chronos")(
        prediction_length=6, context_length=24, max_epochs=3, num_batches_per_epoch=5, batch_size=8, gate="keep",
        device="cpu", progress=False, time_limit=60, trainer_kwargs={"callbacks": estimator_callbacks},
    )  # fmt: skip
    estimator.clock = clock
    fit = estimator.train(DATA).fit
    assert (fit.stopped, fit.epochs) == ("time_limit", 2)
    assert fit.verdict.epoch in (0, 1)


def test_the_time_of_the_clock_on_the_wall() -> None:
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningDidNotHelp)
        predictor = get_estimator("chronos")(
            prediction_length=6, context_length=24, max_epochs=10_000, num_batches_per_epoch=20, batch_size=8,
            patience=0, device="cpu", progress=False, time_limit="1s",
        ).train(DATA)  # fmt: skip
    assert time.monotonic() - began < 60
    assert predictor.fit.stopped == "time_limit"
    assert predictor.fit.epochs < 10_000
    assert predictor.verdict.units == 10


def test_a_head_that_must_be_trained_needs_time() -> None:
    estimator = get_estimator("moment")(
        prediction_length=6, context_length=64, max_epochs=1, num_batches_per_epoch=2, device="cpu", progress=False,
        time_limit=1,
    )  # fmt: skip
    clock = Clock()
    estimator.clock = lambda: clock.now + 100.0 * (estimator.skipped != {})
    with pytest.raises(ValueError, match="left no time to train it, and the checkpoint has no forecasting head"):
        estimator.train(DATA[:3])


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="gluonts-peft")


def test_the_command_line_ends_in_time_and_says_so(ticking: None, tmp_path: Path) -> None:
    rows = [
        pd.DataFrame(
            {
                "item_id": f"p{number // 2}/{entry['item_id']}",
                "timestamp": pd.date_range("2024-01-01", periods=90, freq="h"),
                "target": entry["target"],
            }
        )
        for number, entry in enumerate(DATA)
    ]
    pd.concat(rows).to_csv(tmp_path / "data.csv", index=False)
    fit = [
        "fit",
        tmp_path / "data.csv",
        "--out",
        tmp_path / "model",
        "--horizon",
        6,
        "--context",
        24,
        "--device",
        "cpu",
    ]
    for limit in ("0s", "soon", "nan"):
        result = cli(*fit, "--time-limit", limit)
        assert result.exit_code == 2
        assert f"error: time_limit '{limit}' is not a time above 0" in result.stderr
    refused = cli(*fit, "--verdict-unit", "patient")
    assert (refused.exit_code, "did you mean 'patients'" in refused.stderr) == (2, True)
    options = ["--time-limit", "1s", "--verdict-unit", "patients", "--no-interpolate", "--epochs", 100_000]
    result = cli(*fit, *options, "--gate", "keep")
    assert result.exit_code == 0, result.output
    assert re.search(r"stopped\W+time_limit, after \d+ epochs and \d+ steps", result.stdout)
    assert re.search(r"stopped\W+time_limit, after", cli("show", tmp_path / "model").stdout)
    verdict = json.loads((tmp_path / "model" / "predictor.json").read_text())["fit"]["verdict"]
    assert (verdict["unit"], verdict["units"], verdict["weight"]) == ("patients", 5, 1.0)


def test_options_of_the_verdict_in_specs() -> None:
    def spec(**training: Any) -> TrialSpec:
        return TrialSpec(family="chronos", checkpoint="bolt-nano", prediction_length=6, training=training)

    plain = spec()
    # Trials of earlier versions are found again.
    assert not {"time_limit", "verdict_unit", "interpolate"} & set(plain.normal_form()["training"])
    assert spec(time_limit="10min").hash() == spec(time_limit=600).hash() != plain.hash()
    assert spec(time_limit="10min").normal_form()["training"]["time_limit"] == 600.0
    assert TrialSpec(**spec(time_limit="10min", interpolate=False).normal_form()).training.interpolate is False
    with pytest.raises(SpecError, match="training.verdict_unit 'patient'"):
        spec(verdict_unit="patient")


def test_a_trial_says_that_the_clock_ended_it(ticking: None, tmp_path: Path) -> None:
    def spec(**training: Any) -> TrialSpec:
        shape = dict(num_batches_per_epoch=10, batch_size=8, patience=0, device="cpu")
        return TrialSpec(
            family="chronos", checkpoint="bolt-nano", prediction_length=6, context_length=24,
            training={**shape, **training},
            data=dict(source="simulated", patients=12, hours=48, vital="hr", windows=1),
        )  # fmt: skip

    result = run_trial(spec(max_epochs=100_000, time_limit="1s", verdict_unit="series", interpolate=False), tmp_path)
    assert result.stopped == "time_limit"
    assert (result.verdict.unit, result.verdict.weight) == ("series", 1.0)
    none = spec(time_limit=1e-3)
    message = "time_limit left no time to train a single step"
    with pytest.warns(TuningDidNotHelp), pytest.raises(ValueError, match=message):
        run_trial(none, tmp_path / "none")
