"""Which series a trial has, as plain data: options that all data have, and those of one source.

A source is a class over :class:`DataSpec`, found by its entry point in the group ``gluonts_peft.datasets``; the core
registers its own in the same way. A distribution that offers one needs nothing else::

    class Wells(DataSpec):
        source: Literal["wells"] = "wells"
        path: str
        depth: int = 10

        def load(self):
            return [{"start": ..., "target": ..., "item_id": ...} for ... in read_wells(self.path, self.depth)]

        def paths(self):
            return {"path": self.path}

    [options.entry_points]
    gluonts_peft.datasets =
        wells = my_package:Wells
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from ..errors import unknown
from ..registry import datasets
from .strict import SpecError, StrictSpec

if TYPE_CHECKING:
    from ..series.table import DataEntry

__all__ = ["MOST_FOLDS", "DataSpec", "FirstSource", "PathSource", "doubt", "source_class", "switched"]

DEFAULT_SOURCE = "simulated"
#: Folds at most: each is a training of its own.
MOST_FOLDS = 100
# Common options that version 0.1 did not have.
_LATER = ("season", "folds", "fold")
# The options of all sources of version 0.1: they stood, empty or not, in every trial.
_FIRST = ("path", "patients", "hours", "series", "steps", "seed", "min_hours", "freq", "vital")


def _is_union(cls: type) -> bool:
    """Whether a class is DataSpec itself, any of the sources; its name is not known while it is being made."""
    return StrictSpec in cls.__bases__


class DataSpec(StrictSpec):
    """Which series, and how they are divided.

    ``DataSpec(source="hourly", path=...)`` is an instance of the class of that source, which documents the options of
    its own. Those that all sources have:

    Parameters
    ----------
    source
        Name of the source: ``"simulated"`` (the default) or ``"hourly"`` (:mod:`gluonts_peft.vitals.sources`),
        ``"file"`` or ``"synthetic"`` (:mod:`gluonts_peft.trials.sources`), or one of another distribution.
    group
        What is never divided: ``"patient"`` (what comes before the first ``/`` of an item id) or ``"item"``. The
        default is the source's.
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

    Raises
    ------
    SpecError
        If the source or an option is unknown, or a value cannot be used; all faults are listed.
    """

    #: ``group`` where none is named.
    default_group: ClassVar[Literal["patient", "item"]] = "item"
    #: What several series with the same name before the first ``/`` of their item ids belong to.
    group_name: ClassVar[str] = "group"
    #: The source's option, if it has one, that says which of all series are meant: tables are headed by its value, and
    #: it is kept where an override names another source.
    label_option: ClassVar[str | None] = None
    #: Whether the series are drawn by a program.
    made: ClassVar[bool] = False
    #: A sentence that every report on such data shows.
    caution: ClassVar[str] = ""
    #: Unit, as :meth:`unit` names it -> why units of that name are not independent.
    doubts: ClassVar[Mapping[str, str]] = {}

    source: str = DEFAULT_SOURCE
    group: Literal["patient", "item"] | None = None
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    folds: int | None = Field(default=None, ge=2, le=MOST_FOLDS)
    fold: int | None = Field(default=None, ge=0)
    split_seed: int = Field(default=0, ge=0)
    windows: int = Field(default=3, gt=0)
    train_series: int | None = Field(default=None, gt=0)
    train_steps: int | None = Field(default=None, gt=0)
    season: int | None = Field(default=None, gt=0)

    def __new__(cls, *args: Any, **values: Any) -> Any:
        if _is_union(cls):
            try:
                cls = source_class(values.get("source", DEFAULT_SOURCE))
            except ValueError as error:
                raise SpecError("data", [str(error)]) from None
        return super().__new__(cls)

    def load(self) -> list[DataEntry]:
        """Return the series: entries of GluonTS with ``start``, ``target`` and ``item_id``, the same ones every time.

        The options that all sources have do not matter here; they are used later. Whatever is returned is shared and
        must not be changed.

        Raises
        ------
        ValueError
            If they cannot be read, or there are none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no load()")

    def units(self, entries: Sequence[DataEntry]) -> Collection[str]:
        """Return the names of all groups that the source has, each once and in an order that is always the same.

        A source that left series out when it loaded `entries` names their groups all the same: then a group is in the
        same part whatever was left out.
        """
        return sorted({self.group_of(str(entry["item_id"])) for entry in entries})

    def select(self, entries: Sequence[DataEntry]) -> Sequence[DataEntry]:
        """Return those of the loaded series that are used; the groups of all are divided."""
        return entries

    def paths(self) -> dict[str, str]:
        """Return the files and folders that the series are read from, by the option that names each.

        Where one changes, the data are loaded again; a cluster wants them in full.
        """
        return {}

    def unit(self, entries: Sequence[DataEntry] = ()) -> str:
        """Return what is never divided between the parts, in the singular: ``TrialResult.units``.

        Parameters
        ----------
        entries
            The loaded series; without any, what is certain of every trial of version 0.1.
        """
        return "series" if self.group == "item" else self.group_name

    def like(self, other: DataSpec) -> DataSpec:
        """Return the spec with options that the trial's own data, if they are of the same place, fill in."""
        return self

    def group_of(self, item_id: str) -> str:
        """Return the name of the group, which is never divided, of an item.

        Raises
        ------
        ValueError
            If the item id does not name it.
        """
        return item_id if self.group == "item" else self.before_slash(item_id)

    @classmethod
    def before_slash(cls, item_id: str) -> str:
        """Return what an item id says before its first ``/``."""
        name, slash, _ = item_id.partition("/")
        if not slash or not name:
            raise ValueError(f"item_id {item_id!r} names no group before a '/'; write data.group: item")
        return name

    def label(self) -> str | None:
        """Return which of all series are meant, where the source has an option that says it."""
        return None if self.label_option is None else getattr(self, self.label_option)

    def spelled(self, form: dict[str, Any]) -> dict[str, Any]:
        """Return the normal form for what pydantic makes of the spec."""
        # Trials of earlier versions, which had no such options, keep their hash.
        return {name: value for name, value in form.items() if name not in _LATER or value is not None}

    @model_serializer(mode="wrap")
    def _spelled(self, dump: Any) -> dict[str, Any]:
        return self.spelled(dump(self))

    @model_validator(mode="after")
    def _normal(self) -> DataSpec:
        if self.group is None:
            self._set("group", self.default_group)
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

    @classmethod
    def called(cls) -> str:
        return "data"

    @classmethod
    def checking(cls, values: Any) -> type[StrictSpec]:
        return source_class(values.get("source", DEFAULT_SOURCE)) if _is_union(cls) else cls

    @classmethod
    def unknown_option(cls, name: str, value: Any) -> str:
        own = cls.model_fields["source"].default
        others = [repr(other) for other, options in _own_options().items() if name in options and other != own]
        if not others:
            return super().unknown_option(name, value)
        named = " or ".join(filter(None, [", ".join(others[:-1]), others[-1]]))
        return f"{name} {value!r} belongs to source {named}, not to {own!r}; drop it, or name that source"

    @staticmethod
    def _of_its_source(value: Any) -> DataSpec:
        if isinstance(value, DataSpec):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"{value!r} is not a mapping of options")
        return source_class(value.get("source", DEFAULT_SOURCE)).model_validate(dict(value))

    @staticmethod
    def _dumped(value: DataSpec, info: SerializationInfo) -> dict[str, Any]:
        return value.model_dump(mode=info.mode)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not _is_union(cls):
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            cls._of_its_source,
            serialization=core_schema.plain_serializer_function_ser_schema(cls._dumped, info_arg=True),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if not _is_union(cls):
            return handler(schema)
        forms = []
        for name, each in _sources().items():
            form = handler(each.__pydantic_core_schema__)
            inner = handler.resolve_ref_schema(form)
            if name != DEFAULT_SOURCE and "source" not in inner.setdefault("required", []):
                inner["required"].append("source")
            forms.append(form)
        return {"anyOf": forms}


class FirstSource(DataSpec):
    """A source of version 0.1: it takes the empty options of all others, and spells them out, as trials did then."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if name not in _FIRST or value is not None}

    def spelled(self, form: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(_FIRST) | super().spelled(form)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return None if name in _FIRST else super().__getattr__(name)


class PathSource(FirstSource):
    """A source that reads a file or a folder.

    Parameters
    ----------
    path
        Where it lies.
    """

    path: str = ""

    def paths(self) -> dict[str, str]:
        return {"path": self.path}

    @model_validator(mode="after")
    def _has_a_path(self) -> PathSource:
        if not self.path:
            raise ValueError(f"source {self.source!r} needs a path; name the file as data.path")
        return self


def source_class(name: Any) -> type[DataSpec]:
    """Return the class of a source.

    Raises
    ------
    ValueError
        If there is none of that name, or what is offered under it cannot be loaded or used.
    """
    if not datasets.knows(DEFAULT_SOURCE):
        raise ValueError(
            "no sources of data are registered: the installed metadata of gluonts-peft are older than its code; install"
            " it again"
        )
    # Only text can be a name; other values may not even be hashable.
    if not isinstance(name, str):
        raise ValueError(unknown(datasets.kind, name, datasets.names()))
    try:
        found = datasets.get(name)
    except ImportError as error:
        raise ValueError(str(error)) from error
    if not (
        isinstance(found, type)
        and issubclass(found, DataSpec)
        and found.load is not DataSpec.load
        and found.model_fields["source"].default == name
    ):
        raise ValueError(
            f"source {name!r} is offered as {found!r}, which is no DataSpec with load() and a field source:"
            f" Literal[{name!r}] = {name!r}; correct it, or uninstall what offers it"
        )
    return found


def switched(data: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """Return options of data for another source: without those of their own one.

    What says which of all series are meant (``label_option``) stays, so that nothing is left out or added in silence.
    """
    own = data.get("source", DEFAULT_SOURCE)
    if own == source:
        return dict(data)
    dropped = _own_options().get(own, {}) if isinstance(own, str) else {}
    return {name: value for name, value in data.items() if name not in dropped or dropped[name]}


def doubt(unit: str) -> str:
    """Return why units of that name are not independent, as the source says that names them; empty if they are."""
    return next((source.doubts[unit] for source in _sources().values() if unit in source.doubts), "")


def _sources() -> dict[str, type[DataSpec]]:
    """Return all sources but broken ones, which harm nobody."""
    found = {}
    for name in datasets.names():
        with contextlib.suppress(ValueError):
            found[name] = source_class(name)
    return found


def _own_options() -> dict[str, dict[str, bool]]:
    """Return the options of each source beside the common ones, and whether each is its label."""
    return {
        name: {
            option: option == source.label_option
            for option in source.model_fields
            if option not in DataSpec.model_fields
        }
        for name, source in _sources().items()
    }
