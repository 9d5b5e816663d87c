"""Which series a trial has, as plain data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from .strict import StrictSpec

__all__ = ["MOST_FOLDS", "OWN_OPTIONS", "DataSpec"]

Source = Literal["simulated", "hourly", "file", "synthetic"]

OWN_OPTIONS: dict[str, dict[str, Any]] = {
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
        own = OWN_OPTIONS[self.source]
        kind = {"simulated": int, "hourly": str}.get(self.source)
        if kind is not None and self.patients is not None and not isinstance(self.patients, kind):
            wanted = "the path of a table that says whose the stays are" if kind is str else "a number of patients"
            raise ValueError(f"patients {self.patients!r} is not for source {self.source!r}; give {wanted}, or drop it")
        for source, options in OWN_OPTIONS.items():
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
