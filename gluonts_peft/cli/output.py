"""What verbs print: lines, facts and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "facts", "print_rows", "say", "stopped"]


# Wide enough that no cell of a table is wrapped or cut when the output goes to a file or another program.
PIPE_WIDTH = 1000


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH)


def say(text: str, stderr: bool = False) -> None:
    console(stderr).print(text, markup=False, highlight=False, soft_wrap=True)


def print_rows(
    header: Iterable[str], rows: Iterable[Iterable[object]], title: str | None = None, right: int = 99
) -> None:
    """Print a table; columns from number ``right`` on are numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for position, name in enumerate(header):
        table.add_column(Text(name), justify="right" if position >= right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console().print(table)


def facts(rows: Iterable[tuple[str, object]]) -> None:
    for name, value in rows:
        say(f"{name + ':':<22}{value}")


def stopped(run: Any) -> list[tuple[str, str]]:
    """Say why a training ended before it was done, if the clock ended it."""
    after = f"after {run.epochs} epochs and {run.steps} steps"
    return [("stopped", f"{run.stopped}, {after}: the same command may end elsewhere")] if run.stopped else []
