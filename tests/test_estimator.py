from __future__ import annotations

import copy
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts.core import serde
from gluonts.dataset.common import ListDataset
from gluonts.dataset.pandas import PandasDataset
from gluonts.model.estimator import Estimator

import gluonts_peft.estimator
from gluonts_peft import PeftEstimator, PeftPredictor, TuningDidNotHelp, get_adapter, get_estimator, list_adapters
from gluonts_peft.series.entries import UnusableWarning
from gluonts_peft.series.store import SeriesStore
from gluonts_peft.series.windows import Windows
from gluonts_peft.training import mean_loss

NAN = float("nan")


def make_dataset(count: int = 8, length: int = 80, seed: int = 0) -> list[dict[str, Any]]:
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
        prediction_length=6,
        context_length=32,
        max_epochs=2,
        num_batches_per_epoch=5,
        batch_size=8,
        device="cpu",
        progress=False,
    )
    return get_estimator("chronos")(**{**defaults, **options})


def values_of(predictor: PeftPredictor, data: Any = DATA) -> np.ndarray:
    return np.stack([forecast.forecast_array for forecast in predictor.predict(data)])


@pytest.fixture(scope="module")
def zero_shot() -> PeftPredictor:
    return make_estimator(adapter="none").train(DATA)


@pytest.fixture(scope="module")
def tuned() -> PeftPredictor:
    return make_estimator(gate="keep").train(DATA)


def test_a_family_is_found_by_name_and_is_a_gluonts_estimator() -> None:
    kind = get_estimator("chronos")
    assert issubclass(kind, PeftEstimator)
    assert issubclass(kind, Estimator)
    assert kind(prediction_length=3).prediction_length == 3
    assert kind(prediction_length=3).lead_time == 0
    with pytest.raises(ValueError, match=r"^family 'cronos' is unknown; did you mean 'chronos'\? known: .*chronos"):
        get_estimator("cronos")


HYBRID = ["layernorm", {"name": "lora", "r": 1}]
OPTIONS: dict[str, Any] = {
    "checkpoint": "t5-nano",
    "adapter": HYBRID,
    "learning_rate": 1e-3,
    "validation_windows": 2,
    "backbone_options": {"num_samples": 5, "temperature": 0.5},
    "folder": "somewhere",
    "trainer_kwargs": {"detect_anomaly": True},
}


def attributes(estimator: PeftEstimator) -> dict[str, Any]:
    return {name: value for name, value in vars(estimator).items() if not name.startswith("__")}


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda estimator: serde.load_json(serde.dump_json(estimator))],
    ids=["copy", "deepcopy", "json"],
)
def test_an_estimator_can_be_copied_and_stored(again: Any) -> None:
    estimator = make_estimator(**OPTIONS)
    other = again(estimator)
    assert other is not estimator
    assert type(other) is type(estimator)
    assert repr(other) == repr(estimator)
    assert attributes(other) == attributes(estimator)
    assert other.adapter == HYBRID
    assert other.backbone_options == OPTIONS["backbone_options"]


def test_a_stored_estimator_trains_as_the_first_one(tuned: PeftPredictor) -> None:
    again = serde.load_json(serde.dump_json(make_estimator(gate="keep"))).train(DATA)
    assert np.array_equal(values_of(again), values_of(tuned))


def test_the_representation_shows_all_arguments() -> None:
    text = repr(make_estimator(**OPTIONS))
    assert text.startswith("gluonts_peft_chronos.estimator.ChronosEstimator(")
    for part in ("prediction_length=6", "adapter=['layernorm', {'name': 'lora', 'r': 1}]", "checkpoint='t5-nano'"):
        assert part in text


def test_arguments_are_converted_and_not_changed() -> None:
    backbone_options = {"num_samples": 5}
    estimator = make_estimator(prediction_length="6", batch_size=4.0, backbone_options=backbone_options)
    assert (estimator.prediction_length, estimator.options.batch_size) == (6, 4)
    estimator.backbone_options["num_samples"] = 7
    assert backbone_options == {"num_samples": 5}


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_epoch'"):
        get_estimator("chronos")(prediction_length=6, max_epoch=3)
    message = "hyperparameter 'max_epoch' is unknown; did you mean 'max_epochs'? known: adapter, any_freq, "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        get_estimator("chronos").from_hyperparameters(prediction_length=6, max_epoch=3)


def test_from_hyperparameters_and_from_inputs_build_the_same() -> None:
    kind = get_estimator("chronos")
    hyperparameters = {"prediction_length": "6", "adapter": "bitfit", "max_epochs": 3}
    direct = kind(prediction_length=6, adapter="bitfit", max_epochs=3)
    for estimator in (kind.from_hyperparameters(**hyperparameters), kind.from_inputs(DATA, **hyperparameters)):
        assert type(estimator) is kind
        assert attributes(estimator) == attributes(direct)


def test_adapters_are_kept_in_normal_form() -> None:
    assert make_estimator(adapter={"name": "lora"}).adapter == "lora"
    assert make_estimator(adapter=get_adapter("lora", r=1)).adapter == {"name": "lora", "r": 1}
    assert make_estimator(adapter=("layernorm", "lora")).adapter == ["layernorm", "lora"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_length": 0}, "prediction_length 0 is not positive; name the steps to forecast"),
        ({"prediction_length": -4}, "prediction_length -4 is not positive; name the steps to forecast"),
        ({"context_length": 0}, "context_length 0 is not positive"),
        ({"min_context": -2}, "min_context -2 is not positive"),
        ({"validation_windows": 0}, "validation_windows 0 is not positive"),
        ({"max_validation_windows": -1}, "max_validation_windows -1 is not positive"),
        ({"max_epochs": 0}, "max_epochs 0 is not positive"),
        ({"batch_size": -8}, "batch_size -8 is not positive"),
        ({"patience": -1}, "patience -1 is negative"),
        ({"seed": -7}, "seed -7 is negative"),
        ({"gate": "rase"}, "gate 'rase' is unknown; did you mean 'raise'? known: fallback, keep, raise"),
        ({"gate": ""}, "gate '' is unknown; known: fallback, keep, raise"),
        (
            {"adapter": "lorra"},
            f"adapter 'lorra' is unknown; did you mean 'lora'? known: {', '.join(list_adapters())}",
        ),
        (
            {"adapter": ["lora", "bitfitt"]},
            f"adapter 'bitfitt' is unknown; did you mean 'bitfit'? known: {', '.join(list_adapters())}",
        ),
        (
            {"adapter": {"r": 2}},
            "adapter {'r': 2} has no 'name'; write e.g. {'name': 'lora', 'r': 2}",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_estimator(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"checkpoint": "bolt-nan"},
            "checkpoint 'bolt-nan' is neither a bundled name (bolt-nano,"
            " chronos2-nano, t5-nano), nor an existing folder, nor a hub id"
            " such as 'amazon/chronos-bolt-tiny'",
        ),
        ({"device": "gpu"}, "device 'gpu' is unknown; name 'auto', 'cpu', 'cuda' or 'cuda:1'"),
        (
            {"device": "cuda:99"},
            f"device 'cuda:99' does not exist; this machine has {torch.cuda.device_count()} CUDA devices",
        ),
        (
            {"context_length": 100_000},
            "context_length 100000 exceeds the 504 steps that checkpoint 'bolt-nano' can see",
        ),
        ({"backbone_options": {"temperature": 0.5}}, "backbone option 'temperature' is unknown; known: (none)"),
        (
            {"checkpoint": "t5-nano", "backbone_options": {"temprature": 0.5}},
            "backbone option 'temprature' is unknown; did you mean 'temperature'? known: num_samples, temperature,"
            " top_k, top_p",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_does_not_exist_is_refused_when_it_is_needed(options: dict[str, Any], message: str) -> None:
    estimator = make_estimator(**options)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        estimator.train(DATA)


def changed(series: int, **fields: Any) -> list[dict[str, Any]]:
    return [{**entry, **fields} if i == series else entry for i, entry in enumerate(DATA)]


def spoiled(step: int, value: float) -> Any:
    target = DATA[2]["target"].astype(np.float64)
    target[step] = value
    return changed(2, target=target)


NEEDED = (
    "a window needs min_context=6 + prediction_length=6 + holdout=6, 18 steps, and the longest series has {}: lower one"
    " of them or give longer series with observed values"
)
SHORT = make_dataset(count=3, length=17)
MISSING = [{**entry, "target": np.full(80, NAN)} for entry in DATA[:4]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "dataset is empty: give at least one entry with a 'target'"),
        ([{**DATA[0], "target": []}], "dataset has no values: all of its 1 targets have length 0"),
        (SHORT, "no series is left, skipped 3 of 3 series: 3 too short; " + NEEDED.format(17)),
        (
            MISSING,
            "no series is left, skipped 4 of 4 series: 4 without observed values in context and label; "
            + NEEDED.format(80),
        ),
        (
            SHORT[:2] + MISSING,
            "no series is left, skipped 6 of 6 series: 2 too short, 4 without observed values in context and label; "
            + NEEDED.format(80),
        ),
        (spoiled(5, math.inf), "target of item_id 's2' has the value inf at step 5: give NaN for missing values"),
        (spoiled(7, -math.inf), "target of item_id 's2' has the value -inf at step 7: give NaN for missing values"),
        (spoiled(1, 1e39), "target of item_id 's2' has the value 1e+39 at step 1, too large for float32: rescale it"),
        (
            changed(1, target=np.ones((2, 80))),
            "multivariate targets are not supported, target of item_id 's1' has shape (2, 80): give each dimension as"
            " an entry of its own",
        ),
        (
            [{"item_id": "bare", "start": DATA[0]["start"]}],
            "item_id 'bare' has no 'target', only ['item_id', 'start']: give one of shape (steps,)",
        ),
    ],
    ids=["empty", "no-values", "short", "missing", "both", "inf", "-inf", "huge", "multivariate", "no-target"],
)
def test_data_that_cannot_be_used_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_estimator().train(data)


def test_validation_data_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="^dataset is empty: give at least one entry with a 'target'$"):
        make_estimator().train(DATA, [])


def test_series_that_are_too_short_are_left_out_if_asked(tuned: PeftPredictor) -> None:
    """They take no part: neither in training nor in the gate."""
    data = [*DATA, *make_dataset(count=3, length=11)]
    with pytest.raises(
        ValueError, match=r"^3 of 11 series cannot be trained on: item_id 's0' \(11 steps, needed are 18"
    ):
        make_estimator(gate="keep").train(data)
    estimator = make_estimator(gate="keep", unusable="skip")
    with pytest.warns(UnusableWarning, match="^3 of 11 series are left out, they cannot be trained on: item_id 's0'"):
        mixed = estimator.train(data)
    assert estimator.skipped == {"training": 3}
    assert mixed.fit == type(mixed.fit)(**{**vars(tuned.fit), "seconds": mixed.fit.seconds})
    assert np.array_equal(values_of(mixed), values_of(tuned))


@pytest.mark.parametrize("kind", ["list", "pandas", "generator", "lists-of-numbers"])
def test_any_gluonts_dataset_will_do(tuned: PeftPredictor, kind: str) -> None:
    data: Any = {
        "list": lambda: ListDataset(DATA, freq="h"),
        "pandas": lambda: PandasDataset(
            {
                entry["item_id"]: pd.DataFrame(
                    {"target": entry["target"].astype(np.float64)},
                    index=pd.period_range(entry["start"], periods=80, freq="h"),
                )
                for entry in DATA
            }
        ),
        "generator": lambda: (entry for entry in DATA),
        "lists-of-numbers": lambda: [{**entry, "target": entry["target"].tolist()} for entry in DATA],
    }[kind]()
    assert np.array_equal(values_of(make_estimator(gate="keep").train(data)), values_of(tuned))


def spy_on_fit(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    fit = gluonts_peft.estimator.fit

    def spy(backbone: Any, adapter: Any, windows: Windows, validation: Any, options: Any, **more: Any) -> Any:
        seen.update(windows=windows, validation=validation)
        return fit(backbone, adapter, windows, validation, options, **more)

    monkeypatch.setattr(gluonts_peft.estimator, "fit", spy)
    return seen


def test_without_validation_data_the_last_steps_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_fit(monkeypatch)
    make_estimator(adapter="none").train(DATA)
    windows: Windows = seen["windows"]
    assert (windows.holdout, windows.min_context, windows.context_length, windows.prediction_length) == (6, 6, 32, 6)
    _, cuts = windows.pairs(0, 2000)
    assert cuts.max() + 6 == 80 - 6
    assert cuts.min() == 6
    labels = np.concatenate([batch["future_target"] for batch in seen["validation"]])
    assert np.array_equal(labels, np.stack([entry["target"][-6:] for entry in DATA]))


def test_no_label_of_several_validation_windows_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_fit(monkeypatch)
    make_estimator(adapter="none", validation_windows=3).train(DATA)
    assert seen["windows"].holdout == 18
    labels = np.concatenate([batch["future_target"] for batch in seen["validation"]])
    expected = [entry["target"][begin : begin + 6] for entry in DATA for begin in (62, 68, 74)]
    assert np.array_equal(labels, np.stack(expected))


def test_with_validation_data_nothing_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_fit(monkeypatch)
    other = make_dataset(count=3, seed=5)
    predictor = make_estimator(adapter="none", validation_windows=2).train(DATA, other)
    windows: Windows = seen["windows"]
    # The same names and times, but other values.
    assert np.all(windows.holdout == 0)
    assert windows.pairs(0, 2000)[1].max() + 6 == 80
    labels = np.concatenate([batch["future_target"] for batch in seen["validation"]])
    expected = [entry["target"][begin : begin + 6] for entry in other for begin in (68, 74)]
    assert np.array_equal(labels, np.stack(expected))
    assert predictor.gate.windows == 6


def test_the_number_of_validation_windows_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_fit(monkeypatch)
    predictor = make_estimator(adapter="none", validation_windows=3, max_validation_windows=5).train(DATA)
    assert sum(len(batch["past_target"]) for batch in seen["validation"]) == predictor.gate.windows == 5


def test_the_steps_held_out_decide_no_weight() -> None:
    """Other values there change the verdict, never the gradients: with one epoch there is no choice among epochs."""
    other = [{**entry, "target": np.concatenate([entry["target"][:-6], np.full(6, 90.0)])} for entry in DATA]
    left, right = (make_estimator(gate="keep", max_epochs=1, interpolate=False).train(data) for data in (DATA, other))
    assert left.gate.zero_shot != right.gate.zero_shot
    for name, tensor in left.backbone.adapter.state_dict().items():
        assert torch.equal(tensor, right.backbone.adapter.state_dict()[name])


def test_the_gate_scores_the_predictor_that_is_returned(tuned: PeftPredictor, zero_shot: PeftPredictor) -> None:
    windows = Windows(SeriesStore.from_dataset(DATA), context_length=32, prediction_length=6, min_context=6)
    validation = list(windows.last())
    assert tuned.gate.tuned == mean_loss(tuned.backbone, validation)
    assert tuned.gate.zero_shot == mean_loss(zero_shot.backbone, validation) == zero_shot.gate.zero_shot
    assert tuned.gate.windows == 8


# Weights that are NaN from the first step on, and weights that are finite and very bad.
FAILURES = {"nan": {"adapter": "lora", "learning_rate": 1e30}, "worse": {"adapter": "bitfit", "learning_rate": 1e6}}


@pytest.mark.parametrize("failure", FAILURES)
def test_tuning_that_does_not_help_falls_back_to_zero_shot(zero_shot: PeftPredictor, failure: str) -> None:
    with pytest.warns(TuningDidNotHelp) as caught:
        predictor = make_estimator(**FAILURES[failure]).train(DATA)
    gate = predictor.gate
    assert not gate.passed
    assert gate.zero_shot == zero_shot.gate.zero_shot
    assert gate.tuned > gate.zero_shot
    adapter = FAILURES[failure]["adapter"]
    assert [str(warning.message) for warning in caught if warning.category is TuningDidNotHelp] == [
        f"adapter {adapter} on 'bolt-nano': {predictor.verdict}; the zero-shot predictor is returned"
        " (gate='keep' keeps the tuned)"
    ]
    assert next(w for w in caught if w.category is TuningDidNotHelp).filename == __file__
    assert predictor.backbone.adapter is None
    assert np.array_equal(values_of(predictor), values_of(zero_shot))


@pytest.mark.parametrize("failure", FAILURES)
def test_tuning_that_does_not_help_can_raise(failure: str) -> None:
    with pytest.raises(TuningDidNotHelp, match=r"^adapter \w+ on 'bolt-nano': no evidence: "):
        make_estimator(gate="raise", **FAILURES[failure]).train(DATA)


def test_tuning_that_does_not_help_can_be_kept(zero_shot: PeftPredictor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TuningDidNotHelp)
        predictor = make_estimator(gate="keep", **FAILURES["worse"]).train(DATA)
    assert not predictor.gate.passed
    assert math.isfinite(predictor.gate.tuned)
    assert predictor.backbone.adapter.name == "bitfit"
    assert not np.array_equal(values_of(predictor), values_of(zero_shot))


def test_tuning_that_neither_helps_nor_harms_falls_back(zero_shot: PeftPredictor) -> None:
    with pytest.warns(TuningDidNotHelp):
        predictor = make_estimator(learning_rate=1e-30).train(DATA)
    assert predictor.gate.tuned == predictor.gate.zero_shot
    assert np.array_equal(values_of(predictor), values_of(zero_shot))


def test_tuning_that_helps_passes_silently() -> None:
    """A pattern without noise or reason, the same in all series: nothing that pretraining could know."""
    pattern = np.random.default_rng(0).uniform(0, 10, 7)
    data = [{**DATA[0], "target": np.resize(np.roll(pattern, -i), 90)} for i in range(7)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", TuningDidNotHelp)
        options = dict(context_length=16, num_batches_per_epoch=20, learning_rate=5e-3)
        predictor = make_estimator(gate="raise", **options).train(data)
    assert predictor.gate.passed
    assert predictor.backbone.adapter.name == "lora"
    truth = np.stack([np.resize(np.roll(pattern, -i), 96)[90:] for i in range(7)])
    before = make_estimator(adapter="none", context_length=16).train(data)
    error = {
        name: np.abs(np.stack([f.quantile(0.5) for f in p.predict(data)]) - truth).mean()
        for name, p in (("tuned", predictor), ("zero-shot", before))
    }
    assert error["tuned"] < error["zero-shot"]


@pytest.mark.parametrize("gate", ["fallback", "raise", "keep"])
def test_adapter_none_trains_nothing_and_has_nothing_to_prove(gate: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        predictor = make_estimator(adapter="none", gate=gate).train(DATA)
    assert (predictor.fit.epochs, predictor.fit.steps, predictor.fit.history) == (0, 0, [])
    assert predictor.gate.tuned == predictor.gate.zero_shot
    assert math.isfinite(predictor.gate.zero_shot)
    assert not any(parameter.requires_grad for parameter in predictor.backbone.parameters())


def test_an_estimator_can_train_again_and_keeps_nothing(tuned: PeftPredictor) -> None:
    estimator = make_estimator(gate="keep")
    first = estimator.train(make_dataset(seed=3))
    before = values_of(first)
    assert np.array_equal(values_of(estimator.train(DATA)), values_of(tuned))
    assert np.array_equal(values_of(first), before)


def test_a_folder_takes_checkpoint_and_series_and_changes_nothing(tuned: PeftPredictor, tmp_path: Path) -> None:
    predictor = make_estimator(gate="keep", folder=str(tmp_path / "run")).train(DATA, None)
    assert np.array_equal(values_of(predictor), values_of(tuned))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["last.ckpt", "series"]
    store = SeriesStore.open(tmp_path / "run" / "series" / "training")
    assert np.array_equal(store.series(3), DATA[3]["target"])


def test_series_of_an_earlier_run_are_not_taken_for_the_present_ones(tmp_path: Path) -> None:
    make_estimator(adapter="none", folder=str(tmp_path)).train(make_dataset(count=3, seed=9))
    make_estimator(adapter="none", folder=str(tmp_path)).train(DATA, DATA[:2])
    for name, count in (("training", 8), ("validation", 2)):
        store = SeriesStore.open(tmp_path / "series" / name)
        assert len(store) == count
        assert np.array_equal(store.series(0), DATA[0]["target"])


def test_a_horizon_beyond_the_checkpoints_own_trains_and_forecasts() -> None:
    data = make_dataset(count=3, length=190)
    predictor = make_estimator(prediction_length=70, gate="keep", max_epochs=1).train(data)
    assert values_of(predictor, data).shape == (3, 9, 70)
    assert np.isfinite(values_of(predictor, data)).all()
