"""What reproducible mode costs: one global batch on 1, 2 and 4 ranks, normal and reproducible. A table goes out.

`python -m benchmarks.reproducible [--shape movi_c_small] [--clips 8] [--steps 3] [--worlds 1,2,4]`. Ranks are processes with one
thread each, gloo between them; on fewer cores than ranks they share them, so CPU time of all ranks stands beside wall time.
The first characters of the weights' sha256 show what the mode is for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import sys
import time
from dataclasses import replace

from benchmarks.rank_cost import run_ranks
from benchmarks.shapes import QUICK, SHAPES, compose_run

TIMEOUT_S = 1800
MIB = 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproducible", allow_abbrev=False)
    parser.add_argument("--shape", choices=[*SHAPES, "quick"], default="movi_c_small", help="model, losses and patch grid")
    parser.add_argument("--clips", type=int, default=8, help="clips of an update over all ranks")
    parser.add_argument("--steps", type=int, default=3, help="updates that are timed, after one that is not")
    parser.add_argument("--worlds", default="1,2,4", help="numbers of ranks")
    options = parser.parse_args(argv)
    print(
        f"{options.shape}, {options.clips} clips an update, a thread a rank, ZeRO-0 over gloo; median of {options.steps} updates"
    )
    print(f"{'ranks':>5}  {'mode':<12}  {'wall s':>8}  {'CPU s':>8}  {'ratio':>6}  {'peak MiB':>8}  weights")
    for world in map(int, options.worlds.split(",")):
        normal = None
        for mode in ("normal", "reproducible"):
            arguments = [mode, options.shape, str(options.clips), str(options.steps)]
            wall, cpu, peak, digest = run_ranks("benchmarks.reproducible", ["--rank", *arguments], world, TIMEOUT_S)
            normal = normal or wall
            print(
                f"{world:>5}  {mode:<12}  {wall:8.3f}  {cpu:8.3f}  {wall / normal:6.2f}  {peak:8.0f}  {digest[:16]}", flush=True
            )
    return 0


def _rank(mode: str, shape_name: str, clips: int, steps: int) -> tuple[float, float, float, str]:
    """One rank: median wall seconds of its updates, CPU seconds of all ranks, its peak resident MiB, the weights' sha256."""
    import torch

    from benchmarks.step_cost import feature_batch
    from data_pipeline.order import World, rank_slice
    from trainer import distributed
    from trainer.build import build_model, build_objective
    from trainer.config import ParallelConfig
    from trainer.engine import Engine
    from trainer.step import train_step

    torch.set_num_threads(1)
    device = torch.device("cpu")
    shape = replace(QUICK if shape_name == "quick" else SHAPES[shape_name], clips=clips)
    run, world = compose_run(shape), distributed.world_from_environment()
    distributed.start(device, TIMEOUT_S)
    parallel = ParallelConfig(device="cpu", zero_stage=0, reproducible=mode == "reproducible", timeout_s=TIMEOUT_S)
    engine = Engine(build_model(run.model, seed=0), run.optim, parallel, device)
    objective = build_objective(run)
    slices = [rank_slice(clips, World(rank, world.size)) for rank in range(world.size)]
    whole, (first, last) = feature_batch(run, shape), slices[world.rank]
    taken = [*range(first, last), *[max(last - 1, 0)] * (-(-clips // world.size) - (last - first))]
    batch = replace(
        whole,
        features=whole.features[taken],
        num_real=last - first,
        sample_ids=tuple(taken),
        keys=tuple(whole.keys[index] for index in taken),
        starts=(0,) * len(taken),
        positions=tuple(taken),
    )
    walls, cpus = [], []
    for step in range(steps + 1):
        before = time.process_time(), time.perf_counter()
        train_step(engine, objective, batch, [stop - start for start, stop in slices], step, lr=1e-4)
        cpus.append(time.process_time() - before[0])
        walls.append(time.perf_counter() - before[1])
    total = distributed.all_sum(torch.tensor(statistics.median(cpus[1:]), dtype=torch.float64)).item()
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in engine.weights().values())).hexdigest()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    return statistics.median(walls[1:]), total, peak, digest


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        from trainer.process import leave

        mode, shape_name, clips, steps = sys.argv[2:]
        print(json.dumps(_rank(mode, shape_name, int(clips), int(steps))), flush=True)
        leave(0)
    sys.exit(main())
