"""``forecast``: the steps after the end of series."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

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
    Family,
    Horizon,
    Model,
    Overwrite,
    Samples,
    Unusable,
    check_model,
    check_samples,
    load_model,
    one_of,
)
from .output import say

__all__ = ["forecast"]


@app.command(epilog=example("forecast recent.csv --model model --out forecasts.csv"))
@claiming
@reads_data
def forecast(
    data: Data,
    out: Annotated[Path, typer.Option(help="File for the forecasts: .csv, .csv.gz or .parquet.")],
    model: Model = None,
    family: Family = None,
    checkpoint: Checkpoint = None,
    horizon: Horizon = None,
    context: Context = None,
    num_samples: Samples = None,
    future: Annotated[
        Path | None, typer.Option(help="Table of the --known columns after the end of each series.")
    ] = None,
    device: Device = "auto",
    unusable: Unusable = "raise",
    any_freq: AnyFreq = False,
    overwrite: Overwrite = False,
    *,
    columns: Columns,
) -> None:
    """Forecast the steps after the end of each series of DATA, with a tuned model or zero-shot."""
    one_of("unusable", unusable, ("raise", "skip"))
    from ..series.table import writable, write_forecasts

    check_model(model, family, horizon, context)
    writable(out, overwrite)
    dataset = columns.read(data, future=future)
    predictor = load_model(model, family, checkpoint, horizon, context, device)
    check_samples(predictor, num_samples)
    count = 0

    def counted() -> Iterator[Any]:
        nonlocal count
        options: dict[str, Any] = dict(num_samples=num_samples, unusable=unusable, any_freq=any_freq)
        for each in predictor.predict(dataset, **options):
            count += 1
            yield each

    write_forecasts(counted(), out, overwrite=overwrite, columns=columns.names[:2])
    say(f"{predictor.prediction_length} steps of {count} series forecast: {out}")
