"""How time and memory grow: cases along one axis come in, a row each goes out, with the exponent of the axis on the last."""

from __future__ import annotations

import gc
import importlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.case import Case
from benchmarks.measure import median_of, peak_of_tensors, timed
from benchmarks.single import MIB
from benchmarks.table import Row

CLIP = Case(batch=1, frames=4, patches=1024)
SSYNC = [
    replace(CLIP, path="fast", frames=frames, patches=patches)
    for frames, patches in ((4, 1024), (16, 1024), (16, 4096), (64, 4096))
]
SSYNC_SLOTS = [replace(CLIP, path="fast", frames=16, slots=slots) for slots in (6, 12, 24)]
SRL = [replace(CLIP, path=path, frames=frames) for path in ("decoder", "encoder") for frames in (4, 16, 64)]
STEP_FRAMES = [replace(CLIP, patches=256, frames=frames, hidden=256, width=128) for frames in (8, 32, 128)]


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(value) over log(size), least squares: 1 is linear, 2 is quadratic."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    centre_x, centre_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((one - centre_x) * (other - centre_y) for one, other in zip(x, y, strict=True))
    return over / sum((one - centre_x) ** 2 for one in x)


def rows(rounds: int) -> list[Row]:
    """SSync over patches and slots, SRL over patches, a step over frames. Dear ones are measured once."""
    return [
        *series("benchmarks.ssync", "SSync alone", "T*P", SSYNC, rounds),
        *series("benchmarks.ssync", "SSync alone, T*P=16384", "S", SSYNC_SLOTS, rounds),
        *series("benchmarks.srl", "SRL's decoder loss", "T*P", SRL[:3], 1),
        *series("benchmarks.srl", "SRL's encoder loss", "T*P", SRL[3:], 1),
        *series("benchmarks.step", "training step, P=256 E=128 hidden 256", "T", STEP_FRAMES, 1),
    ]


AXES = {"T*P": lambda case: case.frames * case.patches, "S": lambda case: case.slots, "T": lambda case: case.frames}


def series(module: str, title: str, axis: str, cases: Sequence[Case], rounds: int) -> list[Row]:
    """Time: median over rounds after one that does not count; memory: the allocator's peak, the same on every machine."""
    sizes = [AXES[axis](case) for case in cases]
    found = [
        _row(module, f"{title}, growing {axis}", f"{axis} = {size}", case, rounds)
        for size, case in zip(sizes, cases, strict=True)
    ]
    memory, time = ([getattr(row, name) for row in found] for name in ("peak_mib", "cpu_ms"))
    exponent = growth_exponent(sizes, memory)
    beside = f"memory grows as ({axis})^{exponent:.2f}, time as ({axis})^{growth_exponent(sizes, time):.2f}"
    return [*found[:-1], replace(found[-1], ratio=exponent, beside=beside)]


def _row(module: str, section: str, name: str, case: Case, rounds: int) -> Row:
    call, device = importlib.import_module(module).prepare(case), torch.device(case.device)
    gc.collect()
    memory = peak_of_tensors(call, device).bytes / MIB
    seconds = median_of([timed(call, device) for _ in range(rounds)])
    return Row(section=section, name=name, cpu_ms=seconds.cpu * 1e3, wall_ms=seconds.wall * 1e3, peak_mib=memory)
