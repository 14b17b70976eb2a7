"""Videos as short animations: what each thing looked like over time, side by side, in step with one another.

Comes in: GalleryItems after a training, or what an earlier report stored of them. Goes out: HTML in which every animation is one
film strip (WebP) that CSS moves frame by frame: no script, and it can be stopped. Beside the page lie, for each video, the exact
pictures (video_00_KEY.png) and the arrays that they were drawn from (.npz), so that a page can be made anew.
"""

from __future__ import annotations

import base64
import json
import zipfile
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.files import write_atomically
from trainer.report.parts import missing, note
from trainer.report.render import CELL, MAPS, GalleryItem, Row, render_item, rows_of, shrink
from trainer.report.score_table import percent, score_table

FRAMES_PER_S = 6
QUALITY = 70  # of the strips in the page; the exact pictures lie beside it
_PATTERN = "video_[0-9][0-9]_*"


def gallery_section(items: Sequence[GalleryItem], of_run: str = "") -> str:
    """One figure per video. `of_run` tells the figures of several runs on one page apart."""
    if not items:
        return missing("No pictures: no validation video was shown to this run's last evaluation.")
    chosen = ""
    if any(item.place for item in items):
        chosen = "The videos with the best and the worst scores (mean of video FG-ARI and video mBO). "
    words = (
        f"{chosen}A colour is a slot; the truth has the colour of the slot that fits it best. White lines are borders. "
        "Stop an animation with its box."
    )
    return note(words) + "".join(_figure(item, f"{of_run}{number}") for number, item in enumerate(items))


def save_gallery(folder: Path, items: Sequence[GalleryItem]) -> list[GalleryItem]:
    """Replace the videos in `folder` by `items`; return them as stored."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(_PATTERN):
        stale.unlink()
    shrunk = [shrink(item) for item in items]
    for number, item in enumerate(shrunk):
        name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in item.key)[:80]
        buffer = BytesIO()
        render_item(item).save(buffer, "PNG", optimize=True)
        write_atomically(folder / f"video_{number:02d}_{name}.png", buffer.getvalue())
        write_atomically(folder / f"video_{number:02d}_{name}.npz", _packed(item))
    return shrunk


def load_gallery(folder: Path, problems: list[str]) -> list[GalleryItem]:
    """The videos that an earlier report stored; one that is damaged becomes a line in `problems`."""
    items = []
    for path in sorted(folder.glob(f"{_PATTERN}.npz")):
        try:
            items.append(_unpacked(path))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            problems.append(f"report/{path.name} cannot be shown: {error}")
    return items


def _packed(item: GalleryItem) -> bytes:
    about: dict[str, Any] = {"key": item.key, "grid": item.grid, "scores": dict(item.scores), "times": item.times}
    about |= {"place": item.place, "num_videos": item.num_videos}
    arrays = {name: getattr(item, name) for name in ("frames", "truth", *MAPS)}
    buffer = BytesIO()
    np.savez_compressed(buffer, about=np.array(json.dumps(about)), **{k: v for k, v in arrays.items() if v is not None})
    return buffer.getvalue()


def _unpacked(path: Path) -> GalleryItem:
    with np.load(path, allow_pickle=False) as content:
        arrays: dict[str, Any] = {name: content[name] for name in content.files}
    about = json.loads(str(arrays.pop("about")))
    for name in ("grid", "times"):
        about[name] = tuple(about[name])
    return GalleryItem(**about, **{name: arrays[name] for name in ("frames", "truth", *MAPS) if name in arrays})


def _figure(item: GalleryItem, number: str) -> str:
    rows = rows_of(item, list(range(len(item.frames))), CELL)
    caption = " · ".join(part for part in (place_words(item), item.key, score_words(item.scores)) if part)
    panels = "".join(_panel(row, item.key) for row in rows)
    box = ""
    if len(item.frames) > 1:
        box = f'<input type="checkbox" id="stop{number}"><label for="stop{number}">stop or play</label>'
    return f'<figure class="video"><figcaption>{escape(caption)}</figcaption>{box}<div class="panels">{panels}</div></figure>'


def _panel(row: Row, key: str) -> str:
    """One animation: a window of one frame's width over the strip of all frames."""
    count, height, width = row.cells.shape[:3]
    alt = f"{row.caption} of video {key}, {count} frame{'s' if count > 1 else ''}"
    style = f"--n:{count};--ratio:{height / width:.4f};--s:{count / FRAMES_PER_S:.2f}s"
    remark = escape(row.note.replace("\n", " "))
    return (
        f'<div class="panel" style="{style}"><div class="window"><img alt="{escape(alt)}" '
        f'src="data:image/webp;base64,{_strip(row)}"></div><b>{escape(row.caption)}</b><small>{remark}</small></div>'
    )


def _strip(row: Row) -> str:
    """All frames in one row, as base64 WebP: a tenth of the PNG's bytes."""
    buffer = BytesIO()
    Image.fromarray(np.concatenate(list(row.cells), axis=1)).save(buffer, "WEBP", quality=QUALITY, method=4)
    return base64.b64encode(buffer.getvalue()).decode()


def place_words(item: GalleryItem) -> str:
    """ "best of 40", "2nd best of 40", "worst of 40"; "" for a video that was not ranked."""
    if not item.place or item.num_videos < 2:
        return ""
    from_end = item.num_videos - item.place + 1
    rank, end = (item.place, "best") if item.place <= from_end else (from_end, "worst")
    return f"{'' if rank == 1 else _ordinal(rank) + ' '}{end} of {item.num_videos}"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def score_words(scores: Mapping[str, float | None]) -> str:
    """A video's own scores in one line: video FG-ARI and mBO first, others only where those are missing."""
    named = score_table({f"metric/{key.removeprefix('metric/')}": value for key, value in scores.items() if value is not None})
    pairs = [
        (f"{column}{name.removeprefix('model')}", value)
        for name, row in named.rows
        for column, value in zip(named.columns, row, strict=True)
        if value is not None
    ]
    first = [pair for pair in pairs if pair[0] in ("video FG-ARI", "video mBO")] or pairs
    return ", ".join(f"{name} {percent(value)} %" for name, value in first)
