"""The local backend over hosts with links of their own (network namespaces): one job on several machines, cables that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.processes import kill_processes_with
from tests.integration.netns_hosts import NetnsHosts, require_netns
from tests.integration.tiny_run import applied_ids, arguments, make_shards, weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 90.0

# Says the size of its world, then waits to be told that all is done. Saves when asked.
WORKER = """
import json, os, signal, time
from pathlib import Path
run = Path(os.environ["SLOTSTREAM_RUN_DIR"])
signal.signal(signal.SIGUSR2, lambda *_: os._exit(75))
told = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")}
(run / f"told_{os.environ['SLOTSTREAM_ATTEMPT']}_{os.environ['RANK']}.json").write_text(json.dumps(told))
while not (run / "finish").exists():
    time.sleep(0.05)
"""


class Job:
    """A launcher that a test started, and its run folder."""

    def __init__(self, folder: Path, name: str, flags: list[str], words: list[str]) -> None:
        self.run = folder / "runs" / name
        self.console = folder / f"{name}.console"
        self.mark = {"NETNS_TEST": str(self.run)}
        command = [
            sys.executable,
            str(ROOT / "cluster" / "launch.py"),
            "--backend",
            "local",
            "--gpus-per-node",
            "0",
            "--grace",
            "5",
        ]
        environment = {**os.environ, **self.mark, "OMP_NUM_THREADS": "1"}
        with self.console.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--runs", str(self.run.parent), *flags, *words, f"name={name}"],
                stdout=output,
                stderr=output,
                env=environment,
            )

    def wait(self) -> None:
        assert self.process.wait(PATIENCE_S) == 0, self.console.read_text()

    def until(self, happens: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not happens():
            told = self.console.read_text()
            assert self.process.poll() is None, f"ended with {self.process.returncode} while waiting: {what}\n{told}"
            assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what}\n{told}\n{self.events()}"
            time.sleep(0.1)

    def events(self, kind: str | None = None) -> list[dict]:
        path = self.run / "events.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [event for event in found if kind in (None, event["event"])]

    def told(self, attempt: int) -> list[dict]:
        """What the workers of an attempt said, by rank."""
        return [json.loads(path.read_text()) for path in sorted(self.run.glob(f"told_{attempt}_*.json")) if path.stat().st_size]

    def worlds(self) -> list[int]:
        """World size of each attempt of which all workers are there."""
        attempts = sorted({int(path.name.split("_")[1]) for path in self.run.glob("told_*_0.json")})
        told = {attempt: self.told(attempt) for attempt in attempts}
        return [len(all_) for all_ in told.values() if all_ and len(all_) == int(all_[0]["WORLD_SIZE"])]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        kill_processes_with(self.mark)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def begin(name: str, flags: list[str], words: list[str]) -> Job:
        jobs.append(Job(tmp_path, name, flags, words))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.close()


@pytest.fixture
def hosts() -> Iterator[NetnsHosts]:
    require_netns()
    with NetnsHosts(4) as made:
        yield made


def across(hosts: NetnsHosts, nodes: int) -> list[str]:
    """Launcher flags that put each node on a host."""
    network = ["--wrap", hosts.wrap, "--listen", hosts.bridge_address, "--interface", "eth0"]
    return ["--nodes", str(nodes), *network]


def test_a_host_is_apart_until_its_cable_is_there(hosts: NetnsHosts) -> None:
    ask = f"import socket; socket.create_connection(({hosts.address(0)!r}, 7), 0.5)"

    def refused() -> bool:
        """Nobody listens on the port: an answer; silence is another error."""
        done = subprocess.run(hosts.command(1, sys.executable, "-c", ask), capture_output=True, text=True)
        return "ConnectionRefusedError" in done.stderr

    assert refused()
    hosts.cut(0)
    assert not refused()
    hosts.mend(0)
    hosts.delay(0, 20)
    assert refused()
    hosts.delay(0, 0)
    assert refused()


def test_hosts_are_gone_when_they_are_closed(hosts: NetnsHosts) -> None:
    def there() -> str:
        words = [["ip", "netns", "list"], ["ip", "-o", "link", "show"]]
        return "".join(subprocess.run(command, capture_output=True, text=True).stdout for command in words)

    with NetnsHosts(2) as more:
        assert more.prefix != hosts.prefix
        more.delay(1, 5)
        sleeper = subprocess.Popen(more.command(1, "sleep", "600"))
        assert more.prefix in there()
        time.sleep(0.2)
    assert sleeper.wait(10) != 0
    assert more.prefix[:-1] not in there()
    assert hosts.prefix in there()


def test_four_hosts_give_the_weights_of_one_and_the_far_one_is_named(
    start: Callable[..., Job], hosts: NetnsHosts, tmp_path: Path
) -> None:
    data, steps = make_shards(tmp_path / "data"), 40
    settings = ["parallel=reproducible", "data.lanes=2", f"optim.max_steps={steps}", "checkpoint.every_steps=20"]
    words = [word for word in arguments(data, tmp_path, "name", *settings)[2:] if not word.startswith(("runs=", "name="))]
    four = start("four", across(hosts, 4), words)
    four.until(lambda: (four.run / "order" / "rank0.jsonl").exists(), "the first step")
    hosts.delay(2, 40)
    four.until(lambda: four.events("straggler"), "the far host is noticed")
    hosts.delay(2, 0)
    found = four.events("straggler")[0]
    assert (found["cause"], found["node"]) == ("communication", 2), found
    four.wait()
    one = start("one", ["--nodes", "1"], words)
    one.wait()
    assert applied_ids(four.run, 4) == applied_ids(one.run, 1)
    theirs, ours = weights(four.run, steps), weights(one.run, steps)
    assert theirs.keys() == ours.keys()
    assert all((theirs[name] == ours[name]).all() for name in ours)


def test_a_cut_host_is_left_out_and_taken_back(start: Callable[..., Job], hosts: NetnsHosts, tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    flags = ["--min-nodes", "2", "--node-patience", "1", "--command", str(program)]
    job = start("cut", [*across(hosts, 3), *flags], [])
    job.until(lambda: job.worlds() == [3], "three workers")
    assert {told["MASTER_ADDR"] for told in job.told(1)} == {hosts.address(0)}
    assert {told["GLOO_SOCKET_IFNAME"] for told in job.told(1)} == {"eth0"}
    hosts.cut(0)  # the one that holds the rendezvous
    job.until(lambda: job.worlds() == [3, 2], "two workers go on")
    assert {told["MASTER_ADDR"] for told in job.told(2)} == {hosts.address(1)}
    assert [event["slot"] for event in job.events("lost")] == [0]
    hosts.mend(0)
    job.until(lambda: job.worlds() == [3, 2, 3], "three again")
    (job.run / "finish").touch()
    job.wait()
