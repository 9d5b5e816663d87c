"""Every field of every PEFT configuration works through everything, or is refused by name with nothing changed."""

from __future__ import annotations

import dataclasses
import json
import math
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import gluonts_peft
from gluonts_peft import get_adapter
from gluonts_peft.adapters import peft as peft_adapters
from gluonts_peft.adapters.additive import TABLE, Method, PeftAdapter
from gluonts_peft.adapters.base import AdapterError
from gluonts_peft.adapters.load import load_adapter
from gluonts_peft.adapters.options import in_layers, matching, resolve_pattern
from gluonts_peft.backbone import Backbone
from gluonts_peft.testing.cases import make_batch, traits
from gluonts_peft_chronos.backbone import BoltBackbone, ChronosBoltModelForForecasting

OURS = {
    "peft_type",
    "peft_version",
    "task_type",
    "inference_mode",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
}

# What anybody may write by mistake, or on purpose.
HOSTILE: tuple[Any, ...] = (
    math.nan,
    math.inf,
    1e38,
    1e-300,
    -1,
    0,
    2.5,
    10**12,
    "x",
    "(a|aa)+$",
    "(",
    [],
    ["no.such.module"],
    {},
    {"q": math.nan},
    {"(": 3},
    {"none": 3},
    [1, "x"],
    None,
    True,
    False,
)

# What is meant to work, or is known to be written, by field.
SENSIBLE: dict[str, tuple[Any, ...]] = {
    "r": (1, 4),
    "lora_alpha": (1, 0.5),
    "lora_dropout": (0.3,),
    "vera_dropout": (0.3,),
    "randlora_dropout": (0.3,),
    "miss_dropout": (0.3,),
    "module_dropout": (0.3,),
    "target_modules": (["q", "wo"], "q", r".*\.(q|v)", "all-linear", ["SelfAttention.q"], ["head"], ".*"),
    "exclude_modules": (["q"], r"decoder.*"),
    "feedforward_modules": (["wo"], r".*wo"),
    "init_lora_weights": (
        "gaussian",
        "orthogonal",
        "mica",
        "pissa",
        "pissa_niter_4",
        "olora",
        "loftq",
        "eva",
        "corda",
        "lora_ga",
    ),
    "init_weights": ("bat", "mini", "gaussian", "kaiming_uniform", "xavier_uniform"),
    "bias": ("all", "lora_only"),
    "modules_to_save": (["head"],),
    "trainable_token_indices": ([0],),
    "layers_to_transform": (0, [0, 1], 1),
    "layers_pattern": ("block",),
    "rank_pattern": ({"q": 3}, {r".*\.(k|v)": 1}),
    "alpha_pattern": ({"q": 3}, {r"decoder.*": 2.5}),
    "n_frequency_pattern": ({"q": 3}, {r"decoder.*v": 7}),
    "block_size_pattern": ({"q": 2},),
    "megatron_config": ({"a": 1},),
    "loftq_config": ({"loftq_bits": 4},),
    "eva_config": ({"rho": 2.0},),
    "target_parameters": (["q.weight"],),
    "layer_replication": ([[0, 1]],),
    "init_r": (3,),
    "target_r": (1,),
    "tinit": (2,),
    "tfinal": (2,),
    "deltaT": (2,),
    "beta1": (0.5, 2.0),
    "beta2": (0.5, 1.0),
    "orth_reg_weight": (0.1,),
    "n_frequency": (7,),
    "scaling": (10.0,),
    "random_loc_seed": (3,),
    "projection_prng_key": (3,),
    "d_initial": (0.2,),
    "randlora_alpha": (32,),
    "oft_block_size": (4,),
    "eps": (1e-3,),
    "num_cayley_neumann_terms": (3,),
    "mini_r": (2,),
    "block_size": (4,),
    "wavelet_family": ("db2", "sym3", "zz9"),
}

# Options that say that the model does not start as the base.
MOVED = {"init_lora_weights", "init_weights", "init_ia3_weights", "d_initial"}


@cache
def base() -> Backbone:
    """A network of one layer with random weights; a training step takes milliseconds."""
    bolt = gluonts_peft.load_backbone("chronos", checkpoint="bolt-nano", prediction_length=4, context_length=16)
    config = deepcopy(bolt.network.config)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 1, "num_decoder_layers": 1}
    vars(config).update(sizes)
    config.update(sizes)  # type: ignore[operator]
    torch.manual_seed(0)
    network = ChronosBoltModelForForecasting(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return BoltBackbone(network, prediction_length=4, context_length=16, source=bolt.source)


@cache
def batch() -> dict[str, Tensor]:
    return make_batch(base())


def answers(backbone: Backbone) -> Tensor:
    past = {name: value for name, value in batch().items() if not name.startswith("future_")}
    with backbone.reading() as reader:
        return reader.forecast(past).values


@cache
def zero() -> Tensor:
    return answers(base())


def fields_of(method: Method) -> list[str]:
    return [item.name for item in dataclasses.fields(method.config_class()) if item.name not in OURS]


def same_numbers(left: Any, right: Any) -> bool:
    return bool(torch.equal(left, right))


def works(method: Method, name: str, value: Any, folder: Path) -> str | None:
    """Try a value of an option through everything; return why it is refused, if it is."""
    more = {"n_frequency": 5} if method.name in ("fourierft", "waveft") and name != "n_frequency" else {}
    more |= {"r": 8} if method.name in ("vera", "randlora") and name != "r" else {}
    torch.manual_seed(1)
    try:
        adapter = get_adapter({"name": method.name, **more, name: value})
    except AdapterError as error:
        return str(error)
    backbone = deepcopy(base())
    before, zero_shot = traits(backbone), zero()
    try:
        adapter.attach(backbone)
    except AdapterError as error:
        assert traits(backbone).differing(before) == ""
        assert backbone.adapter is None
        return str(error)
    if name not in MOVED:
        torch.testing.assert_close(answers(backbone), zero_shot, rtol=1e-4, atol=1e-4)
    adapter.prepare(50)
    start = {name: tensor.detach().clone() for name, tensor in adapter.state_dict().items()}
    backbone.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=adapter.learning_rate)
    for step in range(3):
        loss, penalty = backbone.loss(batch()).mean(), adapter.penalty()
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        adapter.after_step(step)
    backbone.eval()
    tuned = answers(backbone)
    assert tuned.isfinite().all()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in adapter.state_dict().items())
    adapter.save(folder)
    torch.manual_seed(99)
    again = deepcopy(base())
    load_adapter(folder, again)
    assert same_numbers(answers(again), tuned), "a loaded adapter forecasts otherwise"
    torch.manual_seed(98)
    network = deepcopy(base().network)
    plain = deepcopy(base())
    plain.network = peft.PeftModel.from_pretrained(network, folder).get_base_model()
    torch.testing.assert_close(answers(plain), tuned, rtol=1e-3, atol=2e-3, msg="plain PEFT forecasts otherwise")
    again.adapter.merge()  # type: ignore[union-attr]
    assert same_numbers(answers(again), tuned), "merging changes the forecasts"
    adapter.detach()
    assert traits(backbone).differing(before) == ""
    return None


# Which modules are meant is found by one function for all methods: the first of these values will do for most.
NAMING = {"target_modules", "exclude_modules", "layers_to_transform"}


def cells() -> list[tuple[Method, str]]:
    return [(method, name) for method in TABLE for name in fields_of(method)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "name"), cells(), ids=lambda each: getattr(each, "name", each))
def test_an_option_works_through_everything_or_is_refused_by_name(method: Method, name: str, tmp_path: Path) -> None:
    default = PeftAdapter(method, {})._defaults()[name]
    values = SENSIBLE.get(name, ())[: None if method.name in ("lora", "ia3") or name not in NAMING else 1]
    flags = tuple(value for value in (True, False) if isinstance(default, bool) and value is not default)
    for number, value in enumerate((*values, *flags)):
        refused = works(method, name, value, tmp_path / str(number))
        assert refused is None or name in refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", TABLE, ids=lambda method: method.name)
def test_what_makes_no_sense_is_refused_by_name_with_nothing_changed(method: Method) -> None:
    backbone, defaults = deepcopy(base()), PeftAdapter(method, {})._defaults()
    before = traits(backbone)
    for name in fields_of(method):
        for value in HOSTILE:
            said = name
            try:
                adapter = get_adapter({"name": method.name, name: value})
                if type(value) is not type(defaults[name]) or value != defaults[name]:
                    adapter.attach(backbone).detach()
            except AdapterError as error:
                said = str(error)
            assert name in said, (name, value, said)
            assert backbone.adapter is None
            assert traits(backbone).differing(before) == "", (name, value)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"bias": "all"}, """bias 'all' cannot be used: biases train in a list of adapters: ["lora", "bitfit"]"""),
        ({"modules_to_save": ["x"]}, """other modules train in a list of adapters: ["lora", "head"]"""),
        ({"lora_bias": True}, """lora_bias True cannot be used: it cannot be merged where the base has no bias"""),
        ({"init_lora_weights": "pissa"}, "use true, 'gaussian', 'orthogonal' or 'mica'"),
        ({"init_lora_weights": "pissa_niter_4"}, "use true, 'gaussian', 'orthogonal' or 'mica'"),
        ({"init_lora_weights": "eva"}, "it needs data, or changes weights of the base when it starts"),
        ({"init_lora_weights": "x"}, "init_lora_weights 'x' cannot be used"),
        ({"lora_alpha": math.nan}, "lora_alpha nan is not a number from 1e-06 to 1e+06"),
        ({"lora_alpha": 1e38}, "lora_alpha 1e+38 is not a number from 1e-06 to 1e+06"),
        ({"r": 10**9}, "r 1000000000 is not a whole number from 1 to 65536"),
        ({"r": 2000}, "r 2000 is beyond 1024; take a lower rank"),
        ({"target_modules": "(a|aa)+$"}, "name no module"),
        ({"target_modules": "("}, "target_modules is no regular expression"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern '(' is no regular expression"),
        ({"rank_pattern": {"nothing": 3}}, "rank_pattern 'nothing' means none of the 12 modules that are adapted"),
        ({"exclude_modules": ["nothing"]}, "exclude_modules ['nothing'] names none of the 12 modules"),
        ({"layers_to_transform": 7}, "name no module"),
        ({"name": "adalora", "beta1": 2.0}, "beta1 2.0 is not a share from 0 (exclusive) to below 1"),
        ({"name": "adalora", "r": 4}, "AdaLoRA does not use it; set init_r and target_r"),
        ({"name": "adalora", "target_r": 9}, "target_r 9 is above init_r 4; ranks are only taken away"),
        ({"name": "hra", "r": 3}, "r 3 is not even"),
    ],
    ids=str,
)
def test_refusals_name_the_option_and_the_way_out(spec: dict[str, Any], sentence: str) -> None:
    backbone = deepcopy(base())
    before = traits(backbone)
    with pytest.raises(AdapterError) as caught:
        get_adapter({"name": "lora", **spec}).attach(backbone)
    assert sentence in str(caught.value)
    assert traits(backbone).differing(before) == ""


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_2"])
def test_a_start_that_writes_into_the_base_is_refused_whatever_it_is_called(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of options only gives the better message."""
    monkeypatch.setattr(peft_adapters, "check_option", lambda *_: None)
    backbone = deepcopy(base())
    before = traits(backbone)
    with pytest.raises(AdapterError, match="changes weights of the base when it starts"):
        get_adapter({"name": "lora", "init_lora_weights": start}).attach(backbone)
    assert traits(backbone).differing(before) == ""


def test_what_cannot_be_folded_is_refused_whatever_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_adapters, "check_option", lambda *_: None)
    backbone = deepcopy(base())
    before = traits(backbone)
    with pytest.raises(AdapterError, match="cannot be folded into the weights"):
        get_adapter({"name": "lora", "lora_bias": True}).attach(backbone)
    assert traits(backbone).differing(before) == ""


def test_hostile_configurations_in_folders_are_refused(tmp_path: Path) -> None:
    backbone = deepcopy(base())
    get_adapter("lora").attach(backbone).save(tmp_path)
    backbone.adapter.detach()  # type: ignore[union-attr]
    (tmp_path / "gluonts_peft.json").unlink()
    file, before = tmp_path / "adapter_config.json", traits(backbone)
    config = json.loads(file.read_text())
    for name, value in [
        ("r", 10**12),
        ("r", "x"),
        ("lora_alpha", math.nan),
        ("target_modules", r"(.|..)*x" + "y" * 10),
        ("target_modules", "(" * 400),
        ("target_modules", "a{1000000000}"),
        ("target_modules", 3),
        ("rank_pattern", {"(.*.*)*z": 3}),
        ("rank_pattern", [1]),
        ("layers_to_transform", "x"),
        ("init_lora_weights", "pissa"),
        ("use_dora", "yes"),
    ]:
        file.write_text(json.dumps({**config, name: value}))
        with pytest.raises(AdapterError):
            load_adapter(tmp_path, backbone)
        assert traits(backbone).differing(before) == "", (name, value)
    # How a start was found from data is of no matter once it is trained.
    file.write_text(json.dumps({**config, "init_lora_weights": "eva"}))
    assert load_adapter(tmp_path, backbone).spec == {
        "name": "lora",
        "target_modules": sorted(config["target_modules"]),
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
    }


NAMES = ["encoder.block.0.q", "encoder.block.1.q", "encoder.block.1.wo", "encoder.norm", "q"]


def test_names_ends_and_expressions() -> None:
    assert matching(["q"], NAMES, "x") == ["encoder.block.0.q", "encoder.block.1.q", "q"]
    assert matching("block.1.q", NAMES, "x") == ["encoder.block.1.q"]
    assert matching(r".*\.(q|wo)", NAMES, "x") == NAMES[:3]
    assert in_layers(NAMES, 1) == NAMES[1:3]
    assert in_layers(NAMES, [0, 5]) == NAMES[:1]
    with pytest.raises(AdapterError, match="takes too long"):
        matching("(a|aa)+$", ["a" * 100 + "b"], "x")


def test_patterns_become_full_names_of_which_the_first_counts() -> None:
    pattern = {"block.1.q": 3, "q": 4}
    assert resolve_pattern(pattern, NAMES, "x", whole=False) == {
        r"^encoder\.block\.1\.q": 3,
        r"^encoder\.block\.0\.q": 4,
        "^q": 4,
    }
    with pytest.raises(AdapterError, match="x 'q' would mean 'encoder.block.0.q' as well"):
        resolve_pattern(pattern, NAMES, "x", whole=True)


def zeroed() -> Backbone:
    """With two rows of zeros, as pruned models have them."""
    backbone = deepcopy(base())
    with torch.no_grad():
        for name in backbone.places(["q", "v"]):
            backbone.network.get_submodule(name).weight[:2] = 0  # type: ignore[index, union-attr]
    return backbone


@pytest.mark.parametrize("spec", ["dora", {"name": "dora", "lora_dropout": 0.1}, ["ia3", "dora"]], ids=str)
def test_dora_on_rows_of_zeros_stays_finite(spec: Any) -> None:
    backbone = zeroed()
    plain = answers(backbone)
    adapter = get_adapter(spec).attach(backbone)
    torch.testing.assert_close(answers(backbone), plain, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        backbone.loss(batch()).mean().backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is None or p.grad.isfinite().all() for p in adapter.parameters())
        optimizer.step()
    tuned = answers(backbone)
    assert tuned.isfinite().all()
    assert not torch.equal(tuned, plain)
    with backbone.inference():
        past = {name: value for name, value in batch().items() if not name.startswith("future_")}
        torch.testing.assert_close(backbone.forecast(past).values, tuned, rtol=1e-3, atol=1e-3)
    adapter.merge()
    assert torch.equal(answers(backbone), tuned)
