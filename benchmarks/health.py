"""Hangs and stragglers on real ranks: are they named right, how soon, is a healthy run left alone, what does the heartbeat cost.

python -m benchmarks.health [--parts hangs,stragglers,cost] [--ranks 8] [--clean 2000] [--hang-after 15]

hangs: one run of three ranks under the launcher that hangs in four ways. stragglers: one run, first so many clean steps, then one
rank made slow in three ways. cost: microseconds of a heartbeat's parts, and their share of the steps of the run before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.heartbeats import RankBeats
from cluster.supervision.health import Watcher
from cluster.supervision.stragglers import Finding
from tests.integration.ranks import free_port, rank_environment
from tests.integration.tiny_run import arguments, make_shards
from trainer import heartbeat

ROOT = Path(__file__).resolve().parent.parent
HANG_WORKER = ROOT / "tests" / "integration" / "hang_worker.py"
SLOW_WORKER = ROOT / "benchmarks" / "health_worker.py"
HANGS = {"stop": (1, "stopped"), "skip": (2, "skipped collective"), "loader": (1, "loader"), "save": (0, "save")}
BEAT_S = 0.5
EPISODE_STEPS, REST_STEPS = 40, 40


# -- hangs ---------------------------------------------------------------------------------------------------------------------


def hangs(folder: Path, hang_after: float) -> list[tuple[str, ...]]:
    """Rows: fault, what was named, seconds from the last change of any rank to the verdict, how it went on."""
    settings = arguments(make_shards(folder / "data"), folder / "runs", "hangs", "optim.max_steps=40")[2:]
    faults = ",".join(f"{kind}:{rank}" for kind, (rank, _) in HANGS.items())
    words = ["--backend", "local", "--ranks-per-node", "3", "--gpus-per-node", "0", "--hang-after", str(hang_after)]
    command = [sys.executable, "cluster/launch.py", *words, "--command", f"{HANG_WORKER} {faults}", *settings]
    code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    rows: list[tuple[str, ...]] = []
    for attempt, (kind, (rank, cause)) in enumerate(HANGS.items(), start=1):
        path = folder / "runs" / "hangs" / "attempts" / str(attempt) / "hang.json"
        if not path.is_file():
            rows.append((kind, "not found", "", ""))
            continue
        found = json.loads(path.read_text())
        right = (found["culprits"], found["cause"]) == ([rank], cause)
        waited = min(beat["age"] for beat in found["ranks"].values())
        stacks = sum("train_loop.py" in text for text in found["stacks"].values())
        named = f"{'right' if right else 'WRONG'}: rank {found['culprits']}, {found['cause']}"
        rows.append((kind, named, f"{waited:.1f} s", f"{stacks} stacks, run ended with {code}"))
    return rows


# -- stragglers ----------------------------------------------------------------------------------------------------------------


class Group:
    """Real ranks with heartbeats, watched twice a second as an agent and a supervisor do."""

    def __init__(self, folder: Path, ranks: int, steps: int) -> None:
        self.folder, self.beats, self.watcher = folder, RankBeats(None, ranks), Watcher(0)
        self.found: list[tuple[int, Finding]] = []
        self.last: list[dict[str, Any]] = []
        more = (f"optim.max_steps={steps}", f"optim.global_batch={ranks}", "checkpoint.every_steps=2", "observe.log_every=100")
        command = [str(SLOW_WORKER), str(folder), *arguments(make_shards(folder / "data"), folder / "runs", "slow", *more)[2:]]
        port = free_port()
        with open(folder / "out", "w") as out:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env={**rank_environment(rank, ranks, port), **self.beats.environment(rank)},
                    stdout=out,
                    stderr=out,
                )
                for rank in range(ranks)
            ]

    def until(self, step: int) -> None:
        """Watch until all ranks have begun `step`."""
        while not self.last or min(beat["step"] for beat in self.last) < step:
            if any(process.poll() for process in self.processes):
                raise SystemExit(f"a rank ended: {(self.folder / 'out').read_text()[-2000:]}")
            time.sleep(BEAT_S)
            self.last = self.beats.read()
            now = max(beat["step"] for beat in self.last)
            self.found += [(now, finding) for finding in self.watcher.see(time.monotonic(), dict(enumerate(self.last)))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.beats.close()


def stragglers(folder: Path, ranks: int, clean: int) -> tuple[list[tuple[str, ...]], float]:
    """Rows: what was slow, what was named, after how many steps; and the seconds of a clean step."""
    group = Group(folder, ranks, clean + 20 + 3 * (EPISODE_STEPS + REST_STEPS))
    try:
        group.until(20)
        before, began = group.last[0]["step"], time.monotonic()
        group.until(20 + clean)
        seconds = (time.monotonic() - began) / (group.last[0]["step"] - before)
        alarms = [finding.why for _, finding in group.found]
        rows: list[tuple[str, ...]] = [
            (f"nobody, {clean} steps of {1000 * seconds:.0f} ms", f"{len(alarms)} alarms {alarms or ''}", "")
        ]
        extra = max(0.05, 1.5 * seconds)
        faults: dict[str, tuple[int, Callable[[int], Callable[[], None]]]] = {
            "compute": (ranks - 3, lambda rank: duty_cycle(group.processes[rank].pid)),
            "data": (ranks - 2, lambda rank: switch(folder / f"slow_data_{rank}", extra)),
            "save": (ranks - 1, lambda rank: switch(folder / f"slow_save_{rank}", 2 * extra)),
        }
        for cause, (rank, begin) in faults.items():
            print(*rows[-1], sep="; ", file=sys.stderr, flush=True)  # the table comes at the end, and that may be far
            rows.append(episode(group, cause, rank, begin))
    finally:
        group.close()
    return rows, seconds


def episode(group: Group, cause: str, rank: int, begin: Callable[[int], Callable[[], None]]) -> tuple[str, str, str]:
    began, before = max(beat["step"] for beat in group.last), len(group.found)
    end = begin(rank)
    try:
        group.until(began + EPISODE_STEPS)
    finally:
        end()
    group.until(began + EPISODE_STEPS + REST_STEPS - 10)
    said = [(step, finding) for step, finding in group.found[before:] if finding.kind == "straggler"]
    right = [step for step, finding in said if (finding.culprits, finding.cause) == ((rank,), cause)]
    named = f"{'right' if right and len(said) == 1 else 'WRONG'}: " + "; ".join(finding.why for _, finding in said)
    return f"rank {rank}, {cause}", named, f"{right[0] - began}" if right else ""


def switch(file: Path, seconds: float) -> Callable[[], None]:
    file.write_text(str(seconds))
    return file.unlink


def duty_cycle(pid: int) -> Callable[[], None]:
    """Let a process run a third of the time, as a CPU quota does."""
    over = threading.Event()

    def turns() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.06)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.03)

    thread = threading.Thread(target=turns)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return end


# -- cost ----------------------------------------------------------------------------------------------------------------------

COLLECTIVES, PHASES = 13, 9  # of a step with ZeRO and every term


def cost(step_s: float | None) -> list[tuple[str, ...]]:
    """Rows: what, microseconds, share of a step."""
    beats = RankBeats(None, 1)
    os.environ.update(beats.environment(0))
    beat = heartbeat.start()
    collective = heartbeat._counted(lambda: None, beat, 1, True)
    parts = {"collective": collective, "phase": lambda: beat.phase("data"), "step": lambda: beat.step(1)}
    each = {name: best_microseconds(call) for name, call in parts.items()}
    whole = COLLECTIVES * each["collective"] + PHASES * each["phase"] + each["step"]
    rows: list[tuple[str, ...]] = [(name, f"{value:.1f}", "") for name, value in each.items()]
    share = f"{whole / 10_000 / step_s:.2f} % of {1000 * step_s:.0f} ms" if step_s else ""
    rows.append((f"a step: {COLLECTIVES} collectives, {PHASES} phases", f"{whole:.0f}", share))
    rows.append(("agent: one rank read", f"{best_microseconds(beats.read, 1000):.0f}", ""))
    beats.close()
    return rows


def best_microseconds(call: Callable[[], Any], count: int = 20_000) -> float:
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, time.perf_counter() - began)
    return best / count * 1e6


def aligned(head: list[str], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="hangs,stragglers,cost")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--clean", type=int, default=2000)
    parser.add_argument("--hang-after", type=float, default=15.0)
    flags = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    step_s = None
    with tempfile.TemporaryDirectory(prefix="slotstream_health_") as folder:
        for part in flags.parts.split(","):
            (own := Path(folder) / part).mkdir()
            if part == "hangs":
                print(aligned(["hang", "named", "to the verdict", "after it"], hangs(own, flags.hang_after)), flush=True)
            elif part == "stragglers":
                rows, step_s = stragglers(own, flags.ranks, flags.clean)
                print(aligned(["slow", "named", "after steps"], rows), flush=True)
            else:
                print(aligned(["heartbeat", "microseconds", "share"], cost(step_s)), flush=True)


if __name__ == "__main__":
    main()
