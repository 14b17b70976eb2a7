"""The ranks of a build: who they are, how they divide the shards, and that no other build writes in their folder.

Comes in: the variables that cluster/launch.py sets (RANK, WORLD_SIZE, ...); without them one process builds alone. Goes out: a
Team, through which rank 0 tells the others what it prepared and all take shards one after another. Part of data_pipeline.build.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import ConfigError, DataError, StateError

LOCK_NAME = ".build.lock"
LOCK_PATIENCE_S = 5.0  # the workers of a build that was killed end a moment after it
CONNECT_PATIENCE_S = 300.0  # ranks of a large job do not start together
REMINDER_S = 30.0
LAST_WORD_S = 1.5  # all ranks look at the store twice a second
# What a file system says that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Stopped(BaseException):
    """The build was asked to stop. No Exception: nothing on the way may take it for a failure of its own."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands among those of its job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = ""
    port: int = 0

    @staticmethod
    def from_environment(variables: Mapping[str, str] = os.environ) -> Place:
        """Raises ConfigError when the variables of a launcher are incomplete."""
        if variables.get("WORLD_SIZE", "1") == "1":
            return Place()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        try:
            rank, world_size, local_rank, local_world_size, port = (int(variables[name]) for name in names)
            address = variables["MASTER_ADDR"]
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"WORLD_SIZE={variables['WORLD_SIZE']}, but of a launcher's other variables {error!r}; to build in ranks all are "
                f"needed; start it with python cluster/launch.py build-shards, or unset WORLD_SIZE"
            ) from None
        return Place(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            address=address,
            port=port,
        )


class Store(Protocol):
    """What ranks share: numbers that are counted up, and values."""

    def add(self, key: str, amount: int) -> int: ...
    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


class OwnStore:
    """The store of a process that builds alone."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._values: dict[str, bytes] = {}

    def add(self, key: str, amount: int) -> int:
        self._counts[key] = self._counts.get(key, 0) + amount
        return self._counts[key]

    def set(self, key: str, value: str) -> None:
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)


class Team:
    """The ranks of one build. Every method raises StateError when another rank has failed, Stopped when one was stopped."""

    def __init__(self, place: Place, store: Store) -> None:
        self.place = place
        self._store = store

    @property
    def leads(self) -> bool:
        return self.place.rank == 0

    def add(self, name: str, amount: int) -> int:
        """Count `amount` on; returns the sum over all ranks."""
        with self._reporting():
            return self._store.add(name, amount)

    def tell(self, name: str, values: Any) -> None:
        """Make JSON values known to all ranks."""
        with self._reporting():
            self._store.set(name, json.dumps(values))

    def hear(self, name: str, of: int = 0) -> Any:
        """What rank `of` has told, or will tell: waits for it."""
        self.wait_until(lambda: self._store.check([name]), f"rank {of}: {name}")
        with self._reporting():
            return json.loads(self._store.get(name))

    def wait_until(self, condition: Callable[[], bool], what: str, tick: Callable[[], None] = lambda: None) -> None:
        """Return once `condition` holds; says from time to time what it waits for. `tick` is called meanwhile."""
        reminder = time.monotonic() + REMINDER_S
        pause = 0.01
        while True:
            with self._reporting():
                if condition():
                    return
            self.check()
            tick()
            if time.monotonic() >= reminder:
                print(f"rank {self.place.rank} waits for {what}", file=sys.stderr, flush=True)
                reminder = time.monotonic() + REMINDER_S
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)

    def check(self) -> None:
        """Raise when another rank has failed or was stopped."""
        if self.add("stopped", 0):
            raise Stopped
        if self.add("failed", 0):
            raise StateError(
                f"rank {self.place.rank}: another rank has failed (remote peer exited); all ranks end together; read its log, "
                f"then run again: finished shards are kept"
            )

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """What ends this rank too early ends the others."""
        try:
            yield
        except BaseException as error:
            reason = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
            with contextlib.suppress(RuntimeError):  # they have gone already
                self._store.add(reason, 1)
                if self.place.world_size > 1 and self.leads:
                    time.sleep(LAST_WORD_S)  # the store ends with this process
            raise

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except StateError:
            raise
        except RuntimeError as error:  # torch's names for a connection that is gone are RuntimeErrors
            raise StateError(
                f"rank {self.place.rank}: lost rank 0 at {self.place.address}:{self.place.port} (remote peer exited: "
                f"{str(error).splitlines()[0][:120]}); ranks build together; read rank 0's log, then run again"
            ) from None


def join(place: Place) -> Team:
    """Meet the other ranks. Rank 0 serves the store; the others come to it."""
    if place.world_size == 1:
        return Team(place, OwnStore())
    from torch.distributed import TCPStore

    try:
        store = TCPStore(
            place.address,
            place.port,
            place.world_size,
            is_master=place.rank == 0,
            timeout=timedelta(seconds=CONNECT_PATIENCE_S),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise StateError(
            f"rank {place.rank}: no rank 0 at {place.address}:{place.port} within {CONNECT_PATIENCE_S:g} s (remote peer exited: "
            f"{str(error).splitlines()[0][:120]}); every rank must reach it; check the network, or rank 0's log"
        ) from None
    return Team(place, store)


class FolderLock:
    """Sole use of a folder by the ranks of one build and their worker processes.

    Rank 0 takes it alone, which fails as long as anything of another build lives, prepares the folder, and then shares it with
    its own. The kernel frees a share when its process has ended, however it ended; a server of network files does so when it
    notices that a machine is gone.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._file = (out / LOCK_NAME).open("a+")

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def take_alone(self) -> None:
        """Raises DataError when another build is at work."""
        self._take(fcntl.LOCK_EX)

    def share(self) -> None:
        """Let the build's other processes in, or be one of them."""
        self._take(fcntl.LOCK_SH)

    def _take(self, kind: int) -> None:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                return fcntl.flock(self._file, kind | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    print(
                        f"warning: {self._out} has no file locks ({error.strerror}); only one build may write here at a time",
                        file=sys.stderr,
                        flush=True,
                    )
                    return None
                if time.monotonic() >= deadline:
                    raise DataError(
                        f"{self._out}: another build is writing here; one at a time; wait for it or choose another out"
                    ) from None
            time.sleep(0.1)
