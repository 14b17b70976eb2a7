"""Command: interrupt small trainings on a real Slurm, again and again, in every way there is. `python benchmarks/preemptions.py`

Comes in: how often each way is tried. Goes out: a line for each interruption and a table; exit code 1 unless each was resumed in
its run folder with no applied step lost. One job for each way, side by side, on a Slurm of this host (root, Debian packages).
A training saves only when it is asked to: a step that is not in the checkpoint made for the interruption counts as lost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # as a script: this folder's modules are benchmarks.*, and shadow nobody else's

from tests.integration.slurm_cluster import SlurmCluster, missing_programs  # noqa: E402
from tests.integration.tiny_run import arguments, make_shards  # noqa: E402

PATIENCE_S = 300.0
LIMIT_S = 120  # of the ways that end by a time limit: the two minutes of a job with --time 2
STEPS_BEFORE = 5  # applied in a start before it is interrupted


@dataclass(frozen=True)
class Result:
    way: str
    durable_s: float  # from the interruption, or from the moment the platform spoke, to the complete checkpoint
    away_s: float  # from the interruption to the first step that was applied after it
    resumed: bool  # in the same run folder, at the checkpoint's step
    lost: int  # applied steps that are not in the checkpoint


class Training:
    """One job, seen by its run folder."""

    def __init__(self, cluster: SlurmCluster, folder: Path, data: Path, way: str, nodes: str, *flags: str) -> None:
        self.cluster, self.way, self.nodes, self.run_dir = cluster, way, nodes, folder / "runs" / way
        never = ("optim.max_steps=1000000", "optim.decay_steps=1000000", "checkpoint.every_steps=1000000")
        overrides = arguments(data, folder / "runs", way, *never)[2:]
        words = [
            "--backend",
            "slurm",
            "--nodes",
            "2",
            "--gpus-per-node",
            "0",
            f"--sbatch=nodelist={nodes}",
            "--exclusive",
            *flags,
        ]
        environment = {**cluster.environment, "OMP_NUM_THREADS": "1"}
        with (folder / f"{way}.out").open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "cluster" / "launch.py"), *words, *overrides],
                env=environment, cwd=folder, stdout=output, stderr=output,
            )  # fmt: skip

    @property
    def job(self) -> str:
        return json.loads((self.run_dir / "job.json").read_text())["id"]

    def steps(self) -> list[int]:
        """Steps that rank 0 has applied, in order."""
        try:
            lines = (self.run_dir / "order" / "rank0.jsonl").read_text().splitlines()
        except OSError:
            return []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def checkpoint(self) -> tuple[int, float]:
        """Step of the newest complete checkpoint and when it became that; (-1, 0) where there is none."""
        found = [
            (int(path.parent.name[5:]), path.stat().st_mtime)
            for path in (self.run_dir / "checkpoints").glob("step_*/manifest.json")
        ]
        return max(found, default=(-1, 0.0))

    def spoken(self, since: float) -> float | None:
        """When the supervisor said that the platform wants the job's end."""
        lines = (self.run_dir / "events.jsonl").read_text().splitlines()
        times = [event["time"] for line in lines if (event := json.loads(line))["event"] == "preempted" and event["time"] > since]
        return min(times, default=None)

    def until(self, happens: Callable[[], bool], what: str) -> None:
        def either() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.way}: the launcher ended with {self.process.returncode} while waiting: {what}")
            return happens()

        self.cluster.until(either, f"{self.way}: {what}", PATIENCE_S)

    def interrupt(self, how: Callable[[Training], None], planned: bool) -> Result:
        """Interrupt it once it has applied a few steps; wait until it applies steps again."""
        before, _ = self.checkpoint()
        self.until(lambda: len([step for step in self.steps() if step > before]) >= STEPS_BEFORE, "it applies steps")
        began = time.time()
        how(self)
        self.until(lambda: self.checkpoint()[0] > before, "a checkpoint for the interruption")
        saved, saved_at = self.checkpoint()
        restarts = self.cluster.job(self.job).restarts
        self.until(lambda: len(sessions(self.run_dir)) > 0 and sessions(self.run_dir)[-1] > saved_at, "the next session")
        applied = [step for step in self.steps() if step > saved]  # none, unless steps were applied after the save
        self.until(lambda: any(step > saved for step in self.steps()), "it goes on")
        first = next(step for step in self.steps() if step > saved)
        spoken = (self.spoken(began) or began) if planned else began
        steps = self.steps()
        return Result(
            way=self.way,
            durable_s=saved_at - spoken,
            away_s=time.time() - spoken,
            resumed=first == saved + 1 and steps == list(range(steps[0], steps[0] + len(steps))) and restarts >= 0,
            lost=len(applied),
        )


def sessions(run_dir: Path) -> list[float]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event["time"] for line in lines if (event := json.loads(line))["event"] == "session"]


def urgent(training: Training) -> None:
    nodes = f"--nodelist={training.nodes}"
    training.cluster.sbatch("#!/bin/bash\nsleep 1\n", nodes, "--nodes=2", "--exclusive", "--partition=urgent")


# Name to (what is done to the job, whether the platform speaks later than we act, flags of the launch).
WAYS: Mapping[str, tuple[Callable[[Training], None], bool, tuple[str, ...]]] = {
    "usr2_steps": (lambda it: void(it.cluster.run("scancel", "--signal=USR2", it.job)), False, ()),
    "usr2_batch": (lambda it: void(it.cluster.run("scancel", "--batch", "--signal=USR2", it.job)), False, ()),
    "requeue": (lambda it: void(it.cluster.run("scontrol", "requeue", it.job)), False, ()),
    "sigterm_partition": (urgent, True, ()),
    "time_limit": (lambda it: None, True, ("--time", str(LIMIT_S // 60), "--grace", "20")),
}


def void(_: object) -> None:
    """For a way that is one command."""


def series(training: Training, rounds: int, results: list[Result], errors: list[str]) -> None:
    how, planned, _ = WAYS[training.way]
    try:
        for number in range(rounds):
            result = training.interrupt(how, planned)
            results.append(result)
            print(f"{training.way} {number + 1}: {result}", flush=True)
    except Exception as error:
        errors.append(f"{training.way}: {error}")


def table(results: list[Result]) -> str:
    lines = [
        f"{'way':<18}{'times':>6}{'durable s, median':>18}{'worst':>7}{'away s, median':>15}{'resumed':>8}{'steps lost':>11}"
    ]
    for way in (*WAYS, "all"):
        mine = [item for item in results if way in (item.way, "all")]
        if mine:
            durable, away = [item.durable_s for item in mine], [item.away_s for item in mine]
            numbers = f"{statistics.median(durable):>18.1f}{max(durable):>7.1f}{statistics.median(away):>15.1f}"
            counts = f"{sum(item.resumed for item in mine):>8}{sum(item.lost for item in mine):>11}"
            lines.append(f"{way:<18}{len(mine):>6}{numbers}{counts}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="interruptions of each of the five ways (default 4)")
    rounds = parser.parse_args().rounds
    if missing := missing_programs():
        print(f"not installed: {', '.join(missing)}; apt-get install slurmctld slurmd slurm-client munge", file=sys.stderr)
        return 2
    results: list[Result] = []
    errors: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="preemptions-") as name,
        SlurmCluster(num_nodes=2 * len(WAYS), kill_wait_s=30) as cluster,
    ):
        folder = Path(name)
        data = make_shards(folder / "data")
        threads = []
        for index, (way, (_, _, flags)) in enumerate(WAYS.items()):
            training = Training(cluster, folder, data, way, f"n{2 * index + 1},n{2 * index + 2}", *flags)
            threads.append(threading.Thread(target=series, args=(training, rounds, results, errors)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        if errors:
            for way in WAYS:
                print(f"--- {way}\n{(folder / f'{way}.out').read_text()[-2000:]}", file=sys.stderr)
    print(table(results))
    for error in errors:
        print(error, file=sys.stderr)
    good = len(results) == rounds * len(WAYS) and all(item.resumed and item.lost == 0 for item in results)
    return 0 if good and not errors else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
