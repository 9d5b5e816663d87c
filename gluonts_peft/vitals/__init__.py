"""ICU vital signs: simulated patients, and real stays from files on disk. No data are shipped.

Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hourly import PLAUSIBLE, load_hourly
    from .simulate import patient_of, simulate_vitals

_HOME = {
    "PLAUSIBLE": "hourly",
    "load_hourly": "hourly",
    "patient_of": "simulate",
    "simulate_vitals": "simulate",
}

__all__ = ["PLAUSIBLE", "load_hourly", "patient_of", "simulate_vitals"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
