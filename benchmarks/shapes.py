"""The shapes that can be measured. A name comes in, settings go out. No torch import.

Widths and losses are those of configs/; a shape adds the batch, and may change the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is measured.

    `overrides` compose the run; `loader_grid` is the patch grid of the loader's shards; `planned_samples` is the size of a
    dataset whose order is planned; `merge_areas` are (T, side) of SSync's own rows, T*side*side patches each.
    """

    overrides: tuple[str, ...]
    clips: int
    frames: int
    loader_grid: tuple[int, int]
    loader_videos: int = 24
    planned_samples: int = 10_000_000
    merge_areas: tuple[tuple[int, int], ...] = ((4, 32), (16, 32), (16, 64))


SHAPES = {
    "movi_c_small": Shape(overrides=("experiment=ssync_movi_c", "model.grid=[16,16]"), clips=1, frames=4, loader_grid=(24, 24)),
    "movi_c": Shape(overrides=("experiment=ssync_movi_c",), clips=1, frames=4, loader_grid=(24, 24)),
    "ytvis": Shape(overrides=("experiment=ssync_ytvis2021",), clips=1, frames=4, loader_grid=(37, 37), loader_videos=8),
    "coco": Shape(overrides=("experiment=ssync_coco2017",), clips=4, frames=1, loader_grid=(16, 16), loader_videos=96),
    "demo": Shape(
        overrides=("experiment=demo",),
        clips=8,
        frames=4,
        loader_grid=(12, 12),
        loader_videos=96,
    ),
}

# --quick: the same code on numbers that mean nothing
QUICK = Shape(
    overrides=(
        "experiment=ssync_movi_c",
        "model.grid=[3,4]",
        "model.num_slots=5",
        "model.slot_dim=8",
        "model.feature_dim=10",
        "model.decoder_hidden=[16,16]",
    ),
    clips=2,
    frames=3,
    loader_grid=(3, 4),
    loader_videos=6,
    planned_samples=10_000,
    merge_areas=((2, 4), (4, 8), (8, 16)),
)


def compose_run(shape: Shape) -> RunConfig:
    """The run's settings with SSync's losses on from the first step."""
    from data_pipeline.compose import compose
    from trainer.config import RunConfig

    return compose("train", RunConfig, [*shape.overrides, "objective.ssync.start_fraction=0"])
