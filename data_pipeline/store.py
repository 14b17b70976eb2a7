"""Store: reads a window of one sample out of a split's shards, and checks every byte that it reads.

Comes in: a folder, or its URL, with index.json and shards. Goes out: features (as stored, or float32), frames, instance ids.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from awscrt.checksums import crc32c as crc32c_of_bytes

from data_pipeline.codec import CODECS, ChannelStatistics
from data_pipeline.config import DataConfig, RemoteConfig
from data_pipeline.errors import DataError
from data_pipeline.remote.address import is_remote, local_path, shown
from data_pipeline.shard_files import LocalFiles, ShardFiles
from data_pipeline.shards import INDEX_NAME, DatasetIndex, Sample, crc32c, decode_image
from data_pipeline.views import crop_instance_ids

READS = 3  # of bytes that came damaged, where they can be had anew


class ShardDataset:
    """A split and its shards. Safe to use from several threads. `read`: auto, mmap or pread (see LocalFiles)."""

    def __init__(self, folder: Path | str, index: DatasetIndex, read: str = "auto", files: ShardFiles | None = None) -> None:
        self.folder = folder  # or, for messages, the URL
        self.index = index
        codec = str(index.features["codec"])
        if codec not in CODECS:
            raise DataError(
                f"{folder}: codec={codec}; known are {', '.join(CODECS)}; update Slotstream or build the shards again"
            )
        self.codec = CODECS[codec]
        self.statistics = self._load_statistics()
        self.files: ShardFiles = LocalFiles(Path(folder), index, read) if files is None else files
        self.bytes_read = 0  # of features and of whole frames
        self._frame = self.codec.frame_dtype(index.num_patches, int(index.features["width"]))
        self._check_sums = True  # off only to measure what checking costs
        self._count_lock = threading.Lock()

    @staticmethod
    def open(root: str | Path, read: str = "auto", remote: RemoteConfig | None = None) -> ShardDataset:
        """A split in a folder, or behind a URL, which is fetched as `remote` says.

        Raises DataError when the index or a shard is missing, or a shard has another size than the index says.
        """
        if is_remote(root):
            from data_pipeline.remote.remote_files import open_remote

            index, files = open_remote(str(root), remote or RemoteConfig())
            return ShardDataset(shown(root), index, read, files)
        folder = local_path(root)
        dataset = ShardDataset(folder, DatasetIndex.load(folder), read)
        dataset.files.check()
        return dataset

    def __len__(self) -> int:
        return len(self.index.samples)

    def close(self) -> None:
        self.files.close()

    def check(self, expected: DataConfig, views: Sequence[str] | None = None) -> None:
        """Raise DataError unless the shards hold the features that `expected` asks for (and `views`, by default its own)."""
        if expected.input == "frames":
            self._check_frames()
            return
        stored = self.index.features
        rebuild = "build the shards again"
        size = expected.image_size
        rules: tuple[tuple[str, Any, Any, str], ...] = (
            ("data.features", expected.features, stored["extractor"], f"{rebuild} with features={expected.features}"),
            ("data.layer", expected.layer, stored["layer"], f"{rebuild} with features.layer={expected.layer}"),
            ("data.image_size", size, stored["image_size"], f"{rebuild} with source.image_size={size}"),
            ("data.codec", expected.codec or stored["codec"], stored["codec"], f"{rebuild} with codec={expected.codec}"),
        )
        for key, wanted, found, remedy in rules:
            if wanted != found and not self.index.has_features:
                raise DataError(
                    f"{self.folder}: the shards hold no features; data.input=features reads them; "
                    f"set data.input=frames or {rebuild} with features={expected.features}"
                )
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

    @property
    def frame_bytes(self) -> int:
        """Bytes of a frame's features as they are stored."""
        return self._frame.itemsize

    @property
    def batch_layout(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """(plain dtype, shape) of a frame's features in a batch."""
        return self.codec.batch_layout(self.index.num_patches, int(self.index.features["width"]))

    def statistics_table(self) -> np.ndarray | None:
        """Mean and scale of every channel, as a batch carries them: float32 (2, E); None where the codec needs none."""
        return None if self.statistics is None else np.stack([self.statistics.mean, self.statistics.scale])

    def features(self, sample_id: int, view: str, start: int, count: int) -> np.ndarray:
        """A window of frames, decoded. Shapes: float32 (count, P, E). Raises what `read_features` raises."""
        stored = np.empty((count, self.frame_bytes), np.uint8)
        self.read_features(sample_id, view, start, count, stored)
        frame = self._frame
        whole = stored.view(frame)[:, 0] if frame.names else stored.view(frame.base).reshape(count, *frame.shape)
        return self.codec.decode(whole, self.statistics)

    def read_features(self, sample_id: int, view: str, start: int, count: int, out: np.ndarray) -> None:
        """A window of frames as they are stored, straight into `out`: count * frame_bytes contiguous bytes of any dtype.

        Raises DataError for a damaged or missing part, naming shard, sample and frames; `out` holds nothing of use then.
        """
        sample = self.index.samples[sample_id]
        self._check_window(sample, start, count)
        place = sample.members["features"].get(view)
        if place is None:
            stored = ", ".join(sample.members["features"])
            raise DataError(f"{self._where(sample)}: view {view} is not stored; there are {stored}; change data.views")
        piece = self.frame_bytes
        if place["frame_bytes"] != piece:
            raise DataError(
                f"{self._where(sample)}: {place['frame_bytes']} bytes a frame; codec {self.index.features['codec']} has {piece}; "
                f"build the shard again"
            )
        frames = out.reshape(-1).view(np.uint8).reshape(count, piece)
        offset = place["data_offset"] + start * piece
        self._read_into(sample, offset, frames)
        for number in range(count if self._check_sums else 0):
            expected = place["frame_crc32c"][start + number]
            if crc32c_of_bytes(frames[number]) != expected:
                part = f"features {view}, frame {start + number}"
                self._check_crc(sample, part, offset + number * piece, frames[number], expected)
        with self._count_lock:
            self.bytes_read += frames.nbytes

    def frames(self, sample_id: int, start: int, count: int, view: str = "center") -> np.ndarray | None:
        """What a view shows at native size, uint8 (count, h, w, 3); None where frames were not kept."""
        return self._images(sample_id, "frames", start, count, view)

    def whole_frames(self, sample_id: int, numbers: Sequence[int]) -> np.ndarray:
        """Frames `numbers` at native size and uncut, uint8 (len(numbers), H, W, 3). Raises DataError."""
        sample = self.index.samples[sample_id]
        places = sample.members["frames"]
        images = {number: self._image(sample, "frames", places, number) for number in sorted(set(numbers))}
        for number, image in images.items():
            if image.shape != (*sample.size, 3):
                raise DataError(
                    f"{self._where(sample)}: frame {number} has shape {image.shape}, the index says {(*sample.size, 3)}; "
                    f"both must agree; build the shard again"
                )
        with self._count_lock:
            self.bytes_read += sum(places["length"][number] for number in images)
        return np.stack([images[number] for number in numbers])

    def instance_ids(self, sample_id: int, start: int, count: int, view: str = "center") -> np.ndarray | None:
        """What a view shows at native size, uint8 or uint16 (count, h, w); None where the video is not annotated."""
        return self._images(sample_id, "ids", start, count, view)

    def metadata(self, sample_id: int) -> dict[str, Any]:
        """What the source says about the video."""
        sample = self.index.samples[sample_id]
        place = sample.members["meta"]
        return json.loads(self._read_checked(sample, "meta.json", place["offset"], place["length"], place["crc32c"]))

    def _check_frames(self) -> None:
        without = [sample.key for sample in self.index.samples if sample.members["frames"] is None]
        if without:
            raise DataError(
                f"{self.folder}: {len(without)} of {len(self)} videos have no frames, for example {without[0]}; "
                f"data.input=frames needs them; build the shards again with frames=jpeg or png"
            )

    def _load_statistics(self) -> ChannelStatistics | None:
        if not self.codec.needs_statistics:
            return None
        values = self.index.features.get("statistics")
        try:
            return ChannelStatistics.from_json(values or {}, int(self.index.features["width"]))
        except DataError as error:
            raise DataError(f"{self.folder}: {error}") from None

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
        if not 0 <= length <= int(self.index.shards[sample.shard]["bytes"]):
            raise DataError(f"{self._where(sample)}, {part}: {length} bytes; it must fit into its shard; build the shards again")
        buffer = np.empty(length, np.uint8)
        self._read_into(sample, offset, buffer)
        self._check_crc(sample, part, offset, buffer, crc)
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

    def _check_crc(self, sample: Sample, part: str, offset: int, data: np.ndarray, expected: int) -> None:
        """Damaged bytes of a shard that can be fetched anew are read again, into the same place."""
        may_help = True
        for attempt in range(READS):
            found = crc32c(data)
            if found == expected:
                return
            if not may_help or attempt + 1 == READS:
                break
            # False also where another thread has mended the shard since these bytes were read: one more look tells.
            may_help = self.files.mend(sample.shard)
            self._read_into(sample, offset, data)
        raise DataError(
            f"{self._where(sample)}, {part}: crc32c={found:08x}, the index has {expected:08x}; the bytes are damaged; "
            f"delete the shard and build again"
        )

    def _where(self, sample: Sample) -> str:
        return f"{self.files.where(sample.shard)}, sample {sample.key}"


def load_index(root: str | Path) -> DatasetIndex:
    """The index of a split in a folder or behind a URL; no shard is looked at. Raises DataError."""
    if is_remote(root):
        from data_pipeline.remote.splits import RemoteSplit

        with contextlib.closing(RemoteSplit(str(root))) as split:
            return split.index
    return DatasetIndex.load(local_path(root))


@overload
def find_splits(root: Path) -> list[Path]: ...


@overload
def find_splits(root: str) -> list[Path] | list[str]: ...


def find_splits(root: str | Path) -> list[Path] | list[str]:
    """The folders, or URLs, with an index at or just below `root`. Raises DataError when there is none."""
    if is_remote(root):
        from data_pipeline.remote.splits import find_remote_splits

        return find_remote_splits(str(root))
    folder = local_path(root)
    found = [folder] if (folder / INDEX_NAME).exists() else sorted(path.parent for path in folder.glob(f"*/{INDEX_NAME}"))
    if not found:
        raise DataError(
            f"{folder}: no {INDEX_NAME} here or one level below; shards are needed; build them with python -m data_pipeline.build"
        )
    return found


__all__ = ["ShardDataset", "find_splits", "load_index"]
