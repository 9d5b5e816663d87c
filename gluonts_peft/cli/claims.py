"""Folders and files that a verb writes to, claimed before anything is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["PREDICTOR", "claiming", "new_folder", "take_out"]


PREDICTOR = ("adapter", "items.safetensors", "predictor.json", "gluonts-config.json")


@contextmanager
def new_folder(out: Path, resume: bool) -> Iterator[Path]:
    """Claim a folder that is not in use; lend its subfolder for training, and leave nothing but what can be resumed.

    The checkpoint of the training goes last of all, so that a run that is killed at any moment can be resumed.
    """
    from ..files import LOCK, foreign, locked

    training = out / "training"
    last = training / "last.ckpt"

    def check() -> None:
        there = foreign(training) if training.is_dir() else []
        interrupted = last.name in there or (training / "series").is_dir()
        if (out / PREDICTOR[-1]).exists() and not (last.name in there and resume):
            raise FileExistsError(f"--out {out} already holds a predictor; name another folder")
        ours = {training.name, *(PREDICTOR if interrupted else ())}
        others = set(foreign(out)) - ours if out.is_dir() else out.exists()
        if others or (there and not (interrupted and resume)):
            remedy = ", or go on with its interrupted run: --resume" if interrupted else ""
            raise FileExistsError(f"--out {out} is in use; name a new folder{remedy}")

    made = [place for place in (training, out, *out.parents) if not place.exists()]
    if not (training / LOCK).exists():
        # Otherwise the lock of a running process gives the better message.
        check()
    with _undoing([training, *made]), locked(training, "fit", out):
        claimed = False
        try:
            check()
            claimed = True
            yield training
        except BaseException as error:
            error.resumable = last.exists()  # type: ignore[attr-defined]
            if (claimed and not last.exists()) or not foreign(training):
                _remove(training)
            raise
        _remove(training, last)


@contextmanager
def _undoing(made: list[Path]) -> Iterator[None]:
    """Remove the folders that were made, the innermost first, as far as they are empty at the end."""
    try:
        yield
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def _remove(training: Path, last: Path | None = None) -> None:
    import shutil

    for path in sorted(training.iterdir(), key=lambda path: (path == last, path.name == ".lock")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def take_out(out: Path) -> None:
    """Remove the predictor that a run which was killed while it delivered it has left, to be delivered again."""
    import shutil

    for path in (out / name for name in reversed(PREDICTOR)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def claiming(verb: Callable[..., None]) -> Callable[..., None]:
    """Refuse what another process is about to write to ``--out``, before anything is computed."""

    @functools.wraps(verb)
    def claimed(**arguments: Any) -> None:
        from ..files import workshop

        out: Path | None = arguments["out"]
        if out is None or not out.absolute().parent.is_dir():
            return verb(**arguments)
        with workshop(out, "claim", verb.__name__):
            return verb(**arguments)

    return claimed
