"""Searches and studies on a Ray cluster of two nodes, which are processes of this machine; drivers are other processes.

The nodes share its file system, so a node without the shared folder is made by a mount namespace, as root only.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from gluonts.model.predictor import Predictor
from typer.testing import CliRunner

from gluonts_peft.cli import app
from gluonts_peft.trials import SearchSpec, StudySpec, TrialSpec, load_results, ranking, run_study, search
from gluonts_peft.trials.cluster import ClusterError, _expected, _fits

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.timeout(2400)

ROOT = Path(__file__).parents[2]
MAIN = "from gluonts_peft.cli import main; main()"
PATIENCE = 1200.0
BASE: dict[str, Any] = {
    "family": "chronos",
    "checkpoint": "bolt-nano",
    "adapter": "lora",
    "prediction_length": 6,
    "context_length": 24,
    "training": {"max_epochs": 6, "num_batches_per_epoch": 12, "batch_size": 16, "patience": 0, "device": "cpu"},
    "data": {"patients": 20, "hours": 12, "vital": "hr", "windows": 2},
}
SEARCH: dict[str, Any] = {
    "base": BASE,
    "space": {
        "adapter.name": {"space": "choice", "categories": ["lora", "bitfit"]},
        "training.learning_rate": {"space": "loguniform", "lower": 1.0e-4, "upper": 1.0e-2},
    },
    "num_samples": 4,
}


def children(pid: int) -> list[int]:
    """Return the processes below one, the nearest first."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = list(parents.get(pid, []))
    for child in found:
        found.extend(parents.get(child, []))
    return found


def kill_tree(pid: int) -> None:
    for each in (pid, *children(pid)):
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    """Wait until something is there, as long as a process runs."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := what():
            return found
        if process is not None and process.poll() is not None:
            pytest.fail(f"the driver ended with {process.returncode}: {process.communicate()}")
        time.sleep(0.02)
    return pytest.fail(f"waited {PATIENCE} seconds in vain")


class Nodes:
    """A head without cores, and nodes of one core each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": 80 * 2**20,
                "_system_config": {
                    "health_check_initial_delay_ms": 1000,
                    "health_check_period_ms": 500,
                    "health_check_timeout_ms": 5000,
                    "health_check_failure_threshold": 3,
                },
            },
        )
        self.nodes: list[Any] = []
        self.fill()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def fill(self) -> None:
        """Add nodes until there are two."""
        while len(self.nodes) < 2:
            self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20))

    def kill(self, identity: str) -> None:
        """Let a node and all that runs on it end at once."""
        (node,) = (node for node in self.nodes if node.node_id == identity)
        kill_tree(node.all_processes["raylet"][0].process.pid)
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    # Sockets lie there; their paths must be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            # Ray may have been imported before, with this mode; all listen on the loopback only.
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }.items():
            patch.setenv(name, value)
        nodes = None
        before = set(children(os.getpid()))
        try:
            nodes = Nodes()
            yield nodes
        finally:
            left = set(children(os.getpid())) - before
            if nodes is not None:
                nodes.cluster.shutdown()
            for pid in left:
                kill_tree(pid)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The ranking of the search, run without Ray and undisturbed."""
    return search(SearchSpec(**SEARCH), tmp_path_factory.mktemp("reference"), serial=True, progress=False)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "search.yaml"
    path.write_text(json.dumps(SEARCH))
    return path


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    return process.returncode, out, err


def evaluations(out: Path, what: str = "evaluations") -> dict[str, list[dict[str, Any]]]:
    return {path.parent.name: json.loads(path.read_text())[what] for path in out.glob("trials/*/evaluations.json")}


def results(out: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("trials/*/result.json")}


def assert_same(frame: pd.DataFrame, reference: pd.DataFrame) -> None:
    """The order is the same, and the numbers are up to what a resumed training differs by."""
    exact = ["trial", "status", "adapter.name", "training.learning_rate", "epochs", "trainable parameters"]
    pd.testing.assert_frame_equal(frame[exact], reference[exact])
    scores = [name for name in frame if str(name).startswith(("validation ", "test "))]
    pd.testing.assert_frame_equal(frame[scores].astype(float), reference[scores].astype(float), rtol=1e-5)


def test_trials_run_on_both_nodes_and_rank_as_without_ray(
    nodes: Nodes, reference: pd.DataFrame, spec: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, printed, errors = finish(start("search", spec, "--out", out, "--address", nodes.address))
    assert code == 0, errors
    found = evaluations(out)
    assert len(found) == 4
    assert {each["node"] for trial in found.values() for each in trial} == {node.node_id for node in nodes.nodes}
    assert_same(ranking(out), reference)
    assert f"best predictor: {out}/best" in printed
    assert Predictor.deserialize(out / "best").prediction_length == 6
    # Nothing of Ray's own is written but below the folder and the cluster's.
    assert not Path("~/.ray").expanduser().exists()
    assert not Path("~/ray_results").expanduser().exists()
    assert {path.name for path in out.iterdir()} >= {"ray", "trials", "ranking.csv", "best", "search.json"}


def test_a_node_that_dies_costs_no_trial_and_no_finished_epoch(
    nodes: Nodes, reference: pd.DataFrame, spec: Path, tmp_path: Path
) -> None:
    nodes.fill()
    out = tmp_path / "out"
    driver = start("search", spec, "--out", out, "--address", nodes.address)
    # A trial in the middle of its epochs.
    key, before = wait_for(lambda: next(((k, e) for k, e in evaluations(out).items() if len(e) == 2), None), driver)
    nodes.kill(before[0]["node"])
    code, _, errors = finish(driver)
    assert code == 0, errors
    assert_same(ranking(out), reference)
    for trial, found in evaluations(out).items():
        assert [each["epochs"] for each in found] == [1, 2, 3, 4, 5], trial
    after = evaluations(out)[key]
    # What was scored before the node died was not run again, and the rest ran on the other node.
    assert after[:2] == before
    assert {each["node"] for each in after} == {before[0]["node"], nodes.nodes[0].node_id}
    first, second = evaluations(out, "attempts")[key]
    assert (first["epochs"], first["node"]) == (1, before[0]["node"])
    assert second["epochs"] >= 2


def test_a_driver_that_dies_costs_no_finished_trial(
    nodes: Nodes, reference: pd.DataFrame, spec: Path, tmp_path: Path
) -> None:
    nodes.fill()
    out = tmp_path / "out"
    arguments = ("search", spec, "--out", out, "--address", nodes.address)
    driver = start(*arguments)

    def in_the_middle() -> bool:
        running = [e for k, e in evaluations(out).items() if not (out / "trials" / k / "result.json").exists()]
        return bool(results(out)) and any(len(each) >= 1 for each in running)

    wait_for(in_the_middle, driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    before, begun = results(out), evaluations(out)
    code, _, errors = finish(start(*arguments))
    assert code == 0, errors
    after = results(out)
    assert before.items() <= after.items()
    assert len(after) == 4
    for key, found in evaluations(out).items():
        assert [each["epochs"] for each in found] == [1, 2, 3, 4, 5]
        assert found[: len(begun.get(key, []))] == begun.get(key, [])
        # It went on from the last epoch that had been scored, or from a later one.
        starts = [each["epochs"] for each in evaluations(out, "attempts")[key]]
        assert starts == [1] or (len(starts) == 2 and starts[1] >= len(begun[key]))
    assert_same(ranking(out), reference)


CHECK = """
import json, sys
from pathlib import Path
from gluonts_peft.trials import ClusterError, TrialSpec
from gluonts_peft.trials.cluster import check_nodes, connected

address, folder, forms = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
with connected(address):
    for form, resources in forms:
        try:
            check_nodes(folder, [TrialSpec(**form)], resources)
            print("fit")
        except ClusterError as error:
            print(json.dumps(error.faults))
"""


def checked(nodes: Nodes, folder: Path, *cases: tuple[dict[str, Any], dict[str, float]]) -> list[Any]:
    arguments = [nodes.address, str(folder), json.dumps(cases)]
    done = subprocess.run([sys.executable, "-c", CHECK, *arguments], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return [line if line == "fit" else json.loads(line) for line in done.stdout.splitlines()]


def test_a_relative_table_of_patients_is_refused() -> None:
    data = {"source": "hourly", "path": "/shared/stays.parquet", "patients": "patient.csv"}
    message = "data.patients 'patient.csv' is relative, and nodes have other working directories; name it in full"
    with pytest.raises(ClusterError, match=re.escape(message)):
        _expected([TrialSpec(**{**BASE, "data": data})])


def test_what_no_node_can_run_is_refused_before_the_start(nodes: Nodes, spec: Path, tmp_path: Path) -> None:
    nodes.fill()
    table = tmp_path / "stays.csv"
    table.write_text("item_id,timestamp,target\n" + "".join(f"a,2024-01-01 {h:02}:00,1\n" for h in range(24)))
    one = {"CPU": 1.0, "GPU": 0.0}
    fit, no_gpu, relative, folder = checked(
        nodes,
        tmp_path / "out",
        (BASE, one),
        (BASE, {"CPU": 1.0, "GPU": 0.5}),
        ({**BASE, "data": {"source": "file", "path": "stays.csv"}}, one),
        ({**BASE, "checkpoint": "tests"}, one),
    )
    assert fit == "fit"
    assert len(no_gpu) == 1
    assert no_gpu[0].startswith("a trial takes 1 CPU and 0.5 GPU, which no node ever has: node ")
    assert no_gpu[0].count(" has 1 CPU and 0 GPU") == 2
    assert no_gpu[0].count(" has 0 CPU and 0 GPU") == 1
    assert relative == ["data.path 'stays.csv' is relative, and nodes have other working directories; name it in full"]
    assert folder == [
        "checkpoint 'tests' is a relative path, and nodes have other working directories; name it in full"
    ]
    assert not list(tmp_path.glob("out/ray/probe"))

    out = tmp_path / "refused"
    code, _, errors = finish(
        start("search", spec, "--out", out, "--address", nodes.address, "--set", "resources.gpu=2")
    )
    assert code == 2
    assert "error: Ray cluster cannot be used: a trial takes 1 CPU and 2 GPU, which no node ever has" in errors
    assert not (out / "trials").exists()


def test_a_cluster_that_is_not_there_is_said_to_be(spec: Path, tmp_path: Path) -> None:
    arguments = ["search", str(spec), "--out", str(tmp_path / "out"), "--address", "127.0.0.1:1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "error: Ray cluster '127.0.0.1:1' cannot be used: it does not answer: " in done.output
    assert not (tmp_path / "out" / "trials").exists()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mount namespaces need root")
def test_a_node_without_the_shared_folder_is_refused_before_the_start(nodes: Nodes, tmp_path: Path) -> None:
    nodes.fill()
    shared, private = tmp_path / "shared", tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    shared.mkdir()
    ray_start = (
        f"{sys.executable} -m ray.scripts.scripts start --block --address={nodes.address} --num-cpus=1"
        f" --object-store-memory={80 * 2**20} --disable-usage-stats --temp-dir={private}"
    )
    stranger = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {shared} && exec {ray_start}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        faults: Any = "fit"
        # The node takes a while to join.
        while faults == "fit" and time.monotonic() < deadline:
            (faults,) = checked(nodes, shared / "out", (BASE, {"CPU": 1.0, "GPU": 0.0}))
        assert len(faults) == 1
        assert faults[0].startswith("node ")
        assert faults[0].endswith(
            f": it does not see what lies in '{shared}/out': the folder is not shared; mount it there, or name another"
        )
    finally:
        kill_tree(stranger.pid)
        stranger.wait()
        shutil.rmtree(private, ignore_errors=True)


def test_a_study_on_ray_gives_what_one_process_gives(nodes: Nodes, tmp_path: Path) -> None:
    nodes.fill()
    form = {
        "base": {**BASE, "training": {**BASE["training"], "max_epochs": 1, "num_batches_per_epoch": 2}},
        "grid": {"adapter": ["none", "bitfit", {"name": "c3a", "block_size": 7}]},
        "baselines": ["last_value"],
    }
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(json.dumps(form))
    code, _, errors = finish(start("study", path, "--out", out, "--address", nodes.address))
    assert code == 1, errors
    assert "error: 1 of 4 trials failed; run it again to try these again" in errors
    alone = run_study(StudySpec(**form), tmp_path / "alone", progress=False)
    together = load_results(out)
    assert [(result.spec, result.status, result.error) for result in together] == [
        (result.spec, result.status, result.error) for result in alone
    ]
    for one, other in zip(alone, together, strict=True):
        assert other.scores == pytest.approx(one.scores, rel=1e-5)
    done = CliRunner().invoke(app, ["study", str(path), "--out", "relative", "--ray"])
    assert done.exit_code == 2
    assert "error: folder 'relative' cannot be used: it is relative" in done.output
    assert not Path("relative").exists()


@pytest.mark.parametrize(
    ("there", "wanted", "expected"),
    [
        ({"CPU": 4.0}, {"CPU": 1.0, "GPU": 0.0}, 4),
        ({"CPU": 4.0}, {"CPU": 1.0, "GPU": 0.5}, 0),
        ({"CPU": 8.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 0.1}, 8),
        ({"CPU": 16.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 0.1}, 10),
        ({"CPU": 0.5}, {"CPU": 1.0, "GPU": 0.0}, 0),
    ],
)
def test_room(there: dict[str, float], wanted: dict[str, float], expected: int) -> None:
    assert _fits(there, wanted) == expected


def test_the_quick_search_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray puts its files there, and they are gone at the end.
    own = tempfile.mkdtemp(prefix="r", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", own)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    small = ("num_samples=3", "training.max_epochs=2", "training.num_batches_per_epoch=2", "data.patients=20")
    arguments = [argument for each in small for argument in ("--set", each)]
    quick = ROOT / "ray_configs" / "searches" / "quick.yaml"
    code, printed, errors = finish(start("search", quick, "--out", tmp_path / "out", *arguments))
    assert code == 0, errors
    frame = ranking(tmp_path / "out")
    assert len(frame) == 3
    assert set(frame["status"]) <= {"finished", "stopped"}
    assert f"ranking: {tmp_path}/out/ranking.csv" in printed
    # Neither banners of Ray nor progress, which is for terminals.
    assert errors == ""
    assert list(Path(own).iterdir()) == []
    shutil.rmtree(own)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "pbt"])
def test_schedulers_stop_or_change_trials_and_a_second_run_repeats_nothing(
    nodes: Nodes, tmp_path: Path, scheduler: str
) -> None:
    nodes.fill()
    form = copy.deepcopy(SEARCH)
    form["scheduler"] = scheduler
    # With one more, all four would be in a bracket of HyperBand's that stops nobody.
    form["base"]["training"]["max_epochs"] = 5
    if scheduler == "pbt":
        form["base"]["adapter"] = {"name": "lora", "lora_dropout": 0.1}
        form["base"]["training"]["learning_rate"] = 1e-3
        del form["space"]["adapter.name"]
        form["space"]["adapter.lora_dropout"] = {"space": "uniform", "lower": 0.0, "upper": 0.3}
    path, out = tmp_path / "search.yaml", tmp_path / "out"
    path.write_text(json.dumps(form))
    arguments = ("search", path, "--out", out, "--address", nodes.address)
    code, _, errors = finish(start(*arguments))
    assert code == 0, errors
    frame = ranking(out)
    statuses = frame["status"].value_counts()
    if scheduler == "pbt":
        assert statuses.to_dict() == {"finished": 4}
        entries = json.loads((out / "proposals.json").read_text())
        assert [entry["number"] for entry in entries] == [0, 1, 2, 3]
        # Somebody has taken over another's weights: more folders than trials.
        assert len(list(out.glob("trials/*"))) > 4
        assert set(frame["epochs"]) == {5}
    else:
        assert set(statuses.index) == {"finished", "stopped"}
    before = {path: path.read_bytes() for path in out.glob("trials/*/*.json")}
    code, _, errors = finish(start(*arguments))
    assert code == 0, errors
    assert {path: path.read_bytes() for path in out.glob("trials/*/*.json")} == before
    pd.testing.assert_frame_equal(ranking(out), frame)


@pytest.mark.slow
def test_optuna_one_at_a_time_ranks_as_without_ray(nodes: Nodes, tmp_path: Path) -> None:
    nodes.fill()
    form = {**SEARCH, "searcher": {"name": "optuna", "n_startup_trials": 2}, "max_concurrent": 1, "num_samples": 6}
    path = tmp_path / "search.yaml"
    path.write_text(json.dumps(form))
    code, _, errors = finish(start("search", path, "--out", tmp_path / "out", "--address", nodes.address))
    assert code == 0, errors
    alone = search(SearchSpec(**form), tmp_path / "alone", serial=True, progress=False)
    assert_same(ranking(tmp_path / "out"), alone)


@pytest.mark.slow
def test_a_node_that_dies_costs_a_study_no_cell(nodes: Nodes, tmp_path: Path) -> None:
    nodes.fill()
    form = {"base": BASE, "grid": {"adapter": ["lora", "bitfit"], "seed": [0, 1]}}
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(json.dumps(form))
    driver = start("study", path, "--out", out, "--address", nodes.address)
    # Both nodes have a core, so that each has a cell when two are in training.
    wait_for(lambda: len(list(out.glob("trials/*/training/last.ckpt"))) == 2, driver)
    nodes.kill(nodes.nodes[0].node_id)
    code, _, errors = finish(driver)
    assert code == 0, errors
    alone = run_study(StudySpec(**form), tmp_path / "alone", progress=False)
    for one, other in zip(alone, load_results(out), strict=True):
        assert (one.spec, one.epochs, other.epochs) == (other.spec, 6, 6)
        assert other.scores == pytest.approx(one.scores, rel=1e-5)


@pytest.mark.slow
def test_a_budget_and_an_interrupt_end_a_search_which_then_goes_on(
    nodes: Nodes, reference: pd.DataFrame, spec: Path, tmp_path: Path
) -> None:
    nodes.fill()
    out = tmp_path / "out"
    arguments = ("search", spec, "--out", out, "--address", nodes.address)
    driver = start(*arguments)
    wait_for(lambda: any(evaluations(out).values()), driver)
    driver.send_signal(signal.SIGINT)
    code, _, errors = finish(driver)
    assert (code, errors.splitlines()[-1]) == (130, "interrupted")
    code, _, errors = finish(start(*arguments, "--set", "time_budget=1.0"))
    assert code == 1
    assert re.search(r"^error: \d of \d trials have no final score; run it again to try these again$", errors)
    code, _, errors = finish(start(*arguments))
    assert code == 0, errors
    assert_same(ranking(out), reference)
    for found in evaluations(out).values():
        assert [each["epochs"] for each in found] == [1, 2, 3, 4, 5]
