"""From a simulated world to frames and exact annotations.

Comes in: World, Scene, Motion. Goes out: Annotations and frames. Bodies, depth and flow belong to the point in the middle of a
pixel; colour is the mean over the pixel, with shadows from a depth map seen from the light.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from data_pipeline.sources.physics.camera import (
    depth_of,
    look_at,
    moved,
    perspective,
    pixels_of,
    rays,
    world_points,
)
from data_pipeline.sources.physics.scene import FIELD_OF_VIEW, Scene
from data_pipeline.sources.physics.world import Motion, Picture, World

NEAR, FAR = 0.4, 80.0
LIGHT_DISTANCE, LIGHT_FIELD, LIGHT_NEAR, LIGHT_FAR = 20.0, np.radians(48.0), 8.0, 45.0
FLOOR_BIAS, OBJECT_BIAS = 0.03, 0.3  # metres: an object does not shade itself in stripes; the floor is never in the map
SHADOW = 0.5  # share of the light that a full shadow takes away


class Annotations(NamedTuple):
    """bodies int16 (T, H, W), -1: floor and sky; depth float32 (T, H, W); forward, backward float32 (T, H, W, 2) as (x, y)."""

    bodies: np.ndarray
    depth: np.ndarray
    forward: np.ndarray
    backward: np.ndarray


def annotate(world: World, scene: Scene, motion: Motion, size: int) -> Annotations:
    """Bodies, depth and flow of all moments but the first and the last, which are there for the flow's sake."""
    num_frames = len(scene.eyes) - 2
    projection = perspective(FIELD_OF_VIEW, size, NEAR, FAR)
    bodies = np.empty((num_frames, size, size), np.int16)
    depth = np.empty((num_frames, size, size), np.float32)
    flows = np.empty((2, num_frames, size, size, 2), np.float32)
    for frame in range(num_frames):
        moment = frame + 1
        world.show(motion, moment)
        view = look_at(scene.eyes[moment], scene.target)
        picture = world.picture(size, view, projection)
        bodies[frame] = picture.bodies
        metres = depth_of(picture.buffer, NEAR, FAR)
        depth[frame] = metres
        points = world_points(metres, view, FIELD_OF_VIEW)
        flows[0, frame] = _flow(points, picture.bodies, scene, motion, moment, moment + 1)
        flows[1, frame] = _flow(points, picture.bodies, scene, motion, moment, moment - 1)
    return Annotations(bodies, depth, flows[0], flows[1])


def body_maps(world: World, scene: Scene, motion: Motion, size: int) -> np.ndarray:
    """Only the bodies of `annotate`. Shapes: (T, size, size)."""
    projection = perspective(FIELD_OF_VIEW, size, NEAR, FAR)
    maps = []
    for moment in range(1, len(scene.eyes) - 1):
        world.show(motion, moment)
        maps.append(world.picture(size, look_at(scene.eyes[moment], scene.target), projection).bodies)
    return np.stack(maps)


def _flow(points: np.ndarray, bodies: np.ndarray, scene: Scene, motion: Motion, moment: int, other: int) -> np.ndarray:
    """How far each pixel's point is, at another moment, from the pixel. Shapes: (H, H, 2)."""
    before, after = ((motion.positions[:, at], motion.rotations[:, at]) for at in (moment, other))
    there = moved(points, bodies, before, after)
    place, _ = pixels_of(there, look_at(scene.eyes[other], scene.target), len(points), FIELD_OF_VIEW)
    row, column = np.indices(bodies.shape)
    return place - np.stack([column, row], -1)


def colour_frames(world: World, scene: Scene, motion: Motion, size: int, supersampling: int, *, shadows: bool) -> np.ndarray:
    """Frames of all moments but the first and the last. Shapes: uint8 (T, size, size, 3)."""
    fine = size * supersampling
    projection = perspective(FIELD_OF_VIEW, fine, NEAR, FAR)
    frames = np.empty((len(scene.eyes) - 2, size, size, 3), np.uint8)
    steps = range(supersampling)
    for frame in range(len(frames)):
        world.show(motion, frame + 1)
        view = look_at(scene.eyes[frame + 1], scene.target)
        picture = world.picture(fine, view, projection, with_bodies=False)
        colour = picture.colour.astype(np.float32)
        if shadows:
            colour *= _light_share(world, scene, picture, view)[..., None]
        total = sum(colour[row::supersampling, column::supersampling] for row in steps for column in steps)
        frames[frame] = total / supersampling**2 + 0.5
    return frames


def _light_share(world: World, scene: Scene, picture: Picture, view: np.ndarray) -> np.ndarray:
    """1 where the light comes through, 1 - SHADOW where an object is in its way. Shapes: float32 (H, H)."""
    size = picture.buffer.shape[0]
    from_light = look_at(LIGHT_DISTANCE * scene.light, np.zeros(3))
    reach = world.objects_depth(size, from_light, perspective(LIGHT_FIELD, size, LIGHT_NEAR, LIGHT_FAR))
    reach = depth_of(reach, LIGHT_NEAR, LIGHT_FAR).astype(np.float32)
    to_world = np.linalg.inv(view)
    across = (from_light @ to_world).astype(np.float32)  # camera to light; single precision is enough for shadows
    points = _rays(size) * depth_of(picture.buffer, NEAR, FAR).astype(np.float32)[..., None]
    height = points @ to_world[2, :3].astype(np.float32) + np.float32(to_world[2, 3])
    place, depth = pixels_of(points, across, size, LIGHT_FIELD)
    depth -= np.where(height < 0.01, np.float32(FLOOR_BIAS), np.float32(OBJECT_BIAS))
    corner = np.floor(place).astype(np.int32)
    inside = ((corner >= 0) & (corner < size - 1)).all(-1)
    share = place - corner
    x, y = np.where(inside[..., None], corner, 0).transpose(2, 0, 1)
    dark = np.zeros(inside.shape, np.float32)
    for right in (0, 1):  # the mean of four answers, so that a shadow's edge is soft
        for down in (0, 1):
            weight = (share[..., 0] if right else 1 - share[..., 0]) * (share[..., 1] if down else 1 - share[..., 1])
            dark += weight * (depth > reach[y + down, x + right])
    return 1 - SHADOW * dark * inside


@functools.cache
def _rays(size: int) -> np.ndarray:
    return rays(size, FIELD_OF_VIEW).astype(np.float32)
