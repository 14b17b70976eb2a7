"""How features are stored: a codec turns float32 (T, P, E) into what lies in a shard, and back.

Comes in: features of a video, and channel statistics of the dataset where the codec needs them. Goes out: an array whose leading
axis is T and whose frames are equal pieces of bytes, so that a window of frames is one positioned read. It is an ordinary npy
array to any other reader. A batch carries the stored bytes; `restore` makes float32 of them on the device.

    build:   statistics = fit_statistics(arrays of tokens) if codec.needs_statistics else None
             stored = codec.encode(values, statistics);  restored = codec.decode(stored, statistics)
    index:   features["statistics"] = statistics.to_json() (None without), features["quality"] = CodecError.report(parts)
    size:    codec.frame_dtype(num_patches, width).itemsize bytes a frame
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_pipeline.channel_statistics import ChannelStatistics, fit_statistics
from data_pipeline.codec_error import CodecError
from data_pipeline.errors import DataError, check_choice

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_HALF = float(np.finfo(np.float16).max)
LARGEST_NORMALISED = 1e38  # beyond, differences from a channel's mean may leave float32
LEVELS = 127  # int8 without -128: the code is symmetric


class Codec(NamedTuple):
    """`encode(values, statistics)` raises DataError for values that it cannot hold; `decode(stored, statistics)` gives float32.

    `frame_dtype(num_patches, width)` is the dtype of one frame in the batch: a scalar with a shape, or a record of fields.
    `restore(stored, num_patches, statistics)` is `decode` on tensors: stored (B, T, ...) as `batch_layout` says, statistics
    float32 (B, 2, E), mean and scale of each clip's dataset, or None; gives float32 (B, T, P, E), equal to `decode` bit for bit.
    `cut(stored, num_patches, patches, statistics)` is, of the same, what would be stored if frames had these patches alone.
    """

    encode: Callable[..., np.ndarray]
    decode: Callable[..., np.ndarray]
    frame_dtype: Callable[[int, int], np.dtype[Any]]
    restore: Callable[..., Tensor]
    needs_statistics: bool
    cut: Callable[..., Tensor]

    def batch_layout(self, num_patches: int, width: int) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """(plain dtype, shape) of a frame in a batch: a record becomes its bytes, since tensors know no records."""
        frame = self.frame_dtype(num_patches, width)
        return (np.dtype(np.uint8), (frame.itemsize,)) if frame.names else (frame.base, frame.shape)


def _check_finite(values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        frame = int(np.argmin(finite.reshape(len(values), -1).all(axis=1)))
        raise DataError(
            f"features hold {int((~finite).sum())} values that are not finite, first in frame {frame}; "
            f"features must be finite; check the extractor's weights and precision"
        )


def _encode_float16(values: np.ndarray, statistics: ChannelStatistics | None = None) -> np.ndarray:
    _check_finite(values)
    largest = float(np.abs(values).max(initial=0.0))
    if largest > LARGEST_HALF:
        raise DataError(f"largest feature magnitude={largest:g}; codec float16 holds at most 65504; build with codec=float32")
    return values.astype("<f2")


def _encode_float32(values: np.ndarray, statistics: ChannelStatistics | None = None) -> np.ndarray:
    _check_finite(values)
    return np.ascontiguousarray(values, dtype="<f4")


def _decode_float(stored: np.ndarray, statistics: ChannelStatistics | None = None) -> np.ndarray:
    return stored.astype(np.float32)


def _restore_float(stored: Tensor, num_patches: int, statistics: Tensor | None = None) -> Tensor:
    return stored.float()


def _cut_float(stored: Tensor, num_patches: int, patches: slice, statistics: Tensor | None = None) -> Tensor:
    return stored[:, :, patches].contiguous()  # a view would keep whole frames, and be copied again where it is read


def _int8_frame(num_patches: int, width: int) -> np.dtype[Any]:
    """Scales first and an even number of bytes: both parts of every frame of a batch are aligned.

    The odd byte is a field, not a gap between fields: numpy may write anything into a gap.
    """
    odd = [("pad", "u1")] if num_patches * width % 2 else []
    return np.dtype([("scale", "<f2", (num_patches,)), ("q", "i1", (num_patches, width)), *odd])


def _encode_int8(values: np.ndarray, statistics: ChannelStatistics) -> np.ndarray:
    """Tokens are normalised by the dataset's channels, then each has one float16 scale that maps its largest value to 127.

    Without the first step a few massive channels would take up the whole range of every token.
    Differs from rounding to nearest in the scale alone: it is rounded up, so that no code is clipped.
    """
    _check_finite(values)
    largest = float(np.abs(values).max(initial=0.0))
    if largest > LARGEST_NORMALISED:
        raise DataError(f"largest feature magnitude={largest:g}; codec int8 holds at most 1e38; build with codec=float32")
    with np.errstate(over="ignore"):
        normal = (np.asarray(values, np.float32) - statistics.mean) / statistics.scale
        needed = np.abs(normal).max(axis=-1) / np.float32(LEVELS)
        scale = needed.astype("<f2")
    low = scale.astype(np.float32) < needed
    with np.errstate(over="ignore"):
        scale[low] = np.nextafter(scale[low], np.float16(np.inf))
    if not np.isfinite(scale).all():
        frame, token = (int(place[0]) for place in np.nonzero(~np.isfinite(scale)))
        raise DataError(
            f"frame {frame}, patch {token}: a feature lies {float(needed[frame, token]) * LEVELS:.3g} deviations from its "
            f"channel's mean; codec int8 holds at most {LARGEST_HALF * LEVELS:.3g}; build with codec=float32"
        )
    stored = np.zeros(len(values), _int8_frame(*values.shape[1:]))
    stored["scale"] = scale
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    stored["q"] = np.rint(normal / divisor[..., None])
    return stored


def _decode_int8(stored: np.ndarray, statistics: ChannelStatistics) -> np.ndarray:
    values = stored["q"] * stored["scale"].astype(np.float32)[..., None]
    values *= statistics.scale
    values += statistics.mean
    return values


def _restore_int8(stored: Tensor, num_patches: int, statistics: Tensor) -> Tensor:
    """Codes and scales are views of the bytes; one new tensor is made."""
    import torch

    mean, scale = statistics[:, 0, None, None], statistics[:, 1, None, None]
    width = statistics.shape[-1]
    tokens = stored[..., : 2 * num_patches].view(torch.float16)
    codes = stored[..., 2 * num_patches : (2 + width) * num_patches].view(torch.int8).unflatten(-1, (num_patches, width))
    # Multiplied and added in the order of `decode`, each step rounded: the same bits on every device.
    return (codes * tokens.float()[..., None]).mul_(scale).add_(mean)


def _cut_int8(stored: Tensor, num_patches: int, patches: slice, statistics: Tensor) -> Tensor:
    import torch

    first, last, width = patches.start, patches.stop, statistics.shape[-1]
    codes = 2 * num_patches
    scales = stored[..., 2 * first : 2 * last]
    codes_of_patches = stored[..., codes + first * width : codes + last * width]
    odd = stored[..., : (last - first) * width % 2]  # any byte: nobody reads it
    return torch.cat([scales, codes_of_patches, odd], dim=-1)


CODECS: dict[str, Codec] = {
    "int8": Codec(_encode_int8, _decode_int8, _int8_frame, _restore_int8, True, _cut_int8),
    "float16": Codec(_encode_float16, _decode_float, lambda p, e: np.dtype(("<f2", (p, e))), _restore_float, False, _cut_float),
    "float32": Codec(_encode_float32, _decode_float, lambda p, e: np.dtype(("<f4", (p, e))), _restore_float, False, _cut_float),
}


def find_codec(name: str, key: str = "codec") -> Codec:
    """Raises ConfigError that lists the known codecs."""
    check_choice(key, name, CODECS)
    return CODECS[name]


__all__ = ["CODECS", "ChannelStatistics", "Codec", "CodecError", "find_codec", "fit_statistics"]
