"""Command: dataset -> shards with features. `python -m data_pipeline.build source=movi root=... out=... features=dinov2_vits14`

Comes in: a source's videos. Goes out: <out>/<split>/{index.json, <split>-000000.tar, ...}, <out>/settings.json, and
<out>/projection.safetensors where the extractor is fitted on the data. Shards are built in parallel, by the worker processes of
this process or of all ranks of a launcher's job; a build that was stopped goes on where it was, and gives the same bytes with any
number of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipeline.build_jobs import Maker, Progress, check_skipped, choose_device, run_jobs
from data_pipeline.build_metrics import BuildMetrics
from data_pipeline.build_plan import Job, Split, announce, check_grid, estimate, plan
from data_pipeline.build_ranks import FolderLock, Place, Stopped, Team, join
from data_pipeline.build_settings import (
    adopt_settings,
    check_settings,
    prepare_folder,
    remove_shards,
    settings_of,
    statistics_of,
    videos_of,
)
from data_pipeline.codec import CodecError, find_codec
from data_pipeline.compose import compose, run_command
from data_pipeline.config import BuildConfig
from data_pipeline.errors import DataError
from data_pipeline.progress import Show, format_bytes, format_seconds, progress_line, usable_cores
from data_pipeline.shards import INDEX_NAME, DatasetIndex, read_json, sidecar_path, verified_sidecar
from data_pipeline.views import parse_view

REQUEUE = 75  # exit code: stopped when asked to; run again to go on
NETWORK_FILES_S = 90.0  # how long a machine may go on seeing an older list of a network folder's files
SHOWN_SKIPS = 20
EXPORTED = {
    "shards": "finished shards",
    "written_bytes": "bytes of finished shards",
    "skipped": "skipped videos",
}  # sums of all ranks

HELP = """\
usage: python -m data_pipeline.build [--dry-run] [source=NAME] [features=NAME] out=FOLDER [root=FOLDER] [key=value ...]

Reads a dataset's videos, takes patch features of every frame with a frozen extractor, and writes shards:
<out>/<split>/index.json beside <split>-000000.tar and so on. Run it again to go on after a stop.
--dry-run says what would be built and how large it would be, and writes nothing.
On several machines: python cluster/launch.py --nodes N build-shards source=NAME out=FOLDER ...

  source=NAME              which dataset: {sources}
  features=NAME            which extractor: {features}
                           none: frames alone, for training with data.input=frames
  features.layer=last_block  of a DINOv2 model: last_block, last_block_keys (VideoSAUR)
  features.weights=FILE    where a model's weights lie; of patch: another build's projection.safetensors, for features of its kind
  root=FOLDER              where the dataset lies (a generated one needs none)
  out=FOLDER               where the shards go
  splits=[train,validation]
  samples_per_shard=32     videos of a shard
  codec=int8               how features are stored: int8, float16, float32
  codec_fit_frames=256     training frames that the channel statistics of int8 come from
  frames=jpeg              how frames are kept: jpeg, png, none
  jpeg_quality=95
  workers=0                processes (of each rank); 0: one for each usable core
  limit=N                  only the first N videos of each split
  max_skip_fraction=0.0    share of unreadable videos that may be left out
  overwrite=false          true: start anew although there is something in out
  check_space=true         false: begin although the shards seem not to fit on the disk
  targets_dir=FOLDER       a folder that Prometheus watches: the build is listed there while it works
  metrics_address=ADDRESS  interface that its metrics are served on (default: loopback)
  source.KEY=VALUE, features.KEY=VALUE   settings of the dataset and of the extractor
Exit code: 0 done, 75 stopped when asked to (run it again to go on), 130 Ctrl-C, 2 a mistake, 1 another rank's failure.
"""


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP.format(sources=_members("source"), features=_members("features")), end="")
        return 0
    config = compose_build([word for word in argv if word != "--dry-run"])
    if "--dry-run" in argv:
        dry_run(config)
        return 0
    place = Place.from_environment()
    try:
        with _stopped_by(signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
            build(config, place)
    except Stopped:
        print("stopped; finished shards are kept; run the same command again to go on", file=sys.stderr, flush=True)
        return REQUEUE
    return 0


@contextlib.contextmanager
def _stopped_by(*numbers: signal.Signals) -> Any:
    """These signals raise Stopped, once: what follows is tidying up, which a second one must not cut short."""

    def stop(number: int, frame: Any) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def compose_build(overrides: list[str]) -> BuildConfig:
    from data_pipeline.features import GROUP_SCHEMAS as FEATURES_SCHEMAS
    from data_pipeline.sources import GROUP_SCHEMAS as SOURCE_SCHEMAS

    return compose("build_shards", BuildConfig, overrides, {**SOURCE_SCHEMAS, **FEATURES_SCHEMAS})


def dry_run(config: BuildConfig) -> None:
    """Say what `build` would write, and refuse what it would refuse before its first write."""
    source, extractor, keys = _open(config)
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise DataError(f"out={out}: File exists; a folder that can be written is needed; change out")
    check_settings(out, settings_of(config, extractor), config)
    sizes = [estimate(config, source, extractor, split, keys[split]) for split in config.splits]
    announce(config, extractor, sizes, out)


def build(config: BuildConfig, place: Place | None = None) -> None:
    """Build every split of `config`. Raises ConfigError or DataError; what is finished by then is kept for the next call."""
    began = time.monotonic()
    place = place or Place()
    if place.world_size > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a rank that is lost is said in one line of ours
        choose_device(place, worker=0)
    team = join(place)
    with team.ending_together():
        source, extractor, keys = _open(config)
        out = _make_folder(config.out)
        shown = BuildMetrics(config, team.place.world_size) if team.leads else contextlib.nullcontext()
        with FolderLock(out) as lock, shown as metrics:
            settings = _prepare(config, source, extractor, keys, out, lock, team)
            maker = Maker(config, source, extractor, statistics_of(settings, extractor.width))
            splits = [plan(config, settings, split, keys[split], out) for split in config.splits]
            _build_splits(maker, splits, team, metrics, began)


def _open(config: BuildConfig) -> tuple[Any, Any, dict[str, list[str]]]:
    """(source, extractor, keys of each split). Nothing is written before all of them are sound."""
    from data_pipeline.features import build_extractor
    from data_pipeline.sources import build_source

    find_codec(config.codec)
    for view in config.source.train_views:
        parse_view(view)
    source = build_source(config.source, config.root)
    keys = {split: videos_of(source, config, split) for split in config.splits}
    extractor: Any = build_extractor(config.features)
    check_grid(config, extractor)
    return source, extractor, keys


def _make_folder(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"out={path}: {error.strerror}; a folder that can be written is needed; change out") from None
    return Path(path)


def _prepare(
    config: BuildConfig, source: Any, extractor: Any, keys: dict[str, list[str]], out: Path, lock: FolderLock, team: Team
) -> dict[str, Any]:
    """Rank 0 readies the folder, alone; the others wait and take over its settings. Returns the settings."""
    if not team.leads:
        settings: dict[str, Any] = team.hear("settings")
        lock.share()
        adopt_settings(config, extractor, settings, out)
        return settings
    lock.take_alone()
    sizes = [estimate(config, source, extractor, split, keys[split]) for split in config.splits]
    announce(config, extractor, sizes, out)
    settings = prepare_folder(config, source, extractor, out)
    for split in config.splits:
        (out / split).mkdir(exist_ok=True)
        remove_shards(out / split, split, first=-(-len(keys[split]) // config.samples_per_shard))
    lock.share()
    team.tell("settings", settings)
    return settings


def _build_splits(maker: Maker, splits: list[Split], team: Team, metrics: BuildMetrics | None, began: float) -> None:
    jobs = [job for split in splits for job in split.jobs]
    finished, todo = _find_finished(splits, jobs, team)
    kept = len(finished)
    for job, sidecar in finished.items():
        _count_finished(maker.config, job, sidecar, team)
    working, wanted = time.monotonic(), sum(len(job.keys) for job in todo)
    if metrics is not None:
        metrics.begin(wanted, len(jobs))
    with progress_line(wanted) if team.leads else contextlib.nullcontext(_show_nothing) as show:
        shared = _SharedProgress(team, show, metrics)
        with contextlib.closing(run_jobs(maker, todo, team, shared.tick)) as running:
            for job, sidecar in running:
                finished[job] = sidecar
                _count_finished(maker.config, job, sidecar, team)
        team.add("done", 1)
        if not team.leads:
            return
        team.wait_until(lambda: team.add("done", 0) == team.place.world_size, "the other ranks", shared.refresh)
        shared.refresh()
    speed = shared.frames / max(time.monotonic() - working, 1e-9)
    for split in splits:
        _write_index(maker, split, [finished.get(job) or _sidecar_of_another_rank(job) for job in split.jobs])
    _write_card(Path(maker.config.out))
    print(
        f"built {len(todo)} shards of {shared.videos} videos, {shared.frames} frames ({speed:.1f} frames/s), kept {kept}; "
        f"done in {format_seconds(time.monotonic() - began)}",
        flush=True,
    )


class _SharedProgress:
    """Adds this rank's progress to that of all ranks, and shows the sum; `metrics`, on rank 0, exports it."""

    def __init__(self, team: Team, show: Show, metrics: BuildMetrics | None) -> None:
        self.videos = self.frames = 0
        self._team, self._show, self._metrics = team, show, metrics
        self._own = (0, 0)

    def tick(self, progress: Progress) -> None:
        """Raises when another rank has ended too early."""
        self._team.check()
        own, before = (progress.videos.value, progress.frames.value), self._own
        self._own = own
        self.refresh(own[0] - before[0], own[1] - before[1])

    def refresh(self, videos: int = 0, frames: int = 0) -> None:
        self.videos, self.frames = self._team.add("videos", videos), self._team.add("frames", frames)
        self._show(self.videos, self.frames)
        if self._metrics is not None:
            more = {short: self._team.add(name, 0) for short, name in EXPORTED.items()}
            self._metrics.progress(videos=self.videos, frames=self.frames, **more)


def _show_nothing(videos: int, frames: int) -> None:
    """Rank 0 shows the progress of all."""


def _find_finished(splits: list[Split], jobs: list[Job], team: Team) -> tuple[dict[Job, dict[str, Any]], list[Job]]:
    """(on rank 0: side-cars of the shards that need no work, the other shards). Every rank hashes its part of what is there."""
    place = team.place
    mine = jobs[place.rank :: place.world_size]
    with ThreadPoolExecutor(min(4, usable_cores())) as pool:  # hashing releases the interpreter
        sidecars = list(pool.map(lambda job: verified_sidecar(job.path, job.settings), mine))
    own = {job: sidecar for job, sidecar in zip(mine, sidecars, strict=True) if sidecar is not None}
    team.tell(f"sound shards, part {place.rank}", [number for number, job in enumerate(jobs) if job in own])
    if not team.leads:
        return {}, [jobs[number] for number in team.hear("shards to build")]
    sound = {number for rank in range(place.world_size) for number in team.hear(f"sound shards, part {rank}", rank)}
    todo = [number for number in range(len(jobs)) if number not in sound]
    for split in splits:  # an index never names a shard that is being replaced
        if any(jobs[number].split == split.name for number in todo):
            (split.folder / INDEX_NAME).unlink(missing_ok=True)
    team.tell("shards to build", todo)
    if sound:
        print(f"{len(sound)} finished shards verified and kept", flush=True)
    kept = [jobs[number] for number in sorted(sound)]
    return {job: own.get(job) or _sidecar_of_another_rank(job) for job in kept}, [jobs[number] for number in todo]


def _sidecar_of_another_rank(job: Job) -> dict[str, Any]:
    """It is there: that rank said so. But a network file system may show this machine an older state for a while."""
    deadline = time.monotonic() + NETWORK_FILES_S
    while True:
        try:
            sidecar = read_json(sidecar_path(job.path), "the side-car of a finished shard", "run the same command again")
            if sidecar.get("settings") == job.settings:
                return sidecar
            problem = DataError(f"{sidecar_path(job.path)}: of other settings; does another build write here? run it again")
        except DataError as error:
            problem = error
        if time.monotonic() >= deadline:
            raise problem
        time.sleep(0.5)


def _count_finished(config: BuildConfig, job: Job, sidecar: dict[str, Any], team: Team) -> None:
    """Add a shard, and its unreadable videos, to those of all ranks. Raises DataError beyond the limit."""
    team.add(EXPORTED["shards"], 1)
    team.add(EXPORTED["written_bytes"], job.path.stat().st_size if job.path.exists() else 0)
    team.add(EXPORTED["skipped"], len(sidecar["skipped"]))
    if sidecar["skipped"]:
        count = team.add(f"skipped videos of {job.split}", len(sidecar["skipped"]))
        check_skipped(config, job.split, sidecar["skipped"][0], count, job.num_videos)


def _write_index(maker: Maker, split: Split, sidecars: list[dict[str, Any]]) -> None:
    config, extractor = maker.config, maker.extractor
    grid = config.source.image_size // extractor.patch_size if extractor.width else 0
    quality = CodecError.report(sidecar["codec_error"] for sidecar in sidecars)
    features = {
        "extractor": extractor.name,
        "layer": extractor.layer,
        "width": extractor.width,
        "patch_size": extractor.patch_size,
        "grid": [grid, grid],
        "image_size": config.source.image_size,
        "resize": config.source.resize,
        "fingerprint": extractor.fingerprint,
        "codec": config.codec if extractor.width else "float32",  # of no features: one that needs nothing
        "statistics": None if maker.statistics is None else maker.statistics.to_json(),
        "quality": quality,
        "views": list(split.views),
    }
    dataset = {"source": config.source.name, "split": split.name, "background_labelled": bool(maker.source.background_labelled)}
    index = DatasetIndex.merge(sidecars, dataset, features, quality["err_std"])
    index.save(split.folder)
    _say_split(index, split.name, quality)


def _say_split(index: DatasetIndex, name: str, quality: dict[str, Any]) -> None:
    size = sum(int(shard["bytes"]) for shard in index.shards)
    error, kept = quality["err_std"], quality["nearest_neighbour"]
    shown = "not measured" if error is None else f"{error:.2g} of a channel's deviation"
    shown += "" if kept is None else f", {kept:.1%} of nearest neighbours kept"
    codec = f"error of codec {index.features['codec']}: {shown}" if index.has_features else "no features"
    print(
        f"{name}: {len(index.samples)} videos, {sum(sample.frames for sample in index.samples)} frames, "
        f"{format_bytes(size)} in {len(index.shards)} shards, {len(index.skipped)} videos skipped, "
        f"{codec}, version {index.version[:12]}"
    )
    for skip in index.skipped[:SHOWN_SKIPS]:
        print(f"  skipped {skip['key']}: {skip['reason']}")
    if len(index.skipped) > SHOWN_SKIPS:
        print(f"  ... and {len(index.skipped) - SHOWN_SKIPS} more: skipped in {name}/{INDEX_NAME}")


def _write_card(out: Path) -> None:
    """A page about the dataset beside its shards."""
    from data_pipeline.card import write_card

    write_card(out)


def _members(group: str) -> str:
    folder = Path(__file__).resolve().parent.parent / "configs" / group
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))


if __name__ == "__main__":
    sys.exit(run_command(main))
