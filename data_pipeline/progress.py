"""What a long command shows: one live line on a terminal, else a plain line now and then; sizes and times for people."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

Show = Callable[[int, int], None]  # (videos, frames) done so far


@contextlib.contextmanager
def progress_line(total: int, every_s: float = 10.0) -> Iterator[Show]:
    """A function (videos, frames) -> None: one live line on a terminal, else a plain line every few seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        speed = TextColumn("{task.fields[speed]}")
        columns = ("videos", BarColumn(), MofNCompleteColumn(), speed, TimeElapsedColumn(), "left", TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("videos", total=total, speed="")
            began = time.monotonic()
            yield lambda videos, frames: bar.update(
                task, completed=videos, speed=f"{frames / max(time.monotonic() - began, 1e-9):.1f} frames/s"
            )
        return
    yield _plain_lines(total, every_s)


def _plain_lines(total: int, every_s: float) -> Show:
    began = last = time.monotonic()

    def show(videos: int, frames: int) -> None:
        nonlocal last
        now = time.monotonic()
        if videos and (now - last >= every_s):
            last, speed = now, videos / (now - began)
            left = format_seconds((total - videos) / speed)
            print(f"{videos}/{total} videos, {frames / (now - began):.1f} frames/s, {left} left", file=sys.stderr, flush=True)

    return show


def format_bytes(size: float) -> str:
    """Decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
