"""chronos2-nano: official, small, and it looks at covariates. The figures stand in the model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chronos import Chronos2Pipeline
from scipy.signal import lfilter

import gluonts_peft
from gluonts_peft import PeftPredictor
from gluonts_peft_chronos import ChronosBackbone, ChronosEstimator

HORIZON, PAST, COUNT = 24, 96, 128


def predictor(**options: Any) -> PeftPredictor:
    backbone = gluonts_peft.load_backbone("chronos", checkpoint="chronos2-nano", prediction_length=HORIZON, **options)
    return PeftPredictor(backbone, device="cpu")


def smooth(rng: np.random.Generator, steps: int, pole: float) -> np.ndarray:
    """Return autoregressions of unit variance, shape (COUNT, steps)."""
    values = lfilter([1.0], [1.0, -pole], rng.standard_normal((COUNT, steps + 200)), axis=1)[:, 200:]
    result: np.ndarray = values / values.std()
    return result


def driven(driver: Callable[[np.random.Generator, int], np.ndarray], sign: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return targets and the covariate that drives them, shape (COUNT, PAST + HORIZON)."""
    rng, steps = np.random.default_rng(5), PAST + HORIZON
    covariate = driver(rng, steps)
    effect = sign * rng.uniform(1.0, 2.0, (COUNT, 1))
    return 50.0 + 0.3 * smooth(rng, steps, 0.8) + effect * covariate, 10.0 * covariate


DRIVERS = {
    "smooth": lambda rng, steps: smooth(rng, steps, 0.9),
    "event": lambda rng, steps: 1.0 * (smooth(rng, steps, 0.9) > 0.7),
}


def error(target: np.ndarray, **fields: np.ndarray) -> float:
    """Return the mean absolute error of the medians; features are given as far as their field says they are known."""
    start = pd.Period("2024-01-01 00:00", freq="h")
    dataset = [
        {"start": start, "target": row[:PAST], **{name: value[i] for name, value in fields.items()}}
        for i, row in enumerate(target)
    ]
    medians = np.stack([forecast.quantile(0.5) for forecast in predictor().predict(dataset)])
    return float(np.abs(medians - target[:, PAST:]).mean())


def test_it_is_small_and_official() -> None:
    folder = ChronosBackbone.bundled()["chronos2-nano"]
    config = json.loads((folder / "config.json").read_text())

    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "pretraining.json"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4_000_000
    assert config["architectures"] == ["Chronos2Model"]
    assert config["chronos_pipeline_class"] == "Chronos2Pipeline"


@pytest.mark.parametrize("horizon", [12, 72, 100])
def test_it_forecasts_as_the_official_pipeline_does(horizon: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = 50 + torch.randn(6, 300, generator=generator).cumsum(1)
    values[0, :200] = torch.nan
    values[1, 50:70] = torch.nan
    start = pd.Period("2024-01-01 00:00", freq="h")
    dataset = [{"start": start, "target": row.numpy()} for row in values]
    backbone = gluonts_peft.load_backbone("chronos", checkpoint="chronos2-nano", prediction_length=horizon)
    found = np.stack([each.forecast_array for each in PeftPredictor(backbone, device="cpu").predict(dataset)])
    pipeline = Chronos2Pipeline.from_pretrained(ChronosBackbone.bundled()["chronos2-nano"], device_map="cpu")
    expected = torch.cat(pipeline.predict(list(values), prediction_length=horizon)).numpy()

    scale = np.abs(expected).max()
    np.testing.assert_allclose(found[..., :72], expected[..., :72], rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("name", sorted(DRIVERS))
def test_a_covariate_that_drives_the_target_lowers_the_error(name: str) -> None:
    target, covariate = driven(DRIVERS[name])
    alone = error(target)
    known = error(target, feat_dynamic_real=covariate[:, None])
    unrelated = error(target, feat_dynamic_real=np.roll(covariate, 1, axis=0)[:, None])

    assert known < 0.9 * alone
    assert known < 0.9 * unrelated


def test_tuning_with_a_covariate_learns_what_it_does() -> None:
    """Its effect is negative, which the checkpoint hardly reads off a history."""
    target, covariate = driven(DRIVERS["smooth"], sign=-1)
    start = pd.Period("2024-01-01 00:00", freq="h")

    def entries(rows: range, steps: int) -> list[dict[str, Any]]:
        return [
            {"start": start, "target": target[i, :PAST], "feat_dynamic_real": covariate[i : i + 1, :steps]}
            for i in rows
        ]

    options = {"checkpoint": "chronos2-nano", "context_length": 72, "max_epochs": 4, "num_batches_per_epoch": 40}
    estimator = ChronosEstimator(HORIZON, adapter="lora", device="cpu", progress=False, **options)
    tuned, test = estimator.train(entries(range(96), PAST)), entries(range(96, COUNT), PAST + HORIZON)
    errors = [
        float(np.abs(np.stack([each.quantile(0.5) for each in model.predict(test)]) - target[96:, PAST:]).mean())
        for model in (predictor(context_length=72), tuned)
    ]

    assert tuned.gate is not None
    assert tuned.gate.tuned < 0.75 * tuned.gate.zero_shot
    assert errors[1] < 0.75 * errors[0]


def test_an_adapter_on_it_opens_in_the_official_pipeline(tmp_path: Path) -> None:
    backbone = gluonts_peft.load_backbone("chronos", checkpoint="chronos2-nano", prediction_length=HORIZON)
    adapter = gluonts_peft.get_adapter("lora").attach(backbone)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02)
    adapter.save(tmp_path)
    history = 50 + torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).cumsum(1)
    expected = torch.cat(Chronos2Pipeline.from_pretrained(tmp_path).predict(list(history), prediction_length=HORIZON))
    with backbone.inference():
        found = backbone.forecast({"past_target": history, "past_observed_values": torch.ones_like(history)}).values

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
