"""Old place of `gluonts_peft.series.table`, from where its names are imported now."""

from .series.table import (
    DataEntry,
    read_dataset,
    require_columns,
    split_by_item,
    writable,
    write_forecasts,
    write_table,
)

__all__ = [
    "DataEntry",
    "read_dataset",
    "require_columns",
    "split_by_item",
    "writable",
    "write_forecasts",
    "write_table",
]
