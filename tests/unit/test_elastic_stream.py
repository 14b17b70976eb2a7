"""Three epochs on 8, then 3, 5, 7 and 1 ranks, killed in between: the same samples in the same order as an undisturbed run."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import data_config, write_split

from data_pipeline.loader import ClipLoader
from data_pipeline.order import Position, World, rank_places

NUM_SHARDS, BATCH, SEED = 19, 24, 6  # 19 shards of 3 or 4 videos: 8 lanes, the number of videos divides by nothing here
WORLDS = (8, 3, 5, 7, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("elastic")
    write_split(root, frames=[[2] * (3 + number % 2) for number in range(NUM_SHARDS)], codec="int8", pictures=False)
    return root


class Run:
    """All ranks of one attempt, each with its own loader, and what they were given, put together again."""

    def __init__(self, root: Path, world_size: int, position: int, **changes: object) -> None:
        config = data_config(root, lanes=24, block_shards=2, **changes)
        worlds = [World(rank, world_size) for rank in range(world_size)]
        self.loaders = [ClipLoader(config, world, seed=SEED, global_batch=BATCH, position=position) for world in worlds]
        self.places = [rank_places(BATCH, world, self.loaders[0].mixture.lanes) for world in worlds]

    def step(self) -> list[tuple[int, bytes]]:
        """(sample, its features) at each place of the global batch."""
        found: dict[int, tuple[int, bytes]] = {}
        for loader, places in zip(self.loaders, self.places, strict=True):
            batch = next(loader)
            assert batch.num_real == len(places)
            for row, place in enumerate(places):
                assert place not in found
                found[place] = batch.sample_ids[row], batch.features[row].numpy().tobytes()
        return [found[place] for place in range(BATCH)]

    def state(self) -> str:
        states = {json.dumps(loader.state().to_json()) for loader in self.loaders}
        assert len(states) == 1
        return states.pop()

    def kill(self) -> None:
        """Whatever is read ahead is lost with the processes."""
        for loader in self.loaders:
            loader.close()


def digest(stream: list[tuple[int, bytes]]) -> str:
    return hashlib.sha256(b"".join(sample.to_bytes(8, "little") + features for sample, features in stream)).hexdigest()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_on_changing_worlds_gives_the_same_stream(root: Path, seed: int) -> None:
    alone = Run(root, 1, 0)
    num_samples = alone.loaders[0].num_samples
    num_steps = -(-3 * num_samples // BATCH)
    assert alone.loaders[0].mixture.lanes == 8 and num_samples % BATCH
    expected = list(itertools.chain(*(alone.step() for _ in range(num_steps))))
    alone.kill()

    random = np.random.default_rng(seed)
    legs = np.sort(random.choice(np.arange(1, num_steps), len(WORLDS) - 1, replace=False)).tolist()
    stream: list[tuple[int, bytes]] = []
    saved: str | None = None
    for world_size, stop in zip(WORLDS, [*legs, num_steps], strict=True):
        position = 0 if saved is None else Position.from_json(json.loads(saved)).position
        run = Run(root, world_size, position, prefetch_steps=int(random.integers(1, 4)), read_threads=int(random.integers(1, 4)))
        while len(stream) < stop * BATCH:
            stream += run.step()
        saved = run.state()
        for _ in range(int(random.integers(0, 3))):
            run.step()  # done after the last checkpoint, and lost with it
        run.kill()
    assert digest(stream) == digest(expected)
    counts = Counter(sample for sample, _ in stream[: 3 * num_samples])
    assert set(counts) == set(range(num_samples)) and set(counts.values()) == {3}  # 0 missing, 0 repeated
    for epoch in range(3):
        assert len({sample for sample, _ in stream[epoch * num_samples : (epoch + 1) * num_samples]}) == num_samples
