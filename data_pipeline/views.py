"""Views: the squares cut from a video's frames before features are taken.

Comes in: uint8 frames or instance ids at native size, a view name. Goes out: float32 squares for the extractor, or ids cut alike.
Frames may lie on any device; a Cut says all that is needed to cut them there.

A view is `center` or `crop<k>` (the k-th random square, fixed by the video's key and k), optionally followed by `+hflip`.
With resize=stretch every view shows the whole frame, squashed to a square. Where frames are cut in training, `crop*` is a new
crop each time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

VIEW_PATTERN = re.compile(r"(?:center|crop(?P<crop>\d+))(?P<hflip>\+hflip)?")
NUM_CROPS = 1 << 32  # that crop* draws from
FRAMES_AT_ONCE = 8  # bounds the float32 copies of frames at native size


class View(NamedTuple):
    """A parsed view name. `crop` is None for the centre."""

    crop: int | None
    hflip: bool


class Window(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


class Cut(NamedTuple):
    """A view of frames of one size: `part` of the frame is scaled to height and width `scaled`, `kept` of that stays."""

    part: Window
    scaled: tuple[int, int]
    kept: Window
    hflip: bool


def parse_view(view: str) -> View:
    """Raises ConfigError when the name is outside the grammar."""
    match = VIEW_PATTERN.fullmatch(view)
    if match is None:
        raise ConfigError(f"view={view!r}; a view is center or crop<number>, optionally with +hflip; for example crop0+hflip")
    crop = match["crop"]
    return View(None if crop is None else int(crop), match["hflip"] is not None)


def draw_view(views: Sequence[str], below: Callable[[int], int]) -> str:
    """One of `views`; `below(n)` draws a whole number in [0, n). A `crop*` becomes one of many crops."""
    view = views[below(len(views))]
    return view.replace("*", str(below(NUM_CROPS))) if "*" in view else view


def prepare(frames: np.ndarray, view: str, image_size: int, resize: str, key: str) -> Tensor:
    """Cut `view` out of a video's frames, as the frozen backbone gets it (before its own normalisation).

    Shapes: frames uint8 (T, H, W, 3) -> float32 (T, 3, image_size, image_size) in [0, 1].
    Source: SlotContrast, released code: bicubic without antialiasing, corners not aligned, clamped.
    """
    import torch

    cut = cut_of(frames.shape[1:3], view, image_size, resize, key)
    parts = [
        cut_squares(torch.from_numpy(np.ascontiguousarray(frames[first : first + FRAMES_AT_ONCE])), cut)
        for first in range(0, len(frames), FRAMES_AT_ONCE)
    ]
    return torch.cat(parts)


def cut_of(size: tuple[int, ...], view: str, image_size: int, resize: str, key: str) -> Cut:
    """What `view` does to frames of height and width `size` of the video `key`."""
    parsed, whole = parse_view(view), (int(size[0]), int(size[1]))
    if resize == "crop" and parsed.crop is not None:
        scaled, kept = _scaled_window(whole, parsed.crop, image_size, key)
        return Cut(Window(0, 0, *whole), scaled, kept, parsed.hflip)
    square = (image_size, image_size)
    return Cut(_native_window(whole, parsed, image_size, resize, key), square, Window(0, 0, *square), parsed.hflip)


def cut_squares(frames: Tensor, cut: Cut) -> Tensor:
    """Shapes: uint8 (T, H, W, 3) -> float32 (T, 3, image_size, image_size) in [0, 1], on the frames' device."""
    part, kept = cut.part, cut.kept
    image = _resize(frames[:, part.top : part.top + part.height, part.left : part.left + part.width], cut.scaled)
    image = image[:, :, kept.top : kept.top + kept.height, kept.left : kept.left + kept.width]
    return (image.flip(-1) if cut.hflip else image).contiguous()


def crop_instance_ids(ids: np.ndarray, view: str, image_size: int, resize: str, key: str) -> np.ndarray:
    """The part of an id map (or of frames) that `view` shows, at native size: no pixel is invented or blended.

    Shapes: (T, H, W) or (T, H, W, 3) -> (T, h, w[, 3]), same dtype. Resized to image_size afterwards it lies on the view; a
    random crop is cut at whole native pixels, so it may be off by half of one.
    """
    parsed = parse_view(view)
    top, left, height, width = _native_window(ids.shape[1:3], parsed, image_size, resize, key)
    cut = ids[:, top : top + height, left : left + width]
    return np.ascontiguousarray(cut[:, :, ::-1] if parsed.hflip else cut)


def _resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    from torch.nn.functional import interpolate

    image = frames.permute(0, 3, 1, 2).float() / 255.0
    if tuple(image.shape[2:]) == size:
        return image
    return interpolate(image, size=size, mode="bicubic", align_corners=False, antialias=False).clamp_(0.0, 1.0)


def _scaled_window(size: tuple[int, int], crop: int, image_size: int, key: str) -> tuple[tuple[int, int], Window]:
    """A random crop as in training: the short side becomes image_size, then one square for the whole video.

    Returns the size of the scaled frame and the square in it. Source: SlotContrast, released code (long side rounded down).
    """
    short = min(size)
    height, width = (image_size if side == short else int(side / short * image_size) for side in size)
    digest = hashlib.sha256(f"{key}/{crop}".encode()).digest()
    # Fractions of the free space, by whole numbers only: the same crop on every machine and numpy version.
    top = int.from_bytes(digest[:8], "little") * (height - image_size + 1) >> 64
    left = int.from_bytes(digest[8:16], "little") * (width - image_size + 1) >> 64
    return (height, width), Window(top, left, image_size, image_size)


def _native_window(size: tuple[int, ...], view: View, image_size: int, resize: str, key: str) -> Window:
    """The rectangle of the native frame that the view shows."""
    height, width = int(size[0]), int(size[1])
    if resize == "stretch":
        return Window(0, 0, height, width)
    side = min(height, width)
    if view.crop is None:
        # round() to even is the rule of the official validation crop.
        return Window(round((height - side) / 2), round((width - side) / 2), side, side)
    scaled, window = _scaled_window((height, width), view.crop, image_size, key)
    top = min(round(window.top * height / scaled[0]), height - side)
    left = min(round(window.left * width / scaled[1]), width - side)
    return Window(top, left, side, side)
