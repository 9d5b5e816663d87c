"""The command line: a function a verb, which parses, calls the library and prints.

Exit codes: 0 done, 1 a defect of the program or failed trials, 2 wrong input, 3 no evidence that tuning helped (``fit
--gate raise``), 130 Ctrl-C, 143 SIGTERM. What takes long to import is imported inside the verbs, so that ``--help``
answers at once.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .columns import Columns, reads_data

if TYPE_CHECKING:
    from rich.console import Console

    from .predictor import PeftPredictor

__all__ = ["app", "main"]

DEFAULT_FAMILY = "chronos"
# Wide enough that no cell of a table is wrapped or cut when the output goes to a file or another program.
PIPE_WIDTH = 1000

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
Season = Annotated[
    int | None,
    typer.Option(
        "--season", "--seasonality", help="Steps in a season.  [default: the frequency's, 7 for days, 24 for hours]"
    ),
]
Unusable = Annotated[
    str, typer.Option(help="Series of no use, as all missing or too short: raise, or skip (go on without them).")
]
AnyFreq = Annotated[
    bool, typer.Option("--any-freq", help="Take data of another frequency than they seem to have, or the model has.")
]
Baselines = Annotated[bool, typer.Option(help="Score zero-shot, last value and seasonal naive as well.")]
Override = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a key; repeatable.")]


def _example(arguments: str) -> str:
    # Else the parser would wrap it, and it could not be pasted.
    return f"\b\ngluonts-peft {arguments}"


class _Group(TyperGroup):
    """Turns what a verb raises into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        from .processes import Terminated, asked_to_end, private_caches, terminable

        try:
            with _one_line_warnings(), terminable(), private_caches():
                return super().invoke(ctx)
        except BaseException as error:
            # Lightning turns Ctrl-C into exit code 1, and Ray's compiled code an interruption into an error.
            asked = asked_to_end(error)
            if isinstance(asked, Terminated):
                _say(f"terminated ({asked}); {_remedy(ctx, error)}", stderr=True)
                raise typer.Exit(asked.exit_code) from None
            if asked is not None:
                _say("interrupted", stderr=True)
                raise typer.Exit(130) from None
            # Errors of the parser, and its exits, carry their own code; a closed pipe is nobody's fault.
            theirs = not isinstance(error, Exception) or hasattr(error, "exit_code")
            if ctx.params["debug"] or theirs or isinstance(error, BrokenPipeError):
                raise
            if isinstance(error, ValueError | OSError | ImportError):
                code, line = 2, f"error: {error}"
            else:
                code, line = 1, f"error: {type(error).__name__}: {error} (unexpected; --debug shows where)"
        _say(line, stderr=True)
        raise typer.Exit(code)


def _remedy(ctx: Any, error: BaseException) -> str:
    """Say how to go on after an interruption."""
    if getattr(error, "resumable", False):
        return "repeat the command with --resume to go on after the last epoch that was finished"
    if ctx.invoked_subcommand in ("study", "search", "demo"):
        return "what was finished is in --out: repeat the command to go on"
    return "nothing was written: repeat the command"


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    # Plain help is never cut, whatever the width; and errors of the parser look like all others.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def main() -> None:
    """Run the command line."""
    app(prog_name="gluonts-peft")


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _say(f"{record.levelname.lower()}: {record.getMessage()}", stderr=True)

    handler, root = Handler(logging.WARNING), logging.getLogger()
    root.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `json`-module", UserWarning)
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}", stderr=True)
            yield
    finally:
        root.removeHandler(handler)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH)


def _say(text: str, stderr: bool = False) -> None:
    _console(stderr).print(text, markup=False, highlight=False, soft_wrap=True)


def _table(header: Iterable[str], rows: Iterable[Iterable[object]], title: str | None = None, right: int = 99) -> None:
    """Print a table; columns from number ``right`` on are numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for position, name in enumerate(header):
        table.add_column(Text(name), justify="right" if position >= right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    _console().print(table)


def _facts(rows: Iterable[tuple[str, object]]) -> None:
    for name, value in rows:
        _say(f"{name + ':':<22}{value}")


def _adapter(text: str) -> Any:
    return _json("--adapter", text, '{"name": "lora", "r": 4}')


def _json(option: str, text: str, example: str) -> Any:
    if not text.lstrip().startswith(("{", "[")):
        return text
    from .files import parse_json

    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{option} {text!r} is not JSON: {error}; write e.g. '{example}'") from None


def _override(text: str) -> tuple[str, Any]:
    from .files import parse_yaml

    path, equals, value = text.partition("=")
    if not (path and equals):
        raise ValueError(f"--set {text!r} is not path=value; write e.g. --set context_length=72")
    try:
        return path, parse_yaml(value)[0]
    except ValueError as error:
        raise ValueError(f"--set {text!r}: the value is not YAML: {' '.join(str(error).split())}") from None


def _one_of(option: str, value: str, known: Iterable[str]) -> None:
    from .errors import unknown

    if value not in known:
        raise ValueError(unknown(option, value, known))


def _check_names(family: str | None, adapter: Any = ()) -> None:
    """Refuse an unknown family or adapter, before anything of them is imported."""
    from .registry import adapters, families

    if family is not None:
        _one_of("family", family, families.names())
    for part in adapter if isinstance(adapter, list) else [adapter]:
        name = part.get("name") if isinstance(part, dict) else part
        if isinstance(name, str):
            _one_of("adapter", name, adapters.names())


def _check_model(model: Path | None, family: str | None, horizon: int | None, context: int | None) -> None:
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
    _check_names(family)


def _predictor(
    model: Path | None,
    family: str | None,
    checkpoint: str | None,
    horizon: int | None,
    context: int | None,
    device: str,
) -> PeftPredictor:
    """Load a stored predictor, or make a zero-shot one."""
    _check_model(model, family, horizon, context)

    from .backbone import load_backbone
    from .predictor import PeftPredictor

    if model is not None:
        return PeftPredictor.deserialize(model, device=device, checkpoint=checkpoint)
    assert horizon is not None
    backbone = load_backbone(
        family or DEFAULT_FAMILY, prediction_length=horizon, checkpoint=checkpoint, context_length=context
    )
    return PeftPredictor(backbone, device=device)


def _check_samples(predictor: PeftPredictor, num_samples: int | None) -> None:
    backbone = predictor.backbone
    new_head = backbone.adapter is not None and backbone.adapter.head_levels is not None
    if num_samples is not None and (new_head or "samples" not in backbone.capabilities):
        raise ValueError(f"--num-samples {num_samples} has no use: the model forecasts quantiles; leave it out")


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        _say(f"gluonts-peft {__version__}")
        raise typer.Exit


@app.callback(epilog=_example("fit train.csv --out model --horizon 24 --adapter lora"))
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Show it.")] = False,
) -> None:
    """Adapt pretrained time-series forecasters with a few trainable parameters, and see whether it helped."""


@app.command(epilog=_example("families"))
def families() -> None:
    """List the installed model families."""
    from .registry import families as registry

    rows = []
    for entry in registry.describe():
        try:
            backbone = registry.get(entry.name).backbone_class
            about = (", ".join(backbone.bundled()) or "none", ", ".join(sorted(backbone.capabilities)))
        except Exception as error:
            # A stranger's plug-in may fail in any way; the others are to be listed all the same.
            about = (f"error: {error}", "")
        rows.append((entry.name, entry.distribution, entry.version, *about))
    _table(("family", "distribution", "version", "bundled checkpoints", "capabilities"), rows)


@app.command(epilog=_example("adapters --family chronos --checkpoint bolt-nano"))
def adapters(
    family: Annotated[str | None, typer.Option(help="Count the trainable parameters on this family.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="On this checkpoint.  [default: the family's]")] = None,
) -> None:
    """List the installed adapters; with --family also how many parameters each trains."""
    from .adapters.load import get_adapter
    from .backbone import load_backbone
    from .registry import adapters as registry

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
        _table(header[:-1], [row[:-1] for row in rows])
    else:
        _table(header, rows, f"trainable parameters on {backbone.source.checkpoint}", right=4)


def _where(adapter: Any) -> str:
    owner = getattr(adapter, "method", adapter)
    sites = getattr(owner, "sites", ())
    return "everything" if sites is None else " ".join((*sites, *getattr(owner, "feedforward", ()))) or "-"


@app.command(epilog=_example('fit train.csv --out model --horizon 24 --adapter \'{"name": "lora", "r": 4}\''))
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
    _one_of("unusable", unusable, ("raise", "skip"))
    spec = _adapter(adapter)
    if task not in ("forecast", "reconstruct"):
        raise ValueError(f"--task {task} is unknown; name forecast or reconstruct")
    _one_of("gate", gate, ("fallback", "raise", "keep"))
    _one_of("verdict_unit", verdict_unit, ("series", "patients"))
    if by is not None:
        _one_of("by", by, ("item", "patients"))
    from .deadline import parse_time_limit

    limit = parse_time_limit(time_limit)
    _check_model(None, family, horizon, context)
    _check_names(None, spec)
    if resume and _is_finished(out, family, checkpoint, horizon if task == "forecast" else None, spec, calibrate):
        # A run that is killed in its last moments, or is repeated by a scheduler, has nothing left to do.
        return _say(f"--out {out} holds the finished predictor of this run: there is nothing to go on with")
    with _new_folder(out, resume) as training:
        # Before what takes long to import.
        dataset = columns.read(data)
        held_out = None if validation is None else columns.read(validation, ignore=True)

        from .adapters.load import get_adapter
        from .registry import get_estimator
        from .training import TuningDidNotHelp

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
        )
        try:
            predictor: Any
            if task == "reconstruct":
                from .imputation import train_reconstruction

                predictor = train_reconstruction(estimator, dataset, held_out, ckpt_path="last" if resume else None)
            else:
                predictor = estimator.train(dataset, held_out, ckpt_path="last" if resume else None)
        except TuningDidNotHelp as error:
            _say(f"error: {error}", stderr=True)
            raise typer.Exit(3) from None
        _take_out(out)
        predictor.serialize(out)
    backbone, run = predictor.backbone, predictor.fit
    kind = "zero-shot" if backbone.adapter is None else "tuned"
    # The gate may have taken the adapter off; a new one of its kind has as many parameters.
    tuned = backbone.adapter or get_adapter(estimator.adapter).attach(backbone)
    _facts(
        [
            ("verdict", run.verdict or run.gate),
            *([] if predictor.calibration is None else [("calibration", predictor.calibration)]),
            ("adapter", repr(tuned)),
            ("trainable parameters", f"{tuned.num_parameters():,}"),
            ("trained", f"{run.epochs} epochs, {run.steps} steps, {run.seconds:.1f} seconds"),
            *_stopped(run),
            ("predictor", f"{out} ({kind})"),
        ]
    )


def _stopped(run: Any) -> list[tuple[str, str]]:
    """Say why a training ended before it was done, if the clock ended it."""
    after = f"after {run.epochs} epochs and {run.steps} steps"
    return [("stopped", f"{run.stopped}, {after}: the same command may end elsewhere")] if run.stopped else []


def _is_finished(
    out: Path, family: str, checkpoint: str | None, horizon: int | None, adapter: Any, calibrate: bool
) -> bool:
    """Whether a folder holds a whole predictor of these options, and no checkpoint of a training."""
    from .files import load_json, opened

    if not (out / _PREDICTOR[-1]).is_file() or (out / "training" / "last.ckpt").exists():
        return False
    try:
        record = opened(load_json(out / "predictor.json"))
        found = (record["family"], record["base"]["checkpoint"], record["prediction_length"], record["adapter"])
    except (OSError, ValueError, KeyError, TypeError):
        # Whoever opens it says more.
        return False
    same = calibrate == ("calibration" in record)
    same = same and found[0] == family and checkpoint in (None, found[1]) and horizon in (None, found[2])
    if not same or found[3] is None:
        # Zero-shot was handed over, whatever had been tuned.
        return same

    from .adapters.load import get_adapter

    wanted = get_adapter(adapter).spec
    # Where a checkpoint brings no head, one is trained along.
    return found[3] in (wanted, [*(wanted if isinstance(wanted, list) else [wanted]), "head"])


_PREDICTOR = ("adapter", "items.safetensors", "predictor.json", "gluonts-config.json")


@contextmanager
def _new_folder(out: Path, resume: bool) -> Iterator[Path]:
    """Claim a folder that is not in use; lend its subfolder for training, and leave nothing but what can be resumed.

    The checkpoint of the training goes last of all, so that a run that is killed at any moment can be resumed.
    """
    from .files import LOCK, foreign, locked

    training = out / "training"
    last = training / "last.ckpt"

    def check() -> None:
        there = foreign(training) if training.is_dir() else []
        interrupted = last.name in there or (training / "series").is_dir()
        if (out / _PREDICTOR[-1]).exists() and not (last.name in there and resume):
            raise FileExistsError(f"--out {out} already holds a predictor; name another folder")
        ours = {training.name, *(_PREDICTOR if interrupted else ())}
        others = set(foreign(out)) - ours if out.is_dir() else out.exists()
        if others or (there and not (interrupted and resume)):
            remedy = ", or go on with its interrupted run: --resume" if interrupted else ""
            raise FileExistsError(f"--out {out} is in use; name a new folder{remedy}")

    made = [place for place in (training, out, *out.parents) if not place.exists()]
    if not (training / LOCK).exists():
        # Else whoever may be running there says more than what is there.
        check()
    with _undoing([training, *made]), locked(training, "fit", out):
        claimed = False
        try:
            check()
            claimed = True
            yield training
        except BaseException as error:
            error.resumable = last.exists()  # type: ignore[attr-defined]
            if (claimed and not last.exists()) or not foreign(training):
                _remove(training)
            raise
        _remove(training, last)


@contextmanager
def _undoing(made: list[Path]) -> Iterator[None]:
    """Remove the folders that were made, the innermost first, as far as they are empty at the end."""
    try:
        yield
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def _remove(training: Path, last: Path | None = None) -> None:
    import shutil

    for path in sorted(training.iterdir(), key=lambda path: (path == last, path.name == ".lock")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _take_out(out: Path) -> None:
    """Remove the predictor that a run which was killed while it delivered it has left, to be delivered again."""
    import shutil

    for path in (out / name for name in reversed(_PREDICTOR)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _claiming(verb: Callable[..., None]) -> Callable[..., None]:
    """Refuse what another process is about to write to ``--out``, before anything is computed."""

    @functools.wraps(verb)
    def claimed(**arguments: Any) -> None:
        from .files import workshop

        out: Path | None = arguments["out"]
        if out is None or not out.absolute().parent.is_dir():
            return verb(**arguments)
        with workshop(out, "claim", verb.__name__):
            return verb(**arguments)

    return claimed


@app.command(epilog=_example("forecast recent.csv --model model --out forecasts.csv"))
@_claiming
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
    device: Device = "auto",
    unusable: Unusable = "raise",
    any_freq: AnyFreq = False,
    overwrite: Overwrite = False,
    *,
    columns: Columns,
) -> None:
    """Forecast the steps after the end of each series of DATA, with a tuned model or zero-shot."""
    _one_of("unusable", unusable, ("raise", "skip"))
    from .series.table import writable, write_forecasts

    _check_model(model, family, horizon, context)
    writable(out, overwrite)
    dataset = columns.read(data)
    predictor = _predictor(model, family, checkpoint, horizon, context, device)
    _check_samples(predictor, num_samples)
    count = 0

    def counted() -> Iterator[Any]:
        nonlocal count
        options: dict[str, Any] = dict(num_samples=num_samples, unusable=unusable, any_freq=any_freq)
        for each in predictor.predict(dataset, **options):
            count += 1
            yield each

    write_forecasts(counted(), out, overwrite=overwrite, columns=columns.names[:2])
    _say(f"{predictor.prediction_length} steps of {count} series forecast: {out}")


@app.command(epilog=_example("backtest test.csv --model model --windows 3 --out scores.csv"))
@_claiming
@reads_data
def backtest(
    data: Data,
    model: Model = None,
    family: Family = None,
    checkpoint: Checkpoint = None,
    horizon: Horizon = None,
    context: Context = None,
    windows: Annotated[int, typer.Option(help="Windows a series, the last ones.")] = 1,
    seasonality: Season = None,
    baselines: Baselines = True,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Score this as well: auto_ets or auto_theta (extra baselines).")
    ] = None,
    num_samples: Samples = None,
    device: Device = "auto",
    unusable: Unusable = "raise",
    any_freq: AnyFreq = False,
    out: Annotated[Path | None, typer.Option(help="CSV file for the scores.")] = None,
    overwrite: Overwrite = False,
    *,
    columns: Columns,
) -> None:
    """Score a model on the last windows of each series of DATA, which it must not have been trained on."""
    _one_of("unusable", unusable, ("raise", "skip"))
    if out is not None:
        if out.exists() and not overwrite:
            raise FileExistsError(f"--out {out} exists; name another file, or replace it: --overwrite")
        if not out.parent.is_dir():
            raise FileNotFoundError(f"the folder of --out {out} does not exist; make it first")
    _check_model(model, family, horizon, context)
    from .trials.spec import STATISTICAL, missing_package

    for name in baseline or ():
        _one_of("baseline", name, STATISTICAL)
        if package := missing_package(name):
            raise ImportError(f"--baseline {name} needs {package}; install gluonts-peft[baselines]")
    dataset = columns.read(data)

    import pandas as pd

    from .backtesting import SeasonalNaive
    from .backtesting import backtest_both as score
    from .files import delivering
    from .series.season import season_length
    from .trials.statistics import against_zero_shot
    from .trials.tables import INTERVAL, JUDGE, METRICS, judged

    predictor = _predictor(model, family, checkpoint, horizon, context, device)
    _check_samples(predictor, num_samples)
    season = season_length(dataset[0]["start"].freqstr) if seasonality is None else seasonality
    common: dict[str, Any] = dict(
        windows=windows,
        seasonality=season,
        unusable=unusable,
        any_freq=any_freq,
        visible_context=predictor.backbone.past_length,
    )
    adapter, own = predictor.backbone.adapter, predictor.calibration
    plain = adapter is None and own is None
    scores = {"zero-shot" if plain else "model": score(predictor, dataset, num_samples=num_samples, **common)}
    counts = next(iter(scores.values()))[0].attrs
    if baselines:
        if predictor.backbone.untrained:
            name = predictor.backbone.source.checkpoint
            _say(f"{name} brings no forecasting head: there is no zero-shot to compare with")
        elif not plain:
            if adapter is not None:
                adapter.detach()
            predictor.calibration = None
            scores["zero-shot"] = score(predictor, dataset, num_samples=num_samples, **common)
        naive = {"last value": 1}
        without, all_windows = counts["seasonless_windows"], counts["windows"]
        if without < all_windows:
            naive[f"seasonal naive ({season})"] = season
        if without:
            why = f"fewer than the {season} steps of a season before them" if season > 1 else "no season (--season)"
            there = "is the last value there" if without < all_windows else "would be the last value: it is left out"
            _say(f"{without} of {all_windows} windows have {why}: seasonal naive {there}")
        for name, steps in naive.items():
            scores[name] = score(SeasonalNaive(predictor.prediction_length, steps), dataset, **common)
    for name in dict.fromkeys(baseline or ()):
        from .trials.statistical import SIMPLER, StatisticalPredictor
        from .trials.tables import BASELINES

        fitted = StatisticalPredictor(predictor.prediction_length, name, season_length=season)
        scores[BASELINES[name]] = score(fitted, dataset, **common)
        for reason, count in fitted.simpler.items():
            _say(f"{BASELINES[name]} forecasts {count} of {counts['windows']} windows {SIMPLER[reason]}")
    frame = pd.concat([over_all for over_all, _ in scores.values()], keys=scores.keys()).droplevel(1)
    tests = against_zero_shot({name: each[METRICS[JUDGE]] for name, (_, each) in scores.items()}, JUDGE)
    rows = [(metric, *(f"{value:.4g}" for value in column)) for metric, column in frame.items()]
    if tests is not None:
        if "model" in tests.index:
            _say(f"model: {tests['sentence']['model']}")
        verdicts = [judged(row) for _, row in tests.iterrows()]
        rows = [*zip(("verdict", f"{JUDGE} change", INTERVAL), *verdicts, strict=True), *rows]
        frame = pd.concat([tests.drop(columns="sentence"), frame], axis=1)
    if out is not None:
        with delivering(out, "backtest") as part:
            frame.to_csv(part, index_label="model")
    title = f"{counts['windows']} windows of {counts['series']} series, {predictor.prediction_length} steps each"
    _table(("metric", *frame.index), rows, title, right=1)
    if "MASE[0.5]" in frame:
        _say("MASE[0.5] weighs windows by their observed labels, as gluonts.ev does")


@app.command(epilog=_example("detect ward.csv --family moment --calibration 0.25 --out anomalies"))
@_claiming
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
    _one_of("unusable", unusable, ("raise", "skip"))
    spec = _json("--threshold", threshold, '{"name": "quantile", "level": 0.999}')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} is in use; name a new folder")

    import numpy as np

    from .anomaly import METHODS, QUALITY, THRESHOLDS, check_calibration, evaluate, write_detections
    from .anomaly import detect as find

    number = None if calibration is None else _number(calibration)
    check_calibration(calibration if number is None else number)
    _one_of("method", method, ("auto", *METHODS))
    _one_of("threshold", spec if isinstance(spec, str) else str(dict(spec).get("name")), THRESHOLDS)
    # Whether the family needs a horizon is known only when it is loaded.
    by_family = model is None and method in ("auto", "reconstruction", "visible")
    _check_model(model, family, 1 if by_family and horizon is None else horizon, context)
    marked = [] if labels is None else [labels]
    dataset = columns.read(data, dtype=np.float64, also_ignore=marked)
    clean: Any = calibration
    if calibration is not None:
        clean = columns.read(Path(calibration), dtype=np.float64, ignore=True) if number is None else number
    truth = None if labels is None else columns.read(data, target=labels, ignore=True)
    if by_family and _reconstructs(family):
        if horizon is not None:
            raise ValueError(f"--horizon {horizon} has no use: method 'reconstruction' does not forecast; leave it out")
        horizon = 1
    predictor = _predictor(model, family, checkpoint, horizon, context, device)
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
    from .series.calendar import first_stamp

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
    _table(("item_id", "start", "end", "steps", "peak", "threshold"), rows, f"{len(rows)} events", right=3)
    if quality:
        _table(("item_id", *QUALITY), quality, "scores behind the calibration part", right=1)
    _say(f"scores, events and plot: {out}")


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None


def _reconstructs(family: str | None) -> bool:
    from .registry import get_estimator

    return "reconstruct" in get_estimator(family or DEFAULT_FAMILY).backbone_class.capabilities


@app.command(epilog=_example("impute ward.csv --out filled.csv"))
@_claiming
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
    _one_of("unusable", unusable, ("raise", "skip"))
    import numpy as np

    from .series.table import writable

    writable(out, overwrite)
    _one_of("unfillable", unfillable, ("raise", "keep"))
    if model is None:
        family = family or "moment"
    horizon = None if model is not None else 1
    _check_model(model, family, horizon, context)
    dataset = columns.read(data, dtype=np.float64)

    from .imputation import impute as fill
    from .imputation import write_imputed

    predictor = _predictor(model, family, checkpoint, horizon, context, device)
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
    _say(f"{int(table['imputed'].sum())} values of {len(filled)} series filled, {left} left missing: {out}")


@app.command(epilog=_example("study examples/demo.yaml --out runs/demo --jobs 2 --set prediction_length=12"))
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
        _one_of("--export", export, ("fev",))
    if dry_run:
        if ray or address is not None:
            named = "--ray" if address is None else f"--address {address}"
            raise ValueError(f"{named} does not go with --dry-run, which measures on this machine; leave one out")
        return _estimate_study(spec, out, jobs, dict(map(_override, set_ or ())))
    executor = _on_ray(out, jobs, address) if ray or address is not None else {}
    _run_study(spec, out, jobs, dict(map(_override, set_ or ())), export=export is not None, **executor)


def _estimate_study(spec: Path, out: Path, jobs: int, overrides: dict[str, Any]) -> None:
    if jobs < 1:
        raise ValueError(f"--jobs {jobs} is not positive; name the number of trials at the same time")
    from .trials import estimate, load_study

    found = estimate(load_study(spec, overrides), out)
    _table(("trial", "state"), [(trial.name(), state) for trial, state in found.cells])
    left = sum(state != "finished" for _, state in found.cells)
    _say(f"{len(found.cells)} trials, {left} of them to run")
    if left:
        _say(f"about {_duration(found.seconds / max(1, jobs))} with --jobs {jobs}; less where training stops early")
        _say(f"estimated from: {'; '.join(found.sources)}")


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} seconds" if minutes < 2 else f"{minutes:.0f} minutes" if hours < 2 else f"{hours:.1f} hours"


def _on_ray(out: Path, jobs: int, address: str | None) -> dict[str, Any]:
    if jobs != 1:
        raise ValueError(f"--jobs {jobs} does not go with --ray, which runs as many trials as there are cores")
    from .trials import on_ray
    from .trials.cluster import shared_folder

    shared_folder(out)
    return {"executor": on_ray(address)}


@app.command(epilog=_example("demo --out runs/demo --jobs 2"))
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
        raise ValueError(f"--patients {patients} says whose the stays of --data are; name that too, or leave it out")
    real = {"data.source": "hourly", "data.path": str(data), "prediction_length": 12, "context_length": 72}
    if patients is not None:
        real["data.patients"] = str(patients)
    overrides: dict[str, Any] = {} if data is None else real
    _run_study(spec, out, jobs, overrides | _installed_baselines(spec))


def _installed_baselines(spec: Path) -> dict[str, Any]:
    """Return what leaves those baselines of a study out whose package is not installed; say which these are."""
    from .trials.spec import missing_package, read_yaml

    named = read_yaml(spec, "study", "base, grid, baselines and title").get("baselines") or []
    # What is wrong with them is said by the study itself.
    lacking = [each for each in named if missing_package(each)] if isinstance(named, list) else []
    if not lacking:
        return {}
    names = [each["name"] if isinstance(each, dict) else each for each in lacking]
    _say(f"left out: {', '.join(names)}; their packages come with pip install gluonts-peft[baselines]")
    return {"baselines": [each for each in named if each not in lacking]}


def _run_study(
    spec: Path, out: Path, jobs: int, overrides: dict[str, Any], export: bool = False, **options: Any
) -> None:
    from .trials import export_fev, load_study, print_table, run_study, write_report

    results = run_study(load_study(spec, overrides), out, jobs=jobs, progress=sys.stderr.isatty(), **options)
    print_table(results, _console(), folder=out)
    _say(f"report: {write_report(out)}")
    if export and any(result.status == "finished" for result in results):
        _say(f"summary for fev: {export_fev(out, out / 'fev.csv')}")
    if failed := sum(result.status == "failed" for result in results):
        _say(f"error: {failed} of {len(results)} trials failed; run it again to try these again", stderr=True)
        raise typer.Exit(1)


@app.command(epilog=_example("search ray_configs/searches/quick.yaml --out $PWD/runs/quick --set num_samples=4"))
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
    from .trials import load_search, print_ranking
    from .trials import search as run_search
    from .trials.records import not_helped

    overrides = dict(map(_override, set_ or ()))
    wanted = load_search(spec, overrides)
    ranking = run_search(wanted, out, address=address, serial=serial, progress=sys.stderr.isatty())
    print_ranking(ranking, _console())
    _say(f"ranking: {out / 'ranking.csv'}")
    finished = ranking["status"].isin(["finished", "stopped"])
    if (ranking["status"] == "finished").any():
        _say(f"best predictor: {out / 'best'}{' (no evidence)' if not_helped(ranking) else ''}")
    if not finished.all():
        lost = len(ranking) - finished.sum()
        first = ranking["error"].dropna().head(1)
        why = f" ({first.iloc[0]})" if len(first) else ""
        message = f"error: {lost} of {len(ranking)} trials have no final score{why}; run it again to try these again"
        _say(message, stderr=True)
        raise typer.Exit(1)


@app.command(epilog=_example("show model"))
def show(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A saved predictor or adapter.")]) -> None:
    """Say what a saved predictor or adapter is."""
    predictor, adapter = "predictor.json", "gluonts_peft.json"
    file = next((folder / name for name in (predictor, adapter) if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{str(folder)!r} holds neither a predictor ({predictor}) nor an adapter ({adapter})")

    from .calibration import Calibration
    from .files import NewerFormat, load_json, opened, typed
    from .training import Fit

    try:
        record = opened(load_json(file))
        base, run = record["base"], typed(Fit, record["fit"], "fit") if record.get("fit") else None
        stored = record.get("calibration")
        calibration = [("calibration", typed(Calibration, stored, "calibration"))] if stored else []
        lengths = [(name, record[name]) for name in ("prediction_length", "context_length") if name in record]
        facts = [
            ("what", "predictor" if file.name == predictor else "adapter"),
            ("family", base["family"]),
            ("base", f"{base['checkpoint']} ({base['kind']})"),
            ("revision", base["revision"] or "-"),
            ("fingerprint", base["fingerprint"]),
            ("adapter", json.dumps(record["adapter"] or "none")),
            *lengths,
            ("verdict", (run.verdict or run.gate) if run else "-"),
            *calibration,
            *(_stopped(run) if run else []),
            ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        ]
    except NewerFormat as error:
        raise ValueError(f"{str(file)!r} was {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {type(error).__name__}: {error}") from None
    facts.append(("adapter on disk", f"{sum(path.stat().st_size for path in folder.rglob('*.safetensors')):,} bytes"))
    _facts(facts)


vitals_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(
    vitals_app,
    name="vitals",
    help="Turn a download of ICU vital signs into GluonTS data, divided by patient.",
    epilog=_example("vitals eicu --help"),
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


@vitals_app.command(epilog=_example("vitals eicu eicu-crd-2.0 --out eicu --vital hr --set windows.stride=3"))
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
    from .vitals import load_eicu

    _convert(load_eicu, folder, out, vital, steps, set_, fractions, seed, cohort=cohort, cuff=cuff, freq=freq)


@vitals_app.command(epilog=_example("vitals mimic mimiciv-3.1 --out mimic --steps plausibility,fill --fractions ''"))
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
    from .vitals import load_mimic

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

    from .vitals import convert

    options: dict[str, dict[str, Any]] = {}
    for path, value in map(_override, overrides or ()):
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
    _table(("where", "what", "count"), rows, right=2)
    counted = [(part, *(f"{count:,}" for count in found.values())) for part, found in manifest["parts"].items()]
    _table(("part", *next(iter(manifest["parts"].values()))), counted, right=1)
    total = sum(source["rows"] for source in manifest["sources"])
    _say(f"{total:,} rows in {seconds:.1f} seconds, {total / seconds:,.0f} rows a second: {out}")
