"""Statistics of channels over tokens: sums that lose nothing to a large mean, and what the int8 codec normalises with.

Comes in: tokens, (N, E) at a time. Goes out: mean and deviation of every channel. Part of data_pipeline.codec.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import DataError

# A channel that varies less than this is taken for constant: what moves there is rounding noise.
OF_ITS_SIZE = 1e-5  # against the channel's own mean
OF_OTHERS = 1e-4  # against the deviation of the median channel


class Moments:
    """Count, mean and sum of squared deviations of every channel, float64.

    Parts are merged by Chan's rule: no difference of large sums, so that a constant channel has deviation 0 exactly.
    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self.squares = np.zeros(width)

    def add(self, tokens: np.ndarray) -> None:
        """Shapes: (N, E)."""
        if not len(tokens):
            return
        pivot = tokens[0].astype(np.float64)
        shifted = tokens - pivot
        mean = shifted.mean(axis=0)
        shifted -= mean
        self.merge(len(tokens), pivot + mean, np.square(shifted, out=shifted).sum(axis=0))

    def merge(self, count: int, mean: np.ndarray, squares: np.ndarray) -> None:
        """Take in the moments of other tokens."""
        if not count:
            return
        total = self.count + count
        step = mean - self.mean
        self.mean = mean if not self.count else self.mean + step * (count / total)
        self.squares = self.squares + squares + (np.square(step) * (self.count * count / total) if self.count else 0.0)
        self.count = total

    @property
    def deviation(self) -> np.ndarray:
        return np.sqrt(self.squares / max(self.count, 1))

    def floor(self) -> np.ndarray:
        """The deviation below which a channel counts as constant, for every channel."""
        deviation = self.deviation
        varying = deviation[deviation > OF_ITS_SIZE * np.abs(self.mean)]
        usual = float(np.median(varying)) if len(varying) else 0.0
        return np.maximum(OF_ITS_SIZE * np.abs(self.mean), OF_OTHERS * usual)


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Mean and scale of every channel over the dataset, float32 (E,); scale is finite and above 0."""

    mean: np.ndarray
    scale: np.ndarray

    @property
    def width(self) -> int:
        return len(self.mean)

    def to_json(self) -> dict[str, list[float]]:
        """Numbers that come back bit for bit: a float32 is exact as a double, and a double's shortest text is."""
        return {"mean": [float(value) for value in self.mean], "scale": [float(value) for value in self.scale]}

    @staticmethod
    def from_json(values: Mapping[str, Any], width: int) -> ChannelStatistics:
        """Raises DataError unless there is a finite mean and a positive scale for each of `width` channels."""
        try:
            mean, scale = (np.asarray(values[name], dtype=np.float32) for name in ("mean", "scale"))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"statistics: {error!r}; every channel needs a mean and a scale; build the shards again") from None
        sound = mean.shape == scale.shape == (width,) and np.isfinite(mean).all() and np.isfinite(scale).all()
        if not sound or not (scale > 0).all():
            raise DataError(
                f"statistics: mean {mean.shape}, scale {scale.shape}; {width} finite means and positive scales are needed; "
                f"build the shards again"
            )
        return ChannelStatistics(mean, scale)


def fit_statistics(parts: Iterable[np.ndarray]) -> ChannelStatistics:
    """Mean and deviation of every channel over all tokens.

    The scale of a channel that is constant here is small beside that of the others, but not so small that it would take up the
    whole range of a token in which it moves after all. The result follows from the tokens and their order alone.
    Shapes: each part float32 (N, E). Raises DataError where there are no tokens, or one is not finite.
    """
    moments: Moments | None = None
    for part in parts:
        if not np.isfinite(part).all():
            raise DataError("features hold values that are not finite; channel statistics need finite ones; check the extractor")
        moments = moments or Moments(part.shape[-1])
        moments.add(part)
    if moments is None or not moments.count:
        raise DataError("no features to take channel statistics from; at least one readable video is needed; check the dataset")
    smallest = float(np.finfo(np.float32).tiny)
    scale = np.maximum(moments.deviation, moments.floor())
    scale[scale < smallest] = 1.0  # nothing varies, or all is zero
    return ChannelStatistics(moments.mean.astype(np.float32), scale.astype(np.float32))


__all__ = ["ChannelStatistics", "Moments", "fit_statistics"]
