"""``detect``: find anomalies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, example
from .claims import claiming
from .columns import Columns, reads_data
from .options import (
    DEFAULT_FAMILY,
    AnyFreq,
    Checkpoint,
    Context,
    Data,
    Device,
    Family,
    Horizon,
    Model,
    Unusable,
    check_model,
    json_option,
    load_model,
    one_of,
)
from .output import print_rows, say

__all__ = ["detect"]


@app.command(epilog=example("detect ward.csv --family moment --calibration 0.25 --out anomalies"))
@claiming
@reads_data
def detect(
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for scores, events and plot.")],
    calibration: Annotated[
        str | None, typer.Option(help="Clean part: steps or share at the start of each series, or a file.")
    ] = None,
    model: Model = None,
    family: Family = None,
    checkpoint: Checkpoint = None,
    horizon: Horizon = None,
    context: Context = None,
    method: Annotated[str, typer.Option(help="auto, reconstruction, visible, residual or exceedance.")] = "auto",
    threshold: Annotated[
        str, typer.Option(help="quantile, deviations or extreme; or JSON: a mapping with the name and options.")
    ] = "quantile",
    smoothing: Annotated[int, typer.Option(help="Width of a moving mean over the scores.")] = 1,
    merge: Annotated[int, typer.Option(help="Steps between stretches that are one event all the same.")] = 0,
    min_length: Annotated[int, typer.Option(help="Fewest steps of an event.")] = 1,
    stride: Annotated[int | None, typer.Option(help="Steps from window to window.  [default: the method's]")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Column with 1 where there is an anomaly: scores the scores.")
    ] = None,
    device: Device = "auto",
    unusable: Unusable = "raise",
    any_freq: AnyFreq = False,
    *,
    columns: Columns,
) -> None:
    """Find anomalies in each series of DATA, with a tuned model or zero-shot."""
    one_of("unusable", unusable, ("raise", "skip"))
    spec = json_option("--threshold", threshold, '{"name": "quantile", "level": 0.999}')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} is in use; name a new folder")

    import numpy as np

    from ..anomaly import METHODS, QUALITY, THRESHOLDS, check_calibration, evaluate, write_detections
    from ..anomaly import detect as find

    number = None if calibration is None else _number(calibration)
    check_calibration(calibration if number is None else number)
    one_of("method", method, ("auto", *METHODS))
    one_of("threshold", spec if isinstance(spec, str) else str(dict(spec).get("name")), THRESHOLDS)
    # Whether the family needs a horizon is known only when it is loaded.
    by_family = model is None and method in ("auto", "reconstruction", "visible")
    check_model(model, family, 1 if by_family and horizon is None else horizon, context)
    marked = [] if labels is None else [labels]
    dataset = columns.read(data, dtype=np.float64, also_ignore=marked)
    clean: Any = calibration
    if calibration is not None:
        clean = columns.read(Path(calibration), dtype=np.float64, ignore=True) if number is None else number
    truth = None if labels is None else columns.read(data, target=labels, ignore=True)
    if by_family and _reconstructs(family):
        if horizon is not None:
            raise ValueError(
                f"--horizon {horizon} has no effect: method 'reconstruction' does not forecast; leave it out"
            )
        horizon = 1
    predictor = load_model(model, family, checkpoint, horizon, context, device)
    for label in truth or ():
        if len(wrong := label["target"][~np.isin(label["target"], (0, 1))]):
            raise ValueError(
                f"labels hold {wrong[0]:g} in series {label['item_id']!r}; give 1 for an anomaly and 0 else"
            )
    found = find(
        predictor,
        dataset,
        calibration=clean,
        method=method,
        threshold=spec,
        smoothing=smoothing,
        merge=merge,
        min_length=min_length,
        stride=stride,
        unusable=unusable,
        any_freq=any_freq,
        progress=sys.stderr.isatty(),
    )
    if not found:
        raise ValueError(f"no series of '{data}' is left to be judged; give others, or another --calibration")
    write_detections(found, dataset, out, columns=columns.names)
    from ..series.calendar import first_stamp

    quality = []
    labels_of = {label["item_id"]: label for label in truth or ()}
    for each in found if truth else ():
        label = labels_of[each.scores.item_id]
        judged, marks = each.scores.values[each.begin :], label["target"][each.begin :]
        # A series without anomalies, or with nothing else, is nothing to measure by.
        both = 0 < marks[~np.isnan(judged)].astype(bool).sum() < (~np.isnan(judged)).sum()
        scored = evaluate(judged, marks) if both else {}
        quality.append((each.scores.item_id, *(f"{scored[name]:.3f}" if scored else "-" for name in QUALITY)))
    rows = [
        (
            each.scores.item_id,
            first_stamp(event.start, each.scores.calendar),
            first_stamp(event.end, each.scores.calendar),
            event.last - event.first + 1,
            f"{event.peak:.4g}",
            f"{each.threshold:.4g}",
        )
        for each in found
        for event in each.events
    ]
    print_rows(("item_id", "start", "end", "steps", "peak", "threshold"), rows, f"{len(rows)} events", right=3)
    if quality:
        print_rows(("item_id", *QUALITY), quality, "scores behind the calibration part", right=1)
    say(f"scores, events and plot: {out}")


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def _reconstructs(family: str | None) -> bool:
    from ..registry import get_estimator

    return "reconstruct" in get_estimator(family or DEFAULT_FAMILY).backbone_class.capabilities
