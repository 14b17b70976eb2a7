"""ClevrTex and its variants: rendered pictures of textured objects, each a clip of one frame with exact masks.

Comes in: the folder clevrtex_full (or the one above it), with CLEVRTEX_full_000000.png and CLEVRTEX_full_000000_flat.png
at any depth. Goes out: Clip with T = 1; an id is a pixel's value in the flat picture, 0 = background. By number, the first tenth
is test, the next tenth validation, the rest train: the split of the official loader.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.clip import Clip
from data_pipeline.config import ClevrTexSource
from data_pipeline.errors import ConfigError, DataError, unknown_key
from data_pipeline.sources.davis import decode_png

SPLITS = {"test": (0.0, 0.1), "validation": (0.1, 0.2), "train": (0.2, 1.0)}
CROP = 0.8
REMEDY = "unpack the archive again"


class ClevrTexImages:
    """Source of ClevrTex. Key: the picture's number in six digits."""

    background_labelled = True

    def __init__(self, config: ClevrTexSource, root: str | None) -> None:
        if root is None:
            raise ConfigError("root=null; source clevrtex reads the folder clevrtex_full; add root=FOLDER")
        self.root, self.variant, self.crop = Path(root), config.variant, config.official_crop
        self._splits: dict[str, dict[str, Path]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The folder is listed again in another process."""
        return {**self.__dict__, "_splits": {}}

    def keys(self, split: str) -> list[str]:
        return list(self._split(split))

    def read(self, split: str, key: str) -> Clip:
        if key not in self._split(split):
            raise unknown_key("picture", key, split, self.root)
        path = self._split(split)[key]
        masks_at = path.with_name(f"{path.stem}_flat.png")
        frame, ids = decode_png(path, ("RGB", "RGBA"))[..., :3], decode_png(masks_at, ("P", "L", "I;16"))
        if ids.shape != frame.shape[:2]:
            here, there = ids.shape, frame.shape
            raise DataError(
                f"{masks_at}: {here[1]}x{here[0]}, its picture {there[1]}x{there[0]}; both must have one size; {REMEDY}"
            )
        if self.crop:
            frame, ids = central_square(frame), central_square(ids)
        ids = ids.astype(np.uint16 if ids.dtype.itemsize > 1 else np.uint8)
        metadata = {"image": path.name, "num_instances": int(np.count_nonzero(np.unique(ids)))}
        return Clip(key=key, frames=np.ascontiguousarray(frame[None]), instance_ids=ids[None], metadata=metadata)

    def _split(self, split: str) -> dict[str, Path]:
        """The pictures of a split in the order of their numbers, by key."""
        if split not in self._splits:
            splits = {"test": (0.0, 1.0)} if self.variant == "outd" else SPLITS
            if split not in splits:
                raise DataError(f"split={split!r} is not in {self.root}; it has {', '.join(splits)}; change splits")
            pictures = find_pictures(self.root, self.variant)
            first, last = (int(share * len(pictures)) for share in splits[split])
            if first == last:
                raise DataError(f"split={split!r} of {self.root} is empty; {len(pictures)} pictures are too few; change root")
            self._splits[split] = dict(list(pictures.items())[first:last])
        return self._splits[split]


def find_pictures(root: Path, variant: str) -> dict[str, Path]:
    """Pictures by number, in order. Raises DataError for none, a doubled and a missing one, since the split is by position."""
    if not root.is_dir():
        raise DataError(f"root={root} is not a folder; the folder clevrtex_{variant} is needed; change root")
    folder = root / f"clevrtex_{variant}"
    pattern = re.compile(rf"CLEVRTEX_{variant}_(\d{{6}})\.png")
    found: dict[str, Path] = {}
    for path in sorted((folder if folder.is_dir() else root).rglob(f"CLEVRTEX_{variant}_*.png")):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        if match[1] in found:
            raise DataError(f"{path}: number {match[1]} is {found[match[1]]} too; each must be there once; {REMEDY}")
        found[match[1]] = path
    if not found:
        raise DataError(
            f"root={root}: no CLEVRTEX_{variant}_000000.png at any depth; the folder clevrtex_{variant} is needed; change root"
        )
    missing = next((number for number in range(int(max(found)) + 1) if f"{number:06d}" not in found), None)
    if missing is not None:
        raise DataError(f"root={root}: no CLEVRTEX_{variant}_{missing:06d}.png; numbers must have no gap; {REMEDY}")
    return dict(sorted(found.items()))


def central_square(pixels: np.ndarray) -> np.ndarray:
    """Shapes: (H, W, ...) -> (S, S, ...), S = 0.8 of the short side. Source: the official loader (crop_size)."""
    height, width = pixels.shape[:2]
    side = int(CROP * min(height, width))
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]
