"""Find anomalies with a pretrained model: a score a point, a threshold from a clean part, events.

    detections = detect(predictor, dataset, calibration=0.25)   scores, threshold and events of each series
    scores = score(predictor, dataset, method="reconstruction") scores alone
    evaluate(scores[0].values, labels)                          how good they are

A score is how far a value lies from what the model expected there, in standard deviations of its series
(``"reconstruction"``, ``"visible"``) or in units of the predicted spread (``"residual"``, ``"exceedance"``); see
:data:`METHODS`. A missing value, and one that comes too early to be expected, has none: NaN.
"""

from __future__ import annotations

from .detection import Detection, check_calibration, detect
from .evaluation import QUALITY, adjusted_best_f1, best_f1, evaluate, window_hits
from .events import Event, find_events
from .scores import METHODS, Scores, score, smooth
from .thresholds import THRESHOLDS, threshold
from .writing import write_detections

__all__ = [
    "METHODS",
    "QUALITY",
    "THRESHOLDS",
    "Detection",
    "Event",
    "Scores",
    "adjusted_best_f1",
    "best_f1",
    "check_calibration",
    "detect",
    "evaluate",
    "find_events",
    "score",
    "smooth",
    "threshold",
    "window_hits",
    "write_detections",
]
