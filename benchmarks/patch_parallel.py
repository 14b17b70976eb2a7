"""Command: memory of a step on each rank where ranks share a clip's patches. `python -m benchmarks.patch_parallel --ranks 2`.

Real processes over gloo, one thread each: first one rank with all patches, then each number of ranks asked for. Goes out: the
resident high-water mark above weights and inputs of the rank that needs most, and its ratio to one rank's.
Weights, gradients and Adam's moments are on every rank but for what ZeRO splits; what a clip needs is what is shared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.case import Case, add_shape_flags, case_of
from benchmarks.rank_cost import ROOT, _environment, _free_port
from benchmarks.single import MIB, small

SHAPE = {"batch": 1, "frames": 128, "patches": 1369, "slots": 7, "width": 768}  # ViT-B at 518 px: a clip's tensors dominate
TIMEOUT_S = 1800
# glibc keeps freed blocks of less than 32 MiB and returns larger ones, so that a rank with less would seem to need more.
RETURN_WHAT_IS_FREED = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patch_parallel", allow_abbrev=False)
    add_shape_flags(parser)
    parser.set_defaults(**SHAPE)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="numbers of ranks that share a clip (default: 2)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="more settings of the run")
    options = parser.parse_args(argv)
    case = case_of(options, "fused")
    mib = {ranks: max(run_ranks(case, ranks)) for ranks in [1, *options.ranks]}
    report = {ranks: {"resident_mib": found, "ratio": found / mib[1]} for ranks, found in mib.items()}
    print(json.dumps({"shape": case.shape_text, "ranks": report}) if options.json else _text(case, report), flush=True)
    return 0


def _text(case: Case, report: dict[int, dict[str, float]]) -> str:
    lines = [f"step, {case.shape_text}, {case.precision}, one thread a rank; MiB above weights and inputs, largest rank"]
    for ranks, row in report.items():
        lines.append(f"{ranks:3d} rank{'s' * (ranks > 1):1s}  {row['resident_mib']:8.0f} MiB   {row['ratio']:.2f} of one rank's")
    return "\n".join(lines)


def run_ranks(case: Case, ranks: int) -> list[float]:
    """MiB of each rank. None of the processes outlives the call."""
    port = _free_port()
    command = [sys.executable, "-m", "benchmarks.patch_parallel", "rank", case.to_json()]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=_environment(rank, ranks, port) | RETURN_WHAT_IS_FREED, stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    try:
        texts = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    if any(process.returncode for process in started):
        raise RuntimeError(f"exit codes of the ranks: {[process.returncode for process in started]}; see their messages above")
    return [float(text.strip().splitlines()[-1]) for text in texts]


def measure_rank(case: Case) -> float:
    """This rank's MiB. A tiny case runs first, so that loading libraries and meeting the others is no part of it.

    Before the step whose memory is high comes one of two frames: what a first update makes and keeps, Adam's moments, counts.
    """
    import torch

    from benchmarks.measure import peak_resident_bytes
    from trainer import distributed

    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"), TIMEOUT_S)
    tiny = prepare(replace(small(case), patches=64))  # a row at least for every rank
    for _ in range(2):
        tiny(case.frames)
    call = prepare(case)

    def several() -> None:
        for frames in (2, case.frames):
            call(frames)

    return peak_resident_bytes(several)[0] / MIB


def prepare(case: Case) -> Callable[[int], object]:
    """A training step in which all ranks share the case's clips, or as many of their first frames as it is given."""
    from itertools import count

    from benchmarks.step import random_batch
    from trainer import distributed
    from trainer.build import build_model, build_objective
    from trainer.engine import Engine, choose_device
    from trainer.step import train_step

    run, world = case.run(), distributed.world_from_environment()
    device = choose_device(case.device)
    model = build_model(run.model, seed=0)
    model.patches = distributed.form_patch_groups(world, world.size, case.grid, TIMEOUT_S)
    engine = Engine(model, run.optim, run.parallel, device)
    objective = build_objective(run, model.patches)
    batch, numbers = model.patches.cut(random_batch(case)).to(device), count()

    def call(frames: int) -> object:
        part = replace(batch, features=batch.features[:, :frames])
        return train_step(engine, objective, part, [case.batch], next(numbers), lr=run.optim.lr)

    return call


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        from trainer.process import leave

        print(measure_rank(Case.from_json(sys.argv[2])), flush=True)
        leave(0)
    raise SystemExit(main())
