"""The one check of a dataset and its entries, at the door of train, predict, impute, detect and backtest.

    door = Door("forecast", backbone=backbone, horizon=12)
    for entry in door.open(dataset): ...

Lists are looked through before anything is computed; what is read lazily (files, generators, ``PandasDataset``) stays
lazy, and each entry is checked before it is used. What is wrong raises :class:`EntryError`, whichever verb meets it.

A valid series that the verb cannot use, such as one without an observed value, is *unusable*:
``unusable="raise"`` names all such series and what they lack, ``unusable="skip"`` leaves them out and warns with the
same words. The default is to raise, in every verb: forecasts are paired with entries by position (GluonTS's own
``evaluate_model`` does it), so a series that is left out without having been asked for would shift all that follow. A
constant series is usable.

A ``start`` must be a ``pandas.Period``, in every verb. Of a time stamp nobody can tell the frequency but by guessing.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..errors import unknown
from .dated import dated
from .rows import FEATURES, Layout, rows_of
from .season import unit_of

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = [
    "UNUSABLE",
    "Door",
    "DroppedWarning",
    "EntryError",
    "Unusable",
    "UnusableWarning",
    "as_array",
    "called",
    "check_unusable",
    "in_step",
    "nothing_seen",
]

Entry = Mapping[str, Any]

UNUSABLE = ("raise", "skip")
"""What happens to series that a verb cannot use."""

# Fields that are not values over time.
_PLAIN = frozenset(("target", "start", "item_id", "info", "freq", "source", "forecast_start"))
# Names that are shown before "and n more".
_SHOWN = 5
# Fewest observed values in the dataset from which a coarser grid is taken to be meant.
_LEAST_OBSERVED = 8
_HOW = "give a list of entries like {'item_id': 'a', 'start': pd.Period('2024-01-01', 'D'), 'target': [1.0, 2.0]}"


class EntryError(ValueError, TypeError):
    """A dataset, or an entry of it, is not what GluonTS means by one."""


class UnusableWarning(UserWarning):
    """Series were left out, as ``unusable="skip"`` asks."""


class DroppedWarning(UserWarning):
    """Fields of the entries are not used."""


def check_unusable(unusable: str) -> str:
    """Return the policy for series that a verb cannot use, or raise a ValueError if there is none of that name."""
    if unusable not in UNUSABLE:
        raise ValueError(unknown("unusable", unusable, UNUSABLE))
    return unusable


def nothing_seen(target: np.ndarray, steps: int | None = None) -> str | None:
    """Say that a target has no observed value, in its last steps or at all; None if it has one.

    Examples
    --------
    >>> nothing_seen(np.array([1.0, np.nan, np.nan]), 2)
    'no observed value in its last 2 steps'
    """
    part = target if steps is None else target[..., -steps:]
    if part.size and not (part.dtype.kind == "f" and np.isnan(part).all()):
        return None
    return "no observed value" if steps is None else f"no observed value in its last {steps} steps"


def in_step(found: Iterable[tuple[Any, Any]], dataset: Iterable[Entry]) -> Iterator[Entry]:
    """Return the entries that results belong to: those of the same name and start, in order; others are passed over.

    Parameters
    ----------
    found
        The ``item_id`` of each result, or the position of its entry as text, and its start.
    dataset
        What the results were made of.

    Raises
    ------
    ValueError
        If a result has no entry.
    """
    entries = enumerate(dataset)
    for name, start in found:
        for position, entry in entries:
            own = entry.get("item_id")
            if (str(position) if own is None else own) == name and entry["start"] == start:
                yield entry
                break
        else:
            raise ValueError(f"the dataset has no entry of item_id {name!r} that starts at {start}, in this order")


class Unusable:
    """Collects series that a verb cannot use, and reports them once.

    Parameters
    ----------
    verb
        What they cannot be, e.g. ``"forecast"``.
    policy
        One of :data:`UNUSABLE`.

    Raises
    ------
    ValueError
        If there is no such policy.
    """

    def __init__(self, verb: str, policy: str) -> None:
        self.verb = verb
        self.policy = check_unusable(policy)
        self.found: list[tuple[str, str]] = []

    def add(self, name: str, lack: str) -> None:
        """Note the name of a series and what it lacks."""
        self.found.append((name, lack))

    def settle(self, total: int, remedy: str = "") -> None:
        """Raise or warn if any were found among so many series; from then on none are.

        Raises
        ------
        ValueError
            If the policy is ``"raise"``.
        """
        if not self.found:
            return
        shown = ", ".join(f"{name} ({lack})" for name, lack in self.found[:_SHOWN])
        more = f" and {len(self.found) - _SHOWN} more" if len(self.found) > _SHOWN else ""
        count = f"{len(self.found)} of {total} series"
        self.found = []
        if self.policy == "raise":
            ways = f"leave them out, {remedy} or" if remedy else "leave them out, or"
            raise ValueError(
                f"{count} cannot be {self.verb}: {shown}{more}; {ways} go on without them: unusable='skip' (command"
                " line: --unusable skip)"
            )
        warnings.warn(UnusableWarning(f"{count} are left out, they cannot be {self.verb}: {shown}{more}"), stacklevel=3)


class Door:
    """Checks a dataset and its entries.

    Parameters
    ----------
    verb
        What is done with the series, as a participle: ``"forecast"``, ``"imputed"``.
    backbone
        Whose capabilities decide which fields are used; None for a predictor of any kind.
    fields
        Dynamic features that are used; by default those of the family, if it takes covariates.
    multivariate
        Whether targets of two dimensions are taken; by default if the family does.
    horizon
        Steps beyond the target that features which are known in the future must cover.
    lacks
        Says what a series lacks, from its target as an array of floats; None if nothing.
    unusable
        One of :data:`UNUSABLE`.
    freq
        The frequency of the data that the model was trained on; None takes any.
    any_freq
        Take data of another frequency all the same, and such as lie on a finer grid than they were observed on.
    gaps
        Whether gaps are what the verb is for, so that a grid that is mostly missing is no sign of a mistake.
    complete
        Whether all is read before anything is computed, however it is read.
    remedy
        A further way out for unusable series, a clause that ends in a comma.

    Attributes
    ----------
    names, positions
        The ``item_id`` of the entries that were handed over in the last reading, None where there is none, and where
        they stand in the dataset.
    found_freq
        Frequency of the entries of the last reading.

    Raises
    ------
    ValueError
        If there is no such policy.
    """

    def __init__(
        self,
        verb: str,
        *,
        backbone: Backbone | None = None,
        fields: bool | None = None,
        multivariate: bool | None = None,
        horizon: int = 0,
        lacks: Callable[[np.ndarray], str | None] | None = None,
        unusable: str = "raise",
        freq: str | None = None,
        any_freq: bool = False,
        gaps: bool = False,
        complete: bool = False,
        remedy: str = "",
    ) -> None:
        able: Any = frozenset() if backbone is None else backbone.capabilities
        self.verb = verb
        self.family = None if backbone is None else backbone.family
        self.model = None if backbone is None else f"{backbone.source.checkpoint!r} of family {backbone.family!r}"
        self.features = backbone is not None and "covariates" in able if fields is None else fields
        self.multivariate = (backbone is None or "multivariate" in able) if multivariate is None else multivariate
        self.horizon = horizon
        self.lacks = lacks
        self.policy = check_unusable(unusable)
        self.freq = freq
        self.any_freq = any_freq
        self.gaps = gaps
        self.complete = complete
        self.remedy = remedy
        self.names: list[Any] = []
        self.positions: list[int] = []
        self.found_freq: str | None = None

    def open(self, dataset: Any) -> Iterable[Entry]:
        """Return the entries that can be used, in order, each checked before it is handed over.

        A list is checked as a whole, now; anything else as it is read, each time that it is read, and series that are
        left out of it are named at the end.

        Raises
        ------
        EntryError
            If it is not a dataset, or an entry is wrong; the message names it.
        ValueError
            If a series is unusable and the policy is to raise.
        """
        _require_dataset(dataset)
        if isinstance(dataset, list | tuple):
            return list(_Pass(self, whole=True).entries(dataset))
        return _Checked(self, dated(dataset))

    def read(self, dataset: Any) -> list[Entry]:
        """Return all entries that can be used as a list, checked as a whole.

        Raises
        ------
        EntryError, ValueError
            As :meth:`open`.
        """
        _require_dataset(dataset)
        return list(_Pass(self, whole=True).entries(dated(dataset)))


class _Checked:
    """A dataset that is checked while it is read."""

    def __init__(self, door: Door, dataset: Iterable[Entry]) -> None:
        self.door = door
        self.dataset = dataset

    def __iter__(self) -> Iterator[Entry]:
        return _Pass(self.door, whole=False).entries(self.dataset)


class _Pass:
    """One reading of a dataset."""

    def __init__(self, door: Door, *, whole: bool) -> None:
        self.door = door
        self.whole = whole
        door.names, door.positions = [], []
        self.layout = Layout()
        self.names: tuple[str, ...] = ()
        self.first = ""
        self.freq: tuple[str, Any] | None = None
        self.dropped: set[str] = set()
        self.unusable = Unusable(door.verb, door.policy)
        # Steps of the coarsest grid on which all observed values lie, and how many these are.
        self.coarse, self.observed, self.steps = 0, 0, 0

    def entries(self, dataset: Iterable[Entry]) -> Iterator[Entry]:
        position = -1
        # A list is handed over only when all of it was found good.
        kept: list[Entry] = []
        try:
            for position, entry in enumerate(dataset):
                entry, lack = self.check(position, entry)
                if lack is not None:
                    self.unusable.add(_called(entry, position), lack)
                    if not self.whole and self.door.policy == "raise":
                        self.unusable.settle(position + 1, self.door.remedy)
                    continue
                self.door.names.append(entry.get("item_id"))
                self.door.positions.append(position)
                if self.whole:
                    kept.append(entry)
                else:
                    yield entry
        finally:
            # Also where the reader stops early; not over an error that is on its way.
            if not self.whole and self.door.policy == "skip":
                self.unusable.settle(position + 1, self.door.remedy)
        if position < 0 and iter(dataset) is dataset:
            raise EntryError(
                f"dataset is a {type(dataset).__name__} that is empty, or used up already; give a list, which can be"
                " read again"
            )
        if self.whole or self.door.complete:
            self._settle_grid()
        if self.whole:
            self.unusable.settle(position + 1, self.door.remedy)
            yield from kept

    def check(self, position: int, entry: Any) -> tuple[Entry, str | None]:
        """Return an entry, its target an array, and what it lacks."""
        if not isinstance(entry, Mapping):
            raise EntryError(_not_an_entry(position, entry))
        name, raw = _called(entry, position), entry.get("target")
        item_id = entry.get("item_id")
        if item_id is not None and not _hashable(item_id):
            raise EntryError(f"item_id of entry {position} is a {type(item_id).__name__}; give text or a number")
        target, given = as_array(raw), entry
        if target is not raw and raw is not None:
            entry = {**entry, "target": target}
        if self.door.features:
            masked = {name: entry[name] for name in FEATURES if isinstance(entry.get(name), np.ma.MaskedArray)}
            entry = {**entry, **{name: as_array(value) for name, value in masked.items()}} if masked else entry
        if position == 0:
            self._begin(given, name)
        wanted = 1 if self.layout.dimensions is None else 2
        shaped = target.ndim == wanted and (wanted == 1 or len(target) == self.layout.dimensions)
        if raw is None or not shaped or not _real(target):
            if self.door.family is None and target.dtype.kind in "biuf":
                raise EntryError(
                    f"{name} has a target of shape {target.shape}; expected (time,) or (dim, time), with the same dim"
                    " for all series"
                    if not shaped
                    else f"{name} has a target with infinite values; give NaN for missing values"
                )
            self._explain(given, position)
        self._check_start(entry, name)
        self._check_fields(entry, position, name, target.shape[-1])
        if self.door.lacks is None and (self.coarse == 1 or self.door.gaps):
            return entry, None
        if self.coarse != 1 and not self.door.gaps:
            self._look_at_grid(target)
        return entry, None if self.door.lacks is None else self.door.lacks(target)

    def _begin(self, entry: Entry, name: str) -> None:
        try:
            self.layout = Layout.of(entry, features=self.door.features, multivariate=self.door.multivariate)
        except (TypeError, ValueError) as error:
            raise EntryError(str(error)) from None
        self.names, self.first = tuple(field for field, _ in self.layout.features), name

    def _explain(self, entry: Entry, position: int) -> None:
        """Let what reads the values say what is wrong with them."""
        try:
            rows_of(entry, position, self.layout, self.door.horizon)
        except (TypeError, ValueError) as error:
            raise EntryError(str(error)) from None
        raise EntryError(f"{_called(entry, position)} has a target or features that cannot be read; {_HOW}")

    def _check_start(self, entry: Entry, name: str) -> None:
        start = entry.get("start")
        if not isinstance(start, pd.Period):
            what = (
                f"{name} has no start" if start is None else f"start of {name} is {start!r}, a {type(start).__name__}"
            )
            shown = "2024-01-01" if start is None else str(start)
            raise EntryError(
                f"{what}; a pandas.Period says the frequency too: give pd.Period({shown!r}, freq='D'), or"
                " gluonts.dataset.common.ListDataset(entries, freq='D')"
            )
        text = start.freqstr
        if self.freq is not None and self.freq[0] == text:
            return
        unit = unit_of(text)
        if self.freq is None:
            self.freq = (text, unit)
            self.door.found_freq = text
            trained = self.door.freq
            if trained is not None and unit != unit_of(trained) and not self.door.any_freq:
                raise EntryError(
                    f"{name} has the frequency {text!r}, and the model was tuned on data of {trained!r}; give data of"
                    " that frequency, or take it all the same: any_freq=True (command line: --any-freq)"
                )
        elif unit != self.freq[1]:
            raise EntryError(
                f"{name} has the frequency {text!r}, {self.first} has {self.freq[0]!r}; give data of one frequency at a"
                " time"
            )

    def _check_fields(self, entry: Entry, position: int, name: str, steps: int) -> None:
        if self.door.features:
            found = tuple(field for field in FEATURES if entry.get(field) is not None)
            if found != self.names:
                field = next(field for field in FEATURES if (field in found) != (field in self.names))
                has, lacks = (name, self.first) if field in found else (self.first, name)
                raise EntryError(f"{has} has {field}, {lacks} has none; give it to all entries, or to none")
            for field, width in self.layout.features:
                shape = np.shape(entry[field])
                needed = steps + (self.door.horizon if FEATURES[field] else 0)
                rows = 1 if len(shape) == 1 else shape[0] if len(shape) == 2 else -1
                if rows != width or shape[-1] < needed or not _real(entry[field]):
                    self._explain(entry, position)
        # Fields that GluonTS adds on its own are ignored here, and the names of features may be misspelt.
        extra = entry.keys() - _PLAIN - set(self.names)
        extra -= self.dropped
        if extra and self.door.family is not None:
            new = {field for field in extra if _has_values(field, entry[field], steps)}
            if new:
                self.dropped |= new
                warnings.warn(
                    DroppedWarning(
                        f"{self.door.model} does not use {', '.join(sorted(map(str, new)))} of the entries (first:"
                        f" {name}); it uses {', '.join(('target', *self._usable_fields()))}"
                    ),
                    stacklevel=2,
                )

    def _usable_fields(self) -> tuple[str, ...]:
        return tuple(FEATURES) if self.door.features else ()

    def _look_at_grid(self, target: np.ndarray) -> None:
        seen = np.ones(target.shape[-1], bool)
        if target.dtype.kind == "f":
            seen = ~np.isnan(target)
            seen = seen.any(0) if seen.ndim == 2 else seen
        at = np.flatnonzero(seen)
        self.observed, self.steps = self.observed + len(at), self.steps + len(seen)
        if len(at) > 1:
            self.coarse = math.gcd(self.coarse, int(np.gcd.reduce(np.diff(at))))

    def _settle_grid(self) -> None:
        """Refuse data of which every series was observed on a coarser grid only: their frequency is a mistake."""
        if self.door.gaps or self.door.any_freq or self.coarse < 2 or self.observed < _LEAST_OBSERVED:
            return
        assert self.freq is not None
        text = self.freq[0]
        unit, count = unit_of(text)
        offset = pd.tseries.frequencies.to_offset(pd.Timedelta(count * self.coarse, unit="ns"))
        meant = offset.freqstr if unit == "nanosecond" else f"{self.coarse} x {text}"
        raise EntryError(
            f"of the {self.steps} steps of frequency {text!r} {self.observed} are observed, in every series each"
            f" {self.coarse}th at most: the data are of frequency {meant!r}; give them so, or take them all the same:"
            " any_freq=True (command line: --any-freq)"
        )


def _require_dataset(dataset: Any) -> None:
    """Refuse anything that is not a dataset."""
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        hint = "give [entry] if it is one entry" if "target" in dataset else "give PandasDataset(frames) if of frames"
        raise EntryError(f"dataset is a {kind}, not a dataset; {hint}, else {_HOW}")
    if isinstance(dataset, pd.DataFrame | pd.Series):
        raise EntryError(
            f"dataset is a pandas {kind}; give gluonts.dataset.pandas.PandasDataset.from_long_dataframe(frame,"
            " item_id=..., target=...) of a long table, PandasDataset({'a': frame}, target=...) of one series"
        )
    if isinstance(dataset, str | bytes | os.PathLike):
        raise EntryError(f"dataset is {dataset!r}, the name of one; give gluonts_peft.data.read_dataset(path)")
    if hasattr(dataset, "metadata") and hasattr(dataset, "train"):
        raise EntryError(f"dataset is a {kind} of several parts; give one, such as dataset.train")
    if dataset is None or hasattr(dataset, "__array__") or not isinstance(dataset, Iterable):
        raise EntryError(f"dataset is a {kind}, not a dataset; {_HOW}")


def _not_an_entry(position: int, entry: Any) -> str:
    kind = type(entry).__name__
    if isinstance(entry, tuple) and len(entry) == 2 and all(isinstance(part, Mapping) for part in entry):
        return f"entry {position} of the dataset is a pair of history and label; give test_data.input, or the dataset"
    return f"entry {position} of the dataset is a {kind}, not a mapping with 'start' and 'target'; {_HOW}"


def called(item_id: Any, position: int) -> str:
    """Return what an entry is called in messages: its ``item_id``, or its position."""
    return f"entry {position}" if item_id is None else f"item_id {item_id!r}"


def _called(entry: Entry, position: int) -> str:
    return called(entry.get("item_id"), position)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def as_array(values: Any) -> np.ndarray:
    """Values as an array, with NaN where they are masked or missing in the way of pandas."""
    if type(values) is np.ndarray:
        return values
    if isinstance(values, np.ma.MaskedArray):
        floats: Any = np.ma.asarray(values, np.result_type(values.dtype, np.float32))
        return np.asarray(floats.filled(np.nan))
    dtype = getattr(values, "dtype", None)
    if isinstance(dtype, pd.api.extensions.ExtensionDtype) and getattr(dtype, "kind", "O") in "biuf":
        return np.asarray(values.to_numpy(dtype=np.float64, na_value=np.nan))
    try:
        return np.asarray(values)
    except ValueError:
        # Rows of unequal length; what reads the values says so.
        return np.empty((), object)


def _real(values: Any) -> bool:
    array = as_array(values)
    return array.dtype.kind in "biu" or array.dtype.kind == "f" and not np.isinf(array).any()


def _has_values(field: Any, value: Any, steps: int) -> bool:
    """Whether a field looks as if it was to be used: by its name, or as numbers over time."""
    if value is None:
        return False
    if isinstance(field, str) and ("feat_" in field or "covariate" in field):
        return bool(np.size(value))
    return isinstance(value, np.ndarray | list | tuple) and np.shape(value)[-1:] >= (max(steps, 1),) and _real(value)
