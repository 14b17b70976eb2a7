"""Command: check every byte of a build. `python -m data_pipeline.verify [--quick] SHARDS`

Comes in: a folder with shards, or with splits of shards. Goes out: a line for every damaged, missing or stray thing, exit code
1 if there is any.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data_pipeline.compose import run_command
from data_pipeline.errors import DataError, FetchError
from data_pipeline.progress import format_bytes, progress_line, usable_cores
from data_pipeline.remote.address import shown
from data_pipeline.shards import DatasetIndex, Sample, crc32c, read_json, shard_name, sidecar_path, view_member
from data_pipeline.store import find_splits

if TYPE_CHECKING:
    from data_pipeline.remote.splits import RemoteSplit, ShardStream

PIECE = 1 << 20
MEGABYTE = 1_000_000


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.verify", description="Check every checksum of built shards.")
    parser.add_argument("shards", help="folder or URL of a build, or of one of its splits")
    parser.add_argument("--quick", action="store_true", help="sizes and names only: reads no shard")
    parser.add_argument(
        "--threads", type=int, default=min(8, usable_cores()), help="shards read at a time (default: %(default)s)"
    )
    words = parser.parse_args(argv)
    if words.threads < 1:
        parser.error(f"--threads={words.threads}; at least 1 is needed")
    damaged = 0
    for folder in find_splits(words.shards):
        try:
            index, lines = _lines_of(folder, quick=words.quick, threads=words.threads)
        except DataError as error:
            print(error, flush=True)
            damaged += 1
            continue
        found = 0
        for line in lines:
            print(line, flush=True)
            found += 1
        damaged += found
        size = format_bytes(sum(int(shard["bytes"]) for shard in index.shards))
        state = ("sound" if not words.quick else "complete, bytes not read") if not found else f"{found} damaged"
        counts = f"{len(index.shards)} shards, {size}, {len(index.samples)} samples, version {index.version[:12]}"
        print(f"{shown(folder)}: {counts}: {state}")
    return 1 if damaged else 0


def _lines_of(root: Path | str, quick: bool, threads: int) -> tuple[DatasetIndex, Iterator[str]]:
    """The index of a split in a folder or behind a URL, and a line for each thing that is wrong with its shards."""
    if isinstance(root, str):
        from data_pipeline.remote.splits import RemoteSplit

        split = RemoteSplit(root)
        return split.index, verify_remote(split, quick, threads)
    index = DatasetIndex.load(root)
    return index, verify_split(root, index, quick, threads)


def verify_split(folder: Path, index: DatasetIndex, quick: bool = False, threads: int = 1) -> Iterator[str]:
    """One line for each damaged member, shard and side-car and for each file that a build does not leave, in order."""
    samples = _by_shard(index)
    done = [0]  # bytes read, for the progress line

    def check(number: int) -> list[str]:
        shard = index.shards[number]
        path = folder / shard["name"]
        found = list(_verify_size(path, shard) if quick else _verify_shard(path, shard, samples[number], done))
        return found + list(_verify_sidecar(path, shard, samples[number]))

    yield from _check_all(index, check, done, threads)
    yield from _strays(folder, index)


def verify_remote(split: RemoteSplit, quick: bool = False, threads: int = 1) -> Iterator[str]:
    """As `verify_split`, of shards behind a URL; side-cars are not looked at, and strays cannot be seen."""
    samples = _by_shard(split.index)
    done = [0]

    def check(number: int) -> list[str]:
        try:
            if quick:
                split.check_size(number)
                return []
            file = split.stream(number, lambda **_: None)
            return list(_verify_bytes(split.where(number), file, split.index.shards[number], samples[number], done))
        except FetchError as error:
            return [str(error)]

    try:
        yield from _check_all(split.index, check, done, threads)
    finally:
        split.close()


def _by_shard(index: DatasetIndex) -> list[list[Sample]]:
    samples: list[list[Sample]] = [[] for _ in index.shards]
    for sample in index.samples:
        samples[sample.shard].append(sample)
    return samples


def _check_all(index: DatasetIndex, check: Callable[[int], list[str]], done: list[int], threads: int) -> Iterator[str]:
    """What `check` says of each shard, in order; several are checked at a time."""
    total = sum(int(shard["bytes"]) for shard in index.shards)
    with ThreadPoolExecutor(threads) as pool, progress_line(total // MEGABYTE, counted="MB", speed_of="MB") as show:
        for lines in pool.map(check, range(len(index.shards))):
            show(done[0] // MEGABYTE, done[0] // MEGABYTE)
            yield from lines


def _verify_size(path: Path, shard: dict[str, Any]) -> Iterator[str]:
    try:
        found = path.stat().st_size
    except OSError as error:
        yield f"{path}: {error.strerror}"
        return
    if found != shard["bytes"]:
        yield f"{path}: {found} bytes, the index has {shard['bytes']}"


def _verify_shard(path: Path, shard: dict[str, Any], samples: list[Sample], done: list[int]) -> Iterator[str]:
    """Members are read one after another, the way they lie; what is between them only counts for the sha256."""
    wrong_size = list(_verify_size(path, shard))
    if wrong_size:
        yield from wrong_size
        return
    try:
        with path.open("rb") as file:
            yield from _verify_bytes(str(path), file, shard, samples, done)
    except OSError as error:
        yield f"{path}: {error.strerror}"


def _verify_bytes(
    where: str, file: IO[bytes] | ShardStream, shard: dict[str, Any], samples: list[Sample], done: list[int]
) -> Iterator[str]:
    sha256, place = hashlib.sha256(), 0

    def read(length: int) -> bytes:
        nonlocal place
        data = file.read(length)
        sha256.update(data)
        place += len(data)
        done[0] += len(data)
        return data

    for name, offset, length, expected in sorted(_members(samples), key=lambda member: member[1]):
        read(offset - place)
        found = crc32c(read(length))
        if found != expected:
            yield f"{where}: {name}: crc32c={found:08x}, the index has {expected:08x}"
    while read(PIECE):
        pass
    if sha256.hexdigest() != shard["sha256"]:
        yield f"{where}: sha256={sha256.hexdigest()[:12]}, the index has {shard['sha256'][:12]}"


def _members(samples: list[Sample]) -> Iterator[tuple[str, int, int, int]]:
    """(name, offset, length, crc32c) of every member."""
    for sample in samples:
        members = sample.members
        single = {view_member(view): place for view, place in members["features"].items()} | {"meta.json": members["meta"]}
        for name, place in single.items():
            yield f"{sample.key}.{name}", place["offset"], place["length"], place["crc32c"]
        for prefix, columns in (("frame", members["frames"]), ("ids", members["ids"])):
            for number in range(sample.frames if columns else 0):
                offset, length, crc = (columns[fact][number] for fact in ("offset", "length", "crc32c"))
                yield f"{sample.key}.{prefix}_{number:04d}.{columns['suffix']}", offset, length, crc


def _verify_sidecar(path: Path, shard: dict[str, Any], samples: list[Sample]) -> Iterator[str]:
    """A side-car says of its shard what the index says."""
    place = sidecar_path(path)
    try:
        sidecar = read_json(place, "the side-car of a shard", "run the build again: finished shards are kept")
    except DataError as error:
        yield str(error)
        return
    for fact in ("name", "bytes", "sha256"):
        if sidecar.get(fact) != shard[fact]:
            yield f"{place}: {fact}={sidecar.get(fact)}, the index has {shard[fact]}"
    listed = [
        {
            "key": sample.key,
            "frames": sample.frames,
            "size": list(sample.size),
            "num_instances": sample.num_instances,
            "members": sample.members,
        }
        for sample in samples
    ]
    if sidecar.get("samples") != listed:
        yield f"{place}: lists other samples than the index"


def _strays(folder: Path, index: DatasetIndex) -> Iterator[str]:
    """Shards that the index does not know, and what a build that was killed left. Files of other names are nobody's business."""
    split = str(index.dataset.get("split", folder.name))
    known = {shard["name"] for shard in index.shards}
    pattern = re.compile(rf"{re.escape(split)}-(\d{{6,}})\.(tar|json)")
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if path.name.startswith(".") and path.suffix == ".tmp":
            yield f"{path}: a temporary file of a build that was killed; run the build again, or delete it"
        elif match and shard_name(split, int(match[1])) not in known and not _is_of_no_videos(path):
            yield f"{path}: the index does not list it; run the build again, or delete it"


def _is_of_no_videos(path: Path) -> bool:
    """The side-car of a shard none of whose videos could be read: there is no such shard."""
    try:
        return path.suffix == ".json" and read_json(path, "a side-car", "").get("samples") == []
    except DataError:
        return False


if __name__ == "__main__":
    sys.exit(run_command(main))
