"""How features are stored: a codec turns float32 (T, P, E) into what lies in a shard, and back.

What a codec costs is measured on the data that it stored, in units of each channel's own deviation: a cosine hides the loss of a
quiet channel beside a loud one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import DataError, check_choice


class Codec(NamedTuple):
    """`encode` raises DataError for values it cannot hold; `decode` gives the dtype that a batch carries."""

    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    stored: np.dtype[Any]
    decoded: np.dtype[Any]


def _check_finite(values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        frame = int(np.argmin(finite.reshape(len(values), -1).all(axis=1)))
        raise DataError(
            f"features hold {int((~finite).sum())} values that are not finite, first in frame {frame}; "
            f"features must be finite; check the extractor's weights and precision"
        )


def _encode_float16(values: np.ndarray) -> np.ndarray:
    _check_finite(values)
    largest = float(np.abs(values).max(initial=0.0))
    if largest > float(np.finfo(np.float16).max):
        raise DataError(f"largest feature magnitude={largest:g}; codec float16 holds at most 65504; build with codec=float32")
    return values.astype("<f2")


def _encode_float32(values: np.ndarray) -> np.ndarray:
    _check_finite(values)
    return np.ascontiguousarray(values, dtype="<f4")


def _as_stored(values: np.ndarray) -> np.ndarray:
    return values


CODECS: dict[str, Codec] = {
    "float16": Codec(_encode_float16, _as_stored, np.dtype("<f2"), np.dtype("<f2")),
    "float32": Codec(_encode_float32, _as_stored, np.dtype("<f4"), np.dtype("<f4")),
}


def find_codec(name: str, key: str = "codec") -> Codec:
    """Raises ConfigError that lists the known codecs."""
    check_choice(key, name, CODECS)
    return CODECS[name]


class CodecError:
    """Running sums from which the error of a codec over a whole dataset follows.

    Sums are float64 per channel, added in a fixed order by the caller: the figure does not depend on the number of workers.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sums = np.zeros((3, width))  # values, squared values, squared errors

    def add(self, values: np.ndarray, restored: np.ndarray) -> None:
        """Shapes: both (T, P, E)."""
        exact = values.reshape(-1, values.shape[-1]).astype(np.float64)
        error = restored.reshape(exact.shape) - exact
        self.count += len(exact)
        self.sums += [exact.sum(axis=0), np.square(exact).sum(axis=0), np.square(error).sum(axis=0)]

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "sums": self.sums.tolist()}

    @staticmethod
    def merge(parts: Iterable[dict[str, Any]]) -> float | None:
        """RMS error in units of each channel's own deviation; None where no channel varies."""
        parts = [part for part in parts if part["count"]]
        if not parts:
            return None
        count = sum(part["count"] for part in parts)
        total = np.zeros_like(np.asarray(parts[0]["sums"]))
        for part in parts:
            total += np.asarray(part["sums"])
        mean, square, error = total / count
        variance = square - mean**2
        varies = variance > 1e-12 * np.maximum(square, 1e-30)
        return float(np.sqrt((error[varies] / variance[varies]).mean())) if varies.any() else None


__all__ = ["CODECS", "Codec", "CodecError", "find_codec"]
