"""A search over nodes with addresses, ports and links of their own: network namespaces, joined by a bridge.

The nodes are started by the script that is for starting nodes by hand. Root is needed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gluonts_peft.trials import SearchSpec, ranking, search

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="ip of iproute2 is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]

SCRIPT = Path(__file__).parents[2] / "ray_configs" / "clusters" / "nodes.sh"
HEAD = "10.77.0.1"
PATIENCE = 500.0
SEARCH: dict[str, Any] = {
    "base": {
        "family": "chronos",
        "checkpoint": "bolt-nano",
        "adapter": "lora",
        "prediction_length": 6,
        "context_length": 24,
        "training": {"max_epochs": 6, "num_batches_per_epoch": 12, "batch_size": 16, "patience": 0, "device": "cpu"},
        "data": {"patients": 20, "hours": 12, "vital": "hr", "windows": 2},
    },
    "space": {"training.learning_rate": {"space": "loguniform", "lower": 1.0e-4, "upper": 1.0e-2}},
    "num_samples": 4,
}


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    return pytest.fail(f"waited {PATIENCE} seconds in vain")


class Network:
    """A head and two nodes of one core, in namespaces called ``<name>-0`` to ``<name>-2``."""

    def __init__(self, place: Path) -> None:
        self.name = f"gp{os.getpid() % 10000}"
        self.place = place
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "PYTHON": sys.executable,
            "TMPDIR": str(place),
            "PORT": "6400",
            "RAY_AUTH_TOKEN": "2" * 64,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            # A link that is cut is noticed after some 8 seconds instead of a minute.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
        }

    def up(self) -> None:
        ip("link", "add", f"{self.name}b", "type", "bridge")
        ip("link", "set", f"{self.name}b", "up")
        for number in range(3):
            space, outer, inner = f"{self.name}-{number}", f"{self.name}o{number}", f"{self.name}i{number}"
            ip("netns", "add", space)
            ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            ip("link", "set", inner, "netns", space)
            ip("link", "set", outer, "master", f"{self.name}b", "up")
            ip("-n", space, "addr", "add", f"10.77.0.{number + 1}/24", "dev", inner)
            ip("-n", space, "link", "set", inner, "up")
            ip("-n", space, "link", "set", "lo", "up")
        self.start(0, SCRIPT, "head", HEAD)
        wait_for(lambda: self.answers(0))
        for number in (1, 2):
            self.start(number, SCRIPT, "node", HEAD, f"--node-ip-address=10.77.0.{number + 1}", "--num-cpus=1")
        wait_for(lambda: self.answers(2))

    def start(self, number: int, *command: object, **options: Any) -> subprocess.Popen[Any]:
        """Start a program in a namespace."""
        small = [f"--object-store-memory={80 * 2**20}"] if command[0] == SCRIPT else []
        process = subprocess.Popen(
            ["ip", "netns", "exec", f"{self.name}-{number}", *map(str, command), *small],
            env=self.environment,
            start_new_session=True,
            **({"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options),
        )
        self.processes.append(process)
        return process

    def answers(self, nodes: int) -> bool:
        program = (
            "import sys; from gluonts_peft.trials.cluster import connected, room\n"
            "with connected(sys.argv[1]): print(room({'CPU': 1.0}))"
        )
        process = self.start(0, sys.executable, "-c", program, f"{HEAD}:6400", stdout=subprocess.PIPE, text=True)
        return bool(process.communicate(timeout=PATIENCE)[0].strip() == str(nodes))

    def cut(self, pid: int) -> None:
        """Take down the link of the namespace that a process is in."""
        number = ip("netns", "identify", str(pid)).rpartition("-")[2]
        ip("link", "set", f"{self.name}o{number}", "down")

    def down(self) -> None:
        for number in range(3):
            # A node that is cut off ends at no gentler signal.
            pids = subprocess.run(["ip", "netns", "pids", f"{self.name}-{number}"], capture_output=True, text=True)
            for pid in pids.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for process in self.processes:
            process.wait()
        for number in range(3):
            subprocess.run(["ip", "netns", "del", f"{self.name}-{number}"], capture_output=True)
            subprocess.run(["ip", "link", "del", f"{self.name}o{number}"], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self.name}b"], capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    place = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    network = Network(place)
    try:
        network.up()
        yield network
    finally:
        network.down()
        shutil.rmtree(place, ignore_errors=True)


def test_a_link_that_is_cut_costs_no_trial(network: Network, tmp_path: Path) -> None:
    spec, out = tmp_path / "search.yaml", tmp_path / "out"
    spec.write_text(json.dumps(SEARCH))
    program = "from gluonts_peft.cli import main; main()"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    arguments = ("search", spec, "--out", out, "--address", f"{HEAD}:6400")
    driver = network.start(0, sys.executable, "-c", program, *arguments, **options)

    def records() -> dict[str, dict[str, Any]]:
        return {path.parent.name: json.loads(path.read_text()) for path in out.glob("trials/*/evaluations.json")}

    def in_the_middle() -> Any:
        if driver.poll() is not None:
            pytest.fail(driver.communicate()[0])
        return next(((key, each) for key, each in records().items() if len(each["evaluations"]) == 2), None)

    key, before = wait_for(in_the_middle)
    network.cut(before["evaluations"][-1]["pid"])
    printed, _ = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, printed
    for record in records().values():
        assert [each["epochs"] for each in record["evaluations"]] == [1, 2, 3, 4, 5]
    after = records()[key]
    assert after["evaluations"][:2] == before["evaluations"]
    assert len({each["node"] for each in after["attempts"]}) == 2
    assert after["attempts"][-1]["epochs"] >= 2
    alone = search(SearchSpec(**SEARCH), tmp_path / "alone", serial=True, progress=False)
    frame = ranking(out)
    assert frame["trial"].tolist() == alone["trial"].tolist()
    assert frame["validation MAE"].tolist() == pytest.approx(alone["validation MAE"].tolist(), rel=1e-5)
