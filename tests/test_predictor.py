from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from chronos import BaseChronosPipeline
from gluonts.dataset.split import split
from gluonts.ev.metrics import MASE, MeanWeightedSumQuantileLoss
from gluonts.evaluation import Evaluator, make_evaluation_predictions
from gluonts.model.evaluation import evaluate_model
from gluonts.model.forecast import QuantileForecast, SampleForecast
from gluonts.model.predictor import Predictor

from gluonts_peft import PeftPredictor, get_estimator, list_families
from gluonts_peft.adapters.base import AdapterError
from gluonts_peft.backbone import load_backbone
from gluonts_peft.predictor import PredictorError
from gluonts_peft.training import Fit, Gate

FAMILIES = ", ".join(list_families())
LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def make_dataset(count: int = 8, length: int = 80, seed: int = 0) -> list[dict[str, Any]]:
    """AR(1) around a level, of different lengths."""
    generator = np.random.default_rng(seed)
    entries = []
    for i in range(count):
        values = generator.standard_normal(length + i)
        for step in range(1, length + i):
            values[step] += 0.8 * values[step - 1]
        start = pd.Period("2024-01-01 00:00", freq="h") + i
        target = (20 + values).astype(np.float32)
        entries.append({"item_id": f"s{i}", "start": start, "target": target, "info": {"ward": i}})
    return entries


DATA = make_dataset()


def train(**options: Any) -> PeftPredictor:
    defaults: dict[str, Any] = dict(
        prediction_length=6,
        context_length=32,
        max_epochs=2,
        num_batches_per_epoch=5,
        batch_size=8,
        gate="keep",
        device="cpu",
        progress=False,
    )
    predictor: PeftPredictor = get_estimator("chronos")(**{**defaults, **options}).train(DATA)
    return predictor


def values_of(predictor: Any, data: Any = DATA, **options: Any) -> np.ndarray:
    forecasts = list(predictor.predict(data, **options))
    return np.stack([f.samples if isinstance(f, SampleForecast) else f.forecast_array for f in forecasts])


def files_of(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if not path.is_dir()}


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora"},
    "bitfit": {"adapter": "bitfit"},
    "hybrid": {"adapter": ["layernorm", {"name": "lora", "r": 1}]},
    "none": {"adapter": "none"},
    "t5": {"checkpoint": "t5-nano", "adapter": {"name": "lora", "lora_dropout": 0.1}, "seed": 4}
    | {"backbone_options": {"num_samples": 7}},
}


@pytest.fixture(scope="module")
def trained() -> dict[str, PeftPredictor]:
    return {name: train(**options) for name, options in ADAPTERS.items()}


@pytest.fixture(scope="module")
def stored(trained: dict[str, PeftPredictor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stored")
    for name, predictor in trained.items():
        predictor.serialize(root / name)
    return {name: root / name for name in trained}


@pytest.fixture
def lora(stored: dict[str, Path]) -> PeftPredictor:
    """A predictor that a test may change."""
    return PeftPredictor.deserialize(stored["lora"], device="cpu")


def test_adapters_forecast_differently(trained: dict[str, PeftPredictor]) -> None:
    """What the comparisons below rest on."""
    values = [values_of(trained[name]) for name in ("lora", "bitfit", "hybrid", "none")]
    for i, left in enumerate(values):
        for right in values[i + 1 :]:
            assert np.abs(left - right).max() > 1e-3


@pytest.mark.parametrize(("name", "kind", "rows"), [("lora", QuantileForecast, 9), ("t5", SampleForecast, 7)])
def test_forecasts_carry_over_what_belongs_to_their_series(
    trained: dict[str, PeftPredictor], name: str, kind: type, rows: int
) -> None:
    forecasts = list(trained[name].predict(DATA))
    assert len(forecasts) == len(DATA)
    for entry, forecast in zip(DATA, forecasts, strict=True):
        assert type(forecast) is kind
        assert forecast.item_id == entry["item_id"]
        assert forecast.info == entry["info"]
        assert forecast.start_date == entry["start"] + len(entry["target"])
        assert forecast.prediction_length == 6
    assert values_of(trained[name]).shape == (8, rows, 6)
    assert np.isfinite(values_of(trained[name])).all()


@pytest.mark.parametrize("name", ["lora", "t5"])
def test_forecasts_come_in_the_order_of_the_series(trained: dict[str, PeftPredictor], name: str) -> None:
    """The level tells the series apart: whatever the weights are, a median lies near it."""
    levels = [1e3, 1.0, 1e5, 1e-2, 10.0]
    data = [{**DATA[0], "target": np.float32(level) * DATA[i]["target"] / 20} for i, level in enumerate(levels)]
    medians = np.array([forecast.quantile(0.5).mean() for forecast in trained[name].predict(data)])
    assert np.abs(np.log10(medians / levels)).max() < 0.5


def test_entries_need_neither_name_nor_info(trained: dict[str, PeftPredictor]) -> None:
    bare = [{"start": entry["start"], "target": entry["target"].tolist()} for entry in DATA]
    forecasts = list(trained["lora"].predict(bare))
    assert [(forecast.item_id, forecast.info) for forecast in forecasts] == [(None, None)] * 8
    assert np.array_equal(np.stack([f.forecast_array for f in forecasts]), values_of(trained["lora"]))


def test_quantiles_are_read_by_their_levels(trained: dict[str, PeftPredictor]) -> None:
    forecast = next(trained["lora"].predict(DATA))
    for row, level in enumerate(LEVELS):
        assert np.array_equal(forecast.quantile(level), forecast.forecast_array[row])
        assert np.array_equal(forecast.quantile(str(level)), forecast.forecast_array[row])
    assert forecast.forecast_keys == [str(level) for level in LEVELS]


def test_an_empty_dataset_has_no_forecasts(trained: dict[str, PeftPredictor]) -> None:
    assert list(trained["lora"].predict([])) == []


def test_series_are_read_when_they_are_needed(lora: PeftPredictor) -> None:
    read: list[str] = []

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            entry = DATA[len(read) % 8]
            read.append(entry["item_id"])
            yield entry

    lora.batch_size = 3
    forecasts = lora.predict(endless())
    assert read == []
    assert [next(forecasts).item_id for _ in range(3)] == ["s0", "s1", "s2"]
    assert len(read) <= 6
    assert [next(forecasts).item_id for _ in range(3)] == ["s3", "s4", "s5"]
    assert len(read) <= 9


def test_the_batch_size_changes_no_forecast(lora: PeftPredictor) -> None:
    """Short histories too, which are padded to the longest of their batch."""
    data = [*DATA, *({**entry, "target": entry["target"][: 3 + 5 * i]} for i, entry in enumerate(DATA))]
    data[3] = {**data[3], "target": np.where(np.arange(83) % 5 == 0, np.nan, data[3]["target"])}
    reference = values_of(lora, data)
    for batch_size in (1, 5, 16):
        lora.batch_size = batch_size
        np.testing.assert_allclose(values_of(lora, data), reference, rtol=2e-4)


def test_two_walks_at_once_do_not_disturb_each_other(trained: dict[str, PeftPredictor]) -> None:
    predictor = trained["lora"]
    reference = values_of(predictor)
    pairs = list(zip(predictor.predict(DATA), predictor.predict(DATA), strict=True))
    assert np.array_equal(np.stack([left.forecast_array for left, _ in pairs]), reference)
    assert np.array_equal(np.stack([right.forecast_array for _, right in pairs]), reference)


def test_prediction_leaves_the_model_as_it_was(trained: dict[str, PeftPredictor]) -> None:
    """Also if it is broken off: the adapter is folded into the weights for a batch at a time."""
    for name in ("lora", "t5"):
        network = trained[name].backbone.network
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        modes = [module.training for module in network.modules()]
        forecasts = trained[name].predict(DATA)
        next(forecasts)
        forecasts.close()
        assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
        assert [module.training for module in network.modules()] == modes


def test_samples_follow_from_the_seed(stored: dict[str, Path]) -> None:
    predictor = PeftPredictor.deserialize(stored["t5"], device="cpu")
    state = torch.get_rng_state()
    reference = values_of(predictor)
    assert predictor.seed == 4
    assert np.array_equal(values_of(predictor), reference)
    assert torch.equal(torch.get_rng_state(), state)
    predictor.seed = 5
    assert not np.array_equal(values_of(predictor), reference)
    predictor.seed = 4
    assert np.array_equal(values_of(predictor), reference)


def test_the_number_of_samples_is_what_was_asked_for(trained: dict[str, PeftPredictor]) -> None:
    for count in (1, 3, 20):
        assert values_of(trained["t5"], num_samples=count).shape == (8, count, 6)
    assert values_of(trained["t5"]).shape == (8, 7, 6)
    # A quantile family has no use for it.
    assert np.array_equal(values_of(trained["lora"], num_samples=3), values_of(trained["lora"]))


@pytest.mark.parametrize(
    ("entry", "batch_size", "name"),
    [
        ({**DATA[0], "item_id": "blank", "target": np.full(50, np.nan)}, 64, "item_id 'blank'"),
        ({**DATA[0], "item_id": "gone", "target": np.append(np.ones(50), np.full(32, np.nan))}, 2, "item_id 'gone'"),
        ({"start": DATA[0]["start"], "target": np.full(5, np.nan)}, 3, "entry 8"),
        ({"start": DATA[0]["start"], "target": []}, 64, "entry 8"),
    ],
)
def test_a_history_without_values_is_refused_by_name(
    lora: PeftPredictor, entry: dict[str, Any], batch_size: int, name: str
) -> None:
    lora.batch_size = batch_size
    message = (
        f"1 of 9 series cannot be forecast: {name} (no observed value in its last 32 steps); leave them out, or go on"
        " without them: unusable='skip' (command line: --unusable skip)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        values_of(lora, [*DATA, entry])


def test_infinities_are_refused_by_name(lora: PeftPredictor) -> None:
    bad = {**DATA[0], "item_id": "hot", "target": np.array([1.0, np.inf, 2.0])}
    message = "target of item_id 'hot' has the value inf at step 1: give NaN for missing values"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        values_of(lora, [bad])


@pytest.mark.parametrize("name", ["lora", "t5"])
def test_make_evaluation_predictions_and_evaluator(trained: dict[str, PeftPredictor], name: str) -> None:
    iterators = make_evaluation_predictions(DATA, trained[name], num_samples=11)
    forecasts, series = (list(iterator) for iterator in iterators)
    cut = [{**entry, "target": entry["target"][:-6]} for entry in DATA]
    expected = values_of(trained[name], cut, num_samples=11)
    found = np.stack([f.samples if name == "t5" else f.forecast_array for f in forecasts])
    assert found.shape[1] == (11 if name == "t5" else 9)
    assert np.array_equal(found, expected)
    scores, items = Evaluator(num_workers=0)(series, forecasts)
    truth = np.stack([entry["target"][-6:] for entry in DATA])
    medians = np.stack([forecast.quantile(0.5) for forecast in forecasts])
    assert list(items["item_id"]) == [entry["item_id"] for entry in DATA]
    assert scores["abs_error"] == pytest.approx(np.abs(truth - medians).sum(), rel=1e-5)


@pytest.mark.parametrize("name", ["lora", "t5"])
def test_evaluate_model(trained: dict[str, PeftPredictor], name: str) -> None:
    _, template = split(DATA, offset=-12)
    windows = template.generate_instances(6, windows=2)
    metrics = [MASE(), MeanWeightedSumQuantileLoss(quantile_levels=LEVELS)]
    scores = evaluate_model(model=trained[name], test_data=windows, metrics=metrics)
    expected = []
    for (entry, label), forecast in zip(windows, trained[name].predict(windows.input), strict=True):
        error = np.abs(label["target"] - forecast.quantile(0.5)).mean()
        expected.append(error / np.abs(entry["target"][24:] - entry["target"][:-24]).mean())
    assert scores["MASE[0.5]"].item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert 0 < scores["mean_weighted_sum_quantile_loss"].item() < 1


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_stored_predictor_gives_identical_forecasts(
    trained: dict[str, PeftPredictor], stored: dict[str, Path], name: str
) -> None:
    torch.manual_seed(123)
    loaded = Predictor.deserialize(stored[name], device="cpu")
    first = trained[name]
    assert type(loaded) is PeftPredictor
    assert np.array_equal(values_of(loaded), values_of(first))
    # Without parameters there is nothing to attach again.
    assert repr(loaded) == repr(first).replace("adapter=none", "adapter=None")
    assert loaded.fit == first.fit
    assert loaded.gate == first.gate
    assert (loaded.batch_size, loaded.seed) == (first.batch_size, first.seed)
    assert loaded.backbone.options == first.backbone.options
    assert loaded.backbone.source == first.backbone.source
    assert loaded.prediction_length == 6


def test_a_loaded_predictor_can_be_stored_again(stored: dict[str, Path], lora: PeftPredictor, tmp_path: Path) -> None:
    lora.serialize(tmp_path / "again")
    for name in files_of(stored["lora"]):
        assert (tmp_path / "again" / name).read_bytes() == (stored["lora"] / name).read_bytes()


def test_the_folder_holds_a_few_kilobytes_of_json_and_safetensors(stored: dict[str, Path]) -> None:
    assert sorted(files_of(stored["lora"])) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/gluonts_peft.json",
        "gluonts-config.json",
        "predictor.json",
    ]
    assert sorted(files_of(stored["none"])) == ["gluonts-config.json", "predictor.json"]
    for folder in stored.values():
        sizes = files_of(folder)
        assert {Path(name).suffix for name in sizes} <= {".json", ".safetensors"}
        assert sum(sizes.values()) < 100_000
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        for path in folder.rglob("*.json"):
            json.loads(path.read_text())
    config = json.loads((stored["lora"] / "gluonts-config.json").read_text())
    assert config["type"] == "gluonts_peft.predictor.PeftPredictor"


def test_nothing_is_pickled(trained: dict[str, PeftPredictor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle")

    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    for name, predictor in trained.items():
        predictor.serialize(tmp_path / name)
        assert np.array_equal(values_of(Predictor.deserialize(tmp_path / name, device="cpu")), values_of(predictor))


@pytest.mark.parametrize("name", ["gluonts-config.json", "predictor.json", "adapter"])
def test_a_folder_in_use_is_refused(lora: PeftPredictor, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name == "adapter" else (tmp_path / name).write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    message = f"folder {str(tmp_path)!r} is in use: it holds {name!r}; name another folder"
    with pytest.raises(PredictorError, match=f"^{re.escape(message)}$"):
        lora.serialize(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name, "notes.txt"}


def test_a_folder_with_other_files_will_do(lora: PeftPredictor, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    lora.serialize(tmp_path)
    assert np.array_equal(values_of(Predictor.deserialize(tmp_path, device="cpu")), values_of(lora))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["safetensors.torch.save_file", "gluonts.model.predictor.json.dump", "os.replace"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_full_disk_leaves_nothing_behind(
    lora: PeftPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, existed: bool
) -> None:
    folder = tmp_path / "predictor"
    if existed:
        folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(OSError, match="No space left on device"):
            lora.serialize(folder)
    assert list(tmp_path.rglob("*")) == ([folder] if existed else [])
    lora.serialize(folder)
    assert np.array_equal(values_of(Predictor.deserialize(folder, device="cpu")), values_of(lora))


def tampered(source: Path, target: Path, change: Any) -> None:
    shutil.copytree(source, target)
    path = target / "predictor.json"
    config = json.loads(path.read_text())
    result = change(config)
    path.write_text(result if isinstance(result, str) else json.dumps(config))


def drop(*keys: str) -> Any:
    def change(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        del config[keys[-1]]

    return change


def put(value: Any, *keys: str) -> Any:
    def change(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config: "", "JSONDecodeError: "),
        (lambda config: json.dumps(config)[:200], "JSONDecodeError: "),
        (lambda config: "[]", "TypeError: "),
        (lambda config: "null", "TypeError: "),
        (drop("family"), "KeyError: 'family'"),
        (drop("base"), "KeyError: 'base'"),
        (drop("base", "fingerprint"), "TypeError: "),
        (drop("base", "kind"), "TypeError: "),
        (drop("prediction_length"), "KeyError: 'prediction_length'"),
        (drop("context_length"), "KeyError: 'context_length'"),
        (drop("backbone_options"), "KeyError: 'backbone_options'"),
        (drop("adapter"), "KeyError: 'adapter'"),
        (drop("seed"), "KeyError: 'seed'"),
        (drop("fit"), "KeyError: 'fit'"),
        (drop("fit", "gate", "tuned"), "TypeError: "),
        (put("bolt-nano", "base"), "AttributeError: "),
        (put("six", "prediction_length"), "ValueError: "),
        (put(None, "context_length"), "TypeError: "),
        (put([1], "batch_size"), "TypeError: "),
        (put(3, "backbone_options"), "TypeError: "),
        (put({"gate": 1}, "fit"), "TypeError: "),
        (put("1", "fit", "epochs"), "TypeError: fit.epochs is '1', not int"),
        (put(None, "base", "fingerprint"), "TypeError: base.fingerprint is None, not str"),
        (put([], "base", "checkpoint"), "TypeError: base.checkpoint is [], not str"),
        (put(math.inf, "prediction_length"), "ValueError: prediction_length is inf, not an integer"),
        (put("12", "prediction_length"), "ValueError: prediction_length is '12', not an integer"),
        (put(True, "context_length"), "TypeError: context_length is True, not an integer"),
        (put(10**9, "prediction_length"), "ValueError: prediction_length is 1000000000, not from "),
        (put(0, "format"), "ValueError: format is 0, not a positive integer"),
        (lambda config: '{"family": "a", "family": "b"}', "ValueError: key 'family' is there twice"),
        (lambda config: "[" * 5000 + "]" * 5000, "ValueError: it is nested more than 100 deep"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_record_is_named(stored: dict[str, Path], tmp_path: Path, change: Any, reason: str) -> None:
    folder = tmp_path / "bad"
    tampered(stored["lora"], folder, change)
    message = f"{str(folder / 'predictor.json')!r} is damaged: {reason}"
    with pytest.raises(PredictorError, match=f"^{re.escape(message)}"):
        Predictor.deserialize(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (put(3, "format"), "format 3, this one reads up to 2"),
        (put(1, "fit", "accuracy"), "fit has the key 'accuracy', which this one does not know"),
        (put(1, "base", "owner"), "base has the key 'owner', which this one does not know"),
        (put(1, "accuracy"), "it has the key 'accuracy', which this one does not know"),
    ],
)
def test_a_record_of_a_newer_version_is_named(stored: dict[str, Path], tmp_path: Path, change: Any, why: str) -> None:
    tampered(stored["lora"], tmp_path / "new", change)
    message = f"{str(tmp_path / 'new' / 'predictor.json')!r} was written by a newer version of gluonts-peft ({why}): up"
    with pytest.raises(PredictorError, match=f"^{re.escape(message)}"):
        PeftPredictor.deserialize(tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (put("cronos", "family"), ValueError, "family 'cronos' is unknown; did you mean 'chronos'? known: " + FAMILIES),
        (put("os.system", "family"), ValueError, "family 'os.system' is unknown; known: " + FAMILIES),
        (
            put("f" * 64, "base", "fingerprint"),
            PredictorError,
            "predictor in {folder!r} rests on base weights with fingerprint ffffffffffff…, but 'bolt-nano' has ",
        ),
        (
            put("bolt-mega", "base", "checkpoint"),
            PredictorError,
            "base weights of the predictor in {folder!r} cannot be loaded: bundled checkpoint 'bolt-mega' is unknown;"
            " known: bolt-nano, chronos2-nano, t5-nano; if they lie elsewhere now, name the place with checkpoint=...",
        ),
        (
            put(0, "prediction_length"),
            ValueError,
            "prediction_length 0 is not positive; name the steps to forecast",
        ),
        (
            put({"heat": 1}, "backbone_options"),
            ValueError,
            "backbone option 'heat' is unknown; known: (none)",
        ),
    ],
    ids=["family", "path-as-family", "fingerprint", "checkpoint", "length", "options"],
)
def test_a_record_of_something_else_is_refused(
    stored: dict[str, Path], tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    folder = tmp_path / "bad"
    tampered(stored["lora"], folder, change)
    with pytest.raises(error, match=f"^{re.escape(message.format(folder=str(folder)))}"):
        Predictor.deserialize(folder)


def test_a_folder_that_holds_no_predictor_is_named(tmp_path: Path) -> None:
    message = f"folder {str(tmp_path)!r} holds no predictor: it has no predictor.json"
    with pytest.raises(PredictorError, match=f"^{re.escape(message)}$"):
        PeftPredictor.deserialize(tmp_path)


def test_a_missing_or_damaged_adapter_is_named(stored: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(stored["lora"], folder)
    file = folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(AdapterError, match=f"^{re.escape(f'{str(file)!r} is truncated or damaged: ')}"):
        PeftPredictor.deserialize(folder)
    file.unlink()
    message = f"{str(file)!r} does not exist; name the folder of a saved adapter"
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        PeftPredictor.deserialize(folder)
    shutil.rmtree(folder / "adapter")
    message = f"folder {str(folder / 'adapter')!r} holds neither gluonts_peft.json nor adapter_config.json"
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        PeftPredictor.deserialize(folder)


def test_other_base_weights_are_refused(stored: dict[str, Path]) -> None:
    bolt, t5 = (json.loads((stored[name] / "predictor.json").read_text())["base"] for name in ("lora", "t5"))
    message = (
        f"predictor in {str(stored['lora'])!r} rests on base weights with fingerprint {bolt['fingerprint'][:12]}…, but"
        f" 't5-nano' has {t5['fingerprint'][:12]}…; name the right weights with checkpoint=..."
    )
    with pytest.raises(PredictorError, match=f"^{re.escape(message)}$"):
        PeftPredictor.deserialize(stored["lora"], checkpoint="t5-nano")


def test_a_wrong_device_or_option_is_refused(stored: dict[str, Path]) -> None:
    count = torch.cuda.device_count()
    message = f"device 'cuda:99' does not exist; this machine has {count} CUDA devices"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PeftPredictor.deserialize(stored["lora"], device="cuda:99")
    message = "deserialize() has no option 'chekpoint'; it has device and checkpoint"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        Predictor.deserialize(stored["lora"], chekpoint="bolt-nano")


def test_base_weights_that_moved_are_found_where_the_user_says(tmp_path: Path) -> None:
    bundled = get_estimator("chronos").backbone_class.bundled()["bolt-nano"]
    old, new = tmp_path / "models/old", tmp_path / "models/new"
    shutil.copytree(bundled, old)
    predictor = train(checkpoint=str(old))
    folder = tmp_path / "predictor"
    predictor.serialize(folder)
    reference = values_of(predictor)
    assert np.array_equal(values_of(Predictor.deserialize(folder, device="cpu")), reference)
    old.rename(new)
    for place in (new, str(new), "bolt-nano"):
        loaded = Predictor.deserialize(folder, device="cpu", checkpoint=place)
        assert np.array_equal(values_of(loaded), reference)
    message = (
        f"base weights of the predictor in {str(folder)!r} cannot be loaded: checkpoint folder {str(old)!r} does not"
        " exist; if they lie elsewhere now, name the place with checkpoint=..."
    )
    with pytest.raises(PredictorError, match=f"^{re.escape(message)}$"):
        Predictor.deserialize(folder)


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path has the form of a hub id."""
    bundled = get_estimator("chronos").backbone_class.bundled()["bolt-nano"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundled, "models/bolt")
    train(checkpoint="models/bolt", adapter="none").serialize(Path("predictor"))
    shutil.rmtree("models")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(PredictorError, match="checkpoint folder 'models/bolt' does not exist"):
        Predictor.deserialize(Path("predictor"))


def test_adapters_are_exchanged_in_place(
    trained: dict[str, PeftPredictor], stored: dict[str, Path], lora: PeftPredictor
) -> None:
    weights = [tensor.data_ptr() for name, tensor in lora.backbone.network.named_parameters() if "lora" not in name]
    for name in ("bitfit", "hybrid", "lora", "bitfit", "lora"):
        lora.swap(stored[name])
        assert np.array_equal(values_of(lora), values_of(trained[name]))
        assert lora.gate == trained[name].gate
    after = [tensor.data_ptr() for name, tensor in lora.backbone.network.named_parameters() if "lora" not in name]
    assert after == weights


def test_a_bare_adapter_can_be_put_in(
    trained: dict[str, PeftPredictor], stored: dict[str, Path], lora: PeftPredictor
) -> None:
    """Nothing is known then of how it was trained, and the old scores are not its."""
    lora.swap(stored["bitfit"] / "adapter")
    assert np.array_equal(values_of(lora), values_of(trained["bitfit"]))
    assert lora.fit is None
    assert lora.gate is None


def test_an_adapter_can_be_put_into_a_zero_shot_predictor(
    trained: dict[str, PeftPredictor], stored: dict[str, Path]
) -> None:
    predictor = PeftPredictor.deserialize(stored["none"], device="cpu")
    predictor.swap(str(stored["lora"]))
    assert np.array_equal(values_of(predictor), values_of(trained["lora"]))


def test_a_swap_that_fails_changes_nothing(stored: dict[str, Path], tmp_path: Path) -> None:
    damaged, tampered_folder = tmp_path / "damaged", tmp_path / "tampered"
    shutil.copytree(stored["bitfit"], damaged)
    file = damaged / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    tampered(stored["bitfit"], tampered_folder, drop("fit"))
    failures = [
        (tmp_path / "gone", AdapterError, f"folder {str(tmp_path / 'gone')!r} holds neither"),
        (damaged, AdapterError, f"{str(file)!r} is truncated or damaged: "),
        (tampered_folder, PredictorError, f"{str(tampered_folder / 'predictor.json')!r} is damaged: KeyError: 'fit'"),
        (stored["t5"], AdapterError, f"adapter in {str(stored['t5'] / 'adapter')!r} was trained on 't5-nano' with"),
    ]
    for name in ("lora", "hybrid", "bitfit"):
        predictor = PeftPredictor.deserialize(stored[name], device="cpu")
        reference, gate, text = values_of(predictor), predictor.gate, repr(predictor)
        for folder, error, message in failures:
            with pytest.raises(error, match=f"^{re.escape(message)}"):
                predictor.swap(folder)
            assert np.array_equal(values_of(predictor), reference)
            assert predictor.gate == gate
            assert repr(predictor) == text


@pytest.mark.parametrize("name", ["lora", "bitfit", "hybrid", "t5"])
def test_merging_keeps_the_forecasts(
    trained: dict[str, PeftPredictor], stored: dict[str, Path], tmp_path: Path, name: str
) -> None:
    predictor = PeftPredictor.deserialize(stored[name], device="cpu")
    predictor.merge()
    assert predictor.backbone.adapter is None
    np.testing.assert_allclose(values_of(predictor), values_of(trained[name]), rtol=1e-4)
    message = "a merged predictor has no adapter to store; write the whole model with export(folder)"
    with pytest.raises(PredictorError, match=f"^{re.escape(message)}$"):
        predictor.serialize(tmp_path / "merged")
    message = "a merged predictor cannot exchange its adapter: it is part of the weights now"
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        predictor.swap(stored["lora"])
    assert list(tmp_path.iterdir()) == []
    # Once more changes nothing.
    predictor.merge()
    np.testing.assert_allclose(values_of(predictor), values_of(trained[name]), rtol=1e-4)
    with pytest.raises(PredictorError):
        predictor.serialize(tmp_path / "merged")


def test_merging_nothing_leaves_a_zero_shot_predictor(
    trained: dict[str, PeftPredictor], stored: dict[str, Path], tmp_path: Path
) -> None:
    predictor = train(adapter="none")
    predictor.merge()
    predictor.serialize(tmp_path / "same")
    loaded = Predictor.deserialize(tmp_path / "same", device="cpu")
    assert np.array_equal(values_of(loaded), values_of(trained["none"]))


def test_an_adapter_that_cannot_be_merged_stays(
    lora: PeftPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora.backbone.adapter, "mergeable", False)
    reference = values_of(lora)
    message = "adapter 'lora' cannot be merged: its effect is not a change of the weights"
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        lora.merge()
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        lora.export(tmp_path / "export")
    assert not (tmp_path / "export").exists()
    lora.serialize(tmp_path / "stored")
    assert np.array_equal(values_of(lora), reference)


@pytest.mark.parametrize("name", ["lora", "hybrid", "none"])
def test_an_exported_bolt_opens_in_the_official_pipeline(
    trained: dict[str, PeftPredictor], tmp_path: Path, name: str
) -> None:
    predictor = trained[name]
    before, adapter = values_of(predictor), predictor.backbone.adapter
    predictor.export(tmp_path / "model")
    pipeline = BaseChronosPipeline.from_pretrained(str(tmp_path / "model"), device_map="cpu")
    contexts = [torch.tensor(entry["target"][-32:]) for entry in DATA]
    quantiles, _ = pipeline.predict_quantiles(contexts, prediction_length=6, quantile_levels=LEVELS)
    np.testing.assert_allclose(quantiles.transpose(1, 2).numpy(), before, rtol=1e-4)
    assert predictor.backbone.adapter is adapter
    assert np.array_equal(values_of(predictor), before)
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}


def test_an_exported_t5_is_a_checkpoint_of_the_family(trained: dict[str, PeftPredictor], tmp_path: Path) -> None:
    """Sample paths of the official pipeline come from another generator, so ours compares the weights."""
    trained["t5"].export(tmp_path)
    estimator = get_estimator("chronos")(
        prediction_length=6, context_length=32, checkpoint=str(tmp_path), backbone_options={"num_samples": 7}
    )
    loaded = PeftPredictor(estimator.load_backbone(), seed=4, device="cpu")
    np.testing.assert_allclose(values_of(loaded), values_of(trained["t5"]), rtol=1e-4)
    pipeline = BaseChronosPipeline.from_pretrained(str(tmp_path), device_map="cpu")
    samples = pipeline.predict([torch.tensor(DATA[0]["target"][-32:])], prediction_length=6, num_samples=5)
    assert samples.shape == (1, 5, 6)


def test_a_merged_predictor_can_be_exported(
    trained: dict[str, PeftPredictor], lora: PeftPredictor, tmp_path: Path
) -> None:
    lora.merge()
    lora.export(tmp_path / "merged")
    trained["lora"].export(tmp_path / "direct")
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (tmp_path / "direct/model.safetensors").read_bytes()


def test_an_export_does_not_touch_a_folder_in_use(lora: PeftPredictor, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    message = f"folder {str(tmp_path)!r} is not empty; name a new one"
    with pytest.raises(PredictorError, match=f"^{re.escape(message)}$"):
        lora.export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("existed", [True, False])
def test_an_export_that_fails_leaves_nothing_behind(
    lora: PeftPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    folder = tmp_path / "model"
    if existed:
        folder.mkdir()

    def half(self: Any, target: Path) -> None:
        (target / "config.json").write_text("{")
        full()

    monkeypatch.setattr(type(lora.backbone), "export", half)
    with pytest.raises(OSError, match="No space left on device"):
        lora.export(folder)
    assert list(tmp_path.rglob("*")) == ([folder] if existed else [])


def test_scores_without_bounds_are_stored_too(lora: PeftPredictor, tmp_path: Path) -> None:
    lora.fit = Fit(Gate(1.0, math.inf, 3), 1, 5, 0.5, 0.1, [{"epoch": 0, "train_loss": 2.0, "val_loss": math.inf}])
    lora.serialize(tmp_path)
    assert Predictor.deserialize(tmp_path, device="cpu").fit == lora.fit


def test_what_was_not_trained_has_no_scores(tmp_path: Path) -> None:
    backbone = get_estimator("chronos")(prediction_length=6, context_length=32).load_backbone()
    predictor = PeftPredictor(backbone, batch_size=3, seed=9, device="cpu")
    assert predictor.gate is None
    predictor.serialize(tmp_path)
    loaded = PeftPredictor.deserialize(tmp_path, device="cpu")
    assert (loaded.fit, loaded.batch_size, loaded.seed) == (None, 3, 9)
    assert np.array_equal(values_of(loaded), values_of(predictor))


def test_adapters_are_stored_as_safetensors_of_their_own_tensors(
    trained: dict[str, PeftPredictor], stored: dict[str, Path]
) -> None:
    tensors = safetensors.torch.load_file(stored["bitfit"] / "adapter" / "adapter_model.safetensors")
    assert set(tensors) == set(trained["bitfit"].backbone.adapter.state_dict())
    assert sum(tensor.numel() for tensor in tensors.values()) == trained["bitfit"].backbone.adapter.num_parameters()


def test_a_relative_base_is_found_from_elsewhere_and_after_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opens(folder: str | Path) -> bool:
        found = PeftPredictor.deserialize(Path(folder), device="cpu")
        return bool(np.array_equal(values_of(found), wanted))

    bundled = get_estimator("chronos").backbone_class.bundled()
    home = tmp_path / "home"
    shutil.copytree(bundled["bolt-nano"], home / "bases" / "base")
    monkeypatch.chdir(home)
    backbone = load_backbone("chronos", prediction_length=6, checkpoint="bases/base")
    monkeypatch.chdir(tmp_path)
    predictor = PeftPredictor(backbone, device="cpu")
    predictor.serialize(home / "models" / "m")
    wanted = values_of(predictor)
    record = json.loads((home / "models" / "m" / "predictor.json").read_text())
    assert record["base"]["checkpoint"] == "bases/base"
    assert record["base_places"] == {
        "absolute": str(home / "bases" / "base"),
        "relative": os.path.join("..", "..", "bases", "base"),
    }
    assert opens(home / "models" / "m")
    home.rename(tmp_path / "moved")
    assert opens(tmp_path / "moved" / "models" / "m")
    monkeypatch.chdir(tmp_path / "moved")
    assert opens("models/m")
    # Another base at the name that was recorded is not taken for it.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundled["t5-nano"], tmp_path / "bases" / "base")
    assert opens(tmp_path / "moved" / "models" / "m")
    shutil.rmtree(tmp_path / "moved" / "bases")
    with pytest.raises(PredictorError, match="exceeds the 256 steps that checkpoint 'bases/base' can see"):
        opens(tmp_path / "moved" / "models" / "m")
    shutil.rmtree(tmp_path / "bases")
    with pytest.raises(PredictorError, match=r"cannot be loaded: checkpoint folder 'bases/base' does not exist;"):
        opens(tmp_path / "moved" / "models" / "m")
