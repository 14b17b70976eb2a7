"""Order: which sample stands at which position of the endless stream. Pure arithmetic, no state but whole numbers.

Comes in: shard sizes, seed, position. Goes out: sample ids. Position p counts samples over all epochs; step s takes positions
[s*G, (s+1)*G) of global batch G, whatever the number of ranks. To resume is to compute, never to replay.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import ConfigError

MASK_64 = (1 << 64) - 1
ORDER_STREAM, SAMPLE_STREAM, MIXTURE_STREAM = 0, 1, 2  # keep the random numbers of different uses apart
CACHED_EPOCHS = 2  # a batch may straddle an epoch end
ORDER_BEFORE_LANES = "order 1"  # checkpoints that do not say by which rules their stream is ordered
LOW_BITS = np.uint64((1 << 32) - 1)  # of a sort key: the sample's id


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
    order: str = ORDER_BEFORE_LANES  # the rules by which the stream is ordered: Order.rules

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Position:
        seed, global_batch, position = (int(values[name]) for name in ("seed", "global_batch", "position"))
        order = str(values.get("order", ORDER_BEFORE_LANES))
        return Position(str(values["dataset_version"]), seed, global_batch, position, order)

    def require_same_stream(self, now: Position) -> None:
        """Raise ConfigError unless `now` continues the stream that this position belongs to."""
        for name, key in (
            ("dataset_version", "data.root"),
            ("seed", "seed"),
            ("global_batch", "optim.global_batch"),
            ("order", "data.clip_len, data.lanes and data.block_shards"),
        ):
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


class Draws:
    """Random numbers of one sample in one epoch, then of another: the same on any rank, thread or resumed run."""

    def __init__(self) -> None:
        self._bits = philox(0, 0, 0, SAMPLE_STREAM)
        self._state: Any = self._bits.state

    def seek(self, seed: int, epoch: int, sample_id: int) -> None:
        """Go to the sample's first number. A tenth of the price of another generator."""
        key, counter = self._state["state"]["key"], self._state["state"]["counter"]
        key[0], key[1] = seed & MASK_64, epoch & MASK_64
        counter[0], counter[1], counter[2] = 0, 0, sample_id & MASK_64
        self._bits.state = self._state

    def below(self, count: int) -> int:
        """A whole number in [0, count) from raw bits: numpy promises those for ever, not what it makes of them."""
        return int(self._bits.random_raw()) * count >> 64


class Order:
    """Every sample exactly once per epoch; epochs differ.

    The shards, permuted, lie end to end and are cut into lanes of equal length; each `block_shards` shards of a lane in turn are
    shuffled together; then the lanes are dealt out in turn, and the few samples that are left over come last, shuffled. So
    neighbours in a batch come from shards all over the dataset, while a rank that keeps to some lanes (`rank_places`) works on
    few shards at a time, which a cache can hold.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, block_shards: int, lanes: int = 1) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed = seed
        self.block_shards = block_shards
        self.num_samples = int(self.shard_sizes.sum())
        self._first_ids = np.cumsum(self.shard_sizes) - self.shard_sizes
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        if self.num_samples < 1 or self.shard_sizes.min() < 0:
            raise ValueError(f"shard sizes sum to {self.num_samples}; an order needs at least one sample; check the index")
        if self.num_samples > LOW_BITS:
            raise ValueError(f"shards hold {self.num_samples} samples; an order has room for {LOW_BITS}; split the dataset")
        if block_shards < 1:
            raise ConfigError(f"data.block_shards={block_shards}; it must be at least 1; change data.block_shards")
        self.lanes = fitting_lanes(lanes, int((self.shard_sizes > 0).sum()))

    @property
    def rules(self) -> str:
        """By which rules samples are ordered: two orders with equal rules, seed and shards are the same for ever."""
        return f"order 2, lanes {self.lanes}, block_shards {self.block_shards}"

    def epoch(self, epoch: int) -> np.ndarray:
        """Sample ids of an epoch in order, whole numbers (num_samples,). Read-only; the last few are kept."""
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = self._permute(epoch)
                if len(self._epochs) > CACHED_EPOCHS:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]

    def batch(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, sample ids) at positions [position, position + count), both int64 (count,)."""
        return self.at(np.arange(position, position + count, dtype=np.int64))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, sample ids) at `positions`, both int64 of their shape."""
        epochs, rows = positions // self.num_samples, positions % self.num_samples
        ids = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self.epoch(int(epoch))[rows[here]]
        return epochs, ids

    def shards_of(self, ids: np.ndarray) -> np.ndarray:
        """The shard of each sample."""
        return np.searchsorted(self._first_ids + self.shard_sizes, ids, side="right")

    def _permute(self, epoch: int) -> np.ndarray:
        # Raw bits, stable sorts, sorts of keys that all differ: the order must not change with numpy's version or the processor.
        bits = philox(self.seed, epoch, 0, ORDER_STREAM)
        shards = np.argsort(bits.random_raw(len(self.shard_sizes)), kind="stable")
        sizes = self.shard_sizes[shards]
        first = np.cumsum(sizes) - sizes
        length = self.num_samples // self.lanes
        whole = length * self.lanes
        ids = np.empty(self.num_samples, np.int32 if self.num_samples < 1 << 31 else np.int64)
        columns = ids[:whole].reshape(length, self.lanes)
        for lane in range(self.lanes):
            columns[:, lane] = self._shuffled(bits, shards, first, lane * length, (lane + 1) * length)
        ids[whole:] = self._shuffled(bits, shards, first, whole, self.num_samples)
        ids.flags.writeable = False
        return ids

    def _shuffled(self, bits: np.random.Philox, shards: np.ndarray, first: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) of the row of permuted shards, shuffled within windows; uint64. shards[i] begins at first[i].

        A key is random bits above a sample's id. Sorting keys is far quicker than finding an argsort.
        """
        begin, end = np.searchsorted(first, [start, stop - 1], side="right") - [1, 0]
        edges = np.concatenate([[start], first[begin + 1 : end], [stop]])
        shifts = (self._first_ids[shards[begin:end]] - first[begin:end]).view(np.uint64)
        keys = bits.random_raw(stop - start)
        keys &= ~LOW_BITS
        keys |= np.arange(start, stop, dtype=np.uint64) + np.repeat(shifts, np.diff(edges))
        cuts = (edges[:: self.block_shards] - start).tolist()
        for low, high in zip(cuts, [*cuts[1:], stop - start], strict=True):
            keys[low:high].sort()
        keys &= LOW_BITS
        return keys


def fitting_lanes(lanes: int, num_shards: int) -> int:
    """The largest divisor of `lanes` that leaves every lane two shards: a small dataset has fewer lanes."""
    return max(count for count in range(1, lanes + 1) if lanes % count == 0 and (count == 1 or 2 * count <= num_shards))


def rank_slice(global_batch: int, world: World) -> tuple[int, int]:
    """The contiguous part [start, stop) of a global batch that a rank takes; parts differ by one sample at most."""
    return global_batch * world.rank // world.size, global_batch * (world.rank + 1) // world.size


def rank_places(global_batch: int, world: World, lanes: int) -> range:
    """Places in a global batch that a rank takes: as many as `rank_slice` gives it.

    Lanes are shared out to as many groups of neighbouring ranks as comes out even for lanes, ranks and batch, so that a group,
    and with it a node, keeps to its own lanes and their shards from step to step. Else a rank takes one part of the batch.
    """
    groups = lane_groups(global_batch, world.size, lanes)
    group, member = divmod(world.rank, world.size // groups)
    start, stop = rank_slice(global_batch // groups, World(member, world.size // groups))
    return range(group + start * groups, group + stop * groups, groups)


def lane_groups(global_batch: int, world_size: int, lanes: int) -> int:
    """Into how many groups of ranks with lanes of their own the world falls."""
    return math.gcd(lanes, world_size, global_batch)


def padded_batch(global_batch: int, world_size: int, accumulation: int) -> int:
    """Clips that every rank holds per step: the largest part, rounded up to whole micro-batches."""
    largest = -(-global_batch // world_size)
    return -(-largest // accumulation) * accumulation
