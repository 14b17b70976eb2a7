"""Command: everything SSync adds after the decoder: selection, both losses and their gradient. `python -m benchmarks.ssync`.

Paths: fast (the trainer's), plain (the direct way). Both logit maps are there before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import plain_ssync
from benchmarks.case import Case
from benchmarks.single import main
from trainer.config import SSyncConfig
from trainer.objective import ssync

PATHS = ("fast", "plain")


def prepare(case: Case) -> Callable[[], object]:
    config = case.run().objective.ssync
    draw = torch.Generator().manual_seed(0)
    shape = (case.batch, case.frames, case.slots, case.patches)
    attn, objects = (torch.randn(shape, generator=draw).to(case.device).requires_grad_() for _ in range(2))

    def call() -> None:
        if case.path == "plain":
            loss = plain_ssync.loss(attn, objects, case.grid, config.merge.threshold)
        else:
            loss = fast(attn, objects, case.grid, config)
        loss.backward()
        attn.grad = objects.grad = None

    return call


def fast(attn_logits: Tensor, object_logits: Tensor, grid: tuple[int, int], config: SSyncConfig) -> Tensor:
    """Mean over the chosen patches of each, as one rank alone would have them."""
    selection = ssync.select(attn_logits, object_logits, grid, config)
    boundary = ssync.boundary_term(object_logits, selection, config)
    interior = ssync.interior_term(attn_logits, selection, config)
    return boundary.sum / boundary.count.clamp(min=1) + interior.sum / interior.count.clamp(min=1)


if __name__ == "__main__":
    raise SystemExit(main("benchmarks.ssync", PATHS))
