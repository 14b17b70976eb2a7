"""Sources: datasets as they lie on disk, read one whole video at a time. First arrow of the trace: source -> Clip.

Comes in: a SourceConfig and the dataset's folder. Goes out: an object with `keys(split)` and `read(split, key)`.
Readers import their decoders when they are built, so that importing this package costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from data_pipeline.clip import Clip
from data_pipeline.config import CocoSource, DavisSource, MoviSource, SourceConfig, SyntheticSource, YtvisSource
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


def _movi(config: SourceConfig, root: str | None) -> Source:
    from data_pipeline.sources.movi import MoviVideos

    if not isinstance(config, MoviSource):
        raise _wrong_schema(config, MoviSource)
    return MoviVideos(config, root)


def _ytvis(config: SourceConfig, root: str | None) -> Source:
    from data_pipeline.sources.ytvis import YtvisVideos

    if not isinstance(config, YtvisSource):
        raise _wrong_schema(config, YtvisSource)
    return YtvisVideos(config, root)


def _davis(config: SourceConfig, root: str | None) -> Source:
    from data_pipeline.sources.davis import DavisVideos

    if not isinstance(config, DavisSource):
        raise _wrong_schema(config, DavisSource)
    return DavisVideos(config, root)


def _coco(config: SourceConfig, root: str | None) -> Source:
    from data_pipeline.sources.coco import CocoImages

    if not isinstance(config, CocoSource):
        raise _wrong_schema(config, CocoSource)
    return CocoImages(config, root)


def _synthetic(config: SourceConfig, root: str | None) -> Source:
    from data_pipeline.sources.synthetic import SyntheticVideos

    if not isinstance(config, SyntheticSource):
        raise _wrong_schema(config, SyntheticSource)
    return SyntheticVideos(config)


def _wrong_schema(config: SourceConfig, wanted: type) -> ConfigError:
    return ConfigError(
        f"source.name={config.name}; its settings are a {type(config).__name__}, not a {wanted.__name__}; "
        f"choose the dataset with source=MEMBER instead of source.name"
    )


SOURCES: dict[str, Callable[[SourceConfig, str | None], Source]] = {
    "movi": _movi,
    "ytvis": _ytvis,
    "davis": _davis,
    "coco": _coco,
    "synthetic": _synthetic,
}

# "group/name" -> dataclass, for data_pipeline.compose: what a file in configs/source names first in its defaults.
GROUP_SCHEMAS: Mapping[str, type] = {
    "source/movi_schema": MoviSource,
    "source/ytvis_schema": YtvisSource,
    "source/davis_schema": DavisSource,
    "source/coco_schema": CocoSource,
    "source/synthetic_schema": SyntheticSource,
}


def build_source(config: SourceConfig, root: str | None) -> Source:
    """The reader that `config.name` stands for, on the dataset below `root`."""
    if config.name not in SOURCES:
        raise unknown_name("source.name", config.name, SOURCES)
    return SOURCES[config.name](config, root)


__all__ = ["GROUP_SCHEMAS", "SOURCES", "Source", "build_source"]
