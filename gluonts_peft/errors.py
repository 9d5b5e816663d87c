"""What errors of all modules have in common: the sentence for an unknown name, and the check of a whole number."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable

__all__ = ["unknown", "whole_number"]


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the sentence for an unknown name: what it is, the nearest known one, and all there are.

    Parameters
    ----------
    kind
        Singular noun: what the name is meant to be a name of.
    name
        What was given.
    known
        Names that would do.

    Examples
    --------
    >>> unknown("adapter", "lorra", ["vera", "lora"])
    "adapter 'lorra' is unknown; did you mean 'lora'? known: lora, vera"
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"{kind} {name!r} is unknown;{hint} known: {', '.join(known) or '(none)'}"


def whole_number(name: str, value: int, minimum: int) -> int:
    """Return an argument that must be a whole number and at least ``minimum``.

    Raises
    ------
    TypeError, ValueError
        If it is not; the message names the argument and the value.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {number}")
    return number
