"""Store: reads a window of one sample out of a split's shards, and checks every byte that it reads.

Comes in: a folder with index.json and shards. Goes out: features (count, P, E), frames, instance ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.codec import CODECS
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.shard_files import LocalFiles, ShardFiles
from data_pipeline.shards import INDEX_NAME, DatasetIndex, Sample, crc32c, decode_image
from data_pipeline.views import crop_instance_ids


class ShardDataset:
    """A split on disk. Safe to use from several threads."""

    def __init__(self, folder: Path, index: DatasetIndex) -> None:
        self.folder = folder
        self.index = index
        codec = str(index.features["codec"])
        if codec not in CODECS:
            raise DataError(
                f"{folder}: codec={codec}; known are {', '.join(CODECS)}; update Slotstream or build the shards again"
            )
        self.codec = CODECS[codec]
        self.files: ShardFiles = LocalFiles(folder, index)

    @staticmethod
    def open(folder: str | Path) -> ShardDataset:
        """Raises DataError when the index or a shard is missing, or a shard has another size than the index says."""
        folder = Path(folder)
        dataset = ShardDataset(folder, DatasetIndex.load(folder))
        dataset.files.check()
        return dataset

    def __len__(self) -> int:
        return len(self.index.samples)

    def close(self) -> None:
        self.files.close()

    def check(self, expected: DataConfig, views: Sequence[str] | None = None) -> None:
        """Raise DataError unless the shards hold the features that `expected` asks for (and `views`, by default its own)."""
        stored = self.index.features
        rebuild = "build the shards again"
        size = expected.image_size
        rules: tuple[tuple[str, Any, Any, str], ...] = (
            ("data.features", expected.features, stored["extractor"], f"{rebuild} with features={expected.features}"),
            ("data.layer", expected.layer, stored["layer"], f"{rebuild} with features.layer={expected.layer}"),
            ("data.image_size", size, stored["image_size"], f"{rebuild} with source.image_size={size}"),
        )
        for key, wanted, found, remedy in rules:
            if wanted != found:
                raise DataError(
                    f"{self.folder}: {key}={wanted}, but the shards hold {found}; both must be the same; "
                    f"set {key}={found} or {remedy}"
                )
        for view in expected.views if views is None else views:
            if view not in stored["views"]:
                raise DataError(
                    f"{self.folder}: view {view} of data.views is not stored; the shards hold {', '.join(stored['views'])}; "
                    f"change data.views or {rebuild} with it in source.train_views"
                )

    def features(self, sample_id: int, view: str, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
        """A window of frames, by one positioned read into `out` where that is given (contiguous, in the codec's decoded dtype).

        Shapes: (count, P, E). Raises DataError for a damaged or missing part, naming shard, sample and frames.
        """
        sample = self.index.samples[sample_id]
        self._check_window(sample, start, count)
        place = sample.members["features"].get(view)
        if place is None:
            stored = ", ".join(sample.members["features"])
            raise DataError(f"{self._where(sample)}: view {view} is not stored; there are {stored}; change data.views")
        shape = (count, self.index.num_patches, int(self.index.features["width"]))
        direct = out is not None and self.codec.stored == self.codec.decoded == out.dtype
        raw = out if direct and out is not None else np.empty(shape, self.codec.stored)
        assert raw.shape == shape and raw.flags.c_contiguous, (raw.shape, shape)
        piece = int(place["frame_bytes"])
        read = raw.reshape(-1).view(np.uint8).reshape(count, piece)
        self._read_into(sample, int(place["data_offset"]) + start * piece, read)
        for number, expected in enumerate(place["frame_crc32c"][start : start + count]):
            self._check_crc(sample, f"features {view}, frame {start + number}", read[number], expected)
        if direct:
            return raw
        values = self.codec.decode(raw)
        if out is None:
            return values
        out[...] = values
        return out

    def frames(self, sample_id: int, start: int, count: int, view: str = "center") -> np.ndarray | None:
        """What a view shows at native size, uint8 (count, h, w, 3); None where frames were not kept."""
        return self._images(sample_id, "frames", start, count, view)

    def instance_ids(self, sample_id: int, start: int, count: int, view: str = "center") -> np.ndarray | None:
        """What a view shows at native size, uint8 or uint16 (count, h, w); None where the video is not annotated."""
        return self._images(sample_id, "ids", start, count, view)

    def metadata(self, sample_id: int) -> dict[str, Any]:
        """What the source says about the video."""
        sample = self.index.samples[sample_id]
        place = sample.members["meta"]
        return json.loads(self._read_checked(sample, "meta.json", place["offset"], place["length"], place["crc32c"]))

    def _images(self, sample_id: int, part: str, start: int, count: int, view: str) -> np.ndarray | None:
        sample = self.index.samples[sample_id]
        self._check_window(sample, start, count)
        places = sample.members[part]
        if places is None:
            return None
        images = [self._image(sample, part, places, number) for number in range(start, start + count)]
        stored = self.index.features
        return crop_instance_ids(np.stack(images), view, int(stored["image_size"]), str(stored["resize"]), sample.key)

    def _image(self, sample: Sample, part: str, places: Mapping[str, Any], number: int) -> np.ndarray:
        offset, length, crc = (places[name][number] for name in ("offset", "length", "crc32c"))
        data = self._read_checked(sample, f"{part} {number}", offset, length, crc)
        try:
            return decode_image(data)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self._where(sample)}: {part} {number}: {error}; an image is needed; build the shard again"
            ) from None

    def _read_checked(self, sample: Sample, part: str, offset: int, length: int, crc: int) -> bytes:
        buffer = np.empty(length, np.uint8)
        self._read_into(sample, offset, buffer)
        self._check_crc(sample, part, buffer, crc)
        return buffer.tobytes()

    def _read_into(self, sample: Sample, offset: int, buffer: np.ndarray) -> None:
        view = memoryview(buffer.reshape(-1).data)
        try:
            done = self.files.read_into(sample.shard, offset, view)
        except OSError as error:
            raise DataError(f"{self._where(sample)}: {error}; the shard must be readable; mend the disk or build again") from None
        if done < len(view):
            raise DataError(
                f"{self._where(sample)}: the shard ends {len(view) - done} bytes early; it must be whole; "
                f"delete it and build again"
            )

    def _check_window(self, sample: Sample, start: int, count: int) -> None:
        if not (start >= 0 and count >= 1 and start + count <= sample.frames):
            raise DataError(
                f"{self._where(sample)}: frames [{start}, {start + count}) wanted; it has {sample.frames}; change data.clip_len"
            )

    def _check_crc(self, sample: Sample, part: str, data: np.ndarray, expected: int) -> None:
        found = crc32c(data)
        if found != expected:
            raise DataError(
                f"{self._where(sample)}, {part}: crc32c={found:08x}, the index has {expected:08x}; the bytes are damaged; "
                f"delete the shard and build again"
            )

    def _where(self, sample: Sample) -> str:
        return f"{self.files.where(sample.shard)}, sample {sample.key}"


def find_splits(folder: str | Path) -> list[Path]:
    """The folders with an index at or just below `folder`. Raises DataError when there is none."""
    folder = Path(folder)
    found = [folder] if (folder / INDEX_NAME).exists() else sorted(path.parent for path in folder.glob(f"*/{INDEX_NAME}"))
    if not found:
        raise DataError(
            f"{folder}: no {INDEX_NAME} here or one level below; shards are needed; build them with python -m data_pipeline.build"
        )
    return found


__all__ = ["ShardDataset", "find_splits"]
