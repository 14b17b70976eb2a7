"""The Ray backend on a real Ray of several nodes on this host: same results as the local backend, faults, drain, nothing left."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from cluster.backends.ray_started import StartedCluster
from cluster.config import LaunchConfig
from cluster.processes import processes_with
from tests.integration.tiny_run import applied_ids, arguments, make_shards, weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, str(ROOT / "cluster" / "launch.py")]
PATIENCE = 120.0
NODES = 4

# Says that it is there, then waits for a file.
WAIT = """
import os, signal, sys, time
from pathlib import Path
run, rank, attempt = Path(os.environ["SLOTSTREAM_RUN_DIR"]), os.environ["RANK"], os.environ["SLOTSTREAM_ATTEMPT"]
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
(run / f"new_{rank}").write_text(os.environ["WORLD_SIZE"])
(run / f"new_{rank}").rename(run / f"ready_{attempt}_{rank}")
while not (run / "go").exists():
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[StartedCluster]:
    before = dict(os.environ)
    started = StartedCluster(LaunchConfig(nodes=NODES, cpus_per_task=1, gpus_per_node=0))
    whole(started)
    yield started
    started.close()
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        os.environ.pop(name, None)
        os.environ.update({name: before[name]} if name in before else {})


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """A test that fails leaves no launcher behind."""
    yield
    while Launched.started:
        process = Launched.started.pop()
        process.kill()
        process.wait()


class Launched:
    """A launcher with the small waiting program as its job, unless another command is given."""

    started: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, folder: Path, *words: str, command: str = "") -> None:
        program = folder / "program.py"
        program.write_text(WAIT)
        self.run = folder / "runs" / "run"
        self.errors = folder / "launch.err"
        line = [*LAUNCH, "--backend", "ray", "--runs", str(folder / "runs"), "--command", command or str(program), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.errors.open("w") as stream:
            self.process = subprocess.Popen(line, stdout=stream, stderr=stream, env=environment, start_new_session=True)
        self.started.append(self.process)

    def wait_for(self, attempt: int, ranks: int) -> None:
        self.until(lambda: all((self.run / f"ready_{attempt}_{rank}").exists() for rank in range(ranks)), f"attempt {attempt}")

    def until(self, true: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert self.process.poll() is None, f"{what}: launcher ended\n{self.errors.read_text()}"
            assert time.monotonic() < deadline, f"{what}\n{self.errors.read_text()}"
            time.sleep(0.05)

    def end(self, code: int = 0) -> str:
        try:
            found = self.process.wait(PATIENCE)
        finally:
            self.process.kill()
        assert found == code, self.errors.read_text()
        return self.errors.read_text()

    def go(self) -> str:
        (self.run / "go").touch()
        return self.end()

    def agents(self, attempt: int = 1) -> list[dict[str, Any]]:
        return json.loads((self.run / "attempts" / str(attempt) / "launch.json").read_text())["agents"]

    def pid(self, victim: str, slot: int, attempt: int = 1) -> int:
        """Process id of a node's agent, of its rank, of the actor above it or of the raylet above that."""
        agent = self.agents(attempt)[slot]["pid"]
        if victim == "rank":
            events = (self.run / "attempts" / str(attempt) / f"node_{slot}.jsonl").read_text().splitlines()
            return int(next(iter(json.loads(events[0])["pids"].values())))
        return {"agent": agent, "actor": parent(agent), "raylet": parent(parent(agent))}[victim]

    def world(self, attempt: int) -> int:
        return int((self.run / f"ready_{attempt}_0").read_text())

    def left(self) -> list[int]:
        return processes_with({"SLOTSTREAM_RUN_DIR": str(self.run)})


def parent(pid: int) -> int:
    return int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def whole(cluster: StartedCluster) -> None:
    """All nodes there again, for the next test."""
    deadline = time.monotonic() + PATIENCE
    program = (
        "import ray, sys, time, logging\n"
        f"ray.init(address={cluster.address!r}, log_to_driver=False, logging_level=logging.ERROR)\n"
        "from ray._private.state import state\n"
        f"while sum(n['Alive'] and n['NodeID'] not in state.get_draining_nodes() for n in ray.nodes()) < {NODES + 1}:\n"
        "    time.sleep(0.1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as counting:
        while counting.poll() is None and time.monotonic() < deadline:
            cluster.mend()  # on a busy machine a node may need more than the time that Ray gives it to start
            time.sleep(0.5)
        counting.kill()
    assert counting.returncode == 0


def on(cluster: StartedCluster, *words: str) -> list[str]:
    return ["--address", cluster.address, "--node-patience", "60", *words]


def test_order_and_weights_equal_those_of_the_local_backend_also_after_a_raylet_was_killed(cluster, tmp_path):
    data = make_shards(tmp_path / "data")
    runs = {}
    for backend in ("local", "ray"):
        words = ["--nodes", "3", *(on(cluster) if backend == "ray" else ["--backend", "local"])]
        extra = ("optim.max_steps=10",)
        job = arguments(data, tmp_path / backend, "run", *extra)
        (tmp_path / backend).mkdir()
        launched = Launched(tmp_path / backend, *words, "--runs", str(tmp_path / backend), command=" ".join(job))
        runs[backend] = tmp_path / backend / "run"
        launched.run = runs[backend]
        if backend == "ray":
            launched.until(lambda: list((runs["ray"] / "checkpoints").glob("step_*/manifest.json")), "a checkpoint")
            os.kill(launched.pid("raylet", 1), signal.SIGKILL)
        launched.end()
    assert len(list((runs["ray"] / "attempts").glob("[0-9]*"))) > 1  # it was in the middle of the run
    assert applied_ids(runs["ray"], 3) == applied_ids(runs["local"], 3)
    for name, value in weights(runs["local"], 10).items():
        np.testing.assert_allclose(weights(runs["ray"], 10)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    whole(cluster)


def test_what_is_killed_is_replaced_until_the_run_is_done(cluster, tmp_path):
    launched = Launched(tmp_path, *on(cluster, "--nodes", "3"))
    launched.wait_for(1, 3)
    for attempt, victim in enumerate(("rank", "agent", "actor", "raylet"), start=1):
        os.kill(launched.pid(victim, 1, attempt), signal.SIGKILL)
        launched.wait_for(attempt + 1, 3)
        assert launched.world(attempt + 1) == 3
    launched.go()
    assert not launched.left()
    whole(cluster)


def test_goes_on_with_fewer_nodes_when_no_other_is_there(cluster, tmp_path):
    launched = Launched(tmp_path, *on(cluster, "--nodes", "4", "--min-nodes", "3", "--node-patience", "3"))
    launched.wait_for(1, 4)
    os.kill(launched.pid("raylet", 2), signal.SIGKILL)
    launched.wait_for(2, 3)
    assert launched.world(2) == 3
    launched.go()
    whole(cluster)


def test_a_draining_node_is_left_with_a_save(cluster, tmp_path):
    launched = Launched(tmp_path, *on(cluster, "--nodes", "3"))
    launched.wait_for(1, 3)
    raylet = launched.pid("raylet", 0)
    node = re.search(rb"--node-id=(\w+)|--node_id=(\w+)", Path(f"/proc/{raylet}/cmdline").read_bytes())
    assert node is not None
    drained = (node[1] or node[2]).decode()
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", "600"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id", drained]
    subprocess.run([*ray, *reason], check=True, capture_output=True)
    launched.wait_for(2, 3)
    assert "drained" in launched.errors.read_text()
    assert raylet not in {parent(parent(agent["pid"])) for agent in launched.agents(2)}
    verdict = json.loads((launched.run / "attempts" / "1" / "verdict.json").read_text())
    assert verdict["outcome"] == "requeue", verdict
    launched.go()
    if Path(f"/proc/{raylet}").exists():  # Ray ends it when it is idle
        os.kill(raylet, signal.SIGKILL)
    whole(cluster)


def test_more_nodes_than_there_are_is_said_with_what_is_there(cluster, tmp_path):
    said = Launched(tmp_path, *on(cluster, "--nodes", "9", "--start-timeout", "2")).end(2)
    assert "--nodes 9" in said and f"{NODES} nodes" in said and "Traceback" not in said
    assert not (tmp_path / "runs" / "run" / "attempts").exists()


def test_an_address_without_a_ray_is_one_line(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = Launched(tmp_path, "--address", f"127.0.0.1:{port}").end(2)
    assert len(said.splitlines()) == 1 and f"127.0.0.1:{port}" in said
    said = Launched(tmp_path, "--address", "ray://127.0.0.1:10001").end(2)
    assert len(said.splitlines()) == 1 and "HOST:PORT" in said


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_cluster_of_our_own_leaves_nothing(tmp_path, how):
    launched = Launched(tmp_path, "--nodes", "1", "--cpus-per-task", "1")
    launched.wait_for(1, 1)
    raylet = launched.pid("raylet", 0)
    session = int(Path(f"/proc/{raylet}/stat").read_text().rpartition(")")[2].split()[3])
    folder = Path(re.search(rb"(/tmp/ss-ray-[^/\0]+)", Path(f"/proc/{raylet}/cmdline").read_bytes())[1].decode())
    launched.process.send_signal(how)
    launched.process.wait(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while (found := launched.left() + processes_of(session, str(folder))) or folder.exists():
        assert time.monotonic() < deadline, (found, folder.exists())
        time.sleep(0.1)


def processes_of(session: int, folder: str) -> list[int]:
    """Living processes of a session, or with the folder's name in their words."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if state != "Z" and (int(its) == session or folder.encode() in (entry / "cmdline").read_bytes()):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
