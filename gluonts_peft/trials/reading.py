"""Reading what people wrote as YAML and what trials left as JSON; every fault names the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..files import NewerFormat, check_regular, load_json, opened, parse_yaml
from .strict import SpecError, StrictSpec

__all__ = ["from_record", "mapping_of", "read_json", "read_record", "read_yaml"]

_S = TypeVar("_S", bound=StrictSpec)


def read_yaml(path: str | os.PathLike[str], what: str, keys: str) -> dict[str, Any]:
    """Read a study or a search: a mapping with a mapping ``base``.

    Raises
    ------
    SpecError
        If the file is missing, is not YAML, or is no such mapping; the message names the keys.
    """
    path = Path(path)
    try:
        check_regular(path)
        form, root = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SpecError(f"{what} '{path}'", [f"it cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        reason = str(error) if str(error).startswith("it ") else f"it is not YAML: {error}"
        raise SpecError(f"{what} '{path}'", [reason]) from error
    if repeated := _repeated_keys(root):
        raise SpecError(f"{what} '{path}'", repeated)
    if not isinstance(form, dict) or not isinstance(form.get("base"), dict):
        raise SpecError(f"{what} '{path}'", [f"expected a mapping with the keys {keys}"])
    return form


def mapping_of(form: Mapping[str, Any], name: str, what: str, holds: str) -> dict[str, Any]:
    """Return a copy of the part of a file that is a mapping, empty if it is not there.

    Raises
    ------
    SpecError
        If it is something else.
    """
    part = form.get(name)
    if part is not None and not isinstance(part, dict):
        raise SpecError(what, [f"{name} {part!r} is not a mapping of {holds}"])
    return dict(part or {})


def read_record(folder: str | Path, name: str, what: str) -> dict[str, Any]:
    """Read the JSON file by which a folder is known as that of a study or a search.

    Raises
    ------
    SpecError
        If there is none, or it is not JSON.
    """
    path = Path(folder) / name
    if not path.exists():
        raise SpecError(f"folder '{folder}'", [f"it has no {name}; name the folder of a {what}"])
    content = read_json(path)
    if not isinstance(content, dict):
        raise SpecError(f"'{path}'", [f"it holds a {type(content).__name__}, not a mapping"])
    return content


def read_json(path: Path, remedy: str = "") -> Any:
    """Read a JSON record of a study, a search or a trial, without the number of its format.

    Raises
    ------
    SpecError
        If it is damaged, or written by a newer version.
    """
    try:
        return opened(load_json(path))
    except NewerFormat as error:
        raise SpecError(f"'{path}'", [f"it was {error}"]) from None
    except OSError as error:
        raise SpecError(f"'{path}'", [f"it cannot be read: {error.strerror}{remedy}"]) from error
    except ValueError as error:
        raise SpecError(f"'{path}'", [f"{error}{remedy}"]) from error


def from_record(kind: type[_S], path: Path, content: Any = None, remedy: str = "") -> _S:
    """Build a spec or result from a JSON record, see :func:`read_json`, or from a part of it."""
    content = read_json(path, remedy) if content is None else content
    try:
        return kind(**content)
    except SpecError as error:
        newer = [fault for fault in error.faults if "option " in fault and " is unknown" in fault]
        if newer:
            raise SpecError(
                f"'{path}'", [f"it was written by a newer version of gluonts-peft ({newer[0]}): update it"]
            ) from error
        raise SpecError(f"'{path}'", [f"{fault}{remedy}" for fault in error.faults]) from error
    except (ValueError, TypeError) as error:
        raise SpecError(f"'{path}'", [f"{error}{remedy}"]) from error


def _repeated_keys(root: Any) -> list[str]:
    """Return a fault for each key that a mapping of YAML has twice: the second would silently replace the first."""
    import yaml

    faults, waiting, seen = [], [root], set[int]()
    while waiting:
        node = waiting.pop(0)
        # Aliases may lead in a circle.
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            waiting += node.value
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            waiting.append(value)
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    faults.append(f"line {line}: key {key.value!r} is there already, on line {lines[name]}; drop one")
                lines.setdefault(name, line)
    return faults
