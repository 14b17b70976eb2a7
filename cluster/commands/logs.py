"""`launch.py logs NAME`: what the ranks of a run printed. Words in; lines out, with --follow as they come."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.commands.run_reader import newest_attempt, read_json, whole
from cluster.commands.run_view import LIVE, read_run
from cluster.commands.runs import CommandParser, backend_state, find, is_sweep, names_in
from cluster.flags import LaunchError
from cluster.verdict import last_lines

HELP = """What the ranks of a run printed: the end of rank 0's log in the newest attempt, or of the rank that failed.

With --follow lines come as they are written; it goes on in the next attempt and ends with the run."""
LINE_BYTES = 2000  # a generous line, to know how much of a file's end to read
LOOK = 0.5  # seconds between two looks at a growing file


def parser() -> CommandParser:
    made = CommandParser("logs", "NAME [--rank R | --all] [--attempt N] [--lines 50] [--follow] [--runs DIR]", HELP)
    made.add_argument("name", metavar="NAME", help="a run, or SWEEP/POINT")
    made.add_argument("--rank", type=int, metavar="R", help="whose log (default: the rank that failed, else 0)")
    made.add_argument("--all", action="store_true", help="of all ranks, each line behind its rank's number")
    made.add_argument("--attempt", type=int, metavar="N", help="of which attempt (default: the newest)")
    made.add_argument("--lines", type=int, default=50, metavar="L", help="of each rank (default 50)")
    made.add_argument("--follow", "-f", action="store_true", help="go on as lines are written")
    return made


def main(words: Sequence[str]) -> int:
    """Print logs; 0. Raises LaunchError for a run, attempt or rank that is not there."""
    flags = parser().read(words)
    folder = find(Path(flags.runs), flags.name)
    if is_sweep(folder):
        raise LaunchError(f"{flags.name} is a sweep; its points have logs; for example logs {flags.name}/{_first_point(folder)}")
    attempt = _attempt(folder, flags.attempt, flags.follow)
    if flags.follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(folder, attempt, flags)
        return 0
    ranks = _ranks(folder, attempt, flags)
    for rank in ranks:
        path = _log(folder, attempt, rank)
        if len(ranks) == 1:
            print(f"{path}:", file=sys.stderr, flush=True)
        lines = last_lines(path, flags.lines, max(64 * 1024, flags.lines * LINE_BYTES)) if flags.lines > 0 else []
        for line in lines:
            print(line if len(ranks) == 1 else f"[{rank}] {line}")
    return 0


def _first_point(folder: Path) -> str:
    return next((name for name in names_in(folder) if os.path.isdir(folder / name)), "POINT")


def _attempt(folder: Path, asked: int | None, wait: bool) -> int:
    newest = newest_attempt(folder)
    while newest is None and wait and read_run(folder, time.time(), backend_state).state in LIVE:
        time.sleep(LOOK)
        newest = newest_attempt(folder)
    if newest is None:
        raise LaunchError(f"{folder.name} has no attempt yet; see python cluster/launch.py status {folder.name}")
    if asked is not None and not os.path.isdir(folder / "attempts" / str(asked)):
        raise LaunchError(f"--attempt {asked}; {folder.name} has attempts up to {newest}; give one of them")
    return asked or newest


def _log(folder: Path, attempt: int, rank: int) -> Path:
    return folder / "attempts" / str(attempt) / f"rank_{rank}.log"


def _all_ranks(folder: Path, attempt: int) -> list[int]:
    found = (path.stem.partition("_")[2] for path in (folder / "attempts" / str(attempt)).glob("rank_*.log"))
    return sorted(int(rank) for rank in found if rank.isdigit())


def _ranks(folder: Path, attempt: int, flags: argparse.Namespace) -> list[int]:
    there = _all_ranks(folder, attempt)
    if flags.all:
        return there
    if flags.rank is None:
        culprit = whole(read_json(folder / "attempts" / str(attempt) / "verdict.json"), "rank")
        return [culprit if culprit in there else 0]
    if flags.rank not in there and not flags.follow:
        named = f"ranks {there[0]} to {there[-1]}" if there else "no log yet"
        raise LaunchError(f"--rank {flags.rank}; attempt {attempt} of {folder.name} has {named}; give one of them")
    return [flags.rank]


def _follow(folder: Path, attempt: int, flags: argparse.Namespace) -> None:
    """Print the last lines and what is added to them, attempt after attempt, until the run is not live any more."""
    ranks = _ranks(folder, attempt, flags)
    offsets = {rank: _offset_of_last(_log(folder, attempt, rank), flags.lines) for rank in ranks}
    while True:
        live = read_run(folder, time.time(), backend_state).state in LIVE
        newest = newest_attempt(folder) or attempt
        for rank in _all_ranks(folder, attempt) if flags.all else ranks:
            over = not live or newest > attempt
            offsets[rank] = _print_added(
                _log(folder, attempt, rank), offsets.get(rank, 0), rank if flags.all else None, over=over
            )
        if newest > attempt and flags.attempt is None:
            attempt, offsets = newest, {}
            ranks = _ranks(folder, attempt, flags)
            print(f"attempt {attempt}:", file=sys.stderr, flush=True)
        elif not live or newest > attempt:
            return
        else:
            time.sleep(LOOK)


def _offset_of_last(path: Path, lines: int) -> int:
    """Where the last `lines` lines of a file begin."""
    try:
        with open(path, "rb") as stream:
            end = stream.seek(0, 2)
            start = stream.seek(max(0, end - max(64 * 1024, lines * LINE_BYTES)))
            data = stream.read(end - start)
    except OSError:
        return 0
    kept = data.splitlines(keepends=True)[-lines:] if lines > 0 else []
    return end - sum(map(len, kept))


def _print_added(path: Path, offset: int, rank: int | None, *, over: bool) -> int:
    """Print the whole lines behind `offset`, when it is `over` also a last one without an end; return the new offset."""
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            data = stream.read()
    except OSError:
        return offset
    end = len(data) if over else max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
    text = data[:end].decode("utf-8", "replace")
    if rank is not None:
        lines = (line.rstrip().rpartition("\r")[2] for line in text.split("\n"))
        text = "".join(f"[{rank}] {line}\n" for line in lines if line)
    sys.stdout.write(text)
    sys.stdout.flush()
    return offset + end
