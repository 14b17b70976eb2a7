"""`launch.py profile NAME`: a live run's next updates, profiled. A run's name in; the run's answer and an exit code out.

The request is a file in the run folder, which rank 0 looks for once a second (trainer/observe/profiler.py): it works on every
backend, from every machine that sees the folder, and the run goes on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.commands.run_reader import read_json, text
from cluster.commands.run_view import NOT_OVER, read_run
from cluster.commands.runs import CommandParser, backend_state, find, is_sweep
from cluster.flags import LaunchError

HELP = """Profile the next updates of a run that trains, without stopping it.

A trace for ui.perfetto.dev, what memory tensors took and a table of operators appear in runs/NAME/profile. The command waits
for them. Without it: observe.profile='steps[100:120]', or a file runs/NAME/profile/request that says steps=20."""
MAX_STEPS = 50  # trainer/observe/profile_window.py has the same number
LOOK = 0.2
REQUEST, ANSWER = "request", "last.json"


def main(words: Sequence[str]) -> int:
    """0: the profile is there; 1: it is not. Raises LaunchError for a run that does not train."""
    parser = CommandParser("profile", "NAME [--steps 20] [--all-ranks] [--wait S] [--runs DIR]", HELP)
    parser.add_argument("name", metavar="NAME", help="a run, or SWEEP/POINT")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="updates to profile (default 20)")
    parser.add_argument("--all-ranks", action="store_true", help="of every rank, not of rank 0 alone")
    parser.add_argument("--wait", type=float, default=300.0, metavar="S", help="seconds to wait for it (default 300)")
    flags = parser.read(words)
    if not 0 < flags.steps <= MAX_STEPS:
        raise LaunchError(f"--steps {flags.steps}; 1 to {MAX_STEPS} updates fit into a profile; change --steps")
    folder = _live(Path(flags.runs), flags.name)
    before = read_json(folder / "profile" / ANSWER)
    request = _ask(folder / "profile", f"steps={flags.steps}{' ranks=all' if flags.all_ranks else ''}\n")
    print(f"{flags.name}: asked for a profile of {flags.steps} updates", file=sys.stderr, flush=True)
    code = 1
    try:
        code = _answer(folder, before, flags.wait)
    finally:
        if code or not flags.all_ranks:  # one to all ranks is taken away by the run, once each has had the time to see it
            request.unlink(missing_ok=True)
    return code


def _ask(folder: Path, text: str) -> Path:
    """The request, whole from the first moment that it is there."""
    folder.mkdir(exist_ok=True)
    hidden, request = folder / f".{REQUEST}.{os.getpid()}.tmp", folder / REQUEST
    hidden.write_text(text)
    os.replace(hidden, request)
    return request


def _live(runs: Path, name: str) -> Path:
    folder = find(runs, name)
    if is_sweep(folder):
        raise LaunchError(f"{name} is a sweep; one run is profiled at a time; give {name}/POINT")
    state = read_run(folder, time.time(), backend_state).state
    if state not in NOT_OVER:
        raise LaunchError(f"{name} is {state}; a run that trains can be profiled; start it with observe.profile='steps[a:b]'")
    return folder


def _answer(folder: Path, before: dict[str, Any], wait: float) -> int:
    deadline = time.monotonic() + wait
    while True:
        answer = read_json(folder / "profile" / ANSWER)
        if answer and answer != before:
            break
        if time.monotonic() > deadline:
            return _none(
                f"no answer within {wait:g} s; a run answers while it trains: see status {folder.name}, or give --wait S"
            )
        if read_run(folder, time.time(), backend_state).state not in NOT_OVER:
            return _none(f"{folder.name} ended before its profile was written")
        time.sleep(LOOK)
    if (why := text(answer, "error")) is not None:
        return _none(why)
    for file in answer.get("files", []):
        print(folder / "profile" / str(file))
    return 0


def _none(why: str) -> int:
    print(f"no profile: {why}", file=sys.stderr, flush=True)
    return 1
