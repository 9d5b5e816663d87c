"""What a trial is and what it found, as plain data: checked at once, and put into a normal form.

Equal trials are equal data: defaults are filled in, options without effect are refused or reset, and a spec's
:meth:`TrialSpec.hash` is the name of its folder. Nothing here imports torch.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_serializer, model_validator

from ..calibration import Calibration
from ..deadline import parse_time_limit
from ..errors import unknown
from ..files import opened, record, write_atomically
from ..moved import moved
from ..registry import Registry, adapters, families
from ..trainer_kwargs import check_precision
from ..verdict import Verdict
from .baselinespec import BASELINE, BOOSTED, NAIVE, TRAINED, check_baseline
from .dataspec import DataSpec, switched
from .reading import from_record
from .strict import SpecError, StrictSpec, with_options

__all__ = ["RESULT", "SHARED_TRAINING", "TrainingSpec", "TrialResult", "TrialSpec", "describe_adapter", "merged"]

RESULT = "result.json"

# What decides which windows are seen is the same for baselines and adapters.
_WINDOWS = ("min_context", "validation_windows", "max_validation_windows")
SHARED_TRAINING = ("batch_size", *_WINDOWS, "device", "precision")
# What decides how zero-shot is calibrated.
_CALIBRATING = ("calibrate", *_WINDOWS)


# As people write it.
_TIME = WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}, {"type": "null"}]})


class TrainingSpec(StrictSpec):
    """How to train: the arguments of :class:`gluonts_peft.PeftEstimator` of the same names, with its defaults.

    ``calibrate`` counts for zero-shot too, so that both are compared as they would be handed over. A ``time_limit`` is
    kept in seconds; what it ends is not reproducible. ``verdict_unit`` None is ``"patients"`` where groups of series
    are divided, else ``"series"``. With ``by``, test series choose their weights by what lies before their first test
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
            check_baseline(self.checkpoint)
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
        also = {name: DataSpec(**data.normal_form() | divided) for name, data in self.also.items()}
        self._set("also", {name: data.like(self.data) for name, data in also.items()})
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
        label = self.data.label()
        fold = [] if self.data.fold is None else [f"fold {self.data.fold}"]
        if self.family == BASELINE:
            seed = [f"seed {self.seed}"] if self.trains else []
            return " ".join(filter(None, [self.checkpoint, label, *seed, *fold]))
        adapter = describe_adapter(self.adapter)
        if self.ensemble is not None:
            adapter += f" with weight {self.ensemble:g}"
        return " ".join(filter(None, [self.checkpoint, adapter, label, f"seed {self.seed}", *fold]))


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
        What was never divided between the parts, as the source calls it (:meth:`DataSpec.unit`): ``"series"``,
        ``"patient"``, ...; of the trial's own data under ``""``, of ``TrialSpec.also`` by its name.
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
        # As stored on disk, for callers who read the file themselves.
        return opened(values)

    def unit(self, name: str = "") -> str:
        """Return what was never divided in the trial's own data, or in further ones; see ``units``."""
        data = self.spec.also[name] if name else self.spec.data
        # Results of earlier versions do not say it.
        return self.units.get(name) or data.unit()

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
    if source is not None and isinstance(data, dict):
        form["data"] = switched(data, source)
    for path in sorted(values, key=lambda path: path.count(".")):
        *parents, last = path.split(".")
        place = form
        for depth, name in enumerate(parents):
            if (depth, name) == (0, "adapter") and isinstance(place.get(name), str):
                place[name] = {"name": place[name]}
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise SpecError(
                    "trial", [f"{path!r} leads into {'.'.join(parents[: depth + 1])!r}, which is not a mapping"]
                )
        place[last] = copy.deepcopy(values[path])
    return form


def _normal_adapter(adapter: Any) -> Any:
    if isinstance(adapter, str):
        _check_known(adapters, adapter)
        return adapter
    if isinstance(adapter, Mapping):
        return with_options("adapter", adapter, _normal_adapter, "{'name': 'lora', 'r': 2}")
    if isinstance(adapter, list | tuple) and adapter:
        parts = [_normal_adapter(part) for part in adapter]
        return parts[0] if len(parts) == 1 else parts
    raise ValueError(f"adapter {adapter!r} is not a name, a mapping with a name and options, or a list of these")


def _check_known(registry: Registry, name: str, *further: str) -> None:
    if name not in further and not registry.knows(name):
        raise ValueError(unknown(registry.kind, name, [*registry.names(), *further]))


__getattr__ = moved(
    __name__,
    {
        **dict.fromkeys(
            ("FROM_SCRATCH", "PACKAGES", "STATISTICAL", "missing_package"), "gluonts_peft.trials.baselinespec"
        ),
        **dict.fromkeys(("mapping_of", "read_json", "read_record", "read_yaml"), "gluonts_peft.trials.reading"),
        **dict.fromkeys(("StudySpec", "load_study"), "gluonts_peft.trials.studyspec"),
    },
)
