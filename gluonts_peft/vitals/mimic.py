"""MIMIC-III and MIMIC-IV: vital signs from the tables of a download (Johnson et al. 2016, 2023)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .stays import Positions, Stays, known_stays
from .tables import NUMBER, TIME, Tables, floats

__all__ = ["ITEMS", "load_mimic"]

_log = logging.getLogger(__name__)

#: Item ids of D_ITEMS by channel: CareVue (below 10,000, MIMIC-III only) and MetaVision.
ITEMS: dict[str, tuple[int, ...]] = {
    "hr": (211, 220045),
    "map": (52, 6702, 220052, 225312),
    "sbp": (51, 6701, 220050, 225309),
    "dbp": (8368, 8555, 220051, 225310),
    "map cuff": (456, 443, 220181),
    "sbp cuff": (455, 442, 220179),
    "dbp cuff": (8441, 8440, 220180),
    "resp": (615, 618, 220210, 224690),
    "o2sat": (646, 220277),
}
# Values kept, both bounds excluded.
_LOW, _HIGH = 0.0, 300.0
_YEAR_SECONDS = 365.2425 * 24 * 3600


def load_mimic(
    folder: str | os.PathLike[str],
    *,
    vitals: Sequence[str] = ("hr", "map", "sbp", "dbp"),
    min_age: float | None = 16,
    cuff: str = "gaps",
    freq: str = "h",
    scratch: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Stays:
    """Read vital signs of a MIMIC-III or MIMIC-IV download.

    Which of the two it is, is seen from ``ICUSTAYS``, which names a stay ``icustay_id`` or ``stay_id``.
    ``CHARTEVENTS`` is read as a stream, once, in whatever order its rows are. Values are kept if they are above 0 and
    below 300 and the row is not marked as an error; rows before admission or after discharge are left out. Several
    values of one step become their median. All rules are counted in ``counts`` of what is returned.

    Parameters
    ----------
    folder
        Folder with ``CHARTEVENTS``, ``ICUSTAYS`` and ``PATIENTS``; ``.csv`` or ``.csv.gz``, names and headers in any
        case; in subfolders ``icu`` and ``hosp``, as MIMIC-IV has them, or not.
    vitals
        Any of ``"hr"`` (beats/min), ``"map"``, ``"sbp"``, ``"dbp"`` (mmHg), ``"resp"`` (breaths/min) and ``"o2sat"``
        (per cent); their items are in `ITEMS`.
    min_age
        Stays of patients younger than this many years at admission are left out: MIMIC-III has newborns, and calls
        adults those of 16 and above. None keeps all, and needs no ``PATIENTS``.
    cuff
        Where cuff pressures are used: ``"gaps"`` (steps without an arterial pressure), ``"stays"`` (stays without any
        arterial pressure) or ``"never"``.
    freq
        Step, whole minutes; nurses chart about once an hour.
    scratch, progress
        As in `load_eicu`.

    Returns
    -------
    Stays
        Sorted by patient (``subject_id``) and stay.

    Raises
    ------
    ValueError
        If a table or column is missing, a cell is not a number or time, a file is cut off, a stay occurs twice or
        has no patient or admission, an option is unknown, or no stay is left.
    """
    known_vitals = [channel for channel in ITEMS if not channel.endswith(" cuff")]
    for vital in vitals:
        if vital not in known_vitals:
            raise ValueError(f"vital {vital!r} is unknown; known: {', '.join(known_vitals)}")
    with Tables(Path(folder), subfolders=("icu", "hosp"), progress=progress) as tables:
        icustays, events = tables.need("icustays"), tables.need("chartevents")
        people = None
        if min_age is not None:
            people = tables.need("patients", "; it has the ages, to do without give min_age=None (--min-age 0)")
        tables.expect(*(path for path in (icustays, people, events) if path is not None))
        stay = _stay_column(tables, icustays)
        table = tables.whole(icustays, {stay: NUMBER, "subject_id": NUMBER, "intime": TIME, "outtime": TIME})
        subjects = np.array(["" if np.isnan(name) else f"{name:.0f}" for name in table["subject_id"]])
        known = known_stays(table[stay], subjects, stay, "subject_id", icustays)
        lost = np.flatnonzero(np.isnan(table["intime"]))
        if len(lost):
            raise ValueError(
                f"{stay} {table[stay][lost[0]]:.0f} in '{icustays}' has no intime ({len(lost)} such stays); "
                "minutes since admission need one"
            )
        counts = {"in the table": len(known)}
        if people is not None:
            assert min_age is not None
            age = _ages(tables, people, table, stay)
            counts["of a patient whose age is unknown"] = int(np.isnan(age).sum())
            counts[f"of a patient younger than {min_age:g}"] = int((age < min_age).sum())
            known = known[age[known] >= min_age]
            if not len(known):
                raise ValueError(f"no stay of '{icustays}' is left: none has a patient of at least min_age={min_age:g}")
        # Dates are shifted by patient, so only differences mean anything.
        admission = table["intime"][known]
        stays = Stays(
            subjects[known],
            table[stay][known].astype(np.int64),
            (table["outtime"][known] - admission) / 60,
            vitals=vitals,
            freq=freq,
            cuff=cuff,
            scratch=None if scratch is None else Path(scratch),
        )
        stays.counts["stays"] = {**counts, "in the cohort": len(known)}
        _add(stays, tables, events, stay, Positions(table[stay], known), admission)
    stays.sources = tables.sources
    dataset = "mimic-iii" if stay == "icustay_id" else "mimic-iv"
    stays.options = {"dataset": dataset, "min_age": min_age, "cuff": cuff}
    for name, found in stays.counts.items():
        _log.info("%s: %s", name, ", ".join(f"{count} {rule}" for rule, count in found.items()))
    return stays


def _stay_column(tables: Tables, path: Path) -> str:
    header = tables.columns(path)
    found = [name for name in ("icustay_id", "stay_id") if name in (column.strip().lower() for column in header)]
    if len(found) != 1:
        raise ValueError(
            f"'{path}' must have the column 'icustay_id' (MIMIC-III) or 'stay_id' (MIMIC-IV); "
            f"columns: {', '.join(header) or 'none'}"
        )
    return found[0]


def _ages(tables: Tables, path: Path, table: dict[str, NDArray[Any]], stay: str) -> NDArray[np.float64]:
    """Ages at admission in years, NaN where unknown; those above 89 are shifted, to about 300, in MIMIC-III."""
    columns = {"subject_id": NUMBER}
    columns |= {"dob": TIME} if stay == "icustay_id" else {"anchor_age": NUMBER, "anchor_year": NUMBER}
    people = tables.whole(path, columns)

    def of_stays(column: str) -> NDArray[np.float64]:
        value_of = dict(zip(people["subject_id"].tolist(), people[column].tolist(), strict=True))
        return np.array([value_of.get(subject, np.nan) for subject in table["subject_id"].tolist()])

    if stay == "icustay_id":
        return (table["intime"] - of_stays("dob")) / _YEAR_SECONDS
    year = table["intime"].astype("datetime64[s]").astype("datetime64[Y]").astype(np.int64) + 1970
    return of_stays("anchor_age") + year - of_stays("anchor_year")


def _add(
    stays: Stays, tables: Tables, path: Path, stay: str, positions: Positions, admission: NDArray[np.float64]
) -> None:
    """Stream the events into the stays."""
    counts = stays.begin("chartevents")
    channels = [channel for channel in ITEMS if channel in stays.channels]
    channel_of = {item: number for number, channel in enumerate(channels) for item in ITEMS[channel]}
    items = np.sort(np.array(list(channel_of), dtype=np.float64))
    channel_at = np.array([channel_of[int(item)] for item in items])
    kinds = {stay: NUMBER, "itemid": NUMBER, "charttime": TIME, "valuenum": NUMBER}
    # Later versions have no such column.
    marked = stay == "icustay_id" and "error" in (column.strip().lower() for column in tables.columns(path))
    if marked:
        kinds["error"] = NUMBER
    for batch in tables.batches(path, kinds):
        counts["rows"] += batch.num_rows
        item = floats(batch.column(1))
        place = np.minimum(np.searchsorted(items, item), len(items) - 1)
        wanted = np.flatnonzero(items[place] == item)
        counts["of other items"] += len(item) - len(wanted)
        place, batch = place[wanted], batch.take(wanted)
        position, value = positions(floats(batch.column(0))), floats(batch.column(3))
        keep = np.ones(len(value), dtype=bool)
        with np.errstate(invalid="ignore"):
            rules = {
                "of an unknown stay": position == -2,
                "of a stay outside the cohort": position == -1,
                "marked as an error": floats(batch.column(4)) == 1 if marked else ~keep,
                "without a number": np.isnan(value),
                "not between 0 and 300": (value <= _LOW) | (value >= _HIGH),
            }
        for rule, removed in rules.items():
            counts[rule] += int((removed & keep).sum())
            keep &= ~removed
        position, value, channel = position[keep], value[keep], channel_at[place[keep]]
        minutes = (floats(batch.column(2))[keep] - admission[position]) / 60
        columns = {name: np.where(channel == number, value, np.nan) for number, name in enumerate(channels)}
        stays.add(position, minutes, columns, counts)
