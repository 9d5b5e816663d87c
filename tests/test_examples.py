"""The programs under examples/ run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=1100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_evaluate_checkpoints_prints_a_ratio_a_data_set(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hours = np.arange(700)
    dates = pd.date_range("2016-07-01", periods=len(hours), freq="h")
    ett = pd.DataFrame({"date": dates})
    for channel in ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"):
        ett[channel] = 5 * np.sin(2 * np.pi * hours / 24) + rng.normal(size=len(hours))
    ett.to_csv(tmp_path / "ett.csv", index=False)
    stays = [
        pd.DataFrame(
            {"stay_id": stay, "hour": range(60), "hr": 80 + rng.normal(0, 5, 60), "map": 75 + rng.normal(0, 5, 60)}
        )
        for stay in range(6)
    ]
    frame = pd.concat(stays).astype({"stay_id": "int32", "hour": "int16", "hr": "float32", "map": "float32"})
    frame = frame.assign(**{name: np.float32(50.0) for name in ("sbp", "dbp", "resp", "o2sat")})
    frame.to_parquet(tmp_path / "vitals.parquet")
    out = run(
        "examples/evaluate_checkpoints.py",
        "bolt-nano",
        *("--ett", str(tmp_path / "ett.csv"), "--vitals", str(tmp_path / "vitals.parquet"), "--windows", "2"),
    )
    ratios = [float(found) for found in re.findall(r"│\s+(\d+\.\d{3})\s+│\n", out)]
    # White noise around a level is what the last value is worst at, by a factor of up to the square root of two; a
    # clean daily season with noise is where seasonal naive pays for repeating the noise.
    assert len(ratios) == 3
    assert all(ratio < 1.0 for ratio in ratios)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_every_program_says_what_it_is(name: str) -> None:
    assert "usage:" in run(f"examples/{name}", "--help")
