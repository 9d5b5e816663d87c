"""``fit``: tune a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app, example
from .claims import PREDICTOR, new_folder, take_out
from .columns import Columns, reads_data
from .options import (
    DEFAULT_FAMILY,
    AnyFreq,
    Checkpoint,
    Context,
    Data,
    Device,
    NewFolder,
    Unusable,
    check_model,
    check_names,
    json_option,
    one_of,
)
from .output import facts, say, stopped

__all__ = ["fit"]


Validation = Annotated[Path | None, typer.Option(help="Data of the verdict.  [default: the ends of DATA, held out]")]


AdapterSpec = Annotated[str, typer.Option(help="Name; or JSON: a mapping with options, or a list for a hybrid.")]


Rate = Annotated[float | None, typer.Option(help="Peak learning rate.  [default: the adapter's]")]


IfWorse = Annotated[
    str, typer.Option(help="Without evidence that tuning helped: fallback (to zero-shot), raise (exit code 3), keep.")
]


By = Annotated[
    str | None, typer.Option(help="Let each item (or: patients) choose its own weight.  [default: one for all]")
]


TimeLimit = Annotated[
    str | None, typer.Option(help="Time for training and verdict: 90s, 10min, 1h30min, or seconds.  [default: none]")
]


VerdictUnit = Annotated[
    str, typer.Option(help="What the verdict counts: series, or patients (what comes before / in an item id).")
]


Interpolate = Annotated[
    bool, typer.Option(help="Let the verdict choose a weight between the pretrained and the tuned model.")
]


Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")]


def adapter_option(text: str) -> Any:
    return json_option("--adapter", text, '{"name": "lora", "r": 4}')


@app.command(epilog=example('fit train.csv --out model --horizon 24 --adapter \'{"name": "lora", "r": 4}\''))
@reads_data
def fit(
    data: Data,
    out: NewFolder,
    horizon: Annotated[int, typer.Option(help="Steps to forecast.")],
    family: Annotated[str, typer.Option(help="Model family.")] = DEFAULT_FAMILY,
    checkpoint: Checkpoint = None,
    adapter: AdapterSpec = "lora",
    context: Context = None,
    validation: Validation = None,
    validation_windows: Annotated[int, typer.Option(help="Last windows of a series for the verdict.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs at most.")] = 10,
    batches: Annotated[int, typer.Option(help="Batches an epoch.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Windows a batch.")] = 32,
    learning_rate: Rate = None,
    seed: Annotated[int, typer.Option(help="Same seed, same machine, same numbers.")] = 0,
    gate: IfWorse = "fallback",
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Recalibrate the quantiles on series that chose nothing.")
    ] = False,
    verdict_unit: VerdictUnit = "series",
    interpolate: Interpolate = True,
    by: By = None,
    time_limit: TimeLimit = None,
    task: Annotated[
        str, typer.Option(help="forecast, or reconstruct (for detect and impute; --horizon then has no effect).")
    ] = "forecast",
    device: Device = "auto",
    unusable: Unusable = "raise",
    any_freq: AnyFreq = False,
    resume: Resume = False,
    *,
    columns: Columns,
) -> None:
    """Tune a pretrained model on DATA and write a GluonTS predictor.

    While it runs, its checkpoints are in OUT/training; after an interruption repeat the command with --resume: that
    ends at once where the run was finished after all.
    """
    one_of("unusable", unusable, ("raise", "skip"))
    spec = adapter_option(adapter)
    if task not in ("forecast", "reconstruct"):
        raise ValueError(f"--task {task} is unknown; name forecast or reconstruct")
    one_of("gate", gate, ("fallback", "raise", "keep"))
    one_of("verdict_unit", verdict_unit, ("series", "patients"))
    if by is not None:
        one_of("by", by, ("item", "patients"))
    from ..deadline import parse_time_limit

    limit = parse_time_limit(time_limit)
    check_model(None, family, horizon, context)
    check_names(None, spec)
    if resume and _is_finished(out, family, checkpoint, horizon if task == "forecast" else None, spec, calibrate):
        # A run that is killed in its last moments, or is repeated by a scheduler, has nothing left to do.
        return say(f"--out {out} holds the finished predictor of this run: there is nothing to go on with")
    with new_folder(out, resume) as training:
        # Before what takes long to import.
        dataset = columns.read(data)
        held_out = None if validation is None else columns.read(validation, ignore=True)

        from ..adapters.load import get_adapter
        from ..registry import get_estimator
        from ..training import TuningDidNotHelp

        estimator = get_estimator(family)(
            prediction_length=horizon,
            context_length=context,
            checkpoint=checkpoint,
            adapter=spec,
            max_epochs=epochs,
            num_batches_per_epoch=batches,
            batch_size=batch_size,
            learning_rate=learning_rate,
            gate=gate,
            calibrate=calibrate,
            verdict_unit=verdict_unit,
            interpolate=interpolate,
            by=by,
            validation_windows=validation_windows,
            time_limit=limit,
            seed=seed,
            device=device,
            folder=str(training),
            progress=sys.stderr.isatty(),
            unusable=unusable,
            any_freq=any_freq,
            task=task,
        )
        try:
            predictor = estimator.train(dataset, held_out, ckpt_path="last" if resume else None)
        except TuningDidNotHelp as error:
            say(f"error: {error}", stderr=True)
            raise typer.Exit(3) from None
        take_out(out)
        predictor.serialize(out)
    backbone, run = predictor.backbone, predictor.fit
    kind = "zero-shot" if backbone.adapter is None else "tuned"
    # The gate may have taken the adapter off; a new one of its kind has as many parameters.
    tuned = backbone.adapter or get_adapter(estimator.adapter).attach(backbone)
    facts(
        [
            ("verdict", run.verdict or run.gate),
            *([] if predictor.calibration is None else [("calibration", predictor.calibration)]),
            ("adapter", repr(tuned)),
            ("trainable parameters", f"{tuned.num_parameters():,}"),
            ("trained", f"{run.epochs} epochs, {run.steps} steps, {run.seconds:.1f} seconds"),
            *stopped(run),
            ("predictor", f"{out} ({kind})"),
        ]
    )


def _is_finished(
    out: Path, family: str, checkpoint: str | None, horizon: int | None, adapter: Any, calibrate: bool
) -> bool:
    """Whether a folder holds a whole predictor of these options, and no checkpoint of a training."""
    from ..files import load_json, opened

    if not (out / PREDICTOR[-1]).is_file() or (out / "training" / "last.ckpt").exists():
        return False
    try:
        record = opened(load_json(out / "predictor.json"))
        found = (record["family"], record["base"]["checkpoint"], record["prediction_length"], record["adapter"])
    except (OSError, ValueError, KeyError, TypeError):
        # Opening it gives the better message.
        return False
    same = calibrate == ("calibration" in record)
    same = same and found[0] == family and checkpoint in (None, found[1]) and horizon in (None, found[2])
    if not same or found[3] is None:
        # Zero-shot was handed over, whatever had been tuned.
        return same

    from ..adapters.load import get_adapter

    wanted = get_adapter(adapter).spec
    # Where a checkpoint brings no head, one is trained along.
    return found[3] in (wanted, [*(wanted if isinstance(wanted, list) else [wanted]), "head"])
