"""``search``: trials that Ray Tune chooses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import app, example
from .options import Address, Override, override
from .output import console, say

__all__ = ["search"]


@app.command(epilog=example("search ray_configs/searches/quick.yaml --out $PWD/runs/quick --set num_samples=4"))
def search(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="YAML file of the search.")],
    out: Annotated[Path, typer.Option(help="Folder for trials and ranking: absolute, and shared by all nodes.")],
    set_: Override = None,
    address: Address = None,
    serial: Annotated[bool, typer.Option("--serial", help="One trial after another, here, without Ray.")] = False,
) -> None:
    """Let Ray Tune choose among the trials of a search; a second run continues the first.

    At the end OUT/ranking.csv has the trials, the best first, and OUT/best is the best one's predictor; a warning says
    if there is no evidence that it is better than zero-shot.
    """
    if serial and address is not None:
        raise ValueError(f"--serial does not go with --address {address}; leave one out")
    from ..trials import load_search, print_ranking
    from ..trials import search as run_search
    from ..trials.records import not_helped

    overrides = dict(map(override, set_ or ()))
    wanted = load_search(spec, overrides)
    ranking = run_search(wanted, out, address=address, serial=serial, progress=sys.stderr.isatty())
    print_ranking(ranking, console())
    say(f"ranking: {out / 'ranking.csv'}")
    finished = ranking["status"].isin(["finished", "stopped"])
    if (ranking["status"] == "finished").any():
        say(f"best predictor: {out / 'best'}{' (no evidence)' if not_helped(ranking) else ''}")
    if not finished.all():
        lost = len(ranking) - finished.sum()
        first = ranking["error"].dropna().head(1)
        why = f" ({first.iloc[0]})" if len(first) else ""
        message = f"error: {lost} of {len(ranking)} trials have no final score{why}; run it again to try these again"
        say(message, stderr=True)
        raise typer.Exit(1)
