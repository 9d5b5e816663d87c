"""Options of the command line that say how data are to be read: declared once, for all verbs that read data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

__all__ = ["Columns", "reads_data"]


@dataclass(frozen=True)
class Columns:
    """Which columns and how they are written; each field is an option of the command line."""

    freq: Annotated[str | None, typer.Option(help="Frequency such as 5min, h or D.  [default: inferred]")] = None
    item_id: Annotated[
        str, typer.Option(help="Column with the name of the series; '' for a table of a single one.")
    ] = "item_id"
    timestamp: Annotated[str, typer.Option(help="Column with the time stamps.")] = "timestamp"
    target: Annotated[str, typer.Option(help="Column with the values.")] = "target"
    sep: Annotated[str, typer.Option(help="What is between the fields of a CSV file; '\\t' is a tab.")] = ","
    decimal: Annotated[str, typer.Option(help="Decimal mark of a CSV file.")] = "."
    date_format: Annotated[
        str | None, typer.Option(help="How time stamps are written, e.g. '%d.%m.%Y %H:%M'.  [default: ISO 8601]")
    ] = None
    encoding: Annotated[str, typer.Option(help="Encoding of a CSV file, e.g. latin-1 or utf-16.")] = "utf-8"
    ignore: Annotated[
        list[str] | None, typer.Option(help="Column that is meant to be left out, '*' for all; repeatable.")
    ] = None

    known: Annotated[
        list[str] | None,
        typer.Option(help="Column of a feature that is known in the future too, as promotions; repeatable, or a,b."),
    ] = None
    past: Annotated[
        list[str] | None,
        typer.Option(help="Column of a feature that is known in the past only, as temperatures; repeatable, or a,b."),
    ] = None

    @property
    def names(self) -> tuple[str, str, str]:
        """Names of the columns for item, time and value, for what is written."""
        return self.item_id or "item_id", self.timestamp, self.target

    def read(self, path: Path, **changes: Any) -> list[dict[str, Any]]:
        """Read a dataset; ``changes`` are arguments of `read_dataset`."""
        from ..series.table import read_dataset

        options = {field.name: getattr(self, field.name) for field in fields(self)}
        ignore = list(self.ignore or ()) + list(changes.pop("also_ignore", ()))
        options |= {"item_id": self.item_id or None, "ignore": True if "*" in ignore else ignore}
        options |= {name: _several(getattr(self, name)) for name in ("known", "past")}
        return read_dataset(path, **{**options, **changes})


def reads_data(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of `Columns`, in place of its keyword ``columns``."""
    hints = get_type_hints(verb, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(verb).parameters.values()
        if parameter.name != "columns"
    ]
    shared = get_type_hints(Columns, include_extras=True)
    more = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=shared[field.name]
        )
        for field in fields(Columns)
    ]

    def run(**given: Any) -> None:
        columns = Columns(**{field.name: given.pop(field.name) for field in fields(Columns)})
        verb(**given, columns=columns)

    run.__name__, run.__doc__, run.__module__ = verb.__name__, verb.__doc__, verb.__module__
    run.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *more)}
    return run


def _several(given: list[str] | None) -> list[str]:
    """Return the names of columns that were given one by one or separated by commas."""
    return [name for each in given or () for name in each.split(",") if name]
