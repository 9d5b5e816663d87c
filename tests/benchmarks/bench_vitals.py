"""A table of vital signs that is larger than memory ought to be: rows a second and peak memory of the loader.

    python tests/benchmarks/bench_vitals.py                 # 20 million rows, at most 2 GiB
    python tests/benchmarks/bench_vitals.py --rows 2000000

A made-up ``vitalPeriodic.csv.gz`` in the layout of eICU-CRD, its rows in no order, is read, put on the grid, checked
for contradicting pressures and written as Arrow files, by a process of its own, whose highest resident memory counts.
All stays are kept: with a cohort there is less to do.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

PERIODIC = (
    *("vitalperiodicid", "patientunitstayid", "observationoffset", "temperature", "sao2", "heartrate", "respiration"),
    *("cvp", "etco2", "systemicsystolic", "systemicdiastolic", "systemicmean", "pasystolic", "padiastolic", "pamean"),
    *("st1", "st2", "st3", "icp"),
)
APERIODIC = (
    *("vitalaperiodicid", "patientunitstayid", "observationoffset", "noninvasivesystolic", "noninvasivediastolic"),
    *("noninvasivemean", "paop", "cardiacoutput", "cardiacinput", "svr", "svri", "pvr", "pvri"),
)
# Of eICU-CRD: 146 million rows of 200,859 stays.
ROWS_A_STAY = 730
TOGETHER = 400

CHILD = """
import json, sys, time
from functools import wraps
from pathlib import Path
from gluonts_peft.vitals import convert, load_eicu

seconds = {}

@wraps(load_eicu)
def timed(*arguments, **options):
    start = time.perf_counter()
    stays = load_eicu(*arguments, **options)
    seconds["reading"] = time.perf_counter() - start
    return stays

start = time.perf_counter()
manifest = convert(timed, sys.argv[1], sys.argv[2], cohort="all", steps=["plausibility"], progress=sys.stderr.isatty())
seconds["all"] = time.perf_counter() - start
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "counts": manifest["counts"], "parts": manifest["parts"]}))
"""


def generate(folder: Path, rows: int, seed: int = 0) -> int:
    """Write the tables of `rows` rows or a few more; return how many rows of ``vitalPeriodic`` there are."""
    rng = np.random.default_rng(seed)
    number = -(-rows // ROWS_A_STAY)
    stays = 141_000 + np.cumsum(rng.integers(1, 30, number))
    with (folder / "patient.csv").open("w", encoding="utf-8") as file:
        file.write("patientunitstayid,uniquepid,apacheadmissiondx,unitdischargeoffset\n")
        # Four stays for three patients.
        for position, stay in enumerate(stays):
            file.write(f'{stay},002-{position * 3 // 4},"Sepsis, GI",{ROWS_A_STAY * 5}\n')
    with (
        gzip.open(folder / "vitalPeriodic.csv.gz", "wb", compresslevel=1) as periodic,
        gzip.open(folder / "vitalAperiodic.csv.gz", "wb", compresslevel=1) as aperiodic,
    ):
        for first in range(0, number, TOGETHER):
            some = stays[first : first + TOGETHER]
            size = len(some) * ROWS_A_STAY
            order = rng.permutation(size)
            common = {
                "vitalperiodicid": np.arange(size) + 10_000_000 + first * ROWS_A_STAY,
                "patientunitstayid": np.repeat(some, ROWS_A_STAY)[order],
                "observationoffset": np.tile(np.arange(ROWS_A_STAY) * 5 + 3, len(some))[order],
            }
            mean = np.clip(rng.normal(80, 12, size), 30, 200)
            arterial = rng.random(size) < 0.25
            table = {
                **common,
                "sao2": _column(rng, np.clip(rng.normal(96, 2, size), 50, 100), 0.9),
                "heartrate": _column(rng, np.clip(rng.normal(86, 18, size), 30, 220), 0.98),
                "respiration": _column(rng, np.clip(rng.normal(20, 5, size), 3, 60), 0.85),
            }
            for name, factor in (("systolic", 1.5), ("mean", 1.0), ("diastolic", 0.75)):
                table[f"systemic{name}"] = pa.array(np.round(mean * factor).astype(np.int32), mask=~arterial)
            _append(periodic, table, PERIODIC, size, first == 0)
            few = slice(0, size // 12)
            cuff = {"vitalaperiodicid": common["vitalperiodicid"][few]}
            cuff |= {name: common[name][few] for name in ("patientunitstayid", "observationoffset")}
            for name, factor in (("systolic", 1.5), ("mean", 1.0), ("diastolic", 0.75)):
                cuff[f"noninvasive{name}"] = np.round(mean[few] * factor).astype(np.int32)
            _append(aperiodic, cuff, APERIODIC, size // 12, first == 0)
    return number * ROWS_A_STAY


def _column(rng: np.random.Generator, values: np.ndarray, share: float) -> pa.Array:
    return pa.array(np.round(values).astype(np.int32), mask=rng.random(len(values)) > share)


def _append(file: gzip.GzipFile, columns: dict, names: Sequence[str], rows: int, first: bool) -> None:
    table = pa.table({name: columns.get(name, pa.nulls(rows, pa.int32())) for name in names})
    pyarrow.csv.write_csv(table, file, pyarrow.csv.WriteOptions(include_header=first, quoting_header="none"))


def measure(rows: int, folder: Path) -> dict:
    """Generate and convert; what the process found, and the rows that it should have."""
    start = time.perf_counter()
    generated = generate(folder, rows)
    seconds = time.perf_counter() - start
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(folder / "out")], stdout=subprocess.PIPE, text=True, check=True
    )
    return {**json.loads(found.stdout), "generated": generated, "generating": seconds}


def main() -> None:
    """Measure, print, and fail if it took too much memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000, help="rows of vitalPeriodic, at least")
    parser.add_argument("--limit", type=float, default=2.0, help="GiB that the process may take at most")
    parser.add_argument("--folder", type=Path, help="folder for the temporary files")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(arguments.rows, Path(folder))
    seconds, counts = found["seconds"], found["counts"]
    both = counts["vitalPeriodic"]["rows"] + counts["vitalAperiodic"]["rows"]
    gib = found["peak"] / 2**30
    lines = [
        f"{counts['vitalPeriodic']['rows']:,} rows of vitalPeriodic, {both:,} in all, "
        f"{counts['vitalPeriodic']['out of order']:,} out of order (made in {found['generating']:.0f} s)",
        f"reading    {both / seconds['reading']:>12,.0f} rows a second, {seconds['reading']:.1f} s",
        f"all        {both / seconds['all']:>12,.0f} rows a second, {seconds['all']:.1f} s",
        f"peak       {gib:.2f} GiB of {arguments.limit:g}",
    ]
    sys.stdout.write(json.dumps(found) + "\n" if arguments.json else "\n".join(lines) + "\n")
    if counts["vitalPeriodic"]["rows"] != found["generated"] or counts["vitalPeriodic"]["kept"] == 0:
        sys.exit("rows were lost")
    if gib > arguments.limit:
        sys.exit(f"{gib:.2f} GiB are more than {arguments.limit:g}")


if __name__ == "__main__":
    main()
