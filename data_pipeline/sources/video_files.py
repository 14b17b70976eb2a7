"""A folder of video files, without annotations. Needs PyAV: pip install slotstream[video]

Comes in: a root with mp4, mov, mkv, webm and avi files, at any depth. Goes out: Clip without instance ids. A long video is cut
into consecutive pieces: only the packets' times are read to find where, and to read a piece only its own frames are decoded, from
the key frame before it on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.clip import Clip
from data_pipeline.config import VideoFilesSource
from data_pipeline.errors import ConfigError, DataError, unknown_key
from data_pipeline.sources.folder import list_files, safe_keys, split_of

ENDINGS = ("mp4", "mov", "mkv", "webm", "avi")
PIECE_DIGITS = 4
REMEDY = "copy the file again or leave it out"


@dataclass(frozen=True)
class Timeline:
    """When the frames of a file are shown, in its own ticks, in order. `stamped`: the file says so, and can be sought."""

    ticks: np.ndarray  # int64 (N,)
    seconds_a_tick: float
    stamped: bool


class VideoFiles:
    """Source of a folder of videos. Key: the path without its ending; behind it the number of the piece, where videos are cut."""

    background_labelled = False

    def __init__(self, config: VideoFilesSource, root: str | None) -> None:
        if root is None:
            raise ConfigError("root=null; source video_files reads a folder of video files; add root=FOLDER")
        import_av()
        self.root, self.config = Path(root), config
        self._files: dict[str, str] | None = None
        self._splits: dict[str, dict[str, None]] = {}  # keys of files in order
        self._timelines: dict[str, Timeline] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Another process looks into the files that it reads."""
        return {**self.__dict__, "_files": None, "_splits": {}, "_timelines": {}}

    def keys(self, split: str) -> list[str]:
        return [key for file in self._split(split) for key in self._pieces(file)]

    def read(self, split: str, key: str) -> Clip:
        file, number = self._locate(split, key)
        path = self.root / self._all()[file]
        timeline = self._timeline(file)
        kept = choose_frames(timeline, self.config)
        pieces = self._num_pieces(len(kept))
        if number >= pieces:
            raise DataError(f"video key={key!r}; {path} has {pieces} pieces; take keys from keys({split!r})")
        wanted = np.array_split(kept, pieces)[number]
        frames = decode_frames(path, timeline, wanted)
        times = (timeline.ticks[wanted] - timeline.ticks[0]) * timeline.seconds_a_tick
        metadata = {
            "file": self._all()[file],
            "first_frame": int(wanted[0]),
            "start_s": round(float(times[0]), 6),
            "fps": round((len(times) - 1) / float(times[-1] - times[0]), 3) if times[-1] > times[0] else None,
        }
        return Clip(key=key, frames=frames, metadata=metadata)

    def _locate(self, split: str, key: str) -> tuple[str, int]:
        """(key of the file, number of the piece)."""
        file, number = key, 0
        if self.config.clip_frames is not None:
            file, _, digits = key.rpartition("-")
            number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else -1
        if file not in self._split(split) or number < 0:
            raise unknown_key("video", key, split, self.root)
        return file, number

    def _pieces(self, file: str) -> list[str]:
        """Keys of a file's pieces. A file that cannot be read has one, so that reading it reports why."""
        if self.config.clip_frames is None:
            return [file]
        try:
            count = self._num_pieces(len(choose_frames(self._timeline(file), self.config)))
        except DataError:
            count = 1
        return [f"{file}-{number:0{PIECE_DIGITS}d}" for number in range(count)]

    def _num_pieces(self, num_frames: int) -> int:
        return 1 if self.config.clip_frames is None else -(-num_frames // self.config.clip_frames)

    def _timeline(self, file: str) -> Timeline:
        if file not in self._timelines:
            self._timelines[file] = read_timeline(self.root / self._all()[file])
        return self._timelines[file]

    def _split(self, split: str) -> dict[str, None]:
        if split not in self._splits:
            files = self._all()
            chosen = split_of(self.root, split, list(files.values()), list(files), self.config.validation_share)
            self._splits[split] = dict.fromkeys(chosen)
        return self._splits[split]

    def _all(self) -> dict[str, str]:
        """Files by key, in the order of their paths."""
        if self._files is None:
            files = list_files(self.root, ENDINGS)
            self._files = dict(zip(safe_keys([file.rpartition(".")[0] for file in files]), files, strict=True))
        return self._files


def import_av() -> Any:
    """PyAV. Raises ConfigError that names the extra to install."""
    try:
        import av
    except ImportError:
        raise ConfigError("source=video_files needs PyAV, which is not installed; pip install 'slotstream[video]'") from None
    return av


def choose_frames(timeline: Timeline, config: VideoFilesSource) -> np.ndarray:
    """Numbers of the frames to keep, at least one: at `fps` the frame shown at each moment, then the stride, then the cap."""
    count = len(timeline.ticks)
    numbers = np.arange(count)
    if config.fps is not None:
        times = (timeline.ticks - timeline.ticks[0]) * timeline.seconds_a_tick
        moments = np.arange(int(times[-1] * config.fps + 1e-6) + 1) / config.fps
        numbers = np.unique(np.searchsorted(times, moments + 1e-6, side="right") - 1)  # a slow file gives each frame once
    return numbers[:: config.frame_stride][: config.max_frames]


def read_timeline(path: Path) -> Timeline:
    """Times of all frames from the packets alone, nothing decoded. Raises DataError for a file that is cut or holds no video."""
    with _opened(path) as (container, stream):
        stamps: list[int | None] = []
        count = 0
        for packet in container.demux(stream):
            count += packet.dts is not None or packet.size > 0  # the last, empty one only says that there are no more
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
        if not stamps:
            raise DataError(f"{path}: no frames; a video needs at least one; {REMEDY}")
        if count < stream.frames:
            raise DataError(f"{path}: {count} frames, its header says {stream.frames}; the file is cut; {REMEDY}")
        tick = float(stream.time_base or 1 / 25)
        ticks = sorted(stamp for stamp in stamps if stamp is not None)
        stamped = len(set(ticks)) == len(stamps)
        if not stamped:
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            ticks = [round(number / rate / tick) for number in range(len(stamps))]
        declared, found = _declared_seconds(stream, tick), (ticks[-1] - ticks[0]) * tick
        if found < 0.98 * declared - 1.0:  # for files whose header counts no frames: mkv, webm
            raise DataError(f"{path}: {found:.1f} s of frames, its header says {declared:.1f} s; the file is cut; {REMEDY}")
        return Timeline(np.array(ticks, np.int64), tick, stamped)


def _declared_seconds(stream: Any, tick: float) -> float:
    """How long the stream lasts by the file's header; 0 where it does not say."""
    if stream.duration:
        return float(stream.duration * tick)
    parts = str(stream.metadata.get("DURATION", "")).split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return 0.0
    return 3600 * hours + 60 * minutes + seconds


def decode_frames(path: Path, timeline: Timeline, wanted: np.ndarray) -> np.ndarray:
    """The frames with these numbers, uint8 (N, H, W, 3), turned upright. Raises DataError where one cannot be decoded."""
    frames: dict[int, np.ndarray] = {}
    for number, frame in _decoded(path, timeline, int(wanted[0]), set(wanted.tolist())):
        if frame.is_corrupt:
            raise DataError(f"{path}, frame {number}: damaged; every frame must decode; {REMEDY}")
        # the angle is counted against the clock; older PyAV does not tell it
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(getattr(frame, "rotation", 0) / 90))
        frames[number] = pixels
        if pixels.shape != next(iter(frames.values())).shape:
            raise DataError(f"{path}, frame {number}: the picture changes its size; all frames must have one; {REMEDY}")
    missing = [number for number in wanted.tolist() if number not in frames]
    if missing:
        raise DataError(f"{path}, frame {missing[0]}: cannot be decoded, nor can {len(missing) - 1} others; {REMEDY}")
    return np.stack([frames[number] for number in wanted.tolist()])


def _decoded(path: Path, timeline: Timeline, first: int, wanted: set[int]) -> Iterator[tuple[int, Any]]:
    """Wanted frames as they are decoded, from the key frame before the first one on, or from the start where that fails."""
    numbers = {int(tick): number for number, tick in enumerate(timeline.ticks)} if timeline.stamped else None
    last = max(wanted)
    for seek in (True, False) if numbers is not None and first > 0 else (False,):
        with _opened(path) as (container, stream):
            if seek and not _sought(container, stream, int(timeline.ticks[first])):
                continue
            begun = False
            for position, frame in enumerate(container.decode(stream)):
                number = position if numbers is None else numbers.get(frame.pts, -1)
                if seek and not begun and number > first:
                    break  # some files seek too far: their index is in decoding order
                begun = begun or number >= 0
                if number in wanted:
                    yield number, frame
                if number >= last:
                    return
            else:
                return


def _sought(container: Any, stream: Any, tick: int) -> bool:
    """Move to a key frame at or before `tick`; False where the file has no index for that."""
    try:
        container.seek(tick, stream=stream)
    except (import_av().FFmpegError, ValueError):
        return False
    return True


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, first video stream that is no cover picture). Every fault of FFmpeg inside the block becomes a DataError."""
    av = import_av()
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            streams = [stream for stream in container.streams.video if "attached_pic" not in _disposition(stream)]
            if not streams:
                raise DataError(f"{path}: no video stream in it; one is needed; {REMEDY}")
            streams[0].codec_context.thread_count = 1  # builds run one process a core
            yield container, streams[0]
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        reason = "the file is empty" if path.is_file() and not path.stat().st_size else getattr(error, "strerror", None) or error
        raise DataError(f"{path}: unreadable video, {reason}; {REMEDY}") from error


def _disposition(stream: Any) -> str:
    return str(getattr(stream, "disposition", ""))
