"""Order: every sample once, the same for any world, resumed by arithmetic."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from data_pipeline.order import Draws, Order, Position, World, padded_batch, rank_places, rank_slice

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)
SEEDS = st.integers(-(2**63), 2**64)
FROZEN_ORDER = [[4, 0, 1, 2, 3, 5, 6, 8, 7], [8, 2, 5, 1, 7, 6, 0, 3, 4]]
FROZEN_LANES = [5, 12, 9, 2, 7, 1, 6, 11, 8, 10, 0, 3, 4]
FROZEN_DRAWS = [28, 3, 27, 54, 21, 40]


def draws_of(seed: int, epoch: int, sample_id: int, below: int, count: int) -> list[int]:
    draws = Draws()
    draws.seek(seed, epoch, sample_id)
    return [draws.below(below) for _ in range(count)]


@given(SIZES, SEEDS, st.integers(1, 5), st.sampled_from([1, 2, 12]), st.integers(0, 10**9))
@settings(deadline=None)
def test_every_sample_exactly_once_per_epoch(sizes: list[int], seed: int, block_shards: int, lanes: int, epoch: int) -> None:
    ids = Order(sizes, seed, block_shards, lanes).epoch(epoch)
    np.testing.assert_array_equal(np.sort(ids), np.arange(sum(sizes)))


@pytest.mark.parametrize(("shards", "lanes"), [(1, 1), (3, 1), (4, 2), (11, 5), (97, 48), (480, 240), (10_000, 240)])
def test_a_small_dataset_has_fewer_lanes(shards: int, lanes: int) -> None:
    assert Order([3] * shards, 0, 8, 240).lanes == lanes


def test_a_lane_keeps_to_its_shards() -> None:
    """Each of 12 lanes works through a twelfth of the shards, a window of two after the other."""
    order = Order([10] * 96, seed=1, block_shards=2, lanes=12)
    by_lane = order.shards_of(order.epoch(0)).reshape(-1, 12).T
    assert sorted(itertools.chain(*(set(lane) for lane in by_lane.tolist()))) == list(range(96))
    for lane in by_lane:
        windows = lane.reshape(4, 20)
        assert all(len(set(window)) == 2 and len(set(window[:10])) == 2 for window in windows.tolist())


def test_lanes_of_other_length_than_the_shards_lose_nothing() -> None:
    """A shard that lies across two lanes is in both; the few samples beyond equal lanes come last."""
    sizes = [7, 3, 9, 1, 5, 8, 2, 6, 4]
    order = Order(sizes, seed=1, block_shards=1, lanes=4)
    ids = order.epoch(2)
    assert order.lanes == 4 and sum(sizes) % 4 == 1
    for lane in ids[:44].reshape(11, 4).T:
        shards = order.shards_of(lane)
        assert np.count_nonzero(np.diff(shards)) == len(set(shards)) - 1  # windows of one shard: none comes back


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("lanes", [1, 8, 240])
@pytest.mark.parametrize("global_batch", [1, 16, 24])
def test_ranks_share_a_batch_and_know_each_others_counts(world_size: int, lanes: int, global_batch: int) -> None:
    taken = [rank_places(global_batch, World(rank, world_size), lanes) for rank in range(world_size)]
    assert sorted(itertools.chain(*taken)) == list(range(global_batch))
    slices = [rank_slice(global_batch, World(rank, world_size)) for rank in range(world_size)]
    assert [len(places) for places in taken] == [stop - start for start, stop in slices]
    groups = math.gcd(lanes, world_size, global_batch)
    for rank, places in enumerate(taken):  # from step to step a rank meets the same lanes, which no other group meets
        met = {(step * global_batch + place) % lanes % groups for step in range(9) for place in places}
        assert met == ({rank * groups // world_size} if places else set())


@given(SIZES, SEEDS, st.integers(1, 5), st.integers(0, 200), st.integers(1, 40))
@settings(deadline=None)
def test_a_batch_is_a_window_of_the_stream(sizes: list[int], seed: int, block_shards: int, position: int, count: int) -> None:
    order, total = Order(sizes, seed, block_shards), sum(sizes)
    stream = np.concatenate([order.epoch(epoch) for epoch in range((position + count) // total + 1)])
    epochs, ids = Order(sizes, seed, block_shards).batch(position, count)
    np.testing.assert_array_equal(ids, stream[position : position + count])
    np.testing.assert_array_equal(epochs, np.arange(position, position + count) // total)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("global_batch", [1, 4, 6, 7, 16])
def test_any_world_takes_the_same_global_batches(world_size: int, global_batch: int) -> None:
    order = Order([4, 7, 1, 5], seed=3, block_shards=2)
    for step in range(9):
        _, whole = order.batch(step * global_batch, global_batch)
        slices = [rank_slice(global_batch, World(rank, world_size)) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate([whole[start:stop] for start, stop in slices]), whole)
        sizes = [stop - start for start, stop in slices]
        assert max(sizes) - min(sizes) <= 1
        for accumulation in (1, 2, 3):
            padded = padded_batch(global_batch, world_size, accumulation)
            assert max(sizes) <= padded < max(sizes) + accumulation and padded % accumulation == 0


def test_epochs_and_seeds_give_other_orders() -> None:
    order = Order([8] * 6, seed=0, block_shards=3)
    orders = [tuple(order.epoch(epoch)) for epoch in range(4)] + [tuple(Order([8] * 6, 1, 3).epoch(0))]
    assert len(set(orders)) == 5


def test_a_block_holds_whole_shards_and_mixes_them() -> None:
    sizes = [10] * 12
    shard_of = np.repeat(np.arange(12), 10)
    ids = Order(sizes, seed=5, block_shards=4).epoch(0)
    blocks = [shard_of[ids[first : first + 40]] for first in range(0, 120, 40)]
    assert all(len(set(block)) == 4 for block in blocks)
    assert sorted(shard for block in blocks for shard in set(block)) == list(range(12))
    assert all(len(set(block[:12])) >= 3 for block in blocks)


def test_every_place_is_as_likely_for_every_sample() -> None:
    """Mean place of each sample over many epochs: a skewed shuffle would leave the middle."""
    order = Order([3, 2, 4, 1], seed=11, block_shards=2)
    places = np.mean([np.argsort(order.epoch(epoch)) for epoch in range(3000)], axis=0)
    assert np.abs(places - 4.5).max() < 0.45


def test_the_order_never_changes() -> None:
    """Recorded once: a checkpoint of today must resume with the same order for ever."""
    order = Order([3, 2, 4], seed=1234, block_shards=2)
    assert order.epoch(0).tolist() == FROZEN_ORDER[0]
    assert order.epoch(1).tolist() == FROZEN_ORDER[1]
    assert Order([3, 2, 4, 1, 3], seed=7, block_shards=2, lanes=2).epoch(3).tolist() == FROZEN_LANES
    assert draws_of(1234, 1, 5, 100, 6) == FROZEN_DRAWS


def test_far_positions_need_no_replay() -> None:
    """A million epochs on, only the epochs in the batch are permuted."""
    order = Order([2, 3], seed=0, block_shards=1)
    permuted: list[int] = []
    permute = order._permute
    order._permute = lambda epoch: permuted.append(epoch) or permute(epoch)  # type: ignore[method-assign,func-returns-value]
    order.batch(5 * 10**6 - 2, 4)
    assert permuted == [10**6 - 1, 10**6]


@given(SEEDS, st.integers(0, 2**40), st.integers(0, 2**40), st.integers(1, 50))
def test_draws_follow_from_seed_epoch_and_sample_alone(seed: int, epoch: int, sample_id: int, below: int) -> None:
    first = draws_of(seed, epoch, sample_id, below, 5)
    used = Draws()
    used.seek(epoch, seed, 3)
    used.below(7)
    used.seek(seed, epoch, sample_id)
    assert [used.below(below) for _ in range(5)] == first and all(0 <= value < below for value in first)


def test_draws_are_even() -> None:
    counts = np.bincount([draws_of(0, epoch, sample, 6, 1)[0] for epoch in range(20) for sample in range(300)], minlength=6)
    assert np.abs(counts - 1000).max() < 150


def test_position_survives_json_and_refuses_another_stream() -> None:
    position = Position("abc", seed=7, global_batch=12, position=10**6)
    assert Position.from_json(json.loads(json.dumps(position.to_json()))) == position
    position.require_same_stream(Position("abc", 7, 12, 0))
    others = {"data.root": Position("abd", 7, 12, 0), "seed=8": Position("abc", 8, 12, 0), "batch=6": Position("abc", 7, 6, 0)}
    others["order=order 2, lanes 4"] = Position("abc", 7, 12, 0, "order 2, lanes 4")
    for key, other in others.items():
        with pytest.raises(ConfigError, match=key):
            position.require_same_stream(other)


def test_a_checkpoint_from_before_lanes_is_told_from_one_of_now() -> None:
    old = Position.from_json({"dataset_version": "abc", "seed": 7, "global_batch": 12, "position": 24})
    now = Position("abc", 7, 12, 0, Order([5, 5], 7, 8, 240).rules)
    with pytest.raises(ConfigError, match="order=order 2, .*the checkpoint has order 1.* data.lanes and data.block_shards"):
        old.require_same_stream(now)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 3), (0, 0)])
def test_impossible_worlds_are_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        World(rank, size)


def test_an_empty_order_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Order([0, 0], 0, 1)
    with pytest.raises(ConfigError, match="block_shards=0"):
        Order([1], 0, 0)
