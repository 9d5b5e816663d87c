"""TRACE: what the importance is, what is selected, and what is left at the end."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from torch import Tensor

import gluonts_peft
from gluonts_peft import Windows, get_adapter
from gluonts_peft.adapters.base import AdapterError
from gluonts_peft.adapters.load import load_adapter
from gluonts_peft.adapters.trace import SELECTIONS, Trace
from gluonts_peft.backbone import Backbone

ROOT = Path(__file__).parents[2]
Batches = Callable[..., dict[str, Tensor]]


@cache
def base(checkpoint: str = "bolt-nano") -> Backbone:
    return gluonts_peft.load_backbone("chronos", checkpoint=checkpoint, prediction_length=8, context_length=48)


def attached(checkpoint: str = "bolt-nano", seed: int = 0, **options: Any) -> Trace:
    """A selection that is off identity, so that every gate has an influence."""
    torch.manual_seed(seed)
    adapter = get_adapter({"name": "trace", **options}).attach(deepcopy(base(checkpoint)))
    assert isinstance(adapter, Trace)
    with torch.no_grad():
        for name, parameter in adapter.attached.network.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
            elif name.endswith(".gate"):
                parameter.add_(0.3 * torch.randn(()))
    return adapter


def ready(adapter: Trace, make_batch: Batches, steps: int = 100, windows: int = 16) -> Trace:
    """Prepared and given held-out windows."""
    adapter.prepare(steps)
    adapter.score_on([make_batch(windows, seed=5)], adapter.attached.loss)
    return adapter


def rounds(adapter: Trace) -> list[dict[str, list[Any]]]:
    found: list[dict[str, list[Any]]] = adapter.report()["rounds"]
    return found


def select(adapter: Trace, seed: int = 0, last: int = 1000) -> Trace:
    """Go through all rounds without training in between."""
    for step in [step for step in adapter._rounds if step <= last]:
        torch.manual_seed(seed + step)
        adapter.after_step(step - 1)
    return adapter


def loss_of(backbone: Backbone, batch: Mapping[str, Tensor]) -> float:
    with backbone.inference():
        return float(backbone.loss(batch).double().mean())


def test_importance_is_the_slope_of_the_held_out_loss_in_the_gate(make_batch: Batches) -> None:
    adapter = ready(attached(selection="all_on", simulations=1, schedule=1), make_batch)
    batch, step = make_batch(16, seed=5), 0.02
    slopes = []
    for layer in adapter._gated.values():
        ends = []
        for change in (step, -step):
            with torch.no_grad():
                layer.gate.add_(change)
            ends.append(loss_of(adapter.attached, batch))
            with torch.no_grad():
                layer.gate.sub_(change)
        slopes.append(abs(ends[0] - ends[1]) / (2 * step))
    select(adapter)

    np.testing.assert_allclose(rounds(adapter)[0]["importance"], slopes, rtol=0.02, atol=3e-4)
    assert max(slopes) > 0.01


def test_a_module_is_scored_as_it_will_be_without_the_others(make_batch: Batches) -> None:
    """Mean and standard error over the simulations in which a module was on, each on windows of its own."""
    adapter = ready(attached(keep=0.5, schedule=1, simulations=6), make_batch, windows=18)
    step = next(iter(adapter._rounds))
    torch.manual_seed(7)
    masks = adapter._masks(torch.ones(28, dtype=torch.bool), 14)
    everything = make_batch(18, seed=5)
    gates = {name: layer.gate for name, layer in adapter._gated.items()}
    slopes: dict[str, list[float]] = {name: [] for name in gates}
    for number, mask in enumerate(masks):
        for layer, on in zip(adapter._gated.values(), mask.tolist(), strict=True):
            layer.on = on
        batch = {name: tensor[number::6] for name, tensor in everything.items()}
        loss = adapter.attached.loss(batch).mean()
        found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
        for name, on, slope in zip(gates, mask.tolist(), found, strict=True):
            if on:
                slopes[name].append(0.0 if slope is None else abs(float(slope)))
            else:
                assert slope is None
    for layer in adapter._gated.values():
        layer.on = True
    torch.manual_seed(7)
    adapter.after_step(step - 1)
    (seen,) = rounds(adapter)

    np.testing.assert_allclose(seen["importance"], [np.mean(own) for own in slopes.values()], rtol=1e-4, atol=1e-8)
    errors = [np.std(own, ddof=1) / np.sqrt(len(own)) for own in slopes.values()]
    np.testing.assert_allclose(seen["standard_error"], errors, rtol=1e-3, atol=1e-8)
    order = np.argsort(seen["importance"])[::-1]
    assert sorted(order[:14]) == np.flatnonzero(seen["on"]).tolist()


def test_masks_are_balanced_and_leave_out_what_is_no_candidate() -> None:
    adapter = attached(simulations=7)
    candidates = torch.rand(28) < 0.7
    masks = adapter._masks(candidates, 5)
    times = masks.sum(0)[candidates]

    assert masks.shape == (7, 28)
    assert masks.sum(1).tolist() == [5] * 7
    assert not masks[:, ~candidates].any()
    assert int(times.max() - times.min()) <= 1
    assert len({tuple(mask.tolist()) for mask in masks}) > 1


def test_gate_gradient_does_not_change_when_a_gate_is_scaled_against_its_b(make_batch: Batches) -> None:
    found = {}
    for score in ("gradient", "gate_gradient"):
        for factor in (1.0, 3.0):
            adapter = attached(selection="all_on", schedule=1, score=score)
            with torch.no_grad():
                for layer in adapter._gated.values():
                    layer.gate.mul_(factor)
                    layer.lora_B["default"].weight.div_(factor)
            found[score, factor] = rounds(select(ready(adapter, make_batch)))[0]["importance"]

    np.testing.assert_allclose(found["gate_gradient", 3.0], found["gate_gradient", 1.0], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(3 * np.array(found["gradient", 3.0]), found["gradient", 1.0], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_budget_shrinks_in_equal_steps(selection: str, keep: float, make_batch: Batches) -> None:
    adapter = select(ready(attached(keep=keep, selection=selection), make_batch))
    counts = [sum(seen["on"]) for seen in rounds(adapter)]

    assert counts == [round(28 * (1 - (1 - keep) * k / 4)) for k in (1, 2, 3, 4)]
    assert list(adapter._rounds) == [12, 24, 36, 48]
    passes = 32 if selection in ("dsic", "all_on") else 0
    assert adapter.report()["cost"]["backward_passes"] == passes
    assert len(adapter.kept) == counts[-1]


def test_what_is_out_for_good_does_not_come_back(make_batch: Batches) -> None:
    for reversible in (True, False):
        adapter = ready(attached(keep=0.25, reversible=reversible, selection="random"), make_batch)
        states = np.array([seen["on"] for seen in rounds(select(adapter))])
        returned = (states[1:] & ~states[:-1]).any()
        assert returned == reversible


def test_a_masked_module_keeps_what_it_has_learnt(make_batch: Batches) -> None:
    adapter = ready(attached(keep=0.25, selection="random"), make_batch)
    select(adapter, last=12)
    off = [layer for layer in adapter._gated.values() if not layer.on]
    before = [layer.lora_B["default"].weight.clone() for layer in off]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adapter.attached.loss(make_batch()).mean().backward()
        optimizer.step()

    assert off
    assert all(torch.equal(layer.lora_B["default"].weight, was) for layer, was in zip(off, before, strict=True))


def test_controls_choose_what_they_say(make_batch: Batches) -> None:
    magnitude = select(ready(attached(selection="magnitude", schedule=1), make_batch))
    gates = torch.stack([layer.gate.detach().abs() for layer in magnitude._gated.values()])
    chosen = [select(ready(attached(selection="random", schedule=1), make_batch), seed) for seed in (0, 0, 1)]

    assert np.flatnonzero(rounds(magnitude)[0]["on"]).tolist() == sorted(gates.argsort(descending=True)[:14].tolist())
    assert chosen[0].kept == chosen[1].kept != chosen[2].kept


def test_finishing_changes_no_output_and_leaves_a_plain_lora(make_batch: Batches, tmp_path: Path) -> None:
    adapter = select(ready(attached(keep=0.25), make_batch))
    backbone, batch = adapter.attached, make_batch(missing=0.0)
    before = backbone.loss(batch)
    network, kept = deepcopy(base().network), adapter.kept
    adapter.finish()

    assert torch.equal(backbone.loss(batch), before)
    assert adapter.kept == kept
    assert len(kept) == 7
    # Rank 2 on matrices of 80 by 80.
    assert adapter.num_parameters() == 7 * 2 * 160
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == kept
    assert json.loads((tmp_path / "gluonts_peft.json").read_text())["kept"] == kept
    plain = network(context=batch["past_target"]).quantile_preds
    opened = peft.PeftModel.from_pretrained(network, tmp_path)
    found = opened(context=batch["past_target"]).quantile_preds
    expected = backbone.network(context=batch["past_target"]).quantile_preds
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-2
    torch.manual_seed(3)
    again = deepcopy(base())
    loaded = load_adapter(tmp_path, again)
    assert isinstance(loaded, Trace)
    assert (loaded.spec, loaded.kept) == (adapter.spec, kept)
    assert torch.equal(again.loss(batch), before)
    # Without our record it is what it is: LoRA.
    (tmp_path / "gluonts_peft.json").unlink()
    assert load_adapter(tmp_path, deepcopy(base())).name == "lora"


def test_folded_forecasts_know_gates_and_masks(make_batch: Batches) -> None:
    adapter = select(ready(attached(keep=0.5), make_batch))
    batch = make_batch()
    with adapter.attached.inference():
        expected = adapter.attached.forecast(batch).values
    with adapter.attached.reading() as reader:
        inside = reader.forecast(batch).values
    assert not adapter.settled or adapter._gated
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-4)


def test_a_selection_goes_on_where_it_was(make_batch: Batches) -> None:
    whole = select(ready(attached(keep=0.25), make_batch))
    first = select(ready(attached(keep=0.25), make_batch), last=24)
    state = {name: tensor.detach().clone() for name, tensor in first.state_dict().items()}
    second = ready(attached(keep=0.25, seed=9), make_batch)
    second.load_state_dict(state)
    second.load_training_state({name: tensor.clone() for name, tensor in first.training_state().items()})
    assert [layer.on for layer in second._gated.values()] == rounds(first)[-1]["on"]
    for step in (36, 48):
        torch.manual_seed(step)
        second.after_step(step - 1)

    assert rounds(second) == rounds(whole)
    assert second.kept == whole.kept
    assert second.settled


def make_dataset(count: int, length: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    start = pd.Period("2024-01-01", freq="h")
    values = 20 + generator.standard_normal((count, length)).cumsum(1)
    return [{"item_id": f"s{i}", "start": start, "target": row.astype(np.float32)} for i, row in enumerate(values)]


def estimator(**options: Any) -> Any:
    defaults: dict[str, Any] = dict(
        prediction_length=8,
        context_length=32,
        max_epochs=4,
        num_batches_per_epoch=6,
        batch_size=4,
        gate="keep",
        progress=False,
    )
    return gluonts_peft.get_estimator("chronos")(**{**defaults, **options})


def test_the_selection_counts_updates_where_gradients_accumulate() -> None:
    spec = {"name": "trace", "keep": 0.5, "schedule": 2}
    predictor = estimator(adapter=spec, trainer_kwargs={"accumulate_grad_batches": 2}).train(make_dataset(10, 120))
    assert len(predictor.fit.report["rounds"]) == 2
    assert predictor.fit.report["cost"]["backward_passes"] == 16
    assert np.isfinite(predictor.gate.tuned)


def test_an_error_of_fewer_than_two_simulations_is_not_known() -> None:
    spec = {"name": "trace", "keep": 0.25, "schedule": 1, "simulations": 4}
    rounds = estimator(adapter=spec).train(make_dataset(10, 120)).fit.report["rounds"]
    assert set(rounds[0]["standard_error"]) == {None}
    assert all(value > 0 for value in rounds[0]["importance"])
    spec["selection"] = "random"
    rounds = estimator(adapter=spec).train(make_dataset(10, 120)).fit.report["rounds"]
    assert set(rounds[0]["standard_error"]) == {None}


def test_an_epoch_before_the_last_selection_is_not_the_best(tmp_path: Path) -> None:
    # A rate at which the loss rises: the first epochs would be the best.
    spec = {"name": "trace", "keep": 0.25, "schedule": 2, "alpha_steps": 6}
    predictor = estimator(adapter=spec, learning_rate=0.05, interpolate=False).train(make_dataset(10, 120))
    losses = [epoch["val_loss"] for epoch in predictor.fit.history]

    assert predictor.verdict.epoch >= 1
    assert predictor.fit.gate.tuned == pytest.approx(losses[predictor.verdict.epoch], rel=1e-5)
    assert len(predictor.fit.report["kept"]) == 7
    assert [sum(seen["on"]) for seen in predictor.fit.report["rounds"]] == [18, 7]
    assert predictor.fit.report["cost"]["backward_passes"] == 16
    predictor.serialize(tmp_path / "stored")
    again = gluonts_peft.PeftPredictor.deserialize(tmp_path / "stored")
    assert again.fit.report == predictor.fit.report
    data = make_dataset(3, 40)
    for left, right in zip(again.predict(data), predictor.predict(data), strict=True):
        np.testing.assert_array_equal(left.forecast_array, right.forecast_array)


def test_scoring_windows_are_neither_trained_on_nor_those_of_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[Any] = []
    trained: list[Any] = []
    score_on, sample = Trace.score_on, Windows.sample

    def spy_scoring(self: Trace, batches: Any, loss: Any) -> None:
        scored.extend(batch["future_target"].numpy() for batch in batches)
        score_on(self, batches, loss)

    def spy_training(self: Windows, step: int, batch_size: int) -> Any:
        batch = sample(self, step, batch_size)
        trained.append(batch["future_target"])
        return batch

    monkeypatch.setattr(Trace, "score_on", spy_scoring)
    monkeypatch.setattr(Windows, "sample", spy_training)
    data = make_dataset(10, 120)
    estimator(adapter={"name": "trace", "schedule": 1}, max_epochs=1, num_batches_per_epoch=8, batch_size=80).train(
        data
    )

    def labels(ends: range) -> set[tuple[float, ...]]:
        return {tuple(entry["target"][end - 8 : end]) for entry in data for end in ends}

    # 64 wanted: six or seven of each of ten series, two steps apart, before the gate's eight.
    found = {tuple(row) for row in np.concatenate(scored)}
    assert labels(range(102, 113, 2)) < found <= labels(range(100, 113, 2))
    assert len(found) == 64
    # The last label that is trained on ends where the first scored one begins.
    drawn = {tuple(row) for row in np.concatenate(trained)}
    assert drawn <= labels(range(16, 95))
    assert drawn & labels(range(94, 95))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep 0 is not a share of the modules in (0, 1]"),
        ({"keep": 1.5}, "keep 1.5 is not a share of the modules in (0, 1]"),
        ({"keep": float("nan")}, "keep nan is not a share of the modules in (0, 1]"),
        ({"keep": "half"}, "keep 'half' is not a share of the modules in (0, 1]"),
        ({"simulations": 0}, "simulations 0 is not a positive whole number"),
        ({"schedule": 2.5}, "schedule 2.5 is not a positive whole number"),
        ({"alpha_steps": 0}, "alpha_steps 0 is not a positive whole number"),
        ({"mask_proportion": 1.0}, "mask_proportion 1.0 is not a share of the modules in [0, 1)"),
        ({"score": "gate"}, "score 'gate' is unknown; known: gate_gradient, gradient"),
        (
            {"selection": "dsci"},
            "selection 'dsci' is unknown; did you mean 'dsic'? known: all_on, dsic, magnitude, random",
        ),
        ({"use_dora": True}, "option 'use_dora' is unknown; "),
        ({"simulation": 4}, "option 'simulation' is unknown; did you mean 'simulations'? "),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError) as caught:
        get_adapter({"name": "trace", **options})
    assert str(caught.value).startswith(f"adapter 'trace': {message}")


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({"alpha_steps": 30}, 100, "schedule 4 with alpha_steps 30 leaves none of the 100 training steps after the"),
        ({}, 4, "schedule 4 with alpha_steps 1 leaves none of the 4 training steps after the last selection"),
        ({"keep": 0.05}, 100, "8 simulations with 1 of 28 modules on leave some unscored; use at least 28 simulations"),
        ({"mask_proportion": 0.9}, 100, "8 simulations with 3 of 28 modules on leave some unscored; use at least 10"),
    ],
    ids=str,
)
def test_a_training_that_cannot_hold_the_selection_is_refused(
    options: dict[str, Any], steps: int, message: str
) -> None:
    with pytest.raises(AdapterError) as caught:
        attached(**options).prepare(steps)
    assert str(caught.value).startswith(f"adapter 'trace': {message}")


def test_more_simulations_than_data_are_refused() -> None:
    # One series of 50 steps: no more than half of its 27 training windows are held out.
    message = "8 simulations need as many held-out windows, and there are 3; lower simulations or give more"
    with pytest.raises(AdapterError, match=message):
        estimator(adapter="trace").train(make_dataset(1, 50))


def test_without_held_out_windows_nothing_is_scored() -> None:
    adapter = attached()
    adapter.prepare(100)
    with pytest.raises(AdapterError, match="has no held-out windows to score on"):
        adapter.after_step(11)


def test_layers_that_are_not_linear_are_refused() -> None:
    backbone = deepcopy(base())
    with pytest.raises(AdapterError, match="gates linear layers, and 'shared' is a Embedding; name other sites"):
        get_adapter({"name": "trace", "target_modules": ["shared"]}).attach(backbone)
    state = backbone.network.state_dict()
    assert list(state) == list(base().network.state_dict())


def test_keeping_everything_selects_nothing() -> None:
    predictor = estimator(adapter={"name": "trace", "keep": 1}, max_epochs=1).train(make_dataset(10, 120))

    assert predictor.fit.report["rounds"] == []
    assert len(predictor.fit.report["kept"]) == 28


def load_program() -> Any:
    found = importlib.util.spec_from_file_location("etth1", ROOT / "examples" / "trace" / "etth1.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("table", ["heads", "selection"])
def test_the_program_on_etth1_runs(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two of the heads, and DSIC against one control."""
    program = load_program()
    monkeypatch.setattr(program, "KINDS", ("linear", "pooling"))
    monkeypatch.setattr(program, "SMALL", ["pooling"])
    monkeypatch.setattr(program, "SELECTIONS", ("dsic", "random"))
    hours = np.arange(14400)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"date": pd.date_range("2016-07-01", periods=len(hours), freq="h")})
    frame["OT"] = np.sin(2 * np.pi * hours / 24) + rng.normal(size=len(hours))
    frame.to_csv(tmp_path / "ett.csv", index=False)
    options = {"--data": tmp_path / "ett.csv", "--out": tmp_path / "out", "--horizons": 336, "--stride": 800}
    options |= {"--seeds": 1 if table == "heads" else 2, "--epochs": 2, "--steps": 5, "--batch-size": 2, "--pool": 16}
    options |= {"--rates": 0.003, "--keep": 0.5, "--head": "pooling"}
    monkeypatch.setattr(sys, "argv", ["etth1.py", table, *(str(part) for pair in options.items() for part in pair)])
    program.main()
    first = capsys.readouterr()
    lines = (tmp_path / "out" / f"{table}.jsonl").read_text().splitlines()
    program.main()
    second = capsys.readouterr()

    assert len(lines) == {"heads": 2 + 3, "selection": 2 * 2}[table]
    assert all(0.3 < json.loads(line)["mse"] < 5.0 for line in lines)
    assert {"heads": "TRACE + pooling", "selection": "larger than noise"}[table] in first.out
    # The second time there is nothing left to do.
    assert (second.out, second.err) == (first.out, "")


def test_the_study_on_vitals_runs(tmp_path: Path) -> None:
    from gluonts_peft.trials import load_study, run_study

    path = ROOT / "examples" / "trace" / "vitals.yaml"
    adapters = load_study(path).grid["adapter"]
    tiny = {"prediction_length": 6, "context_length": 24, "seed": [0], "data.patients": 20, "data.hours": 8}
    tiny |= {"data.windows": 1, "training.max_epochs": 2, "training.num_batches_per_epoch": 3, "training.batch_size": 4}
    tiny |= {"training.device": "cpu", "adapter": [adapters[number] for number in (0, 2, 5, 12)]}
    results = run_study(load_study(path, tiny), tmp_path / "out", progress=False)

    assert [result.error for result in results if result.status != "finished"] == []
    # None; seven of 28 modules, twice; half of them and a head on two patches and the state of the decoder.
    assert [result.trainable_parameters for result in results] == [
        0,
        7 * 320,
        7 * 320,
        14 * 320 + 7 * 80 + 7 + 7 * 2 * 6 * 9 + 6 * 9,
    ]
