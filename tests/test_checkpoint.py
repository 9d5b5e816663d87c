from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import gluonts_peft
from gluonts_peft.checkpoint import (
    Checkpoint,
    CheckpointError,
    fingerprint,
    parse,
    read_config,
    resolve,
    save_tensors,
    weight_files,
)
from gluonts_peft_chronos import ChronosBackbone

NAMES = ("bolt-nano", "t5-nano")


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Copy of a bundled checkpoint that a test may damage."""
    copy = tmp_path / f"copy-of-{request.param}"
    shutil.copytree(ChronosBackbone.bundled()[request.param], copy)
    return copy


def load(checkpoint: str | Path) -> gluonts_peft.Backbone:
    return gluonts_peft.load_backbone("chronos", checkpoint=checkpoint, prediction_length=8)


def failure(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        action(*arguments, **options)
    return str(caught.value)


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("text", "expected", "printed"),
    [
        ("bolt-nano", Checkpoint("bundled", "bolt-nano"), "bolt-nano"),
        ("here", Checkpoint("folder", "here"), "here"),
        (Path("here"), Checkpoint("folder", "here"), "here"),
        ("deep/er", Checkpoint("folder", "deep/er"), "deep/er"),
        ("amazon/chronos-t5-tiny", Checkpoint("hub", "amazon/chronos-t5-tiny"), "amazon/chronos-t5-tiny"),
        ("me/my_model.v2@main", Checkpoint("hub", "me/my_model.v2", "main"), "me/my_model.v2@main"),
        ("me/model@refs/pr/1", Checkpoint("hub", "me/model", "refs/pr/1"), "me/model@refs/pr/1"),
        (Checkpoint("hub", "a/b", "c"), Checkpoint("hub", "a/b", "c"), "a/b@c"),
    ],
    ids=str,
)
def test_parse(text: Any, expected: Checkpoint, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert parse(text, bundled=["t5-nano", "bolt-nano"]) == expected
    assert str(expected) == printed


def test_bundled_name_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bolt-nano").mkdir()
    monkeypatch.chdir(tmp_path)

    assert parse("bolt-nano", bundled=["bolt-nano"]).kind == "bundled"
    assert parse("./bolt-nano", bundled=["bolt-nano"]) == Checkpoint("folder", "./bolt-nano")


@pytest.mark.parametrize(
    ("text", "bundled", "message"),
    [
        (
            "bolt-nanno",
            ["t5-nano", "bolt-nano"],
            "checkpoint 'bolt-nanno' is neither a bundled name (bolt-nano, t5-nano), nor an existing folder, nor a hub"
            " id such as 'amazon/chronos-bolt-tiny'",
        ),
        (
            "../no/such/folder",
            [],
            "checkpoint '../no/such/folder' is neither a bundled name (none), nor an existing folder, nor a hub id such"
            " as 'amazon/chronos-bolt-tiny'",
        ),
        (
            Path("amazon/chronos"),
            ["bolt-nano"],
            "checkpoint 'amazon/chronos' is neither a bundled name (bolt-nano), nor an existing folder, nor a hub id"
            " such as 'amazon/chronos-bolt-tiny'",
        ),
        (
            "weights.safetensors",
            [],
            "checkpoint 'weights.safetensors' is a file; name the folder that holds config.json and the weights",
        ),
    ],
    ids=str,
)
def test_parse_refuses(
    text: Any, bundled: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.safetensors").touch()
    monkeypatch.chdir(tmp_path)

    assert failure(parse, text, bundled=bundled) == message


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (Checkpoint("bundled", "huge"), "bundled checkpoint 'huge' is unknown; known: big, small"),
        (Checkpoint("folder", "gone"), "checkpoint folder 'gone' does not exist"),
    ],
)
def test_resolve_refuses(checkpoint: Checkpoint, message: str) -> None:
    assert failure(resolve, checkpoint, bundled={"small": Path("s"), "big": Path("b")}) == message


def test_resolve_finds_bundled_names_and_folders(tmp_path: Path) -> None:
    assert resolve(Checkpoint("bundled", "small"), bundled={"small": tmp_path}) == (tmp_path, None)
    assert resolve(Checkpoint("folder", str(tmp_path)), bundled={}) == (tmp_path, None)


def test_fingerprint_depends_on_every_bit_of_the_weights(folder: Path) -> None:
    before = fingerprint(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    for position in (len(content) - 1, struct.unpack("<Q", content[:8])[0] + 8):
        content[position] ^= 1
        weights.write_bytes(content)
        assert fingerprint(folder) != before
        content[position] ^= 1
    weights.write_bytes(content)

    assert fingerprint(folder) == before
    assert len(before) == 64


def test_fingerprint_does_not_depend_on_config_or_place(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    change_config(folder, lambda config: config.update(remark="changed"))
    (folder / "README.md").write_text("new")
    moved = folder.rename(tmp_path / "elsewhere")

    assert fingerprint(moved) == before
    assert load(moved).source.fingerprint == before


def test_the_bundled_checkpoints_differ() -> None:
    prints = {fingerprint(ChronosBackbone.bundled()[name]) for name in NAMES}

    assert len(prints) == len(NAMES)


def test_weights_in_several_files_are_one_checkpoint(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(tensors) // 2
    parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    index: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    backbone = load(folder)
    whole = load(folder.name.removeprefix("copy-of-"))

    assert len(weight_files(folder)) == 2
    assert backbone.source.fingerprint != whole.source.fingerprint
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(backbone.network.state_dict()[name], tensor)


def test_safetensors_of_other_things_are_not_weights(folder: Path) -> None:
    before = fingerprint(folder)
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")

    assert fingerprint(folder) == before


@pytest.mark.parametrize("keep", [4, 100, 50_000, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    message = failure(load, folder)

    assert message.startswith(f"{str(weights)!r} is truncated or damaged: ")
    assert message.endswith("; fetch it again")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert failure(load, folder) == f"checkpoint folder {str(folder)!r} has no model.safetensors"
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (folder / "a.ckpt").write_bytes(b"\x80\x04")

    assert failure(load, folder) == (
        f"checkpoint folder {str(folder)!r} has no model.safetensors; pickled weights (a.ckpt, pytorch_model.bin) are"
        " not read: convert them to safetensors"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "{'a': 1}",
            "{path!r} is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ("", "{path!r} is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[1, 2]", "{path!r} holds a list, not a mapping"),
        ("3", "{path!r} holds a int, not a mapping"),
    ],
)
def test_config_that_is_no_mapping(folder: Path, content: str, message: str) -> None:
    path = folder / "config.json"
    path.write_text(content)

    assert failure(read_config, folder) == failure(load, folder) == message.format(path=str(path))


def test_config_in_bytes_that_are_no_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")

    assert failure(load, folder).startswith(f"{str(folder / 'config.json')!r} is not JSON: ")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()

    assert failure(load, folder) == f"checkpoint folder {str(folder)!r} has no config.json"


@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_checkpoint_of_another_family(folder: Path, model_type: str) -> None:
    change_config(folder, lambda config: (config.pop("chronos_config"), config.update(model_type=model_type)))

    assert failure(load, folder) == (
        f"checkpoint folder {str(folder)!r} is not of family 'chronos': its config.json has no chronos_config"
        f" (model_type '{model_type}')"
    )


@pytest.mark.parametrize(
    ("pipeline", "hint"), [("ChronosBoltPipelin", "did you mean 'ChronosBoltPipeline'? "), ("Other", "")]
)
def test_unknown_pipeline(folder: Path, pipeline: str, hint: str) -> None:
    change_config(folder, lambda config: config.update(chronos_pipeline_class=pipeline))

    assert failure(load, folder) == (
        f"checkpoint folder {str(folder)!r}: pipeline {pipeline!r} is unknown; {hint}known: Chronos2Pipeline,"
        " ChronosBoltPipeline, ChronosPipeline"
    )


@pytest.mark.parametrize(("layers", "count"), [(1, 8), (2, 16)])
def test_missing_weights_are_not_filled_with_random_numbers(folder: Path, layers: int, count: int) -> None:
    start = json.loads((folder / "config.json").read_text())["num_layers"]
    change_config(folder, lambda config: config.update(num_layers=start + layers))

    assert failure(load, folder) == (
        f"checkpoint folder {str(folder)!r} does not fit its config.json: {count} missing keys (first:"
        f" encoder.block.{start}.layer.0.SelfAttention.k.weight)"
    )


def test_weights_of_another_shape(folder: Path) -> None:
    change_config(folder, lambda config: config.update(d_ff=2 * config["d_ff"]))

    assert failure(load, folder).startswith(f"checkpoint folder {str(folder)!r} ")


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("amazon/chronos-bolt-tiny", LocalEntryNotFoundError("not in the cache\nlong story"), "not in the cache"),
        ("amazon/other@main", ConnectionError("no route"), "no route"),
        ("amazon/silent", OSError(), "no reason given"),
    ],
    ids=["cache", "network", "silent"],
)
def test_hub_that_cannot_be_reached(name: str, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)

    assert failure(load, name) == (
        f"checkpoint {name!r} cannot be fetched from the hub ({type(error).__name__}: {reason}); check the name and the"
        " network, name a local folder, or use a bundled checkpoint: bolt-nano, chronos2-nano, t5-nano"
    )


@pytest.mark.parametrize("name", ["me/a--b", "me/.hidden"])
def test_name_that_the_hub_refuses(name: str) -> None:
    message = failure(load, name)

    assert message.startswith(f"checkpoint {name!r} cannot be fetched from the hub (HFValidationError: ")
    assert message.endswith(
        "; check the name and the network, name a local folder, or use a bundled checkpoint:"
        " bolt-nano, chronos2-nano, t5-nano"
    )


@pytest.mark.parametrize(
    ("asked", "last", "expected"),
    [
        ("me/model", "0123456789" * 4, "0123456789" * 4),
        ("me/model@v1", "abcdef0123" * 4, "abcdef0123" * 4),
        ("me/model@v1", "plain-folder", "v1"),
        ("me/model", "plain-folder", None),
    ],
)
def test_hub_checkpoint_is_recorded_with_its_exact_revision(
    asked: str, last: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / last
    shutil.copytree(ChronosBackbone.bundled()["bolt-nano"], snapshot)
    calls = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    backbone = load(asked)
    revision = asked.partition("@")[2] or None

    # Nothing but JSON and safetensors may come in.
    assert calls == [("me/model", {"revision": revision, "allow_patterns": ["*.json", "*.safetensors"]})]
    assert backbone.source.kind == "hub"
    assert backbone.source.checkpoint == "me/model"
    assert backbone.source.revision == expected
    assert backbone.source.fingerprint == fingerprint(snapshot)


def test_hub_checkpoint_is_found_in_the_local_cache_without_a_network(
    tmp_path: Path, python: Callable[..., str]
) -> None:
    commit = "0a1b2c3d4e" * 4
    cached = tmp_path / "hub" / "models--me--model"
    shutil.copytree(ChronosBackbone.bundled()["t5-nano"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    program = (
        "from gluonts_peft.checkpoint import parse, resolve, CheckpointError\n"
        "folder, revision = resolve(parse('me/model', bundled=[]), bundled={})\n"
        "print(folder.name, revision, sorted(path.name for path in folder.glob('model*')))\n"
        "try:\n"
        "    resolve(parse('me/absent@v7', bundled=[]), bundled={})\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    printed = python(program, HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    first, second = printed.strip().splitlines()

    assert first == f"{commit} {commit} ['model.safetensors']"
    assert second.startswith("checkpoint 'me/absent@v7' cannot be fetched from the hub (LocalEntryNotFoundError: ")
    assert second.endswith("; check the name and the network, name a local folder, or use a bundled checkpoint: none")


def test_written_tensors_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:

    (tmp_path / "other").touch()
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {})

    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("value", [None, -1, 0.5, "text", [3], {}, 10**12, math.nan], ids=repr)
def test_values_in_a_config_that_make_no_sense(value: Any, tmp_path: Path) -> None:
    """Whatever a library does with them, the error is ours and names the folder; what can be used is used."""
    source = ChronosBackbone.bundled()["t5-nano"]
    config = json.loads((source / "config.json").read_text())
    place = tmp_path / "model"
    shutil.copytree(source, place)
    refused = 0
    for key in config["chronos_config"]:
        for name in (key, f"{key}_"):
            changed = {**config["chronos_config"], name: value}
            if name != key:
                del changed[key]
            (place / "config.json").write_text(json.dumps({**config, "chronos_config": changed}))
            with suppress(CheckpointError):
                load(place)
                continue
            assert str(place) in failure(load, place)
            refused += 1
    # At least the keys of other names.
    assert refused >= len(config["chronos_config"])
