"""The command line: a module a verb, which parses, calls the library and prints.

Exit codes: 0 done, 1 a defect of the program or failed trials, 2 wrong input, 3 no evidence that tuning helped (``fit
--gate raise``), 130 Ctrl-C, 143 SIGTERM. What takes long to import is imported inside the verbs, so that ``--help``
answers at once.
"""

from __future__ import annotations

from .app import app

# The help lists verbs in the order in which they are imported.
from . import catalogue, fit, forecast, backtest, detect, impute, study, search, show, vitals  # isort: skip  # noqa: F401

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    app(prog_name="gluonts-peft")
