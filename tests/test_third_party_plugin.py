"""A plug-in that this project does not know: installed it works, uninstalled it is gone, broken it harms nobody."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import gluonts_peft
from gluonts_peft.adapters.base import AdapterError
from gluonts_peft.cli import app
from gluonts_peft.registry import families

fracast = pytest.importorskip("fracast", reason="the package that the example wraps is not installed")

SOURCE = Path(__file__).parents[1] / "examples" / "third_party_plugin"


def run(*arguments: str, path: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": "" if path is None else str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=2300, cwd=cwd, env=environment
    )


def listed() -> dict[str, list[str]]:
    """Rows of ``gluonts-peft families`` by their first column."""
    result = CliRunner().invoke(app, ["families"])
    assert result.exit_code == 0, result.output
    rows = [
        [cell.strip() for cell in line.strip("│ ").split("│")] for line in result.output.splitlines() if "│" in line
    ]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of its own with the installed distribution; the shared environment stays as it is."""
    root = tmp_path_factory.mktemp("third-party")
    shutil.copytree(SOURCE, root / "source", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    command = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    done = run(*command, "--target", str(root / "site"), str(root / "source"))
    assert done.returncode == 0, done.stderr
    return root / "site"


@contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """Make a folder of distributions visible to this process, and leave none of their modules behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(families, "_loaded", dict(families._loaded))
        patch.setattr(families, "_known", set(families._known))
        yield
    for name in ("gluonts_peft_fracast", "gluonts_peft_broken"):
        sys.modules.pop(name, None)


@pytest.fixture
def available(installed: Path) -> Iterator[None]:
    with on_path(installed):
        yield


def test_the_template_is_short() -> None:
    assert len((SOURCE / "gluonts_peft_fracast.py").read_text().splitlines()) < 100


def test_it_is_found_when_installed_and_gone_otherwise(installed: Path) -> None:
    before = listed()
    with on_path(installed):
        during = listed()

    assert during.pop("fracast") == ["gluonts-peft-fracast", "0.1.0", "fracast-0", "quantiles"]
    assert before == during == listed()
    assert "chronos" in before


@pytest.mark.timeout(2400)
def test_it_passes_the_public_checks(installed: Path, tmp_path: Path) -> None:
    shutil.copy(SOURCE / "test_fracast.py", tmp_path)
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_fracast.py", path=installed, cwd=tmp_path)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}

    assert done.returncode == 0, done.stdout
    assert counts["passed"] >= 65
    # What a univariate quantile family with a trained head has no use for.
    assert counts.get("skipped", 0) <= 5
    assert not counts.keys() & {"failed", "errors", "xfailed"}


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize("length", [20, 300, 3000])
def test_its_forecasts_are_the_official_ones(length: int) -> None:
    official = fracast.FracastModel.from_pretrained(weights="fp32")
    ours = gluonts_peft.load_backbone("fracast", prediction_length=100)
    rng = np.random.default_rng(length)
    history = (50 + rng.standard_normal((3, length)).cumsum(1)).astype(np.float32)
    history[rng.random(history.shape) < 0.1] = np.nan
    expected = official.forecast_batch(history, horizon=100).transpose(0, 2, 1)
    past = torch.from_numpy(history)[:, -2048:]
    with ours.inference():
        found = ours.forecast({"past_target": past.nan_to_num(0), "past_observed_values": (~past.isnan()).float()})

    assert found.levels == tuple(official.quantiles)
    assert found.values.shape == (3, 9, 100)
    np.testing.assert_allclose(found.values.numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


# LoRA of rank 2 on two 64 x 64 layers; a linear head of 9 quantiles.
@pytest.mark.usefixtures("available")
@pytest.mark.parametrize(
    ("adapter", "count"),
    [("lora", 2 * 2 * 128), ("bitfit", 1609), ("layernorm", 512), ("head", 9 * 65), ("full", 85001), ("none", 0)],
)
def test_adapters_find_their_places(adapter: str, count: int) -> None:
    backbone = gluonts_peft.load_backbone("fracast", prediction_length=8)

    assert gluonts_peft.get_adapter(adapter).attach(backbone).num_parameters() == count


@pytest.mark.usefixtures("available")
def test_what_has_no_place_is_refused() -> None:
    with pytest.raises(AdapterError) as caught:
        gluonts_peft.get_adapter("ia3").attach(gluonts_peft.load_backbone("fracast", prediction_length=8))

    assert str(caught.value) == (
        "adapter 'ia3' is impossible on family 'fracast': it scales keys and values of attention, and this network"
        " convolves instead of attending"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import a_module_that_nobody_has\n", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("raise RuntimeError('no licence')\n", "RuntimeError: no licence"),
        ("", "AttributeError: module 'gluonts_peft_broken' has no attribute 'Broken'"),
    ],
    ids=["import", "error", "no-class"],
)
def test_a_broken_one_is_listed_with_its_error_and_harms_nobody(tmp_path: Path, text: str, reason: str) -> None:
    before = listed()
    (tmp_path / "gluonts_peft_broken.py").write_text(text)
    info = tmp_path / "gluonts_peft_broken-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gluonts-peft-broken\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[gluonts_peft.estimators]\nbroken = gluonts_peft_broken:Broken\n")
    with on_path(tmp_path):
        found, names = listed(), gluonts_peft.list_families()
        with pytest.raises(ImportError) as caught:
            gluonts_peft.get_estimator("broken")
        assert gluonts_peft.load_backbone("chronos", prediction_length=4).family == "chronos"
    message = f"family 'broken' of gluonts-peft-broken 0.3 cannot be loaded from 'gluonts_peft_broken:Broken': {reason}"

    assert found.pop("broken") == ["gluonts-peft-broken", "0.3", f"error: {message}"]
    assert str(caught.value) == message
    assert found == before == listed()
    assert set(names) == {*before, "broken"}
