"""Pictures of what the slots do: frames, truth, attention and object maps, before and after merging, boundary, interior.

Comes in: a GalleryItem, all NumPy. Goes out: a row of pictures per thing, and one sheet per video with a column per frame. NumPy
and Pillow only; no torch, so that a report can be rendered anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's seven colours, then greedily the colour farthest (CIELAB) from all before it, taking the smallest distance
# under normal, protanope and deuteranope vision: any two differ by 17 or more, about seven just noticeable differences.
PALETTE = np.array(
    [
        (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
        (204, 121, 167), (0, 0, 255), (150, 255, 165), (105, 30, 0), (75, 45, 75), (45, 30, 165),
        (180, 255, 240), (90, 120, 255), (225, 15, 75), (225, 165, 90), (45, 45, 120), (165, 225, 255),
        (150, 210, 165), (60, 75, 240), (150, 60, 0), (195, 255, 120), (75, 150, 240), (75, 105, 60),
    ],
    dtype=np.uint8,
)  # fmt: skip
BOUNDARY_COLOUR = (213, 94, 0)
INTERIOR_COLOUR = (0, 114, 178)
MAX_FRAMES = 8  # of a sheet
MAX_FILM_FRAMES = 24  # of an animation: what a page can carry
CELL = 140  # pixels of a picture's longer side
MAPS = ("attn_labels", "object_labels", "merged_attn_labels", "merged_object_labels", "boundary", "interior")
_GAP = 4
_GUTTER = 176  # captions
_INK = (32, 33, 36)
_FAINT = (95, 99, 104)
_OPACITY = 0.62


@dataclass(frozen=True, kw_only=True)
class GalleryItem:
    """One video as the report shows it.

    Shapes: frames uint8 (T, H, W, 3); truth integer (T, h, w) of any size, 0 = background, None = not annotated;
    label maps integer (T, P) before and after merging; boundary and interior boolean (T, P); grid = (Y, X), P = Y*X
    row-major. The merged maps and the two sets may be None: their rows are then left out. `times` are the frames' numbers in
    the video; empty: all of it. `place` is 1 for the best of `num_videos` videos; 0: they were not ranked.
    """

    key: str
    frames: np.ndarray
    attn_labels: np.ndarray
    object_labels: np.ndarray
    grid: tuple[int, int]
    truth: np.ndarray | None = None
    merged_attn_labels: np.ndarray | None = None
    merged_object_labels: np.ndarray | None = None
    boundary: np.ndarray | None = None
    interior: np.ndarray | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)
    times: tuple[int, ...] = ()
    place: int = 0
    num_videos: int = 0

    def __post_init__(self) -> None:
        num_frames, patches = self.frames.shape[0], self.grid[0] * self.grid[1]
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[-1] != 3:
            got = f"{self.frames.dtype}{list(self.frames.shape)}"
            raise ValueError(f"video {self.key}: frames are {got}; uint8 [T, H, W, 3] is needed")
        if self.truth is not None and (self.truth.ndim != 3 or self.truth.shape[0] != num_frames):
            raise ValueError(f"video {self.key}: truth is {list(self.truth.shape)}; [{num_frames}, h, w] is needed")
        if self.times and len(self.times) != num_frames:
            raise ValueError(f"video {self.key}: {len(self.times)} times for {num_frames} frames; one for each is needed")
        for name in MAPS:
            value = getattr(self, name)
            if value is not None and value.shape != (num_frames, patches):
                raise ValueError(f"video {self.key}: {name} is {list(value.shape)}; [T, P] = [{num_frames}, {patches}] is needed")


@dataclass(frozen=True)
class Row:
    """A row of pictures. `cells` uint8 (N, h, w, 3)."""

    caption: str
    note: str
    cells: np.ndarray


def shrink(item: GalleryItem, max_frames: int = MAX_FILM_FRAMES, cell: int = CELL) -> GalleryItem:
    """The same video in the size and with the frames that a report shows: what is gathered and stored of it."""
    chosen = choose_frames(len(item.frames), max_frames)
    size = cell_size(item.frames.shape[1:3], cell)
    if max(size) > max(item.frames.shape[1:3]):
        size = item.frames.shape[1:3]  # small frames stay as they are
    parts = {name: value[chosen] for name in MAPS if (value := getattr(item, name)) is not None}
    return replace(
        item,
        frames=np.stack([_resize_frame(item.frames[t], size) for t in chosen]),
        truth=None if item.truth is None else _nearest(item.truth[chosen], size),
        times=tuple(item.times[t] if item.times else t for t in chosen),
        **parts,
    )


def render_item(item: GalleryItem, max_frames: int = MAX_FRAMES, cell: int = CELL) -> Image.Image:
    """The whole picture of one video: a row per thing with its caption, a column per chosen frame."""
    chosen = choose_frames(len(item.frames), max_frames)
    return _assemble(rows_of(item, chosen, cell), [item.times[t] if item.times else t for t in chosen])


def choose_frames(num_frames: int, at_most: int) -> list[int]:
    """At most so many frame numbers, evenly spread, first and last among them."""
    return sorted({int(round(place)) for place in np.linspace(0, num_frames - 1, min(num_frames, at_most))})


def rows_of(item: GalleryItem, chosen: list[int], cell: int = CELL) -> list[Row]:
    """Every row that `item` has something for, in reading order."""
    size = cell_size(item.frames.shape[1:3], cell)
    frames = np.stack([_resize_frame(item.frames[t], size) for t in chosen])
    rows = [Row("frames", f"{len(item.frames)} of the video", frames)]
    if item.truth is not None:
        slots = upsample(item.object_labels, item.grid, item.truth.shape[1:])
        truth = _nearest(match_colours(item.truth, slots)[chosen], size)
        rows.append(Row("ground truth", "coloured like the\nbest matching slot", overlay(frames, truth, background=-1)))
    for caption, labels in (
        ("attention maps", item.attn_labels),
        ("object maps", item.object_labels),
        ("attention, merged", item.merged_attn_labels),
        ("object, merged", item.merged_object_labels),
    ):
        if labels is not None:
            rows.append(_label_row(caption, labels, item, chosen, frames))
    for caption, chosen_set, colour in (
        ("boundary set", item.boundary, BOUNDARY_COLOUR),
        ("interior set", item.interior, INTERIOR_COLOUR),
    ):
        if chosen_set is not None:
            cells = highlight(frames, upsample(chosen_set[chosen], item.grid, size), colour)
            rows.append(Row(caption, f"{100 * chosen_set.mean():.0f} % of the patches", cells))
    return rows


def overlay(frames: np.ndarray, labels: np.ndarray, background: int | None = None) -> np.ndarray:
    """Colour a label map over greyed frames and outline it; `background` (where given) stays grey.

    Shapes: frames uint8 (N, h, w, 3); labels integer (N, h, w); result as frames.
    """
    grey = _grey(frames)
    mixed = _mix(grey, PALETTE[labels % len(PALETTE)], _OPACITY)
    if background is not None:
        mixed = np.where((labels == background)[..., None], grey, mixed)
    return np.where(outlines(labels)[..., None], np.uint8(255), mixed)


def highlight(frames: np.ndarray, chosen: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Paint the chosen pixels over faded frames. Shapes: frames uint8 (N, h, w, 3); chosen boolean (N, h, w)."""
    faded = _mix(_grey(frames), np.full_like(frames, 255), 0.45)
    painted = _mix(faded, np.broadcast_to(np.array(colour, dtype=np.uint8), frames.shape), 0.7)
    return np.where(chosen[..., None], painted, faded)


def outlines(labels: np.ndarray) -> np.ndarray:
    """True at pixels whose right or lower neighbour has another label. (N, h, w) -> boolean (N, h, w)"""
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, :, :-1] |= labels[:, :, :-1] != labels[:, :, 1:]
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return edge


def upsample(patches: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """A patch map at pixel size, nearest neighbour. (N, P) -> (N, *size)"""
    return _nearest(patches.reshape(len(patches), *grid), size)


def match_colours(truth: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Renumber objects so that each takes the number, and so the colour, of the slot that fits it best (IoU over the video).

    Pairs are made greedily, best first, each slot once; an object without a slot takes a number that no slot has used.
    Shapes: truth and slots integer (T, h, w); result as truth, background (0) becomes -1.
    """
    ids, true = np.unique(truth, return_inverse=True)
    used, predicted = np.unique(slots, return_inverse=True)
    both = np.zeros((len(ids), len(used)), dtype=np.int64)
    np.add.at(both, (true.ravel(), predicted.ravel()), 1)
    iou = both / (both.sum(1, keepdims=True) + both.sum(0, keepdims=True) - both)
    iou[ids == 0] = -1.0  # the background takes no colour
    colours = np.full(len(ids), -1, dtype=np.int64)
    while iou.size and iou.max() > 0:
        row, column = np.unravel_index(iou.argmax(), iou.shape)
        colours[row] = used[column]
        iou[row], iou[:, column] = -1.0, -1.0
    free = (number for number in range(len(used) + len(ids) + int(used.max(initial=0))) if number not in used)
    for row in np.flatnonzero((colours < 0) & (ids != 0)):
        colours[row] = next(free)
    return colours[true].reshape(truth.shape)


def cell_size(frame_size: tuple[int, int], cell: int) -> tuple[int, int]:
    """(h, w) of a picture whose longer side is `cell`, with the frame's proportions."""
    scale = cell / max(frame_size)
    return max(1, round(frame_size[0] * scale)), max(1, round(frame_size[1] * scale))


def _label_row(caption: str, labels: np.ndarray, item: GalleryItem, chosen: list[int], frames: np.ndarray) -> Row:
    count = len(np.unique(labels))
    cells = overlay(frames, upsample(labels[chosen], item.grid, frames.shape[1:3]))
    return Row(caption, f"{count} slot{'s' if count != 1 else ''} in use", cells)


def _assemble(rows: list[Row], chosen: list[int]) -> Image.Image:
    count, height, width = rows[0].cells.shape[:3]
    top = 26
    pitch = max(height, 44) + _GAP  # a caption and its note need 44 pixels also beside a flat picture
    picture = Image.new("RGB", (_GUTTER + count * (width + _GAP), top + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(picture)
    strong, light = _font(15), _font(13)
    for column, frame in enumerate(chosen):
        draw.text((_GUTTER + column * (width + _GAP) + width / 2, 4), f"t = {frame}", font=light, fill=_FAINT, anchor="ma")
    for number, row in enumerate(rows):
        y = top + number * pitch
        draw.text((4, y + 2), row.caption, font=strong, fill=_INK)
        draw.multiline_text((4, y + 23), row.note, font=light, fill=_FAINT, spacing=3)
        for column in range(count):
            picture.paste(Image.fromarray(row.cells[column]), (_GUTTER + column * (width + _GAP), y))
    return picture


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _resize_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _nearest(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows = ((np.arange(size[0]) + 0.5) * maps.shape[1] / size[0]).astype(int)  # the source pixel under each centre
    columns = ((np.arange(size[1]) + 0.5) * maps.shape[2] / size[1]).astype(int)
    return maps[:, rows[:, None], columns]


def _grey(frames: np.ndarray) -> np.ndarray:
    luma = frames @ np.array([0.299, 0.587, 0.114])
    return np.repeat(luma.round().astype(np.uint8)[..., None], 3, axis=-1)


def _mix(below: np.ndarray, above: np.ndarray, opacity: float) -> np.ndarray:
    return (below * (1 - opacity) + above * opacity).round().astype(np.uint8)


__all__ = ["BOUNDARY_COLOUR", "INTERIOR_COLOUR", "MAPS", "PALETTE", "GalleryItem", "Row", "choose_frames", "highlight",
           "match_colours", "outlines", "overlay", "render_item", "rows_of", "shrink", "upsample"]  # fmt: skip
