"""DAVIS 2017: a folder of JPEG frames and a folder of palette PNGs for each video, and a list of videos for each split.

Comes in: the folder DAVIS (JPEGImages/480p, Annotations_unsupervised/480p, ImageSets/2017) or the one above it. Goes out: Clip;
an id is a PNG's palette index as it stands. Index 255, pixels that no one labelled, becomes 0; metadata counts them.
"""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.clip import Clip
from data_pipeline.config import DavisSource
from data_pipeline.errors import ConfigError, DataError, unknown_key
from data_pipeline.sources.ytvis import Video, read_frames, unique_keys

FRAMES, LISTS = "JPEGImages/480p", "ImageSets/2017"
ANNOTATIONS = {"unsupervised": "Annotations_unsupervised/480p", "semi": "Annotations/480p"}
SPLITS = {"train": "train.txt", "validation": "val.txt"}
VOID = 255


class DavisVideos:
    """Source of DAVIS 2017. Key: the video folder's name."""

    background_labelled = False

    def __init__(self, config: DavisSource, root: str | None) -> None:
        if root is None:
            raise ConfigError("root=null; source davis reads a folder with JPEGImages and ImageSets; add root=FOLDER")
        self.root = Path(root)
        self.annotations = config.annotations
        self._splits: dict[str, dict[str, Video]] = {}

    def keys(self, split: str) -> list[str]:
        return list(self._split(split))

    def read(self, split: str, key: str) -> Clip:
        if key not in self._split(split):
            raise unknown_key("video", key, split, self.root)
        name = self._split(split)[key].name
        base = find_davis(self.root)
        frame_files = _files(base / FRAMES / name, "jpg", "copy the video again")
        remedy = f"change source.annotations={self.annotations} or copy the video again"
        mask_files = _files(base / ANNOTATIONS[self.annotations] / name, "png", remedy)
        _check_same_names(frame_files, mask_files)
        frames = read_frames(frame_files)
        indices = read_masks(mask_files, frames.shape[1:3])
        void = indices == VOID
        ids = np.where(void, np.uint8(0), indices)
        metadata = {
            "video_name": name,
            "num_instances": int(np.count_nonzero(np.unique(ids))),
            "num_void": int(void.sum()),
        }
        return Clip(key=key, frames=frames, instance_ids=ids, metadata=metadata)

    def _split(self, split: str) -> dict[str, Video]:
        """The videos of a split in the order of its list, by key."""
        if split not in SPLITS:
            raise DataError(f"split={split!r} is not in {self.root}; it has {', '.join(SPLITS)}; change splits")
        if split not in self._splits:
            self._splits[split] = read_list(find_davis(self.root) / LISTS / SPLITS[split])
        return self._splits[split]


def find_davis(root: Path) -> Path:
    """`root` or its folder DAVIS, whichever holds the frames. Raises DataError when neither does."""
    for folder in (root, root / "DAVIS"):
        if (folder / FRAMES).is_dir():
            return folder
    raise DataError(f"root={root}: no {FRAMES}, nor DAVIS/{FRAMES}; the folder DAVIS of DAVIS 2017 (480p) is needed; change root")


def read_list(path: Path) -> dict[str, Video]:
    """The videos that a file of ImageSets names, one a line, by key. Raises DataError for a doubled name or a path."""
    try:
        names = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read, {getattr(error, 'strerror', None) or error}; copy it again") from error
    if not names:
        raise DataError(f"{path}: no videos; one folder name a line is needed; copy it again")
    times = Counter(names)
    for name in names:
        if "/" in name or name in (".", ".."):
            raise DataError(f"{path}: video {name!r}; the name of a folder in {FRAMES} is needed; copy the file again")
        if times[name] > 1:
            raise DataError(f"{path}: video {name!r} occurs twice; names must differ; copy the file again")
    videos = [Video(number, name, (), None) for number, name in enumerate(names, start=1)]
    return dict(zip(unique_keys(videos), videos, strict=True))


def read_masks(paths: list[Path], size: tuple[int, ...]) -> np.ndarray:
    """Palette indices of PNGs, uint8 (T, H, W). Raises DataError for a damaged file, another mode, another size than `size`."""
    masks = []
    for path in paths:
        masks.append(decode_png(path))
        if masks[-1].shape != tuple(size):
            here = masks[-1].shape
            raise DataError(f"{path}: {here[1]}x{here[0]}, its frame {size[1]}x{size[0]}; both must have one size; copy it again")
    return np.stack(masks)


def decode_png(path: Path, modes: tuple[str, ...] = ("P",)) -> np.ndarray:
    """Pixels as they are stored; a palette picture gives its indices. Raises DataError for damage and for any other mode."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.verify()  # checksums, which decoding alone ignores
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            mode, pixels = picture.mode, np.array(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "file not found" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"{path}: unreadable PNG, {reason}; copy the file again") from error
    if mode not in modes:
        wanted = "palette indices (mode P)" if modes == ("P",) else " or ".join(modes)
        raise DataError(f"{path}: a PNG of mode {mode}; {wanted} are needed; copy the file again")
    return pixels


def _files(folder: Path, ending: str, remedy: str) -> list[Path]:
    """The folder's pictures in the order of their names; at least one."""
    files = sorted(folder.glob(f"*.{ending}"))
    if not files:
        raise DataError(f"{folder}: no .{ending} files; one for each frame is needed; {remedy}")
    return files


def _check_same_names(frames: list[Path], masks: list[Path]) -> None:
    """Pairing by position would shift every mask after a missing file."""
    here, there = {path.stem for path in frames}, {path.stem for path in masks}
    if here != there:
        alone = min(here ^ there)
        missing = masks[0].with_stem(alone) if alone in here else frames[0].with_stem(alone)
        raise DataError(f"{missing}: file not found; every frame needs a JPEG and a PNG; copy the video again")
