"""Clip: one whole video as a source gives it. First arrow of the trace: source -> Clip."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.errors import DataError

KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One video (or one image, then T = 1).

    Shapes: frames uint8 (T, H, W, 3) RGB; instance_ids uint8 or uint16 (T, H, W), 0 = nothing annotated, 1..n = objects,
    the same id for an object in every frame; None where the dataset has no annotation.
    `key` is unique in its dataset and holds no dot (a tar reader cuts member names at the first dot).
    `metadata` is JSON: numbers, strings, lists, mappings.
    """

    key: str
    frames: np.ndarray
    instance_ids: np.ndarray | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not KEY_PATTERN.fullmatch(self.key):
            raise DataError(f"sample key={self.key!r}; only letters, digits, '_' and '-' are allowed; rename the video")
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[-1] != 3 or 0 in self.frames.shape:
            raise DataError(
                f"video {self.key}: frames are {self.frames.dtype}{list(self.frames.shape)}; "
                f"uint8 [T, H, W, 3] with no empty axis is needed; check the source's files"
            )
        if self.instance_ids is not None:
            if self.instance_ids.dtype not in (np.uint8, np.uint16):
                raise DataError(f"video {self.key}: instance ids are {self.instance_ids.dtype}; uint8 or uint16 is needed")
            if self.instance_ids.shape != self.frames.shape[:3]:
                raise DataError(
                    f"video {self.key}: masks are {list(self.instance_ids.shape)} [T, H, W], "
                    f"frames {list(self.frames.shape[:3])}; both must have one size; mend the annotation or leave this video out"
                )

    @property
    def num_frames(self) -> int:
        return self.frames.shape[0]
