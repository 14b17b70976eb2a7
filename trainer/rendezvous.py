"""How ranks find each other: the store at MASTER_ADDR:MASTER_PORT, who may use it, and until when one waits.

Comes in: this rank's place and its environment. Goes out: a store in which all ranks of this very attempt have met, or one error
line, or Interrupted on every rank when one was asked to stop. torch would wait in C++, where no Python handler of a signal runs;
here every wait is a short one, again and again.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from data_pipeline.errors import ConfigError, StateError
from data_pipeline.order import World
from trainer.preemption import Interrupted

CONNECT_S = 5.0  # one attempt
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5  # between two looks
LINGER_S = 5.0  # rank 0 holds the store for those that still have to read that the run stops
IDENTITY, DECISION, GO, STOP = "slotstream", "decision", "go", "stop"


def join(world: World, timeout_s: int, stopping: Callable[[], bool]) -> Store:
    """The store of this attempt, once all its ranks are there.

    Raises ConfigError (address, interface), StateError (port taken, another attempt's store, ranks that do not come within
    `timeout_s`) and Interrupted, on all ranks that are there, when `stopping` turns true on one of them.
    """
    host, port = _address()
    _check_interface()
    waiting = _Waiting(timeout_s, stopping)
    family = _resolve(host, port, waiting)
    store = _open(host, port, family, world) if world.rank == 0 else _connect(host, port, world, waiting)
    store.set_timeout(timedelta(seconds=timeout_s))
    identity = {"run": os.path.basename(os.environ.get("SLOTSTREAM_RUN_DIR", "")), **_attempt(), "world_size": world.size}
    _identify(store, identity, world, f"{host}:{port}", waiting)
    own = PrefixStore(f"{identity['run']}/{identity['attempt']}", store)
    _meet(own, world, waiting)
    return own


class _Waiting:
    """A wait with an end, in short pauses."""

    def __init__(self, timeout_s: float, stopping: Callable[[], bool]) -> None:
        self.timeout_s, self.stopping = timeout_s, stopping
        self._end = time.monotonic() + timeout_s
        self._pause = FIRST_PAUSE_S

    def pause(self) -> bool:
        """False once the time is over."""
        left = self._end - time.monotonic()
        time.sleep(max(0.0, min(self._pause, left)))
        self._pause = min(LONGEST_PAUSE_S, 1.5 * self._pause)
        return left > 0


def _address() -> tuple[str, int]:
    host, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "")
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"MASTER_PORT={port!r}; a port in [1, 65535] is needed; start the run with cluster/launch.py")
    return host, int(port)


def _attempt() -> dict[str, str]:
    return {"attempt": os.environ.get("SLOTSTREAM_ATTEMPT", "")}


def _check_interface() -> None:
    """gloo's own error for a wrong name is a stack trace."""
    wanted = [name.strip() for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name.strip()]
    there = [name for _, name in socket.if_nameindex()]
    for name in wanted:
        if name not in there:
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME={name}; host {socket.gethostname()} has the interfaces {', '.join(there)}; "
                "give one of them with --interface"
            )


def _resolve(host: str, port: int, waiting: _Waiting) -> socket.AddressFamily:
    """Raises ConfigError for a name that nobody knows; a name server that does not answer is asked again."""
    while True:
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        except socket.gaierror as error:
            if waiting.stopping():
                raise Interrupted from None
            if error.errno != socket.EAI_AGAIN or not waiting.pause():
                raise ConfigError(
                    f"MASTER_ADDR={host} does not resolve on {socket.gethostname()} ({error.strerror}); every node must know the "
                    "first one's address; give the launcher an address that all nodes can reach"
                ) from None


def _open(host: str, port: int, family: socket.AddressFamily, world: World) -> TCPStore:
    """Rank 0 serves, on that address alone where it is one of this host's: torch would take any."""
    server = None
    with contextlib.suppress(ValueError, OSError):
        literal = "127.0.0.1" if host == "localhost" else str(ipaddress.ip_address(host))
        server = _listen(literal, port, family)
    server = server or _listen("", port, family)
    # the store takes the socket over
    return TCPStore(host, port, world.size, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())


def _listen(host: str, port: int, family: socket.AddressFamily) -> socket.socket:
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise StateError(
            f"MASTER_PORT={port} of {host or 'this host'} is taken by another process; rank 0 has to serve there; "
            "start again: the launcher chooses another port"
        ) from None


def _connect(host: str, port: int, world: World, waiting: _Waiting) -> TCPStore:
    """Others come to it, whenever it opens."""
    while True:
        if waiting.stopping():
            raise Interrupted
        try:
            socket.create_connection((host, port), timeout=CONNECT_S).close()  # torch logs a stack trace for each refusal
            patience = timedelta(seconds=CONNECT_S)
            return TCPStore(host, port, world.size, is_master=False, wait_for_workers=False, timeout=patience)
        except (OSError, DistError) as error:
            if not waiting.pause():
                raise StateError(
                    f"rank 0's store at {host}:{port} did not answer within {waiting.timeout_s} s "
                    f"({str(error).splitlines()[0]}); rank {world.rank} cannot find the others; look at rank 0's log, or at what "
                    "lies between the nodes (python cluster/launch.py doctor)"
                ) from None


def _identify(store: Store, own: dict, world: World, where: str, waiting: _Waiting) -> None:
    """Refuse what another attempt, another run or another number of ranks has opened."""
    if world.rank == 0:
        store.set(IDENTITY, json.dumps(own))
        return
    while not store.check([IDENTITY]):
        if waiting.stopping():
            raise Interrupted
        if not waiting.pause():
            raise StateError(f"{where} is open, but rank 0 has not said for which run within {waiting.timeout_s} s; see its log")
    there = json.loads(store.get(IDENTITY))
    for key, value in own.items():
        if there.get(key) != value:
            raise StateError(
                f"the store at {where} belongs to {_shown(there)}, this is rank {world.rank} of {_shown(own)}; ranks of one "
                "attempt alone may meet; end what is left of the other one"
            )


def _shown(identity: dict) -> str:
    run, attempt = identity.get("run") or "(no name)", identity.get("attempt") or "(no number)"
    return f"run {run}, attempt {attempt}, world size {identity.get('world_size')}"


def _meet(store: Store, world: World, waiting: _Waiting) -> None:
    """Return on all ranks once all are there, or raise Interrupted on all: whoever decides first decides for everybody."""
    if store.add(f"rank/{world.rank}", 1) > 1:
        raise StateError(f"rank {world.rank} is there twice; each rank of an attempt is one process; end one of them")
    if store.add("arrived", 1) == world.size:
        store.compare_set(DECISION, "", GO)
    while not store.check([DECISION]):
        if waiting.stopping():
            store.compare_set(DECISION, "", STOP)
        elif not waiting.pause():
            missing = [rank for rank in range(world.size) if not store.check([f"rank/{rank}"])]
            raise StateError(
                f"ranks {missing} of {world.size} did not come within {waiting.timeout_s} s; all must start; see their logs"
            )
    if store.get(DECISION) == STOP.encode():
        store.add("left", 1)
        if world.rank == 0:
            _linger(store)
        raise Interrupted


def _linger(store: Store) -> None:
    waiting = _Waiting(LINGER_S, lambda: False)
    while store.add("left", 0) < store.add("arrived", 0) and waiting.pause():
        pass
