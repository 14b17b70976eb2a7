"""Command: kill a build again and again, and compare what it makes with an undisturbed one. `python benchmarks/build_chaos.py`

Comes in: a number of kills. Goes out: a line for each, and whether every file is the same; exit code 1 if one is not. Each is a
SIGKILL of one process, picked at random from the launcher, its agents, the ranks and their workers; then the build is started
again with other numbers of nodes, ranks and workers. A build that is complete before the next kill is compared and begun anew.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # as a script: this folder's modules are benchmarks.*, and shadow nobody else's

from cluster.processes import processes_with  # noqa: E402

# (nodes, ranks of each, workers of each rank); no nodes: the command without the launcher
FORMS = ((2, 2, 1), (0, 1, 4), (2, 1, 2), (1, 3, 1), (0, 1, 1), (1, 2, 2))
SMALL = [
    *("source=synthetic", "source.num_train=60", "source.num_validation=12", "source.num_frames=16", "source.image_size=64"),
    *("source.train_views=[center]", "features=patch", "features.num_fit_clips=4", "codec_fit_frames=16", "samples_per_shard=2"),
]
PATIENCE_S = 120.0


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)  # by kind of process
    completed: int = 0
    differing: list[str] = field(default_factory=list)  # files

    @property
    def identical(self) -> bool:
        return self.completed > 0 and not self.differing


def digests(out: Path) -> dict[str, str]:
    """sha256 of every file under `out`."""
    files = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Attempt:
    """One start of the build, and all processes that come of it."""

    def __init__(self, form: tuple[int, int, int], out: Path, folder: Path, settings: list[str]) -> None:
        nodes, ranks, workers = form
        words = [*settings, f"out={out}", f"workers={workers}"]
        self.name = f"{nodes} nodes x {ranks} ranks x {workers} workers" if nodes else f"{workers} workers"
        if nodes:
            head = ["cluster/launch.py", "--nodes", str(nodes), "--ranks-per-node", str(ranks), "--gpus-per-node", "0"]
            words = [*head, "--grace", "3", "--runs", str(folder / "runs"), "build-shards", *words]
        else:
            words = ["-m", "data_pipeline.build", *words]
        self._mark = {"BUILD_CHAOS": uuid.uuid4().hex}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | self._mark
        self.log = folder / "log.txt"
        with self.log.open("a") as log:
            self.process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)

    def kill_one(self, draw: random.Random) -> str:
        """SIGKILL to one of the processes; returns what it was."""
        alive = sorted(processes_with(self._mark))
        victim = draw.choice(alive) if alive else self.process.pid
        kind = kind_of(victim)
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return "process that had just ended"
        return kind

    def wait(self) -> int:
        """Until every process has ended by itself; returns the command's exit code."""
        code = self.process.wait(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while left := processes_with(self._mark):
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {left} are left of a build that has ended; see {self.log}")
            time.sleep(0.05)
        return code

    def end(self) -> None:
        for pid in processes_with(self._mark):
            os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)


def kind_of(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return "process that had just ended"
    kinds = {"launch.py": "launcher", "agent.py": "agent", "resource_tracker": "resource tracker", "spawn_main": "worker"}
    return next((kind for word, kind in kinds.items() if word in words), "rank")


def torment(kills: int, seed: int, folder: Path, settings: list[str], say: Callable[[str], None] = print) -> Tally:
    """Build undisturbed once, then under `kills` kills; compare every build that is completed."""
    draw, tally = random.Random(seed), Tally()
    serial = Attempt((0, 1, 1), folder / "serial", folder, settings)
    if serial.wait() != 0:
        raise RuntimeError(f"the undisturbed build failed; see {serial.log}")
    expected, out = digests(folder / "serial"), folder / "out"
    number = 0
    while sum(tally.kills.values()) < kills or number == 0 or out.exists():
        attempt = Attempt(FORMS[number % len(FORMS)], out, folder, settings)
        number += 1
        try:
            if sum(tally.kills.values()) < kills and _reach_a_moment(attempt, out, draw):
                kind = attempt.kill_one(draw)
                tally.kills[kind] += 1
                say(f"kill {sum(tally.kills.values())}: {kind} of {attempt.name}, {len(list(out.rglob('*.tar')))} shards done")
            code = attempt.wait()
        finally:
            attempt.end()
        if code == 0:
            tally.completed += 1
            found = digests(out)
            tally.differing += [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
            shutil.rmtree(out)
    return tally


def _reach_a_moment(attempt: Attempt, out: Path, draw: random.Random) -> bool:
    """Wait for a random moment: mostly while shards are made, else anywhere from the start on. False: the build was quicker."""
    before = set(out.rglob("*.json"))
    in_work = draw.random() < 0.75
    deadline = time.monotonic() + PATIENCE_S
    while in_work and set(out.rglob("*.json")) <= before and attempt.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(draw.uniform(0.0, 1.5 if in_work else 8.0))
    return attempt.process.poll() is None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/build_chaos.py", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="build_chaos_") as folder:
        tally = torment(options.kills, options.seed, Path(folder), SMALL, say=lambda line: print(line, flush=True))
    kinds = ", ".join(f"{count} {kind}" for kind, count in tally.kills.most_common())
    print(f"{sum(tally.kills.values())} kills ({kinds}) over {tally.completed} builds in {time.monotonic() - began:.0f} s")
    print("every file is identical to the undisturbed build's" if tally.identical else f"DIFFERENT: {tally.differing}")
    return 0 if tally.identical else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
