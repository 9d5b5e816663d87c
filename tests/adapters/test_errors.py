"""What users are told when something does not fit: whole sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import gluonts_peft
from gluonts_peft import get_adapter
from gluonts_peft.adapters.base import AdapterError
from gluonts_peft.adapters.load import load_adapter
from gluonts_peft.backbone import SITES, Backbone

ADAPTERS = ", ".join(gluonts_peft.list_adapters())
KINDS = ", ".join(sorted(SITES))


@cache
def base(checkpoint: str) -> Backbone:
    return gluonts_peft.load_backbone("chronos", checkpoint=checkpoint, prediction_length=8, context_length=48)


def fresh(checkpoint: str = "t5-nano") -> Backbone:
    return deepcopy(base(checkpoint))


def failure(action: Callable[..., Any], *arguments: Any, kind: type[Exception] = ValueError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        action(*arguments, **options)
    return str(caught.value)


def saved(folder: Path, spec: Any, checkpoint: str = "t5-nano") -> Path:
    get_adapter(spec).attach(fresh(checkpoint)).save(folder)
    return folder


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lorra", f"adapter 'lorra' is unknown; did you mean 'lora'? known: {ADAPTERS}"),
        ("fourier", f"adapter 'fourier' is unknown; did you mean 'fourierft'? known: {ADAPTERS}"),
        ({"name": "?"}, f"adapter '?' is unknown; known: {ADAPTERS}"),
        (["lora", "bitfitt"], f"adapter 'bitfitt' is unknown; did you mean 'bitfit'? known: {ADAPTERS}"),
        ({"name": "bitfit", "r": 2}, "adapter 'bitfit': option 'r' is unknown; known: (none)"),
        ({"name": "none", "rank": 2}, "adapter 'none': option 'rank' is unknown; known: (none)"),
        (["lora"], "a hybrid needs at least two adapters, got ['lora']; name a single adapter by itself"),
        ([], "a hybrid needs at least two adapters, got []; name a single adapter by itself"),
        (
            ["lora", {"name": "lora", "r": 4}],
            "a hybrid takes each adapter once, got ['lora', 'lora']",
        ),
        (["bitfit", "lora", "bitfit"], "a hybrid takes each adapter once, got ['bitfit', 'lora', 'bitfit']"),
        (["none", "lora"], "adapter 'none' cannot be a part of a hybrid, got ['none', 'lora']"),
        (["bitfit", "full"], "adapter 'full' cannot be a part of a hybrid, got ['bitfit', 'full']"),
        (
            ["lora", "dora"],
            "a hybrid takes one variant of a method, got ['lora', 'dora'], which share their tensors' names",
        ),
        (
            ["adalora", "ia3", "lora"],
            "a hybrid takes one variant of a method, got ['adalora', 'ia3', 'lora'], which share their tensors' names",
        ),
    ],
    ids=str,
)
def test_specs_that_cannot_be_built(spec: Any, message: str) -> None:
    assert failure(get_adapter, spec) == message


@pytest.mark.parametrize(
    ("spec", "start", "known"),
    [
        (
            {"name": "lora", "lora_alfa": 3},
            "adapter 'lora': option 'lora_alfa' is unknown; did you mean 'lora_alpha'? known: ",
            {"r", "sites", "target_modules", "use_rslora"},
        ),
        (
            {"name": "fourierft", "n_frequencies": 3},
            "adapter 'fourierft': option 'n_frequencies' is unknown; did you mean 'n_frequency'? known: ",
            {"scaling", "sites", "random_loc_seed"},
        ),
        (
            {"name": "lora", "task_type": "X"},
            "adapter 'lora': option 'task_type' is unknown; ",
            {"r"},
        ),
    ],
)
def test_unknown_options_of_peft_methods(spec: dict[str, Any], start: str, known: set[str]) -> None:
    message = failure(get_adapter, spec, kind=AdapterError)

    assert message.startswith(start)
    listed = message.partition("known: ")[2].split(", ")
    assert listed == sorted(listed)
    assert known <= set(listed)
    assert not {"task_type", "peft_type", "inference_mode"} & set(listed)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "lora", "sites": ["qq"]}, f"site 'qq' is unknown; did you mean 'q'? known: {KINDS}"),
        ({"name": "vera", "sites": ["q", "nrom"]}, f"site 'nrom' is unknown; did you mean 'norm'? known: {KINDS}"),
        (
            {"name": "lora", "sites": "ff_inn"},
            f"site 'ff_inn' is unknown; did you mean 'ff_in'? known: {KINDS}",
        ),
        *(
            ({"name": "lora", "sites": value}, f"sites {value!r} are no kinds of site; name some of: {KINDS}")
            for value in (None, 3, 0.5, True, [], {}, [1], ["q", None], [["q"]])
        ),
    ],
)
def test_unknown_sites(spec: dict[str, Any], message: str) -> None:
    backbone = fresh()

    assert failure(get_adapter(spec).attach, backbone) == message
    assert_untouched(backbone)


@pytest.mark.parametrize(
    ("checkpoint", "kinds", "message"),
    [
        (
            "t5-nano",
            {"norm": ("a",), "bias": ("b",)},
            "family 'chronos' has no site of kind q, k, v, o; it has: norm, bias",
        ),
        ("bolt-nano", {"head": ("a",), "q": ()}, "family 'chronos' has no site of kind q, k, v, o; it has: head"),
    ],
)
def test_family_without_the_places(
    checkpoint: str, kinds: dict[str, tuple[str, ...]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = fresh(checkpoint)
    monkeypatch.setattr(type(backbone), "sites", lambda self: kinds)

    assert failure(get_adapter("lora").attach, backbone) == message
    assert_untouched(backbone)


@pytest.mark.parametrize(
    ("spec", "impossible", "message"),
    [
        ("vera", "vera", "adapter 'vera' is impossible on family 'chronos': no room"),
        ("oft", "oft", "adapter 'oft' is impossible on family 'chronos': no room"),
        (["bitfit", "vera"], "vera", "adapter 'vera' is impossible on 'chronos': no room"),
    ],
    ids=str,
)
def test_adapter_that_a_family_declares_impossible(
    spec: Any, impossible: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = fresh()
    monkeypatch.setattr(type(backbone), "impossible", {impossible: "no room"})

    assert failure(get_adapter(spec).attach, backbone, kind=AdapterError) == message
    assert_untouched(backbone)


def assert_untouched(backbone: Backbone) -> None:
    """After a refusal the backbone is as it was, and takes another adapter."""
    before = base(backbone.source.checkpoint).network
    assert [type(module) for module in backbone.network.modules()] == [type(module) for module in before.modules()]
    now = backbone.network.state_dict()
    assert list(now) == list(before.state_dict())
    assert all(torch.equal(now[name], tensor) for name, tensor in before.state_dict().items())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.adapter is None
    assert not hasattr(backbone.network, "peft_config")


@pytest.mark.parametrize(
    ("spec", "start"),
    [
        (
            {"name": "lora", "target_modules": ["abc"]},
            "adapter 'lora': {'target_modules': ['abc']} name no module of ",
        ),
        ({"name": "fourierft", "n_frequency": 10**9}, "adapter fourierft(n_frequency=1000000000) cannot be attached"),
        (
            ["bitfit", {"name": "lora", "sites": ["norm"]}],
            "adapter lora(sites=['norm']) cannot be attached to T5Backbone",
        ),
        (["lora", {"name": "ia3", "target_modules": ["x"]}], "adapter 'ia3': {'target_modules': ['x']} name no module"),
    ],
    ids=str,
)
def test_what_peft_refuses_is_refused_with_its_reason_and_undone(spec: Any, start: str) -> None:
    backbone = fresh()
    message = failure(get_adapter(spec).attach, backbone, kind=AdapterError)

    assert message.startswith(start)
    assert_untouched(backbone)
    get_adapter("lora").attach(backbone)


@pytest.mark.parametrize("action", ["detach", "merge", "save", "parameter_names"])
@pytest.mark.parametrize(
    ("spec", "printed"),
    [("lora", "lora"), ({"name": "vera", "r": 4}, "vera(r=4)"), (["bitfit", "lora"], "bitfit + lora")],
    ids=str,
)
def test_adapter_that_is_not_attached(spec: Any, printed: str, action: str, tmp_path: Path) -> None:
    method = getattr(get_adapter(spec), action)
    arguments = (tmp_path / "out",) if action == "save" else ()

    assert failure(method, *arguments, kind=AdapterError) == (
        f"adapter {printed} is not attached; call attach(backbone) first"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", ["lora", "bitfit", ["layernorm", "lora"]], ids=str)
@pytest.mark.parametrize(("trained", "opened"), [("t5-nano", "bolt-nano"), ("bolt-nano", "t5-nano")])
def test_adapter_of_another_base(spec: Any, trained: str, opened: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", spec, trained)
    backbone = fresh(opened)

    assert failure(load_adapter, folder, backbone, kind=AdapterError) == (
        f"adapter in {str(folder)!r} was trained on {trained!r} with fingerprint"
        f" {base(trained).source.fingerprint[:12]}…, this backbone is {opened!r} with fingerprint"
        f" {base(opened).source.fingerprint[:12]}…; load the adapter's own base, or pass check_base=False"
    )
    assert_untouched(backbone)


def test_the_check_of_the_base_can_be_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", "lora")
    record = json.loads((folder / "gluonts_peft.json").read_text())
    record["base"]["fingerprint"] = "f" * 64
    (folder / "gluonts_peft.json").write_text(json.dumps(record))

    assert "fingerprint ffffffffffff…" in failure(load_adapter, folder, fresh(), kind=AdapterError)
    assert load_adapter(folder, fresh(), check_base=False).name == "lora"


@pytest.mark.parametrize("spec", ["lora", "bitfit", ["layernorm", "lora"]], ids=str)
@pytest.mark.parametrize("keep", [5, -1])
def test_truncated_adapter(spec: Any, keep: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", spec)
    path = folder / ("layernorm" if isinstance(spec, list) else "") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    backbone = fresh()

    assert failure(load_adapter, folder, backbone, kind=AdapterError).startswith(
        f"{str(path)!r} is truncated or damaged: "
    )
    assert_untouched(backbone)


@pytest.mark.parametrize("spec", ["lora", "bitfit", ["layernorm", "lora"]], ids=str)
def test_tensors_that_changed_on_the_disk(spec: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", spec)
    file = (folder / "lora" if isinstance(spec, list) else folder) / "adapter_model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    backbone = fresh()
    for number in range(0, (len(content) - header) // 4, (len(content) - header) // 20):
        # A low bit of a number: a small change, and finite.
        changed = bytearray(content)
        changed[header + 4 * number + 1] ^= 1
        file.write_bytes(bytes(changed))
        message = failure(load_adapter, folder, backbone, kind=AdapterError)
        assert "is not what was saved: its tensors or its options were changed or damaged since" in message
        assert str(file.parent) in message
        assert_untouched(backbone)
    file.write_bytes(content)
    load_adapter(folder, backbone)


def test_options_that_changed_on_the_disk(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", {"name": "lora", "r": 2, "lora_alpha": 8})
    path = folder / "gluonts_peft.json"
    record = json.loads(path.read_text())
    record["adapter"]["lora_alpha"] = 9
    path.write_text(json.dumps(record))
    assert "is not what was saved" in failure(load_adapter, folder, fresh(), kind=AdapterError)
    # What the message advises.
    path.unlink()
    assert load_adapter(folder, fresh()).options["lora_alpha"] == 8


@pytest.mark.parametrize("spec", ["vera", "full"])
def test_adapter_without_its_tensors(spec: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", spec)
    path = folder / "adapter_model.safetensors"
    path.unlink()
    backbone = fresh()

    assert failure(load_adapter, folder, backbone, kind=AdapterError) == (
        f"{str(path)!r} does not exist; name the folder of a saved adapter"
    )
    assert_untouched(backbone)


FIRST = "base_model.model.decoder.block.0.layer.0.SelfAttention"


@pytest.mark.parametrize(
    ("stored", "built", "message"),
    [
        (
            {"name": "lora", "r": 4},
            {"name": "lora", "r": 2},
            "stored tensor 'base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight' has shape (4, 64),"
            " adapter lora(r=2) needs (2, 64); was it saved with other options or on another base?",
        ),
        (
            {"name": "fourierft", "n_frequency": 7},
            {"name": "fourierft", "n_frequency": 9},
            "stored tensor 'base_model.model.encoder.block.0.layer.0.SelfAttention.q.fourierft_spectrum' has shape"
            " (7,), adapter fourierft(n_frequency=9) needs (9,); was it saved with other options or on another base?",
        ),
        (
            {"name": "lora", "sites": ["q"]},
            {"name": "lora", "sites": ["q", "v"]},
            f"stored tensors do not fit adapter lora(sites=['q', 'v']): 12 missing (first: {FIRST}.v.lora_A.weight), 0"
            " without a place; was it saved with other options or on another base?",
        ),
        (
            {"name": "lora", "sites": ["q", "k"]},
            {"name": "lora", "sites": ["q"]},
            "stored tensors do not fit adapter lora(sites=['q']): 0 missing, 12 without a place (first:"
            f" {FIRST}.k.lora_A.weight); was it saved with other options or on another base?",
        ),
        (
            "bitfit",
            "head",
            "stored tensors do not fit adapter head: 1 missing (first: shared.weight), 2 without a place (first:"
            " decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight); was it saved with other options or"
            " on another base?",
        ),
    ],
    ids=["rank", "frequencies", "missing", "surplus", "selective"],
)
def test_tensors_that_do_not_fit(stored: Any, built: Any, message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", stored)
    record = json.loads((folder / "gluonts_peft.json").read_text())
    record["adapter"] = built
    (folder / "gluonts_peft.json").write_text(json.dumps(record))
    backbone = fresh()

    assert failure(load_adapter, folder, backbone, kind=AdapterError) == message
    assert_untouched(backbone)


def test_tensors_that_do_not_fit_change_nothing() -> None:
    adapter = get_adapter("layernorm").attach(fresh())
    state = {name: tensor.detach().clone() + 1 for name, tensor in adapter.state_dict().items()}
    last = list(state)[-1]
    state[last] = state[last][:-1]
    before = {name: tensor.detach().clone() for name, tensor in adapter.state_dict().items()}

    assert last in failure(adapter.load_state_dict, state, kind=AdapterError)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"adapter": "lora"}', "KeyError: 'base'"),
        ('{"base": {}}', "KeyError: 'adapter'"),
        ("[]", "TypeError: list indices must be integers or slices, not str"),
    ],
)
def test_damaged_record(content: str, problem: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", "lora")
    path = folder / "gluonts_peft.json"
    path.write_text(content)
    backbone = fresh()

    assert failure(load_adapter, folder, backbone, kind=AdapterError) == f"{str(path)!r} is damaged: {problem}"
    assert_untouched(backbone)


@pytest.mark.parametrize("base_record", ["{}", "[]", '{"fingerprint": "0"}', "null"])
def test_record_whose_base_is_damaged(base_record: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", "lora")
    path = folder / "gluonts_peft.json"
    path.write_text(f'{{"adapter": "lora", "base": {base_record}}}')

    assert failure(load_adapter, folder, fresh(), kind=AdapterError).startswith(f"{str(path)!r} is damaged: ")


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_folder_without_an_adapter(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = tmp_path / name

    assert failure(load_adapter, folder, fresh(), kind=AdapterError) == (
        f"folder {str(folder)!r} holds neither gluonts_peft.json nor adapter_config.json"
    )


@pytest.mark.parametrize("content", ["{", '{"peft_type": "NO_SUCH"}', "[1]"])
def test_peft_configuration_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)

    assert failure(load_adapter, tmp_path, fresh(), kind=AdapterError).startswith(
        f"adapter_config.json in {str(tmp_path)!r} cannot be read: "
    )


def test_peft_method_that_is_not_in_the_table(tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    from gluonts_peft.adapters.additive import TABLE

    PromptTuningConfig(num_virtual_tokens=2).save_pretrained(tmp_path)
    known = ", ".join(method.name for method in TABLE)

    assert failure(load_adapter, tmp_path, fresh(), kind=AdapterError) == (
        f"adapter in {str(tmp_path)!r} is of type PeftType.PROMPT_TUNING, which is not supported; known: {known}"
    )


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        (
            {"tinit": 3, "tfinal": 4},
            7,
            "adapter 'adalora': tinit 3 + tfinal 4 leave none of the 7 training steps; lower them or train longer",
        ),
        (
            {"tinit": 10},
            5,
            "adapter 'adalora': tinit 10 + tfinal 0 leave none of the 5 training steps; lower them or train longer",
        ),
    ],
)
def test_adalora_that_has_no_time(options: dict[str, int], steps: int, message: str) -> None:
    adapter = get_adapter("adalora", **options).attach(fresh())

    assert failure(adapter.prepare, steps, kind=AdapterError) == message


@pytest.mark.parametrize("total", [10, 200])
def test_adalora_is_not_told_the_length(total: int) -> None:
    backbone = fresh()

    assert failure(get_adapter("adalora", total_step=total).attach, backbone, kind=AdapterError) == (
        "adapter 'adalora': option 'total_step' is known when training starts; leave it out"
    )
    assert_untouched(backbone)


def test_projections_that_are_drawn_differently(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", "vera")
    record = json.loads((folder / "gluonts_peft.json").read_text())
    record["frozen"] = "0" * 64
    (folder / "gluonts_peft.json").write_text(json.dumps(record))
    backbone = fresh()

    assert failure(load_adapter, folder, backbone, kind=AdapterError) == (
        f"adapter vera in {str(folder)!r} rests on random projections that this version of torch draws differently;"
        " load it with the versions in its record, or train it with save_projection=True"
    )
    assert_untouched(backbone)
