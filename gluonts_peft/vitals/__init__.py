"""ICU vital signs: simulated patients, and real stays from files on disk. No data are shipped.

Names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..moved import loaded_on_use

if TYPE_CHECKING:
    from .eicu import load_eicu
    from .hourly import PLAUSIBLE, load_hourly
    from .mimic import load_mimic
    from .output import convert, write
    from .simulate import patient_of, simulate_vitals
    from .stays import Stay, Stays
    from .steps import PAPER_STEPS, STEPS, prepare

_HOME = {
    "PAPER_STEPS": "steps",
    "PLAUSIBLE": "hourly",
    "STEPS": "steps",
    "Stay": "stays",
    "Stays": "stays",
    "convert": "output",
    "load_eicu": "eicu",
    "load_hourly": "hourly",
    "load_mimic": "mimic",
    "patient_of": "simulate",
    "prepare": "steps",
    "simulate_vitals": "simulate",
    "write": "output",
}

__all__ = [
    "PAPER_STEPS",
    "PLAUSIBLE",
    "STEPS",
    "Stay",
    "Stays",
    "convert",
    "load_eicu",
    "load_hourly",
    "load_mimic",
    "patient_of",
    "prepare",
    "simulate_vitals",
    "write",
]


__getattr__ = loaded_on_use(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
