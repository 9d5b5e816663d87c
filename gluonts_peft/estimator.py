"""The GluonTS estimator: one class for all families and adapters."""

from __future__ import annotations

import inspect
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from gluonts.core.component import validated
from gluonts.dataset.common import Dataset
from gluonts.model.estimator import Estimator

from . import __version__
from .adapters.load import get_adapter
from .backbone import Backbone
from .calibration import Calibrator
from .deadline import TIME_LIMIT, Deadline, spelled
from .errors import unknown
from .items import Items, check_by, require_weights
from .objectives import parse_tasks
from .predictor import PeftPredictor
from .preparation import TrainingTask, parse_task
from .series.entries import Door, Unusable, called, check_unusable
from .series.frames import from_dataframe, is_dataframe
from .series.store import SeriesStore
from .series.windows import Windows
from .trainer_kwargs import check_trainer_kwargs, resolve_precision
from .training import Fit, TrainingOptions, TuningDidNotHelp, fit, resolve_device
from .verdict import UNITS

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
        Minimum steps of history in a training or validation window; ``min(context_length, prediction_length)`` if None.
    validation_windows
        Number of validation windows per series: the last ones, ``prediction_length`` apart.
    max_validation_windows
        Maximum number of validation windows; of more, an evenly spaced part is used.
    gate
        What to hand over if there is no evidence on the validation windows that the tuned model is better than
        zero-shot, see :class:`gluonts_peft.verdict.Verdict`: ``"fallback"`` warns
        (:class:`~gluonts_peft.TuningDidNotHelp`) and returns the zero-shot predictor, ``"raise"`` raises it,
        ``"keep"`` returns the tuned predictor nevertheless. The verdict is recorded in any case; if only a proof will
        do, ask for ``predictor.verdict.proven``.
    verdict_unit
        Independent unit of the verdict: ``"series"``, or ``"patients"`` if several series come from one patient, whose
        name precedes the first ``/`` of an item id.
    interpolate
        Whether weights between the pretrained and the tuned model may be handed over too, see
        :func:`gluonts_peft.training.fit`.
    calibrate
        Recalibrate the quantiles of the predictor, tuned or zero-shot, on units that are used neither for training nor
        for choosing epoch and weight, see :mod:`gluonts_peft.calibration`: half of the validation units, at least 20;
        without validation data a fifth of the training units, which are then not trained on; with a single series half
        of its validation windows. The calibration is stored with the predictor, not with the adapter.
    by
        Let each ``"item"``, or each of the ``"patients"`` as in `verdict_unit`, choose its own weight by its history if
        that is long enough, shrunk towards the common weight, see :mod:`gluonts_peft.items`. Needs 3
        ``validation_windows`` or more. None means one weight for all.
    seed
        Seed of initialisation, sampled windows, dropout and sample paths: same seed and machine, same numbers.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
    precision
        A precision of Lightning; ``"auto"`` is bfloat16 on GPUs that support it, else float32.
    time_limit
        Time for :meth:`train`, e.g. ``"10min"``, ``"1h30min"``, a number of seconds or a ``timedelta``; None means no
        limit. Zero-shot is scored first, however long that takes. Training stops early enough for the verdict, within
        an epoch if need be, and the best epoch so far is handed over; if there was time for none, zero-shot with a
        warning. A resumed run has used the time that its complete epochs took. If time ran out, ``fit.stopped`` is
        ``"time_limit"``: a repetition may stop at another step.
    folder
        Folder of training checkpoints and memory-mapped series; None writes nothing to disk.
    backbone_options
        Options of the family.
    tasks
        Several tasks to train for at once, see :func:`gluonts_peft.objectives.parse_tasks`; None trains for forecasts
        of ``prediction_length`` steps. The gate then scores all tasks together, relative to zero-shot, and
        ``fit.tasks`` has the scores of each; if the checkpoint has no forecasting head, a task that got worse is a
        warning.
    progress
        Show a progress bar.
    trainer_kwargs
        Further arguments of ``lightning.pytorch.Trainer``: those in :data:`gluonts_peft.trainer_kwargs.ACCEPTED`.
        Others are refused: they are options of this class, or would break the training loop.
    unusable
        How to treat series that yield no training or validation window, as they are too short or have no observed
        value: ``"raise"``, or ``"skip"``, which leaves them out with a warning that names them.
    any_freq
        Accept data whose series were all observed on a coarser grid than their frequency, which are otherwise refused.
    task
        What to train for: ``"forecast"``; or, for anomalies and gaps, ``"reconstruct"``, by families with that
        capability. Options are given as ``{"task": "reconstruct", "mask_ratio": 0.3, "held_out": 0.2}``, see
        :class:`gluonts_peft.preparation.Reconstructing`. Verdict and gate then rest on the reconstruction loss, and
        ``prediction_length`` and ``validation_windows`` have no effect.
    """

    __version__: str = __version__
    backbone_class: ClassVar[type[Backbone]]
    default_checkpoint: ClassVar[str]

    def __new__(cls, *arguments: Any, **options: Any) -> PeftEstimator:
        """Refuse numbers that conversion to the types of the constructor would silently change."""
        try:
            given = inspect.signature(cls.__init__).bind_partial(None, *arguments, **options).arguments
        except TypeError:
            # The constructor has a better message.
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
        task: Any = "forecast",
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
            check_by(by, validation_windows, interpolate, calibrate)
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
        # Clock for the time limit.
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
            require_weights(wanted)
        self.folder = None if folder is None else Path(folder)
        self.backbone_options = dict(backbone_options or {})
        self.tasks = None if tasks is None else parse_tasks(tasks, prediction_length)
        if self.tasks is not None and "cache" in wanted.alone and wanted.options.get("cache"):
            raise ValueError(
                f"adapter {wanted!r}: option 'cache' has no effect with tasks, which look at more than the features;"
                " leave it out"
            )
        self.task: TrainingTask = parse_task(task)
        self.task.check(self)
        self.progress = progress
        self.trainer_kwargs = dict(trainer_kwargs or {})
        check_trainer_kwargs(self.trainer_kwargs)
        self.unusable = check_unusable(unusable)
        self.any_freq = any_freq
        # Number of series that the last training left out, for each role of a dataset.
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
            # Only where given: families that override from_checkpoint need not accept it.
            **({} if self.networks is None else {"networks": self.networks}),
            **self.backbone_options,
        )

    def train(
        self,
        training_data: Dataset,
        validation_data: Dataset | None = None,
        ckpt_path: str | None = None,
        item_data: Dataset | None = None,
        *,
        item_id: str | None = "item_id",
        timestamp: str = "timestamp",
        target: str = "target",
        known: Sequence[str] = (),
        past: Sequence[str] = (),
    ) -> PeftPredictor:
        """Tune on a GluonTS dataset, or on a data frame.

        Parameters
        ----------
        training_data
            Data that training windows are drawn from: a GluonTS dataset, or a frame of pandas, polars or pyarrow with
            one row per item and time.
        validation_data
            Their last windows decide which weights are handed over, and the verdict. If None, the labels of the last
            ``validation_windows`` windows of each training series are held out and not trained on; with a task
            ``reconstruct`` their histories too. Labels of `validation_data` that lie inside the training data of the
            same item (same ``item_id``, or equal series) are not trained on either, with a warning.

            For adapters that score themselves, such as ``trace``, the windows before these are held out too.
        ckpt_path
            Training checkpoint to resume from, or ``"last"``: that of ``folder`` if there is one.
        item_data
            Series whose last ``validation_windows`` windows choose their weights, with `by`: the histories of the
            series to forecast. Those that are too short have the common weight. If None, the validation data choose.
        item_id, timestamp, target, known, past
            Columns of data frames, see :func:`gluonts_peft.series.frames.from_dataframe`.

        Returns
        -------
        PeftPredictor
            With ``verdict``, ``calibration``, and ``fit``: epochs, seconds and losses.

        Raises
        ------
        ValueError
            If the data, a checkpoint or an option cannot be used, or a series with ``unusable="raise"``; the message
            says which and why. For wrong entries, and for anything that is not a dataset, it is an
            :class:`~gluonts_peft.series.entries.EntryError`.
        TuningDidNotHelp
            If ``gate="raise"`` and there is no evidence that tuning helped.
        """
        columns: dict[str, Any] = dict(item_id=item_id, timestamp=timestamp, target=target, known=known, past=past)
        training_data, validation_data, item_data = (
            from_dataframe(data, **columns) if is_dataframe(data) else data
            for data in (training_data, validation_data, item_data)
        )
        deadline = self.deadline()
        resolve_precision(self.options.precision, resolve_device(self.options.device))
        self.skipped = {}
        self.task.check(self)
        backbone = self.load_backbone()
        run = self.task.prepare(self, backbone, training_data, validation_data, item_data, deadline)
        result = fit(
            backbone,
            run.adapter,
            run.windows,
            run.validation,
            self.options,
            folder=self.folder,
            ckpt_path=ckpt_path,
            progress=self.progress,
            trainer_kwargs=self.trainer_kwargs,
            loss=run.loss,
            score=run.score,
            judge=run.judge,
            interpolate=self.interpolate,
            deadline=deadline,
            items=run.items,
        )
        found = None if run.items is None else run.items.found
        return self.hand_over(backbone, run.adapter, run.finish(result), run.freq, run.calibrator, found)

    def deadline(self) -> Deadline | None:
        """Return the deadline of a training that begins now, None without a time limit."""
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
        """Return the tuned predictor, or what ``gate`` says if there is no evidence that tuning helped."""
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
        """Return to zero-shot if time was up before even a part of an epoch was judged."""
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
        """Check the entries of a dataset and store their series, in ``folder`` if there is one.

        Parameters
        ----------
        dataset
            GluonTS dataset.
        name
            Role of the dataset, ``"training"``, ``"validation"`` or ``"items"``, and its place in the folder.
        backbone
            The model that the series are for.
        freq
            Frequency that they must have; None accepts any.

        Returns
        -------
        SeriesStore, Door
            The series, and the check that they passed, which knows their ids and frequency.
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
        # An earlier run may have left other data there.
        shutil.rmtree(folder, ignore_errors=True)
        return SeriesStore.from_dataset(entries, folder, **kinds), door

    def settle(self, part: str, verb: str, windows: Windows, door: Door) -> None:
        """Raise, or warn and count, if series yield no window, as ``unusable`` says.

        Parameters
        ----------
        part
            ``"training"`` or ``"validation"``, the key in ``skipped``.
        verb
            What the windows are used for, in messages.
        windows, door
            The windows, and the check that their series passed.
        """
        unusable = Unusable(verb, self.unusable)
        self.skipped[part] = len(windows.left_out())
        for number, lack in windows.left_out():
            unusable.add(called(door.names[number], number), lack)
        unusable.settle(len(windows.store))


def _declared(kind: str) -> list[str]:
    """Return the names of the arguments of the constructor that are annotated with a type."""
    parameters = inspect.signature(PeftEstimator.__init__).parameters
    return [name for name, parameter in parameters.items() if kind in str(parameter.annotation).split(" | ")]


_WHOLE, _NUMBERS, _TRUTH = _declared("int"), _declared("float"), (bool, np.bool_)
