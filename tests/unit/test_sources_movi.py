"""MOVi from TFRecords: arrays equal to what TensorFlow read, and every kind of damage is named."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.compose import compose
from data_pipeline.config import BuildConfig, FeaturesConfig, MoviSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import GROUP_SCHEMAS, SOURCES, build_source
from data_pipeline.sources.movi import MoviVideos
from data_pipeline.sources.tfrecord import Record, decode_varints, index_records, masked_crc, parse_example, read_record

TREE = Path(__file__).resolve().parents[1] / "data" / "movi_tfds_tiny"
VERSION = Path("movi_c/48x48/1.0.0")
SHARDS = ("movi_c-train.tfrecord-00000-of-00002", "movi_c-train.tfrecord-00001-of-00002")
EXPECTED = json.loads((TREE / "expected.json").read_text())["splits"]["train"]
KEYS = ["train-00000-0000", "train-00000-0001", "train-00001-0000"]


def open_movi(root: Path, variant: str | None = None) -> MoviVideos:
    source = build_source(MoviSource(variant=variant), str(root))
    assert isinstance(source, MoviVideos)
    return source


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TREE, tmp_path / "tree"))


# --- what TensorFlow read ---


@pytest.mark.parametrize("number", range(3))
def test_frames_and_ids_are_those_that_tensorflow_reads(number):
    clip = open_movi(TREE).read("train", KEYS[number])
    expected = EXPECTED["records"][number]["features"]
    assert hashlib.sha256(clip.frames.tobytes()).hexdigest() == expected["video"]["sha256"]
    assert clip.frames.shape == tuple(expected["video"]["shape"])
    assert clip.instance_ids is not None and clip.instance_ids.dtype == np.uint8
    assert hashlib.sha256(clip.instance_ids.tobytes()).hexdigest() == expected["segmentations"]["sha256"]
    assert clip.metadata["video_name"] == EXPECTED["order"][number]
    assert clip.metadata["num_instances"] == expected["metadata/num_instances"]["value"][0]
    assert clip.metadata["background"] == expected["background"]["value"][0]
    categories = np.array(clip.metadata["categories"], np.int64)
    assert hashlib.sha256(categories.tobytes()).hexdigest() == expected["instances/category"]["sha256"]
    json.dumps(dict(clip.metadata))


def test_records_lie_where_tensorflow_found_them():
    for shard, file in enumerate(EXPECTED["tfrecord_frames"]):
        records = index_records(TREE / VERSION / SHARDS[shard])
        assert records == [Record(item["offset"], item["length"]) for item in file["records"]]


@pytest.mark.parametrize("kind", ["array", "text"])
def test_every_feature_of_that_kind_parses(kind):
    path = TREE / VERSION / SHARDS[0]
    features = {name: item for name, item in EXPECTED["records"][1]["features"].items() if item["kind"] == kind}
    parsed = parse_example(read_record(path, index_records(path)[1]), frozenset(features), "here")
    for name, item in features.items():
        value = parsed[name]
        if kind == "text":
            assert [text.decode() for text in value] == item["value"]
        elif isinstance(value, np.ndarray):  # numbers; pictures are compared above
            array = value.astype(item["dtype"])
            assert hashlib.sha256(array.tobytes()).hexdigest() == item["sha256"], name


@pytest.mark.parametrize("level", [".", "movi_c", "movi_c/48x48", "movi_c/48x48/1.0.0"])
def test_any_level_may_be_the_root(level):
    source = open_movi(TREE / level)
    assert source.keys("train") == KEYS
    assert source.background_labelled


def test_a_source_survives_pickling_after_use():
    source = open_movi(TREE)
    before = source.read("train", KEYS[2])
    after = pickle.loads(pickle.dumps(source)).read("train", KEYS[2])
    assert (before.frames == after.frames).all()


# --- the wire format ---


def varint(number: int) -> bytes:
    number &= 0xFFFFFFFFFFFFFFFF
    out = b""
    while True:
        out += bytes([number & 0x7F | (0x80 if number > 0x7F else 0)])
        number >>= 7
        if not number:
            return out


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(features: dict[str, bytes]) -> bytes:
    entries = b"".join(field(1, field(1, name.encode()) + field(2, value)) for name, value in features.items())
    return field(1, entries)


def bytes_list(items: list[bytes]) -> bytes:
    return field(1, b"".join(field(1, item) for item in items))


def int64_list(numbers: list[int], packed: bool = True) -> bytes:
    if packed:
        return field(3, field(1, b"".join(map(varint, numbers))))
    return field(3, b"".join(varint(1 << 3) + varint(number) for number in numbers))


INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(INT64, max_size=9))
def test_packed_and_single_integers_come_back(numbers):
    assert decode_varints(memoryview(b"".join(map(varint, numbers)))).tolist() == numbers
    payload = example({"a": int64_list(numbers), "skipped": bytes_list([b"x" * 200]), "b": int64_list(numbers, packed=False)})
    parsed = parse_example(payload, frozenset("ab"), "here")
    assert parsed["a"].tolist() == parsed["b"].tolist() == numbers
    assert set(parsed) == {"a", "b"}


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=5))
def test_packed_and_single_floats_come_back(numbers):
    values = [struct.pack("<f", number) for number in numbers]
    single = field(2, b"".join(varint(1 << 3 | 5) + value for value in values))
    parsed = parse_example(example({"a": field(2, field(1, b"".join(values))), "b": single}), frozenset("ab"), "here")
    assert parsed["a"].tolist() == parsed["b"].tolist() == numbers


@given(st.binary(max_size=40), st.integers(0, 200))
def test_a_malformed_example_is_a_data_error_and_nothing_else(noise, cut):
    payload = example({"a": int64_list([5, 300, -2]), "b": bytes_list([b"12", b"345"])})
    for broken in (noise, payload[:cut] + noise):
        try:
            parse_example(broken, frozenset("ab"), "here")
        except DataError as error:
            assert "here" in str(error)


# --- damage ---


@given(position=st.integers(0, 889784), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory, position, bit):
    path = tmp_path_factory.getbasetemp() / "flipped.tfrecord"
    data = bytearray((TREE / VERSION / SHARDS[1]).read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(DataError, match="flipped.tfrecord.*byte offset 0"):
        read_record(path, index_records(path)[0])


def test_a_flipped_byte_names_file_and_offset(copy):
    path = copy / VERSION / SHARDS[0]
    data = bytearray(path.read_bytes())
    data[1071085 + 500_000] ^= 0x10
    path.write_bytes(data)
    source = open_movi(copy)
    source.read("train", KEYS[0])  # the record before it is whole
    with pytest.raises(DataError, match=f"{SHARDS[0]}: CRC-32C of the payload.*offset 1071085 "):
        source.read("train", KEYS[1])


@pytest.mark.parametrize(("size", "offset"), [(1893979, 1071085), (1071085 + 5, 1071085), (1071084, 0), (7, 0)])
def test_a_cut_file_is_a_truncated_record(copy, size, offset):
    path = copy / VERSION / SHARDS[0]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=f"{SHARDS[0]}: truncated record at byte offset {offset};.*file has {size}"):
        open_movi(copy).read("train", KEYS[0])


@pytest.mark.parametrize("size", [1071085, 0])
def test_a_file_cut_between_records_has_too_few(copy, size):
    path = copy / VERSION / SHARDS[0]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=f"{SHARDS[0]}: {min(size, 1)} records; dataset_info.json says 2"):
        open_movi(copy).read("train", KEYS[0])


def test_a_missing_file_is_named(copy):
    (copy / VERSION / SHARDS[1]).unlink()
    with pytest.raises(DataError, match=f"{SHARDS[1]}: cannot be read, No such file"):
        open_movi(copy).read("train", KEYS[2])


def test_missing_root_split_and_key_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_movi(tmp_path / "nowhere").keys("train")
    with pytest.raises(DataError, match="no dataset_info.json beside"):
        open_movi(tmp_path).keys("train")
    with pytest.raises(DataError, match="split='validation' is not in .*; it has train"):
        open_movi(TREE).keys("validation")
    for key in ("train-00000-0002", "train-00002-0000", "test-00000-0000", "what"):
        with pytest.raises(DataError, match=f"key='{key}'"):
            open_movi(TREE).read("train", key)
    with pytest.raises(ConfigError, match="root=null"):
        build_source(MoviSource(), None)


def test_a_root_with_several_datasets_is_refused_with_their_names(copy):
    shutil.copytree(copy / VERSION, copy / "movi_c/32x32/1.0.0")
    with pytest.raises(ConfigError, match="2 datasets: movi_c/32x32/1.0.0, movi_c/48x48/1.0.0"):
        open_movi(copy).keys("train")
    assert open_movi(copy / "movi_c/32x32").keys("train") == KEYS


def test_the_variant_chooses_and_a_wrong_one_is_named(copy):
    other = Path(shutil.copytree(copy / VERSION, copy / "movi_e/48x48/1.0.0"))
    info = other / "dataset_info.json"
    info.write_text(info.read_text().replace('"movi_c"', '"movi_e"'))
    assert open_movi(copy, "movi_c").keys("train") == KEYS
    with pytest.raises(ConfigError, match="variant=movi_a; .*movi_c, movi_e"):
        open_movi(copy, "movi_a").keys("train")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_broken_json_is_named(copy, name):
    (copy / VERSION / name).write_text('{"name": "movi_c", "splits": [')
    with pytest.raises(DataError, match=f"{name}: broken JSON"):
        open_movi(copy).keys("train")


@pytest.mark.parametrize("content", [{}, {"name": "movi_c", "splits": 3}, {"name": "movi_c", "splits": [{"name": "train"}]}])
def test_an_info_without_splits_is_named(copy, content):
    (copy / VERSION / "dataset_info.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="dataset_info.json"):
        open_movi(copy).keys("train")


# --- datasets written here, with a fault inside a valid record ---


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def write_movi(folder: Path, video: list[bytes], segmentations: list[bytes], **extra: bytes) -> Path:
    payload = example({"video": bytes_list(video), "segmentations": bytes_list(segmentations), **extra})
    length = struct.pack("<Q", len(payload))
    frame = length + struct.pack("<I", masked_crc(length)) + payload + struct.pack("<I", masked_crc(payload))
    (folder / "movi_e-validation.tfrecord-00000-of-00001").write_bytes(frame)
    info = {"name": "movi_e", "splits": [{"name": "validation", "shardLengths": ["1"]}]}  # as older TFDS writes it
    (folder / "dataset_info.json").write_text(json.dumps(info))
    tree = {"featuresDict": {"features": {"video": {}, "segmentations": {}}}}
    (folder / "features.json").write_text(json.dumps(tree))
    return folder


def pictures(num_frames: int, height: int, width: int) -> list[bytes]:
    return [png(np.full((height, width, 3), frame, np.uint8)) for frame in range(num_frames)]


def masks(num_frames: int, height: int, width: int, dtype: type = np.uint8) -> list[bytes]:
    return [png(np.full((height, width), (1 if dtype == np.uint8 else 200) + 30 * frame, dtype)) for frame in range(num_frames)]


def test_sixteen_bit_ids_are_kept_whole(tmp_path):
    write_movi(tmp_path, pictures(3, 5, 7), masks(3, 5, 7, np.uint16))
    clip = open_movi(tmp_path).read("validation", "validation-00000-0000")
    assert clip.instance_ids is not None and clip.instance_ids.dtype == np.uint16
    assert clip.instance_ids.max(axis=(1, 2)).tolist() == [200, 230, 260]
    assert clip.frames.shape == (3, 5, 7, 3)


@pytest.mark.parametrize(
    ("video", "segmentations", "message"),
    [
        (pictures(3, 5, 7), masks(3, 5, 6), "frames are 7x5 uint8, segmentations 6x5"),
        (pictures(3, 5, 7), masks(2, 5, 7), "3 frames, 2 segmentations"),
        (pictures(2, 5, 7) + pictures(1, 7, 5), masks(3, 5, 7), "video, frame 2: 5x7 uint8, frame 0 7x5"),
        (pictures(2, 5, 7)[:1] + [b"no picture"], masks(2, 5, 7), "video, frame 1: not a readable PNG"),
        ([pictures(1, 9, 9)[0][:-25]], masks(1, 9, 9), "video, frame 0: not a readable PNG"),
        (masks(2, 5, 7), masks(2, 5, 7), "a PNG of mode L; RGB is needed"),
        (pictures(2, 5, 7), pictures(2, 5, 7), "segmentations, frame 0: a PNG of mode RGB; grey is needed"),
        ([], masks(2, 5, 7), "no pictures in feature 'video'"),
    ],
)
def test_faulty_pictures_are_named(tmp_path, video, segmentations, message):
    write_movi(tmp_path, video, segmentations)
    with pytest.raises(DataError, match=f"00000-of-00001, record at byte offset 0.*{message}"):
        open_movi(tmp_path).read("validation", "validation-00000-0000")


# --- configuration ---


@pytest.mark.parametrize(
    ("member", "values"),
    [
        ("movi", {"name": "movi", "variant": None, "image_size": 336}),
        ("movi_c", {"name": "movi", "variant": "movi_c", "resize": "stretch"}),
        ("movi_e", {"name": "movi", "variant": "movi_e"}),
        ("ytvis", {"name": "ytvis", "image_size": 518, "resize": "crop"}),
        ("ytvis2021", {"name": "ytvis", "num_validation": 300, "train_views": ["center", "crop0", "crop1"]}),
        ("synthetic", {"name": "synthetic", "image_size": 96, "difficulty": "easy"}),
    ],
)
def test_every_member_of_the_source_group_composes(member, values):
    schemas = {**GROUP_SCHEMAS, "features/test_schema": FeaturesConfig}
    overrides = [f"source={member}", "features=test_schema", "features.name=patch", "out=somewhere"]
    config = compose("build_shards", BuildConfig, overrides, schemas)
    assert {name: getattr(config.source, name) for name in values} == values
    assert type(config.source) in GROUP_SCHEMAS.values()
    assert config.source.name in SOURCES


def test_no_file_of_the_source_group_is_forgotten():
    folder = Path(__file__).resolve().parents[2] / "configs" / "source"
    known = {"movi", "movi_c", "movi_e", "ytvis", "ytvis2021", "synthetic", "davis2017", "ovis", "coco2017"}
    known |= {"voc2012", "clevrtex", "official_shards", "official_ytvis", "official_coco", "video_files", "images"}
    known |= {"physics_movi_c", "physics_movi_e"}
    assert {path.stem for path in folder.glob("*.yaml")} == known


def test_an_unknown_source_lists_the_known_ones():
    with pytest.raises(ConfigError, match="source.name='movie' is not known; .*did you mean 'movi'"):
        build_source(MoviSource(name="movie"), None)
    with pytest.raises(ConfigError, match="source.name=ytvis; its settings are a MoviSource, not a YtvisSource"):
        build_source(MoviSource(name="ytvis"), None)
