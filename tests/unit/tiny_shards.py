"""Small splits of shards for tests, written without a source or an extractor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.codec import CODECS, ChannelStatistics, CodecError, fit_statistics
from data_pipeline.config import DataConfig
from data_pipeline.shards import DatasetIndex, EncodedSample, ShardWriter, encode_image, shard_name, write_sidecar

GRID, WIDTH, SIZE = (2, 3), 5, (7, 9)
VIEWS = ("center", "center+hflip")


def sample_features(key: str, num_frames: int, view: str, width: int = WIDTH) -> np.ndarray:
    """Different numbers for every sample, view, frame, patch and channel. Shapes: float32 (T, P, E)."""
    seed = sum(ord(letter) * 31**place for place, letter in enumerate(key + view)) % 2**32
    return np.random.default_rng(seed).normal(size=(num_frames, GRID[0] * GRID[1], width)).astype(np.float32)


def statistics(codec: str) -> ChannelStatistics | None:
    """What the codec needs; fitted on a few samples, as a build does."""
    if not CODECS[codec].needs_statistics:
        return None
    return fit_statistics(sample_features(f"fit {number}", 4, "center").reshape(-1, WIDTH) for number in range(3))


def stored_features(key: str, num_frames: int, view: str, codec: str = "float16") -> np.ndarray:
    return CODECS[codec].encode(sample_features(key, num_frames, view), statistics(codec))


def decoded_features(key: str, num_frames: int, view: str, codec: str = "float16") -> np.ndarray:
    """What a reader must get. Shapes: float32 (T, P, E)."""
    return CODECS[codec].decode(stored_features(key, num_frames, view, codec), statistics(codec))


def make_sample(
    key: str, num_frames: int, views: Sequence[str] = VIEWS, codec: str = "float16", frames: str = "png", pictures: bool = True
) -> EncodedSample:
    random = np.random.default_rng(num_frames)
    pixels = random.integers(0, 256, (num_frames, *SIZE, 3), dtype=np.uint8)
    ids = random.integers(0, 400, (num_frames, *SIZE)).astype(np.uint16)
    return EncodedSample(
        key=key,
        num_frames=num_frames,
        size=SIZE,
        num_instances=3,
        features={view: stored_features(key, num_frames, view, codec) for view in views},
        image_suffix=frames,
        images=[encode_image(frame, frames) for frame in pixels] if pictures else None,
        ids=[encode_image(frame, "png") for frame in ids] if pictures else None,
        metadata={"fps": 12, "name": key},
    )


def write_split(
    root: Path,
    split: str = "train",
    frames: Sequence[Sequence[int]] = ((4, 6), (8,)),
    codec: str = "float16",
    pictures: bool = True,
    **features: Any,
) -> Path:
    """`frames[shard]` lists the number of frames of each sample of a shard. Returns the split's folder."""
    folder = root / split
    folder.mkdir(parents=True)
    sidecars = []
    for number, lengths in enumerate(frames):
        error = CodecError(WIDTH)
        with ShardWriter(folder / shard_name(split, number)) as shard:
            for row, length in enumerate(lengths):
                shard.add(make_sample(f"video-{number}_{row}", length, codec=codec, pictures=pictures))
        sidecars.append(write_sidecar(shard.path, shard, settings="test", skipped=[], codec_error=error.to_json()))
    made = {
        "extractor": "fake",
        "layer": "last_block",
        "width": WIDTH,
        "patch_size": 4,
        "grid": list(GRID),
        "image_size": 12,
        "resize": "stretch",
        "fingerprint": "f" * 64,
        "codec": codec,
        "views": list(VIEWS),
    } | features
    if (fitted := statistics(codec)) is not None:
        made["statistics"] = fitted.to_json()
    dataset = {"source": "fake", "split": split, "background_labelled": True}
    DatasetIndex.merge(sidecars, dataset, made, None).save(folder)
    return folder


def data_config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"root": str(root), "features": "fake", "image_size": 12, "clip_len": 2, **changes})


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
