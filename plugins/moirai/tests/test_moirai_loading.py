"""Checkpoint folders are told apart by their keys, and refused before anything in them runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from uni2ts import distribution as d
from uni2ts.model.moirai.module import encode_distr_output

from gluonts_peft.checkpoint import CheckpointError
from gluonts_peft_moirai import MoiraiBackbone
from gluonts_peft_moirai.distributions import decode

KINDS = ("moirai-1", "moirai-moe", "moirai-2")


@pytest.fixture
def folder(backbone: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    kind = getattr(request, "param", "moirai-1")
    backbone(kind).export(tmp_path)
    return tmp_path


def refused(folder: Path, **changes: Any) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(CheckpointError) as caught:
        MoiraiBackbone.load_network(folder)
    return str(caught.value).replace(str(folder), "FOLDER")


@pytest.mark.parametrize(
    "output",
    [
        d.MixtureOutput([d.StudentTOutput(), d.NormalFixedScaleOutput(0.01), d.ParetoFixedAlphaOutput(2.5)]),
        d.LaplaceFixedScaleOutput(),
        d.LogNormalOutput(),
    ],
    ids=lambda output: type(output).__name__,
)
def test_what_uni2ts_encodes_is_decoded(output: Any) -> None:
    encoded = encode_distr_output(output)
    decoded = decode(json.loads(json.dumps(encoded)))

    assert type(decoded) is type(output)
    assert encode_distr_output(decoded) == encoded


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "uni2ts.distribution.os.system",
        # Within the prefix that uni2ts allows, and yet anything at all.
        "uni2ts.distribution._base.torch.load",
        "uni2ts.distribution._base.torch.hub.load",
        "uni2ts.distribution.DistributionOutput",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_names_of_anything_but_distributions_are_refused_before_they_run(
    target: str, nested: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr("os.system", lambda *_: ran.append("os.system"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: ran.append("torch.load"))
    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: ran.append("torch.hub.load"))
    evil: dict[str, Any] = {"_target_": target, "command": "true"}
    if nested:
        evil = {"_target_": "uni2ts.distribution.mixture.MixtureOutput", "components": [evil]}
    message = refused(folder, distr_output=evil)

    assert message.startswith(f"checkpoint folder 'FOLDER': distr_output is refused: _target_ {target!r} is unknown; ")
    assert ran == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("StudentT", "distr_output 'StudentT' is not a mapping with a _target_"),
        ({"_target_": 3}, "distr_output {'_target_': 3} is not a mapping with a _target_"),
        (
            {"_target_": "uni2ts.distribution.StudentTOutput", "scale": 2.0},
            "distr_output: arguments of uni2ts.distribution.StudentTOutput do not fit: StudentTOutput() takes no"
            " arguments",
        ),
        (
            {"_target_": "uni2ts.distribution.NormalFixedScaleOutput", "scale": {"_target_": "os.getcwd"}},
            "distr_output: scale of uni2ts.distribution.NormalFixedScaleOutput is {'_target_': 'os.getcwd'}, not a"
            " positive number",
        ),
        (
            {"_target_": "uni2ts.distribution.MixtureOutput", "components": {}},
            "distr_output: components of uni2ts.distribution.MixtureOutput is not a list of distributions",
        ),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(output: Any, message: str, folder: Path) -> None:
    assert refused(folder, distr_output=output) == f"checkpoint folder 'FOLDER': {message}"


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        (
            "moirai-1",
            {"distr_output": None},
            "checkpoint folder 'FOLDER' is not of family 'moirai': its config.json has neither distr_output"
            " (Moirai 1.x, Moirai-MoE) nor patch_size with num_predict_token or quantile_levels (Moirai-2)",
        ),
        ("moirai-1", {"num_layers": None}, "num_layers missing (Moirai 1.x)"),
        (
            "moirai-2",
            {"d_model": 100},
            "d_model is 100, not a multiple of 64, the width of a head (Moirai-2)",
        ),
        (
            "moirai-2",
            {"patch_size": -8},
            "patch_size is -8, not a positive integer (Moirai-2)",
        ),
        ("moirai-moe", {"d_ff": "32"}, "d_ff is '32', not a positive integer (Moirai-MoE)"),
        (
            "moirai-2",
            {"quantile_levels": [0.5, 0.1]},
            "quantile_levels is [0.5, 0.1], not a rising list of numbers between 0 and 1 (Moirai-2)",
        ),
        (
            "moirai-1",
            {"patch_sizes": [8, 8]},
            "patch_sizes is [8, 8], not a list of different positive integers (Moirai 1.x)",
        ),
        ("moirai-1", {"dropout_p": 1.5}, "dropout_p is 1.5, not a probability (Moirai 1.x)"),
    ],
    indirect=["folder"],
)
def test_configurations_that_cannot_be_used(folder: Path, changes: dict[str, Any], message: str) -> None:
    assert refused(folder, **changes).removeprefix("config.json of 'FOLDER': ") == message


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole, state = path.read_bytes(), load_file(path)
    assert "cannot be loaded as Moirai" in refused(folder, d_model=128)
    more, fewer = (refused(folder, d_model=64, num_layers=count) for count in (3, 1))
    if "centroid" in more:
        assert "shape torch.Size([2, 32, 64])" in more
        assert "shape torch.Size([2, 32, 64])" in fewer
    else:
        assert "tensors are missing from its weights (first: encoder.layers.2." in more
        assert "tensors are unknown to its configuration (first: encoder.layers.1." in fewer
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 2}))
    MoiraiBackbone.load_network(folder)
    first = sorted(state)[0]
    save_file({name: tensor for name, tensor in state.items() if name != first}, path)
    assert refused(folder).endswith(f"1 tensors are missing from its weights (first: {first})")
    path.write_bytes(whole[:-100])
    assert "is truncated or damaged" in refused(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.ckpt").write_bytes(b"")

    assert "pickled weights (model.ckpt) are not read: convert them to safetensors" in refused(folder)


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_keys_of_the_hub_that_the_network_does_not_take_are_let_be(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"license": "cc-by-nc-4.0"}))

    assert MoiraiBackbone.load_network(folder).d_model == 64
