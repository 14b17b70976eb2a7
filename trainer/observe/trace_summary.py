"""What a trace adds up to: the JSON that torch writes in; operators by their own time and memory, and a curve of memory out.

Read line by line: a trace of a hundred updates has a million events, which torch's own tables hold at kilobytes each.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = ("cpu_op", "user_annotation")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
POINTS = 2000  # of the memory curve
ROWS = 100


@dataclass
class Operator:
    """Sums over a trace. Microseconds, and bytes made less bytes freed; `self`: without what operators inside it took."""

    name: str
    calls: int = 0
    self_us: float = 0.0
    total_us: float = 0.0
    self_bytes: int = 0


@dataclass
class Summary:
    host: list[Operator]  # most time of their own first
    device: list[Operator]
    curve: list[tuple[float, int]]  # (microseconds, bytes that CPU tensors made in the profile hold)

    def table(self) -> str:
        """The operators as text."""
        parts = [_table("operators of the host", self.host), *([_table("kernels", self.device)] if self.device else [])]
        return "\n\n".join(parts) + "\n"

    def memory(self) -> dict[str, Any]:
        every = -(-len(self.curve) // POINTS)
        groups = [self.curve[start : start + every] for start in range(0, len(self.curve), every)]
        makers = sorted((one for one in self.host if one.self_bytes > 0), key=lambda one: -one.self_bytes)
        return {
            "what": "bytes of CPU tensors made since the profile began; each point is the most of its stretch",
            "peak_bytes": max(point[1] for point in self.curve),
            "end_bytes": self.curve[-1][1],
            "curve_us_bytes": [max(group, key=lambda point: point[1]) for group in groups],
            "operators": [{"name": one.name, "calls": one.calls, "self_bytes": one.self_bytes} for one in makers[:ROWS]],
        }


def summarise(trace: Path) -> Summary:
    """Of a trace that is not packed."""
    host: list[tuple[Any, float, float, str, int]] = []  # thread, begin, minus duration (0 for a change of memory), name, bytes
    device: dict[str, Operator] = {}
    with trace.open(encoding="utf-8", errors="replace") as file:
        for event in _events(file):
            category, name = event.get("cat"), str(event.get("name"))
            if category in HOST:
                host.append((event.get("tid"), float(event["ts"]), -float(event.get("dur", 0)), name, 0))
            elif name == "[memory]" and event["args"].get("Device Type") == 0:
                host.append((event.get("tid"), float(event["ts"]), 0.0, "", int(event["args"]["Bytes"])))
            elif category in DEVICE:
                one = device.setdefault(name, Operator(name))
                one.calls, one.self_us = one.calls + 1, one.self_us + float(event.get("dur", 0))
                one.total_us = one.self_us
    host.sort(key=lambda one: (str(one[0]), one[1], one[2]))
    changes = sorted((begin, size) for _, begin, _, name, size in host if not name)
    return Summary(_by_time(_nested(host)), _by_time(device.values()), _curve(changes))


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Each object of traceEvents; one that cannot be read is left out."""
    taken: list[str] = []
    for line in lines:
        if line.rstrip() == "  {":
            taken = [line]
        elif taken and line.startswith("  }"):
            with contextlib.suppress(ValueError):
                yield json.loads("".join(taken) + "}")
            taken = []
        elif taken:
            taken.append(line)


def _nested(events: Iterable[tuple[Any, float, float, str, int]]) -> Iterable[Operator]:
    """Operators with their own time and bytes: of what happens in another operator on its thread, only that one has it."""
    found: dict[str, Operator] = {}
    open_: list[tuple[Any, float, Operator]] = []  # thread, end, operator; the innermost last
    for thread, begin, minus_duration, name, size in events:
        while open_ and (open_[-1][0] != thread or open_[-1][1] <= begin):
            open_.pop()
        outer = open_[-1][2] if open_ else None
        if not name:
            if outer is not None:
                outer.self_bytes += size
            continue
        one, duration = found.setdefault(name, Operator(name)), -minus_duration
        one.calls, one.self_us, one.total_us = one.calls + 1, one.self_us + duration, one.total_us + duration
        if outer is not None:
            outer.self_us -= duration
        open_.append((thread, begin + duration, one))
    return found.values()


def _curve(changes: list[tuple[float, int]]) -> list[tuple[float, int]]:
    curve, held = [(0.0, 0)], 0
    for when, size in changes:
        held += size
        curve.append((when - changes[0][0], held))
    return curve


def _by_time(operators: Iterable[Operator]) -> list[Operator]:
    return sorted(operators, key=lambda one: -one.self_us)


def _table(title: str, operators: list[Operator]) -> str:
    whole = sum(one.self_us for one in operators) or 1.0
    lines = [
        f"{title}, by time of their own",
        f"{'share':>7} {'self ms':>11} {'total ms':>11} {'calls':>8} {'self MiB':>10}  name",
    ]
    lines += [
        f"{100 * one.self_us / whole:6.1f}% {one.self_us / 1e3:11.3f} {one.total_us / 1e3:11.3f} {one.calls:8d} "
        f"{one.self_bytes / 2**20:10.2f}  {one.name[:90]}"
        for one in operators[:ROWS]
    ]
    return "\n".join(lines)


__all__ = ["Operator", "Summary", "summarise"]
