"""What a long command shows: one live line on a terminal, else a plain line now and then; sizes and times for people."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator

from data_pipeline.errors import ConfigError

Show = Callable[[int, int], None]  # done so far: of what is counted, of what the speed is told in


@contextlib.contextmanager
def progress_line(total: int, every_s: float = 10.0, counted: str = "videos", speed_of: str = "frames") -> Iterator[Show]:
    """A function (videos, frames) -> None: one live line on a terminal, else a plain line every few seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        speed = TextColumn("{task.fields[speed]}")
        columns = (counted, BarColumn(), MofNCompleteColumn(), speed, TimeElapsedColumn(), "left", TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(counted, total=total, speed="")
            began = time.monotonic()
            yield lambda done, amount: bar.update(
                task, completed=done, speed=f"{amount / max(time.monotonic() - began, 1e-9):.1f} {speed_of}/s"
            )
        return
    yield _plain_lines(total, every_s, counted, speed_of)


def _plain_lines(total: int, every_s: float, counted: str, speed_of: str) -> Show:
    began = last = time.monotonic()

    def show(done: int, amount: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done and (now - last >= every_s):
            last, speed = now, done / (now - began)
            left = format_seconds((total - done) / speed)
            line = f"{done}/{total} {counted}, {amount / (now - began):.1f} {speed_of}/s, {left} left"
            print(line, file=sys.stderr, flush=True)

    return show


def format_bytes(size: float) -> str:
    """Decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def parse_bytes(key: str, text: str) -> int:
    """A size as people write it: 500000, 64MB, 1.5 TB (decimal), 64MiB (binary). Raises ConfigError naming `key`."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{key}={text}; a size is needed; write it like 200GB, 1.5TB or 64MiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
