"""A sweep's points as one Slurm job array: points in; submitted, watched to their end; an exit code out."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.commands.run_reader import job_record, read_json
from cluster.commands.run_view import NOT_OVER
from cluster.commands.runs import backend_state
from cluster.commands.sweep_points import Point
from cluster.commands.sweep_table import PointView, end_line, summary, view_point
from cluster.config import LaunchConfig
from cluster.flags import LaunchError
from cluster.processes import SignalPipe

LOOK = 2.0  # seconds between two looks
LOOK_PER_POINT = 0.1  # and longer with many points: each that waits is a question to Slurm


def run_array(folder: Path, launches: Sequence[tuple[Point, LaunchConfig, list[str]]], parallel: int | None) -> int:
    """Submit all points or none, watch them unless --detach; 0, or 130 and 143 when it was stopped. Raises LaunchError."""
    slurm: Any = importlib.import_module("cluster.backends.slurm")
    ids = slurm.submit_array([(config, words) for _, config, words in launches], parallel)
    say(f"{folder.name}: {len(ids)} points are job {str(ids[0]).partition('_')[0]}")
    if launches[0][1].detach:
        return 0
    return Watch(folder, [point for point, _, _ in launches]).run()


class Watch:
    """Follows points by their folders until none is queued or runs; a stop signal cancels those that are left."""

    def __init__(self, folder: Path, points: Sequence[Point]) -> None:
        self.folder = folder
        self._left = list(points)
        self._total = len(points)
        self._stop: int | None = None
        self._said = ""

    def run(self) -> int:
        signals = SignalPipe((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        while self._left:
            views = [view_point(self.folder, point, backend_state) for point in self._left]
            for view in views:
                if view.state not in NOT_OVER:
                    self._left.remove(view.point)
                    say(end_line(view, self._total - len(self._left), self._total))
            self._say_states([view for view in views if view.state in NOT_OVER])
            if self._left:
                for number in signals.wait(LOOK + LOOK_PER_POINT * len(self._left))[0]:
                    self._on_stop(number)
        return 0 if self._stop is None else 128 + self._stop

    def _say_states(self, live: Sequence[PointView]) -> None:
        text = summary(live)
        if live and text != self._said:
            self._said = text
            say(f"{time.strftime('%H:%M:%S')} {text}")

    def _on_stop(self, number: int) -> None:
        now = self._stop is not None and number == signal.SIGINT
        self._stop = self._stop or number
        say("killing what is left" if now else "stopping: running points save, queued ones are taken back (Ctrl-C again: kill)")
        from cluster.backends import BACKENDS

        for point in self._left:
            job = read_json(job_record(self.folder / point.name))
            try:
                BACKENDS["slurm"].cancel(job, now)
            except (LaunchError, OSError) as error:
                say(f"{point.name}: {error}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
