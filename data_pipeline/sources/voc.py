"""Pascal VOC 2012: pictures with a mask for each object, each a clip of one frame.

Comes in: the folder VOC2012 (JPEGImages, SegmentationObject, ImageSets/Segmentation) or one above it. Goes out: Clip with T = 1;
an id is a PNG's palette index. Index 255, the outlines and what no one labelled, becomes 0; metadata counts it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.clip import Clip
from data_pipeline.config import VocSource
from data_pipeline.errors import ConfigError, DataError, unknown_key
from data_pipeline.sources.davis import VOID, read_list, read_masks
from data_pipeline.sources.ytvis import Video, read_frames

FRAMES, MASKS, LISTS = "JPEGImages", "SegmentationObject", "ImageSets/Segmentation"
BELOW = (".", "VOC2012", "VOCdevkit/VOC2012", "TrainVal/VOCdevkit/VOC2012")


class VocImages:
    """Source of Pascal VOC. Key: the picture's name, 2007_000032."""

    background_labelled = False  # the outlines are void, so 0 is not all background

    def __init__(self, config: VocSource, root: str | None) -> None:
        if root is None:
            raise ConfigError("root=null; source voc reads a folder with JPEGImages and SegmentationObject; add root=FOLDER")
        self.root = Path(root)
        self.lists = {"train": config.train_list, "validation": "val"}
        self._splits: dict[str, dict[str, Video]] = {}

    def keys(self, split: str) -> list[str]:
        return list(self._split(split))

    def read(self, split: str, key: str) -> Clip:
        if key not in self._split(split):
            raise unknown_key("picture", key, split, self.root)
        name, base = self._split(split)[key].name, find_voc(self.root)
        frames = read_frames([base / FRAMES / f"{name}.jpg"])
        if self.lists[split] == "trainaug":  # SBD has masks of classes, not of objects, for most of these
            return Clip(key=key, frames=frames, metadata={"image": name})
        indices = read_masks([base / MASKS / f"{name}.png"], frames.shape[1:3])
        void = indices == VOID
        ids = np.where(void, np.uint8(0), indices)
        metadata = {"image": name, "num_instances": int(np.count_nonzero(np.unique(ids))), "num_void": int(void.sum())}
        return Clip(key=key, frames=frames, instance_ids=ids, metadata=metadata)

    def _split(self, split: str) -> dict[str, Video]:
        """The pictures of a split in the order of its list, by key."""
        if split not in self.lists:
            raise DataError(f"split={split!r} is not in {self.root}; it has {', '.join(self.lists)}; change splits")
        if split not in self._splits:
            self._splits[split] = read_list(find_voc(self.root) / LISTS / f"{self.lists[split]}.txt")
        return self._splits[split]


def find_voc(root: Path) -> Path:
    """The folder at or below `root` that holds the pictures. Raises DataError when none does."""
    for below in BELOW:
        if (root / below / FRAMES).is_dir():
            return root / below
    raise DataError(f"root={root}: no {FRAMES}, nor {BELOW[2]}/{FRAMES}; the folder VOC2012 is needed; change root")
