"""``study`` and ``demo``: trials of a grid."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, example
from .options import Address, Jobs, Override, Report, one_of, override
from .output import console, print_rows, say

__all__ = ["demo", "study"]


@app.command(epilog=example("study examples/demo.yaml --out runs/demo --jobs 2 --set prediction_length=12"))
def study(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="YAML file of the study.")],
    out: Report,
    jobs: Jobs = 1,
    set_: Override = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run on the nodes of a Ray cluster, on all their cores.")] = False,
    address: Address = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the trials and how long they will take, and run none of them.")
    ] = False,
    export: Annotated[
        str | None, typer.Option(help="fev: also write OUT/fev.csv, a summary as the library fev has it.")
    ] = None,
) -> None:
    """Run the trials of a study; a second run continues the first."""
    if export is not None:
        one_of("--export", export, ("fev",))
    if dry_run:
        if ray or address is not None:
            named = "--ray" if address is None else f"--address {address}"
            raise ValueError(f"{named} does not go with --dry-run, which measures on this machine; leave one out")
        return _estimate_study(spec, out, jobs, dict(map(override, set_ or ())))
    executor = _on_ray(out, jobs, address) if ray or address is not None else {}
    _run_study(spec, out, jobs, dict(map(override, set_ or ())), export=export is not None, **executor)


def _estimate_study(spec: Path, out: Path, jobs: int, overrides: dict[str, Any]) -> None:
    if jobs < 1:
        raise ValueError(f"--jobs {jobs} is not positive; name the number of trials at the same time")
    from ..trials import estimate, load_study

    found = estimate(load_study(spec, overrides), out)
    print_rows(("trial", "state"), [(trial.name(), state) for trial, state in found.cells])
    left = sum(state != "finished" for _, state in found.cells)
    say(f"{len(found.cells)} trials, {left} of them to run")
    if left:
        say(f"about {_duration(found.seconds / max(1, jobs))} with --jobs {jobs}; less where training stops early")
        say(f"estimated from: {'; '.join(found.sources)}")


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} seconds" if minutes < 2 else f"{minutes:.0f} minutes" if hours < 2 else f"{hours:.1f} hours"


def _on_ray(out: Path, jobs: int, address: str | None) -> dict[str, Any]:
    if jobs != 1:
        raise ValueError(f"--jobs {jobs} does not go with --ray, which runs as many trials as there are cores")
    from ..trials import on_ray
    from ..trials.cluster import shared_folder

    shared_folder(out)
    return {"executor": on_ray(address)}


@app.command(epilog=example("demo --out runs/demo --jobs 2"))
def demo(
    data: Annotated[Path | None, typer.Option(help="Hourly vitals (.parquet) in place of simulated ones.")] = None,
    out: Report = Path("runs/demo"),
    jobs: Jobs = 1,
    patients: Annotated[
        Path | None, typer.Option(help="Table of the patient of each stay in --data, as eICU's patient.csv.gz.")
    ] = None,
    spec: Annotated[Path, typer.Option("--study", help="The study.")] = Path("examples/demo.yaml"),
) -> None:
    """Compare every adapter with zero-shot and full tuning on vital signs; run it in a checkout of the project."""
    if not spec.is_file():
        raise FileNotFoundError(f"--study {spec} does not exist; run in a checkout of the project, or name the file")
    if patients is not None and data is None:
        raise ValueError(f"--patients {patients} maps the stays of --data to patients; name that too, or leave it out")
    real = {"data.source": "hourly", "data.path": str(data), "prediction_length": 12, "context_length": 72}
    if patients is not None:
        real["data.patients"] = str(patients)
    overrides: dict[str, Any] = {} if data is None else real
    _run_study(spec, out, jobs, overrides | _installed_baselines(spec))


def _installed_baselines(spec: Path) -> dict[str, Any]:
    """Return what leaves those baselines of a study out whose package is not installed; say which these are."""
    from ..trials.baselinespec import missing_package
    from ..trials.reading import read_yaml

    named = read_yaml(spec, "study", "base, grid, baselines and title").get("baselines") or []
    # What is wrong with them is said by the study itself.
    lacking = [each for each in named if missing_package(each)] if isinstance(named, list) else []
    if not lacking:
        return {}
    names = [each["name"] if isinstance(each, dict) else each for each in lacking]
    say(f"left out: {', '.join(names)}; their packages come with pip install gluonts-peft[baselines]")
    return {"baselines": [each for each in named if each not in lacking]}


def _run_study(
    spec: Path, out: Path, jobs: int, overrides: dict[str, Any], export: bool = False, **options: Any
) -> None:
    from ..trials import export_fev, load_study, print_table, run_study, write_report

    results = run_study(load_study(spec, overrides), out, jobs=jobs, progress=sys.stderr.isatty(), **options)
    print_table(results, console(), folder=out)
    say(f"report: {write_report(out)}")
    if export and any(result.status == "finished" for result in results):
        say(f"summary for fev: {export_fev(out, out / 'fev.csv')}")
    if failed := sum(result.status == "failed" for result in results):
        say(f"error: {failed} of {len(results)} trials failed; run it again to try these again", stderr=True)
        raise typer.Exit(1)
