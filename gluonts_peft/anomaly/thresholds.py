"""The score above which a point is an anomaly, from scores of a part that is known to be clean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import unknown

__all__ = ["LEAST_CALIBRATION", "THRESHOLDS", "threshold", "threshold_options"]

Floats = NDArray[np.float64]

# Fewest scores that a threshold can rest on (our choice): below it, a high quantile is the maximum.
LEAST_CALIBRATION = 50
# Fewest scores that a tail is fitted to (our choice).
LEAST_PEAKS = 20


def threshold(
    scores: ArrayLike, spec: str | Mapping[str, Any] = "quantile", *, where: str = "the calibration part"
) -> float:
    """Return the score above which a point is an anomaly, from scores of a clean part.

    Parameters
    ----------
    scores
        Scores of points that are known to be clean; NaN is left out.
    spec
        A name of :data:`THRESHOLDS`, or a mapping with its option: ``{"name": "quantile", "level": 0.999}``,
        ``{"name": "deviations", "k": 3}``, ``{"name": "extreme", "risk": 1e-4, "level": 0.95}``.

    where
        What the scores are of, for messages.

    Raises
    ------
    ValueError
        If the name or an option is unknown or out of range, there are fewer than 50 scores, or all are equal.
    """
    name, options = threshold_options(spec)
    values = np.asarray(scores, float)
    clean = values[~np.isnan(values)]
    if len(clean) < LEAST_CALIBRATION:
        raise ValueError(
            f"{where} has {len(clean)} scores, a threshold needs {LEAST_CALIBRATION}; give a longer one (the first"
            " steps of a series have no score from forecasts)"
        )
    if clean.min() == clean.max():
        raise ValueError(f"{where} is constant: all its scores are {clean[0]:g}, which says nothing about a threshold")
    return float(THRESHOLDS[name](clean, **options))


def threshold_options(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a threshold, or raise a ValueError if they cannot be used on any scores."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in THRESHOLDS:
        raise ValueError(unknown("threshold", str(name), THRESHOLDS))
    known = THRESHOLDS[name].__kwdefaults__ or {}
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"threshold {name!r}: option", option, known))
        if isinstance(options[option], bool) or not isinstance(options[option], int | float):
            raise ValueError(f"threshold {name!r}: {option} {options[option]!r} is not a number")
    for share in ("level", "risk"):
        if share in options:
            _between(share, float(options[share]))
    return str(name), options


def _quantile(scores: Floats, *, level: float = 0.995) -> float:
    _between("level", level)
    return float(np.quantile(scores, level))


def _deviations(scores: Floats, *, k: float = 3.0) -> float:
    return float(scores.mean() + k * scores.std())


def _extreme(scores: Floats, *, risk: float = 1e-4, level: float = 0.95) -> float:
    from scipy.stats import genpareto

    _between("level", level)
    base = float(np.quantile(scores, level))
    peaks = scores[scores > base] - base
    if len(peaks) < LEAST_PEAKS:
        raise ValueError(
            f"level {level} leaves {len(peaks)} of {len(scores)} clean scores above it, a tail is fitted to"
            f" {LEAST_PEAKS} or more; lower it, or give a longer calibration part"
        )
    if not 0.0 < risk * len(scores) < len(peaks):
        raise ValueError(
            f"risk {risk} is not below {len(peaks) / len(scores):.4g}, the share of scores above the level {level}"
        )
    shape, _, scale = genpareto.fit(peaks, floc=0.0)
    return base + float(genpareto.isf(risk * len(scores) / len(peaks), shape, 0.0, scale))


THRESHOLDS: dict[str, Callable[..., float]] = {
    "quantile": _quantile,
    "deviations": _deviations,
    "extreme": _extreme,
}
"""Thresholds by name.

``"quantile"``: quantile ``level`` of the clean scores; ``"deviations"``: their mean plus ``k`` standard deviations;
``"extreme"``: the score that a clean point exceeds with probability ``risk``, from a generalised Pareto distribution
that is fitted to what exceeds their quantile ``level`` (peaks over threshold, as SPOT does: Siffer et al. 2017, KDD;
fitted by ``scipy.stats.genpareto``).
"""


def _between(name: str, share: float) -> None:
    if not 0.0 < share < 1.0:
        raise ValueError(f"{name} {share} is not between 0 and 1")
