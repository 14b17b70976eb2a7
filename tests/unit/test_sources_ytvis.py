"""YouTube-VIS folders: id maps equal to the expected ones, both mask encodings, and every kind of damage is named."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from data_pipeline.config import YtvisSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import build_source
from data_pipeline.sources.ytvis import YtvisVideos, decode_rle, to_short_side

TREE = Path(__file__).resolve().parents[1] / "data" / "ytvis_tiny"
EXPECTED = json.loads((TREE / "expected.json").read_text())["videos"]
FILE_ORDER = ["badc0de999", "deadbeef00", "5f6a7b8c9d", "c0ffee1234", "0a1b2c3d4e"]


def open_ytvis(root: Path, num_validation: int = 0) -> YtvisVideos:
    source = build_source(YtvisSource(num_validation=num_validation), str(root))
    assert isinstance(source, YtvisVideos)
    return source


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TREE, tmp_path / "tree"))


def rewrite(root: Path, change: Callable[[dict[str, Any]], None]) -> YtvisVideos:
    """Change the annotation file of a copied tree."""
    path = root / "train" / "instances.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return open_ytvis(root)


# --- what must come out ---


@pytest.mark.parametrize("key", FILE_ORDER)
def test_ids_and_frames_are_the_expected_ones(key):
    clip = open_ytvis(TREE).read("train", key)
    expected = EXPECTED[key]
    assert clip.instance_ids is not None
    assert list(clip.instance_ids.shape) == expected["id_map"]["shape"]
    assert clip.instance_ids.dtype == np.dtype(expected["id_map"]["dtype"])
    assert hashlib.sha256(np.ascontiguousarray(clip.instance_ids).tobytes()).hexdigest() == expected["id_map"]["sha256"]
    np.testing.assert_allclose(clip.frames.mean(axis=(0, 1, 2)), np.ravel(expected["mean_rgb"]), atol=0.5)
    assert clip.metadata["num_instances"] == expected["num_instances"]
    assert clip.metadata["categories"] == expected["category_ids"]
    assert clip.metadata["video_id"] == expected["video_id"]
    json.dumps(dict(clip.metadata))


@pytest.mark.parametrize("key", FILE_ORDER)
def test_an_object_keeps_its_id_and_is_absent_where_it_is_not_annotated(key):
    ids = open_ytvis(TREE).read("train", key).instance_ids
    assert ids is not None
    for number, present in enumerate(EXPECTED[key]["present"], start=1):
        seen = (ids == number).any(axis=(1, 2))
        assert not (seen & ~np.array(present)).any()


def test_the_last_videos_in_file_order_are_validation():
    source = open_ytvis(TREE, num_validation=2)
    assert source.keys("train") == FILE_ORDER[:3]
    assert source.keys("validation") == FILE_ORDER[3:]
    assert not source.background_labelled
    assert source.read("validation", "0a1b2c3d4e").num_frames == 6
    with pytest.raises(DataError, match="key='0a1b2c3d4e'; split train"):
        source.read("train", "0a1b2c3d4e")


@pytest.mark.parametrize("num_validation", [5, 300])
def test_a_file_with_too_few_videos_says_what_to_set(num_validation):
    with pytest.raises(ConfigError, match=f"source.num_validation={num_validation}; .* has 5 videos.*to at most 4"):
        open_ytvis(TREE, num_validation).keys("train")


def test_the_2019_archive_and_the_split_folder_are_found_too(copy):
    assert open_ytvis(copy / "train").keys("train") == FILE_ORDER
    shutil.move(copy / "train" / "instances.json", copy / "train.json")
    assert open_ytvis(copy).read("train", "deadbeef00").frames.shape == (4, 64, 64, 3)


def test_a_source_survives_pickling_after_use():
    source = open_ytvis(TREE)
    before = source.read("train", "c0ffee1234")
    after = pickle.loads(pickle.dumps(source)).read("train", "c0ffee1234")
    assert before.instance_ids is not None and (before.instance_ids == after.instance_ids).all()


def test_odd_and_shared_folder_names_become_keys_and_stay_in_the_metadata(copy):
    frames = copy / "train" / "JPEGImages"
    shutil.move(frames / "badc0de999", frames / "my video.1")

    def rename(content):
        content["videos"][0]["file_names"] = [f"my video.1/{5 * frame:05d}.jpg" for frame in range(4)]
        content["videos"].append({**content["videos"][1], "id": 77})

    source = rewrite(copy, rename)
    keys = source.keys("train")
    assert keys == ["my_video_1-id9", "deadbeef00-id4", *FILE_ORDER[2:], "deadbeef00-id77"]
    assert source.read("train", keys[0]).metadata["video_name"] == "my video.1"
    assert source.read("train", keys[-1]).metadata["num_instances"] == 0


def test_a_file_without_annotations_gives_no_ids(copy):
    source = rewrite(copy, lambda content: content.update(annotations=None))
    assert source.read("train", "deadbeef00").instance_ids is None


# --- masks ---


def encodings(mask: np.ndarray) -> list[dict[str, Any]]:
    """The two encodings of a mask, both by other code than ours."""
    flat = np.concatenate([[0], mask.T.ravel().astype(int)])
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[1], edges, [flat.size]])).tolist()
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    size = list(mask.shape)
    return [{"size": size, "counts": runs}, {"size": size, "counts": packed["counts"].decode()}]


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=23)))
def test_both_encodings_of_a_mask_come_back(mask):
    for encoded in encodings(mask):
        assert (decode_rle(encoded, mask.shape, "here") == mask).all()


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_any_other_text_is_a_data_error_or_a_mask(text):
    try:
        assert decode_rle({"size": [5, 7], "counts": text}, (5, 7), "here").shape == (5, 7)
    except DataError as error:
        assert "here: broken mask" in str(error)


@pytest.mark.parametrize(
    "counts",
    [
        [34],
        [36],
        [20, 20],
        [40, -5],
        [17.5, 17.5],
        [],
        "",
        ["35"],
        [[35]],
        [[1], [2, 3]],
        [2**70],
        None,
        [2**63 - 1, 2**63 - 1, 37],
    ],
)
def test_counts_that_do_not_fill_the_frame_are_refused(counts):
    with pytest.raises(DataError, match="here: broken mask"):
        decode_rle({"size": [5, 7], "counts": counts}, (5, 7), "here")


# --- damage ---


def test_a_mask_of_another_size_than_its_frame_is_named(copy):
    def widen(content):
        content["annotations"][0]["segmentations"][2]["size"] = [128, 96]

    with pytest.raises(DataError, match=r"video 0a1b2c3d4e, annotation 1, frame 2: the mask is \[128, 96\], its frame"):
        rewrite(copy, widen).read("train", "0a1b2c3d4e")


def test_a_list_of_masks_of_another_length_is_named(copy):
    with pytest.raises(DataError, match="annotation 1: 5 segmentations, 6 frames"):
        rewrite(copy, lambda content: content["annotations"][0]["segmentations"].pop()).read("train", "0a1b2c3d4e")


@pytest.mark.parametrize("mask", [3, {}, {"size": 3, "counts": [1]}, [[1, 2, 3, 4]]])
def test_a_segmentation_of_another_kind_is_named(copy, mask):
    def replace(content):
        content["annotations"][0]["segmentations"][0] = mask

    with pytest.raises(DataError, match="annotation 1, frame 0: a segmentation must be null or have"):
        rewrite(copy, replace).read("train", "0a1b2c3d4e")


@pytest.mark.parametrize("keep", [0, 2, 300, -100])
def test_a_cut_jpeg_is_named(copy, keep):
    path = copy / "train" / "JPEGImages" / "c0ffee1234" / "00010.jpg"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="c0ffee1234/00010.jpg: unreadable JPEG"):
        open_ytvis(copy).read("train", "c0ffee1234")


def test_a_cut_jpeg_is_an_error_even_where_pillow_was_told_to_accept_it(copy, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    path = copy / "train" / "JPEGImages" / "c0ffee1234" / "00010.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="c0ffee1234/00010.jpg: unreadable JPEG"):
        open_ytvis(copy).read("train", "c0ffee1234")


def test_a_missing_frame_is_named(copy):
    (copy / "train" / "JPEGImages" / "deadbeef00" / "00005.jpg").unlink()
    with pytest.raises(DataError, match="deadbeef00/00005.jpg: unreadable JPEG, file not found"):
        open_ytvis(copy).read("train", "deadbeef00")


def test_frames_of_mixed_size_are_named(copy):
    frames = copy / "train" / "JPEGImages"
    shutil.copy(frames / "badc0de999" / "00000.jpg", frames / "deadbeef00" / "00010.jpg")
    with pytest.raises(DataError, match="deadbeef00/00010.jpg: 80x60, the video's first frame 64x64"):
        open_ytvis(copy).read("train", "deadbeef00")


@pytest.mark.parametrize("text", ['{"videos": [', "[]", '{"annotations": []}', '{"videos": [{"id": 1}]}', "\xff"])
def test_broken_annotations_are_named(copy, text):
    (copy / "train" / "instances.json").write_text(text, "latin-1")
    with pytest.raises(DataError, match="instances.json: "):
        open_ytvis(copy).keys("train")


def test_frames_outside_the_folder_and_doubled_ids_are_refused(copy):
    def escape(content):
        content["videos"][0]["file_names"][0] = "../../secret.jpg"

    with pytest.raises(DataError, match="names below JPEGImages are needed"):
        rewrite(copy, escape).keys("train")
    shutil.copy(TREE / "train" / "instances.json", copy / "train")
    with pytest.raises(DataError, match="video id=9 occurs twice"):
        rewrite(copy, lambda content: content["videos"].append(content["videos"][0])).keys("train")


def test_missing_roots_and_splits_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_ytvis(tmp_path / "nowhere").keys("train")
    with pytest.raises(DataError, match="no instances.json"):
        open_ytvis(tmp_path).keys("train")
    (tmp_path / "instances.json").write_text("{}")
    with pytest.raises(DataError, match="JPEGImages is missing beside instances.json"):
        open_ytvis(tmp_path).keys("train")
    with pytest.raises(DataError, match="split='test' is not in .*; it has train, validation"):
        open_ytvis(TREE).keys("test")
    with pytest.raises(DataError, match="split='validation' .* is empty; num_validation=0"):
        open_ytvis(TREE).keys("validation")
    with pytest.raises(ConfigError, match="root=null"):
        build_source(YtvisSource(), None)
    with pytest.raises(ConfigError, match="source.num_validation=-1"):
        YtvisSource(num_validation=-1)


@pytest.mark.parametrize(("size", "short_side"), [((60, 80), 320), ((96, 128), 48), ((128, 96), 100)])
def test_short_side_takes_the_pixels_that_nearest_exact_takes(size, short_side):
    frames = np.arange(2 * size[0] * size[1], dtype=np.uint16).reshape(2, *size)
    made = to_short_side(frames, short_side)
    scale = short_side / min(size)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(frames.astype(np.float32))[None], size=[int(side * scale) for side in size], mode="nearest-exact"
    )
    assert min(made.shape[1:]) == short_side
    assert np.array_equal(made, wanted[0].numpy().astype(np.uint16))


def test_short_side_resizes_frames_and_ids_together():
    plain = build_source(YtvisSource(num_validation=2), str(TREE))
    small = build_source(YtvisSource(num_validation=2, short_side=30), str(TREE))
    key = plain.keys("train")[0]
    whole, clip = plain.read("train", key), small.read("train", key)
    assert min(clip.frames.shape[1:3]) == 30 and clip.instance_ids.shape == clip.frames.shape[:3]
    assert set(np.unique(clip.instance_ids)) <= set(np.unique(whole.instance_ids))
