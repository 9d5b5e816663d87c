"""What forecasts are scored by: definitions of metrics, and their names in tables, reports, searches and summaries.

A metric is a row of this table and nothing else. Another distribution adds one with an entry point in the group
``gluonts_peft.metrics`` that names a :class:`Column`: it is then computed by :func:`gluonts_peft.backtest`, is a column
of every table and report, and an objective that a search can have.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from .registry import metrics
from .scores import LEVELS

__all__ = ["Column", "score_columns"]


@dataclass(frozen=True)
class Column:
    """A metric; lower is better.

    Parameters
    ----------
    name
        What tables, rankings and objectives call it.
    score
        What the metric calls itself in the result of :func:`gluonts_peft.backtest`, e.g. ``"MAE[0.5]"``.
    metric
        Returns its definition in the sense of :mod:`gluonts.ev`, as ``MAE("0.5")`` is one. Called where it is needed.
    header
        Heading in reports; the name by default.
    shown
        Whether tables and reports have it.
    scale
        Reports show the value times this: 100 for a share in per cent.
    fev
        Name in summaries in the format of fev; None leaves it out of them.
    """

    name: str
    score: str
    metric: Callable[[], Any]
    header: str | None = None
    shown: bool = True
    scale: float = 1.0
    fev: str | None = None


def _gluonts(name: str, *arguments: Any) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module("gluonts.ev.metrics"), name)(*arguments)


def _ours(name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module("gluonts_peft.metrics"), name)("0.5")


_OWN = (
    Column("MSE", "MSE[0.5]", _gluonts("MSE", "0.5"), fev="MSE"),
    Column("MAE", "MAE[0.5]", _gluonts("MAE", "0.5"), fev="MAE"),
    Column("MAPE", "MAPE[0.5]", _gluonts("MAPE", "0.5"), header="MAPE %", scale=100.0, fev="MAPE"),
    Column("MASE", "MASE[0.5]", _gluonts("MASE", "0.5"), shown=False, fev="MASE"),
    Column("DTW", "DTW[0.5]", _ours("DTW"), header="DTW distance"),
    Column("DTW path error", "DTWPathError[0.5]", _ours("DTWPathError")),
    Column(
        "quantile loss",
        "mean_weighted_sum_quantile_loss",
        _gluonts("MeanWeightedSumQuantileLoss", LEVELS),
        fev="WQL",
    ),
)


@cache
def score_columns() -> tuple[Column, ...]:
    """Return all metrics: those of this package, then those of other distributions by the names of their entry points.

    Raises
    ------
    TypeError
        If an entry point names something else than a :class:`Column`.
    ValueError
        If two have the same name, or the same score.
    """
    found = list(_OWN)
    for name in metrics.names():
        column = metrics.get(name)
        if not isinstance(column, Column):
            raise TypeError(f"metric {name!r} is {column!r}; its entry point must name a gluonts_peft.columns.Column")
        for other in found:
            for what in ("name", "score"):
                if getattr(other, what) == getattr(column, what):
                    raise ValueError(f"metric {name!r}: {what} {getattr(column, what)!r} is taken; choose another")
        found.append(column)
    return tuple(found)
