"""GluonTS files and folders of them: JSON lines, Arrow, Parquet, with a metadata.json that says the frequency."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..files import load_json
from .calendar import Calendar, Stamps, period_freq, with_calendar
from .grid import GIVE_FREQ, calendars_of_starts
from .rows import narrowest

__all__ = ["GLUONTS", "files_of", "read_gluonts"]

DataEntry = dict[str, Any]

_log = logging.getLogger(__name__)

GLUONTS = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".arrow", ".feather")
# Files of a folder that say something about the data.
_ABOUT = ("metadata.json", "manifest.json")


def suffix_of(path: Path, known: Sequence[str]) -> str | None:
    """Return the known ending that a file has, or None."""
    name = path.name.lower()
    return next((suffix for suffix in known if name.endswith(suffix)), None)


def files_of(folder: Path) -> list[Path]:
    """Return the GluonTS files of a folder, in order."""
    for part in ("train", "test"):
        if (folder / part).is_dir():
            raise ValueError(f"path '{folder}' holds the folder '{part}'; give one part, such as '{folder / part}'")
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and file.name not in _ABOUT and not file.name.startswith(".")
    )
    known = [file for file in files if suffix_of(file, (".parquet", *GLUONTS)) is not None]
    if len(known) < len(files):
        ignored = next(file for file in files if file not in known)
        _log.warning(
            "'%s': %d files of other kinds are ignored (first: '%s')", folder, len(files) - len(known), ignored
        )
    if not known:
        raise ValueError(f"path '{folder}' holds no GluonTS file; known endings: .parquet, {', '.join(GLUONTS)}")
    return known


def _metadata_freq(folder: Path) -> tuple[str, Path] | None:
    for file in (folder / "metadata.json", folder.parent / "metadata.json"):
        if file.is_file():
            try:
                content = load_json(file)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"'{file}' is not JSON: {error}; repair it, or {GIVE_FREQ} and remove it") from None
            if isinstance(content, dict) and isinstance(content.get("freq"), str):
                return content["freq"], file
    return None


def read_gluonts(files: Sequence[Path], folder: Path, freq: str | None) -> list[DataEntry]:
    """Read the entries of GluonTS files, in the order in which they lie there.

    Parameters
    ----------
    files
        The files.
    folder
        Where ``metadata.json`` is looked for, and in its parent.
    freq
        Frequency, if there is no such file.

    Returns
    -------
    list of dict
        Entries with ``start``, ``target`` (float32, or float64 where that cannot hold it) and ``item_id``, and the
        other fields that they had. If any start
        is more than the start of its period (a time zone, noon, the last day of a month), all carry a calendar.
    """
    found = _metadata_freq(folder)
    if freq is not None:
        if found is not None and period_freq(found[0]) != period_freq(freq):
            raise ValueError(f"freq {freq!r} is not that of '{found[1]}', {found[0]!r}; leave freq out, or correct one")
    elif found is not None:
        freq = found[0]
    else:
        raise ValueError(f"'{folder}' has no metadata.json with a freq; {GIVE_FREQ}, for example freq='h'")
    own = period_freq(freq)
    entries: list[DataEntry] = []
    starts: list[pd.Timestamp | None] = []
    for file in files:
        for start, entry in _entries(file, own, len(entries)):
            starts.append(start)
            entries.append(entry)
    if not entries:
        raise ValueError(f"path '{folder}' holds no entries; give a dataset with at least one")
    calendars = _calendars(entries, starts, freq)
    if all(calendar.plain for calendar in calendars):
        return entries
    return [with_calendar(entry, calendar) for entry, calendar in zip(entries, calendars, strict=True)]


def _entries(file: Path, freq: str, position: int) -> Iterator[tuple[pd.Timestamp | None, DataEntry]]:
    """Entries of a file, each with its start as the file has it."""
    from gluonts.dataset.common import ProcessDataEntry, infer_file_type
    from gluonts.exceptions import GluonTSDataError

    process = ProcessDataEntry(freq)
    try:
        for raw in infer_file_type(file):
            if not isinstance(raw, dict):
                raise TypeError(f"it is a {type(raw).__name__}, not an object")
            start = _timestamp(raw.get("start"))
            yield start, _checked(dict(process(dict(raw))), raw["target"], file, position)
            position += 1
    except KeyError as error:
        raise ValueError(f"entry {position} in '{file}' has no field {error}; GluonTS needs it") from None
    except (GluonTSDataError, TypeError) as error:
        raise ValueError(f"entry {position} in '{file}' is not a GluonTS entry: {str(error)[:200]}") from None
    except Exception as error:
        # Whatever GluonTS, pyarrow or gzip stumbled over; ours and missing rights are told as they are.
        if isinstance(error, PermissionError) or str(file) in str(error):
            raise
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"entry {position} in '{file}' cannot be read: {text or type(error).__name__}; is it damaged or cut off? "
            "write it again"
        ) from None


def _timestamp(start: Any) -> pd.Timestamp | None:
    """The start of an entry as a time stamp; None where it is the name of a period, such as a week."""
    if start is None:
        return None
    try:
        found = pd.Timestamp(start)
    except (TypeError, ValueError):
        return None
    return None if found is pd.NaT else found


def _checked(entry: DataEntry, target: Any, file: Path, position: int) -> DataEntry:
    name = entry.get("item_id")
    entry["item_id"] = str(position) if name is None else name.item() if isinstance(name, np.generic) else name
    # GluonTS makes everything float32. A copy, since Arrow files hand out views of a file that may go away.
    values = narrowest(np.asarray(target, dtype=np.float64))
    entry["target"] = values
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        when = (entry["start"] + int(infinite[0])).to_timestamp()
        raise ValueError(
            f"target of item {entry['item_id']!r} at {when} in '{file}' is {values[infinite[0]]}, infinite as float32 "
            f"({len(infinite)} such values); write missing values as NaN"
        )
    return entry


def _calendars(entries: Sequence[DataEntry], starts: Sequence[pd.Timestamp | None], freq: str) -> list[Calendar]:
    """Calendars that the entries bring, or that their starts tell."""
    found: list[Calendar] = [Calendar()] * len(entries)
    groups: dict[str | None, list[int]] = {}
    for i, (entry, start) in enumerate(zip(entries, starts, strict=True)):
        info = entry.get("info")
        if isinstance(info, dict) and isinstance(info.get("calendar"), dict):
            found[i] = Calendar.from_dict(info["calendar"])
        elif start is not None:
            groups.setdefault(None if start.tz is None else str(start.tz), []).append(i)
    for members in groups.values():
        stamps = Stamps.of_index(pd.DatetimeIndex([starts[i] for i in members]))
        for i, calendar in zip(members, calendars_of_starts(stamps, freq), strict=True):
            found[i] = calendar
    return found
