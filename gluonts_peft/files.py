"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "write_atomically"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lend the name of a file beside ``path`` to write to; it takes the place of ``path`` only after all went well.

    Folders above ``path`` are made. Nobody else is lent the same name: over shared storage, a process that was given up
    for dead may still be writing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as a rename is atomic only within a file system.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield partial
        # What a rename puts in place must be on the disk before it.
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
