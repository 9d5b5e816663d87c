"""Data sets of GluonTS that know more of their calendars than their entries say."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from .calendar import Stamps, base_of, by_clock, offset_name, period_freq, with_calendar
from .grid import calendars

__all__ = ["dated"]


def dated(dataset: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Return a dataset whose entries carry their calendars, as far as it knows more than they say.

    ``PandasDataset`` turns the stamps of its frames into periods; the frames still have them.
    """
    from gluonts.dataset.pandas import PandasDataset

    if not isinstance(dataset, PandasDataset):
        return dataset
    return _Dated(dataset)


class _Dated:
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Any:
        column = self.dataset.timestamp
        for name, frame in self.dataset._data_entries.iterable:
            times = frame[column] if column else frame.index
            if isinstance(times.dtype, pd.PeriodDtype):
                yield self.dataset._pair_to_dataentry(name, frame)
                continue
            index = pd.DatetimeIndex(times)
            if index.tz is not None and not by_clock(period_freq(self.dataset.freq)):
                # On a clock that never changes, hours are evenly spaced.
                fixed = index.tz_convert(offset_name(int(pd.Timedelta(index.min().utcoffset()).value)))
                frame = frame.copy(deep=False)
                if column:
                    frame[column] = fixed
                else:
                    frame.index = fixed
            with warnings.catch_warnings():
                # The zone is not lost: it is in the calendar.
                warnings.filterwarnings("ignore", "Converting to PeriodArray/Index", UserWarning)
                entry = self.dataset._pair_to_dataentry(name, frame)
            freq = entry["start"].freqstr
            # One stamp tells all, but for places in a month.
            index = index.sort_values() if base_of(freq)[0] in "MQY" else pd.DatetimeIndex([index.min()])
            yield with_calendar(entry, calendars(Stamps.of_index(index), freq))
