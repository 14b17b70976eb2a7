"""How fast clips come out of shards. A shape comes in, rows go out: our loader beside a plain copy and stock webdataset."""

from __future__ import annotations

import argparse
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Seconds, median_of, timed
from benchmarks.shapes import SHAPES, Shape
from benchmarks.table import Row, render
from data_pipeline.codec import ChannelStatistics, CodecError, find_codec, fit_statistics
from data_pipeline.config import DataConfig
from data_pipeline.loader import ClipLoader
from data_pipeline.order import Order, World
from data_pipeline.shards import DatasetIndex, EncodedSample, ShardWriter, shard_name, write_sidecar

VIEW, EXTRACTOR, SHARDS = "center", "generated", 2
CODECS = ("float16", "int8")
CLIPS_OF_A_VIDEO = 6  # 4 of 24 frames are read
CLIPS_PER_STEP = 8
SAMPLES_PER_SHARD = 32
CPU = torch.device("cpu")


def rows(shape: Shape, width: int, rounds: int) -> list[Row]:
    """Medians over rounds; in a round all read clips, one after the other. Figures of one clip.

    Shards lie in a temporary folder and have just been written, so that they come from the page cache, not from a disk.
    """
    loading = [row for codec in CODECS for row in _codec_rows(codec, shape, width, rounds)]
    return loading + order_rows(shape.planned_samples, rounds)


def order_rows(num_samples: int, rounds: int) -> list[Row]:
    """What it costs to find the first batch: everything is computed anew, as a resumed process does."""
    sizes = [SAMPLES_PER_SHARD] * (num_samples // SAMPLES_PER_SHARD)

    def first_batch(position: int) -> Seconds:
        return timed(lambda: Order(sizes, seed=0, block_shards=8, lanes=240).batch(position, CLIPS_PER_STEP), CPU)

    section = f"order of {len(sizes) * SAMPLES_PER_SHARD:,} samples in shards of {SAMPLES_PER_SHARD}"
    rows = []
    for name, position in (("plan, first batch", 0), ("plan, batch at a tenth", num_samples // 10)):
        seconds = median_of([first_batch(position) for _ in range(min(rounds, 5))])
        rows.append(Row(section=section, name=name, cpu_ms=seconds.cpu * 1e3, wall_ms=seconds.wall * 1e3))
    return rows


def _codec_rows(codec: str, shape: Shape, width: int, rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="slotstream-bench-") as folder:
        root = Path(folder)
        report = write_shards(root, shape, width, codec)
        source = Source(root, shape)
        try:
            readings: dict[str, list[Seconds]] = {name: [] for name in source.readers}
            for number in range(rounds + 1):
                for name, (read, num_clips) in source.readers.items():
                    seconds = timed(read, CPU)
                    if number:  # the first is a warm-up
                        readings[name].append(Seconds(seconds.cpu / num_clips, seconds.wall / num_clips))
        finally:
            source.close()
    section = (
        f"loading a clip of {shape.frames} of {CLIPS_OF_A_VIDEO * shape.frames} frames x {source.num_patches} patches x {width} "
        f"channels, {source.clip_bytes / 1e6:.2f} MB in {codec}"
    )
    return _rows(section, source.clip_bytes, readings, report)


def write_shards(root: Path, shape: Shape, width: int, codec: str) -> dict[str, float]:
    """Videos with features of one view and nothing else, as the build writes them; returns what the codec cost."""
    folder = root / "train"
    folder.mkdir()
    base = _features(shape, width)
    statistics_ = fit_statistics(base) if find_codec(codec).needs_statistics else None
    sidecars, errors = [], CodecError(width)
    for shard_number in range(SHARDS):
        with ShardWriter(folder / shard_name("train", shard_number)) as shard:
            for number in range(shard_number, shape.loader_videos, SHARDS):
                shard.add(_sample(f"video{number:04d}", np.roll(base, number, axis=(0, 1)), codec, statistics_, errors))
        sidecars.append(write_sidecar(shard.path, shard, settings="", skipped=[], codec_error=errors.to_json()))
    made = {"extractor": EXTRACTOR, "layer": "last_block", "width": width, "patch_size": 14, "grid": list(shape.loader_grid)}
    made |= {"image_size": 336, "resize": "stretch", "fingerprint": "", "codec": codec, "views": [VIEW]}
    made |= {"statistics": statistics_.to_json()} if statistics_ else {}
    dataset = {"source": "generated", "split": "train", "background_labelled": True}
    DatasetIndex.merge(sidecars, dataset, made, None).save(folder)
    return CodecError.report([errors.to_json()])


def _features(shape: Shape, width: int) -> np.ndarray:
    """Like a ViT's raw output: every channel has its own size and mean, a few are massive. Shapes: float32 (T, P, E)."""
    random = np.random.default_rng(0)
    size = (CLIPS_OF_A_VIDEO * shape.frames, shape.loader_grid[0] * shape.loader_grid[1], width)
    gain, mean = np.exp(0.5 * random.standard_normal(width)), random.standard_normal(width)
    mean[:: max(1, width // 4)] *= 30
    return random.standard_normal(size, dtype=np.float32) * gain.astype(np.float32) + mean.astype(np.float32)


def _sample(key: str, values: np.ndarray, codec: str, channels: ChannelStatistics | None, errors: CodecError) -> EncodedSample:
    stored = find_codec(codec).encode(values, channels)
    errors.add(values, find_codec(codec).decode(stored, channels), stored.nbytes)
    return EncodedSample(key=key, num_frames=len(values), size=(1, 1), num_instances=None, features={VIEW: stored})


class Source:
    """Ways to the same clips, in batches of CLIPS_PER_STEP. `readers` are (read, number of clips that it reads)."""

    def __init__(self, root: Path, shape: Shape) -> None:
        self.shape, self.root = shape, root
        self.num_patches = shape.loader_grid[0] * shape.loader_grid[1]
        self.config = DataConfig(root=str(root), features=EXTRACTOR, image_size=336, clip_len=shape.frames, views=[VIEW])
        self.loaders = {"loader": self._loader(), "unchecked": self._loader()}
        self.loaders["unchecked"].dataset._check_sums = False
        self.steps = max(1, 4 * shape.loader_videos // CLIPS_PER_STEP)
        dataset = self.loaders["loader"].dataset
        self.clip_bytes = shape.frames * dataset.frame_bytes
        self.places = self._places(dataset.index)
        self.maps = [_map(Path(dataset.folder) / shard["name"]) for shard in dataset.index.shards]
        # As many batches as the loader has under way, so that both write to memory as near to the processor.
        buffers = (self.config.prefetch_steps + 2, CLIPS_PER_STEP, self.clip_bytes)
        self.ring = np.zeros(buffers, np.uint8)
        many = self.steps * CLIPS_PER_STEP
        self.readers: dict[str, tuple[Callable[[], None], int]] = {
            "copy": (self.copy, many),
            "loader": (lambda: self.load("loader"), many),
            "unchecked": (lambda: self.load("unchecked"), many),
            "webdataset": (self.webdataset, shape.loader_videos),
        }

    def copy(self) -> None:
        """The same bytes of as many clips, from the page cache, by memcpy into as many batches."""
        for number in range(self.steps * CLIPS_PER_STEP):
            shard, offset = self.places[number % len(self.places)]
            step, row = divmod(number, CLIPS_PER_STEP)
            np.copyto(self.ring[step % len(self.ring), row], self.maps[shard][offset : offset + self.clip_bytes])

    def load(self, name: str) -> None:
        """Steps of the loader. It begins and ends with its queue full, so that the round pays for just what it takes."""
        loader = self.loaders[name]
        for _ in range(self.steps):
            next(loader)
        while loader.queue_depth() < self.config.prefetch_steps:
            time.sleep(2e-4)

    def webdataset(self) -> None:
        """Read whole samples one after the other, decode the arrays, keep the first clip of each, collate."""
        batch: list[np.ndarray] = []
        for features in self._decoded():
            batch.append(features[: self.shape.frames])
            if len(batch) == CLIPS_PER_STEP:
                np.stack(batch)
                batch.clear()

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()

    def _loader(self) -> ClipLoader:
        return ClipLoader(self.config, World(), seed=0, global_batch=CLIPS_PER_STEP)

    def _places(self, index: DatasetIndex) -> list[tuple[int, int]]:
        """(shard, offset) of every clip, shuffled."""
        places = [
            (sample.shard, sample.members["features"][VIEW]["data_offset"] + clip * self.clip_bytes)
            for sample in index.samples
            for clip in range(CLIPS_OF_A_VIDEO)
        ]
        return [places[number] for number in np.random.default_rng(0).permutation(len(places))]

    def _decoded(self) -> Iterator[np.ndarray]:
        import webdataset

        shards = sorted(str(path) for path in (self.root / "train").glob("*.tar"))
        for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
            yield sample[f"{VIEW}.features.npy"]


def _map(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)


def _rows(section: str, clip_bytes: int, readings: dict[str, list[Seconds]], report: dict[str, float]) -> list[Row]:
    copy, copy_cpu = (_speed_ratio(readings, "loader", "copy", kind) for kind in ("wall", "cpu"))
    stock = _speed_ratio(readings, "loader", "webdataset", "cpu")
    sums = 1 - _speed_ratio(readings, "loader", "unchecked", "cpu")
    lines = {
        "loader": ("ClipLoader", None, ""),
        "unchecked": ("  without checksums", None, f"CRC-32C takes {100 * sums:.0f} % of a CPU second's clips"),
        "copy": ("for comparison: copy in memory", copy, f"ClipLoader has {copy:.2f} of its speed, {copy_cpu:.2f} by CPU time"),
        "webdataset": ("for comparison: stock webdataset", stock, f"ClipLoader gives {stock:.1f} times the clips a CPU second"),
    }
    timed_rows = [
        _row(section, name, median_of(readings[key]), clip_bytes, ratio, beside) for key, (name, ratio, beside) in lines.items()
    ]
    size, error = report["bytes_vs_float16"], report["err_std"]
    beside = f"{size:.4f} of float16's bytes; error {error:.4f} of a channel's deviation"
    return [*timed_rows, Row(section=section, name="size and error", ratio=size, beside=beside)]


def _row(section: str, name: str, clip: Seconds, clip_bytes: int, ratio: float | None, beside: str) -> Row:
    return Row(
        section=section,
        name=name,
        cpu_ms=clip.cpu * 1e3,
        wall_ms=clip.wall * 1e3,
        clips_per_s=1 / clip.wall,
        mb_per_s=clip_bytes / 1e6 / clip.wall,
        ratio=ratio,
        beside=beside,
    )


def _speed_ratio(readings: dict[str, list[Seconds]], one: str, other: str, kind: str) -> float:
    """Median over rounds of time(other) / time(one): both of a round saw the same machine."""
    pairs = zip(readings[one], readings[other], strict=True)
    return statistics.median(getattr(theirs, kind) / getattr(ours, kind) for ours, theirs in pairs)


def main() -> None:
    """`python -m benchmarks.loader_cost`: these rows alone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader_cost", description="Measure the loader and the order.")
    parser.add_argument("--shape", choices=SHAPES, default="movi_c_small", help="default: movi_c_small, 24 x 24 patches")
    parser.add_argument("--width", type=int, default=384, help="channels of the features (default: 384, ViT-S)")
    parser.add_argument("--steps", type=int, default=7, help="measured rounds of each figure (default: 7)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(render(rows(SHAPES[options.shape], options.width, options.steps)))


if __name__ == "__main__":
    main()
