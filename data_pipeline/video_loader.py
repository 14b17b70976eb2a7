"""Video loader: shards -> whole videos for evaluation. Part of data_pipeline.loader.

Comes in: DataConfig, this rank's World. Goes out: one video a batch, as ClipBatch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import ClipBatch
from data_pipeline.clip_input import INPUTS
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.order import World
from data_pipeline.remote.address import split_root
from data_pipeline.store import ShardDataset

EVAL_VIEW = "center"


class VideoLoader:
    """Whole videos for evaluation, one a batch: each exactly once over all ranks, the same number of batches on every rank.

    A rank that runs out gets a batch with num_real=0. Damage is an error here: a score on other videos is another score.
    Iterating again starts over. `finish` is called with each batch, in the caller's thread: it may take features on a device.
    """

    def __init__(
        self,
        config: DataConfig,
        world: World,
        *,
        with_frames: bool = True,
        finish: Callable[[ClipBatch], ClipBatch] = lambda batch: batch,
    ) -> None:
        self.config, self.world, self.with_frames, self.finish = config, world, with_frames, finish
        self.dataset = ShardDataset.open(split_root(config.root, config.val_split), config.read, config.remote)
        self.dataset.check(config, views=[EVAL_VIEW])
        self.num_videos = min(len(self.dataset), len(self.dataset) if config.val_limit is None else config.val_limit)
        if self.num_videos < 1:
            raise DataError(
                f"{self.dataset.folder}: {len(self.dataset)} videos, data.val_limit={config.val_limit}; "
                f"at least one video is needed to evaluate; change data.val_limit or build the split again"
            )
        self._input = INPUTS[config.input](config, self.dataset)
        self._pool = ThreadPoolExecutor(config.read_threads, thread_name_prefix="read-videos")

    def __len__(self) -> int:
        """Batches of every rank."""
        return -(-self.num_videos // self.world.size)

    def __iter__(self) -> Iterator[ClipBatch]:
        pending: deque[Future[ClipBatch]] = deque()
        submitted = 0
        try:
            for _ in range(len(self)):
                while submitted < len(self) and len(pending) <= self.config.prefetch_steps:
                    pending.append(self._pool.submit(self._read_video, submitted))
                    submitted += 1
                yield self.finish(pending.popleft().result())
        finally:
            for read in pending:
                read.cancel()

    def close(self) -> None:
        """Stop reading; returns when no thread runs any more."""
        self.dataset.close()  # first: a read may be waiting for a server, and this ends the wait
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> VideoLoader:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _read_video(self, step: int) -> ClipBatch:
        sample_id = step * self.world.size + self.world.rank
        if sample_id >= self.num_videos:
            # Only the last step can be short; a padding batch repeats video 0 and counts nothing.
            return replace(self._load(0, step), num_real=0)
        return self._load(sample_id, step)

    def _load(self, sample_id: int, step: int) -> ClipBatch:
        sample = self.dataset.index.samples[sample_id]
        frame, shape = self._input.layout(self.dataset, [sample.size])
        features = np.empty((1, sample.frames, *shape), frame)
        cut = self._input.read(self.dataset, sample_id, EVAL_VIEW, 0, sample.frames, features[0])
        frames = self.dataset.frames(sample_id, 0, sample.frames, EVAL_VIEW) if self.with_frames else None
        ids = self.dataset.instance_ids(sample_id, 0, sample.frames, EVAL_VIEW)
        table = self.dataset.statistics_table() if self.config.input == "features" else None
        return ClipBatch(
            features=torch.from_numpy(features),
            grid=self.dataset.index.grid,
            num_real=1,
            sample_ids=(sample_id,),
            keys=(sample.key,),
            starts=(0,),
            step=step,
            codec=self._input.codec,
            cuts=() if cut is None else (cut,),
            statistics=None if table is None else torch.from_numpy(table)[None],
            frames=None if frames is None else torch.from_numpy(frames)[None],
            instance_ids=None if ids is None else torch.from_numpy(ids.astype(np.int64))[None],
        )


__all__ = ["VideoLoader"]
