"""Text for terminals: columns and rows in, aligned lines out that fit a width; numbers, ages, sizes in words. Pure functions."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

GAP = "  "
MIN_FLEXIBLE = 12  # a column is cut to no fewer letters than this


@dataclass(frozen=True)
class Column:
    title: str
    rank: int = 0  # 0: always shown; of the others the highest goes first where the width is too small
    right: bool = False  # numbers


def screen_width() -> int | None:
    """Columns of the terminal; None where standard output is none, and lines need not be cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> list[list[str]]:
    """Lines of a table, the first block its head, then one block for each row. Columns that are empty in all rows are left out.

    Where `width` is too small, columns go, and at last the longest of those that stay is cut.
    """
    shown = [place for place in range(len(columns)) if columns[place].rank == 0 or any(row[place] for row in rows)]
    wide = {place: max(len(columns[place].title), *(len(row[place]) for row in rows), 0) for place in shown}
    while width is not None and _total(wide, shown) > width:
        optional = [place for place in shown if columns[place].rank]
        if not optional:
            longest = max(shown, key=lambda place: wide[place])
            if wide[longest] <= MIN_FLEXIBLE:
                break
            wide[longest] = max(MIN_FLEXIBLE, wide[longest] - (_total(wide, shown) - width))
            continue
        shown.remove(max(optional, key=lambda place: columns[place].rank))
    head = [columns[place].title for place in range(len(columns))]
    return [[_line(columns, row, shown, wide)] for row in (head, *rows)]


def _total(wide: dict[int, int], shown: Sequence[int]) -> int:
    return sum(wide[place] for place in shown) + len(GAP) * (len(shown) - 1)


def _line(columns: Sequence[Column], row: Sequence[str], shown: Sequence[int], wide: dict[int, int]) -> str:
    cells = []
    for place in shown:
        text = shorten(row[place], wide[place])
        cells.append(text.rjust(wide[place]) if columns[place].right else text.ljust(wide[place]))
    return GAP.join(cells).rstrip()


def shorten(text: str, width: int) -> str:
    """`text`, with its middle left out where it is longer than `width`: names differ at both ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + (text[-tail:] if tail else "")


def note(text: str, width: int | None, mark: str = "  ! ") -> list[str]:
    """A remark beneath a row, on as many lines as it needs."""
    indent = " " * len(mark)
    return textwrap.wrap(text, width or 10_000, initial_indent=mark, subsequent_indent=indent, break_on_hyphens=False) or []


def span(seconds: float | None) -> str:
    """A duration as people say it: 42 s, 7 min, 3 h 12 min, 2 d 4 h; empty for None."""
    if seconds is None:
        return ""
    whole = max(0, int(seconds + 0.5))
    if whole < 100:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes // 60 % 24} h"


def count(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"


def short_number(value: float | None) -> str:
    """Three figures: 51.2, 1,234, 0.0123; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def size(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"
