"""Pictures, checked pixel by pixel on maps whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.report.render import (
    BOUNDARY_COLOUR,
    INTERIOR_COLOUR,
    PALETTE,
    GalleryItem,
    choose_frames,
    highlight,
    match_colours,
    outlines,
    overlay,
    render_item,
    rows_of,
    shrink,
    upsample,
)

T, GRID, SIZE = 3, (2, 4), (16, 32)
LABELS = np.tile(np.array([0, 0, 1, 1, 0, 0, 5, 5]), (T, 1))


def item(**changes) -> GalleryItem:
    truth = np.zeros((T, *SIZE), dtype=np.uint8)
    truth[:, 8:, 16:] = 1
    chosen = np.zeros((T, 8), dtype=bool)
    chosen[:, 3] = True
    values = {
        "key": "clip",
        "frames": np.full((T, *SIZE, 3), 128, dtype=np.uint8),
        "truth": truth,
        "attn_labels": LABELS,
        "object_labels": LABELS,
        "merged_attn_labels": np.zeros_like(LABELS),
        "merged_object_labels": LABELS,
        "boundary": chosen,
        "interior": ~chosen,
        "grid": GRID,
    }
    return GalleryItem(**(values | changes))


def is_near(pixel: np.ndarray, colour) -> bool:
    """Whether a colour over grey kept its hue: channel order and direction from grey are the colour's."""
    toward = np.asarray(colour, dtype=float) - 128
    moved = pixel.astype(float) - 128
    return bool(np.dot(moved, toward) > 0.9 * np.linalg.norm(moved) * np.linalg.norm(toward) > 0)


def test_a_region_has_its_label_colour_and_an_outline():
    cells = rows_of(item(), [0, 2], cell=32)[2].cells
    assert cells.shape == (2, 16, 32, 3)
    for (y, x), label in {(4, 4): 0, (4, 24): 1, (12, 24): 5}.items():
        assert is_near(cells[1, y, x], PALETTE[label])
    assert (cells[:, 4, 15] == 255).all() and (cells[:, 7, 24] == 255).all() and not (cells[:, 4, 10] == 255).all()


def test_outlines_are_where_labels_change():
    labels = np.array([[[1, 1, 2], [1, 1, 2], [3, 3, 3]]])
    assert outlines(labels)[0].tolist() == [[False, True, False], [True, True, True], [False, False, False]]
    assert not outlines(np.full((2, 5, 4), 7)).any()


def test_labels_past_the_palette_wrap_around():
    frames = np.full((1, 4, 4, 3), 128, dtype=np.uint8)
    many, few = np.full((1, 4, 4), len(PALETTE) + 2), np.full((1, 4, 4), 2)
    assert (overlay(frames, many) == overlay(frames, few)).all()


def test_sets_are_painted_where_they_are_and_nowhere_else():
    rows = {row.caption: row for row in rows_of(item(), [1], cell=32)}
    boundary, interior = rows["boundary set"].cells[0], rows["interior set"].cells[0]
    inside = np.zeros(SIZE, dtype=bool)
    inside[:8, 24:] = True  # patch 3 of the first row
    painted = np.ptp(boundary.astype(int), axis=-1) > 20  # faded frames are grey
    assert (painted == inside).all() and is_near(boundary[3, 28], BOUNDARY_COLOUR)
    assert ((np.ptp(interior.astype(int), axis=-1) > 20) == ~inside).all() and is_near(interior[12, 3], INTERIOR_COLOUR)
    assert rows["boundary set"].note.startswith("12 %")


def test_an_empty_set_paints_nothing():
    frames = np.full((1, 6, 5, 3), 90, dtype=np.uint8)
    assert np.ptp(highlight(frames, np.zeros((1, 6, 5), dtype=bool), BOUNDARY_COLOUR), axis=-1).max() == 0


def test_truth_takes_the_colour_of_its_slot_and_background_none():
    row = rows_of(item(), [0], cell=32)[1]
    assert row.caption == "ground truth" and is_near(row.cells[0, 12, 24], PALETTE[5])
    assert np.ptp(row.cells[0, 3, 3].astype(int)) == 0


def test_matching_gives_each_slot_once_and_a_free_number_to_the_rest():
    slots = np.array([[[4, 4, 4, 4, 9, 9]]])
    truth = np.array([[[1, 1, 1, 2, 3, 0]]])
    matched = match_colours(truth, slots)[0, 0]
    assert matched[:3].tolist() == [4, 4, 4] and matched[4] == 9 and matched[5] == -1
    assert matched[3] not in (4, 9, -1)
    assert match_colours(np.zeros((1, 2, 2), dtype=int), np.zeros((1, 2, 2), dtype=int)).max() == -1


def test_upsampling_is_nearest_also_where_sizes_do_not_divide():
    assert upsample(np.array([[1, 2, 3, 4]]), (2, 2), (3, 4)).tolist() == [[[1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]]


@pytest.mark.parametrize(("num_frames", "at_most", "chosen"), [(1, 8, [0]), (8, 8, list(range(8))), (24, 3, [0, 12, 23])])
def test_chosen_frames_are_spread(num_frames, at_most, chosen):
    assert choose_frames(num_frames, at_most) == chosen


def test_rows_without_something_to_show_are_left_out():
    bare = item(truth=None, boundary=None, interior=None, merged_attn_labels=None, merged_object_labels=None)
    assert [row.caption for row in rows_of(bare, [0])] == ["frames", "attention maps", "object maps"]
    assert len(rows_of(item(), [0])) == 8


def test_the_picture_holds_every_cell():
    picture = render_item(item(), cell=32)
    cells = rows_of(item(), [0, 1, 2], cell=32)
    content = np.asarray(picture)
    for number, row in enumerate(cells):
        y = 26 + number * (44 + 4)
        assert (content[y : y + 16, 176 + 36 : 176 + 36 + 32] == row.cells[1]).all()


def test_shrinking_keeps_what_is_shown_and_where_it_was_in_the_video():
    long = {name: np.repeat(getattr(item(), name)[:1], 40, axis=0) for name in ("frames", "truth", "boundary", "interior")}
    long |= {name: np.tile(np.arange(40)[:, None] % 3, (1, 8)) for name in ("attn_labels", "object_labels")}
    small = shrink(item(**long, merged_attn_labels=None, merged_object_labels=None), max_frames=5, cell=16)
    assert small.frames.shape == (5, 8, 16, 3) and small.truth is not None and small.truth.shape == (5, 8, 16)
    assert small.times == (0, 10, 20, 29, 39) and small.object_labels[:, 0].tolist() == [0, 1, 2, 2, 0]
    assert small.merged_attn_labels is None and small.boundary is not None and small.boundary.shape == (5, 8)
    again = shrink(small, max_frames=3, cell=16)
    assert again.times == (0, 20, 39) and (again.frames[1] == small.frames[2]).all()


def test_small_frames_are_not_blown_up():
    assert shrink(item(), cell=500).frames.shape == (T, *SIZE, 3)


def test_an_image_is_a_video_of_one_frame():
    one = {name: getattr(item(), name)[:1] for name in ("frames", "truth", "attn_labels", "object_labels")}
    assert render_item(item(**one, merged_attn_labels=None, merged_object_labels=None, boundary=None, interior=None)).height > 0


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="2 times for 3 frames"):
        item(times=(0, 1))
    with pytest.raises(ValueError, match=r"object_labels is \[3, 7\]"):
        item(object_labels=LABELS[:, :7])
    with pytest.raises(ValueError, match="uint8"):
        item(frames=np.zeros((T, *SIZE, 3)))


# Machado, Oliveira and Fernandes 2009, severity 1: protanope and deuteranope vision in linear RGB.
PROTANOPE = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]])
DEUTERANOPE = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]])


def test_palette_colours_differ_for_colour_blind_eyes_too():
    linear = to_linear(PALETTE)
    assert len(PALETTE) >= 24
    for eye in (np.eye(3), PROTANOPE, DEUTERANOPE):
        lab = to_lab(np.clip(linear @ eye.T, 0, 1))
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1e9 * np.eye(len(lab))
        assert distance.min() > 15


def to_linear(colours: np.ndarray) -> np.ndarray:
    return np.where(colours / 255 <= 0.04045, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)


def to_lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    relative = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    root = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.stack([116 * root[:, 1] - 16, 500 * (root[:, 0] - root[:, 1]), 200 * (root[:, 1] - root[:, 2])], axis=1)
