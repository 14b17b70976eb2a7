"""What SSync's selection and losses cost alone as clips grow. Settings come in, rows go out: memory is linear in T*P."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.growth import growth_exponent
from benchmarks.measure import median_of, peak_of_tensors, timed
from benchmarks.shapes import Shape
from benchmarks.ssync import fast
from benchmarks.table import Row
from trainer.config import ObjectiveConfig

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


def _row(
    section: str, objective: ObjectiveConfig, num_slots: int, frames: int, side: int, rounds: int, device: torch.device
) -> Row:
    random = torch.Generator().manual_seed(0)
    attn, objects = (
        torch.randn(1, frames, num_slots, side * side, generator=random).to(device).requires_grad_() for _ in range(2)
    )

    def call() -> None:
        fast(attn, objects, (side, side), objective.ssync).backward()
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
