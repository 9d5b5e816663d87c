"""Reading never writes, and changes of weights are whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gluonts_peft
from gluonts_peft import PeftPredictor, get_adapter, get_estimator
from gluonts_peft.adapters.base import AdapterError
from gluonts_peft.adapters.load import load_adapter
from gluonts_peft.anomaly import score
from gluonts_peft.backbone import Backbone
from gluonts_peft.imputation import impute
from gluonts_peft.predictor import PredictorError
from gluonts_peft.testing.cases import at_once, traits
from gluonts_peft.weights import Snapshot

HEAD = {"name": "head", "kind": "pooling"}
ADAPTERS: list[Any] = [
    "none",
    "full",
    "head",
    "bitfit",
    "layernorm",
    "lora",
    "dora",
    "vera",
    "fourierft",
    "ia3",
    "trace",
    ["lora", "bitfit"],
    ["layernorm", "vera", "ia3"],
    ["lora", HEAD],
    HEAD,
]
CELLS = [("chronos", "bolt-nano", spec) for spec in ADAPTERS] + [
    ("chronos", "t5-nano", "lora"),
    ("chronos", "t5-nano", ["layernorm", "fourierft"]),
    ("chronos", "chronos2-nano", "dora"),
    ("chronos", "chronos2-nano", "bitfit"),
    ("moirai", None, "lora"),
    ("moirai", None, ["layernorm", "ia3"]),
    ("lag-llama", None, "vera"),
]


@cache
def base(family: str = "chronos", checkpoint: str | None = "bolt-nano") -> Backbone:
    options = {"num_samples": 3} if checkpoint == "t5-nano" or family == "lag-llama" else {}
    return gluonts_peft.load_backbone(family, checkpoint=checkpoint, prediction_length=8, context_length=32, **options)


def series(count: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    values = 20.0 + rng.normal(size=(count, 60)).cumsum(1).astype(np.float32)
    start = pd.Period("2024-01-01", "h")
    return [{"item_id": str(i), "start": start, "target": row[: 40 + 2 * i]} for i, row in enumerate(values)]


def adapted(spec: Any, family: str = "chronos", checkpoint: str | None = "bolt-nano", seed: int = 0) -> Backbone:
    """A backbone with an adapter that changes its forecasts."""
    backbone = deepcopy(base(family, checkpoint))
    torch.manual_seed(seed)
    shaken(get_adapter(spec).attach(backbone))
    return backbone


def shaken(adapter: Any) -> Any:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return adapter


def predictor(backbone: Backbone, **options: Any) -> PeftPredictor:
    return PeftPredictor(backbone, **{"batch_size": 4, "device": "cpu", **options})


def values(forecasts: Any) -> np.ndarray:
    return np.stack([getattr(f, "forecast_array", getattr(f, "samples", None)) for f in forecasts])


def forecast(backbone: Backbone, **options: Any) -> np.ndarray:
    return values(predictor(backbone, **options).predict(series()))


@pytest.mark.parametrize(("family", "checkpoint", "spec"), CELLS, ids=str)
def test_threads_and_predictors_on_one_base_forecast_as_one_alone(
    family: str, checkpoint: str | None, spec: Any
) -> None:
    backbone = adapted(spec, family, checkpoint)
    alone, before = forecast(backbone), traits(backbone)
    whole, short = predictor(backbone), predictor(backbone).shorten(5)
    for _ in range(2):
        for found, first in at_once(lambda: (values(whole.predict(series())), values(short.predict(series())))):
            assert np.array_equal(found, alone)
            assert np.array_equal(first, alone[:, :, :5])
    assert traits(backbone).differing(before) == ""
    assert backbone.adapter is not None
    backbone.adapter.detach()
    assert traits(backbone).differing(traits(base(family, checkpoint))).startswith("module")  # A copy: other objects.
    for (name, left), (other, right) in zip(
        backbone.state_dict().items(), base(family, checkpoint).state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(left, right)
    assert np.array_equal(forecast(backbone), forecast(deepcopy(base(family, checkpoint))))


def test_reading_is_the_same_in_whatever_mode_the_model_is() -> None:
    backbone = adapted({"name": "lora", "lora_dropout": 0.5})
    expected = forecast(backbone)
    backbone.train()
    before = traits(backbone)
    assert np.array_equal(forecast(backbone), expected)
    assert traits(backbone).differing(before) == ""


def test_imputation_and_detection_change_nothing() -> None:
    backbone = gluonts_peft.load_backbone("moment", prediction_length=8)
    shaken(get_adapter(["lora", "head"]).attach(backbone))
    data = series(3)
    data[1]["target"] = np.where(np.arange(len(data[1]["target"])) % 7 == 0, np.nan, data[1]["target"])
    before = traits(backbone)

    def read() -> list[Any]:
        filled = [entry["target"] for entry in impute(backbone, data, progress=False)]
        scores = [found.values for found in score(backbone, data, progress=False)]
        return [*filled, *scores]

    alone = read()
    for found in at_once(read):
        for left, right in zip(found, alone, strict=True):
            np.testing.assert_array_equal(left, right)
    assert traits(backbone).differing(before) == ""


def parts(backbone: Backbone, change: Callable[[PeftPredictor], None]) -> np.ndarray:
    """Forecasts of ten series, four at a time; the model is changed after the first is out."""
    open_ended = predictor(backbone)
    stream = open_ended.predict(series())
    first = next(stream)
    change(open_ended)
    return values([first, *stream])


@pytest.mark.parametrize(("one", "other"), [("lora", "vera"), ("bitfit", "lora"), (["lora", "bitfit"], "layernorm")])
def test_an_adapter_that_is_exchanged_counts_from_the_next_batch(one: Any, other: Any, tmp_path: Path) -> None:
    before, after = adapted(one), adapted(other, seed=1)
    assert after.adapter is not None
    after.adapter.save(tmp_path)
    old, new = forecast(before), forecast(after)
    found = parts(before, lambda predictor: predictor.swap(tmp_path))
    assert np.array_equal(found[:4], old[:4])
    assert np.array_equal(found[4:], new[4:])


@pytest.mark.parametrize("spec", ["lora", "bitfit", "layernorm", ["lora", "ia3"]], ids=str)
def test_an_adapter_that_is_merged_meanwhile_changes_no_forecast(spec: Any) -> None:
    backbone = adapted(spec)
    expected = forecast(backbone)
    assert np.array_equal(parts(backbone, lambda predictor: predictor.merge()), expected)
    assert np.array_equal(forecast(backbone), expected)


def test_exchange_in_another_thread(tmp_path: Path) -> None:
    """Each forecast is that of one adapter or the other, whenever the exchange comes."""
    backbone, other = adapted("lora"), adapted(["layernorm", "bitfit"], seed=1)
    for each, name in ((backbone, "one"), (other, "two")):
        assert each.adapter is not None
        each.adapter.save(tmp_path / name)
    allowed = [forecast(backbone, batch_size=2), forecast(other, batch_size=2)]
    shared, over = predictor(backbone, batch_size=2), threading.Event()

    def exchange() -> None:
        for turn in range(12):
            shared.swap(tmp_path / ("two", "one")[turn % 2])
        over.set()

    def read() -> int:
        count = 0
        while not over.is_set():
            for row, found in enumerate(values(shared.predict(series()))):
                assert any(np.array_equal(found, expected[row]) for expected in allowed)
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        pool.submit(exchange).result()
        assert sum(reader.result() for reader in readers) > 0
    assert np.array_equal(values(shared.predict(series())), allowed[0])


def test_an_exchange_that_fails_leaves_the_same_adapter(tmp_path: Path) -> None:
    backbone = adapted(["lora", "bitfit"])
    expected, adapter, before = forecast(backbone), backbone.adapter, traits(backbone)
    get_adapter("lora").attach(deepcopy(base("chronos", "t5-nano"))).save(tmp_path)
    with pytest.raises(AdapterError):
        predictor(backbone).swap(tmp_path)
    assert backbone.adapter is adapter
    assert traits(backbone).differing(before) == ""
    assert np.array_equal(forecast(backbone), expected)


def test_a_change_of_the_adapter_is_seen(tmp_path: Path) -> None:
    backbone = adapted("lora")
    adapter = backbone.adapter
    assert adapter is not None
    before = forecast(backbone)
    adapter.save(tmp_path)
    shaken(adapter)
    assert not np.array_equal(forecast(backbone), before)
    adapter.load(tmp_path)
    assert np.array_equal(forecast(backbone), before)
    # Also one that torch does not count.
    adapter.parameters()[0].data.mul_(-1.0)
    assert not np.array_equal(forecast(backbone), before)
    # Also of what is no tensor.
    t5 = deepcopy(base("chronos", "t5-nano"))
    cold = forecast(t5)
    t5.temperature = 3.0  # type: ignore[assignment]
    assert not np.array_equal(forecast(t5), cold)


def test_readers_share_the_base_and_are_used_again() -> None:
    backbone = adapted("lora")
    with backbone.reading() as one, backbone.reading() as two:
        assert one is not two
        own = {id(parameter) for parameter in backbone.adapter.folds()}  # type: ignore[union-attr]
        plain = {name.replace(".base_layer.", "."): p for name, p in backbone.named_parameters()}
        for (name, left), (_, right) in zip(one.named_parameters(), two.named_parameters(), strict=True):
            assert left is right
            assert (left.data_ptr() == plain[name].data_ptr()) == (id(plain[name]) not in own)
        assert not any(module.training for module in one.modules())
    with backbone.reading() as again:
        assert again in (one, two)
        with pytest.raises(AdapterError, match="cannot be attached to a copy that only reads"):
            get_adapter("lora").attach(again)
        with again.reading() as same:
            assert same is again


MERGED = "cannot be attached: another one was merged into the weights"


def test_merged_is_a_property_of_the_backbone(tmp_path: Path) -> None:
    backbone = adapted("lora")
    adapter = backbone.adapter
    assert adapter is not None
    adapter.save(tmp_path / "adapter")
    first, expected = predictor(backbone), forecast(backbone)
    adapter.merge()
    for each in (first, first.shorten(4), predictor(backbone), predictor(deepcopy(backbone))):
        assert each.merged
        with pytest.raises(PredictorError, match="merged"):
            each.serialize(tmp_path / "predictor")
        with pytest.raises(AdapterError, match="merged"):
            each.swap(tmp_path / "adapter")
    for attach in (
        lambda: load_adapter(tmp_path / "adapter", backbone),
        lambda: get_adapter("bitfit").attach(backbone),
    ):
        with pytest.raises(AdapterError, match=MERGED):
            attach()
    with pytest.raises(AdapterError, match="is not attached"):
        adapter.merge()
    assert not (tmp_path / "predictor").exists()
    assert np.array_equal(forecast(backbone), expected)
    first.export(tmp_path / "model")
    again = gluonts_peft.load_backbone("chronos", checkpoint=tmp_path / "model", prediction_length=8, context_length=32)
    assert np.array_equal(forecast(again), expected)


@pytest.mark.parametrize("spec", ["lora", "full", "layernorm", ["bitfit", "ia3"]], ids=str)
def test_merging_and_training_leave_what_others_share(spec: Any) -> None:
    backbone = deepcopy(base())
    shared = [(tensor.detach(), tensor.detach().clone()) for tensor in (*backbone.parameters(), *backbone.buffers())]
    shaken(get_adapter(spec).attach(backbone)).merge()
    assert backbone.merged
    assert all(torch.equal(value, saved) for value, saved in shared)


class BreaksError(RuntimeError):
    pass


@pytest.mark.parametrize(
    "spec", ["lora", "layernorm", "bitfit", "trace", ["layernorm", "lora", "bitfit"], HEAD], ids=str
)
@pytest.mark.parametrize("place", ["_attach", "_bind", "_check_start"])
def test_an_attach_that_fails_anywhere_leaves_nothing(spec: Any, place: str) -> None:
    backbone = deepcopy(base())
    backbone.network.get_submodule("encoder.block.0").train()
    before, adapter = traits(backbone), get_adapter(spec)
    own, done = dict(vars(adapter)), getattr(adapter, place)

    def fails(*arguments: Any) -> None:
        done(*arguments)
        raise BreaksError

    setattr(adapter, place, fails)
    with pytest.raises(BreaksError):
        adapter.attach(backbone)
    delattr(adapter, place)
    assert traits(backbone).differing(before) == ""
    assert backbone.adapter is None
    assert vars(adapter) == own
    # And the same adapter attaches afterwards.
    adapter.attach(backbone).detach()
    backbone.network.get_submodule("encoder.block.0").train()
    assert traits(backbone).differing(before) == ""


@pytest.mark.parametrize("spec", ["lora", "layernorm", ["layernorm", "lora", "bitfit"]], ids=str)
def test_a_merge_that_fails_changes_nothing(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = adapted(spec)
    adapter, expected, before = backbone.adapter, forecast(backbone), traits(backbone)
    assert adapter is not None
    part = getattr(adapter, "parts", [adapter])[-1]
    done = part._fold

    def fails() -> None:
        done()
        raise BreaksError("no more")

    monkeypatch.setattr(part, "_fold", fails)
    with pytest.raises(AdapterError, match="cannot be merged: BreaksError: no more"):
        adapter.merge()
    monkeypatch.undo()
    assert traits(backbone).differing(before) == ""
    assert backbone.adapter is adapter
    assert not backbone.merged
    assert np.array_equal(forecast(backbone), expected)
    adapter.merge()
    assert np.array_equal(forecast(backbone), expected)


@pytest.mark.parametrize(
    ("precision", "spec"),
    [
        ("bf16-true", "lora"),
        ("bf16-true", "vera"),
        ("bf16-true", ["layernorm", "bitfit"]),
        ("16-true", "lora"),
        ("64-true", "vera"),
        ("bf16-mixed", ["layernorm", "bitfit"]),
    ],
    ids=str,
)
def test_the_base_keeps_its_type_whatever_the_precision(precision: str, spec: Any, tmp_path: Path) -> None:
    estimator = get_estimator("chronos")(
        prediction_length=8,
        context_length=32,
        adapter=spec,
        max_epochs=1,
        num_batches_per_epoch=3,
        gate="keep",
        device="cpu",
        precision=precision,
        progress=False,
        batch_size=4,
    )
    tuned = estimator.train(series())
    assert {tensor.dtype for tensor in tuned.backbone.parameters()} == {torch.float32}
    if precision == "16-true":
        # AdamW divides by zero in float16: what comes of it is no number, and the gate had warned of it.
        with pytest.raises(ValueError, match="finite"):
            list(tuned.predict(series()))
    else:
        tuned.serialize(tmp_path / "predictor")
        again = PeftPredictor.deserialize(tmp_path / "predictor", device="cpu")
        assert np.array_equal(values(again.predict(series())), values(tuned.predict(series())))
        tuned.export(tmp_path / "model")
        assert {tensor.dtype for tensor in estimator_of(tmp_path / "model").parameters()} == {torch.float32}
    assert tuned.backbone.adapter is not None
    tuned.backbone.adapter.detach()
    zero_shot = forecast(deepcopy(base()), batch_size=tuned.batch_size)
    assert np.array_equal(values(tuned.predict(series())), zero_shot)


def estimator_of(folder: Path) -> Backbone:
    return gluonts_peft.load_backbone("chronos", checkpoint=folder, prediction_length=8, context_length=32)


def test_a_snapshot_gives_back_types_and_values() -> None:
    backbone = deepcopy(base())
    before, state = traits(backbone), deepcopy(backbone.state_dict())
    adapter = get_adapter("full").attach(backbone)
    backbone.half()
    adapter.detach()
    assert traits(backbone).differing(before) == ""
    snapshot = Snapshot(backbone)
    backbone.to(torch.bfloat16)
    backbone.network.eval().requires_grad_(True)
    del backbone.network.encoder.block[1]  # type: ignore[union-attr]
    snapshot.restore()
    assert traits(backbone).differing(before) == ""
    assert all(
        torch.equal(left, right) for left, right in zip(backbone.state_dict().values(), state.values(), strict=True)
    )
