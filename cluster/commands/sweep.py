"""`launch.py --multirun ...`: one run for each combination of values. Words in; run folders, a table, an exit code out.

RUNS/NAME/sweep.json fixes the points. On this machine and on Ray each point is a launch of its own, --parallel at once; on Slurm
they are one job array. The same command goes on where it stopped: points that are done are not started again.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.commands.run_view import NOT_OVER
from cluster.commands.runs import backend_state
from cluster.commands.sweep_array import run_array
from cluster.commands.sweep_points import CANCELLED, LOCK, Point, Sweep, expand, fix_sweep
from cluster.commands.sweep_table import PointView, end_line, read_points, sweep_lines, view_point, write_csv
from cluster.commands.tables import count, screen_width, shorten, span
from cluster.config import LaunchConfig, override_value, parse
from cluster.flags import LaunchError, build_parser
from cluster.processes import SignalPipe, die_with_parent, signal_process, write_json
from cluster.run_folder import clean_word

HELP = """python cluster/launch.py --multirun [flags] name=NAME key=a,b other=range(3) ... [--parallel K] [--keep-failed]

One run for each combination of the values: RUNS/NAME/<number>_<values>, each with all that a run folder has.

  --parallel K    so many points at once (default: 1; on Slurm: as many as the cluster has room for)
  --keep-failed   do not start points again that failed
  --dry-run       print every point's command; start nothing

optim.lr=1e-3,1e-4, seed=range(3) and model=choice(a,b) are lists of values; a value with a comma in it needs quotes.
The same command again goes on where it stopped. Ctrl-C asks the running points to save; again: kills them.
`status NAME` shows the table at any time; at the end it is printed, and RUNS/NAME/sweep.csv is written.
`cancel NAME` stops it from anywhere. Exit code: 0 all points are done, 1 some failed, 75 some were stopped, 130 Ctrl-C."""
LAUNCHER = Path(__file__).resolve().parent.parent / "launch.py"
TICK = 0.2
REDRAW = 1.0
OWN_KEYS = ("name", "runs")


@dataclass(frozen=True)
class Plan:
    """What the command asks for."""

    folder: Path  # RUNS/NAME
    flags: tuple[str, ...]  # the launcher's, for every point
    sweep: Sweep
    parallel: int | None
    keep_failed: bool
    config: LaunchConfig  # of the first point: backend, detach, dry run

    def words(self, point: Point) -> list[str]:
        """The command line that launches a point."""
        job = [word for word in self.sweep.fixed if "=" not in word and not word.startswith("~")]
        settings = [word for word in self.sweep.fixed if word not in job]
        return [*self.flags, "--runs", str(self.folder), *job, *settings, *point.overrides, f"name={point.name}"]


def main(words: Sequence[str]) -> int:
    """Run a sweep; its exit code. Raises LaunchError before anything was started."""
    if "-h" in words or "--help" in words:
        print(HELP, flush=True)
        return 0
    plan = read_plan(words)
    if plan.config.dry_run:
        for point in plan.sweep.points:
            shown = shlex.join(clean_word(word) for word in plan.words(point) if word != "--dry-run")
            print(f"python cluster/launch.py {shown}")
        return 0
    with _sole_use(plan.folder):
        sweep = fix_sweep(plan.folder, plan.sweep)
        plan = Plan(plan.folder, plan.flags, sweep, plan.parallel, plan.keep_failed, plan.config)
        write_json(plan.folder / "command.json", _record(plan, words))
        return _run(plan)


def _record(plan: Plan, words: Sequence[str]) -> dict[str, Any]:
    """What `resume NAME` repeats."""
    from cluster.backends import choose_backend

    backend = choose_backend(plan.config)
    return {"words": [clean_word(word) for word in words], "backend": backend, "working_folder": os.getcwd()}


def read_plan(words: Sequence[str]) -> Plan:
    """The plan of a command line. Raises LaunchError."""
    rest = [word for word in words if word not in ("--multirun", "--keep-failed")]
    parallel = _take(rest, "--parallel")
    if parallel is not None and (not parallel.isdecimal() or int(parallel) < 1):
        raise LaunchError(f"--parallel {parallel}; a whole number from 1 is needed; it is how many points run at once")
    values, job_words = build_parser().parse_known_args(rest)
    overrides = [word for word in job_words if word.partition("=")[0] not in OWN_KEYS]
    flags = _without(rest, job_words)
    runs = override_value(job_words, "runs") or _take(flags, "--runs") or "runs"
    name = override_value(job_words, "name")
    if not name or "," in name or "(" in name:
        raise LaunchError("--multirun without name=...; a sweep's runs lie in a folder of that name; for example name=lr")
    if job_words and job_words[0] == "evaluate":
        raise LaunchError("--multirun evaluate; scores belong to the run that they score; evaluate runs one by one")
    sweep = expand(overrides)
    folder = Path(os.path.abspath(runs)) / name
    _take(flags, "--runs")
    parse([*flags, *_first(sweep), f"name={name}", "--runs", str(folder.parent)])  # refuses a wrong flag or name
    config = parse([*flags, *_first(sweep), f"name={sweep.points[0].name}", "--runs", str(folder)])
    if values.detach and config.backend != "slurm":
        _refuse_detached(config)
    return Plan(folder, tuple(flags), sweep, None if parallel is None else int(parallel), "--keep-failed" in words, config)


def _refuse_detached(config: LaunchConfig) -> None:
    from cluster.backends import choose_backend

    if choose_backend(config) != "slurm":
        raise LaunchError("--detach with --multirun; only Slurm keeps a queue of its own; leave --detach out, or run it in tmux")


def _first(sweep: Sweep) -> list[str]:
    return [*sweep.fixed, *sweep.points[0].overrides]


def _take(words: list[str], flag: str) -> str | None:
    """Remove `flag VALUE` or `flag=VALUE` from the words; the value, or None where the flag is not there."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            if not equals and place + 1 == len(words):
                raise LaunchError(f"{flag} needs a value; see --multirun --help")
            found = value if equals else words[place + 1]
            del words[place : place + (1 if equals else 2)]
            return found
    return None


def _without(words: Sequence[str], taken: Sequence[str]) -> list[str]:
    """`words` without the subsequence `taken`, matched from the end."""
    kept, left = [], list(taken)
    for word in reversed(words):
        if left and word == left[-1]:
            left.pop()
        else:
            kept.append(word)
    return kept[::-1]


@contextmanager
def _sole_use(folder: Path) -> Iterator[None]:
    """Two sweeps in one folder would start the same points."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            raise LaunchError(
                f"sweep {folder} is run by {holder}; one at a time; stop that one, or choose another name=..."
            ) from None
        except OSError:  # a file system without locks: each run still has its owner
            pass
        stream.truncate(0)
        stream.write(f"process {os.getpid()}")
        stream.flush()
        (folder / CANCELLED).unlink(missing_ok=True)  # of an earlier start
        yield


def _run(plan: Plan) -> int:
    from cluster.backends import choose_backend

    waiting, skipped = _waiting(plan)
    if skipped:
        say(f"{plan.folder.name}: {skipped}")
    if waiting and choose_backend(plan.config) == "slurm":
        code = run_array(plan.folder, [(point, parse(plan.words(point)), plan.words(point)) for point in waiting], plan.parallel)
    elif waiting:
        code = Queue(plan, waiting).run()
    else:
        code = 0
    points = read_points(plan.folder, backend_state)
    write_csv(plan.folder, points)
    print("\n".join(sweep_lines(plan.folder, points, screen_width())), flush=True)
    return code or exit_code(points)


def _waiting(plan: Plan) -> tuple[list[Point], str]:
    """(points to start, a word on the others)."""
    states = {point: view_point(plan.folder, point, backend_state).state for point in plan.sweep.points}
    leave = {"done", *NOT_OVER, *(["failed"] if plan.keep_failed else [])}
    left = [state for state in states.values() if state in leave]
    named = ", ".join(f"{left.count(state)} {state}" for state in sorted(set(left)))
    waiting = [point for point, state in states.items() if state not in leave]
    return waiting, f"{named} already, {len(waiting)} to start" if left else ""


def exit_code(points: Sequence[PointView]) -> int:
    """0 when all points are done, 1 when one failed, else 75."""
    states = {item.state for item in points}
    return 0 if states <= {"done"} else 1 if states & {"failed", "lost"} else 75


class Queue:
    """Points as launches of their own, `parallel` at once, until all have ended or somebody wants it to stop."""

    def __init__(self, plan: Plan, waiting: Sequence[Point]) -> None:
        self.plan = plan
        self._waiting = deque(waiting)
        self._running: dict[Point, subprocess.Popen[bytes]] = {}
        self._total = len(waiting)
        self._ended = 0
        self._failed = 0
        self._stop: int | None = None  # the signal that ended it
        self._cancelled = False
        self._drawn = 0.0
        self._line = ""

    def run(self) -> int:
        """0, or 130 and 143 when a signal stopped it; how the points ended, and which did not start, is in their folders."""
        signals = SignalPipe((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD))
        while self._running or (self._waiting and self._stop is None):
            while self._may_start():
                self._start(self._waiting.popleft())
            for number in signals.wait(TICK)[0]:
                if number != signal.SIGCHLD:
                    self._on_stop(number)
            for point in [item for item, process in self._running.items() if process.poll() is not None]:
                self._note_end(point, self._running.pop(point))
            self._draw()
        self._clear()
        return 0 if self._stop is None else 128 + self._stop

    def _may_start(self) -> bool:
        if not self._cancelled and os.path.exists(self.plan.folder / CANCELLED):
            self._on_cancel()
        return bool(self._waiting) and self._stop is None and len(self._running) < (self.plan.parallel or 1)

    def _on_cancel(self) -> None:
        """`cancel` stops the points that it sees running. One whose launcher just begins it cannot see: we ask them all."""
        self._cancelled = True
        self._clear()
        say(f"{self.plan.folder.name} is cancelled: {len(self._running)} running points save, {len(self._waiting)} do not start")
        self._waiting.clear()
        for process in self._running.values():
            signal_process(process.pid, signal.SIGTERM)

    def _start(self, point: Point) -> None:
        folder = self.plan.folder / point.name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "launch.log", "ab") as log:
            command = [sys.executable, str(LAUNCHER), *self.plan.words(point)]
            # A session of its own: the terminal's Ctrl-C comes through us. It dies with us: its agents then end its ranks.
            self._running[point] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent()
            )

    def _on_stop(self, number: int) -> None:
        again = self._stop is not None
        self._stop = self._stop or number
        self._clear()
        say("killing the running points" if again and number == signal.SIGINT else
            f"stopping: {len(self._running)} running points save (Ctrl-C again: kill)")  # fmt: skip
        for process in self._running.values():
            signal_process(process.pid, number)

    def _note_end(self, point: Point, process: subprocess.Popen[bytes]) -> None:
        self._ended += 1
        failed = process.returncode not in (0, 75) and not self._cancelled
        self._failed += failed and self._stop is None
        self._clear()
        view = view_point(self.plan.folder, point)
        said = _last_word(self.plan.folder / point.name / "launch.log") if failed else ""
        say(end_line(view, self._ended, self._total, said))

    def _draw(self) -> None:
        if not self._running or not sys.stderr.isatty() or time.monotonic() - self._drawn < REDRAW:
            return
        self._drawn = time.monotonic()
        running = [view_point(self.plan.folder, point) for point in self._running]
        at = ", ".join(f"{item.point.name}{_progress(item)}" for item in running)
        line = f"{self._ended}/{self._total} ended, {self._failed} failed; running: {at}"
        self._line = shorten(line, (screen_width() or 80) - 1)
        sys.stderr.write(f"\r\x1b[K{self._line}")
        sys.stderr.flush()

    def _clear(self) -> None:
        if self._line:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._line, self._drawn = "", 0.0


def _progress(item: PointView) -> str:
    if item.run is None or item.run.step is None:
        return ""
    of = f"/{count(item.run.steps)}" if item.run.steps else ""
    return f" {count(item.run.step)}{of}" + (f", {span(item.run.eta_s)} left" if item.run.eta_s is not None else "")


def _last_word(log: Path) -> str:
    from cluster.verdict import last_lines

    return next(iter(last_lines(log, 1)), "it said nothing")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
