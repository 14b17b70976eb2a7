"""A panel as a picture, from the series that its own queries give: a Prometheus and a panel in, a PNG to be looked at out."""

from __future__ import annotations

import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cluster.monitoring import check

SIZE, LEFT, TOP, RIGHT, BOTTOM = (900, 380), 80, 40, 20, 40
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
Series = dict[str, list[tuple[float, float]]]


def series_of(url: str, dashboard: str, panel: str, seconds: float, window: str) -> Series:
    """Each line of the panel over the last seconds: its labels, and (seconds ago, value) of its points."""
    ask, now, found = check.connect(url), time.time(), {}
    for name, title, query in check.panel_queries():
        if (name, title) == (dashboard, panel):
            asked = check.concrete(query, window=window)
            answer = ask("query_range", query=asked, start=str(now - seconds), end=str(now), step="0.5")["result"]
            for one in answer:
                label = " ".join(f"{key}={value}" for key, value in sorted(one["metric"].items()) if key != "__name__") or panel
                label += " (another query)" * (label in found)
                found[label] = [(float(at) - now, float(value)) for at, value in one["values"]]
    return found


def draw(title: str, series: Series, path: Path) -> None:
    """Lines over time with a scale and a legend."""
    image = Image.new("RGB", (SIZE[0], SIZE[1] + 18 * len(series)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    points = [point for line in series.values() for point in line]
    first, top = min(at for at, _ in points), max(value for _, value in points) or 1.0
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def place(at: float, value: float) -> tuple[float, float]:
        return LEFT + width * (at - first) / (-first or 1.0), TOP + height * (1 - value / top)

    pen.text((LEFT, 12), title, "black", font)
    for share in (0.0, 0.5, 1.0):
        y = place(0.0, share * top)[1]
        pen.line([(LEFT, y), (SIZE[0] - RIGHT, y)], "#dddddd")
        pen.text((8, y - 8), f"{share * top:.4g}", "black", font)
    pen.text((LEFT, SIZE[1] - BOTTOM + 8), f"{first:.0f} s", "black", font)
    pen.text((SIZE[0] - RIGHT - 30, SIZE[1] - BOTTOM + 8), "now", "black", font)
    for number, (label, line) in enumerate(series.items()):
        colour, y = COLOURS[number % len(COLOURS)], SIZE[1] - 6 + 18 * number
        pen.line([place(*point) for point in line], colour, 2)
        pen.rectangle([LEFT, y + 3, LEFT + 12, y + 11], colour)
        pen.text((LEFT + 20, y - 1), label[:110], "black", font)
    image.save(path)
