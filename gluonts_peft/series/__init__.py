"""Series in and out: tables, data frames and files, calendars, the check of entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..moved import loaded_on_use

if TYPE_CHECKING:
    from .frames import from_dataframe, to_dataframe
    from .table import read_dataset, split_by_item, write_forecasts

__all__ = ["from_dataframe", "read_dataset", "split_by_item", "to_dataframe", "write_forecasts"]

_HOME = {
    "from_dataframe": "frames",
    "read_dataset": "table",
    "split_by_item": "table",
    "to_dataframe": "frames",
    "write_forecasts": "table",
}

# The command line's help needs none of them.
__getattr__ = loaded_on_use(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
