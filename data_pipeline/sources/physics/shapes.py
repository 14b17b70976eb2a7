"""Shapes of the physics clips: closed surfaces with texture coordinates, and the solids that collide in their place.

Comes in: random choices. Goes out: Shape, in units of its own radius (no point is farther than 1 from the centre).
A surface of revolution collides as a pile of cylinders, a ring as a ring of balls, all others as their convex hull.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from data_pipeline.sources.physics.randomness import Draw

AROUND = 24  # faces around an axis
ALONG = 14  # faces along it


class Mesh(NamedTuple):
    """A surface seen from the outside. vertices, normals (V, 3); uv (V, 2); triangles (F, 3), counter-clockwise."""

    vertices: np.ndarray
    normals: np.ndarray
    uv: np.ndarray
    triangles: np.ndarray


class Part(NamedTuple):
    """A solid that collides: a ball or an upright cylinder. `centre` (3)."""

    kind: str  # ball | cylinder
    centre: np.ndarray
    radius: float
    length: float = 0.0


@dataclass(frozen=True)
class Shape:
    """A mesh and what collides in its place: parts, or where there are none, the convex hull of the mesh."""

    mesh: Mesh
    parts: tuple[Part, ...] = ()

    def scaled(self, factor: float) -> Shape:
        parts = (Part(part.kind, part.centre * factor, part.radius * factor, part.length * factor) for part in self.parts)
        return replace(self, mesh=self.mesh._replace(vertices=self.mesh.vertices * factor), parts=tuple(parts))


def draw_shape(name: str, draw: Draw) -> Shape:
    """A member of a family of shapes: its centre of volume is the origin, as the simulation expects, its farthest point at 1."""
    shape = SHAPES[name](draw)
    centre = centre_of(shape.mesh)
    mesh = shape.mesh._replace(vertices=shape.mesh.vertices - centre)
    shape = Shape(mesh, tuple(part._replace(centre=part.centre - centre) for part in shape.parts))
    return shape.scaled(1 / float(np.linalg.norm(shape.mesh.vertices, axis=1).max()))


def as_obj(mesh: Mesh) -> str:
    """The mesh as a Wavefront OBJ file."""
    parts = [
        ("v %.9g %.9g %.9g\n", mesh.vertices),
        ("vt %.9g %.9g\n", mesh.uv),
        ("vn %.9g %.9g %.9g\n", mesh.normals),
        ("f %d/%d/%d %d/%d/%d %d/%d/%d\n", np.repeat(mesh.triangles + 1, 3, axis=1)),
    ]
    return "".join(line * len(rows) % tuple(rows.reshape(-1).tolist()) for line, rows in parts)


def volume_of(mesh: Mesh) -> float:
    """What the closed surface holds."""
    return float(_wedges(mesh).sum())


def centre_of(mesh: Mesh) -> np.ndarray:
    """Centre of what the closed surface holds. Shapes: (3)."""
    wedges = _wedges(mesh)
    return wedges @ mesh.vertices[mesh.triangles].sum(axis=1) / 4 / wedges.sum()


def _wedges(mesh: Mesh) -> np.ndarray:
    """Signed volumes of the tetrahedra between the origin and each triangle. Shapes: (F)."""
    corners = mesh.vertices[mesh.triangles]
    return np.einsum("fi,fi->f", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])) / 6


def grid_mesh(points: np.ndarray, repeats: tuple[float, float]) -> Mesh:
    """A mesh from points (rows + 1, columns + 1, 3) of a surface; outside is where rows x columns points.

    `repeats`: how often the texture is laid along rows and columns. Normals are the mean of the faces around a point.
    """
    rows, columns = points.shape[0] - 1, points.shape[1] - 1
    corner = np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)
    down, right, across = corner + columns + 1, corner + 1, corner + columns + 2
    triangles = np.stack([np.stack([corner, down, right], -1), np.stack([right, down, across], -1)], 2).reshape(-1, 3)
    v, u = np.meshgrid(np.linspace(0, repeats[0], rows + 1), np.linspace(0, repeats[1], columns + 1), indexing="ij")
    vertices = points.reshape(-1, 3)
    faces = vertices[triangles]
    area = np.linalg.norm(np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 0]), axis=1)
    triangles = triangles[area > 1e-9]  # where a row shrinks to a point
    return Mesh(vertices, _normals(vertices, triangles), np.stack([u, v], -1).reshape(-1, 2), triangles)


def _normals(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Shapes: (V, 3). Points at one place (a seam, a pole) share their normal."""
    corners = vertices[triangles]
    faces = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    _, place = np.unique(np.round(vertices, 9), axis=0, return_inverse=True)
    total = np.zeros((int(place.max()) + 1, 3))
    np.add.at(total, place.reshape(-1)[triangles].reshape(-1), np.repeat(faces, 3, axis=0))
    total /= np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
    return total[place.reshape(-1)]


def _flat(mesh: Mesh) -> Mesh:
    """The mesh with edges that show: every triangle has corners of its own."""
    corners = mesh.triangles.reshape(-1)
    faces = mesh.vertices[mesh.triangles]
    normal = np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return Mesh(mesh.vertices[corners], np.repeat(normal, 3, axis=0), mesh.uv[corners], np.arange(len(corners)).reshape(-1, 3))


def _join(meshes: list[Mesh]) -> Mesh:
    first = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes[:-1]])
    triangles = np.concatenate([mesh.triangles + offset for mesh, offset in zip(meshes, first, strict=True)])
    vertices, normals, uv = (np.concatenate([mesh[part] for mesh in meshes]) for part in range(3))
    return Mesh(vertices, normals, uv, triangles)


# --- families: (draw) -> Shape of any size ---


def _box(draw: Draw) -> Shape:
    half = np.array([1.0, draw.uniform(0.5, 1), draw.uniform(0.45, 1)])
    faces = []
    for axis in range(3):
        for sign in (-1.0, 1.0):
            along, across = np.roll(np.eye(3), axis, axis=0)[1:] * half
            if sign < 0:
                along, across = across, along
            middle = np.roll(np.eye(3), axis, axis=0)[0] * half * sign
            steps = np.linspace(-1, 1, 5)
            faces.append(grid_mesh(middle + steps[:, None, None] * along + steps[None, :, None] * across, (1, 1)))
    return Shape(_join(faces))


def _ball(draw: Draw) -> Shape:
    return Shape(grid_mesh(_sphere_points(), (1, 2)), (Part("ball", np.zeros(3), 1.0),))


def _sphere_points() -> np.ndarray:
    """Points of the unit sphere from the top to the bottom. Shapes: (ALONG + 1, AROUND + 1, 3)."""
    fall, turn = np.linspace(0, np.pi, ALONG + 1)[:, None], np.linspace(0, 2 * np.pi, AROUND + 1)
    turn[-1] = 0.0  # the seam closes exactly
    return np.stack([np.sin(fall) * np.cos(turn), np.sin(fall) * np.sin(turn), np.cos(fall) + 0 * turn], -1)


def _blob(draw: Draw) -> Shape:
    """A stone: a sphere with a few broad bumps."""
    points = _sphere_points()
    swell = np.zeros(points.shape[:2])
    for _ in range(5):
        swell += draw.uniform(0.1, 0.4) * np.exp(3.0 * (points @ draw.direction() - 1))
    return Shape(grid_mesh(points * (0.6 + swell)[..., None] * draw.uniforms((3,), 0.75, 1.1), (1, 2)))


def _cushion(draw: Draw) -> Shape:
    """A superquadric between box, ball and octahedron. Source: Barr, Superquadrics (1981)."""
    sphere, flat, round_ = _sphere_points(), draw.uniform(0.4, 1.4), draw.uniform(0.4, 1.4)
    across = np.hypot(sphere[..., 0], sphere[..., 1])
    unit = sphere[..., :2] / np.maximum(across, 1e-12)[..., None]
    side = _power(across, flat)[..., None] * _power(unit, round_)
    points = np.concatenate([side, _power(sphere[..., 2:], flat)], -1) * [1.0, draw.uniform(0.6, 1), draw.uniform(0.5, 1)]
    return Shape(grid_mesh(points, (1, 2)))


def _power(values: np.ndarray, exponent: float) -> np.ndarray:
    values = np.where(np.abs(values) < 1e-9, 0.0, values)  # rounding at the poles and axes would grow
    return np.sign(values) * np.abs(values) ** exponent


def _prism(draw: Draw) -> Shape:
    """A rod with 3 to 6 sides."""
    turn = np.linspace(0, 2 * np.pi, draw.integer(3, 6) + 1)
    turn[-1] = 0.0
    height, ring = draw.uniform(0.4, 1.5), np.stack([np.cos(turn), np.sin(turn)], -1)
    rings = [(0.0, height)] + [(1.0, height * level) for level in (1, 0.5, 0, -0.5, -1)] + [(0.0, -height)]
    points = np.array([[(*(corner * radius), level) for corner in ring] for radius, level in rings])
    return Shape(_flat(grid_mesh(points, (1, 2))))


def _ring(draw: Draw) -> Shape:
    thick = draw.uniform(0.22, 0.4)
    fall, turn = np.linspace(0, 2 * np.pi, ALONG + 1)[:, None], np.linspace(0, 2 * np.pi, AROUND + 1)
    fall[-1], turn[-1] = 0.0, 0.0
    reach = 1 + thick * np.sin(fall)
    points = np.stack([reach * np.cos(turn), reach * np.sin(turn), thick * np.cos(fall) + 0 * turn], -1)
    centres = np.stack([np.cos(turn[:-1]), np.sin(turn[:-1]), 0 * turn[:-1]], -1)[::2]
    return Shape(grid_mesh(points, (1, 3)), tuple(Part("ball", centre, thick) for centre in centres))


def _turned(outline: Callable[[np.ndarray, Draw], np.ndarray], height: tuple[float, float]) -> Callable[[Draw], Shape]:
    """A family of surfaces of revolution: `outline` gives radii at levels from 0 (top) to 1 (bottom)."""

    def family(draw: Draw) -> Shape:
        half = draw.uniform(*height)
        share = np.linspace(0, 1, ALONG - 1)
        radii, levels = outline(share, draw), half * (1 - 2 * share)
        parts = [
            Part("cylinder", np.array([0, 0, (low + high) / 2]), (first + second) / 2, high - low)
            for first, second, high, low in zip(radii[:-1], radii[1:], levels[:-1], levels[1:], strict=True)
        ]
        # The flat ends carry points of their own at the rim, so that the rim shows.
        radii = np.concatenate([[0.0, radii[0]], radii, [radii[-1], 0.0]])
        levels = np.concatenate([[half, half], levels, [-half, -half]])
        turn = np.linspace(0, 2 * np.pi, AROUND + 1)
        turn[-1] = 0.0
        points = np.stack([radii[:, None] * np.cos(turn), radii[:, None] * np.sin(turn), levels[:, None] + 0 * turn], -1)
        return Shape(_sharpened(grid_mesh(points, (1, 2)), levels, half), tuple(parts))

    return family


def _sharpened(mesh: Mesh, levels: np.ndarray, half: float) -> Mesh:
    """Give the flat ends of a surface of revolution upright normals, and the rims those of the side alone."""
    normals = mesh.normals.reshape(len(levels), -1, 3).copy()
    normals[:2], normals[-2:] = (0, 0, 1), (0, 0, -1)
    for rim, inner in ((2, 3), (-3, -4)):
        normals[rim] = normals[inner]
    return mesh._replace(normals=normals.reshape(-1, 3))


def _straight(share: np.ndarray, draw: Draw) -> np.ndarray:
    return np.ones_like(share)


def _tapering(share: np.ndarray, draw: Draw) -> np.ndarray:
    tip = draw.uniform(0.05, 0.5)
    return tip + (1 - tip) * share


def _waisted(share: np.ndarray, draw: Draw) -> np.ndarray:
    waist, place = draw.uniform(0.35, 0.6), draw.uniform(0.35, 0.65)
    return 1 - (1 - waist) * np.exp(-(((share - place) / 0.22) ** 2))


def _bellied(share: np.ndarray, draw: Draw) -> np.ndarray:
    """A bottle: a neck above a belly."""
    neck, belly = draw.uniform(0.25, 0.45), draw.uniform(0.6, 0.75)
    return neck + (1 - neck) / (1 + np.exp(-(share - belly + 0.25) * 18)) - 0.25 * np.maximum(share - 0.85, 0) / 0.15


SHAPES: dict[str, Callable[[Draw], Shape]] = {
    "box": _box,
    "ball": _ball,
    "stone": _blob,
    "cushion": _cushion,
    "prism": _prism,
    "ring": _ring,
    "cylinder": _turned(_straight, (0.5, 1.4)),
    "cone": _turned(_tapering, (0.7, 1.4)),
    "spool": _turned(_waisted, (0.8, 1.5)),
    "bottle": _turned(_bellied, (1.2, 2.0)),
}
