"""The base of all specs: immutable, without unknown keys, and with faults that name the option and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from ..errors import unknown

__all__ = ["SpecError", "StrictSpec", "with_options"]


class SpecError(ValueError):
    """A spec cannot be used; the message lists every fault.

    Parameters
    ----------
    what
        The thing that is wrong, e.g. ``"trial"``.
    faults
        A sentence each, with the path of the option.
    """

    def __init__(self, what: str, faults: Sequence[str]) -> None:
        self.what = what
        self.faults = list(dict.fromkeys(faults))
        count = len(self.faults)
        text = self.faults[0] if count == 1 else f"{count} faults" + "".join(f"\n- {fault}" for fault in self.faults)
        super().__init__(f"{what} cannot be used: {text}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.faults)


class StrictSpec(BaseModel):
    """Immutable, without unknown keys, and with readable errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SpecError(self.called(), _faults(type(self), error, values)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not {"bool", "Any"} & set(
            _names(cls.model_fields[str(info.field_name)].annotation)
        ):
            raise ValueError(f"{json.dumps(value)} is neither a number nor a name")
        return value

    # Without this mark pydantic would call __init__ for nested specs too, and their faults would lose their path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def called(cls) -> str:
        """Return what messages call such a thing."""
        return cls.__name__.removesuffix("Spec").lower()

    @classmethod
    def checking(cls, values: Any) -> type[StrictSpec]:
        """Return the class that checks some values: this one, or one of those that it stands for."""
        return cls

    @classmethod
    def unknown_option(cls, name: str, value: Any) -> str:
        """Return the sentence for an option that the class does not have."""
        return unknown("option", name, cls.model_fields)

    def normal_form(self) -> dict[str, Any]:
        """Return the spec as JSON values, all defaults spelled out."""
        form: dict[str, Any] = self.model_dump(mode="json")
        return form


def _names(annotation: Any) -> list[str]:
    """Return the names of the types in an annotation: that itself, or the members of a union."""
    return [getattr(each, "__name__", str(each)) for each in (get_args(annotation) or (annotation,))]


def with_options(kind: str, value: Mapping[Any, Any], normal: Callable[[str], Any], example: str) -> Any:
    """Return a mapping with a name and options in its normal form: the options sorted, without any the name alone."""
    if not isinstance(value.get("name"), str):
        raise ValueError(f"{kind} {dict(value)!r} has no 'name'; write e.g. {example}")
    name = normal(value["name"])
    try:
        options = json.loads(json.dumps({str(key): option for key, option in value.items() if key != "name"}))
    except TypeError as error:
        raise ValueError(f"{kind} {dict(value)!r} holds what JSON cannot: {error}") from None
    return {"name": name, **{key: options[key] for key in sorted(options)}} if options else name


def _faults(model: type[StrictSpec], error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    faults = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        cause = item.get("ctx", {}).get("error")
        if item["type"] == "extra_forbidden":
            *parents, key = item["loc"]
            where = f"{'.'.join(map(str, parents))}: " if parents else ""
            faults.append(where + _model_at(model, parents, values).unknown_option(str(key), item["input"]))
        elif item["type"] == "missing":
            faults.append(f"{path} is missing")
        elif isinstance(cause, SpecError):
            faults.extend(cause.faults)
        elif cause is not None:
            faults.append(f"{path}: {cause}" if path else str(cause))
        else:
            faults.append(f"{path} {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return faults


def _model_at(model: type[StrictSpec], location: Sequence[Any], values: Any) -> type[StrictSpec]:
    """Return the class that has checked what lies at a place in some values."""
    parts = iter(location)
    for part in parts:
        inner, values = model.model_fields[part].annotation, values[part]
        if get_origin(inner) is dict:
            # The names of a mapping lead to what its values are.
            inner, values = get_args(inner)[1], values[next(parts)]
        if not (isinstance(inner, type) and issubclass(inner, StrictSpec)):
            break
        model = inner.checking(values)
    return model
