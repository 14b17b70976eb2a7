"""The simulated world of a physics clip: one pybullet client, alive for one clip.

Comes in: Scene. Goes out: Motion (where everything is at each moment, who ran into whom) and raw pictures of the world.
Nothing is shown on a screen and no OpenGL is used. A new client for every clip is what makes a clip independent of those before.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.config import PHYSICS_STEPS
from data_pipeline.errors import ConfigError
from data_pipeline.sources.physics.scene import Body, Scene
from data_pipeline.sources.physics.shapes import Mesh, Shape, as_obj, grid_mesh

SETTLE_STEPS = 360  # what rests comes to rest before the clip begins
SURROUND_RADIUS = 28.0  # of floor and sky
FLOOR_REPEATS, SKY_REPEATS = 5.0, (1.0, 4.0)
SURFACE = {
    "lateralFriction": 0.5,
    "rollingFriction": 0.01,
    "spinningFriction": 0.01,
    "restitution": 0.5,
    "linearDamping": 0.0,
    "angularDamping": 0.02,
}
FAR_AWAY = 1000.0
QUIET_STEPS = 20  # two objects that were apart for so long and touch run into one another


class Collision(NamedTuple):
    """Two objects begin to touch. `bodies`: numbers of the scene's bodies, -1 for the floor; `impulse` in newton seconds."""

    step: int  # since the first moment
    bodies: tuple[int, int]
    position: tuple[float, float, float]
    impulse: float


@dataclass(frozen=True)
class Motion:
    """positions (N, P, 3) in metres, rotations (N, P, 4) quaternions (x, y, z, w) of N objects at P moments."""

    positions: np.ndarray
    rotations: np.ndarray
    collisions: list[Collision]


class Picture(NamedTuple):
    """What the renderer gives. colour uint8 (H, W, 3); buffer float32 (H, W), OpenGL's depth; bodies int16 (H, W), -1: none."""

    colour: np.ndarray
    buffer: np.ndarray
    bodies: np.ndarray


class World:
    """The bodies of a scene in a client of their own. Use `open_world`."""

    def __init__(self, scene: Scene, bullet: Any, client: int, folder: Path) -> None:
        self._bullet, self._client, self._folder = bullet, client, folder
        self._light = scene.light.tolist()
        bullet.setPhysicsEngineParameter(
            enableFileCaching=0,  # a texture file of another clip may have had the same name
            fixedTimeStep=1 / PHYSICS_STEPS,
            deterministicOverlappingPairs=1,
            physicsClientId=client,
        )
        bullet.setGravity(0, 0, -9.81, physicsClientId=client)
        self._floor = self._add_floor(scene.floor)
        self._sky = self._add(self._write("sky", _sky_mesh()), scene.sky, solid=-1)
        self._bodies = [self._add_body(number, body) for number, body in enumerate(scene.bodies)]
        self._number = {handle: number for number, handle in enumerate(self._bodies)} | {self._floor: -1}
        self._scene = scene

    # --- building ---

    def _add_floor(self, texture: np.ndarray) -> int:
        plane = self._bullet.createCollisionShape(self._bullet.GEOM_PLANE, physicsClientId=self._client)
        return self._add(self._write("floor", _floor_mesh()), texture, plane)

    def _add_body(self, number: int, body: Body) -> int:
        path = self._write(f"object{number}", body.shape.mesh)
        handle = self._add(path, body.texture, self._add_solid(body.shape, path), body.mass)
        # what moves stays out of the way until what rests has settled
        self._place(handle, body.position + [0, 0, FAR_AWAY * body.moving], body.rotation)
        return handle

    def _add_solid(self, shape: Shape, path: Path) -> int:
        bullet = self._bullet
        if not shape.parts:
            return bullet.createCollisionShape(bullet.GEOM_MESH, fileName=str(path), physicsClientId=self._client)
        assert len(shape.parts) <= 16, "pybullet joins no more than 16 parts"
        kinds = {"ball": bullet.GEOM_SPHERE, "cylinder": bullet.GEOM_CYLINDER}
        return bullet.createCollisionShapeArray(
            shapeTypes=[kinds[part.kind] for part in shape.parts],
            radii=[part.radius for part in shape.parts],
            lengths=[part.length for part in shape.parts],
            collisionFramePositions=[part.centre.tolist() for part in shape.parts],
            physicsClientId=self._client,
        )

    def _write(self, name: str, mesh: Mesh) -> Path:
        """Meshes go through files: pybullet never frees those that it is given as lists."""
        path = self._folder / f"{name}.obj"
        path.write_text(as_obj(mesh))
        return path

    def _add(self, path: Path, texture: np.ndarray, solid: int, mass: float = 0.0) -> int:
        bullet, client = self._bullet, self._client
        visual = bullet.createVisualShape(bullet.GEOM_MESH, fileName=str(path), physicsClientId=client)
        handle = bullet.createMultiBody(mass, solid, visual, physicsClientId=client)
        bullet.changeDynamics(handle, -1, **SURFACE, physicsClientId=client)
        picture = path.with_suffix(".bmp")
        Image.fromarray(texture).save(picture)
        number = bullet.loadTexture(str(picture), physicsClientId=client)
        bullet.changeVisualShape(handle, -1, textureUniqueId=number, physicsClientId=client)
        return handle

    # --- motion ---

    def simulate(self, num_moments: int, steps_per_moment: int) -> Motion:
        """Let the world run; the first moment is the start."""
        self._settle()
        self._throw()
        positions = np.empty((len(self._bodies), num_moments, 3))
        rotations = np.empty((len(self._bodies), num_moments, 4))
        collisions: list[Collision] = []
        last_touch: dict[tuple[int, int], int] = {}
        for moment in range(num_moments):
            for number, handle in enumerate(self._bodies):
                positions[number, moment], rotations[number, moment] = self._where(handle)
            for step in range(moment * steps_per_moment, (moment + 1) * steps_per_moment * (moment + 1 < num_moments)):
                self._bullet.stepSimulation(physicsClientId=self._client)
                collisions += self._new_collisions(step, last_touch)
        return Motion(positions, rotations, collisions)

    def _settle(self) -> None:
        resting = [handle for body, handle in zip(self._scene.bodies, self._bodies, strict=True) if not body.moving]
        if not resting:
            return
        for handle in resting:  # friction that lets nothing roll away, and no bouncing
            self._bullet.changeDynamics(
                handle,
                -1,
                lateralFriction=1.0,
                rollingFriction=0.2,
                restitution=0.0,
                angularDamping=0.5,
                physicsClientId=self._client,
            )
        for _ in range(SETTLE_STEPS):
            self._bullet.stepSimulation(physicsClientId=self._client)
        for handle in resting:
            self._bullet.changeDynamics(handle, -1, **SURFACE, physicsClientId=self._client)
            self._bullet.resetBaseVelocity(handle, [0, 0, 0], [0, 0, 0], physicsClientId=self._client)

    def _throw(self) -> None:
        """Bring in what moves, above whatever has come to lie in its place."""
        taken = [
            (np.array(self._where(handle)[0]), body.radius)
            for body, handle in zip(self._scene.bodies, self._bodies, strict=True)
            if not body.moving
        ]
        for body, handle in zip(self._scene.bodies, self._bodies, strict=True):
            if not body.moving:
                continue
            position = body.position.copy()
            while any(np.linalg.norm(position - centre) < body.radius + radius for centre, radius in taken):
                position[2] += 0.1
            taken.append((position, body.radius))
            self._place(handle, position, body.rotation)
            self._bullet.resetBaseVelocity(handle, body.velocity.tolist(), body.spin.tolist(), physicsClientId=self._client)

    def _new_collisions(self, step: int, last_touch: dict[tuple[int, int], int]) -> list[Collision]:
        strongest: dict[tuple[int, int], Any] = {}
        for contact in self._bullet.getContactPoints(physicsClientId=self._client):
            first, second = sorted((self._number[contact[1]], self._number[contact[2]]))
            if contact[9] > 0 and contact[9] > strongest.get((first, second), contact)[9] - 1e-12:
                strongest[first, second] = contact
        begun = [pair for pair in sorted(strongest) if step - last_touch.get(pair, -QUIET_STEPS - 1) > QUIET_STEPS]
        last_touch.update(dict.fromkeys(strongest, step))
        return [Collision(step, pair, tuple(strongest[pair][6]), strongest[pair][9] / PHYSICS_STEPS) for pair in begun]

    def _where(self, handle: int) -> tuple[Any, Any]:
        return self._bullet.getBasePositionAndOrientation(handle, physicsClientId=self._client)

    def _place(self, handle: int, position: np.ndarray, rotation: np.ndarray) -> None:
        self._bullet.resetBasePositionAndOrientation(handle, position.tolist(), rotation.tolist(), physicsClientId=self._client)

    # --- pictures ---

    def show(self, motion: Motion, moment: int) -> None:
        """Put every object where it is at a moment."""
        for number, handle in enumerate(self._bodies):
            self._place(handle, motion.positions[number, moment], motion.rotations[number, moment])

    def picture(self, size: int, view: np.ndarray, projection: np.ndarray, *, with_bodies: bool = True) -> Picture:
        """Shapes: view, projection (4, 4) as they multiply columns."""
        _, _, colour, buffer, handles = self._bullet.getCameraImage(
            size,
            size,
            view.T.reshape(-1).tolist(),
            projection.T.reshape(-1).tolist(),
            renderer=self._bullet.ER_TINY_RENDERER,
            flags=0 if with_bodies else self._bullet.ER_NO_SEGMENTATION_MASK,
            shadow=0,
            lightDirection=self._light,
            lightAmbientCoeff=0.55,
            lightDiffuseCoeff=0.5,
            lightSpecularCoeff=0.05,
            physicsClientId=self._client,
        )
        first = self._bodies[0]  # floor and sky came before
        bodies = np.reshape(handles, (size, size)) - first if with_bodies else np.empty(0)
        return Picture(
            np.reshape(colour, (size, size, 4))[..., :3].astype(np.uint8, copy=False),
            np.reshape(buffer, (size, size)).astype(np.float32, copy=False),
            np.maximum(bodies, -1).astype(np.int16),
        )

    def objects_depth(self, size: int, view: np.ndarray, projection: np.ndarray) -> np.ndarray:
        """OpenGL's depth of the objects alone, 1 where there is none. Floor and sky shade nothing and cost most to draw."""
        for height in (-FAR_AWAY, 0.0):
            for handle in (self._floor, self._sky):
                self._place(handle, np.array([0, 0, height]), np.array([0, 0, 0, 1]))
            if height:
                buffer = self.picture(size, view, projection, with_bodies=False).buffer
        return buffer


@contextlib.contextmanager
def open_world(scene: Scene) -> Iterator[World]:
    bullet = import_bullet()
    client = bullet.connect(bullet.DIRECT)
    try:
        with tempfile.TemporaryDirectory(prefix="slotstream-physics-") as folder:
            yield World(scene, bullet, client, Path(folder))
    finally:
        bullet.disconnect(client)


def import_bullet() -> Any:
    """pybullet, without the line that it prints when it is imported. Raises ConfigError when it is not installed."""
    if sys.modules.get("pybullet") is not None:
        return sys.modules["pybullet"]
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)  # the line is written by C, past sys.stderr
        import pybullet
    except ImportError as error:
        raise ConfigError(
            f"source.name=physics: pybullet cannot be imported ({error}); it simulates and draws these clips; "
            f"install it with pip install 'slotstream[physics]'"
        ) from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
    return pybullet


def _floor_mesh() -> Mesh:
    """A square as a grid of small ones: triangles that reach behind the camera are drawn with less precision."""
    steps = np.linspace(-1, 1, 25)
    reach = SURROUND_RADIUS * steps
    x, y = np.meshgrid(reach, reach)
    return grid_mesh(np.stack([x, -y, 0 * x], -1), (FLOOR_REPEATS, FLOOR_REPEATS))


def _sky_mesh() -> Mesh:
    """A half sphere that is seen from within; it begins below the floor."""
    fall, turn = np.linspace(0, np.pi / 2 + 0.1, 13)[:, None], np.linspace(0, 2 * np.pi, 37)
    points = np.stack([np.sin(fall) * np.cos(turn), -np.sin(fall) * np.sin(turn), np.cos(fall) + 0 * turn], -1)
    return grid_mesh(points * SURROUND_RADIUS, SKY_REPEATS)
