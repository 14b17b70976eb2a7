"""Loader: shards -> ClipBatch. Last arrow of the data half.

Comes in: DataConfig, this rank's World, a position of the stream. Goes out: one ClipBatch per step (ClipLoader, endless) or one
whole video at a time (VideoLoader, evaluation). Reads run in threads of this process: a trip through a worker process costs many
times the read itself. What a step holds follows from the position alone, so threads and prefetching cannot change it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import ClipBatch
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.order import Order, Position, World, draw, generator, padded_batch, rank_slice
from data_pipeline.store import ShardDataset

EVAL_VIEW = "center"


class _Read(NamedTuple):
    """What one read gave: a clip lies in the batch already."""

    sample_id: int
    start: int


class _Pending(NamedTuple):
    step: int
    epoch: int
    features: Tensor
    reads: list[Future[_Read]]
    num_real: int


class ClipLoader:
    """Training clips of one rank, step after step without end; every video once per epoch over all ranks.

    A clip is one of the video's whole chunks of clip_len frames, drawn per video and epoch, in one of the stored views, drawn
    likewise. Videos shorter than clip_len have no place in the order; `excluded` counts them.
    Source: SlotContrast, released code, for the chunks.
    Differs: each video comes once per epoch; there, shards are drawn with replacement.
    """

    def __init__(
        self, config: DataConfig, world: World, *, seed: int, global_batch: int, accumulation: int = 1, position: int = 0
    ) -> None:
        self.config, self.world, self.seed, self.global_batch = config, world, seed, global_batch
        self.dataset = ShardDataset.open(Path(config.root) / config.train_split)
        self.dataset.check(config)
        self.position = position
        self.wait_seconds = 0.0
        self.batch_size = padded_batch(global_batch, world.size, accumulation)
        frames = np.array([sample.frames for sample in self.dataset.index.samples], dtype=np.int64)
        self._eligible = np.flatnonzero(frames >= config.clip_len)
        self.excluded = len(frames) - len(self._eligible)
        if not len(self._eligible):
            raise DataError(
                f"{self.dataset.folder}: none of {len(frames)} videos has data.clip_len={config.clip_len} frames; "
                f"at least one must; change data.clip_len"
            )
        self.order = Order(self._eligible_per_shard(), seed, config.block_shards)
        self._damage = _Damage(self.dataset, len(self._eligible), config.max_skip_fraction)
        self._next_position = position
        self._pending: deque[_Pending] = deque()
        self._pool = ThreadPoolExecutor(config.read_threads, thread_name_prefix="read")
        self._pinned = torch.cuda.is_available()

    @property
    def num_samples(self) -> int:
        """Videos of an epoch."""
        return self.order.num_samples

    @property
    def steps_per_epoch(self) -> int:
        """Steps that begin in an epoch; epochs may end inside a step."""
        return -(-self.num_samples // self.global_batch)

    @property
    def skipped(self) -> int:
        """Damaged videos met so far on this rank; each was replaced by the next sound one."""
        return len(self._damage.reasons)

    @property
    def skip_reasons(self) -> dict[str, str]:
        """Why, by the video's key."""
        return dict(self._damage.reasons)

    def state(self) -> Position:
        """The whole resume state: pass its `position` to a new loader."""
        return Position(self.dataset.index.version, self.seed, self.global_batch, self.position)

    def queue_depth(self) -> int:
        """Steps that are read and wait to be taken."""
        return sum(all(read.done() for read in pending.reads) for pending in self._pending)

    def __iter__(self) -> Iterator[ClipBatch]:
        return self

    def __next__(self) -> ClipBatch:
        self._prefetch(1)
        pending = self._pending.popleft()
        began = time.perf_counter()
        # Every read is awaited before one of them may raise: none may still write into a batch that is given up.
        errors = [error for read in pending.reads if (error := read.exception()) is not None]
        self.wait_seconds += time.perf_counter() - began
        if errors:
            raise errors[0]
        batch = self._finish(pending)
        self.position += self.global_batch
        self._prefetch(self.config.prefetch_steps)
        return batch

    def close(self) -> None:
        """Stop reading; returns when no thread runs any more."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self.dataset.close()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _eligible_per_shard(self) -> list[int]:
        shards = np.array([sample.shard for sample in self.dataset.index.samples], dtype=np.int64)[self._eligible]
        return np.bincount(shards, minlength=len(self.dataset.index.shards)).tolist()

    def _prefetch(self, num_steps: int) -> None:
        while len(self._pending) < num_steps:
            self._pending.append(self._submit(self._next_position))
            self._next_position += self.global_batch

    def _submit(self, position: int) -> _Pending:
        epochs, places = self.order.batch(position, self.global_batch)
        start, stop = rank_slice(self.global_batch, self.world)
        num_real = stop - start
        # A rank without a share of the batch still needs a clip of the right shape.
        mine = range(start, stop) if num_real else range(min(start, self.global_batch - 1), min(start, self.global_batch - 1) + 1)
        features = torch.empty(self._shape(), dtype=self._dtype(), pin_memory=self._pinned)
        rows = features.numpy()
        reads = [
            self._pool.submit(self._read_clip, int(epochs[place]), int(places[place]), rows[row])
            for row, place in enumerate(mine)
        ]
        return _Pending(position // self.global_batch, int(epochs[0]), features, reads, num_real)

    def _shape(self) -> tuple[int, int, int, int]:
        index = self.dataset.index
        return self.batch_size, self.config.clip_len, index.num_patches, int(index.features["width"])

    def _dtype(self) -> torch.dtype:
        return torch.from_numpy(np.empty(0, self.dataset.codec.decoded)).dtype

    def _read_clip(self, epoch: int, place: int, out: np.ndarray) -> _Read:
        """Read the sample at `place` of the eligible ones, or the next one that is sound."""
        while True:
            sample_id = int(self._eligible[place])
            random = generator(self.seed, epoch, sample_id)
            clip_len = self.config.clip_len
            start = clip_len * draw(random, self.dataset.index.samples[sample_id].frames // clip_len)
            view = self.config.views[draw(random, len(self.config.views))]
            try:
                self.dataset.features(sample_id, view, start, clip_len, out)
                return _Read(sample_id, start)
            except DataError as error:
                self._damage.add(sample_id, error)
            place = (place + 1) % self.num_samples

    def _finish(self, pending: _Pending) -> ClipBatch:
        clips = [read.result() for read in pending.reads]
        num_read, size = len(clips), self.batch_size
        pending.features[num_read:] = pending.features[0]
        clips += [clips[0]] * (size - num_read)
        return ClipBatch(
            features=pending.features,
            grid=self.dataset.index.grid,
            num_real=pending.num_real,
            sample_ids=tuple(clip.sample_id for clip in clips),
            keys=tuple(self.dataset.index.samples[clip.sample_id].key for clip in clips),
            starts=tuple(clip.start for clip in clips),
            step=pending.step,
            epoch=pending.epoch,
        )


class _Damage:
    """Counts damaged samples and says when there are too many."""

    def __init__(self, dataset: ShardDataset, num_samples: int, max_fraction: float) -> None:
        self.reasons: dict[str, str] = {}
        self._dataset, self._num_samples, self._max_fraction = dataset, num_samples, max_fraction
        self._lock = threading.Lock()

    def add(self, sample_id: int, error: DataError) -> None:
        """Raises DataError when the share of damaged samples passes the limit."""
        with self._lock:
            self.reasons.setdefault(self._dataset.index.samples[sample_id].key, str(error))
            count = len(self.reasons)
        if count > self._max_fraction * self._num_samples or count >= self._num_samples:
            raise DataError(
                f"{error}; {count} of {self._num_samples} samples are damaged, "
                f"limit data.max_skip_fraction={self._max_fraction}; "
                f"find all with python -m data_pipeline.verify {self._dataset.folder}"
            )


class VideoLoader:
    """Whole videos for evaluation, one a batch: each exactly once over all ranks, the same number of batches on every rank.

    A rank that runs out gets a batch with num_real=0. Damage is an error here: a score on other videos is another score.
    Iterating again starts over.
    """

    def __init__(self, config: DataConfig, world: World, *, with_frames: bool = True) -> None:
        self.config, self.world, self.with_frames = config, world, with_frames
        self.dataset = ShardDataset.open(Path(config.root) / config.val_split)
        self.dataset.check(config, views=[EVAL_VIEW])
        self.num_videos = min(len(self.dataset), len(self.dataset) if config.val_limit is None else config.val_limit)
        if self.num_videos < 1:
            raise DataError(
                f"{self.dataset.folder}: {len(self.dataset)} videos, data.val_limit={config.val_limit}; "
                f"at least one video is needed to evaluate; change data.val_limit or build the split again"
            )
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
                yield pending.popleft().result()
        finally:
            for read in pending:
                read.cancel()

    def close(self) -> None:
        """Stop reading; returns when no thread runs any more."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.dataset.close()

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
        features = self.dataset.features(sample_id, EVAL_VIEW, 0, sample.frames)
        frames = self.dataset.frames(sample_id, 0, sample.frames, EVAL_VIEW) if self.with_frames else None
        ids = self.dataset.instance_ids(sample_id, 0, sample.frames, EVAL_VIEW)
        return ClipBatch(
            features=torch.from_numpy(features)[None],
            grid=self.dataset.index.grid,
            num_real=1,
            sample_ids=(sample_id,),
            keys=(sample.key,),
            starts=(0,),
            step=step,
            frames=None if frames is None else torch.from_numpy(frames)[None],
            instance_ids=None if ids is None else torch.from_numpy(ids.astype(np.int64))[None],
        )


__all__ = ["ClipLoader", "VideoLoader"]
