"""Features taken in the training loop: the numbers that a build would have stored, whatever view, size or extractor."""

from __future__ import annotations

import itertools
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_build import FakeExtractor, FakeSource, config_for, fake_source
from safetensors.torch import save_file
from tiny_shards import data_config, write_split

from data_pipeline import verify
from data_pipeline.batch import ClipBatch
from data_pipeline.build import build, compose_build
from data_pipeline.card import card
from data_pipeline.clip import Clip
from data_pipeline.config import BuildConfig, DataConfig, FeaturesConfig, OnlineConfig, SourceConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.features import EXTRACTORS
from data_pipeline.inspect import main as inspect_main
from data_pipeline.loader import ClipLoader, VideoLoader
from data_pipeline.online import OnlineFeatures
from data_pipeline.order import World
from data_pipeline.store import ShardDataset
from data_pipeline.views import prepare

CPU, ALONE = torch.device("cpu"), World()
VIEWS = ["center", "center+hflip", "crop0", "crop1+hflip"]
source = pytest.fixture(fake_source, name="source")


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> FakeExtractor:
    fake = FakeExtractor()
    monkeypatch.setitem(EXTRACTORS, "mean", lambda config, device=None: fake)
    return fake


def read(config: DataConfig, count: int = 6, world: World = ALONE, accumulation: int = 1) -> list[ClipBatch]:
    online = OnlineFeatures(config, CPU) if config.input == "frames" else lambda batch: batch
    with ClipLoader(config, world, seed=3, global_batch=5, accumulation=accumulation) as loader:
        return [online(batch.to(CPU)) for batch in itertools.islice(loader, count)]


def assert_alike(stored: ClipBatch, online: ClipBatch, tolerance: float = 1e-6) -> None:
    names = ("sample_ids", "keys", "starts", "num_real", "epoch", "step", "grid", "num_frames")
    assert [getattr(stored, name) for name in names] == [getattr(online, name) for name in names]
    assert online.codec == "float32" and online.features.is_contiguous() and not online.features.requires_grad
    torch.testing.assert_close(online.decoded(), stored.decoded(), rtol=tolerance, atol=tolerance)


def fake_config(folder: Path, **changes: Any) -> DataConfig:
    values = {"features": "mean", "layer": "pixels", "image_size": 8, "clip_len": 2, "views": VIEWS}
    return DataConfig(**{"root": str(folder), **values, **changes})


def test_every_view_has_the_numbers_that_a_build_stores(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    """Frames of 10 x 14 pixels: scaled, cut and mirrored."""
    made = SourceConfig(name="fake", image_size=8, train_views=VIEWS, resize="crop")
    build(config_for(tmp_path, source=made, codec="float32"))
    stored, frames = fake_config(tmp_path), fake_config(tmp_path, input="frames")
    for one, other in zip(read(stored), read(frames), strict=True):
        assert_alike(one, other)
    for one, other in zip(*(read(config, 3, World(1, 2), accumulation=2) for config in (stored, frames)), strict=True):
        assert one.size == 4 and one.num_real == 3
        assert_alike(one, other)
    with VideoLoader(stored, World()) as whole, VideoLoader(frames, World(), finish=OnlineFeatures(frames, CPU)) as taken:
        for one, other in zip(whole, taken, strict=True):
            assert_alike(one, other)
            assert one.instance_ids is not None and torch.equal(one.instance_ids, other.instance_ids)
    with ClipLoader(frames, World(), seed=3, global_batch=5) as loader:
        raw = next(loader)
    assert raw.features.dtype == torch.uint8 and raw.features.shape == (5, 2, 10, 14, 3)


def test_videos_of_several_sizes_meet_in_one_batch(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are cut on the host, and rounded to 8 bits."""
    whole = source.read

    def narrower(split: str, key: str) -> Clip:
        clip = whole(split, key)
        return replace(clip, frames=clip.frames[:, :, : 14 - int(key.split("_")[1])], instance_ids=None)

    monkeypatch.setattr(source, "read", narrower)
    made = SourceConfig(name="fake", image_size=8, train_views=VIEWS, resize="crop")
    build(config_for(tmp_path, source=made, codec="float32"))
    pairs = list(zip(read(fake_config(tmp_path)), read(fake_config(tmp_path, input="frames")), strict=True))
    for one, other in pairs:
        assert_alike(one, other, tolerance=0.5 / 255 + 1e-6)
    assert any(not torch.allclose(one.features, other.features, atol=1e-6) for one, other in pairs)


@pytest.fixture(scope="module")
def patch_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("online") / "shards"
    words = "source=synthetic source.num_train=5 source.num_validation=2 source.num_frames=9 source.image_size=32 features=patch "
    words += "features.num_random=8 features.num_components=4 features.num_fit_clips=3 samples_per_shard=2 workers=1 "
    words += "codec=float32 frames=png"
    build(compose_build([*words.split(), f"out={out}"]))
    return out


def test_an_extractor_that_looks_at_the_frame_before(patch_shards: Path) -> None:
    """A window that begins inside the video, and one at its beginning."""
    stored = DataConfig(root=str(patch_shards), features="patch", layer="slow", image_size=32, clip_len=3)
    frames = replace(stored, input="frames")
    starts = set()
    for one, other in zip(read(stored), read(frames), strict=True):
        assert_alike(one, other, tolerance=1e-4)
        starts |= set(one.starts)
    assert starts == {0, 3, 6}
    with VideoLoader(frames, World(), finish=OnlineFeatures(frames, CPU)) as loader:
        expected = loader.dataset.features(0, "center", 0, 9)
        torch.testing.assert_close(next(iter(loader)).features[0], torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_once", [1, 4, 64])
def test_a_vision_transformer_in_chunks(tmp_path: Path, source: FakeSource, at_once: int) -> None:
    from test_features_vit import meta_weights

    save_file(meta_weights(depth=1), tmp_path / "model.safetensors")
    made = SourceConfig(name="fake", image_size=8, train_views=["center", "crop0"], resize="crop")
    weights = str(tmp_path / "model.safetensors")
    build(config_for(tmp_path / "out", source=made, features=FeaturesConfig(name="dinov2", weights=weights), codec="float32"))
    stored = DataConfig(root=str(tmp_path / "out"), features="dinov2", image_size=8, clip_len=2, views=["center", "crop0"])
    frames = replace(stored, input="frames", online=OnlineConfig(weights=weights, batch_frames=at_once))
    for one, other in zip(read(stored, 2), read(frames, 2), strict=True):
        assert_alike(one, other, tolerance=1e-4)
    online = OnlineFeatures(frames, CPU)
    assert online.extractor.fingerprint == ShardDataset.open(tmp_path / "out" / "train").index.features["fingerprint"]
    with torch.autocast("cpu", torch.bfloat16):  # the trainer's own choice does not reach it
        again = online(next(iter(ClipLoader(frames, World(), seed=3, global_batch=5))))
    torch.testing.assert_close(again.features, read(frames, 1)[0].features)


def test_new_crops_every_time_are_the_same_for_every_world(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    build(config_for(tmp_path, features=FeaturesConfig(name="none", layer="none")))
    config = fake_config(tmp_path, input="frames", views=["crop*"])

    def cuts(world: World, position: int = 0) -> list[tuple]:
        with ClipLoader(config, world, seed=1, global_batch=6, position=position) as loader:
            batches = list(itertools.islice(loader, 4 - position // 6))
        return [list(zip(batch.keys, batch.cuts, strict=True))[: batch.num_real] for batch in batches]

    alone = cuts(World())
    assert alone[2:] == cuts(World(), position=12)
    for one, parts in zip(alone, zip(cuts(World(0, 2)), cuts(World(1, 2)), strict=True), strict=True):
        assert sorted(one) == sorted(itertools.chain(*parts))
    drawn: dict[str, set] = {}
    for key, cut in itertools.chain(*alone):
        drawn.setdefault(key, set()).add(cut)
    assert max(map(len, drawn.values())) > 1


def test_shards_without_features(tmp_path: Path, source: FakeSource, extractor: FakeExtractor, capsys: Any) -> None:
    """Frames and ids alone: sound, shown, described, and trained on."""
    build(config_for(tmp_path / "none", features=FeaturesConfig(name="none", layer="none")))
    build(config_for(tmp_path / "mean"))
    said = capsys.readouterr().out
    assert "no features" in said and verify.main([str(tmp_path / "none")]) == 0
    with tarfile.open(tmp_path / "none/train/train-000000.tar") as shard:
        assert not [name for name in shard.getnames() if "features" in name]
    assert inspect_main([str(tmp_path / "none"), "--out", str(tmp_path)]) == 0 and (tmp_path / "train.png").is_file()
    shown = capsys.readouterr().out
    assert "none: frames alone" in shown and "codec" not in shown
    text = card(tmp_path / "none")
    assert "data.input=frames" in text and "fingerprint" not in text
    names: dict[str, Any] = {}
    code = text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "none"))
    exec(compile(code, "card", "exec"), names)
    assert names["frames"].shape == (1, 10, 10, 3) and names["ids"] is None
    config = fake_config(tmp_path / "none", input="frames", views=["crop7+hflip"])
    for batch in read(config, 2):
        for key, start, features in zip(batch.keys, batch.starts, batch.features, strict=True):
            frames = source.read("train", key).frames[start : start + 2]
            expected = extractor(prepare(frames, "crop7+hflip", 8, "crop", key))
            torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path: Path, source: FakeSource, extractor: FakeExtractor, patch_shards: Path) -> None:
    build(config_for(tmp_path / "none", features=FeaturesConfig(name="none", layer="none")))
    with pytest.raises(DataError, match=r"hold no features.*data\.input=frames"):
        ClipLoader(fake_config(tmp_path / "none"), World(), seed=0, global_batch=2)
    write_split(tmp_path / "bare", pictures=False)
    with pytest.raises(DataError, match=r"3 of 3 videos have no frames.*frames=jpeg"):
        ClipLoader(data_config(tmp_path / "bare", input="frames"), World(), seed=0, global_batch=2)
    for changes, message in (
        ({"codec": "int8"}, r"data\.codec=int8.*drop data\.codec"),
        ({"views": ["left"]}, r"view='left'"),
        ({"input": "pixels"}, r"data\.input='pixels'.*features, frames"),
    ):
        with pytest.raises(ConfigError, match=message):
            fake_config(tmp_path, **{"input": "frames", **changes})
    with pytest.raises(ConfigError, match=r"features=none, frames=none"):
        BuildConfig(source=SourceConfig(name="fake"), features=FeaturesConfig(name="none"), out="x", frames="none")
    for changes, message in (
        ({"features": "none"}, r"data\.features='none'"),
        ({"features": "dinov3"}, r"data\.features='dinov3' is not known"),
        ({"image_size": 10}, r"data\.image_size=10.*multiple of its patch size 4.*data\.image_size=8"),
        ({"layer": "last_block"}, r"data\.layer=last_block; mean has pixels"),
        ({"features": "patch", "layer": "slow"}, r"projection.safetensors does not exist"),
        ({"features": "patch", "layer": "slow", "root": "s3://bucket/x"}, r"data\.online\.weights is not set"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            OnlineFeatures(fake_config(tmp_path, **{"input": "frames", **changes}), CPU)
    named = fake_config(tmp_path, input="frames", features="patch", layer="slow", online=OnlineConfig(weights=str(patch_shards)))
    assert OnlineFeatures(named, CPU).grid == (1, 1)


def test_a_damaged_frame_is_one_sample_skipped(tmp_path: Path) -> None:
    folder = write_split(tmp_path, frames=((4, 4, 4),))
    place = ShardDataset.open(folder).index.samples[1].members["frames"]
    with (folder / "train-000000.tar").open("r+b") as file:
        for offset in place["offset"]:
            file.seek(offset + 40)
            file.write(b"\xff\x00\xff")
    config = data_config(tmp_path, input="frames", max_skip_fraction=0.5)
    with ClipLoader(config, World(), seed=0, global_batch=3) as loader:
        batch = next(loader)
        assert set(batch.sample_ids) == {0, 2} and loader.skipped == 1 and "frames" in loader.skip_reasons["video-0_1"]
    cut = batch.split(3)
    for row, part in enumerate(cut):
        assert part.cuts == batch.cuts[row : row + 1] and np.array_equal(part.features[0], batch.features[row])
