"""How good scores and events are, where the anomalies are known.

Range-based and VUS metrics are those of ``aeon.benchmarking.metrics.anomaly_detection``; its releases do not install
beside the numpy and pandas that this project needs, so it is not a dependency, and nothing of it is rewritten here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..sweep import runs
from .events import Event

__all__ = ["QUALITY", "adjusted_best_f1", "best_f1", "evaluate", "window_hits"]

Floats = NDArray[np.float64]

QUALITY = ("roc_auc", "average_precision", "best_f1", "adjusted_best_f1")
"""What :func:`evaluate` measures."""


def evaluate(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Score the scores.

    Parameters
    ----------
    scores
        Shape ``(time,)``; points without a score are left out.
    labels
        Shape ``(time,)``: 1 or True where there is an anomaly, else 0.

    Returns
    -------
    dict
        ``roc_auc`` and ``average_precision`` of scikit-learn, :func:`best_f1` and :func:`adjusted_best_f1`.

    Raises
    ------
    ValueError
        If lengths differ, a label is neither 0 nor 1, or there are no anomalies, or nothing else, where there is a
        score.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    values, truth = _checked(scores, labels)
    measures = (roc_auc_score, average_precision_score, _best_f1)
    found = [float(measure(truth, values)) for measure in measures]
    return dict(zip(QUALITY, (*found, adjusted_best_f1(scores, labels)), strict=True))


def best_f1(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the highest F1 over all thresholds: that of an oracle who knows the labels, an upper bound.

    Parameters and errors as :func:`evaluate`.
    """
    values, truth = _checked(scores, labels)
    return _best_f1(truth, values)


def adjusted_best_f1(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the highest F1 over all thresholds after point adjustment.

    Point adjustment counts a whole labelled stretch as found if one of its points is. It flatters: where anomalies are
    long, *random* scores reach values that papers report as progress (Kim et al. 2022, AAAI, arXiv 2109.05257), since
    by chance one point of a long stretch is high. It is here to compare with numbers that others report so; judge by
    the others.

    Parameters and errors as :func:`evaluate`.
    """
    _, truth = _checked(scores, labels)
    adjusted = np.array(scores, float)
    kept = ~np.isnan(adjusted)
    # Stretches of the whole series: a point without a score parts them all the same.
    for begin, end in runs(np.asarray(labels) == 1):
        part = slice(begin, end)
        if kept[part].any():
            adjusted[part][kept[part]] = adjusted[part][kept[part]].max()
    return _best_f1(truth, adjusted[kept])


def _best_f1(truth: NDArray[np.bool_], values: Floats) -> float:
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(truth, values)
    return float(np.max(2.0 * precision * recall / np.maximum(precision + recall, 1e-12)))


def window_hits(events: Sequence[Event], windows: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Count what the events of a series hit.

    Parameters
    ----------
    events
        From :func:`detect`.
    windows
        First and last step of each true anomaly, as the windows of the Numenta Anomaly Benchmark.

    Returns
    -------
    dict
        ``hit`` and ``missed`` windows, and ``false`` events, those that overlap none.
    """
    windows = list(windows)
    hit = sum(any(event.first <= last and event.last >= first for event in events) for first, last in windows)
    false = sum(not any(event.first <= last and event.last >= first for first, last in windows) for event in events)
    return {"hit": hit, "missed": len(windows) - hit, "false": false}


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    values: Floats = np.asarray(scores, float)
    truth: NDArray[Any] = np.asarray(labels)
    if values.shape != truth.shape or values.ndim != 1:
        raise ValueError(
            f"labels have shape {truth.shape}, scores {values.shape}: give one label a point of the series"
        )
    kept = ~np.isnan(values)
    values, truth = values[kept], truth[kept]
    if len(wrong := truth[(truth != 0) & (truth != 1)]):
        raise ValueError(f"labels hold {wrong[0]}; give 1 for an anomaly and 0 else")
    truth = truth.astype(bool)
    if truth.all() or not truth.any():
        raise ValueError(
            f"of the {len(truth)} points with a score {int(truth.sum())} are labelled as anomalies: there is nothing to"
            " tell apart"
        )
    return values, truth
