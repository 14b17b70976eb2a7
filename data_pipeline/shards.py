"""Shards: one plain tar of samples, its side-car, and the index of a split.

Comes in: samples with encoded features. Goes out: `<split>-000000.tar` that stock webdataset reads, `<split>-000000.json` beside
it (what lies where, with checksums), and `index.json`, all side-cars in one. A sample `<key>` has the members

    <key>.<view>.features.npy    (T, P, E), frame after frame: a window of frames is one positioned read
    <key>.frame_0000.jpg         each frame at native size (jpg or png)
    <key>.ids_0000.png           each frame's instance ids at native size, lossless, 8 or 16 bit
    <key>.meta.json              what the source says about the video

Everything in a shard follows from the samples alone: members sorted, owner and time zero. The same input gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from awscrt.checksums import crc32c as crc32c_of_bytes

from data_pipeline.errors import DataError
from data_pipeline.files import replacing, sha256_of, write_atomically

INDEX_FORMAT = "slotstream-index/1"
SHARD_FORMAT = "slotstream-shard/1"
INDEX_NAME = "index.json"


def crc32c(data: bytes | np.ndarray) -> int:
    """CRC-32C of bytes or of a contiguous array, without a copy."""
    return int(crc32c_of_bytes(data if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)))


def canonical(values: Any) -> bytes:
    """The one JSON text of plain values, for hashing and for files that must be reproducible."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest(values: Any) -> str:
    return hashlib.sha256(canonical(values)).hexdigest()


def view_member(view: str) -> str:
    """Member suffix of a view's features: `center+hflip` is stored as `center_hflip.features.npy`."""
    return f"{view.replace('+', '_')}.features.npy"


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def read_json(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """Raises DataError when the file is missing, cut off or no JSON object."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {what} must be there; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}; {what} must be one whole JSON object; {remedy}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds a JSON {type(values).__name__}; {what} must be one whole JSON object; {remedy}")
    return values


def _check_shards(shards: Any, path: str) -> None:
    """A shard's name becomes part of a path or a URL, its hash a file's name: neither may lead anywhere else."""
    for shard in shards:
        name, sha256 = str(shard["name"]), str(shard["sha256"])
        if not re.fullmatch(r"[^\W_][^/\\?#%\x00-\x1f]*\.tar", name) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise DataError(f"{path}: shard {name!r}; a shard has a plain name and a sha256; build the shards again")


class _HashedFile:
    """Passes writes on and hashes them, so that a shard need not be read again for its sha256."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.position = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.position += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.position


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """A sample ready to be stored.

    Shapes: features[view] (T, P, E) in the codec's stored dtype. `images` and `ids` hold one encoded file per frame.
    """

    key: str
    num_frames: int
    size: tuple[int, int]
    num_instances: int | None
    features: Mapping[str, np.ndarray]
    image_suffix: str = "jpg"
    images: list[bytes] | None = None
    ids: list[bytes] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


class ShardWriter:
    """Writes one shard: `with ShardWriter(...) as shard: shard.add(sample)`. Nothing is left behind when the block raises."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples: list[dict[str, Any]] = []
        self.bytes = 0
        self.sha256 = ""

    def __enter__(self) -> ShardWriter:
        self._stack = contextlib.ExitStack()
        self._file = _HashedFile(self._stack.enter_context(replacing(self.path)))
        self._tar = self._stack.enter_context(
            tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT, copybufsize=1 << 20)  # type: ignore[arg-type]
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        self.bytes, self.sha256 = self._file.position, self._file.sha256.hexdigest()

    def add(self, sample: EncodedSample) -> None:
        """Append a sample's members, sorted by name."""
        files: dict[str, bytes] = {"meta.json": canonical(dict(sample.metadata))}
        for view, values in sample.features.items():
            files[view_member(view)] = _npy(values)
        for prefix, suffix, images in (("frame", sample.image_suffix, sample.images), ("ids", "png", sample.ids)):
            for number, data in enumerate(images or ()):
                files[f"{prefix}_{number:04d}.{suffix}"] = data
        offsets = {name: self._append(f"{sample.key}.{name}", files[name]) for name in sorted(files)}
        places = {name: _place(offsets[name], data) for name, data in files.items()}
        self.samples.append(
            {
                "key": sample.key,
                "frames": sample.num_frames,
                "size": list(sample.size),
                "num_instances": sample.num_instances,
                "members": {
                    "features": {
                        view: places[name] | _frame_places(offsets[name], files[name], values)
                        for view, values in sample.features.items()
                        for name in [view_member(view)]
                    },
                    "frames": _columns("frame", sample.image_suffix, sample.images, offsets),
                    "ids": _columns("ids", "png", sample.ids, offsets),
                    "meta": places["meta.json"],
                },
            }
        )

    def _append(self, name: str, data: bytes) -> int:
        """Add one member; returns the offset of its first byte in the shard."""
        entry = tarfile.TarInfo(name)  # owner, group and time are 0, mode 0644
        entry.size = len(data)
        self._tar.addfile(entry, io.BytesIO(data))
        return self._file.position - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _place(offset: int, data: bytes) -> dict[str, Any]:
    return {"offset": offset, "length": len(data), "crc32c": crc32c(data)}


def _frame_places(offset: int, data: bytes, values: np.ndarray) -> dict[str, Any]:
    """Where each frame lies in an npy member: the header comes first, then equal pieces."""
    frame_bytes = values.nbytes // len(values)
    header = len(data) - values.nbytes
    pieces = range(header, len(data), frame_bytes)
    return {
        "data_offset": offset + header,
        "frame_bytes": frame_bytes,
        "frame_crc32c": [crc32c(data[first : first + frame_bytes]) for first in pieces],
    }


def _columns(prefix: str, suffix: str, images: list[bytes] | None, offsets: Mapping[str, int]) -> dict[str, Any] | None:
    """One list per fact instead of one record per frame: a fifth of the index."""
    if images is None:
        return None
    return {
        "suffix": suffix,
        "offset": [offsets[f"{prefix}_{number:04d}.{suffix}"] for number in range(len(images))],
        "length": [len(data) for data in images],
        "crc32c": [crc32c(data) for data in images],
    }


def encode_image(pixels: np.ndarray, suffix: str, quality: int = 95) -> bytes:
    """A frame (H, W, 3) uint8 as jpg or png, or an id map (H, W) uint8/uint16 as png."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if suffix == "jpg":
        # No colour subsampling: small saturated objects would bleed.
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def decode_image(data: bytes) -> np.ndarray:
    """Shapes: (H, W, 3) uint8, or (H, W) uint8 or uint16 for an id map. Raises OSError or ValueError when it is no image."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.array(image)


def sidecar_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def write_sidecar(path: Path, writer: ShardWriter, **facts: Any) -> dict[str, Any]:
    """Written after the shard lies under its real name: a side-car vouches for its shard."""
    sidecar = {
        "format": SHARD_FORMAT,
        "name": path.name,
        "bytes": writer.bytes,
        "sha256": writer.sha256,
        "samples": writer.samples,
        **facts,
    }
    write_atomically(sidecar_path(path), canonical(sidecar))
    return sidecar


def verified_sidecar(path: Path, settings: str) -> dict[str, Any] | None:
    """The side-car of a finished shard that was built with `settings` and whose bytes are the ones it names; else None."""
    try:
        sidecar = read_json(sidecar_path(path), "a side-car", "")
        if sidecar.get("format") != SHARD_FORMAT or sidecar.get("settings") != settings:
            return None
        if not sidecar["samples"]:
            return sidecar
        if path.stat().st_size != sidecar["bytes"] or sha256_of(path) != sidecar["sha256"]:
            return None
        return sidecar
    except (DataError, OSError):
        return None


@dataclass(frozen=True, slots=True)
class Sample:
    """One video in a shard. `members` says where its parts lie: features by view, frames, ids, meta."""

    key: str
    shard: int
    frames: int
    size: tuple[int, int]
    num_instances: int | None
    members: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DatasetIndex:
    """A split: its shards in order, every sample, how the features were made. Equal content has an equal `version`."""

    dataset: Mapping[str, Any]  # source, split, background_labelled
    features: Mapping[str, Any]  # extractor, layer, width, patch_size, grid, image_size, resize, fingerprint, codec, views
    shards: list[dict[str, Any]]  # name, bytes, sha256, samples
    samples: list[Sample]
    skipped: list[dict[str, Any]]  # key, reason
    codec_error: float | None  # RMS, in units of each channel's own deviation

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", digest(self._content()))

    version: str = field(init=False, default="")

    @property
    def background_labelled(self) -> bool:
        return bool(self.dataset["background_labelled"])

    @property
    def grid(self) -> tuple[int, int]:
        return int(self.features["grid"][0]), int(self.features["grid"][1])

    @property
    def has_features(self) -> bool:
        """False where shards hold frames alone."""
        return bool(self.features["views"])

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def _content(self) -> dict[str, Any]:
        return {
            "format": INDEX_FORMAT,
            "dataset": dict(self.dataset),
            "features": dict(self.features),
            "shards": self.shards,
            "samples": [
                {
                    "key": sample.key,
                    "shard": sample.shard,
                    "frames": sample.frames,
                    "size": list(sample.size),
                    "num_instances": sample.num_instances,
                    "members": sample.members,
                }
                for sample in self.samples
            ],
            "skipped": self.skipped,
            "codec_error": self.codec_error,
        }

    def save(self, folder: Path) -> None:
        write_atomically(folder / INDEX_NAME, canonical(self._content() | {"version": self.version}))

    @staticmethod
    def load(folder: Path) -> DatasetIndex:
        """Raises DataError for a missing, cut, foreign or changed index."""
        remedy = "build the shards with python -m data_pipeline.build, or set data.root to where they are"
        return DatasetIndex.parse(read_json(folder / INDEX_NAME, "an index", remedy), str(folder / INDEX_NAME))

    @staticmethod
    def parse(values: Mapping[str, Any], path: str) -> DatasetIndex:
        """The index in what its file holds; `path` is for messages. Raises DataError as `load` does."""
        if values.get("format") != INDEX_FORMAT:
            raise DataError(f"{path}: format={values.get('format')!r}; this version reads {INDEX_FORMAT}; build the shards again")
        try:
            index = DatasetIndex(
                samples=[Sample(**{**sample, "size": tuple(sample["size"])}) for sample in values["samples"]],
                **{name: values[name] for name in ("dataset", "features", "shards", "skipped", "codec_error")},
            )
            _check_shards(index.shards, path)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: {error!r}; an index must hold every field; build the shards again") from None
        if index.version != values.get("version"):
            raise DataError(
                f"{path}: version={str(values.get('version'))[:12]}, its content gives {index.version[:12]}; "
                f"an index must not be edited; build again (finished shards are kept)"
            )
        return index

    @staticmethod
    def merge(
        sidecars: Iterable[Mapping[str, Any]], dataset: Mapping[str, Any], features: Mapping[str, Any], codec_error: float | None
    ) -> DatasetIndex:
        """One index from the side-cars of a split, in order. A shard none of whose videos could be read is left out."""
        shards: list[dict[str, Any]] = []
        samples: list[Sample] = []
        skipped: list[dict[str, Any]] = []
        for sidecar in sidecars:
            skipped += sidecar["skipped"]
            if not sidecar["samples"]:
                continue
            samples += [Sample(shard=len(shards), **{**sample, "size": tuple(sample["size"])}) for sample in sidecar["samples"]]
            shards.append({name: sidecar[name] for name in ("name", "bytes", "sha256")} | {"samples": len(sidecar["samples"])})
        return DatasetIndex(
            dataset=dataset, features=features, shards=shards, samples=samples, skipped=skipped, codec_error=codec_error
        )
