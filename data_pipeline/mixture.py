"""Mixture: which sample of which dataset stands at which position, for one dataset or several with weights.

Comes in: datasets, weights, seed. Goes out: (dataset, epoch, place) of any position, by arithmetic. A position is one number: the
stream resumes from it alone, on any world.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.order import MIXTURE_STREAM, Order, philox
from data_pipeline.remote.address import split_root
from data_pipeline.shards import digest
from data_pipeline.store import ShardDataset

MIN_CYCLE = 256  # positions after which every dataset has had its exact share
MUST_AGREE = ("extractor", "layer", "width", "grid", "image_size", "codec", "fingerprint")


class Places(NamedTuple):
    """Where the clips of some positions come from. Shapes: all int64 (N,). `place` counts the dataset's eligible samples."""

    dataset: np.ndarray
    epoch: np.ndarray
    place: np.ndarray


class Part:
    """A dataset and its own order. Videos shorter than a clip have no place in it; `excluded` counts them."""

    def __init__(self, dataset: ShardDataset, config: DataConfig, seed: int) -> None:
        self.dataset = dataset
        frames = np.array([sample.frames for sample in dataset.index.samples], dtype=np.int64)
        self.eligible = np.flatnonzero(frames >= config.clip_len)
        self.excluded = len(frames) - len(self.eligible)
        if not len(self.eligible):
            raise DataError(
                f"{dataset.folder}: none of {len(frames)} videos has data.clip_len={config.clip_len} frames; "
                f"at least one must; change data.clip_len"
            )
        shards = np.array([sample.shard for sample in dataset.index.samples], dtype=np.int64)[self.eligible]
        sizes = np.bincount(shards, minlength=len(dataset.index.shards)).tolist()
        self.order = Order(sizes, seed, config.block_shards, config.lanes)


class Mixture:
    """Datasets in turn, by a cycle that holds each as often as its weight says and is shuffled anew every time.

    Every dataset is read exactly once in each of its own epochs, which end at different positions.
    """

    def __init__(self, parts: Sequence[Part], weights: Sequence[int], seed: int, clip_len: int) -> None:
        self.parts, self.seed, self.clip_len = list(parts), seed, clip_len
        common = math.gcd(*weights)
        times = -(-MIN_CYCLE * common // sum(weights))
        self.shares = [weight // common * times for weight in weights]
        self.cycle = sum(self.shares)
        self.first_ids = np.cumsum([0, *(len(part.dataset) for part in parts)])
        self._turns = lru_cache(maxsize=64)(self._draw_turns)

    @staticmethod
    def open(config: DataConfig, seed: int) -> Mixture:
        """The training split of data.root, or those of data.mixture. Raises DataError when they do not fit or not agree."""
        listed = [(part.root, part.weight) for part in config.mixture] or [(config.root, 1)]
        parts = []
        for root, _ in listed:
            dataset = ShardDataset.open(split_root(root, config.train_split), config.read, config.remote)
            dataset.check(config)
            parts.append(Part(dataset, config, seed))
        for part in parts[1:] if config.input == "features" else ():
            _check_agree(parts[0].dataset, part.dataset)
        return Mixture(parts, [weight for _, weight in listed], seed, config.clip_len)

    @property
    def num_samples(self) -> int:
        """Videos of all datasets. With several datasets an epoch is just so many positions."""
        return sum(part.order.num_samples for part in self.parts)

    @property
    def frame_sizes(self) -> set[tuple[int, int]]:
        """Native height and width of the videos that have a place in the stream."""
        return {part.dataset.index.samples[number].size for part in self.parts for number in part.eligible}

    @property
    def version(self) -> str:
        """Stands for the content of all datasets and their shares."""
        versions = [part.dataset.index.version for part in self.parts]
        return versions[0] if len(versions) == 1 else digest([versions, self.shares])

    @property
    def rules(self) -> str:
        return "; ".join([*(part.order.rules for part in self.parts), f"clip_len {self.clip_len}"])

    @property
    def lanes(self) -> int:
        """Lanes that a position's remainder tells; several datasets have none in common."""
        return self.parts[0].order.lanes if len(self.parts) == 1 else 1

    def at(self, positions: np.ndarray) -> Places:
        """Shapes: positions int64 (N,)."""
        if len(self.parts) == 1:
            epochs, places = self.parts[0].order.at(positions)
            return Places(np.zeros_like(places), epochs, places)
        cycles, slots = np.divmod(positions, self.cycle)
        found = Places(*(np.empty(len(positions), np.int64) for _ in range(3)))
        inner = np.empty(len(positions), np.int64)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            turns, before = self._turns(int(cycle))
            found.dataset[here] = turns[slots[here]]
            inner[here] = cycle * np.asarray(self.shares)[turns[slots[here]]] + before[slots[here]]
        for number, part in enumerate(self.parts):
            here = found.dataset == number
            found.epoch[here], found.place[here] = part.order.at(inner[here])
        return found

    def close(self) -> None:
        for part in self.parts:
            part.dataset.close()

    def _draw_turns(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The dataset of every slot of a cycle, and how many slots before it have the same. Shapes: both (cycle,)."""
        bits = philox(self.seed, cycle, 0, MIXTURE_STREAM)
        turns = np.repeat(np.arange(len(self.shares)), self.shares)[np.argsort(bits.random_raw(self.cycle), kind="stable")]
        before = np.empty(self.cycle, np.int64)
        for number, share in enumerate(self.shares):
            before[turns == number] = np.arange(share)
        return turns, before


def _check_agree(first: ShardDataset, other: ShardDataset) -> None:
    for name in MUST_AGREE:
        here, there = first.index.features[name], other.index.features[name]
        if here != there:
            raise DataError(
                f"{other.folder}: {name}={there}, but {first.folder} has {here}; datasets of data.mixture must agree in it; "
                f"build them alike, or leave one out"
            )


__all__ = ["Mixture", "Part", "Places"]
