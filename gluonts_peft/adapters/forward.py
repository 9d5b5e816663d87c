"""Methods of single modules that an adapter replaces, such as a faster forward pass.

The replacement is an attribute of the instance, a partial of a function that has a name: the module keeps its class, so
that it can be copied, pickled and sent to another process, which finds both the class and the function by their names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

__all__ = ["replace_method", "restore_method"]


def replace_method(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Let ``module.name(...)`` call ``function(module, ...)``, which may call ``type(module).name(module, ...)``.

    Parameters
    ----------
    module
        Whose method it is; others of its class keep theirs.
    name
        Of a method that the class has.
    function
        At the top level of its module.
    """
    vars(module)[name] = partial(function, module)


def restore_method(module: nn.Module, name: str) -> None:
    """Give a module the method of its class back; nothing happens if it was not replaced."""
    vars(module).pop(name, None)
