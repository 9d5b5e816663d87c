"""Scoring a model on validation windows, unit by unit.

Errors are measured in what the history before the windows of a series scales them by, and forecasts are drawn with the
same random numbers for all models, so that scores of one window differ by the weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .scores import quantile_scores, scale
from .series.season import season_length

if TYPE_CHECKING:
    from .backbone import Backbone, Trajectories
    from .series.store import SeriesStore
    from .series.windows import LastWindows
    from .training import Loss

__all__ = [
    "MOST_SAMPLED",
    "MOST_WINDOWS",
    "UNITS",
    "Scorer",
    "forecast_alike",
    "history_scales",
    "keys_of",
    "season_of",
    "unit_key",
    "units_of",
]

#: What scores may be averaged over before they are compared.
UNITS = ("series", "patients")
#: Windows that are scored at most: by one forward pass each; and by sample paths, which take a pass per step.
MOST_WINDOWS, MOST_SAMPLED = 256, 64
_BATCH, _SAMPLES = 64, 20
_NAMES = {True: "scaled quantile loss", False: "reconstruction loss"}

Floats = NDArray[np.float64]


class Scorer:
    """Scores a model on validation windows, unit by unit.

    Parameters
    ----------
    windows
        What to score on; of more than ``MOST_WINDOWS`` an evenly spaced part is used.
    unit
        ``"series"``, or ``"patients"``: what precedes the first ``/`` of an item id. If there is a single unit, each of
        its windows counts as one.
    tasks
        What is scored: the forecast alone if None; else pairs (weight, what), where what is a number of steps to
        forecast or a loss that gives one number per window. Each is taken relative to its value before tuning.
    every
        Score all windows, however many.

    Attributes
    ----------
    units, unit
        Number of units, and what a unit is.
    windows, left_out
        Number of windows that are scored, and of those that are not, as their history has no scale.
    forecasts, sampled, score_name
        Whether a forecast is needed, whether forecasts are sample paths, and the name of the score.
    """

    def __init__(
        self,
        windows: LastWindows,
        *,
        unit: str = "series",
        tasks: Sequence[tuple[float, int | Loss]] | None = None,
        every: bool = False,
    ) -> None:
        store = windows.windows.store
        self.parts: list[tuple[float, int | Loss]] = list(tasks or [(1.0, windows.windows.prediction_length)])
        self.joint = tasks is not None
        self.forecasts = any(isinstance(what, int) for _, what in self.parts)
        self.sampled = False
        self.score_name = "score of all tasks" if len(self.parts) > 1 else _NAMES[self.forecasts]
        keys = keys_of(store, windows.series, unit)
        self._every = every
        chosen = _spread(keys, len(keys) if every else MOST_WINDOWS)
        first: dict[int, int] = {}
        for series, cut in zip(windows.series.tolist(), windows.cuts.tolist(), strict=True):
            first[series] = min(cut, first.get(series, cut))
        self._series, self._cuts = windows.series[chosen], windows.cuts[chosen]
        numbers, places = np.unique(self._series, return_inverse=True)
        self._scales = history_scales(store, numbers, [first[number] for number in numbers.tolist()])[places]
        self._source = windows.windows
        self._keys, self.unit = units_of([keys[position] for position in chosen], unit)
        self._batches: list[Mapping[str, Any]] | None = None
        self._good: NDArray[np.bool_] | None = None
        self._before: list[float] = []

    @property
    def units(self) -> int:
        return len(set(self._known()))

    @property
    def windows(self) -> int:
        return len(self._known())

    @property
    def left_out(self) -> int:
        return len(self._keys) - self.windows

    def start(self, backbone: Backbone) -> Floats:
        """Score the model before tuning, the baseline of all others; shape ``(units,)``, lower is better."""
        if self.forecasts:
            # Sample paths take a forward pass per step, so fewer windows are scored.
            self.sampled = self._forecast(backbone, self._read(slice(0, 1))).levels is None
            if self.sampled and len(self._keys) > MOST_SAMPLED and not self._every:
                kept = _spread(self._keys, MOST_SAMPLED)
                self._keys = [self._keys[position] for position in kept]
                self._series, self._cuts, self._scales = self._series[kept], self._cuts[kept], self._scales[kept]
        count = len(self._keys)
        self._batches = [self._read(slice(begin, begin + _BATCH)) for begin in range(0, count, _BATCH)]
        rows = self._rows(backbone)
        good = self._good = np.asarray(np.isfinite(rows).all(axis=0))
        self._before = [float(row[good].mean()) if good.any() else 1.0 for row in rows]
        return self._by_unit(rows)

    def score(self, backbone: Backbone) -> Floats:
        """Score the model as it is now; shape ``(units,)``, lower is better."""
        return self._by_unit(self._rows(backbone))

    def by_window(self, backbone: Backbone) -> Floats:
        """Score the model as it is now; shape ``(windows,)``, NaN for windows that are left out."""
        total = self._total(self._rows(backbone))
        assert self._good is not None, "start() comes first"
        result: Floats = np.where(self._good, total, math.nan)
        return result

    def _known(self) -> list[str]:
        assert self._good is not None, "start() comes first"
        return [key for key, good in zip(self._keys, self._good, strict=True) if good]

    def _read(self, part: slice) -> Mapping[str, Any]:
        return self._source.read(self._series[part], self._cuts[part])

    def _forecast(self, backbone: Backbone, batch: Mapping[str, Any]) -> Trajectories:
        with backbone.inference():
            return forecast_alike(backbone, batch, num_samples=_SAMPLES)

    def _rows(self, backbone: Backbone) -> Floats:
        """Return the score of each task and window, shape ``(tasks, windows)``."""
        import torch

        assert self._batches is not None, "start() comes first"
        columns, begin = [], 0
        for batch in self._batches:
            size = len(batch["past_target"])
            scales, begin = self._scales[begin : begin + size], begin + size
            label, seen = np.asarray(batch["future_target"]), np.asarray(batch["future_observed_values"])
            found = None
            rows = []
            for _, what in self.parts:
                if isinstance(what, int):
                    found = found or self._forecast(backbone, batch)
                    values = found.values.double().cpu().numpy()[:, :, :what]
                    rows.append(quantile_scores(values, found.levels, label[:, :what], seen[:, :what], scales))
                else:
                    tensors = {name: torch.as_tensor(value).to(backbone.device) for name, value in batch.items()}
                    with backbone.inference():
                        rows.append(what(backbone, tensors).double().cpu().numpy())
            columns.append(np.stack(rows))
        result: Floats = np.concatenate(columns, axis=1)
        return result

    def _total(self, rows: Floats) -> Floats:
        """Return the score of each window over all tasks, shape ``(windows,)``."""
        if not self.joint:
            first: Floats = rows[0]
            return first
        shares = [weight / (before or 1.0) for (weight, _), before in zip(self.parts, self._before, strict=True)]
        total: Floats = np.asarray(shares) @ rows / math.fsum(weight for weight, _ in self.parts)
        return total

    def _by_unit(self, rows: Floats) -> Floats:
        total = self._total(rows)
        keys = self._known()
        places = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        index = [places[key] for key in keys]
        sums = np.bincount(index, weights=total[self._good], minlength=len(places))
        result: Floats = sums / np.bincount(index, minlength=len(places))
        return result


def unit_key(name: str, unit: str) -> str:
    """Return the unit of a series by its item id: the id itself, or for patients what precedes the first ``/``."""
    return name.partition("/")[0] if unit == "patients" else name


def keys_of(store: SeriesStore, series: NDArray[np.int64], unit: str) -> list[str]:
    """Return the unit of each series, given by its number in the store."""
    if unit == "patients":
        return [unit_key(store.item_ids[number], unit) for number in series]
    return [str(number) for number in series]


def units_of(keys: list[str], unit: str) -> tuple[list[str], str]:
    """Return the unit of each window, and what a unit is: the windows themselves where there is a single unit."""
    if len(set(keys)) == 1 and len(keys) > 1:
        return [str(position) for position in range(len(keys))], "windows"
    return keys, unit


def season_of(store: SeriesStore) -> int:
    """Return the season length of the data in steps, 1 if they have no frequency."""
    return 1 if store.freq is None else season_length(store.freq)


def history_scales(store: SeriesStore, series: Iterable[int], cuts: Iterable[int]) -> Floats:
    """Return the scale of errors of each series by its history before a cut, shape ``(cuts, dimensions)``.

    See :func:`gluonts_peft.scores.scale`.
    """
    season, target = season_of(store), store.layout.target
    pairs = zip(series, cuts, strict=True)
    return np.stack([scale(store.series(each)[:cut].reshape(cut, -1)[:, :target], season) for each, cut in pairs])


def forecast_alike(backbone: Backbone, batch: Mapping[str, Any], num_samples: int | None = None) -> Trajectories:
    """Forecast windows with the same random numbers for all models, so that forecasts differ by the weights alone."""
    import torch

    past = {
        name: torch.as_tensor(value).to(backbone.device)
        for name, value in batch.items()
        if not name.startswith("future_")
    }
    generator = torch.Generator(device=backbone.device).manual_seed(0)
    return backbone.forecast(past, num_samples=num_samples, generator=generator)


def _spread(keys: Sequence[str], most: int) -> list[int]:
    """Return positions of at most `most` windows, evenly spaced over units, with as many windows of each."""
    if len(keys) <= most:
        return list(range(len(keys)))
    of: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        of.setdefault(key, []).append(position)
    units = list(of.values())
    if len(units) > most:
        units = [units[number] for number in np.linspace(0, len(units) - 1, most).astype(int)]
    each = max(1, most // len(units))
    # Evenly spaced within a unit, too.
    return sorted(
        those[number] for those in units for number in np.linspace(0, len(those) - 1, min(each, len(those))).astype(int)
    )
