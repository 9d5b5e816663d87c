"""The cluster files: checked offline, by Ray's own schema where there is one."""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ray = pytest.importorskip("ray")
jsonschema = pytest.importorskip("jsonschema")

CLUSTERS = Path(__file__).parents[2] / "ray_configs" / "clusters"

STRING = {"type": "string", "minLength": 1}
AMOUNTS = {"type": "object", "additionalProperties": STRING}
CONTAINER = {
    "type": "object",
    "required": ["name", "image"],
    "additionalProperties": False,
    "properties": {
        "name": STRING,
        "image": STRING,
        "env": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "additionalProperties": False,
                "properties": {
                    "name": STRING,
                    "value": STRING,
                    "valueFrom": {
                        "type": "object",
                        "required": ["secretKeyRef"],
                        "additionalProperties": False,
                        "properties": {
                            "secretKeyRef": {
                                "type": "object",
                                "required": ["name", "key"],
                                "additionalProperties": False,
                                "properties": {"name": STRING, "key": STRING},
                            }
                        },
                    },
                },
            },
        },
        "ports": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["containerPort"],
                "additionalProperties": False,
                "properties": {"name": STRING, "containerPort": {"type": "integer"}},
            },
        },
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"requests": AMOUNTS, "limits": AMOUNTS},
        },
        "volumeMounts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "mountPath"],
                "additionalProperties": False,
                "properties": {"name": STRING, "mountPath": STRING},
            },
        },
    },
}
POD = {
    "type": "object",
    "required": ["spec"],
    "additionalProperties": False,
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "additionalProperties": False,
            "properties": {
                "containers": {"type": "array", "minItems": 1, "items": CONTAINER},
                "volumes": {"type": "array", "items": {"type": "object", "required": ["name"]}},
            },
        }
    },
}
GROUP = {
    "type": "object",
    "required": ["rayStartParams", "template"],
    "additionalProperties": False,
    # The operator takes strings only.
    "properties": {"rayStartParams": {"type": "object", "additionalProperties": STRING}, "template": POD},
}
#: The fields of a RayJob of ray.io/v1 that the file uses, with their types in the custom resource definition.
RAY_JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["entrypoint", "rayClusterSpec"],
            "additionalProperties": False,
            "properties": {
                "entrypoint": STRING,
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer"},
                "backoffLimit": {"type": "integer"},
                "rayClusterSpec": {
                    "type": "object",
                    "required": ["headGroupSpec"],
                    "additionalProperties": False,
                    "properties": {
                        "rayVersion": STRING,
                        "headGroupSpec": GROUP,
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {
                                **GROUP,
                                "required": [*GROUP["required"], "groupName"],
                                "properties": {
                                    **GROUP["properties"],
                                    "groupName": STRING,
                                    "replicas": {"type": "integer"},
                                    "minReplicas": {"type": "integer"},
                                    "maxReplicas": {"type": "integer"},
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


def launcher(name: str) -> dict[str, Any]:
    form: dict[str, Any] = yaml.safe_load((CLUSTERS / name).read_text())
    return form


def check(form: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(form)))


@pytest.mark.parametrize("name", ["local.yaml", "aws.yaml", "gcp.yaml"])
def test_the_launcher_takes_the_file(name: str) -> None:
    form = launcher(name)
    check(form)
    wrong = {**form, "max_workrs": 3}
    with pytest.raises(jsonschema.ValidationError, match="max_workrs"):
        check(wrong)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_trials_run_on_workers_of_which_one_is_always_there(name: str) -> None:
    kinds = launcher(name)["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["worker"]["min_workers"] >= 1


@pytest.mark.parametrize("name", ["local.yaml", "aws.yaml", "gcp.yaml", "kuberay.yaml", "nodes.sh"])
def test_every_file_says_how_to_run_it_and_sets_authentication_and_telemetry(name: str) -> None:
    text = (CLUSTERS / name).read_text()
    assert "gluonts-peft search" in text
    assert "RAY_AUTH_MODE" in text
    assert "RAY_USAGE_STATS_ENABLED" in text


def test_the_job_has_the_fields_of_a_ray_job() -> None:
    form = launcher("kuberay.yaml")
    jsonschema.validate(form, RAY_JOB)
    cluster = form["spec"]["rayClusterSpec"]
    assert re.match(r"gluonts-peft search /shared/\S+ --out /shared/\S+ --address auto$", form["spec"]["entrypoint"])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}
    for wrong in (
        ("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"),
        ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "ports", 0, "containerPort"),
    ):
        broken = copy.deepcopy(form)
        place = broken
        for step in wrong[:-1]:
            place = place[step]
        place[wrong[-1]] = 0 if isinstance(place[wrong[-1]], str) else "0"
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, RAY_JOB)


def test_the_script_says_what_is_wrong() -> None:
    script = str(CLUSTERS / "nodes.sh")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    for arguments in ((), ("head",), ("worker", "127.0.0.1")):
        done = subprocess.run([script, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert "ray_configs/clusters/nodes.sh head 192.168.0.10" in done.stderr


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 1100
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


ALIVE = """
import sys
from gluonts_peft.trials.cluster import connected, room
with connected(sys.argv[1]):
    print(room({"CPU": 1.0}))
"""


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_script_starts_a_cluster_and_takes_it_down() -> None:
    script = str(CLUSTERS / "nodes.sh")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = tempfile.mkdtemp(prefix="r", dir="/tmp")
    environment = {
        **os.environ,
        "PORT": str(port),
        "PYTHON": sys.executable,
        "TMPDIR": place,
        "RAY_AUTH_TOKEN": "1" * 64,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
    }

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        small = f"--object-store-memory={80 * 2**20}"
        return subprocess.Popen(
            [script, *arguments, small], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def rooms() -> str:
        done = subprocess.run(
            [sys.executable, "-c", ALIVE, f"127.0.0.1:{port}"], capture_output=True, text=True, env=environment
        )
        return done.stdout.strip()

    processes = [start("head", "127.0.0.1")]
    try:
        wait_for(lambda: rooms() == "0")
        processes += [start("node", "127.0.0.1", f"--num-cpus={count}") for count in (1, 2)]
        wait_for(lambda: rooms() == "3")
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=1100)
        assert list(Path(place).iterdir()) == []
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(place, ignore_errors=True)
