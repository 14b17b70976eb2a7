"""What all shards of a folder stand on: settings, a fitted extractor, the channel statistics of the codec.

Comes in: a BuildConfig, its source and extractor. Goes out: <out>/settings.json and <out>/projection.safetensors, which rank 0
writes before any shard; a later call with other settings is refused. Part of data_pipeline.build.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.codec import ChannelStatistics, find_codec, fit_statistics
from data_pipeline.config import BuildConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.files import write_atomically
from data_pipeline.shards import INDEX_NAME, canonical, read_json
from data_pipeline.views import prepare

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TRAIN_SPLIT = "train"
SETTINGS_NAME = "settings.json"
PROJECTION_NAME = "projection.safetensors"  # a fitted extractor
STATISTICS_VIDEOS = 64  # videos at most that the channel statistics come from
_REMEDY = "set overwrite=true to start anew, or choose another out"
# What may differ from call to call: it says where and how, not what.
_FREE = ("out", "splits", "workers", "max_skip_fraction", "overwrite", "check_space", "metrics_address", "targets_dir")
_FREE_FEATURES = ("weights", "batch_frames")  # where weights lie does not matter: the fingerprint says which they are


def prepare_folder(config: BuildConfig, source: Any, extractor: Any, out: Path) -> dict[str, Any]:
    """Write (or check) the settings, fit what is fitted on the data; returns the settings that the shards stand on.

    Raises: ConfigError when the folder was built with other settings, DataError when the training videos cannot be read.
    """
    settings = settings_of(config, extractor)
    check_settings(out, settings, config)
    if config.overwrite or (_changed(out, settings) and not _is_begun(out)):
        _clear(out, config.splits)
    remove_leftovers(out)
    known = _write_settings(out, settings)
    if needs_fit(extractor):
        _fit(config, source, extractor, out)
        settings["fingerprint"] = extractor.fingerprint
        check_settings(out, settings, config)
        if _changed(out, settings):  # no shard is there: statistics of other features must not stay either
            (out / SETTINGS_NAME).unlink()
        known = _write_settings(out, settings)
    if extractor.width and find_codec(config.codec).needs_statistics:
        if "statistics" not in known:
            settings["statistics"] = _statistics(config, source, extractor).to_json()
            known = _write_settings(out, settings)
        settings["statistics"] = known["statistics"]
    return settings


def adopt_settings(config: BuildConfig, extractor: Any, settings: Mapping[str, Any], out: Path) -> None:
    """On the other ranks: take over what rank 0 has prepared. Raises DataError when this rank would make other features."""
    if needs_fit(extractor):
        extractor.load(out / PROJECTION_NAME)
    own, theirs = _flat(settings_of(config, extractor) | {"fingerprint": extractor.fingerprint}), _flat(settings)
    for name, value in own.items():
        if theirs.get(name) != value:
            raise DataError(f"{name}={value} on this rank, {theirs.get(name)} on rank 0; all ranks must build alike; mend it")


def settings_of(config: BuildConfig, extractor: Any) -> dict[str, Any]:
    """What must not change between two calls that work on the same folder. The fingerprint of a fitted extractor comes later."""
    values = dataclasses.asdict(config)
    for name in _FREE:
        del values[name]
    for name in _FREE_FEATURES:
        values["features"].pop(name, None)
    if not find_codec(config.codec).needs_statistics:
        del values["codec_fit_frames"]
    values["root"] = None if config.root is None else str(Path(config.root).resolve())
    if not needs_fit(extractor):
        values["fingerprint"] = extractor.fingerprint
    return values


def needs_fit(extractor: Any) -> bool:
    return bool(getattr(extractor, "needs_fit", False))


def statistics_of(settings: Mapping[str, Any], width: int) -> ChannelStatistics | None:
    """The channel statistics that the shards stand on; None where the codec needs none."""
    return ChannelStatistics.from_json(settings["statistics"], width) if "statistics" in settings else None


def check_settings(out: Path, settings: Mapping[str, Any], config: BuildConfig) -> None:
    """Refuse to mix shards of two kinds in one folder. `settings` may lack what is not known yet."""
    changed = _changed(out, settings)
    if not changed or not _is_begun(out):
        return
    name, before, now = changed[0]
    if not config.overwrite:
        raise ConfigError(f"{name}={now}, but {out} was built with {before}; both must agree; {_REMEDY}")
    others = _other_splits(out, config.splits)
    if others:
        raise ConfigError(
            f"{name}={now}, but split {others[0]} in {out} was built with {before} and is not among splits; "
            f"all splits must be built alike; add it to splits or choose another out"
        )


def _changed(out: Path, settings: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value in the folder, value now) of settings that differ."""
    path = out / SETTINGS_NAME
    if not path.exists():
        return []
    before, now = _flat(read_json(path, "the settings of a build", _REMEDY)), _flat(settings)
    return [(name, before[name], now[name]) for name in now if name in before and before[name] != now[name]]


def _is_begun(out: Path) -> bool:
    """A build that ended before its first shard binds nobody to its settings."""
    return any(any(out.glob(f"*/{name}")) for name in (INDEX_NAME, "*.tar"))


def _other_splits(out: Path, splits: Iterable[str]) -> list[str]:
    return sorted(path.parent.name for path in out.glob(f"*/{INDEX_NAME}") if path.parent.name not in splits)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat


def _write_settings(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Before anything else is written, and again with each fact that is found out; returns all that is known."""
    path = out / SETTINGS_NAME
    known = (read_json(path, "the settings of a build", _REMEDY) if path.exists() else {}) | dict(settings)
    write_atomically(path, canonical(known))
    return known


def _clear(out: Path, splits: Iterable[str]) -> None:
    """Take away an earlier build of `splits`: only files with the names that a build gives."""
    for split in splits:
        (out / split / INDEX_NAME).unlink(missing_ok=True)
        remove_shards(out / split, split, first=0)
    if not _other_splits(out, splits):  # another split stands on the same settings, projection and statistics
        (out / SETTINGS_NAME).unlink(missing_ok=True)
        (out / PROJECTION_NAME).unlink(missing_ok=True)


def remove_shards(folder: Path, split: str, first: int) -> None:
    """Remove shard files from number `first` on, and what a killed build left under temporary names."""
    pattern = re.compile(rf"{re.escape(split)}-(\d+)\.(?:tar|json)")
    for path in folder.glob("*") if folder.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and int(match[1]) >= first:
            path.unlink()
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Files under the temporary names of data_pipeline.files."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def videos_of(source: Any, config: BuildConfig, split: str) -> list[str]:
    """Keys of a split's videos. Raises DataError when there are none, or one stands for two."""
    keys = list(source.keys(split))[: config.limit]
    repeated = sorted(key for key, count in Counter(keys).items() if count > 1)
    if repeated:
        raise DataError(
            f"split {split}: key {repeated[0]} stands for {Counter(keys)[repeated[0]]} videos ({len(repeated)} such keys); "
            f"a key must be unique; rename the videos"
        )
    if not keys:
        where = config.root or config.source.name
        raise DataError(f"{where}: split {split} has no videos; at least one is needed; check root and limit")
    return keys


def _fit(config: BuildConfig, source: Any, extractor: Any, out: Path) -> None:
    """Fit the extractor on the first training videos, once, or take another build's; from then on it is read from <out>."""
    path = out / PROJECTION_NAME
    if config.features.weights is not None:
        extractor.load(Path(config.features.weights))
        if path.exists() and _is_begun(out):
            return  # whether it is the folder's own is for the caller to check, by its fingerprint
        extractor.save(path)
    elif not path.exists():
        keys = videos_of(source, config, TRAIN_SPLIT)[: getattr(config.features, "num_fit_clips", None)]
        print(f"fitting {extractor.name} on {len(keys)} videos", flush=True)
        unread: list[str] = []
        try:
            with one_thread():
                extractor.fit(_train_clips(config, source, keys, unread))
        except DataError as error:
            raise DataError(f"{error}" + (f" ({len(unread)} unreadable; for example {unread[0]})" if unread else "")) from None
        extractor.save(path)
    extractor.load(path)


def _statistics(config: BuildConfig, source: Any, extractor: Any) -> ChannelStatistics:
    """From evenly chosen frames of training videos, whatever splits are built and however many workers there are."""
    try:
        keys = evenly(videos_of(source, config, TRAIN_SPLIT), min(STATISTICS_VIDEOS, config.codec_fit_frames))
    except DataError as error:
        raise DataError(
            f"codec={config.codec} takes channel statistics from split {TRAIN_SPLIT}: {error}; or set codec=float16"
        ) from None
    each = max(1, config.codec_fit_frames // len(keys))
    print(f"channel statistics from up to {each} frames of {len(keys)} videos", flush=True)
    unread: list[str] = []
    try:
        with one_thread():
            return fit_statistics(_tokens(config, source, extractor, keys, each, unread))
    except DataError as error:
        example = f"; for example {unread[0]}" if unread else ""
        raise DataError(
            f"codec={config.codec} takes channel statistics from split {TRAIN_SPLIT}: {error} ({len(unread)} of {len(keys)} "
            f"chosen videos are unreadable{example}); mend the files, or add codec=float16, which needs no statistics"
        ) from None


def _tokens(
    config: BuildConfig, source: Any, extractor: Any, keys: list[str], each: int, unread: list[str]
) -> Iterator[np.ndarray]:
    """Patches of a run of `each` frames of every video, the first video's at its beginning, the last one's at its end.

    Shapes: (N, E). A run, because an extractor may look at neighbouring frames.
    """
    import torch

    for number, clip in enumerate(_train_clips(config, source, keys, unread)):
        start = number * max(0, len(clip) - each) // max(1, len(keys) - 1)
        with torch.inference_mode():
            values = extractor(clip[start : start + each]).float().cpu().numpy()
        yield values.reshape(-1, values.shape[-1])


def _train_clips(config: BuildConfig, source: Any, keys: Iterable[str], unread: list[str]) -> Iterator[Tensor]:
    """Readable videos as the extractor gets them; the reasons of others go to `unread`: shards count them, not this."""
    for key in keys:
        try:
            frames = source.read(TRAIN_SPLIT, key).frames
        except DataError as error:
            unread.append(str(error))
            continue
        yield prepare(frames, "center", config.source.image_size, config.source.resize, key)


def evenly(items: Any, wanted: int) -> list[Any]:
    """At most `wanted` of `items`, spread over all of them."""
    count = min(len(items), wanted)
    return [items[number * len(items) // count] for number in range(count)]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums depend on how they are cut: what is computed here must not depend on the machine's number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
