"""The few HTML shapes that all sections are made of. Text comes in unescaped; HTML goes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def section(name: str, title: str, content: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{content}</section>'


def missing(text: str) -> str:
    """The line that stands where a part is not there."""
    return f'<p class="empty">{escape(text)}</p>'


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def numbers(facts: Iterable[tuple[str, str]]) -> str:
    """A row of large numbers, each under its name."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="numbers">{items}</dl>' if items else ""


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, one pair a line."""
    lines = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f'<table class="facts">{lines}</table>' if lines else ""


def table(label: str, columns: Sequence[str], rows: Iterable[str], kind: str = "plain") -> str:
    """A table that scrolls by itself where the page is narrow. `rows` are <tr> elements."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(name: str, cells: Iterable[str], kind: str = "") -> str:
    """A line of a table: its heading and text cells."""
    texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    opened = f'<tr class="{kind}">' if kind else "<tr>"
    return f'{opened}<th scope="row">{escape(name)}</th>{texts}</tr>'


def fold(summary: str, content: str) -> str:
    """Something long, closed at first."""
    return f"<details><summary>{escape(summary)}</summary><div>{content}</div></details>"


def fold_text(summary: str, text: str) -> str:
    return fold(summary, f"<pre>{escape(text)}</pre>")


def span_words(seconds: float) -> str:
    """A length of time for a person: 42 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
