"""Names of modules that are found when they are asked for: of packages, and at old places for one release."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["loaded_on_use", "moved"]


def loaded_on_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` that imports its public names on first use, so that importing it is cheap.

    Parameters
    ----------
    package
        ``__name__``.
    homes
        Name -> the module of the package where it is.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{homes[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    return find


def moved(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that finds names where they are now, with a DeprecationWarning.

    For names that moved to a module which imports the old one; where it does not, a plain import does it.

    Parameters
    ----------
    module
        The old place in full, ``__name__``.
    homes
        Name -> the module in full where it is now.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is now {homes[name]}.{name}; the old place goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(homes[name]), name)

    return find
