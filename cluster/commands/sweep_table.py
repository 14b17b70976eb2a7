"""How the points of a sweep stand: its folder in; a table, sorted best first, and sweep.csv out."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.commands.run_reader import scores
from cluster.commands.run_view import Ask, RunView, is_run, read_run
from cluster.commands.sweep_points import Point, read_sweep
from cluster.commands.tables import Column, count, note, span, table

SHOWN_SCORES = ("metric/video_fg_ari", "metric/video_mbo", "metric/frame_fg_ari", "metric/frame_mbo")
CSV = "sweep.csv"
NOT_STARTED = "waiting"


@dataclass(frozen=True)
class PointView:
    point: Point
    state: str  # that of its run, or "waiting"
    run: RunView | None = None
    scores: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        run = dataclasses.asdict(self.run) if self.run else None
        return {**dataclasses.asdict(self.point), "state": self.state, "scores": self.scores, "run": run}


def read_points(folder: Path, ask: Ask | None = None) -> list[PointView]:
    """Every point of the sweep in `folder`, in its own order."""
    sweep = read_sweep(folder)
    return [view_point(folder, point, ask) for point in sweep.points] if sweep else []


def view_point(folder: Path, point: Point, ask: Ask | None = None) -> PointView:
    run_dir = folder / point.name
    if not is_run(run_dir):
        return PointView(point, NOT_STARTED)
    run = read_run(run_dir, time.time(), ask)
    return PointView(point, NOT_STARTED if run.state == "new" else run.state, run, scores(run_dir))


def best_first(points: Sequence[PointView]) -> list[PointView]:
    """By the first score that any point has; points without it at the end, in their own order."""
    key = next((name for name in SHOWN_SCORES if any(name in item.scores for item in points)), None)
    if key is None:
        return list(points)
    scored = [item for item in points if key in item.scores]
    return sorted(scored, key=lambda item: -item.scores[key]) + [item for item in points if key not in item.scores]


def sweep_summary(points: Sequence[PointView]) -> str:
    return f"sweep of {len(points)} points: {summary(points)}"


def summary(points: Sequence[PointView]) -> str:
    states = Counter(item.state for item in points)
    order = ["done", *sorted(states.keys() - {"done"})]
    return ", ".join(f"{states[state]} {state}" for state in order if states[state])


def end_line(view: PointView, ended: int, total: int, said: str = "") -> str:
    """What is printed when a point has ended; `said` is its launcher's last word where it failed."""
    run = view.run
    state = "failed" if said and view.state == NOT_STARTED else view.state
    step = f" at step {count(run.step)}" if run and run.step is not None else ""
    score = view.scores.get(SHOWN_SCORES[0])
    shown = "" if score is None else f", {SHOWN_SCORES[0].removeprefix('metric/')} {score:.4f}"
    why = (run and run.problem) or said
    return f"[{ended}/{total}] {view.point.name} {state}{step}{shown}" + (f": {why}" if why else "")


def sweep_lines(folder: Path, points: Sequence[PointView], width: int | None) -> list[str]:
    """What `status SWEEP` and the end of a sweep print."""
    if not points:
        return [f"{folder.name}: sweep.json cannot be read; restore it, or start the sweep under another name=..."]
    ordered = best_first(points)
    keys = _keys(points)
    metrics = [name for name in SHOWN_SCORES if any(name in item.scores for item in points)]
    columns = [
        Column("point", 3),
        *(Column(key.rpartition(".")[2]) for key in keys),
        Column("state"),
        Column("step", 2, True),
        *(Column(name.removeprefix("metric/"), place and place + 3, True) for place, name in enumerate(metrics)),
        Column("left", 1, True),
    ]
    blocks = table(columns, [_cells(item, keys, metrics) for item in ordered], width)
    lines = [f"{folder.name}: {sweep_summary(points)}", *blocks[0]]
    for item, block in zip(ordered, blocks[1:], strict=True):
        lines += block
        lines += note(item.run.problem, width) if item.run and item.run.problem else []
    return lines


def _keys(points: Sequence[PointView]) -> list[str]:
    return [override.partition("=")[0] for override in points[0].point.overrides]


def _cells(item: PointView, keys: Sequence[str], metrics: Sequence[str]) -> list[str]:
    values = [override.partition("=")[2] for override in item.point.overrides]
    values += [""] * (len(keys) - len(values))
    run = item.run
    step = "" if run is None or run.step is None else count(run.step) + (f"/{count(run.steps)}" if run.steps else "")
    shown = [f"{item.scores[name]:.4f}" if name in item.scores else "" for name in metrics]
    return [item.point.name.partition("_")[0], *values[: len(keys)], item.state, step, *shown, span(run.eta_s) if run else ""]


def write_csv(folder: Path, points: Sequence[PointView]) -> Path:
    """sweep.csv: one line per point, best first: what it varies, its state, steps, and every score."""
    keys = _keys(points) if points else []
    metrics = sorted({name for item in points for name in item.scores})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", *keys, "state", "step", "steps", *metrics])
    for item in best_first(points):
        values = [override.partition("=")[2] for override in item.point.overrides]
        run = item.run
        writer.writerow([item.point.name, *values, item.state, run.step if run else None, run.steps if run else None,
                         *(item.scores.get(name) for name in metrics)])  # fmt: skip
    path = folder / CSV
    temporary = path.with_name(f".{CSV}.{os.getpid()}.tmp")
    temporary.write_text(text.getvalue())
    os.replace(temporary, path)
    return path
