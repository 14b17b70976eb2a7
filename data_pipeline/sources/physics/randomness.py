"""Random numbers of a clip: a counter-based stream of its own for every (seed, variant, split, index, attempt).

Only Philox's bits and their plain conversion to doubles are used; everything else is computed from those doubles here, so that
no release of numpy that draws integers or shuffles differently changes a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


class Draw:
    """A stream of random choices."""

    def __init__(self, seed: int, stream: int, index: int, attempt: int = 0) -> None:
        key = np.array([seed, stream << 48 | index], np.uint64)
        counter = np.array([0, 0, 0, attempt], np.uint64)  # 2**192 blocks apart: attempts never overlap
        self._generator = np.random.Generator(np.random.Philox(key=key, counter=counter))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(self._generator.random())

    def uniforms(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> np.ndarray:
        return low + (high - low) * self._generator.random(shape)

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._generator.random() * (high - low + 1))

    def choice(self, items: Sequence[Item]) -> Item:
        return items[self.integer(0, len(items) - 1)]

    def shuffled(self, count: int) -> np.ndarray:
        return np.argsort(self._generator.random(count), kind="stable")

    def direction(self) -> np.ndarray:
        """A point on the unit sphere, evenly distributed. Shapes: (3)."""
        height, turn = self.uniform(-1, 1), self.uniform(0, 2 * np.pi)
        flat = np.sqrt(1 - height * height)
        return np.array([flat * np.cos(turn), flat * np.sin(turn), height])

    def rotation(self) -> np.ndarray:
        """A turn, evenly distributed, as a quaternion (x, y, z, w). Source: Shoemake, Uniform random rotations (1992)."""
        share, first, second = self.uniform(), self.uniform(0, 2 * np.pi), self.uniform(0, 2 * np.pi)
        low, high = np.sqrt(1 - share), np.sqrt(share)
        return np.array([low * np.sin(first), low * np.cos(first), high * np.sin(second), high * np.cos(second)])
