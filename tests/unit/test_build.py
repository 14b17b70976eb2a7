"""Build: dataset -> shards; the same bytes however it is cut, stopped or resumed; nothing half-written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_build import LOOKED_AT, FakeExtractor, FakeSource, config_for, contents, fake_extractor, fake_source

from data_pipeline import build as build_module
from data_pipeline import build_jobs, verify
from data_pipeline.build import build
from data_pipeline.build_plan import Job
from data_pipeline.build_ranks import FolderLock, Place, join
from data_pipeline.clip import Clip
from data_pipeline.compose import run_command
from data_pipeline.config import BuildConfig, FeaturesConfig, PatchFeatures, SourceConfig, SyntheticSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.shards import DatasetIndex
from data_pipeline.store import ShardDataset

PROJECT = Path(build_module.__file__).parent.parent


source = pytest.fixture(fake_source, name="source")
extractor = pytest.fixture(fake_extractor, name="extractor")


def test_a_build_is_what_the_source_and_the_extractor_give(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    build(config_for(tmp_path, codec="float16"))
    train, validation = ShardDataset.open(tmp_path / "train"), ShardDataset.open(tmp_path / "validation")
    assert [shard["samples"] for shard in train.index.shards] == [3, 3, 1]
    assert [sample.key for sample in train.index.samples] == source.keys("train")
    assert train.index.features["views"] == ["center", "crop0+hflip"] and validation.index.features["views"] == ["center"]
    assert (train.index.features["grid"], train.index.features["extractor"], train.index.features["layer"]) == (
        [2, 2],
        "mean",
        "pixels",
    )
    assert not train.index.background_labelled and 0 < (train.index.codec_error or 0) < 1e-2
    from data_pipeline.views import prepare

    for sample_id, sample in enumerate(train.index.samples):
        clip = source.read("train", sample.key)
        for view in ("center", "crop0+hflip"):
            expected = extractor(prepare(clip.frames, view, 8, "crop", clip.key)).numpy().astype(np.float16)
            np.testing.assert_array_equal(train.features(sample_id, view, 0, clip.num_frames), expected)
        assert train.instance_ids(sample_id, 0, 1) is None and train.metadata(sample_id) == clip.metadata
    clip = source.read("validation", "validation_2")
    frames, ids = validation.frames(2, 0, clip.num_frames), validation.instance_ids(2, 0, clip.num_frames)
    np.testing.assert_array_equal(frames, clip.frames[:, :, 2:12])
    assert clip.instance_ids is not None
    np.testing.assert_array_equal(ids, clip.instance_ids[:, :, 2:12])
    assert validation.index.samples[2].num_instances == 2


def test_two_builds_have_the_same_bytes(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    build(config_for(tmp_path / "a"))
    build(config_for(tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_second_call_builds_nothing(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, capsys: pytest.CaptureFixture[str]
) -> None:
    build(config_for(tmp_path))
    before = contents(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    source.reads.clear()
    build(config_for(tmp_path))
    assert len(source.reads) == LOOKED_AT  # a few videos of each split, to say how much there is
    assert contents(tmp_path) == before and stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert "4 finished shards verified and kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    "harm",
    [
        lambda out: (out / "train" / "train-000001.tar").unlink(),
        lambda out: (out / "train" / "train-000002.json").unlink(),
        lambda out: (out / "train" / "train-000000.tar").write_bytes(b"cut"),
        lambda out: (out / "validation" / "validation-000000.json").write_bytes(b'{"format": "slot'),
        lambda out: (out / "train" / "index.json").unlink(),
        lambda out: (out / "train" / ".train-000001.tar.99.tmp").write_bytes(b"left by a killed build"),
        lambda out: (out / "train" / "train-000009.tar").write_bytes(b"of a larger build"),
    ],
)
def test_a_build_mends_what_is_missing_or_damaged(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, harm: Callable[[Path], Any]
) -> None:
    build(config_for(tmp_path))
    whole = contents(tmp_path)
    harm(tmp_path)
    source.reads.clear()
    build(config_for(tmp_path))
    assert contents(tmp_path) == whole
    assert len(source.reads) <= LOOKED_AT + 3


def test_a_build_stopped_in_the_middle_goes_on(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(config_for(tmp_path / "whole"))
    read = source.read

    def stop_at_the_fifth(split: str, key: str) -> Clip:
        if key == "train_4" and (tmp_path / "out" / "train" / "train-000000.tar").exists():
            raise RuntimeError("power cut")
        return read(split, key)

    monkeypatch.setattr(source, "read", stop_at_the_fifth)
    with pytest.raises(RuntimeError, match="power cut"):
        build(config_for(tmp_path / "out"))
    names = set(contents(tmp_path / "out"))
    assert "train/train-000000.tar" in names and "train/train-000001.tar" not in names
    assert not any("index.json" in name or "tmp" in name for name in names)
    monkeypatch.setattr(source, "read", read)
    source.reads.clear()
    build(config_for(tmp_path / "out"))
    assert ("train", "train_1") not in source.reads
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "float32"}, "codec=float32, but .* was built with int8"),
        ({"limit": 2}, "limit=2, but .* was built with None"),
        ({"samples_per_shard": 4}, "samples_per_shard=4"),
        ({"features": FeaturesConfig(name="mean", layer="block_3")}, "features.layer=block_3"),
        ({"source": SourceConfig(name="fake", image_size=12)}, "source.image_size=12, but .* was built with 8"),
    ],
)
def test_other_settings_are_refused_unless_told(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, changes: dict[str, Any], message: str
) -> None:
    build(config_for(tmp_path / "out"))
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=message + ".*overwrite=true"):
        build(config_for(tmp_path / "out", **changes))
    assert contents(tmp_path / "out") == before
    with pytest.raises(ConfigError, match="split train .* is not among splits"):
        build(config_for(tmp_path / "out", **changes, overwrite=True, splits=["validation"]))
    assert contents(tmp_path / "out") == before
    build(config_for(tmp_path / "out", **changes, overwrite=True))
    build(config_for(tmp_path / "fresh", **changes))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_dry_run_refuses_what_the_build_refuses(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    build(config_for(tmp_path / "out"))
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="codec=float32, but .* was built with int8"):
        build_module.dry_run(config_for(tmp_path / "out", codec="float32"))
    with pytest.raises(DataError, match="settings.json: File exists; a folder that can be written is needed"):
        build_module.dry_run(config_for(tmp_path / "out" / "settings.json"))
    build_module.dry_run(config_for(tmp_path / "other"))
    assert contents(tmp_path) == before


def test_a_build_without_a_shard_binds_nobody_to_its_settings(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that fail in the fit can be mended without overwrite."""
    extractor.needs_fit = True

    def fail(clips: Any) -> None:
        raise DataError("features.num_components=9; choose fewer")

    with monkeypatch.context() as patched, pytest.raises(DataError, match="choose fewer"):
        patched.setattr(extractor, "fit", fail)
        build(config_for(tmp_path / "out", features=PatchFeatures(name="mean", num_components=9)))
    for name in ("out", "fresh"):
        extractor.gain = 1.0
        build(config_for(tmp_path / name, features=PatchFeatures(name="mean", num_components=2)))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_other_weights_are_refused(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    build(config_for(tmp_path))
    extractor.gain = 2.0
    with pytest.raises(ConfigError, match="fingerprint=2.000000, but .* was built with 1.000000"):
        build(config_for(tmp_path))


def test_an_extractor_is_fitted_once(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    extractor.needs_fit = True
    features = PatchFeatures(name="mean", num_fit_clips=2)
    build(config_for(tmp_path, features=features, splits=["train"]))
    fitted = extractor.gain
    expected = np.mean([source.read("train", key).frames.mean() / 255 for key in ("train_0", "train_1")])
    assert extractor.fits == 1 and fitted == pytest.approx(expected, rel=0.1) and (tmp_path / "projection.safetensors").exists()
    extractor.gain = 0.0
    build(config_for(tmp_path, features=features))
    assert extractor.fits == 1 and extractor.gain == fitted
    indices = [DatasetIndex.load(tmp_path / split) for split in ("train", "validation")]
    assert {index.features["fingerprint"] for index in indices} == {f"{fitted:.6f}"}


def test_a_fit_without_readable_videos_says_why(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(clips: Any) -> None:
        raise DataError(f"given {len(list(clips))} clips")

    extractor.needs_fit = True
    monkeypatch.setattr(extractor, "fit", fit)
    source.broken = {f"train_{number}" for number in range(7)}
    with pytest.raises(DataError, match=r"given 0 clips \(7 unreadable; for example train_0.jpg: cut off\)"):
        build(config_for(tmp_path, features=PatchFeatures(name="mean")))


def test_a_fit_can_be_taken_from_another_build(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    """So that two datasets have features of one kind, as data.mixture needs them."""
    extractor.needs_fit = True
    build(config_for(tmp_path / "first", features=PatchFeatures(name="mean")))
    other = PatchFeatures(name="mean", weights=str(tmp_path / "other.json"))
    (tmp_path / "other.json").write_text("0.5")
    build(config_for(tmp_path / "second", features=other))
    assert extractor.fits == 1 and (tmp_path / "second" / "projection.safetensors").read_text() == "0.5"
    assert DatasetIndex.load(tmp_path / "second" / "train").features["fingerprint"] == "0.500000"
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="fingerprint=0.500000, but .*first was built with"):
        build(config_for(tmp_path / "first", features=other))
    assert contents(tmp_path) == before
    for path in (tmp_path / "first").glob("*/*"):
        path.unlink()  # as if it had been stopped before the first shard
    build(config_for(tmp_path / "first", features=other))
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_unreadable_videos_are_counted_and_left_out(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, capsys: pytest.CaptureFixture[str]
) -> None:
    source.broken = {"train_1", "train_6"}
    build(config_for(tmp_path, max_skip_fraction=2 / 7))
    index = ShardDataset.open(tmp_path / "train").index
    assert [sample.key for sample in index.samples] == ["train_0", "train_2", "train_3", "train_4", "train_5"]
    assert index.skipped == [
        {"key": "train_1", "reason": "train_1.jpg: cut off"},
        {"key": "train_6", "reason": "train_6.jpg: cut off"},
    ]
    assert len(index.shards) == 2 and not (tmp_path / "train" / "train-000002.tar").exists()
    assert "2 videos skipped" in capsys.readouterr().out
    assert run_command(verify.main, [str(tmp_path)]) == 0
    source.reads.clear()
    build(config_for(tmp_path, max_skip_fraction=2 / 7))
    assert len(source.reads) == LOOKED_AT


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_too_many_unreadable_videos_stop_the_build(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, fraction: float
) -> None:
    source.broken = {"train_1", "train_2"}
    limit = rf"train_1.jpg: cut off \(split train, video train_1\); [12] of 7 videos .*limit max_skip_fraction={fraction}"
    with pytest.raises(DataError, match=limit):
        build(config_for(tmp_path, max_skip_fraction=fraction))
    names = set(contents(tmp_path))
    assert not any(
        name.endswith(("index.json", ".tar")) or "tmp" in name for name in names if "000000" in name or "index" in name
    )


def test_a_stricter_limit_counts_for_finished_shards_too(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    source.broken = {"train_1"}
    build(config_for(tmp_path, max_skip_fraction=0.5))
    with pytest.raises(DataError, match="limit max_skip_fraction=0.0"):
        build(config_for(tmp_path))


def test_features_that_cannot_be_stored_stop_the_build(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    extractor.gain = 1e9
    with pytest.raises(DataError, match="video train_0, view center: largest feature magnitude=.*codec=float32"):
        build(config_for(tmp_path, codec="float16", max_skip_fraction=0.9))
    assert not list(tmp_path.rglob("index.json")) and not list(tmp_path.rglob("*.tar"))


def test_repeated_keys_empty_splits_and_odd_sizes_are_refused(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor
) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="split empty has no videos"):
        build(config_for(out, splits=["empty"]))
    with pytest.raises(
        ConfigError, match="source.image_size=10; mean needs a multiple of its patch size 4; set source.image_size to 8 or 12"
    ):
        build(config_for(out, source=SourceConfig(name="fake", image_size=10)))
    with pytest.raises(ConfigError, match="view='crop'"):
        build(config_for(out, source=SourceConfig(name="fake", image_size=8, train_views=["crop"])))
    with pytest.raises(ConfigError, match="codec='int3'"):
        build(config_for(out, codec="int3"))
    source.repeated = ["train_3"]
    with pytest.raises(DataError, match="key train_3 stands for 2 videos"):
        build(config_for(out))
    assert not out.exists()
    (tmp_path / "file").write_text("")
    source.repeated = []
    with pytest.raises(DataError, match="out=.*file"):
        build(config_for(tmp_path / "file"))


@pytest.mark.parametrize("hold", [FolderLock.take_alone, FolderLock.share])
def test_two_builds_in_one_folder_are_refused(
    tmp_path: Path, source: FakeSource, extractor: FakeExtractor, monkeypatch: pytest.MonkeyPatch, hold: Callable[..., None]
) -> None:
    """Also when all that is left of the other one is a rank or a worker."""
    monkeypatch.setattr("data_pipeline.build_ranks.LOCK_PATIENCE_S", 0.0)
    with FolderLock(tmp_path) as other:
        hold(other)
        with pytest.raises(DataError, match="another build is writing here"):
            build(config_for(tmp_path))
    build(config_for(tmp_path))  # the lock ends with its holder


def test_a_file_system_without_locks_is_named_and_used(
    tmp_path: Path,
    source: FakeSource,
    extractor: FakeExtractor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    build(config_for(tmp_path))
    assert "has no file locks" in capsys.readouterr().err and (tmp_path / "train" / "index.json").exists()


def test_frames_may_be_left_out_or_compressed(tmp_path: Path, source: FakeSource, extractor: FakeExtractor) -> None:
    build(config_for(tmp_path / "none", frames="none", splits=["validation"]))
    build(config_for(tmp_path / "jpeg", frames="jpeg", splits=["validation"]))
    bare, packed = (ShardDataset.open(tmp_path / name / "validation") for name in ("none", "jpeg"))
    assert bare.frames(0, 0, 2) is None and bare.instance_ids(0, 0, 2) is not None
    frames = packed.frames(0, 0, 2)
    assert frames is not None and packed.index.samples[0].members["frames"]["suffix"] == "jpg"
    original = source.read("validation", "validation_0").frames[:, :, 2:12]
    assert np.abs(frames.astype(int) - original).mean() < 12


def run_build(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "data_pipeline.build", *arguments]
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=200)


def synthetic(out: Path, **changes: Any) -> BuildConfig:
    return config_for(
        out,
        source=SyntheticSource(image_size=32, num_train=5, num_validation=2, num_frames=4, seed=3),
        features=PatchFeatures(num_components=6, num_random=16, num_fit_clips=3),
        samples_per_shard=2,
        **changes,
    )


@pytest.mark.slow
def test_worker_processes_give_the_same_bytes(tmp_path: Path) -> None:
    build(synthetic(tmp_path / "one"))
    build(synthetic(tmp_path / "two", workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    build(synthetic(tmp_path / "two", workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_the_command_builds_and_says_what_it_did(tmp_path: Path) -> None:
    small = ["source.num_train=2", "source.num_validation=1", "source.num_frames=3", "source.image_size=32", "workers=1"]
    done = run_build("source=synthetic", "features=patch", "features.num_fit_clips=2", f"out={tmp_path / 'out'}", *small)
    assert done.returncode == 0, done.stderr
    for text in (
        "train: 2 videos of about 3 frames",
        "in all",
        "fitting patch on 2 videos",
        "0 videos skipped",
        "error of codec int8",
        "built 2 shards of 3 videos, 9 frames",
    ):
        assert text in done.stdout
    assert len(ShardDataset.open(tmp_path / "out" / "train")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=synthetic", "features=patch", "sample_per_shard=3"], "did you mean samples_per_shard"),
        (["source=synthetic", "features=patch", "workers=many"], "workers"),
        (["source=synthetic", "features=patch", "frames=bmp"], "frames='bmp'"),
        (["source=synthetics", "features=patch"], "did you mean synthetic"),
        (["source=movi", "features=patch", "root=/no/such/folder"], "/no/such/folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    failed = run_build(*arguments, f"out={tmp_path / 'out'}")
    assert failed.returncode == 2
    assert message in failed.stderr and len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from data_pipeline import build, inspect, verify; build.main(['--help']); "
        "assert not {'torch', 'webdataset'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "max_skip_fraction" in done.stdout, done.stderr


def test_a_lost_worker_is_reported(tmp_path: Path) -> None:
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    job = Job(tmp_path / "a.tar", "train", ("k",), ("center",), "s", 1)
    lost: Future[dict[str, Any]] = Future()
    lost.set_exception(BrokenProcessPool("gone"))
    team, progress = join(Place()), build_jobs.Progress()
    with pytest.raises(DataError, match="a worker process ended"):
        list(build_jobs._collect(lambda job: lost, 2, [job], team, progress, lambda progress: None))
    assert progress.stop.is_set()
