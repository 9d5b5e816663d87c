"""AutoETS and AutoTheta of statsforecast, fitted to the history of each window alone.

What practitioners do, and so what they would have instead of a pretrained model. Our choices, since statsforecast knows
neither missing values nor short series:

- The history is all of the series before the window, its last :data:`MAX_HISTORY` steps at most, and not just the
  context that models see.
- Missing values inside the history are interpolated linearly. Steps before the first observed value are dropped; so are
  those after the last one, and the forecast begins right after it.
- Models have a season where the history holds two of them, and one that the method knows: up to 24 steps for ETS, 4 or
  more for Theta. Otherwise they have none.
- Where no model can be fitted, or the history has fewer than 8 steps, the forecast is a random walk: the last value,
  with normal quantiles as wide as the changes from step to step.

The last two are counted. Quantiles of ETS are statsforecast's. Those of Theta are normal around its forecast, with the
variance ``(1 + (h - 1) * alpha ** 2) * sigma ** 2`` of step h (Fiorucci et al. 2016); sigma is that of all residuals
but the first three, as in statsforecast, whose own quantiles come from 200 sample paths, and whose residuals (release
2.1) still hold the season where that is additive. Quantiles are sorted, and nothing else is done to them: those of
positive series may be below 0.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
from gluonts.core.component import validated
from gluonts.dataset import DataEntry, Dataset
from gluonts.dataset.util import forecast_start
from gluonts.model.forecast import QuantileForecast
from gluonts.model.predictor import RepresentablePredictor
from numpy.typing import NDArray

from ..backtesting import QUANTILE_LEVELS
from ..errors import unknown
from .baselinespec import STATISTICAL

__all__ = ["MAX_HISTORY", "SIMPLER", "StatisticalPredictor", "check_options"]

#: Steps that a model is fitted to at most, unless an option says otherwise.
MAX_HISTORY = 500

#: What is counted where a forecast is simpler than asked for, and the words for it.
SIMPLER = {"without_season": "without a season", "random_walk": "as a random walk"}

#: Longest season of ETS in statsforecast, and in R's forecast; and the shortest that Theta looks for.
_LONGEST_SEASON, _SHORTEST_SEASON = 24, 4
_SHORTEST = 8
_NORMAL = np.array([NormalDist().inv_cdf(level) for level in QUANTILE_LEVELS])
_THETA = ("STM", "OTM", "DSTM", "DOTM")

Floats = NDArray[np.floating[Any]]


class StatisticalPredictor(RepresentablePredictor):  # type: ignore[misc, unused-ignore]
    """Fit a model to each series and forecast its quantiles.

    Parameters
    ----------
    prediction_length
        Steps to forecast.
    method
        ``"auto_ets"`` or ``"auto_theta"``.
    season_length
        Steps in a season; 1 for none.
    model
        Models to choose from, None for all. Of ETS: error, trend and season as statsforecast spells them, such as
        ``"AZZ"``. Of Theta: ``"STM"``, ``"OTM"``, ``"DSTM"`` or ``"DOTM"``.
    max_history
        Last steps of a series that a model is fitted to.

    Attributes
    ----------
    simpler : collections.Counter
        Series of the last reading that were forecast more simply than asked for, by the keys of :data:`SIMPLER`.

    Raises
    ------
    ValueError
        If an argument cannot be used; while predicting, if a series has no observed value or several dimensions.
    ImportError
        If statsforecast is not installed.
    """

    @validated()  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(
        self,
        prediction_length: int,
        method: str,
        season_length: int = 1,
        model: str | None = None,
        max_history: int = MAX_HISTORY,
    ) -> None:
        super().__init__(prediction_length=prediction_length)
        check_options(method, {"model": model, "max_history": max_history})
        _statsforecast(method)
        self.method = method
        self.season_length = season_length
        self.model = model
        self.max_history = max_history
        self.simpler: Counter[str] = Counter()

    def predict(self, dataset: Dataset, **_: Any) -> Iterator[QuantileForecast]:
        """Forecast every series; options of other predictors, such as ``num_samples``, have no meaning here."""
        self.simpler = Counter()
        return map(self.predict_item, dataset)

    def predict_item(self, item: DataEntry) -> QuantileForecast:
        """Forecast one series.

        Parameters
        ----------
        item
            Data entry with ``target`` ``(time,)``; NaN and infinite values are missing.

        Returns
        -------
        QuantileForecast
            Of :data:`~gluonts_peft.backtesting.QUANTILE_LEVELS`.
        """
        target = np.asarray(item["target"], np.float64)
        if target.ndim != 1:
            raise ValueError(f"item_id {item.get('item_id')!r} has {target.ndim} dimensions; {self.method} takes one")
        seen = np.flatnonzero(np.isfinite(target[-self.max_history :]))
        if not len(seen):
            raise ValueError(
                f"item_id {item.get('item_id')!r} has no observed value in its last {self.max_history} steps; leave the"
                " series out, or raise max_history"
            )
        history = target[-self.max_history :]
        gap = len(history) - 1 - int(seen[-1])
        history = np.interp(np.arange(seen[0], seen[-1] + 1), seen, history[seen])
        values = self._quantiles(history, self.prediction_length + gap)[:, gap:]
        return QuantileForecast(
            np.sort(values, axis=0),
            forecast_keys=[str(level) for level in QUANTILE_LEVELS],
            start_date=forecast_start(item),
            item_id=item.get("item_id"),
            info=item.get("info"),
        )

    def _quantiles(self, history: Floats, steps: int) -> Floats:
        """Return the quantiles of so many steps after a history without gaps, (levels, steps)."""
        season = self.season_length
        known = season <= _LONGEST_SEASON if self.method == "auto_ets" else season >= _SHORTEST_SEASON
        if not (known and len(history) >= 2 * season):
            season = 1
        if history.min() == history.max():
            # There is nothing to fit, and nothing simpler than a constant.
            return _random_walk(history, steps)
        values = self._fitted(history, season, steps) if len(history) >= _SHORTEST else None
        if values is None:
            self.simpler["random_walk"] += 1
            return _random_walk(history, steps)
        if season < self.season_length:
            self.simpler["without_season"] += 1
        return values

    def _fitted(self, history: Floats, season: int, steps: int) -> Floats | None:
        """Return the quantiles of the best model; None if none could be fitted."""
        forecast = self._ets if self.method == "auto_ets" else self._theta
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                values = forecast(history, season, steps)
        except Exception:
            # What statsforecast raises then is a plain Exception, or whatever its steps come upon.
            return None
        return values if np.isfinite(values).all() else None

    def _ets(self, history: Floats, season: int, steps: int) -> Floats:
        components = self.model or "ZZZ"
        model = _statsforecast(self.method).AutoETS(season, model=components if season > 1 else components[:2] + "N")
        # Intervals around the median: 80 % of them lie between 0.1 and 0.9.
        widths = [abs(round(200 * level - 100)) for level in QUANTILE_LEVELS]
        found = model.forecast(history, steps, level=sorted(set(widths)))
        sides = ["hi" if level > 0.5 else "lo" for level in QUANTILE_LEVELS]
        return np.stack([found[f"{side}-{width}"] for side, width in zip(sides, widths, strict=True)])

    def _theta(self, history: Floats, season: int, steps: int) -> Floats:
        model = _statsforecast(self.method).AutoTheta(season, model=self.model).fit(history)
        found = model.model_
        residuals, factor = found["residuals"], np.ones(steps)
        sigma = np.std(residuals[3:], ddof=1)
        if found.get("decompose"):
            pattern = found["seas_forecast"]["mean"]
            if found["decomposition_type"] == "multiplicative":
                factor = np.resize(pattern, steps)
            else:
                # Whether it is in them or not: without it they are smaller.
                whole = pattern[(np.arange(len(history)) - len(history)) % season]
                sigma = min(sigma, np.std((residuals - whole)[3:], ddof=1))
        spread = sigma * np.sqrt(1 + np.arange(steps) * found["par"]["alpha"] ** 2) * factor
        values: Floats = model.predict(steps)["mean"] + _NORMAL[:, None] * spread
        return values


def _random_walk(history: Floats, steps: int) -> Floats:
    changes = np.diff(history)
    width = math.sqrt(float(np.mean(np.square(changes)))) if len(changes) else 0.0
    values: Floats = history[-1] + width * _NORMAL[:, None] * np.sqrt(np.arange(1.0, steps + 1))
    return values


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Make sure that a method has such options.

    Raises
    ------
    ValueError
        If a name or a value is wrong.
    """
    if method not in STATISTICAL:
        raise ValueError(unknown("method", method, STATISTICAL))
    for option in options:
        if option not in ("model", "max_history"):
            raise ValueError(f"baseline {method!r}: " + unknown("option", option, ("model", "max_history")))
    model, history = options.get("model"), options.get("max_history", MAX_HISTORY)
    if method == "auto_ets" and model is not None and not re.fullmatch("[AMZ][NAMZ][NAMZ]", str(model)):
        raise ValueError(
            f"baseline {method!r}: model {model!r} is not error (A, M or Z), trend and season (N, A, M or Z each);"
            " write e.g. 'AZZ'"
        )
    if method == "auto_theta" and model not in (None, *_THETA):
        raise ValueError(f"baseline {method!r}: " + unknown("model", model, _THETA))
    if isinstance(history, bool) or not isinstance(history, int) or history < 1:
        raise ValueError(f"baseline {method!r}: max_history {history!r} is not a whole number, 1 or more")


def _statsforecast(method: str) -> Any:
    try:
        from statsforecast import models
    except ImportError as error:
        raise ImportError(
            f"baseline {method!r} needs statsforecast ({error}); install gluonts-peft[baselines]"
        ) from error
    return models
