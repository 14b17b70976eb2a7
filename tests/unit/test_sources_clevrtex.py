"""ClevrTex folders: the official split by number, the official square, exact ids, and damage named."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import ClevrTexSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import build_source
from data_pipeline.sources.clevrtex import ClevrTexImages

HEIGHT, WIDTH, COUNT = 24, 32, 30


def ids_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 11, (HEIGHT, WIDTH), dtype=np.uint8)


def pixels_of(number: int) -> np.ndarray:
    return np.random.default_rng(100 + number).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten pictures a folder, with alpha, as the archive has them."""
    for number in range(COUNT):
        folder = tmp_path / "clevrtex_full" / str(number // 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_of(number)).save(folder / f"CLEVRTEX_full_{number:06d}.png")
        Image.fromarray(ids_of(number)).save(folder / f"CLEVRTEX_full_{number:06d}_flat.png")
        (folder / f"CLEVRTEX_full_{number:06d}.json").write_text("{}")
    return tmp_path


def open_clevrtex(root: Path, **settings: Any) -> ClevrTexImages:
    source = build_source(ClevrTexSource(**settings), str(root))
    assert isinstance(source, ClevrTexImages)
    return source


def test_the_first_tenth_is_test_the_next_validation(root):
    for folder in (root, root / "clevrtex_full"):
        source = open_clevrtex(folder)
        assert source.keys("test") == ["000000", "000001", "000002"]
        assert source.keys("validation") == ["000003", "000004", "000005"]
        assert source.keys("train") == [f"{number:06d}" for number in range(6, COUNT)]
    assert source.background_labelled


def test_pictures_and_ids_and_the_official_square(root):
    whole = open_clevrtex(root, official_crop=False).read("train", "000017")
    np.testing.assert_array_equal(whole.frames[0], pixels_of(17)[..., :3])
    np.testing.assert_array_equal(whole.instance_ids, ids_of(17)[None])
    assert whole.metadata == {"image": "CLEVRTEX_full_000017.png", "num_instances": 10}
    cut = open_clevrtex(root).read("train", "000017")
    np.testing.assert_array_equal(cut.frames[0], pixels_of(17)[2:21, 6:25, :3])  # 19 = int(0.8 * 24) pixels about the middle
    np.testing.assert_array_equal(cut.instance_ids, ids_of(17)[None, 2:21, 6:25])
    assert cut.frames.flags.writeable


def test_a_palette_gives_its_indices_and_a_source_survives_pickling(root):
    path = root / "clevrtex_full" / "2" / "CLEVRTEX_full_000029_flat.png"
    picture = Image.fromarray(ids_of(29))
    picture.putpalette([255 - value for value in range(33)])
    picture.save(path)
    assert Image.open(path).mode == "P"
    source = pickle.loads(pickle.dumps(open_clevrtex(root, official_crop=False)))
    np.testing.assert_array_equal(source.read("train", "000029").instance_ids, ids_of(29)[None])


def test_the_set_without_splits_is_all_test(root):
    folder = root / "clevrtex_outd"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(pixels_of(number)).save(folder / f"CLEVRTEX_outd_{number:06d}.png")
    source = open_clevrtex(root, variant="outd")
    assert source.keys("test") == ["000000", "000001"]
    with pytest.raises(DataError, match="split='train' is not in .*; it has test"):
        source.keys("train")


def test_damage_and_gaps_are_named(root):
    folder = root / "clevrtex_full" / "1"
    flat = folder / "CLEVRTEX_full_000015_flat.png"
    Image.fromarray(pixels_of(15)).save(flat)
    with pytest.raises(DataError, match="000015_flat.png: a PNG of mode RGBA; P or L or I;16"):
        open_clevrtex(root).read("train", "000015")
    Image.fromarray(ids_of(15).T).save(flat)
    with pytest.raises(DataError, match="000015_flat.png: 24x32, its picture 32x24"):
        open_clevrtex(root).read("train", "000015")
    flat.unlink()
    with pytest.raises(DataError, match="000015_flat.png: unreadable PNG, file not found"):
        open_clevrtex(root).read("train", "000015")
    picture = folder / "CLEVRTEX_full_000016.png"
    picture.write_bytes(picture.read_bytes()[:-20])
    with pytest.raises(DataError, match="000016.png: unreadable PNG"):
        open_clevrtex(root).read("train", "000016")
    with pytest.raises(DataError, match="key='000003'; split train"):
        open_clevrtex(root).read("train", "000003")
    (folder.parent / "2" / picture.name).write_bytes(b"")
    with pytest.raises(DataError, match="000016.png: number 000016 is .*1/CLEVRTEX_full_000016.png too"):
        open_clevrtex(root).keys("train")
    (folder.parent / "2" / picture.name).unlink()
    picture.unlink()
    with pytest.raises(DataError, match="no CLEVRTEX_full_000016.png; numbers must have no gap"):
        open_clevrtex(root).keys("train")


def test_wrong_roots_and_settings_are_named(root):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_clevrtex(root / "nowhere").keys("train")
    with pytest.raises(DataError, match="no CLEVRTEX_vbg_000000.png at any depth"):
        open_clevrtex(root, variant="vbg").keys("train")
    for path in root.rglob("*.png"):
        if int(path.name[14:20]) > 7:
            path.unlink()
    with pytest.raises(DataError, match="split='test' of .* is empty; 8 pictures are too few"):
        open_clevrtex(root).keys("test")
    with pytest.raises(ConfigError, match="source.variant='ful'"):
        ClevrTexSource(variant="ful")
    with pytest.raises(ConfigError, match="root=null"):
        build_source(ClevrTexSource(), None)
