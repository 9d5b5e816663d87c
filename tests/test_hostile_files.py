"""Files that others wrote, or that time has gnawed at: our error with the path, or the same result; nothing else."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gluonts_peft.adapters.base import AdapterError
from gluonts_peft.adapters.load import load_adapter
from gluonts_peft.backbone import Backbone, load_backbone
from gluonts_peft.checkpoint import CheckpointError
from gluonts_peft.checkpoint_io import read_checkpoint
from gluonts_peft.files import FolderInUse, NewerFormat, delivering, load_json, locked, opened, parse_json, parse_yaml
from gluonts_peft.predictor import PeftPredictor, PredictorError
from gluonts_peft.registry import families
from gluonts_peft.trials import load_study
from gluonts_peft.trials.records import Journal, Record, read_search
from gluonts_peft.trials.spec import TrialResult
from gluonts_peft.trials.strict import SpecError

STORED = Path(__file__).parent / "stored" / "0.1.0"
HOSTILE = [None, True, -1, 0, 10**9, 10**30, 1.5, math.nan, math.inf, "12", "", "(a+)+$", [], [1], {}, {"a": 1}, [[]]]
HOSTILE += ["<gone>", "<1e400>", "<deep>", "<twice>"]
GENERATED = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from places(value, (*at, key))


def damaged(content: Any, place: tuple[Any, ...], value: Any) -> str:
    """Return a JSON text with another value at a place."""
    tree = json.loads(json.dumps(content))
    *above, last = place
    inner = tree
    for name in above:
        inner = inner[name]
    if value == "<gone>":
        del inner[last]
    else:
        inner[last] = value
    text = json.dumps(tree).replace('"<1e400>"', "1e400").replace('"<deep>"', "[" * 3000 + "]" * 3000)
    return text.replace('"<twice>"', '{"a": 1, "a": 2}')


@st.composite
def damages(draw: Any, content: Any) -> str:
    """Draw a value somewhere else, a text cut short, or a flipped character."""
    text = json.dumps(content)
    kind = draw(st.sampled_from(["value"] * 6 + ["cut", "flip"]))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text) - 1))]
    if kind == "flip":
        at = draw(st.integers(0, len(text) - 1))
        return text[:at] + draw(st.characters(max_codepoint=255)) + text[at + 1 :]
    return damaged(content, draw(st.sampled_from(list(places(content)))), draw(st.sampled_from(HOSTILE)))


def outcome(call: Callable[[], Any], errors: tuple[type[ValueError], ...], path: Path) -> Any:
    try:
        return call()
    except errors as error:
        said = str(error)
    assert str(path.parent) in said, f"the error does not name the place: {said}"
    return None


@pytest.fixture(scope="module")
def predictor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "predictor"
    shutil.copytree(STORED / "predictors" / "bolt-nano-lora", folder)
    return folder


@pytest.mark.parametrize("name", ["predictor.json", "adapter/gluonts_peft.json"])
def test_a_damaged_predictor_is_named_or_is_the_same(name: str, predictor_folder: Path) -> None:
    path = predictor_folder / name
    whole = path.read_text()
    wanted = PeftPredictor.deserialize(predictor_folder, device="cpu").backbone.adapter
    assert wanted is not None
    state = {key: tensor.clone() for key, tensor in wanted.state_dict().items()}

    @GENERATED
    @given(text=damages(json.loads(whole)))
    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8")
        found = outcome(
            lambda: PeftPredictor.deserialize(predictor_folder, device="cpu"), (PredictorError, AdapterError), path
        )
        if found is None or found.backbone.adapter is None:
            return
        again = found.backbone.adapter.state_dict()
        assert all(np.array_equal(state[key], again[key]) for key in state)

    try:
        check()
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("chronos", "bolt-nano"),
        ("chronos", "t5-nano"),
        ("chronos", "chronos2-nano"),
        ("moirai", "moirai-nano"),
        ("lag-llama", "lag-llama-nano"),
        ("moment", "moment-nano"),
    ],
)
def test_a_damaged_configuration_is_named_and_builds_nothing_large(family: str, name: str, tmp_path: Path) -> None:
    kind: type[Backbone] = families.get(family).backbone_class
    folder = tmp_path / name
    shutil.copytree(kind.bundled()[name], folder)
    path = folder / "config.json"
    content = json.loads(path.read_text())

    def load() -> Any:
        return kind.from_checkpoint(str(folder), prediction_length=4)

    @GENERATED
    @given(text=damages(content))
    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8")
        outcome(load, (CheckpointError,), path)

    check()
    # Each would take all memory, or years.
    layers = [place for place in places(content) if "layers" in str(place[-1]) or place[-1] == "n_layer"]
    assert layers
    for place in layers:
        path.write_text(damaged(content, place, 10**9))
        with pytest.raises(CheckpointError, match=f"{place[-1]} is 1,000,000,000, but there are [0-9]+ tensors"):
            load()


def trial_files() -> list[Path]:
    found = [next(STORED.rglob(name)) for name in ("study.json", "search.json", "proposals.json", "evaluations.json")]
    return [*found, next(STORED.rglob("result.json"))]


READERS: dict[str, Callable[[Path], Any]] = {
    "study.json": lambda folder: load_study_record(folder),
    "search.json": read_search,
    "proposals.json": Journal,
    "evaluations.json": Record.read,
    "result.json": TrialResult.read,
}


def load_study_record(folder: Path) -> Any:
    from gluonts_peft.trials.grid import read_study

    return read_study(folder)


@pytest.mark.parametrize("source", trial_files(), ids=lambda path: path.name)
def test_a_damaged_record_of_trials_is_named(source: Path, tmp_path: Path) -> None:
    path = tmp_path / source.name
    read = READERS[source.name]
    content = json.loads(source.read_text())
    path.write_text(json.dumps(content))
    assert read(tmp_path) is not None
    if isinstance(content, dict):
        path.write_text(json.dumps({"format": 3, **content}))
        with pytest.raises(SpecError, match=r"it was written by a newer version of gluonts-peft \(format 3, this"):
            read(tmp_path)

    @GENERATED
    @given(text=damages(content))
    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8")
        outcome(lambda: read(tmp_path), (SpecError,), path)

    check()


def test_an_option_of_a_newer_version_is_said_to_be_one(tmp_path: Path) -> None:
    content = json.loads(next(STORED.rglob("result.json")).read_text())
    content["spec"]["training"]["momentum"] = 0.9
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(SpecError, match=r"written by a newer version of gluonts-peft \(.*option 'momentum' is unknown"):
        TrialResult.read(tmp_path)


WRONG = [3, "x", [1], True, 1.5, {"a": 1}, {1: 2}, [[]], None]


@pytest.mark.parametrize("key", ["base", "grid", "baselines", "base.training", "base.data", "base.also"])
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_part_of_a_study_of_the_wrong_type_is_named(key: str, value: Any, tmp_path: Path) -> None:
    import yaml

    form: dict[str, Any] = {
        "base": {"family": "chronos", "checkpoint": "bolt-nano", "prediction_length": 6},
        "grid": {"seed": [0]},
        "baselines": ["last_value"],
    }
    place = form
    for name in key.split(".")[:-1]:
        place = place[name]
    place[key.split(".")[-1]] = value
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(form))
    harmless = value is None and key == "grid"
    if harmless:
        assert len(load_study(path).grid) == 0
        return
    with pytest.raises(SpecError, match=key.split(".")[-1] if isinstance(value, int | str | float) else None) as caught:
        load_study(path)
    assert str(path) in str(caught.value)


def test_json_is_bounded(tmp_path: Path) -> None:
    assert parse_json("[" * 99 + "]" * 99)
    for text, reason in (
        ("[" * 102 + "]" * 102, "nested more than 100 deep"),
        ("[" * 100_000, "nested more than 100 deep"),
        ('{"a": {"b": 1, "b": 2}}', "key 'b' is there twice"),
        ('{"a": ' + "9" * 5000 + "}", "4300"),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_json(text)
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert load_json(path) == {}
    path.write_text(" " * 100 + "{}")
    with pytest.raises(ValueError, match="it has more than 50 bytes"):
        load_json(path, limit=50)
    with pytest.raises(ValueError, match="it is a folder, not a file"):
        load_json(tmp_path)
    with pytest.raises(ValueError, match="it is a device, not a file"):
        load_json(Path("/dev/zero"))


def test_yaml_is_bounded() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\n")[0] == {"a": [1, 2], "b": [1, 2]}
    bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 9))
    for text, reason in (
        (bomb, "its aliases stand for more than 200,000 values"),
        ("a: &x [*x]", "its aliases lead in a circle"),
        ("[" * 3000, "nested more than 100 deep"),
        ("#" * 2_000_000, "more than 1,048,576 characters"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("{a: 1", "expected ',' or '}'"),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_yaml(text)


def test_a_record_without_a_format_is_of_the_first_version() -> None:
    assert opened({"a": 1}) == {"a": 1}
    assert opened({"format": 2, "a": 1}, known=["a"]) == {"a": 1}
    for number in (0, -1, True, 1.0, "2", None, []):
        with pytest.raises(ValueError, match="not a positive integer"):
            opened({"format": number})
    with pytest.raises(NewerFormat, match=r"^written by a newer version of gluonts-peft \(format 3, this one re"):
        opened({"format": 3})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(predictor_folder: Path, tmp_path: Path) -> None:
    def piped(source: Path, name: str) -> Path:
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(source, folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        return folder

    bundled = families.get("chronos").backbone_class.bundled()["bolt-nano"]
    for name in ("predictor.json", "gluonts-config.json", "adapter/gluonts_peft.json"):
        with pytest.raises((PredictorError, AdapterError), match=name):
            PeftPredictor.deserialize(piped(predictor_folder, name))
    tensors = piped(predictor_folder / "adapter", "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="it is a pipe, not a file"):
        load_adapter(tensors, load_backbone("chronos", prediction_length=6, checkpoint="bolt-nano"))
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(CheckpointError, match=name):
            load_backbone("chronos", prediction_length=6, checkpoint=str(piped(bundled, name)))
    os.mkfifo(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="it is a pipe, not a file"):
        read_checkpoint(tmp_path / "last.ckpt")
    os.mkfifo(tmp_path / "study.yaml")
    with pytest.raises(SpecError, match="it is a pipe, not a file"):
        load_study(tmp_path / "study.yaml")


def test_a_folder_of_another_type_is_refused_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "gluonts-config.json").write_text(json.dumps({"type": "evil.Predictor"}))
    with pytest.raises(PredictorError, match="holds a predictor of type 'evil.Predictor', not PeftPredictor; nothing"):
        PeftPredictor.deserialize(tmp_path)


def test_a_base_with_an_adapter_beside_it_is_refused(tmp_path: Path) -> None:
    """transformers would load the base that the adapter names in its place."""
    folder = tmp_path / "base"
    shutil.copytree(families.get("chronos").backbone_class.bundled()["bolt-nano"], folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(CheckpointError, match=r"holds an adapter, adapter_config\.json, beside the weights"):
        load_backbone("chronos", prediction_length=6, checkpoint=str(folder))


def test_only_one_works_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with delivering(folder, "first") as part:
        part.mkdir()
        second = delivering(folder, "second")
        with pytest.raises(FolderInUse, match=f"^folder '{folder}' is in use by a second that is running$"):
            second.__enter__()
        assert part.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "out"]
    with pytest.raises(FileNotFoundError), delivering(tmp_path / "other" / "out", "third"):
        (tmp_path / "gone").unlink()
    assert not (tmp_path / "other").exists()
    found: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with locked(tmp_path, "thread"):
                pass
        except FolderInUse as error:
            found.append(error)

    with locked(tmp_path, "test"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(found) == 1
    with locked(tmp_path, "test"):
        pass


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_what_a_killed_delivery_has_moved_is_taken_out_again(moved: int, tmp_path: Path) -> None:
    """Into a folder with other content the parts go one by one; the next one finds some of them there."""
    (tmp_path / "notes.txt").write_text("mine")
    parts = ("a", "b", "c")
    hidden = tmp_path / f".{tmp_path.name}.partial"
    (hidden / "content").mkdir(parents=True)
    (hidden / "moving.json").write_text(json.dumps(parts))
    for number, name in enumerate(parts):
        (tmp_path / name if number < moved else hidden / "content" / name).write_text("old")

    def free() -> None:
        assert not [name for name in parts if (tmp_path / name).exists()]

    with delivering(tmp_path, "test", names=parts, check=free) as content:
        content.mkdir()
        for name in parts:
            (content / name).write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "notes.txt": "mine",
        **dict.fromkeys(parts, "new"),
    }
