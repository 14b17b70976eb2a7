"""The official repositories' shards: the arrays that went in come out, and every way in which a shard can be broken is named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import MoviSource, OfficialShardsSource, YtvisSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import build_source
from data_pipeline.sources.official_shards import OfficialShards
from data_pipeline.sources.tar_members import index_tar, read_member
from data_pipeline.sources.ytvis import decode_rle

DATA = Path(__file__).resolve().parents[1] / "data"
FRAMES, SIZE = 3, (4, 5)


def open_shards(root: Path, **settings: Any) -> OfficialShards:
    source = build_source(OfficialShardsSource(**settings), str(root))
    assert isinstance(source, OfficialShards)
    return source


def video(seed: int, frames: int = FRAMES, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


def dense(seed: int, frames: int = FRAMES, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed + 1000).integers(0, 4, (frames, *size, 1), dtype=np.uint8)


def write_webdataset(path: Path, samples: Mapping[str, Mapping[str, np.ndarray]]) -> Path:
    """As the official scripts do: stock webdataset, whose entries carry their time in an attribute header."""
    with webdataset.TarWriter(str(path)) as writer:
        for key, parts in samples.items():
            writer.write({"__key__": key, **parts})
    return path


def write_tar(path: Path, members: Mapping[str, bytes], **settings: Any) -> Path:
    with tarfile.open(path, "w", **settings) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def header(text: str, data: bytes = b"", version: int = 1) -> bytes:
    """.npy bytes with any header text."""
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text.encode() + data


@pytest.fixture
def movi(tmp_path: Path) -> Path:
    for number in range(2):
        samples = {f"{3 * number + row:06d}": {"video.npy": video(3 * number + row)} for row in range(3)}
        write_webdataset(tmp_path / f"movi_c-train-{number:06d}.tar", samples)
    flow = np.zeros((FRAMES, *SIZE, 2), np.float32)
    parts = {
        f"{row:06d}": {"video.npy": video(row), "segmentations.npy": dense(row), "forward_flow.npy": flow} for row in range(2)
    }
    write_webdataset(tmp_path / "movi_c-validation-000000.tar", parts)
    return tmp_path


# --- what must come out ---


def test_videos_and_dense_ids_come_out_as_they_went_in(movi):
    source = open_shards(movi)
    assert source.keys("train") == [f"{number:06d}" for number in range(6)]
    assert source.keys("validation") == ["000000", "000001"]
    assert source.background_labelled
    for number, key in enumerate(source.keys("train")):
        clip = source.read("train", key)
        np.testing.assert_array_equal(clip.frames, video(number))
        assert clip.instance_ids is None and clip.frames.flags.writeable
    clip = source.read("validation", "000001")
    np.testing.assert_array_equal(clip.frames, video(1))
    np.testing.assert_array_equal(clip.instance_ids, dense(1)[..., 0])
    assert clip.metadata == {"shard": "movi_c-validation-000000.tar", "num_instances": 3, "num_void": 0}


def test_a_converted_movi_reads_as_movi_itself(tmp_path):
    original = build_source(MoviSource(), str(DATA / "movi_tfds_tiny"))
    clips = {key: original.read("train", key) for key in original.keys("train")}
    write_webdataset(
        tmp_path / "movi_c-validation-000000.tar",
        {key: {"video.npy": clip.frames, "segmentations.npy": clip.instance_ids[..., None]} for key, clip in clips.items()},
    )
    source = open_shards(tmp_path)
    for key, clip in clips.items():
        read = source.read("validation", key)
        assert (read.frames == clip.frames).all() and (read.instance_ids == clip.instance_ids).all()


def test_a_converted_youtube_vis_reads_as_youtube_vis_itself(tmp_path):
    """Channels are mask * category in the order of annotation ids, as the released conversion stacks them; overlaps included."""
    tree = DATA / "ytvis_tiny"
    original = build_source(YtvisSource(num_validation=0), str(tree))
    content = json.loads((tree / "train" / "instances.json").read_text())
    samples = {}
    for item in content["videos"]:
        key = item["file_names"][0].split("/")[0]
        clip = original.read("train", key)
        own = [note for note in content["annotations"] if note["video_id"] == item["id"] and not note.get("iscrowd")]
        stack = np.zeros((*clip.frames.shape[:3], max(len(own), 1)), np.uint8)
        for channel, note in enumerate(sorted(own, key=lambda note: note["id"])):
            for frame, mask in enumerate(note["segmentations"]):
                if mask is not None:
                    stack[frame, ..., channel] = decode_rle(mask, clip.frames.shape[1:3], "here") * note["category_id"]
        samples[key] = {"video.npy": clip.frames, "segmentations.npy": stack}
    write_webdataset(tmp_path / "ytvis-validation-000000.tar", samples)
    source = open_shards(tmp_path)
    assert not source.background_labelled and source.keys("validation") == list(samples)
    for key in samples:
        read, wanted = source.read("validation", key), original.read("train", key)
        assert (read.frames == wanted.frames).all() and (read.instance_ids == wanted.instance_ids).all()
        for name in ("num_instances", "categories"):
            assert read.metadata[name] == wanted.metadata[name]


@pytest.mark.parametrize("first", [True, False])
def test_images_with_channels_first_or_last(tmp_path, first):
    picture = video(1, frames=1)[0]
    stack = np.zeros((6, *SIZE), np.uint8)
    stack[0, 1:3, 1:4], stack[2, 2:, 3:] = 18, 44  # instance 2 has no pixel and keeps its number
    stack = stack[:3]
    masks = stack if first else stack.transpose(1, 2, 0)
    write_webdataset(tmp_path / "coco-val-000000.tar", {"139": {"image.npy": picture, "segmentations.npy": masks}})
    write_webdataset(tmp_path / "coco-train-000000.tar", {"25": {"image.npy": picture}})
    source = open_shards(tmp_path)
    clip = source.read("validation", "139")
    wanted = np.zeros((1, *SIZE), np.uint8)
    wanted[0, 1:3, 1:4] = 1
    wanted[0, 2:, 3:] = 3
    np.testing.assert_array_equal(clip.instance_ids, wanted)
    np.testing.assert_array_equal(clip.frames, picture[None])
    assert clip.metadata["categories"] == [18, None, 44]
    assert source.read("train", "25").instance_ids is None


def test_void_pixels_belong_to_no_one(tmp_path):
    ids = dense(3)
    ids[0, 0, :2] = 255
    write_webdataset(tmp_path / "davis-validation-000000.tar", {"0": {"video.npy": video(0), "segmentations.npy": ids}})
    clip = open_shards(tmp_path).read("validation", "0")
    np.testing.assert_array_equal(clip.instance_ids, np.where(ids == 255, 0, ids)[..., 0])
    assert clip.metadata["num_void"] == 2


def test_more_instances_than_eight_bits_number(tmp_path):
    stack = np.zeros((1, 16, 20, 300), np.uint8)
    stack.reshape(-1, 300)[np.arange(300), np.arange(300)] = 7
    parts = {"video.npy": video(0, 1, (16, 20)), "segmentations.npy": stack}
    write_webdataset(tmp_path / "ytvis-validation-000000.tar", {"0": parts})
    ids = open_shards(tmp_path).read("validation", "0").instance_ids
    assert ids is not None and ids.dtype == np.uint16 and ids.reshape(-1)[:300].tolist() == list(range(1, 301))


def test_several_datasets_and_unknown_ones_are_asked_about(movi):
    write_webdataset(movi / "birds-validation-000000.tar", {"7": {"video.npy": video(0), "segmentations.npy": dense(0)}})
    with pytest.raises(ConfigError, match="holds shards of birds, movi_c; .*set source.dataset"):
        open_shards(movi).keys("train")
    with pytest.raises(ConfigError, match="source.dataset=cats; .* lies birds, movi_c"):
        open_shards(movi, dataset="cats").keys("train")
    assert len(open_shards(movi, dataset="movi_c").keys("train")) == 6
    with pytest.raises(ConfigError, match="source.masks=auto, shards of 'birds'; .*set source.masks to dense"):
        open_shards(movi, dataset="birds").read("validation", "7")
    ids = open_shards(movi, dataset="birds", masks="dense").read("validation", "7").instance_ids
    np.testing.assert_array_equal(ids, dense(0)[..., 0])
    with pytest.raises(DataError, match=r"segmentations.npy, channel 0: values \[0, 1, 2, 3\].*source.masks=dense"):
        open_shards(movi, dataset="birds", masks="channels").read("validation", "7")


def test_a_source_survives_pickling_and_sends_no_offsets(movi):
    source = open_shards(movi)
    before = source.read("train", "000004").frames
    sent = pickle.dumps(source)
    assert len(sent) < 500
    assert (pickle.loads(sent).read("train", "000004").frames == before).all()


# --- the tar ---


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_walked(tmp_path, kind):
    long = "folder/" + "x" * 90 + "/" + "y" * 95  # beyond what a plain header holds
    members = {"a.txt": b"", long: b"1" * 513, "b.bin": b"2" * 512}
    if kind == tarfile.PAX_FORMAT:
        members["name-\u00e9.txt"] = b"3"
    path = write_tar(tmp_path / "x.tar", members, format=kind)
    with tarfile.open(path, "a", format=kind) as tar:
        entry = tarfile.TarInfo("folder")
        entry.type = tarfile.DIRTYPE
        tar.addfile(entry)
    found = index_tar(path)
    assert {member.name: read_member(path, member) for member in found} == members


@given(st.data())
def test_a_cut_at_any_byte_is_noticed(tmp_path_factory, data):
    """Also between members, where a plain tar reader sees a shorter archive and nothing else."""
    folder = tmp_path_factory.getbasetemp() / "cut"
    folder.mkdir(exist_ok=True)
    path = folder / "movi_c-validation-000000.tar"
    write_webdataset(path, {f"{row}": {"video.npy": video(row), "segmentations.npy": dense(row)} for row in range(2)})
    whole = path.read_bytes()
    end = max(member.offset + member.size for member in index_tar(path))
    last = -(-end // 512) * 512 + 1024  # behind it lie only the zeros that fill the last record
    keep = data.draw(st.one_of(st.integers(0, last // 512 - 1).map(lambda block: 512 * block), st.integers(0, last - 1)))
    path.write_bytes(whole[:keep])
    with pytest.raises(DataError, match="movi_c-validation-000000.tar"):
        open_shards(folder).keys("validation")


def test_a_video_without_its_masks_is_noticed_where_the_tar_was_closed_again(tmp_path):
    write_tar(tmp_path / "ytvis-validation-000000.tar", {"1.video.npy": npy(video(0))})
    with pytest.raises(DataError, match="ytvis-validation-000000.tar, sample 1: no segmentations.npy; .*cut between members"):
        open_shards(tmp_path).keys("validation")
    write_tar(tmp_path / "ytvis-validation-000000.tar", {"1.segmentations.npy": npy(dense(0))})
    with pytest.raises(DataError, match="sample 1: has segmentations.npy; exactly one of video.npy and image.npy"):
        open_shards(tmp_path).keys("validation")


@given(position=st.integers(0, 511), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_header_is_noticed(tmp_path_factory, position, bit):
    path = write_tar(tmp_path_factory.getbasetemp() / "flip.tar", {"1.video.npy": npy(video(0))}, format=tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = index_tar(path)
    except DataError as error:
        assert "flip.tar" in str(error)
    else:  # the stored sum ends in bytes that say nothing
        assert position in range(148, 156) and [member.name for member in found] == ["1.video.npy"]


@given(noise=st.binary(max_size=1600), filled=st.booleans())
def test_noise_is_a_data_error_and_nothing_else(tmp_path_factory, noise, filled):
    path = tmp_path_factory.getbasetemp() / "noise.tar"
    path.write_bytes(noise + bytes(1024) if filled else noise)
    try:
        assert index_tar(path) == []
    except DataError as error:
        assert "noise.tar" in str(error)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "movi_c-train-000000.tar"
    with tarfile.open(path, "w") as tar:
        entry = tarfile.TarInfo("1.video.npy")
        entry.type, entry.linkname = kind, "/etc/passwd"
        tar.addfile(entry)
    with pytest.raises(DataError, match="movi_c-train-000000.tar, byte offset 0: an entry of kind"):
        open_shards(tmp_path).keys("train")


@pytest.mark.parametrize("size", [1 << 62, 2000])
def test_a_size_beyond_the_file_is_noticed(tmp_path, size):
    path = write_tar(tmp_path / "x.tar", {"a": b"1"})
    head = bytearray(path.read_bytes()[:512])
    head[124:136] = b"\x80" + size.to_bytes(11, "big")
    head[148:156] = f"{sum(head[:148]) + sum(head[156:]) + 8 * 32:06o}\0 ".encode()
    path.write_bytes(bytes(head) + bytes(1024))
    with pytest.raises(DataError, match=f"member a of {size} bytes, the file ends at 1536"):
        index_tar(path)


# --- samples ---


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"../1.video.npy": npy(video(0))}, "sample '': letters, digits"),
        ({"a/b.video.npy": npy(video(0))}, "sample 'a/b': letters, digits"),
        ({"1.video.npy": npy(video(0)), "1.image.npy": npy(video(0)[0])}, "sample 1: has image.npy, video.npy; exactly one"),
        ({"1.txt": b"x"}, "sample 1: has txt; exactly one"),
        ({}, "no samples"),
    ],
)
def test_a_sample_of_another_kind_is_named(tmp_path, members, words):
    write_tar(tmp_path / "movi_c-train-000000.tar", members)
    with pytest.raises(DataError, match=f"movi_c-train-000000.tar.*{words}"):
        open_shards(tmp_path).keys("train")


def test_doubled_keys_missing_shards_and_splits_are_named(movi):
    write_webdataset(movi / "movi_c-train-000002.tar", {"000001": {"video.npy": video(0)}})
    with pytest.raises(DataError, match="movi_c-train-000002.tar, sample 000001 is in movi_c-train-000000.tar too"):
        open_shards(movi).keys("train")
    (movi / "movi_c-train-000001.tar").unlink()
    with pytest.raises(DataError, match="movi_c, split train: 2 shards, none numbered 000001"):
        open_shards(movi).keys("train")
    with pytest.raises(DataError, match="split='test' of movi_c is not in .*; it has train, validation"):
        open_shards(movi).keys("test")
    with pytest.raises(DataError, match="key='9'; split validation"):
        open_shards(movi).read("validation", "9")
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_shards(movi / "nowhere").keys("train")
    (movi / "empty").mkdir()
    with pytest.raises(DataError, match="no shards; files named"):
        open_shards(movi / "empty").keys("train")
    with pytest.raises(ConfigError, match="root=null"):
        build_source(OfficialShardsSource(), None)
    with pytest.raises(ConfigError, match="source.masks='densse'.*did you mean 'dense'"):
        OfficialShardsSource(masks="densse")


SHAPE = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no .npy"),
        (b"PK\x03\x04" + bytes(60), "no .npy"),
        (header("(" * 500), "no .npy"),
        (header("{'descr': '|u1'}"), "no .npy"),
        (header(SHAPE.format("|u1", "(1, 4, 5, 3)"), bytes(60), version=3), "no .npy file of version 1 or 2"),
        (header(SHAPE.format("|u1", "(1, 4, 5, 3)"), bytes(59)), r"shape \[1, 4, 5, 3\] with 59 bytes"),
        (header(SHAPE.format("|u1", "(1, 4, 5, 3)"), bytes(61)), "with 61 bytes"),
        (header(SHAPE.format("|u1", "(99999999999, 99999999999, 99999999999, 3)"), bytes(60)), "with 60 bytes"),
        (header(SHAPE.format("|u1", "(-1, -4, 5, 3)"), bytes(60)), "no .npy"),
        (header(SHAPE.format("|u1", "()"), bytes(1)), r"shape \[\]"),
        (header(SHAPE.format("|O", "(1, 4, 5, 3)"), bytes(60)), "type \\|O; "),
        (header(SHAPE.format("<f4", "(1, 1, 5, 3)"), bytes(60)), "type <f4; "),
        (npy(video(0)[..., 0]), r"shape \[3, 4, 5\]; \(T, H, W, 3\) is needed"),
        (npy(np.zeros((1, 4, 5, 4), np.uint8)), r"shape \[1, 4, 5, 4\]; \(T, H, W, 3\) is needed"),
    ],
)
def test_a_broken_array_is_named_and_harms_no_other(tmp_path, data, words):
    write_tar(tmp_path / "movi_c-train-000000.tar", {"1.video.npy": data, "2.video.npy": npy(video(2))})
    source = open_shards(tmp_path)
    with pytest.raises(DataError, match=f"movi_c-train-000000.tar, member 1.video.npy: .*{words}"):
        source.read("train", "1")
    np.testing.assert_array_equal(source.read("train", "2").frames, video(2))


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (dense(0)[:2], r"shape \[2, 4, 5, 1\], frames \[3, 4, 5\]"),
        (dense(0, size=(5, 4)), r"shape \[3, 5, 4, 1\]"),
        (dense(0)[..., 0], r"shape \[3, 4, 5\]"),
        (np.repeat(dense(0), 2, axis=-1), "2 channels; dense ids have 1; set source.masks=channels"),
    ],
)
def test_masks_that_do_not_lie_on_the_frames_are_named(tmp_path, masks, words):
    write_webdataset(tmp_path / "movi_c-validation-000000.tar", {"1": {"video.npy": video(0), "segmentations.npy": masks}})
    with pytest.raises(DataError, match=f"member 1.segmentations.npy: {words}"):
        open_shards(tmp_path).read("validation", "1")


def test_column_order_is_kept(tmp_path):
    write_tar(tmp_path / "movi_c-train-000000.tar", {"1.video.npy": npy(np.asfortranarray(video(3)))})
    np.testing.assert_array_equal(open_shards(tmp_path).read("train", "1").frames, video(3))
