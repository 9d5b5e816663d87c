"""The values that one option of a trial can take.

Spaces have the names and fields that Ludwig's and Ray Tune's have. Optuna, which draws from them, is imported
when the first value is drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from ..moved import moved
from .strict import StrictSpec

__all__ = ["Kind", "Space", "several"]

Kind = Literal[
    "uniform", "quniform", "loguniform", "qloguniform", "randint", "qrandint", "lograndint", "qlograndint", "choice"
]


class Space(StrictSpec):
    """The values that one option of a trial can take.

    Parameters
    ----------
    space
        ``uniform``, ``loguniform`` (floats from ``lower`` to ``upper``), ``randint``, ``lograndint`` (integers from
        ``lower`` to below ``upper``), each with a leading ``q`` rounded to multiples of ``q`` (where ``upper`` belongs
        to integers too), or ``choice`` of ``categories``: as ``ray.tune`` has them.
    lower, upper
        Bounds.
    q
        Step; the bounds are multiples of it.
    categories
        Of ``choice``: any values of YAML.
    when
        Path of the space -> value or values of it: only with these the option is there at all.
    """

    space: Kind
    lower: float | None = None
    upper: float | None = None
    q: float | None = None
    categories: list[Any] | None = None
    when: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_log(self) -> bool:
        """Whether the logarithm is uniform."""
        return "log" in self.space

    @property
    def is_integer(self) -> bool:
        """Whether values are whole numbers."""
        return self.space.endswith("randint")

    @model_validator(mode="after")
    def _check(self) -> Space:
        if self.space == "choice":
            needed = {"categories"}
        else:
            needed = {"lower", "upper", "q"} if self.space.startswith("q") else {"lower", "upper"}
        for name in ("lower", "upper", "q", "categories"):
            value = getattr(self, name)
            if name in needed and value is None:
                raise ValueError(f"space {self.space!r} needs {name!r}")
            if name not in needed and value is not None:
                raise ValueError(f"{name} {value!r} has no effect in space {self.space!r}; drop it")
        if self.space == "choice":
            forms = [json.dumps(category, sort_keys=True) for category in self.categories or ()]
            if not forms:
                raise ValueError("categories has no values; name at least one")
            if len(set(forms)) < len(forms):
                raise ValueError(f"categories {self.categories} has a value more than once")
            return self
        lower, upper, q = self.lower, self.upper, self.q
        assert lower is not None
        assert upper is not None
        if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper):
            raise ValueError(f"lower {lower:g} must be below upper {upper:g}, both finite")
        if self.is_log and lower <= 0:
            raise ValueError(f"lower {lower:g} must be above 0 in space {self.space!r}")
        if self.is_integer and not all(value is None or value == int(value) for value in (lower, upper, q)):
            raise ValueError(f"lower, upper and q of space {self.space!r} must be whole numbers")
        if q is not None and (q <= 0 or any(abs(v / q - round(v / q)) > 1e-9 for v in (lower, upper))):
            raise ValueError(f"lower {lower:g} and upper {upper:g} must be multiples of q {q:g}, which is above 0")
        return self

    def corners(self) -> list[Any]:
        """Return the values between which, or one of which, all others are."""
        if self.categories is not None:
            return self.categories
        assert self.upper is not None
        last = self.upper - 1 if self.is_integer and self.q is None else self.upper
        return [self._value(self.lower), self._value(last)]

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Whether the option is there, given the values of earlier ones."""
        return all(path in values and values[path] in several(allowed) for path, allowed in self.when.items())

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the function of that name in ``ray.tune``."""
        if self.categories is not None:
            return {"categories": self.categories}
        kind = int if self.is_integer else float
        named = {"lower": self.lower, "upper": self.upper, "q": self.q}
        return {name: kind(value) for name, value in named.items() if value is not None}

    def distribution(self) -> Any:
        """Return what Optuna draws from; a choice is drawn by its number."""
        from optuna import distributions

        if self.categories is not None:
            return distributions.CategoricalDistribution(range(len(self.categories)))
        assert self.lower is not None
        assert self.upper is not None
        if self.is_integer:
            last = int(self.upper) - (self.q is None)
            return distributions.IntDistribution(int(self.lower), last, log=self.is_log)
        return distributions.FloatDistribution(self.lower, self.upper, log=self.is_log)

    def decode(self, drawn: Any) -> Any:
        """Return the value of the option for what Optuna has drawn."""
        return self._value(drawn) if self.categories is None else self.categories[drawn]

    def encode(self, value: Any) -> Any | None:
        """Return what Optuna would have drawn for a value; None if it is not in the space."""
        if self.categories is not None:
            return self.categories.index(value) if value in self.categories else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        low, high = self.corners()
        return value if low <= value <= high else None

    def _value(self, number: Any) -> Any:
        if self.q is not None:
            # Without the last digits, which are the noise of the product.
            number = float(f"{round(number / self.q) * self.q:.12g}")
        return int(number) if self.is_integer else float(number)


def several(allowed: Any) -> list[Any]:
    return allowed if isinstance(allowed, list) else [allowed]


__getattr__ = moved(
    __name__,
    {
        "Proposer": "gluonts_peft.trials.proposer",
        **dict.fromkeys(
            (
                "ResourceSpec",
                "SchedulerSpec",
                "SearchSpec",
                "SearcherSpec",
                "is_mutable",
                "load_search",
                "metric_columns",
                "search_schema",
            ),
            "gluonts_peft.trials.searchspec",
        ),
    },
)
