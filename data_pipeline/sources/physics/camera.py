"""Geometry of the camera: matrices, depth, and where the point that a pixel shows goes.

A pixel (row, column) shows the point on the ray through its middle. Camera coordinates: x right, y up, the view along -z.
Depth is measured along the view, in metres. Flow is in pixels, x to the right and y down.
"""

from __future__ import annotations

import numpy as np


def look_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """World to camera, z up in the picture. Shapes: eye, target (3) -> (4, 4)."""
    back = (eye - target) / np.linalg.norm(eye - target)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    turn = np.stack([right, np.cross(back, right), back])
    view = np.eye(4)
    view[:3, :3], view[:3, 3] = turn, -turn @ eye
    return view


def perspective(field_of_view: float, size: int, near: float, far: float) -> np.ndarray:
    """Camera to clip coordinates. Half a pixel is added: the renderer looks at a pixel's lower left corner. Shapes: (4, 4)."""
    focal = 1 / np.tan(field_of_view / 2)
    matrix = np.zeros((4, 4))
    matrix[0, 0] = matrix[1, 1] = focal
    matrix[0, 2] = matrix[1, 2] = 1 / size
    matrix[2, 2], matrix[2, 3] = -(far + near) / (far - near), -2 * far * near / (far - near)
    matrix[3, 2] = -1
    return matrix


def depth_of(buffer: np.ndarray, near: float, far: float) -> np.ndarray:
    """OpenGL's depth buffer as metres along the view."""
    return far * near / (far - (far - near) * buffer.astype(np.float64))


def rays(size: int, field_of_view: float) -> np.ndarray:
    """Points at depth 1 that the pixels show, in camera coordinates. Shapes: (size, size, 3)."""
    step = ((np.arange(size) + 0.5) / size * 2 - 1) * np.tan(field_of_view / 2)
    return np.stack(
        [np.broadcast_to(step, (size, size)), np.broadcast_to(-step[:, None], (size, size)), -np.ones((size, size))], -1
    )


def world_points(depth: np.ndarray, view: np.ndarray, field_of_view: float) -> np.ndarray:
    """The points that the pixels show. Shapes: depth (H, H) -> (H, H, 3)."""
    points = rays(depth.shape[0], field_of_view) * depth[..., None]
    return (points - view[:3, 3]) @ view[:3, :3]  # the inverse of a turn is its transpose


def pixels_of(points: np.ndarray, view: np.ndarray, size: int, field_of_view: float) -> tuple[np.ndarray, np.ndarray]:
    """Where points (..., 3) are in the picture: (x, y) (..., 2) in pixels, 0 in the middle of the first, and depth (...)."""
    seen = points @ view[:3, :3].T + view[:3, 3]
    depth = -seen[..., 2]
    scale = size / (2 * np.tan(field_of_view / 2))
    place = np.stack([seen[..., 0], -seen[..., 1]], -1) / depth[..., None] * scale
    return place + (size - 1) / 2, depth


def rotation_matrices(quaternions: np.ndarray) -> np.ndarray:
    """Shapes: (..., 4) as (x, y, z, w) -> (..., 3, 3)."""
    x, y, z, w = np.moveaxis(quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def moved(
    points: np.ndarray, bodies: np.ndarray, before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Points (H, H, 3) carried along by the bodies (H, H) they belong to; -1 stays.

    `before`, `after`: positions (N, 3) and rotations (N, 4) of all bodies at two moments.
    """
    turns = rotation_matrices(after[1]) @ np.swapaxes(rotation_matrices(before[1]), -1, -2)
    turns = np.concatenate([turns, np.eye(3)[None]])  # number -1 finds the last
    shifts = np.concatenate([after[0] - np.einsum("nij,nj->ni", turns[:-1], before[0]), np.zeros((1, 3))])
    return np.einsum("hwij,hwj->hwi", turns[bodies], points) + shifts[bodies]
