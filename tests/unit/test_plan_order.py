"""`python -m data_pipeline.plan`: its figures on orders whose figures are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_shards import write_split

from data_pipeline import plan
from data_pipeline.compose import run_command
from data_pipeline.order import Order


def in_order(order: Order, ids: np.ndarray) -> Order:
    """`order` with `ids` as its first epoch."""
    order.epoch = lambda epoch: ids  # type: ignore[method-assign]
    return order


def test_quality_of_a_full_permutation_is_1_and_of_no_shuffle_near_0() -> None:
    sizes = [20] * 200
    full = np.random.default_rng(0).permutation(4000)
    assert plan.shuffle_quality(in_order(Order(sizes, 0, 1), full), 16) == pytest.approx(1, abs=0.02)
    assert plan.shuffle_quality(in_order(Order(sizes, 0, 1), np.arange(4000)), 16) == pytest.approx(
        8 / (200 * (1 - 0.96**20)), rel=0.05
    )
    qualities = [plan.shuffle_quality(Order(sizes, 0, block, lanes), 16) for block, lanes in ((1, 1), (8, 1), (8, 20), (8, 100))]
    assert qualities == sorted(qualities) and qualities[1] < 0.2 and qualities[-1] > 0.95


def test_locality_counts_what_a_node_touches_and_must_hold() -> None:
    """Two nodes, shards of one sample each in order: every shard is touched once, by one node."""
    order = in_order(Order([1] * 24, 0, 1, 12), np.arange(24))
    found = plan.locality(order, [100] * 24, global_batch=4, ranks=2, nodes=2, steps=3)
    assert found == plan.Locality(shards_in_steps=6, shards_in_epoch=12, cached_shards=2, cached_bytes=200)
    whole = plan.locality(order, [100] * 24, global_batch=4, ranks=2, nodes=1, steps=3)
    assert (whole.shards_in_steps, whole.shards_in_epoch, whole.cached_shards) == (12, 24, 4)


def test_a_shard_is_held_from_its_first_use_to_its_last() -> None:
    order = in_order(Order([2] * 4, 0, 1), np.array([0, 2, 1, 4, 6, 7, 5, 3]))
    found = plan.locality(order, [1, 10, 100, 1000], global_batch=1, ranks=1, nodes=1, steps=8)
    assert (found.cached_shards, found.cached_bytes) == (3, 1110)  # shards 1, 2 and 3 overlap; shard 0 is done by then


def test_lanes_that_ranks_divide_keep_nodes_apart() -> None:
    order = Order([10] * 480, seed=0, block_shards=2, lanes=240)
    apart = plan.locality(order, [1] * 480, global_batch=48, ranks=8, nodes=4, steps=10)
    mixed = plan.locality(order, [1] * 480, global_batch=42, ranks=7, nodes=7, steps=10)
    assert apart.shards_in_epoch == 120 and mixed.shards_in_epoch > 300


def test_the_command_prints_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path, frames=[[4, 6, 1], [8, 5], [2, 3, 7]], pictures=False)
    arguments = ["--clip-len", "2", "--global-batch", "2", "--ranks", "2", "--nodes", "2", "--epochs", "3"]
    assert run_command(plan.main, [str(tmp_path), *arguments]) == 0
    text = capsys.readouterr().out
    assert "7 of 8 have 2 frames, in 3 shards" in text and "4 an epoch of 2 clips" in text and "shuffle quality" in text
    hashes = [line.split()[-1] for line in text.splitlines() if line.startswith("  epoch ")]
    assert len(set(hashes)) == 3
    order = Order([2, 2, 3], 0, 8, 240)
    assert hashes == [plan.order_hash(order, epoch) for epoch in range(3)]


def test_too_long_clips_and_odd_nodes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path, pictures=False)
    assert run_command(plan.main, [str(tmp_path), "--clip-len", "9"]) == 2
    assert "none of 3 videos has 9 frames" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan.main([str(tmp_path), "--ranks", "3", "--nodes", "2"])
