"""What a second rank adds to a step. Settings come in, rows go out; run as a module this file is one of the ranks.

The model is tiny and every rank has the same share of clips, so what differs is communication and DeepSpeed's own work.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.table import Row

ROOT = Path(__file__).resolve().parent.parent
WORLD_SIZES = (1, 2)
TIMEOUT_S = 120


def rows(rounds: int, zero_stage: int) -> list[Row]:
    """Median step of rank 0 with one and with two ranks of one thread, on the CPU over gloo."""
    section = f"step of a tiny model, one clip a rank, ZeRO-{zero_stage} over gloo, one thread a rank"
    found = []
    for world_size in WORLD_SIZES:
        cpu, wall = run_ranks("benchmarks.rank_cost", [str(rounds), str(zero_stage)], world_size)
        name = f"{world_size} rank{'s' * (world_size > 1)}"
        found.append(Row(section=section, name=name, cpu_ms=cpu * 1e3, wall_ms=wall * 1e3))
    one, two = (row.wall_ms or 0.0 for row in found)
    return [found[0], replace(found[1], ratio=two / one, beside=f"{two - one:+.2f} ms wall for the second rank")]


def run_ranks(module: str, arguments: list[str], world_size: int, timeout_s: float = TIMEOUT_S) -> Any:
    """Start the ranks, wait for all, read rank 0's last line as JSON. None of them outlives the call."""
    port = _free_port()
    command = [sys.executable, "-m", module, *arguments]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=_environment(rank, world_size, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world_size)
    ]
    try:
        texts = [rank.communicate(timeout=timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    for number, (rank, (_, errors)) in enumerate(zip(ranks, texts, strict=True)):
        if rank.returncode:
            raise RuntimeError(f"rank {number} of {world_size} ended with exit code {rank.returncode}:\n{errors[-2000:]}")
    return json.loads(texts[0][0].strip().splitlines()[-1])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    own = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    own |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return os.environ | {key: str(value) for key, value in own.items()} | {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}


def _rank(rounds: int, zero_stage: int) -> tuple[float, float]:
    """One rank: median CPU and wall seconds of its steps."""
    import torch

    from benchmarks.shapes import QUICK, compose_run
    from benchmarks.step_cost import feature_batch
    from trainer import distributed
    from trainer.build import build_model, build_objective
    from trainer.config import ParallelConfig
    from trainer.engine import Engine
    from trainer.step import train_step

    torch.set_num_threads(1)
    device = torch.device("cpu")
    run = compose_run(QUICK)
    world = distributed.world_from_environment()
    distributed.start(device, TIMEOUT_S)
    engine = Engine(build_model(run.model, seed=0), run.optim, ParallelConfig(device="cpu", zero_stage=zero_stage), device)
    objective = build_objective(run)
    batch = next(feature_batch(run, QUICK, seed=world.rank).split(QUICK.clips))
    times = []
    for step in range(rounds + 3):
        before = time.process_time(), time.perf_counter()
        train_step(engine, objective, batch, [1] * world.size, step, lr=run.optim.lr)
        times.append((time.process_time() - before[0], time.perf_counter() - before[1]))
    cpu, wall = zip(*times[3:], strict=True)
    return statistics.median(cpu), statistics.median(wall)


if __name__ == "__main__":
    from trainer.process import leave

    print(json.dumps(_rank(int(sys.argv[1]), int(sys.argv[2]))), flush=True)
    leave(0)
