"""The channel statistics of a build: where they come from, that they are one set for all splits, and what is said without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_build import FakeExtractor, FakeSource, config_for, contents, fake_extractor, fake_source

from data_pipeline.build import build
from data_pipeline.build_settings import evenly
from data_pipeline.errors import DataError
from data_pipeline.shards import DatasetIndex
from data_pipeline.store import ShardDataset
from data_pipeline.views import prepare

source = pytest.fixture(fake_source, name="source")
extractor = pytest.fixture(fake_extractor, name="extractor")


def statistics(out: Path, split: str) -> dict[str, Any]:
    return DatasetIndex.load(out / split).features["statistics"]


def test_int8_is_the_default_and_close_to_the_features(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    build(config_for(tmp_path))
    train = ShardDataset.open(tmp_path / "train")
    quality = train.index.features["quality"]
    assert train.index.features["codec"] == "int8" and train.index.codec_error == quality["err_std"]
    assert 0 < quality["err_std"] < 0.02 and quality["cosine_loss"] < 1e-4 and 0.5 < quality["nearest_neighbour"] <= 1
    deviation = np.asarray(statistics(tmp_path, "train")["scale"])
    clip = source.read("train", "train_2")
    exact = extractor(prepare(clip.frames, "center", 8, "crop", clip.key)).numpy()
    found = train.features(2, "center", 0, clip.num_frames)
    assert np.abs((found - exact) / deviation).max() < 0.05 and not np.array_equal(found, exact)


def test_statistics_are_those_of_the_training_frames_and_of_all_splits(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor
) -> None:
    """As many frames as there are: then the sample is the whole split."""
    build(config_for(tmp_path, codec_fit_frames=28))
    clips = [source.read("train", key) for key in source.keys("train")]
    tokens = np.concatenate([extractor(prepare(c.frames, "center", 8, "crop", c.key)).numpy().reshape(-1, 3) for c in clips])
    found = statistics(tmp_path, "train")
    np.testing.assert_allclose(found["mean"], tokens.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["scale"], tokens.std(axis=0), rtol=1e-4)
    assert statistics(tmp_path, "validation") == found
    assert json.loads((tmp_path / "settings.json").read_text())["statistics"] == found


@pytest.mark.parametrize("splits", [["validation", "train"], ["validation"], ["train"]])
def test_the_order_of_the_splits_changes_nothing(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, splits: list[str]
) -> None:
    build(config_for(tmp_path / "both"))
    build(config_for(tmp_path / "out", splits=splits))
    build(config_for(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "both")


def test_statistics_are_taken_once(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    build(config_for(tmp_path))
    whole = contents(tmp_path)
    (tmp_path / "validation" / "validation-000000.tar").unlink()
    source.broken = {key for key in source.keys("train")}  # could not be taken a second time
    build(config_for(tmp_path))
    build(config_for(tmp_path, splits=["validation"], overwrite=True))
    assert contents(tmp_path) == whole


def test_a_build_killed_before_it_noted_them_takes_the_same(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    build(config_for(tmp_path))
    whole = contents(tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["statistics"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    build(config_for(tmp_path))
    assert contents(tmp_path) == whole


def test_few_frames_are_spread_over_the_videos(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.build_settings.STATISTICS_VIDEOS", 3)
    source.reads.clear()
    build(config_for(tmp_path, codec_fit_frames=3, splits=["validation"]))
    assert [key for split, key in source.reads if split == "train"] == ["train_0", "train_2", "train_4"]
    assert evenly(list(range(7)), 3) == [0, 2, 4] and evenly([5, 6], 3) == [5, 6]


def test_an_unreadable_training_video_is_left_out_of_the_sample(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor
) -> None:
    source.broken = {"train_3"}
    build(config_for(tmp_path, max_skip_fraction=0.5))
    assert len(DatasetIndex.load(tmp_path / "train").samples) == 6


def test_without_a_training_split_another_codec_is_named(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.broken = set(source.keys("train"))
    with pytest.raises(DataError, match=r"codec=int8 .* split train: .*7 of 7 chosen videos .*_0.jpg: cut off.*codec=float16"):
        build(config_for(tmp_path, splits=["validation"]))
    keys = source.keys
    monkeypatch.setattr(source, "keys", lambda split: [] if split == "train" else keys(split))
    with pytest.raises(DataError, match="codec=int8 .* split train has no videos.*codec=float16"):
        build(config_for(tmp_path, splits=["validation"]))
    assert not list(tmp_path.rglob("*.tar"))
    build(config_for(tmp_path / "plain", splits=["validation"], codec="float16"))
    assert DatasetIndex.load(tmp_path / "plain" / "validation").features["statistics"] is None


def test_features_that_are_not_finite_stop_the_build(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    extractor.gain = float("inf")
    with pytest.raises(DataError, match="codec=int8 .* not finite"):
        build(config_for(tmp_path))
