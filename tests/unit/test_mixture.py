"""Mixtures: every dataset by its weight, each exactly once in its own epochs, resumed from one number."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import data_config, decoded_features, write_split

from data_pipeline.config import MixturePart
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.loader import ClipLoader
from data_pipeline.mixture import Mixture
from data_pipeline.order import World

SIZES = {"a": [[4] * 3] * 3, "b": [[2, 2], [1, 6]]}  # 9 videos; 3, and one that is too short
WEIGHTS = {"a": 2, "b": 1}


@pytest.fixture
def config(tmp_path: Path):
    for number, (name, frames) in enumerate(SIZES.items()):
        write_split(tmp_path / name, frames=frames, codec="int8", pictures=False, note=number)
    parts = [MixturePart(root=str(tmp_path / name), weight=weight) for name, weight in WEIGHTS.items()]
    return data_config(tmp_path, mixture=parts, views=["center"])


def test_shares_are_exact_and_every_dataset_comes_once_in_each_of_its_epochs(config) -> None:
    mixture = Mixture.open(config, seed=3)
    places = mixture.at(np.arange(2 * mixture.cycle))
    assert Counter(places.dataset.tolist()) == {0: 4 * mixture.cycle // 3, 1: 2 * mixture.cycle // 3}
    assert (mixture.num_samples, [part.excluded for part in mixture.parts]) == (12, [0, 1])
    for number, size in ((0, 9), (1, 3)):
        mine = places.dataset == number
        whole = mine.sum() // size * size
        for epoch, rows in enumerate(places.place[mine][:whole].reshape(-1, size)):
            assert sorted(rows) == list(range(size))
            assert set(places.epoch[mine][epoch * size : (epoch + 1) * size]) == {epoch}
    # Not in blocks: in twelve positions in a row both datasets nearly always meet.
    turns = places.dataset.reshape(-1, 12)
    assert ((turns.min(axis=1) == 0) & (turns.max(axis=1) == 1)).mean() > 0.9


def test_any_position_is_found_without_the_ones_before(config) -> None:
    mixture = Mixture.open(config, seed=3)
    whole = np.stack(mixture.at(np.arange(1000)))
    for start in (0, 1, 255, 256, 257, 767, 950):
        found = np.stack(Mixture.open(config, seed=3).at(np.arange(start, start + 40)))
        np.testing.assert_array_equal(found, whole[:, start : start + 40][:, : found.shape[1]])
    far = mixture.at(np.array([10**9]))
    assert far.place[0] < 9


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_hold_clips_of_both_with_their_own_statistics(config, world_size: int) -> None:
    """A resume in the middle, on another world, goes on with the same clips."""
    keys: list[tuple[int, str]] = []
    position = 0
    for size in (1, world_size):
        ranks = [ClipLoader(config, World(rank, size), seed=5, global_batch=4, position=position) for rank in range(size)]
        assert ranks[0].excluded == 1 and ranks[0].num_samples == 12
        for batches in itertools.islice(zip(*ranks, strict=True), 5):
            for batch in batches:
                decoded = batch.decoded()
                for row in range(batch.num_real):
                    sample, key, start = batch.sample_ids[row], batch.keys[row], batch.starts[row]
                    shard, number = int(key[6]), int(key[8])
                    frames = SIZES["a" if sample < 9 else "b"][shard][number]
                    expected = decoded_features(key, frames, "center", "int8")[start : start + 2]
                    np.testing.assert_array_equal(decoded[row].numpy(), expected)
                    keys.append((sample, key))
        position = ranks[0].state().position
        for rank in ranks:
            rank.close()
    alone = ClipLoader(config, World(), seed=5, global_batch=4)
    expected_keys = [pair for batch in itertools.islice(alone, 10) for pair in zip(batch.sample_ids, batch.keys, strict=True)]
    alone.close()
    assert keys == expected_keys and {sample < 9 for sample, _ in keys} == {True, False}


def test_the_version_tells_content_and_weights(config) -> None:
    versions = set()
    for weights in ((2, 1), (4, 2), (1, 2)):
        for part, weight in zip(config.mixture, weights, strict=True):
            part.weight = weight
        versions.add(Mixture.open(config, seed=0).version)
    assert len(versions) == 2  # 4:2 is 2:1
    config.mixture.pop()
    versions.add(Mixture.open(config, seed=0).version)
    assert len(versions) == 3


def test_datasets_that_do_not_agree_are_refused(config, tmp_path: Path) -> None:
    write_split(tmp_path / "c", codec="int8", pictures=False, fingerprint="0" * 64)
    config.mixture.append(MixturePart(root=str(tmp_path / "c")))
    with pytest.raises(DataError, match="c/train: fingerprint=000.* but .*a/train has fff.*data.mixture must agree"):
        Mixture.open(config, seed=0)


@pytest.mark.parametrize("weight", [0, -1, 1001])
def test_impossible_weights_are_refused(weight: int) -> None:
    with pytest.raises(ConfigError, match=f"data.mixture.weight={weight}"):
        MixturePart(root="a", weight=weight)
