"""Pascal VOC folders: palette indices become ids, outlines and void none, lists are the splits, damage is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import VocSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import build_source
from data_pipeline.sources.voc import VocImages

HEIGHT, WIDTH = 20, 30
NAMES = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}


def masks(seed: int) -> np.ndarray:
    """Two objects with outlines of void, as in the dataset."""
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[2:9, 3:12] = ids[10:18, 15 + seed : 28] = 255
    ids[3:8, 4:11], ids[11:17, 16 + seed : 27] = 1, 2
    return ids


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationObject", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for name, listed in {**NAMES, "trainaug": [*NAMES["train"], "2008_000002"]}.items():
        (base / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(listed) + "\n")
    for seed, name in enumerate([*NAMES["train"], *NAMES["val"], "2008_000002"]):
        pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / "JPEGImages" / f"{name}.jpg")
        if name != "2008_000002":
            picture = Image.fromarray(masks(seed), "L").convert("P")
            picture.putdata(masks(seed).reshape(-1).tolist())
            picture.save(base / "SegmentationObject" / f"{name}.png")
    return tmp_path


def open_voc(root: Path, train_list: str = "train") -> VocImages:
    source = build_source(VocSource(train_list=train_list), str(root))
    assert isinstance(source, VocImages)
    return source


def test_ids_are_the_palette_indices_without_void(root):
    source = open_voc(root)
    assert source.keys("train") == NAMES["train"] and source.keys("validation") == NAMES["val"]
    for seed, (split, key) in enumerate(
        [("train", NAMES["train"][0]), ("train", NAMES["train"][1]), ("validation", NAMES["val"][0])]
    ):
        clip = source.read(split, key)
        wanted = masks(seed)
        assert clip.frames.shape == (1, HEIGHT, WIDTH, 3) and clip.instance_ids is not None
        np.testing.assert_array_equal(clip.instance_ids[0], np.where(wanted == 255, 0, wanted))
        assert clip.metadata == {"image": key, "num_instances": 2, "num_void": int((wanted == 255).sum())}
    assert not source.background_labelled


@pytest.mark.parametrize("below", [".", "VOCdevkit/VOC2012"])
def test_both_roots_and_pickling(root, below):
    source = open_voc(root / below)
    before = source.read("train", NAMES["train"][1]).instance_ids
    after = pickle.loads(pickle.dumps(source)).read("train", NAMES["train"][1]).instance_ids
    assert before is not None and (before == after).all()


def test_the_augmented_list_has_more_pictures_and_no_masks(root):
    source = open_voc(root, "trainaug")
    assert source.keys("train") == [*NAMES["train"], "2008_000002"]
    assert all(source.read("train", key).instance_ids is None for key in source.keys("train"))
    assert source.read("validation", NAMES["val"][0]).instance_ids is not None


def test_damage_and_wrong_names_are_named(root):
    base = root / "VOCdevkit" / "VOC2012"
    mask = base / "SegmentationObject" / "2007_000032.png"
    Image.open(mask).convert("L").save(mask)
    with pytest.raises(DataError, match="SegmentationObject/2007_000032.png: a PNG of mode L; palette indices"):
        open_voc(root).read("train", "2007_000032")
    mask.unlink()
    with pytest.raises(DataError, match="SegmentationObject/2007_000032.png: unreadable PNG, file not found"):
        open_voc(root).read("train", "2007_000032")
    picture = base / "JPEGImages" / "2007_000033.jpg"
    picture.write_bytes(picture.read_bytes()[:-30])
    with pytest.raises(DataError, match="JPEGImages/2007_000033.jpg: unreadable JPEG"):
        open_voc(root).read("validation", "2007_000033")
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(picture)
    with pytest.raises(DataError, match="2007_000033.png: 30x20, its frame 31x20"):
        open_voc(root).read("validation", "2007_000033")
    with pytest.raises(DataError, match="trainval.txt: cannot be read, No such file"):
        open_voc(root, "trainval").keys("train")
    with pytest.raises(DataError, match="split='test' is not in .*; it has train, validation"):
        open_voc(root).keys("test")
    with pytest.raises(DataError, match="key='2007_000033'; split train"):
        open_voc(root).read("train", "2007_000033")
    with pytest.raises(DataError, match="no JPEGImages, nor VOCdevkit/VOC2012/JPEGImages"):
        open_voc(root / "nowhere").keys("train")
    with pytest.raises(ConfigError, match="source.train_list='trainaugg'"):
        VocSource(train_list="trainaugg")
    with pytest.raises(ConfigError, match="root=null"):
        build_source(VocSource(), None)
