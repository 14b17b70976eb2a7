"""What SSync's selection and losses cost alone as clips grow. Settings come in, rows go out: memory is linear in T*P."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.measure import median_of, peak_of_tensors, timed
from benchmarks.shapes import Shape
from benchmarks.table import Row
from trainer.config import ObjectiveConfig
from trainer.objective import ssync

MIB = 2**20


def rows(objective: ObjectiveConfig, num_slots: int, shape: Shape, rounds: int, device: torch.device) -> list[Row]:
    """One row for each (T, side) of the shape: selection, both losses and their gradient, B = 1."""
    section = f"SSync selection + losses with gradient, B=1 S={num_slots}"
    found = [_row(section, objective, num_slots, frames, side, rounds, device) for frames, side in shape.merge_areas]
    areas = [frames * side * side for frames, side in shape.merge_areas]
    memory, time = ([getattr(row, name) for row in found] for name in ("peak_mib", "cpu_ms"))
    exponent = growth_exponent(areas, memory)
    beside = f"memory grows as (T*P)^{exponent:.2f}, time as (T*P)^{growth_exponent(areas, time):.2f}"
    return [*found[:-1], replace(found[-1], ratio=exponent, beside=beside)]


def growth_exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of log(value) over log(size), least squares: 1 is linear, 2 is quadratic."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    centre_x, centre_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((one - centre_x) * (other - centre_y) for one, other in zip(x, y, strict=True))
    return over / sum((one - centre_x) ** 2 for one in x)


def _row(
    section: str, objective: ObjectiveConfig, num_slots: int, frames: int, side: int, rounds: int, device: torch.device
) -> Row:
    random = torch.Generator().manual_seed(0)
    attn, objects = (
        torch.randn(1, frames, num_slots, side * side, generator=random).to(device).requires_grad_() for _ in range(2)
    )

    def call() -> None:
        _losses(attn, objects, (side, side), objective).backward()
        attn.grad = objects.grad = None

    call()
    seconds = median_of([timed(call, device) for _ in range(rounds)])
    return Row(
        section=section,
        name=f"T*P = {frames * side * side}  ({frames} x {side}x{side})",
        cpu_ms=seconds.cpu * 1e3,
        wall_ms=seconds.wall * 1e3,
        peak_mib=peak_of_tensors(call, device).bytes / MIB,
    )


def _losses(attn_logits: Tensor, object_logits: Tensor, grid: tuple[int, int], objective: ObjectiveConfig) -> Tensor:
    selection = ssync.select(attn_logits, object_logits, grid, objective.ssync)
    boundary = ssync.boundary_term(object_logits, selection, objective.ssync)
    interior = ssync.interior_term(attn_logits, selection, objective.ssync)
    return boundary.sum / boundary.count.clamp(min=1) + interior.sum / interior.count.clamp(min=1)
