"""COCO folders: polygons and run lengths become one id map, crowds are left out, and every kind of damage is named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from data_pipeline.config import CocoSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import build_source
from data_pipeline.sources.coco import Annotation, CocoImages, Picture, paint

HEIGHT, WIDTH = 40, 50
EMPTY, BUSY, GREY = "000000000009", "000000000139", "000000000025"  # file order


def box(left: int, top: int, right: int, bottom: int) -> list[float]:
    return [float(value) for value in (left, top, right, top, right, bottom, left, bottom)]


def annotation(number: int, image: int, outline: Any, category: int, crowd: int = 0) -> dict[str, Any]:
    return {"id": number, "image_id": image, "segmentation": outline, "category_id": category, "iscrowd": crowd}


def counted(mask: np.ndarray, packed: bool) -> dict[str, Any]:
    """Run lengths of a mask, as a string or as a list."""
    if packed:
        return {"size": list(mask.shape), "counts": coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()}
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel().astype(int)]))) + 1
    runs = np.diff(np.concatenate([[1], edges, [mask.size + 1]]))
    return {"size": list(mask.shape), "counts": runs.tolist()}


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def content() -> dict[str, Any]:
    """Image 9 has nothing; 139 has polygons, run lengths and a crowd, not in the order of ids; 25 is grey, with one polygon."""
    sizes = {9: (HEIGHT, WIDTH), 139: (HEIGHT, WIDTH), 25: (30, 20)}
    return {
        "images": [
            {"id": number, "file_name": f"{number:012d}.jpg", "height": height, "width": width}
            for number, (height, width) in sizes.items()
        ],
        "annotations": [
            annotation(907, 139, counted(rectangle(30, 20, 45, 35), packed=True), 3),
            annotation(12, 139, [box(5, 5, 20, 15), box(30, 2, 40, 8)], 62),
            annotation(13, 139, counted(rectangle(0, 0, 50, 40), packed=False), 1, crowd=1),
            annotation(40, 139, [box(10, 10, 32, 25)], 62),
            annotation(50, 25, [box(2, 3, 9, 11)], 18),
        ],
        "categories": [{"id": 3, "name": "car"}],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, content())
    random = np.random.default_rng(3)
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        for number, size in ((9, (HEIGHT, WIDTH, 3)), (139, (HEIGHT, WIDTH, 3)), (25, (30, 20))):
            pixels = random.integers(0, 256, size, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{number:012d}.jpg")
    return tmp_path


def write(root: Path, train: Any) -> None:
    folder = root / "annotations"
    folder.mkdir(exist_ok=True)
    (folder / "instances_train2017.json").write_text(json.dumps(train))
    (folder / "instances_val2017.json").write_text(json.dumps({**content(), "images": content()["images"][:1]}))


def open_coco(root: Path) -> CocoImages:
    source = build_source(CocoSource(), str(root))
    assert isinstance(source, CocoImages)
    return source


def rewrite(root: Path, change: Callable[[dict[str, Any]], Any]) -> CocoImages:
    """Change the annotations of the train split."""
    changed = content()
    change(changed)
    write(root, changed)
    return open_coco(root)


# --- what must come out ---


def test_polygons_and_run_lengths_are_painted_in_the_order_of_ids_without_the_crowd(root):
    clip = open_coco(root).read("train", BUSY)
    wanted = np.zeros((HEIGHT, WIDTH), np.uint8)
    wanted[5:15, 5:20] = wanted[2:8, 30:40] = 1
    wanted[10:25, 10:32] = 2
    wanted[20:35, 30:45] = 3
    assert clip.instance_ids is not None and clip.instance_ids.dtype == np.uint8
    np.testing.assert_array_equal(clip.instance_ids, wanted[None])
    assert clip.frames.shape == (1, HEIGHT, WIDTH, 3)
    assert clip.metadata == {"image_id": 139, "num_instances": 3, "categories": [62, 62, 3]}
    json.dumps(dict(clip.metadata))


def test_an_image_without_annotations_has_no_objects(root):
    clip = open_coco(root).read("train", EMPTY)
    assert clip.instance_ids is not None and clip.instance_ids.shape == (1, HEIGHT, WIDTH)
    assert not clip.instance_ids.any() and clip.metadata["num_instances"] == 0


def test_a_grey_image_becomes_rgb(root):
    clip = open_coco(root).read("train", GREY)
    assert clip.frames.shape == (1, 30, 20, 3)
    assert (clip.frames[..., 0] == clip.frames[..., 2]).all()
    assert clip.instance_ids is not None and clip.instance_ids.sum() == 7 * 8


def test_splits_and_keys(root):
    source = open_coco(root)
    assert source.keys("train") == [EMPTY, BUSY, GREY]
    assert source.keys("validation") == [EMPTY]
    assert not source.background_labelled
    (root / "annotations" / "instances_val2017.json").unlink()
    assert open_coco(root).keys("train") == [EMPTY, BUSY, GREY]  # a split needs only its own file
    with pytest.raises(DataError, match="instances_val2017.json: cannot be read, No such file"):
        open_coco(root).keys("validation")


def test_a_source_survives_pickling_and_sends_no_annotations(root):
    source = open_coco(root)
    before = source.read("train", BUSY).instance_ids
    sent = pickle.dumps(source)
    assert len(sent) < 500
    after = pickle.loads(sent).read("train", BUSY).instance_ids
    assert before is not None and (before == after).all()


def test_what_encloses_nothing_paints_nothing_and_keeps_its_number(root):
    def flatten(changed):
        changed["annotations"][1]["segmentation"] = [[3.0, 3.0, 30.0, 30.0]]
        changed["annotations"][3]["segmentation"] = []

    clip = rewrite(root, flatten).read("train", BUSY)
    assert clip.instance_ids is not None and set(np.unique(clip.instance_ids)) == {0, 3}
    assert clip.metadata["num_instances"] == 3


coordinate = st.floats(-10, 60, allow_nan=False).map(lambda value: round(value, 2))
polygon = st.integers(3, 7).flatmap(lambda corners: st.lists(coordinate, min_size=2 * corners, max_size=2 * corners))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' decode, which only tests call
@given(st.lists(polygon, min_size=1, max_size=3))
def test_any_polygons_are_filled_as_pycocotools_fills_them(polygons):
    wanted = coco.decode(coco.frPyObjects(polygons, HEIGHT, WIDTH)).any(axis=-1)
    outline = [np.array(values) for values in polygons]
    ids = paint(Picture(1, "1.jpg", (HEIGHT, WIDTH), (Annotation(5, 1, 1, False, outline),)), "here")
    np.testing.assert_array_equal(ids[0], wanted)


def test_many_objects_need_a_wider_type():
    annotations = tuple(Annotation(number, 1, 1, False, [np.array(box(0, 0, 5, 5))]) for number in range(300))
    ids = paint(Picture(1, "1.jpg", (7, 6), annotations), "here")
    assert ids.dtype == np.uint16 and ids.max() == 300


# --- damage ---


@pytest.mark.parametrize(
    ("outline", "words"),
    [
        ({"size": [WIDTH, HEIGHT], "counts": [2000]}, r"annotation 12, frame 0: the mask is \[50, 40\], its frame \[40, 50\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [1999]}, "annotation 12, frame 0: broken mask"),
        ({"counts": [2000]}, "annotation 12, frame 0: a segmentation must"),
        ("text", "annotation 12, frame 0: a segmentation must"),
        ([[1, 2, 3, 4, 5, 6, 7]], "annotation 12: a polygon must be a list of numbers"),
        ([1, 2, 3, 4, 5, 6], "annotation 12: a polygon must be a list of numbers"),
        ([["a", 2, 3, 4, 5, 6]], "annotation 12: a polygon must be a list of numbers"),
        ([[[1, 2], [3, 4], [5, 6]]], "annotation 12: a polygon must be a list of numbers"),
        ([None], "annotation 12: a polygon must be a list of numbers"),
        ([[1, 2, 3, 4, 5, 1e12]], "annotation 12: a polygon leaves the image of 50x40"),
        ([[1, 2, 3, 4, 5, float("nan")]], "annotation 12: a polygon leaves the image"),
        ([[1, 2, 3, 4, 5, float("-inf")]], "annotation 12: a polygon leaves the image"),
    ],
)
def test_a_broken_outline_is_named_and_harms_no_other_image(root, outline, words):
    source = rewrite(root, lambda changed: changed["annotations"][1].update(segmentation=outline))
    with pytest.raises(DataError, match=f"instances_train2017.json, image 139, {words}"):
        source.read("train", BUSY)
    assert source.read("train", GREY).metadata["num_instances"] == 1


def test_an_image_of_another_size_than_its_annotations_is_named(root):
    source = rewrite(root, lambda changed: changed["images"][1].update(width=HEIGHT, height=WIDTH))
    with pytest.raises(DataError, match="train2017/000000000139.jpg: 50x40, its annotations 40x50"):
        source.read("train", BUSY)


@pytest.mark.parametrize("keep", [0, 100, -40])
def test_a_cut_image_is_named(root, keep):
    path = root / "train2017" / f"{BUSY}.jpg"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="train2017/000000000139.jpg: unreadable JPEG"):
        open_coco(root).read("train", BUSY)
    path.unlink()
    with pytest.raises(DataError, match="train2017/000000000139.jpg: unreadable JPEG, file not found"):
        open_coco(root).read("train", BUSY)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda changed: changed.pop("annotations"), "KeyError 'annotations'"),
        (lambda changed: changed.update(images=3), "not COCO instances"),
        (lambda changed: changed["images"][0].pop("height"), "KeyError 'height'"),
        (lambda changed: changed["images"][0].update(file_name="../secret.jpg"), "image id=9 has file_name='../secret.jpg'"),
        (lambda changed: changed["images"][0].update(id=-1), "image id=-1"),
        (lambda changed: changed["images"][0].update(id=139), "3 images with 2 ids"),
        (lambda changed: changed.update(images=[]), "no images"),
        (lambda changed: changed["annotations"][0].pop("image_id"), "KeyError 'image_id'"),
        (lambda changed: changed["annotations"][0].pop("segmentation"), "not COCO instances"),
        (lambda changed: changed["annotations"][0].update(id=float("inf")), "not COCO instances"),
    ],
)
def test_broken_annotations_are_named(root, change, words):
    with pytest.raises(DataError, match=f"instances_train2017.json: .*{words}"):
        rewrite(root, change).keys("train")


@pytest.mark.parametrize("text", ["[]", '{"images": [', "\xff", "null"])
def test_a_file_that_is_no_annotation_file_is_named(root, text):
    (root / "annotations" / "instances_train2017.json").write_text(text, "latin-1")
    with pytest.raises(DataError, match="instances_train2017.json: .*not COCO instances"):
        open_coco(root).keys("train")


def test_missing_roots_splits_and_keys_are_named(root):
    with pytest.raises(DataError, match="nowhere/train2017 is not a folder"):
        open_coco(root / "nowhere").keys("train")
    with pytest.raises(DataError, match="split='test' is not in .*; it has train, validation"):
        open_coco(root).keys("test")
    with pytest.raises(DataError, match="key='000000000139'; split validation"):
        open_coco(root).read("validation", BUSY)
    with pytest.raises(ConfigError, match="root=null"):
        build_source(CocoSource(), None)
