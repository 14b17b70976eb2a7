"""Loader: shards -> ClipBatch. Last arrow of the data half.

Comes in: DataConfig, this rank's World, a position of the stream. Goes out: one ClipBatch per step, without end (evaluation reads
whole videos: data_pipeline.video_loader). Reads run in threads of this process: a trip through a worker process costs many times
the read itself. What a step holds follows from the position alone, so threads and prefetching cannot change it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import astuple
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import ClipBatch
from data_pipeline.batch_buffers import BatchBuffers
from data_pipeline.clip_input import INPUTS, ClipInput
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError, FetchError
from data_pipeline.mixture import Mixture, Part, Places
from data_pipeline.order import Draws, Position, World, padded_batch, rank_places
from data_pipeline.shard_files import FileCounters, LocalFiles
from data_pipeline.store import ShardDataset
from data_pipeline.video_loader import VideoLoader
from data_pipeline.views import Cut, draw_view


class _Clip(NamedTuple):
    """What one read gave: the clip's bytes lie in the batch already. `sample_id` counts through all datasets."""

    dataset: int
    sample_id: int
    key: str
    start: int
    cut: Cut | None


class _Pending(NamedTuple):
    position: int
    features: Tensor
    reads: list[Future[list[_Clip]]]
    num_real: int


class ClipLoader:
    """Training clips of one rank, step after step without end; every video once per epoch over all ranks.

    A clip is one of the video's whole chunks of clip_len frames, drawn per video and epoch, in one of data.views, drawn
    likewise. Videos shorter than clip_len have no place in the order; `excluded` counts them.
    A batch is its holder's: its memory is used for a later one only when no tensor, view or array of it is left.
    Source: SlotContrast, released code, for the chunks.
    Differs: each video comes once per epoch; there, shards are drawn with replacement.
    """

    def __init__(
        self, config: DataConfig, world: World, *, seed: int, global_batch: int, accumulation: int = 1, position: int = 0
    ) -> None:
        self.config, self.world, self.seed, self.global_batch = config, world, seed, global_batch
        self.mixture = Mixture.open(config, seed)
        self.position = position
        self.wait_seconds = 0.0
        self.batch_size = padded_batch(global_batch, world.size, accumulation)
        places = rank_places(global_batch, world, self.mixture.lanes)
        # A rank without a share of the batch still needs a clip of the right shape.
        self._mine = np.array(places or [min(places.start, global_batch - 1)], dtype=np.int64)
        self._num_real = len(places)
        self._damage = [_Damage(part, config.max_skip_fraction) for part in self.mixture.parts]
        self._next_position = position
        self._pending: deque[_Pending] = deque()
        self._pool = ThreadPoolExecutor(config.read_threads, thread_name_prefix="read")
        self._lock, self._closed = threading.Lock(), False  # close() may come from another thread while this one reads on
        pinned = torch.cuda.is_available()
        self._input: ClipInput = INPUTS[config.input](config, self.dataset)
        frame, shape = self._input.layout(self.dataset, self.mixture.frame_sizes)
        length = self._input.frames_before + config.clip_len
        # One batch with the consumer, one on the way there, the rest being read.
        self._buffers = BatchBuffers((self.batch_size, length, *shape), frame, config.prefetch_steps + 2, pinned)
        self._statistics = _statistics_table(self.mixture, pinned) if config.input == "features" else None
        self._ready: ClipBatch | None = None  # the next batch, where somebody has looked at it already
        self._prefetcher = _ShardPrefetcher(self.mixture, self._mine, global_batch, config.block_shards)

    @property
    def dataset(self) -> ShardDataset:
        """The first dataset: what it says about its features holds for all."""
        return self.mixture.parts[0].dataset

    @property
    def num_samples(self) -> int:
        """Videos of an epoch."""
        return self.mixture.num_samples

    @property
    def excluded(self) -> int:
        """Videos that are shorter than a clip."""
        return sum(part.excluded for part in self.mixture.parts)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that begin in an epoch; epochs may end inside a step."""
        return -(-self.num_samples // self.global_batch)

    @property
    def skipped(self) -> int:
        """Damaged videos met so far on this rank; each was replaced by the next sound one."""
        return len(self.skip_reasons)

    @property
    def skip_reasons(self) -> dict[str, str]:
        """Why, by the video's key."""
        return {key: reason for damage in self._damage for key, reason in damage.reasons.items()}

    @property
    def bytes_read(self) -> int:
        """Bytes of features, or of encoded frames, read from shards so far, ahead of the consumer too."""
        return sum(part.dataset.bytes_read for part in self.mixture.parts)

    @property
    def file_counters(self) -> FileCounters:
        """What fetching shards has cost so far, over all datasets."""
        counters = [astuple(part.dataset.files.counters) for part in self.mixture.parts]
        return FileCounters(*map(sum, zip(*counters, strict=True)))

    def state(self) -> Position:
        """The whole resume state: pass its `position` to a new loader."""
        return Position(self.mixture.version, self.seed, self.global_batch, self.position, self.mixture.rules)

    def queue_depth(self) -> int:
        """Steps that are read and wait to be taken."""
        return sum(all(read.done() for read in pending.reads) for pending in self._pending)

    def __iter__(self) -> Iterator[ClipBatch]:
        return self

    def ready(self) -> ClipBatch | None:
        """The very batch that comes next, where all of it is read by now. The stream stays where it is."""
        if self._ready is None and self._pending:
            reads = self._pending[0].reads
            if all(read.done() and read.exception() is None for read in reads):
                self._ready = self._finish(self._pending[0])
        return self._ready

    def __next__(self) -> ClipBatch:
        self._read_ahead(1)
        pending = self._pending.popleft()
        began = time.perf_counter()
        # Every read is awaited before one of them may raise: none may still write into a batch that is given up.
        errors = [error for read in pending.reads if (error := self._error_of(read)) is not None]
        self.wait_seconds += time.perf_counter() - began
        if errors:
            raise errors[0]
        batch, self._ready = self._ready or self._finish(pending), None
        self.position += self.global_batch
        self._read_ahead(self.config.prefetch_steps)
        return batch

    def close(self) -> None:
        """Stop reading; returns when no thread runs any more."""
        with self._lock:
            self._closed = True
        self.mixture.close()  # first: a read may be waiting for a server, and this ends the wait
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._ready = None

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_ahead(self, num_steps: int) -> None:
        while len(self._pending) < num_steps:
            self._prefetcher.announce(self._next_position)
            self._pending.append(self._submit(self._next_position))
            self._next_position += self.global_batch

    def _submit(self, position: int) -> _Pending:
        places = self.mixture.at(position + self._mine)
        features = self._buffers.take()
        rows = features.numpy()
        count, threads = len(self._mine), self.config.read_threads
        cuts = [slice(count * part // threads, count * (part + 1) // threads) for part in range(threads)]
        with self._lock:
            if self._closed:
                raise self._closed_error()
            reads = [
                self._pool.submit(self._read_clips, Places(*(axis[cut] for axis in places)), rows[cut])
                for cut in cuts
                if cut.stop > cut.start
            ]
        return _Pending(position, features, reads, self._num_real)

    def _error_of(self, read: Future[list[_Clip]]) -> BaseException | None:
        try:
            return read.exception()
        except CancelledError:
            return self._closed_error()

    def _closed_error(self) -> FetchError:
        return FetchError(f"{self.dataset.folder}: nothing is read any more, because the reader was closed")

    def _read_clips(self, places: Places, rows: np.ndarray) -> list[_Clip]:
        draws = Draws()
        listed = zip(places.dataset.tolist(), places.epoch.tolist(), places.place.tolist(), rows, strict=True)
        return [self._read_clip(draws, number, epoch, place, row) for number, epoch, place, row in listed]

    def _read_clip(self, draws: Draws, number: int, epoch: int, place: int, out: np.ndarray) -> _Clip:
        """Read the sample at `place` of a dataset's eligible ones, or the next one that is sound."""
        part, clip_len, views = self.mixture.parts[number], self.config.clip_len, self.config.views
        while True:
            local = int(part.eligible[place])
            sample = part.dataset.index.samples[local]
            sample_id = int(self.mixture.first_ids[number]) + local
            draws.seek(self.seed, epoch, sample_id)
            start = clip_len * draws.below(sample.frames // clip_len)
            view = draw_view(views, draws.below)
            try:
                cut = self._input.read(part.dataset, local, view, start, clip_len, out)
                return _Clip(number, sample_id, sample.key, start, cut)
            except FetchError:  # not the sample's fault, and elsewhere it may be read: every rank must see the same samples
                raise
            except DataError as error:
                self._damage[number].add(sample.key, error)
            place = (place + 1) % len(part.eligible)

    def _finish(self, pending: _Pending) -> ClipBatch:
        clips = [clip for read in pending.reads for clip in read.result()]
        positions = (pending.position + self._mine).tolist()
        missing = self.batch_size - len(clips)
        if missing:
            pending.features[len(clips) :] = pending.features[0]
            clips += [clips[0]] * missing
            positions += [positions[0]] * missing
        return ClipBatch(
            features=pending.features,
            grid=self.dataset.index.grid,
            num_real=pending.num_real,
            sample_ids=tuple(clip.sample_id for clip in clips),
            keys=tuple(clip.key for clip in clips),
            starts=tuple(clip.start for clip in clips),
            positions=tuple(positions),
            step=pending.position // self.global_batch,
            epoch=pending.position // self.num_samples,
            codec=self._input.codec,
            statistics=self._statistics_of(clips),
            cuts=tuple(clip.cut for clip in clips if clip.cut is not None),
            frames_before=self._input.frames_before,
        )

    def _statistics_of(self, clips: list[_Clip]) -> Tensor | None:
        if self._statistics is None:
            return None
        rows = self._statistics[[clip.dataset for clip in clips]]
        return rows.pin_memory() if self._statistics.is_pinned() else rows


def _statistics_table(mixture: Mixture, pinned: bool) -> Tensor | None:
    """Channel statistics by dataset, float32 (datasets, 2, E); None where the codec needs none."""
    tables = [part.dataset.statistics_table() for part in mixture.parts]
    if tables[0] is None:
        return None
    table = torch.from_numpy(np.stack([table for table in tables if table is not None]))
    return table.pin_memory() if pinned else table


class _ShardPrefetcher:
    """Tells the files which shards this rank will want next, nearest first, about two windows of every lane ahead."""

    def __init__(self, mixture: Mixture, mine: np.ndarray, global_batch: int, block_shards: int) -> None:
        self._mixture, self._mine, self._global_batch = mixture, mine, global_batch
        self._files = [part.dataset.files for part in mixture.parts]
        # In so many steps every lane moves on by one window of shards.
        window = block_shards * max(
            part.order.lanes * part.order.num_samples / len(part.order.shard_sizes) for part in mixture.parts
        )
        self._steps = max(1, int(min(window, mixture.num_samples)) // global_batch)
        self._announced: list[set[int]] = [set() for _ in self._files]
        self._until: int | None = None
        self._needed = not all(type(files) is LocalFiles for files in self._files)

    def announce(self, position: int) -> None:
        """Called before each step is read; does something once every window."""
        if not self._needed or (self._until is not None and position < self._until):
            return
        ahead = range(position, position + 2 * self._steps * self._global_batch, self._global_batch)
        places = self._mixture.at((np.array(ahead)[:, None] + self._mine).reshape(-1))
        for number, files in enumerate(self._files):
            part = self._mixture.parts[number]
            shards = part.order.shards_of(places.place[places.dataset == number])
            first = np.unique(shards, return_index=True)[1]
            wanted = shards[np.sort(first)].tolist()
            new = [shard for shard in wanted if shard not in self._announced[number]]
            self._announced[number] = set(wanted)
            if new:
                files.prefetch(wanted)
        self._until = position + self._steps * self._global_batch


class _Damage:
    """Counts damaged samples of a dataset and says when there are too many."""

    def __init__(self, part: Part, max_fraction: float) -> None:
        self.reasons: dict[str, str] = {}
        self._part, self._max_fraction = part, max_fraction
        self._lock = threading.Lock()

    def add(self, key: str, error: DataError) -> None:
        """Raises DataError when the share of damaged samples passes the limit."""
        total = len(self._part.eligible)
        with self._lock:
            self.reasons.setdefault(key, str(error))
            count = len(self.reasons)
        if count > self._max_fraction * total or count >= total:
            raise DataError(
                f"{error}; {count} of {total} samples are damaged, "
                f"limit data.max_skip_fraction={self._max_fraction}; "
                f"find all with python -m data_pipeline.verify {self._part.dataset.folder}"
            )


__all__ = ["ClipLoader", "VideoLoader"]
