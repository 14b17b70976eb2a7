"""Contact sheet: a picture of what a split's shards hold. Part of data_pipeline.inspect.

Comes in: a ShardDataset. Goes out: one picture. For each of a few videos a row of frames with the annotated objects in colour,
and below it the features of the same frames: their first three principal components within a video as red, green and blue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards import Sample
from data_pipeline.store import ShardDataset

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

GAP, CAPTION, MARGIN = 2, 20, 8  # pixels
PAPER, INK, FAINT, FAULT = (24, 24, 27), (244, 244, 245), (161, 161, 170), (248, 113, 113)
GREY = 96  # stands for frames that were not kept
FILL = 0.35  # of an object's colour over its pixels
GOLDEN = 0.618034  # hues a golden section apart stay apart for any number of objects
FIT_VIDEOS, FIT_FRAMES = 32, 2
PLACE_VIDEOS = 8  # so many are needed to tell what belongs to a place from what happens to be there
NOTE = "principal components 1, 2, 3 within a video as red, green, blue"

T = TypeVar("T")


class Colours(NamedTuple):
    """Features -> colours: less the mean of the video and of the place, three directions, what becomes dark and bright."""

    places: np.ndarray  # (P, E): what all videos have in common there
    deviation: np.ndarray  # (E,)
    directions: np.ndarray  # (E, 3)
    low: np.ndarray
    high: np.ndarray
    explained: float  # share of the variance of the normalised channels

    def paint(self, features: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Shapes: (P, E), (E,) -> uint8 (P, 3)."""
        values = ((features - mean - self.places) / self.deviation) @ self.directions
        return (np.clip((values - self.low) / (self.high - self.low), 0.0, 1.0) * 255).astype(np.uint8)


@dataclass
class Sheet:
    """The finished picture, and a line for each thing that could not be read."""

    pixels: np.ndarray
    faults: list[str] = field(default_factory=list)
    explained: float | None = None


def draw_sheet(dataset: ShardDataset, num_videos: int, num_frames: int, tile: int, with_features: bool = True) -> Sheet:
    """Evenly chosen videos, evenly chosen frames. What is damaged becomes a crossed tile and a line in `faults`."""
    from PIL import Image, ImageDraw

    faults: list[str] = []
    samples = dataset.index.samples
    chosen = evenly(len(samples), num_videos)
    colours = fit_colours(dataset, faults) if with_features and dataset.index.has_features else None
    drawn = any(samples[number].members["frames"] or samples[number].members["ids"] for number in chosen)
    lines = int(drawn) + int(colours is not None)
    columns = max(len(evenly(samples[number].frames, num_frames)) for number in chosen)
    block = CAPTION + lines * (tile + GAP)
    size = (2 * MARGIN + columns * (tile + GAP) - GAP, CAPTION + len(chosen) * block + CAPTION)
    image = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(image)
    _write(pen, (MARGIN, 4), _title(dataset), INK, size[0])
    for place, number in enumerate(chosen):
        top = CAPTION + place * block
        _write(pen, (MARGIN, top + 5), _caption(dataset, samples[number]), FAINT, size[0])
        frames = evenly(samples[number].frames, num_frames)
        rows = [[_picture(dataset, number, frame, tile, faults) for frame in frames]] if drawn else []
        rows += [] if colours is None else [_feature_tiles(dataset, colours, number, frames, tile, faults)]
        for line, tiles in enumerate(rows):
            for column, pixels in enumerate(tiles):
                left, upper = MARGIN + column * (tile + GAP), top + CAPTION + line * (tile + GAP)
                image.paste(Image.fromarray(pixels), (left, upper))
                if line == 0:
                    pen.text((left + 4, upper + 2), f"{frames[column]}", INK, stroke_width=1, stroke_fill=(0, 0, 0))
    _write(
        pen,
        (MARGIN, size[1] - CAPTION + 4),
        _note(colours, drawn, any(samples[number].members["ids"] for number in chosen)),
        FAINT,
        size[0],
    )
    return Sheet(np.asarray(image), faults, None if colours is None else colours.explained)


def fit_colours(dataset: ShardDataset, faults: list[str]) -> Colours | None:
    """Principal components of a few frames of evenly chosen videos; None where no features could be read.

    Each video's mean is taken away, and the mean of each place in the frame over enough videos, else light and position would be
    all that one sees; then channels are normalised, else a few massive ones would be. A direction's largest entry is positive, so
    that the same features always give the same colours.
    """
    parts: list[np.ndarray] = []
    for number in evenly(len(dataset), FIT_VIDEOS):
        chosen = evenly(dataset.index.samples[number].frames, FIT_FRAMES)
        read = [values for frame in chosen if (values := _read_features(dataset, number, frame, faults)) is not None]
        if read:
            video = np.stack(read).astype(np.float64)
            parts.append(video - video.mean(axis=(0, 1)))
    if not parts:
        return None
    tokens = np.concatenate(parts)
    places = tokens.mean(axis=0) if len(parts) >= PLACE_VIDEOS else np.zeros(tokens.shape[1:])
    tokens = (tokens - places).reshape(-1, tokens.shape[-1])
    deviation = tokens.std(axis=0)
    deviation[deviation < 1e-6 * max(float(deviation.max()), 1e-30)] = np.inf  # a constant channel says nothing
    normal = tokens / deviation
    variances, directions = np.linalg.eigh(normal.T @ normal / len(normal))
    directions = np.pad(directions[:, ::-1][:, :3], ((0, 0), (0, max(0, 3 - len(variances)))))
    signs = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(3)])
    directions = directions * np.where(signs == 0, 1.0, signs)
    low, high = np.percentile(normal @ directions, [2, 98], axis=0)
    explained = float(variances[-3:].sum() / max(float(variances.sum()), 1e-30))
    return Colours(places, deviation, directions, low, np.maximum(high, low + 1e-9), explained)


def overlay(pixels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Tint every object and colour its inner border. Shapes: pixels uint8 (H, W, 3), ids (H, W); 0 is left alone."""
    padded = np.pad(ids, 1, mode="edge")
    height, width = ids.shape
    shifted = [padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    inside = ids > 0
    border = np.any([other != ids for other in shifted], axis=0) & inside
    result = pixels.copy()
    result[inside] = ((1 - FILL) * pixels[inside] + FILL * id_colours(ids[inside])).astype(np.uint8)
    result[border] = id_colours(ids[border])
    return result


def id_colours(ids: np.ndarray) -> np.ndarray:
    """A bright colour for each id. Shapes: (N,) -> uint8 (N, 3)."""
    hue = (ids.astype(np.float64) * GOLDEN % 1.0)[:, None]
    wave = np.abs((hue + np.array([0.0, 2 / 3, 1 / 3])) % 1.0 * 6.0 - 3.0) - 1.0
    return (np.clip(wave, 0.0, 1.0) * 255).astype(np.uint8)


def evenly(total: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `total`, the first and the last among them where there are two or more."""
    if wanted == 1 or total == 1:
        return [total // 2]
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(int)).tolist()


def _view(dataset: ShardDataset) -> str:
    """The view to show: the whole square in the middle, unless other views alone are stored."""
    views = [str(view) for view in dataset.index.features["views"]]
    return "center" if "center" in views or not views else views[0]


def _read_features(dataset: ShardDataset, number: int, frame: int, faults: list[str]) -> np.ndarray | None:
    """Shapes: float32 (P, E)."""
    return _attempt(faults, lambda: dataset.features(number, _view(dataset), frame, 1)[0])


def _feature_tiles(
    dataset: ShardDataset, colours: Colours, number: int, frames: list[int], tile: int, faults: list[str]
) -> list[np.ndarray]:
    """The chosen frames of one video, in colours that leave its mean out."""
    read = [_read_features(dataset, number, frame, faults) for frame in frames]
    found = [features for features in read if features is not None]
    if not found:
        return [_crossed(tile) for _ in frames]
    mean, grid = np.concatenate(found).mean(axis=0), dataset.index.grid
    return [
        _crossed(tile) if features is None else _nearest(colours.paint(features, mean).reshape(*grid, 3), tile)
        for features in read
    ]


def _picture(dataset: ShardDataset, number: int, frame: int, tile: int, faults: list[str]) -> np.ndarray:
    """A frame with its objects, as the view shows it; grey where frames were not kept."""
    from PIL import Image

    members, view = dataset.index.samples[number].members, _view(dataset)
    pixels = _attempt(faults, lambda: dataset.frames(number, frame, 1, view)) if members["frames"] else None
    ids = _attempt(faults, lambda: dataset.instance_ids(number, frame, 1, view)) if members["ids"] else None
    if any(members[part] and values is None for part, values in (("frames", pixels), ("ids", ids))):
        return _crossed(tile)
    shown = np.full((tile, tile, 3), GREY, np.uint8)
    if pixels is not None:
        shown = np.array(Image.fromarray(pixels[0]).resize((tile, tile), Image.Resampling.BILINEAR))
    return shown if ids is None else overlay(shown, _nearest(ids[0], tile))


def _attempt(faults: list[str], read: Callable[[], T]) -> T | None:
    """What `read` gives, or None and a line that says why not. A shard that is damaged says so once."""
    try:
        return read()
    except DataError as error:
        if str(error) not in faults:
            faults.append(str(error))
        return None


def _crossed(tile: int) -> np.ndarray:
    """What stands for something that cannot be read."""
    pixels = np.full((tile, tile, 3), 40, np.uint8)
    steps = np.arange(tile)
    for columns in (steps, tile - 1 - steps):
        pixels[steps, columns] = FAULT
    return pixels


def _nearest(values: np.ndarray, size: int) -> np.ndarray:
    """Shapes: (H, W, ...) -> (size, size, ...)."""
    rows, columns = (((np.arange(size) + 0.5) * side / size).astype(int) for side in values.shape[:2])
    return values[rows[:, None], columns]


def _title(dataset: ShardDataset) -> str:
    index = dataset.index
    made = index.features
    return (
        f"{index.dataset['source']} {index.dataset['split']}: {len(index.samples)} videos, {made['extractor']} {made['layer']}, "
        f"{made['grid'][0]}x{made['grid'][1]} patches x {made['width']}, {made['codec']}, version {index.version[:12]}"
    )


def _caption(dataset: ShardDataset, sample: Sample) -> str:
    objects = "not annotated" if sample.num_instances is None else f"{sample.num_instances} objects"
    shard = dataset.index.shards[sample.shard]["name"]
    return f"{sample.key}: {sample.frames} frames of {sample.size[1]}x{sample.size[0]}, {objects}, {shard}"


def _note(colours: Colours | None, drawn: bool, annotated: bool) -> str:
    frames = "frames with their annotated objects" if annotated else "frames"
    if colours is None:
        return frames
    return f"{frames + '; below them the ' if drawn else ''}features: {NOTE} ({colours.explained:.0%} of the variance)"


def _write(pen: ImageDraw, place: tuple[int, int], text: str, colour: tuple[int, int, int], width: int) -> None:
    """Text that ends with dots where the picture does."""
    room = width - place[0] - MARGIN
    while pen.textlength(text) > room and len(text) > 4:
        text = text[:-4] + "..."
    pen.text(place, text, colour)
