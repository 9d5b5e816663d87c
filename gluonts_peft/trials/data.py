"""The data of a trial: which series there are, and which of them it trains on, validates on and is tested on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..series.table import DataEntry, split_by_item
from .dataspec import DataSpec

__all__ = ["Data", "deal", "load_data"]


@dataclass(frozen=True)
class Data:
    """The parts of the data, what was never divided between them (``TrialResult.units``), and the SHA-256 over all."""

    train: list[DataEntry]
    validation: list[DataEntry]
    test: list[DataEntry]
    unit: str
    fingerprint: str


def load_data(spec: DataSpec) -> Data:
    """Read or simulate the series of a spec and divide them.

    Equal specs are loaded once a process, as long as their files stay the same: what is returned is shared and must not
    be changed.

    Raises
    ------
    ValueError
        If the data cannot be read, or nothing is left.
    """
    return _load(spec.model_dump_json(), *(_state(Path(path)) for path in spec.paths().values()))


def _state(path: Path) -> tuple[Any, ...]:
    """Return what tells whether a file, or what lies in a folder and beside it, has changed."""
    path = path.absolute()
    # A folder of one part takes its frequency and its manifest from those above.
    about = [folder / name for folder in path.parents[:2] for name in ("metadata.json", "manifest.json")]
    files = [path, *about, *(sorted(path.rglob("*")) if path.is_dir() else [])]
    found = ((file, file.stat()) for file in files if file.is_file())
    return tuple((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for file, stat in found)


@lru_cache(maxsize=16)
def _load(text: str, *state: Any) -> Data:
    spec = DataSpec(**json.loads(text))
    # What only divides is not read for: the folds of a study share their series.
    entries, units, unit = _series(spec.model_copy(update=_UNDIVIDED).model_dump_json(), *state)
    # All units, also those that have nothing of what is selected: a unit is in the same part whatever that is.
    part_of = {unit: part for part, those in enumerate(_divided(list(units), spec)) for unit in those}
    parts: tuple[list[DataEntry], ...] = ([], [], [])
    for entry in entries:
        parts[part_of[spec.group_of(str(entry["item_id"]))]].append(entry)
    for name, share, part in zip(("training", "validation", "test"), spec.fractions, parts, strict=True):
        if share and not part:
            having = len({spec.group_of(str(entry["item_id"])) for entry in entries})
            where = "part" if spec.folds is None else f"part of fold {spec.fold}"
            remedy = (
                f"other data.fractions than {spec.fractions}"
                if spec.folds is None
                else f"fewer data.folds than {spec.folds}"
            )
            raise ValueError(
                f"no series is left in the {name} {where}: {having} of {len(units)} groups have one; use"
                f" {remedy}, or another data.split_seed than {spec.split_seed}"
            )
    train, validation, test = parts
    train = _limited(train, spec)
    return Data(train, validation, test, unit, _fingerprint(train, validation, test))


# What all sources have says how their series are used, but for what a group is.
_UNDIVIDED = {name: field.default for name, field in DataSpec.model_fields.items() if name not in ("source", "group")}


@lru_cache(maxsize=8)
def _series(text: str, *_: Any) -> tuple[tuple[DataEntry, ...], tuple[str, ...], str]:
    """Return the series of a spec, the names of all groups of its source, and what a group is called."""
    spec = DataSpec(**json.loads(text))
    entries = spec.load()
    return tuple(spec.select(entries)), tuple(spec.units(entries)), spec.unit(entries)


def _divided(units: list[str], spec: DataSpec) -> tuple[list[str], ...]:
    """Return the groups to train on, to validate on and to test."""
    tested: list[str] = []
    fractions = spec.fractions
    if spec.folds is not None:
        fold = deal(units, spec.folds, spec.split_seed)
        tested = [unit for unit in units if fold[unit] == spec.fold]
        units = [unit for unit in units if fold[unit] != spec.fold]
        train, validation, _ = fractions
        fractions = (train / (train + validation), validation / (train + validation), 0.0)
        if len(units) < 2 and validation:
            raise ValueError(
                f"data.folds {spec.folds} leaves {len(units)} group to train and to validate on; give more series, or"
                f" data.fractions without a validation share in place of {spec.fractions}"
            )
    parts = split_by_item([{"item_id": unit} for unit in units], fractions=fractions, seed=spec.split_seed)
    train_units, validation_units, rest = ([unit["item_id"] for unit in part] for part in parts)
    return train_units, validation_units, tested or rest


def deal(units: Sequence[str], folds: int, seed: int = 0) -> dict[str, int]:
    """Deal units into disjoint folds whose sizes differ by one at most.

    The fold of a unit depends on the names of all units, their number and the seed, not on their order: units are
    sorted by the SHA-256 of seed and name, and cut into blocks. One unit more or less moves at most ``folds - 1``
    others.

    Parameters
    ----------
    units
        Names, each once.
    folds
        How many.
    seed
        Other seeds deal otherwise.

    Returns
    -------
    dict[str, int]
        Unit -> number of its fold, from 0.

    Raises
    ------
    ValueError
        If there are fewer units than folds.
    """
    if len(units) < folds:
        raise ValueError(f"data.folds {folds} is more than the {len(units)} groups that there are; name fewer")
    order = sorted(units, key=lambda unit: hashlib.sha256(f"{seed} {unit}".encode()).digest())
    return {unit: place * folds // len(order) for place, unit in enumerate(order)}


def _limited(train: list[DataEntry], spec: DataSpec) -> list[DataEntry]:
    """Leave out what a spec does not want to train on."""
    if spec.train_series is not None:
        if spec.train_series > len(train):
            raise ValueError(
                f"train_series {spec.train_series} is more than the {len(train)} training series that there are"
            )
        # One order for all numbers, so that fewer are a part of more.
        order = np.random.default_rng(spec.split_seed).permutation(len(train))
        train = [train[position] for position in sorted(order[: spec.train_series])]
    if spec.train_steps is not None:
        shortened = []
        for entry in train:
            target = entry["target"]
            gone = max(0, target.shape[-1] - spec.train_steps)
            if np.isfinite(target[..., gone:]).any():
                shortened.append({**entry, "target": target[..., gone:], "start": entry["start"] + gone})
        train = shortened
    return train


def _fingerprint(*parts: list[DataEntry]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} series\n".encode())
        for entry in part:
            target = np.ascontiguousarray(entry["target"])
            start = entry["start"]
            digest.update(f"{entry['item_id']} {start} {start.freqstr} {target.dtype} {target.shape}\n".encode())
            digest.update(target.tobytes())
    return digest.hexdigest()
