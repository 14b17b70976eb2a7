"""What a build will write: which video stands in which shard, how large it will be, whether it fits.

Comes in: the keys of the splits and the settings. Goes out: a Split with its Jobs, lines for people. Part of data_pipeline.build.
"""

from __future__ import annotations

import contextlib
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.build_settings import TRAIN_SPLIT, evenly
from data_pipeline.clip import Clip
from data_pipeline.codec import find_codec
from data_pipeline.config import BuildConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.progress import format_bytes
from data_pipeline.shards import digest, encode_image, shard_name

EVAL_VIEWS = ("center",)
LOOKED_AT = 3  # videos of a split that its size is estimated from
SURE_TO_FAIL = 0.98  # share of the estimate that must be free: an estimate is none to the byte
IMAGE_SUFFIXES = {"jpeg": "jpg", "png": "png", "none": ""}


@dataclass(frozen=True)
class Job:
    """One shard to be built."""

    path: Path
    split: str
    keys: tuple[str, ...]
    views: tuple[str, ...]
    settings: str  # hash of all that determines the shard's bytes
    num_videos: int  # of the whole split


@dataclass(frozen=True)
class Split:
    """What a split will become."""

    name: str
    folder: Path
    num_videos: int
    views: tuple[str, ...]
    jobs: list[Job]


@dataclass(frozen=True)
class Size:
    """What a split will take, estimated."""

    split: str
    num_videos: int
    num_shards: int
    num_frames: float  # of a video
    bytes: int


def check_grid(config: BuildConfig, extractor: Any) -> None:
    """Raises ConfigError unless frames are whole patches."""
    size, patch = config.source.image_size, extractor.patch_size
    if size % patch:
        lower = size // patch * patch
        raise ConfigError(
            f"source.image_size={size}; {extractor.name} needs a multiple of its patch size {patch}; "
            f"set source.image_size to {lower or patch} or {lower + patch}"
        )


def views_of(config: BuildConfig, split: str) -> tuple[str, ...]:
    """Views whose features are stored."""
    if config.features.name == "none":
        return ()
    return tuple(config.source.train_views) if split == TRAIN_SPLIT else EVAL_VIEWS


def plan(config: BuildConfig, settings: Mapping[str, Any], split: str, keys: list[str], out: Path) -> Split:
    """Which videos stand in which shard: by the source's order alone, so that a skipped video moves no other."""
    folder, views = out / split, views_of(config, split)
    groups = [tuple(keys[first : first + config.samples_per_shard]) for first in range(0, len(keys), config.samples_per_shard)]
    content = {name: value for name, value in settings.items() if name != "root"}  # a dataset may be moved
    jobs = [
        Job(folder / shard_name(split, number), split, group, views, digest([content, split, group, views]), len(keys))
        for number, group in enumerate(groups)
    ]
    return Split(split, folder, len(keys), views, jobs)


def estimate(config: BuildConfig, source: Any, extractor: Any, split: str, keys: list[str]) -> Size:
    """From a few readable videos; 0 bytes where none of them can be read."""
    patches = (config.source.image_size // extractor.patch_size) ** 2
    frame_bytes = len(views_of(config, split)) * find_codec(config.codec).frame_dtype(patches, extractor.width).itemsize
    clips = list(_readable(source, split, evenly(keys, LOOKED_AT)))
    frames = sum(clip.num_frames for clip in clips) / max(1, len(clips))
    per_frame = sum(frame_bytes + _image_bytes(config, clip) for clip in clips) / max(1, len(clips))
    num_shards = -(-len(keys) // config.samples_per_shard)
    # Headers of a video's features and facts, and the end of a tar: they count where videos are images.
    around = len(keys) * 1024 * (len(views_of(config, split)) + 1) + num_shards * tarfile.RECORDSIZE // 2 if clips else 0
    return Size(split, len(keys), num_shards, frames, round(len(keys) * frames * per_frame) + around)


def _readable(source: Any, split: str, keys: Iterable[str]) -> Iterable[Clip]:
    for key in keys:
        with contextlib.suppress(DataError):
            yield source.read(split, key)


def _image_bytes(config: BuildConfig, clip: Clip) -> int:
    """Of a frame and its ids as they will be stored, each rounded up to the blocks of a tar."""
    suffix, middle = IMAGE_SUFFIXES[config.frames], clip.num_frames // 2
    images = [encode_image(clip.frames[middle], suffix, config.jpeg_quality)] if suffix else []
    images += [] if clip.instance_ids is None else [encode_image(clip.instance_ids[middle], "png")]
    return sum(512 + -(-len(image) // 512) * 512 for image in images)


def announce(config: BuildConfig, extractor: Any, sizes: list[Size], out: Path) -> None:
    """Say how much will be written. Raises DataError when it cannot fit; shards that are there already count as written."""
    grid = config.source.image_size // extractor.patch_size
    for size in sizes:
        views = views_of(config, size.split)
        taken = f"views {', '.join(views)}, {grid} x {grid} patches x {extractor.width} {config.codec}"
        print(
            f"{size.split}: {size.num_videos} videos of about {size.num_frames:.0f} frames, {taken if views else 'no features'}: "
            f"about {format_bytes(size.bytes)} in {size.num_shards} shards"
        )
    total, free = sum(size.bytes for size in sizes), shutil.disk_usage(_existing(out)).free
    missing = round(sum(size.bytes * _share_missing(size, out) for size in sizes))
    rest = f", about {format_bytes(missing)} of it still to be written" if missing < total else ""
    print(f"about {format_bytes(total)} in all{rest}; {format_bytes(free)} free for {out}", flush=True)
    if config.check_space and free < SURE_TO_FAIL * missing:
        raise DataError(
            f"out={out}: {format_bytes(free)} free, about {format_bytes(missing)} needed; the shards must fit; free space, "
            f"choose another out, keep less (frames=none, fewer source.train_views), or set check_space=false to try all the same"
        )


def _share_missing(size: Size, out: Path) -> float:
    """A shard that is there counts as written: should it have to be built again, it frees its own place."""
    there = len(list((out / size.split).glob(f"{size.split}-*.tar")))
    return max(0.0, 1.0 - there / size.num_shards)


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
