"""What a trial and a study are, as plain data: read from YAML, checked at once, and put into a normal form.

Equal trials are equal data: defaults are filled in, options without effect are refused or reset, and a spec's
:meth:`TrialSpec.hash` is the name of its folder. Nothing here imports torch.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from ..calibration import Calibration
from ..deadline import parse_time_limit
from ..errors import unknown
from ..files import NewerFormat, check_regular, load_json, opened, parse_yaml, record, write_atomically
from ..registry import Registry, adapters, families
from ..trainer_kwargs import check_precision
from ..verdict import Verdict

__all__ = [
    "BASELINE",
    "BOOSTED",
    "FROM_SCRATCH",
    "NAIVE",
    "PACKAGES",
    "STATISTICAL",
    "TRAINED",
    "DataSpec",
    "SpecError",
    "StudySpec",
    "TrainingSpec",
    "TrialResult",
    "TrialSpec",
    "describe_adapter",
    "load_study",
    "missing_package",
]

BASELINE = "baseline"
RESULT = "result.json"

Naive = Literal["seasonal_naive", "last_value"]
Statistical = Literal["auto_ets", "auto_theta"]
Boosted = Literal["lightgbm"]
Trained = Literal["deepar", "patch_tst", "simple_feedforward", "tft", "nbeats", "nhits"]
Source = Literal["simulated", "hourly", "file", "synthetic"]

#: Baselines that repeat values, that are fitted to the history of each window, trees, and networks from scratch.
NAIVE: tuple[str, ...] = get_args(Naive)
STATISTICAL: tuple[str, ...] = get_args(Statistical)
BOOSTED: tuple[str, ...] = get_args(Boosted)
TRAINED: tuple[str, ...] = get_args(Trained)
_BASELINES = NAIVE + STATISTICAL + BOOSTED + TRAINED

#: What a baseline needs beside this package, all of it in the extra ``baselines``.
PACKAGES = {
    **dict.fromkeys(STATISTICAL, "statsforecast"),
    **dict.fromkeys(BOOSTED, "lightgbm"),
    **dict.fromkeys(("nbeats", "nhits"), "neuralforecast"),
}

#: How a study trains its baselines unless it says otherwise: random weights need more steps than an adapter.
FROM_SCRATCH: dict[str, Any] = {"max_epochs": 40}
# What decides which windows are seen is the same for baselines and adapters.
_WINDOWS = ("min_context", "validation_windows", "max_validation_windows")
_SHARED_TRAINING = ("batch_size", *_WINDOWS, "device", "precision")
# What decides how zero-shot is calibrated.
_CALIBRATING = ("calibrate", *_WINDOWS)

_OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "simulated": {"patients": 200, "hours": 48, "seed": 0},
    "hourly": {"patients": None, "min_hours": 48},
    "file": {"freq": None},
    "synthetic": {"series": 100, "steps": 200, "seed": 0},
}
_READ = ("hourly", "file")
# Options of the data that version 0.1 did not have.
_LATER = ("season", "folds", "fold")
#: Folds at most: each is a training of its own.
MOST_FOLDS = 100


class SpecError(ValueError):
    """A spec cannot be used; the message lists every fault.

    Parameters
    ----------
    what
        The thing that is wrong, e.g. ``"trial"``.
    faults
        A sentence each, with the path of the option.
    """

    def __init__(self, what: str, faults: Sequence[str]) -> None:
        self.what = what
        self.faults = list(dict.fromkeys(faults))
        count = len(self.faults)
        text = self.faults[0] if count == 1 else f"{count} faults" + "".join(f"\n- {fault}" for fault in self.faults)
        super().__init__(f"{what} cannot be used: {text}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.faults)


def _names(annotation: Any) -> list[str]:
    """Return the names of the types in an annotation: that itself, or the members of a union."""
    return [getattr(each, "__name__", str(each)) for each in (get_args(annotation) or (annotation,))]


class StrictSpec(BaseModel):
    """Immutable, without unknown keys, and with readable errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SpecError(type(self).__name__.removesuffix("Spec").lower(), _faults(type(self), error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not {"bool", "Any"} & set(
            _names(cls.model_fields[str(info.field_name)].annotation)
        ):
            raise ValueError(f"{json.dumps(value)} is neither a number nor a name")
        return value

    # Without this mark pydantic would call __init__ for nested specs too, and their faults would lose their path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def normal_form(self) -> dict[str, Any]:
        """Return the spec as JSON values, all defaults spelled out."""
        form: dict[str, Any] = self.model_dump(mode="json")
        return form


class DataSpec(StrictSpec):
    """Which series, and how they are divided.

    Parameters
    ----------
    source
        ``"simulated"`` (:func:`gluonts_peft.vitals.simulate_vitals`: no patient ever had these values), ``"hourly"``
        (:func:`gluonts_peft.vitals.load_hourly`), ``"file"`` (:func:`gluonts_peft.series.table.read_dataset`) or
        ``"synthetic"`` (:func:`gluonts_peft.synthetic.sample_series`, taken as hourly: the recipe that bundled
        checkpoints were pretrained on).
    path
        File or folder, for the sources that read one.
    patients, hours, seed
        Of the simulator; 200, 48 and 0 if not given.
    series, steps, seed
        Of synthetic data; 100, 200 and 0 if not given.
    patients
        Of the hourly table: a table that says whose the stays are (:func:`gluonts_peft.vitals.load_hourly`). Without
        it, and without a column ``patient``, stays are divided, and those of one patient may be in several parts.
    min_hours
        Of the hourly table: shorter stays are left out; 48 if not given.
    freq
        Of a file, where it cannot be inferred.
    vital
        Keep the series of one vital sign: those whose item id ends in ``/<vital>``. None keeps all. The division is the
        same for each.
    group
        What is never divided: ``"patient"`` (what comes before the first ``/`` of an item id) or ``"item"``. By default
        ``"patient"``, for files ``"item"``.
    fractions
        Shares of training, validation and test groups, of all that the source has. Without a validation share the last
        steps of the training series are held out for it.
    folds, fold
        Cross-validation: the groups are dealt into so many disjoint parts of equal size, of which number ``fold``, from
        0, is tested; training and validation share the others in the proportion of their ``fractions``, whose last one
        becomes ``1 / folds``. So every group is tested exactly once by the trials of all folds. A study that names
        ``folds`` alone runs all of them, and its tables pool them.
    split_seed
        Seed of the division.
    windows
        Test windows a series, the last ones, each a horizon apart.
    train_series
        Train on so many series only, drawn by ``split_seed``; fewer are a part of more. None means all. A trial that
        trains nothing has None.
    train_steps
        Train on the last so many steps of each series only. None means all, as above.
    season
        Steps in a season, for MASE and for the seasonal naive baseline; that of the frequency by default.
    """

    source: Source = "simulated"
    path: str | None = None
    patients: int | str | None = None
    hours: int | None = Field(default=None, gt=0)
    series: int | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    seed: int | None = Field(default=None, ge=0)
    min_hours: int | None = Field(default=None, gt=0)
    freq: str | None = None
    vital: str | None = None
    group: Literal["patient", "item"] | None = None
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    folds: int | None = Field(default=None, ge=2, le=MOST_FOLDS)
    fold: int | None = Field(default=None, ge=0)
    split_seed: int = Field(default=0, ge=0)
    windows: int = Field(default=3, gt=0)
    train_series: int | None = Field(default=None, gt=0)
    train_steps: int | None = Field(default=None, gt=0)
    season: int | None = Field(default=None, gt=0)

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, dump: Any) -> dict[str, Any]:
        # Trials of earlier versions, which had no such options, keep their hash.
        form: dict[str, Any] = dump(self)
        return {name: value for name, value in form.items() if name not in _LATER or value is not None}

    @field_validator("patients", mode="before")
    @classmethod
    def _number_or_table(cls, value: Any) -> Any:
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if value is None or (isinstance(value, str) and value):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer() or value < 1:
            raise ValueError(f"{value!r} is neither a number of patients (simulated) nor the path of a table (hourly)")
        return int(value)

    @model_validator(mode="after")
    def _normal(self) -> DataSpec:
        own = _OWN_OPTIONS[self.source]
        kind = {"simulated": int, "hourly": str}.get(self.source)
        if kind is not None and self.patients is not None and not isinstance(self.patients, kind):
            wanted = "the path of a table that says whose the stays are" if kind is str else "a number of patients"
            raise ValueError(f"patients {self.patients!r} is not for source {self.source!r}; give {wanted}, or drop it")
        for source, options in _OWN_OPTIONS.items():
            for name in options:
                value = getattr(self, name)
                if name in own and value is None:
                    self._set(name, own[name])
                elif name not in own and value is not None:
                    raise ValueError(f"{name} {value!r} belongs to source {source!r}, not to {self.source!r}; drop it")
        if self.source not in _READ and self.path is not None:
            raise ValueError(
                f"path {self.path!r} has no use for source {self.source!r}; name source 'hourly' or 'file'"
            )
        if self.source in _READ and not self.path:
            raise ValueError(f"source {self.source!r} needs a path; name the file as data.path")
        if self.source == "synthetic" and self.vital is not None:
            raise ValueError(f"vital {self.vital!r} is of no use: source 'synthetic' has no vital signs; drop it")
        if self.group is None:
            self._set("group", "patient" if self.source in ("simulated", "hourly") else "item")
        train, validation, test = self.fractions
        if min(train, test) <= 0 or validation < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(
                f"fractions {self.fractions} must be shares of training, validation and test that add up to 1, training"
                " and test above 0, as (0.7, 0.1, 0.2) are"
            )
        if self.fold is not None and (self.folds is None or self.fold >= self.folds):
            known = "data.folds is not given" if self.folds is None else f"there are those from 0 to {self.folds - 1}"
            raise ValueError(f"fold {self.fold} is none of the folds: {known}")
        if self.folds is not None and self.fold is None:
            raise ValueError(
                f"folds {self.folds}: a trial tests one of them; name it as data.fold, from 0 to {self.folds - 1}, or"
                " run a study, which tests all"
            )
        if self.folds is not None and abs(test - 1 / self.folds) > 1e-6:
            rest = (1 - 1 / self.folds) / (train + validation)
            self._set("fractions", (train * rest, validation * rest, 1 / self.folds))
        return self


# As people write it.
_TIME = WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}, {"type": "null"}]})


class TrainingSpec(StrictSpec):
    """How to train: the arguments of :class:`gluonts_peft.PeftEstimator` of the same names, with its defaults.

    ``calibrate`` counts for zero-shot too, so that both are compared as they would be handed over. A ``time_limit`` is
    kept in seconds; what it ends is not reproducible. ``verdict_unit`` None is ``"patients"`` where ``data.group`` is
    ``"patient"``, else ``"series"``. With ``by``, test series choose their weights by what lies before their first test
    window.
    """

    max_epochs: int = Field(default=10, gt=0)
    num_batches_per_epoch: int = Field(default=50, gt=0)
    batch_size: int = Field(default=32, gt=0)
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    gradient_clip_val: float = Field(default=1.0, ge=0)
    patience: int = Field(default=5, ge=0)
    min_context: int | None = Field(default=None, gt=0)
    validation_windows: int = Field(default=1, gt=0)
    max_validation_windows: int = Field(default=1024, gt=0)
    calibrate: bool = False
    device: str = "auto"
    precision: str = "auto"
    time_limit: Annotated[float | None, _TIME] = None
    verdict_unit: Literal["series", "patients"] | None = None
    interpolate: bool = True
    by: Literal["item", "patients"] | None = None

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, dump: Any) -> dict[str, Any]:
        # Trials of earlier versions, which had no such options, keep their hash.
        later = {"calibrate": False, "time_limit": None, "verdict_unit": None, "interpolate": True, "by": None}
        form: dict[str, Any] = dump(self)
        return {name: value for name, value in form.items() if name not in later or value != later[name]}

    @field_validator("time_limit", mode="before")
    @classmethod
    def _in_seconds(cls, value: Any) -> float | None:
        return parse_time_limit(value)

    @field_validator("precision")
    @classmethod
    def _known_precision(cls, value: str) -> str:
        check_precision(value)
        return value

    @model_validator(mode="after")
    def _windows_to_choose_by(self) -> TrainingSpec:
        if self.by is not None and self.calibrate:
            raise ValueError(f"by {self.by!r} and calibrate do not go together; leave one out")
        if self.by is not None and self.validation_windows < 3:
            raise ValueError(
                f"by {self.by!r} needs validation_windows of 3 or more to choose by, not {self.validation_windows}"
            )
        if self.by is not None and not self.interpolate:
            raise ValueError(f"by {self.by!r} needs weights to choose from; leave interpolate false out")
        return self


class TrialSpec(StrictSpec):
    """One fine-tuning and its backtest.

    Parameters
    ----------
    family
        Model family, or ``"baseline"``: then ``checkpoint`` is one of :data:`NAIVE`; of :data:`STATISTICAL`
        (:mod:`gluonts_peft.trials.statistical`); of :data:`BOOSTED` (:mod:`gluonts_peft.trials.boosting`), or of
        :data:`TRAINED`, networks that are trained from scratch (:mod:`gluonts_peft.trials.baselines`). The last two
        need a ``context_length``.
    checkpoint
        Bundled name, local folder or hub id with an optional ``@revision``.
    adapter
        A name, a mapping with a name and options, or a list of these. ``"none"`` is zero-shot.
    prediction_length, context_length
        Steps to forecast, and steps of history that the model sees at most. Test series in which it would see no value
        before a window are left out and counted, for baselines too, so that all are scored on the same windows.
    backbone_options
        Options of the family; of a baseline, those of its method or network.
    training
        How to train. Reset to the defaults where nothing trains. A network's own ``learning_rate`` is 1e-3. Of
        :data:`BOOSTED` it says which windows are trained and validated on, and the rest is reset.
    data
        Which series.
    seed
        Decides initialisation, training windows, dropout and sample paths. Baselines that are not trained have seed 0.
    ensemble
        Weight of the tuned model in an average with zero-shot, quantile by quantile: what is scored is
        ``ensemble * tuned + (1 - ensemble) * zero-shot``. None scores the tuned model alone. Reset where nothing is
        tuned.
    also
        Name -> further data on whose test windows the same predictor is scored, without training on them: whether
        tuning makes it forget. Their scores are called ``"<name>/<metric>"``.

    Raises
    ------
    SpecError
        If anything is unknown or has a value that cannot be used; all faults are listed.
    """

    family: str
    checkpoint: str
    adapter: Any = "lora"
    prediction_length: int = Field(gt=0)
    context_length: int | None = Field(default=None, gt=0)
    backbone_options: dict[str, Any] = Field(default_factory=dict)
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    data: DataSpec = Field(default_factory=DataSpec)
    seed: int = Field(default=0, ge=0)
    ensemble: float | None = Field(default=None, gt=0, lt=1)
    also: dict[str, DataSpec] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _normal(self) -> TrialSpec:
        trained = self.family == BASELINE and self.checkpoint in BOOSTED + TRAINED
        if self.family == BASELINE:
            _check_baseline(self.checkpoint)
            if self.adapter != "none":
                raise ValueError(f"adapter {self.adapter!r} cannot tune a baseline; write adapter 'none'")
            if trained and self.context_length is None:
                raise ValueError(f"baseline {self.checkpoint!r} has no context_length of its own; name one")
        else:
            _check_known(families, self.family, BASELINE)
        if self.family == BASELINE and self.checkpoint in NAIVE:
            self._set("backbone_options", {})
        if self.family == BASELINE and not trained:
            self._set("seed", 0)
            self._set("training", TrainingSpec())
        if self.family == BASELINE and self.checkpoint in BOOSTED:
            kept = {name: getattr(self.training, name) for name in _WINDOWS}
            self._set("training", TrainingSpec(**kept))
        self._set("adapter", _normal_adapter(self.adapter))
        if self.adapter == "none":
            self._set("ensemble", None)
        if self.adapter == "none" and self.family != BASELINE:
            names = ("device", "precision", *(_CALIBRATING if self.training.calibrate else ()))
            self._set("training", TrainingSpec(**{name: getattr(self.training, name) for name in names}))
        if self.ensemble is not None and self.training.calibrate:
            raise ValueError(
                f"ensemble {self.ensemble:g} averages quantiles, which undoes training.calibrate; drop one of them"
            )
        for name in self.also:
            if not name or "/" in name:
                raise ValueError(f"also: name {name!r} must be there and hold no '/'")
        untrained = {"train_series": None, "train_steps": None}
        self._set("also", {name: data.model_copy(update=untrained) for name, data in self.also.items()})
        own = (self.data.folds, self.data.fold)
        for name, data in self.also.items():
            if (data.folds, data.fold) not in ((None, None), own):
                raise ValueError(f"also.{name}: folds and fold are those of data, for further data too; drop them")
        divided = {} if own == (None, None) else {"folds": own[0], "fold": own[1]}
        self._set("also", {name: DataSpec(**data.normal_form() | divided) for name, data in self.also.items()})
        for data in self.also.values():
            if (data.source, data.path, data.patients) == (self.data.source, self.data.path, None):
                data._set("patients", self.data.patients)
        if not self.trains:
            self._set("data", self.data.model_copy(update=untrained))
        return self

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.adapter != "none" or (self.family == BASELINE and self.checkpoint in BOOSTED + TRAINED)

    def hash(self) -> str:
        """Return the SHA-256 of the normal form, in hexadecimal."""
        text = json.dumps(self.normal_form(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def name(self) -> str:
        """Return a short name for people; it need not be unique."""
        vital = [self.data.vital] if self.data.vital else []
        fold = [] if self.data.fold is None else [f"fold {self.data.fold}"]
        if self.family == BASELINE:
            seed = [f"seed {self.seed}"] if self.trains else []
            return " ".join([self.checkpoint, *vital, *seed, *fold])
        adapter = describe_adapter(self.adapter)
        if self.ensemble is not None:
            adapter += f" with weight {self.ensemble:g}"
        return " ".join([self.checkpoint, adapter, *vital, f"seed {self.seed}", *fold])


class TrialResult(StrictSpec):
    """What a trial found.

    Parameters
    ----------
    spec
        The trial.
    status, error
        ``"finished"``, or ``"failed"`` with the reason.
    scores
        Metric to value over all test windows, as :func:`gluonts_peft.backtest` names them; of the tuned model, whatever
        the verdict says. The trial with adapter ``"none"`` holds the zero-shot scores on the same windows. None where a
        score is not finite. Of data in ``TrialSpec.also`` under ``"<name>/<metric>"``.
    counts
        Series and windows that were scored, how many were skipped for which reason, and series to train on. Of
        statistical baselines ``simpler_...``: windows that a simpler method forecast, as it had to. Of trees the
        ``leaves``, of all levels.
    gate
        Validation losses ``zero_shot`` and ``tuned``, the number of ``windows``, whether tuning ``passed``, by its
        verdict; None where nothing trains.
    verdict
        That of the training, on the validation windows; None where nothing trains or there is no zero-shot forecast,
        and in results before version 0.2.
    calibration
        That of the predictor, with coverage before and after; None where none was asked for.
    trainable_parameters, epochs, steps, learning_rate
        Of the training; None for baselines that are not trained, and for trees.
    stopped
        ``"time_limit"`` if the clock ended the training: run again, it may give other numbers.
    seconds, seconds_forecast, seconds_total
        Of training with its validations, of forecasting the test windows, and of the trial with loading.
    peak_memory_mb
        See :func:`gluonts_peft.trials.run.run_trial`.
    device
        Where the model ran.
    adapter
        Folder of the predictor, relative to that of the trial; baselines are not stored.
    base
        Source and fingerprint of the pretrained weights.
    data_fingerprint
        SHA-256 over the three parts of the data.
    also_fingerprints
        The same of each of ``TrialSpec.also``, by its name.
    units
        What was never divided between the parts, ``"patient"``, ``"stay"`` (of which a patient may have several, in
        several parts) or ``"series"``: of the trial's own data under ``""``, of ``TrialSpec.also`` by its name.
    versions
        Of everything that decides the numbers.
    """

    spec: TrialSpec
    status: Literal["finished", "failed"]
    error: str | None = None
    scores: dict[str, float | None] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    gate: dict[str, float | int | bool | None] | None = None
    verdict: Verdict | None = None
    calibration: Calibration | None = None
    trainable_parameters: int | None = None
    epochs: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    stopped: str | None = None
    seconds: float | None = None
    seconds_forecast: float | None = None
    seconds_total: float | None = None
    peak_memory_mb: float | None = None
    device: str | None = None
    adapter: str | None = None
    base: dict[str, str | None] | None = None
    data_fingerprint: str | None = None
    also_fingerprints: dict[str, str] = Field(default_factory=dict)
    units: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _without_format(cls, values: Any) -> Any:
        # As it is on disk, for whoever reads the file by herself.
        return opened(values)

    def unit(self, name: str = "") -> str:
        """Return what was never divided in the trial's own data, or in further ones; see ``units``."""
        data = self.spec.also[name] if name else self.spec.data
        # Results of earlier versions do not say it; they knew the patients of no hourly table.
        earlier = "series" if data.group == "item" else "stay" if data.source == "hourly" else "patient"
        return self.units.get(name, earlier)

    def write(self, folder: Path) -> None:
        """Write ``result.json`` into a folder, whole or not at all."""
        write_atomically(folder / RESULT, json.dumps(record(self.normal_form()), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> TrialResult | None:
        """Read ``result.json`` of a folder; None if there is none.

        Raises
        ------
        SpecError
            If the file is damaged.
        """
        path = folder / RESULT
        if not path.exists():
            return None
        return from_record(cls, path, remedy="; delete the file to run the trial again")


class StudySpec(StrictSpec):
    """Many trials from a grid.

    Parameters
    ----------
    title
        Heading of the report.
    base
        What all trials share.
    grid
        Dotted path into the trial -> values; every combination is a trial.
    baselines
        Names, or mappings with a name and options, as ``{name: lightgbm, num_leaves: 15}``. Of :data:`NAIVE` and
        :data:`STATISTICAL`: run once on each combination of data and horizon; the others: once for each seed.
    baseline_training
        Options of :class:`TrainingSpec` for the networks among them, beside :data:`FROM_SCRATCH`. Batch size,
        validation windows and device are those of the trials.

    Raises
    ------
    SpecError
        If a path or value cannot be used in any of the trials; all faults are listed.
    """

    title: str = "Study"
    base: dict[str, Any]
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    baselines: tuple[Any, ...] = ()
    baseline_training: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _without_format(cls, values: Any) -> Any:
        # As it is on disk, for whoever reads the file by herself.
        return opened(values)

    @field_validator("baselines")
    @classmethod
    def _normal_baselines(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map(_normal_baseline, values))

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        faults = [
            f"grid path {path!r} has no values; name at least one" for path, each in self.grid.items() if not each
        ]
        if not faults:
            try:
                TrainingSpec(**self.baseline_training)
            except SpecError as error:
                faults = [f"baseline_training: {fault}" for fault in error.faults]
        if not faults:
            for form in (*self.forms(), *self.baseline_forms()):
                try:
                    TrialSpec(**form)
                except SpecError as error:
                    faults.extend(error.faults)
        if faults:
            raise SpecError("study", faults)
        return self

    def baseline_forms(self) -> Iterator[dict[str, Any]]:
        """Return the baselines of every combination of the grid's values; equal ones more than once."""
        # Naive baselines have no context of their own, but it decides which windows are scored.
        shared = ("prediction_length", "context_length", "data", "seed", "also")
        for baseline in self.baselines:
            name, options = _parts(baseline)
            for form in self.forms():
                # What is no mapping is a fault of the trials themselves.
                training = form["training"] if isinstance(form.get("training"), dict) else {}
                kept = {key: training[key] for key in _SHARED_TRAINING if key in training}
                yield {
                    "family": BASELINE,
                    "checkpoint": name,
                    "adapter": "none",
                    "backbone_options": options,
                    **{key: form[key] for key in shared if key in form},
                    "training": {**kept, **FROM_SCRATCH, **self.baseline_training},
                }

    def forms(self) -> Iterator[dict[str, Any]]:
        """Return the base with each combination of the grid's values in it, the last path varying fastest.

        One that names ``data.folds`` and no fold of them comes once for each.
        """
        for values in itertools.product(*self.grid.values()):
            form = merged(self.base, dict(zip(self.grid, values, strict=True)))
            data = form.get("data")
            folds = data.get("folds") if isinstance(data, dict) and data.get("fold") is None else None
            # What is no number of folds is a fault of the trial.
            if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= MOST_FOLDS:
                yield form
                continue
            for fold in range(folds):
                yield {**form, "data": {**form["data"], "fold": fold}}


def read_yaml(path: str | os.PathLike[str], what: str, keys: str) -> dict[str, Any]:
    """Read a study or a search: a mapping with a mapping ``base``.

    Raises
    ------
    SpecError
        If the file is missing, is not YAML, or is no such mapping; the message names the keys.
    """
    path = Path(path)
    try:
        check_regular(path)
        form, root = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SpecError(f"{what} '{path}'", [f"it cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        reason = str(error) if str(error).startswith("it ") else f"it is not YAML: {error}"
        raise SpecError(f"{what} '{path}'", [reason]) from error
    if repeated := _repeated_keys(root):
        raise SpecError(f"{what} '{path}'", repeated)
    if not isinstance(form, dict) or not isinstance(form.get("base"), dict):
        raise SpecError(f"{what} '{path}'", [f"expected a mapping with the keys {keys}"])
    return form


def mapping_of(form: Mapping[str, Any], name: str, what: str, holds: str) -> dict[str, Any]:
    """Return a copy of the part of a file that is a mapping, empty if it is not there.

    Raises
    ------
    SpecError
        If it is something else.
    """
    part = form.get(name)
    if part is not None and not isinstance(part, dict):
        raise SpecError(what, [f"{name} {part!r} is not a mapping of {holds}"])
    return dict(part or {})


def _repeated_keys(root: Any) -> list[str]:
    """Return a fault for each key that a mapping of YAML has twice: the second would silently replace the first."""
    import yaml

    faults, waiting, seen = [], [root], set[int]()
    while waiting:
        node = waiting.pop(0)
        # Aliases may lead in a circle.
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            waiting += node.value
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            waiting.append(value)
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    faults.append(f"line {line}: key {key.value!r} is there already, on line {lines[name]}; drop one")
                lines.setdefault(name, line)
    return faults


def read_record(folder: str | Path, name: str, what: str) -> dict[str, Any]:
    """Read the JSON file by which a folder is known as that of a study or a search.

    Raises
    ------
    SpecError
        If there is none, or it is not JSON.
    """
    path = Path(folder) / name
    if not path.exists():
        raise SpecError(f"folder '{folder}'", [f"it has no {name}; name the folder of a {what}"])
    content = read_json(path)
    if not isinstance(content, dict):
        raise SpecError(f"'{path}'", [f"it holds a {type(content).__name__}, not a mapping"])
    return content


def read_json(path: Path, remedy: str = "") -> Any:
    """Read a JSON record of a study, a search or a trial, without the number of its format.

    Raises
    ------
    SpecError
        If it is damaged, or written by a newer version.
    """
    try:
        return opened(load_json(path))
    except NewerFormat as error:
        raise SpecError(f"'{path}'", [f"it was {error}"]) from None
    except OSError as error:
        raise SpecError(f"'{path}'", [f"it cannot be read: {error.strerror}{remedy}"]) from error
    except ValueError as error:
        raise SpecError(f"'{path}'", [f"{error}{remedy}"]) from error


_S = TypeVar("_S", bound=StrictSpec)


def from_record(kind: type[_S], path: Path, content: Any = None, remedy: str = "") -> _S:
    """Build a spec or result from a JSON record, see :func:`read_json`, or from a part of it."""
    content = read_json(path, remedy) if content is None else content
    try:
        return kind(**content)
    except SpecError as error:
        newer = [fault for fault in error.faults if "option " in fault and " is unknown" in fault]
        if newer:
            raise SpecError(
                f"'{path}'", [f"it was written by a newer version of gluonts-peft ({newer[0]}): update it"]
            ) from error
        raise SpecError(f"'{path}'", [f"{fault}{remedy}" for fault in error.faults]) from error
    except (ValueError, TypeError) as error:
        raise SpecError(f"'{path}'", [f"{error}{remedy}"]) from error


def load_study(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> StudySpec:
    """Read a study from a YAML file.

    Parameters
    ----------
    path
        The file.
    overrides
        Dotted paths and values that replace those of the file: ``title``, ``baselines`` and ``baseline_training`` of
        the study; any other path is one of the trial, as ``"training.max_epochs"``. A path that the grid varies gets
        these values instead, a list of them or a single one. With another ``data.source`` the options of the file's own
        source are dropped.

    Raises
    ------
    SpecError
        If the file is missing, is not YAML, or holds or gets anything that cannot be used; all faults are listed.
    """
    form = read_yaml(path, "study", "base, grid, baselines and title")
    grid = mapping_of(form, "grid", f"study '{path}'", "paths and lists of values")
    changes = {}
    for name, value in (overrides or {}).items():
        if name in ("title", "baselines", "baseline_training"):
            form[name] = value
        elif name.startswith("baseline_training."):
            form["baseline_training"] = {**(form.get("baseline_training") or {}), name.partition(".")[2]: value}
        elif name in grid:
            grid[name] = list(value) if isinstance(value, list | tuple) else [value]
        else:
            changes[name] = value
    try:
        return StudySpec(**{**form, "grid": grid, "base": merged(form["base"], changes)})
    except SpecError as error:
        raise SpecError(f"study '{path}'", error.faults) from None


def describe_adapter(adapter: Any) -> str:
    """Return an adapter's spec in words: ``"lora(r=4)"``, ``"layernorm + lora"``."""
    if isinstance(adapter, list):
        return " + ".join(describe_adapter(part) for part in adapter)
    if isinstance(adapter, dict):
        options = ", ".join(f"{key}={value}" for key, value in adapter.items() if key != "name")
        return f"{adapter['name']}({options})"
    return str(adapter)


def merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy of a trial's mapping with values put at dotted paths, parents before children."""
    form: dict[str, Any] = copy.deepcopy(dict(base))
    source = values.get("data.source")
    data = form.get("data")
    if source is not None and isinstance(data, dict) and data.get("source", "simulated") != source:
        foreign = {"path"}.union(*(options for name, options in _OWN_OPTIONS.items() if name != source))
        form["data"] = {key: value for key, value in data.items() if key not in foreign}
    for path in sorted(values, key=lambda path: path.count(".")):
        *parents, last = path.split(".")
        place = form
        for depth, name in enumerate(parents):
            if (depth, name) == (0, "adapter") and isinstance(place.get(name), str):
                place[name] = {"name": place[name]}
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise SpecError(
                    "trial", [f"{path!r} leads into {'.'.join(parents[: depth + 1])!r}, which is no mapping"]
                )
        place[last] = copy.deepcopy(values[path])
    return form


def _parts(value: Mapping[str, Any] | str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a baseline in its normal form."""
    if isinstance(value, str):
        return value, {}
    return value["name"], {key: option for key, option in value.items() if key != "name"}


def missing_package(baseline: Any) -> str | None:
    """Return the package that a baseline, or what was written for one, needs and that is not installed; else None."""
    name = baseline.get("name") if isinstance(baseline, Mapping) else baseline
    package = PACKAGES.get(str(name))
    return package if package is not None and importlib.util.find_spec(package) is None else None


def _check_baseline(name: str) -> None:
    if name not in _BASELINES:
        raise ValueError(unknown("baseline", name, _BASELINES))


def _normal_baseline(baseline: Any) -> Any:
    if isinstance(baseline, str):
        _check_baseline(baseline)
        return baseline
    if not isinstance(baseline, Mapping):
        raise ValueError(f"baseline {baseline!r} is neither a name nor a mapping with a name and options")
    normal = _with_options("baseline", baseline, _normal_baseline, "{'name': 'lightgbm', 'num_leaves': 15}")
    name, options = _parts(normal)
    if name in NAIVE and options:
        raise ValueError(f"baseline {name!r} takes no options, not {', '.join(options)}; drop them")
    return normal


def _with_options(kind: str, value: Mapping[Any, Any], normal: Callable[[str], Any], example: str) -> Any:
    """Return a mapping with a name and options in its normal form: the options sorted, without any the name alone."""
    if not isinstance(value.get("name"), str):
        raise ValueError(f"{kind} {dict(value)!r} has no 'name'; write e.g. {example}")
    name = normal(value["name"])
    try:
        options = json.loads(json.dumps({str(key): option for key, option in value.items() if key != "name"}))
    except TypeError as error:
        raise ValueError(f"{kind} {dict(value)!r} holds what JSON cannot: {error}") from None
    return {"name": name, **{key: options[key] for key in sorted(options)}} if options else name


def _normal_adapter(adapter: Any) -> Any:
    if isinstance(adapter, str):
        _check_known(adapters, adapter)
        return adapter
    if isinstance(adapter, Mapping):
        return _with_options("adapter", adapter, _normal_adapter, "{'name': 'lora', 'r': 2}")
    if isinstance(adapter, list | tuple) and adapter:
        parts = [_normal_adapter(part) for part in adapter]
        return parts[0] if len(parts) == 1 else parts
    raise ValueError(f"adapter {adapter!r} is not a name, a mapping with a name and options, or a list of these")


_seen: dict[str, set[str]] = {}


def _check_known(registry: Registry, name: str, *further: str) -> None:
    # Reading the metadata of all installed distributions takes long next to everything else here.
    if name in _seen.get(registry.kind, ()) or name in further:
        return
    names = _seen[registry.kind] = set(registry.names())
    if name not in names:
        raise ValueError(unknown(registry.kind, name, [*names, *further]))


def _faults(model: type[BaseModel], error: ValidationError) -> list[str]:
    faults = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        cause = item.get("ctx", {}).get("error")
        if item["type"] == "extra_forbidden":
            *parents, key = item["loc"]
            where = f"{'.'.join(map(str, parents))}: " if parents else ""
            faults.append(where + unknown("option", key, _fields_at(model, parents)))
        elif item["type"] == "missing":
            faults.append(f"{path} is missing")
        elif isinstance(cause, SpecError):
            faults.extend(cause.faults)
        elif cause is not None:
            faults.append(f"{path}: {cause}" if path else str(cause))
        else:
            faults.append(f"{path} {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return faults


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    for part in location:
        # Names of a mapping lead to what its values are.
        inner = model.model_fields[part].annotation if part in model.model_fields else model
        if get_origin(inner) is dict:
            inner = get_args(inner)[1]
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return list(model.model_fields)
