"""Names at their old places, for one release."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["moved"]


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
