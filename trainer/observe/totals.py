"""What a run's progress lines add up to: their values in, the rows of the summary at its end out. Console holds one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Totals:
    """Of this attempt: updates, speed and wait over all of its windows, the highest memory, the last line's values."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, step: int) -> None:
        """`step` updates were done before."""
        self.first = self.last = step
        self.values: dict[str, Any] = {}
        self._clips = self._wait_s = self._seconds = self._memory_gib = 0.0

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """One log line: its rates hold for the updates since the line before."""
        seconds = (step - self.last) * values.get("time/step_ms", 0.0) / 1e3
        self._seconds += seconds
        self._clips += seconds * values.get("speed/clips_per_s", 0.0)
        self._wait_s += (step - self.last) * values.get("time/data_wait_ms", 0.0) / 1e3
        self._memory_gib = max(self._memory_gib, values.get("mem/peak_gib", 0.0))
        self.last, self.values = step, dict(values)

    def rows(self) -> list[tuple[str, str]]:
        """What is known, by name; speed is of updates alone, without saves and evaluations."""
        rows = []
        if self._seconds and self._clips:
            share = self._wait_s / self._seconds
            rows.append(("speed", f"{self._clips / self._seconds:.3g} clips/s, {100 * share:.0f} % of the time waiting for data"))
        if self._memory_gib:
            rows.append(("memory", f"{self._memory_gib:.2f} GiB at most, of rank 0"))
        if self.values.get("data/skipped"):
            rows.append(("data", f"damaged samples replaced on rank 0: {self.values['data/skipped']}"))
        return rows


__all__ = ["Totals"]
