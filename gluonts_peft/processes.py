"""How processes end: asked to by a signal, and together with the process that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .files import machine

__all__ = [
    "Terminated",
    "asked_to_end",
    "end_with_parent",
    "end_workers",
    "keeping_handler",
    "private_caches",
    "scratch",
    "terminable",
]

_PR_SET_PDEATHSIG = 1
# Systems that ask twice mean it once; after that a second request is one to end at once.
_ONCE = 2.0


class Terminated(BaseException):  # noqa: N818
    """The process was asked to end, by SIGTERM or SIGHUP; like KeyboardInterrupt it is no error.

    Parameters
    ----------
    number
        Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """What shells and schedulers expect: 143 for SIGTERM."""
        return 128 + self.number


def asked_to_end(error: BaseException) -> BaseException | None:
    """Return the interruption behind an error: compiled code, as Ray's, may put an error of its own in its place."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, Terminated | KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen


@contextmanager
def terminable() -> Iterator[None]:
    """Within the context SIGTERM and SIGHUP raise :class:`Terminated`, so that what is unfinished is put in order.

    Only what would end the process anyway is replaced: not the handlers of others, not a signal that is ignored, as
    ``nohup`` does, and nothing at all outside of the main thread.
    """
    asked: list[float] = []

    def end(number: int, frame: Any) -> None:
        if asked and time.monotonic() - asked[0] < _ONCE:
            return
        if asked:
            os._exit(128 + number)
        asked.append(time.monotonic())
        raise Terminated(number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def keeping_handler(number: int) -> Iterator[None]:
    """Put the handler of a signal back that a library replaces within the context, if this is the main thread."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(number) if main else None
    try:
        yield
    finally:
        if main and handler is not None:
            signal.signal(number, handler)


@contextmanager
def scratch(prefix: str, place: str | None = None) -> Iterator[Path]:
    """Lend a folder for temporary files, and remove those that processes of this machine which were killed have left.

    Parameters
    ----------
    prefix
        Of its name, which is short: sockets may lie in it.
    place
        Where; by default in the system's folder for such.
    """
    me = f"{os.getpid()} {machine()}"
    for owner in Path(place or tempfile.gettempdir()).glob(f"{prefix}????????/owner"):
        with suppress(OSError, ValueError, OverflowError):
            process, where = owner.read_text().split()
            if where == machine() and not _exists(int(process)):
                shutil.rmtree(owner.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    (folder / "owner").write_text(me)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def private_caches() -> Iterator[None]:
    """Within the context libraries keep their caches in a folder that is deleted at the end, not in the user's home.

    For programs of ours only: matplotlib looks for the user's settings there too. What the user has set, or a cache
    that is there already, is used.
    """
    home = Path("~").expanduser()
    theirs = any((home / place / "matplotlib").exists() for place in (".cache", ".config"))
    wanted = {"MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "torchinductor"}
    names = [name for name in wanted if name not in os.environ and not (theirs and name == "MPLCONFIGDIR")]
    if not names:
        yield
        return
    with scratch("gluonts-peft-") as folder:
        os.environ.update({name: str(folder / wanted[name]) for name in names})
        try:
            yield
        finally:
            for name in names:
                os.environ.pop(name, None)


def end_with_parent() -> None:
    """Let this process, a worker of ``multiprocessing``, end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform == "linux":
        # At once, whatever this process is in the middle of.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def end_workers(executor: ProcessPoolExecutor) -> None:
    """End the processes of a pool without waiting for what they are doing."""
    for process in list((getattr(executor, "_processes", None) or {}).values()):
        process.terminate()
