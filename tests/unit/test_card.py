"""The dataset card: it says what the index says, never where it was built, and the code on it runs."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build import build, compose_build
from data_pipeline.card import CARD_NAME, MARK, OTHER_NAME, card, main, write_card
from data_pipeline.errors import DataError
from data_pipeline.shards import INDEX_NAME, DatasetIndex
from data_pipeline.sources import SOURCES
from data_pipeline.store import ShardDataset
from tests.unit.tiny_shards import write_split


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A build with two training shards and the default codec."""
    out = tmp_path_factory.mktemp("card") / "shards"
    words = "source=synthetic source.num_train=3 source.num_validation=1 source.num_frames=3 source.image_size=32 features=patch "
    words += "features.num_random=8 features.num_components=4 features.num_fit_clips=3 samples_per_shard=2 workers=1"
    build(compose_build([*words.split(), f"out={out}"]))
    return out


def copy_of(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "elsewhere" / "copy"))


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_it_says_what_was_built(built):
    text = card(built)
    train, validation = (DatasetIndex.load(built / split) for split in ("train", "validation"))
    assert text.startswith(MARK) and text.index("| train | 3 | 9 | 3 | 32x32 |") < text.index("| validation | 1 | 3 |")
    for words in (
        train.version[:16],
        validation.version[:16],
        str(train.features["fingerprint"])[:16],
        "`center`, `center+hflip`",
    ):
        assert words in text
    assert f"`{train.features['codec']}`: error {train.codec_error:.2g}" in text
    assert "4 x 4 patches x 10 channels" in text and "difficulty=easy" in text and "0 is annotated background" in text
    assert "Left out" not in text


def test_the_same_shards_elsewhere_have_the_same_card(built, tmp_path):
    there = copy_of(built, tmp_path)
    assert write_card(there) == there / CARD_NAME
    first = (there / CARD_NAME).read_bytes()
    write_card(there)
    assert (there / CARD_NAME).read_bytes() == first == card(built).encode()
    assert str(built) not in first.decode() and "elsewhere" not in first.decode()


def test_the_code_on_it_runs_and_both_ways_read_the_same_features(built, tmp_path, capsys):
    """Ours, and stock webdataset's with the codec undone by hand."""
    there = copy_of(built, tmp_path)
    ours: dict = {}
    theirs: dict = {}
    for code, names in zip(code_blocks(card(there)), (ours, theirs), strict=True):
        exec(compile(code.replace("FOLDER", str(there)), "card", "exec"), names)
    assert ours["features"].shape == (1, 16, 10) and ours["frames"].shape == (1, 32, 32, 3) == (*ours["ids"].shape, 3)
    np.testing.assert_array_equal(theirs["features"][:1], ours["features"])
    assert "(3, 16, 10)" in capsys.readouterr().out
    ours["split"].close()


def test_the_settings_on_it_fit_the_shards(built):
    from data_pipeline.config import DataConfig

    words = dict(re.findall(r"data\.(\w+)=(\S+)", card(built)))
    views = words.pop("views").strip("[]").split(",")
    config = DataConfig(**{**words, "image_size": int(words["image_size"]), "views": views})
    for split in (config.train_split, config.val_split):
        dataset = ShardDataset.open(built / split)
        dataset.check(config, views if split == "train" else ["center"])
        dataset.close()


@pytest.mark.parametrize("codec", ["float16", "float32"])
def test_plain_codecs_need_no_statistics(tmp_path, codec, capsys):
    write_split(tmp_path, frames=((3,),), codec=codec)
    text = card(tmp_path)
    assert "statistics" not in text and "error not measured" in text and "train-000000.tar" in text and "train-{" not in text
    theirs: dict = {}
    exec(compile(code_blocks(text)[1].replace("FOLDER", str(tmp_path)), "card", "exec"), theirs)
    assert theirs["features"].shape == (3, 6, 5)


def test_videos_that_were_left_out_are_listed_without_paths(tmp_path):
    folder = write_split(tmp_path)
    index = DatasetIndex.load(folder)
    reason = "/home/someone/data/JPEGImages/cat/00001.jpg: unreadable JPEG, cut; copy it again"
    index.skipped.extend({"key": f"cat{number}", "reason": reason} for number in range(23))
    DatasetIndex(
        **{name: getattr(index, name) for name in ("dataset", "features", "shards", "samples", "skipped", "codec_error")}
    ).save(folder)
    text = card(tmp_path)
    assert "- train, `cat19`: 00001.jpg: unreadable JPEG, cut; copy it again" in text and "and 3 more" in text
    assert "someone" not in text and "`cat20`" not in text


def test_nothing_is_said_of_ids_where_there_are_none(tmp_path):
    folder = write_split(tmp_path)
    assert "instance ids" in card(tmp_path)
    index = DatasetIndex.load(folder)
    samples = [dataclasses.replace(sample, num_instances=None) for sample in index.samples]
    dataclasses.replace(index, samples=samples).save(folder)
    assert "instance ids" not in card(tmp_path) and "| not annotated |" in card(tmp_path)


def test_a_file_that_someone_else_wrote_is_left_alone(tmp_path):
    write_split(tmp_path)
    (tmp_path / CARD_NAME).write_text("my own notes")
    assert write_card(tmp_path) == tmp_path / OTHER_NAME
    assert (tmp_path / CARD_NAME).read_text() == "my own notes" and (tmp_path / OTHER_NAME).read_text().startswith(MARK)


def test_the_command_writes_the_card_anew(built, capsys):
    (built / CARD_NAME).unlink()
    assert main([str(built)]) == 0
    assert capsys.readouterr().out.strip() == str(built / CARD_NAME) and (built / CARD_NAME).read_text() == card(built)


def test_without_an_index_there_is_no_card(tmp_path):
    with pytest.raises(DataError, match=f"no {INDEX_NAME} one level below"):
        write_card(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_source_has_its_terms():
    from data_pipeline.card import ORIGINS

    assert set(ORIGINS) == set(SOURCES)
