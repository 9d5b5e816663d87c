"""Vital signs as data of trials: what ``data.source`` of a study can name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from ..trials.dataspec import DataSpec, FirstSource, PathSource
from ..trials.sources import File

__all__ = ["Hourly", "Simulated", "VitalSigns", "VitalsFile"]

DataEntry = dict[str, Any]


class VitalSigns(FirstSource):
    """Series of patients, whose item ids are ``"<patient>/<vital>"`` or ``"<patient>/<stay>/<vital>"``.

    Parameters
    ----------
    vital
        Keep the series of one vital sign: those whose item id ends in ``/<vital>``. None keeps all. The division is the
        same for each.
    """

    default_group: ClassVar[Literal["patient", "item"]] = "patient"
    group_name: ClassVar[str] = "patient"
    label_option: ClassVar[str | None] = "vital"

    vital: str | None = None

    @classmethod
    def before_slash(cls, item_id: str) -> str:
        from .simulate import patient_of

        return patient_of(item_id)

    def wanted(self) -> tuple[str, ...]:
        """Return the vital signs to load: the one that is named, or heart rate and mean arterial pressure."""
        return ("hr", "map") if self.vital is None else (self.vital,)


class Simulated(VitalSigns):
    """Patients who never lived (:func:`gluonts_peft.vitals.simulate_vitals`).

    Parameters
    ----------
    patients, hours
        How many, and how long each is watched.
    seed
        Of the simulator.
    vital
        As in :class:`VitalSigns`.
    """

    made: ClassVar[bool] = True
    caution: ClassVar[str] = (
        "The data are simulated: no patient ever had these values, and nothing clinical follows from them."
    )

    source: Literal["simulated"] = "simulated"
    patients: int = 200
    hours: int = Field(default=48, gt=0)
    seed: int = Field(default=0, ge=0)

    @field_validator("patients", mode="before")
    @classmethod
    def _number(cls, value: Any) -> int:
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, str):
            raise ValueError(f"{value!r} is not a number of patients; give one, or name source 'hourly' for a table")
        if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer() or value < 1:
            raise ValueError(f"{value!r} is not a number of patients; give a whole number from 1")
        return int(value)

    def load(self) -> list[DataEntry]:
        from .simulate import simulate_vitals

        return simulate_vitals(self.patients, self.hours, seed=self.seed, vitals=self.wanted())


class Hourly(VitalSigns, PathSource):
    """A wide table with a row for each stay and hour (:func:`gluonts_peft.vitals.load_hourly`).

    Parameters
    ----------
    path
        The Parquet file.
    patients
        Path of a table that maps stays to patients. Without it, and without a column ``patient``, stays are divided,
        and those of one patient may be in several parts. Further data of a trial that have the same ``path`` have the
        same table unless they name another.
    min_hours
        Shorter stays are left out.
    vital
        As in :class:`VitalSigns`.
    """

    doubts: ClassVar[Mapping[str, str]] = {"stay": "a patient may have several"}

    source: Literal["hourly"] = "hourly"
    patients: str | None = None
    min_hours: int = Field(default=48, gt=0)

    @field_validator("patients", mode="before")
    @classmethod
    def _table(cls, value: Any) -> Any:
        if not isinstance(value, str) or not value or value.isdecimal():
            raise ValueError(
                f"{value!r} is no path of a table that maps stays to patients; give one, or name source 'simulated' for"
                " a number of them"
            )
        return value

    def load(self) -> list[DataEntry]:
        from .hourly import load_hourly

        return load_hourly(self.path, min_hours=self.min_hours, vitals=self.wanted(), patients=self.patients)

    def units(self, entries: Sequence[DataEntry]) -> Collection[str]:
        from .hourly import hourly_units

        return super().units(entries) if self.group == "item" else hourly_units(self.path, self.patients)

    def paths(self) -> dict[str, str]:
        table = {} if self.patients is None else {"patients": self.patients}
        return {"path": self.path, **table}

    def unit(self, entries: Sequence[DataEntry] = ()) -> str:
        # An item id has two slashes where the patient is known.
        known = bool(entries) and str(entries[0]["item_id"]).count("/") >= 2
        return super().unit(entries) if known or self.group == "item" else "stay"

    def like(self, other: DataSpec) -> DataSpec:
        if isinstance(other, Hourly) and self.path == other.path and self.patients is None:
            return self.model_copy(update={"patients": other.patients})
        return self


class VitalsFile(VitalSigns, File):
    """A table or a GluonTS dataset, of vital signs or of anything else; prepared vital signs are divided by patient.

    Parameters
    ----------
    path
        File or folder.
    freq
        Frequency, where it cannot be inferred.
    vital
        As in :class:`VitalSigns`.
    """

    default_group: ClassVar[Literal["patient", "item"]] = "item"

    source: Literal["file"] = "file"

    def load(self) -> list[DataEntry]:
        self._check_prepared(Path(self.path))
        return File.load(self)

    def select(self, entries: Sequence[DataEntry]) -> Sequence[DataEntry]:
        if self.vital is None:
            return entries
        found = [entry for entry in entries if str(entry["item_id"]).endswith(f"/{self.vital}")]
        if not found:
            raise ValueError(f"no item_id of '{self.path}' ends in '/{self.vital}'; name another data.vital, or none")
        return found

    def _check_prepared(self, path: Path) -> None:
        """Refuse to divide prepared vital signs once more, or by anything but patients."""
        from .output import WHOLE, find_manifest

        found = find_manifest(path)
        if found is None:
            return
        manifest, parts = found[0], found[1]["parts"]
        if manifest.parent == path.absolute() and WHOLE not in parts:
            raise ValueError(
                f"path '{path}' holds vital signs that are divided already, into {', '.join(parts)}; trials divide by"
                f" themselves: prepare them with --fractions '' and give the folder '{WHOLE}'"
            )
        if self.group != "patient":
            raise ValueError(
                f"path '{path}' holds prepared vital signs ('{manifest}'), several series of a patient, who would be in"
                " several parts; write data.group: patient"
            )
