"""Slow features: the linear directions of a descriptor that change least from a patch to its neighbours, in closed form.

Descriptors of many clips go in, a fixed projection comes out. What belongs to one object is alike in neighbouring patches and in
the next frame, pixel noise and texture phase are not: the directions in which neighbours correlate most tell objects apart.
Source: slow feature analysis (Wiskott and Sejnowski 2002), here with neighbours in space as well as in time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError

_RIDGE = 1e-3  # of the mean variance: keeps directions without variance out of the solution
_MIN_DEVIATION = 1e-6


def _shift(step: int) -> tuple[slice, slice]:
    """Along one axis: the places that have a neighbour `step` ahead, and these neighbours."""
    if step == 0:
        return slice(None), slice(None)
    return (slice(None, -step), slice(step, None)) if step > 0 else (slice(-step, None), slice(None, step))


# Both ends of every pair of neighbours, as slices of (T, Y, X): right, below, both diagonals below, next frame.
_STEPS = ((0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 1, -1), (1, 0, 0))
_PAIRS = [tuple(zip(*(_shift(step) for step in steps), strict=True)) for steps in _STEPS]


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowProjection:
    """Everything the projection needs; C inputs, R random features, K kept directions.

    Shapes: mean and deviation (C), random_weight (C, R), random_bias (R), weight (C + R, K), bias (K), correlation (K).
    `correlation` is that of a direction between neighbouring patches, falling; the outputs have it as their deviation.
    """

    mean: Tensor
    deviation: Tensor
    random_weight: Tensor
    random_bias: Tensor
    weight: Tensor
    bias: Tensor
    correlation: Tensor

    def __call__(self, descriptors: Tensor) -> Tensor:
        """Shapes: (..., C) -> (..., K)."""
        return self._expand(descriptors) @ self.weight.to(descriptors.device) + self.bias.to(descriptors.device)

    def _expand(self, descriptors: Tensor) -> Tensor:
        fixed = (self.mean, self.deviation, self.random_weight, self.random_bias)
        return expand(descriptors, *(item.to(descriptors.device) for item in fixed))

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def expand(descriptors: Tensor, mean: Tensor, deviation: Tensor, random_weight: Tensor, random_bias: Tensor) -> Tensor:
    """Standardised descriptors and fixed random ReLU features of them, side by side.

    Shapes: (..., C) -> (..., C + R).
    """
    standard = (descriptors - mean) / deviation
    return torch.cat([standard, torch.relu(standard @ random_weight + random_bias)], dim=-1)


def fit_slow(descriptors: Iterable[Tensor], num_components: int, num_random: int, seed: int) -> SlowProjection:
    """Find the `num_components` slowest directions of the descriptors and of `num_random` random features of them.

    Shapes: descriptors: (T, Y, X, C) for each clip; C is the same for all.
    Raises: ConfigError when more directions are asked for than there are inputs, DataError when there are no neighbours.
    """
    kept = list(descriptors)
    if not kept:
        raise DataError("the slow projection was given 0 clips; at least 1 is needed; check the source's train split")
    num_inputs = kept[0].shape[-1]
    if num_components > num_inputs + num_random:
        raise ConfigError(
            f"features.num_components={num_components}; the descriptor and its random features have {num_inputs + num_random}; "
            f"choose fewer components or more features.num_random"
        )
    mean, deviation = _moments(kept)
    random_weight, random_bias = _random_features(num_inputs, num_random, seed)
    inputs = [_as_float32(item) for item in (mean, deviation, random_weight, random_bias)]
    centre, covariance, neighbour = _statistics((expand(item, *inputs) for item in kept), num_inputs + num_random)
    try:
        correlation, directions = _slowest(covariance, neighbour, num_components)
    except np.linalg.LinAlgError:
        raise DataError("patches of the training clips are all alike; a fit needs some that differ; see the videos") from None
    weight = directions * np.maximum(correlation, 0.0)  # scaled by its correlation: what is not slow is small
    names = ("mean", "deviation", "random_weight", "random_bias")
    return SlowProjection(
        **dict(zip(names, inputs, strict=True)),
        weight=_as_float32(weight),
        bias=_as_float32(-centre @ weight),
        correlation=_as_float32(correlation),
    )


def _as_float32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _moments(descriptors: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel over all patches, accumulated in float64."""
    rows = [item.double().reshape(-1, item.shape[-1]) for item in descriptors]
    count = sum(item.shape[0] for item in rows)
    mean = torch.stack([item.sum(0) for item in rows]).sum(0) / count
    variance = torch.stack([(item - mean).square().sum(0) for item in rows]).sum(0) / count
    return mean.numpy(), variance.sqrt().clamp_min(_MIN_DEVIATION).numpy()


def _random_features(num_inputs: int, num_random: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.Generator(np.random.Philox(seed))  # a counter-based stream: the same numbers on every platform
    weight = draw.standard_normal((num_inputs, num_random)) / np.sqrt(num_inputs)
    return weight, draw.uniform(-1.0, 1.0, num_random)


def _statistics(expanded: Iterable[Tensor], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, covariance of a patch with itself and (symmetric) with its neighbours, over all pairs of a clip, in float64.

    Covariances are about each clip's own mean: what is constant in a clip is as slow as can be and tells no two objects apart.
    A patch counts once for each pair that it is in, so that the ratio of the two is a correlation, at most 1.
    """
    total, count = torch.zeros(size, dtype=torch.float64), 0.0
    square = torch.zeros(size, size, dtype=torch.float64)
    neighbour = torch.zeros(size, size, dtype=torch.float64)
    for item in expanded:
        values = item.double()
        times = _times_in_pairs(values.shape[:3]).reshape(-1, 1)
        clip_total = (values.reshape(-1, size) * times).sum(0)
        values = values - clip_total / times.sum().clamp_min(1)
        rows = values.reshape(-1, size)
        total += clip_total
        count += float(times.sum())
        square += (rows * times).T @ rows
        # One product for all directions: each patch times the sum of its neighbours ahead.
        ahead = _sum_of_neighbours(values)
        neighbour += rows.T @ ahead.reshape(-1, size)
    if count == 0:
        raise DataError("the slow projection saw no two neighbouring patches; clips need more than one patch; use larger frames")
    return (total / count).numpy(), (square / count).numpy(), ((neighbour + neighbour.T) / count).numpy()


def _sum_of_neighbours(values: Tensor) -> Tensor:
    """Sum over the neighbours ahead of each patch. Shapes: (T, Y, X, C) -> (T, Y, X, C)."""
    ahead = torch.zeros_like(values)
    for here, there in _PAIRS:
        ahead[here] += values[there]
    return ahead


def _times_in_pairs(shape: torch.Size) -> Tensor:
    """How many pairs each patch is in. Shapes: -> (T, Y, X)."""
    times = torch.zeros(shape, dtype=torch.float64)
    for here, there in _PAIRS:
        times[here] += 1
        times[there] += 1
    return times


def _slowest(covariance: np.ndarray, neighbour: np.ndarray, num_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Solve neighbour v = correlation * covariance v; the largest correlations first, each v of unit variance."""
    size = covariance.shape[0]
    ridge = _RIDGE * np.trace(covariance) / size
    span = [size - num_components, size - 1]
    correlation, directions = scipy.linalg.eigh(neighbour, covariance + ridge * np.eye(size), subset_by_index=span)
    correlation, directions = correlation[::-1], directions[:, ::-1]
    # An eigenvector's sign is arbitrary: its largest entry is made positive so that a fit is reproducible.
    largest = np.abs(directions).argmax(axis=0)
    return correlation, directions * np.sign(directions[largest, np.arange(num_components)])
