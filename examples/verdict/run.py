"""Measure what a verdict is worth: tune, perturb, draw few series again and again, and score on unseen patients.

Takes 10 to 20 minutes on two cores; the scores of a vital sign are kept in OUT and not computed again.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from models import MIXTURES, make
from rules import RULES, SIZES, choices_table, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="hourly vital signs, a Parquet table")
    parser.add_argument("--patients", type=Path, help="table that maps stays to patients, e.g. patient.csv.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the scores and the table")
    parser.add_argument("--draws", type=int, default=6, help="draws of series for each model and number of series")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2) as workers:
        jobs = []
        for vital in ("hr", "map"):
            file = options.out / f"{vital}.npz"
            if not file.is_file():
                jobs.append(workers.submit(make, options.data, options.patients, vital, file))
        for job in jobs:
            job.result()
    lines, found = table(options.out, options.draws)
    lines += ["", *choices_table(options.out, options.draws)]
    (options.out / "verdict.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    old, new = RULES[0], RULES[2]
    for size in SIZES:
        before, after = found[MIXTURES[0], old, size], found[MIXTURES[0], new, size]
        if after["proven by noise"] > 5.0 or after["worse"] > before["worse"] or after["change"] > before["change"]:
            raise SystemExit(f"with {size} series the verdict is no better than the rule before it: {before}, {after}")


if __name__ == "__main__":
    main()
