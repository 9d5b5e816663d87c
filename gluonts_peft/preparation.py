"""Preparing a training run: what a task makes of an estimator and its data.

A task decides which windows are trained on, which are validated on, and by which loss and scores; the training itself
is the same for all. :class:`Forecasting` trains forecasts, possibly with several objectives at once, see
:mod:`gluonts_peft.objectives`; :class:`Reconstructing` trains to fill in hidden patches, for anomalies and gaps.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .adapters.load import get_adapter
from .calibration import Calibrator, require_quantiles, set_apart
from .errors import unknown
from .items import ItemJudge, require_weights
from .objectives import KINDS, Joint, Reconstruction
from .outcome import Fit, TuningDidNotHelp
from .registry import adapter_names
from .series.entries import Door, called
from .series.overlap import held_back
from .series.store import SeriesStore
from .series.windows import Windows
from .sweep import require_reconstruct
from .training_options import resolve_device
from .verdict import Judge

if TYPE_CHECKING:
    from .adapters.base import Adapter
    from .backbone import Backbone
    from .deadline import Deadline
    from .estimator import PeftEstimator
    from .training import Loss

    Data = Iterable[Mapping[str, Any]]

__all__ = ["Forecasting", "Prepared", "Reconstructing", "TrainingTask", "parse_task"]

logger = logging.getLogger(__name__)


def _as_it_is(result: Fit) -> Fit:
    return result


@dataclass
class Prepared:
    """What a task hands to :func:`gluonts_peft.training.fit`, and to what follows.

    Parameters
    ----------
    adapter, windows, validation, judge, loss, score, items
        As for :func:`gluonts_peft.training.fit`.
    freq
        Frequency of the training data.
    calibrator
        Calibrates the quantiles afterwards, if that is wanted.
    finish
        Completes the outcome of the training.
    """

    adapter: Adapter
    windows: Windows
    validation: list[Mapping[str, Any]]
    judge: Judge
    freq: str | None
    loss: Loss | None = None
    score: Callable[[], float] | None = None
    items: ItemJudge | None = None
    calibrator: Calibrator | None = None
    finish: Callable[[Fit], Fit] = field(default=_as_it_is)


class TrainingTask(Protocol):
    """A task that an estimator can train for."""

    def check(self, estimator: PeftEstimator) -> None:
        """Raise a ValueError if an option of the estimator has no part in the task."""

    def prepare(
        self,
        estimator: PeftEstimator,
        backbone: Backbone,
        training_data: Data,
        validation_data: Data | None,
        item_data: Data | None,
        deadline: Deadline | None,
    ) -> Prepared:
        """Prepare a training run; the data are those of :meth:`gluonts_peft.PeftEstimator.train`."""


@dataclass(frozen=True)
class Forecasting:
    """Train for forecasts of ``prediction_length`` steps, or for the ``tasks`` of the estimator."""

    def check(self, estimator: PeftEstimator) -> None:
        """Accept all options."""

    def prepare(
        self,
        estimator: PeftEstimator,
        backbone: Backbone,
        training_data: Data,
        validation_data: Data | None,
        item_data: Data | None,
        deadline: Deadline | None,
    ) -> Prepared:
        """Hold labels out, set calibration windows apart, and score zero-shot where there are several tasks."""
        tasks, options = estimator.tasks, estimator.options
        history = tasks is not None and tasks.history
        if history:
            require_reconstruct(backbone)
        forecasts = tasks is None or tasks.forecasts
        adapter = get_adapter(_with_head(estimator.adapter, backbone) if forecasts else estimator.adapter)
        if estimator.by is not None:
            require_weights(adapter)
            if backbone.untrained:
                raise ValueError(
                    f"checkpoint {backbone.source.checkpoint!r} has no forecasting head of its own, so that by has no"
                    " zero-shot to choose; leave by out"
                )
        elif item_data is not None:
            raise ValueError("item_data is there to choose weights by item; name by='item' too, or leave it out")
        store, door = estimator.keep_series(training_data, "training", backbone)
        label = estimator.prediction_length * estimator.validation_windows
        if history:
            label += backbone.context_length
        lengths: dict[str, Any] = {
            "context_length": backbone.past_length,
            "prediction_length": estimator.prediction_length,
            "min_context": estimator.min_context or min(backbone.context_length, estimator.prediction_length),
            "seed": options.seed,
            "time_features": backbone.time_features,
        }
        held_out: Any = label
        validation_store, validation_door = store, door
        if validation_data is not None:
            validation_store, validation_door = estimator.keep_series(
                validation_data, "validation", backbone, door.found_freq
            )
            names = (door.names, validation_door.names)
            held_out = _without_labels(store, validation_store, names, label, estimator.calibrate)
        windows = Windows(store, holdout=held_out, **lengths)
        estimator.settle("training", "trained on", windows, door)
        validation_windows = Windows(validation_store, **lengths)
        if validation_data is not None:
            estimator.settle("validation", "validated on", validation_windows, validation_door)
        last = validation_windows.last(
            windows=estimator.validation_windows, max_windows=estimator.max_validation_windows
        )
        calibrator = None
        if estimator.calibrate:
            require_quantiles(backbone, adapter.head_levels, last)
            last, apart, untrained = set_apart(last, estimator.verdict_unit, own=validation_data is None)
            calibrator = Calibrator(apart, estimator.verdict_unit)
            if untrained.any():
                windows = Windows(store, holdout=np.where(untrained, store.lengths, held_out), **lengths)
            if deadline is not None and not backbone.untrained:
                # Measures what calibration will cost at the end.
                backbone.to(resolve_device(options.device))
                with deadline.measuring("calibration"):
                    calibrator.learn(backbone)
        prepared = Prepared(
            adapter,
            windows,
            list(last),
            Judge(last, unit=estimator.verdict_unit, tasks=None if tasks is None else tasks.judged),
            door.found_freq,
            calibrator=calibrator,
        )
        if estimator.by is not None:
            judged, names_of = last, validation_door.names
            if item_data is not None:
                item_store, item_door = estimator.keep_series(item_data, "items", backbone, door.found_freq)
                judged, names_of = Windows(item_store, **lengths).last(estimator.validation_windows), item_door.names
            prepared.items = ItemJudge(
                judged,
                names_of,
                by=estimator.by,
                tasks=None if tasks is None else tasks.judged,
                keep=estimator.gate == "keep",
            )
        if tasks is not None:
            if history and adapter_names(adapter.spec) == {"head"}:
                raise ValueError(
                    f"adapter {adapter!r} trains the forecasting head alone, which has no part in the task"
                    " 'reconstruct'; add another, e.g. ['lora', 'head'], or leave the task out"
                )
            backbone.to(resolve_device(options.device))
            begun = estimator.clock()
            several = _Several(tasks, backbone, adapter, prepared.validation)
            if deadline is not None:
                deadline.expect("after", estimator.clock() - begun)
            prepared.loss, prepared.finish = several.loss, several.finish
            prepared.score = several.score if several.comparable else None
        return prepared


class _Several:
    """Scores of several tasks before and after tuning.

    Parameters
    ----------
    tasks
        The tasks; `loss` are the same ones, scaled by their scores before tuning.
    backbone
        Before tuning, on its device.
    adapter
        Not attached yet.
    validation
        Batches of validation windows.
    """

    def __init__(self, tasks: Joint, backbone: Backbone, adapter: Adapter, validation: list[Mapping[str, Any]]) -> None:
        self.backbone, self.adapter, self.validation = backbone, adapter, validation
        self.levels = adapter.head_levels
        self.before = tasks.scores(backbone, validation, self.levels, forecasts=not backbone.untrained)
        # The losses of a new head and of the model's own are not comparable.
        self.loss = tasks.scaled(self.before, forecasts=self.levels is None)
        #: Whether all tasks have a score before tuning.
        self.comparable = bool(self.before) and not (backbone.untrained and tasks.forecasts)

    def score(self) -> float:
        """Return the score of all tasks, relative to that before tuning."""
        return self.loss.relative(self.loss.scores(self.backbone, self.validation, self.levels), self.before)

    def finish(self, result: Fit) -> Fit:
        """Add the scores of each task to the outcome; warn of tasks that got worse where no verdict tells."""
        names = [task.name for task in self.loss.tasks]
        if math.isfinite(result.gate.tuned):
            after = self.loss.scores(self.backbone, self.validation, self.levels)
        else:
            after = dict.fromkeys(names, math.inf)
        before = {name: {"before": self.before[name]} if name in self.before else {} for name in after}
        result = replace(result, tasks={name: {**before[name], "after": after[name]} for name in after})
        if self.comparable:
            return result
        # The checkpoint had no head to forecast with.
        for name, earlier in self.before.items():
            if not after[name] < earlier:
                worse = f"no better than before: loss {earlier:.5g} before, {after[name]:.5g} after"
                warnings.warn(TuningDidNotHelp(f"adapter {self.adapter!r}, task {name!r}: {worse}"), stacklevel=3)
        return replace(result, gate=replace(result.gate, zero_shot=None))


@dataclass(frozen=True)
class Reconstructing:
    """Train to reconstruct hidden patches of the history, for anomalies and gaps; data are univariate.

    Windows of ``context_length`` steps that touch each other are validated on. Without validation data the ends of the
    training series are held out for this; validation data must not overlap the training data of the same items.

    Parameters
    ----------
    mask_ratio
        Share of the patches that are hidden.
    held_out
        Share of each series that is held out if there are no validation data.
    """

    mask_ratio: float = 0.3
    held_out: float = 0.2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
                raise ValueError(f"{name} {value!r} is not a share between 0 and 1")

    def check(self, estimator: PeftEstimator) -> None:
        """Raise a ValueError if an option of the estimator has no part in reconstruction."""
        if estimator.tasks is not None:
            raise ValueError(
                "tasks have no part in task 'reconstruct', which is a single one; leave them out, or write"
                " {'task': 'reconstruct'} among them"
            )
        if estimator.calibrate:
            raise ValueError("calibrate has no part in task 'reconstruct', which makes no quantiles; leave it out")
        if estimator.by is not None:
            raise ValueError(
                f"by {estimator.by!r} chooses by forecasts and has no part in reconstruction; leave it out"
            )
        if "head" in adapter_names(estimator.adapter):
            raise ValueError(
                f"adapter {get_adapter(estimator.adapter)!r} trains a forecasting head, which has no part in"
                " reconstruction; name another without one, e.g. 'lora'"
            )

    def prepare(
        self,
        estimator: PeftEstimator,
        backbone: Backbone,
        training_data: Data,
        validation_data: Data | None,
        item_data: Data | None,
        deadline: Deadline | None,
    ) -> Prepared:
        """Hold the ends of the series out, or check that validation data do not overlap the training data."""
        require_reconstruct(backbone)
        if item_data is not None:
            raise ValueError("item_data chooses weights by forecasts and has no part in reconstruction; leave it out")
        cut_off = validation_data is None
        if cut_off:
            training_data, validation_data = self._cut(training_data, estimator, backbone)
        store, door = estimator.keep_series(training_data, "training", backbone)
        held_out_store, held_out_door = estimator.keep_series(validation_data, "validation", backbone, door.found_freq)
        if not cut_off and (held_back(store, held_out_store, (door.names, held_out_door.names), None) > 0).any():
            raise ValueError(
                "validation_data holds the same times of the same items as the training data: what is trained on would"
                " be validated on; leave it out, and the ends of the training series are held out, or give other series"
            )
        least = estimator.min_context or min(backbone.context_length, 4 * backbone.patch_length)
        # Windows have a label of one step at least; here it has no influence.
        lengths: dict[str, Any] = {
            "context_length": backbone.context_length,
            "prediction_length": 1,
            "min_context": least,
        }
        windows = Windows(store, seed=estimator.options.seed, **lengths)
        estimator.settle("training", "trained on", windows, door)
        held_out_windows = Windows(held_out_store, **lengths)
        if not cut_off:
            estimator.settle("validation", "validated on", held_out_windows, held_out_door)
        last = held_out_windows.last(
            windows=-(-int(held_out_windows.store.lengths.max()) // backbone.context_length),
            distance=backbone.context_length,
            max_windows=estimator.max_validation_windows,
            batch_size=64,
        )
        loss = Reconstruction(self.mask_ratio)
        return Prepared(
            get_adapter(estimator.adapter),
            windows,
            list(last),
            Judge(last, unit=estimator.verdict_unit, tasks=[(1.0, loss)]),
            door.found_freq,
            loss=loss,
        )

    def _cut(
        self, data: Data, estimator: PeftEstimator, backbone: Backbone
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the beginnings of all series, and the ends that are held out."""
        entries = Door("trained on", backbone=backbone, any_freq=estimator.any_freq).read(data)
        cuts = [math.ceil(len(entry["target"]) * (1.0 - self.held_out)) for entry in entries]
        pairs = list(zip(entries, cuts, strict=True))
        return (
            [{**entry, "target": entry["target"][:cut]} for entry, cut in pairs if cut],
            [
                {**entry, "target": entry["target"][cut:], "start": entry["start"] + cut}
                for entry, cut in pairs
                if cut < len(entry["target"])
            ],
        )


def parse_task(task: Any) -> TrainingTask:
    """Return the task that a name or a mapping means.

    Parameters
    ----------
    task
        ``"forecast"``, ``"reconstruct"``, or a mapping with options, e.g.
        ``{"task": "reconstruct", "mask_ratio": 0.3, "held_out": 0.2}``.

    Raises
    ------
    ValueError
        If the task or an option is unknown, or a value cannot be used.

    Examples
    --------
    >>> parse_task({"task": "reconstruct", "held_out": 0.1})
    Reconstructing(mask_ratio=0.3, held_out=0.1)
    """
    options: dict[str, Any] = dict(task) if isinstance(task, Mapping) else {"task": task}
    name = options.pop("task", None)
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(unknown("task", name, KINDS))
    if name == "forecast":
        if options:
            raise ValueError(
                f"task 'forecast' has no option {next(iter(options))!r}; what is forecast, for several objectives too,"
                " is said by prediction_length and tasks"
            )
        return Forecasting()
    known = ("mask_ratio", "held_out")
    for option in options:
        if option not in known:
            raise ValueError(f"task {name!r}: {unknown('option', option, known)}")
    return Reconstructing(**options)


def _with_head(spec: Any, backbone: Backbone) -> Any:
    """Return an adapter with the head added if the checkpoint has none: the head must train along."""
    parts, names = spec if isinstance(spec, list) else [spec], adapter_names(spec)
    if "head" not in backbone.untrained or names & {"head", "full"}:
        return spec
    if names == {"none"}:
        raise ValueError(
            f"adapter 'none' trains nothing, but checkpoint {backbone.source.checkpoint!r} has no forecasting head to"
            " forecast with; train one with adapter 'head' (linear probing), or along with any other"
        )
    logger.info("checkpoint %r has no forecasting head: it is trained along with %s", backbone.source.checkpoint, spec)
    return [*parts, "head"]


def _without_labels(
    store: SeriesStore, validation: SeriesStore, names: tuple[list[Any], list[Any]], label: int, calibrate: bool
) -> Any:
    """Return the number of steps at the end of each training series that overlap validation labels; 0 if none do."""
    held = held_back(store, validation, names, label)
    count = int((held > 0).sum())
    if not count:
        return 0
    if calibrate:
        raise ValueError(
            f"calibrate needs series that are not trained on, and validation_data is of the same items as {count} of"
            f" {len(store)} training series: leave validation_data out, and some of the training series are held out"
            " for it, or give other series"
        )
    if (held == store.lengths).all():
        raise ValueError(
            f"the labels of validation_data lie at or before the start of all {count} training series of the same"
            " items: nothing is left to train on; leave validation_data out, or give earlier training data"
        )
    first = int(np.flatnonzero(held)[0])
    warnings.warn(
        f"labels of validation_data lie inside the training data of {count} of {len(store)} series (first:"
        f" {called(names[0][first], first)}): the last {int(held.max())} steps at most of these are not trained on",
        stacklevel=4,
    )
    return held
