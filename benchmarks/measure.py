"""How time and memory are taken. A piece of code comes in, seconds or bytes go out."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

WHOLE = "whole"


class Seconds(NamedTuple):
    """CPU seconds of every thread of this process, and wall seconds."""

    cpu: float
    wall: float


class PartClock:
    """Seconds by part. Parts do not nest, except in the one named WHOLE.

    On CUDA every reading waits for the device first, so that a part's time is its own; without the clock parts may overlap.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, Seconds] = {}
        self._began: dict[str, Seconds] = {}

    def start(self, name: str) -> None:
        self._began[name] = self._now()

    def stop(self, name: str) -> None:
        now, began, before = self._now(), self._began.pop(name), self.parts.get(name, Seconds(0.0, 0.0))
        self.parts[name] = Seconds(before.cpu + now.cpu - began.cpu, before.wall + now.wall - began.wall)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.start(name)
        yield
        self.stop(name)

    def take(self) -> dict[str, Seconds]:
        """What has been added up since the last call."""
        parts, self.parts = self.parts, {}
        return parts

    def _now(self) -> Seconds:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return Seconds(time.process_time(), time.perf_counter())


def median_of(rounds: list[Seconds]) -> Seconds:
    return Seconds(statistics.median(one.cpu for one in rounds), statistics.median(one.wall for one in rounds))


def timed(call: Callable[[], object], device: torch.device) -> Seconds:
    clock = PartClock(device)
    with clock.part(WHOLE):
        call()
    return clock.parts[WHOLE]


class TensorPeak(NamedTuple):
    """Most bytes that tensors held at once above those held before, and the largest block among all (None: not known)."""

    bytes: int
    largest_block: int | None


def peak_of_tensors(call: Callable[[], object], device: torch.device) -> TensorPeak:
    """Memory of tensors during `call`. Exact: read from the allocator, which the profiler follows on the CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return TensorPeak(torch.cuda.max_memory_allocated(device) - before, None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [(event["args"]["Addr"], event["args"]["Bytes"]) for event in sorted(events, key=lambda one: one["args"]["Ev Idx"])]
    return TensorPeak(peak_of_changes(changes), max((size for _, size in changes), default=0))


def peak_of_changes(changes: Iterable[tuple[int, int]]) -> int:
    """The most bytes that were held, of (address, bytes) in order, freed bytes negative.

    The profiler loses an event now and then. A block at an address that is in use tells that a free was lost.
    """
    held: dict[int, int] = {}
    total = peak = 0
    for address, size in changes:
        total += size
        if size < 0:
            held.pop(address, None)
        else:
            total -= held.get(address, 0)
            held[address] = size
        peak = max(peak, total)
    return peak


def peak_resident_bytes(call: Callable[[], object]) -> tuple[int, bool]:
    """Growth of the process's resident memory at its highest during `call`, and whether the mark could be reset before.

    Free memory is handed back to the system first. Where the mark cannot be reset, it is the highest of the process's life,
    and the growth comes out too large or, when an earlier peak was higher, meaningless.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    reset = _reset_high_water_mark()
    before = _status_bytes("VmRSS") or _lifetime_peak()
    call()
    peak = _status_bytes("VmHWM") or _lifetime_peak()
    return max(0, peak - before), reset


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    """A figure of /proc/self/status; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _lifetime_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
