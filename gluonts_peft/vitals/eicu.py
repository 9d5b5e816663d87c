"""eICU-CRD: vital signs from the tables of a download (Pollard et al. 2018, doi 10.1038/sdata.2018.178)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .stays import PRESSURES, Positions, Stays, known_stays
from .tables import NUMBER, TEXT, Tables, floats

__all__ = ["load_eicu"]

_log = logging.getLogger(__name__)

_PERIODIC = {
    "hr": "heartrate",
    "map": "systemicmean",
    "sbp": "systemicsystolic",
    "dbp": "systemicdiastolic",
    "resp": "respiration",
    "o2sat": "sao2",
}
_APERIODIC = {"map": "noninvasivemean", "sbp": "noninvasivesystolic", "dbp": "noninvasivediastolic"}
# Our choice. The diagnosis tree also has "signs and symptoms of sepsis (SIRS)|due to non-infectious process".
_SEPSIS = r"(?i)\b(uro)?sepsis\b|\bseptic shock\b|\bsepticemia\b"
_NOT_SEPSIS = r"(?i)non-?infectious"


def load_eicu(
    folder: str | os.PathLike[str],
    *,
    vitals: Sequence[str] = ("hr", "map", "sbp", "dbp"),
    cohort: str = "sepsis",
    cuff: str = "gaps",
    freq: str = "5min",
    scratch: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Stays:
    """Read vital signs of an eICU-CRD download.

    ``vitalPeriodic`` (medians of five minutes from the monitor) and ``vitalAperiodic`` (cuff pressures) are read as
    streams, once, in whatever order their rows are. Rows before admission or after discharge are left out. Several
    values of one step become their median. All rules are counted in ``counts`` of what is returned.

    Parameters
    ----------
    folder
        Folder with ``patient``, ``vitalPeriodic``, and where needed ``vitalAperiodic`` and ``diagnosis``; ``.csv`` or
        ``.csv.gz``, names and headers in any case.
    vitals
        Any of ``"hr"`` (beats/min), ``"map"``, ``"sbp"``, ``"dbp"`` (mmHg), ``"resp"`` (breaths/min) and ``"o2sat"``
        (per cent).
    cohort
        ``"sepsis"``: stays with sepsis as the admission diagnosis (``apacheadmissiondx``) or, if there is a table
        ``diagnosis``, in it. ``"all"``: all stays.
    cuff
        Where cuff pressures are used: ``"gaps"`` (steps without an arterial pressure), ``"stays"`` (stays without any
        arterial pressure) or ``"never"``.
    freq
        Step, whole minutes; a step begins at admission or a multiple of `freq` after it.
    scratch
        Folder for the rows of data larger than memory; the caller removes it when done with the stays. By default rows
        are kept in memory, 12 bytes a value.
    progress
        Whether to show a progress bar over the bytes on stderr.

    Returns
    -------
    Stays
        Sorted by patient (``uniquepid``) and stay (``patientunitstayid``).

    Raises
    ------
    ValueError
        If a table or column is missing, a cell is not a number, a file is cut off, a stay occurs twice or has no
        patient, an option is unknown, or no stay is left.
    """
    for vital in vitals:
        if vital not in _PERIODIC:
            raise ValueError(f"vital {vital!r} is unknown; known: {', '.join(_PERIODIC)}")
    if cohort not in ("sepsis", "all"):
        raise ValueError(f"cohort {cohort!r} is unknown; known: sepsis, all")
    pressures = [vital for vital in vitals if vital in PRESSURES]
    with Tables(Path(folder), progress=progress) as tables:
        patient, periodic = tables.need("patient"), tables.need("vitalPeriodic")
        aperiodic = None
        if pressures and cuff != "never":
            aperiodic = tables.need("vitalAperiodic", "; it has the cuff pressures, to do without give cuff='never'")
        diagnosis = tables.find("diagnosis") if cohort == "sepsis" else None
        tables.expect(*(path for path in (patient, periodic, aperiodic, diagnosis) if path is not None))

        table = tables.whole(
            patient,
            {"patientunitstayid": NUMBER, "uniquepid": TEXT, "apacheadmissiondx": TEXT, "unitdischargeoffset": NUMBER},
        )
        known = known_stays(table["patientunitstayid"], table["uniquepid"], "patientunitstayid", "uniquepid", patient)
        member, cohort_counts = _cohort(tables, table, cohort, diagnosis)
        if not member.any():
            raise ValueError(f"no stay of '{patient}' is in the cohort {cohort!r}; give cohort='all', or another file")
        chosen = known[member[known]]
        stays = Stays(
            table["uniquepid"][chosen],
            table["patientunitstayid"][chosen].astype(np.int64),
            table["unitdischargeoffset"][chosen],
            vitals=vitals,
            freq=freq,
            cuff=cuff,
            scratch=None if scratch is None else Path(scratch),
        )
        stays.counts["stays"] = {"in the table": len(known), **cohort_counts, "in the cohort": len(chosen)}
        positions = Positions(table["patientunitstayid"], chosen)
        wanted = {vital: _PERIODIC[vital] for vital in vitals}
        _add(stays, "vitalPeriodic", tables.batches(periodic, _kinds(wanted)), wanted, positions)
        if aperiodic is not None:
            wanted = {f"{vital} cuff": _APERIODIC[vital] for vital in pressures}
            _add(stays, "vitalAperiodic", tables.batches(aperiodic, _kinds(wanted)), wanted, positions)
    stays.sources = tables.sources
    stays.options = {"dataset": "eicu", "cohort": cohort, "cuff": cuff}
    for name, counts in stays.counts.items():
        _log.info("%s: %s", name, ", ".join(f"{count} {rule}" for rule, count in counts.items()))
    return stays


def _cohort(
    tables: Tables, table: dict[str, NDArray[Any]], cohort: str, diagnosis: Path | None
) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Say which rows of ``patient`` are in the cohort, and how they were found."""
    import pyarrow as pa

    ids = table["patientunitstayid"]
    if cohort == "all":
        return np.ones(len(ids), dtype=bool), {}
    admitted = _sepsis(pa.array(table["apacheadmissiondx"], pa.string()))
    counts = {"sepsis by admission diagnosis": int(admitted.sum())}
    if diagnosis is None:
        return admitted, counts
    found: set[float] = set()
    for batch in tables.batches(diagnosis, {"patientunitstayid": NUMBER, "diagnosisstring": TEXT}):
        found.update(floats(batch.column(0))[_sepsis(batch.column(1))].tolist())
    later = np.isin(ids, list(found))
    return admitted | later, {**counts, "sepsis by the diagnosis table": int(later.sum())}


def _sepsis(texts: Any) -> NDArray[np.bool_]:
    import pyarrow.compute as pc

    matches = pc.and_not(pc.match_substring_regex(texts, _SEPSIS), pc.match_substring_regex(texts, _NOT_SEPSIS))
    found: NDArray[np.bool_] = pc.fill_null(matches, False).to_numpy(zero_copy_only=False)
    return found


def _kinds(columns: dict[str, str]) -> dict[str, str]:
    return dict.fromkeys(("patientunitstayid", "observationoffset", *columns.values()), NUMBER)


def _add(stays: Stays, table: str, batches: Iterator[Any], columns: dict[str, str], positions: Positions) -> None:
    """Stream one table of vital signs into the stays; `columns` is channel -> column."""
    counts = stays.begin(table)
    for batch in batches:
        counts["rows"] += batch.num_rows
        position = positions(floats(batch.column(0)))
        counts["of an unknown stay"] += int((position == -2).sum())
        counts["of a stay outside the cohort"] += int((position == -1).sum())
        inside = np.flatnonzero(position >= 0)
        values = {channel: floats(batch.column(name))[inside] for channel, name in columns.items()}
        stays.add(position[inside], floats(batch.column(1))[inside], values, counts)
