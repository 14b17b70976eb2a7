"""How fast shards come over a network that costs nothing. `python -m benchmarks.remote_cost [MB [ROUNDS]]`: a web server's answer
read and thrown away, beside a shard that is fetched, verified, synced to disk, published and opened.

A size comes in, rows go out. Server and reader share this machine: the figures bound what a fast network could bring.
"""

from __future__ import annotations

import hashlib
import http.client
import http.server
import statistics
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Seconds, timed
from benchmarks.table import Row, render
from data_pipeline.codec import CODECS, CodecError
from data_pipeline.config import RemoteConfig
from data_pipeline.shards import DatasetIndex, EncodedSample, ShardWriter, shard_name, write_sidecar
from data_pipeline.store import ShardDataset

SECTION = "remote shards, over loopback"
GRID, WIDTH, FRAMES, WINDOW = (24, 24), 384, 24, 4
CPU = torch.device("cpu")


def rows(num_mb: int = 128, rounds: int = 5) -> list[Row]:
    """Medians over rounds; in a round each way reads the same shard, one after the other."""
    with tempfile.TemporaryDirectory(prefix="slotstream-bench-") as folder:
        index = _write_shard(Path(folder), num_mb)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            ways = {
                "for comparison: plain GET": partial(_get, server.server_port, index, False),
                "for comparison: plain GET + sha256": partial(_get, server.server_port, index, True),
                "whole shard into the cache": partial(_fetch, server.server_port, index),
            }
            readings: dict[str, list[Seconds]] = {name: [] for name in ways}
            for number in range(rounds + 1):
                for name, way in ways.items():
                    seconds = timed(way, CPU)
                    if number:
                        readings[name].append(seconds)
        finally:
            server.shutdown()
            server.server_close()
    return _rows(readings, int(index.shards[0]["bytes"]))


def _rows(readings: dict[str, list[Seconds]], size: int) -> list[Row]:
    cpus = {name: statistics.median(seconds.cpu for seconds in taken) for name, taken in readings.items()}
    walls = {name: statistics.median(seconds.wall for seconds in taken) for name, taken in readings.items()}
    plain = cpus["for comparison: plain GET + sha256"]
    return [
        Row(
            section=SECTION,
            name=name,
            cpu_ms=1e3 * cpus[name],
            wall_ms=1e3 * walls[name],
            mb_per_s=size / walls[name] / 1e6,
            beside="" if name.startswith("for") else f"{cpus[name] / plain:.2f} x the CPU time of plain GET + sha256",
        )
        for name in readings
    ]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...


def _get(port: int, index: DatasetIndex, hashed: bool) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", f"/train/{index.shards[0]['name']}")
    answer, buffer = connection.getresponse(), memoryview(bytearray(1 << 18))
    sha256 = hashlib.sha256()
    while got := answer.readinto(buffer):
        if hashed:
            sha256.update(buffer[:got])
    connection.close()


def _fetch(port: int, index: DatasetIndex) -> None:
    with tempfile.TemporaryDirectory(prefix="slotstream-bench-") as cache:
        dataset = ShardDataset.open(f"http://127.0.0.1:{port}/train", remote=RemoteConfig(cache_dir=cache))
        dataset.features(0, "center", 0, WINDOW)
        dataset.close()


def _write_shard(root: Path, num_mb: int) -> DatasetIndex:
    """One shard of about so many MB, features only."""
    folder = root / "train"
    folder.mkdir()
    random = np.random.default_rng(0)
    values = random.standard_normal((FRAMES, GRID[0] * GRID[1], WIDTH), dtype=np.float32)
    stored = CODECS["float16"].encode(values)
    with ShardWriter(folder / shard_name("train", 0)) as shard:
        for number in range(max(1, num_mb * 1_000_000 // stored.nbytes)):
            shard.add(
                EncodedSample(
                    key=f"video{number:04d}", num_frames=FRAMES, size=(1, 1), num_instances=None, features={"center": stored}
                )
            )
    sidecar = write_sidecar(shard.path, shard, settings="", skipped=[], codec_error=CodecError(WIDTH).to_json())
    made = {"extractor": "generated", "layer": "last_block", "width": WIDTH, "patch_size": 14, "grid": list(GRID)}
    made |= {"image_size": 336, "resize": "stretch", "fingerprint": "", "codec": "float16", "views": ["center"]}
    index = DatasetIndex.merge([sidecar], {"source": "generated", "split": "train", "background_labelled": True}, made, None)
    index.save(folder)
    return index


if __name__ == "__main__":
    print(render(rows(*(int(word) for word in sys.argv[1:]))))
