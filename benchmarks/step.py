"""Command: one update of the weights from stored features, as the trainer makes it. `python -m benchmarks.step --batch 4 --json`.

Paths: fused, plain, official_form (the trainer's own step with the decoder as released). The frozen backbone, the disk and
dequantising are no part of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import official_form
from benchmarks.case import PATHS, Case
from benchmarks.single import main
from data_pipeline.batch import ClipBatch
from trainer.build import build_model, build_objective
from trainer.engine import Engine, choose_device
from trainer.step import train_step


def prepare(case: Case) -> Callable[[], object]:
    run = case.run()
    device = choose_device(case.device)
    model = build_model(run.model, seed=0)
    if case.path == "official_form":
        official_form.adopt(model.decoder)
    engine = Engine(model, run.optim, run.parallel, device)
    objective, batch = build_objective(run), random_batch(case).to(device)
    numbers = iter(range(10**9))

    def call() -> object:
        return train_step(engine, objective, batch, [case.batch], next(numbers), lr=run.optim.lr)

    return call


def random_batch(case: Case, seed: int = 1) -> ClipBatch:
    """Every tensor of a step has a size that values do not change, so random features cost what real ones do."""
    draw = torch.Generator().manual_seed(seed)
    return ClipBatch(
        features=torch.randn(case.batch, case.frames, case.patches, case.width, generator=draw),
        grid=case.grid,
        num_real=case.batch,
        sample_ids=tuple(range(case.batch)),
        keys=tuple(f"clip{number}" for number in range(case.batch)),
        starts=(0,) * case.batch,
    )


if __name__ == "__main__":
    raise SystemExit(main("benchmarks.step", PATHS))
