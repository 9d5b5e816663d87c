"""``vitals``: turn downloads of ICU data into GluonTS data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, example
from .options import override
from .output import print_rows, say

__all__ = ["vitals_app"]


vitals_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


app.add_typer(
    vitals_app,
    name="vitals",
    help="Turn a download of ICU vital signs into GluonTS data, divided by patient.",
    epilog=example("vitals eicu --help"),
)


Download = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with the tables, .csv or .csv.gz.")]


NewData = Annotated[Path, typer.Option(help="New folder for the data.")]


Vital = Annotated[list[str], typer.Option(help="hr, map, sbp, dbp, resp or o2sat; repeatable.")]


Cuff = Annotated[str, typer.Option(help="Cuff pressures: gaps (of the arterial ones), stays (without any), never.")]


Step = Annotated[str, typer.Option(help="Of ranges, plausibility, fill, scale, smooth, length, windows, in order.")]


StepOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="STEP.OPTION=VALUE", help="Option of a step; repeatable.")
]


Fractions = Annotated[str, typer.Option(help="Patients for train, validation, test; '' for one part, all.")]


SplitSeed = Annotated[int, typer.Option(help="Seed of the split.")]


PAPER_STEPS = "plausibility,fill,scale,smooth,windows"


@vitals_app.command(epilog=example("vitals eicu eicu-crd-2.0 --out eicu --vital hr --set windows.stride=3"))
def eicu(
    folder: Download,
    out: NewData,
    vital: Vital = ["hr", "map"],  # noqa: B006
    cohort: Annotated[str, typer.Option(help="sepsis (by admission diagnosis or diagnosis table) or all.")] = "sepsis",
    cuff: Cuff = "gaps",
    freq: Annotated[str, typer.Option(help="Step, whole minutes.")] = "5min",
    steps: Step = PAPER_STEPS,
    set_: StepOption = None,
    fractions: Fractions = "0.8,0.1,0.1",
    seed: SplitSeed = 42,
) -> None:
    """Convert eICU-CRD: vitalPeriodic, vitalAperiodic, patient, and diagnosis if there."""
    from ..vitals import load_eicu

    _convert(load_eicu, folder, out, vital, steps, set_, fractions, seed, cohort=cohort, cuff=cuff, freq=freq)


@vitals_app.command(epilog=example("vitals mimic mimiciv-3.1 --out mimic --steps plausibility,fill --fractions ''"))
def mimic(
    folder: Download,
    out: NewData,
    vital: Vital = ["hr", "map"],  # noqa: B006
    min_age: Annotated[float, typer.Option(help="Years at admission; 0 keeps newborns and needs no PATIENTS.")] = 16,
    cuff: Cuff = "gaps",
    freq: Annotated[str, typer.Option(help="Step, whole minutes.")] = "h",
    steps: Step = PAPER_STEPS,
    set_: StepOption = None,
    fractions: Fractions = "0.8,0.1,0.1",
    seed: SplitSeed = 42,
) -> None:
    """Convert MIMIC-III or MIMIC-IV: CHARTEVENTS, ICUSTAYS and PATIENTS."""
    from ..vitals import load_mimic

    _convert(
        load_mimic, folder, out, vital, steps, set_, fractions, seed, min_age=min_age or None, cuff=cuff, freq=freq
    )


def _convert(
    load: Any,
    folder: Path,
    out: Path,
    vital: list[str],
    steps: str,
    overrides: list[str] | None,
    fractions: str,
    seed: int,
    **loading: Any,
) -> None:
    import time

    from ..vitals import convert

    options: dict[str, dict[str, Any]] = {}
    for path, value in map(override, overrides or ()):
        step, dot, option = path.partition(".")
        if not (dot and option):
            raise ValueError(f"--set {path}={value} is not step.option=value; write e.g. --set smooth.points=5")
        options.setdefault(step, {})[option] = value
    try:
        shares = [float(share) for share in fractions.split(",")] if fractions else None
    except ValueError:
        raise ValueError(f"--fractions {fractions!r} are not numbers; write e.g. 0.8,0.1,0.1") from None
    start = time.perf_counter()
    manifest = convert(
        load,
        folder,
        out,
        vitals=vital,
        steps=[step.strip() for step in steps.split(",")] if steps else [],
        options=options,
        fractions=shares,
        seed=seed,
        progress=sys.stderr.isatty(),
        **loading,
    )
    seconds = time.perf_counter() - start
    rows = [(name, rule, f"{count:,}") for name, found in manifest["counts"].items() for rule, count in found.items()]
    print_rows(("where", "what", "count"), rows, right=2)
    counted = [(part, *(f"{count:,}" for count in found.values())) for part, found in manifest["parts"].items()]
    print_rows(("part", *next(iter(manifest["parts"].values()))), counted, right=1)
    total = sum(source["rows"] for source in manifest["sources"])
    say(f"{total:,} rows in {seconds:.1f} seconds, {total / seconds:,.0f} rows a second: {out}")
