"""Shard files: bytes at an offset of a split's shards, wherever the shards lie. Part of data_pipeline.store.

Comes in: the folder of a split and its index. Goes out: bytes in the caller's buffer, not yet checked: the store knows the sums.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.file_systems import is_local
from data_pipeline.shards import DatasetIndex

MAX_OPEN_FILES = 256  # shards kept open: those used last


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
        """Say all shards that will be wanted next, nearest first; those of an earlier call are forgotten. Returns at once."""

    def mend(self, shard: int) -> bool:
        """Bytes of a shard are not those that the index has a sum of: whether reading them again can help."""

    def close(self) -> None:
        """Reads that are waiting for a server end with an error; others may go on."""

    def where(self, shard: int) -> str:
        """The shard's place, for messages."""


class LocalFiles:
    """Shards in a folder, read through memory maps or by positioned reads.

    `read`: mmap, pread, or auto: mmap on this machine's own file systems, where it is the faster, pread elsewhere. Nobody gets
    hold of a map: bytes are copied out. A shard is closed when it is neither among the last used nor being read.
    """

    def __init__(self, folder: Path, index: DatasetIndex, read: str = "auto") -> None:
        self.folder, self.index = folder, index
        self.counters = FileCounters()
        self.mapped = read == "mmap" or (read == "auto" and is_local(folder))
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def check(self) -> None:
        for number, shard in enumerate(self.index.shards):
            _check_size(Path(self.where(number)), int(shard["bytes"]))

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> int:
        return self._opened(shard).read_into(offset, buffer)

    def prefetch(self, shards: Sequence[int]) -> None:
        """The operating system reads ahead by itself."""

    def mend(self, shard: int) -> bool:
        return False  # there is no other place to take them from

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def where(self, shard: int) -> str:
        return str(self.folder / self.index.shards[shard]["name"])

    def _opened(self, shard: int) -> OpenShard:
        with self._lock:
            found = self._open.get(shard)
            if found is None:
                descriptor = os.open(self.where(shard), os.O_RDONLY | os.O_CLOEXEC)
                found = self._open[shard] = OpenShard(descriptor, self.mapped)
                if len(self._open) > MAX_OPEN_FILES:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard)
            return found


class OpenShard:
    """An open file, the descriptor of which it takes over; closes when the last reader lets go of it."""

    def __init__(self, descriptor: int, mapped: bool) -> None:
        self.map: np.ndarray | None = None
        self.descriptor = descriptor
        size = os.fstat(self.descriptor).st_size
        if mapped and size:
            self.map = np.frombuffer(mmap.mmap(self.descriptor, size, prot=mmap.PROT_READ), np.uint8)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.descriptor)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        if self.map is None:
            return self._read_at(offset, buffer)
        # A file that has been cut since it was mapped would fault; numpy's copy lets other threads run, a memoryview's does not.
        end = min(len(self.map), os.fstat(self.descriptor).st_size, offset + len(buffer))
        count = max(0, end - offset)
        np.copyto(np.frombuffer(buffer, np.uint8, count), self.map[offset : offset + count])
        return count

    def _read_at(self, offset: int, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            got = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            if got == 0:
                break
            done += got
        return done


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the index lists this shard; copy it here or build again") from None
    if found != expected:
        raise DataError(
            f"{path}: {found} bytes, the index has {expected}; the shard is cut or changed; delete it and build again"
        )
