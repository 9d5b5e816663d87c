"""Series in and out: tables, data frames and files, calendars, the check of entries."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .frames import from_dataframe, to_dataframe
    from .table import read_dataset, split_by_item, write_forecasts

__all__ = ["from_dataframe", "read_dataset", "split_by_item", "to_dataframe", "write_forecasts"]

_HOME = {"from_dataframe": "frames", "to_dataframe": "frames"}


def __getattr__(name: str) -> Any:
    # Imported when they are asked for: the command line's help needs none of them.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME.get(name, 'table')}", __name__), name)
