"""A build's progress for Prometheus. Counts of all ranks in, http://address:port/metrics out. Part of data_pipeline.build.

Rank 0 serves for all ranks: it knows their sum. There is nothing to find where neither a launcher made a run folder nor
targets_dir is set, so nothing is served there.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

from prometheus_client import Counter, Gauge

from data_pipeline import targets
from data_pipeline.config import BuildConfig
from data_pipeline.metrics_access import AccessError
from data_pipeline.metrics_server import MetricsServer

SCRAPE_WITHIN_S = 10.0  # a short build waits so long for Prometheus to see how it ended
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
        run_dir = os.environ.get("SLOTSTREAM_RUN_DIR")
        self._run = Path(run_dir) if run_dir else None
        self._listing: targets.Listing | None = None
        out = Path(config.out).absolute()
        self._server = self._serve(config, out)
        registry = self._server.registry
        self._counters = {name: Counter(name, text, registry=registry) for name, text in _COUNTERS.items()}
        self._gauges = {name: Gauge(name, text, registry=registry) for name, text in _GAUGES.items()}
        self._gauges["slotstream_build_ranks"].set(ranks)
        info = {"out": out.name, "source": config.source.name, "codec": config.codec}
        info |= {"features": getattr(config.features, "name", "")}
        Gauge("slotstream_build_info", "What is built; always 1.", list(info), registry=registry).labels(**info).set(1)
        self._told = dict.fromkeys(_COUNTERS, 0)

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

    def exposition(self) -> bytes:
        """The text that a scrape would get now."""
        return self._server.exposition()

    def __enter__(self) -> BuildMetrics:
        return self

    def __exit__(self, *error: object) -> None:
        if self._listing is not None:
            self._server.wait_for_scrape(SCRAPE_WITHIN_S, expected=self._listing.copy is not None)
            self._listing.close()
        try:
            self._server.close(self._run and self._run / "monitoring" / "metrics_build.prom")
        except OSError as error:
            _warn(f"the last values of the metrics are lost: {error}; nothing else is")

    def _serve(self, config: BuildConfig, out: Path) -> MetricsServer:
        if not self._run and targets.watched_folder(out, config.targets_dir) is None:
            return MetricsServer(None)
        try:
            server = MetricsServer(config.metrics_address, config.metrics_access)
        except AccessError as error:
            _warn(f"no metrics: {error.strerror}; mend it for the next call; the build goes on")
            return MetricsServer(None)
        except OSError as error:
            _warn(f"no metrics: {error}; metrics_address must be one of this machine; the build goes on")
            return MetricsServer(None)
        attempt, node = os.environ.get("SLOTSTREAM_ATTEMPT", "1"), os.environ.get("SLOTSTREAM_NODE", socket.gethostname())
        folder = self._run or out  # without a run folder the list is named after the shards' folder
        group = targets.target_group(server.target, run=folder.name, attempt=attempt, node=node, rank=0, **server.labels)
        path = folder / "monitoring" / "targets.json"
        self._listing = targets.Listing(path, [group], config.targets_dir, _warn, in_run_folder=self._run is not None)
        return server


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


__all__ = ["BuildMetrics"]
