"""What a batch is filled with: features as shards store them, or frames for an extractor in the training loop.

Comes in: an open split, a sample, a view, a window of frames. Goes out: the bytes of a clip in a batch's memory, and for frames
the Cut that is still to be made of them. Part of data_pipeline.loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.features import FRAMES_BEFORE
from data_pipeline.store import ShardDataset
from data_pipeline.views import Cut, cut_of, prepare

Layout = tuple[np.dtype[Any], tuple[int, ...]]  # plain dtype and shape of one frame in a batch


class ClipInput(Protocol):
    """`codec` is what the batch calls its content; before a training clip's frames come `frames_before` others."""

    codec: str
    frames_before: int

    def layout(self, dataset: ShardDataset, sizes: Iterable[tuple[int, int]]) -> Layout:
        """`sizes` are the native sizes that can meet in a batch."""

    def read(self, dataset: ShardDataset, sample_id: int, view: str, start: int, count: int, out: np.ndarray) -> Cut | None:
        """Frames [start, start + count) into the end of `out`, whose leading axis is time; in what is left, the ones before.

        Raises DataError; `out` holds nothing of use then.
        """


class StoredFeatures:
    """Features as they are stored; the device restores them."""

    frames_before = 0

    def __init__(self, config: DataConfig, dataset: ShardDataset) -> None:
        self.codec = str(dataset.index.features["codec"])

    def layout(self, dataset: ShardDataset, sizes: Iterable[tuple[int, int]]) -> Layout:
        return dataset.batch_layout

    def read(self, dataset: ShardDataset, sample_id: int, view: str, start: int, count: int, out: np.ndarray) -> Cut | None:
        dataset.read_features(sample_id, view, start, count, out)
        return None


class StoredFrames:
    """Frames as uint8 at native size, whole; the device resizes, cuts and mirrors them.

    Differs: videos of several sizes cannot lie in one batch like that. They are cut here, and rounded to 8 bits again.
    """

    codec = "frames"

    def __init__(self, config: DataConfig, dataset: ShardDataset) -> None:
        self.image_size = config.image_size
        self.frames_before = FRAMES_BEFORE.get(config.features, 0)

    def layout(self, dataset: ShardDataset, sizes: Iterable[tuple[int, int]]) -> Layout:
        square = (self.image_size, self.image_size)
        different = set(sizes)
        return np.dtype(np.uint8), (*(different.pop() if len(different) == 1 else square), 3)

    def read(self, dataset: ShardDataset, sample_id: int, view: str, start: int, count: int, out: np.ndarray) -> Cut | None:
        sample, size = dataset.index.samples[sample_id], self.image_size
        # A video begins mirrored: before its first frame comes its second, so that a difference to the frame before is one there.
        wanted = [min(abs(number), sample.frames - 1) for number in range(start + count - len(out), start + count)]
        frames = dataset.whole_frames(sample_id, wanted)
        rules = (size, str(dataset.index.features["resize"]), sample.key)
        if out.shape[1:3] == tuple(sample.size):
            out[:] = frames
            return cut_of(sample.size, view, *rules)
        squares = prepare(frames, view, *rules).permute(0, 2, 3, 1)
        out[:] = (squares * 255).round_().numpy()
        return cut_of((size, size), "center", *rules)


INPUTS: dict[str, Callable[[DataConfig, ShardDataset], ClipInput]] = {"features": StoredFeatures, "frames": StoredFrames}

__all__ = ["INPUTS", "ClipInput"]
