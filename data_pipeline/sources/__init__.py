"""Sources: datasets as they lie on disk, read one whole video at a time. First arrow of the trace: source -> Clip.

Comes in: a SourceConfig and the dataset's folder. Goes out: an object with `keys(split)` and `read(split, key)`.
Readers import their decoders when they are built, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Protocol

from data_pipeline.clip import Clip
from data_pipeline.config import (
    ClevrTexSource,
    CocoSource,
    DavisSource,
    ImagesSource,
    MoviSource,
    OfficialShardsSource,
    PhysicsSource,
    SourceConfig,
    SyntheticSource,
    VideoFilesSource,
    VocSource,
    YtvisSource,
)
from data_pipeline.errors import ConfigError, unknown_name


class Source(Protocol):
    """A dataset. Cheap to construct and picklable: files are opened on first use."""

    background_labelled: bool  # True: id 0 is annotated background; False: id 0 only means "not annotated"

    def keys(self, split: str) -> list[str]:
        """Keys of all videos of a split, in a fixed order. Raises DataError when the root or the split is missing."""
        ...

    def read(self, split: str, key: str) -> Clip:
        """One whole video. Raises DataError that names the file and the rule when something is missing or damaged."""
        ...


Builder = Callable[[SourceConfig, str | None], Source]


def _reader(module: str, name: str, schema: type, needs_root: bool = True) -> Builder:
    """A builder that imports its reader when it is called."""

    def build(config: SourceConfig, root: str | None) -> Source:
        if not isinstance(config, schema):
            raise _wrong_schema(config, schema)
        reader = getattr(importlib.import_module(f"data_pipeline.sources.{module}"), name)
        return reader(config, root) if needs_root else reader(config)

    return build


def _wrong_schema(config: SourceConfig, wanted: type) -> ConfigError:
    return ConfigError(
        f"source.name={config.name}; its settings are a {type(config).__name__}, not a {wanted.__name__}; "
        f"choose the dataset with source=MEMBER instead of source.name"
    )


SOURCES: dict[str, Builder] = {
    "movi": _reader("movi", "MoviVideos", MoviSource),
    "ytvis": _reader("ytvis", "YtvisVideos", YtvisSource),
    "davis": _reader("davis", "DavisVideos", DavisSource),
    "coco": _reader("coco", "CocoImages", CocoSource),
    "voc": _reader("voc", "VocImages", VocSource),
    "clevrtex": _reader("clevrtex", "ClevrTexImages", ClevrTexSource),
    "official_shards": _reader("official_shards", "OfficialShards", OfficialShardsSource),
    "video_files": _reader("video_files", "VideoFiles", VideoFilesSource),
    "images": _reader("images", "Images", ImagesSource),
    "synthetic": _reader("synthetic", "SyntheticVideos", SyntheticSource, needs_root=False),
    "physics": _reader("physics", "PhysicsVideos", PhysicsSource, needs_root=False),
}

# "group/name" -> dataclass, for data_pipeline.compose: what a file in configs/source names first in its defaults.
GROUP_SCHEMAS: Mapping[str, type] = {
    "source/movi_schema": MoviSource,
    "source/ytvis_schema": YtvisSource,
    "source/davis_schema": DavisSource,
    "source/coco_schema": CocoSource,
    "source/voc_schema": VocSource,
    "source/clevrtex_schema": ClevrTexSource,
    "source/official_shards_schema": OfficialShardsSource,
    "source/video_files_schema": VideoFilesSource,
    "source/images_schema": ImagesSource,
    "source/synthetic_schema": SyntheticSource,
    "source/physics_schema": PhysicsSource,
}


def build_source(config: SourceConfig, root: str | None) -> Source:
    """The reader that `config.name` stands for, on the dataset below `root`."""
    if config.name not in SOURCES:
        raise unknown_name("source.name", config.name, SOURCES)
    return SOURCES[config.name](config, root)


__all__ = ["GROUP_SCHEMAS", "SOURCES", "Source", "build_source"]
