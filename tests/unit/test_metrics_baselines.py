"""Grid of blocks, k-means and the ceiling of the patch grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from trainer.metrics.baselines import _lloyd, as_maps, grid_of_blocks, k_means, patch_ceiling
from trainer.metrics.segmentation import SegmentationScores, adjusted_rand, contingency, label_map, upsample_labels


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 9), st.integers(1, 12))
def test_blocks_are_rectangles_that_cover_the_grid(num_slots: int, height: int, width: int) -> None:
    if num_slots > height * width:
        with pytest.raises(ConfigError, match=f"num_slots={num_slots}"):
            grid_of_blocks(num_slots, 2, (height, width))
        return
    labels = grid_of_blocks(num_slots, 2, (height, width))
    assert labels.shape == (2, height * width)
    assert torch.equal(labels[0], labels[1])
    picture = labels[0].view(height, width).numpy()
    assert set(np.unique(picture)) == set(range(num_slots))
    for label in range(num_slots):
        rows, columns = np.nonzero(picture == label)
        assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_blocks_have_about_one_size() -> None:
    counts = torch.bincount(grid_of_blocks(11, 1, (24, 24))[0])
    assert counts.min() >= 0.7 * 576 / 11
    assert counts.max() <= 1.3 * 576 / 11
    assert grid_of_blocks(4, 1, (2, 4))[0].tolist() in ([0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3, 0, 1, 2, 3])


def blobs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four well separated clouds over T3 x P20 patches in E5, and which cloud each patch is of."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, 4, (3, 20), generator=generator)
    centres = 10 * torch.eye(5)[:4] + 100
    return centres[owner] + 0.3 * torch.randn(3, 20, 5, generator=generator), owner


def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
    return adjusted_rand(contingency(one.numpy()[..., None], other.numpy()[..., None]).sum(axis=0))


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_separate_clouds_with_one_label_each_in_all_frames(seed: int) -> None:
    features, owner = blobs(seed)
    labels = k_means(features, 4, seed, restarts=3)
    assert labels.shape == (3, 20)
    assert agreement(labels, owner) == 1


def test_k_means_is_a_function_of_its_arguments() -> None:
    features = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    np.random.seed(1)
    first = k_means(features, 5, seed=7, restarts=2)
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(first, k_means(features.clone(), 5, seed=7, restarts=2))
    assert not torch.equal(first, k_means(features, 5, seed=8))


def spread(features: torch.Tensor, labels: torch.Tensor) -> float:
    points, flat = features.reshape(-1, features.shape[-1]).double(), labels.reshape(-1)
    parts = [points[flat == label] for label in flat.unique()]
    return float(sum(((part - part.mean(dim=0)) ** 2).sum() for part in parts))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 7))
def test_restarts_never_hurt_and_labels_are_nearest_centres(seed: int, num_clusters: int) -> None:
    features = torch.randn(2, 15, 3, generator=torch.Generator().manual_seed(seed))
    one, many = k_means(features, num_clusters, seed), k_means(features, num_clusters, seed, restarts=4)
    assert spread(features, many) <= spread(features, one) + 1e-9
    points, flat = features.reshape(-1, 3).double(), many.reshape(-1)
    centres = torch.stack([points[flat == label].mean(dim=0) for label in flat.unique()])
    nearest = torch.cdist(points, centres).argmin(dim=1)
    assert torch.equal(flat.unique()[nearest], flat)


def test_k_means_on_fewer_distinct_points_than_clusters() -> None:
    labels = k_means(torch.ones(2, 6, 3), 4, seed=0)
    assert labels.unique().numel() <= 4
    two = torch.cat([torch.zeros(1, 6, 3), torch.ones(1, 6, 3)])
    assert k_means(two, 5, seed=0)[0, 0] != k_means(two, 5, seed=0)[1, 0]


def test_an_empty_cluster_takes_the_worst_fitted_point() -> None:
    labels, distance = _lloyd(np.array([[0.0], [1.0], [10.0]]), np.array([[0.5], [1000.0]]), max_iters=10)
    assert labels.tolist() == [0, 0, 1]
    assert distance == pytest.approx(0.5)


@pytest.mark.parametrize("num_clusters", [0, 13])
def test_k_means_refuses_a_wrong_number(num_clusters: int) -> None:
    with pytest.raises(ConfigError, match=f"num_clusters={num_clusters}"):
        k_means(torch.ones(2, 6, 3), num_clusters, seed=0)


def test_ceiling_of_aligned_truth_is_one() -> None:
    truth = torch.randint(0, 5, (3, 20), generator=torch.Generator().manual_seed(0)) * 100
    pixels = upsample_labels(truth, (4, 5), (12, 20))
    ceiling = patch_ceiling(pixels, (4, 5))
    assert torch.equal(ceiling, truth)
    scores = SegmentationScores().add(pixels, upsample_labels(ceiling, (4, 5), (12, 20)))
    assert set(scores.values()) == {1.0}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(8, 12), (7, 11), (3, 4), (2, 9)]))
def test_no_patch_labelling_agrees_with_more_pixels(seed: int, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, 4, (2, *size), generator=generator)
    best = upsample_labels(patch_ceiling(true, (4, 6)), (4, 6), size)
    other = upsample_labels(torch.randint(0, 4, (2, 24), generator=generator), (4, 6), size)
    assert (best == true).sum() >= (other == true).sum()
    changed = patch_ceiling(true, (4, 6))
    changed[1, int(torch.randint(0, 24, (), generator=generator))] = int(torch.randint(0, 4, (), generator=generator))
    assert (best == true).sum() >= (upsample_labels(changed, (4, 6), size) == true).sum()


def test_ceiling_takes_numpy_ids_of_small_types() -> None:
    ids = np.array([[[1, 1, 0, 300], [1, 2, 300, 300]]], dtype=np.uint16)
    assert patch_ceiling(ids, (1, 2)).tolist() == [[1, 300]]


def test_as_maps_goes_through_label_map() -> None:
    labels = grid_of_blocks(3, 2, (3, 4))
    maps = as_maps(labels, 5)
    assert maps.shape == (2, 5, 12)
    assert torch.equal(maps.sum(dim=1), torch.ones(2, 12))
    assert torch.equal(label_map(maps, (3, 4), (3, 4)).view(2, 12).long(), labels)
