"""Physics clips: objects fall, roll and run into one another; masks, depth and flow are exact. First arrow of the trace.

Comes in: settings and a seed, nothing from disk. Goes out: PhysicsClip with all annotations, or Clip with frames and masks.
A clip is a function of (seed, variant, split, index) and the settings of its pictures: the same scene is shown at any resolution,
and it does not matter how many processes draw, nor in which order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.clip import Clip
from data_pipeline.config import PHYSICS_STEPS, PHYSICS_VARIANTS, PhysicsSource
from data_pipeline.errors import DataError
from data_pipeline.sources.physics.pictures import Annotations, annotate, body_maps, colour_frames
from data_pipeline.sources.physics.randomness import Draw
from data_pipeline.sources.physics.scene import FIELD_OF_VIEW, VARIANTS, Scene, Variant, draw_scene
from data_pipeline.sources.physics.world import Motion, World, import_bullet, open_world

VERSION = "slotstream-physics/1"  # raised when any clip changes
SPLITS = ("train", "validation", "test")
JUDGED_SIZE = 64  # scenes are judged at one resolution, so that a clip is the same scene at any other
SEEN_SHARE, SEEN_FRAMES = 0.001, 0.25  # an object is seen when it covers so much of a frame in so many of the frames
MOST_SHARE = 0.4  # no object may cover more of a frame: it would be in the camera's face
MOST_ATTEMPTS = 100


@dataclass(frozen=True, kw_only=True)
class PhysicsClip:
    """A clip with everything that is known about it.

    Shapes: frames uint8 (T, H, W, 3); instance_ids uint8 (T, H, W), 0 = floor and sky, k = object k of metadata["objects"];
    depth float32 (T, H, W) in metres along the view; forward_flow, backward_flow float32 (T, H, W, 2) as (right, down) in
    pixels: how far the point that a pixel shows is from that pixel in the next and in the previous frame, seen there or not.
    The clip's first backward and last forward flow lead to moments just outside of it.
    """

    key: str
    frames: np.ndarray
    instance_ids: np.ndarray
    depth: np.ndarray
    forward_flow: np.ndarray
    backward_flow: np.ndarray
    metadata: dict[str, Any]

    def to_clip(self) -> Clip:
        return Clip(key=self.key, frames=self.frames, instance_ids=self.instance_ids, metadata=self.metadata)


class PhysicsVideos:
    """Source of physics clips. Key: split and index."""

    background_labelled = True

    def __init__(self, config: PhysicsSource) -> None:
        import_bullet()  # missing: say so before anything is written
        self.config = config
        self._counts = {"train": config.num_train, "validation": config.num_validation, "test": config.num_test}

    def keys(self, split: str) -> list[str]:
        if split not in self._counts:
            raise DataError(f"split={split!r} is not generated; there are {', '.join(SPLITS)}; change splits")
        return [f"{split}-{index:06d}" for index in range(self._counts[split])]

    def read(self, split: str, key: str) -> Clip:
        return self.render(split, key).to_clip()

    def render(self, split: str, key: str) -> PhysicsClip:
        """A clip with depth, flow and all else. Raises DataError for a key that is not in the split."""
        if key not in self.keys(split):
            raise DataError(f"video key={key!r}; split {split} has no such clip; take keys from keys({split!r})")
        return render_clip(self.config, split, int(key.rpartition("-")[2]))


def render_clip(config: PhysicsSource, split: str, index: int) -> PhysicsClip:
    """Clip `index` of a split. About 1.3 s for 24 frames of 128 pixels, 1.8 s for movi_e."""
    for attempt, scene in _scenes(config, split, index):
        with open_world(scene) as world:
            motion = world.simulate(len(scene.eyes), PHYSICS_STEPS // config.frame_rate)
            if not is_fit(VARIANTS[config.variant], len(scene.bodies), body_maps(world, scene, motion, JUDGED_SIZE)):
                continue
            return _render(config, split, index, attempt, world, scene, motion)
    raise DataError(
        f"clip {split}-{index:06d}: none of {MOST_ATTEMPTS} scenes shows its objects; variant {config.variant}, "
        f"num_frames={config.num_frames}; choose another source.seed or source.frame_rate"
    )


def _scenes(config: PhysicsSource, split: str, index: int) -> Iterator[tuple[int, Scene]]:
    """Scenes for one clip, the first fit one is taken; each with a moment before and one after the clip, for the flow."""
    stream = SPLITS.index(split) + len(SPLITS) * PHYSICS_VARIANTS.index(config.variant)
    for attempt in range(MOST_ATTEMPTS):
        draw = Draw(config.seed, stream, index, attempt)
        yield attempt, draw_scene(VARIANTS[config.variant], config.num_frames + 2, draw)


def is_fit(variant: Variant, num_bodies: int, bodies: np.ndarray) -> bool:
    """Whether enough objects are in view and none fills it. Shapes: bodies (T, H, W), -1 = none."""
    shares = np.stack([(bodies == number).mean(axis=(1, 2)) for number in range(num_bodies)])
    seen = (shares >= SEEN_SHARE).mean(axis=1) >= SEEN_FRAMES
    return bool(seen.sum() >= variant.seen * num_bodies and shares.max() <= MOST_SHARE)


def _render(
    config: PhysicsSource, split: str, index: int, attempt: int, world: World, scene: Scene, motion: Motion
) -> PhysicsClip:
    notes = annotate(world, scene, motion, config.resolution)
    frames = colour_frames(world, scene, motion, config.resolution, config.supersampling, shadows=config.shadows)
    origin = {"generator": VERSION, "variant": config.variant, "seed": config.seed, "split": split, "index": index}
    return PhysicsClip(
        key=f"{split}-{index:06d}",
        frames=frames,
        instance_ids=(notes.bodies + 1).astype(np.uint8),
        depth=notes.depth,
        forward_flow=notes.forward,
        backward_flow=notes.backward,
        metadata={**origin, "attempt": attempt, "frame_rate": config.frame_rate, **_describe(config, scene, motion, notes)},
    )


def _describe(config: PhysicsSource, scene: Scene, motion: Motion, notes: Annotations) -> dict[str, Any]:
    """What a clip shows, as JSON. Lists by frame go through the frames of the clip alone."""
    steps = PHYSICS_STEPS // config.frame_rate
    inside = slice(1, config.num_frames + 1)
    objects = [
        {
            "shape": body.kind,
            "pattern": body.pattern,
            "colours": ["#" + "".join(f"{round(part * 255):02x}" for part in colour) for colour in body.palette],
            "radius": _rounded(body.radius),
            "mass": _rounded(body.mass),
            "is_dynamic": body.moving,
            "visible_pixels": [int(count) for count in (notes.bodies == number).sum(axis=(1, 2))],
            "positions": _rounded(motion.positions[number, inside]),
            "rotations": _rounded(motion.rotations[number, inside]),
        }
        for number, body in enumerate(scene.bodies)
    ]
    collisions = [
        {
            "frame": _rounded(event.step / steps - 1),
            "instances": [body + 1 for body in event.bodies],
            "position": _rounded(event.position),
            "impulse": _rounded(event.impulse),
        }
        for event in motion.collisions
        if 0 <= event.step / steps - 1 <= config.num_frames - 1
    ]
    return {
        "num_instances": len(objects),
        "camera": {
            "field_of_view": _rounded(np.degrees(FIELD_OF_VIEW)),
            "positions": _rounded(scene.eyes[inside]),
            "target": _rounded(scene.target),
        },
        "light": _rounded(scene.light),
        "floor": scene.floor_pattern,
        "sky": scene.sky_pattern,
        "objects": objects,
        "collisions": collisions,
    }


def _rounded(values: Any) -> Any:
    """Plain numbers with five decimals: a hundredth of a millimetre."""
    return np.round(values, 5).tolist()
