"""Addresses, sizes, patience: what needs no server."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from data_pipeline.config import RemoteConfig
from data_pipeline.errors import ConfigError, FetchError
from data_pipeline.progress import parse_bytes
from data_pipeline.remote import patience as patience_module
from data_pipeline.remote.address import is_remote, join, local_path, shown, split_root
from data_pipeline.remote.fetch import Broken
from data_pipeline.remote.patience import Patience
from data_pipeline.remote.schemes import open_fetcher
from data_pipeline.remote.splits import ShardStream


def test_addresses(tmp_path: Path) -> None:
    assert not is_remote("data/movi") and not is_remote(tmp_path) and not is_remote("file:///data")
    assert is_remote("s3://bucket/movi") and is_remote("https://host/movi")
    assert split_root("data/movi", "train") == Path("data/movi/train")
    assert split_root("file:///data/my%20movi", "train") == Path("/data/my movi/train")
    assert split_root("s3://bucket/movi/", "train") == "s3://bucket/movi/train"
    assert join("https://host/a?sig=x%2Fy", "b.tar") == "https://host/a/b.tar?sig=x%2Fy"
    with pytest.raises(ConfigError, match="names machine server"):
        local_path("file://server/data")


def test_what_is_shown_holds_no_secret() -> None:
    assert shown("https://me:secret@host:81/a/b?token=secret#secret") == "https://host:81/a/b"
    assert shown("/data/a?b") == "/data/a?b"


@pytest.mark.parametrize(
    ("text", "size"), [("500", 500), ("64MB", 64_000_000), ("1.5 tb", 1_500_000_000_000), ("2KiB", 2048), ("7g", 7_000_000_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes("key", text) == size


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_bytes": "much"},
        {"cache_bytes": "0"},
        {"mode": "half"},
        {"attempts": 0},
        {"endpoint": "minio:9000"},
        {"streams": 0},
    ],
)
def test_wrong_settings_are_named(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"data.remote.{next(iter(changes))}"):
        RemoteConfig(**changes)  # type: ignore[arg-type]


def test_an_unknown_scheme_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'hdfs' is not known; choose one of .*s3"):
        open_fetcher("hdfs://host/data", RemoteConfig())


class _Waits(threading.Event):
    """Notes the waits instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        return False


def test_waits_grow_and_end() -> None:
    stop = _Waits()
    patience = Patience(RemoteConfig(attempts=6), "URL", stop)
    for _ in range(5):
        patience.wait(Broken("status 503"))
    assert all(0.25 * 2**number <= wait <= 0.5 * 2**number for number, wait in enumerate(stop.waits))
    with pytest.raises(FetchError, match="URL: status 503; 6 attempts in .* brought nothing"):
        patience.wait(Broken("status 503"))


def test_progress_starts_the_count_anew() -> None:
    patience = Patience(RemoteConfig(attempts=2), "URL", _Waits())
    for _ in range(5):
        patience.wait(Broken("cut"))
        patience.received(patience_module.PROGRESS_BYTES)


def test_the_servers_wish_is_heard_up_to_the_deadline() -> None:
    stop = _Waits()
    patience = Patience(RemoteConfig(deadline_s=60), "URL", stop)
    patience.wait(Broken("status 429", wait_s=40))
    assert stop.waits == [40]
    with pytest.raises(FetchError, match="the server asks for 5 min 0 s more"):
        patience.wait(Broken("status 429", wait_s=300))


def test_a_stream_reads_like_a_file() -> None:
    stream = ShardStream(iter([b"abc", b"", b"defg", b"h"]))  # an empty chunk is the end, as of a file
    assert [stream.read(2), stream.read(0), stream.read(9)] == [b"ab", b"", b"c"]
    stream = ShardStream(iter([b"abc", b"defg", b"h"]))
    assert [stream.read(2), stream.read(4), stream.read(9), stream.read(1)] == [b"ab", b"cdef", b"gh", b""]
