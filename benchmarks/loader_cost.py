"""How fast clips come out of shards. A shape comes in, rows go out: our loader beside a plain copy and stock webdataset."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Seconds, median_of, timed
from benchmarks.shapes import Shape
from benchmarks.table import Row
from data_pipeline.codec import CodecError, find_codec
from data_pipeline.config import DataConfig
from data_pipeline.loader import ClipLoader
from data_pipeline.order import World
from data_pipeline.shards import DatasetIndex, EncodedSample, ShardWriter, shard_name, write_sidecar

VIEW, EXTRACTOR, SHARDS, CODEC = "center", "generated", 2, "float16"
CLIPS_PER_STEP = 2
NAMES = {"loader": "ClipLoader", "copy": "for comparison: copy in memory", "webdataset": "for comparison: stock webdataset"}
CPU = torch.device("cpu")


def rows(shape: Shape, width: int, rounds: int) -> list[Row]:
    """Medians over rounds; in a round the three read the same number of clips, one after the other.

    Shards lie in a temporary folder and have just been written, so that they come from the page cache, not from a disk.
    """
    with tempfile.TemporaryDirectory(prefix="slotstream-bench-") as folder:
        root = Path(folder)
        write_shards(root, shape, width)
        source = Source(root, shape, width)
        try:
            readers = {"copy": source.copy, "loader": source.load, "webdataset": source.webdataset}
            for read in readers.values():
                read()
            readings: dict[str, list[Seconds]] = {name: [] for name in readers}
            for _ in range(rounds):
                for name, read in readers.items():
                    readings[name].append(timed(read, CPU))
        finally:
            source.close()
    return _rows(shape, width, source, readings)


def write_shards(root: Path, shape: Shape, width: int) -> None:
    """Videos of two clips with features of one view and nothing else, as the build writes them."""
    folder = root / "train"
    folder.mkdir()
    random = np.random.default_rng(0)
    num_frames, patches = 2 * shape.frames, shape.loader_grid[0] * shape.loader_grid[1]
    sidecars = []
    for shard_number in range(SHARDS):
        with ShardWriter(folder / shard_name("train", shard_number)) as shard:
            for number in range(shard_number, shape.loader_videos, SHARDS):
                values = random.standard_normal((num_frames, patches, width), dtype=np.float32)
                features = {VIEW: find_codec(CODEC).encode(values)}
                shard.add(
                    EncodedSample(
                        key=f"video{number:04d}", num_frames=num_frames, size=(1, 1), num_instances=None, features=features
                    )
                )
        sidecars.append(write_sidecar(shard.path, shard, settings="", skipped=[], codec_error=CodecError(width).to_json()))
    made = {"extractor": EXTRACTOR, "layer": "last_block", "width": width, "patch_size": 14, "grid": list(shape.loader_grid)}
    made |= {"image_size": 336, "resize": "stretch", "fingerprint": "", "codec": CODEC, "views": [VIEW]}
    dataset = {"source": "generated", "split": "train", "background_labelled": True}
    DatasetIndex.merge(sidecars, dataset, made, None).save(folder)


class Source:
    """Three ways to the same number of clips, in batches of CLIPS_PER_STEP."""

    def __init__(self, root: Path, shape: Shape, width: int) -> None:
        self.shape, self.root = shape, root
        self.clip_shape = (shape.frames, shape.loader_grid[0] * shape.loader_grid[1], width)
        self.clip_bytes = 2 * int(np.prod(self.clip_shape))
        self.num_clips = shape.loader_videos
        config = DataConfig(root=str(root), features=EXTRACTOR, image_size=336, clip_len=shape.frames, views=[VIEW])
        self.loader = ClipLoader(config, World(), seed=0, global_batch=CLIPS_PER_STEP)
        self.ahead = config.prefetch_steps
        self.everything = np.random.default_rng(1).integers(0, 255, (self.num_clips, self.clip_bytes), dtype=np.uint8)
        self.target = np.empty((CLIPS_PER_STEP, self.clip_bytes), np.uint8)

    def copy(self) -> None:
        """The bytes of as many clips, each from its own place, by memcpy into a batch that is used again."""
        for first in range(0, self.num_clips, CLIPS_PER_STEP):
            np.copyto(self.target, self.everything[first : first + CLIPS_PER_STEP])

    def load(self) -> None:
        """Steps of the loader. It begins and ends with its queue full, so that the round pays for just what it takes."""
        for _ in range(self.num_clips // CLIPS_PER_STEP):
            next(self.loader)
        while self.loader.queue_depth() < self.ahead:
            time.sleep(1e-4)

    def webdataset(self) -> None:
        """Read whole samples one after the other, decode the arrays, keep the first clip of each, collate."""
        batch: list[np.ndarray] = []
        for features in self._decoded():
            batch.append(features[: self.shape.frames])
            if len(batch) == CLIPS_PER_STEP:
                torch.from_numpy(np.stack(batch))
                batch.clear()

    def _decoded(self) -> Iterator[np.ndarray]:
        import webdataset

        shards = sorted(str(path) for path in (self.root / "train").glob("*.tar"))
        for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
            yield sample[f"{VIEW}.features.npy"]

    def close(self) -> None:
        self.loader.close()


def _rows(shape: Shape, width: int, source: Source, readings: dict[str, list[Seconds]]) -> list[Row]:
    section = (
        f"loading a clip of {shape.frames} frames x {source.clip_shape[1]} patches x {width} channels, "
        f"{source.clip_bytes / 1e6:.2f} MB in {CODEC}"
    )
    loader, copy, stock = (_row(section, name, readings[key], source) for key, name in NAMES.items())
    to_copy, to_stock = (_speed_ratio(readings, "loader", other) for other in ("copy", "webdataset"))
    return [
        loader,
        replace(copy, ratio=to_copy, beside=f"ClipLoader has {to_copy:.2f} of its speed"),
        replace(stock, ratio=to_stock, beside=f"ClipLoader is {to_stock:.1f} times as fast"),
    ]


def _row(section: str, name: str, readings: list[Seconds], source: Source) -> Row:
    """Figures of one clip."""
    seconds = median_of(readings)
    clip = Seconds(seconds.cpu / source.num_clips, seconds.wall / source.num_clips)
    return Row(
        section=section,
        name=name,
        cpu_ms=clip.cpu * 1e3,
        wall_ms=clip.wall * 1e3,
        clips_per_s=1 / clip.wall,
        mb_per_s=source.clip_bytes / 1e6 / clip.wall,
    )


def _speed_ratio(readings: dict[str, list[Seconds]], one: str, other: str) -> float:
    """Median over rounds of wall(other) / wall(one): both of a round saw the same machine."""
    pairs = zip(readings[one], readings[other], strict=True)
    return statistics.median(theirs.wall / ours.wall for ours, theirs in pairs)
