"""Trials: one fine-tuning and its backtest, or many of them from a grid, and the report on them.

    study = load_study("examples/demo.yaml", {"seed": [0]})
    results = run_study(study, "out", jobs=2)
    print_table(results)
    write_report("out")

Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .grid import expand, run_study
    from .report import load_results, print_table, table, write_report
    from .run import load_data, run_trial
    from .spec import DataSpec, SpecError, StudySpec, TrainingSpec, TrialResult, TrialSpec, load_study

_HOME = {
    "DataSpec": "spec",
    "SpecError": "spec",
    "StudySpec": "spec",
    "TrainingSpec": "spec",
    "TrialResult": "spec",
    "TrialSpec": "spec",
    "expand": "grid",
    "load_data": "run",
    "load_results": "report",
    "load_study": "spec",
    "print_table": "report",
    "run_study": "grid",
    "run_trial": "run",
    "table": "report",
    "write_report": "report",
}

__all__ = [
    "DataSpec",
    "SpecError",
    "StudySpec",
    "TrainingSpec",
    "TrialResult",
    "TrialSpec",
    "expand",
    "load_data",
    "load_results",
    "load_study",
    "print_table",
    "run_study",
    "run_trial",
    "table",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
