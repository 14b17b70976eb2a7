"""YouTube-VIS 2019 and 2021: a JSON file of annotations beside a folder of JPEG frames for each video.

Comes in: the train folder (instances.json, JPEGImages/) or the folder above it. Goes out: Clip; instance ids 1..n stand for
the annotations of a video in the order of their ids, whatever their class. Crowd annotations are left out; where masks
overlap the higher id wins. The published validation files carry no masks, so validation is cut from the train file.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.clip import Clip
from data_pipeline.config import YtvisSource
from data_pipeline.errors import ConfigError, DataError, unknown_key

# (annotations, frames) below root: a split's own folder, the 2021 archive, the 2019 archive, OVIS
LAYOUTS = (
    ("instances.json", "JPEGImages"),
    ("train/instances.json", "train/JPEGImages"),
    ("train.json", "train/JPEGImages"),
    ("annotations_train.json", "train"),
)


class Video(NamedTuple):
    """A video of the file: its folder's name, its frames, its annotations in the order of their ids (None: not annotated)."""

    number: int
    name: str
    file_names: tuple[str, ...]
    annotations: tuple[dict[str, Any], ...] | None


class YtvisVideos:
    """Source of a YouTube-VIS train folder. Key: the video folder's name."""

    background_labelled = False

    def __init__(self, config: YtvisSource, root: str | None) -> None:
        if root is None:
            raise ConfigError("root=null; source ytvis reads a folder with instances.json and JPEGImages; add root=FOLDER")
        self.root = Path(root)
        self.num_validation, self.short_side = config.num_validation, config.short_side
        self._videos: dict[str, Video] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The annotations are read again in another process: sending them costs more."""
        return {**self.__dict__, "_videos": None}

    def keys(self, split: str) -> list[str]:
        keys = list(self._all())
        cut = self._num_train(len(keys))
        splits = {"train": keys[:cut], "validation": keys[cut:]}
        if split not in splits:
            raise DataError(f"split={split!r} is not in {self.root}; it has {', '.join(splits)}; change splits")
        if not splits[split]:
            raise DataError(f"split={split!r} of {self.root} is empty; num_validation={self.num_validation}; change splits")
        return splits[split]

    def read(self, split: str, key: str) -> Clip:
        if key not in self.keys(split):
            raise unknown_key("video", key, split, self.root)
        video = self._all()[key]
        annotation_file, folder = find_layout(self.root)
        frames = read_frames([folder / name for name in video.file_names])
        ids = None
        if video.annotations is not None:
            ids = draw_ids(video.annotations, frames.shape[:3], f"{annotation_file}, video {video.name}")
        if self.short_side is not None:
            frames = to_short_side(frames, self.short_side)
            ids = None if ids is None else to_short_side(ids, self.short_side)
        metadata = {
            "video_name": video.name,
            "video_id": video.number,
            "num_instances": len(video.annotations or ()),
            "categories": [item.get("category_id") for item in video.annotations or ()],
        }
        return Clip(key=key, frames=frames, instance_ids=ids, metadata=metadata)

    def _all(self) -> dict[str, Video]:
        if self._videos is None:
            self._videos = load_videos(find_layout(self.root)[0])
        return self._videos

    def _num_train(self, num_videos: int) -> int:
        if num_videos <= self.num_validation:
            raise ConfigError(
                f"source.num_validation={self.num_validation}; {self.root} has {num_videos} videos and some must be left for "
                f"training; set source.num_validation to at most {max(num_videos - 1, 0)}"
            )
        return num_videos - self.num_validation


def find_layout(root: Path) -> tuple[Path, Path]:
    """(annotation file, folder of frames) at or below `root`. Raises DataError when neither is there."""
    if not root.is_dir():
        raise DataError(f"root={root} is not a folder; it must hold instances.json and JPEGImages; change root")
    for file, frames in LAYOUTS:
        if (root / file).is_file():
            if not (root / frames).is_dir():
                raise DataError(f"{root / frames} is missing beside {file}; the frames must lie there; change root")
            return root / file, root / frames
    raise DataError(f"root={root}: no instances.json; the folder with instances.json and JPEGImages is needed; change root")


def load_videos(path: Path) -> dict[str, Video]:
    """Every video of an annotation file in file order, by key. Raises DataError with the file and the faulty entry."""
    content = _json(path)
    try:
        annotations = _by_video(content.get("annotations"))
        videos = [_video(item, annotations) for item in content["videos"]]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(f"{path}: {type(error).__name__} {error}; this is not YouTube-VIS; copy it again") from None
    numbers = Counter(video.number for video in videos)
    if numbers and max(numbers.values()) > 1:
        raise DataError(f"{path}: video id={numbers.most_common(1)[0][0]} occurs twice; ids must differ; copy it again")
    return dict(zip(unique_keys(videos), videos, strict=True))


def read_frames(paths: list[Path]) -> np.ndarray:
    """Decode JPEGs of one size to uint8 (T, H, W, 3). Raises DataError for a missing or cut file and for mixed sizes."""
    frames: list[np.ndarray] = []
    for path in paths:
        try:
            frames.append(_decode_jpeg(path.read_bytes()))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "file not found" if isinstance(error, FileNotFoundError) else str(error)
            raise DataError(f"{path}: unreadable JPEG, {reason}; copy the file again") from error
        if frames[-1].shape != frames[0].shape:
            here, first = frames[-1].shape, frames[0].shape
            raise DataError(f"{path}: {here[1]}x{here[0]}, the video's first frame {first[1]}x{first[0]}; all must have one size")
    return np.stack(frames)


def to_short_side(frames: np.ndarray, size: int) -> np.ndarray:
    """(T, H, W, ...) with the shorter of H and W brought to `size`, each pixel taking the value under its centre (nearest-exact).

    Source: SlotContrast, released conversion of YouTube-VIS. The long side is rounded down.
    """
    height, width = frames.shape[1:3]
    short = min(height, width)
    rows, columns = (
        np.minimum(((np.arange(old * size // short) + 0.5) * old / (old * size // short)).astype(np.int64), old - 1)
        for old in (height, width)
    )
    return frames[:, rows][:, :, columns]


def _decode_jpeg(data: bytes) -> np.ndarray:
    """RGB pixels. Raises OSError when the end is missing, also where Pillow is told to fill up cut files with grey."""
    if data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda"):  # end of image, start of scan: neither occurs inside a scan
        raise OSError("no JPEG, or it is truncated")
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
        return np.asarray(picture.convert("RGB"))


def draw_ids(annotations: tuple[dict[str, Any], ...], shape: tuple[int, ...], where: str) -> np.ndarray:
    """Paint the masks of a video: (T, H, W), 0 = none, k = annotation k-1; a later one covers an earlier one."""
    ids = np.zeros(shape, np.uint8 if len(annotations) < 256 else np.uint16)
    for number, annotation in enumerate(annotations, start=1):
        here = f"{where}, annotation {annotation['id']}"
        masks = annotation.get("segmentations")
        if not isinstance(masks, list) or len(masks) != shape[0]:
            found = len(masks) if isinstance(masks, list) else masks
            raise DataError(f"{here}: {found} segmentations, {shape[0]} frames; one a frame is needed; leave the video out")
        for frame, mask in enumerate(masks):
            if mask is not None:
                ids[frame][decode_rle(mask, shape[1:], f"{here}, frame {frame}")] = number
    return ids


def decode_rle(mask: Any, size: tuple[int, ...], where: str) -> np.ndarray:
    """A run-length encoded mask, as a list of counts or as COCO's compressed string -> bool (H, W).

    Raises: DataError when its size is not `size`, or its counts do not add up to H*W.
    Differs: pycocotools fills the rest of a short mask with whatever lies in memory; here that is an error.
    """
    if not isinstance(mask, dict) or "counts" not in mask or not isinstance(mask.get("size"), list):
        raise DataError(f"{where}: a segmentation must be null or have 'size' and 'counts'; leave the video out")
    if mask["size"] != list(size):
        raise DataError(f"{where}: the mask is {mask['size']}, its frame {list(size)} [H, W]; both must have one size")
    counts = mask["counts"]
    try:
        runs = np.array(_decompress(counts) if isinstance(counts, str) else counts)
    except ValueError as error:
        raise DataError(f"{where}: broken mask, {error}; leave the video out") from None
    total = size[0] * size[1]
    if runs.ndim != 1 or runs.dtype.kind != "i" or runs.min() < 0 or runs.max() > total or runs.sum() != total:
        raise DataError(f"{where}: broken mask; its counts must be whole numbers that add up to {total}; leave the video out")
    return np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(size[1], size[0]).T  # column by column


def _decompress(text: str) -> list[int]:
    """COCO's compressed counts: five bits a character, low ones first; from the fourth on as the
    difference to the last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {character!r} is not of the compressed form")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the compressed counts are cut off")
    return counts


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read, {error.strerror or error}; copy it again") from error
    except ValueError as error:
        raise DataError(f"{path}: broken JSON, {error}; copy it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: a {type(content).__name__}; a JSON object is needed; copy it again")
    return content


def _by_video(annotations: list[dict[str, Any]] | None) -> dict[int, list[dict[str, Any]]] | None:
    """Annotations that count, by video id, each list in the order of annotation ids; None for a file without any list."""
    if annotations is None:
        return None
    grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in sorted(annotations, key=lambda item: int(item["id"])):
        if not annotation.get("iscrowd", 0):
            grouped[int(annotation["video_id"])].append(annotation)
    return grouped


def _video(item: dict[str, Any], annotations: dict[int, list[dict[str, Any]]] | None) -> Video:
    number = int(item["id"])
    file_names = tuple(str(name) for name in item["file_names"])
    if not file_names or any(name.startswith("/") or ".." in PurePosixPath(name).parts for name in file_names):
        raise ValueError(f"video id={number} has file_names={list(file_names)}; names below JPEGImages are needed")
    name = str(PurePosixPath(file_names[0]).parent)
    own = None if annotations is None else tuple(annotations.get(number, ()))
    return Video(number, name if name != "." else str(number), file_names, own)


def unique_keys(videos: list[Video]) -> list[str]:
    """Folder names as sample keys; a name that had to be changed, or that two videos share, gets the video id behind it."""
    plain = [re.sub(r"[^A-Za-z0-9_-]", "_", video.name) for video in videos]
    times = Counter(plain)
    return [
        name if times[name] == 1 and name == video.name else f"{name}-id{video.number}"
        for name, video in zip(plain, videos, strict=True)
    ]
