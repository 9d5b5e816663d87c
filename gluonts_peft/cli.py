"""The command line: a function a verb, which parses, calls the library and prints.

Exit codes: 0 done, 1 a defect of the program or failed trials, 2 wrong input, 3 tuning did not help (``fit --gate
raise``), 130 Ctrl-C. What takes long to import is imported inside the verbs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.console import Console

    from .predictor import PeftPredictor

__all__ = ["app", "main"]

DEFAULT_FAMILY = "chronos"
# Wide enough that no cell of a table is wrapped or cut when the output goes to a file or another program.
PIPE_WIDTH = 1000

Data = Annotated[Path, typer.Argument(metavar="DATA", help="Table (.csv, .parquet), GluonTS file or GluonTS folder.")]
Freq = Annotated[str | None, typer.Option(help="Frequency such as 5min, h or D.  [default: inferred]")]
ItemId = Annotated[str, typer.Option(help="Column with the name of the series; '' for a table of a single one.")]
Timestamp = Annotated[str, typer.Option(help="Column with the time stamps.")]
Target = Annotated[str, typer.Option(help="Column with the values.")]
Model = Annotated[Path | None, typer.Option(help="A predictor's folder; --checkpoint then is where its base lies now.")]
Family = Annotated[str | None, typer.Option(help=f"Model family.  [default: {DEFAULT_FAMILY}]")]
Checkpoint = Annotated[str | None, typer.Option(help="Bundled name, folder or hub id.  [default: the family's]")]
Horizon = Annotated[int | None, typer.Option(help="Steps to forecast, if there is no --model.")]
Context = Annotated[int | None, typer.Option(help="Steps of history to see.  [default: the checkpoint's]")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Samples = Annotated[int | None, typer.Option(help="Sample paths a series, for families that sample.")]
Jobs = Annotated[int, typer.Option(help="Trials at the same time.")]
Report = Annotated[Path, typer.Option(help="Folder for trials, table and report.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]
NewFolder = Annotated[Path, typer.Option(help="New folder for the predictor.")]
Validation = Annotated[Path | None, typer.Option(help="Data of the gate.  [default: the ends of DATA, held out]")]
AdapterSpec = Annotated[str, typer.Option(help="Name; or JSON: a mapping with options, or a list for a hybrid.")]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate.  [default: the adapter's]")]
IfWorse = Annotated[
    str, typer.Option(help="If tuning did not help: fallback (to zero-shot), raise (exit code 3), keep.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")]
Season = Annotated[int | None, typer.Option(help="Steps in a season.  [default: GluonTS's for the frequency]")]
Baselines = Annotated[bool, typer.Option(help="Score zero-shot, last value and seasonal naive as well.")]
Override = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a key; repeatable.")]


def _example(arguments: str) -> str:
    # Else the parser would wrap it, and it could not be pasted.
    return f"\b\ngluonts-peft {arguments}"


class _Group(TyperGroup):
    """Turns what a verb raises into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _one_line_warnings():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            code, line = 130, "interrupted"
        except SystemExit as error:
            # Lightning turns Ctrl-C into exit code 1.
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            code, line = 130, "interrupted"
        except Exception as error:
            # Errors of the parser, and its exits, carry their own code; a closed pipe is nobody's fault.
            if ctx.params["debug"] or hasattr(error, "exit_code") or isinstance(error, BrokenPipeError):
                raise
            if isinstance(error, ValueError | OSError | ImportError):
                code, line = 2, f"error: {error}"
            else:
                code, line = 1, f"error: {type(error).__name__}: {error} (unexpected; --debug shows where)"
        _say(line, stderr=True)
        raise typer.Exit(code)


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
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'--adapter {text!r} is not JSON: {error}; write e.g. \'{{"name": "lora", "r": 4}}\''
        ) from None


def _override(text: str) -> tuple[str, Any]:
    import yaml

    path, equals, value = text.partition("=")
    if not (path and equals):
        raise ValueError(f"--set {text!r} is not path=value; write e.g. --set context_length=72")
    try:
        return path, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text!r}: the value is not YAML: {' '.join(str(error).split())}") from None


def _predictor(
    model: Path | None,
    family: str | None,
    checkpoint: str | None,
    horizon: int | None,
    context: int | None,
    device: str,
) -> PeftPredictor:
    """Load a stored predictor, or make a zero-shot one."""
    if model is None and horizon is None:
        raise ValueError("there is nothing to forecast with; give --model FOLDER, or --horizon N for zero-shot")
    if model is not None:
        for option, value in (("--family", family), ("--horizon", horizon), ("--context", context)):
            if value is not None:
                raise ValueError(f"{option} {value} does not go with --model {model}, which has its own; leave one out")

    from .backbone import load_backbone
    from .predictor import PeftPredictor

    if model is not None:
        return PeftPredictor.deserialize(model, device=device, checkpoint=checkpoint)
    assert horizon is not None
    backbone = load_backbone(
        family or DEFAULT_FAMILY, prediction_length=horizon, checkpoint=checkpoint, context_length=context
    )
    return PeftPredictor(backbone, device=device)


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
    from .backbone import load_backbone
    from .registry import adapters as registry
    from .registry import get_adapter

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
def fit(
    data: Data,
    out: NewFolder,
    horizon: Annotated[int, typer.Option(help="Steps to forecast.")],
    family: Annotated[str, typer.Option(help="Model family.")] = DEFAULT_FAMILY,
    checkpoint: Checkpoint = None,
    adapter: AdapterSpec = "lora",
    context: Context = None,
    validation: Validation = None,
    epochs: Annotated[int, typer.Option(help="Epochs at most.")] = 10,
    batches: Annotated[int, typer.Option(help="Batches an epoch.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Windows a batch.")] = 32,
    learning_rate: Rate = None,
    seed: Annotated[int, typer.Option(help="Same seed, same machine, same numbers.")] = 0,
    gate: IfWorse = "fallback",
    device: Device = "auto",
    freq: Freq = None,
    item_id: ItemId = "item_id",
    timestamp: Timestamp = "timestamp",
    target: Target = "target",
    resume: Resume = False,
) -> None:
    """Tune a pretrained model on DATA and write a GluonTS predictor.

    While it runs, its checkpoints are in OUT/training; after an interruption repeat the command with --resume.
    """
    spec = _adapter(adapter)
    with _new_folder(out, resume) as training:
        from .data import read_dataset
        from .registry import get_adapter, get_estimator
        from .training import TuningDidNotHelp

        columns: dict[str, Any] = dict(freq=freq, item_id=item_id or None, timestamp=timestamp, target=target)
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
            seed=seed,
            device=device,
            folder=str(training),
            progress=sys.stderr.isatty(),
        )
        dataset = read_dataset(data, **columns)
        held_out = None if validation is None else read_dataset(validation, **columns)
        try:
            predictor = estimator.train(dataset, held_out, ckpt_path="last" if resume else None)
        except TuningDidNotHelp as error:
            _say(f"error: {error}", stderr=True)
            raise typer.Exit(3) from None
        predictor.serialize(out)
    backbone, run = predictor.backbone, predictor.fit
    kind = "zero-shot" if backbone.adapter is None else "tuned"
    # The gate may have taken the adapter off; a new one of its kind has as many parameters.
    tuned = backbone.adapter or get_adapter(estimator.adapter).attach(backbone)
    _facts(
        [
            ("gate", run.gate),
            ("adapter", repr(tuned)),
            ("trainable parameters", f"{tuned.num_parameters():,}"),
            ("trained", f"{run.epochs} epochs, {run.steps} steps, {run.seconds:.1f} seconds"),
            ("predictor", f"{out} ({kind})"),
        ]
    )


@contextmanager
def _new_folder(out: Path, resume: bool) -> Iterator[Path]:
    """Refuse a folder in use; lend its subfolder for training, and leave nothing there but what can be resumed."""
    import shutil

    if (out / "gluonts-config.json").exists():
        raise FileExistsError(f"--out {out} already holds a predictor; name another folder")
    training, existed = out / "training", out.exists()
    interrupted = (training / "series").is_dir()
    if existed and not (interrupted and resume) and (not out.is_dir() or any(out.iterdir())):
        remedy = ", or go on with its interrupted run: --resume" if interrupted else ""
        raise FileExistsError(f"--out {out} is in use; name a new folder{remedy}")
    try:
        yield training
    except BaseException:
        if not (training / "last.ckpt").exists():
            shutil.rmtree(training if existed else out, ignore_errors=True)
        raise
    shutil.rmtree(training, ignore_errors=True)


@app.command(epilog=_example("forecast recent.csv --model model --out forecasts.csv"))
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
    freq: Freq = None,
    item_id: ItemId = "item_id",
    timestamp: Timestamp = "timestamp",
    target: Target = "target",
    overwrite: Overwrite = False,
) -> None:
    """Forecast the steps after the end of each series of DATA, with a tuned model or zero-shot."""
    from .data import read_dataset, write_forecasts

    predictor = _predictor(model, family, checkpoint, horizon, context, device)
    dataset = read_dataset(data, freq=freq, item_id=item_id or None, timestamp=timestamp, target=target)
    write_forecasts(predictor.predict(dataset, num_samples=num_samples), out, overwrite=overwrite)
    _say(f"{predictor.prediction_length} steps of {len(dataset)} series forecast: {out}")


@app.command(epilog=_example("backtest test.csv --model model --windows 3 --out scores.csv"))
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
    num_samples: Samples = None,
    device: Device = "auto",
    freq: Freq = None,
    item_id: ItemId = "item_id",
    timestamp: Timestamp = "timestamp",
    target: Target = "target",
    out: Annotated[Path | None, typer.Option(help="CSV file for the scores.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Score a model on the last windows of each series of DATA, which it must not have been trained on."""
    if out is not None:
        if out.exists() and not overwrite:
            raise FileExistsError(f"--out {out} exists; name another file, or replace it: --overwrite")
        if not out.parent.is_dir():
            raise FileNotFoundError(f"the folder of --out {out} does not exist; make it first")

    import pandas as pd
    from gluonts.time_feature.seasonality import get_seasonality

    from .backtesting import SeasonalNaive
    from .backtesting import backtest as score
    from .data import read_dataset

    predictor = _predictor(model, family, checkpoint, horizon, context, device)
    dataset = read_dataset(data, freq=freq, item_id=item_id or None, timestamp=timestamp, target=target)
    season = seasonality or get_seasonality(dataset[0]["start"].freqstr)
    common: dict[str, Any] = dict(windows=windows, seasonality=season)
    adapter = predictor.backbone.adapter
    scores = {"zero-shot" if adapter is None else "model": score(predictor, dataset, num_samples=num_samples, **common)}
    if baselines:
        if adapter is not None:
            adapter.detach()
            scores["zero-shot"] = score(predictor, dataset, num_samples=num_samples, **common)
        for name, steps in {"last value": 1, f"seasonal naive ({season})": season}.items():
            scores[name] = score(SeasonalNaive(predictor.prediction_length, steps), dataset, **common)
    counts = next(iter(scores.values())).attrs
    frame = pd.concat(scores.values(), keys=scores.keys()).droplevel(1)
    if out is not None:
        frame.to_csv(out, index_label="model")
    title = f"{counts['windows']} windows of {counts['series']} series, {predictor.prediction_length} steps each"
    rows = [(metric, *(f"{value:.4g}" for value in column)) for metric, column in frame.items()]
    _table(("metric", *frame.index), rows, title, right=1)


@app.command(epilog=_example("study examples/demo.yaml --out runs/demo --jobs 2 --set prediction_length=12"))
def study(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="YAML file of the study.")],
    out: Report,
    jobs: Jobs = 1,
    set_: Override = None,
) -> None:
    """Run the trials of a study; a second run continues the first."""
    _run_study(spec, out, jobs, dict(map(_override, set_ or ())))


@app.command(epilog=_example("demo --out runs/demo --jobs 2"))
def demo(
    data: Annotated[Path | None, typer.Option(help="Hourly vitals (.parquet) in place of simulated ones.")] = None,
    out: Report = Path("runs/demo"),
    jobs: Jobs = 1,
    spec: Annotated[Path, typer.Option("--study", help="The study.")] = Path("examples/demo.yaml"),
) -> None:
    """Compare every adapter with zero-shot and full tuning on vital signs; run it in a checkout of the project."""
    if not spec.is_file():
        raise FileNotFoundError(f"--study {spec} does not exist; run in a checkout of the project, or name the file")
    real = {"data.source": "hourly", "data.path": str(data), "prediction_length": 12, "context_length": 72}
    _run_study(spec, out, jobs, {} if data is None else real)


def _run_study(spec: Path, out: Path, jobs: int, overrides: dict[str, Any]) -> None:
    from .trials import load_study, print_table, run_study, write_report

    results = run_study(load_study(spec, overrides), out, jobs=jobs, progress=sys.stderr.isatty())
    print_table(results, _console())
    _say(f"report: {write_report(out)}")
    if failed := sum(result.status == "failed" for result in results):
        _say(f"error: {failed} of {len(results)} trials failed; run it again to try these again", stderr=True)
        raise typer.Exit(1)


@app.command(epilog=_example("show model"))
def show(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A saved predictor or adapter.")]) -> None:
    """Say what a saved predictor or adapter is."""
    from .adapters.base import RECORD
    from .predictor import CONFIG
    from .training import Gate

    file = next((folder / name for name in (CONFIG, RECORD) if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{str(folder)!r} holds neither a predictor ({CONFIG}) nor an adapter ({RECORD})")
    try:
        record = json.loads(file.read_text())
        base, run = record["base"], record.get("fit")
        lengths = [(name, record[name]) for name in ("prediction_length", "context_length") if name in record]
        facts = [
            ("what", "predictor" if file.name == CONFIG else "adapter"),
            ("family", base["family"]),
            ("base", f"{base['checkpoint']} ({base['kind']})"),
            ("revision", base["revision"] or "-"),
            ("fingerprint", base["fingerprint"]),
            ("adapter", json.dumps(record["adapter"] or "none")),
            *lengths,
            ("gate", Gate(**run["gate"]) if run else "-"),
            ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {type(error).__name__}: {error}") from None
    facts.append(("adapter on disk", f"{sum(path.stat().st_size for path in folder.rglob('*.safetensors')):,} bytes"))
    _facts(facts)
