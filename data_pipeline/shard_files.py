"""Shard files: bytes at an offset of a split's shards, wherever the shards lie. Part of data_pipeline.store.

Comes in: the folder of a split and its index. Goes out: bytes in the caller's buffer, not yet checked: the store knows the sums.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import DataError
from data_pipeline.shards import DatasetIndex

MAX_OPEN_FILES = 256  # shards kept open; others are opened for each read


@dataclass
class FileCounters:
    """What reading has cost so far. A local disk counts nothing."""

    cache_hits: int = 0  # shards that were there when they were wanted
    cache_misses: int = 0
    fetched_bytes: int = 0
    corrupt: int = 0  # fetched shards whose bytes were not the index's
    retries: int = 0


class ShardFiles(Protocol):
    """Safe to use from several threads."""

    counters: FileCounters

    def check(self) -> None:
        """Raises DataError when a shard is missing, or has another size than the index says."""

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` of a shard; returns how many bytes there were. Raises OSError or DataError."""

    def prefetch(self, shards: Sequence[int]) -> None:
        """Say which shards will be wanted next, nearest first. Returns at once."""

    def close(self) -> None: ...

    def where(self, shard: int) -> str:
        """The shard's place, for messages."""


class LocalFiles:
    """Shards in a folder, read by positioned reads."""

    def __init__(self, folder: Path, index: DatasetIndex) -> None:
        self.folder, self.index = folder, index
        self.counters = FileCounters()
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        for number, shard in enumerate(self.index.shards):
            _check_size(Path(self.where(number)), int(shard["bytes"]))

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> int:
        done = 0
        with self._descriptor(shard) as descriptor:
            while done < len(buffer):
                got = os.preadv(descriptor, [buffer[done:]], offset + done)
                if got == 0:
                    break
                done += got
        return done

    def prefetch(self, shards: Sequence[int]) -> None:
        """The operating system reads ahead by itself."""

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def where(self, shard: int) -> str:
        return str(self.folder / self.index.shards[shard]["name"])

    @contextlib.contextmanager
    def _descriptor(self, shard: int) -> Iterator[int]:
        with self._lock:
            descriptor = self._descriptors.get(shard)
            if descriptor is None and len(self._descriptors) < MAX_OPEN_FILES:
                descriptor = self._descriptors[shard] = self._open(shard)
        if descriptor is not None:
            yield descriptor
            return
        descriptor = self._open(shard)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, shard: int) -> int:
        return os.open(self.where(shard), os.O_RDONLY | os.O_CLOEXEC)


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the index lists this shard; copy it here or build again") from None
    if found != expected:
        raise DataError(
            f"{path}: {found} bytes, the index has {expected}; the shard is cut or changed; delete it and build again"
        )
