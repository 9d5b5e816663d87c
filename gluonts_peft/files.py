"""Files and folders that appear whole or not at all, one owner at a time, and bounded reading of what others wrote.

**Writing.** :func:`replacing` writes one file, :func:`delivering` a file or folder that is claimed from the start, so
that of two processes with one target the second is refused before it computes anything. What a killed process leaves
are hidden files and folders named ``.<target>.*partial``; the next writer clears them.

**Reading.** :func:`load_json` and :func:`parse_yaml` read regular files up to a size and depth, and nothing but data.
:func:`opened` undoes what :func:`record` does: JSON records of this project say in which format they are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import time
import types
import typing
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

__all__ = [
    "FORMAT",
    "LOCK",
    "FolderInUse",
    "NewerFormat",
    "as_integer",
    "check_regular",
    "delivering",
    "foreign",
    "load_json",
    "locked",
    "machine",
    "opened",
    "parse_json",
    "parse_yaml",
    "record",
    "replacing",
    "typed",
    "workshop",
    "write_atomically",
]

_T = TypeVar("_T")

#: Of the JSON records that this version writes; 1 is that of 0.1.0, which has no field ``"format"``.
FORMAT = 2
LOCK = ".lock"

#: No record of ours is larger, nor is a ``config.json``; what grows with the data asks for more.
_LIMIT = 64 << 20
_DEPTH = 100
# A study of thousands of cells has some hundred lines; the parser is slow, and aliases multiply what they stand for.
_YAML_LIMIT = 1 << 20
_YAML_NODES = 200_000
# Seconds after which a file that a process of another machine did not finish is a remnant.
_FORGOTTEN = 86_400.0


class NewerFormat(ValueError):  # noqa: N818
    """A record was written by a newer version of this project."""


class FolderInUse(ValueError):  # noqa: N818
    """Another process is writing there."""


def record(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the number of its format, as it is written to disk."""
    return {"format": FORMAT, **content}


def opened(content: Any, known: Sequence[str] | None = None) -> Any:
    """Return a record without the number of its format; anything that is not a mapping is returned unchanged.

    Parameters
    ----------
    content
        As read from a file. Records without the number are those of 0.1.0.
    known
        All keys that there can be, where another one means that a newer version wrote it.

    Raises
    ------
    NewerFormat
        If the format or a key is of a newer version.
    ValueError
        If the format is no positive integer.
    """
    if not isinstance(content, dict):
        return content
    rest = dict(content)
    number = rest.pop("format", 1)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"format is {number!r}, not a positive integer")
    if number > FORMAT:
        raise NewerFormat(_newer(f"format {number}, this one reads up to {FORMAT}"))
    if known is not None and (foreign := [key for key in rest if key not in known]):
        raise NewerFormat(_newer(f"it has the key {foreign[0]!r}, which this one does not know"))
    return rest


def _newer(why: str) -> str:
    return f"written by a newer version of gluonts-peft ({why}): update it"


def load_json(path: Path, *, limit: int = _LIMIT) -> Any:
    """Read a JSON file of limited size and depth, without repeated keys.

    ``NaN`` and ``Infinity``, which Python writes, come back as numbers; who needs finite ones checks that.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If it is not a regular file (a folder, device or pipe), too large or deep, or not JSON in UTF-8. The message
        does not name the file.
    """
    with _open_regular(path) as file:
        # A buffer of that size is taken at once.
        data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes, which no file of its kind has")
    return parse_json(data.decode("utf-8-sig"))


def parse_json(text: str) -> Any:
    """Parse JSON of limited depth, without repeated keys; see :func:`load_json`."""
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEPTH} deep") from None
    level: list[Any] = [[content]]
    for _ in range(_DEPTH + 1):
        level = [inner for each in level for inner in _inside(each) if isinstance(inner, dict | list)]
        if not level:
            return content
    raise ValueError(f"it is nested more than {_DEPTH} deep")


def _inside(value: Any) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, dict) else value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def parse_yaml(text: str) -> tuple[Any, Any]:
    """Parse YAML of limited size, and return its content and its tree of nodes.

    Raises
    ------
    ValueError
        If it is not YAML, too large or deep, or has aliases that lead in a circle or stand for too much.
    """
    import yaml

    if len(text) > _YAML_LIMIT:
        raise ValueError(f"it has more than {_YAML_LIMIT:,} characters")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _measure(root)
        return yaml.safe_load(text), root
    except (yaml.YAMLError, OverflowError, TypeError) as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEPTH} deep") from None


def _measure(root: Any) -> None:
    """Count the nodes of a tree with all aliases written out."""
    import yaml

    sizes: dict[int, int] = {}
    open_: set[int] = set()

    def size(node: Any, depth: int) -> int:
        if depth > _DEPTH:
            raise ValueError(f"it is nested more than {_DEPTH} deep")
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) in open_:
            raise ValueError("its aliases lead in a circle")
        if id(node) not in sizes:
            open_.add(id(node))
            pairs = isinstance(node, yaml.MappingNode)
            inner = [part for each in node.value for part in (each if pairs else (each,))]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in inner)
            open_.discard(id(node))
        if sizes[id(node)] > _YAML_NODES:
            raise ValueError(f"its aliases stand for more than {_YAML_NODES:,} values")
        return sizes[id(node)]

    size(root, 0)


def check_regular(path: Path) -> None:
    """Make sure that opening a file cannot block or never end, as a pipe or a device would.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If it is anything but a regular file, or a link to one.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"it is a {_kind(path.stat().st_mode)}, not a file")


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return next((name for test, name in kinds.items() if test(mode)), "device")


def _open_regular(path: Path) -> IO[bytes]:
    # A pipe without a writer would block in open itself.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(number, "rb") if stat.S_ISREG(os.fstat(number).st_mode) else None
    if file is None:
        mode = os.fstat(number).st_mode
        os.close(number)
        raise ValueError(f"it is a {_kind(mode)}, not a file")
    return file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lend the name of a file beside ``path`` to write to; it takes the place of ``path`` only after all went well.

    Folders above ``path`` are made. Nobody else is lent the same name: over shared storage, a process that was given up
    for dead may still be writing. What processes of this machine that are dead have left beside ``path`` is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{_escaped(path.name)}.*.partial"):
        if _is_left(left):
            left.unlink(missing_ok=True)
    # In the same folder, as a rename is atomic only within a file system.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}_{os.getpid()}_{machine()}.partial")
    try:
        yield partial
        # What a rename puts in place must be on the disk before it.
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


@lru_cache(maxsize=1)
def machine() -> str:
    """Return what names the processes that this one can see: their numbers mean nothing elsewhere."""
    import socket

    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _is_left(partial: Path) -> bool:
    """Whether the process that wrote an unfinished file is dead, or has not touched it for a day."""
    _, *owner = partial.name.removesuffix(".partial").rsplit("_", 2)
    try:
        if len(owner) == 2 and owner[1] == machine():
            os.kill(int(owner[0]), 0)
        return time.time() - partial.stat().st_mtime > _FORGOTTEN
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False


def foreign(folder: Path) -> list[str]:
    """Return what is in a folder besides a lock and what killed processes have left unfinished."""
    names = sorted(os.listdir(folder))
    return [name for name in names if name != LOCK and not (name[0] == "." and name.endswith("partial"))]


def _sync(path: Path) -> None:
    for each in [path] if path.is_file() else path.rglob("*"):
        if each.is_file():
            with each.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def locked(folder: Path, what: str, target: Path | None = None) -> Iterator[None]:
    """Keep other processes from working in a folder, which is made, for the time of the context.

    The system takes the lock back when a process dies, however that happens.

    Parameters
    ----------
    folder
        Holds the file ``.lock``, which stays.
    what
        Works there, for the message.
    target
        What the message names; the folder by default.

    Raises
    ------
    FolderInUse
        If another process, or another thread of this one, holds the lock.
    """
    lock = _lock(folder, what, folder if target is None else target)
    try:
        yield
    finally:
        lock.close()


def _lock(folder: Path, what: str, target: Path) -> IO[bytes]:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / LOCK).open("ab")
        except FileNotFoundError:
            # Its owner has just taken the folder away.
            continue
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(folder / LOCK) and os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK)):
                return lock
            lock.close()
        except ImportError:
            return lock
        except BlockingIOError:
            lock.close()
            kind = "file" if target.is_file() else "folder"
            raise FolderInUse(f"{kind} '{target}' is in use by a {what} that is running") from None
        except FileNotFoundError:
            lock.close()
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                lock.close()
                raise
            warnings.warn(f"'{folder}' lies on storage that knows no locks: start one {what} there only", stacklevel=4)
            return lock


@contextmanager
def workshop(target: Path, purpose: str, what: str, *, within: bool = False) -> Iterator[Path]:
    """Lend a hidden, empty folder beside a target, or within it, which is claimed for the time of the context.

    What an earlier process that was killed has left there is cleared; the folder is gone afterwards, and so are folders
    above the target that were made and are empty.
    """
    target = target.absolute()
    parent = target if within else target.parent
    hidden = parent / f".{target.name}.{purpose}"
    made = [place for place in hidden.parents if not place.exists()]
    lock = _lock(hidden, what, target)
    try:
        _undeliver(hidden, target)
        _clear(hidden)
        yield hidden
    finally:
        _clear(hidden)
        # Last of all: from here on somebody else may claim it.
        with suppress(OSError):
            (hidden / LOCK).unlink()
            hidden.rmdir()
        lock.close()
        for place in made:
            with suppress(OSError):
                place.rmdir()


def _clear(hidden: Path) -> None:
    for each in hidden.iterdir() if hidden.is_dir() else ():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each, ignore_errors=True)
        elif each.name != LOCK:
            each.unlink(missing_ok=True)


_CONTENT, _MOVING = "content", "moving.json"


@contextmanager
def delivering(
    target: Path, what: str, *, names: Sequence[str] = (), check: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Claim a file or folder, and lend the name of another to write in its place; it appears whole or not at all.

    A file, a new folder or an empty one takes its place by one rename. Into a folder with other content, the parts are
    moved one by one in the order of ``names``, of which the last makes it what it is; what a process that was killed in
    between has moved is taken out again by the next one.

    Parameters
    ----------
    target
        The file or folder.
    what
        Writes it, for the message.
    names
        The parts of a folder, where other content is allowed beside them; none means it is not.
    check
        Raises if the target must not be written. Called when it is claimed, and again before it is put in place.

    Raises
    ------
    FolderInUse
        If another process has claimed it.
    OSError
        If the disk is full or the place cannot be written; then nothing of it is left.
    """
    # Nothing can be put in the place of what is mounted, and not everybody may write beside a folder of his own.
    folder = target.is_dir()
    beside = bool(os.listdir(target)) if folder else False
    within = folder and (beside or target.is_mount() or not os.access(target.absolute().parent, os.W_OK))

    def free() -> None:
        check()
        if not names and target.is_dir() and foreign(target):
            raise FolderInUse(f"folder '{target}' is in use; name a new one")

    with workshop(target, "partial", what, within=within) as hidden:
        free()
        # The name of the target: its ending may say how to write it.
        content = hidden / (_CONTENT if folder or not target.suffix else target.name)
        yield content
        _sync(content)
        free()
        if not within:
            os.replace(content, target)
            return
        parts = [name for name in names or sorted(os.listdir(content)) if (content / name).exists()]
        (hidden / _MOVING).write_text(json.dumps(parts), encoding="utf-8")
        try:
            for name in parts:
                os.replace(content / name, target / name)
            (hidden / _MOVING).unlink()
        except BaseException:
            _undeliver(hidden, target)
            raise


def _undeliver(hidden: Path, target: Path) -> None:
    """Take out again what was moved by a process that did not come to its end."""
    try:
        parts = load_json(hidden / _MOVING)
    except (OSError, ValueError):
        return
    if not isinstance(parts, list) or not parts or any(Path(str(name)).name != name for name in parts):
        return
    if not (hidden / _CONTENT / parts[-1]).exists() and (target / parts[-1]).exists():
        # All of it is in place.
        return
    for name in reversed(parts):
        moved = target / name
        if (hidden / _CONTENT / name).exists() or not moved.exists():
            continue
        shutil.rmtree(moved) if moved.is_dir() else moved.unlink()
    (hidden / _MOVING).unlink()


def typed(kind: type[_T], values: Any, name: str) -> _T:
    """Build a dataclass of plain values, and of others of its kind, from a record.

    Raises
    ------
    NewerFormat
        If the record has a key that the class does not know.
    TypeError
        If a key is missing, or a value is of another type.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{name} is {values!r}, not a mapping")
    hints = typing.get_type_hints(kind)
    if foreign := [key for key in values if key not in hints]:
        raise NewerFormat(_newer(f"{name} has the key {foreign[0]!r}, which this one does not know"))
    return kind(**{key: _checked(hints[key], value, f"{name}.{key}") for key, value in values.items()})


def _checked(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return typed(hint, value, name)
    kinds = [typing.get_origin(each) or each for each in typing.get_args(hint)] if _is_union(hint) else [hint]
    kinds = [typing.get_origin(each) or each for each in kinds]
    nested = next((each for each in typing.get_args(hint) if is_dataclass(each)), None) if _is_union(hint) else None
    if nested is not None and isinstance(value, dict):
        return _checked(nested, value, name)
    if Any in kinds or (isinstance(value, int) and not isinstance(value, bool) and float in kinds):
        return value
    if isinstance(value, list) and tuple in kinds:
        return tuple(value)
    plain = tuple(each for each in kinds if isinstance(each, type))
    if len(plain) == len(kinds) and (not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain)):
        raise TypeError(f"{name} is {value!r}, not {' or '.join(each.__name__ for each in plain)}")
    return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def as_integer(value: Any, name: str, low: int, high: int = 2**31 - 1) -> int:
    """Return an integer of a record.

    Raises
    ------
    TypeError, ValueError
        If it is something else, or out of range.
    """
    if isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, not an integer")
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, not an integer")
        raise TypeError(f"{name} is {value!r}, not an integer")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, not from {low} to {high}")
    return value
