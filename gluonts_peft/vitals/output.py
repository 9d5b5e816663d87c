"""Write prepared stays as GluonTS Arrow files, divided by patient, with a manifest of where each number comes from."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..files import delivering, load_json, opened, workshop
from ..series.table import split_by_item
from .simulate import patient_of
from .stays import PRESSURES, DataEntry, Stays
from .steps import PAPER_STEPS, check_steps, prepare

__all__ = ["PARTS", "convert", "write"]

#: Folders of the parts, in the order of the fractions.
PARTS = ("train", "validation", "test")
WHOLE = "all"
MANIFEST = "manifest.json"


def write(
    stays: Stays,
    out: str | os.PathLike[str],
    *,
    vitals: Sequence[str] | None = None,
    fractions: Sequence[float] | None = (0.8, 0.1, 0.1),
    seed: int = 42,
    progress: bool = False,
) -> dict[str, Any]:
    """Write stays as a folder of GluonTS Arrow files; it appears whole or not at all.

    Each part, such as ``OUT/train``, can be read by `gluonts_peft.series.table.read_dataset` and by a trial's ``data``
    (source ``"file"``). Equal data and options give equal bytes.

    Parameters
    ----------
    stays
        What a loader or `prepare` returned. They are put on the grid, and go through their steps, now.
    out
        New folder. While it is being made, what is unfinished is in a hidden folder beside it.
    vitals
        Those that are written; by default all that were read.
    fractions
        Shares of the patients for training, validation and test, as in `gluonts_peft.series.table.split_by_item`. None
        writes one part, ``all``, for trials, which divide by themselves.
    seed
        Seed of the split.
    progress
        Whether to show a progress bar over the stays on stderr.

    Returns
    -------
    dict[str, Any]
        What is in ``OUT/manifest.json``: sources with their SHA-256, options, the counts of each rule, and of each part
        the patients, stays or windows, series, points and missing points.

    Raises
    ------
    ValueError
        If the folder is in use or cannot be made, a vital sign was not read, a fraction is wrong, nothing is left, or
        there are fewer patients than parts.
    """
    _check_split(fractions, seed)
    out = Path(out)
    wanted = tuple(stays.vitals if vitals is None else vitals)
    _check_new(out)
    with delivering(out, "conversion") as folder:
        folder.mkdir()
        rows = folder / "series.arrow"
        patients = _write_all(stays, wanted, rows, progress)
        if not patients:
            raise ValueError(f"no series is left to write to '{out}': {_losses(stays)}")
        if fractions is None:
            parts = {WHOLE: patients}
        else:
            groups = split_by_item([{"item_id": name} for name in patients], fractions=fractions, seed=seed)
            parts = {
                part: [str(entry["item_id"]) for entry in group]
                for part, group in zip(PARTS, groups, strict=True)
                if group
            }
        counts = _divide(rows, folder, parts)
        if not any(name == "windows" for name, _, _ in stays.steps):
            for found in counts.values():
                del found["windows"]
        rows.unlink()
        manifest = {
            **stays.options,
            "freq": stays.freq,
            "vitals": list(wanted),
            "sources": [asdict(source) for source in stays.sources],
            "steps": [{"name": name, "options": given} for name, given, _ in stays.steps],
            "counts": {name: dict(found) for name, found in stays.counts.items()},
            "split": None if fractions is None else {"fractions": list(fractions), "seed": seed},
            "parts": counts,
            "versions": _versions(),
        }
        (folder / "metadata.json").write_text(json.dumps({"freq": stays.freq}) + "\n", encoding="utf-8")
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def convert(
    load: Callable[..., Stays],
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    vitals: Sequence[str] = ("hr", "map"),
    steps: Sequence[str] = PAPER_STEPS,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    fractions: Sequence[float] | None = (0.8, 0.1, 0.1),
    seed: int = 42,
    progress: bool = False,
    **loading: Any,
) -> dict[str, Any]:
    """Load, prepare and write a download of any size: rows wait in a hidden folder beside `out`, not in memory.

    Parameters
    ----------
    load
        `load_eicu` or `load_mimic`.
    folder
        Folder of the download.
    out, vitals, fractions, seed
        As in `write`. Pressures that only the step ``"plausibility"`` needs are read as well.
    steps, options
        As in `prepare`.
    progress
        Whether to show progress bars on stderr.
    **loading
        Options of `load`.

    Returns
    -------
    dict[str, Any]
        The manifest.

    Raises
    ------
    ValueError
        As `load`, `prepare` and `write`; then nothing is left behind.
    """
    read = tuple(vitals)
    if "plausibility" in steps and set(read) & set(PRESSURES):
        read += tuple(vital for vital in PRESSURES if vital not in read)
    freq = loading.get("freq", inspect.signature(load).parameters["freq"].default)
    check_steps(steps, {} if options is None else options, read, freq)
    _check_split(fractions, seed)
    _check_new(Path(out))
    with workshop(Path(out), "reading", "conversion") as scratch:
        stays = load(folder, vitals=read, scratch=scratch, progress=progress, **loading)
        return write(
            prepare(stays, steps, options), out, vitals=vitals, fractions=fractions, seed=seed, progress=progress
        )


def find_manifest(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the manifest of a prepared folder, of a part of it or of a part's file; None where there is none."""
    path = path.absolute()
    for folder in (path, *path.parents[:2]):
        file = folder / MANIFEST
        if file.is_file():
            try:
                content = opened(load_json(file))
            except (OSError, ValueError):
                continue
            # Another program's file may have the name.
            if isinstance(content, dict) and {"vitals", "parts", "sources"} <= set(content):
                return file, content
    return None


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out '{out}' is in use; name a new folder")


def _check_split(fractions: Sequence[float] | None, seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed is {seed}; give at least 0")
    if fractions is None:
        return
    if len(fractions) != len(PARTS):
        raise ValueError(f"fractions {tuple(fractions)} must be three, of {', '.join(PARTS)}")
    split_by_item([{"item_id": part} for part in PARTS], fractions=fractions, seed=seed)


def _write_all(stays: Stays, vitals: Sequence[str], path: Path, progress: bool) -> list[str]:
    """Write all series into one file, and return their patients, each once."""
    from gluonts.dataset.arrow import ArrowWriter

    patients: dict[str, None] = {}

    def noted() -> Iterator[DataEntry]:
        for entry in stays.entries(vitals):
            patients.setdefault(patient_of(entry["item_id"]))
            yield entry

    series: Iterator[DataEntry] = noted()
    if progress:
        from tqdm import tqdm

        series = iter(tqdm(series, desc="preparing", unit=" series"))
    first = next(series, None)
    if first is not None:
        ArrowWriter(metadata={"freq": stays.freq}).write_to_file(itertools.chain([first], series), path)
    return list(patients)


def _losses(stays: Stays) -> str:
    """Say how many stays each step let through."""
    left = [f"of {len(stays)} stays {stays.counts['grid']['stays']} have values"]
    left += [f"{stays.counts[name]['stays out']} are left after '{name}'" for name, _, _ in stays.steps]
    return ", ".join(left)


def _divide(path: Path, folder: Path, parts: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    """Copy each series into the file of its patient's part, a batch at a time."""
    import pyarrow as pa

    part_of = {patient: part for part, patients in parts.items() for patient in patients}
    counts = {
        part: {"patients": len(patients), "stays": 0, "windows": 0, "series": 0, "points": 0, "missing": 0}
        for part, patients in parts.items()
    }
    latest = dict.fromkeys(parts, "")
    with contextlib.ExitStack() as stack:
        # Not mapped: pages that were read would count as memory of the process.
        reader = stack.enter_context(pa.ipc.open_file(stack.enter_context(pa.OSFile(str(path)))))
        writers = {}
        for part in parts:
            (folder / part).mkdir()
            file = stack.enter_context((folder / part / "data.arrow").open("wb"))
            writers[part] = stack.enter_context(pa.ipc.new_file(file, reader.schema))
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            items = batch.column("item_id").to_pylist()
            where = np.array([part_of[patient_of(item)] for item in items])
            for part, writer in writers.items():
                chosen = np.flatnonzero(where == part)
                if not len(chosen):
                    continue
                some = batch.take(pa.array(chosen))
                writer.write_batch(some)
                found = counts[part]
                found["series"] += len(chosen)
                target = some.column("target").flatten().to_numpy(zero_copy_only=False)
                found["points"] += len(target)
                found["missing"] += int(np.isnan(target).sum())
                for item in chosen:
                    # The series of a stay and of a window are neighbours.
                    window = items[item].rpartition("/")[0]
                    stay = window.split("/")[:2]
                    before = latest[part]
                    found["stays"] += before.split("/")[:2] != stay
                    found["windows"] += before != window
                    latest[part] = window
    return counts


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("gluonts-peft", "gluonts", "numpy", "pandas", "pyarrow", "scipy")}
