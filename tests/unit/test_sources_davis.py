"""DAVIS folders: id maps as expected in both annotation sets, void pixels unlabelled, damage named. And OVIS' layout."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build import compose_build
from data_pipeline.config import DavisSource, YtvisSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import build_source
from data_pipeline.sources.davis import DavisVideos

TREE = Path(__file__).resolve().parents[1] / "data" / "davis_tiny"
YTVIS_TREE = TREE.parent / "ytvis_tiny" / "train"
EXPECTED = json.loads((TREE / "expected.json").read_text())["videos"]
VIDEOS = [("train", "bike-loop"), ("train", "cat-jump"), ("validation", "two-dogs")]
FOLDERS = {"unsupervised": "Annotations_unsupervised", "semi": "Annotations"}
LISTED = {"unsupervised": "annotations_unsupervised", "semi": "annotations"}


def open_davis(root: Path, annotations: str = "unsupervised") -> DavisVideos:
    source = build_source(DavisSource(annotations=annotations), str(root))
    assert isinstance(source, DavisVideos)
    return source


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TREE / "DAVIS", tmp_path / "tree"))


def mask_file(root: Path, video: str, frame: int) -> Path:
    return root / "Annotations_unsupervised" / "480p" / video / f"{frame:05d}.png"


# --- what must come out ---


@pytest.mark.parametrize("annotations", FOLDERS)
@pytest.mark.parametrize(("split", "key"), VIDEOS)
def test_ids_and_frames_are_the_expected_ones(split, key, annotations):
    clip = open_davis(TREE, annotations).read(split, key)
    expected = EXPECTED[key]
    ids = clip.instance_ids
    assert ids is not None and ids.dtype == np.uint8
    assert list(clip.frames.shape) == expected["shape"]
    np.testing.assert_allclose(clip.frames.mean(axis=(0, 1, 2)), expected["mean_rgb"], atol=0.5)
    # the expected digest is of the indices with void in them: put void back where the files have it
    folder = TREE / "DAVIS" / FOLDERS[annotations] / "480p" / key
    void = np.stack([np.asarray(Image.open(path)) == 255 for path in sorted(folder.glob("*.png"))])
    assert not ids[void].any()
    digest = hashlib.sha256(np.where(void, np.uint8(255), ids).tobytes()).hexdigest()
    assert digest == expected[LISTED[annotations]]["sha256"]
    assert clip.metadata["num_void"] == expected["void_255_pixels"]
    json.dumps(dict(clip.metadata))


@pytest.mark.parametrize(("split", "key"), VIDEOS)
def test_objects_are_where_they_should_be_and_void_belongs_to_none(split, key):
    clip = open_davis(TREE).read(split, key)
    ids, expected = clip.instance_ids, EXPECTED[key]
    assert ids is not None
    counts = dict(zip(*(values.tolist() for values in np.unique(ids, return_counts=True)), strict=True))
    pixels = {int(number): count for number, count in expected["annotations_unsupervised"]["pixels_per_id"].items()}
    pixels[0] += pixels.pop(255, 0)
    assert counts == pixels
    for number, present in expected["present"].items():
        assert (ids == int(number)).any(axis=(1, 2)).tolist() == present
    assert clip.metadata["num_instances"] == len(expected["present"])


def test_the_annotation_setting_chooses_the_set():
    counts = [open_davis(TREE, annotations).read("validation", "two-dogs").metadata["num_instances"] for annotations in FOLDERS]
    assert counts == [3, 2]
    with pytest.raises(ConfigError, match="source.annotations='semmi'.*did you mean 'semi'"):
        DavisSource(annotations="semmi")


def test_splits_and_both_roots(copy):
    for root in (TREE, TREE / "DAVIS"):
        source = open_davis(root)
        assert source.keys("train") == ["bike-loop", "cat-jump"]
        assert source.keys("validation") == ["two-dogs"]
        assert not source.background_labelled
    (copy / "ImageSets" / "2017" / "train.txt").write_text("cat-jump\n\nbike-loop")
    assert open_davis(copy).keys("train") == ["cat-jump", "bike-loop"]


def test_a_source_survives_pickling_after_use():
    source = open_davis(TREE)
    before = source.read("train", "cat-jump").instance_ids
    after = pickle.loads(pickle.dumps(source)).read("train", "cat-jump").instance_ids
    assert before is not None and (before == after).all()


def test_numbers_with_gaps_are_kept(copy):
    path = mask_file(copy, "cat-jump", 2)
    picture = Image.open(path)
    indices = np.array(picture)
    changed = Image.fromarray(np.where(indices == 1, np.uint8(254), indices), "P")
    changed.putpalette(picture.getpalette() or [])
    changed.save(path)
    ids = open_davis(copy).read("train", "cat-jump").instance_ids
    assert ids is not None and set(np.unique(ids[2])) == {0, 254}
    assert set(np.unique(ids)) == {0, 1, 254}


def test_an_odd_folder_name_becomes_a_key(copy):
    for folder in ("JPEGImages", "Annotations_unsupervised"):
        shutil.move(copy / folder / "480p" / "cat-jump", copy / folder / "480p" / "cat jump.2")
    (copy / "ImageSets" / "2017" / "train.txt").write_text("bike-loop\ncat jump.2\n")
    source = open_davis(copy)
    assert source.keys("train") == ["bike-loop", "cat_jump_2-id2"]
    assert source.read("train", "cat_jump_2-id2").metadata["video_name"] == "cat jump.2"


# --- damage ---


@pytest.mark.parametrize("keep", [0, 5, 200, -12])
def test_a_cut_png_is_named(copy, keep):
    path = mask_file(copy, "bike-loop", 3)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="bike-loop/00003.png: unreadable PNG"):
        open_davis(copy).read("train", "bike-loop")


def test_no_flipped_bit_of_the_pixels_goes_unnoticed(copy):
    path = mask_file(copy, "cat-jump", 0)
    data = path.read_bytes()
    start = data.index(b"IDAT") + 4
    for position in range(start, len(data) - 12, 41):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(DataError, match="cat-jump/00000.png: unreadable PNG"):
            open_davis(copy).read("train", "cat-jump")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_png_of_another_mode_is_named(copy, mode):
    path = mask_file(copy, "bike-loop", 0)
    Image.open(path).convert(mode).save(path)
    with pytest.raises(DataError, match=f"bike-loop/00000.png: a PNG of mode {mode}; palette indices"):
        open_davis(copy).read("train", "bike-loop")


def test_a_mask_of_another_size_than_its_frame_is_named(copy):
    shutil.copy(mask_file(copy, "bike-loop", 0), mask_file(copy, "cat-jump", 4))
    with pytest.raises(DataError, match="cat-jump/00004.png: 107x60, its frame 80x60"):
        open_davis(copy).read("train", "cat-jump")


def test_a_missing_picture_is_named_on_both_sides(copy):
    mask_file(copy, "bike-loop", 2).unlink()
    with pytest.raises(DataError, match="Annotations_unsupervised/480p/bike-loop/00002.png: file not found"):
        open_davis(copy).read("train", "bike-loop")
    (copy / "JPEGImages" / "480p" / "cat-jump" / "00001.jpg").unlink()
    with pytest.raises(DataError, match="JPEGImages/480p/cat-jump/00001.jpg: file not found"):
        open_davis(copy).read("train", "cat-jump")


def test_a_cut_jpeg_is_named(copy):
    path = copy / "JPEGImages" / "480p" / "cat-jump" / "00001.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match="cat-jump/00001.jpg: unreadable JPEG"):
        open_davis(copy).read("train", "cat-jump")


def test_a_missing_annotation_set_says_which_setting_chose_it(copy):
    shutil.rmtree(copy / "Annotations")
    with pytest.raises(DataError, match="bike-loop: no .png files.*source.annotations=semi"):
        open_davis(copy, "semi").read("train", "bike-loop")
    shutil.rmtree(copy / "JPEGImages" / "480p" / "bike-loop")
    with pytest.raises(DataError, match="JPEGImages/480p/bike-loop: no .jpg files"):
        open_davis(copy).read("train", "bike-loop")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no videos"),
        ("a\nb\na\n", "'a' occurs twice"),
        ("../two-dogs", "the name of a folder"),
        ("..", "the name of a folder"),
        ("\xff", "cannot be read"),
    ],
)
def test_a_broken_list_is_named(copy, text, words):
    (copy / "ImageSets" / "2017" / "val.txt").write_text(text, "latin-1")
    with pytest.raises(DataError, match=f"val.txt: .*{words}"):
        open_davis(copy).keys("validation")


def test_missing_roots_splits_and_keys_are_named(tmp_path, copy):
    with pytest.raises(DataError, match="no JPEGImages/480p, nor DAVIS/JPEGImages/480p"):
        open_davis(tmp_path / "nowhere").keys("train")
    with pytest.raises(DataError, match="split='test' is not in .*; it has train, validation"):
        open_davis(TREE).keys("test")
    with pytest.raises(DataError, match="key='two-dogs'; split train"):
        open_davis(TREE).read("train", "two-dogs")
    (copy / "ImageSets" / "2017" / "val.txt").unlink()
    with pytest.raises(DataError, match="val.txt: cannot be read, No such file"):
        open_davis(copy).keys("validation")
    with pytest.raises(ConfigError, match="root=null"):
        build_source(DavisSource(), None)


# --- OVIS: the layout of its archive, read by the reader of YouTube-VIS ---


def test_the_ovis_archive_is_read_like_youtube_vis(tmp_path):
    shutil.copytree(YTVIS_TREE / "JPEGImages", tmp_path / "train")
    shutil.copy(YTVIS_TREE / "instances.json", tmp_path / "annotations_train.json")
    here, there = (build_source(YtvisSource(num_validation=2), str(root)) for root in (tmp_path, YTVIS_TREE))
    for split in ("train", "validation"):
        assert here.keys(split) == there.keys(split)
        for key in here.keys(split):
            read, wanted = here.read(split, key), there.read(split, key)
            assert (read.frames == wanted.frames).all() and (read.instance_ids == wanted.instance_ids).all()


def test_the_ovis_member_cuts_validation_from_the_train_file():
    source = compose_build(["source=ovis", "features=patch", "root=x", "out=y"]).source
    assert isinstance(source, YtvisSource)
    assert (source.name, source.num_validation, source.resize) == ("ytvis", 60, "crop")
