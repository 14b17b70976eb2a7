"""Textures of the physics clips: pictures that repeat without a seam, drawn from palettes.

Comes in: random choices. Goes out: uint8 (size, size, 3). No detail is finer than a few texels: the renderer has no mipmaps,
and what is finer than a pixel would flicker.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np

from data_pipeline.sources.physics.randomness import Draw

OBJECT_PATTERNS = ("plain", "marble", "stripes", "checks", "dots", "patches", "cells")
FLOOR_PATTERNS = ("marble", "tiles", "planks", "patches", "cells", "sand")
SKY_PATTERNS = ("clouds", "marble", "panels", "patches")


def draw_palette(draw: Draw, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """Three colours: two related ones and one of another hue. Shapes: (3, 3) RGB in [0, 1]."""
    hue = draw.uniform()
    hues = (hue, hue + draw.uniform(-0.1, 0.1), hue + draw.uniform(0.25, 0.75))
    values = np.linspace(*value, 3)[draw.shuffled(3)]
    return np.array(
        [colorsys.hsv_to_rgb(tint % 1.0, draw.uniform(*saturation), bright) for tint, bright in zip(hues, values, strict=True)]
    )


def draw_texture(pattern: str, palette: np.ndarray, size: int, draw: Draw) -> np.ndarray:
    """A picture in the palette's colours, its light and dark varied a little everywhere."""
    level = PATTERNS[pattern](size, draw)
    colour = np.stack([np.interp(level, (0, 0.5, 1), palette[:, channel]) for channel in range(3)], -1)
    grain = 1 + 0.3 * (cloud(size, 1.0, draw) - 0.5)
    return np.clip(colour * grain[..., None] * 255 + 0.5, 0, 255).astype(np.uint8)


def cloud(size: int, roughness: float, draw: Draw) -> np.ndarray:
    """Noise whose spectrum falls like 1/frequency**(2 - roughness/2), without a seam, in [0, 1]. Shapes: (size, size)."""
    rows, columns = np.fft.fftfreq(size)[:, None] * size, np.fft.rfftfreq(size)[None] * size
    frequency = np.hypot(rows, columns)
    weight = np.where(frequency > 0, np.maximum(frequency, 1) ** -(2 - roughness / 2), 0)
    weight *= np.exp(-((frequency / (size / 5)) ** 2))  # nothing finer than about five texels
    values = np.fft.irfft2(np.fft.rfft2(draw.uniforms((size, size), -1, 1)) * weight, s=(size, size))
    return np.clip(0.5 + values / (5 * values.std()), 0, 1)


def _soft(values: np.ndarray, sharpness: float) -> np.ndarray:
    """Near 0 below zero, near 1 above, with a slope between: an edge without jags."""
    return np.clip(0.5 + values * sharpness, 0, 1)


def _axes(size: int) -> tuple[np.ndarray, np.ndarray]:
    step = (np.arange(size) + 0.5) / size
    return step[:, None], step[None, :]


def _plain(size: int, draw: Draw) -> np.ndarray:
    return 0.25 * cloud(size, 0.0, draw)


def _marble(size: int, draw: Draw) -> np.ndarray:
    return cloud(size, draw.uniform(0.4, 1.2), draw)


def _sand(size: int, draw: Draw) -> np.ndarray:
    return np.clip(0.35 + 0.5 * (cloud(size, 2.2, draw) - 0.5), 0, 1)


def _stripes(size: int, draw: Draw) -> np.ndarray:
    v, u = _axes(size)
    along, across = draw.choice(((0, 2), (2, 0), (3, 0), (0, 4), (2, 2), (3, 1)))
    bend = draw.uniform(0, 0.25) * (cloud(size, 0.0, draw) - 0.5)
    return _soft(np.sin(2 * np.pi * (along * u + across * v + bend)), size / 40)


def _checks(size: int, draw: Draw) -> np.ndarray:
    v, u = _axes(size)
    rows, columns = draw.integer(2, 3), draw.integer(2, 3)
    return _soft(np.sin(2 * np.pi * rows * v) * np.sin(2 * np.pi * columns * u), size / 30)


def _tiles(size: int, draw: Draw) -> np.ndarray:
    """Square tiles of two shades with joints between."""
    count = draw.choice((2, 4, 6))
    v, u = (axis * count for axis in _axes(size))
    joint = np.minimum(abs(v - np.round(v)), abs(u - np.round(u))) < 1.6 * count / size
    shade = draw.uniforms((count, count), 0.0, 0.6)[np.floor(v).astype(int), np.floor(u).astype(int)]
    if draw.uniform() < 0.5:
        shade = 0.1 + 0.4 * ((np.floor(v) + np.floor(u)) % 2)
    return np.where(joint, 1.0, shade + 0.25 * (cloud(size, 1.0, draw) - 0.5)).clip(0, 1)


def _planks(size: int, draw: Draw) -> np.ndarray:
    count = draw.integer(5, 8)
    v, u = _axes(size)
    row = np.floor(v * count).astype(int)
    begin = draw.uniforms((count,))[row]
    piece = np.floor(2 * (u + begin)).astype(int) % 2
    shade = draw.uniforms((count, 2), 0, 0.6)[row + 0 * piece, piece]
    joint = (abs(v * count - np.round(v * count)) < 1.3 * count / size) | (
        abs(2 * (u + begin) - np.round(2 * (u + begin))) < 3 / size
    )
    grain = np.roll(cloud(size, 1.0, draw), 3, axis=1).mean(axis=1, keepdims=True) - 0.5 + cloud(size, 0.5, draw) - 0.5
    return np.where(joint, 1.0, shade + 0.3 * grain).clip(0, 1)


def _dots(size: int, draw: Draw) -> np.ndarray:
    count = draw.integer(2, 4)
    v, u = (axis * count for axis in _axes(size))
    row, column = np.floor(v), np.floor(u)
    distance = np.hypot(v - row - 0.5, u - column - 0.5)
    return _soft(draw.uniform(0.25, 0.38) - distance, size / (3 * count)) * (0.5 + 0.5 * ((row + column) % 2))


def _patches(size: int, draw: Draw) -> np.ndarray:
    """Camouflage: noise cut at two levels."""
    noise = cloud(size, draw.uniform(0.0, 0.6), draw)
    return 0.5 * _soft(noise - 0.42, 12) + 0.5 * _soft(noise - 0.6, 12)


def _cells(size: int, draw: Draw) -> np.ndarray:
    """Pebbles: the plane divided among random points, joints between."""
    count = draw.integer(12, 30)
    points, shade = draw.uniforms((count, 2)), draw.uniforms((count,), 0, 0.7)
    v, u = _axes(size)
    gap = [abs(axis[None] - points[:, coordinate, None, None]) for coordinate, axis in enumerate((v, u))]
    distance = np.hypot(*(np.minimum(part, 1 - part) for part in gap))  # around the edges: the pattern repeats
    nearest, second = np.partition(distance, 1, axis=0)[:2]
    joint = _soft(3.0 / size - (second - nearest), size / 3)
    return np.maximum(shade[distance.argmin(axis=0)], joint)


def _clouds(size: int, draw: Draw) -> np.ndarray:
    return _soft(cloud(size, 0.3, draw) - 0.5, 2.0)


def _panels(size: int, draw: Draw) -> np.ndarray:
    """Upright bands of random shade: walls and shelves in the distance."""
    count = draw.integer(6, 14)
    v, u = _axes(size)
    shade = draw.uniforms((3, count))[np.floor(v * 3).astype(int), np.floor(u * count).astype(int)]
    return np.clip(0.8 * shade + 0.4 * (cloud(size, 0.3, draw) - 0.5), 0, 1)


PATTERNS: dict[str, Callable[[int, Draw], np.ndarray]] = {
    "plain": _plain,
    "marble": _marble,
    "sand": _sand,
    "stripes": _stripes,
    "checks": _checks,
    "tiles": _tiles,
    "planks": _planks,
    "dots": _dots,
    "patches": _patches,
    "cells": _cells,
    "clouds": _clouds,
    "panels": _panels,
}
