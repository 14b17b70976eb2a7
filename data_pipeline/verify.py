"""Command: check every byte of a build. `python -m data_pipeline.verify SHARDS`

Comes in: a folder with shards, or with splits of shards. Goes out: a line for every damaged thing, exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.compose import run_command
from data_pipeline.shards import DatasetIndex, Sample, crc32c, view_member
from data_pipeline.store import find_splits


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.verify", description="Check every checksum of built shards.")
    parser.add_argument("shards", help="folder of a build, or of one of its splits")
    folders = find_splits(parser.parse_args(argv).shards)
    damaged = 0
    for folder in folders:
        index = DatasetIndex.load(folder)
        found = 0
        for line in verify_split(folder, index):
            print(line, flush=True)
            found += 1
        damaged += found
        state = "sound" if not found else f"{found} damaged"
        print(f"{folder}: {len(index.shards)} shards, {len(index.samples)} samples, version {index.version[:12]}: {state}")
    return 1 if damaged else 0


def verify_split(folder: Path, index: DatasetIndex) -> Iterator[str]:
    """One line for each damaged member, and for each shard whose bytes are not those that were written."""
    samples: list[list[Sample]] = [[] for _ in index.shards]
    for sample in index.samples:
        samples[sample.shard].append(sample)
    for number, shard in enumerate(index.shards):
        yield from _verify_shard(folder / shard["name"], shard, samples[number])


def _verify_shard(path: Path, shard: dict[str, Any], samples: list[Sample]) -> Iterator[str]:
    """Members are read one after another, the way they lie; what is between them only counts for the sha256."""
    try:
        found = path.stat().st_size
        if found != shard["bytes"]:
            yield f"{path}: {found} bytes, the index has {shard['bytes']}"
            return
        sha256 = hashlib.sha256()
        with path.open("rb") as file:
            for name, offset, length, expected in sorted(_members(samples), key=lambda member: member[1]):
                sha256.update(file.read(offset - file.tell()))
                data = file.read(length)
                sha256.update(data)
                if crc32c(data) != expected:
                    yield f"{path}: {name}: crc32c={crc32c(data):08x}, the index has {expected:08x}"
            while rest := file.read(1 << 20):
                sha256.update(rest)
    except OSError as error:
        yield f"{path}: {error.strerror}"
        return
    if sha256.hexdigest() != shard["sha256"]:
        yield f"{path}: sha256={sha256.hexdigest()[:12]}, the index has {shard['sha256'][:12]}"


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


if __name__ == "__main__":
    sys.exit(run_command(main))
