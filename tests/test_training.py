from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts.model.forecast import Forecast
from lightning.pytorch.callbacks import Callback, EarlyStopping
from safetensors.torch import load_file

from gluonts_peft import get_estimator
from gluonts_peft.checkpoint_io import read_checkpoint, write_checkpoint
from gluonts_peft.training import Gate, TrainingOptions, resolve_device

HYBRID = ["layernorm", {"name": "lora", "r": 1}]
DROPOUT = {"name": "lora", "lora_dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora", "patience": 3},
    "adalora": {"adapter": {"name": "adalora", "tinit": 2, "tfinal": 5}},
    "hybrid": {"adapter": HYBRID, "weight_decay": 0.1},
    "t5-dropout": {"checkpoint": "t5-nano", "adapter": DROPOUT},
    # Two rounds of selection, the second half way, and two modules of three are out at the end.
    "trace": {"adapter": {"name": "trace", "keep": 0.34, "schedule": 2}, "patience": 3},
}
# Changes no weight by as much as rounding lets the forecasts see: the loss stays what it was.
STANDSTILL = 1e-30


def make_dataset(count: int = 10, length: int = 90, seed: int = 0) -> list[dict[str, Any]]:
    """AR(1) around a level."""
    generator = np.random.default_rng(seed)
    entries = []
    for i in range(count):
        values = generator.standard_normal(length)
        for step in range(1, length):
            values[step] += 0.8 * values[step - 1]
        start = pd.Period("2024-01-01 00:00", freq="h")
        entries.append({"item_id": f"s{i}", "start": start, "target": (20 + values).astype(np.float32)})
    return entries


DATA = make_dataset()


def make_estimator(**options: Any) -> Any:
    defaults: dict[str, Any] = dict(
        prediction_length=8,
        context_length=32,
        max_epochs=2,
        num_batches_per_epoch=5,
        batch_size=8,
        gate="keep",
        device="cpu",
        progress=False,
    )
    return get_estimator("chronos")(**{**defaults, **options})


def with_callbacks(*callbacks: Callback, **trainer_kwargs: Any) -> dict[str, Any]:
    return {"trainer_kwargs": {"callbacks": list(callbacks), **trainer_kwargs}}


def weights_of(predictor: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in predictor.backbone.adapter.state_dict().items()}


def values_of(forecasts: Any) -> np.ndarray:
    def values(forecast: Forecast) -> np.ndarray:
        return forecast.samples if hasattr(forecast, "samples") else forecast.forecast_array

    return np.stack([values(forecast) for forecast in forecasts])


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def assert_same_run(left: Any, right: Any) -> None:
    """Same weights and same numbers, bit by bit."""
    assert equal(weights_of(left), weights_of(right))
    assert left.fit.history == right.fit.history
    assert (left.fit.gate, left.fit.epochs, left.fit.steps) == (right.fit.gate, right.fit.epochs, right.fit.steps)


class HaltError(Exception):
    """Stands for a crash."""


class Crash(Callback):
    """Raises in one hook of one epoch."""

    def __init__(self, hook: str, epoch: int) -> None:
        self.hook, self.epoch = hook, epoch

    def _maybe(self, hook: str, trainer: Any) -> None:
        if hook == self.hook and trainer.current_epoch == self.epoch:
            raise HaltError(f"{hook} of epoch {self.epoch}")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 2:
            self._maybe("batch", trainer)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self._maybe("validation", trainer)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        # Ours comes after a user's callbacks, so this epoch's checkpoint is not written.
        self._maybe("epoch", trainer)


class Recorder(Callback):
    """Notes rates and gradients of all steps, and how often training began."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.norms: list[float] = []
        self.starts = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.starts += 1

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        # Modules that are out of a selection have none.
        gradients = [parameter.grad for parameter in module.adapter.parameters() if parameter.grad is not None]
        self.norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))


# One process imports everything and never trains; each run is a fork of it, so that runs share no state. A killed run
# goes slower than its reference, so that there is time to kill it.
RUNNER = """
import json, os, signal, sys, time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file

torch.set_num_threads(1)
task = json.loads(Path(sys.argv[1]).read_text())
root = Path(sys.argv[1]).parent

import numpy as np
import pandas as pd
from gluonts_peft import get_adapter, get_estimator

Estimator = get_estimator("chronos")
start = pd.Period("2024-01-01 00:00", freq="h")
data = [{"start": start, "target": np.array(values, np.float32)} for values in task["data"]]
get_adapter("lora").attach(Estimator(**task["common"]).load_backbone())


class Steps(Callback):
    def __init__(self, pause):
        self.count, self.pause = 0, pause

    def on_train_batch_start(self, *_):
        self.count += 1
        time.sleep(self.pause)


def fork(options, folder, name, slow=False, ckpt_path=None):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        steps = Steps(0.02 if slow else 0.0)
        extra = {"trainer_kwargs": {"callbacks": [steps]}}
        where = None if folder is None else str(folder)
        predictor = Estimator(**{**task["common"], **options, **extra}, folder=where).train(data, ckpt_path=ckpt_path)
        tensors = predictor.backbone.adapter.state_dict()
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, root / f"{name}.safetensors")
        fit = predictor.fit
        record = [fit.history, fit.gate.zero_shot, fit.gate.tuned, fit.epochs, fit.steps]
        (root / f"{name}.json").write_text(json.dumps({"fit": record, "steps": steps.count}))
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(pid):
    assert os.waitpid(pid, 0)[1] == 0, "a run failed"


killed = {}
for name, options in task["cases"].items():
    finish(fork(options, None, f"{name}-whole"))
    for moment, delay in task["moments"]:
        label = f"{name}-{moment}"
        folder = root / label
        pid = fork(options, folder, label + "-never", slow=True)
        seen = set()
        while len(seen) < moment:
            if (folder / "last.ckpt").exists():
                seen.add((folder / "last.ckpt").stat().st_mtime_ns)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended before it could be killed"
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        killed[label] = os.WIFSIGNALED(status) and os.WTERMSIG(status)
        finish(fork(options, folder, label + "-resumed", ckpt_path="last"))
(root / "killed.json").write_text(json.dumps(killed))
"""
# After how many checkpoints, and how many seconds later: in the middle of an epoch, and right after one.
MOMENTS = [(1, 0.05), (3, 0.0)]


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what whole, killed and resumed runs left behind."""
    root = tmp_path_factory.mktemp("killed")
    for name in ("home", "cwd"):
        (root / name).mkdir()
    common = dict(prediction_length=8, context_length=32, max_epochs=6, num_batches_per_epoch=5, batch_size=8)
    common |= dict(gate="keep", device="cpu", progress=False)
    task = {
        "common": common,
        "cases": CASES,
        "moments": MOMENTS,
        "data": [entry["target"].tolist() for entry in DATA],
    }
    (root / "task.json").write_text(json.dumps(task))
    (root / "runner.py").write_text(RUNNER)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HF_", "MPL"))}
    # Forks of a process that has started OpenMP threads can hang. Matplotlib, which GluonTS imports, keeps a list of
    # fonts, by default at home.
    environment |= {"HOME": str(root / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"MPLCONFIGDIR": str(root / "fonts")}
    done = subprocess.run(
        [sys.executable, str(root / "runner.py"), str(root / "task.json")],
        cwd=root / "cwd",
        env=environment,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.mark.parametrize("moment", [moment for moment, _ in MOMENTS])
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_killed_and_resumed_ends_as_an_undisturbed_one(
    killed_runs: Path, case: str, moment: int
) -> None:
    label = f"{case}-{moment}"
    assert json.loads((killed_runs / "killed.json").read_text())[label] == 9
    assert not (killed_runs / f"{label}-never.json").exists()
    resumed = load_file(killed_runs / f"{label}-resumed.safetensors")
    whole = load_file(killed_runs / f"{case}-whole.safetensors")
    assert whole
    assert equal(resumed, whole)
    after = json.loads((killed_runs / f"{label}-resumed.json").read_text())
    undisturbed = json.loads((killed_runs / f"{case}-whole.json").read_text())
    assert after["fit"] == undisturbed["fit"]
    # It went on where the last checkpoint was, instead of beginning anew.
    assert 0 < after["steps"] <= undisturbed["steps"] - 5 * moment
    assert after["steps"] % 5 == 0


def test_nothing_is_written_but_into_the_named_folder(killed_runs: Path) -> None:
    """The runs of the other process, some without a folder, began with an empty home and working directory."""
    assert list((killed_runs / "home").rglob("*")) == []
    assert list((killed_runs / "cwd").rglob("*")) == []


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, Any]:
    """Undisturbed runs, in this process."""
    return {name: make_estimator(max_epochs=4, **options).train(DATA) for name, options in CASES.items()}


@pytest.mark.parametrize(
    ("case", "hook", "epoch"),
    [
        ("lora", "batch", 1),
        ("lora", "validation", 3),
        ("adalora", "epoch", 2),
        ("adalora", "batch", 3),
        ("hybrid", "epoch", 1),
        ("hybrid", "validation", 1),
        ("t5-dropout", "batch", 2),
        # Between the rounds of selection, and after the last one.
        ("trace", "batch", 1),
        ("trace", "validation", 3),
        # Nothing had been written: "last" begins at the beginning.
        ("lora", "batch", 0),
    ],
)
def test_a_run_that_crashed_and_was_resumed_ends_as_an_undisturbed_one(
    whole_runs: dict[str, Any], tmp_path: Path, case: str, hook: str, epoch: int
) -> None:
    options = {**CASES[case], "max_epochs": 4, "folder": str(tmp_path)}
    with pytest.raises(HaltError, match=f"^{hook} of epoch {epoch}$"):
        make_estimator(**options, **with_callbacks(Crash(hook, epoch))).train(DATA)
    assert (tmp_path / "last.ckpt").exists() == (epoch > 0)
    recorder = Recorder()
    resumed = make_estimator(**options, **with_callbacks(recorder)).train(DATA, ckpt_path="last")
    assert_same_run(resumed, whole_runs[case])
    assert len(recorder.rates) == 5 * (4 - epoch)


def test_a_run_can_crash_again_and_again(whole_runs: dict[str, Any], tmp_path: Path) -> None:
    options = {**CASES["lora"], "max_epochs": 4, "folder": str(tmp_path)}
    for epoch in (1, 2, 3):
        with pytest.raises(HaltError):
            make_estimator(**options, **with_callbacks(Crash("batch", epoch))).train(DATA, ckpt_path="last")
    assert_same_run(make_estimator(**options).train(DATA, ckpt_path="last"), whole_runs["lora"])


def test_a_checkpoint_elsewhere_can_be_named(whole_runs: dict[str, Any], tmp_path: Path) -> None:
    options = {**CASES["lora"], "max_epochs": 4}
    with pytest.raises(HaltError):
        make_estimator(**options, folder=str(tmp_path), **with_callbacks(Crash("batch", 2))).train(DATA)
    resumed = make_estimator(**options).train(DATA, ckpt_path=str(tmp_path / "last.ckpt"))
    assert_same_run(resumed, whole_runs["lora"])


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(whole_runs: dict[str, Any], tmp_path: Path) -> None:
    options = {**CASES["lora"], "max_epochs": 4, "folder": str(tmp_path)}
    first = make_estimator(**options).train(DATA)
    again = make_estimator(**options).train(DATA, ckpt_path="last")
    assert_same_run(again, first)
    # A folder changes nothing.
    assert_same_run(first, whole_runs["lora"])
    assert again.fit.seconds == first.fit.seconds


def test_a_run_that_stopped_early_is_not_continued(tmp_path: Path) -> None:
    options = {"max_epochs": 6, "patience": 2, "learning_rate": STANDSTILL, "folder": str(tmp_path)}
    first = make_estimator(**options).train(DATA)
    assert first.fit.epochs == 3
    again = make_estimator(**options).train(DATA, ckpt_path="last")
    assert_same_run(again, first)


@pytest.fixture(scope="module")
def stored_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    make_estimator(folder=str(folder)).train(DATA)
    return folder


@pytest.mark.parametrize(
    ("options", "data", "differing"),
    [
        ({"batch_size": 4}, None, "options differ (batch_size: 8 there, 4 here)"),
        ({"seed": 3}, None, "windows, options differ (seed: 0 there, 3 here)"),
        ({"learning_rate": 0.5}, None, "options differ (learning_rate: 0.002 there, 0.5 here)"),
        ({"max_epochs": 9}, None, "options differ (max_epochs: 2 there, 9 here)"),
        ({"adapter": {"name": "lora", "r": 3}}, None, "adapter differ ('lora' there, {'name': 'lora', 'r': 3} here)"),
        ({"min_context": 5}, None, "windows differ (min_context: 8 there, 5 here)"),
        ({"context_length": 16}, None, "validation, windows differ"),
        ({"validation_windows": 2}, None, "validation, windows differ ("),
        ({}, make_dataset(seed=1), "data, validation differ ("),
        ({}, make_dataset(count=11), "data, validation differ ("),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_a_run_is_not_resumed_as_another(stored_run: Path, options: dict[str, Any], data: Any, differing: str) -> None:
    ckpt_path = stored_run / "last.ckpt"
    before = ckpt_path.read_bytes()
    message = f"checkpoint {str(ckpt_path)!r} belongs to another run: {differing}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make_estimator(**options).train(DATA if data is None else data, ckpt_path=str(ckpt_path))
    assert ckpt_path.read_bytes() == before


def test_other_validation_data_are_another_run(stored_run: Path) -> None:
    message = "belongs to another run: validation, windows differ"
    held_out = [{**entry, "target": entry["target"][:-8]} for entry in DATA]
    with pytest.raises(ValueError, match=message):
        make_estimator().train(DATA, held_out, ckpt_path=str(stored_run / "last.ckpt"))


def test_a_folder_that_holds_a_run_is_not_overwritten(stored_run: Path, tmp_path: Path) -> None:
    before = (stored_run / "last.ckpt").read_bytes()
    message = (
        f"folder {str(stored_run)!r} already holds a training run; pass ckpt_path='last' to go on with it, or name"
        " another folder"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_estimator(folder=str(stored_run)).train(DATA)
    # Nor by a run that goes on from somewhere else.
    make_estimator(folder=str(tmp_path)).train(DATA)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_estimator(folder=str(stored_run)).train(DATA, ckpt_path=str(tmp_path / "last.ckpt"))
    assert (stored_run / "last.ckpt").read_bytes() == before


def test_last_needs_a_folder() -> None:
    message = "ckpt_path 'last' needs the folder of the earlier run; name it as `folder`"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_estimator().train(DATA, ckpt_path="last")


def test_a_checkpoint_that_is_missing_or_damaged_is_named(stored_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.ckpt"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(f'checkpoint {str(path)!r} does not exist')}$"):
        make_estimator().train(DATA, ckpt_path=str(path))
    path.write_bytes((stored_run / "last.ckpt").read_bytes()[:-100])
    message = f"{str(path)!r} is not a training checkpoint of this project, or is damaged: "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make_estimator().train(DATA, ckpt_path=str(path))
    write_checkpoint({"epoch": 1}, path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'checkpoint {str(path)!r} belongs to another run: ')}"):
        make_estimator().train(DATA, ckpt_path=str(path))


def test_a_checkpoint_holds_the_adapter_and_not_the_base(stored_run: Path) -> None:
    state = read_checkpoint(stored_run / "last.ckpt")
    assert state["state_dict"]
    assert all("lora" in name for name in state["state_dict"])
    # Weights, best weights and two moments of the optimiser, 9,000 numbers each; the base has 80 times as many.
    assert (stored_run / "last.ckpt").stat().st_size < 400_000


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle")

    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    options = {"folder": str(tmp_path)}
    with pytest.raises(HaltError):
        make_estimator(**options, **with_callbacks(Crash("batch", 1))).train(DATA)
    assert make_estimator(**options).train(DATA, ckpt_path="last").fit.epochs == 2


@pytest.mark.parametrize("case", ["adalora", "t5-dropout"])
def test_same_seed_same_numbers(whole_runs: dict[str, Any], case: str) -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    again = make_estimator(max_epochs=4, **CASES[case]).train(DATA)
    assert_same_run(again, whole_runs[case])
    assert np.array_equal(values_of(again.predict(DATA)), values_of(whole_runs[case].predict(DATA)))
    other = make_estimator(max_epochs=4, **CASES[case], seed=1).train(DATA)
    assert not equal(weights_of(other), weights_of(again))
    assert not np.array_equal(values_of(other.predict(DATA)), values_of(again.predict(DATA)))


@pytest.mark.parametrize("case", ["hybrid", "t5-dropout"])
def test_global_state_is_untouched(whole_runs: dict[str, Any], case: str) -> None:
    """The fixture has trained before, so that what imports do is over."""

    def state() -> tuple[Any, ...]:
        named = {name: item for name, item in logging.root.manager.loggerDict.items() if hasattr(item, "level")}
        return (
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            {name: (item.level, item.disabled, len(item.handlers)) for name, item in named.items()},
            (logging.root.level, logging.root.manager.disable),
            list(warnings.filters),
            (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()),
            torch.are_deterministic_algorithms_enabled(),
            dict(os.environ),
        )

    before = state()
    list(make_estimator(**CASES[case]).train(DATA).predict(DATA))
    for left, right in zip(before, state(), strict=True):
        assert left == right


@pytest.mark.parametrize(
    ("warmup", "rising", "falling"),
    [(0.4, [1 / 5, 2 / 5, 3 / 5, 4 / 5], 6), (0.0, [], 10), (0.1, [1 / 2], 9)],
)
def test_the_rate_rises_linearly_and_falls_by_half_a_cosine(warmup: float, rising: list[float], falling: int) -> None:
    recorder = Recorder()
    predictor = make_estimator(learning_rate=0.004, warmup=warmup, **with_callbacks(recorder)).train(DATA)
    expected = rising + [(1 + math.cos(math.pi * step / falling)) / 2 for step in range(falling)]
    assert recorder.rates == pytest.approx([0.004 * factor for factor in expected], rel=1e-12)
    assert max(recorder.rates) == 0.004
    assert predictor.fit.learning_rate == 0.004


def test_the_default_rate_is_the_adapters_own() -> None:
    recorder = Recorder()
    predictor = make_estimator(adapter="bitfit", warmup=0.0, **with_callbacks(recorder)).train(DATA)
    assert recorder.rates[0] == predictor.backbone.adapter.learning_rate == predictor.fit.learning_rate == 3e-3


def test_gradients_are_clipped_to_the_norm_that_was_asked_for() -> None:
    clipped, free = Recorder(), Recorder()
    make_estimator(gradient_clip_val=1e-3, **with_callbacks(clipped)).train(DATA)
    make_estimator(gradient_clip_val=0.0, **with_callbacks(free)).train(DATA)
    assert clipped.norms == pytest.approx([1e-3] * 10, rel=1e-3)
    assert min(free.norms) > 1e-2


@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (2, 3), (0, 5), (9, 5)])
def test_training_stops_after_patience_epochs_without_a_better_loss(patience: int, epochs: int) -> None:
    predictor = make_estimator(max_epochs=5, patience=patience, learning_rate=STANDSTILL).train(DATA)
    assert predictor.fit.epochs == len(predictor.fit.history) == epochs
    assert predictor.fit.steps == 5 * epochs
    assert len({entry["val_loss"] for entry in predictor.fit.history}) == 1


def test_the_weights_of_the_best_epoch_are_kept() -> None:
    """A rate far too large makes the loss go up and down."""

    class Snapshots(Callback):
        def __init__(self) -> None:
            self.weights: list[dict[str, torch.Tensor]] = []

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            self.weights.append({name: t.detach().clone() for name, t in module.adapter.state_dict().items()})

    snapshots = Snapshots()
    predictor = make_estimator(
        max_epochs=6, patience=0, learning_rate=0.03, warmup=0.0, interpolate=False, **with_callbacks(snapshots)
    ).train(DATA)
    losses = [entry["val_loss"] for entry in predictor.fit.history]
    best = int(np.argmin([entry["score"] for entry in predictor.fit.history]))
    assert best == predictor.verdict.epoch
    assert [entry["epoch"] for entry in predictor.fit.history] == list(range(6))
    for epoch, weights in enumerate(snapshots.weights):
        assert equal(weights, weights_of(predictor)) == (epoch == best)
    assert predictor.gate.tuned == pytest.approx(losses[best], rel=1e-5)


def test_epochs_and_the_gate_are_compared_by_one_mean() -> None:
    """Over windows whose losses differ by orders of magnitude, so that single precision would show."""
    data = [{**entry, "target": entry["target"] * 10.0**i} for i, entry in enumerate(make_dataset())]
    # Nothing of it is folded, which would make the last bits others.
    options: dict[str, Any] = dict(adapter="bitfit", max_epochs=3, validation_windows=4, interpolate=False)
    predictor = make_estimator(checkpoint="bolt-nano", **options).train(data)
    losses = [entry["val_loss"] for entry in predictor.fit.history]
    assert predictor.gate.tuned == losses[predictor.verdict.epoch]
    assert float(np.float32(losses[0])) != losses[0]


class Poison(Callback):
    """Makes the weights NaN in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.current_epoch == self.epoch and index == 4:
            module.adapter.parameters()[0].data.fill_(math.nan)


def test_a_loss_that_is_not_finite_ends_the_training_with_the_best_finite_weights(
    whole_runs: dict[str, Any], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    options = {**CASES["lora"], "max_epochs": 4, "interpolate": False, "folder": str(tmp_path)}
    predictor = make_estimator(**options, **with_callbacks(Poison(2))).train(DATA)
    losses = [entry["val_loss"] for entry in predictor.fit.history]
    assert math.isnan(losses[2])
    assert losses[:2] == [entry["val_loss"] for entry in whole_runs["lora"].fit.history[:2]]
    assert predictor.fit.epochs == 3
    assert predictor.gate.tuned == pytest.approx(losses[predictor.verdict.epoch], rel=1e-5)
    assert all(tensor.isfinite().all() for tensor in weights_of(predictor).values())
    assert "validation loss is nan after epoch 2: training stops" in caplog.messages
    # And it stays ended.
    again = make_estimator(**options).train(DATA, ckpt_path="last")
    assert again.fit.epochs == 3
    assert equal(weights_of(again), weights_of(predictor))


def test_no_finite_loss_at_all_is_no_success() -> None:
    predictor = make_estimator(**with_callbacks(Poison(0))).train(DATA)
    assert predictor.fit.epochs == 1
    assert predictor.gate.tuned == math.inf
    assert not predictor.gate.passed
    assert str(predictor.gate).startswith("no evidence: ")


def test_callbacks_of_the_user_serve_every_training_and_the_arguments_stay_theirs() -> None:
    recorder = Recorder()
    callbacks: list[Callback] = [recorder]
    given = {"callbacks": callbacks, "gradient_clip_algorithm": "value"}
    estimator = make_estimator(trainer_kwargs=given)
    for count in (1, 2):
        estimator.train(DATA)
        assert recorder.starts == count
        assert len(recorder.rates) == 10 * count
    assert given == {"callbacks": callbacks, "gradient_clip_algorithm": "value"}
    assert callbacks == [recorder]
    assert estimator.trainer_kwargs == given


def test_the_users_own_early_stopping_counts_too(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=1)
    options = dict(max_epochs=5, learning_rate=STANDSTILL, folder=str(tmp_path), **with_callbacks(stopping))
    assert make_estimator(**options).train(DATA).fit.epochs == 2


def test_accumulated_gradients_come_from_different_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    from gluonts_peft.series.windows import Windows

    steps: list[int] = []
    sample = Windows.sample

    def spy(self: Windows, step: int, batch_size: int) -> Any:
        steps.append(step)
        return sample(self, step, batch_size)

    monkeypatch.setattr(Windows, "sample", spy)
    make_estimator(num_batches_per_epoch=4, trainer_kwargs={"accumulate_grad_batches": 2}).train(DATA)
    assert steps == list(range(8))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_epochs", 0, "max_epochs 0 is not positive"),
        ("num_batches_per_epoch", -3, "num_batches_per_epoch -3 is not positive"),
        ("batch_size", 0, "batch_size 0 is not positive"),
        ("weight_decay", -0.5, "weight_decay -0.5 is negative"),
        ("gradient_clip_val", -1.0, "gradient_clip_val -1.0 is negative"),
        ("patience", -2, "patience -2 is negative"),
        ("seed", -1, "seed -1 is negative"),
        ("learning_rate", 0.0, "learning_rate 0.0 is not positive"),
        ("learning_rate", -1.0, "learning_rate -1.0 is not positive"),
        ("learning_rate", math.inf, "learning_rate inf is not positive"),
        ("learning_rate", math.nan, "learning_rate nan is not positive"),
        ("warmup", 1.0, "warmup 1.0 is not a share of the training; name a number from 0 to below 1"),
        ("warmup", -0.1, "warmup -0.1 is not a share of the training; name a number from 0 to below 1"),
    ],
)
def test_options_that_cannot_be_used_are_refused(option: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TrainingOptions(**{option: value})


def test_total_steps() -> None:
    assert TrainingOptions(max_epochs=3, num_batches_per_epoch=7).total_steps == 21


@pytest.mark.parametrize(
    ("asked", "available", "expected"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
        ("cuda", 0, "device 'cuda' does not exist; this machine has 0 CUDA devices"),
        ("cuda:7", 2, "device 'cuda:7' does not exist; this machine has 2 CUDA devices"),
        ("gpu", 1, "device 'gpu' is unknown; name 'auto', 'cpu', 'cuda' or 'cuda:1'"),
    ],
)
def test_the_device_is_the_one_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str, available: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    if expected.startswith("device"):
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            resolve_device(asked)
    else:
        assert resolve_device(asked) == torch.device(expected)


@pytest.mark.parametrize(
    ("zero_shot", "tuned", "passed", "text"),
    [
        (
            2.0,
            1.5,
            True,
            "no verdict: validation loss 2 zero-shot, 1.5 tuned (-25.00 %, 7 windows, which chose the epoch)",
        ),
        (
            2.0,
            2.0,
            False,
            "no verdict: validation loss 2 zero-shot, 2 tuned (+0.00 %, 7 windows, which chose the epoch)",
        ),
        (
            2.0,
            3.0,
            False,
            "no verdict: validation loss 2 zero-shot, 3 tuned (+50.00 %, 7 windows, which chose the epoch)",
        ),
        (
            2.0,
            math.inf,
            False,
            "no verdict: validation loss 2 zero-shot, inf tuned (+inf %, 7 windows, which chose the epoch)",
        ),
        (
            2.0,
            math.nan,
            False,
            "no verdict: validation loss 2 zero-shot, nan tuned (+nan %, 7 windows, which chose the epoch)",
        ),
        (
            0.0,
            1.0,
            False,
            "no verdict: validation loss 0 zero-shot, 1 tuned (+nan %, 7 windows, which chose the epoch)",
        ),
    ],
)
def test_the_gate_wants_a_lower_loss(zero_shot: float, tuned: float, passed: bool, text: str) -> None:
    gate = Gate(zero_shot, tuned, 7)
    assert gate.passed is passed
    assert str(gate) == text
