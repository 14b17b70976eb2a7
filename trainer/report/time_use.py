"""Where the time of a step went, by phase, and what was done beside the steps.

Comes in: the lines of a run log (`time/<phase>_ms`, `time/step_ms`, `evaluate/seconds`, `checkpoint/stall_seconds`). Goes out: a
bar of shares, a table, a chart of the phases over the steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from trainer.observe.run_log import iterate_keys, series
from trainer.report.charts import chart
from trainer.report.colours import fill
from trainer.report.parts import facts, missing, note, row, span_words, table

_NAMES = {
    "data_wait": "waiting for data",
    "forward": "forward",
    "exchange": "meeting the other ranks",
    "backward": "backward",
    "optimizer": "gradient reduction, optimizer",
}
REST = "the rest: logging, saving, bookkeeping"


def time_section(lines: list[dict[str, Any]]) -> str:
    phases = phases_of(lines)
    beside = facts(beside_the_steps(lines))
    if not phases:
        return missing("No times of steps were logged.") + beside
    total = sum(phases.values())
    rows = [_phase_row(number, name, ms, total) for number, (name, ms) in enumerate(phases.items())]
    columns = ("phase", "ms a step", "share")
    words = f"Rank 0, mean of all logged steps but the first window: {total:.3g} ms a step."
    picture = chart("Phases of a step", [(name, _line(lines, key)) for key, name in _logged(lines).items()], "ms", True)
    return (
        note(words)
        + _bar(phases, total)
        + f'<div class="pair">{table("Phases of a step", columns, rows)}{picture}</div>'
        + beside
    )


def phases_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds a step by phase, in the order of a step, the unexplained rest last; {} where nothing was logged.

    The first window is left out where there are more than two: it holds the warm-up.
    """
    lines = list(lines)
    known = _logged(lines)
    found = {name: _mean([value for _, value in _line(lines, key)]) for key, name in known.items()}
    found = {name: value for name, value in found.items() if math.isfinite(value)}
    step = _mean([value for _, value in _line(lines, "time/step_ms")])
    if found and math.isfinite(step) and step > sum(found.values()):
        found[REST] = step - sum(found.values())
    return found


def beside_the_steps(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What else the run's time went into, as (what, how long)."""
    rows = []
    for key, name in (("evaluate/seconds", "evaluation"), ("checkpoint/stall_seconds", "waiting for checkpoints")):
        values = [value for _, value in series(lines, key) if math.isfinite(value)]
        if values:
            long = span_words(sum(values)) if sum(values) >= 1 else f"{sum(values):.2g} s"
            rows.append((f"{name}, in all", f"{long}, {len(values)} time{'s' if len(values) > 1 else ''}"))
    return rows


def _logged(lines: list[Any]) -> dict[str, str]:
    """Keys of the phases that the log has, with their names, in the order of a step."""
    keys = [key for key in iterate_keys(lines, "time/") if key.endswith("_ms") and key != "time/step_ms"]
    order = [f"time/{name}_ms" for name in _NAMES]
    keys.sort(key=lambda key: order.index(key) if key in order else len(order))
    return {key: _NAMES.get(key[5:-3], key[5:-3].replace("_", " ")) for key in keys}


def _line(lines: list[Any], key: str) -> list[tuple[int, float]]:
    points = series(lines, key)
    return points[1:] if len(points) > 2 else points


def _bar(phases: Mapping[str, float], total: float) -> str:
    parts = []
    for number, (name, ms) in enumerate(phases.items()):
        share = 100 * ms / total if total else 0.0
        words = f"{share:.0f} %" if share >= 9 else ""
        parts.append(f'<span class="{fill(number)}" style="flex:{max(share, 0.2):.2f}" title="{escape(name)}">{words}</span>')
    return f'<div class="shares" aria-hidden="true">{"".join(parts)}</div>'


def _phase_row(number: int, name: str, ms: float, total: float) -> str:
    share = 100 * ms / total if total else 0.0
    plain = row(name, [f"{ms:.3g}", f"{share:.1f} %"])
    return plain.replace('<th scope="row">', f'<th scope="row"><i class="{fill(number)}"></i>', 1)


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
