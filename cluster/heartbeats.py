"""The heartbeats of one node's ranks: files that the ranks write in, read as plain records; and the Python stacks of a rank.

Comes in: a folder and the number of ranks. Goes out: one dict a rank (`RankBeats.read`), for the agent to send on. No rank is
asked: its record is memory, and its state comes from the kernel, so both can be read of a rank that hangs or is stopped.
trainer/heartbeat.py writes the record and holds the same layout. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import shutil
import signal
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.processes import signal_process

PHASES = ("start", "load", "data", "forward", "exchange", "backward", "optimizer", "save", "evaluate", "finish")
OPERATIONS = (
    "all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "gather", "scatter", "send", "recv",
    "barrier", "wait", "device_read", "other",
)  # fmt: skip
RECORD = "<QIIqIIQdddddddQd"
WINDOW = "<Qdddd"
WINDOW_STEPS, WINDOWS, WINDOWS_AT = 2, 20, 128
FILE_BYTES = 1024
PREFIX = "slotstream_beats_"
STACKS_SIGNAL = signal.SIGRTMIN + 6

FIELDS = (
    "pid", "version", "step", "phase", "in_collective", "collective", "changed",
    "data", "compute", "communication", "save", "evaluate", "total", "steps", "allowed",
)  # fmt: skip
_RECORD, _WINDOW, _SEQUENCE = struct.Struct(RECORD), struct.Struct(WINDOW), struct.Struct("<Q")
_tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
_TRIES = 100  # a writer is through in microseconds; one that was stopped in the middle never is


class RankBeats:
    """Heartbeat files of `ranks` ranks in a folder of their own under `folder` (None: in memory where there is /dev/shm).

    Before the ranks start, `environment` says what each needs. After `close` nothing is left.
    """

    def __init__(self, folder: Path | None, ranks: int) -> None:
        parent = folder or _parent()
        sweep(parent)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}_", dir=parent))
        self._lock = os.open(self._folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # where nothing can be locked, nothing is swept away
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._made = time.monotonic()
        self._memory: list[mmap.mmap] = []
        for rank in range(ranks):
            with open(self._folder / f"rank_{rank}", "w+b") as file:
                file.truncate(FILE_BYTES)
                self._memory.append(mmap.mmap(file.fileno(), FILE_BYTES))

    def environment(self, local_rank: int) -> dict[str, str]:
        return {
            "SLOTSTREAM_HEARTBEAT": str(self._folder / f"rank_{local_rank}"),
            "SLOTSTREAM_STACKS": str(self._stacks_of(local_rank)),
        }

    def read(self) -> list[dict[str, Any]]:
        """Each rank's record, in order of local rank.

        `pid` is 0 until the rank has begun its heartbeat (a program that knows nothing of it never does); `age`: seconds since
        it last changed step, phase or collective; `allowed`: seconds for which its settings let it be silent; `state`: the
        kernel's letter ("T": stopped, "Z": ended, "": gone); `moved`: bytes it has read and written so far; `recent`:
        [number, data, compute, communication, save] of groups of WINDOW_STEPS.
        """
        now = time.monotonic()
        return [self._read(local_rank, now) for local_rank in range(len(self._memory))]

    def stacks(self, local_rank: int, patience: float = 2.0) -> str:
        """Python stacks of all threads of a rank, dumped by itself; in brackets why there are none.

        A stopped process is set going until it has answered, then stopped again. Waits `patience` s at most.
        """
        pid = self._read(local_rank, time.monotonic())["pid"]
        path = self._stacks_of(local_rank)
        if not pid or not _catches(pid, STACKS_SIGNAL):
            return "(none: the rank is gone, or has not come so far)"
        before = _size(path)
        _signal_main_thread(pid, STACKS_SIGNAL)
        state, _ = _state(pid)
        if state == "T":
            signal_process(pid, signal.SIGCONT)
        answered = _settles(path, before, patience)
        if state == "T":
            signal_process(pid, signal.SIGSTOP)
        if not answered:
            return f"(none: no answer within {patience:g} s; process state {state or 'gone'})"
        return path.read_bytes()[before:].decode("utf-8", "replace")

    def close(self) -> None:
        for memory in self._memory:
            memory.close()
        self._memory = []
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)
        self._lock = -1

    def _stacks_of(self, local_rank: int) -> Path:
        return self._folder / f"stacks_{local_rank}"

    def _read(self, local_rank: int, now: float) -> dict[str, Any]:
        content = _whole(self._memory[local_rank])
        _, *values = _RECORD.unpack_from(content)
        record = dict(zip(FIELDS, values, strict=True))
        changed = record.pop("changed") if record["pid"] else self._made
        operation = record["in_collective"]
        state, moved = _state(record["pid"]) if record["pid"] else ("", 0)
        groups = [_WINDOW.unpack_from(content, WINDOWS_AT + index * _WINDOW.size) for index in range(WINDOWS)]
        return {
            **record,
            "local_rank": local_rank,
            "step": record["step"] if record["pid"] else -1,
            "phase": PHASES[record["phase"]] if record["phase"] < len(PHASES) else "finish",
            "in_collective": operation > 0,
            "operation": OPERATIONS[min(operation, len(OPERATIONS)) - 1] if operation else "",
            "age": max(0.0, now - changed),
            "state": state,
            "moved": moved,
            "recent": sorted([number, *(round(value, 6) for value in seconds)] for number, *seconds in groups if number),
        }


def sweep(parent: Path | None = None) -> None:
    """Remove what killed agents left on this machine: folders whose agent is gone and whose lock nobody holds.

    Both are asked: between its making and its locking a folder is known by the process only, and an agent in a container with
    process numbers of its own by the lock only.
    """
    for folder in (parent or _parent()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            if Path(f"/proc/{int(folder.name.removeprefix(PREFIX).split('_')[0])}").exists():
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where an agent lives
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _parent() -> Path:
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())


def _whole(memory: mmap.mmap) -> bytes:
    """The record as it stands between two writes."""
    content = memory[:]
    for _ in range(_TRIES):
        (before,) = _SEQUENCE.unpack_from(memory)
        content = memory[:]
        if before % 2 == 0 and _SEQUENCE.unpack_from(memory)[0] == before:
            break
        time.sleep(0.0001)
    return content


def _state(pid: int) -> tuple[str, int]:
    """(the kernel's letter for a process, bytes that it read and wrote); ("", 0) when it is gone."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return "", 0
    try:
        counters = Path(f"/proc/{pid}/io").read_bytes().split()
        return letter, int(counters[1]) + int(counters[3])
    except (OSError, IndexError, ValueError):
        return letter, 0


def _signal_main_thread(pid: int, number: int) -> None:
    """To the process as a whole, some other thread of a stopped one might answer while the main thread already runs on."""
    if _tgkill is None:
        signal_process(pid, number)
    else:
        _tgkill(pid, pid, number)


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: without one the signal would end it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _settles(path: Path, before: int, patience: float) -> bool:
    """True once a file has grown past `before` bytes and stopped growing."""
    deadline = time.monotonic() + patience
    size, quiet = before, 0
    while time.monotonic() < deadline and quiet < 4:
        time.sleep(0.03)
        size, former = _size(path), size
        quiet = quiet + 1 if size == former > before else 0
    return size > before
