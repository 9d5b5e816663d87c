from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

# Sweeps put hundreds of cases through lines that other tests run too: there the tracer of the coverage would cost half
# of their time again, and plug-ins are not what it measures.
SWEEPS = (
    "plugins/",
    "tests/test_matrix.py",
    "tests/test_families.py",
    "tests/test_testing.py",
    "tests/test_trainer_kwargs.py",
    "tests/adapters/test_options.py",
    "tests/series/test_calendar.py",
    "tests/series/test_entries.py",
)
# What takes longest begins first, so that no worker is left alone with it at the end.
LONGEST = (
    "tests/trials/test_cluster.py",
    "tests/test_matrix.py",
    "tests/adapters/test_options.py",
    "tests/trials/test_search.py",
    "tests/test_processes.py",
    "tests/test_training.py",
    "tests/test_third_party_plugin.py",
    "tests/test_trainer_kwargs.py",
    "tests/test_pickling.py",
    "tests/trials/test_report.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.location[0].startswith(SWEEPS):
            item.add_marker(pytest.mark.no_cover)
    items.sort(key=lambda item: LONGEST.index(item.location[0]) if item.location[0] in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand tests to the workers file by file, those of the matrix by adapter and checkpoint, in the order of above."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFileOrCell(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            return f"{file} {name.rpartition('-')[0]}" if file == "tests/test_matrix.py" else file

    return ByFileOrCell(config, log)


@pytest.fixture(scope="session", autouse=True)
def _house_rules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, so that sums have one order, and a home folder that nobody can write to, not even root."""
    blocker = tmp_path_factory.mktemp("home") / "blocker"
    blocker.touch()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # Processes that tests start count as these do.
        patch.setenv("OMP_NUM_THREADS", "1")
        # No folder can be made below a file.
        patch.setenv("HOME", str(blocker / "home"))
        # Lightning imports matplotlib, which complains where it has no place for its list of fonts.
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """Builder of batches: random walks on a level, some of the steps missing."""

    def make(
        size: int = 4, context: int = 48, prediction: int = 8, seed: int = 0, missing: float = 0.1
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        level = 20 + 80 * torch.rand(size, 1, generator=generator)
        values = level + torch.randn(size, context + prediction, generator=generator).cumsum(1)
        observed = (torch.rand(values.shape, generator=generator) >= missing).float()
        # Every window keeps something to see and something to forecast.
        observed[:, context - 2 : context + 1] = 1.0
        values = values * observed
        return {
            "past_target": values[:, :context],
            "past_observed_values": observed[:, :context],
            "future_target": values[:, context:],
            "future_observed_values": observed[:, context:],
        }

    return make


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., list[dict[str, Any]]]:
    """Builder of GluonTS datasets: series that return to a level of their own, so there is something to learn."""

    def make(n: int, length: int, seed: int = 0, freq: str = "h") -> list[dict[str, Any]]:
        generator = np.random.default_rng(seed)
        levels = generator.uniform(20, 100, n)
        noise = generator.standard_normal((n, length))
        state, deviations = noise[:, 0], []
        for t in range(length):
            state = 0.6 * state + noise[:, t]
            deviations.append(state)
        targets = (levels[:, None] + np.stack(deviations, 1)).astype(np.float32)
        start = pd.Period("2024-01-01 00:00", freq=freq)
        return [{"item_id": f"item-{i}", "start": start, "target": target} for i, target in enumerate(targets)]

    return make


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """Run a program in a fresh process and return what it prints."""
    import subprocess
    import sys

    def run(program: str, cwd: Path | None = None, **environment: str) -> str:
        import os

        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, **environment},
            timeout=1100,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
