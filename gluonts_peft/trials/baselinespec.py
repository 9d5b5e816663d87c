"""Which baselines there are, what each needs, and how one is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from ..errors import unknown
from .strict import with_options

__all__ = [
    "BASELINE",
    "BOOSTED",
    "FROM_SCRATCH",
    "NAIVE",
    "PACKAGES",
    "STATISTICAL",
    "TRAINED",
    "check_baseline",
    "missing_package",
    "normal_baseline",
    "parts_of",
]

BASELINE = "baseline"

#: Baselines that repeat values, that are fitted to the history of each window, trees, and networks from scratch.
NAIVE = ("seasonal_naive", "last_value")
STATISTICAL = ("auto_ets", "auto_theta")
BOOSTED = ("lightgbm",)
TRAINED = ("deepar", "patch_tst", "simple_feedforward", "tft", "nbeats", "nhits")
_BASELINES = NAIVE + STATISTICAL + BOOSTED + TRAINED

#: What a baseline needs beside this package, all of it in the extra ``baselines``.
PACKAGES = {
    **dict.fromkeys(STATISTICAL, "statsforecast"),
    **dict.fromkeys(BOOSTED, "lightgbm"),
    **dict.fromkeys(("nbeats", "nhits"), "neuralforecast"),
}

#: How a study trains its baselines unless it says otherwise: random weights need more steps than an adapter.
FROM_SCRATCH: dict[str, Any] = {"max_epochs": 40}


def check_baseline(name: str) -> None:
    if name not in _BASELINES:
        raise ValueError(unknown("baseline", name, _BASELINES))


def normal_baseline(baseline: Any) -> Any:
    if isinstance(baseline, str):
        check_baseline(baseline)
        return baseline
    if not isinstance(baseline, Mapping):
        raise ValueError(f"baseline {baseline!r} is neither a name nor a mapping with a name and options")
    normal = with_options("baseline", baseline, normal_baseline, "{'name': 'lightgbm', 'num_leaves': 15}")
    name, options = parts_of(normal)
    if name in NAIVE and options:
        raise ValueError(f"baseline {name!r} takes no options, not {', '.join(options)}; drop them")
    return normal


def parts_of(value: Mapping[str, Any] | str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a baseline in its normal form."""
    if isinstance(value, str):
        return value, {}
    return value["name"], {key: option for key, option in value.items() if key != "name"}


def missing_package(baseline: Any) -> str | None:
    """Return the package that a baseline, or what was written for one, needs and that is not installed; else None."""
    name = baseline.get("name") if isinstance(baseline, Mapping) else baseline
    package = PACKAGES.get(str(name))
    return package if package is not None and importlib.util.find_spec(package) is None else None
