"""`launch.py status`: the state of runs, read from their folders. Words in, a table (or JSON) and an exit code out."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cluster.commands.run_view import RunView, read_run
from cluster.commands.runs import CommandParser, backend_state, folders_of, is_sweep, remembering
from cluster.commands.sweep_table import read_points, sweep_lines, sweep_summary
from cluster.commands.tables import Column, count, note, screen_width, short_number, span, table

HELP = """The state of runs: all under the folder of runs, or those that are named. NAME is a run, a sweep, or SWEEP/POINT.

  state      queued, running, saving, stopped (requeue): saved, goes on when started again; stopped, done, failed,
             lost: whoever watched it is gone without a word; unknown: its backend does not answer; new: nothing was started
  restarts   behind the attempt: "4 (+3)" is the fourth attempt, three of them restarts by the launcher
  waits      share of a step's time in which it waits for data
  saved ago  age of the newest checkpoint whose files are all there in full
  !          what is wrong with a run: who failed and its last words, a hang, a straggler, a full disk

For a sweep that is named: a table of its points, best first."""

COLUMNS = (
    Column("run"), Column("state"), Column("job", 5), Column("nodes", 8), Column("attempt", 6), Column("step", 1, True),
    Column("clips/s", 7, True), Column("left", 2, True), Column("waits", 9, True), Column("saved ago", 3, True),
    Column("last event", 4),
)  # fmt: skip


def parser() -> CommandParser:
    made = CommandParser("status", "[NAME ...] [--runs DIR] [--json] [--watch]", HELP)
    made.add_argument("names", nargs="*", metavar="NAME", help="runs or sweeps (default: all)")
    made.add_argument("--json", action="store_true", help="one JSON object per run, in a list")
    made.add_argument("--watch", action="store_true", help="show it again and again, until Ctrl-C")
    made.add_argument("--every", type=float, default=2.0, metavar="S", help="with --watch: seconds between two looks (default 2)")
    return made


def main(words: Sequence[str]) -> int:
    """Show the state of runs; 0 always, when there is something to show. Raises LaunchError."""
    flags = parser().read(words)
    runs = Path(flags.runs)
    if not flags.watch:
        print(_json(runs, flags.names) if flags.json else _page(runs, flags.names), flush=True)
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            text = _json(runs, flags.names) if flags.json else f"{time.strftime('%H:%M:%S')}\n{_page(runs, flags.names)}"
            clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
            print(clear + text, flush=True)
            time.sleep(max(0.1, flags.every))
    return 0


def views(folders: Sequence[Path]) -> list[RunView]:
    ask, now = remembering(backend_state), time.time()
    return [read_run(folder, now, ask) for folder in folders]


def _json(runs: Path, names: Sequence[str]) -> str:
    found = []
    for folder in folders_of(runs, names):
        if is_sweep(folder):
            points = [point.as_dict() for point in read_points(folder, remembering(backend_state))]
            found.append({"name": folder.name, "path": str(folder), "sweep": points})
        else:
            found.append(views([folder])[0].as_dict())
    return json.dumps(found, indent=1)


def _page(runs: Path, names: Sequence[str]) -> str:
    width, folders = screen_width(), folders_of(runs, names)
    single = [folder for folder in folders if not is_sweep(folder)]
    sweeps = [folder for folder in folders if is_sweep(folder)]
    lines = render(views(single), width) if single else []
    for folder in sweeps:
        points = read_points(folder, remembering(backend_state))
        if names:
            lines += [*([""] if lines else []), *sweep_lines(folder, points, width)]
        else:
            lines.append(f"{folder.name}  {sweep_summary(points)}; its points: status {folder.name}")
    if not lines:
        lines = [f"{runs} has no runs yet; start one: python cluster/launch.py experiment=demo"]
    return "\n".join(lines)


def render(shown: Sequence[RunView], width: int | None) -> list[str]:
    """The table of runs, each with what is wrong with it beneath; at the end how many there are of each state."""
    blocks = table(COLUMNS, [_cells(view) for view in shown], width)
    lines = list(blocks[0])
    for view, block in zip(shown, blocks[1:], strict=True):
        lines += block
        lines += note(view.problem, width) if view.problem else []
    if len(shown) > 3:
        states = Counter(view.state for view in shown)
        lines.append(f"{len(shown)} runs: " + ", ".join(f"{number} {state}" for state, number in states.most_common()))
    return lines


def _cells(view: RunView) -> list[str]:
    job = " ".join(part for part in (view.backend, view.job) if part)
    nodes = f"{view.nodes} x {view.ranks_per_node}" if view.nodes and view.ranks_per_node else ""
    attempt = "" if view.attempt is None else f"{view.attempt} (+{view.restarts})" if view.restarts else str(view.attempt)
    of = f"/{count(view.steps)}" if view.steps is not None and view.step is not None else ""
    event = (
        "" if view.event is None else f"{view.event} {span(view.event_age_s)} ago" if view.event_age_s is not None else view.event
    )
    waits = "" if view.data_wait is None else f"{100 * view.data_wait:.0f} %"
    return [
        view.name, view.state, job, nodes, attempt, count(view.step) + of, short_number(view.clips_per_s), span(view.eta_s),
        waits, span(view.checkpoint_age_s), event,
    ]  # fmt: skip
