"""Keeps the ratios of the last run beside those of this one: ``runs/bench/<part>.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import gluonts_peft

FOLDER = Path(__file__).parents[2] / "runs" / "bench"


def record(part: str, ratios: Mapping[str, float], console: Console) -> None:
    """Write the ratios of a part, and print those of the last run and how much they changed.

    Parameters
    ----------
    part
        Name of the file.
    ratios
        What was measured; only ratios of one run may be compared with those of another.
    console
        Where to print.
    """
    file = FOLDER / f"{part}.json"
    before = json.loads(file.read_text())["ratios"] if file.is_file() else {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    versions = {"gluonts-peft": gluonts_peft.__version__, "torch": torch.__version__}
    threads = torch.get_num_threads()
    file.write_text(json.dumps({"versions": versions, "threads": threads, "ratios": dict(ratios)}, indent=1) + "\n")
    known = [name for name in ratios if name in before]
    if known:
        table = Table(title=f"{part}: against the last run", title_justify="left")
        for column in ("", "last", "now", "change"):
            table.add_column(column, justify="right" if column else "left")
        for name in known:
            change = 100 * (ratios[name] / before[name] - 1)
            table.add_row(name, f"{before[name]:.2f}", f"{ratios[name]:.2f}", f"{change:+.0f} %")
        console.print(table)
    console.print(f"written: runs/bench/{file.name}\n")
