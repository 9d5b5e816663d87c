"""Hourly vital signs of ICU stays in a wide table, one row per stay and hour."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gluonts_peft.series.table import require_columns

__all__ = ["PLAUSIBLE", "hourly_units", "load_hourly"]

DataEntry = dict[str, Any]

_log = logging.getLogger(__name__)

#: Lowest and highest value taken as real, both included: our choice, wide enough for a dying patient and narrow enough
#: for zeros and line flushes. hr in beats/min, pressures in mmHg, resp in breaths/min, o2sat in per cent.
PLAUSIBLE: dict[str, tuple[float, float]] = {
    "hr": (20.0, 250.0),
    "map": (20.0, 200.0),
    "sbp": (30.0, 300.0),
    "dbp": (10.0, 200.0),
    "resp": (2.0, 80.0),
    "o2sat": (30.0, 100.0),
}

# A stay has hours since admission, not dates.
_ADMISSION = "2000-01-01 00:00"

# Columns of a table of patients: those of eICU-CRD, or plain ones.
_STAY, _PATIENT = ("patientunitstayid", "stay_id"), ("uniquepid", "patient")


def load_hourly(
    path: str | os.PathLike[str],
    *,
    vitals: Sequence[str] = ("hr", "map"),
    min_hours: int = 48,
    plausible: bool = True,
    patients: str | os.PathLike[str] | None = None,
) -> list[DataEntry]:
    """Read one series per stay and vital sign from a wide hourly Parquet file.

    Parameters
    ----------
    path
        Parquet file with the columns ``stay_id``, ``hour`` (whole hours since admission) and the vital signs, as made
        from the eICU-CRD demo (Pollard et al. 2018, doi 10.1038/sdata.2018.178). Rows before admission are left out. A
        column ``patient``, if there is one, maps stays to patients.
    vitals
        Columns to read, each one of `PLAUSIBLE`.
    min_hours
        Stays with fewer hours from the first to the last row are left out.
    plausible
        Whether values outside `PLAUSIBLE` become missing.
    patients
        Table that maps stays to patients, in place of a column ``patient``: ``.csv``, ``.csv.gz`` or ``.parquet``
        with the columns ``patientunitstayid`` and ``uniquepid``, as eICU-CRD's ``patient`` has, or ``stay_id`` and
        ``patient``, in any case. Without either, nobody knows which stays are of one patient.

    Returns
    -------
    list[DataEntry]
        Sorted by stay, then in the order of `vitals`: dictionaries with ``start`` (``pd.Period`` of freq ``"h"``; the
        date is arbitrary, hour 0 is midnight of 2000-01-01), ``target`` (float32, shape ``(hours,)``, NaN is missing)
        and ``item_id``: ``"<patient>/<stay>/<vital>"``, or ``"<stay>/<vital>"`` where the patients are not known.
        Series without any value are left out. The counts of rows, stays, series and values left out are logged.

    Raises
    ------
    ValueError
        If the file or a column is missing, a vital sign is unknown or asked for twice, an hour is not whole or occurs
        twice in a stay, a value is infinite, the table of patients does not know a stay, or nothing is left.
    """
    if min_hours < 1:
        raise ValueError(f"min_hours is {min_hours}; give at least 1")
    if not vitals or len(set(vitals)) < len(vitals):
        raise ValueError(f"vitals {tuple(vitals)} must name each column once; known: {', '.join(PLAUSIBLE)}")
    path = Path(path)
    frame, stays, hours, patient_of_stay = _read(path, vitals, patients)
    order = np.lexsort((hours, stays))
    stays, hours = stays[order], hours[order]
    twice = np.flatnonzero((np.diff(stays) == 0) & (np.diff(hours) == 0))
    if len(twice):
        first = twice[0]
        raise ValueError(
            f"stay_id {stays[first]} has hour {hours[first]} twice in '{path}' ({len(twice)} rows too many in all); "
            "keep one row per stay and hour"
        )
    values = frame[list(vitals)].to_numpy(dtype=np.float32)[order]
    if plausible:
        low, high = np.array([PLAUSIBLE[vital] for vital in vitals], dtype=np.float32).T
        with np.errstate(invalid="ignore"):
            implausible = (values < low) | (values > high)
        for vital, count in zip(vitals, implausible.sum(0), strict=True):
            _log.info("%s: %d values outside %g to %g set to missing", vital, count, *PLAUSIBLE[vital])
        values = np.where(implausible, np.float32(np.nan), values)
    infinite = np.argwhere(np.isinf(values))
    if len(infinite):
        row, column = infinite[0]
        raise ValueError(
            f"{vitals[column]} of stay_id {stays[row]} at hour {hours[row]} in '{path}' is infinite; "
            "give plausible=True, or leave missing values empty"
        )

    entries: list[DataEntry] = []
    short = empty = 0
    firsts = np.flatnonzero(np.diff(stays, prepend=stays[0] - 1))
    admission = pd.Period(_ADMISSION, "h")
    names = {stay: f"{patient_of_stay[stay]}/{stay}" if patient_of_stay else str(stay) for stay in stays[firsts]}
    for first, last in zip(firsts, np.append(firsts[1:], len(stays)), strict=True):
        places = hours[first:last] - hours[first]
        if places[-1] + 1 < min_hours:
            short += 1
            continue
        for column, vital in enumerate(vitals):
            target = np.full(places[-1] + 1, np.nan, dtype=np.float32)
            target[places] = values[first:last, column]
            if np.isnan(target).all():
                empty += 1
                continue
            start = admission + int(hours[first])
            entries.append({"start": start, "target": target, "item_id": f"{names[stays[first]]}/{vital}"})
    _log.info("%d of %d stays are shorter than %d hours and left out", short, len(firsts), min_hours)
    _log.info("%d series without any value are left out, %d are kept", empty, len(entries))
    if not entries:
        raise ValueError(
            f"no series of '{path}' is left: {short} of {len(firsts)} stays are shorter than min_hours={min_hours}, "
            f"{empty} series have no value; lower min_hours or name other vitals"
        )
    return entries


def hourly_units(path: str | os.PathLike[str], patients: str | os.PathLike[str] | None = None) -> list[str]:
    """Return the patients of a file for `load_hourly`, whatever of them is left there; stays, where no one knows them.

    That is what comes before the first ``/`` of an item id, each once.
    """
    _, stays, _, patient_of_stay = _read(Path(path), (), patients)
    return sorted(set(patient_of_stay.values()) if patient_of_stay else {str(stay) for stay in np.unique(stays)})


def _read(path: Path, vitals: Sequence[str], patients: Any) -> tuple[Any, Any, Any, dict[int, str]]:
    """Return the rows since admission, their stays and hours, and the patient of each stay, if anything says it."""
    if not path.is_file():
        raise ValueError(f"path '{path}' does not exist; give the hourly Parquet file")
    import pyarrow.parquet

    columns = [str(name) for name in pyarrow.parquet.read_schema(path).names]
    require_columns(path, columns, {"stay_id": "stay_id", "hour": "hour"})
    for vital in vitals:
        require_columns(path, columns, {"vital": vital})
        if vital not in PLAUSIBLE:
            raise ValueError(f"vital {vital!r} is unknown; known: {', '.join(PLAUSIBLE)}")
    own = ["patient"] if patients is None and "patient" in columns else []
    frame = pd.read_parquet(path, columns=["stay_id", "hour", *own, *vitals])
    stays, hours = _stays_and_hours(frame, path)
    since = hours >= 0
    if vitals:
        _log.info("%d rows before admission (hour below 0) are left out", int((~since).sum()))
    if not since.any():
        raise ValueError(f"no row of '{path}' is left: every hour is below 0, before admission; count from admission")
    frame, stays, hours = frame[since], stays[since], hours[since]
    if patients is not None:
        found = _patients(Path(patients), np.unique(stays))
    else:
        found = _one_each(stays, frame["patient"], path) if own else {}
    return frame, stays, hours, found


def _patients(path: Path, stays: Any) -> dict[int, str]:
    """Return stay -> patient by a table."""
    if not path.is_file():
        raise ValueError(f"patients '{path}' does not exist; give the table that maps stays to patients")
    known = (*_STAY, *_PATIENT)
    if path.name.lower().endswith(".parquet"):
        frame = pd.read_parquet(path)
    elif path.name.lower().endswith((".csv", ".csv.gz")):
        # A patient may well be called "NA".
        frame = pd.read_csv(path, usecols=lambda name: name.strip().lower() in known, dtype=str, keep_default_na=False)
    else:
        raise ValueError(f"patients '{path}' has an unknown ending; known: .csv, .csv.gz, .parquet")
    frame.columns = [str(name).strip().lower() for name in frame.columns]
    pairs = [pair for pair in zip(_STAY, _PATIENT, strict=True) if set(pair) <= set(frame.columns)]
    if not pairs:
        raise ValueError(
            f"patients '{path}' has neither the columns {' and '.join((_STAY[0], _PATIENT[0]))} nor"
            f" {' and '.join((_STAY[1], _PATIENT[1]))}; give a table with a row for each stay"
        )
    stay, patient = pairs[0]
    ids = pd.to_numeric(frame[stay], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    used = np.isin(ids, stays)
    found = _one_each(ids[used].astype(np.int64), frame[patient][used], path)
    missing = [name for name in stays if name not in found]
    if missing:
        raise ValueError(
            f"stay_id {missing[0]} is not in the table patients '{path}' ({len(missing)} of {len(stays)} are not);"
            " give the table that belongs to the data"
        )
    return found


def _one_each(stays: Any, patients: Any, path: Path) -> dict[int, str]:
    """Return stay -> patient, each of them named, and one."""
    pairs = pd.DataFrame({"stay": stays, "patient": patients.to_numpy()}).drop_duplicates()
    found: dict[int, str] = {}
    for stay, patient in zip(pairs["stay"], pairs["patient"], strict=True):
        name = "" if pd.isna(patient) else str(patient).strip()
        if not name or "/" in name:
            raise ValueError(f"the patient of stay_id {stay} in '{path}' is {name!r}; give a name without '/'")
        if found.setdefault(int(stay), name) != name:
            raise ValueError(f"stay_id {stay} is of the patients {found[stay]!r} and {name!r} in '{path}'; keep one")
    return found


def _stays_and_hours(frame: Any, path: Path) -> tuple[Any, Any]:
    if not len(frame):
        raise ValueError(f"path '{path}' holds no rows; give a table with at least one")
    whole = []
    for column in ("stay_id", "hour"):
        numbers = pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        bad = np.flatnonzero(~np.isfinite(numbers) | (numbers != np.round(numbers)))
        if len(bad):
            raise ValueError(
                f"{column} of row {bad[0] + 1} in '{path}' is {str(frame[column].iloc[bad[0]])!r}, which is not a "
                f"whole number ({len(bad)} such rows); correct or remove it"
            )
        whole.append(frame[column].to_numpy().astype(np.int64))
    return whole[0], whole[1]
