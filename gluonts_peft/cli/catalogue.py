"""``families`` and ``adapters``: what is installed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .app import app, example
from .options import DEFAULT_FAMILY
from .output import print_rows

__all__ = ["adapters", "families"]


@app.command(epilog=example("families"))
def families() -> None:
    """List the installed model families."""
    from ..registry import families as registry

    rows = []
    for entry in registry.describe():
        try:
            backbone = registry.get(entry.name).backbone_class
            about = (", ".join(backbone.bundled()) or "none", ", ".join(sorted(backbone.capabilities)))
        except Exception as error:
            # A stranger's plug-in may fail in any way; the others are to be listed all the same.
            about = (f"error: {error}", "")
        rows.append((entry.name, entry.distribution, entry.version, *about))
    print_rows(("family", "distribution", "version", "bundled checkpoints", "capabilities"), rows)


@app.command(epilog=example("adapters --family chronos --checkpoint bolt-nano"))
def adapters(
    family: Annotated[str | None, typer.Option(help="Count the trainable parameters on this family.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="On this checkpoint.  [default: the family's]")] = None,
) -> None:
    """List the installed adapters; with --family also how many parameters each trains."""
    from ..adapters.load import get_adapter
    from ..backbone import load_backbone
    from ..registry import adapters as registry

    backbone = None
    if family or checkpoint:
        backbone = load_backbone(family or DEFAULT_FAMILY, prediction_length=1, checkpoint=checkpoint)
    rows = []
    for entry in registry.describe():
        count: object = ""
        try:
            adapter = get_adapter(entry.name)
            about = (f"{adapter.learning_rate:g}", _where(adapter))
            if backbone is not None:
                count = f"{adapter.attach(backbone).num_parameters():,}"
                adapter.detach()
        except Exception as error:
            about = ("", f"error: {error}")
        rows.append((entry.name, f"{entry.distribution} {entry.version}", *about, count))
    header = ("adapter", "distribution", "learning rate", "goes to", "parameters")
    if backbone is None:
        print_rows(header[:-1], [row[:-1] for row in rows])
    else:
        print_rows(header, rows, f"trainable parameters on {backbone.source.checkpoint}", right=4)


def _where(adapter: Any) -> str:
    owner = getattr(adapter, "method", adapter)
    sites = getattr(owner, "sites", ())
    return "everything" if sites is None else " ".join((*sites, *getattr(owner, "feedforward", ()))) or "-"
