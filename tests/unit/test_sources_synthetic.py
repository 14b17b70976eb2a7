"""Generated clips: the same numbers give the same bytes, the masks are exact, and the clips are what their settings say."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.clip import Clip
from data_pipeline.config import DIFFICULTIES, SyntheticSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import build_source
from data_pipeline.sources import synthetic as generated

SIZE = 40  # small, so that many clips can be drawn
kinds = st.sampled_from(DIFFICULTIES)
seeds = st.integers(0, 2**63)
indices = st.integers(0, 10**6)


def settings_of(**changes) -> SyntheticSource:
    return SyntheticSource(**{"image_size": SIZE, "num_frames": 5, **changes})


def digest(clip: Clip) -> str:
    assert clip.instance_ids is not None
    return hashlib.sha256(clip.frames.tobytes() + clip.instance_ids.tobytes()).hexdigest()


# --- determinism ---


@settings(max_examples=25, deadline=None)
@given(kinds, seeds, indices)
def test_the_same_numbers_give_the_same_bytes_and_others_do_not(difficulty, seed, index):
    config = settings_of(difficulty=difficulty, seed=seed)
    clip = generated.draw_clip(config, "train", index)
    assert digest(clip) == digest(generated.draw_clip(config, "train", index))
    others = [
        generated.draw_clip(config, "train", index + 1),
        generated.draw_clip(config, "validation", index),
        generated.draw_clip(settings_of(difficulty=difficulty, seed=seed + 1), "train", index),
    ]
    assert len({digest(clip), *map(digest, others)}) == 4


def test_a_clip_does_not_depend_on_what_was_read_before():
    first, second = (build_source(settings_of(), None) for _ in range(2))
    first.read("train", "train-000000")
    first.read("validation", "validation-000002")
    assert digest(first.read("train", "train-000003")) == digest(second.read("train", "train-000003"))


def test_every_difficulty_draws_from_a_stream_of_its_own():
    counts = {kind: generated.draw_clip(settings_of(difficulty=kind), "train", 0).frames.mean() for kind in DIFFICULTIES}
    assert len(set(counts.values())) == 3


# --- exact masks ---


@settings(max_examples=25, deadline=None)
@given(kinds, seeds, indices)
def test_a_pixel_carries_the_nearest_object_that_covers_it(difficulty, seed, index):
    """The id map against masks of each object alone, computed from the outline on the whole frame."""
    config, kind = settings_of(difficulty=difficulty, seed=seed), generated.DIFFICULTIES[difficulty]
    clip = generated.draw_clip(config, "train", index)
    stream = 1 + 2 * DIFFICULTIES.index(difficulty)
    scene = generated.compose_scene(generated.generator(seed, stream, index), kind, config.num_frames)
    catalogue = generated.draw_species(seed, kind.num_species)
    expected = np.zeros((config.num_frames, SIZE, SIZE), int)
    edge = np.zeros(expected.shape, bool)  # within rounding of an outline either answer is right
    for number, sprite in enumerate(scene.sprites, start=1):
        for frame in range(config.num_frames):
            depth = outline_depth(sprite, catalogue[sprite.species], frame)
            expected[frame][depth < 0] = number
            edge[frame] |= np.abs(depth) < 1e-4
    assert (clip.instance_ids == expected)[~edge].all()
    assert edge.mean() < 0.02
    assert set(np.unique(clip.instance_ids)) <= set(range(len(scene.sprites) + 1))
    assert clip.metadata["num_instances"] == len(scene.sprites) == len(clip.metadata["species"])


def outline_depth(sprite: generated.Sprite, species: generated.Species, frame: int) -> np.ndarray:
    """Signed distance to the outline over the frame, negative inside, in radii; written apart from the drawing."""
    middle = (np.arange(SIZE) + 0.5) / SIZE
    along = (middle[None, :] - sprite.centre[frame, 1] + 1j * (middle[:, None] - sprite.centre[frame, 0])) / sprite.radius
    point = along * np.exp(-1j * sprite.angle[frame])
    u, v, distance, theta = point.real, point.imag, np.abs(point), np.angle(point)
    if species.shape == "disc":
        return distance - 1
    if species.shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.85
    if species.shape == "triangle":  # three half planes, a third of a turn apart
        return np.max([np.cos(turn) * v + np.sin(turn) * u for turn in 2 * np.pi / 3 * np.arange(3)], axis=0) - 0.62
    wobble = 0.16 * np.cos(species.lobes * theta + species.phase) + 0.07 * np.cos(2 * theta - species.phase)
    return distance - 0.92 - wobble


@settings(max_examples=15, deadline=None)
@given(kinds, seeds, st.data())
def test_leaving_an_object_out_changes_the_picture_only_where_it_was(difficulty, seed, data):
    kind, rng = generated.DIFFICULTIES[difficulty], generated.generator(seed, 9, 9)
    scene = generated.compose_scene(rng, kind, 4)
    canvas = generated.draw_background(rng, kind, scene, SIZE)
    looks = generated.draw_species(seed, kind.num_species)
    layers = [generated.draw_sprite(sprite, looks[sprite.species], scene.light, SIZE) for sprite in scene.sprites]
    gone = data.draw(st.integers(0, len(layers) - 1))
    with_it, ids = generated.paint(canvas.copy(), layers)
    without, ids_without = generated.paint(canvas.copy(), layers[:gone] + layers[gone + 1 :])
    alone = generated.paint(np.zeros_like(canvas), [layers[gone]._replace(colour=np.ones_like(layers[gone].colour))])[0][..., 0]
    assert ((with_it != without).any(-1) <= (alone > 0)).all()
    renumbered = ids_without + (ids_without > gone)
    assert (ids[ids != gone + 1] == renumbered[ids != gone + 1]).all()


def test_masks_fit_the_picture_without_noise():
    """Where an object's mask ends, colours change: an edge of the picture lies on most of the mask's outline."""
    clip = generated.draw_clip(SyntheticSource(num_frames=3), "train", 1)
    assert clip.instance_ids is not None
    across = np.abs(np.diff(clip.frames.astype(int), axis=2)).sum(-1)
    border = np.diff(clip.instance_ids.astype(int), axis=2) != 0
    assert across[border].mean() > 3 * across[~border].mean()


# --- what the clips are ---


def clips(difficulty: str, count: int = 30) -> list[Clip]:
    config = settings_of(difficulty=difficulty, num_train=count, num_frames=16)
    source = build_source(config, None)
    assert source.background_labelled
    return [source.read("train", key) for key in source.keys("train")]


@pytest.mark.parametrize(("difficulty", "least", "most"), [("easy", 3, 5), ("movi_c", 3, 10), ("movi_e", 11, 23)])
def test_clips_hold_as_many_objects_as_their_difficulty_says(difficulty, least, most):
    drawn = clips(difficulty)
    counts = [clip.metadata["num_instances"] for clip in drawn]
    assert least <= min(counts) < max(counts) <= most
    visible = [len(np.unique(clip.instance_ids)) - 1 for clip in drawn]
    assert sum(visible) > 0.85 * sum(counts)  # hidden all the time is rare
    for clip in drawn:
        assert clip.frames.shape == (16, SIZE, SIZE, 3) and clip.instance_ids is not None
        assert clip.frames.dtype == clip.instance_ids.dtype == np.uint8
        json.dumps(dict(clip.metadata))


def test_objects_move_hide_one_another_leave_enter_and_share_looks():
    moved = entered = left = doubled = 0
    for clip in clips("easy", 60):
        ids = clip.instance_ids
        assert ids is not None
        doubled += max(Counter(clip.metadata["species"]).values()) > 1
        for number in range(1, clip.metadata["num_instances"] + 1):
            there = (ids == number).any(axis=(1, 2))
            moved += there[0] and not ((ids[0] == number) & (ids[-1] == number)).all()
            entered += not there[0] and there.any()
            left += not there[-1] and there.any()
    assert moved > 100 and entered > 5 and left > 5 and doubled > 5


def test_the_camera_stands_still_in_movi_c_and_moves_in_movi_e():
    movi_c, movi_e = (
        generated.compose_scene(generated.generator(3, 1, 2), generated.DIFFICULTIES[kind], 8) for kind in ("movi_c", "movi_e")
    )
    assert np.abs(movi_c.pan).max() == 0
    assert np.hypot(*(movi_e.pan[-1] - movi_e.pan[0])) > 7 * 0.25 * 1.5 / 96
    ways = [sprite.centre + movi_e.pan for sprite in movi_e.sprites]
    assert 1 <= sum(not np.allclose(way, way[0]) for way in ways) <= 3


def test_all_shapes_and_patterns_occur_and_species_are_shared_by_the_splits():
    looks = generated.draw_species(5, 24)
    assert {look.shape for look in looks} == set(generated.SHAPES) == set(generated.OUTLINES)
    assert {look.pattern for look in looks} == set(generated.PATTERNS) == set(generated.FILLS)
    assert all(look.colours.min() >= 0 and look.colours.max() <= 1 for look in looks)
    config = settings_of(seed=5)
    for split in ("train", "validation"):
        metadata = generated.draw_clip(config, split, 4).metadata
        assert metadata["shapes"] == [looks[number].shape for number in metadata["species"]]


@pytest.mark.parametrize(("image_size", "num_frames"), [(16, 1), (57, 2), (128, 3)])
def test_any_size_and_length(image_size, num_frames):
    for difficulty in DIFFICULTIES:
        clip = generated.draw_clip(settings_of(difficulty=difficulty, image_size=image_size, num_frames=num_frames), "train", 7)
        assert clip.frames.shape == (num_frames, image_size, image_size, 3)


def test_objects_stay_within_their_boxes():
    """No shape reaches beyond the box it is drawn in: the boxes' rims are empty."""
    for look in generated.draw_species(1, 40):
        sprite = generated.Sprite(0, np.array([[0.5, 0.5], [0.3, 0.71]]), np.array([0.4, 2.0]), 0.2)
        cover = generated.draw_sprite(sprite, look, np.array([0.0, 1.0]), 96).cover
        assert cover.max() == 1
        assert max(cover[:, 0].max(), cover[:, -1].max(), cover[:, :, 0].max(), cover[:, :, -1].max()) == 0


# --- settings ---


def test_keys_are_counted_and_others_refused():
    source = build_source(settings_of(num_train=3, num_validation=2), None)
    assert source.keys("train") == ["train-000000", "train-000001", "train-000002"]
    assert source.keys("validation") == ["validation-000000", "validation-000001"]
    with pytest.raises(DataError, match="split='test' is not generated; there are train, validation"):
        source.keys("test")
    with pytest.raises(DataError, match="key='train-000003'"):
        source.read("train", "train-000003")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"difficulty": "movi_x"}, "source.difficulty='movi_x' is not known"),
        ({"num_frames": 0}, "source.num_frames=0"),
        ({"num_train": 0}, "source.num_train=0"),
        ({"seed": -1}, "source.seed=-1"),
        ({"image_size": 8}, "source.image_size=8"),
        ({"resize": "pad"}, "source.resize='pad'"),
    ],
)
def test_settings_outside_their_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(**changes)


def test_the_settings_know_the_difficulties_that_can_be_drawn():
    assert set(DIFFICULTIES) == set(generated.DIFFICULTIES)
