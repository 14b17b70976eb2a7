"""One profile under way: torch's profiler over a few updates, with a mark for each update and each phase in it.

Comes in: the updates as they are done. Goes out: files, see observe/profiler.py, which decides when.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainer.observe.trace_summary import Summary, summarise
from trainer.step import Clock

SNAPSHOT_ENTRIES = 200_000  # allocations that CUDA's snapshot remembers
GROWS = 8  # torch takes so many times the memory of a recording to end it: 0.4 KiB an event become 3


class Recording:
    """Begins when it is made, behind update `first`; `done`: the last update that is in it."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.done = first, last, first
        self._cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._marks: dict[str, Any] = {}
        self._profile: Any = profile(activities=activities, record_shapes=True, profile_memory=True)
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
        self._began_with = resident_bytes()
        self._profile.start()
        Clock.watcher = self._phase
        self._mark("step", f"step {first + 1}")

    def mark(self, step: int) -> None:
        """`step` updates are done, the next one begins."""
        self.done = step
        self._mark("step", f"step {step + 1}")

    def fills_memory(self) -> bool:
        """Whether ending it later would take more than half of the memory that is free: then it must end now."""
        return GROWS * (resident_bytes() - self._began_with) > free_bytes() / 2

    def _phase(self, phase: str | None) -> None:
        self._mark("phase", phase)

    def _mark(self, kind: str, name: str | None) -> None:
        former = self._marks.pop(kind, None)
        if former is not None:
            former.__exit__(None, None, None)
        if name is not None:
            self._marks[kind] = record_function(name)
            self._marks[kind].__enter__()

    def write(self, folder: Path, name: str) -> list[str]:
        """End it; the names of the files, the trace first."""
        self._end()
        files = [f"{name}.trace.json.gz", f"{name}.memory.{'pickle' if self._cuda else 'json'}", f"{name}.operators.txt"]
        hidden = [folder / f".{file}" for file in files]
        trace = folder / f".{name}.trace.json"
        try:
            self._profile.export_chrome_trace(str(trace))
            found = summarise(trace)
            hidden[2].write_text(found.table())
            self._write_memory(hidden[1], found)
            with trace.open("rb") as plain, gzip.open(hidden[0], "wb", compresslevel=3) as packed:
                shutil.copyfileobj(plain, packed, 1 << 20)
            for temporary, file in zip(hidden, files, strict=True):
                temporary.replace(folder / file)
        finally:
            self._forget()
            for temporary in (trace, *hidden):
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
        return files

    def drop(self) -> None:
        """End it without a file, whatever state it is in."""
        with contextlib.suppress(Exception):
            self._end()
        with contextlib.suppress(Exception):
            self._forget()

    def _end(self) -> None:
        Clock.watcher = None
        for kind in ("phase", "step"):
            self._mark(kind, None)
        self._profile.stop()

    def _forget(self) -> None:
        if self._cuda:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write_memory(self, path: Path, found: Summary) -> None:
        """CUDA: the allocator's snapshot with its history, for pytorch.org/memory_viz. CPU: torch keeps no such history there,
        so the curve of what tensors took, and which operators took it."""
        if self._cuda:
            torch.cuda.memory._dump_snapshot(str(path))
        else:
            path.write_text(json.dumps(found.memory()))


def resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def free_bytes() -> float:
    """What this machine, or the job's share of it, has left; infinity where nobody says."""
    left = [float("inf")]
    with contextlib.suppress(OSError, IndexError):
        left.append(1024 * int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]))
    for group in (Path("/sys/fs/cgroup"), *_own_group()):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            left.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(left)


def _own_group() -> list[Path]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        return [Path("/sys/fs/cgroup" + line[3:]) for line in lines if line.startswith("0::/")]
    return []


__all__ = ["Recording", "free_bytes", "resident_bytes"]
