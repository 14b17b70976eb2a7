"""This rank's heartbeat: what the training loop says goes in; a small record in memory that the node's agent reads comes out.

The agent maps a file for each rank and names it in SLOTSTREAM_HEARTBEAT; without it every call here does nothing. The agent reads
the record without asking the rank, so a rank that hangs, or is stopped, still tells where it was. cluster/heartbeats.py holds the
same layout. Collectives are counted in one place (`count_collectives`), whoever calls them. No torch import at module level.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

PHASES = ("start", "load", "data", "forward", "exchange", "backward", "optimizer", "save", "evaluate", "finish")
# in_collective is 0, or 1 + the index of what the rank waits in. "device_read": the host waits for the device, and so for others.
OPERATIONS = (
    "all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "gather", "scatter", "send", "recv",
    "barrier", "wait", "device_read", "other",
)  # fmt: skip
# sequence (odd while being written), pid, version, step, phase, in_collective, collectives launched so far, CLOCK_MONOTONIC of
# the last change; then seconds of finished steps: data, compute, communication, save, evaluate, all; their number; seconds for
# which this phase may be silent by this rank's own settings (0: they do not say)
RECORD = "<QIIqIIQdddddddQd"
# The last WINDOWS groups of WINDOW_STEPS finished steps each: number (1 is the first; 0: empty), seconds of the whole group in
# data, compute, communication, save. A reader that looks twice a second still sees steps of 16 ms group by group.
WINDOW = "<Qdddd"
WINDOW_STEPS, WINDOWS, WINDOWS_AT = 2, 20, 128
FILE_BYTES = 1024
VERSION = 1

_SEQUENCE, _WHO, _PLACE, _SUMS, _ALLOWED, _WINDOW = map(struct.Struct, ("<Q", "<II", "<qIIQd", "<ddddddQ", "<d", WINDOW))
_WHO_AT, _PLACE_AT, _SUMS_AT, _ALLOWED_AT = 8, 16, 48, 104
_DATA, _COMPUTE, _COMMUNICATION, _SAVE, _EVALUATE, _OTHER = range(6)
_COLUMN = {"data": _DATA, "save": _SAVE, "evaluate": _EVALUATE, "start": _OTHER, "load": _OTHER, "finish": _OTHER}
_COLUMNS = [_COLUMN.get(phase, _COMPUTE) for phase in PHASES]
_SHARED = (_DATA, _COMPUTE, _SAVE)  # a wait for others in one of these is communication


class Heartbeat:
    """Writes the record in `memory`; None: keeps quiet. For one thread at a time, the one that trains."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self._memory = memory
        self._sequence, self._step, self._phase, self._collective = 0, -1, 0, 0
        self._waits_in = 0
        self._allowed = [0.0] * len(PHASES)
        self._since = time.monotonic()
        self._spent = [0.0] * 6  # of the step under way, by column
        self._sums, self._steps = [0.0] * 6, 0
        self._group = [0.0] * 6
        if memory is not None:
            _WHO.pack_into(memory, _WHO_AT, os.getpid(), VERSION)
        self._write()

    @property
    def alive(self) -> bool:
        return self._memory is not None

    @property
    def at(self) -> str:
        """The phase."""
        return PHASES[self._phase]

    @property
    def waits(self) -> bool:
        """Inside a collective."""
        return self._waits_in > 0

    def allow(self, name: str, seconds: float) -> None:
        """A later phase `name` may be silent for so long without being taken for a hang."""
        self._allowed[PHASES.index(name)] = seconds

    def phase(self, name: str) -> None:
        """This rank begins phase `name` of PHASES."""
        if self._memory is not None:
            self._account()
            self._phase = PHASES.index(name)
            self._write()

    def step(self, number: int) -> None:
        """Update `number` (0 is the first) begins; what was spent since the last such call is the step before it."""
        if self._memory is None:
            return
        self._account()
        if self._step >= 0:
            self._add_step()
        self._step, self._spent = number, [0.0] * 6
        self._write(sums=True)

    def enter(self, operation: int, count: bool = True) -> None:
        """A collective is launched, or waited for: `operation` is 1 + its index in OPERATIONS."""
        self._account()
        self._waits_in = operation
        self._collective += count
        self._write()

    def leave(self) -> None:
        self._account()
        self._waits_in = 0
        self._write()

    @contextlib.contextmanager
    def reading_device(self) -> Iterator[None]:
        """Where the host waits until the device is through. On a GPU collectives return at once: this is where a rank hangs."""
        if self._memory is None or self._waits_in:
            yield
            return
        self.enter(_CODES["device_read"], count=False)
        try:
            yield
        finally:
            self.leave()

    def _account(self) -> None:
        """The time since the last change goes to the phase, or to communication where others were waited for."""
        now = time.monotonic()
        column = _COLUMNS[self._phase]
        if self._waits_in and column in _SHARED:
            column = _COMMUNICATION
        self._spent[column] += now - self._since
        self._since = now

    def _add_step(self) -> None:
        self._sums = [total + spent for total, spent in zip(self._sums, self._spent, strict=True)]
        self._group = [total + spent for total, spent in zip(self._group, self._spent, strict=True)]
        self._steps += 1

    def _write(self, sums: bool = False) -> None:
        """The sequence number is odd while the rest is written: a reader that sees it odd, or changed, looks again."""
        memory = self._memory
        if memory is None:
            return
        sequence = self._sequence
        self._sequence = sequence + 2
        _SEQUENCE.pack_into(memory, 0, sequence + 1)
        _PLACE.pack_into(memory, _PLACE_AT, self._step, self._phase, self._waits_in, self._collective, self._since)
        _ALLOWED.pack_into(memory, _ALLOWED_AT, self._allowed[self._phase])
        if sums:
            _SUMS.pack_into(memory, _SUMS_AT, *self._sums[:5], sum(self._sums), self._steps)
            number, rest = divmod(self._steps, WINDOW_STEPS)
            if number and not rest:
                at = WINDOWS_AT + (number - 1) % WINDOWS * _WINDOW.size
                _WINDOW.pack_into(memory, at, number, *self._group[:4])
                self._group = [0.0] * 6
        _SEQUENCE.pack_into(memory, 0, sequence + 2)


_CODES = {name: index + 1 for index, name in enumerate(OPERATIONS)}
_mine = Heartbeat()


def start() -> Heartbeat:
    """Begin this process's heartbeat in the file of SLOTSTREAM_HEARTBEAT. No file, or one that cannot be mapped: a quiet one."""
    global _mine
    path = os.environ.get("SLOTSTREAM_HEARTBEAT")
    if path:
        with contextlib.suppress(OSError, ValueError), open(path, "r+b") as file:
            _mine = Heartbeat(mmap.mmap(file.fileno(), FILE_BYTES))
    return _mine


def mine() -> Heartbeat:
    """The heartbeat of this process."""
    return _mine


@contextlib.contextmanager
def during(name: str) -> Iterator[None]:
    """Phase `name` inside, the former phase after it. Also a decorator."""
    former = _mine.at
    _mine.phase(name)
    try:
        yield
    finally:
        _mine.phase(former)


def count_collectives() -> None:
    """Have every collective of torch.distributed, DeepSpeed's among them, counted and marked. Before DeepSpeed is imported.

    A blocking one is marked until it returns; an asynchronous one while it is launched and while somebody waits for it.
    """
    if not _mine.alive:
        return
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    for name in _COUNTED:
        function = getattr(distributed_c10d, name, None)
        if function is None or hasattr(function, "counted_by_heartbeat"):
            continue
        wrapped = _counted(function, _mine, _code_of(name), count=True)
        for module in (distributed_c10d, dist):  # its own functions call each other in the first, users call the second
            if hasattr(module, name):
                setattr(module, name, wrapped)
    if not hasattr(dist.Work.wait, "counted_by_heartbeat"):
        dist.Work.wait = _counted(dist.Work.wait, _mine, _CODES["wait"], count=False)  # type: ignore[method-assign]


# Object collectives and DeepSpeed's coalesced ones are built on these.
_COUNTED = (
    "all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "all_gather", "all_gather_coalesced", "all_gather_into_tensor",
    "all_gather_single", "_all_gather_base", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single",
    "_reduce_scatter_base", "all_to_all", "all_to_all_single", "gather", "scatter", "send", "recv", "barrier",
    "monitored_barrier",
)  # fmt: skip


def _code_of(name: str) -> int:
    found = [operation for operation in OPERATIONS if name.removeprefix("_").startswith(operation)]
    return _CODES[max(found, key=len, default="barrier" if "barrier" in name else "other")]


def _counted(function: Callable, beat: Heartbeat, operation: int, count: bool) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if beat.waits:  # one collective calls another: one is counted
            return function(*args, **kwargs)
        beat.enter(operation, count)
        try:
            return function(*args, **kwargs)
        finally:
            beat.leave()

    call.counted_by_heartbeat = True  # type: ignore[attr-defined]
    return call
