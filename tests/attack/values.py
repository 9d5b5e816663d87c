"""Hostile values, and ways to damage what is nested or stored."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 10**9, 10**30, -(10**12), 0.0, -0.5, 0.3, 1.0, 1e-30, 1e38, 1e300,
    float("nan"), float("inf"), float("-inf"), "", " ", "lora", "no such thing", "12", "nan", "../../etc", "a/b",
    "\x00", "(a+)+$", "[", "é" * 50, "x" * 5000, [], [1], ["q"], ["no such place"], [None], [[]], {}, {"name": "lora"},
    {"a": {"b": {}}}, [1, 2, 3], "q", "cpu", "cuda:9", "5min", "h", "D", "bolt-nano",
)  # fmt: skip


def hostile(generator: np.random.Generator) -> Any:
    """Return one of the hostile values."""
    return copy.deepcopy(HOSTILE[int(generator.integers(len(HOSTILE)))])


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a nested structure, itself left out."""
    found = []
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        found += [(*path, key), *places(value, (*path, key))]
    return found


def mutate(tree: Any, generator: np.random.Generator) -> tuple[Any, tuple[Any, ...], str]:
    """Change one place of a nested structure: replace, remove, rename or repeat it. Returns it, the place and how."""
    tree = copy.deepcopy(tree)
    paths = places(tree)
    path = paths[int(generator.integers(len(paths)))]
    owner = tree
    for key in path[:-1]:
        owner = owner[key]
    way = str(generator.choice(["replace", "replace", "replace", "remove", "rename", "wrap", "deep"]))
    value = owner[path[-1]]
    if way == "replace":
        owner[path[-1]] = hostile(generator)
    elif way == "remove":
        del owner[path[-1]]
    elif way == "rename" and isinstance(owner, dict):
        owner[f"{path[-1]}_"] = owner.pop(path[-1])
    elif way == "wrap":
        owner[path[-1]] = [value]
    else:
        for _ in range(int(generator.integers(1, 400))):
            value = [value]
        owner[path[-1]] = value
    return tree, path, way


def damage(file: Path, generator: np.random.Generator) -> str:
    """Damage a file in one of many ways; returns how."""
    content = file.read_bytes()
    ways = ["truncate", "flip", "zero", "empty", "append", "garbage", "fifo", "folder", "header", "link to itself"]
    way = str(generator.choice(ways))
    if way == "truncate":
        file.write_bytes(content[: int(generator.integers(len(content)))])
    elif way in ("flip", "zero", "header"):
        changed = bytearray(content)
        reach = min(len(changed), 4096) if way == "header" else len(changed)
        for _ in range(int(generator.integers(1, 9))):
            place = int(generator.integers(reach))
            changed[place] = 0 if way == "zero" else changed[place] ^ (1 << int(generator.integers(8)))
        file.write_bytes(bytes(changed))
    elif way == "empty":
        file.write_bytes(b"")
    elif way == "append":
        file.write_bytes(content + generator.bytes(int(generator.integers(1, 5000))))
    elif way == "garbage":
        file.write_bytes(generator.bytes(int(generator.integers(1, 5000))))
    else:
        file.unlink()
        if way == "fifo":
            os.mkfifo(file)
        elif way == "folder":
            file.mkdir()
        else:
            file.symlink_to(file)
    return way
