"""Arguments of the trainer: each works, or is refused by name before anything is computed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch

from gluonts_peft import get_estimator
from gluonts_peft.adapters.base import AdapterError
from gluonts_peft.checkpoint_io import read_checkpoint, write_checkpoint
from gluonts_peft.trainer_kwargs import ACCEPTED, REFUSED, check_trainer_kwargs, deciding, resolve_precision
from gluonts_peft.training import LAST, TrainingOptions

DATA = [
    {
        "item_id": f"s{i}",
        "start": pd.Period("2024-01-01", "h"),
        "target": np.random.default_rng(i).normal(20, 1, 80).astype(np.float32),
    }
    for i in range(4)
]


def make_estimator(**options: Any) -> Any:
    defaults: dict[str, Any] = dict(
        prediction_length=6,
        context_length=32,
        max_epochs=2,
        num_batches_per_epoch=2,
        batch_size=4,
        gate="keep",
        device="cpu",
        progress=False,
    )
    return get_estimator("chronos")(**{**defaults, **options})


ARGUMENTS = [name for name in inspect.signature(pl.Trainer.__init__).parameters if name != "self"]
VALUES: dict[str, Any] = {
    "accumulate_grad_batches": 2,
    "gradient_clip_algorithm": "value",
    "deterministic": True,
    "benchmark": False,
    "callbacks": [],
    "detect_anomaly": True,
    "enable_model_summary": True,
    "inference_mode": False,
    "log_every_n_steps": 1,
    "logger": False,
    "profiler": None,
}


def test_every_argument_of_the_trainer_has_an_answer() -> None:
    assert set(ARGUMENTS) <= ACCEPTED.keys() | REFUSED.keys()
    assert not ACCEPTED.keys() & REFUSED.keys()
    assert VALUES.keys() == ACCEPTED.keys()


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("value", [0, 1, 2, 0.5, True, None, "auto"])
def test_what_does_not_work_is_refused_by_name_when_the_estimator_is_made(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^trainer_kwargs: {name}={re.escape(repr(value))} cannot be used, \w+"):
        make_estimator(trainer_kwargs={name: value})


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_what_is_accepted_trains_to_the_end(name: str) -> None:
    predictor = make_estimator(trainer_kwargs={name: VALUES[name]}).train(DATA)
    assert (predictor.fit.epochs, len(predictor.fit.history)) == (2, 2)
    assert np.isfinite(predictor.gate.tuned)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_epoch": 3}, "argument of the trainer 'max_epoch' is unknown"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0 is not a whole number, 1 or more"),
        ({"accumulate_grad_batches": 2.5}, "accumulate_grad_batches=2.5 is not a whole number, 1 or more"),
        ({"gradient_clip_algorithm": "norms"}, "gradient_clip_algorithm 'norms' is unknown; did you mean 'norm'?"),
    ],
)
def test_wrong_values_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^trainer_kwargs: {re.escape(message)}"):
        check_trainer_kwargs(kwargs)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"accumulate_grad_batches": 2}),
        ({"accumulate_grad_batches": 2}, {}),
        ({}, {"gradient_clip_algorithm": "value"}),
        ({}, {"deterministic": True}),
    ],
)
def test_a_run_goes_on_only_with_the_arguments_that_decide_its_numbers(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    make_estimator(folder=str(tmp_path), trainer_kwargs=first).train(DATA)
    with pytest.raises(ValueError, match="belongs to another run: trainer differ"):
        make_estimator(folder=str(tmp_path), trainer_kwargs=second).train(DATA, ckpt_path="last")
    same = {**first, "log_every_n_steps": 1}
    assert make_estimator(folder=str(tmp_path), trainer_kwargs=same).train(DATA, ckpt_path="last").fit.epochs == 2


@pytest.mark.parametrize("kwargs", [{"accumulate_grad_batches": 1}, {"gradient_clip_algorithm": "norm"}])
def test_a_default_that_is_named_is_the_default(kwargs: dict[str, Any]) -> None:
    assert deciding(kwargs) == {}


def test_a_run_of_a_version_that_did_not_record_them_goes_on(tmp_path: Path) -> None:
    make_estimator(folder=str(tmp_path)).train(DATA)
    state = read_checkpoint(tmp_path / LAST)
    for callback in state["callbacks"].values():
        if "run" in callback:
            assert callback["run"].pop("trainer") == {"precision": "32-true"}
    write_checkpoint(state, tmp_path / LAST)
    again = make_estimator(folder=str(tmp_path), trainer_kwargs={"accumulate_grad_batches": 2})
    assert again.train(DATA, ckpt_path="last").fit.epochs == 2


def test_a_precision_that_the_cpu_would_exchange_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for spelling in ("16-mixed", "16"):
        estimator = make_estimator(precision=spelling)
        monkeypatch.setattr(type(estimator), "load_backbone", lambda _: pytest.fail("loaded"))
        message = f"^precision '{spelling}' is not for the CPU, which mixes with bfloat16: name 'bf16-mixed', or a GPU"
        with pytest.raises(ValueError, match=message):
            estimator.train(DATA)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "32", "32-true", "auto"])
def test_a_precision_is_recorded_as_what_it_is(precision: str, tmp_path: Path) -> None:
    make_estimator(precision=precision, folder=str(tmp_path)).train(DATA)
    [run] = [each["run"] for each in read_checkpoint(tmp_path / LAST)["callbacks"].values() if "run" in each]
    assert run["trainer"]["precision"] == ("bf16-mixed" if "bf16" in precision else "32-true")


def test_an_unknown_precision_is_refused_when_options_are_made() -> None:
    with pytest.raises(ValueError, match=r"^precision '8-bit' is unknown; known: 16-mixed"):
        TrainingOptions(precision="8-bit")
    with pytest.raises(ValueError, match=r"^precision 'bf16-mixd' is unknown; did you mean 'bf16-mixed'\?"):
        make_estimator(precision="bf16-mixd")
    assert resolve_precision("auto", torch.device("cpu")) == "32-true"


@pytest.mark.parametrize(("option", "value"), [("windows", 8), ("cache", True)])
@pytest.mark.parametrize("others", [["lora"], ["layernorm", "lora"], ["bitfit"]])
def test_options_of_a_head_alone_are_refused_beside_others(option: str, value: Any, others: list[str]) -> None:
    head = {"name": "head", "kind": "pooling", option: value}
    with pytest.raises(AdapterError, match=rf"option '{option}' is for training alone, and beside .* leave it out$"):
        make_estimator(adapter=[*others, head])
    make_estimator(adapter=head)
    if option == "cache":
        with pytest.raises(ValueError, match="option 'cache' has no effect with tasks"):
            make_estimator(adapter=head, tasks=[{}])
    make_estimator(adapter=[*others, {"name": "head", "kind": "pooling", "cache": False, "windows": None}])
