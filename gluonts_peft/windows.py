"""Old place of stores and windows, whose names are imported from the modules of `gluonts_peft.series` now."""

from .series.batches import context_batches
from .series.rows import FEATURES, Layout, narrowest
from .series.store import SeriesStore
from .series.windows import LastWindows, Skipped, Windows

__all__ = ["FEATURES", "LastWindows", "Layout", "SeriesStore", "Skipped", "Windows", "context_batches", "narrowest"]
