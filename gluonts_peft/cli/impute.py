"""``impute``: fill gaps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import app, example
from .claims import claiming
from .columns import Columns, reads_data
from .options import (
    AnyFreq,
    Checkpoint,
    Context,
    Data,
    Device,
    Model,
    Overwrite,
    Unusable,
    check_model,
    load_model,
    one_of,
)
from .output import say

__all__ = ["impute"]


@app.command(epilog=example("impute ward.csv --out filled.csv"))
@claiming
@reads_data
def impute(
    data: Data,
    out: Annotated[Path, typer.Option(help="File for the filled series: .csv, .csv.gz or .parquet.")],
    model: Model = None,
    family: Annotated[str | None, typer.Option(help="Model family that reconstructs.  [default: moment]")] = None,
    checkpoint: Checkpoint = None,
    context: Context = None,
    max_gap: Annotated[int | None, typer.Option(help="Longest gap to fill.  [default: half the context]")] = None,
    unfillable: Annotated[str, typer.Option(help="Longer gaps and empty series: raise, keep (missing).")] = "raise",
    device: Device = "auto",
    unusable: Unusable = "raise",
    any_freq: AnyFreq = False,
    overwrite: Overwrite = False,
    *,
    columns: Columns,
) -> None:
    """Fill the gaps of each series of DATA; observed values stay as they are."""
    one_of("unusable", unusable, ("raise", "skip"))
    import numpy as np

    from ..series.table import writable

    writable(out, overwrite)
    one_of("unfillable", unfillable, ("raise", "keep"))
    if model is None:
        family = family or "moment"
    horizon = None if model is not None else 1
    check_model(model, family, horizon, context)
    dataset = columns.read(data, dtype=np.float64)

    from ..imputation import impute as fill
    from ..imputation import write_imputed

    predictor = load_model(model, family, checkpoint, horizon, context, device)
    filled = fill(
        predictor,
        dataset,
        max_gap=max_gap,
        unfillable=unfillable,
        unusable=unusable,
        any_freq=any_freq,
        progress=sys.stderr.isatty(),
    )
    if not filled:
        raise ValueError(f"no series of '{data}' has an observed value; give others")
    table = write_imputed(dataset, filled, out, overwrite=overwrite, columns=columns.names)
    left = int(table[columns.target].isna().sum())
    say(f"{int(table['imputed'].sum())} values of {len(filled)} series filled, {left} left missing: {out}")
