"""Build jobs: one shard each, run here or in worker processes. Part of data_pipeline.build.

Comes in: shards to be built. Goes out: their side-cars, as they are finished; the first failure stops all.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.clip import Clip
from data_pipeline.codec import CodecError, find_codec
from data_pipeline.config import BuildConfig
from data_pipeline.errors import DataError
from data_pipeline.progress import progress_line, usable_cores
from data_pipeline.shards import EncodedSample, ShardWriter, encode_image, sidecar_path, write_sidecar
from data_pipeline.views import prepare

PROJECTION_NAME = "projection.safetensors"  # a fitted extractor, in the folder of the build


@dataclass(frozen=True)
class Job:
    """One shard to be built."""

    path: Path
    split: str
    keys: tuple[str, ...]
    views: tuple[str, ...]
    settings: str  # hash of all that determines the shard's bytes
    num_videos: int  # of the whole split


Results = Generator[tuple[Job, dict[str, Any]], None, None]  # shards with their side-cars, as they are finished


def check_skipped(config: BuildConfig, split: str, skipped: list[dict[str, Any]], total: int) -> None:
    """Raise DataError when more than the allowed share of a split's videos could not be read."""
    limit = config.max_skip_fraction
    if len(skipped) <= limit * total + 1e-9 and len(skipped) < total:
        return
    raise DataError(
        f"{skipped[0]['reason']} (split {split}, video {skipped[0]['key']}); "
        f"{len(skipped)} of {total} videos are unreadable so far, limit max_skip_fraction={limit}; "
        f"mend the files or raise max_skip_fraction"
    )


class _Stopped(Exception):
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


def build_shard(config: BuildConfig, source: Any, extractor: Any, job: Job, progress: Progress) -> dict[str, Any]:
    """Write one shard and its side-car; returns the side-car.

    An unreadable video is left out and named; features that cannot be stored stop the build: the next video would fare no better.
    """

    sidecar_path(job.path).unlink(missing_ok=True)
    error = CodecError(extractor.width)
    skipped: list[dict[str, Any]] = []
    with ShardWriter(job.path) as shard:
        for key in job.keys:
            if progress.stop.is_set():
                raise _Stopped
            clip = _read(source, job, key, skipped)
            if clip is not None:
                shard.add(_encode(config, extractor, job, clip, error))
            else:
                check_skipped(config, job.split, skipped, job.num_videos)
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


def _encode(config: BuildConfig, extractor: Any, job: Job, clip: Clip, error: CodecError) -> EncodedSample:
    """A clip as it is stored: features of each view, frames and ids at native size."""

    suffix = {"jpeg": "jpg", "png": "png"}.get(config.frames, "")
    ids = clip.instance_ids
    return EncodedSample(
        key=clip.key,
        num_frames=clip.num_frames,
        size=(int(clip.frames.shape[1]), int(clip.frames.shape[2])),
        num_instances=None if ids is None else int(np.count_nonzero(np.unique(ids))),
        features={view: _view_features(config, extractor, clip, view, error) for view in job.views},
        image_suffix=suffix,
        images=[encode_image(frame, suffix, config.jpeg_quality) for frame in clip.frames] if suffix else None,
        ids=None if ids is None else [encode_image(frame, "png") for frame in ids],
        metadata=clip.metadata,
    )


def _view_features(config: BuildConfig, extractor: Any, clip: Clip, view: str, error: CodecError) -> np.ndarray:
    """Shapes: (T, P, E) in the codec's stored dtype."""
    import torch

    codec = find_codec(config.codec)
    with torch.inference_mode():
        frames = prepare(clip.frames, view, config.source.image_size, config.source.resize, clip.key)
        values = extractor(frames).float().cpu().numpy()
    expected = (clip.num_frames, (config.source.image_size // extractor.patch_size) ** 2, extractor.width)
    assert values.shape == expected, (values.shape, expected)
    try:
        stored = codec.encode(values)
    except DataError as problem:
        raise DataError(f"video {clip.key}, view {view}: {problem}") from None
    error.add(values, codec.decode(stored))
    return stored


def run_jobs(config: BuildConfig, source: Any, extractor: Any, jobs: list[Job]) -> Results:
    """Build `jobs`, yielding each as it is finished. The first failure stops all of them."""
    if not jobs:
        return
    num_workers = min(config.workers or _default_workers(), len(jobs))
    total = sum(len(job.keys) for job in jobs)
    if num_workers == 1:
        yield from _run_here(config, source, extractor, jobs, total)
    else:
        yield from _run_in_processes(config, jobs, num_workers, total)


def _default_workers() -> int:
    import torch

    # A few processes keep an accelerator busy; each holds its own copy of the model there.
    return min(usable_cores(), 4 * torch.cuda.device_count() or usable_cores())


def _run_here(config: BuildConfig, source: Any, extractor: Any, jobs: list[Job], total: int) -> Results:

    import torch

    progress, threads = Progress(), torch.get_num_threads()
    # One thread, as in a worker: sums depend on how they are cut, and a shard's bytes must not depend on the number of workers.
    torch.set_num_threads(1)
    try:
        # A thread, so that the progress line lives while a shard is built.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = {pool.submit(build_shard, config, source, extractor, job, progress): job for job in jobs}
            yield from _collect(pool, futures, progress, total)
    finally:
        torch.set_num_threads(threads)


def _run_in_processes(config: BuildConfig, jobs: list[Job], num_workers: int, total: int) -> Results:

    # spawn: a fork would inherit torch's threads and an accelerator's context in an unknown state.
    context = multiprocessing.get_context("spawn")
    progress = Progress(context)
    numbers = context.Value("q", 0)
    with ProcessPoolExecutor(num_workers, context, _start_worker, (config, progress, numbers)) as pool:
        futures = {pool.submit(_work, job): job for job in jobs}
        yield from _collect(pool, futures, progress, total)


def _collect(pool: Executor, futures: dict[Future[dict[str, Any]], Job], progress: Progress, total: int) -> Results:

    waiting = set(futures)
    try:
        with progress_line(total) as show:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                show(progress.videos.value, progress.frames.value)
                for future in sorted(done, key=lambda future: futures[future].path):
                    yield futures[future], future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process ended without a word; perhaps memory ran out; shards so far are kept; run again with fewer workers"
        ) from None
    finally:
        progress.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(config: BuildConfig, progress: Progress, numbers: Any) -> None:
    """Runs once in each worker process."""

    import torch

    from data_pipeline.features import build_extractor
    from data_pipeline.sources import build_source

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent tells workers to stop
    _end_with_parent()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        with numbers.get_lock():
            number, numbers.value = numbers.value, numbers.value + 1
        torch.cuda.set_device(number % torch.cuda.device_count())
    extractor: Any = build_extractor(config.features)
    if getattr(extractor, "needs_fit", False):
        extractor.load(Path(config.out) / PROJECTION_NAME)
    _worker.update(config=config, source=build_source(config.source, config.root), extractor=extractor, progress=progress)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job) -> dict[str, Any]:
    return build_shard(_worker["config"], _worker["source"], _worker["extractor"], job, _worker["progress"])
