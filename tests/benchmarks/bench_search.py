"""How much faster a search is on two workers of Ray than its trials one after the other.

    python tests/benchmarks/bench_search.py             # 8 trials on 2 workers
    python tests/benchmarks/bench_search.py --steps 50  # shorter epochs

Both sides are whole commands, so that importing torch, starting Ray and asking its nodes count: some 15 seconds, which
trials of a second never earn back. Both give the same ranking, which is checked. One thread a process on both sides.
The ratio means something only on a machine with two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from rich.console import Console

SEARCH = {
    "base": {
        "family": "chronos",
        "checkpoint": "bolt-nano",
        "adapter": "lora",
        "prediction_length": 36,
        "context_length": 72,
        "training": {"max_epochs": 4, "batch_size": 32, "patience": 0, "device": "cpu"},
        "data": {"patients": 40, "hours": 48, "vital": "map", "windows": 3},
    },
    "space": {"training.learning_rate": {"space": "loguniform", "lower": 1.0e-4, "upper": 1.0e-2}},
    "max_concurrent": 2,
}


def run(spec: Path, out: Path, *options: str) -> float:
    """Return the seconds of a search."""
    command = [
        sys.executable,
        "-c",
        "from gluonts_peft.cli import main; main()",
        "search",
        str(spec),
        "--out",
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    subprocess.run([*command, *options], check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Print the ratio."""
    from recorded import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500, help="steps of an epoch; a trial has 4")
    options = parser.parse_args()
    spec = {**SEARCH, "num_samples": options.trials}
    spec["base"]["training"]["num_batches_per_epoch"] = options.steps  # type: ignore[index]
    console = Console(width=100, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "search.yaml"
        path.write_text(json.dumps(spec))
        alone = run(path, Path(folder) / "serial", "--serial")
        both = run(path, Path(folder) / "ray")
        orders = [pd.read_csv(Path(folder) / name / "ranking.csv")["trial"].tolist() for name in ("serial", "ray")]
    same = orders[0] == orders[1]
    console.print(f"{options.trials} trials one after the other   {alone:7.1f} s")
    console.print(f"{options.trials} trials on two workers         {both:7.1f} s")
    console.print(f"ratio {both / alone:.2f} (at most 0.6 is the aim); the same ranking: {'yes' if same else 'NO'}")
    record("search", {"two workers relative to one": both / alone}, console)


if __name__ == "__main__":
    main()
