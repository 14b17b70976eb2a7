"""Labellings that need no training, so that a score means something: in comes a grid, features or the truth, out come
labels of patches (T, P), row-major. Shown in one table with the trained model.

To score one: `label_map(as_maps(labels, n), grid, size)` takes the way that a model's maps take;
`upsample_labels(labels, grid, size)` keeps hard patch edges, which is right for `patch_ceiling`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from trainer.metrics.segmentation import resize_ids


def as_maps(labels: Tensor, num_labels: int) -> Tensor:
    """Labels (T, P) as one-hot float32 maps (T, S, P)."""
    return torch.nn.functional.one_hot(labels.long(), num_labels).transpose(1, 2).float()


# ---------------------------------------------------------------- blocks


def grid_of_blocks(num_slots: int, num_frames: int, grid: tuple[int, int]) -> Tensor:
    """`num_slots` rectangles of about the same area, laid out as squarely as the number allows, the same in every frame.

    Shapes: int64 (T, P). Labels count from the top left, row by row. Raises: ConfigError with more slots than patches.
    """
    height, width = grid
    if num_slots > height * width:
        raise ConfigError(f"num_slots={num_slots} is more than the {height}x{width} patches; choose fewer slots")
    least = -(-num_slots // width)  # fewer rows of blocks would need blocks narrower than a patch
    num_rows = min(max(round((num_slots * height / width) ** 0.5), 1, least), num_slots, height)
    blocks = np.diff(np.arange(num_rows + 1) * num_slots // num_rows)  # blocks in each row of blocks
    row_of = _cut(height, blocks)
    first = np.cumsum(blocks) - blocks
    labels = np.stack([first[row] + _cut(width, np.ones(blocks[row], dtype=int)) for row in row_of])
    return torch.from_numpy(labels.reshape(1, -1)).repeat(num_frames, 1)


def _cut(length: int, weights: np.ndarray) -> np.ndarray:
    """Part that each of `length` places belongs to; parts are as long as their weights ask, and none is empty."""
    count = len(weights)
    ends = np.round(length * np.cumsum(weights) / weights.sum()).astype(int)
    for part in range(count):
        ends[part] = max(ends[part], (ends[part - 1] if part else 0) + 1)
        ends[part] = min(ends[part], length - (count - 1 - part))
    return np.searchsorted(ends, np.arange(length), side="right")


# ---------------------------------------------------------------- k-means


def k_means(features: Tensor, num_clusters: int, seed: int, *, restarts: int = 1, max_iters: int = 100) -> Tensor:
    """k-means over all patches of a video together, so that a cluster keeps its label from frame to frame.

    Shapes: features (T, P, E); result int64 (T, P). Started by k-means++ from its own generator: the same video, seed and
    settings give the same labels. The best of `restarts` runs (least squared distance) is kept. float64 on the CPU.
    Source: Lloyd 1982; Arthur and Vassilvitskii 2007. Differs: a cluster that runs empty takes the worst fitted point.
    Raises: ConfigError with more clusters than patches.
    """
    num_frames, num_patches, width = features.shape
    points = features.detach().cpu().double().numpy().reshape(-1, width)
    if not 1 <= num_clusters <= len(points):
        raise ConfigError(f"num_clusters={num_clusters}; a number in 1..{len(points)} (all patches of the video) is needed")
    points = points - points.mean(axis=0)  # smaller numbers lose less in the expanded distance
    rng = np.random.Generator(np.random.PCG64(seed))
    runs = [_lloyd(points, _spread_centres(points, num_clusters, rng), max_iters) for _ in range(restarts)]
    labels, _ = min(runs, key=lambda run: run[1])
    return torch.from_numpy(labels.reshape(num_frames, num_patches))


def _spread_centres(points: np.ndarray, num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre is a point drawn with probability proportional to its squared distance from the nearest."""
    chosen = [int(rng.integers(len(points)))]
    nearest = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    for _ in range(num_clusters - 1):
        mass = np.cumsum(nearest)
        # With fewer distinct points than clusters all distances are 0; any point will do.
        draw = np.searchsorted(mass, rng.random() * mass[-1], side="right")
        chosen.append(min(int(draw), len(points) - 1))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return points[chosen]


def _lloyd(points: np.ndarray, centres: np.ndarray, max_iters: int) -> tuple[np.ndarray, float]:
    """Labels and summed squared distance after Lloyd's iterations from `centres`."""
    norms = (points**2).sum(axis=1)
    labels = np.full(len(points), -1, dtype=np.int64)
    for _ in range(max_iters):
        distances = norms[:, None] - 2 * (points @ centres.T) + (centres**2).sum(axis=1)
        previous, labels = labels, distances.argmin(axis=1)
        if np.array_equal(previous, labels):
            break
        centres = _means(points, labels, centres, distances)
    return labels, float(distances[np.arange(len(points)), labels].sum())


def _means(points: np.ndarray, labels: np.ndarray, centres: np.ndarray, distances: np.ndarray) -> np.ndarray:
    members = np.eye(len(centres))[labels]
    sizes = members.sum(axis=0)
    means = (members.T @ points) / np.maximum(sizes, 1)[:, None]
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        worst = np.argsort(-distances[np.arange(len(points)), labels], kind="stable")
        means[empty] = points[worst[: len(empty)]]
    return means


# ---------------------------------------------------------------- ceiling


def patch_ceiling(true: Tensor | np.ndarray, grid: tuple[int, int]) -> Tensor:
    """The truth at patch resolution: each patch gets the id that most of its pixels have (the smallest of equals).

    Shapes: true ids (T, H, W); result int64 (T, P). No other labelling of whole patches agrees with more pixels, so
    what it loses is lost to the grid alone. It may use more labels than a model has slots.
    Differs: a model's maps are upsampled softly and can place an edge inside a patch, so a score above the ceiling is
    possible in principle.
    """
    ids = torch.as_tensor(true).long()
    num_frames, height, width = ids.shape
    num_patches = grid[0] * grid[1]
    patch = resize_ids(torch.arange(num_patches).view(1, *grid), (height, width)).reshape(-1)
    values, dense = torch.unique(ids, return_inverse=True)
    labels = torch.empty(num_frames, num_patches, dtype=torch.long)
    for frame in range(num_frames):
        votes = torch.bincount(patch * len(values) + dense[frame].reshape(-1), minlength=num_patches * len(values))
        labels[frame] = values[votes.view(num_patches, -1).numpy().argmax(axis=1)]
    return labels
