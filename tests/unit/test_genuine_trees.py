"""The three genuine trees of tests/data: every figure of their expected.json that the sources' own tests do not compare.

The MOVi tree was written by tensorflow_datasets; the others lie in the layouts of YouTube-VIS and DAVIS.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DavisSource, MoviSource, YtvisSource
from data_pipeline.sources import build_source
from data_pipeline.sources.tfrecord import Feature, index_records, masked_crc, parse_example, read_record
from data_pipeline.sources.ytvis import decode_rle

av = pytest.importorskip("av")
DATA = Path(__file__).resolve().parents[1] / "data"
MOVI = DATA / "movi_tfds_tiny"
VERSION = MOVI / "movi_c" / "48x48" / "1.0.0"
EXPECTED = {
    name: json.loads((DATA / name / "expected.json").read_text()) for name in ("movi_tfds_tiny", "ytvis_tiny", "davis_tiny")
}
SPLIT = EXPECTED["movi_tfds_tiny"]["splits"]["train"]
YTVIS = EXPECTED["ytvis_tiny"]["videos"]
RAGGED = ("ragged_flat_values", "ragged_row_lengths_0")  # how TFDS names the two halves of a ragged feature


def sha256(values: np.ndarray | bytes) -> str:
    return hashlib.sha256(values if isinstance(values, bytes) else np.ascontiguousarray(values).tobytes()).hexdigest()


def pictures(encoded: list[bytes], channels: int) -> np.ndarray:
    """PNGs of 8 and 16 bits a value; FFmpeg reads 16-bit RGB, of which Pillow keeps the high bytes alone."""
    deep = encoded[0][24] == 16 and channels == 3
    stacked = np.stack([_by_ffmpeg(data) if deep else np.asarray(Image.open(io.BytesIO(data))) for data in encoded])
    return stacked if channels == 3 else stacked[..., None]


def _by_ffmpeg(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), format="png_pipe") as container:
        return next(container.decode(video=0)).to_ndarray()


# --- MOVi ---


@pytest.mark.parametrize("name", EXPECTED["movi_tfds_tiny"]["files"])
def test_movi_files_are_the_ones_that_were_written(name):
    data, listed = (VERSION / name).read_bytes(), EXPECTED["movi_tfds_tiny"]["files"][name]
    assert len(data) == listed["bytes"] and sha256(data) == listed["sha256"]


def test_movi_checksums_are_those_that_tensorflow_stored():
    for file in SPLIT["tfrecord_frames"]:
        data = (VERSION / file["file"]).read_bytes()
        for record in file["records"]:
            start, length = record["offset"], record["length"]
            payload = data[start + 12 : start + 12 + length]
            assert struct.unpack_from("<QI", data, start) == (length, record["masked_crc32c_length"])
            assert masked_crc(data[start : start + 8]) == record["masked_crc32c_length"]
            assert masked_crc(payload) == record["masked_crc32c_data"] == struct.unpack_from("<I", data, start + 12 + length)[0]


def movi_features(number: int) -> tuple[dict[str, Any], dict[str, Feature]]:
    """(what TensorFlow read, what we read) of a record."""
    shard, row = divmod(number, SPLIT["shard_lengths"][0])
    path = VERSION / SPLIT["tfrecord_frames"][shard]["file"]
    wanted = SPLIT["records"][number]["features"]
    names = {f"{name}/{half}" for name in wanted for half in RAGGED} | set(wanted)
    return wanted, parse_example(read_record(path, index_records(path)[row]), frozenset(names), "here")


@pytest.mark.parametrize("number", range(3))
def test_every_movi_feature_is_what_tensorflow_reads(number):
    wanted, parsed = movi_features(number)
    compared = 0
    for name, item in wanted.items():
        if item["kind"] == "ragged":
            flat, lengths = (parsed[f"{name}/{half}"] for half in RAGGED)
            assert isinstance(flat, np.ndarray) and isinstance(lengths, np.ndarray)
            assert lengths.tolist() == item["row_lengths"], name
            assert sha256(flat.astype(item["dtype"]).reshape(item["flat_shape"])) == item["sha256_flat"], name
        elif item["kind"] == "text":
            value = parsed[name]
            assert isinstance(value, list) and [text.decode() for text in value] == item["value"], name
        else:
            value = parsed[name]
            found = value if isinstance(value, np.ndarray) else pictures(value, item["shape"][-1])
            assert sha256(found.astype(item["dtype"]).reshape(item["shape"])) == item["sha256"], name
        compared += 1
    assert compared == len(wanted) > 35


@pytest.mark.parametrize("number", range(3))
def test_a_movi_id_stands_for_the_instance_before_it(number):
    """Value k is instance k-1: it is in a frame where TensorFlow counts visible pixels of that instance, and in no other."""
    _, parsed = movi_features(number)
    source = build_source(MoviSource(), str(MOVI))
    ids = source.read("train", source.keys("train")[number]).instance_ids
    visibility = np.asarray(parsed["instances/visibility"]).reshape(-1, 24)
    assert ids is not None
    counts = np.stack([(ids == row + 1).sum(axis=(1, 2)) for row in range(len(visibility))])
    np.testing.assert_array_equal(counts, visibility)


# --- YouTube-VIS ---


def ytvis_json() -> dict[str, Any]:
    return json.loads((DATA / "ytvis_tiny" / "train" / "instances.json").read_text())


def test_ytvis_lists_what_is_expected():
    content, listed = ytvis_json(), EXPECTED["ytvis_tiny"]
    assert [video["id"] for video in content["videos"]] == listed["video_order_in_json"]
    assert len(content["annotations"]) == listed["num_annotations"]
    source = build_source(YtvisSource(num_validation=0), str(DATA / "ytvis_tiny"))
    clips = [source.read("train", key) for key in source.keys("train")]
    assert [clip.metadata["video_id"] for clip in clips] == listed["video_order_in_json"]
    assert sum(clip.metadata["num_instances"] for clip in clips) == listed["num_non_crowd"]


@pytest.mark.parametrize("key", YTVIS)
def test_every_ytvis_mask_is_the_expected_one_and_the_later_covers(key):
    expected, content = YTVIS[key], ytvis_json()
    notes = {note["id"]: note for note in content["annotations"] if note["video_id"] == expected["video_id"]}
    size = expected["shape"][1:3]
    stack = np.zeros((len(expected["annotation_ids"]), *expected["shape"][:3]), np.uint8)
    for row, number in enumerate(expected["annotation_ids"]):
        for frame, mask in enumerate(notes[number]["segmentations"]):
            assert (mask is not None) == expected["present"][row][frame]
            if mask is not None:
                stack[row, frame] = decode_rle(mask, tuple(size), "here")
                assert int(stack[row, frame].sum()) == expected["areas"][row][frame]
    assert len(stack) == 0 or sha256(stack) == expected["stack_masks_sha256"]
    assert (stack.sum(axis=0) > 1).sum(axis=(1, 2)).tolist() == expected["overlap_pixels_per_frame"]
    clip = build_source(YtvisSource(num_validation=0), str(DATA / "ytvis_tiny")).read("train", key)
    assert clip.instance_ids is not None and list(clip.frames.shape) == expected["shape"]
    order = np.arange(1, len(stack) + 1)[:, None, None, None]
    np.testing.assert_array_equal(clip.instance_ids, (stack * order).max(axis=0, initial=0))
    pixels = dict(zip(*(column.tolist() for column in np.unique(clip.instance_ids, return_counts=True)), strict=True))
    assert pixels == {int(number): count for number, count in expected["id_map"]["pixels_per_id"].items() if count}


@pytest.mark.parametrize("key", YTVIS)
def test_ytvis_pictures_are_the_ones_that_were_written(key):
    files = sorted((DATA / "ytvis_tiny" / "train" / "JPEGImages" / key).glob("*.jpg"))
    assert [sha256(file.read_bytes())[:16] for file in files] == YTVIS[key]["jpeg_sha256"]


# --- DAVIS ---


@pytest.mark.parametrize("key", EXPECTED["davis_tiny"]["videos"])
def test_davis_has_the_expected_ids_in_both_sets(key):
    expected = EXPECTED["davis_tiny"]["videos"][key]
    split = {"train": "train", "val": "validation"}[expected["split"]]
    for kind, listed in (("unsupervised", expected["ids"]), ("semi", expected["annotations"]["ids"])):
        source = build_source(DavisSource(annotations=kind), str(DATA / "davis_tiny"))
        assert source.keys(split) == EXPECTED["davis_tiny"]["sets"][expected["split"]]
        ids = source.read(split, key).instance_ids
        assert np.unique(ids).tolist() == [number for number in listed if number != 255]
