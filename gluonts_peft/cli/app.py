"""The program: its verbs, what their errors look like, and its exit codes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .output import say

__all__ = ["app", "example"]


def example(arguments: str) -> str:
    # Else the parser would wrap it, and it could not be pasted.
    return f"\b\ngluonts-peft {arguments}"


class Verbs(TyperGroup):
    """Turns what a verb raises into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        from ..processes import Terminated, asked_to_end, private_caches, terminable

        try:
            with one_line_warnings(), terminable(), private_caches():
                return super().invoke(ctx)
        except BaseException as error:
            # Lightning turns Ctrl-C into exit code 1, and Ray's compiled code an interruption into an error.
            asked = asked_to_end(error)
            if isinstance(asked, Terminated):
                say(f"terminated ({asked}); {_remedy(ctx, error)}", stderr=True)
                raise typer.Exit(asked.exit_code) from None
            if asked is not None:
                say("interrupted", stderr=True)
                raise typer.Exit(130) from None
            # Errors of the parser, and its exits, carry their own code; a closed pipe is nobody's fault.
            theirs = not isinstance(error, Exception) or hasattr(error, "exit_code")
            if ctx.params["debug"] or theirs or isinstance(error, BrokenPipeError):
                raise
            if isinstance(error, ValueError | OSError | ImportError):
                code, line = 2, f"error: {error}"
            else:
                code, line = 1, f"error: {type(error).__name__}: {error} (unexpected; --debug shows where)"
        say(line, stderr=True)
        raise typer.Exit(code)


def _remedy(ctx: Any, error: BaseException) -> str:
    """Say how to go on after an interruption."""
    if getattr(error, "resumable", False):
        return "repeat the command with --resume to go on after the last epoch that was finished"
    if ctx.invoked_subcommand in ("study", "search", "demo"):
        return "what was finished is in --out: repeat the command to go on"
    return "nothing was written: repeat the command"


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    no_args_is_help=True,
    # Plain help is never cut, whatever the width; and errors of the parser look like all others.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"{record.levelname.lower()}: {record.getMessage()}", stderr=True)

    handler, root = Handler(logging.WARNING), logging.getLogger()
    root.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `json`-module", UserWarning)
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}", stderr=True)
            yield
    finally:
        root.removeHandler(handler)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        say(f"gluonts-peft {__version__}")
        raise typer.Exit


@app.callback(epilog=example("fit train.csv --out model --horizon 24 --adapter lora"))
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Show it.")] = False,
) -> None:
    """Adapt pretrained time-series forecasters with a few trainable parameters, and see whether it helped."""
