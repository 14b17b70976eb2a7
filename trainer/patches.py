"""Patch parallelism: ranks of a group share the patches of the same clips, each holds a band of rows of the patch grid.

Comes in: this rank's place and the whole grid. Goes out: a PatchGroup, with which the model and the objective ask for the few
things that they cannot know of a band alone: sums over all patches, and the rows next to the band. ALONE is one rank with all
patches; every question is then answered without any communication.
Parameter gradients are sums over the group, as they are sums over clips: each rank's backward gives the part of its patches.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from data_pipeline.batch import ClipBatch
from data_pipeline.errors import ConfigError
from data_pipeline.order import World


@dataclass(frozen=True, slots=True)
class PatchGroup:
    """The ranks that share this rank's clips. `grid`: whole patch grid (Y, X); `index`: whose band from the top.

    `group`: communicator of those ranks; `peers`: of the ranks that hold the same band of other clips, None where there is none.
    """

    size: int = 1
    index: int = 0
    grid: tuple[int, int] = (0, 0)
    group: dist.ProcessGroup | None = None
    peers: dist.ProcessGroup | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """First and last + 1 of this rank's rows; bands differ by one row at most."""
        return self.grid[0] * self.index // self.size, self.grid[0] * (self.index + 1) // self.size

    def grid_of_band(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Of the whole `grid`, what this rank holds."""
        return grid if self.size == 1 else (self.rows[1] - self.rows[0], grid[1])

    @property
    def band(self) -> slice | None:
        """This rank's patches among those of a frame, row-major; None: all."""
        return None if self.size == 1 else slice(self.rows[0] * self.grid[1], self.rows[1] * self.grid[1])

    def cut(self, batch: ClipBatch) -> ClipBatch:
        """Of whole frames, this rank's band."""
        return batch if self.size == 1 else batch.band(*self.rows)

    def doubt(self, batch: ClipBatch) -> float:
        """A number whose sum over the group is 0 where all its ranks hold the same clips."""
        if self.size == 1:
            return 0.0
        clips = float(zlib.crc32(repr((batch.sample_ids, batch.starts)).encode()))
        return -clips if self.index else (self.size - 1) * clips

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the group of values with gradient; its backward is again a sum, since each rank goes on with its own patches
        and so holds only a part of the result's gradient."""
        return values if self.size == 1 else _Sum.apply(values, self.group)

    @torch.no_grad()
    def total(self, values: Tensor) -> Tensor:
        """Sum over the group of values without gradient, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    @torch.no_grad()
    def mean_over_clip(self, values: Tensor) -> Tensor:
        """Mean over frames and all patches: (B, T, S, P of the band) -> (B, 1, S, 1)."""
        if self.size == 1:
            return values.mean(dim=(1, 3), keepdim=True)
        # float64: what lies at the mean must not change side with the number of ranks
        sums = self.total(values.sum(dim=(1, 3), keepdim=True, dtype=torch.float64))
        return (sums / (values.shape[1] * math.prod(self.grid))).to(values.dtype)

    @torch.no_grad()
    def with_next_rows(self, labels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int], slice]:
        """Labels of the band and of one row on each side where there is one: (B, T, P) -> (B, T, P'), their grid, and where the
        band lies among P'. `grid` is the band's."""
        if self.size == 1:
            return labels, grid, slice(None)
        cells = labels.unflatten(2, grid)
        ends = torch.stack([cells[:, :, 0], cells[:, :, -1]]).contiguous()
        rows = [torch.empty_like(ends) for _ in range(self.size)]
        dist.all_gather([row.view(torch.uint8) for row in rows], ends.view(torch.uint8), group=self.group)
        above = [rows[self.index - 1][1].unsqueeze(2)] if self.index else []
        below = [rows[self.index + 1][0].unsqueeze(2)] if self.index + 1 < self.size else []
        wider = torch.cat([*above, cells, *below], dim=2)
        first = len(above) * grid[1]
        return wider.flatten(2), (wider.shape[2], grid[1]), slice(first, first + labels.shape[2])


ALONE = PatchGroup()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def data_world(world: World, patch_ranks: int) -> World:
    """This rank's place among the groups: what decides which clips it reads."""
    return World(world.rank // patch_ranks, world.size // patch_ranks)


def check_layout(world: World, patch_ranks: int, grid: tuple[int, int], ranks_on_node: int) -> None:
    """Raises ConfigError where ranks cannot form such groups."""
    for what, number in (("the run", world.size), ("this node", ranks_on_node)):
        if number % patch_ranks:
            raise ConfigError(
                f"parallel.patch_ranks={patch_ranks} does not divide the {number} rank(s) of {what}; so many neighbouring ranks "
                "of a node share a clip's patches; change it or the number of ranks"
            )
    if patch_ranks > grid[0]:
        raise ConfigError(f"parallel.patch_ranks={patch_ranks}; the patch grid has only {grid[0]} rows to share; set it lower")
