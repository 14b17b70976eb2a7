"""Rows of figures come in, one aligned text table goes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLUMNS = ("cpu_ms", "wall_ms", "share", "peak_mib", "clips_per_s", "mb_per_s")
HEADINGS = ("CPU ms", "wall ms", "share", "peak MiB", "clips/s", "MB/s")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line. Units: as the names say; `share` is a part of 1; None where a figure makes no sense."""

    section: str
    name: str
    cpu_ms: float | None = None
    wall_ms: float | None = None
    share: float | None = None
    peak_mib: float | None = None
    clips_per_s: float | None = None
    mb_per_s: float | None = None
    ratio: float | None = None  # what it compares is said in `beside`
    beside: str = ""


def render(rows: Sequence[Row]) -> str:
    """Numbers right-aligned, a line for each section."""
    lines = [["", *HEADINGS, ""]]
    for number, row in enumerate(rows):
        if number == 0 or rows[number - 1].section != row.section:
            lines.append([row.section])
        lines.append([f"  {row.name}", *(cell(name, getattr(row, name)) for name in COLUMNS), row.beside])
    full = [line for line in lines if len(line) > 1]
    widths = [max(len(line[column]) for line in full) for column in range(len(HEADINGS) + 2)]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: list[str], widths: list[int]) -> str:
    if len(cells) == 1:
        return cells[0]
    first, *numbers, last = cells
    middle = "  ".join(cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True))
    return f"{first.ljust(widths[0])}  {middle}  {last}".rstrip()


def cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "share":
        return f"{100 * value:.1f} %"
    decimals = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:,.{decimals}f}"
