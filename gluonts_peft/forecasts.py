"""Forecasts of GluonTS, made of arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gluonts.model.forecast import Forecast, QuantileForecast, SampleForecast
from numpy.typing import NDArray

__all__ = ["forecasts_of"]


def forecasts_of(
    entries: list[Mapping[str, Any]], values: NDArray[Any], levels: tuple[float, ...] | None
) -> Iterator[Forecast]:
    """Return a forecast for each entry.

    Parameters
    ----------
    entries
        Of a GluonTS dataset.
    values
        Shape ``(entries, n, steps)`` or ``(entries, n, steps, dimensions)``.
    levels
        Quantile levels of axis 1; None for sample paths.
    """
    first: QuantileForecast | None = None
    for entry, own in zip(entries, values, strict=True):
        common = {
            "start_date": entry["start"] + np.shape(entry["target"])[-1],
            "info": entry.get("info"),
        }
        # The constructors take text only.
        name = entry.get("item_id")
        if levels is None:
            sampled = SampleForecast(samples=own, **common)
            sampled.item_id = name
            yield sampled
        elif first is None:
            # GluonTS finds a level only under the spelling str(float).
            first = QuantileForecast(own, forecast_keys=[str(level) for level in levels], **common)
            first.item_id = name
            yield first
        else:
            # The constructor parses every level anew, at the cost of a small network's forecast.
            forecast = object.__new__(QuantileForecast)
            arrays = dict(zip(first.forecast_keys, own, strict=True))
            vars(forecast).update(vars(first), forecast_array=own, _forecast_dict=arrays, item_id=name, **common)
            yield forecast
