"""Ray clusters: connecting to one, checking its nodes before anything runs on them, and the cells of a study there.

Ray is imported within functions, so that all else works without it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_atomically
from ..processes import keeping_handler, scratch
from .baselinespec import BASELINE
from .identity import base_fingerprint
from .spec import TrialResult, TrialSpec
from .strict import SpecError

if TYPE_CHECKING:
    from ..networks import Networks
    from .grid import Executor

__all__ = ["ClusterError", "check_nodes", "code_versions", "connected", "on_ray", "room", "shared_folder"]

# A node that has not answered by then, importing torch included, is not fit for a search.
_PATIENCE = 300.0
_RESTARTS = 3


class ClusterError(SpecError):
    """A Ray cluster cannot run the trials; the message lists its nodes and their faults."""


@lru_cache(maxsize=1)
def _token() -> str:
    # Ray reads it once a process, so that it must not change.
    return secrets.token_hex(32)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that are not set, for the time of the context."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _auth(address: str | None) -> dict[str, str]:
    """Return Ray's settings of authentication, which it would otherwise choose by what it finds."""
    token = {"RAY_AUTH_TOKEN": _token()} if address is None else {}
    if "ray" in sys.modules:
        # It has read the mode when it was imported, and asks for a token wherever there is one.
        return token
    named = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    stored = (Path("~").expanduser() / ".ray" / "auth_token").is_file()
    return {"RAY_AUTH_MODE": "token" if token or named or stored else "disabled", **token}


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster for the time of the context.

    Parameters
    ----------
    address
        ``"auto"``, ``"host:port"`` or ``"ray://..."``. None takes ``RAY_ADDRESS`` of the environment, or starts Ray on
        this machine, with a token of its own and files below ``RAY_TMPDIR`` or the system's folder for such, which are
        deleted at the end. Where Ray is connected already, that connection is used and kept.

    Raises
    ------
    ClusterError
        If there is no such cluster, or Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("optuna") is None:
        raise ClusterError("Ray", ["it is not installed; pip install 'gluonts-peft[ray]'"])
    address = address or os.environ.get("RAY_ADDRESS")
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Trials are identified by their results; the rest is for those who open the folder with Ray's own tools.
        "TUNE_GLOBAL_CHECKPOINT_S": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        **_auth(address),
    }
    with _environment(settings):
        import ray

        if ray.is_initialized():
            yield
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is not None:
            try:
                _knock(address)
                with keeping_handler(signal.SIGTERM):
                    ray.init(address=address, **quiet)
            except (OSError, RuntimeError, ValueError) as error:
                first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ClusterError(f"Ray cluster {address!r}", [f"it does not answer: {first}"]) from error
            try:
                yield
            finally:
                ray.shutdown()
            return
        # Sockets lie there, and their paths must be short.
        with scratch("ray-", os.environ.get("RAY_TMPDIR")) as folder:
            try:
                # Ray's own handler would end the process with exit code 15.
                with keeping_handler(signal.SIGTERM):
                    ray.init(include_dashboard=False, object_store_memory=200_000_000, _temp_dir=str(folder), **quiet)
                yield
            finally:
                ray.shutdown()


def _knock(address: str) -> None:
    """Make sure that somebody listens at host:port: Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=30).close()


def shared_folder(folder: str | Path) -> Path:
    """Return a folder that can be named to other nodes.

    Raises
    ------
    ClusterError
        If it is relative: nodes have other working directories.
    """
    if not Path(folder).is_absolute():
        raise ClusterError(
            f"folder '{folder}'",
            [f"it is relative, and nodes have other working directories; name an absolute path, as {Path.cwd()}/..."],
        )
    return Path(folder)


def room(resources: Mapping[str, float]) -> int:
    """Return how many trials the nodes have room for at once, whatever else runs on them."""
    return sum(_fits(node["Resources"], resources) for node in _nodes())


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _fits(there: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    # A sum of fractions of a GPU may miss the whole by the last digit.
    return min(int(there.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items() if amount)


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def check_nodes(folder: Path, trials: Iterable[TrialSpec], resources: Mapping[str, float]) -> None:
    """Make sure that every node that a trial can come to can run it.

    Each is asked by a task that is pinned to it: whether it sees the folder and is seen to write there, has the same
    versions, the same data, and the same checkpoints. Nodes that join later are not asked.

    Parameters
    ----------
    folder
        Where results go.
    trials
        What is to run; their data and checkpoints are looked at, each once.
    resources
        ``"CPU"`` and ``"GPU"`` of a trial.

    Raises
    ------
    ClusterError
        With all nodes that are not fit and why, or if a trial fits on none.
    """
    nodes = _nodes()
    fitting = [node for node in nodes if _fits(node["Resources"], resources)]
    wanted = _amounts(resources)
    if not fitting:
        have = [f"{_name(node)} has {_amounts(node['Resources'])}" for node in nodes]
        raise ClusterError(
            "Ray cluster",
            [
                f"a trial takes {wanted}, which no node ever has: {'; '.join(have) or 'there is none'}. Ask for less,"
                " or start a node that has it; a cluster that grows by itself needs one of the kind to begin with"
            ],
        )
    expected = _expected(list(trials))
    probes = folder / "ray" / "probe"
    shutil.rmtree(probes, ignore_errors=True)
    mark = secrets.token_hex(8)
    write_atomically(probes / "driver", mark)
    faults = _ask(fitting, str(probes), mark, json.dumps(expected))
    shutil.rmtree(probes, ignore_errors=True)
    if faults:
        raise ClusterError("Ray cluster", faults)


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _ask(nodes: list[dict[str, Any]], probes: str, mark: str, expected: str) -> list[str]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # The file that a node writes must be seen from here: it is read back by its name.
    task = ray.remote(num_cpus=0, max_retries=0)(_probe)
    pending = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            probes, mark, node["NodeID"], expected
        ): node
        for node in nodes
    }
    done, silent = ray.wait(list(pending), num_returns=len(pending), timeout=_PATIENCE)
    faults = [f"{_name(pending[each])} has not answered within {_PATIENCE:g} seconds" for each in silent]
    for each in done:
        node = pending[each]
        try:
            found = ray.get(each)
        except Exception as error:
            found = [_last_line(error)]
        if not found and not _reads(Path(probes) / node["NodeID"], mark):
            found = [f"what it writes to '{Path(probes).parents[1]}' does not arrive here: the folder is not shared"]
        faults += [f"{_name(node)}: {fault}" for fault in found]
    return sorted(faults)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _reads(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def _expected(trials: list[TrialSpec]) -> dict[str, Any]:
    """Return what must be the same everywhere, as it is here."""
    from .data import load_data

    relative = {
        f"data.{name} '{path}' is relative"
        for trial in trials
        for data in (trial.data, *trial.also.values())
        for name, path in data.paths().items()
        if not Path(path).is_absolute()
    }
    kinds = {(trial.family, trial.checkpoint): _kind(trial) for trial in trials if trial.family != BASELINE}
    relative |= {
        f"checkpoint '{name}' is a relative path"
        for (_, name), kind in kinds.items()
        if kind == "folder" and not Path(name).expanduser().is_absolute()
    }
    if relative:
        raise ClusterError(
            "Ray cluster", [f"{fault}, and nodes have other working directories; name it in full" for fault in relative]
        )
    data = {each.model_dump_json(): each for trial in trials for each in (trial.data, *trial.also.values())}
    return {
        "versions": code_versions(trials),
        "data": [[text, load_data(each).fingerprint] for text, each in data.items()],
        # Bundled ones are the same where the versions are.
        "bases": [[*base, base_fingerprint(*base)] for base, kind in sorted(kinds.items()) if kind != "bundled"],
    }


def _kind(trial: TrialSpec) -> str:
    from ..checkpoint import parse
    from ..registry import get_estimator

    return parse(trial.checkpoint, bundled=get_estimator(trial.family).backbone_class.bundled()).kind


def code_versions(trials: Iterable[TrialSpec]) -> dict[str, str]:
    """Return the versions of all that decides the numbers of some trials, plug-ins of adapters and sources included."""
    from ..adapters.base import versions
    from ..registry import adapters, datasets, families

    trials = list(trials)
    parts = [
        part for trial in trials for part in (trial.adapter if isinstance(trial.adapter, list) else [trial.adapter])
    ]
    used = {part if isinstance(part, str) else part["name"] for part in parts}
    found = {e.distribution: e.version for e in adapters.describe() if e.name in used}
    found |= {e.distribution: e.version for e in families.describe() if e.name in {t.family for t in trials}}
    sources = {data.source for trial in trials for data in (trial.data, *trial.also.values())}
    found |= {e.distribution: e.version for e in datasets.describe() if e.name in sources}
    return {**versions(), **found}


def _probe(probes: str, mark: str, node: str, expected_text: str) -> list[str]:
    """Return the faults of the node that this runs on."""
    expected = json.loads(expected_text)
    folder = Path(probes).parents[1]
    if not _reads(Path(probes) / "driver", mark):
        return [f"it does not see what lies in '{folder}': the folder is not shared; mount it there, or name another"]
    try:
        write_atomically(Path(probes) / node, mark)
    except OSError as error:
        return [f"it cannot write to '{folder}': {error.strerror}"]
    from importlib.metadata import PackageNotFoundError, version

    faults = []
    for name, here in expected["versions"].items():
        try:
            there = version(name)
        except PackageNotFoundError:
            faults.append(f"{name} is not installed, the driver has {here}")
            continue
        if there != here:
            faults.append(f"{name} is {there}, the driver has {here}")
    if faults:
        return faults
    from .data import load_data
    from .dataspec import DataSpec

    for text, fingerprint in expected["data"]:
        data = DataSpec(**json.loads(text))
        try:
            found = load_data(data).fingerprint
        except (OSError, ValueError) as error:
            faults.append(f"data of source {data.source!r} cannot be read: {error}")
            continue
        if found != fingerprint:
            where = "".join(f" ({name} {path!r})" for name, path in data.paths().items())
            faults.append(f"data of source {data.source!r}{where} differ from the driver's")
    for family, name, fingerprint in expected["bases"]:
        try:
            found = base_fingerprint(family, name)
        except (OSError, ValueError) as error:
            faults.append(f"checkpoint {name!r} of family {family!r} cannot be read: {error}")
            continue
        if found != fingerprint:
            faults.append(f"checkpoint {name!r} of family {family!r} has other weights than the driver's")
    return faults


@cache
def _networks() -> Networks:
    """Return the networks of this worker process, in which Ray runs one trial after another."""
    from ..networks import Networks

    return Networks()


def quiet_worker(cpus: float) -> Networks:
    """Set the threads of a worker process and silence what each trial would repeat; return the networks to share."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS") or cpus)))
    logging.getLogger("gluonts_peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Using `json`-module for json-handling")
    return _networks()


def whereabouts() -> dict[str, Any]:
    """Return which node and process this is; without Ray there are no nodes."""
    ray = sys.modules.get("ray")
    return {
        "node": ray.get_runtime_context().get_node_id() if ray is not None and ray.is_initialized() else None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def on_ray(address: str | None = None, *, cpu: float = 1, gpu: float = 0) -> Executor:
    """Return an executor for :func:`gluonts_peft.trials.run_study` that runs the cells on the nodes of a Ray cluster.

    A cell whose node or process dies is run again, from its last epoch; one that dies four times fails alone.

    Parameters
    ----------
    address
        See :func:`connected`.
    cpu, gpu
        What a cell takes of a node.

    Raises
    ------
    ClusterError
        When the study starts: if the folder is relative, or a node is not fit.
    """
    resources = {"CPU": cpu, "GPU": gpu}

    def execute(
        todo: list[TrialSpec], folder: Path, show: Callable[[list[TrialSpec]], None]
    ) -> Generator[TrialResult, None, None]:
        shared_folder(folder)
        if not todo:
            return
        with connected(address):
            check_nodes(folder, todo, resources)
            yield from _cells(todo, folder, show, resources)

    return execute


def _cells(
    todo: list[TrialSpec], folder: Path, show: Callable[[list[TrialSpec]], None], resources: Mapping[str, float]
) -> Generator[TrialResult, None, None]:
    import ray

    from .grid import failed_cell

    task = ray.remote(num_cpus=resources["CPU"], num_gpus=resources["GPU"], max_retries=_RESTARTS)(_cell)
    waiting = deque(todo)
    running: dict[Any, TrialSpec] = {}
    while waiting or running:
        # Not all at once, so that the bar shows what runs; one more than there is room for keeps the nodes busy.
        while waiting and len(running) <= room(resources):
            trial = waiting.popleft()
            running[task.remote(trial.model_dump_json(), str(folder), resources["CPU"])] = trial
        show(list(running.values()))
        (done,), _ = ray.wait(list(running), num_returns=1)
        trial = running.pop(done)
        try:
            yield TrialResult(**json.loads(ray.get(done)))
        except ray.exceptions.RayError as error:
            yield failed_cell(trial, folder, f"its processes died {_RESTARTS + 1} times: {_last_line(error)}")


def _cell(spec: str, folder: str, cpus: float) -> str:
    from .grid import run_cell

    networks = quiet_worker(cpus)
    return run_cell(TrialSpec(**json.loads(spec)), Path(folder), networks).model_dump_json()
