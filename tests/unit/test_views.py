"""Views: geometry of crops, the same for frames and ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.views import crop_instance_ids, parse_view, prepare


def ramp(num_frames: int, height: int, width: int) -> np.ndarray:
    """Red grows downwards, green to the right, blue with the frame."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 0] = np.arange(height)[:, None]
    frames[..., 1] = np.arange(width)
    frames[..., 2] = np.arange(num_frames)[:, None, None]
    return frames


@pytest.mark.parametrize("name", ["", "centre", "crop", "crop-1", "center+flip", "hflip", "center+hflip+hflip", "crop1 "])
def test_names_outside_the_grammar_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="view="):
        parse_view(name)


def test_names_inside_the_grammar() -> None:
    assert parse_view("center") == (None, False)
    assert parse_view("crop12+hflip") == (12, True)


def test_stretch_shows_the_whole_frame_as_torch_resizes_it() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (11, 6, 10, 3), dtype=np.uint8)
    image = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    expected = torch.nn.functional.interpolate(image, size=(14, 14), mode="bicubic", align_corners=False).clamp(0, 1)
    found = prepare(frames, "crop3", 14, "stretch", "key")
    assert found.shape == (11, 3, 14, 14) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(prepare(frames, "center+hflip", 14, "stretch", "key"), expected.flip(-1))
    assert found.min() >= 0 and found.max() <= 1 and found.is_contiguous()


@pytest.mark.parametrize(("size", "offset"), [((8, 11), (0, 2)), ((8, 13), (0, 2)), ((15, 8), (4, 0)), ((9, 9), (0, 0))])
def test_centre_square_has_the_official_offset(size: tuple[int, int], offset: tuple[int, int]) -> None:
    """(dim - side) / 2 = 1.5, 2.5 and 3.5 round to 2, 2 and 4: to even."""
    side = min(size)
    ids = np.arange(size[0] * size[1]).reshape(1, *size).astype(np.uint16)
    cut = crop_instance_ids(ids, "center", 12, "crop", "key")
    np.testing.assert_array_equal(cut, ids[:, offset[0] : offset[0] + side, offset[1] : offset[1] + side])
    frames = prepare(ramp(2, *size), "center", side, "crop", "key") * 255
    assert frames[0, 0, 0, 0].round() == offset[0] and frames[0, 1, 0, 0].round() == offset[1]


def test_random_crops_differ_by_key_and_number_and_stay_for_ever() -> None:
    frames = ramp(3, 20, 90)
    left = {
        (key, crop): int((prepare(frames, f"crop{crop}", 20, "crop", key)[0, 1, 0, 0] * 255).round())
        for key in ("a", "b")
        for crop in range(3)
    }
    assert len(set(left.values())) >= 5
    assert all(0 <= value <= 70 for value in left.values())
    again = prepare(frames, "crop1", 20, "crop", "a")
    assert int((again[0, 1, 0, 0] * 255).round()) == left["a", 1]
    # One crop for the whole video.
    assert (again[:, 1] == again[0, 1]).all()


@pytest.mark.parametrize("view", ["center", "crop0", "crop1+hflip"])
@pytest.mark.parametrize(("size", "image_size"), [((12, 31), 24), ((40, 18), 9), ((16, 16), 8)])
def test_ids_lie_where_the_frames_lie(view: str, size: tuple[int, int], image_size: int) -> None:
    """Resized, the native cut of a column ramp agrees with the prepared frames within a pixel."""
    frames = ramp(2, *size)
    cut = crop_instance_ids(frames, view, image_size, "crop", "video")
    assert cut.shape == (2, min(size), min(size), 3)
    image = torch.from_numpy(cut).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(image, size=(image_size, image_size), mode="bicubic", align_corners=False)
    found = prepare(frames, view, image_size, "crop", "video") * 255
    inner = (..., slice(2, -2), slice(2, -2))
    scale = min(size) / image_size
    assert (resized - found)[inner].abs().max() <= 1.0 + scale


def test_flip_mirrors_ids_and_keeps_values() -> None:
    ids = np.random.default_rng(1).integers(0, 60000, (2, 5, 8)).astype(np.uint16)
    plain, flipped = (crop_instance_ids(ids, view, 10, "stretch", "k") for view in ("center", "center+hflip"))
    np.testing.assert_array_equal(flipped, plain[:, :, ::-1])
    assert flipped.dtype == np.uint16 and flipped.flags.c_contiguous
