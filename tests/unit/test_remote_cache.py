"""The cache's folder: names, locks, room, leftovers; no network."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.config import RemoteConfig
from data_pipeline.errors import ConfigError
from data_pipeline.remote import cache as cache_module
from data_pipeline.remote.cache import ShardCache, cache_folder

HERE = socket.gethostname()


def put(cache: ShardCache, content: bytes, used: float | None = None) -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    with cache.receive(sha256, len(content), force=True) as incoming:
        assert incoming is not None
        os.write(incoming.descriptor, content)
        os.close(cache.publish(incoming, sha256))
    if used is not None:
        os.utime(cache.folder / f"{sha256}.tar", (used, used))
    return sha256


def names(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {"room.lock"}


def room_for(cache: ShardCache, size: int) -> bool:
    with cache.receive("0" * 64, size, force=False) as incoming:
        return incoming is not None


def test_a_shard_comes_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "new" / "cache", 1000)
    sha256 = put(cache, b"0123456789")
    descriptor = cache.open(sha256, 10)
    assert descriptor is not None and os.pread(descriptor, 4, 3) == b"3456"
    os.close(descriptor)
    assert names(cache) == {f"{sha256}.tar"}
    assert cache.open("1" * 64, 10) is None


def test_a_shard_of_another_size_is_dropped(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1000)
    sha256 = put(cache, b"0123456789")
    os.truncate(tmp_path / f"{sha256}.tar", 4)
    assert cache.open(sha256, 10) is None
    assert names(cache) == set()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1000)
    with pytest.raises(OSError, match="no more"), cache.receive("2" * 64, 8, force=False) as incoming:
        assert incoming is not None and len(names(cache)) == 1
        raise OSError("no more")
    assert names(cache) == set()


def test_the_least_recently_used_goes_first_but_none_that_is_open(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 30)
    now = time.time()
    held, old, new = (put(cache, letter * 10, now - age) for letter, age in ((b"a", 30), (b"b", 20), (b"c", 10)))
    descriptor = cache.open(held, 10)
    os.utime(tmp_path / f"{held}.tar", (now - 30, now - 30))
    assert descriptor is not None
    assert room_for(cache, 10)
    assert names(cache) == {f"{held}.tar", f"{new}.tar"}
    assert not room_for(cache, 25)
    assert names(cache) == {f"{held}.tar"}, "the others were removed, the open one is still there"
    os.close(descriptor)
    assert room_for(cache, 25) and names(cache) == set()
    assert old not in (held, new)


def test_what_is_being_written_counts_with_its_whole_size(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 30)
    with cache.receive("3" * 64, 20, force=False) as incoming:
        assert incoming is not None
        assert room_for(cache, 10) and not room_for(cache, 11)


def test_the_disk_is_never_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path, 10**9)
    sha256 = put(cache, b"x" * 5000)
    full = os.statvfs_result((4096, 4096, 1000, 31, 31, 10, 10, 10, 0, 255))  # 20 of 1000 blocks are kept free
    monkeypatch.setattr(cache_module.os, "statvfs", lambda _: full)
    assert room_for(cache, 11 * 4096) and names(cache) == {f"{sha256}.tar"}
    assert room_for(cache, 12 * 4096) and names(cache) == set()


def test_a_clock_that_was_ahead_keeps_nothing_for_ever(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 20)
    ahead = put(cache, b"a" * 10, time.time() + 1e6)
    assert room_for(cache, 10), "looked at, and its time set right"
    assert (tmp_path / f"{ahead}.tar").stat().st_mtime < time.time() + 60
    newer = put(cache, b"b" * 10, time.time() + 0.5)
    assert room_for(cache, 10)
    assert names(cache) == {f"{newer}.tar"}


def leftover(folder: Path, host: str, age: float = 0.0) -> Path:
    path = folder / f"{'4' * 64}.{host}.{2**22 + 1}.abcd.part"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1000)
    shard = put(cache, b"whole")
    dead, dead_elsewhere = leftover(tmp_path, HERE), leftover(tmp_path, "other.host", 2e5)
    odd = leftover(tmp_path, "third", -1e6)  # written in the future: no live writer does
    perhaps_alive = leftover(tmp_path, "fourth", 3600)
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / f"{'8' * 64}.lock").touch()  # of a process that was killed
    with cache.receive("5" * 64, 7, force=False) as incoming:
        assert incoming is not None
        os.utime(incoming.path, (0, 0))  # however old it looks: its writer holds it
        ShardCache(tmp_path, 1000)
        assert incoming.path.exists() and perhaps_alive.exists()
        assert not dead.exists() and not dead_elsewhere.exists() and not odd.exists()
    assert names(cache) == {f"{shard}.tar", perhaps_alive.name, "notes.txt"}


def test_a_killed_writer_leaves_nothing_that_stays(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, threading; from pathlib import Path; from data_pipeline.remote.cache import ShardCache\n"
        "cache = ShardCache(Path(sys.argv[1]), 1000)\n"
        "with cache.fetching('6' * 64, threading.Event()), cache.receive('6' * 64, 9, force=False) as incoming:\n"
        "    os.write(incoming.descriptor, b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=Path(__file__).parents[2])
    assert len(list(tmp_path.glob("*.part"))) == 1
    cache = ShardCache(tmp_path, 1000)
    with cache.fetching("6" * 64, threading.Event()):
        pass
    assert names(cache) == set()


def test_one_fetches_while_others_wait(tmp_path: Path) -> None:
    cache, inside, most = ShardCache(tmp_path, 1000), [0], [0]

    def fetch() -> None:
        for _ in range(5):
            with cache.fetching("7" * 64, threading.Event()):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.002)
                inside[0] -= 1

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and names(cache) == set()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.remote.cache_dir=.*file/cache: Not a directory; .*mode=ranges"):
        ShardCache(tmp_path / "file" / "cache", 1000)
    with pytest.raises(ConfigError, match=r"data.remote.cache_dir=/proc/cache"):
        ShardCache(Path("/proc/cache"), 1000)  # nobody may write there, not even root


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_TMPDIR", "TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("SLURM_TMPDIR", "TMPDIR", "XDG_CACHE_HOME"):
        folder = cache_folder(RemoteConfig())
        assert folder.is_relative_to(tmp_path / name)
        assert folder.parent.stat().st_mode & 0o077 == 0
        monkeypatch.delenv(name)
    assert cache_folder(RemoteConfig(cache_dir="/fast")) == Path("/fast/shards")
