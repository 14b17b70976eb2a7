"""Remote files: a split's shards behind a URL, as data_pipeline.shard_files.ShardFiles. Last step of data_pipeline.remote.

Comes in: the URL of a split. Goes out: its index, and its bytes either from whole shards in the cache (CachedFiles) or by
requests for just the bytes that are read (RangedFiles). A shard enters the cache only if it is, byte for byte, the index's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from data_pipeline.config import RemoteConfig
from data_pipeline.errors import DataError, FetchError
from data_pipeline.file_systems import is_local
from data_pipeline.remote.cache import Incoming, ShardCache, open_cache
from data_pipeline.remote.fetch import Fetcher
from data_pipeline.remote.patience import Patience
from data_pipeline.remote.remote_index import load_index
from data_pipeline.remote.schemes import open_fetcher
from data_pipeline.remote.transfer import piece, whole
from data_pipeline.shard_files import FileCounters, OpenShard, ShardFiles
from data_pipeline.shards import DatasetIndex

REFETCHES = 2  # of a shard whose bytes came damaged
MAX_RECENT = 4  # shards kept open that no plan wants


def open_remote(root: str, config: RemoteConfig) -> tuple[DatasetIndex, ShardFiles]:
    """The index of a split behind a URL, and its shards. Raises FetchError, ConfigError or DataError."""
    cache = open_cache(config) if config.mode == "whole" else None
    fetcher = open_fetcher(root, config)
    try:
        index = load_index(fetcher, config, None if cache is None else cache.folder.parent / "indexes")
        if cache is None:
            return index, RangedFiles(fetcher, index, config)
        return index, CachedFiles(fetcher, index, config, cache)
    except BaseException:
        fetcher.close()
        raise


class _RemoteFiles:
    """What both ways to read share."""

    def __init__(self, fetcher: Fetcher, index: DatasetIndex, config: RemoteConfig) -> None:
        self.fetcher, self.index, self.config = fetcher, index, config
        self.counters = FileCounters()
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Nothing: to ask for each of many thousand shards would take longer than to meet a missing one."""

    def where(self, shard: int) -> str:
        return self.fetcher.where(self._name(shard))

    def close(self) -> None:
        self._stop.set()
        self.fetcher.close()

    def _name(self, shard: int) -> str:
        return str(self.index.shards[shard]["name"])

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                setattr(self.counters, name, getattr(self.counters, name) + number)

    def _patience(self, shard: int) -> Patience:
        return Patience(self.config, self.where(shard), self._stop)


class RangedFiles(_RemoteFiles):
    """Only the bytes that are asked for, each time anew."""

    def __init__(self, fetcher: Fetcher, index: DatasetIndex, config: RemoteConfig) -> None:
        super().__init__(fetcher, index, config)
        self._tags: dict[int, str | None] = {}

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> int:
        """See ShardFiles.read_into."""
        size = int(self.index.shards[shard]["bytes"])
        buffer = buffer[: max(0, size - offset)]
        if len(buffer):
            tag = self._tags.get(shard)
            fetched = piece(self.fetcher, self._name(shard), size, offset, buffer, tag, self._patience(shard), self._count)
            self._tags[shard] = fetched
        return len(buffer)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Nothing is kept that could be fetched ahead."""

    def mend(self, shard: int) -> bool:
        """Whether reading again may bring other bytes: those that came are gone."""
        self._count(corrupt=1)
        return True


class CachedFiles(_RemoteFiles):
    """Whole shards in the cache, fetched when they are first wanted, or before by `prefetch`.

    Shards that the plan wants next, and the few read last, are held open; the cache removes none that anybody holds open.
    """

    def __init__(self, fetcher: Fetcher, index: DatasetIndex, config: RemoteConfig, cache: ShardCache) -> None:
        super().__init__(fetcher, index, config)
        self.cache = cache
        self.mapped = is_local(cache.folder)
        self._held: OrderedDict[int, OpenShard] = OrderedDict()  # the one read last comes last
        self._coming: dict[int, Future[OpenShard | None]] = {}
        self._wanted: list[int] = []  # by the plan, nearest first
        self._queued: set[int] = set()
        self._pool = ThreadPoolExecutor(config.streams, thread_name_prefix="fetch")

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> int:
        """See ShardFiles.read_into."""
        return self._hold(shard).read_into(offset, buffer)

    def prefetch(self, shards: Sequence[int]) -> None:
        """See ShardFiles.prefetch. Shards of earlier plans are let go; what is in the cache already is held from now on."""
        with self._lock:
            self._wanted = list(dict.fromkeys(shards))
            self._let_go_old()
            missing = [shard for shard in self._wanted if shard not in self._held and shard not in self._coming]
        for shard in missing:
            self._bring(shard, here_only=True)
        with self._lock:
            queued = [shard for shard in missing if shard not in self._held and shard not in self._queued]
            self._queued.update(queued)
            if not self._stop.is_set():  # the pool takes nothing more
                for shard in queued:
                    self._pool.submit(self._fetch_ahead, shard)

    def mend(self, shard: int) -> bool:
        """Drop a shard that no longer has the bytes that were verified; True: it is fetched anew when it is read again.

        False when its bytes are the index's: then the index is at odds with itself and fetching cannot help.
        """
        if _sha256(self._hold(shard).descriptor) == self.index.shards[shard]["sha256"]:
            return False
        self._count(corrupt=1)
        self.cache.remove(self.index.shards[shard]["sha256"])
        with self._lock:
            self._let_go({shard})
        return True

    def close(self) -> None:
        """Returns when no thread fetches any more."""
        with self._lock:
            self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._let_go(set(self._held))
        super().close()

    def _hold(self, shard: int) -> OpenShard:
        while True:
            with self._lock:
                held = self._held.get(shard)
                if held is not None:
                    self._held.move_to_end(shard)
                    return held
            brought = self._bring(shard)
            if brought is not None:
                return brought

    def _let_go_old(self) -> None:
        """Hold what the plan wants, and the few shards read last: reads of them may be under way. The caller has the lock."""
        if len(self._held) > MAX_RECENT:
            self._let_go({*list(self._held)[:-MAX_RECENT]} - set(self._wanted))

    def _let_go(self, shards: set[int]) -> None:
        """Stop holding shards open; one that is being read is closed by its last reader. The caller has the lock."""
        for shard in shards:
            self._held.pop(shard, None)

    def _fetch_ahead(self, shard: int) -> None:
        """In a thread of the pool. What goes wrong here is told to the read that needs the shard, which tries again."""
        with self._lock:
            self._queued.discard(shard)
            if shard not in self._wanted or shard in self._held or self._stop.is_set():
                return
        with contextlib.suppress(DataError, OSError):
            self._bring(shard, ahead=True)

    def _bring(self, shard: int, *, ahead: bool = False, here_only: bool = False) -> OpenShard | None:
        """Hold a shard open, or wait until the thread that is about to do so has done so. Ahead: only if there is room."""
        with self._lock:
            future = self._coming.get(shard)
            mine = future is None
            if future is None:
                future = self._coming[shard] = Future()
        if not mine:
            return future.result()
        opened, failure = None, None
        try:
            descriptor = self._obtain(shard, ahead, here_only)
            opened = None if descriptor is None else OpenShard(descriptor, self.mapped)
        except BaseException as error:
            failure = error
        with self._lock:
            del self._coming[shard]
            if opened is not None:
                self._held[shard] = opened
                self._let_go_old()
        if failure is None:
            future.set_result(opened)
            return opened
        future.set_exception(failure)
        raise failure

    def _obtain(self, shard: int, ahead: bool, here_only: bool) -> int | None:
        """A descriptor of a shard, fetched if need be; None when there is no room, or it is not here."""
        sha256, size = self.index.shards[shard]["sha256"], int(self.index.shards[shard]["bytes"])
        try:
            descriptor = self.cache.open(sha256, size)
            if descriptor is None and not here_only:
                with self.cache.fetching(sha256, self._stop):
                    descriptor = self.cache.open(sha256, size)  # another process may have brought it meanwhile
                    if descriptor is None:
                        return self._fetch(shard, ahead)
        except OSError as error:
            raise FetchError(
                f"{self.where(shard)}: cache {self.cache.folder}: {error.strerror}; {size} bytes must fit there; "
                f"make room, lower data.remote.cache_bytes, or set another data.remote.cache_dir or data.remote.mode=ranges"
            ) from None
        if descriptor is not None:
            self._count(cache_hits=1)
        return descriptor

    def _fetch(self, shard: int, ahead: bool) -> int | None:
        wanted = self.index.shards[shard]["sha256"]
        for _ in range(1 + REFETCHES):
            with self._receive(shard, ahead) as incoming:
                if incoming is None:
                    return None
                found = self._write(shard, incoming)
                if found == wanted:
                    self._count(cache_misses=1)
                    return self.cache.publish(incoming, wanted)
            self._count(corrupt=1)
        raise FetchError(
            f"{self.where(shard)}: sha256={found[:12]}, the index has {wanted[:12]}, {1 + REFETCHES} times; "
            f"the object is damaged or belongs to another index; upload it again"
        )

    def _write(self, shard: int, incoming: Incoming) -> str:
        """Fetch a shard into a file; returns the sha256 of what came."""
        sha256, size = hashlib.sha256(), int(self.index.shards[shard]["bytes"])
        for chunk in whole(self.fetcher, self._name(shard), size, self._patience(shard), self._count):
            if self._stop.is_set():
                raise FetchError(f"{self.where(shard)}: given up on the way, because the reader was closed")
            sha256.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[os.write(incoming.descriptor, view) :]
        return sha256.hexdigest()

    @contextlib.contextmanager
    def _receive(self, shard: int, ahead: bool) -> Iterator[Incoming | None]:
        """Room in the cache. A read that needs it now lets go of what the plan wants last, and then goes beyond the limit."""
        sha256, size = self.index.shards[shard]["sha256"], int(self.index.shards[shard]["bytes"])
        while True:
            with self._lock:
                given = next(iter(self._least_needed(ahead)), None)
            with self.cache.receive(sha256, size, force=given is None and not ahead) as incoming:
                if incoming is not None or given is None:
                    yield incoming
                    return
            with self._lock:
                self._let_go({given})

    def _least_needed(self, ahead: bool) -> list[int]:
        """Shards held open, those to give up first coming first."""
        unwanted = [shard for shard in self._held if shard not in self._wanted]
        return unwanted if ahead else unwanted + [shard for shard in reversed(self._wanted) if shard in self._held]


def _sha256(descriptor: int) -> str:
    sha256, place = hashlib.sha256(), 0
    while data := os.pread(descriptor, 1 << 20, place):
        sha256.update(data)
        place += len(data)
    return sha256.hexdigest()


__all__ = ["CachedFiles", "RangedFiles", "open_remote"]
