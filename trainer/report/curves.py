"""A curve as inline SVG: no script, no file, readable with a screen reader and in print.

Comes in: named series of (step, value). Goes out: one <svg> with axes, ticks, lines and a title. Non-finite values are gaps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trainer.report.colours import fill, stroke

MAX_POINTS = 300
WIDTH, HEIGHT = 440, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 22, 10, 34

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high` over pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.logarithmic else linear_ticks(self.low, self.high)


def line_chart(title: str, lines: Sequence[tuple[str, Points]], from_zero: bool = False) -> str:
    """An SVG with one line for each series that has a finite value; "" when none has. `from_zero`: a linear axis with 0 on it.

    A line's colour and dash are those of its place among `lines`, as in `legend`.
    """
    finite = [any(math.isfinite(value) for _, value in points) for _, points in lines]
    drawn = {number: (name, thin(points)) for number, (name, points) in enumerate(lines) if finite[number]}
    if not drawn:
        return ""
    steps = [step for _, points in drawn.values() for step, _ in points]
    values = [value for _, points in drawn.values() for _, value in points if math.isfinite(value)]
    x = Axis(*_widen(min(0, *steps), max(steps), 0.0), _LEFT, WIDTH - _RIGHT)
    y = _value_axis([0.0, *values] if from_zero else values)
    label = f"{title}: " + "; ".join(_spoken(name, points) for name, points in drawn.values())
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts += _frame(x, y)
    parts += [_line(points, x, y, number) for number, (_, points) in drawn.items()]
    return "".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """Names beside samples of their lines, in the order in which `line_chart` draws them."""
    items = []
    for number, name in enumerate(names):
        sample = f'<line x1="0" y1="6" x2="26" y2="6" {stroke(number)}/>'
        items.append(f'<li><svg width="26" height="12" aria-hidden="true">{sample}</svg> {escape(name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def thin(points: Points, at_most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Means over equal runs of points, so that a long run's page stays small. Last point kept; gaps stay gaps."""
    if len(points) <= at_most:
        return list(points)
    size = math.ceil(len(points) / (at_most - 1))
    groups = [points[place : place + size] for place in range(0, len(points), size)]
    means = [(group[-1][0], _mean([value for _, value in group])) for group in groups[:-1]]
    return [*means, (groups[-1][-1][0], points[-1][1])]


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / gap - 1e-9)
    return [round(number * gap, 12) for number in range(first, math.floor(high / gap + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """40000 as 40k, 0.00004 as 4e-5."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def _value_axis(values: list[float]) -> Axis:
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > 30
    if logarithmic:
        low, high = low / 1.15, high * 1.15
    else:
        low, high = _widen(low, high, 0.06)
    return Axis(low, high, HEIGHT - _BOTTOM, _TOP, logarithmic)


def _widen(low: float, high: float, share: float) -> tuple[float, float]:
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-30):
        room = abs(high) * 0.1 or 1.0
        return low - room, high + room
    room = (high - low) * share
    return (0.0 if 0 <= low < room else low - room), high + room


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: max(1, math.ceil(len(ticks) / 7))]


def _frame(x: Axis, y: Axis) -> list[str]:
    parts = ['<g class="axis">']
    for value in y.ticks():
        place = f"{y.place(value):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place}" y2="{place}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{place}" dy="0.34em" text-anchor="end">{tick_text(value)}</text>')
    for value in x.ticks():
        place, bottom = f"{x.place(value):.1f}", HEIGHT - _BOTTOM
        parts.append(f'<line class="tick" x1="{place}" x2="{place}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{place}" y="{bottom + 17}" text-anchor="middle">{tick_text(value)}</text>')
    parts.append(f'<line class="base" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{HEIGHT - _BOTTOM}" y2="{HEIGHT - _BOTTOM}"/>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    note = f'<text x="{_LEFT}" y="{HEIGHT - 3}">log scale</text>' if y.logarithmic else ""
    return [*parts, f"{note}</g>"]


def _line(points: Points, x: Axis, y: Axis, number: int) -> str:
    path, pen_down, dots = [], False, []
    for place, (step, value) in enumerate(points):
        if not math.isfinite(value):
            pen_down = False
            continue
        spot = f"{x.place(step):.1f} {y.place(value):.1f}"
        path.append(f"{'L' if pen_down else 'M'}{spot}")
        alone = not pen_down and (place + 1 == len(points) or not math.isfinite(points[place + 1][1]))
        if alone or len(points) <= 12:
            cx, cy = spot.split()
            dots.append(f'<circle cx="{cx}" cy="{cy}" r="3" class="{fill(number)}"/>')
        pen_down = True
    return f'<path d="{"".join(path)}" fill="none" {stroke(number)}/>{"".join(dots)}'


def _spoken(name: str, points: Points) -> str:
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    (first, start), (last, end) = finite[0], finite[-1]
    return f"{name} from {start:.4g} at step {first:g} to {end:.4g} at step {last:g}"


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
