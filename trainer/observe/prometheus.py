"""The Prometheus exporter of one rank: its own registry, its own port, at most 60 series.

Comes in: plain Python numbers of a step, a checkpoint, a score. Goes out: http://address:port/metrics while the run lives
and `monitoring/metrics_rank<r>.prom` when it ends. Recording is a few dictionary look-ups and additions: microseconds.

A gauge appears with its first value: before the first checkpoint there is no checkpoint time, rather than one in 1970.
Labels that say where a rank runs (run, attempt, node, rank) come from the target file, not from here.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram

from data_pipeline.metrics_server import MetricsServer
from data_pipeline.shard_files import FileCounters

PHASES = ("data", "forward", "backward", "optimizer")
SCORES = ("video_fg_ari", "video_mbo", "frame_fg_ari", "frame_mbo")  # the closed set of label `metric`
MEMORY_KINDS = ("host", "device")  # host: resident set; device: peak of what the allocator held
BUCKETS_S = (0.5, 5.0)  # with +Inf 3 buckets: 4 phases x (3 + sum + count) are 20 of the 60 series
MAX_SERIES = 60
MAX_LOSS_TERMS = 5  # beside the total: what the other series leave room for. metrics.jsonl holds all of a run's terms

_GAUGES = {
    "slotstream_last_step_timestamp_seconds": "When this rank finished its last update, seconds since 1970.",
    "slotstream_grad_norm": "Norm of the gradient before clipping, over all weights.",
    "slotstream_learning_rate": "Learning rate of the last update.",
    "slotstream_data_queue_depth": "Batches that were ready when the last one was taken.",
    "slotstream_data_position": "Samples of the order that were consumed so far, over all ranks.",
    "slotstream_data_epoch": "Epoch of the order that the last update read from, from 0.",
    "slotstream_checkpoint_last_success_timestamp_seconds": "When the newest complete checkpoint was written, since 1970.",
    "slotstream_checkpoint_bytes": "Size of the newest checkpoint on disk.",
    "slotstream_checkpoint_duration_seconds": "How long the newest checkpoint took.",
    "slotstream_checkpoint_every_steps": "Updates from one checkpoint to the next, as configured.",
    "slotstream_world_size": "Ranks that train together.",
    "slotstream_straggler_ratio": "Own time of this rank since the last log line, over the median of the others.",
    "slotstream_evaluating": "1 while validation videos are scored, else 0.",
}
_LABELLED_GAUGES = {
    "slotstream_loss": ("term", "Loss over the global batch by term; total is the weighted sum. Rank 0 only."),
    "slotstream_score": ("metric", "Newest validation score in [0, 1]. Rank 0 only."),
    "slotstream_memory_bytes": ("kind", "Memory of this rank: host = resident set, device = peak held by the allocator."),
}
_COUNTERS = {
    "slotstream_steps_total": "Updates that this process applied.",
    "slotstream_samples_total": "Clips of this rank that went into applied updates.",
    "slotstream_frames_total": "Frames of this rank that went into applied updates.",
    "slotstream_nonfinite_total": "Updates refused because a loss or gradient was not finite.",
    "slotstream_data_wait_seconds_total": "Time in which this rank waited for its loader.",
    "slotstream_samples_skipped_total": "Damaged samples that were replaced by the next readable one.",
    "slotstream_checkpoint_verify_failures_total": "Checkpoints found whose content is not what their manifest says.",
    "slotstream_checkpoint_save_failures_total": "Checkpoints that could not be written; the run went on or ended.",
    "slotstream_preemptions_total": "Requests to stop that this run obeyed, in earlier attempts too.",
    "slotstream_restarts_total": "Attempts of this run before this one.",
    "slotstream_shard_hits_total": "Shards that were in the cache when they were wanted; a local disk counts nothing.",
    "slotstream_shard_misses_total": "Shards that had to be fetched.",
    "slotstream_shard_fetched_bytes_total": "Bytes that came from servers, damaged ones with them.",
    "slotstream_shard_corrupt_total": "Fetched shards or pieces whose bytes were not the index's; they were fetched again.",
}


_FILE_COUNTERS = {  # the field of FileCounters behind a counter
    "slotstream_shard_hits_total": "cache_hits",
    "slotstream_shard_misses_total": "cache_misses",
    "slotstream_shard_fetched_bytes_total": "fetched_bytes",
    "slotstream_shard_corrupt_total": "corrupt",
}


@dataclass(frozen=True, slots=True)
class StepStats:
    """What a rank knows of an update without asking the device. Units: seconds; samples and frames are this rank's."""

    samples: int
    frames: int
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds by name in PHASES
    data_wait_s: float = 0.0
    queue_depth: int | None = None
    position: int | None = None
    epoch: int | None = None


class Exporter:
    """Metrics of one rank, served from a daemon thread.

    `loss_terms` is the closed set of label `term` ("total" is added), empty on ranks other than 0. `run_info` holds the
    labels of `slotstream_run_info`, for example {"git_sha": ..., "config_hash": ..., "dataset_version": ...}. `restarts`
    and `preemptions`: those before this attempt. `checkpoint_every`: updates from one checkpoint to the next.
    Raises ValueError when the terms would take the rank past 60 series, OSError when `address` is not one of this machine.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        address: str = "127.0.0.1",
        access: str | None = None,
        run_dir: Path | None = None,
        loss_terms: Sequence[str] = (),
        run_info: Mapping[str, str] | None = None,
        restarts: int = 0,
        preemptions: int = 0,
        checkpoint_every: int | None = None,
    ) -> None:
        self.rank = rank
        self.final_path = None if run_dir is None else Path(run_dir) / "monitoring" / f"metrics_rank{rank}.prom"
        self.loss_terms = tuple(dict.fromkeys(["total", *loss_terms])) if rank == 0 else ()
        self._check_budget()
        self.server = MetricsServer(address, access)
        self.registry = self.server.registry
        self._counters = {name: Counter(name, text, registry=self.registry) for name, text in _COUNTERS.items()}
        steps = Histogram(
            "slotstream_step_duration_seconds",
            "Time of an update by phase.",
            ["phase"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._phases = {phase: steps.labels(phase) for phase in PHASES}
        self._gauges: dict[str, Gauge] = {}
        info = {_label(name): str(value) for name, value in (run_info or {}).items()}
        run = Gauge("slotstream_run_info", "What runs here; always 1.", list(info), registry=self.registry)
        (run.labels(**info) if info else run).set(1)
        self._set("slotstream_world_size", world_size)
        if checkpoint_every is not None:
            self._set("slotstream_checkpoint_every_steps", checkpoint_every)
        self._set("slotstream_evaluating", 0)
        self._counters["slotstream_restarts_total"].inc(max(0, restarts))
        self._counters["slotstream_preemptions_total"].inc(preemptions)
        self._files = FileCounters()

    def observe_step(self, stats: StepStats) -> None:
        """After each applied update."""
        count = self._counters
        count["slotstream_steps_total"].inc()
        count["slotstream_samples_total"].inc(stats.samples)
        count["slotstream_frames_total"].inc(stats.frames)
        count["slotstream_data_wait_seconds_total"].inc(max(0.0, stats.data_wait_s))
        for phase, seconds in stats.phases.items():
            self._phases[phase].observe(seconds)
        self._set("slotstream_last_step_timestamp_seconds", time.time())
        for name in ("queue_depth", "position", "epoch"):
            value = getattr(stats, name)
            if value is not None:
                self._set(f"slotstream_data_{name}", value)

    def observe_log(
        self, losses: Mapping[str, float] | None = None, grad_norm: float | None = None, learning_rate: float | None = None
    ) -> None:
        """On log steps, with the values that had to come from the device. `losses` by term, with "total"; rank 0 shows them."""
        for term, value in (losses or {}).items():
            if term in self.loss_terms:
                self._set("slotstream_loss", value, term)
        if grad_norm is not None:
            self._set("slotstream_grad_norm", grad_norm)
        if learning_rate is not None:
            self._set("slotstream_learning_rate", learning_rate)
        self._set("slotstream_memory_bytes", _resident_bytes(), "host")

    def straggler(self, ratio: float) -> None:
        """This rank's own time over the median of the other ranks'."""
        self._set("slotstream_straggler_ratio", ratio)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Validation videos are scored inside."""
        self._set("slotstream_evaluating", 1)
        try:
            yield
        finally:
            self._set("slotstream_evaluating", 0)

    def device_memory(self, peak_bytes: int) -> None:
        """Peak memory that the device's allocator held."""
        self._set("slotstream_memory_bytes", peak_bytes, "device")

    def checkpoint_saved(self, size_bytes: int, seconds: float) -> None:
        """A checkpoint is complete on disk: its time (now), size and duration."""
        self._set("slotstream_checkpoint_last_success_timestamp_seconds", time.time())
        self._set("slotstream_checkpoint_bytes", size_bytes)
        self._set("slotstream_checkpoint_duration_seconds", seconds)

    def checkpoint_verify_failed(self, count: int = 1) -> None:
        self._counters["slotstream_checkpoint_verify_failures_total"].inc(count)

    def checkpoint_save_failed(self) -> None:
        self._counters["slotstream_checkpoint_save_failures_total"].inc()

    def score(self, scores: Mapping[str, float]) -> None:
        """Newest validation scores; keys as in the run log ("metric/video_fg_ari") or bare. Names outside SCORES are left out."""
        for key, value in scores.items():
            name = key.removeprefix("metric/")
            if self.rank == 0 and name in SCORES:
                self._set("slotstream_score", value, name)

    def skipped(self, count: int = 1) -> None:
        self._counters["slotstream_samples_skipped_total"].inc(count)

    def shard_files(self, now: FileCounters) -> None:
        """What reading shards has cost since this process began; told as often as one likes."""
        before, self._files = self._files, replace(now)
        for name, field_name in _FILE_COUNTERS.items():
            self._counters[name].inc(max(0, getattr(now, field_name) - getattr(before, field_name)))

    def nonfinite(self) -> None:
        self._counters["slotstream_nonfinite_total"].inc()

    def preempted(self) -> None:
        self._counters["slotstream_preemptions_total"].inc()

    def close(self) -> None:
        """Stop serving; keep the last values in the run folder. May be called twice. Raises OSError where they cannot be."""
        self.server.close(self.final_path)

    def _set(self, name: str, value: float, label: str | None = None) -> None:
        gauge = self._gauges.get(name)
        if gauge is None:
            labels, text = ([_LABELLED_GAUGES[name][0]], _LABELLED_GAUGES[name][1]) if label is not None else ([], _GAUGES[name])
            gauge = self._gauges[name] = Gauge(name, text, labels, registry=self.registry)
        (gauge if label is None else gauge.labels(label)).set(value)

    def _check_budget(self) -> None:
        rank_zero = len(self.loss_terms) + len(SCORES) if self.rank == 0 else 0
        total = most_series(rank_zero)
        if total > MAX_SERIES:
            raise ValueError(
                f"loss terms={list(self.loss_terms)}; {total} series a rank would result, {MAX_SERIES} are allowed "
                f"so that hundreds of ranks stay cheap to scrape; export fewer terms"
            )


def most_series(rank_zero_series: int = 0) -> int:
    """How many series a rank exports once every gauge has its first value."""
    histogram = len(PHASES) * (len(BUCKETS_S) + 1 + 2)
    run_info = 1
    return len(_COUNTERS) + len(_GAUGES) + len(MEMORY_KINDS) + histogram + run_info + rank_zero_series


def _label(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


__all__ = ["BUCKETS_S", "MAX_LOSS_TERMS", "MAX_SERIES", "PHASES", "SCORES", "Exporter", "StepStats", "most_series"]
