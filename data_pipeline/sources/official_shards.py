"""The WebDataset shards that the released code of SlotContrast, SRL and SSync writes, as a source.

Comes in: a folder with `<dataset>-<split>-000000.tar` and so on. A sample `<key>` has the members

    <key>.video.npy          uint8 (T, H, W, 3), or image.npy uint8 (H, W, 3)
    <key>.segmentations.npy  uint8 (T, H, W, 1) with dense ids, or (T, H, W, I) with a channel for each instance that holds
                             mask * category; (I, H, W) or (H, W, I) for an image; only validation has it

Goes out: Clip. Ids of channels are 1..n in their order; where masks overlap the later channel covers the earlier one, as in the
sources that read the datasets themselves. Other members (forward_flow.npy) are left alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.clip import KEY_PATTERN, Clip
from data_pipeline.config import OfficialShardsSource
from data_pipeline.errors import ConfigError, DataError, unknown_key
from data_pipeline.sources.tar_members import Member, index_tar, read_member

SHARD_NAME = re.compile(r"(?P<dataset>.+)-(?P<split>train|validation|val)-(?P<number>\d+)\.tar")
SPLITS = {"train": "train", "validation": "validation", "val": "validation"}
VIDEO, IMAGE, MASKS = "video.npy", "image.npy", "segmentations.npy"
MASKS_OF = {"movi": "dense", "davis": "dense", "ytvis": "channels", "coco": "channels"}  # by the first word of a shard's name
VOID = 255  # DAVIS: pixels that no one labelled
LARGEST_HEADER = 4096
# What every numpy writes. Taken apart here: numpy's own reader evaluates the text, and fails in many ways on what is no header.
NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>[^']{1,16})', 'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>[\d, ]{0,200})\), \}\s*"
)
REMEDY = "make the shard again"


class Place(NamedTuple):
    """Where a sample lies. Masks are None where the split has none."""

    path: Path
    frames: Member
    masks: Member | None


class OfficialShards:
    """Source of the official repositories' shards. Key: the sample's own."""

    def __init__(self, config: OfficialShardsSource, root: str | None) -> None:
        if root is None:
            raise ConfigError("root=null; source official_shards reads a folder of <dataset>-<split>-000000.tar; add root=FOLDER")
        self.root, self.dataset, self.masks = Path(root), config.dataset, config.masks
        self._splits: dict[str, dict[str, Place]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The headers are read again in another process: sending what they say costs more."""
        return {**self.__dict__, "_splits": {}}

    @property
    def background_labelled(self) -> bool:
        """In MOVi alone 0 is the background that was rendered, not what no one annotated."""
        return self._dataset().startswith("movi")

    def keys(self, split: str) -> list[str]:
        return list(self._split(split))

    def read(self, split: str, key: str) -> Clip:
        if key not in self._split(split):
            raise unknown_key("sample", key, split, self.root)
        path, member, mask_member = self._split(split)[key]
        frames = _frames(path, member)
        if mask_member is None:
            return Clip(key=key, frames=frames, metadata={"shard": path.name})
        where = f"{path}, member {mask_member.name}"
        stack = _stack(_array(path, mask_member), frames.shape[:3], member.name.endswith(IMAGE), where)
        ids, facts = (dense_ids if self._kind_of_masks() == "dense" else channel_ids)(stack, where)
        return Clip(key=key, frames=frames, instance_ids=ids, metadata={"shard": path.name, **facts})

    def _kind_of_masks(self) -> str:
        if self.masks != "auto":
            return self.masks
        word = re.split(r"[_-]", self._dataset())[0]
        if word not in MASKS_OF:
            raise ConfigError(
                f"source.masks=auto, shards of {self._dataset()!r}; only those of {', '.join(MASKS_OF)} are known; "
                f"set source.masks to dense (one channel of ids) or channels (one for each instance)"
            )
        return MASKS_OF[word]

    def _dataset(self) -> str:
        """The one dataset whose shards lie in the root, or the one that the settings name."""
        found = sorted({match["dataset"] for _, match in self._shards()})
        if self.dataset is not None and self.dataset not in found:
            raise ConfigError(
                f"source.dataset={self.dataset}; below root={self.root} lies {', '.join(found)}; change source.dataset"
            )
        if self.dataset is None and len(found) > 1:
            raise ConfigError(
                f"root={self.root} holds shards of {', '.join(found)}; one is read; set source.dataset to one of them"
            )
        return self.dataset or found[0]

    def _shards(self) -> list[tuple[Path, re.Match[str]]]:
        if not self.root.is_dir():
            raise DataError(f"root={self.root} is not a folder; it must hold <dataset>-<split>-000000.tar; change root")
        matches = [(path, SHARD_NAME.fullmatch(path.name)) for path in sorted(self.root.iterdir())]
        shards = [(path, match) for path, match in matches if match]
        if not shards:
            raise DataError(f"root={self.root}: no shards; files named <dataset>-<split>-000000.tar are needed; change root")
        return shards

    def _split(self, split: str) -> dict[str, Place]:
        if split not in self._splits:
            dataset = self._dataset()
            shards = [(path, match) for path, match in self._shards() if match["dataset"] == dataset]
            chosen = {int(match["number"]): path for path, match in shards if SPLITS[match["split"]] == split}
            if not chosen:
                there = ", ".join(sorted({SPLITS[match["split"]] for _, match in shards}))
                raise DataError(f"split={split!r} of {dataset} is not in {self.root}; it has {there}; change splits")
            missing = sorted(set(range(len(chosen))) - set(chosen))
            if missing:
                raise DataError(
                    f"{self.root}: {dataset}, split {split}: {len(chosen)} shards, none numbered {missing[0]:06d}; "
                    f"numbers must run from 0 without a gap; copy the missing shard"
                )
            self._splits[split] = _samples([chosen[number] for number in sorted(chosen)], need_masks=split != "train")
        return self._splits[split]


def _samples(shards: list[Path], need_masks: bool) -> dict[str, Place]:
    """Every sample by key, in the order of the shards. Raises DataError for a doubled or incomplete one."""
    samples: dict[str, Place] = {}
    for path in shards:
        parts: dict[str, dict[str, Member]] = defaultdict(dict)
        for member in index_tar(path):
            key, _, part = member.name.partition(".")
            if part in parts[key]:
                raise DataError(f"{path}, member {member.name} occurs twice; names must differ; {REMEDY}")
            parts[key][part] = member
        if not parts:
            raise DataError(f"{path}: no samples; at least one is needed; {REMEDY}")
        for key, members in parts.items():
            if not KEY_PATTERN.fullmatch(key):
                raise DataError(f"{path}, sample {key!r}: letters, digits, '_' and '-' are allowed in a key; {REMEDY}")
            if key in samples:
                raise DataError(f"{path}, sample {key} is in {samples[key].path.name} too; a key must name one sample; {REMEDY}")
            samples[key] = _place(path, key, members, need_masks)
    return samples


def _place(path: Path, key: str, members: dict[str, Member], need_masks: bool) -> Place:
    pictures = [members[part] for part in (VIDEO, IMAGE) if part in members]
    if len(pictures) != 1:
        raise DataError(
            f"{path}, sample {key}: has {', '.join(sorted(members))}; exactly one of {VIDEO} and {IMAGE} is needed; "
            f"the shard may have been cut between members: {REMEDY}"
        )
    if need_masks and MASKS not in members:
        raise DataError(
            f"{path}, sample {key}: no {MASKS}; every sample of validation has one; "
            f"the shard may have been cut between members: {REMEDY}"
        )
    return Place(path, pictures[0], members.get(MASKS))


def _frames(path: Path, member: Member) -> np.ndarray:
    """Shapes: uint8 (T, H, W, 3)."""
    frames = _array(path, member)
    if member.name.endswith(IMAGE) and frames.ndim == 3:
        frames = frames[None]
    if frames.ndim != 4 or frames.shape[-1] != 3:
        wanted = "(H, W, 3)" if member.name.endswith(IMAGE) else "(T, H, W, 3)"
        raise DataError(f"{path}, member {member.name}: shape {list(frames.shape)}; {wanted} is needed; {REMEDY}")
    return frames.copy()  # torch warns of pixels that must not be written


def _array(path: Path, member: Member) -> np.ndarray:
    """A uint8 array from .npy bytes. Its header's claims are compared with the bytes that are there before anything is made."""
    where = f"{path}, member {member.name}"
    data = read_member(path, member)
    width = 2 if data[6:7] == b"\1" else 4  # of the header's length, in versions 1 and 2
    begin = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    header = NPY_HEADER.fullmatch(data[8 + width : min(begin, LARGEST_HEADER)])
    if data[:8] not in (b"\x93NUMPY\1\0", b"\x93NUMPY\2\0") or header is None:
        raise DataError(f"{where}: no .npy file of version 1 or 2 with one array; {REMEDY}")
    if header["dtype"] not in (b"|u1", b"<u1", b"u1"):
        raise DataError(f"{where}: values of type {header['dtype'].decode('ascii', 'replace')}; |u1 (uint8) is needed; {REMEDY}")
    shape, size = tuple(int(side) for side in re.findall(rb"\d+", header["shape"])), 1
    for side in shape:
        size *= side  # whole numbers of any size: a product cannot wrap around
    if not shape or min(shape) < 1 or size != len(data) - begin:
        raise DataError(f"{where}: shape {list(shape)} with {len(data) - begin} bytes; one a value is needed; {REMEDY}")
    order: Any = "F" if header["fortran"] == b"True" else "C"
    return np.frombuffer(data, np.uint8, offset=begin).reshape(shape, order=order)


def _stack(masks: np.ndarray, size: tuple[int, ...], image: bool, where: str) -> np.ndarray:
    """Shapes: (T, H, W, I), or for an image (I, H, W) or (H, W, I) -> (T, H, W, I)."""
    if image and masks.ndim == 3:
        masks = (masks.transpose(1, 2, 0) if masks.shape[1:] == size[1:] else masks)[None]
    if masks.ndim != 4 or masks.shape[:3] != size:
        raise DataError(f"{where}: shape {list(masks.shape)}, frames {list(size)} [T, H, W]; both must have one size; {REMEDY}")
    return masks


def dense_ids(stack: np.ndarray, where: str) -> tuple[np.ndarray, dict[str, Any]]:
    """One channel of ids. Index 255, pixels that no one labelled, becomes 0 and is counted."""
    if stack.shape[-1] != 1:
        raise DataError(f"{where}: {stack.shape[-1]} channels; dense ids have 1; set source.masks=channels")
    void = stack[..., 0] == VOID
    ids = np.where(void, np.uint8(0), stack[..., 0])
    return ids, {"num_instances": int(np.count_nonzero(np.unique(ids))), "num_void": int(void.sum())}


def channel_ids(stack: np.ndarray, where: str) -> tuple[np.ndarray, dict[str, Any]]:
    """A channel for each instance, mask * category -> ids 1..n. A video without annotations has one channel of zeros."""
    channels = stack.shape[-1]
    ids = np.zeros(stack.shape[:3], np.uint8 if channels < 256 else np.uint16)
    categories = []
    for number in range(channels):
        channel = stack[..., number]
        category = int(channel.max())
        inside = channel == category
        if category and not (inside | (channel == 0)).all():
            raise DataError(
                f"{where}, channel {number}: values {np.unique(channel).tolist()[:5]}; a channel holds 0 and one category; "
                f"set source.masks=dense if it holds ids"
            )
        if category:
            ids[inside] = number + 1
        categories.append(category or None)  # an instance that a smaller size left without a pixel
    if categories == [None]:
        categories = []
    return ids, {"num_instances": len(categories), "categories": categories}
