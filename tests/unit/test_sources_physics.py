"""Simulated clips: a function of their numbers; masks, depth and flow agree with geometry computed apart from the renderer."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data_pipeline.compose import compose
from data_pipeline.config import PHYSICS_VARIANTS, BuildConfig, FeaturesConfig, PhysicsSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import GROUP_SCHEMAS, SOURCES, build_source
from data_pipeline.sources.physics.camera import look_at, rotation_matrices
from data_pipeline.sources.physics.randomness import Draw
from data_pipeline.sources.physics.scene import VARIANTS, draw_scene
from data_pipeline.sources.physics.shapes import SHAPES, centre_of, draw_shape, volume_of
from data_pipeline.sources.physics.textures import PATTERNS, draw_palette, draw_texture
from data_pipeline.sources.physics.world import SURROUND_RADIUS

pytest.importorskip("pybullet", reason="pip install 'slotstream[physics]'")  # dev brings it wherever it need not be compiled

from data_pipeline.sources import physics
from data_pipeline.sources.physics.pictures import FIELD_OF_VIEW
from data_pipeline.sources.physics.video import is_fit

SIZE, FRAMES = 40, 3
SCALE = SIZE / 2 / np.tan(np.radians(25.0))  # pixels of a metre, a metre away
seeds, indices = st.integers(0, 2**63), st.integers(0, 10**6)


def settings_of(**changes) -> PhysicsSource:
    return PhysicsSource(**{"resolution": SIZE, "num_frames": FRAMES, "supersampling": 1, "shadows": False, **changes})


@cache
def clip_of(variant: str, index: int) -> physics.PhysicsClip:
    return physics.render_clip(settings_of(variant=variant), "train", index)


def digest(clip: physics.PhysicsClip) -> str:
    arrays = (clip.frames, clip.instance_ids, clip.depth, clip.forward_flow, clip.backward_flow)
    return hashlib.sha256(b"".join(map(np.ndarray.tobytes, arrays)) + json.dumps(clip.metadata).encode()).hexdigest()


# --- determinism ---


def test_a_clip_does_not_depend_on_what_was_read_before_nor_on_the_process():
    program = (
        "from tests.unit.test_sources_physics import digest, physics, settings_of\n"
        "print(digest(physics.PhysicsVideos(settings_of()).render('train', 'train-000005')))"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    source = physics.PhysicsVideos(settings_of())
    first = digest(source.render("train", "train-000005"))
    source.render("train", "train-000001")
    physics.PhysicsVideos(settings_of(variant="easy")).render("validation", "validation-000005")
    assert digest(source.render("train", "train-000005")) == first
    assert other.communicate(timeout=120)[0].split() == [first]  # and nothing else is printed


def test_seeds_splits_variants_and_indices_show_other_scenes():
    scenes = [
        physics.render_clip(settings_of(variant="easy", num_frames=1), "train", 0),
        physics.render_clip(settings_of(variant="easy", num_frames=1), "train", 1),
        physics.render_clip(settings_of(variant="easy", num_frames=1, seed=1), "train", 0),
        physics.render_clip(settings_of(variant="easy", num_frames=1), "test", 0),
        physics.render_clip(settings_of(variant="movi_c", num_frames=1), "train", 0),
    ]
    assert len({json.dumps(clip.metadata["objects"]) for clip in scenes}) == len(scenes)


def test_the_scene_and_the_annotations_do_not_depend_on_how_frames_are_drawn():
    """Twice the resolution shows the same scene; supersampling and shadows change colours alone."""
    plain = clip_of("movi_c", 0)
    fine = physics.render_clip(settings_of(supersampling=2, shadows=True), "train", 0)
    for name in ("instance_ids", "depth", "forward_flow", "backward_flow"):
        assert (getattr(plain, name) == getattr(fine, name)).all(), name
    assert (plain.frames != fine.frames).any()
    assert np.abs(plain.frames.astype(float) - fine.frames).mean() < 40
    large = physics.render_clip(settings_of(resolution=2 * SIZE), "train", 0)
    drop = {"visible_pixels"}
    shown = [[{k: v for k, v in thing.items() if k not in drop} for thing in clip.metadata["objects"]] for clip in (plain, large)]
    assert shown[0] == shown[1]
    shrunk = large.instance_ids.reshape(FRAMES, SIZE, 2, SIZE, 2).max(axis=(2, 4)) * (large.instance_ids[:, ::2, ::2] > 0)
    assert ((shrunk > 0) == (plain.instance_ids > 0)).mean() > 0.95


def test_the_benchmark_is_what_it_was():
    """Version 1 for ever. Positions may differ in the last digits between machines, the scene may not."""
    objects = physics.render_clip(settings_of(variant="easy", num_frames=6), "train", 3).metadata["objects"]
    assert [(thing["shape"], thing["pattern"], thing["colours"]) for thing in objects] == GOLDEN_OBJECTS
    np.testing.assert_allclose([thing["positions"][-1] for thing in objects], GOLDEN_POSITIONS, atol=1e-3)
    np.testing.assert_allclose([sum(thing["visible_pixels"]) for thing in objects], GOLDEN_PIXELS, rtol=0.02)


GOLDEN_OBJECTS = [
    ("cylinder", "patches", ["#b7ff76", "#71b270", "#334e66"]),
    ("ball", "cells", ["#e1ffa4", "#9eb26e", "#410d66"]),
    ("ring", "cells", ["#0a6651", "#23ffd5", "#5007b2"]),
    ("bottle", "stripes", ["#20b271", "#126615", "#e18bff"]),
]
GOLDEN_POSITIONS = [[-0.39, -1.417, 1.334], [-0.404, 0.867, 1.359], [-2.645, -0.879, 2.279], [1.316, 1.031, 1.128]]
GOLDEN_PIXELS = [1434, 288, 219, 386]


@settings(max_examples=30, deadline=None)
@given(seeds, indices, st.integers(-3, 5), st.integers(0, 7))
def test_choices_stay_in_their_bounds_and_attempts_are_streams_of_their_own(seed, index, low, width):
    draw, again = Draw(seed, 2, index), Draw(seed, 2, index)
    numbers = [draw.integer(low, low + width) for _ in range(60)]
    assert set(numbers) <= set(range(low, low + width + 1))
    assert width > 3 or set(numbers) == set(range(low, low + width + 1))
    assert numbers == [again.integer(low, low + width) for _ in range(60)]
    assert sorted(draw.shuffled(9)) == list(range(9))
    assert np.linalg.norm(draw.direction()) == pytest.approx(1) == np.linalg.norm(draw.rotation())
    assert draw.uniform() != Draw(seed, 2, index, attempt=1).uniform() != Draw(seed, 3, index).uniform()


# --- geometry ---


def pinhole(clip: physics.PhysicsClip, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the camera is, and directions of the rays through the pixels' middles, one metre long along the view."""
    eye, target = (np.array(part) for part in (clip.metadata["camera"]["positions"][frame], clip.metadata["camera"]["target"]))
    ahead = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(ahead, [0, 0, 1])
    right /= np.linalg.norm(right)
    down = np.cross(ahead, right)
    step = (np.arange(SIZE) - (SIZE - 1) / 2) / SCALE
    return eye, ahead + step[None, :, None] * right + step[:, None, None] * down


def project(clip: physics.PhysicsClip, frame: int, points: np.ndarray) -> np.ndarray:
    """Places (x, y) in pixels of points (..., 3), by the same pinhole."""
    eye, target = (np.array(part) for part in (clip.metadata["camera"]["positions"][frame], clip.metadata["camera"]["target"]))
    ahead = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(ahead, [0, 0, 1])
    right /= np.linalg.norm(right)
    seen = points - eye
    place = np.stack([seen @ right, seen @ np.cross(ahead, right)], -1) / (seen @ ahead)[..., None]
    return place * SCALE + (SIZE - 1) / 2


@pytest.mark.parametrize(("variant", "index"), [("movi_c", 0), ("movi_c", 1), ("movi_e", 0)])
def test_depth_is_the_distance_to_the_floor_and_to_the_sky(variant, index):
    clip = clip_of(variant, index)
    for frame in range(FRAMES):
        eye, rays = pinhole(clip, frame)
        background = clip.instance_ids[frame] == 0
        place = eye + rays * clip.depth[frame][..., None]
        floor = (
            background & (rays[..., 2] < 0) & (np.hypot(*(eye + rays * (-eye[2] / rays[..., 2])[..., None])[..., :2].T).T < 25)
        )
        expected = -eye[2] / rays[..., 2]
        assert floor.mean() > 0.2
        np.testing.assert_allclose(clip.depth[frame][floor], expected[floor], rtol=2e-4)
        away = np.linalg.norm(place, axis=-1)[background & ~floor]
        assert ((away > 0.95 * 25) & (away < 1.5 * SURROUND_RADIUS)).all()  # faces of the half sphere lie a little within


def of_kind(variant: str, kind: str) -> list[tuple[physics.PhysicsClip, int, dict]]:
    """All objects of a shape in a few clips, with their ids."""
    clips = [clip_of(variant, index) for index in range(3)]
    return [(clip, k, o) for clip in clips for k, o in enumerate(clip.metadata["objects"], start=1) if o["shape"] == kind]


@pytest.mark.parametrize("variant", ["movi_c", "movi_e"])
def test_a_ball_is_seen_where_rays_meet_a_sphere(variant):
    found = of_kind(variant, "ball")
    pixels = 0
    for (clip, number, thing), frame in product(found, range(FRAMES)):
        eye, rays = pinhole(clip, frame)
        centre, radius = np.array(thing["positions"][frame]) - eye, thing["radius"]
        square, along = (rays * rays).sum(-1), rays @ centre
        miss = np.sqrt(np.maximum(centre @ centre - along**2 / square, 0))  # how far the ray passes from the centre
        mask = clip.instance_ids[frame] == number
        pixels += mask.sum()
        assert (miss[mask] < radius * 1.001).all()
        inside = miss < radius * 0.97  # the facets lie a little within the sphere
        near = (along - np.sqrt(np.maximum(along**2 - square * (centre @ centre - radius**2), 0))) / square
        assert (clip.depth[frame][inside & ~mask] < near[inside & ~mask] + 0.05 * radius).all()  # something is before it
        assert np.abs(clip.depth[frame] - near)[inside & mask].max(initial=0) < 0.08 * radius
    assert pixels > 50


@pytest.mark.parametrize("variant", ["movi_c", "movi_e"])
def test_flow_carries_a_point_with_its_object_and_past_the_camera(variant):
    """The floor stays, an object moves as a rigid body between the positions that the metadata gives."""
    clip, moved = clip_of(variant, 0), 0.0
    for flow, frames, step in ((clip.forward_flow, (0, 1), 1), (clip.backward_flow, (1, 2), -1)):
        for frame in frames:
            eye, rays = pinhole(clip, frame)
            points = eye + rays * clip.depth[frame][..., None]
            row, column = np.indices((SIZE, SIZE))
            for number in np.unique(clip.instance_ids[frame]):
                mask, there = clip.instance_ids[frame] == number, points
                if number:
                    thing = clip.metadata["objects"][number - 1]
                    turn = (
                        Rotation.from_quat(thing["rotations"][frame + step]) * Rotation.from_quat(thing["rotations"][frame]).inv()
                    )
                    there = (points - thing["positions"][frame]) @ turn.as_matrix().T + thing["positions"][frame + step]
                expected = project(clip, frame + step, there) - np.stack([column, row], -1)
                np.testing.assert_allclose(flow[frame][mask], expected[mask], atol=0.01)
                moved = max(moved, np.abs(expected[mask]).max())
    assert moved > 1
    still = clip.forward_flow[clip.instance_ids == 0]
    assert (np.abs(still).max() < 0.01) == (variant == "movi_c")  # its camera stands still


def test_flow_leads_to_the_same_object_unless_something_hides_it():
    for index in range(3):
        clip = clip_of("movi_c", index)
        for frame in range(FRAMES - 1):
            row, column = np.indices((SIZE, SIZE))
            x, y = np.rint(clip.forward_flow[frame] + np.stack([column, row], -1)).astype(int).transpose(2, 0, 1)
            stays = (x >= 0) & (x < SIZE) & (y >= 0) & (y < SIZE) & (clip.instance_ids[frame] > 0)
            there = clip.instance_ids[frame + 1, y[stays], x[stays]]
            back = clip.backward_flow[frame + 1, y[stays], x[stays]]
            same = there == clip.instance_ids[frame][stays]
            assert same.mean() > 0.75
            gap = np.linalg.norm(back + clip.forward_flow[frame][stays], axis=-1)[same]
            assert np.median(gap) < 0.3  # forth and back, but for rounding to whole pixels


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_cameras_and_turns_are_rigid(seed):
    draw = Draw(seed, 9, 9)
    eye, target = 7 * draw.direction() + [0, 0, 8], draw.direction()
    view = look_at(eye, target)
    np.testing.assert_allclose(view[:3, :3] @ view[:3, :3].T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(view @ [*target, 1], [0, 0, -np.linalg.norm(eye - target), 1], atol=1e-12)
    turn = draw.rotation()
    np.testing.assert_allclose(rotation_matrices(turn), Rotation.from_quat(turn).as_matrix(), atol=1e-12)
    assert pytest.approx(np.radians(50)) == FIELD_OF_VIEW


# --- what is shown ---


@pytest.mark.parametrize(("variant", "count", "moving"), [("easy", (2, 4), 4), ("movi_c", (3, 10), 10), ("movi_e", (11, 23), 3)])
def test_a_clip_is_what_its_variant_says(variant, count, moving):
    for index in range(3):
        clip = clip_of(variant, index)
        facts, objects = clip.metadata, clip.metadata["objects"]
        assert count[0] <= len(objects) == facts["num_instances"] <= count[1]
        assert 1 <= sum(thing["is_dynamic"] for thing in objects) <= moving
        assert set(np.unique(clip.instance_ids)) <= set(range(len(objects) + 1)) and clip.instance_ids.dtype == np.uint8
        for number, thing in enumerate(objects, start=1):
            assert thing["visible_pixels"] == (clip.instance_ids == number).sum(axis=(1, 2)).tolist()
        assert len(set(map(tuple, facts["camera"]["positions"]))) == (FRAMES if variant == "movi_e" else 1)
        assert (facts["generator"], facts["split"], facts["index"]) == ("slotstream-physics/1", "train", index)
        assert clip.frames.std() > 15 and (clip.frames.max(axis=-1) > 8).mean() > 0.97  # no black frames
        for number in np.flatnonzero(np.bincount(clip.instance_ids.ravel(), minlength=2) > 60):
            assert clip.frames[clip.instance_ids == number].std() > 4


def test_objects_fall_on_the_floor_run_into_one_another_and_sink_into_nothing():
    config = settings_of(num_frames=14, resolution=16)
    bumps = 0
    for index in range(2):
        facts = physics.render_clip(config, "train", index).metadata
        for event in facts["collisions"]:
            assert 0 <= event["frame"] <= 13 and event["impulse"] > 0
            first, second = event["instances"]
            assert 0 <= first < second <= facts["num_instances"]
            bumps += first > 0
            if first == 0:
                assert abs(event["position"][2]) < 0.05
            nearest = np.rint(event["frame"]).astype(int)
            thing = facts["objects"][second - 1]
            assert np.linalg.norm(np.subtract(thing["positions"][nearest], event["position"])) < thing["radius"] + 0.5
        assert any(event["instances"][0] == 0 for event in facts["collisions"])
        places = np.array([thing["positions"] for thing in facts["objects"]])
        assert places[..., 2].min() > 0.05 and (places[:, 0, 2] > places[:, -1, 2]).mean() > 0.6
    assert bumps > 0


def test_scenes_whose_objects_are_not_seen_are_drawn_anew():
    bodies = np.full((4, 10, 10), -1)
    bodies[:, 2, :3], bodies[0, 5, 5] = 0, 1
    assert is_fit(VARIANTS["movi_c"], 2, bodies)  # a quarter of the frames is enough
    assert not is_fit(VARIANTS["movi_c"], 3, bodies)
    assert is_fit(VARIANTS["movi_e"], 2, bodies) and not is_fit(VARIANTS["movi_e"], 3, bodies)
    bodies[3, :5] = 1
    assert not is_fit(VARIANTS["movi_c"], 2, bodies)  # it fills half the frame


@pytest.mark.parametrize("variant", PHYSICS_VARIANTS)
def test_objects_do_not_touch_at_the_start(variant):
    bodies = draw_scene(VARIANTS[variant], 3, Draw(0, 5, 6)).bodies
    for first, second in product(bodies, bodies):
        assert first is second or np.linalg.norm(first.position - second.position) > first.radius + second.radius
    assert all(body.position[2] >= body.radius for body in bodies)


@settings(max_examples=4, deadline=None)
@given(seeds, st.just(list(SHAPES)))
def test_shapes_are_closed_and_balanced_and_their_solids_fill_them(seed, names):
    for name in names:
        shape = draw_shape(name, Draw(seed, 0, 0))
        mesh = shape.mesh
        assert np.linalg.norm(mesh.vertices, axis=1).max() == pytest.approx(1)
        np.testing.assert_allclose(centre_of(mesh), 0, atol=1e-9)
        assert 0.02 < volume_of(mesh) <= 4 / 3 * np.pi
        np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-6)
        _, place = np.unique(np.round(mesh.vertices, 7), axis=0, return_inverse=True)
        corners = place.reshape(-1)[mesh.triangles]
        edges = np.concatenate([corners[:, [a, b]] for a, b in ((0, 1), (1, 2), (2, 0))])
        edges = {tuple(edge) for edge in edges if edge[0] != edge[1]}
        assert all((second, first) in edges for first, second in edges), name  # each edge has its other side
        for part in shape.parts:
            centre = np.linalg.norm(part.centre)  # a cylinder's is on its axis
            reach = centre + part.radius if part.kind == "ball" else np.hypot(part.radius, centre + part.length / 2)
            assert reach < 1.06


@settings(max_examples=4, deadline=None)
@given(seeds, st.just(sorted(PATTERNS)))
def test_textures_repeat_without_a_seam(seed, patterns):
    for pattern in patterns:
        draw = Draw(seed, 0, 0)
        texture = draw_texture(pattern, draw_palette(draw, (0.2, 0.9), (0.3, 1.0)), 64, draw).astype(float)
        assert texture.shape == (64, 64, 3) and texture.std() > 0.5
        if pattern in ("marble", "sand", "clouds", "patches", "plain"):
            inner = max(np.abs(np.diff(texture, axis=axis)).mean(axis=(1 - axis, 2)).max() for axis in (0, 1))
            assert max(np.abs(texture[0] - texture[-1]).mean(), np.abs(texture[:, 0] - texture[:, -1]).mean()) < 1.5 * inner + 1


# --- settings and bad input ---


@pytest.mark.parametrize(("member", "variant"), [("physics_movi_c", "movi_c"), ("physics_movi_e", "movi_e")])
def test_members_of_the_source_group_compose(member, variant):
    schemas = {**GROUP_SCHEMAS, "features/test_schema": FeaturesConfig}
    overrides = [f"source={member}", "features=test_schema", "features.name=patch", "out=somewhere", "source.num_frames=6"]
    config = compose("build_shards", BuildConfig, overrides, schemas).source
    assert isinstance(config, PhysicsSource) and (config.variant, config.num_frames, config.resolution) == (variant, 6, 128)
    assert SOURCES[config.name](config, None).keys("test")[-1] == "test-000099"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "movi_d"}, "source.variant='movi_d' is not known"),
        ({"frame_rate": 7}, "source.frame_rate=7; a divisor of 240"),
        ({"frame_rate": 0}, "source.frame_rate=0"),
        ({"supersampling": 0}, "source.supersampling=0; 1 to 4"),
        ({"resolution": 8}, "source.resolution=8"),
        ({"num_test": 0}, "source.num_test=0"),
        ({"seed": -1}, "source.seed=-1"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(**changes)


def test_unknown_splits_and_keys_are_named():
    source = build_source(settings_of(num_train=2), None)
    assert source.keys("train") == ["train-000000", "train-000001"] and source.background_labelled
    with pytest.raises(DataError, match="split='valid' is not generated; there are train, validation, test"):
        source.keys("valid")
    with pytest.raises(DataError, match="video key='train-000002'"):
        source.read("train", "train-000002")


def test_a_missing_simulator_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybullet", None)
    with pytest.raises(ConfigError, match=r"source.name=physics: pybullet cannot be imported .*slotstream\[physics\]"):
        build_source(settings_of(), None)
