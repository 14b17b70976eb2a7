"""Speed and memory of a training loop: one call per step goes in, one dict per log line comes out. No torch import here."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

_GIB = 2.0**30


class Meter:
    """Counts clips and frames over a window that ends at each `report`.

        meter = Meter()
        for batch in loader:
            ...
            meter.update(clips=8, frames=32, data_wait_s=waited)    # once a step
            if step % 50 == 0:
                log(meter.report())

    Counts are whatever the caller passes: give a rank's own for its own speed, the global ones for the run's.
    """

    def __init__(self, start: float | None = None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.restart(start)

    def restart(self, start: float | None = None) -> None:
        """Begin a new window now (or at clock time `start`), for example after a pause for evaluation."""
        self._start = self._clock() if start is None else start
        self._steps = self._clips = self._frames = 0
        self._wait_s = 0.0

    def update(self, clips: int, frames: int, data_wait_s: float = 0.0) -> None:
        """Count one finished step."""
        self._steps += 1
        self._clips += clips
        self._frames += frames
        self._wait_s += data_wait_s

    def report(self) -> dict[str, float]:
        """Rates over the window, then a new window. An empty window gives memory alone.

        Units: step_ms is wall time of a step with its wait for data in it; GiB are 2**30 bytes.
        On a GPU call it only where the host waits for the device anyway, or queued work is not in the times.
        """
        now = self._clock()
        values = {"mem/peak_gib": peak_gib()}
        if self._steps:
            elapsed = max(now - self._start, 1e-9)
            values["speed/clips_per_s"] = self._clips / elapsed
            values["speed/frames_per_s"] = self._frames / elapsed
            values["time/step_ms"] = 1e3 * elapsed / self._steps
            values["time/data_wait_ms"] = 1e3 * self._wait_s / self._steps
        self.restart(now)
        return values


def peak_gib() -> float:
    """Most memory this process has had so far: of its GPU where it uses one, else resident on the host."""
    torch = sys.modules.get("torch")  # nobody used a GPU without importing it
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / _GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / _GIB  # Linux counts in KiB
