"""Processes, signals and ports on one machine: what the launcher and the agents share. Standard library only."""

from __future__ import annotations

import ctypes
import json
import os
import random
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None  # loaded before any fork


def die_with_parent() -> Callable[[], None]:
    """A function for the child of a fork: the kernel then kills the child when its parent ends, however that ends."""
    parent = os.getpid()

    def request() -> None:
        if _libc is None:
            return
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the request
            os._exit(128 + signal.SIGKILL)

    return request


def signal_group(group: int, number: int) -> None:
    """Signal every process of a group; a group that is gone is no error."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def signal_process(pid: int, number: int) -> None:
    """Signal one process; one that is gone is no error."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def ended(pid: int) -> bool:
    """True when a child has ended, without reaping it: until it is reaped, its group's number cannot be given to another."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def exit_of(returncode: int) -> tuple[int, str | None]:
    """(shell-style exit code, signal name or None) of subprocess's return code."""
    if returncode >= 0:
        return returncode, None
    try:
        return 128 - returncode, signal.Signals(-returncode).name
    except ValueError:
        return 128 - returncode, f"signal {-returncode}"


class SignalPipe:
    """Signals as readable bytes. Handlers of Python alone would wait until a blocking call returns."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._mine = set(numbers)
        for number in self._mine:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._mine)  # those that came before now follow

    def wait(self, timeout: float, also: int | None = None) -> tuple[list[int], bool]:
        """(signals that came, True when the descriptor `also` has something to read or was closed), after `timeout` s at most."""
        watched = [self._read] if also is None else [self._read, also]
        ready, _, _ = select.select(watched, [], [], max(0.0, timeout))
        return self.read(), also is not None and also in ready

    def fileno(self) -> int:
        return self._read

    def read(self) -> list[int]:
        """The signals that have come."""
        try:
            return [number for number in os.read(self._read, 4096) if number in self._mine]
        except BlockingIOError:
            return []


def processes_with(environment: dict[str, str]) -> list[int]:
    """Ids of the processes (not this one) whose environment holds all these variables. Empty where there is no /proc."""
    marks = {f"{key}={value}".encode() for key, value in environment.items()}
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if marks <= set((entry / "environ").read_bytes().split(b"\0")) and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


def kill_processes_with(environment: dict[str, str], patience: float = 5.0) -> list[int]:
    """Kill what still carries these variables, also a process that left its group; return the ids that were met."""
    met: set[int] = set()
    deadline = time.monotonic() + patience
    while (left := processes_with(environment)) and time.monotonic() < deadline:
        met.update(left)
        for pid in left:
            signal_process(pid, signal.SIGKILL)
        time.sleep(0.02)
    return sorted(met)


class Port:
    """A TCP port of this machine that no other launcher takes while this object lives.

    It lies below the range from which the kernel serves outgoing connections, else any of those could take it before rank 0
    listens. Launchers keep apart through a name in the kernel's abstract socket space, which ends with the process.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.number, self._claim = _claim_port(address)

    def close(self) -> None:
        if self._claim is not None:
            self._claim.close()


def _claim_port(address: str) -> tuple[int, socket.socket | None]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    first, last = 10000, _ephemeral_start() - 1
    candidates = random.SystemRandom().sample(range(first, last), 200) if last - first > 1000 else []
    why: str | None = "other launchers hold them"
    for number in [*candidates, 0]:
        with socket.socket(family) as probe:
            try:
                probe.bind((address, number))
            except OSError as error:
                why = error.strerror
                continue
            number = probe.getsockname()[1]
        claim = _claim_name(number)
        if claim is not False:
            return number, claim or None
    raise OSError(f"no free TCP port at {address} between 10000 and 65535: {why}")


def _claim_name(number: int) -> Any:
    """A socket that marks the port as ours, False when another launcher has marked it, None where that cannot be done."""
    if sys.platform != "linux":
        return None
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0slotstream-port-{number}")
    except OSError:
        claim.close()
        return False
    return claim


def _ephemeral_start() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees the old file or the new one, never a part. A full disk leaves the old one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # unique between hosts, too
    text = json.dumps(content, indent=2) + "\n"
    try:
        with open(temporary, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
