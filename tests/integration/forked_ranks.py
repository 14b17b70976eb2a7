"""Many small worlds for the price of one start: a process that has imported everything forks each rank.

As a program: a JSON list of jobs in, a JSON list of what each of their ranks did out. Jobs run one after the other. Ranks are
real processes with gloo between them; only the imports are shared.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.integration.ranks import ROOT, free_port, rank_environment

PATIENCE_S = 200


class Job(NamedTuple):
    """`world` ranks of `python -m <module> <arguments>`, logs in `folder`. With `kill_at` = (run folder, step) all are killed
    once a checkpoint of that step or a later one is there."""

    world: int
    module: str
    arguments: list[str]
    folder: str
    kill_at: tuple[str, int] | None = None


def run_jobs(jobs: list[Job]) -> list[list[int]]:
    """Exit codes of each job's ranks (minus the signal, where one ended them); fails with the program's own errors."""
    environment = rank_environment(0, 1, free_port())
    command = [sys.executable, "-m", "tests.integration.forked_ranks", json.dumps(jobs)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S * len(jobs), check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def said(job: Job) -> list[Any]:
    """Each rank's last line of stdout, as JSON."""
    texts = [(Path(job.folder) / f"rank{rank}.out").read_text() for rank in range(job.world)]
    return [json.loads(text.strip().splitlines()[-1]) for text in texts]


def errors(job: Job) -> str:
    return "\n".join((Path(job.folder) / f"rank{rank}.err").read_text()[-2000:] for rank in range(job.world))


def main(jobs: list[Job]) -> list[list[int]]:
    import torch

    torch.set_num_threads(1)
    training = ["trainer.train_loop"] if any(job.module == "trainer.main" for job in jobs) else []
    for module in ("torch._dynamo", "deepspeed", *training, *(job.module for job in jobs)):
        __import__(module)
    return [_run(job) for job in jobs]


def _run(job: Job) -> list[int]:
    port = free_port()
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    pids = [_fork(job, rank, port) for rank in range(job.world)]
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE_S
    while len(codes) < len(pids):
        late = time.monotonic() > end
        if late or (job.kill_at and _has_checkpoint(*job.kill_at)):
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _has_checkpoint(run: str, step: int) -> bool:
    return any(int(path.name[5:]) >= step for path in Path(run, "checkpoints").glob("step_????????"))


def _fork(job: Job, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the program, however that ends
    try:
        for number, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(job.folder) / f"rank{rank}.{end}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        os.environ.clear()
        os.environ.update(rank_environment(rank, job.world, port))
        sys.argv = [job.module, *job.arguments]
        runpy.run_module(job.module, run_name="__main__")
    finally:
        os._exit(99)  # a rank leaves by itself


if __name__ == "__main__":
    print(json.dumps(main([Job(*job) for job in json.loads(sys.argv[1])])), flush=True)
