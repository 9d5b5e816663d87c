"""Which values of PEFT's options work here, and which are refused before anything happens.

One rule an option, for all methods that have it. An option without a rule needs something that does not exist here; it
may be given with the value that PEFT would take anyway. Names and patterns are resolved into full names of modules
here, so that no regular expression reaches PEFT, which would let it run for ever.
"""

from __future__ import annotations

import numbers
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .base import AdapterError

__all__ = ["check_option", "in_layers", "matching", "resolve_pattern", "widest"]

Rule = Callable[[Any], "str | None"]

# Beyond these a scale leaves nothing of the base in float32, or of the adapter.
_SMALLEST, _LARGEST = 1e-6, 1e6
# Seconds that matching a regular expression may take, and characters it may have.
_PATIENCE, _LONGEST = 1.0, 1000


def _whole(low: int, high: int = 2**16) -> Rule:
    def rule(value: Any) -> str | None:
        fits = isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= int(value) <= high
        return None if fits else f"a whole number from {low} to {high}"

    return rule


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _number(low: float, high: float) -> Rule:
    def rule(value: Any) -> str | None:
        fits = _is_real(value) and low <= float(value) <= high
        return None if fits else f"a number from {low:g} to {high:g}"

    return rule


def _share(*, least: bool = True) -> Rule:
    def rule(value: Any) -> str | None:
        fits = _is_real(value) and 0 <= float(value) < 1
        return None if fits and (least or value > 0) else f"a share from 0{'' if least else ' (exclusive)'} to below 1"

    return rule


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _one_of(*values: Any) -> Rule:
    def rule(value: Any) -> str | None:
        fits = any(type(value) is type(each) and value == each for each in values)
        return None if fits else f"one of {', '.join(map(repr, values))}"

    return rule


def _names(value: Any) -> str | None:
    fits = isinstance(value, str) and value or isinstance(value, list | tuple | set) and value
    return None if fits and all(isinstance(each, str) and each for each in value) else "a list of names of modules"


def _layers(value: Any) -> str | None:
    rule = _whole(0)
    listed = value if isinstance(value, list | tuple) and value else [value]
    return None if all(rule(each) is None for each in listed) else "a whole number or a list of them: layers to adapt"


def _pattern(inner: Rule) -> Rule:
    def rule(value: Any) -> str | None:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
            return "a mapping of names of modules to values"
        wrong = next((found for each in value.values() if (found := inner(each))), None)
        return wrong and f"a mapping of names of modules, each to {wrong}"

    return rule


_RANK, _SEED, _SCALE = _whole(1), _whole(0, 2**63 - 1), _number(_SMALLEST, _LARGEST)
_STARTS = (True, False, "gaussian", "orthogonal", "mica")

_RULES: dict[str, Rule] = {
    "r": _RANK,
    "init_r": _RANK,
    "target_r": _RANK,
    "mini_r": _RANK,
    "n_frequency": _whole(1, 2**31 - 1),
    "block_size": _RANK,
    "oft_block_size": _whole(0),
    "num_cayley_neumann_terms": _whole(1, 100),
    # AdaLoRA says itself that it has to be left out.
    "total_step": _whole(1, 2**31 - 1),
    "tinit": _whole(0, 2**31 - 1),
    "tfinal": _whole(0, 2**31 - 1),
    "deltaT": _whole(1, 2**31 - 1),
    "projection_prng_key": _SEED,
    "random_loc_seed": _SEED,
    "lora_alpha": _SCALE,
    "randlora_alpha": _SCALE,
    "scaling": _SCALE,
    "d_initial": _SCALE,
    "eps": _number(1e-12, 1.0),
    "orth_reg_weight": _number(0.0, _LARGEST),
    "beta1": _share(least=False),
    "beta2": _share(least=False),
    "lora_dropout": _share(),
    "vera_dropout": _share(),
    "randlora_dropout": _share(),
    "miss_dropout": _share(),
    "module_dropout": _share(),
    "use_rslora": _flag,
    "use_dora": _flag,
    "save_projection": _flag,
    "sparse": _flag,
    "very_sparse": _flag,
    "coft": _flag,
    "block_share": _flag,
    "use_cayley_neumann": _flag,
    "apply_GS": _flag,
    "use_idwt": _flag,
    "proportional_parameters": _flag,
    "init_weights": _flag,
    "init_ia3_weights": _flag,
    "init_lora_weights": _one_of(*_STARTS),
    "wavelet_family": lambda value: _one_of(*_wavelets())(value),
    "target_modules": _names,
    "exclude_modules": _names,
    "feedforward_modules": _names,
    "layers_to_transform": _layers,
    "rank_pattern": _pattern(_RANK),
    "alpha_pattern": _pattern(_SCALE),
    "n_frequency_pattern": _pattern(_whole(1, 2**31 - 1)),
    "block_size_pattern": _pattern(_RANK),
}

# Where one name means something else to a method.
_OWN_RULES: dict[tuple[str, str], Rule] = {
    ("oft", "r"): _whole(0),
    # Reflections come in pairs that undo each other at the start.
    ("hra", "r"): lambda value: (
        _RANK(value) or (None if value % 2 == 0 else "even; an odd one starts away from the base")
    ),
    ("miss", "init_weights"): _one_of(True, False, "bat", "mini"),
    ("c3a", "init_weights"): _one_of(True, False, "gaussian", "kaiming_uniform", "xavier_uniform"),
    # PEFT takes every text for true here.
    ("adalora", "init_lora_weights"): _flag,
}

# Why an option without a rule does not work, and what does.
_WAYS_OUT = {
    "bias": 'biases train in a list of adapters: ["{name}", "bitfit"]',
    "lora_bias": 'it cannot be merged where the base has no bias; biases train in a list: ["{name}", "bitfit"]',
    "modules_to_save": 'other modules train in a list of adapters: ["{name}", "head"]',
    "trainable_token_indices": "forecasters have no tokens to train; the embedding is a site: sites=['embedding']",
    "layers_pattern": "layers_to_transform finds the layers by itself; or name them with target_modules",
    "target_parameters": "name modules with target_modules",
    "fan_in_fan_out": "it follows from the model",
    "ensure_weight_tying": "tied weights stay tied without it",
    "use_qalora": "the base is not quantised",
    "qalora_group_size": "the base is not quantised",
    "loftq_config": "the base is not quantised",
}
_OWN_WAYS_OUT = {
    ("adalora", "r"): "AdaLoRA does not use it; set init_r and target_r",
    ("adalora", "rank_pattern"): "AdaLoRA finds the ranks itself",
    ("adalora", "alpha_pattern"): "AdaLoRA does not use it",
    ("adalora", "use_dora"): "AdaLoRA does not use it",
    ("adalora", "use_rslora"): "AdaLoRA does not use it",
}
_START = (
    "it needs data, or changes weights of the base when it starts, so that no zero-shot forecast is left to go back to;"
    " use true, 'gaussian', 'orthogonal' or 'mica'"
)


def _wavelets() -> Sequence[str]:
    from peft.tuners.waveft.constants import WAVELET_REDUCTIONS

    return sorted(WAVELET_REDUCTIONS)


def check_option(method: str, name: str, value: Any, default: Any) -> None:
    """Refuse a value that does not work.

    Parameters
    ----------
    method
        Name of the adapter.
    name, value
        Of the option.
    default
        What PEFT takes if the option is not given.

    Raises
    ------
    AdapterError
        If it is refused; the message says what would work.
    """
    if type(value) is type(default) and value == default:
        return
    told = f"adapter {method!r}: {name} {value!r}"
    if (method, name) in _OWN_WAYS_OUT:
        raise AdapterError(f"{told} cannot be used: {_OWN_WAYS_OUT[method, name]}")
    rule = _OWN_RULES.get((method, name), _RULES.get(name))
    if rule is None:
        way = _WAYS_OUT.get(name, "what it is for does not exist here; leave it out").replace("{name}", method)
        raise AdapterError(f"{told} cannot be used: {way}")
    wanted = rule(value)
    if wanted is None:
        return
    if name == "init_lora_weights" and isinstance(value, str) and method != "adalora":
        raise AdapterError(f"{told} cannot be used: {_START}")
    raise AdapterError(f"{told} is not {wanted}")


def matching(spec: str | Iterable[str], names: Sequence[str], told: str) -> list[str]:
    """Return those of some names of modules that are meant.

    Parameters
    ----------
    spec
        Names, or their ends after a dot; or one regular expression for whole names.
    names
        To choose from.
    told
        What to call it in a message.

    Raises
    ------
    AdapterError
        If it is no regular expression, or takes too long.
    """
    if not isinstance(spec, str):
        ends = tuple(f".{each}" for each in spec)
        wanted = set(spec)
        return [name for name in names if name in wanted or name.endswith(ends)]
    if not re.search(r"[\\^$*+?{}\[\]()|]", spec):
        return matching([spec], names, told)
    # The one of the standard library knows no limit of time.
    import regex  # type: ignore[import-untyped]

    # Counts are written out when it is compiled, nested ones their product.
    counts = [int(number) for found in re.findall(r"\{([\d,]*)\}", spec) for number in re.findall(r"\d+", found)]
    if len(spec) > _LONGEST or len(counts) > 4 or max(counts, default=0) > 20:
        raise AdapterError(f"{told} is too large a regular expression; write a list of names")
    until = time.monotonic() + _PATIENCE
    try:
        compiled = regex.compile(spec)
        return [
            name for name in names if compiled.fullmatch(name, timeout=max(until - time.monotonic(), 1e-3)) is not None
        ]
    except TimeoutError:
        raise AdapterError(
            f"{told} is the regular expression {spec!r}, which takes too long; write a list of names"
        ) from None
    except (regex.error, RecursionError, MemoryError, OverflowError, ValueError) as error:
        raise AdapterError(f"{told} is no regular expression ({error}); write a list of names") from None


def in_layers(names: Iterable[str], layers: int | Iterable[int]) -> list[str]:
    """Return the names that lie in some layers: the first number that stands between two dots counts, as in PEFT."""
    wanted = {layers} if isinstance(layers, int) else set(layers)
    found = []
    for name in names:
        index = next((part for part in name.split(".")[2:-1] if part.isdecimal()), None)
        if index is not None and int(index) in wanted:
            found.append(name)
    return found


def resolve_pattern(pattern: Mapping[str, Any], names: Sequence[str], told: str, *, whole: bool) -> dict[str, Any]:
    """Return a mapping of names or regular expressions as one of full names, of which the first key counts.

    Parameters
    ----------
    pattern
        Keys are ends of names after a dot, or regular expressions for them.
    names
        Of the modules that are adapted.
    told
        What to call it in a message.
    whole
        Whether the method looks up full names; else it takes keys for expressions, and these stand for one name each.

    Raises
    ------
    AdapterError
        If a key means none of the modules, is no regular expression, or takes too long.
    """
    found: dict[str, Any] = {}
    for key, value in pattern.items():
        plain = not re.search(r"[\\^$*+?{}\[\]()|]", key)
        meant = matching([key] if plain else rf"(?:.*\.)?(?:{key})", names, f"{told} {key!r}")
        if not meant:
            raise AdapterError(f"{told} {key!r} means none of the {len(names)} modules that are adapted")
        for name in meant:
            found.setdefault(name if whole else f"^{re.escape(name)}", value)
    for name in found if whole else ():
        if other := next((other for other in names if other.endswith(f".{name}")), None):
            raise AdapterError(f"{told} {name!r} would mean {other!r} as well; leave one of the two out")
    return found


def widest(modules: Iterable[nn.Module]) -> int:
    """Return the largest width of some layers, 0 of none."""
    shapes = [weight.shape for module in modules if (weight := getattr(module, "weight", None)) is not None]
    return max((size for shape in shapes for size in shape), default=0)
