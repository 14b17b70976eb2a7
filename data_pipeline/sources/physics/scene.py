"""What a physics clip shows before anything moves: objects, floor, sky, light, the camera's path.

Comes in: a variant's name and random choices. Goes out: Scene. Metres and seconds; z points up, the floor is z = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.sources.physics.randomness import Draw
from data_pipeline.sources.physics.shapes import SHAPES, Shape, draw_shape, volume_of
from data_pipeline.sources.physics.textures import (
    FLOOR_PATTERNS,
    OBJECT_PATTERNS,
    SKY_PATTERNS,
    draw_palette,
    draw_texture,
)

OBJECT_TEXELS, SURROUND_TEXELS = 96, 256
GAP = 0.05  # between the spheres around two objects at the start


@dataclass(frozen=True)
class Variant:
    """What distinguishes one kind of clips from another. Pairs are the bounds of an even distribution."""

    moving: tuple[int, int]  # objects that fly in
    resting: tuple[int, int]  # objects that lie on the floor at the start; they may be pushed
    radius: tuple[float, float]  # of the sphere around a moving object
    resting_radius: tuple[float, float]
    spread: float  # objects start at most so far from the middle along x and y
    speed: float  # along x and y at the start, at most, before the pull to the middle
    distance: tuple[float, float]  # of the camera from what it looks at
    elevation: tuple[float, float]  # of the camera, degrees
    travel: tuple[float, float]  # how far the camera goes in the whole clip
    seen: float  # share of the objects that must be seen; other scenes are drawn anew


VARIANTS = {
    "easy": Variant((2, 4), (0, 0), (0.8, 1.4), (0, 0), 2.0, 2.5, (7.0, 8.0), (20, 50), (0, 0), 1.0),
    "movi_c": Variant((3, 10), (0, 0), (0.55, 1.35), (0, 0), 2.8, 3.0, (7.0, 9.0), (15, 50), (0, 0), 1.0),
    "movi_e": Variant((1, 3), (10, 20), (0.5, 1.2), (0.4, 1.1), 4.0, 4.0, (7.5, 10.0), (15, 50), (1.5, 4.0), 0.8),
}
FIELD_OF_VIEW = np.radians(50.0)  # across and down


@dataclass(frozen=True)
class Body:
    """An object at the start. `rotation` is a quaternion (x, y, z, w), `texture` uint8 (S, S, 3), `mass` in kg."""

    kind: str
    shape: Shape
    radius: float
    mass: float
    pattern: str
    palette: np.ndarray
    texture: np.ndarray
    position: np.ndarray
    rotation: np.ndarray
    velocity: np.ndarray
    spin: np.ndarray
    moving: bool


@dataclass(frozen=True)
class Scene:
    """Everything of a clip but its course. `light`: unit vector to the light; `eyes` (P, 3): the camera at each moment."""

    bodies: list[Body]
    floor: np.ndarray
    sky: np.ndarray
    floor_pattern: str
    sky_pattern: str
    light: np.ndarray
    eyes: np.ndarray
    target: np.ndarray


def draw_scene(variant: Variant, num_moments: int, draw: Draw) -> Scene:
    """A scene whose objects do not touch. The camera's position is drawn for `num_moments` evenly spaced moments."""
    num_resting, num_moving = draw.integer(*variant.resting), draw.integer(*variant.moving)
    bodies: list[Body] = []
    for number in range(num_resting + num_moving):
        bodies.append(_draw_body(variant, number >= num_resting, bodies, draw))
    target = np.array([draw.uniform(-0.3, 0.3), draw.uniform(-0.3, 0.3), draw.uniform(0.3, 0.9)])
    floor_pattern, sky_pattern = draw.choice(FLOOR_PATTERNS), draw.choice(SKY_PATTERNS)
    floor = draw_texture(floor_pattern, draw_palette(draw, (0.05, 0.45), (0.45, 0.95)), SURROUND_TEXELS, draw)
    sky = draw_texture(sky_pattern, draw_palette(draw, (0.05, 0.5), (0.45, 0.95)), SURROUND_TEXELS, draw)
    height, turn = np.radians(draw.uniform(40, 65)), draw.uniform(0, 2 * np.pi)
    return Scene(
        bodies=bodies,
        floor=floor,
        sky=sky,
        floor_pattern=floor_pattern,
        sky_pattern=sky_pattern,
        light=_on_sphere(height, turn),
        eyes=target + _draw_path(variant, num_moments, draw),
        target=target,
    )


def _on_sphere(elevation: float, turn: float) -> np.ndarray:
    return np.array([np.cos(elevation) * np.cos(turn), np.cos(elevation) * np.sin(turn), np.sin(elevation)])


def _draw_body(variant: Variant, moving: bool, others: list[Body], draw: Draw) -> Body:
    radius = draw.uniform(*(variant.radius if moving else variant.resting_radius))
    kind, pattern = draw.choice(list(SHAPES)), draw.choice(OBJECT_PATTERNS)
    shape = draw_shape(kind, draw).scaled(radius)
    palette = draw_palette(draw, (0.35, 1.0), (0.4, 1.0))
    position = _draw_place(variant, moving, radius, others, draw)
    velocity = np.zeros(3)
    if moving:  # towards the middle more often than not, as in MOVi
        velocity[:2] = draw.uniforms((2,), -variant.speed, variant.speed) - position[:2]
    return Body(
        kind=kind,
        shape=shape,
        radius=radius,
        mass=draw.uniform(300, 1500) * volume_of(shape.mesh),
        pattern=pattern,
        palette=palette,
        texture=draw_texture(pattern, palette, OBJECT_TEXELS, draw),
        position=position,
        rotation=draw.rotation(),
        velocity=velocity,
        spin=draw.direction() * draw.uniform(0, 4.0) * moving,
        moving=moving,
    )


def _draw_place(variant: Variant, moving: bool, radius: float, others: list[Body], draw: Draw) -> np.ndarray:
    """A free place: near the floor for what rests, in the air for what moves; higher and higher when it is crowded."""
    low, high = (radius + 0.3, 3.5) if moving else (radius, radius)
    lift = 0.0
    while True:
        position = np.array([*draw.uniforms((2,), -variant.spread, variant.spread), draw.uniform(low, max(low, high)) + lift])
        if all(np.linalg.norm(position - other.position) > radius + other.radius + GAP for other in others):
            return position
        lift += 0.02


def _draw_path(variant: Variant, num_moments: int, draw: Draw) -> np.ndarray:
    """The camera relative to what it looks at: still, or along a straight line at an even speed. Shapes: (num_moments, 3)."""
    turn, elevation = draw.uniform(0, 2 * np.pi), np.radians(draw.uniform(*variant.elevation))
    middle = draw.uniform(*variant.distance) * _on_sphere(elevation, turn)
    travel = draw.uniform(*variant.travel)
    heading = turn + np.pi / 2 + draw.uniform(-0.9, 0.9) + np.pi * (draw.uniform() < 0.5)  # across rather than along the view
    way = travel * np.array([np.cos(heading), np.sin(heading), draw.uniform(-0.25, 0.25)])
    return middle + np.linspace(-0.5, 0.5, num_moments)[:, None] * way
