"""The GluonTS estimator: one class for all families and adapters."""

from __future__ import annotations

import inspect
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from gluonts.core.component import validated
from gluonts.dataset.common import Dataset
from gluonts.model.estimator import Estimator

from . import __version__
from .adapters.load import get_adapter
from .backbone import Backbone
from .calibration import Calibrator, require_quantiles, set_apart
from .deadline import TIME_LIMIT, Deadline, spelled
from .errors import unknown
from .items import BY, LEAST_WINDOWS, ItemJudge, Items
from .objectives import Joint, parse_tasks
from .predictor import PeftPredictor
from .registry import adapter_names
from .series.entries import Door, Unusable, called, check_unusable
from .series.overlap import held_back
from .series.store import SeriesStore
from .series.windows import Windows
from .sweep import require_reconstruct
from .trainer_kwargs import check_trainer_kwargs, resolve_precision
from .training import Fit, TrainingOptions, TuningDidNotHelp, fit, resolve_device
from .verdict import UNITS, Judge

if TYPE_CHECKING:
    from .adapters.base import Adapter
    from .networks import Networks

__all__ = ["PeftEstimator"]

logger = logging.getLogger(__name__)

GATES = ("fallback", "raise", "keep")


class PeftEstimator(Estimator):  # type: ignore[misc]
    """Tune a pretrained forecaster with an adapter.

    Families subclass it, name their backbone and default checkpoint, and add nothing else.

    Parameters
    ----------
    prediction_length
        Steps to forecast.
    context_length
        Steps of history that the model sees at most; the checkpoint's own length if None.
    checkpoint
        Bundled name, local folder in the family's official layout, or hub id with an optional ``@revision``; the
        family's default if None.
    adapter
        A name, a mapping ``{"name": "lora", "r": 2}``, or a list of these for a hybrid. ``"none"`` is zero-shot,
        ``"full"`` tunes everything. See ``gluonts-peft adapters``.
    max_epochs, num_batches_per_epoch, batch_size, learning_rate, weight_decay, warmup, gradient_clip_val, patience
        See :class:`gluonts_peft.training.TrainingOptions`; ``learning_rate`` None means the adapter's own.
    min_context
        Fewest steps of history of a training or validation window; ``min(context_length, prediction_length)`` if None.
    validation_windows
        Validation windows a series: the last ones, each ``prediction_length`` apart.
    max_validation_windows
        Of these, an evenly spaced part is used if there are more.
    gate
        What to hand over if there is no evidence on the validation windows that the tuned model is better than
        zero-shot, see :class:`gluonts_peft.verdict.Verdict`: ``"fallback"`` warns
        (:class:`~gluonts_peft.TuningDidNotHelp`) and returns the zero-shot predictor, ``"raise"`` raises it,
        ``"keep"`` returns the tuned predictor all the same. The verdict is recorded in any case; who wants no less than
        a proof asks for ``predictor.verdict.proven``.
    verdict_unit
        What the verdict counts: ``"series"``, or ``"patients"``, with what comes before the first ``/`` of an item id
        as the patient, where several series of one are no independent evidence.
    interpolate
        Whether weights between the pretrained and the tuned model may be handed over too, see
        :func:`gluonts_peft.training.fit`.
    calibrate
        Recalibrate the quantiles of what is handed over, tuned or zero-shot, on units that neither trained nor chose
        epoch or weight, see :mod:`gluonts_peft.calibration`: half of the validation units, 20 at least; without
        validation data a fifth of the training ones, of which nothing is trained on; of a single series half of its
        validation windows. It is stored with the predictor, and no part of the adapter.
    by
        Let each ``"item"``, or ``"patients"`` as of `verdict_unit`, choose a weight of its own by its own history where
        that is long enough, shrunk towards the common one, see :mod:`gluonts_peft.items`. It takes 3
        ``validation_windows`` or more. None has one weight for all.
    seed
        Decides initialisation, windows, dropout and sample paths: same seed, same machine, same numbers.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
    precision
        A precision of Lightning; ``"auto"`` is bfloat16 where a GPU has it, else float32.
    time_limit
        What :meth:`train` may take, e.g. ``"10min"``, ``"1h30min"``, a number of seconds or a ``timedelta``; None means
        no limit. Zero-shot is scored first, however long that takes. The training ends in time for its verdict, within
        an epoch if need be, and the best epoch so far is handed over; zero-shot if there was time for none, with a
        warning. A run that is gone on with has spent what its training took until its last whole epoch. Where the clock
        ended it, ``fit.stopped`` is ``"time_limit"``: a repetition may end elsewhere.
    folder
        Where training checkpoints and, for large data, the memory-mapped series go. None writes nothing to disk.
    backbone_options
        Options of the family.
    tasks
        Several tasks to train for at once, see :func:`gluonts_peft.objectives.parse_tasks`; None trains for forecasts
        of ``prediction_length`` steps. The gate then scores all of them together, relative to zero-shot, and
        ``fit.tasks`` each; where the checkpoint brings no forecasting head, a task that got worse is a warning.
    progress
        Show a progress bar.
    trainer_kwargs
        Further arguments of ``lightning.pytorch.Trainer``: those in :data:`gluonts_peft.trainer_kwargs.ACCEPTED`.
        Others are options here, or would break the loop, and are refused.
    unusable
        What becomes of series that give no window to train or validate on, as they are too short or nothing of them was
        observed: ``"raise"``, or ``"skip"``, which leaves them out and warns with their names.
    any_freq
        Train also on data whose every series was observed on a coarser grid than its frequency says, which are else
        refused.
    """

    __version__: str = __version__
    backbone_class: ClassVar[type[Backbone]]
    default_checkpoint: ClassVar[str]

    def __new__(cls, *arguments: Any, **options: Any) -> PeftEstimator:
        """Refuse numbers that the conversion to the types of the constructor would change without a word."""
        try:
            given = inspect.signature(cls.__init__).bind_partial(None, *arguments, **options).arguments
        except TypeError:
            # The constructor says it better.
            given = {}
        for name in _WHOLE:
            value = given.get(name)
            if isinstance(value, _TRUTH) or isinstance(value, float) and not value.is_integer():
                raise ValueError(f"{name} {value!r} is not a whole number")
        for name in _NUMBERS:
            if isinstance(given.get(name), _TRUTH):
                raise ValueError(f"{name} {given[name]!r} is not a number")
        return super().__new__(cls)  # type: ignore[no-any-return]

    @validated()  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(
        self,
        prediction_length: int,
        context_length: int | None = None,
        checkpoint: str | None = None,
        adapter: Any = "lora",
        max_epochs: int = 10,
        num_batches_per_epoch: int = 50,
        batch_size: int = 32,
        learning_rate: float | None = None,
        weight_decay: float = 0.0,
        warmup: float = 0.1,
        gradient_clip_val: float = 1.0,
        patience: int = 5,
        min_context: int | None = None,
        validation_windows: int = 1,
        max_validation_windows: int = 1024,
        gate: str = "fallback",
        verdict_unit: str = "series",
        interpolate: bool = True,
        calibrate: bool = False,
        by: str | None = None,
        seed: int = 0,
        device: str = "auto",
        precision: str = "auto",
        time_limit: Any = None,
        folder: str | None = None,
        backbone_options: dict | None = None,  # type: ignore[type-arg]
        tasks: list | None = None,  # type: ignore[type-arg]
        progress: bool = True,
        trainer_kwargs: dict | None = None,  # type: ignore[type-arg]
        unusable: str = "raise",
        any_freq: bool = False,
    ) -> None:
        super().__init__()
        if prediction_length <= 0:
            raise ValueError(f"prediction_length {prediction_length} is not positive; name the steps to forecast")
        for name, value in (
            ("context_length", context_length),
            ("min_context", min_context),
            ("validation_windows", validation_windows),
            ("max_validation_windows", max_validation_windows),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{name} {value} is not positive")
        if folder == "":
            raise ValueError("folder '' is no folder; name one, or leave it out to write nothing to disk")
        if gate not in GATES:
            raise ValueError(unknown("gate", gate, GATES))
        if verdict_unit not in UNITS:
            raise ValueError(unknown("verdict_unit", verdict_unit, UNITS))
        if by is not None:
            _check_by(by, validation_windows, interpolate, calibrate)
        self.prediction_length = prediction_length
        self.context_length = context_length
        self.checkpoint = self.default_checkpoint if checkpoint is None else checkpoint
        wanted = get_adapter(adapter)
        wanted.require_trainable()
        self.adapter = wanted.spec
        self.options = TrainingOptions(
            max_epochs=max_epochs,
            num_batches_per_epoch=num_batches_per_epoch,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup=warmup,
            gradient_clip_val=gradient_clip_val,
            patience=patience,
            seed=seed,
            device=device,
            precision=precision,
            time_limit=time_limit,
        )
        # What a time limit is measured with.
        self.clock: Callable[[], float] = time.monotonic
        # Networks to share with other estimators of this process, see `Networks`.
        self.networks: Networks | None = None
        self.min_context = min_context
        self.validation_windows = validation_windows
        self.max_validation_windows = max_validation_windows
        self.gate = gate
        self.verdict_unit = verdict_unit
        self.interpolate = interpolate
        self.calibrate = calibrate
        self.by = by
        if by is not None:
            _check_weights(wanted)
        self.folder = None if folder is None else Path(folder)
        self.backbone_options = dict(backbone_options or {})
        self.tasks = None if tasks is None else parse_tasks(tasks, prediction_length)
        if self.tasks is not None and "cache" in wanted.alone and wanted.options.get("cache"):
            raise ValueError(
                f"adapter {wanted!r}: option 'cache' has no effect with tasks, which look at more than the features;"
                " leave it out"
            )
        self.progress = progress
        self.trainer_kwargs = dict(trainer_kwargs or {})
        check_trainer_kwargs(self.trainer_kwargs)
        self.unusable = check_unusable(unusable)
        self.any_freq = any_freq
        # Series of each part that the last training left out.
        self.skipped: dict[str, int] = {}

    @classmethod
    def from_hyperparameters(cls, **hyperparameters: Any) -> PeftEstimator:
        """Build an estimator from a mapping; unlike GluonTS's own, unknown names are an error.

        Raises
        ------
        ValueError
            If a name is unknown or a value cannot be used.
        """
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for name in hyperparameters:
            if name not in known:
                raise ValueError(unknown("hyperparameter", name, known))
        estimator: PeftEstimator = cls(**hyperparameters)
        return estimator

    def load_backbone(self) -> Backbone:
        """Load the pretrained model, without an adapter."""
        return self.backbone_class.from_checkpoint(
            self.checkpoint,
            prediction_length=self.prediction_length,
            context_length=self.context_length,
            # Families that build their network otherwise need not know of it.
            **({} if self.networks is None else {"networks": self.networks}),
            **self.backbone_options,
        )

    def train(
        self,
        training_data: Dataset,
        validation_data: Dataset | None = None,
        ckpt_path: str | None = None,
        item_data: Dataset | None = None,
    ) -> PeftPredictor:
        """Tune on a GluonTS dataset.

        Parameters
        ----------
        training_data
            Where training windows are drawn from.
        validation_data
            Its last windows decide which weights are handed over, and the verdict. If None, the labels of the last
            ``validation_windows`` windows of each training series are held out for this and not trained on, with a task
            ``reconstruct`` their histories too. So are labels of `validation_data` that lie inside the training data of
            the same item (same ``item_id``, or equal series), with a warning.

            Adapters that score themselves, such as ``trace``, set further windows
            apart before these.
        ckpt_path
            Training checkpoint to go on from, or ``"last"``: that of ``folder`` if there is one.
        item_data
            Series whose last ``validation_windows`` windows choose their weights, with `by`: the histories of what is
            to be forecast. Those that are too short have the common weight. If None, the validation data choose.

        Returns
        -------
        PeftPredictor
            With ``verdict``, ``calibration``, and ``fit``: epochs, seconds and losses.

        Raises
        ------
        ValueError
            If the data, a checkpoint or an option cannot be used, or a series with ``unusable="raise"``; the message
            says what and why. Of what is no dataset, or a wrong entry, it is a
            :class:`~gluonts_peft.series.entries.EntryError`.
        TuningDidNotHelp
            If ``gate="raise"`` and there is no evidence that tuning helped.
        """
        deadline = self.deadline()
        resolve_precision(self.options.precision, resolve_device(self.options.device))
        self.skipped = {}
        backbone = self.load_backbone()
        if self.tasks is not None and self.tasks.history:
            require_reconstruct(backbone)
        forecasts = self.tasks is None or self.tasks.forecasts
        adapter = get_adapter(_with_head(self.adapter, backbone) if forecasts else self.adapter)
        if self.by is not None:
            _check_weights(adapter)
            if backbone.untrained:
                raise ValueError(
                    f"checkpoint {backbone.source.checkpoint!r} has no forecasting head of its own, so that by has no"
                    " zero-shot to choose; leave by out"
                )
        elif item_data is not None:
            raise ValueError("item_data is there to choose weights by item; name by='item' too, or leave it out")
        store, door = self.keep_series(training_data, "training", backbone)
        held_out: Any = self.prediction_length * self.validation_windows if validation_data is None else 0
        if held_out and self.tasks is not None and self.tasks.history:
            held_out += backbone.context_length
        lengths: dict[str, Any] = {
            "context_length": backbone.past_length,
            "prediction_length": self.prediction_length,
            "min_context": self.min_context or min(backbone.context_length, self.prediction_length),
            "seed": self.options.seed,
            "time_features": backbone.time_features,
        }
        held_out_store, held_out_door = store, door
        if validation_data is not None:
            held_out_store, held_out_door = self.keep_series(validation_data, "validation", backbone, door.found_freq)
            label = self.prediction_length * self.validation_windows
            if self.tasks is not None and self.tasks.history:
                label += backbone.context_length
            held_out = _without_labels(store, held_out_store, (door.names, held_out_door.names), label, self.calibrate)
        windows = Windows(store, holdout=held_out, **lengths)
        self.settle("training", "trained on", windows, door)
        held_out_windows = Windows(held_out_store, **lengths)
        if validation_data is not None:
            self.settle("validation", "validated on", held_out_windows, held_out_door)
        last = held_out_windows.last(windows=self.validation_windows, max_windows=self.max_validation_windows)
        calibrator = None
        if self.calibrate:
            require_quantiles(backbone, adapter.head_levels, last)
            last, apart, untrained = set_apart(last, self.verdict_unit, own=validation_data is None)
            calibrator = Calibrator(apart, self.verdict_unit)
            if untrained.any():
                windows = Windows(store, holdout=np.where(untrained, store.lengths, held_out), **lengths)
            if deadline is not None and not backbone.untrained:
                # What it will cost at the end.
                backbone.to(resolve_device(self.options.device))
                with deadline.measuring("calibration"):
                    calibrator.learn(backbone)
        validation = list(last)
        items = None
        if self.by is not None:
            judged, names = last, held_out_door.names
            if item_data is not None:
                item_store, item_door = self.keep_series(item_data, "items", backbone, door.found_freq)
                judged, names = Windows(item_store, **lengths).last(self.validation_windows), item_door.names
            items = ItemJudge(
                judged,
                names,
                by=self.by,
                tasks=None if self.tasks is None else self.tasks.judged,
                keep=self.gate == "keep",
            )
        joint, before, levels = self.tasks, {}, adapter.head_levels
        score = None
        if joint is not None:
            if joint.history and adapter_names(adapter.spec) == {"head"}:
                raise ValueError(
                    f"adapter {adapter!r} trains the forecasting head alone, which has no part in the task"
                    " 'reconstruct'; add another, e.g. ['lora', 'head'], or leave the task out"
                )
            backbone.to(resolve_device(self.options.device))
            begun = self.clock()
            before = joint.scores(backbone, validation, levels, forecasts=not backbone.untrained)
            if deadline is not None:
                deadline.expect("after", self.clock() - begun)
            # Losses of a new head and of the model's own differ in kind.
            joint = joint.scaled(before, forecasts=levels is None)
            if before and not (backbone.untrained and joint.forecasts):
                score = partial(_relative, joint, backbone, validation, levels, before)
        result = fit(
            backbone,
            adapter,
            windows,
            validation,
            self.options,
            folder=self.folder,
            ckpt_path=ckpt_path,
            progress=self.progress,
            trainer_kwargs=self.trainer_kwargs,
            loss=joint,
            score=score,
            judge=Judge(last, unit=self.verdict_unit, tasks=None if joint is None else joint.judged),
            interpolate=self.interpolate,
            deadline=deadline,
            items=items,
        )
        if joint is not None:
            names, diverged = [task.name for task in joint.tasks], not math.isfinite(result.gate.tuned)
            after = dict.fromkeys(names, math.inf) if diverged else joint.scores(backbone, validation, levels)
            scores = {name: {"before": before[name]} if name in before else {} for name in after}
            result = replace(result, tasks={name: {**scores[name], "after": after[name]} for name in after})
            if score is None:
                # There was no head to forecast with before.
                result = replace(result, gate=replace(result.gate, zero_shot=None))
                for name, earlier in before.items():
                    if not after[name] < earlier:
                        worse = f"no better than before: loss {earlier:.5g} before, {after[name]:.5g} after"
                        warnings.warn(TuningDidNotHelp(f"adapter {adapter!r}, task {name!r}: {worse}"), stacklevel=2)
        found = None if items is None else items.found
        return self.hand_over(backbone, adapter, result, door.found_freq, calibrator, found)

    def deadline(self) -> Deadline | None:
        """Return the limit of a training that begins now."""
        return None if self.options.time_limit is None else Deadline(self.options.time_limit, self.clock)

    def hand_over(
        self,
        backbone: Backbone,
        adapter: Adapter,
        result: Fit,
        freq: str | None,
        calibrator: Calibrator | None = None,
        items: Items | None = None,
    ) -> PeftPredictor:
        """Return the tuned predictor, or what ``gate`` wants without evidence that tuning helped."""
        if result.stopped == TIME_LIMIT and not math.isfinite(result.gate.tuned):
            self._refuse_untrained(backbone, adapter)
        elif not result.gate.passed and adapter.num_parameters() and items is None:
            message = f"adapter {adapter!r} on {backbone.source.checkpoint!r}: {result.verdict or result.gate}"
            if self.gate == "raise":
                raise TuningDidNotHelp(message)
            if self.gate == "fallback":
                warnings.warn(
                    TuningDidNotHelp(f"{message}; the zero-shot predictor is returned (gate='keep' keeps the tuned)"),
                    stacklevel=3,
                )
                adapter.detach()
        tuned = backbone.adapter is not None and backbone.adapter.num_parameters() > 0
        return PeftPredictor(
            backbone,
            fit=result,
            seed=self.options.seed,
            device=self.options.device,
            freq=freq if tuned or calibrator is not None else None,
            calibration=None if calibrator is None else calibrator.learn(backbone),
            items=items,
        )

    def _refuse_untrained(self, backbone: Backbone, adapter: Adapter) -> None:
        """Go back to zero-shot where the clock left no epoch, not even a part of one, that was judged."""
        limit = spelled(self.options.time_limit or 0.0)
        message = f"adapter {adapter!r} on {backbone.source.checkpoint!r}: time_limit {limit} left no time to train it"
        if backbone.untrained:
            raise ValueError(f"{message}, and the checkpoint has no forecasting head of its own; give it more time")
        if self.gate == "raise":
            raise TuningDidNotHelp(f"{message}; give it more time")
        warnings.warn(TuningDidNotHelp(f"{message}; the zero-shot predictor is returned"), stacklevel=4)
        adapter.detach()

    def keep_series(
        self, dataset: Dataset, name: str, backbone: Backbone, freq: str | None = None
    ) -> tuple[SeriesStore, Door]:
        """Check the entries of a dataset and keep their series, in ``folder`` if there is one.

        Parameters
        ----------
        dataset
            GluonTS dataset.
        name
            What part it is, ``"training"``, ``"validation"`` or ``"items"``: its place in the folder.
        backbone
            That the series are for.
        freq
            Frequency that they must have, if one is known.

        Returns
        -------
        SeriesStore, Door
            The series; and the check that they passed, which knows their names and frequency.
        """
        door = Door("trained on", backbone=backbone, freq=freq, any_freq=self.any_freq, complete=True)
        entries = door.open(dataset)
        kinds: dict[str, Any] = {
            "features": "covariates" in backbone.capabilities,
            "multivariate": "multivariate" in backbone.capabilities,
        }
        if self.folder is None:
            return SeriesStore.from_dataset(entries, **kinds), door
        folder = self.folder / "series" / name
        # What an earlier run left there may be of other data.
        shutil.rmtree(folder, ignore_errors=True)
        return SeriesStore.from_dataset(entries, folder, **kinds), door

    def settle(self, part: str, verb: str, windows: Windows, door: Door) -> None:
        """Raise, or warn and count, where series give no window: what ``unusable`` says.

        Parameters
        ----------
        part
            ``"training"`` or ``"validation"``, for ``skipped``.
        verb
            What is done with the windows, for messages.
        windows, door
            The windows, and the check that their series passed.
        """
        unusable = Unusable(verb, self.unusable)
        self.skipped[part] = len(windows.left_out())
        for number, lack in windows.left_out():
            unusable.add(called(door.names[number], number), lack)
        unusable.settle(len(windows.store))


def _check_by(by: str, validation_windows: int, interpolate: bool, calibrate: bool) -> None:
    """Refuse options that leave nothing to choose, or nothing to choose by."""
    if by not in BY:
        raise ValueError(unknown("by", by, BY))
    if validation_windows <= LEAST_WINDOWS:
        raise ValueError(
            f"by {by!r} needs more than {LEAST_WINDOWS} windows of an item to choose by, and validation_windows is"
            f" {validation_windows}; name {LEAST_WINDOWS + 1} or more"
        )
    if calibrate:
        raise ValueError(
            f"by {by!r} and calibrate do not go together: quantiles are calibrated for one weight; leave one out"
        )
    if not interpolate:
        raise ValueError(f"by {by!r} needs weights to choose from; leave interpolate=False out")


def _check_weights(adapter: Adapter) -> None:
    """Refuse adapters that have no weights between zero-shot and tuned for items to choose from."""
    if adapter.head_levels is not None or adapter.scoring_windows:
        why = "begins at random" if adapter.head_levels is not None else "changes its form while it trains"
        raise ValueError(f"adapter {adapter!r} {why}, so that by has no weights to choose from; leave by out")


def _declared(kind: str) -> list[str]:
    """Return the arguments that the constructor declares to be of a type."""
    parameters = inspect.signature(PeftEstimator.__init__).parameters
    return [name for name, parameter in parameters.items() if kind in str(parameter.annotation).split(" | ")]


_WHOLE, _NUMBERS, _TRUTH = _declared("int"), _declared("float"), (bool, np.bool_)


def _with_head(spec: Any, backbone: Backbone) -> Any:
    """Add the head to an adapter where the checkpoint brings none: it has to be trained whatever else is."""
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


def _relative(
    joint: Joint,
    backbone: Backbone,
    validation: Sequence[Mapping[str, Any]],
    levels: Sequence[float] | None,
    before: Mapping[str, float],
) -> float:
    return joint.relative(joint.scores(backbone, validation, levels), before)


def _without_labels(
    store: SeriesStore, validation: SeriesStore, names: tuple[list[Any], list[Any]], label: int, calibrate: bool
) -> Any:
    """Return the steps at the end of each training series that hold validation labels; 0 if none does."""
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
        stacklevel=3,
    )
    return held
