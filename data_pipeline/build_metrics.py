"""A build's progress for Prometheus. Counts of all ranks in, http://address:port/metrics out. Part of data_pipeline.build.

Rank 0 serves for all ranks: it knows their sum. There is nothing to find where neither a launcher made a run folder nor
targets_dir is set, so nothing is served there.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest, start_http_server

from data_pipeline import targets
from data_pipeline.config import BuildConfig
from data_pipeline.files import write_atomically

REFRESH_S = 60.0  # of the target file, so that nobody takes the build for dead
_COUNTERS = {
    "slotstream_build_videos_total": "Videos that this build has written, over all ranks.",
    "slotstream_build_frames_total": "Frames that this build has written, over all ranks.",
    "slotstream_build_shards_total": "Shards that are there, those of earlier calls among them.",
    "slotstream_build_written_bytes_total": "Bytes of those shards.",
    "slotstream_build_skipped_total": "Videos that could not be read and were left out.",
}
_GAUGES = {
    "slotstream_build_videos_wanted": "Videos that this call has to write.",
    "slotstream_build_shards_wanted": "Shards of all splits.",
    "slotstream_build_ranks": "Ranks that build together.",
    "slotstream_build_last_progress_timestamp_seconds": "When a video was last finished, seconds since 1970.",
}


class BuildMetrics:
    """What a build exports. A context: at its end the last values stay in the run folder, and the target list goes.

    Raises nothing for an address that cannot be had: a build does not fail for its metrics, it says so once.
    """

    def __init__(self, config: BuildConfig, ranks: int) -> None:
        disable_created_metrics()
        run_dir = os.environ.get("SLOTSTREAM_RUN_DIR")
        self._run = Path(run_dir) if run_dir else None
        self._watched = targets.watched_folder(self._run or Path(config.out), config.targets_dir)
        self._registry = CollectorRegistry()
        self._counters = {name: Counter(name, text, registry=self._registry) for name, text in _COUNTERS.items()}
        self._gauges = {name: Gauge(name, text, registry=self._registry) for name, text in _GAUGES.items()}
        self._gauges["slotstream_build_ranks"].set(ranks)
        out = Path(config.out).absolute()
        info = {"out": out.name, "source": config.source.name, "codec": config.codec}
        info |= {"features": getattr(config.features, "name", "")}
        Gauge("slotstream_build_info", "What is built; always 1.", list(info), registry=self._registry).labels(**info).set(1)
        self._name = self._run.name if self._run else out.name
        # Where there is no run folder, the copy in the watched folder is the only list; it is named after the shards' folder.
        self._list = (self._run or out) / "monitoring" / "targets.json"
        self._server: Any = None
        self._told = dict.fromkeys(_COUNTERS, 0)
        self._refreshed = 0.0
        if self._run or self._watched:
            self._serve(config.metrics_address)

    def begin(self, videos: int, shards: int) -> None:
        """`videos`: to be written now; `shards`: of all splits."""
        self._gauges["slotstream_build_videos_wanted"].set(videos)
        self._gauges["slotstream_build_shards_wanted"].set(shards)

    def progress(self, **sums: int) -> None:
        """Sums over all ranks so far, by the counters' short names; told as often as one likes."""
        moved = False
        for short, now in sums.items():
            name = f"slotstream_build_{short}_total"
            more, self._told[name] = now - self._told[name], now
            self._counters[name].inc(more)
            moved |= more > 0 and short == "videos"
        if moved:
            self._gauges["slotstream_build_last_progress_timestamp_seconds"].set(time.time())
        if self._watched and self._server and time.monotonic() - self._refreshed > REFRESH_S:
            self._refreshed = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(targets.watched_file(self._list, self._watched))

    def exposition(self) -> bytes:
        """The text that a scrape would get now."""
        return generate_latest(self._registry)

    def __enter__(self) -> BuildMetrics:
        return self

    def __exit__(self, *error: object) -> None:
        if self._run is not None:
            write_atomically(self._run / "monitoring" / "metrics_build.prom", self.exposition())
        if self._server is not None:
            targets.remove(self._list, self._watched)
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _serve(self, address: str) -> None:
        try:
            self._server, _ = start_http_server(0, addr=address, registry=self._registry)
            host = socket.gethostname() if address in ("0.0.0.0", "::") else address
            target = f"{f'[{host}]' if ':' in host else host}:{self._server.server_port}"
            attempt, node = os.environ.get("SLOTSTREAM_ATTEMPT", "1"), os.environ.get("SLOTSTREAM_NODE", socket.gethostname())
            group = targets.target_group(target, run=self._name, attempt=attempt, node=node, rank=0)
            if self._run is not None:
                targets.write_targets(self._list, [group])
                if self._watched:
                    targets.link_into(self._list, self._watched)
            else:
                targets.write_targets(targets.watched_file(self._list, self._watched or self._list.parent), [group])
        except OSError as error:
            print(f"no metrics: {error}; check metrics_address and targets_dir; the build goes on", file=sys.stderr, flush=True)


__all__ = ["BuildMetrics"]
