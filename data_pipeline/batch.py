"""ClipBatch: what a training or evaluation step eats. The contract between data_pipeline and trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_pipeline.codec import CODECS
from data_pipeline.views import Cut


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipBatch:
    """Clips of one rank for one step.

    Shapes: features as they are stored: (B, T, P, E) for codecs of plain numbers, uint8 (B, T, bytes of a frame) for int8;
    P = grid[0] * grid[1], row-major. statistics float32 (B, 2, E): mean and scale of every channel in the clip's dataset, where
    the codec needs them. Where features are taken in training, codec is "frames": features are uint8 (B, N + T, H, W, 3), the
    first N = frames_before of each clip only context, and `cuts` say what each clip shows.
    frames uint8 (B, T, H, W, 3) and instance_ids int64 (B, T, H, W), only where asked for (evaluation).
    The first `num_real` clips are real; the rest repeat a real one so that every rank has the same B, and count nothing.
    """

    features: Tensor
    grid: tuple[int, int]
    num_real: int
    sample_ids: tuple[int, ...]
    keys: tuple[str, ...]
    starts: tuple[int, ...]
    positions: tuple[int, ...] = ()  # of the clips in the endless stream of all ranks; evaluation has none
    step: int = 0
    epoch: int = 0
    codec: str = "float32"
    statistics: Tensor | None = None
    cuts: tuple[Cut, ...] = ()
    frames_before: int = 0
    frames: Tensor | None = None
    instance_ids: Tensor | None = None

    @property
    def size(self) -> int:
        return self.features.shape[0]

    @property
    def num_frames(self) -> int:
        """T, of a clip."""
        return self.features.shape[1] - self.frames_before

    def decoded(self) -> Tensor:
        """What the model reads: float32 (B, T, P, E) on the device where the batch lies."""
        return CODECS[self.codec].restore(self.features, self.grid[0] * self.grid[1], self.statistics)

    def band(self, first: int, last: int) -> ClipBatch:
        """The same clips, of the patch grid only rows [first, last), still as they are stored; a copy."""
        rows, columns = self.grid
        patches = slice(first * columns, last * columns)
        cut = CODECS[self.codec].cut(self.features, rows * columns, patches, self.statistics)
        return replace(self, features=cut, grid=(last - first, columns))

    def to(self, device: torch.device) -> ClipBatch:
        """The same batch with its features on `device`, still as they are stored; frames and masks stay where they are."""
        statistics = None if self.statistics is None else self.statistics.to(device, non_blocking=True)
        return replace(self, features=self.features.to(device, non_blocking=True), statistics=statistics)

    def split(self, num_parts: int) -> Iterator[ClipBatch]:
        """Cut along B into `num_parts` micro-batches of equal size (B must divide)."""
        size = self.size // num_parts
        assert size * num_parts == self.size, (self.size, num_parts)
        for part in range(num_parts):
            cut = slice(part * size, (part + 1) * size)
            yield replace(
                self,
                features=self.features[cut],
                num_real=min(max(self.num_real - part * size, 0), size),
                sample_ids=self.sample_ids[cut],
                keys=self.keys[cut],
                starts=self.starts[cut],
                positions=self.positions[cut],
                statistics=None if self.statistics is None else self.statistics[cut],
                cuts=self.cuts[cut],
                frames=None if self.frames is None else self.frames[cut],
                instance_ids=None if self.instance_ids is None else self.instance_ids[cut],
            )
