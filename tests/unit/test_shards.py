"""Shards, index, store, verify and inspect: what is written is read back, and damage is never read as data."""

from __future__ import annotations

import json
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tiny_shards import (
    GRID,
    SIZE,
    VIEWS,
    data_config,
    decoded_features,
    flip_byte,
    make_sample,
    sample_features,
    stored_features,
    write_split,
)

from data_pipeline import inspect, verify
from data_pipeline.compose import run_command
from data_pipeline.errors import DataError
from data_pipeline.shards import DatasetIndex, ShardWriter, decode_image, encode_image, verified_sidecar
from data_pipeline.store import ShardDataset

PATCHES = GRID[0] * GRID[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_split(tmp_path / "built")


def place(folder: Path, sample_id: int, view: str = "center") -> dict:
    return DatasetIndex.load(folder).samples[sample_id].members["features"][view]


def test_stock_webdataset_reads_a_shard(folder: Path) -> None:
    samples = list(webdataset.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["video-0_0", "video-0_1"]
    first = samples[0]
    np.testing.assert_array_equal(
        first["center_hflip.features.npy"], sample_features("video-0_0", 4, "center+hflip").astype(np.float16)
    )
    assert first["meta.json"] == {"fps": 12, "name": "video-0_0"}
    assert sorted(first) == sorted(
        ["__key__", "__url__", "center.features.npy", "center_hflip.features.npy", "meta.json"]
        + [f"frame_{number:04d}.png" for number in range(4)]
        + [f"ids_{number:04d}.png" for number in range(4)]
        + (["__local_path__"] if "__local_path__" in first else [])
    )


def test_members_carry_neither_time_nor_owner(folder: Path) -> None:
    with tarfile.open(folder / "train-000000.tar") as tar:
        entries = tar.getmembers()
    assert {(entry.mtime, entry.uid, entry.gid, entry.uname) for entry in entries} == {(0, 0, 0, "")}
    names = [entry.name for entry in entries if entry.name.startswith("video-0_0")]
    assert names == sorted(names)


def test_the_same_samples_give_the_same_bytes_and_version(folder: Path, tmp_path: Path) -> None:
    again = write_split(tmp_path / "again")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in again.iterdir()
    }
    other = write_split(tmp_path / "other", fingerprint="0" * 64)
    assert DatasetIndex.load(other).version != DatasetIndex.load(folder).version


def test_long_keys_are_stored_too(tmp_path: Path) -> None:
    key = "k" * 180
    with ShardWriter(tmp_path / "long.tar") as shard:
        shard.add(make_sample(key, 2))
    offset = shard.samples[0]["members"]["features"]["center"]["offset"]
    assert (tmp_path / "long.tar").read_bytes()[offset : offset + 6] == b"\x93NUMPY"
    assert [sample["__key__"] for sample in webdataset.WebDataset(str(tmp_path / "long.tar"), shardshuffle=False)] == [key]


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 6), (2, 3), (5, 1)])
@pytest.mark.parametrize("codec", ["int8", "float16", "float32"])
@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_windows_are_the_frames_asked_for(tmp_path: Path, codec: str, read: str, start: int, count: int) -> None:
    dataset = ShardDataset.open(write_split(tmp_path, codec=codec), read)
    expected = decoded_features("video-0_1", 6, "center+hflip", codec)[start : start + count]
    found = dataset.features(1, "center+hflip", start, count)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    out = np.empty((count, dataset.frame_bytes), np.uint8)
    dataset.read_features(1, "center+hflip", start, count, out)
    assert out.tobytes() == stored_features("video-0_1", 6, "center+hflip", codec)[start : start + count].tobytes()
    assert dataset.bytes_read == 2 * out.nbytes


def test_frames_ids_and_metadata_come_back(folder: Path) -> None:
    dataset = ShardDataset.open(folder)
    sample = make_sample("video-1_0", 8)
    assert sample.images is not None and sample.ids is not None
    frames, ids = dataset.frames(2, 3, 4), dataset.instance_ids(2, 3, 4, "center+hflip")
    assert frames is not None and frames.dtype == np.uint8 and frames.shape == (4, *SIZE, 3)
    np.testing.assert_array_equal(frames, [decode_image(data) for data in sample.images[3:7]])
    assert ids is not None and ids.dtype == np.uint16
    np.testing.assert_array_equal(ids[:, :, ::-1], [decode_image(data) for data in sample.ids[3:7]])
    assert dataset.metadata(2) == {"fps": 12, "name": "video-1_0"}
    assert (len(dataset), dataset.index.samples[2].frames, dataset.index.background_labelled) == (3, 8, True)


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (3, 2), (0, 5), (0, 0)])
def test_windows_outside_the_video_are_refused(folder: Path, start: int, count: int) -> None:
    with pytest.raises(DataError, match="it has 4"):
        ShardDataset.open(folder).features(0, "center", start, count)


def test_a_flipped_byte_is_caught_where_it_is_read_and_only_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = place(folder, 1)
    flip_byte(folder / "train-000000.tar", damaged["data_offset"] + 3 * damaged["frame_bytes"] + 1)
    dataset = ShardDataset.open(folder)
    dataset.features(1, "center", 0, 3)
    dataset.features(1, "center+hflip", 0, 6)
    with pytest.raises(DataError, match=r"train-000000.tar, sample video-0_1, features center, frame 3: crc32c"):
        dataset.features(1, "center", 2, 2)
    assert run_command(verify.main, [str(folder.parent)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "video-0_1.center.features.npy: crc32c=" in lines[0] and "sha256=" in lines[1] and "2 damaged" in lines[2]


def test_a_flipped_byte_in_an_image_is_caught(folder: Path) -> None:
    flip_byte(folder / "train-000001.tar", DatasetIndex.load(folder).samples[2].members["ids"]["offset"][5] + 40)
    dataset = ShardDataset.open(folder)
    assert dataset.instance_ids(2, 0, 5) is not None
    with pytest.raises(DataError, match="ids 5: crc32c"):
        dataset.instance_ids(2, 5, 1)


def test_verify_sees_bytes_between_members(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(verify.main, [str(folder)]) == 0
    flip_byte(folder / "train-000001.tar", 120)
    assert run_command(verify.main, [str(folder)]) == 1
    assert "train-000001.tar: sha256=" in capsys.readouterr().out


def test_cut_and_missing_shards_are_refused_at_open(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder / "train-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=rf"train-000001.tar: {len(whole) - 512} bytes, the index has {len(whole)}"):
        ShardDataset.open(folder)
    shard.unlink()
    with pytest.raises(DataError, match="train-000001.tar: No such file"):
        ShardDataset.open(folder)
    assert run_command(verify.main, [str(folder)]) == 1
    assert "train-000001.tar: No such file" in capsys.readouterr().out


def test_a_shard_cut_while_open_is_an_error_not_zeros(folder: Path) -> None:
    dataset = ShardDataset.open(folder)
    with (folder / "train-000001.tar").open("r+b") as file:
        file.truncate(place(folder, 2)["data_offset"] + 10)
    with pytest.raises(DataError, match="sample video-1_0: the shard ends"):
        dataset.features(2, "center", 0, 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "one whole JSON object"),
        (lambda text: b"[1, 2]", "JSON list"),
        (lambda text: b'{"a":' * 100_000, "one whole JSON object"),  # deeper than can be read
        (lambda text: text.replace(b"slotstream-index/1", b"slotstream-index/9"), "format='slotstream-index/9'"),
        (lambda text: text.replace(b"video-0_1", b"video-0_9"), "must not be edited"),
        (lambda text: json.dumps({"format": "slotstream-index/1"}).encode(), "every field"),
        (lambda text: text.replace(b'"shards":[{', b'"shards":[{"extra":0},{'), "every field"),
    ],
)
def test_a_damaged_index_is_refused(folder: Path, damage, message: str) -> None:
    path = folder / "index.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        DatasetIndex.load(folder)


@pytest.mark.parametrize(
    "name",
    ["../../secret.tar", "/etc/x.tar", "http://host/x.tar", "..", ".hidden.tar", "a\\b.tar", "a?b.tar", "train-000000", ""],
)
def test_a_shard_lies_beside_its_index_and_nowhere_else(folder: Path, name: str) -> None:
    """Also where the version is right: whoever can write an index can hash it."""
    index = DatasetIndex.load(folder)
    shards = [{**index.shards[0], "name": name}, *index.shards[1:]]
    replace(index, shards=shards).save(folder)
    with pytest.raises(DataError, match="a shard has a plain name"):
        DatasetIndex.load(folder)


def test_a_member_larger_than_its_shard_is_refused_before_memory_is_taken(folder: Path) -> None:
    dataset = ShardDataset.open(folder)
    dataset.index.samples[0].members["meta"]["length"] = 1 << 50
    with pytest.raises(DataError, match="sample video-0_0, meta.json: 1125899906842624 bytes; it must fit into its shard"):
        dataset.metadata(0)


def test_an_index_survives_save_and_load(folder: Path, tmp_path: Path) -> None:
    index = DatasetIndex.load(folder)
    index.save(tmp_path)
    assert DatasetIndex.load(tmp_path) == index
    with pytest.raises(DataError, match="no such file"):
        DatasetIndex.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "dinov2_vits14"}, r"data.features=dinov2_vits14, but the shards hold fake.*features=dinov2_vits14"),
        ({"layer": "block_3"}, "data.layer=block_3, but the shards hold last_block"),
        ({"image_size": 336}, "data.image_size=336, but the shards hold 12"),
        ({"views": ["center", "crop0"]}, r"view crop0 .* hold center, center\+hflip"),
    ],
)
def test_features_of_another_kind_are_refused(folder: Path, changes: dict, message: str) -> None:
    dataset = ShardDataset.open(folder)
    dataset.check(data_config(folder.parent))
    with pytest.raises(DataError, match=message) as error:
        dataset.check(data_config(folder.parent, **changes))
    assert "\n" not in str(error.value)


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    folder = write_split(tmp_path)
    index = DatasetIndex.load(folder)
    other = DatasetIndex(
        **{name: getattr(index, name) for name in ("dataset", "shards", "samples", "skipped", "codec_error")},
        features={**index.features, "codec": "int3"},
    )
    other.save(folder)
    with pytest.raises(DataError, match="codec=int3; known are int8, float16"):
        ShardDataset.open(folder)


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path / "a.tar") as shard:
            shard.add(make_sample("one", 2))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_sidecar_vouches_only_for_the_bytes_it_saw(folder: Path) -> None:
    shard = folder / "train-000000.tar"
    assert verified_sidecar(shard, "test") is not None
    assert verified_sidecar(shard, "other settings") is None
    flip_byte(shard, shard.stat().st_size - 1)
    assert verified_sidecar(shard, "test") is None
    assert verified_sidecar(folder / "train-000007.tar", "test") is None


def test_threads_read_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More shards than may stay open, several threads on each."""
    monkeypatch.setattr("data_pipeline.shard_files.MAX_OPEN_FILES", 2)
    dataset = ShardDataset.open(write_split(tmp_path, frames=[[3]] * 5))
    wrong: list[int] = []

    def read() -> None:
        for sample_id in list(range(5)) * 20:
            expected = sample_features(f"video-{sample_id}_0", 3, VIEWS[0]).astype(np.float16)
            if not np.array_equal(dataset.features(sample_id, VIEWS[0], 0, 3), expected):
                wrong.append(sample_id)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dataset.close()
    assert wrong == []


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_id_maps_are_lossless(dtype: type) -> None:
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (6, 11)).astype(dtype)
    found = decode_image(encode_image(ids, "png"))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, ids)


def test_commands_say_where_shards_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (verify, inspect):
        assert run_command(command.main, [str(tmp_path)]) == 2
        assert "no index.json" in capsys.readouterr().err
