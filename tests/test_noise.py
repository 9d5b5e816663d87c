"""Warnings of libraries reach the user, except those that are named."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from gluonts_peft import PeftPredictor, get_adapter, get_estimator, list_adapters
from gluonts_peft.backbone import load_backbone
from gluonts_peft.noise import NOISE, without_noise

DATA = [
    {
        "item_id": f"s{i}",
        "start": pd.Period("2024-01-01", "h"),
        "target": np.random.default_rng(i).normal(20, 1, 80).astype(np.float32),
    }
    for i in range(3)
]


def train(adapter: Any = "lora", family: str = "chronos", **options: Any) -> PeftPredictor:
    defaults: dict[str, Any] = dict(
        prediction_length=6,
        context_length=32,
        max_epochs=2,
        num_batches_per_epoch=3,
        batch_size=4,
        gate="keep",
        device="cpu",
        progress=False,
    )
    found: PeftPredictor = get_estimator(family)(adapter=adapter, **{**defaults, **options}).train(DATA)
    return found


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [f"{each.category.__name__}: {each.message}" for each in caught]


HYBRID = ["layernorm", "lora"]
SPECS = [name for name in list_adapters() if name not in ("trace", "head", "none")]


@pytest.mark.parametrize("spec", [*SPECS, HYBRID, {"name": "head", "kind": "linear"}], ids=str)
def test_a_run_of_ours_is_quiet(
    spec: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = train(spec, folder=str(tmp_path / "training"))
    predictor.serialize(tmp_path / "model")
    list(PeftPredictor.deserialize(tmp_path / "model", device="cpu").predict(DATA))
    assert told(list(recwarn)) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("family", ["moirai", "lag-llama", "moment"])
def test_a_run_of_another_family_is_quiet(family: str, recwarn: pytest.WarningsRecorder) -> None:
    train(family=family)
    assert told(list(recwarn)) == []


class Says(Callback):  # type: ignore[misc]
    def on_train_start(self, *_: Any) -> None:
        rank_zero_warn("a new remark of Lightning")
        rank_zero_info("what Lightning is about to do")
        module = "lightning.pytorch.trainer.connectors.data_connector"
        warnings.warn_explicit("another new remark", UserWarning, "lightning/x.py", 1, module=module)


def test_a_warning_of_lightning_that_is_not_named_reaches_the_user(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="new remark") as caught:
        train(trainer_kwargs={"callbacks": [Says()]})
    texts = [str(each.message) for each in caught]
    assert texts == ["a new remark of Lightning", "another new remark"]
    assert not any("about to do" in record.getMessage() for record in caplog.records)


def test_a_warning_in_the_log_of_lightning_reaches_the_user(caplog: pytest.LogCaptureFixture) -> None:
    class Logs(Callback):  # type: ignore[misc]
        def on_train_start(self, *_: Any) -> None:
            logging.getLogger("lightning.pytorch.utilities.rank_zero").warning("look out")

    train(trainer_kwargs={"callbacks": [Logs()]})
    assert "look out" in [record.getMessage() for record in caplog.records]


def test_a_warning_of_peft_that_is_not_named_reaches_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    original = peft.get_peft_model

    def remarks(*arguments: Any, **options: Any) -> Any:
        warnings.warn("a new remark of PEFT", UserWarning, stacklevel=1)
        return original(*arguments, **options)

    from gluonts_peft.adapters import additive

    target = additive if hasattr(additive, "get_peft_model") else peft
    monkeypatch.setattr(target, "get_peft_model", remarks)
    monkeypatch.setattr(peft.tuners.lora.LoraModel, "__init__", _with_remark(peft.tuners.lora.LoraModel.__init__))
    with pytest.warns(UserWarning, match="^a new remark of PEFT"):
        get_adapter("lora").attach(load_backbone("chronos", prediction_length=6))


def _with_remark(original: Any) -> Any:
    def init(self: Any, *arguments: Any, **options: Any) -> None:
        warnings.warn("a new remark of PEFT's model", UserWarning, stacklevel=1)
        original(self, *arguments, **options)

    return init


def test_a_warning_of_transformers_reaches_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging as theirs

    from gluonts_peft_chronos.backbone import ChronosBoltModelForForecasting

    found: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    handler, logger = Keep(), theirs.get_logger("transformers.modeling_utils")
    original = ChronosBoltModelForForecasting.from_pretrained

    def remarks(*arguments: Any, **options: Any) -> Any:
        logger.warning("a new remark of transformers")
        return original(*arguments, **options)

    monkeypatch.setattr(ChronosBoltModelForForecasting, "from_pretrained", remarks)
    theirs.add_handler(handler)
    try:
        load_backbone("chronos", prediction_length=6)
    finally:
        theirs.remove_handler(handler)
    assert [record.getMessage() for record in found] == ["a new remark of transformers"]


EXAMPLES = {
    "lightning": [
        "`isinstance(treespec, LeafSpec)` is deprecated, use something else.",
        "The 'val_dataloader' does not have many workers which may be a bottleneck.",
        "The number of training batches (2) is smaller than the logging interval Trainer(log_every_n_steps=50).",
        "GPU available but not used. You can set it by doing `Trainer(accelerator='gpu')`.",
    ],
    "peft": [
        "Specified to not save vera_A and vera_B within the state dictionary, instead they will be restored",
        "Unsupported layer type '<class 'transformers.models.t5.modeling_t5.T5LayerNorm'>' encountered, proceed",
        "Could not find a config file in somewhere - will assume that the vocabulary was not modified.",
    ],
}


def test_each_row_of_the_table_has_a_reason_and_leaves_out_its_example_and_no_more() -> None:
    assert all(remark.reason for remark in NOISE)
    for library, texts in EXAMPLES.items():
        rows = [remark for remark in NOISE if remark.library == library]
        assert len(rows) == len(texts)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with without_noise(library):
                for remark, text in zip(rows, texts, strict=True):
                    assert re.match(remark.text, text)
                    warnings.warn(text, UserWarning, stacklevel=1)
                    warnings.warn(f"But {text}", UserWarning, stacklevel=1)
        assert [str(each.message) for each in caught] == [f"But {text}" for text in texts]
