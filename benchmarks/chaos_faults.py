"""The faults of the soak: a living Run in, one thing broken (and, where a person would, mended later).

Each fault is a function (run, draw) that returns what it did. A fault that lasts returns only when it is over, so that the run
has to live through it unattended.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.chaos_run import DISK, Run, read_proc

HELD_S = (4.0, 14.0)  # how long a disk stays full or a Slurm node away
CUT_S = (3.0, 35.0)  # how long a link stays down: TCP alone gets over it, or the node is lost, or the run goes on with fewer
LIVING_S = 120.0
AGAIN_S = (0.5, 12.0)  # when the second blow falls: anywhere in a restart

Doing = Callable[[Run, random.Random], str]


@dataclass(frozen=True)
class Fault:
    do: Doing
    restarts: bool = True  # False: the run may live through it without a new attempt
    needs: str = ""  # hosts: links to cut; disk: a small one; local, slurm, ray: that backend


def kill_rank(run: Run, draw: random.Random, by: signal.Signals = signal.SIGKILL) -> str:
    rank, pid = draw.choice(sorted(_living(run, run.ranks).items()))
    os.kill(pid, by)
    return f"rank {rank}"


def kill_agent(run: Run, draw: random.Random, by: signal.Signals = signal.SIGKILL) -> str:
    agents = _living(run, run.agents)
    number = draw.randrange(len(agents))
    os.kill(agents[number], by)
    return f"agent {number + 1} of {len(agents)}"


def kill_launcher(run: Run, draw: random.Random) -> str:
    """Then the command is given again until it is taken, as a user's cron would: agents of the old one may live for a while."""
    assert run.process is not None
    run.process.kill()
    run.process.wait()
    tries, deadline = 0, time.monotonic() + 60
    while time.monotonic() < deadline:
        tries += 1
        run.start()
        attempt, settled = run.attempt(), time.monotonic() + 5
        while run.exit_code() is None and run.attempt() == attempt and time.monotonic() < settled:
            time.sleep(0.1)
        if run.exit_code() is None:
            break
        time.sleep(0.5)
    return f"given again, taken at try {tries}"


def kill_twice(run: Run, draw: random.Random) -> str:
    first = kill_rank(run, draw)
    time.sleep(draw.uniform(*AGAIN_S))
    ranks = run.ranks()
    return f"{first}, then {kill_rank(run, draw)} under way" if ranks else f"{first}, then nothing to kill"


def cut_link(run: Run, draw: random.Random) -> str:
    hosts = run.place.hosts
    assert hosts is not None
    host, seconds = draw.randrange(hosts.count), draw.uniform(*CUT_S)
    hosts.cut(host)
    time.sleep(seconds)
    hosts.mend(host)
    return f"host {host} for {seconds:.0f} s"


def fill_disk(run: Run, draw: random.Random) -> str:
    """Full up to a random rest, so that a save fails at a random byte; freed after a while."""
    newest = run.newest_checkpoint()
    size = sum(path.stat().st_size for path in newest.iterdir()) if newest else 100_000
    rest, seconds = draw.randrange(size), draw.uniform(*HELD_S)
    ballast = run.checkpoints / ".ballast"
    with ballast.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"\1" * 65536)
        except OSError:
            stream.truncate(max(0, stream.tell() - rest))
    time.sleep(seconds)
    ballast.unlink()
    return f"{rest} bytes free of {DISK} for {seconds:.0f} s"


def truncate_newest(run: Run, draw: random.Random) -> str:
    path = _file_of_newest(run, draw)
    size = path.stat().st_size
    os.truncate(path, cut := draw.randrange(size))
    return f"{path.parent.name}/{path.name} {size} -> {cut} bytes; {kill_rank(run, draw)}"


def flip_newest(run: Run, draw: random.Random) -> str:
    path = _file_of_newest(run, draw)
    at = draw.randrange(path.stat().st_size)
    _flip(path, [at])
    return f"{path.parent.name}/{path.name} byte {at}; {kill_rank(run, draw)}"


def delete_of_newest(run: Run, draw: random.Random) -> str:
    path = _file_of_newest(run, draw)
    path.unlink()
    return f"{path.parent.name}/{path.name}; {kill_rank(run, draw)}"


def damage_shard(run: Run, draw: random.Random) -> str:
    """Bytes all over a shard in the cache, then a restart, so that it is opened anew."""
    path = draw.choice(sorted(run.cache.rglob("*.tar")))
    size = path.stat().st_size
    _flip(path, [draw.randrange(size) for _ in range(200)])
    return f"200 bytes of {path.name[:8]}...tar; {kill_rank(run, draw)}"


def _job(run: Run) -> str:
    return run.place.slurm.run("squeue", "--noheader", "--states=RUNNING", "--format=%i").split()[0]


def kill_slurm_node(run: Run, draw: random.Random) -> str:
    """Its slurmd and its ranks are gone at once; after a while the node is there again."""
    cluster = run.place.slurm
    names = cluster.run("squeue", "--noheader", "--states=RUNNING", "--format=%N").split()[0]
    node = draw.choice(cluster.run("scontrol", "show", "hostnames", names).split())
    seconds = draw.uniform(*HELD_S)
    cluster.kill_node(node)
    time.sleep(seconds)
    cluster.start_slurmd(node)
    return f"{node} for {seconds:.0f} s"


def requeue(run: Run, draw: random.Random) -> str:
    run.place.slurm.run("scontrol", "requeue", job := _job(run))
    return f"job {job}"


def save_signal(run: Run, draw: random.Random) -> str:
    """As sbatch --signal sends it before the time limit."""
    run.place.slurm.run("scancel", "--signal=USR2", job := _job(run))
    return f"job {job}"


def kill_raylet(run: Run, draw: random.Random) -> str:
    """Of a node, not of the head: a cluster without its head is no cluster any more."""
    found = [pid for pid in run.left() if b"raylet/raylet" in (line := read_proc(pid, "cmdline")) and b"--head" not in line]
    os.kill(pid := draw.choice(found), signal.SIGKILL)
    return f"process {pid}, one of {len(found)}"


def _living(run: Run, found: Callable[[], Any]) -> Any:
    """Ranks or agents; between two attempts, those of the next."""
    run.until(found, "somebody lives", LIVING_S)
    return found()


def _file_of_newest(run: Run, draw: random.Random) -> Path:
    """Once an older one is there to fall back on: without it a run is right to refuse."""
    run.until(lambda: len(list(run.checkpoints.glob("step_*[0-9]"))) > 1, "two checkpoints are there", LIVING_S)
    newest = run.newest_checkpoint()
    assert newest is not None
    return draw.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))


def _flip(path: Path, places: list[int]) -> None:
    with path.open("r+b") as stream:
        for at in places:
            stream.seek(at)
            byte = stream.read(1)[0]
            stream.seek(at)
            stream.write(bytes([byte ^ 0x10]))


FAULTS: dict[str, Fault] = {
    "kill -9 of a rank": Fault(kill_rank),
    "kill -9 of an agent": Fault(kill_agent),
    "kill -9 of the launcher": Fault(kill_launcher, needs="local"),
    "kill -9, again while restarting": Fault(kill_twice),
    "SIGSTOP of a rank": Fault(partial(kill_rank, by=signal.SIGSTOP)),
    "SIGSTOP of an agent": Fault(partial(kill_agent, by=signal.SIGSTOP)),
    "link down": Fault(cut_link, restarts=False, needs="hosts"),
    "disk full": Fault(fill_disk, restarts=False, needs="disk"),
    "newest checkpoint truncated": Fault(truncate_newest),
    "newest checkpoint flipped": Fault(flip_newest),
    "newest checkpoint lacks a file": Fault(delete_of_newest),
    "shard in the cache damaged": Fault(damage_shard),
    "slurm: node without power": Fault(kill_slurm_node, needs="slurm"),
    "slurm: requeue": Fault(requeue, needs="slurm"),
    "slurm: SIGUSR2": Fault(save_signal, needs="slurm"),
    "ray: raylet killed": Fault(kill_raylet, needs="ray"),
}
