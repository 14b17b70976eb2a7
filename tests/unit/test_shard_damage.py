"""A thousand random damages of shards: each is caught before a sample is used, and nothing else is taken for damage."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tiny_shards import VIEWS, write_split

from data_pipeline.errors import DataError
from data_pipeline.shards import DatasetIndex
from data_pipeline.store import ShardDataset
from data_pipeline.verify import verify_split

FLIPS, CUTS, SWAPS = 600, 200, 200


class Member(NamedTuple):
    shard: int
    offset: int
    length: int


class Split:
    """Two shards of two samples with everything that a sample may have, and how to damage and mend them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = DatasetIndex.load(folder)
        self.paths = [folder / shard["name"] for shard in self.index.shards]
        self.sound = [path.read_bytes() for path in self.paths]
        self.members = list(self._members())
        self.expected = self.read(self.open())

    def open(self, read: str = "auto") -> ShardDataset:
        return ShardDataset.open(self.folder, read)

    def read(self, dataset: ShardDataset) -> str:
        """Read all there is; a hash of it. Raises DataError."""
        found = hashlib.sha256()
        for sample_id, sample in enumerate(dataset.index.samples):
            for view in VIEWS:
                found.update(dataset.features(sample_id, view, 0, sample.frames))
            for part in (dataset.frames, dataset.instance_ids):
                found.update(np.ascontiguousarray(part(sample_id, 0, sample.frames)))
            found.update(repr(dataset.metadata(sample_id)).encode())
        return found.hexdigest()

    def is_read_wrong(self, read: str = "auto") -> bool:
        """Whether damage is refused. Fails when it is neither refused nor harmless."""
        try:
            dataset = self.open(read)
            found = self.read(dataset)
        except DataError:
            return True
        assert found == self.expected
        dataset.close()
        return False

    def verify_complains(self) -> bool:
        return any(True for _ in verify_split(self.folder, self.index))

    def write(self, shard: int, data: bytes) -> None:
        self.paths[shard].write_bytes(data)

    def mend(self) -> None:
        for path, data in zip(self.paths, self.sound, strict=True):
            path.write_bytes(data)

    def _members(self) -> Iterator[Member]:
        for sample in self.index.samples:
            parts = sample.members
            places = [*parts["features"].values(), parts["meta"]]
            places += [
                {"offset": o, "length": n}
                for part in ("frames", "ids")
                for o, n in zip(parts[part]["offset"], parts[part]["length"], strict=True)
            ]
            for place in places:
                yield Member(sample.shard, place["offset"], place["length"])


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return Split(write_split(tmp_path, frames=[[2, 3], [2, 3]], codec="int8"))


@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_flipped_bits_are_caught_while_the_split_is_open(split: Split, read: str) -> None:
    """In a member's bytes: refused when they are read, and only then. Elsewhere: verify sees it; what is read is right."""
    random = np.random.default_rng([ord(letter) for letter in read])
    dataset = split.open(read)
    for _ in range(FLIPS // 2):
        shard = int(random.integers(len(split.paths)))
        place = int(random.integers(len(split.sound[shard])))
        data = bytearray(split.sound[shard])
        data[place] ^= 1 << int(random.integers(8))
        with split.paths[shard].open("r+b") as file:
            file.write(data)
        inside = any(one.shard == shard and one.offset <= place < one.offset + one.length for one in split.members)
        header = inside and not _is_used(split, shard, place)
        if inside and not header:
            with pytest.raises(DataError, match="crc32c"):
                split.read(dataset)
        else:
            assert split.read(dataset) == split.expected and split.verify_complains()
        with split.paths[shard].open("r+b") as file:
            file.write(split.sound[shard])
    assert split.read(dataset) == split.expected and not split.verify_complains()
    dataset.close()


def _is_used(split: Split, shard: int, place: int) -> bool:
    """False in the npy header of features: its facts stand in the index, and are read there."""
    for sample in split.index.samples:
        for features in sample.members["features"].values():
            if sample.shard == shard and features["offset"] <= place < features["data_offset"]:
                return False
    return True


def test_cut_shards_are_caught(split: Split) -> None:
    """Half of the cuts at the end of a member, where a tar reader sees nothing wrong."""
    random = np.random.default_rng(1)
    for number in range(CUTS):
        shard = int(random.integers(len(split.paths)))
        ends = [-(-(one.offset + one.length) // 512) * 512 for one in split.members if one.shard == shard]
        cut = int(random.choice(ends)) if number % 2 else int(random.integers(len(split.sound[shard])))
        split.write(shard, split.sound[shard][:cut])
        assert split.is_read_wrong() and split.verify_complains()
        split.write(shard, split.sound[shard])
        assert number % 20 or not split.is_read_wrong()


@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_shards_cut_while_they_are_open_are_caught(split: Split, read: str) -> None:
    """A map of a file that was cut would end the process."""
    dataset = split.open(read)
    assert split.read(dataset) == split.expected
    for cut in (0, 512, split.members[0].offset + 5):
        with split.paths[0].open("r+b") as file:
            file.truncate(cut)
        with pytest.raises(DataError, match="the shard ends .* early"):
            split.read(dataset)
    dataset.close()


def test_swapped_members_frames_and_shards_are_caught(split: Split) -> None:
    random = np.random.default_rng(2)
    assert len(split.sound[0]) == len(split.sound[1])
    frames = [
        Member(sample.shard, place["data_offset"] + number * place["frame_bytes"], place["frame_bytes"])
        for sample in split.index.samples
        for place in sample.members["features"].values()
        for number in range(sample.frames)
    ]
    pairs = [(one, other) for pieces in (split.members, frames) for one, other in itertools.combinations(pieces, 2)]
    pairs = [
        (one, other)
        for one, other in pairs
        if one.length == other.length and split_bytes(split, one) != split_bytes(split, other)
    ]
    for choice in random.choice(len(pairs), SWAPS - 1):
        one, other = pairs[choice]
        for place, data in ((one, split_bytes(split, other)), (other, split_bytes(split, one))):
            whole = bytearray(split.paths[place.shard].read_bytes())
            whole[place.offset : place.offset + place.length] = data
            split.write(place.shard, bytes(whole))
        assert split.is_read_wrong() and split.verify_complains()
        split.mend()
    split.write(0, split.sound[1])
    split.write(1, split.sound[0])
    assert split.is_read_wrong() and split.verify_complains()
    split.mend()
    assert not split.is_read_wrong() and not split.verify_complains()


def split_bytes(split: Split, member: Member) -> bytes:
    return split.sound[member.shard][member.offset : member.offset + member.length]
