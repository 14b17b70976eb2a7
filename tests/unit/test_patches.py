"""Bands of patches: how they are cut, and which layouts are refused. What ranks make of them together: integration tests."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batch import ClipBatch
from data_pipeline.codec import CODECS, fit_statistics
from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError
from data_pipeline.order import World
from trainer.config import ModelConfig, ObjectiveConfig, ParallelConfig, RunConfig, SRLConfig
from trainer.patches import ALONE, PatchGroup, check_layout, data_world


@given(st.integers(1, 40), st.integers(1, 5), st.data())
def test_bands_cover_the_grid_in_order_and_differ_by_a_row_at_most(rows: int, columns: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, rows))
    groups = [PatchGroup(size, index, (rows, columns)) for index in range(size)]
    assert groups[0].rows[0] == 0 and groups[-1].rows[1] == rows
    assert all(one.rows[1] == other.rows[0] for one, other in pairwise(groups))
    heights = {last - first for first, last in (group.rows for group in groups)}
    assert min(heights) >= 1 and max(heights) - min(heights) <= 1
    for group in groups:
        held = len(range(rows * columns)[group.band or slice(None)])
        assert held == np.prod(group.grid_of_band((rows, columns)))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("grid", "width"), [((7, 5), 3), ((4, 3), 6), ((5, 1), 1)])
def test_a_band_of_stored_features_decodes_to_the_band_of_the_decoded(codec: str, grid: tuple[int, int], width: int) -> None:
    """Bit for bit, with odd and even numbers of bytes in a frame; scales and codes of int8 lie apart from each other."""
    values = np.random.default_rng(1).normal(size=(6, grid[0] * grid[1], width)).astype(np.float32)
    statistics = fit_statistics([values.reshape(-1, width)]) if CODECS[codec].needs_statistics else None
    stored = CODECS[codec].encode(values, statistics)
    plain, shape = CODECS[codec].batch_layout(values.shape[1], width)
    features = torch.from_numpy(np.frombuffer(stored.tobytes(), plain).reshape(2, 3, *shape).copy())
    batch = ClipBatch(
        features=features,
        grid=grid,
        num_real=2,
        sample_ids=(0, 1),
        keys=("a", "b"),
        starts=(0, 0),
        codec=codec,
        statistics=None if statistics is None else torch.from_numpy(np.stack([[statistics.mean, statistics.scale]] * 2)),
    )
    whole = batch.decoded()
    for index in range(3):
        group = PatchGroup(3, index, grid)
        band = group.cut(batch)
        assert band.grid == group.grid_of_band(grid)
        assert torch.equal(band.decoded(), whole[:, :, group.band])
    assert ALONE.cut(batch) is batch


def test_groups_are_neighbouring_ranks() -> None:
    worlds = [data_world(World(rank, 6), 2) for rank in range(6)]
    assert worlds == [World(0, 3), World(0, 3), World(1, 3), World(1, 3), World(2, 3), World(2, 3)]


@pytest.mark.parametrize(
    ("ranks", "on_node", "grid", "words"),
    [
        (3, 3, (7, 5), "patch_ranks=2 does not divide the 3 rank"),
        (6, 3, (7, 5), "does not divide the 3 rank.* of this node"),
        (2, 2, (1, 9), "only 1 rows"),
    ],
)
def test_ranks_that_cannot_form_groups_are_refused(ranks: int, on_node: int, grid: tuple[int, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_layout(World(0, ranks), 2, grid, on_node)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"parallel": ParallelConfig(patch_ranks=5), "model": ModelConfig(grid=[4, 9])}, "only 4 rows"),
        ({"model": ModelConfig(patch_maps=True)}, "patch_maps=true"),
        (
            {"objective": ObjectiveConfig(srl=SRLConfig(decoder_weight=0.1)), "model": ModelConfig(projectors=True)},
            "SRL compares",
        ),
    ],
)
def test_what_couples_patches_of_different_bands_is_refused(more: dict[str, Any], words: str) -> None:
    settings = {"data": DataConfig(root="shards"), "parallel": ParallelConfig(patch_ranks=2)} | more
    with pytest.raises(ConfigError, match=words):
        RunConfig(**settings)


def test_fewer_than_one_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="patch_ranks=0"):
        ParallelConfig(patch_ranks=0)
