"""Splits behind a URL, for the commands that look at shards: which there are, and a shard's bytes from first to last.

Comes in: the URL of a build or of one of its splits. Goes out: the URLs of its splits; streams. Nothing is kept on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from data_pipeline.config import RemoteConfig
from data_pipeline.errors import DataError, FetchError
from data_pipeline.remote.address import join, shown
from data_pipeline.remote.fetch import NotFound, Refused
from data_pipeline.remote.patience import Patience
from data_pipeline.remote.remote_index import load_index
from data_pipeline.remote.schemes import open_fetcher
from data_pipeline.remote.transfer import Count, exists, piece, whole
from data_pipeline.shards import INDEX_NAME

KNOWN_SPLITS = ("train", "validation", "test")  # a web server lists no folder


def find_remote_splits(root: str) -> list[str]:
    """The URLs with an index: `root` itself, or those of its known splits. Raises DataError when there is none."""
    config = RemoteConfig()
    fetcher = open_fetcher(root, config)
    refused: FetchError | None = None
    found = []
    try:
        for split in ("", *KNOWN_SPLITS):
            name = f"{split}/{INDEX_NAME}" if split else INDEX_NAME
            try:
                exists(fetcher, name, Patience(config, fetcher.where(name), threading.Event()))
            except NotFound:
                continue
            except Refused as error:  # a bucket that may not be listed refuses what is not there
                refused = refused or error
                continue
            if not split:
                return [root]
            found.append(join(root, split))
    finally:
        fetcher.close()
    if not found:
        raise refused or DataError(
            f"{shown(root)}: no {INDEX_NAME} here or in {', '.join(KNOWN_SPLITS)} below; shards are needed; give a split's URL"
        )
    return found


class RemoteSplit:
    """A split's index, and its shards as streams. Safe to use from several threads."""

    def __init__(self, root: str, config: RemoteConfig | None = None) -> None:
        self.config = config or RemoteConfig()
        self.fetcher = open_fetcher(root, self.config)
        self.index = load_index(self.fetcher, self.config, None)
        self._stop = threading.Event()

    def stream(self, shard: int, count: Count) -> ShardStream:
        """A shard from its first byte on. Reading raises FetchError."""
        facts, where = self.index.shards[shard], self.where(shard)
        patience = Patience(self.config, where, self._stop)
        return ShardStream(whole(self.fetcher, str(facts["name"]), int(facts["bytes"]), patience, count))

    def check_size(self, shard: int) -> None:
        """Raises FetchError when a shard is missing or has another size than the index says; reads one byte of it."""
        facts, where = self.index.shards[shard], self.where(shard)
        patience = Patience(self.config, where, self._stop)
        byte = memoryview(bytearray(1))
        piece(self.fetcher, str(facts["name"]), int(facts["bytes"]), 0, byte, None, patience, lambda **_: None)

    def where(self, shard: int) -> str:
        return self.fetcher.where(str(self.index.shards[shard]["name"]))

    def close(self) -> None:
        self._stop.set()
        self.fetcher.close()


class ShardStream:
    """Chunks, read like a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def read(self, length: int) -> bytes:
        """`length` bytes, or less at the end."""
        parts: list[memoryview] = []
        while length:
            if not self._rest:
                self._rest = memoryview(next(self._chunks, b""))
                if not self._rest:
                    break
            part, self._rest = self._rest[:length], self._rest[length:]
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


__all__ = ["RemoteSplit", "ShardStream", "find_remote_splits"]
