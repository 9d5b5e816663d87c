"""Families, adapters, metrics and sources of data by name, found through entry points.

A distribution offers a model family in the group ``gluonts_peft.estimators`` (a :class:`~gluonts_peft.PeftEstimator`
class), an adapter in ``gluonts_peft.adapters`` (a callable ``**options -> Adapter``), a metric in
``gluonts_peft.metrics`` (a :class:`~gluonts_peft.columns.Column`) and a source of data in ``gluonts_peft.datasets`` (a
class over :class:`~gluonts_peft.trials.DataSpec`). The core registers its own adapters and sources in the same way.
Listing reads metadata only; nothing is imported until it is asked for by name.

>>> adapters.names()[:3]
['adalora', 'bitfit', 'c3a']
>>> adapters.get("lorra")
Traceback (most recent call last):
    ...
ValueError: adapter 'lorra' is unknown; did you mean 'lora'? known: adalora, bitfit, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import unknown
from .moved import moved

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "Entry",
    "Registry",
    "adapter_names",
    "adapters",
    "datasets",
    "families",
    "get_estimator",
    "list_adapters",
    "list_families",
    "metrics",
]


@dataclass(frozen=True)
class Entry:
    """One name of a registry: who offers it, and where it lies."""

    name: str
    distribution: str
    version: str
    target: str


class Registry:
    """Named objects of one entry-point group.

    Parameters
    ----------
    kind
        Singular noun for messages.
    group
        Entry-point group.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._loaded: dict[str, Any] = {}
        self._known: set[str] = set()

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {self.names()})"

    def _entry_points(self) -> dict[str, EntryPoint]:
        from importlib.metadata import entry_points

        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            other = found.setdefault(point.name, point)
            # The same distribution can be seen twice (an editable install and its metadata folder): no conflict.
            if other.value != point.value or _owner(other) != _owner(point):
                raise ValueError(
                    f"{self.kind} {point.name!r} is offered by both {_owner(other)[0]!r} and {_owner(point)[0]!r};"
                    " uninstall one"
                )
        return found

    def names(self) -> list[str]:
        """Return all names, sorted. Loads nothing."""
        return sorted(self._entry_points())

    def knows(self, name: str) -> bool:
        """Whether an object has that name. Loads nothing.

        Names that were there once are remembered, since reading the metadata of all distributions takes long next to
        the check of a spec; after an uninstallation in this process, :meth:`forget`.
        """
        if name not in self._known:
            self._known = set(self.names())
        return name in self._known

    def forget(self) -> None:
        """Forget what was loaded and known, where distributions come or go while the process runs."""
        self._loaded.clear()
        self._known.clear()

    def describe(self) -> list[Entry]:
        """Return all entries with their distributions. Loads nothing."""
        return [Entry(name, *_owner(point), point.value) for name, point in sorted(self._entry_points().items())]

    def get(self, name: str) -> Any:
        """Load the object of that name.

        Raises
        ------
        ValueError
            If the name is unknown (the nearest known one is offered) or offered by two distributions.
        ImportError
            If the plug-in that offers it does not load; the message names the plug-in.
        """
        if name not in self._loaded:
            points = self._entry_points()
            if name not in points:
                raise ValueError(unknown(self.kind, name, points))
            try:
                self._loaded[name] = points[name].load()
            except Exception as error:
                owner, version = _owner(points[name])
                raise ImportError(
                    f"{self.kind} {name!r} of {owner} {version} cannot be loaded from {points[name].value!r}:"
                    f" {type(error).__name__}: {error}"
                ) from error
        return self._loaded[name]


def _owner(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist is not None else ("unknown", "unknown")


families = Registry("family", "gluonts_peft.estimators")
adapters = Registry("adapter", "gluonts_peft.adapters")
metrics = Registry("metric", "gluonts_peft.metrics")
datasets = Registry("source", "gluonts_peft.datasets")


def list_families() -> list[str]:
    """Return the names of the installed model families."""
    return families.names()


def list_adapters() -> list[str]:
    """Return the names of the installed adapters."""
    return adapters.names()


def get_estimator(name: str) -> Any:
    """Return the estimator class of a model family, e.g. ``get_estimator("chronos")(prediction_length=12)``."""
    return families.get(name)


def adapter_names(spec: Any) -> set[str]:
    """Return the names in an adapter's spec: one, or those of a hybrid's parts."""
    parts = spec if isinstance(spec, list) else [spec]
    return {part if isinstance(part, str) else part["name"] for part in parts}


__getattr__ = moved(__name__, {"get_adapter": "gluonts_peft.adapters.load"})
