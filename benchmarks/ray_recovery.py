"""Seconds that the Ray backend needs to start, and to run again after a kill -9 of each kind of process.

python -m benchmarks.ray_recovery [--nodes 2] [--rounds 1]: a cluster of its own on this machine, small waiting programs as ranks;
a restart counts from the kill to the moment in which all ranks of the next attempt run. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("rank", "agent", "actor", "raylet")
RANK = """
import os, time
from pathlib import Path
run = Path(os.environ["SLOTSTREAM_RUN_DIR"])
(run / f"ready_{os.environ['SLOTSTREAM_ATTEMPT']}_{os.environ['RANK']}").touch()
while not (run / "go").exists():
    time.sleep(0.02)
"""


def main() -> int:
    flags = _flags()
    with tempfile.TemporaryDirectory(prefix="ray-recovery-") as name:
        seconds = measure(Path(name), flags.nodes, flags.rounds)
    print(f"{'what':<34} {'median s':>8} {'worst s':>8}")
    for what, values in seconds.items():
        print(f"{what:<34} {statistics.median(values):>8.1f} {max(values):>8.1f}")
    return 0


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="kills of each kind")
    return parser.parse_args()


def measure(folder: Path, nodes: int, rounds: int) -> dict[str, list[float]]:
    """Seconds by what was measured."""
    (folder / "rank.py").write_text(RANK)
    words = ["--backend", "ray", "--nodes", str(nodes), "--runs", str(folder), "--max-restarts", str(9 * rounds)]
    command = [sys.executable, str(ROOT / "cluster" / "launch.py"), *words, "--command", str(folder / "rank.py")]
    began, run, attempt = time.monotonic(), folder / "run", 1
    launcher = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        seconds = {"start: cluster, actors, ranks": [_wait(launcher, run, attempt, nodes) - began]}
        for kind in KINDS * rounds:
            _progress(run, attempt)
            killed = time.monotonic()
            os.kill(_victim(run, attempt, kind), signal.SIGKILL)
            attempt += 1
            back = _wait(launcher, run, attempt, nodes) - killed
            seconds.setdefault(f"kill -9 of the {kind}: all run again", []).append(back)
        began = time.monotonic()
        (run / "go").touch()
        launcher.wait(120)
        seconds["end: ranks, actors, cluster"] = [time.monotonic() - began]
    finally:
        launcher.kill()
    return seconds


def _wait(launcher: subprocess.Popen[bytes], run: Path, attempt: int, nodes: int) -> float:
    while not all((run / f"ready_{attempt}_{rank}").exists() for rank in range(nodes)):
        if launcher.poll() is not None:
            raise SystemExit(f"the launcher ended with {launcher.returncode} before attempt {attempt} ran")
        time.sleep(0.01)
    return time.monotonic()


def _progress(run: Path, step: int) -> None:
    """A newer checkpoint, as the supervisor sees one: without progress it would pause before it starts again."""
    (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").touch()


def _victim(run: Path, attempt: int, kind: str) -> int:
    folder = run / "attempts" / str(attempt)
    if kind == "rank":
        return int(next(iter(json.loads((folder / "node_1.jsonl").read_text().splitlines()[0])["pids"].values())))
    pid = int(json.loads((folder / "launch.json").read_text())["agents"][1]["pid"])
    for _ in range(("agent", "actor", "raylet").index(kind)):
        pid = int(re.findall(r"PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[0])
    return pid


if __name__ == "__main__":
    sys.exit(main())
