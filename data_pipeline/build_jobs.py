"""Build jobs: one shard each, run here or in worker processes. Part of data_pipeline.build.

Comes in: the shards to be built, and the team that takes them one after another. Goes out: the side-cars of those that this rank
took, as they are finished; the first failure stops all.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.build_plan import IMAGE_SUFFIXES, Job
from data_pipeline.build_ranks import FolderLock, Place, Team
from data_pipeline.build_settings import PROJECTION_NAME, needs_fit, one_thread
from data_pipeline.clip import Clip
from data_pipeline.codec import ChannelStatistics, CodecError, find_codec
from data_pipeline.config import BuildConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.progress import usable_cores
from data_pipeline.shards import EncodedSample, ShardWriter, encode_image, sidecar_path, write_sidecar
from data_pipeline.views import prepare

Results = Generator[tuple[Job, dict[str, Any]], None, None]  # shards with their side-cars, as they are finished


@dataclass(frozen=True)
class Maker:
    """All that makes features of a video."""

    config: BuildConfig
    source: Any
    extractor: Any
    statistics: ChannelStatistics | None


def check_skipped(config: BuildConfig, split: str, example: dict[str, Any], count: int, total: int) -> None:
    """Raise DataError when more than the allowed share of a split's videos could not be read."""
    limit = config.max_skip_fraction
    if count <= limit * total + 1e-9 and count < total:
        return
    raise DataError(
        f"{example['reason']} (split {split}, video {example['key']}); "
        f"{count} of {total} videos are unreadable so far, limit max_skip_fraction={limit}; "
        f"mend the files or raise max_skip_fraction"
    )


class _Dropped(Exception):
    """The build was given up elsewhere; this shard is dropped."""


class Progress:
    """Videos and frames done so far over all workers, and the order to stop. `context` makes it visible to other processes."""

    def __init__(self, context: Any = None) -> None:
        self.videos = context.Value("q", 0) if context else _Count()
        self.frames = context.Value("q", 0) if context else _Count()
        self.stop = context.Event() if context else threading.Event()

    def add(self, num_frames: int) -> None:
        for count, amount in ((self.videos, 1), (self.frames, num_frames)):
            with count.get_lock():
                count.value += amount


class _Count:
    """A counter for one process, with the face of multiprocessing.Value."""

    value = 0

    def get_lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def build_shard(maker: Maker, job: Job, progress: Progress) -> dict[str, Any]:
    """Write one shard and its side-car; returns the side-car.

    An unreadable video is left out and named; features that cannot be stored stop the build: the next video would fare no better.
    """
    try:
        return _build_shard(maker, job, progress)
    except OSError as error:  # what a disk that is full, gone or read-only says
        raise DataError(
            f"{error.filename or job.path}: {error.strerror or error}; the shard was dropped, finished ones are kept; "
            f"make room or mend the place, then run the same command again"
        ) from None


def _build_shard(maker: Maker, job: Job, progress: Progress) -> dict[str, Any]:
    sidecar_path(job.path).unlink(missing_ok=True)
    error = CodecError(maker.extractor.width)
    skipped: list[dict[str, Any]] = []
    with ShardWriter(job.path) as shard:
        for key in job.keys:
            if progress.stop.is_set():
                raise _Dropped
            clip = _read(maker.source, job, key, skipped)
            if clip is not None:
                shard.add(_encode(maker, job, clip, error))
            else:
                check_skipped(maker.config, job.split, skipped[0], len(skipped), job.num_videos)
            progress.add(0 if clip is None else clip.num_frames)
    if not shard.samples:
        job.path.unlink()
    return write_sidecar(job.path, shard, settings=job.settings, skipped=skipped, codec_error=error.to_json())


def _read(source: Any, job: Job, key: str, skipped: list[dict[str, Any]]) -> Clip | None:
    try:
        clip = source.read(job.split, key)
    except DataError as error:
        skipped.append({"key": key, "reason": str(error)})
        return None
    if clip.key != key:
        raise DataError(f"split {job.split}: video {key} calls itself {clip.key}; a key must name one video; mend the source")
    return clip


def _encode(maker: Maker, job: Job, clip: Clip, error: CodecError) -> EncodedSample:
    """A clip as it is stored: features of each view, frames and ids at native size."""
    config, ids = maker.config, clip.instance_ids
    suffix = IMAGE_SUFFIXES[config.frames]
    return EncodedSample(
        key=clip.key,
        num_frames=clip.num_frames,
        size=(int(clip.frames.shape[1]), int(clip.frames.shape[2])),
        num_instances=None if ids is None else int(np.count_nonzero(np.unique(ids))),
        features={view: _view_features(maker, clip, view, error) for view in job.views},
        image_suffix=suffix,
        images=[encode_image(frame, suffix, config.jpeg_quality) for frame in clip.frames] if suffix else None,
        ids=None if ids is None else [encode_image(frame, "png") for frame in ids],
        metadata=clip.metadata,
    )


def _view_features(maker: Maker, clip: Clip, view: str, error: CodecError) -> np.ndarray:
    """Shapes: (T, ...) as the codec lays out a frame."""
    import torch

    source, codec = maker.config.source, find_codec(maker.config.codec)
    with torch.inference_mode():
        frames = prepare(clip.frames, view, source.image_size, source.resize, clip.key)
        values = maker.extractor(frames).float().cpu().numpy()
    expected = (clip.num_frames, (source.image_size // maker.extractor.patch_size) ** 2, maker.extractor.width)
    assert values.shape == expected, (values.shape, expected)
    try:
        stored = codec.encode(values, maker.statistics)
    except DataError as problem:
        raise DataError(f"video {clip.key}, view {view}: {problem}") from None
    error.add(values, codec.decode(stored, maker.statistics), stored.nbytes)
    return stored


def run_jobs(maker: Maker, jobs: list[Job], team: Team, tick: Callable[[Progress], None]) -> Results:
    """Build those of `jobs` that this rank takes, yielding each as it is finished. The first failure stops all of them.

    `tick` is called twice a second, and at the end.
    """
    share = -(-len(jobs) // team.place.world_size)
    num_workers = min(maker.config.workers or _default_workers(team.place), share)
    if num_workers > 1:
        yield from _run_in_processes(maker, jobs, num_workers, team, tick)
    elif jobs:
        yield from _run_here(maker, jobs, team, tick)


def _default_workers(place: Place) -> int:
    """For each rank of a node its part of the cores."""
    import torch

    cores = max(1, usable_cores() // place.local_world_size)
    # A few processes keep an accelerator busy; each holds its own copy of the model there.
    devices = torch.cuda.device_count()
    return min(cores, 4 * max(1, devices // place.local_world_size)) if devices else cores


def _run_here(maker: Maker, jobs: list[Job], team: Team, tick: Callable[[Progress], None]) -> Results:
    import torch

    progress = Progress()
    with one_thread(), ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # A thread, so that progress and signals are seen to while a shard is built.
        yield from _collect(lambda job: pool.submit(build_shard, maker, job, progress), 1, jobs, team, progress, tick)


def _run_in_processes(maker: Maker, jobs: list[Job], num_workers: int, team: Team, tick: Callable[[Progress], None]) -> Results:
    # spawn: a fork would inherit torch's threads and an accelerator's context in an unknown state.
    context = multiprocessing.get_context("spawn")
    progress = Progress(context)
    first = (maker.config, maker.statistics, team.place, progress, context.Value("q", 0))
    with ProcessPoolExecutor(num_workers, context, _start_worker, first) as pool:

        def submit(job: Job) -> Future[dict[str, Any]]:
            # It may start a process, which inherits what is blocked: Ctrl-C finds it without a handler, and with a traceback.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
            try:
                return pool.submit(_work, job)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        try:
            yield from _collect(submit, num_workers, jobs, team, progress, tick)
        except BaseException:
            for worker in multiprocessing.active_children():  # at once, also in the middle of a video or of its own start
                worker.terminate()
            raise


def _collect(
    submit: Callable[[Job], Future[dict[str, Any]]],
    num_workers: int,
    jobs: list[Job],
    team: Team,
    progress: Progress,
    tick: Callable[[Progress], None],
) -> Results:
    """Keep every worker at one shard; a shard is taken when there is somebody to build it."""
    claims = _claims(jobs, team)
    running: dict[Future[dict[str, Any]], Job] = {}
    try:
        running |= {submit(job): job for _, job in zip(range(num_workers), claims, strict=False)}
        while running:
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            tick(progress)
            finished = [(running.pop(future), future.result()) for future in sorted(done, key=lambda one: running[one].path)]
            running |= {submit(job): job for _, job in zip(finished, claims, strict=False)}
            yield from finished
        tick(progress)
    except BrokenProcessPool:
        raise DataError(
            "a worker process ended without a word; perhaps memory ran out; shards so far are kept; run again with fewer workers"
        ) from None
    finally:
        progress.stop.set()


def _claims(jobs: list[Job], team: Team) -> Iterator[Job]:
    """The next job that no rank has taken, again and again."""
    while (number := team.add("claimed", 1) - 1) < len(jobs):
        yield jobs[number]


_worker: dict[str, Any] = {}


def _start_worker(*settings: Any) -> None:
    """Runs once in each worker process. An error here would only break the pool: it is kept for the first job."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):  # may reach the whole group; the parent tells workers to stop
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _on_terminate)
    _end_with_parent()
    try:
        _set_up_worker(*settings)
    except (ConfigError, DataError, OSError) as error:
        _worker["error"] = error


def _set_up_worker(
    config: BuildConfig, statistics: ChannelStatistics | None, place: Place, progress: Progress, numbers: Any
) -> None:
    import torch

    from data_pipeline.features import build_extractor
    from data_pipeline.sources import build_source

    _worker["lock"] = lock = FolderLock(Path(config.out))
    lock.share()  # as long as it lives: no other build may begin beside it
    torch.set_num_threads(1)
    with numbers.get_lock():
        worker, numbers.value = numbers.value, numbers.value + 1
    choose_device(place, worker)
    extractor: Any = build_extractor(config.features)
    if needs_fit(extractor):
        extractor.load(Path(config.out) / PROJECTION_NAME)
    _worker["maker"] = Maker(config, build_source(config.source, config.root), extractor, statistics)
    _worker["progress"] = progress


def choose_device(place: Place, worker: int) -> None:
    """Spread the workers of all ranks of a node over its accelerators."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device((place.local_rank + worker * place.local_world_size) % torch.cuda.device_count())


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job) -> dict[str, Any]:
    if "error" in _worker:
        raise _worker["error"]
    try:
        _worker["building"] = True
        return build_shard(_worker["maker"], job, _worker["progress"])
    except SystemExit:
        os._exit(128 + signal.SIGTERM)  # the pool would take it for the job's result
    finally:
        _worker["building"] = False


def _on_terminate(number: int, frame: Any) -> None:
    """The shard in progress is dropped with its temporary file. One that waits may wait for a lock of a dead one: just end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not _worker.get("building"):
        os._exit(128 + signal.SIGTERM)
    raise SystemExit
