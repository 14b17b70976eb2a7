"""Folders of video files: the right frames of every container, in pieces too, and a sentence for each file that is none."""

from __future__ import annotations

import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_pipeline.sources.video_files as video_files
from data_pipeline.config import VideoFilesSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import build_source
from data_pipeline.sources.video_files import Timeline, VideoFiles, choose_frames

av = pytest.importorskip("av")
HEIGHT, WIDTH, FRAMES, RATE = 32, 48, 40, 5
CODECS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx", "avi": "mpeg4"}
CORNER = (slice(0, 8), slice(0, 8))  # bright, so that one sees how the picture is turned


def write_video(path: Path, codec: str | None = None, frames: int = FRAMES, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
    """Frame k is grey 20 + 5k with a bright corner; key frames every 12, B-frames where the codec has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = codec or CODECS[path.suffix[1:]]
    options = {
        "g": "12",
        **({"bf": "2"} if codec == "libx264" else {}),
        **({"qmin": "1", "qmax": "2"} if codec == "mpeg4" else {}),
    }
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            pixels = np.full((*size, 3), 20 + 5 * number, np.uint8)
            pixels[CORNER] = 250
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def open_videos(root: Path, **settings: Any) -> VideoFiles:
    source = build_source(VideoFilesSource(**{"validation_share": 0.0, **settings}), str(root))
    assert isinstance(source, VideoFiles)
    return source


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames these are, by their grey."""
    return [round((value - 20) / 5) for value in frames[:, HEIGHT // 2, WIDTH // 2].mean(axis=-1)]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for ending in CODECS:
        write_video(root / f"{ending}.{ending}")
    return root


# --- what must come out ---


@pytest.mark.parametrize("ending", CODECS)
def test_whole_videos(written, ending):
    clip = open_videos(written, clip_frames=None).read("train", ending)
    assert clip.frames.shape == (FRAMES, HEIGHT, WIDTH, 3) and clip.instance_ids is None
    assert numbers(clip.frames) == list(range(FRAMES))
    assert clip.metadata == {"file": f"{ending}.{ending}", "first_frame": 0, "start_s": 0.0, "fps": RATE}


@pytest.mark.parametrize("ending", CODECS)
def test_pieces_follow_one_another_and_are_about_as_long(written, ending):
    source = open_videos(written, clip_frames=16)
    keys = [key for key in source.keys("train") if key.startswith(ending)]
    assert keys == [f"{ending}-{number:04d}" for number in range(3)]
    clips = [source.read("train", key) for key in reversed(keys)][::-1]
    assert [clip.num_frames for clip in clips] == [14, 13, 13]
    assert [number for clip in clips for number in numbers(clip.frames)] == list(range(FRAMES))
    assert [clip.metadata["start_s"] for clip in clips] == [0.0, 2.8, 5.4]


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm"])
def test_a_late_piece_decodes_only_from_its_key_frame_on(written, ending, monkeypatch):
    decoded = []
    original = video_files._decoded

    def counted(path, timeline, first, wanted):
        with video_files._opened(path) as (container, stream):
            assert video_files._sought(container, stream, int(timeline.ticks[first]))
            decoded.append(next(iter(container.decode(stream))).pts)
        yield from original(path, timeline, first, wanted)

    monkeypatch.setattr(video_files, "_decoded", counted)
    source = open_videos(written, clip_frames=4)
    clip = source.read("train", f"{ending}-0009")
    assert numbers(clip.frames) == [36, 37, 38, 39]
    timeline = source._timeline(ending)
    assert timeline.stamped and timeline.ticks[24] <= decoded[0] <= timeline.ticks[36]


def test_a_file_that_cannot_be_sought_is_decoded_from_its_start(written, monkeypatch):
    monkeypatch.setattr(video_files, "_sought", lambda *_: False)
    assert numbers(open_videos(written, clip_frames=16).read("train", "mp4-0002").frames) == list(range(27, 40))


def test_rate_stride_and_cap_choose_frames(written):
    def read(**settings: Any) -> list[int]:
        return numbers(open_videos(written, clip_frames=None, **settings).read("train", "mkv").frames)

    assert read(fps=2.5) == list(range(0, FRAMES, 2))
    assert read(fps=2.0) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]
    assert read(fps=100.0) == list(range(FRAMES))
    assert read(frame_stride=7) == list(range(0, FRAMES, 7))
    assert read(fps=2.5, frame_stride=3, max_frames=4) == [0, 6, 12, 18]


@given(
    gaps=st.lists(st.integers(1, 400), max_size=30),
    fps=st.one_of(st.none(), st.floats(0.1, 60)),
    stride=st.integers(1, 5),
    cap=st.one_of(st.none(), st.integers(1, 9)),
)
def test_chosen_frames_are_in_order_and_each_once(gaps, fps, stride, cap):
    """Whatever the distances between the frames are."""
    ticks = np.concatenate([[7], 7 + np.cumsum(gaps)]).astype(np.int64)
    kept = choose_frames(Timeline(ticks, 0.01, True), VideoFilesSource(fps=fps, frame_stride=stride, max_frames=cap))
    assert kept[0] == 0 and (np.diff(kept) > 0).all() and kept[-1] < len(ticks)
    assert cap is None or len(kept) <= cap
    if fps is not None and stride == 1:
        assert len(kept) <= (ticks[-1] - ticks[0]) * 0.01 * fps + 1 + 1e-3


def test_a_phone_held_upright_gives_upright_frames(tmp_path):
    """The header of a video taken upright turns it by a quarter clockwise."""
    path = write_video(tmp_path / "phone.mov")
    data = path.read_bytes()
    matrix = data.index(b"tkhd") + 4 + 40
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, HEIGHT << 16, 0, 1 << 30)
    path.write_bytes(data[:matrix] + turned + data[matrix + 36 :])
    frames = open_videos(tmp_path, clip_frames=None).read("train", "phone").frames
    assert frames.shape[1:] == (WIDTH, HEIGHT, 3)
    bright = np.argwhere(frames[0].min(axis=-1) > 200)
    assert bright[:, 0].max() < 9 and bright[:, 1].min() > HEIGHT - 10  # the upper left corner is now the upper right


def test_splits_are_folders_or_a_share_of_the_files(tmp_path):
    for name in ("train/dog one", "train/deep/cat", "val/dog one", "other/x"):
        write_video(tmp_path / f"{name}.mkv", frames=1)
    source = open_videos(tmp_path)
    assert source.keys("train") == ["train_deep_cat-0000", "train_dog_one-0000"]
    assert source.keys("validation") == ["val_dog_one-0000"]
    flat = tmp_path / "other"
    for number in range(19):
        (flat / f"{number}.MKV").write_bytes((flat / "x.mkv").read_bytes())
    share = open_videos(flat, validation_share=0.3, clip_frames=None)
    train, validation = share.keys("train"), share.keys("validation")
    assert sorted(train + validation) == sorted(["x", *map(str, range(19))]) and 2 <= len(validation) <= 10
    assert share.read("validation", validation[0]).num_frames == 1
    with pytest.raises(DataError, match=f"key='{validation[0]}'; split train"):
        share.read("train", validation[0])


def test_a_source_survives_pickling(written):
    source = open_videos(written, clip_frames=20)
    key = source.keys("train")[-1]
    before = source.read("train", key).frames
    assert (pickle.loads(pickle.dumps(source)).read("train", key).frames == before).all()


# --- damage ---


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_files_that_are_no_videos_are_named_and_do_not_hinder_the_others(tmp_path):
    write_video(tmp_path / "good.mkv")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    write_sound(tmp_path / "sound.mp4")
    source = open_videos(tmp_path)
    assert source.keys("train") == ["empty-0000", "good-0000", "sound-0000", "text-0000"]
    for key, words in (
        ("empty", "unreadable video, the file is empty"),
        ("text", "unreadable video, Invalid data"),
        ("sound", "no video stream in it"),
    ):
        with pytest.raises(DataError, match=f"{key}.mp4: {words}"):
            source.read("train", f"{key}-0000")
    assert source.read("train", "good-0000").num_frames == FRAMES


@pytest.mark.parametrize("ending", CODECS)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_cut_file_is_named(tmp_path, written, ending, share):
    data = (written / f"{ending}.{ending}").read_bytes()
    (tmp_path / f"cut.{ending}").write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=f"cut.{ending}.*copy the file again"):
        open_videos(tmp_path, clip_frames=None).read("train", "cut")


def test_damage_inside_is_named(tmp_path, written):
    data = bytearray((written / "mkv.mkv").read_bytes())
    for position in range(900, len(data), 97):
        data[position] ^= 0xFF
    (tmp_path / "noise.mkv").write_bytes(data)
    with pytest.raises(DataError, match="noise.mkv"):
        open_videos(tmp_path, clip_frames=None).read("train", "noise")


def test_wrong_roots_keys_and_settings_are_named(tmp_path, written, monkeypatch):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_videos(tmp_path / "nowhere").keys("train")
    with pytest.raises(DataError, match="no file ends in .mp4, .mov"):
        open_videos(tmp_path).keys("train")
    with pytest.raises(DataError, match="split='test' is not in .*; it has train, validation"):
        open_videos(written).keys("test")
    with pytest.raises(DataError, match="split='validation' of .* is empty; .*source.validation_share=0.0 of 5"):
        open_videos(written).keys("validation")
    source = open_videos(written, clip_frames=30)
    for key in ("mp4", "mp4-", "mp4-x", "cat-0000"):
        with pytest.raises(DataError, match=f"key='{key}'; split train"):
            source.read("train", key)
    with pytest.raises(DataError, match="key='mp4-0002'; .*mp4.mp4 has 2 pieces"):
        source.read("train", "mp4-0002")
    for settings in ({"fps": 0.0}, {"clip_frames": 0}, {"frame_stride": 0}, {"max_frames": 0}, {"validation_share": 1.5}):
        with pytest.raises(ConfigError, match=f"source.{next(iter(settings))}="):
            VideoFilesSource(**settings)
    with pytest.raises(ConfigError, match="root=null"):
        build_source(VideoFilesSource(), None)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"PyAV, which is not installed; pip install 'slotstream\[video\]'"):
        open_videos(written)
