"""One rank of a few training steps on generated features: arguments are a JSON object, the result is a JSON line."""

from __future__ import annotations

import dataclasses
import json
import sys

import torch

from data_pipeline.batch import ClipBatch
from data_pipeline.order import World, padded_batch, rank_slice
from trainer import distributed
from trainer.config import (
    MergeConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    SlotContrastConfig,
    SRLConfig,
    SSyncConfig,
)
from trainer.engine import Engine
from trainer.model.network import VideoSlotModel
from trainer.objective import Objective
from trainer.process import leave
from trainer.step import NonFiniteLoss, train_step

GRID, WIDTH = (3, 4), 10


def batch_of(step: int, world: World, global_batch: int, accumulation: int, frames: int, poison: int | None) -> ClipBatch:
    """This rank's share of the step's global batch, padded as the loader pads."""
    random = torch.Generator().manual_seed(100 + step)
    features = torch.randn(global_batch, frames, GRID[0] * GRID[1], WIDTH, generator=random)
    if poison is not None:
        features[poison] = float("nan")
    start, stop = rank_slice(global_batch, world)
    ids = list(range(start, stop)) or [0]
    padded = ids + [ids[-1]] * (padded_batch(global_batch, world.size, accumulation) - len(ids))
    named = tuple(f"clip{index}" for index in padded)
    return ClipBatch(
        features=features[padded],
        grid=GRID,
        num_real=stop - start,
        sample_ids=tuple(padded),
        keys=named,
        starts=(0,) * len(padded),
        positions=tuple(step * global_batch + index for index in padded),
    )


def main(options: dict) -> dict:
    torch.manual_seed(5)
    world = distributed.world_from_environment()
    distributed.start(torch.device("cpu"), options.get("timeout_s", 60))
    model = VideoSlotModel(
        ModelConfig(
            num_slots=4,
            slot_dim=8,
            feature_dim=WIDTH,
            grid=list(GRID),
            predictor_heads=2,
            decoder_hidden=[12, 12],
            query_key_gain=3.0,
            projectors=options.get("srl", False),
            patch_maps=options.get("srl", False),
            **options.get("model", {}),
        )
    )
    # eps well above rounding: with 1e-8 Adam turns a gradient that is zero but for rounding into a full step of either sign
    optim = OptimConfig(lr=1e-2, max_steps=10, warmup_steps=1, decay_steps=10, clip_norm=0.05, eps=1e-4)
    parallel = ParallelConfig(
        zero_stage=options["stage"],
        accumulation=options["accumulation"],
        device="cpu",
        reproducible=options.get("reproducible", False),
        timeout_s=options.get("timeout_s", 60),
    )
    ssync = SSyncConfig(
        boundary_weight=1.0,
        interior_weight=1.0,
        start_fraction=options.get("ssync_from", 0.1),
        merge=MergeConfig(threshold=0.8, source=options.get("merged_by", "A")),
    )
    contrast = SlotContrastConfig(scope=options.get("scope", "global"), form="supcon" if "srl" in options else "infonce")
    stages = {"encoder_start": 0.0, "decoder_start": 0.1, "group_frames": 3, "num_neighbours": 2, "num_redundant": 2}
    srl = SRLConfig(decoder_weight=0.3, encoder_weight=0.2, regulariser_weight=0.4, **stages) if "srl" in options else SRLConfig()
    objective = Objective(ObjectiveConfig(slot_contrast=contrast, ssync=ssync, srl=srl), 10)
    engine = Engine(model, optim, parallel, torch.device("cpu"))
    count = options["global_batch"]
    shares = [rank_slice(count, World(rank=rank, size=world.size)) for rank in range(world.size)]
    real = [stop - start for start, stop in shares]
    reports, norms = [], []
    for step in range(options["steps"]):
        poison = options.get("poison") if step == options["steps"] - 1 else None
        before = engine.weights() if poison is not None else None
        try:
            batch = batch_of(step, world, count, options["accumulation"], options.get("frames", 3), poison)
            report = train_step(engine, objective, batch, real, step, lr=1e-2, stop=world.rank == options.get("stop_rank"))
        except NonFiniteLoss as error:
            after = engine.weights()
            same = all(torch.equal(before[name], after[name]) for name in before)
            return {"error": str(error), "unchanged": same}
        reports.append({**dataclasses.asdict(report), "seconds": sorted(report.seconds)})
        norms.append(engine.grad_norm())
    weights = engine.weights()
    return {"reports": reports, "norms": norms, "weights": {name: value.flatten().tolist() for name, value in weights.items()}}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    leave(0)
