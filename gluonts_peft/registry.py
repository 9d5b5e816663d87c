"""Families and adapters by name, found through entry points.

A distribution offers a model family in the group ``gluonts_peft.estimators`` (a :class:`~gluonts_peft.PeftEstimator`
class) and an adapter in ``gluonts_peft.adapters`` (a callable ``**options -> Adapter``). The core registers its own
adapters in the same way. Listing reads metadata only; nothing is imported until it is asked for by name.

>>> adapters.names()[:3]
['adalora', 'bitfit', 'c3a']
>>> adapters.get("lorra")
Traceback (most recent call last):
    ...
ValueError: adapter 'lorra' is unknown; did you mean 'lora'? known: adalora, bitfit, ...
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from .adapters.base import Adapter

__all__ = [
    "Entry",
    "Registry",
    "adapter_names",
    "adapters",
    "families",
    "get_adapter",
    "get_estimator",
    "list_adapters",
    "list_families",
]


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the sentence for an unknown name: what it is, the nearest known one, and all there are."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"{kind} {name!r} is unknown;{hint} known: {', '.join(known) or '(none)'}"


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


def get_adapter(spec: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]], **options: Any) -> Adapter:
    """Build an adapter from its name and options.

    Parameters
    ----------
    spec
        A name (``"lora"``), a mapping with a name and options (``{"name": "lora", "r": 2}``), or a list of these: a
        hybrid of several.
    **options
        Options of the adapter, when ``spec`` is a name.

    Raises
    ------
    ValueError
        If the name or an option is unknown or has a value that cannot be used.
    """
    from .adapters.base import Adapter

    if isinstance(spec, Adapter):
        return spec
    if isinstance(spec, str):
        return adapters.get(spec)(**options)  # type: ignore[no-any-return]
    if isinstance(spec, Mapping):
        if "name" not in spec:
            raise ValueError(f"adapter {dict(spec)!r} has no 'name'; write e.g. {{'name': 'lora', 'r': 2}}")
        rest = {str(key): value for key, value in spec.items() if key != "name"}
        return get_adapter(str(spec["name"]), **rest, **options)
    if not isinstance(spec, Iterable):
        raise ValueError(f"adapter {spec!r} is a {type(spec).__name__}; name it, or write {{'name': 'lora', 'r': 2}}")
    from .adapters.hybrid import Hybrid

    return Hybrid([get_adapter(part) for part in spec])
