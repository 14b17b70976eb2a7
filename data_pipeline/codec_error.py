"""What a codec costs, measured on the data that it stored. Part of data_pipeline.codec.

Comes in: features before and after. Goes out: a few figures for the index. The first is in units of each channel's own deviation:
a cosine hides the loss of a quiet channel beside a loud one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from data_pipeline.channel_statistics import Moments

SAMPLED_TOKENS = 1024  # tokens of a video that are looked at, evenly chosen: more would slow down a build on an accelerator
NEIGHBOUR_TOKENS = 32  # tokens of a clip whose nearest neighbours are compared


class CodecError:
    """Running sums of one shard; `merge` and `report` make figures of the sums of all shards.

    Everything is float64, added in the caller's order and merged in the order of the shards: no figure depends on the number of
    workers.
    """

    def __init__(self, width: int) -> None:
        self.moments = Moments(width)
        self.errors = np.zeros(width)  # squared, summed over tokens
        self.cosine = np.zeros(2)  # sum of 1 - cosine, number of tokens that have a direction
        self.neighbours = np.zeros(2)  # nearest neighbours that stayed, that were looked at
        self.bytes = np.zeros(2)  # stored, and as float16

    def add(self, values: np.ndarray, restored: np.ndarray, stored_bytes: int = 0) -> None:
        """Shapes: both (T, P, E). `stored_bytes`: what the codec made of them."""
        number = values.shape[0] * values.shape[1]
        chosen = _evenly(number, SAMPLED_TOKENS)
        exact, again = (array.reshape(number, -1)[chosen].astype(np.float64) for array in (values, restored))
        self.moments.add(exact)
        self.errors += np.square(again - exact).sum(axis=0)
        self.cosine += _cosine_loss(exact, again)
        self.neighbours += _kept_neighbours(values, restored)
        self.bytes += [stored_bytes, 2 * values.size]

    def to_json(self) -> dict[str, Any]:
        moments = self.moments
        channels = {"mean": moments.mean, "squares": moments.squares, "errors": self.errors}
        pairs = {"cosine": self.cosine, "neighbours": self.neighbours, "bytes": self.bytes}
        return {"count": moments.count} | {name: sums.tolist() for name, sums in (channels | pairs).items()}

    @staticmethod
    def merge(parts: Iterable[dict[str, Any]]) -> float | None:
        """RMS error in units of each channel's own deviation; None where no channel varies."""
        return CodecError.report(parts)["err_std"]

    @staticmethod
    def report(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """All figures; one is None where nothing was measured.

        Units: err_std: RMS over tokens and channels in units of each channel's own deviation, constant_channels left out (what
        moves there is rounding noise); cosine_loss: mean of 1 - cosine over tokens; nearest_neighbour: share of tokens whose
        most similar token in the next frame stays the same, channels normalised; bytes_vs_float16: stored bytes, 1 is float16.
        """
        whole = _summed([part for part in parts if part["count"]])
        if whole is None:
            return dict.fromkeys(("err_std", "cosine_loss", "nearest_neighbour", "bytes_vs_float16", "constant_channels"))
        moments = whole.moments
        varies = moments.deviation > moments.floor()
        relative = whole.errors[varies] / moments.squares[varies]
        return {
            "err_std": float(np.sqrt(relative.mean())) if varies.any() else None,
            "cosine_loss": _share(whole.cosine),
            "nearest_neighbour": _share(whole.neighbours),
            "bytes_vs_float16": _share(whole.bytes) or None,
            "constant_channels": int((~varies).sum()),
        }


def _summed(parts: list[dict[str, Any]]) -> CodecError | None:
    if not parts:
        return None
    whole = CodecError(len(parts[0]["mean"]))
    for part in parts:
        whole.moments.merge(part["count"], np.asarray(part["mean"]), np.asarray(part["squares"]))
        whole.errors += part["errors"]
        for name in ("cosine", "neighbours", "bytes"):
            setattr(whole, name, getattr(whole, name) + part[name])
    return whole


def _evenly(number: int, wanted: int) -> np.ndarray:
    """At most `wanted` of the numbers below `number`, by whole numbers alone."""
    count = min(number, wanted)
    return np.arange(count) * number // max(count, 1)


def _share(pair: np.ndarray) -> float | None:
    return float(pair[0] / pair[1]) if pair[1] else None


def _cosine_loss(exact: np.ndarray, again: np.ndarray) -> tuple[float, int]:
    """Sum of 1 - cosine as half the squared distance of directions, which keeps figures far below float64's 1 - 1e-16."""
    lengths = [np.sqrt(np.square(tokens).sum(axis=1)) for tokens in (exact, again)]
    has = (lengths[0] > 0) & (lengths[1] > 0)
    ours, theirs = (tokens[has] / length[has, None] for tokens, length in zip((exact, again), lengths, strict=True))
    return float(np.square(ours - theirs).sum()) / 2, int(has.sum())


def _kept_neighbours(values: np.ndarray, restored: np.ndarray) -> tuple[int, int]:
    """Evenly chosen tokens of the middle frame, their neighbours in the next (in the same one, where a clip has one frame)."""
    here = (len(values) - 1) // 2
    there = min(here + 1, len(values) - 1)
    patches = values.shape[1]
    chosen = _evenly(patches, NEIGHBOUR_TOKENS)
    if here == there and patches < 2:
        return 0, 0
    pair = values[[here, there]].reshape(-1, values.shape[-1]).astype(np.float64)
    mean, deviation = pair.mean(axis=0), pair.std(axis=0)
    weight = np.where(deviation > 0, 1 / np.where(deviation > 0, deviation, 1), 0)
    nearest = []
    for features in (values, restored):
        tokens, others = ((features[frame].astype(np.float64) - mean) * weight for frame in (here, there))
        others /= np.maximum(np.sqrt(np.square(others).sum(axis=1, keepdims=True)), 1e-300)
        # einsum, not a matrix product: the latter's sums depend on the number of threads.
        similarity = np.einsum("ie,je->ij", tokens[chosen], others)
        if here == there:
            similarity[np.arange(len(chosen)), chosen] = -np.inf
        nearest.append(similarity.argmax(axis=1))
    return int((nearest[0] == nearest[1]).sum()), len(chosen)


__all__ = ["CodecError"]
