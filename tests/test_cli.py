"""Every verb on small real data, and the very sentence of every error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from gluonts_peft import cli, registry

VERBS = [
    "families",
    "adapters",
    "fit",
    "forecast",
    "backtest",
    "detect",
    "impute",
    "study",
    "demo",
    "search",
    "show",
    "vitals",
]
SHORT = ["--horizon", "6", "--context", "48", "--epochs", "1", "--batches", "3", "--batch-size", "4", "--device", "cpu"]
COMPLETE = {"gluonts-config.json", "predictor.json", "adapter"}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="gluonts-peft")


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return str(result.stdout)


def refused(*arguments: object) -> str:
    """The sentence of an error that is one line and has no traceback."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    line, end, rest = result.stderr.partition("\n")
    assert (end, rest) == ("\n", "")
    assert line.startswith("error: ")
    return str(line.removeprefix("error: "))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def _matplotlib_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # Without a home folder matplotlib warns when it is imported, and what is on stderr is compared here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "waves.csv"
    steps, noise = np.arange(96), np.random.default_rng(0)
    series = {name: 10 + level + 3 * np.sin(steps * np.pi / 12 + level) for level, name in enumerate("abc")}
    times = pd.date_range("2024-01-01", periods=len(steps), freq="h")
    frames = [
        pd.DataFrame({"item_id": name, "timestamp": times, "target": values + noise.normal(0, 0.3, len(steps))})
        for name, values in series.items()
    ]
    pd.concat(frames).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def fitted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A tuned predictor's folder, and what `fit` printed; kept whatever the gate says."""
    folder = tmp_path_factory.mktemp("models") / "lora"
    return folder, ok("fit", data, "--out", folder, *SHORT, "--gate", "keep", "--adapter", '{"name": "lora", "r": 4}')


@pytest.fixture(scope="module")
def model(fitted: tuple[Path, str]) -> Path:
    return fitted[0]


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_in_a_command_that_names_only_known_options(verb: str) -> None:
    help_text = ok(verb, "--help")
    example = help_text.rstrip().splitlines()[-1].strip()
    assert example.startswith(f"gluonts-peft {verb}")
    assert set(re.findall(r"--[a-z-]+", example)) <= set(re.findall(r"--[a-z-]+", help_text.replace(example, "")))


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom gluonts_peft.cli import app\n"
        "try: app(['--help'], prog_name='gluonts-peft')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'gluonts', 'pandas', 'numpy', 'ray', 'gluonts_peft_chronos'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.findall(r"^  ([a-z]+)  ", done.stdout, re.MULTILINE) == VERBS
    assert done.stdout.rstrip().splitlines()[-1].strip().startswith("gluonts-peft fit ")


def test_version() -> None:
    from gluonts_peft import __version__

    assert ok("--version") == f"gluonts-peft {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fit", "x.csv", "--horizn", "3"], "No such option: --horizn"),
        (["backtest", "x.csv", "--window", "3"], "No such option: --window"),
        (["forecat"], "No such command 'forecat'. Did you mean 'forecast'?"),
        (["show"], "Missing argument 'FOLDER'."),
    ],
)
def test_a_wrong_name_on_the_command_line_exits_2(arguments: list[str], sentence: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_families_lists_the_plug_in() -> None:
    header, *rows = [line for line in ok("families").splitlines() if line[:1] in "┃│"]
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == [
        "family",
        "distribution",
        "version",
        "bundled checkpoints",
        "capabilities",
    ]
    found = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    assert [cells[0] for cells in found] == registry.families.names()
    [cells] = [cells for cells in found if cells[0] == "chronos"]
    assert cells[1] == "gluonts-peft-chronos"
    assert cells[3] == "bolt-nano, chronos2-nano, t5-nano"


def test_a_plug_in_that_does_not_load_is_listed_with_its_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = dict(registry.families._entry_points())
    points["broken"] = EntryPoint("broken", "no_such_plug_in:Estimator", registry.families.group)
    monkeypatch.setattr(registry.families, "_entry_points", lambda: points)
    monkeypatch.setattr(registry.families, "_loaded", {})
    output = ok("families")
    assert "bolt-nano, chronos2-nano, t5-nano" in output
    sentence = (
        "family 'broken' of unknown unknown cannot be loaded from 'no_such_plug_in:Estimator':"
        " ModuleNotFoundError: No module named 'no_such_plug_in'"
    )
    assert f"error: {sentence}" in output
    assert refused("forecast", data, "--family", "broken", "--horizon", "3", "--out", "y.csv") == sentence


def test_adapters_tells_where_they_go_and_counts_parameters() -> None:
    plain, counted = ok("adapters"), ok("adapters", "--checkpoint", "bolt-nano")
    assert "parameters" not in plain
    assert re.search(r"│ lora +│ gluonts-peft \S+ │ 0.002 +│ q k v o +│$", plain, re.MULTILINE)
    assert re.search(r"│ full +│ gluonts-peft \S+ │ 0.0001 +│ everything │$", plain, re.MULTILINE)
    rows = {cells[1].strip(): cells[-2].strip() for line in counted.splitlines() if len(cells := line.split("│")) > 5}
    assert list(rows) == registry.list_adapters()

    from gluonts_peft import get_adapter, load_backbone

    backbone = load_backbone("chronos", prediction_length=6, checkpoint="bolt-nano")
    for name in ("none", "bitfit", "lora", "full"):
        adapter = get_adapter(name).attach(backbone)
        assert rows[name] == f"{adapter.num_parameters():,}"
        adapter.detach()


def test_an_adapter_that_does_not_load_is_listed_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    points = dict(registry.adapters._entry_points())
    points["broken"] = EntryPoint("broken", "gluonts_peft.registry:no_such_name", registry.adapters.group)
    monkeypatch.setattr(registry.adapters, "_entry_points", lambda: points)
    monkeypatch.setattr(registry.adapters, "_loaded", {})
    output = ok("adapters")
    assert (
        "error: adapter 'broken' of unknown unknown cannot be loaded from 'gluonts_peft.registry:no_such_nam" in output
    )
    assert "│ lora " in output


def test_fit_prints_what_came_out_and_leaves_only_the_predictor(fitted: tuple[Path, str]) -> None:
    folder, output = fitted
    assert re.fullmatch(
        r"verdict: +(proven|better, not proven|no evidence): .*3 series.*\n"
        r"adapter: +lora\(r=4\)\n"
        r"trainable parameters: +17,920\n"
        r"trained: +1 epochs, 3 steps, \d+\.\d seconds\n"
        rf"predictor: +{re.escape(str(folder))} \(tuned\)\n",
        output,
    )
    # In the words of `show`.
    assert output.splitlines()[0] in ok("show", folder).splitlines()
    assert names(folder) == COMPLETE


def test_fit_reads_named_columns_and_a_validation_file(data: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.csv"
    pd.read_csv(data).rename(columns={"item_id": "who", "timestamp": "when", "target": "HR"}).to_csv(
        renamed, index=False
    )
    columns = ["--item-id", "who", "--timestamp", "when", "--target", "HR", "--freq", "h"]
    hybrid = ["--adapter", '["layernorm", {"name": "lora", "r": 1}]', "--gate", "keep"]
    other = tmp_path / "other.csv"
    pd.read_csv(renamed).assign(HR=lambda table: table["HR"] + 1).to_csv(other, index=False)
    output = ok("fit", renamed, "--out", tmp_path / "model", "--validation", other, *columns, *hybrid, *SHORT)
    assert "layernorm + lora(r=1)" in output
    assert names(tmp_path / "model") == COMPLETE
    forecasts = tmp_path / "forecasts.parquet"
    assert refused("forecast", renamed, "--model", tmp_path / "model", "--out", forecasts).startswith(
        "item_id 'item_id'"
    )
    assert run("forecast", renamed, "--model", tmp_path / "model", "--out", forecasts, *columns).exit_code == 0
    assert len(pd.read_parquet(forecasts)) == 18


def test_a_table_of_a_single_series_needs_no_column_with_names(data: Path, tmp_path: Path) -> None:
    single = tmp_path / "ward.csv"
    pd.read_csv(data).query("item_id == 'a'").drop(columns="item_id").to_csv(single, index=False)
    run("forecast", single, "--item-id", "", "--horizon", "3", "--out", tmp_path / "out.csv")
    assert set(pd.read_csv(tmp_path / "out.csv")["item_id"]) == {"ward"}


def test_tuning_that_did_not_help(data: Path, tmp_path: Path) -> None:
    harmful = ["fit", data, *SHORT, "--learning-rate", "3"]

    result = run(*harmful, "--out", tmp_path / "fallback")
    assert result.exit_code == 0
    [line] = result.stderr.splitlines()
    pattern = r"adapter lora on 'bolt-nano': no evidence: .*3 series.*"
    assert re.fullmatch(
        rf"warning: {pattern}; the zero-shot predictor is returned \(gate='keep' keeps the tuned\)", line
    )
    assert "trainable parameters: 8,960\n" in result.stdout
    assert result.stdout.endswith(f"{tmp_path / 'fallback'} (zero-shot)\n")
    assert names(tmp_path / "fallback") == COMPLETE - {"adapter"}

    out = tmp_path / "strict"
    result = run(*harmful, "--out", out, "--gate", "raise")
    assert (result.exit_code, result.stdout) == (3, "")
    assert re.fullmatch(rf"error: {pattern}\n", result.stderr)
    assert names(out) == {"training"}

    # The training is not lost: who wants the tuned model all the same need not repeat it.
    assert f"{out} (tuned)" in ok(*harmful, "--out", out, "--gate", "keep", "--resume")
    assert names(out) == COMPLETE


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--adapter", "lorra"], "adapter 'lorra' is unknown; did you mean 'lora'? known: adalora, bitfit,"),
        (["--adapter", '{"name": "lora", "rr": 2}'], "adapter 'lora': option 'rr' is unknown;"),
        (["--adapter", '{"r": 2}'], "adapter {'r': 2} has no 'name'; write e.g. {'name': 'lora', 'r': 2}"),
        (
            ["--adapter", '{"name": "lora"'],
            "--adapter '{\"name\": \"lora\"' is not JSON: Expecting ',' delimiter: line 1 column 16 (char 15);"
            ' write e.g. \'{"name": "lora", "r": 4}\'',
        ),
        (
            ["--adapter", "[lora]"],
            "--adapter '[lora]' is not JSON: Expecting value: line 1 column 2 (char 1);"
            ' write e.g. \'{"name": "lora", "r": 4}\'',
        ),
        (
            ["--adapter", '["lora"]'],
            "a hybrid needs at least two adapters, got ['lora']; name a single adapter by itself",
        ),
        (["--family", "cronos"], "family 'cronos' is unknown; did you mean 'chronos'? known: "),
        (
            ["--checkpoint", "bolt"],
            "checkpoint 'bolt' is neither a bundled name (bolt-nano, chronos2-nano, t5-nano), nor an existing",
        ),
        (["--horizon", "-3"], "prediction_length -3 is not positive; name the steps to forecast"),
        (["--horizon", "50"], "no series is left, skipped 3 of 3 series: 3 too short;"),
        (["--context", "9999"], "context_length 9999 exceeds the 504 steps that checkpoint 'bolt-nano' can see"),
        (["--epochs", "0"], "max_epochs 0 is not positive"),
        (["--gate", "kep"], "gate 'kep' is unknown; did you mean 'keep'? known: fallback, keep, raise"),
        (["--device", "tpu9"], "device 'tpu9' is unknown; name 'auto', 'cpu', 'cuda' or 'cuda:1'"),
        (
            ["--target", "tgt"],
            "target 'tgt' is not a column of '{data}'; did you mean 'target'? columns: item_id, times",
        ),
        (["--freq", "xy"], "freq 'xy' is not a frequency of periods; give one like 5min, h, D, W, M, Q or Y"),
        (
            ["--validation", "gone.csv"],
            "path 'gone.csv' does not exist; give a table (.csv, .csv.gz, .parquet) or a Gluon",
        ),
    ],
)
def test_wrong_input_to_fit_is_one_sentence_and_leaves_nothing(
    options: list[str], sentence: str, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    assert refused("fit", data, "--out", out, *SHORT, *options).startswith(sentence.replace("{data}", str(data)))
    assert not out.exists()


def test_fit_refuses_a_folder_in_use_before_training(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gluonts_peft import PeftEstimator

    monkeypatch.setattr(PeftEstimator, "train", lambda *_, **__: pytest.fail("trained"))
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    for more in ([], ["--resume", "--adapter", "vera"], ["--resume", "--checkpoint", "t5-nano"]):
        sentence = f"--out {model} already holds a predictor; name another folder"
        assert refused("fit", data, "--out", model, *SHORT, *more) == sentence
    # A scheduler repeats the command though the run had ended.
    output = ok("fit", data, "--out", model, *SHORT, "--resume", "--adapter", '{"name": "lora", "r": 4}')
    assert output.strip() == f"--out {model} holds the finished predictor of this run: there is nothing to go on with"
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before

    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "training" / "notes.txt"):
        for resume in ([], ["--resume"]):
            sentence = f"--out {out} is in use; name a new folder"
            assert refused("fit", data, "--out", out, *SHORT, *resume) == sentence
    assert names(tmp_path / "training") == {"notes.txt"}


def test_a_failed_fit_leaves_an_empty_folder_empty(data: Path, tmp_path: Path) -> None:
    refused("fit", data, "--out", tmp_path, *SHORT, "--horizon", "50")
    assert names(tmp_path) == set()


LONGER = [
    "--horizon",
    "6",
    "--context",
    "48",
    "--epochs",
    "12",
    "--batches",
    "4",
    "--batch-size",
    "4",
    "--gate",
    "keep",
]


def trained(output: str) -> str:
    return next(line.rpartition(",")[0] for line in output.splitlines() if line.startswith("trained:"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "model"
    output = ok("fit", data, "--out", folder, *LONGER, "--device", "cpu")
    return trained(output), (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_killed_fit_resumes_to_the_same_weights(data: Path, tmp_path: Path, undisturbed: tuple[str, bytes]) -> None:
    out = tmp_path / "model"
    command = ["fit", data, "--out", out, *LONGER, "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", "from gluonts_peft.cli import main; main()", *map(str, command)])
    try:
        while not (out / "training" / "last.ckpt").exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert names(out) == {"training"}

    sentence = f"--out {out} is in use; name a new folder, or go on with its interrupted run: --resume"
    assert refused(*command) == sentence
    other = refused(*command, "--resume", "--seed", "7")
    assert other.startswith(f"checkpoint '{out / 'training' / 'last.ckpt'}' belongs to another run: ")
    assert other.endswith("(seed: 0 there, 7 here)")
    output = ok(*command, "--resume")
    assert names(out) == COMPLETE
    assert (trained(output), (out / "adapter" / "adapter_model.safetensors").read_bytes()) == undisturbed


@pytest.fixture
def _sigint_handler() -> Iterator[None]:
    # Lightning switches Ctrl-C off on its way out.
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_sigint_handler")
def test_ctrl_c_during_training_exits_130_and_can_be_resumed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gluonts_peft import training

    def press(module: Any, *_: Any) -> None:
        if module.global_step == 5:
            raise KeyboardInterrupt

    command = ["fit", data, "--out", tmp_path / "model", *LONGER, "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(training._Module, "on_train_batch_end", press)
        result = run(*command)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "interrupted"
    ok(*command, "--resume")


def test_ctrl_c_elsewhere_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def press() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry.families, "describe", press)
    result = run("families")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_a_defect_is_told_from_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("[red]no markup[/red]")

    monkeypatch.setattr(registry.families, "describe", fail)
    result = run("families")
    line = "error: RuntimeError: [red]no markup[/red] (unexpected; --debug shows where)\n"
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", line)
    assert isinstance(run("--debug", "families").exception, RuntimeError)


def test_debug_shows_the_traceback_of_wrong_input() -> None:
    command = [
        sys.executable,
        "-c",
        "from gluonts_peft.cli import main; main()",
        "--debug",
        "demo",
        "--study",
        "gone.yaml",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.splitlines()[-1].startswith("FileNotFoundError: --study gone.yaml does not exist;")


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_forecast_writes_what_the_predictor_says(ending: str, data: Path, model: Path, tmp_path: Path) -> None:
    from gluonts.model import Predictor

    from gluonts_peft.series.table import read_dataset

    out = tmp_path / f"forecasts{ending}"
    command = ["forecast", data, "--model", model, "--out", out, "--device", "cpu"]
    result = run(*command)
    assert (result.exit_code, result.stdout) == (0, f"6 steps of 3 series forecast: {out}\n")
    assert all(line.startswith("warning: The mean prediction is not stored") for line in result.stderr.splitlines())
    table = pd.read_csv(out) if ending == ".csv" else pd.read_parquet(out)
    expected = Predictor.deserialize(model).predict(read_dataset(data))
    for (name, rows), forecast in zip(table.groupby("item_id"), expected, strict=True):
        assert name == forecast.item_id
        np.testing.assert_allclose(rows["0.9"], forecast.quantile(0.9), rtol=1e-5)

    sentence = f"path '{out}' exists; give another one, or overwrite=True (command line: --overwrite)"
    assert refused(*command) == sentence
    assert run(*command, "--overwrite").exit_code == 0


def test_forecast_without_a_trained_predictor(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "zero-shot.csv"
    assert "3 steps of 3 series" in ok(
        "forecast", data, "--checkpoint", "t5-nano", "--horizon", "3", "--num-samples", "4", "--out", out
    )
    assert len(pd.read_csv(out)) == 9


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "there is nothing to forecast with; give --model FOLDER, or --horizon N for zero-shot"),
        (
            ["--model", "m", "--horizon", "3"],
            "--horizon 3 does not go with --model m, which has its own; leave one out",
        ),
        (["--model", "m", "--family", "f"], "--family f does not go with --model m, which has its own; leave one out"),
        (["--model", "gone"], "folder 'gone' holds no predictor: it has no predictor.json"),
        (["--horizon", "0"], "prediction_length 0 is not positive; name the steps to forecast"),
    ],
)
@pytest.mark.parametrize("verb", ["forecast", "backtest"])
def test_what_to_forecast_with_must_be_clear(verb: str, options: list[str], sentence: str, tmp_path: Path) -> None:
    assert refused(verb, "x.csv", "--out", tmp_path / "out.csv", *options) == sentence


def test_a_predictor_refuses_other_base_weights(data: Path, model: Path, tmp_path: Path) -> None:
    sentence = refused("forecast", data, "--model", model, "--checkpoint", "t5-nano", "--out", tmp_path / "out.csv")
    assert re.fullmatch(
        rf"predictor in '{re.escape(str(model))}' rests on base weights with fingerprint \w{{12}}…, but 't5-nano' has"
        r" \w{12}…; name the right weights with checkpoint=\.\.\.",
        sentence,
    )


def test_backtest_puts_zero_shot_and_naive_beside_the_model(data: Path, model: Path, tmp_path: Path) -> None:
    from gluonts_peft import PeftPredictor
    from gluonts_peft import backtest as score
    from gluonts_peft.series.table import read_dataset

    out = tmp_path / "scores.csv"
    command = ["backtest", data, "--model", model, "--windows", "2", "--out", out, "--device", "cpu"]
    output = ok(*command)
    said, title, *_ = output.splitlines()
    assert re.fullmatch(
        r"model: (better, not proven|no evidence), MAE [+-][\d.]+ % against zero-shot \(3 series, too few for a proof:"
        r" it takes 6\)",
        said,
    )
    assert title.startswith("6 windows of 3 series, 6 steps each")
    header = next(line for line in output.splitlines() if "metric" in line)
    titles = [cell.strip() for cell in header.strip("┃").split("┃")]
    assert titles == ["metric", "model", "zero-shot", "last value", "seasonal naive (24)"]
    frame = pd.read_csv(out, index_col="model")
    assert list(frame.index) == titles[1:]
    verdicts = ["verdict", "change %", "low %", "high %", "units"]
    assert list(frame.columns[:5]) == verdicts
    first = [
        cells[0] for line in output.splitlines() if len(cells := [c.strip() for c in line.strip("│").split("│")]) > 1
    ]
    assert first[:4] == ["verdict", "MAE change", "90 % interval", str(frame.columns[5])]
    word, change = frame.loc["model", ["verdict", "change %"]]
    assert said.startswith(f"model: {word}, MAE {change:+.2f} % ")
    frame = frame.drop(columns=verdicts)
    for metric, value in frame.loc["model"].items():
        assert re.search(rf"│ {re.escape(str(metric))} +│ +{re.escape(f'{value:.4g}')} │", output)

    predictor, dataset = PeftPredictor.deserialize(model), read_dataset(data)
    adapter = predictor.backbone.adapter
    assert adapter is not None
    pd.testing.assert_series_equal(
        frame.loc["model"], score(predictor, dataset, windows=2).iloc[0], check_names=False, rtol=1e-4
    )
    adapter.detach()
    pd.testing.assert_series_equal(
        frame.loc["zero-shot"], score(predictor, dataset, windows=2).iloc[0], check_names=False, rtol=1e-4
    )

    assert refused(*command) == f"--out {out} exists; name another file, or replace it: --overwrite"
    ok(*command, "--overwrite", "--no-baselines", "--seasonality", "12")
    assert list(pd.read_csv(out)["model"]) == ["model"]


def test_backtest_scores_statistical_baselines_where_they_are_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("statsforecast", reason="the extra gluonts-peft[baselines] is not installed")
    path, out = tmp_path / "data.csv", tmp_path / "scores.csv"
    stamps = pd.date_range("2024-01-01", periods=40, freq="h").astype(str)
    values = 50 + np.random.default_rng(0).normal(size=40).cumsum()
    pd.DataFrame({"item_id": "a", "timestamp": stamps, "target": values}).to_csv(path, index=False)
    command = ("backtest", path, "--family", "chronos", "--horizon", "6", "--out", out, "--no-baselines")
    result = ok(*command, "--baseline", "auto_theta", "--baseline", "auto_theta")
    assert "AutoTheta forecasts 1 of 1 windows without a season" in result
    frame = pd.read_csv(out)
    assert list(frame["model"]) == ["zero-shot", "AutoTheta"]
    assert frame["MAE[0.5]"].notna().all()
    assert refused(*command, "--overwrite", "--baseline", "lightgbm").startswith("baseline 'lightgbm' is unknown; ")
    monkeypatch.setitem(sys.modules, "statsforecast", None)
    sentence = "--baseline auto_ets needs statsforecast; install gluonts-peft[baselines]"
    assert refused(*command, "--overwrite", "--baseline", "auto_ets") == sentence


@pytest.mark.parametrize(
    ("freq", "steps", "shown", "said"),
    [
        ("D", 40, "seasonal naive (7)", None),
        ("D", 15, "seasonal naive (7)", "1 of 2 windows have fewer than the 7 steps of a season before them: seasonal"),
        ("D", 11, None, "2 of 2 windows have fewer than the 7 steps of a season before them: seasonal naive would be"),
        ("YS", 40, None, "2 of 2 windows have no season (--season): seasonal naive would be the last value"),
    ],
)
def test_backtest_shows_a_seasonal_naive_only_where_there_is_a_season(
    freq: str, steps: int, shown: str | None, said: str | None, tmp_path: Path
) -> None:
    stamps = pd.date_range("1960-01-01", periods=steps, freq=freq)
    pd.DataFrame({"item_id": "a", "timestamp": stamps, "target": np.arange(steps) % 5.0}).to_csv(
        tmp_path / "data.csv", index=False
    )
    output = ok("backtest", tmp_path / "data.csv", "--horizon", "5", "--windows", "2")
    header = next(line for line in output.splitlines() if "metric" in line)
    titles = [cell.strip() for cell in header.strip("┃").split("┃")]
    assert titles == ["metric", "zero-shot", "last value", *([shown] if shown else [])]
    assert (said or "") in output
    assert (said is None) == ("windows have" not in output)


def test_backtest_of_a_checkpoint_without_a_head_leaves_zero_shot_out(data: Path, tmp_path: Path) -> None:
    ok("fit", data, "--family", "moment", "--adapter", "head", *SHORT, "--out", tmp_path / "model")
    output = ok("backtest", data, "--model", tmp_path / "model")
    assert output.startswith("moment-nano brings no forecasting head: there is no zero-shot to compare with\n")
    header = next(line for line in output.splitlines() if "metric" in line)
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == [
        "metric",
        "model",
        "last value",
        "seasonal naive (24)",
    ]


def test_labels_in_the_calibration_part_or_in_a_gap_are_nothing_to_measure_by(ward: Path, tmp_path: Path) -> None:
    table = pd.read_csv(ward)
    steps = table.groupby("item_id").cumcount()
    # Of a, one in the calibration part; of b, one where nothing was observed.
    table["strange"] = ((table["item_id"] == "a") & (steps == 10) | (table["item_id"] == "b") & (steps == 500)).astype(
        int
    )
    path = tmp_path / "labelled.csv"
    table.to_csv(path, index=False)
    common = ["--family", "moment", "--calibration", "0.5", "--labels", "strange"]
    quality = [row for row in cells(ok("detect", path, *common, "--out", tmp_path / "out")) if len(row) == 5]
    assert quality == [["a", "-", "-", "-", "-"], ["b", "-", "-", "-", "-"]]
    assert names(tmp_path / "out") == {"scores.csv", "events.csv", "plot.png"}


def test_backtest_of_zero_shot_needs_no_model(data: Path, tmp_path: Path) -> None:
    output = ok("backtest", data, "--horizon", "6", "--family", "chronos", "--seasonality", "12")
    header = next(line for line in output.splitlines() if "metric" in line)
    titles = [cell.strip() for cell in header.strip("┃").split("┃")]
    assert titles == ["metric", "zero-shot", "last value", "seasonal naive (12)"]
    sentence = f"the folder of --out {tmp_path / 'gone' / 'x.csv'} does not exist; make it first"
    assert refused("backtest", data, "--horizon", "6", "--out", tmp_path / "gone" / "x.csv") == sentence
    assert refused("backtest", data, "--horizon", "6", "--windows", "0") == (
        "windows is 0; expected a whole number, 1 or more"
    )


@pytest.mark.parametrize(
    ("command", "verb", "kept"),
    [
        (["fit", "--horizon", "6", "--epochs", "1", "--batches", "2", "--gate", "keep"], "trained on", None),
        (["forecast", "--horizon", "6"], "forecast", "forecasts"),
        (["backtest", "--horizon", "6", "--no-baselines"], "scored", None),
        (["detect", "--calibration", "60", "--family", "moment"], "scored", "scores"),
        (["impute"], "imputed", "filled"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_one_policy_for_a_series_without_values_in_every_verb(
    command: list[str], verb: str, kept: str | None, data: Path, tmp_path: Path
) -> None:
    table = pd.read_csv(data)
    path = tmp_path / "data.csv"
    pd.concat([table, table[table["item_id"] == "a"].assign(item_id="none", target=np.nan)]).to_csv(path, index=False)
    out = {"fit": "model", "forecast": "out.csv", "detect": "found", "impute": "out.csv", "backtest": "out.csv"}
    where = tmp_path / out[command[0]]
    arguments = [command[0], path, *command[1:], "--out", where]
    sentence = refused(*arguments)
    assert sentence.startswith(f"1 of 4 series cannot be {verb}: item_id 'none' (no observed value")
    assert sentence.endswith("go on without them: unusable='skip' (command line: --unusable skip)")
    assert not where.exists()
    result = run(*arguments, "--unusable", "skip")
    assert result.exit_code == 0, result.stderr
    [line] = [line for line in result.stderr.splitlines() if "left out" in line]
    assert line.startswith(f"warning: 1 of 4 series are left out, they cannot be {verb}: item_id 'none' (no observed")
    if kept is not None:
        written = where / "scores.csv" if where.is_dir() else where
        assert set(pd.read_csv(written)["item_id"]) == {"a", "b", "c"}
    assert "'ignore' is unknown" in refused(*arguments, "--unusable", "ignore")


def test_a_model_of_another_frequency_takes_insisting(data: Path, model: Path, tmp_path: Path) -> None:
    table = pd.read_csv(data)
    stamps = pd.date_range("2024-01-01", periods=len(table[table["item_id"] == "a"]), freq="D")
    table["timestamp"] = np.tile(stamps.strftime("%Y-%m-%d"), table["item_id"].nunique())[: len(table)]
    path = tmp_path / "daily.csv"
    table[table["item_id"] == "a"].to_csv(path, index=False)
    for command in (["forecast", path, "--out", tmp_path / "out.csv"], ["backtest", path, "--no-baselines"]):
        assert refused(*command, "--model", model) == (
            "item_id 'a' has the frequency 'D', and the model was tuned on data of 'h'; give data of that frequency, or"
            " take it all the same: any_freq=True (command line: --any-freq)"
        )
        ok(*command, "--model", model, "--any-freq")


def test_options_without_use_are_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    for command in (["forecast", data, "--out", out], ["backtest", data]):
        assert refused(*command, "--horizon", "3", "--num-samples", "5") == (
            "--num-samples 5 has no effect: the model forecasts quantiles; leave it out"
        )
    command = ["detect", data, "--family", "moment", "--calibration", "0.5", "--out", tmp_path / "found"]
    assert refused(*command, "--horizon", "8") == (
        "--horizon 8 has no effect: method 'reconstruction' does not forecast; leave it out"
    )


def test_series_that_cannot_be_scored_are_an_error_or_a_warning_of_one_line(data: Path, tmp_path: Path) -> None:
    table = pd.read_csv(data)
    path = tmp_path / "short.csv"
    pd.concat([table, table[table["item_id"] == "a"].head(4).assign(item_id="short")]).to_csv(path, index=False)
    assert refused("backtest", path, "--horizon", "6") == (
        "1 of 4 series cannot be scored: item_id 'short' (no observed value before its last 6 steps); leave them out,"
        " or go on without them: unusable='skip' (command line: --unusable skip)"
    )
    result = run("backtest", path, "--horizon", "6", "--no-baselines", "--unusable", "skip")
    assert result.exit_code == 0
    assert result.stderr == (
        "warning: 1 of 4 series are left out, they cannot be scored: item_id 'short' (no observed value before its last"
        " 6 steps)\n"
    )


def test_show_says_what_a_folder_holds(model: Path) -> None:
    predictor, adapter = ok("show", model), ok("show", model / "adapter")
    for text, kind in ((predictor, "predictor"), (adapter, "adapter")):
        facts = dict(re.split(r": +", line, maxsplit=1) for line in text.splitlines())
        assert facts["what"] == kind
        assert (facts["family"], facts["base"]) == ("chronos", "bolt-nano (bundled)")
        assert len(facts["fingerprint"]) == 64
        assert json.loads(facts["adapter"]) == {"name": "lora", "r": 4}
        size = os.path.getsize(model / "adapter" / "adapter_model.safetensors")
        assert facts["adapter on disk"] == f"{size:,} bytes"
        assert "torch 2" in facts["versions"]
    assert re.search(r"^verdict: +(proven|better, not proven|no evidence): .*3 series", predictor, re.MULTILINE)
    assert re.search(r"^prediction_length: +6$", predictor, re.MULTILINE)
    assert "prediction_length" not in adapter


def test_show_refuses_what_is_not_ours(tmp_path: Path) -> None:
    sentence = "holds neither a predictor (predictor.json) nor an adapter (gluonts_peft.json)"
    assert refused("show", tmp_path) == f"'{tmp_path}' {sentence}"
    assert refused("show", tmp_path / "gone") == f"'{tmp_path / 'gone'}' {sentence}"
    file = tmp_path / "predictor.json"
    for content, reason in (("{", "JSONDecodeError: Expecting property name"), ("{}", "KeyError: 'base'")):
        file.write_text(content)
        assert refused("show", tmp_path).startswith(f"'{file}' is damaged: {reason}")


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for the trials, which have tests of their own; keeps what they are called with."""
    import gluonts_peft.trials as module

    calls: list[Any] = []

    def load_study(path: Path, overrides: dict[str, Any]) -> str:
        calls.append((path, overrides))
        return "the study"

    def run_study(study: str, folder: Path, *, jobs: int, progress: bool) -> list[Any]:
        calls.append((study, folder, jobs))
        return []

    functions = {
        "load_study": load_study,
        "run_study": run_study,
        "print_table": lambda results, console, folder: console.print("the table"),
        "write_report": lambda folder: folder / "report.html",
    }
    for name, function in functions.items():
        monkeypatch.setattr(module, name, function, raising=False)
    return calls


def test_study_hands_over_its_overrides(trials: list[Any]) -> None:
    sets = ["--set", "context_length=72", "--set", "data.path=a=b.csv", "--set", "adapters=[lora, {name: dora, r: 1}]"]
    output = ok("study", "spec.yaml", "--out", "runs/x", "--jobs", "2", *sets)
    overrides = {"context_length": 72, "data.path": "a=b.csv", "adapters": ["lora", {"name": "dora", "r": 1}]}
    assert trials == [(Path("spec.yaml"), overrides), ("the study", Path("runs/x"), 2)]
    assert output == f"the table\nreport: {Path('runs/x/report.html')}\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("context_length", "--set 'context_length' is not path=value; write e.g. --set context_length=72"),
        ("=72", "--set '=72' is not path=value; write e.g. --set context_length=72"),
        ("seed=[1", "--set 'seed=[1': the value is not YAML: while parsing a flow sequence"),
    ],
)
def test_an_override_that_cannot_be_read_is_refused(text: str, sentence: str) -> None:
    assert refused("study", "spec.yaml", "--out", "x", "--set", text).startswith(sentence)


@pytest.mark.usefixtures("trials")
def test_demo_needs_its_study() -> None:
    sentence = "--study gone.yaml does not exist; run in a checkout of the project, or name the file"
    assert refused("demo", "--study", "gone.yaml") == sentence


def test_demo_takes_real_data(trials: list[Any], tmp_path: Path) -> None:
    spec = tmp_path / "demo.yaml"
    spec.write_text("base: {}")
    ok("demo", "--study", spec)
    ok("demo", "--study", spec, "--data", "hourly.parquet", "--out", tmp_path)
    real = {"data.source": "hourly", "data.path": "hourly.parquet", "prediction_length": 12, "context_length": 72}
    assert trials == [
        (spec, {}),
        ("the study", Path("runs/demo"), 1),
        (spec, real),
        ("the study", tmp_path, 1),
    ]


def test_demo_leaves_out_what_is_not_installed_and_says_so(
    trials: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = tmp_path / "demo.yaml"
    spec.write_text("base: {}\nbaselines: [last_value, auto_ets, {name: lightgbm, num_leaves: 7}]")
    for package in ("statsforecast", "lightgbm"):
        monkeypatch.setitem(sys.modules, package, None)
    result = ok("demo", "--study", spec)
    assert trials[0] == (spec, {"baselines": ["last_value"]})
    said = "left out: auto_ets, lightgbm; their packages come with pip install gluonts-peft[baselines]"
    assert said in result


SPEC = """
base:
  family: chronos
  checkpoint: bolt-nano
  adapter: lora
  prediction_length: 6
  context_length: 24
  training: {max_epochs: 1, num_batches_per_epoch: 2, batch_size: 4, device: cpu}
  data: {source: simulated, patients: 10, hours: 10, windows: 1}
baselines: [last_value]
grid:
  data.vital: [hr]
"""


def test_a_study_runs_and_a_second_run_continues(tmp_path: Path) -> None:
    spec, out = tmp_path / "spec.yaml", tmp_path / "out"
    spec.write_text(SPEC)
    first = ok("study", spec, "--out", out)
    assert first.endswith(f"report: {out / 'report.html'}\n")
    results = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(results) == 2
    assert ok("study", spec, "--out", out) == first
    assert ok("study", spec, "--out", out, "--export", "fev") == f"{first}summary for fev: {out / 'fev.csv'}\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == results
    assert list(pd.read_csv(out / "fev.csv")["model_name"]) == ["last value", "lora"]
    assert refused("study", spec, "--out", out, "--export", "fevv") == (
        "--export 'fevv' is unknown; did you mean 'fev'? known: fev"
    )

    sentence = refused("study", spec, "--out", out, "--set", "prediction_length=7")
    assert sentence.startswith(f"folder '{out}' holds another study: of its trials 2 only there ")
    assert refused("study", spec, "--out", out, "--set", "training.epochs=7").startswith(
        f"study '{spec}' cannot be used: "
    )


def test_a_dry_run_shows_the_trials_and_runs_none(tmp_path: Path) -> None:
    spec, out = tmp_path / "spec.yaml", tmp_path / "out"
    spec.write_text(SPEC)
    shown = ok("study", spec, "--out", out, "--dry-run", "--jobs", "2")
    assert not out.exists()
    assert "last_value hr" in shown
    assert "bolt-nano lora hr seed 0" in shown
    assert "2 trials, 2 of them to run\nabout " in shown
    assert " seconds with --jobs 2; " in shown
    measured = "last_value hr measured with 0 steps; bolt-nano lora hr seed 0 measured with 2 steps"
    assert f"estimated from: {measured}" in shown
    ok("study", spec, "--out", out)
    again = ok("study", spec, "--out", out, "--dry-run")
    assert again.endswith("2 trials, 0 of them to run\n")
    for arguments, message in [
        (("--ray",), "--ray does not go with --dry-run, which measures on this machine; leave one out"),
        (("--address", "1.2.3.4:5"), "--address 1.2.3.4:5 does not go with --dry-run, which measures on this machine"),
        (("--jobs", "0"), "--jobs 0 is not positive; name the number of trials at the same time"),
    ]:
        refused = run("study", spec, "--out", tmp_path / "new", "--dry-run", *arguments)
        assert refused.exit_code == 2
        assert f"error: {message}" in refused.stderr
    assert not (tmp_path / "new").exists()


def test_failed_trials_exit_1_after_the_report(trials: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import gluonts_peft.trials as module

    results = [SimpleNamespace(status=status) for status in ("finished", "failed", "finished")]
    monkeypatch.setattr(module, "run_study", lambda *_, **__: results)
    result = run("study", "spec.yaml", "--out", "x")
    assert (result.exit_code, result.stdout) == (1, f"the table\nreport: {Path('x/report.html')}\n")
    assert result.stderr == "error: 1 of 3 trials failed; run it again to try these again\n"


def test_demo_on_real_data_is_a_study_that_can_be_used(trials: list[Any], tmp_path: Path) -> None:
    from gluonts_peft.trials.studyspec import load_study

    spec = tmp_path / "demo.yaml"
    spec.write_text(SPEC)
    ok("demo", "--study", spec, "--data", "hourly.parquet", "--out", tmp_path)
    base = load_study(*trials[0]).base
    assert (base["data"]["source"], base["data"]["path"]) == ("hourly", "hourly.parquet")
    assert (base["prediction_length"], base["context_length"]) == (12, 72)
    assert "patients" not in base["data"]
    ok("demo", "--study", spec, "--data", "hourly.parquet", "--patients", "patient.csv.gz", "--out", tmp_path)
    assert load_study(*trials[2]).base["data"]["patients"] == "patient.csv.gz"
    sentence = "--patients patient.csv.gz maps the stays of --data to patients; name that too, or leave it out"
    assert refused("demo", "--study", spec, "--patients", "patient.csv.gz") == sentence


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two series with a daily season: one has a stretch that is strange, and says so, both have gaps."""
    steps, noise = np.arange(600), np.random.default_rng(0)
    frames = []
    for name in "ab":
        values = 50 + 10 * np.sin(steps * np.pi / 12) + noise.normal(size=len(steps))
        if name == "b":
            values[400:412] += 25
        values[[30, 31, 32, 500]] = np.nan
        times = pd.date_range("2024-01-01", periods=len(steps), freq="h")
        strange = (steps >= 400) & (steps < 412) & (name == "b")
        frames.append(pd.DataFrame({"item_id": name, "timestamp": times, "target": values, "strange": strange * 1}))
    path = tmp_path_factory.mktemp("ward") / "ward.csv"
    pd.concat(frames).to_csv(path, index=False)
    return path


def cells(output: str) -> list[list[str]]:
    """The rows of the tables that were printed."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if line[:1] == "│"]


def test_detect_prints_events_and_writes_scores_and_plot(ward: Path, tmp_path: Path) -> None:
    out = tmp_path / "anomalies"
    extreme = '{"name": "extreme", "risk": 1e-6, "level": 0.9}'
    common = ["--calibration", "0.5", "--threshold", extreme, "--merge", "8", "--labels", "strange"]
    output = ok("detect", ward, "--family", "moment", *common, "--out", out)
    assert names(out) == {"scores.csv", "events.csv", "plot.png"}
    assert output.endswith(f"scores, events and plot: {out}\n")
    events, quality = [row for row in cells(output) if len(row) == 6], [row for row in cells(output) if len(row) == 5]
    found = pd.read_csv(out / "events.csv")
    assert len(events) == len(found)
    longest = found.loc[found[found["item_id"] == "b"]["steps"].idxmax()]
    assert "2024-01-17 12:00" <= longest["start"] <= "2024-01-18 00:00"
    assert [longest["item_id"], longest["start"][:16], f"{longest['peak']:.4g}"] in [
        [row[0], row[1], row[4]] for row in events
    ]
    # Only one of the series has anomalies.
    assert "scores behind the calibration part" in output
    assert quality[0] == ["a", "-", "-", "-", "-"]
    assert quality[1][0] == "b"
    assert float(quality[1][1]) > 0.99
    assert len(pd.read_csv(out / "scores.csv")) == 1200

    assert refused("detect", ward, "--family", "moment", *common, "--out", out) == (
        f"--out {out} is in use; name a new folder"
    )


def test_detect_calibrates_on_a_file_and_takes_a_model_that_forecasts(
    data: Path, model: Path, ward: Path, tmp_path: Path
) -> None:
    common = ["--calibration", data, "--smoothing", "3", "--ignore", "strange"]
    output = ok("detect", ward, "--model", model, *common, "--out", tmp_path / "x")
    scores = pd.read_csv(tmp_path / "x" / "scores.csv")
    assert scores["threshold"].nunique() == 1
    assert "b" in {row[0] for row in cells(output)}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--family", "moment"], "calibration is missing: a threshold needs a part without anomalies;"),
        (["--family", "moment", "--calibration", "2.5"], "calibration 2.5 is neither a share between 0 and 1 nor"),
        (["--calibration", "0.5"], "there is nothing to forecast with; give --model FOLDER, or --horizon N"),
        (
            ["--calibration", "0.5", "--horizon", "4", "--method", "reconstruction"],
            "family 'chronos' does not reconstruct its input;",
        ),
        (
            ["--family", "moment", "--calibration", "0.5", "--threshold", '{"name"'],
            "--threshold '{\"name\"' is not JSON: Expecting ':' delimiter: line 1 column 8 (char 7);"
            ' write e.g. \'{"name": "quantile", "level": 0.999}\'',
        ),
        (["--family", "moment", "--calibration", "0.5", "--labels", "target"], "labels hold "),
        (["--family", "moment", "--calibration", "0.5", "--labels", "gone"], "target 'gone' is not"),
    ],
)
def test_detect_refuses_what_it_cannot_do(ward: Path, tmp_path: Path, options: list[str], sentence: str) -> None:
    assert refused("detect", ward, "--out", tmp_path / "out", "--ignore", "*", *options).startswith(sentence)
    assert not (tmp_path / "out").exists()


def test_impute_fills_gaps_and_leaves_the_rest(ward: Path, tmp_path: Path) -> None:
    out = tmp_path / "filled.csv"
    assert (
        ok("impute", ward, "--out", out, "--ignore", "strange")
        == f"8 values of 2 series filled, 0 left missing: {out}\n"
    )
    before, after = pd.read_csv(ward), pd.read_csv(out)
    missing = before["target"].isna()
    assert after["imputed"].tolist() == missing.tolist()
    assert (after["target"][~missing] == before["target"][~missing]).all()
    assert after["target"].between(35, 90).all()
    assert refused("impute", ward, "--out", out).startswith(f"path '{out}' exists; give another one")
    output = run("impute", ward, "--out", out, "--overwrite", "--max-gap", "2", "--unfillable", "keep")
    assert output.stdout == f"2 values of 2 series filled, 6 left missing: {out}\n"
    dropped, kept, _ = output.stderr.split("\n")
    assert dropped == (
        f"warning: '{ward}': 1 columns are not read: strange; if they are meant to be left out, say so with ignore= "
        "(command line: --ignore)"
    )
    assert kept.startswith("warning: 2 gaps stay missing; the first: series 'a' misses the 3 steps 30 to 32,")
    options = ["--out", tmp_path / "x.csv", "--ignore", "strange"]
    assert refused("impute", ward, *options, "--family", "chronos").startswith(
        "family 'chronos' does not reconstruct its input;"
    )


def test_fit_to_reconstruct_makes_a_model_for_impute_and_detect(ward: Path, tmp_path: Path) -> None:
    ignore = ["--ignore", "strange"]
    arguments = ["fit", ward, "--family", "moment", "--task", "reconstruct", *SHORT, "--gate", "keep", *ignore]
    assert "adapter:              lora\n" in ok(*arguments, "--out", tmp_path / "model")
    ok("impute", ward, "--model", tmp_path / "model", "--out", tmp_path / "tuned.csv", *ignore)
    ok("impute", ward, "--context", "48", "--out", tmp_path / "zero-shot.csv", *ignore)
    tuned, zero_shot = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("tuned", "zero-shot"))
    assert (tuned["target"] != zero_shot["target"])[tuned["imputed"]].all()
    ok("detect", ward, "--model", tmp_path / "model", "--calibration", "0.5", "--out", tmp_path / "anomalies", *ignore)
    assert refused(*arguments[:4], "--task", "imputation", *SHORT, "--out", tmp_path / "x") == (
        "--task imputation is unknown; name forecast or reconstruct"
    )
