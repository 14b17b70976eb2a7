"""Cache: whole shards on this node's disk, shared by the processes and jobs of a node. Knows files, locks and room, no network.

Comes in: a shard's sha256 and size. Goes out: an open descriptor. In the folder lie

    <sha256>.tar                            a shard: whole, verified before it got this name; found by any dataset that lists it
    <sha256>.<host>.<pid>.<nonce>.part      one that is being written; its writer holds a lock on it
    <sha256>.lock                           held while a shard is fetched: one process fetches, others wait; then removed
    room.lock                               held while room is made; stays

Locks are flock: the kernel frees those of a dead process. A reader holds a shared lock on its open shard, which keeps it from
being removed for room. Where a file system has no locks the cache still never shows a half-written shard: temporary names are
unique and a shard gets its name last; shards may then be fetched twice, or removed while open, which takes nothing from a reader.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import RemoteConfig
from data_pipeline.errors import ConfigError, FetchError
from data_pipeline.files import sync
from data_pipeline.progress import parse_bytes

FOREIGN_AGE_S = 24 * 3600.0  # an unlocked temporary of another machine, whose locks we may not see, is given so long
FREE_SHARE = 0.02  # of the disk, never taken
POLL_S = 0.05


@dataclass
class Incoming:
    """A shard that is being written."""

    path: Path
    descriptor: int


class ShardCache:
    """Safe to use from several threads, processes and jobs. Raises ConfigError when the folder cannot be used."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._clean()
        except OSError as error:
            raise ConfigError(
                f"data.remote.cache_dir={folder}: {error.strerror}; the cache must be a folder that can be written; "
                f"set data.remote.cache_dir to one, or data.remote.mode=ranges to keep nothing"
            ) from None

    def open(self, sha256: str, size: int) -> int | None:
        """A descriptor of a shard that is here, locked against removal until it is closed; None when it is not here."""
        path = self._path(sha256)
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            _flock(descriptor, fcntl.LOCK_SH)
            found = os.fstat(descriptor)
            if found.st_size == size and found.st_nlink:
                with contextlib.suppress(OSError):  # another user's file
                    os.utime(path)
                return descriptor
            if found.st_nlink:
                path.unlink(missing_ok=True)  # somebody cut it: no shard of this name has another size
            os.close(descriptor)

    @contextlib.contextmanager
    def fetching(self, sha256: str, stop: threading.Event) -> Iterator[None]:
        """One process of the node at a time, for each shard."""
        path = self.folder / f"{sha256}.lock"
        descriptor = self._lock_file(path, stop)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before it is let go: whoever waits sees that it is gone and makes a new one
            os.close(descriptor)

    @contextlib.contextmanager
    def receive(self, sha256: str, size: int, *, force: bool) -> Iterator[Incoming | None]:
        """A file to write the shard into; None when there is no room for it without `force`.

        Least recently used shards that nobody holds open are removed for it. Whatever happens, the temporary file goes.
        """
        with self._alone():
            if not self._make_room(size) and not force:
                yield None
                return
            path = self.folder / f"{sha256}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.part"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            _flock(descriptor, fcntl.LOCK_EX)
        try:
            os.ftruncate(descriptor, size)  # takes no room yet, but shows others how much it is going to be
            incoming = Incoming(path, descriptor)
            yield incoming
            descriptor = incoming.descriptor
        finally:
            path.unlink(missing_ok=True)
            if descriptor >= 0:
                os.close(descriptor)

    def publish(self, incoming: Incoming, sha256: str) -> int:
        """Give a verified shard its name. The caller takes the descriptor over, locked as by `open`."""
        os.fsync(incoming.descriptor)
        incoming.path.replace(self._path(sha256))
        sync(self.folder)
        descriptor, incoming.descriptor = incoming.descriptor, -1
        _flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def remove(self, sha256: str) -> None:
        """Forget a shard whose bytes are no longer those that were verified."""
        self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _make_room(self, size: int) -> bool:
        """Remove the least recently used shards until `size` more bytes fit; whether they do."""
        disk = os.statvfs(self.folder)
        reserve = int(FREE_SHARE * disk.f_blocks * disk.f_frsize)
        shards, used, promised = self._listing()
        room = min(self.limit - used, disk.f_bavail * disk.f_frsize - promised - reserve)
        for _, file_size, path in sorted(shards):
            if room >= size:
                break
            if _remove_unlocked(path):
                room += file_size
        return room >= size

    def _listing(self) -> tuple[list[tuple[float, int, Path]], int, int]:
        """Shards as (last used, size, path); bytes of everything; bytes that will still be written into temporary files."""
        now, shards, used, promised = self._now(), [], 0, 0
        for path in self.folder.iterdir():
            if path.suffix not in (".tar", ".part"):
                continue
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                used += found.st_size
                if path.suffix == ".part":
                    promised += max(0, found.st_size - found.st_blocks * 512)
                    continue
                if found.st_mtime > now + 1:
                    with contextlib.suppress(OSError):  # a clock that was ahead must not keep a shard here for ever
                        os.utime(path, (now, now))
                shards.append((found.st_mtime, found.st_size, path))
        return shards, used, promised

    def _now(self) -> float:
        """The time by the clock of the folder's file system, which is the one that stamps the files."""
        path = self.folder / "room.lock"
        with contextlib.suppress(OSError):
            os.utime(path)
            return path.stat().st_mtime
        return time.time()

    def _clean(self) -> None:
        """Remove what dead processes left: temporary files and locks that nobody holds."""
        now = self._now()
        for path in self.folder.iterdir():
            if path.name == "room.lock" or path.suffix not in (".part", ".lock", ".tmp"):
                continue
            with contextlib.suppress(FileNotFoundError):
                # Far ahead is as odd as long ago: nobody writes in the future.
                if _may_go(path) or abs(now - path.stat().st_mtime) > FOREIGN_AGE_S:
                    _remove_unlocked(path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "room.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _lock_file(self, path: Path, stop: threading.Event) -> int:
        """Hold a lock file that is still the one of that name."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            # Polling, so that closing the reader ends the wait.
            while not stop.is_set() and not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                stop.wait(POLL_S)
            if not stop.is_set() and os.fstat(descriptor).st_nlink:
                return descriptor
            os.close(descriptor)
            if stop.is_set():
                raise FetchError(f"{path}: given up while another process fetched, because the reader was closed")


def _may_go(path: Path) -> bool:
    """Whether a leftover that no lock is seen on is nobody's. Losing a lock file costs another machine a second fetch at most."""
    return path.suffix == ".lock" or (
        path.suffix == ".part" and path.name.split(".", 1)[1].rsplit(".", 3)[0] == socket.gethostname()
    )


def _flock(descriptor: int, kind: int) -> bool:
    """Whether the lock is held, or the file system has none."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _remove_unlocked(path: Path) -> bool:
    """Remove a file unless a process holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        path.unlink(missing_ok=True)
        return True
    except OSError:  # another user's file in a folder that is not ours
        return False
    finally:
        os.close(descriptor)


def cache_folder(config: RemoteConfig) -> Path:
    """data.remote.cache_dir, else slotstream-<user> below SLURM_TMPDIR, TMPDIR or the user's cache folder."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser() / "shards"
    scratch = os.environ.get("SLURM_TMPDIR") or os.environ.get("TMPDIR")
    base = Path(scratch or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / f"slotstream-{os.getuid()}"
    with contextlib.suppress(OSError):  # ShardCache says what is wrong with it
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise ConfigError(f"{folder} belongs to another user; a cache must be one's own; set data.remote.cache_dir")
    return folder / "shards"


def open_cache(config: RemoteConfig) -> ShardCache:
    return ShardCache(cache_folder(config), parse_bytes("data.remote.cache_bytes", config.cache_bytes))


__all__ = ["Incoming", "ShardCache", "cache_folder", "open_cache"]
