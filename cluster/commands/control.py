"""`launch.py cancel NAME` and `resume NAME`: a run's name in; it is stopped or started again; an exit code out."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.commands.run_reader import job_record, newest_attempt, read_json, text
from cluster.commands.run_view import NOT_OVER, RunView, read_run
from cluster.commands.runs import CommandParser, backend_state, find, is_sweep
from cluster.commands.sweep_points import CANCELLED, is_started, read_sweep
from cluster.commands.tables import count, span
from cluster.flags import LaunchError
from cluster.run_folder import HIDDEN, clean_word

CANCEL_HELP = """Stop a run, on whatever backend it is: its ranks save and end, then it is not started again by itself.

The command waits until the run has ended and says how. With --now nothing is saved: what is left are the checkpoints
that are there. Exit code: 0 stopped (or was not running), 1 it did not end in time."""
RESUME_HELP = """Start a run again, with the words and on the backend it was started with; it goes on at its newest checkpoint.

key=value words are added behind the recorded ones; what has made the checkpoints cannot be changed under way.
A run that is done or still running is refused. For a sweep: its points that are not done are started."""
LOOK = 0.2
PATIENCE = 120.0  # seconds beyond the run's own grace time


def cancel(words: Sequence[str]) -> int:
    """Stop a run and wait for its end. Raises LaunchError when it cannot be reached from here."""
    parser = CommandParser("cancel", "NAME [--now] [--wait S] [--runs DIR]", CANCEL_HELP)
    parser.add_argument("name", metavar="NAME", help="a run, SWEEP/POINT, or a sweep: all its points, and no further one starts")
    parser.add_argument("--now", action="store_true", help="kill at once, without a save")
    parser.add_argument("--wait", type=float, metavar="S", help=f"wait so long for its end (default: grace + {PATIENCE:g})")
    flags = parser.read(words)
    folder = find(Path(flags.runs), flags.name)
    if is_sweep(folder):
        return _cancel_sweep(folder, flags.wait, flags.now)
    if (state := _look(folder).state) not in NOT_OVER:
        say(f"{flags.name} is not running: {state}")
        return 0
    _stop(folder, flags.now)
    return _await_end(folder, flags.wait, flags.now)


def _cancel_sweep(folder: Path, wait: float | None, now: bool) -> int:
    """Stop all points, whatever becomes of one of them; raises LaunchError with a line for each that cannot be reached."""
    (folder / CANCELLED).touch()  # first: else the end of a point is the beginning of the next
    started = is_started(folder)
    live = [item for item in _points(folder) if _look(item).state in NOT_OVER]
    if not live and not started:
        say(f"no point of {folder.name} is running")
        return 0
    refused: dict[Path, str] = {}
    for item in live:
        try:
            _stop(item, now)
        except LaunchError as error:
            refused[item] = str(error)
    code = max((_await_end(item, wait, now) for item in live if item not in refused), default=0)
    if started and not refused:
        code = max(code, _await_starter(folder, wait))
    if refused:
        raise LaunchError("\n".join(refused.values()))
    return code


def _await_starter(folder: Path, wait: float | None) -> int:
    """Wait for the process that starts the points: it ends those that were not to be seen yet, and frees the sweep."""
    patience = PATIENCE if wait is None else wait
    deadline = time.monotonic() + patience
    while is_started(folder) and time.monotonic() < deadline:
        time.sleep(LOOK)
    if is_started(folder):
        say(f"the process that starts {folder.name}'s points has not ended after {span(patience)}; see {folder / 'command.json'}")
        return 1
    say(f"{folder.name}: no further point starts; resume {folder.name} goes on with it")
    return 0


def _points(folder: Path) -> list[Path]:
    sweep = read_sweep(folder)
    return [folder / point.name for point in sweep.points if os.path.isdir(folder / point.name)] if sweep else []


def _look(folder: Path) -> RunView:
    return read_run(folder, time.time(), backend_state)


def _stop(folder: Path, now: bool) -> None:
    from cluster.backends import BACKENDS

    record = job_record(folder)
    job = read_json(record)
    host = text(job, "host")
    if job.get("backend") == "local" and host is not None and host != socket.gethostname():
        raise LaunchError(f"{folder.name} runs on {host}, this is {socket.gethostname()}; give the same command there")
    backend: Any = BACKENDS.get(text(job, "backend") or "")
    if backend is None:
        raise LaunchError(f"{record} does not say who runs {folder.name}; stop its launcher where it was started")
    say(f"{folder.name}: killing it" if now else f"{folder.name}: asked to save and stop")
    backend.cancel(job, now)


def _await_end(folder: Path, wait: float | None, now: bool) -> int:
    patience = wait if wait is not None else PATIENCE + (0.0 if now else _grace(folder))
    deadline = time.monotonic() + patience
    view = _look(folder)
    while view.state in NOT_OVER and time.monotonic() < deadline:
        time.sleep(LOOK)
        view = _look(folder)
    if view.state in NOT_OVER:
        say(f"{folder.name} is still {view.state} after {span(patience)}; look at it again, or: cancel {folder.name} --now")
        return 1
    saved = "no checkpoint" if view.checkpoint is None else f"newest checkpoint step {count(view.checkpoint)}"
    age = "" if view.checkpoint_age_s is None else f", {span(view.checkpoint_age_s)} old"
    say(f"{folder.name}: {view.state}; {saved}{age}" + (f"; {view.problem}" if view.problem else ""))
    return 0


def _grace(folder: Path) -> float:
    words = _recorded_words(read_json(job_record(folder)))
    for place, word in enumerate(words):
        value = word.partition("=")[2] or (words[place + 1] if place + 1 < len(words) else "")
        if word.partition("=")[0] == "--grace":
            try:
                return float(value)
            except ValueError:
                break
    return 30.0


def _recorded_words(job: dict[str, Any]) -> list[str]:
    words = job.get("words")
    return [word for word in words if isinstance(word, str)] if isinstance(words, list) else []


def resume(words: Sequence[str]) -> int:
    """Start a run again; the launch's exit code. Raises LaunchError when it is done, runs, or was not recorded."""
    parser = CommandParser("resume", "NAME [key=value ...] [--runs DIR]", RESUME_HELP)
    parser.add_argument("words", nargs="+", metavar="NAME [key=value]", help="a run, SWEEP/POINT or a sweep; settings to add")
    flags = parser.read(words)
    names = [word for word in flags.words if "=" not in word]
    overrides = [word for word in flags.words if "=" in word]
    if len(names) != 1:
        raise LaunchError(f"resume {' '.join(flags.words)}; one run is resumed at a time; give one NAME, and key=value words")
    wrong = next((word for word in overrides if word.partition("=")[0] in ("name", "runs")), None)
    if wrong is not None:
        raise LaunchError(f"{wrong}; a run keeps its name and place when it is resumed; start a new one for that")
    folder = find(Path(flags.runs), names[0])
    if is_sweep(folder):
        return _launch([*_words_of(folder, folder / "command.json"), *overrides], folder / "command.json")
    view = _look(folder)
    if view.state in NOT_OVER:
        first = f"cancel {names[0]} first" if view.state != "unknown" else str(view.problem)
        raise LaunchError(f"{names[0]} is {view.state}; a run has one launcher at a time; {first}")
    if view.state == "done":
        raise LaunchError(f"{names[0]} is done at step {count(view.step)}; there is nothing to go on with; start a new run")
    record = job_record(folder)
    return _launch([*_words_of(folder, record), *overrides], record)


def _words_of(folder: Path, record: Path) -> list[str]:
    content = read_json(record)
    words = _recorded_words(content)
    if not isinstance(content.get("words"), list):
        raise LaunchError(f"{record} does not say how {folder.name} was started; give its command again in full")
    hidden = next((word for word in words if HIDDEN in word), None)
    if hidden:
        raise LaunchError(f"{hidden} was recorded without its secret; {folder.name} cannot be repeated; give its command again")
    backend = text(content, "backend")
    return [*(["--backend", backend] if backend else []), *_placed(words, folder.parent)]


def _placed(words: Sequence[str], runs: Path) -> list[str]:
    """The words without --runs and --backend, which are said anew: the folder may have moved, and auto may mean another here."""
    kept: list[str] = []
    skip = False
    for word in words:
        name = word.partition("=")[0]
        if skip or name in ("--runs", "--backend", "runs"):
            skip = not skip and word in ("--runs", "--backend")
            continue
        kept.append(word)
    return ["--runs", str(runs), *kept]


def _launch(words: Sequence[str], record: Path) -> int:
    """Launch from the folder where the run was started: its words may hold relative paths."""
    from cluster import launch

    folder = record.parent
    began = text(read_json(record), "working_folder") or text(
        read_json(folder / "attempts" / str(newest_attempt(folder)) / "launch.json"), "working_folder"
    )
    if began and os.path.isdir(began):
        os.chdir(began)
    elif began:
        say(f"{began}, where it was started, is not here; relative paths are taken from {os.getcwd()}")
    say(f"python cluster/launch.py {shlex.join(map(clean_word, words))}")
    return launch.main(words)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
