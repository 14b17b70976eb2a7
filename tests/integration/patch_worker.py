"""One rank of a few updates on generated features whose patches ranks may share.

Comes in: scenarios by name as JSON. Goes out, as a JSON line: of each, terms and gradient norms of every update, and weights;
from a single rank also what SSync selected, so that a test can see that it tested something.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch

from data_pipeline.batch import ClipBatch
from data_pipeline.order import World, padded_batch, rank_slice
from trainer import distributed
from trainer.config import MergeConfig, ModelConfig, ObjectiveConfig, OptimConfig, ParallelConfig, SSyncConfig
from trainer.engine import Engine
from trainer.model.network import VideoSlotModel
from trainer.objective import Objective
from trainer.objective.ssync import select
from trainer.patches import data_world
from trainer.process import leave
from trainer.step import train_step

WIDTH, FRAMES, STEPS, LR = 10, 3, 3, 2e-3


def features_of(step: int, clips: int, grid: tuple[int, int]) -> torch.Tensor:
    """Regions that are larger than a patch, so that labels have insides and borders."""
    random = torch.Generator().manual_seed(40 + step)
    seeds = torch.randn(clips, 1, 3, WIDTH, generator=random, dtype=torch.float64)
    places = torch.randint(0, 3, (clips, FRAMES, (grid[0] + 1) // 2, (grid[1] + 1) // 2), generator=random)
    places = places.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, : grid[0], : grid[1]].flatten(2)
    regions = seeds.expand(-1, FRAMES, -1, -1).gather(2, places[..., None].expand(-1, -1, -1, WIDTH))
    return regions + 0.5 * torch.randn(regions.shape, generator=random, dtype=torch.float64)


class DoubleEngine:
    """What a step asks of an Engine, in float64, which DeepSpeed cannot: gradients summed over all ranks, a step along them.

    In float64 another order of sums cannot move a label across a tie, so everything must agree closely.
    """

    def __init__(self, model: VideoSlotModel, accumulation: int) -> None:
        self.module, self.accumulation, self.device = model, accumulation, torch.device("cpu")
        self.patches, self.forward, self.reproducible = model.patches, model, False

    def look(self, *words):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return self.module(*words)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> None:
        grads = [distributed.all_sum(weight.grad) for weight in self.module.parameters()]
        self.norm = float(torch.nn.utils.get_total_norm(grads))
        for weight in self.module.parameters():
            weight.data -= lr * weight.grad
            weight.grad = None

    def grad_norm(self) -> float:
        return self.norm

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(self.module.named_parameters())


def run(options: dict, world: World) -> dict:
    """One scenario. A single rank runs it with all patches of all clips."""
    torch.manual_seed(5)
    stage, grid, count = options.get("stage"), tuple(options.get("grid", (7, 5))), options.get("global_batch", 3)
    patch_ranks = 1 if world.size == 1 else options["patch_ranks"]
    patches = distributed.form_patch_groups(world, patch_ranks, grid, 60)
    torch.set_default_dtype(torch.float64)  # the same first weights for both
    model = VideoSlotModel(
        ModelConfig(
            num_slots=5, slot_dim=8, feature_dim=WIDTH, grid=list(grid), predictor_heads=2, decoder_hidden=[12, 12],
            query_key_gain=3.0, decoder_path=options.get("path", "fused"), decoder_chunk_rows=30, **options.get("model", {}),
        )
    )  # fmt: skip
    dtype = torch.float64 if stage is None else torch.float32
    torch.set_default_dtype(dtype)
    model.to(dtype).patches = patches
    ssync = SSyncConfig(
        boundary_weight=1.0, interior_weight=0.7, start_fraction=0.1, max_different=5, border=options.get("border", "clamp"),
        merge=MergeConfig(threshold=0.5, source=options.get("merged_by", "A")),
    )  # fmt: skip
    objective = Objective(ObjectiveConfig(ssync=ssync), 10, patches)
    engine = _engine(model, options)
    data = data_world(world, patch_ranks)
    shares = [rank_slice(count, World(rank, data.size)) for rank in range(data.size)]
    terms, norms = [], []
    for step in range(STEPS):
        batch = _batch(step, shares, data, grid, engine.accumulation, dtype)
        real = [stop - start for start, stop in shares]
        if options.get("stray") == world.rank:
            batch = replace(batch, sample_ids=tuple(clip + 1 for clip in batch.sample_ids))
        terms.append(train_step(engine, objective, patches.cut(batch), real, step, lr=LR).terms)
        norms.append(engine.grad_norm())
    weights = {name: value.flatten().tolist() for name, value in engine.weights().items()}
    found = _seen(engine, objective, batch) if world.size == 1 else {}
    return {"terms": terms, "norms": norms, "weights": weights, **found}


def _engine(model: VideoSlotModel, options: dict) -> Any:
    accumulation = options.get("accumulation", 1)
    if "stage" not in options:
        return DoubleEngine(model, accumulation)
    optim = OptimConfig(lr=LR, max_steps=10, warmup_steps=1, decay_steps=10, eps=1e-2)
    parallel = ParallelConfig(zero_stage=options["stage"], accumulation=accumulation, device="cpu")
    return Engine(model, optim, parallel, torch.device("cpu"))


def _batch(
    step: int, shares: list[tuple[int, int]], data: World, grid: tuple[int, int], accumulation: int, dtype: torch.dtype
) -> ClipBatch:
    """This group's clips with all their patches, padded as the loader pads."""
    count, (start, stop) = shares[-1][1], shares[data.rank]
    ids = list(range(start, stop)) or [0]
    ids += ids[-1:] * (padded_batch(count, data.size, accumulation) - len(ids))
    return ClipBatch(
        features=features_of(step, count, grid).to(dtype)[ids],
        grid=grid,
        num_real=stop - start,
        sample_ids=tuple(ids),
        keys=tuple(map(str, ids)),
        starts=(0,) * len(ids),
    )


def _seen(engine: Engine, objective: Objective, batch: ClipBatch) -> dict:
    """Slots that became another, and the patches chosen in each row, over the last batch."""
    output = engine.module(batch.features)
    chosen = select(output.attn_logits, output.object_logits, output.grid, objective.config.ssync)
    merged = int((chosen.slot_map != torch.arange(chosen.slot_map.shape[1])).sum())
    rows = {name: getattr(chosen, name).unflatten(2, batch.grid).sum(dim=(0, 1, 3)).tolist() for name in ("boundary", "interior")}
    return {"merged": merged, **rows}


def main(scenarios: dict[str, dict]) -> dict[str, dict]:
    world = distributed.world_from_environment()
    distributed.start(torch.device("cpu"), 60)
    return {name: run(options, world) for name, options in scenarios.items()}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    leave(0)
