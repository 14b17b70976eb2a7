"""Order: which sample stands at which position of the endless stream. Pure arithmetic, no state but whole numbers.

Comes in: shard sizes, seed, position. Goes out: sample ids. Position p counts samples over all epochs; step s takes positions
[s*G, (s+1)*G) of global batch G, whatever the number of ranks. To resume is to compute, never to replay.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import ConfigError

MASK_64 = (1 << 64) - 1
ORDER_STREAM, SAMPLE_STREAM = 0, 1  # keep the random numbers of the order and of the samples apart
CACHED_EPOCHS = 2  # a batch may straddle an epoch end


@dataclass(frozen=True)
class World:
    """This process among all that train together."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank}, world size={self.size}; 0 <= rank < size is needed; check RANK and WORLD_SIZE")


@dataclass(frozen=True)
class Position:
    """Everything that a resume needs of the data; the same on every rank."""

    dataset_version: str
    seed: int
    global_batch: int
    position: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Position:
        return Position(str(values["dataset_version"]), int(values["seed"]), int(values["global_batch"]), int(values["position"]))

    def require_same_stream(self, now: Position) -> None:
        """Raise ConfigError unless `now` continues the stream that this position belongs to."""
        for name, key in (("dataset_version", "data.root"), ("seed", "seed"), ("global_batch", "optim.global_batch")):
            before, after = getattr(self, name), getattr(now, name)
            if before != after:
                raise ConfigError(
                    f"{name}={after}, the checkpoint has {before}; a resume keeps the order of samples; "
                    f"restore {key}, or start a new run"
                )


def philox(seed: int, epoch: int, sample_id: int, stream: int) -> np.random.Philox:
    """A counter-based bit generator: no two (seed, epoch, sample, stream) share numbers."""
    key = np.array([seed & MASK_64, epoch & MASK_64], dtype=np.uint64)
    counter = np.array([0, 0, sample_id & MASK_64, stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def generator(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """Random numbers of one sample in one epoch: the same on any rank, worker or resumed run."""
    return np.random.Generator(philox(seed, epoch, sample_id, SAMPLE_STREAM))


def draw(random: np.random.Generator, below: int) -> int:
    """A whole number in [0, below) from raw bits: numpy promises those for ever, not what it makes of them."""
    return int(random.bit_generator.random_raw()) * below >> 64


class Order:
    """Every sample exactly once per epoch; epochs differ.

    Shards are permuted; each `block_shards` of them in turn are shuffled together. So a run works on few shards at a time, which
    a cache can hold, while neighbours in a batch come from several.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, block_shards: int) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed = seed
        self.block_shards = block_shards
        self.num_samples = int(self.shard_sizes.sum())
        self._first_ids = np.cumsum(self.shard_sizes) - self.shard_sizes
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        if self.num_samples < 1 or self.shard_sizes.min() < 0:
            raise ValueError(f"shard sizes sum to {self.num_samples}; an order needs at least one sample; check the index")
        if block_shards < 1:
            raise ConfigError(f"data.block_shards={block_shards}; it must be at least 1; change data.block_shards")

    def epoch(self, epoch: int) -> np.ndarray:
        """Sample ids of an epoch in order, int64 (num_samples,). Read-only; the last few are kept."""
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = self._permute(epoch)
                if len(self._epochs) > CACHED_EPOCHS:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]

    def batch(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, sample ids) at positions [position, position + count), both int64 (count,)."""
        positions = np.arange(position, position + count, dtype=np.int64)
        epochs, rows = positions // self.num_samples, positions % self.num_samples
        ids = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self.epoch(int(epoch))[rows[here]]
        return epochs, ids

    def _permute(self, epoch: int) -> np.ndarray:
        # Raw bits and stable sorts only: the order must not change with numpy's version or the processor.
        bits = philox(self.seed, epoch, 0, ORDER_STREAM)
        num_shards = len(self.shard_sizes)
        shards = np.argsort(bits.random_raw(num_shards), kind="stable")
        sizes = self.shard_sizes[shards]
        within = np.arange(self.num_samples) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ids = np.repeat(self._first_ids[shards], sizes) + within
        block = np.repeat(np.arange(num_shards, dtype=np.uint64) // np.uint64(self.block_shards), sizes)
        # One sort for all blocks: block number above, 40 random bits below.
        random = bits.random_raw(self.num_samples) >> np.uint64(24)
        ids = ids[np.argsort(block << np.uint64(40) | random, kind="stable")]
        ids.flags.writeable = False
        return ids


def rank_slice(global_batch: int, world: World) -> tuple[int, int]:
    """The contiguous part [start, stop) of a global batch that a rank takes; parts differ by one sample at most."""
    return global_batch * world.rank // world.size, global_batch * (world.rank + 1) // world.size


def padded_batch(global_batch: int, world_size: int, accumulation: int) -> int:
    """Clips that every rank holds per step: the largest part, rounded up to whole micro-batches."""
    largest = -(-global_batch // world_size)
    return -(-largest // accumulation) * accumulation
