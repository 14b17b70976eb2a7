"""Folders of pictures, as single frames and as videos: upright RGB, fixed splits, and a sentence for each file that is none."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.clip import KEY_PATTERN
from data_pipeline.config import ImagesSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import build_source
from data_pipeline.sources.folder import safe_keys, split_of
from data_pipeline.sources.images import Images, natural

HEIGHT, WIDTH = 6, 9


def pixels(seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write(path: Path, values: np.ndarray, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **settings)
    return path


def open_images(root: Path, **settings: Any) -> Images:
    source = build_source(ImagesSource(**{"validation_share": 0.0, **settings}), str(root))
    assert isinstance(source, Images)
    return source


# --- pictures ---


def test_every_format_is_read(tmp_path):
    for number, name in enumerate(("b.png", "deep/c.bmp", "d.webp", "e.JPG", "A.jpeg")):
        settings = {"lossless": True} if name.endswith("webp") else {}
        write(tmp_path / name, pixels(number), **settings)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    source = open_images(tmp_path)
    assert source.keys("train") == ["A", "b", "d", "deep_c", "e"]
    for key, number in (("b", 0), ("deep_c", 1), ("d", 2)):
        clip = source.read("train", key)
        np.testing.assert_array_equal(clip.frames, pixels(number)[None])
        assert clip.instance_ids is None
    assert source.read("train", "e").frames.shape == (1, HEIGHT, WIDTH, 3)
    assert source.read("train", "deep_c").metadata == {"file": "deep/c.bmp"}


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("L", lambda grey: np.repeat(grey[..., None], 3, axis=-1)),
        ("1", lambda grey: np.where(grey[..., None] > 99, 255, [0, 0, 0])),
    ],
)
def test_grey_becomes_rgb(tmp_path, mode, wanted):
    grey = np.where(pixels(0)[..., 0] > 127, 200, 20).astype(np.uint8)
    Image.fromarray(grey).convert(mode, dither=Image.Dither.NONE).save(tmp_path / "x.png")
    np.testing.assert_array_equal(open_images(tmp_path).read("train", "x").frames[0], wanted(grey))


def test_transparency_leaves_the_colours_as_they_are(tmp_path):
    write(tmp_path / "x.png", np.concatenate([pixels(0), pixels(1)[..., :1]], axis=-1))
    np.testing.assert_array_equal(open_images(tmp_path).read("train", "x").frames[0], pixels(0))


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, lambda x: x), (2, lambda x: x[:, ::-1]), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)],
)
def test_exif_turns_the_picture(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "x.png", pixels(3), exif=exif)
    np.testing.assert_array_equal(open_images(tmp_path).read("train", "x").frames[0], turned(pixels(3)))


@pytest.mark.parametrize(
    ("name", "keep", "words"),
    [("x.png", 0, "unreadable"), ("x.png", -20, "unreadable"), ("x.jpg", -30, "unreadable"), ("x.webp", 30, "unreadable")],
)
def test_a_cut_picture_is_named_and_harms_no_other(tmp_path, name, keep, words):
    path = write(tmp_path / name, pixels(0, (40, 50)))
    path.write_bytes(path.read_bytes()[:keep])
    write(tmp_path / "good.png", pixels(1))
    source = open_images(tmp_path)
    with pytest.raises(DataError, match=f"{name}: {words}"):
        source.read("train", "x")
    assert source.read("train", "good").num_frames == 1


def test_sixteen_bits_and_other_formats_are_refused(tmp_path):
    write(tmp_path / "deep.png", np.full((4, 5), 4000, np.uint16))
    with pytest.raises(DataError, match="deep.png: .*more than 8 bits"):
        open_images(tmp_path).read("train", "deep")
    Image.fromarray(pixels(0)).save(tmp_path / "tiff.png", "TIFF")
    with pytest.raises(DataError, match="tiff.png: unreadable picture"):
        open_images(tmp_path).read("train", "tiff")


# --- folders of frames ---


def test_folders_are_videos_in_the_order_of_the_numbers(tmp_path):
    for number in (10, 9, 1, 0, 100):
        write(tmp_path / "train" / "dog" / f"frame_{number}.png", pixels(number))
    for number in range(3):
        write(tmp_path / "validation" / "cat" / f"{number:05d}.png", pixels(50 + number))
    source = open_images(tmp_path, layout="frame_folders")
    assert source.keys("train") == ["train_dog"] and source.keys("validation") == ["validation_cat"]
    wanted = np.stack([pixels(number) for number in (0, 1, 9, 10, 100)])
    np.testing.assert_array_equal(source.read("train", "train_dog").frames, wanted)
    short = open_images(tmp_path, layout="frame_folders", frame_stride=2, max_frames=2).read("train", "train_dog")
    np.testing.assert_array_equal(short.frames, wanted[[0, 2]])
    assert open_images(tmp_path).keys("validation") == [f"validation_cat_{number:05d}" for number in range(3)]


def test_frames_that_make_no_video_are_named(tmp_path):
    write(tmp_path / "dog" / "0.png", pixels(0))
    write(tmp_path / "dog" / "1.png", pixels(0, (5, 5)))
    with pytest.raises(DataError, match="dog/1.png: 5x5, the video's first frame 9x6"):
        open_images(tmp_path, layout="frame_folders").read("train", "dog")
    write(tmp_path / "dog" / "1.bmp", pixels(0))
    with pytest.raises(DataError, match="dog/1.(png|bmp): the frame is there with two endings"):
        open_images(tmp_path, layout="frame_folders").keys("train")
    write(tmp_path / "loose.png", pixels(0))
    with pytest.raises(DataError, match="loose.png lies in no folder of its own; .*source.layout=images"):
        open_images(tmp_path, layout="frame_folders").keys("train")


@given(st.lists(st.text("ab019._²٣", max_size=6), max_size=6))
def test_any_names_can_be_ordered(names):
    assert sorted(sorted(names, key=natural), key=natural) == sorted(names, key=natural)


# --- keys and splits ---

NAMES = st.lists(st.text("aB0_ /.é-", min_size=1, max_size=6), min_size=1, max_size=12)


@given(NAMES)
def test_keys_are_safe_and_unique(names):
    keys = safe_keys(names)
    assert len(set(keys)) == len(names) and all(KEY_PATTERN.fullmatch(key) for key in keys)
    assert safe_keys(names) == keys


@given(count=st.integers(2, 40), share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_a_share_cuts_the_files_into_two_splits_that_last(count, share, seed):
    """A file that is added later moves at most the one that was taken so that neither split is empty."""
    keys = [f"{seed}-{number}" for number in range(count)]
    train, validation = (split_of(Path("root"), split, keys, keys, share) for split in ("train", "validation"))
    assert train and validation and sorted(train + validation) == sorted(keys)
    later = set(split_of(Path("root"), "validation", [*keys, "new"], [*keys, "new"], share))
    assert len(set(validation) ^ (later - {"new"})) <= 1


def test_wrong_roots_keys_and_settings_are_named(tmp_path):
    write(tmp_path / "x.png", pixels(0))
    with pytest.raises(DataError, match="key='y'; split train"):
        open_images(tmp_path).read("train", "y")
    with pytest.raises(DataError, match="split='validation' of .* is empty; .*validation_share=0.0 of 1"):
        open_images(tmp_path).keys("validation")
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "z.png", pixels(0))
    with pytest.raises(DataError, match="split='validation' of .* is empty; .*files lie in the folders train; add .*/validation"):
        open_images(tmp_path).keys("validation")
    with pytest.raises(ConfigError, match="source.layout='folders'"):
        ImagesSource(layout="folders")
    with pytest.raises(ConfigError, match="root=null"):
        build_source(ImagesSource(), None)
    source = open_images(tmp_path)
    assert (pickle.loads(pickle.dumps(source)).read("train", "train_z").frames == source.read("train", "train_z").frames).all()
