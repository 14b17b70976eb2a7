"""Generated videos: textured objects that move, turn, hide one another, leave and enter before a cluttered background.

Comes in: settings and a seed, nothing from disk. Goes out: Clip with exact masks (0 = background and clutter).

Every clip is a pure function of (seed, split, index). Objects belong to species: a shape, a pattern and three colours, drawn
once for a seed and shared by its splits, so that a clip may hold several objects of one look. Lengths are in units of
the frame's side, times in frames. Objects are drawn from the farthest to the nearest with soft edges; a pixel carries the id
of an object that covers at least half of it.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.clip import Clip
from data_pipeline.config import SyntheticSource
from data_pipeline.errors import DataError

SPLITS = ("train", "validation")
SHAPES = ("disc", "square", "triangle", "blob")
PATTERNS = ("stripes", "checks", "rings", "sectors", "dots")
REACH = 1.25  # no shape extends farther than this many radii from its centre
PIXEL_NOISE = 0.03  # standard deviation, of full scale


@dataclass(frozen=True)
class Difficulty:
    """What distinguishes one kind of clips from another. Lengths are shares of the frame's side, speeds per frame."""

    num_objects: tuple[int, int]
    num_moving: tuple[int, int] | None  # None: all move
    radius: tuple[float, float]
    num_species: int
    num_clutter: int
    noise_cell: float  # size of the background's patches of colour
    speed: float  # of objects, at most
    pan: float  # of the camera, at most
    crossing: float  # share of the moving objects that enter or leave


DIFFICULTIES = {
    "easy": Difficulty(
        num_objects=(3, 5),
        num_moving=None,
        radius=(14 / 96, 24 / 96),
        num_species=24,
        num_clutter=3,
        noise_cell=40 / 96,
        speed=4 / 96,
        pan=0.5 / 96,
        crossing=0.3,
    ),
    "movi_c": Difficulty(
        num_objects=(3, 10),
        num_moving=None,
        radius=(7 / 96, 20 / 96),
        num_species=200,
        num_clutter=8,
        noise_cell=20 / 96,
        speed=4 / 96,
        pan=0.0,
        crossing=0.3,
    ),
    "movi_e": Difficulty(
        num_objects=(11, 23),
        num_moving=(1, 3),
        radius=(5 / 96, 14 / 96),
        num_species=200,
        num_clutter=8,
        noise_cell=20 / 96,
        speed=4 / 96,
        pan=1.5 / 96,
        crossing=0.3,
    ),
}


@dataclass(frozen=True)
class Species:
    """A look. `colours` (3, 3) RGB in [0, 1]; `frequency`: repeats of the pattern over a radius; `lobes`, `phase`: of a blob."""

    shape: str
    pattern: str
    colours: np.ndarray
    frequency: float
    lobes: int
    phase: float


class Sprite(NamedTuple):
    """One object of a clip. centre (T, 2) as (y, x) in shares of the side; angle (T) in radians; radius a share of the side."""

    species: int
    centre: np.ndarray
    angle: np.ndarray
    radius: float


class Layer(NamedTuple):
    """A drawn object: boxes of K x K pixels. top_left int (T, 2); colour (T, K, K, 3); cover (T, K, K) in [0, 1]."""

    top_left: np.ndarray
    colour: np.ndarray
    cover: np.ndarray


class Scene(NamedTuple):
    """Everything of a clip but the drawing: sprites from the farthest to the nearest, pan (T, 2), a light's direction (y, x)."""

    sprites: list[Sprite]
    pan: np.ndarray
    light: np.ndarray


class SyntheticVideos:
    """Source of generated clips. Key: split and index."""

    background_labelled = True

    def __init__(self, config: SyntheticSource) -> None:
        self.config = config
        self._counts = {"train": config.num_train, "validation": config.num_validation}

    def keys(self, split: str) -> list[str]:
        if split not in self._counts:
            raise DataError(f"split={split!r} is not generated; there are {', '.join(SPLITS)}; change splits")
        return [f"{split}-{index:06d}" for index in range(self._counts[split])]

    def read(self, split: str, key: str) -> Clip:
        if key not in self.keys(split):
            raise DataError(f"video key={key!r}; split {split} has no such clip; take keys from keys({split!r})")
        return draw_clip(self.config, split, int(key.rpartition("-")[2]))


def draw_clip(config: SyntheticSource, split: str, index: int) -> Clip:
    """Clip `index` of a split; the same settings give the same bytes. About 0.1 s for 16 frames of 96 pixels."""
    kind = DIFFICULTIES[config.difficulty]
    catalogue = draw_species(config.seed, kind.num_species)
    stream = 1 + SPLITS.index(split) + len(SPLITS) * list(DIFFICULTIES).index(config.difficulty)
    rng = generator(config.seed, stream, index)
    scene = compose_scene(rng, kind, config.num_frames)
    canvas = draw_background(rng, kind, scene, config.image_size)
    layers = [draw_sprite(sprite, catalogue[sprite.species], scene.light, config.image_size) for sprite in scene.sprites]
    picture, ids = paint(canvas, layers)
    noise = rng.standard_normal(picture.shape, np.float32) * PIXEL_NOISE
    frames = np.clip((picture + noise) * 255 + 0.5, 0, 255).astype(np.uint8)
    species = [catalogue[sprite.species] for sprite in scene.sprites]
    metadata: dict[str, Any] = {
        "difficulty": config.difficulty,
        "seed": config.seed,
        "index": index,
        "num_instances": len(layers),
        "species": [sprite.species for sprite in scene.sprites],
        "shapes": [look.shape for look in species],
        "patterns": [look.pattern for look in species],
    }
    return Clip(key=f"{split}-{index:06d}", frames=frames, instance_ids=ids, metadata=metadata)


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """A counter-based generator of its own for every (seed, stream, index)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream << 48 | index], np.uint64)))


def draw_species(seed: int, count: int) -> list[Species]:
    """The looks of a seed. Shapes and patterns go round in turn, so that each occurs."""
    rng = generator(seed, 0, 0)
    looks = []
    for number in range(count):
        shape = SHAPES[number % len(SHAPES)]
        pattern = PATTERNS[number % len(PATTERNS)]
        hue = rng.random()
        hues = [hue, hue + rng.uniform(-0.12, 0.12), rng.random()]  # two related colours and one of its own
        values = rng.permutation([0.95, 0.65, 0.35]) + rng.uniform(-0.1, 0.05, 3)
        saturations = rng.uniform(0.55, 1.0, 3)
        colours = [colorsys.hsv_to_rgb(h % 1.0, s, v) for h, s, v in zip(hues, saturations, values, strict=True)]
        phase, frequency = rng.uniform(0, 2 * np.pi), rng.uniform(1.4, 3.2)
        looks.append(Species(shape, pattern, np.array(colours, np.float32), frequency, int(rng.integers(3, 6)), phase))
    return looks


def compose_scene(rng: np.random.Generator, kind: Difficulty, num_frames: int) -> Scene:
    """Draw who is there, where everything goes, where the camera looks. `pan` counts against every position."""
    num_objects = int(rng.integers(kind.num_objects[0], kind.num_objects[1] + 1))
    num_moving = num_objects if kind.num_moving is None else int(rng.integers(kind.num_moving[0], kind.num_moving[1] + 1))
    moving = rng.permutation(num_objects) < num_moving
    steps = np.arange(num_frames)[:, None] - (num_frames - 1) / 2
    pan = steps * _velocity(rng, kind.pan)
    sprites = []
    for moves in moving:
        radius = rng.uniform(*kind.radius)
        centre = _path(rng, kind, num_frames, radius) if moves else rng.uniform(0.02, 0.98, (1, 2)) + steps * 0
        turn = rng.uniform(-0.12, 0.12) if moves else 0.0
        angle = rng.uniform(0, 2 * np.pi) + turn * steps[:, 0]
        sprites.append(Sprite(int(rng.integers(kind.num_species)), centre - pan, angle, radius))
    direction = rng.uniform(0, 2 * np.pi)
    return Scene(sprites, pan, np.array([np.sin(direction), np.cos(direction)], np.float32))


def _velocity(rng: np.random.Generator, most: float) -> np.ndarray:
    """A step per frame in any direction, at least a quarter as long as `most`."""
    direction, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 1.0) * most
    return length * np.array([np.sin(direction), np.cos(direction)])


def _path(rng: np.random.Generator, kind: Difficulty, num_frames: int, radius: float) -> np.ndarray:
    """Centres (T, 2) of a moving object: it enters, leaves, or stays and is thrown back at the frame's edges."""
    steps = np.arange(num_frames)[:, None]
    if rng.random() >= kind.crossing:
        low, high = 0.1, 0.9
        way = rng.uniform(low, high, 2) + steps * _velocity(rng, kind.speed) - low
        return low + (high - low) - np.abs((way % (2 * (high - low))) - (high - low))
    # Crosses one edge at a random moment of the middle half, straight outward; read backwards, it enters.
    along, across = kind.speed * rng.uniform(-0.4, 0.4), kind.speed * rng.uniform(0.5, 0.9)
    moment = rng.uniform(0.25, 0.75) * (num_frames - 1)
    outward = 1 + radius / 2 + (steps - moment) * across
    sideways = rng.uniform(0.2, 0.8) + (steps - moment) * along
    way = np.concatenate([outward, sideways], axis=1)
    if rng.random() < 0.5:
        way = way[:, ::-1]
    if rng.random() < 0.5:
        way = 1 - way
    return way[::-1] if rng.random() < 0.5 else way


def draw_background(rng: np.random.Generator, kind: Difficulty, scene: Scene, size: int) -> np.ndarray:
    """Softly mixed muted colours with discs of clutter, seen by the panning camera: float32 (T, size, size, 3) in [0, 1]."""
    shift = scene.pan * size
    margin = int(np.ceil(np.abs(shift).max())) + 1
    side = size + 2 * margin
    cells = max(2, round(side / (kind.noise_cell * size))) + 1
    weights = np.stack([_smooth(rng.random((cells, cells)), side) for _ in range(3)], axis=-1)
    weights = np.exp(5 * weights)
    canvas = (weights / weights.sum(-1, keepdims=True)).astype(np.float32) @ _muted_colours(rng, 3)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    for _ in range(kind.num_clutter):
        centre, radius = rng.uniform(0, side, 2), rng.uniform(3 / 96, 8 / 96) * size
        cover = np.clip(0.5 + radius - np.hypot(y - centre[0], x - centre[1]), 0, 1)[..., None]
        canvas += (_muted_colours(rng, 1) - canvas) * cover
    return np.stack([_shifted(canvas, margin + move, size) for move in shift])


def _muted_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    colours = [colorsys.hsv_to_rgb(*rng.uniform((0, 0.1, 0.25), (1, 0.5, 0.85))) for _ in range(count)]
    return np.array(colours, np.float32)


def _smooth(cells: np.ndarray, side: int) -> np.ndarray:
    """Blow up random cells to (side, side), with smoothed bilinear weights."""
    place = np.linspace(0, cells.shape[0] - 1 - 1e-6, side)
    low = place.astype(int)
    part = place - low
    part = part * part * (3 - 2 * part)
    rows = cells[low] * (1 - part)[:, None] + cells[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def _shifted(canvas: np.ndarray, corner: np.ndarray, size: int) -> np.ndarray:
    """The square of `size` pixels whose top left lies at a fractional `corner`."""
    top, left = np.floor(corner).astype(int)
    down, right = (corner - (top, left)).astype(np.float32)
    area = canvas[top : top + size + 1, left : left + size + 1]
    rows = area[:-1] * (1 - down) + area[1:] * down
    return rows[:, :-1] * (1 - right) + rows[:, 1:] * right


def draw_sprite(sprite: Sprite, species: Species, light: np.ndarray, size: int) -> Layer:
    """Draw one object in all frames at once, in boxes around its centre."""
    radius = sprite.radius * size
    centre = (sprite.centre * size - 0.5).astype(np.float32)  # pixel k covers [k, k + 1)
    half = int(np.ceil(radius * REACH)) + 1
    top_left = np.floor(centre).astype(int) - half
    offsets = np.arange(2 * half + 2, dtype=np.float32)
    y = ((top_left[:, :1] + offsets - centre[:, :1]) / radius).astype(np.float32)[:, :, None]
    x = ((top_left[:, 1:] + offsets - centre[:, 1:]) / radius).astype(np.float32)[:, None, :]
    cos, sin = (f(sprite.angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    v, u = cos * y - sin * x, sin * y + cos * x
    distance, theta = np.hypot(u, v), np.arctan2(v, u)
    cover = np.clip(0.5 - OUTLINES[species.shape](u, v, distance, theta, species) * radius, 0, 1)
    band = FILLS[species.pattern](u, v, distance, theta, species.frequency).astype(np.int64) % 3
    shade = 1.0 + 0.22 * (light[0] * y + light[1] * x) - 0.18 * distance * distance
    return Layer(top_left, species.colours[band] * shade[..., None], cover)


def paint(canvas: np.ndarray, layers: list[Layer]) -> tuple[np.ndarray, np.ndarray]:
    """Lay the layers over `canvas`, the first one lowest: (picture, ids (T, H, W) with k for layer k-1). Changes `canvas`."""
    num_frames, height, width, _ = canvas.shape
    ids = np.zeros((num_frames, height, width), np.uint8)
    for number, layer in enumerate(layers, start=1):
        box = layer.cover.shape[1]
        for frame, (top, left) in enumerate(layer.top_left):
            rows, columns = slice(max(top, 0), min(top + box, height)), slice(max(left, 0), min(left + box, width))
            if rows.start >= rows.stop or columns.start >= columns.stop:
                continue
            inside = (frame, slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
            cover = layer.cover[inside]
            below = canvas[frame, rows, columns]
            below += (layer.colour[inside] - below) * cover[..., None]
            ids[frame, rows, columns][cover >= 0.5] = number
    return canvas, ids


# Signed distance to the outline in radii, negative inside: (u, v, distance, theta, species) -> array of their shape.


def _disc(u: np.ndarray, v: np.ndarray, distance: np.ndarray, theta: np.ndarray, species: Species) -> np.ndarray:
    return distance - 1.0


def _square(u: np.ndarray, v: np.ndarray, distance: np.ndarray, theta: np.ndarray, species: Species) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.85


def _triangle(u: np.ndarray, v: np.ndarray, distance: np.ndarray, theta: np.ndarray, species: Species) -> np.ndarray:
    side = np.float32(np.sqrt(3) / 2)
    return np.maximum(np.maximum(side * u - v / 2, -side * u - v / 2), v) - 0.62


def _blob(u: np.ndarray, v: np.ndarray, distance: np.ndarray, theta: np.ndarray, species: Species) -> np.ndarray:
    wave = 0.16 * np.cos(species.lobes * theta + species.phase) + 0.07 * np.cos(2 * theta - species.phase)
    return distance - (0.92 + wave)


# Which of the three colours, before the modulus: (u, v, distance, theta, frequency) -> array of whole numbers.


def _stripes(u: np.ndarray, v: np.ndarray, distance: np.ndarray, theta: np.ndarray, frequency: float) -> np.ndarray:
    return np.floor(u * frequency)


def _checks(u: np.ndarray, v: np.ndarray, distance: np.ndarray, theta: np.ndarray, frequency: float) -> np.ndarray:
    return np.floor(u * frequency) + np.floor(v * frequency)


def _rings(u: np.ndarray, v: np.ndarray, distance: np.ndarray, theta: np.ndarray, frequency: float) -> np.ndarray:
    return np.floor(distance * frequency)


def _sectors(u: np.ndarray, v: np.ndarray, distance: np.ndarray, theta: np.ndarray, frequency: float) -> np.ndarray:
    return np.floor((theta / (2 * np.pi) + 0.5) * 3 * np.floor(frequency))


def _dots(u: np.ndarray, v: np.ndarray, distance: np.ndarray, theta: np.ndarray, frequency: float) -> np.ndarray:
    row, column = np.floor(u * frequency), np.floor(v * frequency)
    dot = np.hypot(u * frequency - row - 0.5, v * frequency - column - 0.5) < 0.36
    return dot * (1 + (row + column) % 2)


Outline = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Species], np.ndarray]
Fill = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
OUTLINES: dict[str, Outline] = {"disc": _disc, "square": _square, "triangle": _triangle, "blob": _blob}
FILLS: dict[str, Fill] = {"stripes": _stripes, "checks": _checks, "rings": _rings, "sectors": _sectors, "dots": _dots}
