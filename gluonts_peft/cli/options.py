"""Options that several verbs have, and what is checked of them before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..predictor import PeftPredictor

__all__ = [
    "DEFAULT_FAMILY",
    "Address",
    "AnyFreq",
    "Checkpoint",
    "Context",
    "Data",
    "Device",
    "Family",
    "Horizon",
    "Jobs",
    "Model",
    "NewFolder",
    "Override",
    "Overwrite",
    "Report",
    "Samples",
    "Season",
    "Unusable",
    "check_model",
    "check_names",
    "check_samples",
    "json_option",
    "load_model",
    "one_of",
    "override",
]


DEFAULT_FAMILY = "chronos"


Data = Annotated[Path, typer.Argument(metavar="DATA", help="Table (.csv, .parquet), GluonTS file or GluonTS folder.")]


Model = Annotated[Path | None, typer.Option(help="A predictor's folder; --checkpoint then is where its base lies now.")]


Family = Annotated[str | None, typer.Option(help=f"Model family.  [default: {DEFAULT_FAMILY}]")]


Checkpoint = Annotated[str | None, typer.Option(help="Bundled name, folder or hub id.  [default: the family's]")]


Horizon = Annotated[int | None, typer.Option(help="Steps to forecast, if there is no --model.")]


Context = Annotated[int | None, typer.Option(help="Steps of history to see.  [default: the checkpoint's]")]


Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]


Samples = Annotated[int | None, typer.Option(help="Sample paths a series, for families that sample.")]


Jobs = Annotated[int, typer.Option(help="Trials at the same time.")]


Report = Annotated[Path, typer.Option(help="Folder for trials, table and report.")]


Address = Annotated[
    str | None, typer.Option(help="Ray cluster: auto, HOST:PORT.  [default: RAY_ADDRESS, or this machine alone]")
]


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]


NewFolder = Annotated[Path, typer.Option(help="New folder for the predictor.")]


Season = Annotated[
    int | None,
    typer.Option(
        "--season", "--seasonality", help="Steps in a season.  [default: the frequency's, 7 for days, 24 for hours]"
    ),
]


Unusable = Annotated[
    str, typer.Option(help="Unusable series (all missing, too short): raise, or skip (go on without them).")
]


AnyFreq = Annotated[
    bool, typer.Option("--any-freq", help="Take data of another frequency than they seem to have, or the model has.")
]


Override = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a key; repeatable.")]


def json_option(option: str, text: str, example: str) -> Any:
    if not text.lstrip().startswith(("{", "[")):
        return text
    from ..files import parse_json

    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{option} {text!r} is not JSON: {error}; write e.g. '{example}'") from None


def override(text: str) -> tuple[str, Any]:
    from ..files import parse_yaml

    path, equals, value = text.partition("=")
    if not (path and equals):
        raise ValueError(f"--set {text!r} is not path=value; write e.g. --set context_length=72")
    try:
        return path, parse_yaml(value)[0]
    except ValueError as error:
        raise ValueError(f"--set {text!r}: the value is not YAML: {' '.join(str(error).split())}") from None


def one_of(option: str, value: str, known: Iterable[str]) -> None:
    from ..errors import unknown

    if value not in known:
        raise ValueError(unknown(option, value, known))


def check_names(family: str | None, adapter: Any = ()) -> None:
    """Refuse an unknown family or adapter, before anything of them is imported."""
    from ..registry import adapters, families

    if family is not None:
        one_of("family", family, families.names())
    for part in adapter if isinstance(adapter, list) else [adapter]:
        name = part.get("name") if isinstance(part, dict) else part
        if isinstance(name, str):
            one_of("adapter", name, adapters.names())


def check_model(model: Path | None, family: str | None, horizon: int | None, context: int | None) -> None:
    """Refuse what cannot be a model, before anything of it is imported."""
    for name, steps in (("prediction_length", horizon), ("context_length", context)):
        if steps is not None and steps <= 0:
            use = "to forecast" if name == "prediction_length" else "of history to use"
            raise ValueError(f"{name} {steps} is not positive; name the steps {use}")
    if model is None and horizon is None:
        raise ValueError("there is nothing to forecast with; give --model FOLDER, or --horizon N for zero-shot")
    if model is not None:
        for option, value in (("--family", family), ("--horizon", horizon), ("--context", context)):
            if value is not None:
                raise ValueError(f"{option} {value} does not go with --model {model}, which has its own; leave one out")
        if not (model / "predictor.json").is_file():
            raise ValueError(f"folder {str(model)!r} holds no predictor: it has no predictor.json")
    check_names(family)


def load_model(
    model: Path | None,
    family: str | None,
    checkpoint: str | None,
    horizon: int | None,
    context: int | None,
    device: str,
) -> PeftPredictor:
    """Load a stored predictor, or make a zero-shot one."""
    check_model(model, family, horizon, context)

    from ..backbone import load_backbone
    from ..predictor import PeftPredictor

    if model is not None:
        return PeftPredictor.deserialize(model, device=device, checkpoint=checkpoint)
    assert horizon is not None
    backbone = load_backbone(
        family or DEFAULT_FAMILY, prediction_length=horizon, checkpoint=checkpoint, context_length=context
    )
    return PeftPredictor(backbone, device=device)


def check_samples(predictor: PeftPredictor, num_samples: int | None) -> None:
    backbone = predictor.backbone
    new_head = backbone.adapter is not None and backbone.adapter.head_levels is not None
    if num_samples is not None and (new_head or "samples" not in backbone.capabilities):
        raise ValueError(f"--num-samples {num_samples} has no effect: the model forecasts quantiles; leave it out")
