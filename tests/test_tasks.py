"""Several tasks for one adapter."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts.model.predictor import Predictor

from gluonts_peft import TuningDidNotHelp, get_adapter, get_estimator, load_backbone
from gluonts_peft.objectives import ForecastLoss, Joint, parse_tasks
from gluonts_peft.series.windows import Windows

HORIZON = 16
TASKS: list[dict[str, Any]] = [
    {"prediction_length": HORIZON},
    {"prediction_length": 4, "name": "next", "weight": 2.0},
    {"task": "reconstruct", "rate": 0.5, "mask_ratio": 0.25},
]
QUICK = dict(max_epochs=3, num_batches_per_epoch=10, batch_size=16, patience=0, progress=False, device="cpu")


def moment(**options: Any) -> Any:
    defaults = dict(context_length=64, adapter=["lora", "head"], tasks=TASKS, gate="keep")
    return get_estimator("moment")(prediction_length=HORIZON, **{**QUICK, **defaults, **options})


@pytest.fixture(scope="module")
def joint(make_dataset):
    return moment(max_epochs=8).train(make_dataset(12, 320))


@pytest.mark.parametrize("checkpoint", ["bolt-nano", "t5-nano", "chronos2-nano"])
def test_a_short_task_sees_the_first_steps_of_a_label_alone(checkpoint, make_batch):
    backbone = load_backbone("chronos", checkpoint=checkpoint, prediction_length=8)
    batch = make_batch(missing=0.0)
    other = {**batch, "future_target": torch.cat([batch["future_target"][:, :3], torch.full((4, 5), 1e3)], 1)}
    short = ForecastLoss(3)
    torch.testing.assert_close(short(backbone, batch), short(backbone, other))
    assert not torch.allclose(backbone.loss(batch), backbone.loss(other))
    torch.testing.assert_close(ForecastLoss(8)(backbone, batch), backbone.loss(batch))


def test_the_joint_loss_is_one_before_tuning_and_a_weighted_mean(make_batch):
    backbone = load_backbone("chronos", checkpoint="bolt-nano", prediction_length=8)
    batch = make_batch(missing=0.0)
    joint = parse_tasks([{"weight": 3.0}, {"prediction_length": 2, "rate": 2.0}], 8)
    scores = joint.scores(backbone, [batch])
    assert scores == {
        "forecast 8": pytest.approx(backbone.loss(batch).mean().item()),
        "forecast 2": pytest.approx(ForecastLoss(2)(backbone, batch).mean().item()),
    }
    assert joint.scaled(scores)(backbone, batch).mean().item() == pytest.approx(1.0)
    expected = 0.6 * backbone.loss(batch) + 0.4 * ForecastLoss(2)(backbone, batch)
    torch.testing.assert_close(joint(backbone, batch), expected)


def test_a_training_step_draws_one_task_by_its_rate(make_batch):
    backbone = load_backbone("chronos", checkpoint="bolt-nano", prediction_length=8)
    batch = {name: value[:1] for name, value in make_batch(missing=0.0).items()}
    joint = parse_tasks([{"rate": 3.0}, {"prediction_length": 2, "weight": 5.0}], 8)
    long, short = (float(loss(backbone, batch)) for loss in (backbone.__class__.loss, ForecastLoss(2)))
    backbone.train()
    with torch.no_grad():
        drawn = [float(joint(backbone, batch)) for _ in range(200)]
    is_long = np.isclose(drawn, long, rtol=1e-4)
    assert np.all(is_long | np.isclose(drawn, 5.0 * short, rtol=1e-4))
    # 200 draws of probability 0.75: four standard deviations are 0.12.
    assert abs(is_long.mean() - 0.75) < 0.12


def test_one_adapter_learns_all_tasks_and_is_stored_once(joint, make_dataset, tmp_path):
    assert joint.gate.zero_shot is None  # the checkpoint brings no forecasting head
    scores = joint.fit.tasks
    assert list(scores) == [f"forecast {HORIZON}", "next", "reconstruct"]
    # There was no forecast before.
    assert [list(score) for score in scores.values()] == [["after"], ["after"], ["before", "after"]]
    relative = scores["reconstruct"]["after"] / scores["reconstruct"]["before"]
    total = scores[f"forecast {HORIZON}"]["after"] + 2.0 * scores["next"]["after"] + 0.5 * relative
    assert joint.gate.tuned == pytest.approx(total / 3.5)
    assert scores["reconstruct"]["after"] < scores["reconstruct"]["before"]

    data = make_dataset(3, 120, seed=1)
    long = list(joint.predict(data))
    short = joint.shorten(4)
    assert short.prediction_length == 4
    for whole, part in zip(long, short.predict(data), strict=True):
        assert part.prediction_length == 4
        np.testing.assert_array_equal(part.quantile(0.5), whole.quantile(0.5)[:4])

    short.serialize(tmp_path / "short")
    again = Predictor.deserialize(tmp_path / "short", device="cpu")
    assert again.prediction_length == 4
    assert again.fit.tasks == scores
    for before, after in zip(long, again.predict(data), strict=True):
        np.testing.assert_array_equal(after.quantile(0.5), before.quantile(0.5)[:4])
    assert again.backbone.prediction_length == HORIZON


def test_the_same_seed_gives_the_same_weights(joint, make_dataset):
    again = moment(max_epochs=8).train(make_dataset(12, 320))
    other = moment(seed=1).train(make_dataset(12, 320))
    state, same, different = (each.backbone.adapter.state_dict() for each in (joint, again, other))
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert any(not torch.equal(state[name], different[name]) for name in state)
    assert again.fit.tasks == joint.fit.tasks


def test_a_task_that_is_not_trained_for_does_not_move(make_dataset):
    """Reconstruction alone leaves the forecasting head at its start, and asks for none."""
    predictor = moment(tasks=[{"task": "reconstruct"}], adapter="lora").train(make_dataset(12, 320))
    assert predictor.backbone.adapter.spec == "lora"
    assert list(predictor.fit.tasks) == ["reconstruct"]
    assert predictor.gate.zero_shot == pytest.approx(1.0)
    assert predictor.fit.tasks["reconstruct"]["after"] < predictor.fit.tasks["reconstruct"]["before"]
    head = predictor.backbone.network.forecast_head
    assert all(not parameter.any() for parameter in head.parameters())


def test_histories_that_are_judged_are_not_trained_on(make_dataset, monkeypatch):
    """Noise cannot be learnt: what seems so was trained on."""
    seen = []
    sample = Windows.sample

    def spy(self, step, batch_size):
        seen.append(self.holdout)
        return sample(self, step, batch_size)

    monkeypatch.setattr(Windows, "sample", spy)
    moment(tasks=[{"task": "reconstruct"}], adapter="lora", validation_windows=2).train(make_dataset(4, 320))
    assert set(seen) == {2 * HORIZON + 64}
    moment(tasks=TASKS[:2], validation_windows=2).train(make_dataset(4, 320))
    assert set(seen[30:]) == {2 * HORIZON}


def test_the_gate_scores_all_tasks_with_a_new_head_too(make_dataset):
    """Tuned for forecasts alone, MOMENT's reconstruction gets worse, and that is said."""
    tasks = [{"weight": 1.0}, {"task": "reconstruct", "rate": 1e-6}]
    estimator = moment(adapter=["lora", {"name": "head", "kind": "linear"}], tasks=tasks)
    with pytest.warns(TuningDidNotHelp, match="task 'reconstruct': no better than before: loss .* before, .* after"):
        predictor = estimator.train(make_dataset(12, 320))
    scores = predictor.fit.tasks
    assert scores["reconstruct"]["after"] > scores["reconstruct"]["before"]
    assert "before" not in scores[f"forecast {HORIZON}"]


def test_a_new_head_is_compared_task_by_task_with_the_models_own(make_dataset):
    head = {"name": "head", "kind": "linear", "output": "quantile"}
    tasks = [{"prediction_length": 8, "weight": 3.0}, {"prediction_length": 2}]
    data = make_dataset(12, 160)
    predictor = get_estimator("chronos")(
        prediction_length=8, checkpoint="bolt-nano", adapter=["lora", head], tasks=tasks, gate="keep", **QUICK
    ).train(data)
    scores = predictor.fit.tasks
    changes = [scores[name]["after"] / scores[name]["before"] for name in ("forecast 8", "forecast 2")]
    assert predictor.gate.zero_shot == pytest.approx(1.0)
    assert predictor.gate.tuned == pytest.approx((3 * changes[0] + changes[1]) / 4)
    assert predictor.gate.measure == "score of all tasks"
    # The same measure on both sides: an untrained head that saw some steps is worse, and not by orders of magnitude.
    assert all(0.5 < change < 10 for change in changes)


@pytest.mark.parametrize("adapter", ["head", {"name": "head", "kind": "projection"}])
def test_a_head_alone_has_no_part_in_reconstruction(make_dataset, adapter):
    with pytest.raises(ValueError, match="trains the forecasting head alone, which has no part in the task 'reconst"):
        moment(adapter=adapter).train(make_dataset(4, 320))


def test_without_tasks_nothing_is_recorded(make_dataset):
    predictor = get_estimator("chronos")(prediction_length=8, gate="keep", **QUICK).train(make_dataset(4, 80))
    assert predictor.fit.tasks == {}
    with pytest.raises(ValueError, match="prediction_length 9 is not from 1 to 8, what the model forecasts"):
        predictor.shorten(9)


def test_reconstruction_needs_a_family_that_reconstructs(make_dataset):
    estimator = get_estimator("chronos")(prediction_length=8, tasks=[{}, {"task": "reconstruct"}], **QUICK)
    with pytest.raises(ValueError, match="does not reconstruct"):
        estimator.train(make_dataset(4, 80))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "tasks [] is not a list of mappings; write e.g. [{'prediction_length': 24}]"),
        ([24], "task 24 is not a mapping; write e.g. {'prediction_length': 24}"),
        ([{"task": "forcast"}], "task 'forcast' is unknown; did you mean 'forecast'? known: forecast, reconstruct"),
        ([{"wieght": 2}], "task 'forecast': option 'wieght' is unknown; did you mean 'weight'?"),
        ([{"mask_ratio": 0.5}], "task 'forecast': option 'mask_ratio' is unknown"),
        ([{"prediction_length": 17}], "prediction_length 17 is not from 1 to 16, the prediction_length of the model"),
        ([{"prediction_length": 0}], "prediction_length 0 is not from 1 to 16"),
        ([{"weight": 0}], "task 'forecast': weight 0 is not a positive number"),
        ([{"rate": float("nan")}], "task 'forecast': rate nan is not a positive number"),
        ([{"task": "reconstruct", "mask_ratio": 1.0}], "mask_ratio 1.0 is not a share between 0 and 1"),
        ([{}, {"prediction_length": 16}], "two tasks have the name 'forecast 16'; give one another name"),
    ],
)
def test_bad_tasks_are_refused_when_the_estimator_is_made(tasks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        moment(tasks=tasks)


def test_a_joint_loss_names_itself_so_that_a_run_is_known_again():
    joint = parse_tasks(TASKS, HORIZON)
    assert repr(joint) == repr(parse_tasks(TASKS, HORIZON))
    assert repr(joint) != repr(parse_tasks(TASKS[:2], HORIZON))
    assert isinstance(joint, Joint)


def test_adapters_other_than_lora_take_tasks_too(make_dataset):
    predictor = moment(adapter=["layernorm", "head"], tasks=TASKS[:2]).train(make_dataset(12, 320))
    assert predictor.fit.tasks["next"]["after"] < predictor.fit.tasks[f"forecast {HORIZON}"]["after"]
    assert {part.name for part in predictor.backbone.adapter.parts} == {"layernorm", "head"}
    assert get_adapter(["layernorm", "head"]).spec == predictor.backbone.adapter.spec


def test_the_program_that_compares_joint_and_single_training_runs(tmp_path, monkeypatch, capsys):
    hours = np.arange(14400)
    frame = pd.DataFrame({"date": pd.date_range("2016-07-01", periods=len(hours), freq="h")})
    frame["OT"] = np.sin(2 * np.pi * hours / 24) + np.random.default_rng(0).normal(size=len(hours))
    frame.to_csv(tmp_path / "ett.csv", index=False)
    folder = Path(__file__).parents[1] / "examples" / "trace"
    monkeypatch.syspath_prepend(str(folder))
    small = ["--seeds", "1", "--epochs", "1", "--steps", "2", "--stride", "960", "--long", "12", "--short", "4"]
    files = ["--data", str(tmp_path / "ett.csv"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["joint.py", *files, *small])
    runpy.run_path(str(folder / "joint.py"), run_name="__main__")

    rows = {row["name"]: row for row in map(json.loads, (tmp_path / "out" / "joint.jsonl").read_text().splitlines())}
    assert set(rows["joint"]) == {"name", "seed", "forecast 12", "forecast 4", "reconstruction"}
    assert set(rows["forecast 4 alone"]) == {"name", "seed", "forecast 4", "reconstruction"}
    assert set(rows["reconstruction alone"]) == {"name", "seed", "reconstruction"}
    assert all(
        0.0 < value < 5.0 for row in rows.values() for name, value in row.items() if name not in ("name", "seed")
    )
    assert "joint, longer" in capsys.readouterr().out
