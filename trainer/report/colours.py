"""The colours of lines and bars, for a light and a dark page, as CSS.

Blue, vermilion and pink are Okabe and Ito's or close to them. Any two colours of a page lie 15 or more apart in CIELAB under
normal, protanope and deuteranope vision, and each has a contrast of 3 or more with the page. Lines have dashes, too.
"""

from __future__ import annotations

PAPER_LIGHT, PAPER_DARK = "#ffffff", "#14181d"
LIGHT = ("#0072b2", "#c14b00", "#c563a0", "#24292f", "#3a1ec8", "#8a6a3a")
DARK = ("#56b4e9", "#e69f00", "#cc79a7", "#f5f0a0", "#6a6aff", "#a86030")
DASHES = ("", "7 3", "2 3", "9 3 2 3")


def css() -> str:
    """Variables --c0 to --c5 and --paper for both kinds of page, and the classes of fills (f0) and strokes (s0)."""
    light = _variables(LIGHT, PAPER_LIGHT)
    dark = _variables(DARK, PAPER_DARK)
    fills = "".join(f".f{n}{{background:var(--c{n});fill:var(--c{n})}}.s{n}{{stroke:var(--c{n})}}" for n in range(len(LIGHT)))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{fills}"


def fill(number: int) -> str:
    """The class of the fill of line or part `number`."""
    return f"f{number % len(LIGHT)}"


def stroke(number: int) -> str:
    """The attributes of line `number`. Twelve lines differ in colour or dash."""
    dash = DASHES[number % len(DASHES)]
    plain = f'class="s{number % len(LIGHT)}" stroke-width="2"'
    return f'{plain} stroke-dasharray="{dash}"' if dash else plain


def _variables(colours: tuple[str, ...], paper: str) -> str:
    return "".join(f"--c{number}:{colour};" for number, colour in enumerate(colours)) + f"--paper:{paper}"
