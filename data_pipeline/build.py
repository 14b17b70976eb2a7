"""Command: dataset -> shards with features. `python -m data_pipeline.build source=movi root=... out=... features=dinov2_vits14`

Comes in: a source's videos. Goes out: <out>/<split>/{index.json, <split>-000000.tar, ...}, <out>/settings.json, and
<out>/projection.safetensors where the extractor is fitted on the data. Shards are built in parallel; a build that was stopped
goes on where it was, and gives the same bytes with any number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.build_jobs import PROJECTION_NAME, Job, check_skipped, run_jobs
from data_pipeline.clip import Clip
from data_pipeline.codec import CodecError, find_codec
from data_pipeline.compose import compose, run_command
from data_pipeline.config import BuildConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.files import write_atomically
from data_pipeline.progress import format_bytes, format_seconds, usable_cores
from data_pipeline.shards import (
    INDEX_NAME,
    DatasetIndex,
    canonical,
    digest,
    read_json,
    shard_name,
    verified_sidecar,
)
from data_pipeline.views import parse_view, prepare

if TYPE_CHECKING:
    from torch import Tensor

TRAIN_SPLIT = "train"
SETTINGS_NAME = "settings.json"
EVAL_VIEWS = ("center",)

HELP = """\
usage: python -m data_pipeline.build [source=NAME] [features=NAME] out=FOLDER [root=FOLDER] [key=value ...]

Reads a dataset's videos, takes patch features of every frame with a frozen extractor, and writes shards:
<out>/<split>/index.json beside <split>-000000.tar and so on. Run it again to go on after a stop.

  source=NAME              which dataset: {sources}
  features=NAME            which extractor: {features}
  root=FOLDER              where the dataset lies (a generated one needs none)
  out=FOLDER               where the shards go
  splits=[train,validation]
  samples_per_shard=32     videos of a shard
  codec=float16            how features are stored: float16, float32
  frames=jpeg              how frames are kept: jpeg, png, none
  jpeg_quality=95
  workers=0                processes; 0: one for each usable core
  limit=N                  only the first N videos of each split
  max_skip_fraction=0.0    share of unreadable videos that may be left out
  overwrite=false          true: start anew although there is something in out
  source.KEY=VALUE, features.KEY=VALUE   settings of the dataset and of the extractor
"""


@dataclass(frozen=True)
class Split:
    """What a split will become."""

    name: str
    folder: Path
    num_videos: int
    jobs: list[Job]


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP.format(sources=_members("source"), features=_members("features")), end="")
        return 0
    build(compose_build(argv))
    return 0


def compose_build(overrides: list[str]) -> BuildConfig:
    from data_pipeline.features import GROUP_SCHEMAS as FEATURES_SCHEMAS
    from data_pipeline.sources import GROUP_SCHEMAS as SOURCE_SCHEMAS

    return compose("build_shards", BuildConfig, overrides, {**SOURCE_SCHEMAS, **FEATURES_SCHEMAS})


def build(config: BuildConfig) -> None:
    """Build every split of `config`. Raises ConfigError or DataError; what is finished by then is kept for the next call."""
    from data_pipeline.features import build_extractor
    from data_pipeline.sources import build_source

    began = time.monotonic()
    find_codec(config.codec)
    for view in config.source.train_views:
        parse_view(view)
    source = build_source(config.source, config.root)
    keys = {split: _keys(source, config, split) for split in config.splits}
    extractor: Any = build_extractor(config.features)
    _check_grid(config, extractor)
    out = _make_folder(config.out)
    with _only_build_in(out):
        settings = _settings(config, extractor)
        _check_settings(out, settings, config)
        if config.overwrite:
            _clear(out, config.splits)
        _write_settings(out, settings)
        if _needs_fit(extractor):
            _fit(config, source, extractor, out)
            settings["fingerprint"] = extractor.fingerprint
            _check_settings(out, settings, config)
            _write_settings(out, settings)
        splits = [_plan(config, settings, split, keys[split], out) for split in config.splits]
        _announce(config, source, extractor, splits)
        _build_splits(config, source, extractor, splits, began)


def _make_folder(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"out={path}: {error.strerror}; a folder that can be written is needed; change out") from None
    return Path(path)


def _needs_fit(extractor: Any) -> bool:
    return bool(getattr(extractor, "needs_fit", False))


def _keys(source: Any, config: BuildConfig, split: str) -> list[str]:
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


@contextlib.contextmanager
def _only_build_in(out: Path) -> Iterator[None]:
    """Two builds in one folder would take each other's temporary files away."""
    with (out / ".build.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{out}: another build is writing here; one at a time; wait for it or choose another out") from None
        yield


def _settings(config: BuildConfig, extractor: Any) -> dict[str, Any]:
    """What must not change between two calls that work on the same folder. The fingerprint of a fitted extractor comes later."""
    values = dataclasses.asdict(config)
    for name in ("out", "splits", "workers", "max_skip_fraction", "overwrite"):
        del values[name]
    for name in ("weights", "batch_frames"):  # where weights lie does not matter: the fingerprint says which they are
        values["features"].pop(name, None)
    values["root"] = None if config.root is None else str(Path(config.root).resolve())
    if not _needs_fit(extractor):
        values["fingerprint"] = extractor.fingerprint
    return values


def _check_settings(out: Path, settings: dict[str, Any], config: BuildConfig) -> None:
    """Refuse to mix shards of two kinds in one folder. `settings` may lack what is not known yet."""

    path = out / SETTINGS_NAME
    if not path.exists():
        return
    remedy = "set overwrite=true to start anew, or choose another out"
    before, now = _flat(read_json(path, "the settings of a build", remedy)), _flat(settings)
    changed = [name for name in now if name in before and before[name] != now[name]]
    if not changed:
        return
    name = changed[0]
    if not config.overwrite:
        raise ConfigError(f"{name}={now[name]}, but {out} was built with {before[name]}; both must agree; {remedy}")
    others = sorted(path.parent.name for path in out.glob(f"*/{INDEX_NAME}") if path.parent.name not in config.splits)
    if others:
        raise ConfigError(
            f"{name}={now[name]}, but split {others[0]} in {out} was built with {before[name]} and is not among splits; "
            f"all splits must be built alike; add it to splits or choose another out"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def _write_settings(out: Path, settings: dict[str, Any]) -> None:
    """Before anything else is written, and once more when the extractor's fingerprint is known."""

    path = out / SETTINGS_NAME
    known = read_json(path, "the settings of a build", "") if path.exists() else {}
    write_atomically(path, canonical(known | settings))


def _clear(out: Path, splits: Iterable[str]) -> None:
    """Take away an earlier build of `splits`: only files with the names that a build gives."""

    for split in splits:
        (out / split / INDEX_NAME).unlink(missing_ok=True)
        _remove_shards(out / split, split, first=0)
    (out / SETTINGS_NAME).unlink(missing_ok=True)
    if not any(out.glob(f"*/{INDEX_NAME}")):  # another split may stand on the same projection
        (out / PROJECTION_NAME).unlink(missing_ok=True)


def _remove_shards(folder: Path, split: str, first: int) -> None:
    """Remove shard files from number `first` on, and what a killed build left under temporary names."""
    pattern = re.compile(rf"{re.escape(split)}-(\d+)\.(?:tar|json)")
    for path in folder.glob("*") if folder.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and int(match[1]) >= first:
            path.unlink()
    for path in folder.glob(".*.tmp"):
        path.unlink()


def _fit(config: BuildConfig, source: Any, extractor: Any, out: Path) -> None:
    """Fit the extractor on the first training videos, once; from then on it is read from <out>."""
    path = out / PROJECTION_NAME
    if not path.exists():
        keys = _keys(source, config, TRAIN_SPLIT)[: getattr(config.features, "num_fit_clips", None)]
        print(f"fitting {extractor.name} on {len(keys)} videos", flush=True)
        extractor.fit(_fit_clips(config, source, keys))
        temporary = out / f".{os.getpid()}.{PROJECTION_NAME}"
        try:
            extractor.save(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    extractor.load(path)


def _fit_clips(config: BuildConfig, source: Any, keys: Iterable[str]) -> Iterator[Tensor]:

    for key in keys:
        with contextlib.suppress(DataError):  # an unreadable video is counted where shards are written
            yield prepare(source.read(TRAIN_SPLIT, key).frames, "center", config.source.image_size, config.source.resize, key)


def _check_grid(config: BuildConfig, extractor: Any) -> None:
    size, patch = config.source.image_size, extractor.patch_size
    if size % patch:
        lower = size // patch * patch
        raise ConfigError(
            f"source.image_size={size}; {extractor.name} needs a multiple of its patch size {patch}; "
            f"set source.image_size to {lower or patch} or {lower + patch}"
        )


def _plan(config: BuildConfig, settings: dict[str, Any], split: str, keys: list[str], out: Path) -> Split:
    """Which videos stand in which shard: by the source's order alone, so that a skipped video moves no other."""

    folder = out / split
    folder.mkdir(exist_ok=True)
    views = tuple(config.source.train_views) if split == TRAIN_SPLIT else EVAL_VIEWS
    groups = [tuple(keys[first : first + config.samples_per_shard]) for first in range(0, len(keys), config.samples_per_shard)]
    content = {name: value for name, value in settings.items() if name != "root"}  # a dataset may be moved
    jobs = [
        Job(folder / shard_name(split, number), split, group, views, digest([content, split, group, views]), len(keys))
        for number, group in enumerate(groups)
    ]
    _remove_shards(folder, split, first=len(jobs))
    return Split(split, folder, len(keys), jobs)


def _announce(config: BuildConfig, source: Any, extractor: Any, splits: list[Split]) -> None:
    """Say how much will be written, from the first readable video of each split."""

    patches = (config.source.image_size // extractor.patch_size) ** 2
    frame_bytes = patches * extractor.width * find_codec(config.codec).stored.itemsize
    total = 0
    for split in splits:
        clip = _first_readable(source, split)
        if clip is None:
            continue
        views = split.jobs[0].views
        pictures = 0 if config.frames == "none" else clip.frames[0].nbytes // (6 if config.frames == "jpeg" else 2)
        size = split.num_videos * len(clip.frames) * (len(views) * frame_bytes + pictures)
        total += size
        print(
            f"{split.name}: {split.num_videos} videos of about {len(clip.frames)} frames, views {', '.join(views)}, "
            f"{patches} patches x {extractor.width} {config.codec}: about {format_bytes(size)} in {len(split.jobs)} shards"
        )
    free = shutil.disk_usage(config.out).free
    print(f"about {format_bytes(total)} in all; {format_bytes(free)} free in {config.out}", flush=True)
    if total > free:
        print("warning: the shards may not fit on this disk", file=sys.stderr, flush=True)


def _first_readable(source: Any, split: Split, tries: int = 3) -> Clip | None:
    for key in split.jobs[0].keys[:tries]:
        with contextlib.suppress(DataError):
            return source.read(split.name, key)
    return None


def _build_splits(config: BuildConfig, source: Any, extractor: Any, splits: list[Split], began: float) -> None:

    finished = {split.name: _finished(split.jobs) for split in splits}
    todo = [job for split in splits for job in split.jobs if job.path not in finished[split.name]]
    kept = sum(map(len, finished.values()))
    if kept:
        print(f"{kept} finished shards verified and kept", flush=True)
    for split in splits:
        if any(job.split == split.name for job in todo):
            (split.folder / INDEX_NAME).unlink(missing_ok=True)
    skipped = {split.name: [skip for done in finished[split.name].values() for skip in done["skipped"]] for split in splits}
    for split in splits:
        check_skipped(config, split.name, skipped[split.name], split.num_videos)
    with contextlib.closing(run_jobs(config, source, extractor, todo)) as running:
        for job, sidecar in running:
            finished[job.split][job.path] = sidecar
            skipped[job.split] += sidecar["skipped"]
            check_skipped(config, job.split, skipped[job.split], job.num_videos)
    for split in splits:
        _write_index(config, source, extractor, split, finished[split.name])
    print(f"done in {format_seconds(time.monotonic() - began)}", flush=True)


def _finished(jobs: list[Job]) -> dict[Path, dict[str, Any]]:
    """Side-cars of the shards that need no work. Every byte is hashed: in threads, since hashing releases the interpreter."""

    with ThreadPoolExecutor(min(4, usable_cores())) as pool:
        sidecars = pool.map(lambda job: verified_sidecar(job.path, job.settings), jobs)
        return {job.path: sidecar for job, sidecar in zip(jobs, sidecars, strict=True) if sidecar is not None}


def _write_index(config: BuildConfig, source: Any, extractor: Any, split: Split, finished: dict[Path, dict[str, Any]]) -> None:

    sidecars = [finished[job.path] for job in split.jobs]
    grid = config.source.image_size // extractor.patch_size
    features = {
        "extractor": extractor.name,
        "layer": extractor.layer,
        "width": extractor.width,
        "patch_size": extractor.patch_size,
        "grid": [grid, grid],
        "image_size": config.source.image_size,
        "resize": config.source.resize,
        "fingerprint": extractor.fingerprint,
        "codec": config.codec,
        "views": list(split.jobs[0].views),
    }
    dataset = {"source": config.source.name, "split": split.name, "background_labelled": bool(source.background_labelled)}
    error = CodecError.merge(sidecar["codec_error"] for sidecar in sidecars)
    index = DatasetIndex.merge(sidecars, dataset, features, error)
    index.save(split.folder)
    size = sum(int(shard["bytes"]) for shard in index.shards)
    shown = "not measured" if error is None else f"{error:.2g} of a channel's deviation"
    print(
        f"{split.name}: {len(index.samples)} videos, {sum(sample.frames for sample in index.samples)} frames, "
        f"{format_bytes(size)} in {len(index.shards)} shards, {len(index.skipped)} videos skipped, "
        f"error of codec {config.codec}: {shown}, version {index.version[:12]}"
    )
    for skip in index.skipped:
        print(f"  skipped {skip['key']}: {skip['reason']}")


def _members(group: str) -> str:
    folder = Path(__file__).resolve().parent.parent / "configs" / group
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))


if __name__ == "__main__":
    sys.exit(run_command(main))
