"""Command: start and stop the launcher again and again, and count what it leaves behind. `python -m benchmarks.starts`

Comes in: a number of starts. Goes out: a table by kind of ending (exit codes, seconds until nothing was left) and the counts of
processes, locks and temporary files left. Exit code 1 when anything is left. The ranks are small programs with a helper in the
rank's group and one that left it; all starts share one run folder, so that a lock that stays would stop the next one.
"""

from __future__ import annotations

import argparse
import os
import random
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
    sys.path[0] = str(ROOT)  # as a script: this folder's modules are benchmarks.*

from cluster.processes import kill_processes_with, processes_with  # noqa: E402

PATIENCE_S = 60.0
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
for detached in (False, True):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=detached)
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
signal.signal(signal.SIGUSR2, lambda *_: os._exit(75))
folder = Path(os.environ["STARTS_FOLDER"])
(folder / f"ready_{os.environ['RANK']}_{os.getpid()}").touch()
while not (folder / "finish").exists():
    time.sleep(0.02)
"""


class Start:
    """One start of the launcher and all processes that come of it."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.signals = folder / f"signals_{uuid.uuid4().hex}"
        self.signals.mkdir()
        self.nodes = nodes
        self.mark = {"STARTS_FOLDER": str(self.signals)}
        (folder / "tmp").mkdir(exist_ok=True)
        environment = os.environ | self.mark | {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
        words = [
            "--backend",
            "local",
            "--nodes",
            str(nodes),
            "--gpus-per-node",
            "0",
            "--grace",
            "3",
            "--runs",
            str(folder / "runs"),
        ]
        self.console = self.signals / "console"
        with self.console.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "cluster" / "launch.py"), *words, "--command", str(folder / "program.py")],
                stdout=output,
                stderr=output,
                env=environment,
            )

    def wait_ready(self) -> None:
        self._until(lambda: len(list(self.signals.glob("ready_*"))) >= self.nodes or self.process.poll() is not None, "ready")

    def finish(self) -> None:
        (self.signals / "finish").touch()

    def agents(self) -> list[int]:
        return [pid for pid in processes_with(self.mark) if b"cluster/agent.py" in _command_line(pid)]

    def wait(self) -> float:
        """Until the launcher has ended and nothing of it is left; seconds from the former to the latter, -1 when something is."""
        self._until(lambda: self.process.poll() is not None, "the launcher ends")
        began = time.monotonic()
        while processes_with(self.mark):
            if time.monotonic() - began > PATIENCE_S:
                return -1.0
            time.sleep(0.02)
        return time.monotonic() - began

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        kill_processes_with(self.mark)

    def _until(self, happens: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not happens():
            if time.monotonic() > deadline:
                raise RuntimeError(f"not within {PATIENCE_S:.0f} s: {what}")
            time.sleep(0.01)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def to_the_end(start: Start, draw: random.Random) -> None:
    start.wait_ready()
    start.finish()


def interrupt_early(start: Start, draw: random.Random) -> None:
    """Anywhere from before its first line to when its ranks are there."""
    time.sleep(draw.uniform(0.0, 0.8))
    start.process.send_signal(signal.SIGINT)


def interrupt_late(start: Start, draw: random.Random) -> None:
    start.wait_ready()
    start.process.send_signal(signal.SIGINT)


def interrupt_often(start: Start, draw: random.Random) -> None:
    """An impatient user's Ctrl-C."""
    time.sleep(draw.uniform(0.0, 0.8))
    for _ in range(6):
        start.process.send_signal(signal.SIGINT)
        time.sleep(draw.uniform(0.0, 0.1))


def terminate(start: Start, draw: random.Random) -> None:
    start.wait_ready()
    start.process.send_signal(signal.SIGTERM)


def kill_launcher(start: Start, draw: random.Random) -> None:
    time.sleep(draw.uniform(0.0, 1.2))
    start.process.kill()


def kill_agent(start: Start, draw: random.Random) -> None:
    """The node is given a new agent; the job is done in the next attempt."""
    start.wait_ready()
    os.kill(draw.choice(start.agents()), signal.SIGKILL)
    start.finish()


# kind -> (what is done, exit codes that are right)
KINDS: dict[str, tuple[Callable[[Start, random.Random], None], set[int]]] = {
    "to the end": (to_the_end, {0}),
    "Ctrl-C, early": (interrupt_early, {130, -2, 1}),  # -2, 1: before our first line, by Python itself
    "Ctrl-C, late": (interrupt_late, {130}),
    "Ctrl-C, six times": (interrupt_often, {130, -2, 1}),
    "SIGTERM": (terminate, {75, 143}),
    "kill -9 of the launcher": (kill_launcher, {-9}),
    "kill -9 of an agent": (kill_agent, {0}),
}


@dataclass
class Tally:
    times: Counter[str] = field(default_factory=Counter)
    codes: dict[str, Counter[int]] = field(default_factory=dict)
    longest_s: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def start_and_stop(starts: int, seed: int, folder: Path, nodes: int = 2, say: Callable[[str], None] = print) -> Tally:
    """Start and end the launcher so many times, each kind of ending as often as the others."""
    tally, draw = Tally(), random.Random(seed)
    (folder / "program.py").write_text(PROGRAM)
    before = temporary_files()
    kinds = [kind for kind, _ in zip(_endless(draw), range(starts), strict=False)]
    for number, kind in enumerate(kinds, start=1):
        start = Start(folder, nodes)
        try:
            act, right = KINDS[kind]
            act(start, draw)
            seconds = start.wait()
            code = start.process.returncode
            note(tally, kind, code, seconds)
            if code not in right:
                said = " | ".join(start.console.read_text(errors="replace").splitlines()[-12:])
                tally.problems.append(f"start {number}, {kind}: exit code {code}, not one of {sorted(right)}; it said: {said}")
            if seconds < 0:
                tally.problems.append(f"start {number}, {kind}: processes left: {processes_with(start.mark)}")
        except (RuntimeError, IndexError) as error:
            tally.problems.append(f"start {number}, {kind}: {error}")
        finally:
            start.close()
        say(f"{number:4d} {kind}: exit code {start.process.returncode}")
    left = sorted(str(path) for path in [*(folder / "tmp").rglob("*"), *(temporary_files() - before)])
    tally.problems += [f"temporary file left: {path}" for path in left]
    return tally


def _endless(draw: random.Random):
    while True:
        yield from draw.sample(sorted(KINDS), len(KINDS))


def note(tally: Tally, kind: str, code: int, seconds: float) -> None:
    tally.times[kind] += 1
    tally.codes.setdefault(kind, Counter())[code] += 1
    tally.longest_s[kind] = max(tally.longest_s.get(kind, 0.0), seconds)


def temporary_files() -> set[Path]:
    """What carries our name where temporary files lie."""
    return {path for folder in (Path("/tmp"), Path("/dev/shm")) if folder.is_dir() for path in folder.glob("*slotstream*")}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.starts", description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=2)
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with tempfile.TemporaryDirectory(prefix="starts_") as folder:
        tally = start_and_stop(options.starts, options.seed, Path(folder), options.nodes, lambda line: print(line, flush=True))
    print(f"\n{'ended by':26s} {'times':>5s}  {'gone after, longest s':>21s}  exit codes")
    for kind, times in tally.times.items():
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(tally.codes[kind].items()))
        print(f"{kind:26s} {times:5d}  {tally.longest_s[kind]:21.2f}  {codes}")
    for problem in tally.problems:
        print(f"WRONG: {problem}")
    if not tally.problems:
        print(f"{sum(tally.times.values())} starts; processes, locks and temporary files left: 0")
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
