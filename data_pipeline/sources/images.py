"""A folder of pictures, without annotations: each a clip of one frame, or each folder of numbered pictures a video.

Comes in: a root with jpg, png, webp and bmp files, at any depth. Goes out: Clip without instance ids, turned as EXIF says.
"""

from __future__ import annotations

import io
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.clip import Clip
from data_pipeline.config import ImagesSource
from data_pipeline.errors import ConfigError, DataError, unknown_key
from data_pipeline.sources.folder import list_files, safe_keys, split_of

ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp")
FORMATS = ["JPEG", "PNG", "WEBP", "BMP"]


class Images:
    """Source of a folder of pictures. Key: the picture's path without its ending, or the folder's path."""

    background_labelled = False

    def __init__(self, config: ImagesSource, root: str | None) -> None:
        if root is None:
            raise ConfigError("root=null; source images reads a folder of pictures; add root=FOLDER")
        self.root, self.config = Path(root), config
        self._videos: dict[str, tuple[str, ...]] | None = None
        self._splits: dict[str, dict[str, None]] = {}  # keys in order

    def __getstate__(self) -> dict[str, Any]:
        """The folder is listed again in another process."""
        return {**self.__dict__, "_videos": None, "_splits": {}}

    def keys(self, split: str) -> list[str]:
        return list(self._split(split))

    def read(self, split: str, key: str) -> Clip:
        if key not in self._split(split):
            raise unknown_key("picture or video", key, split, self.root)
        files = self._all()[key][:: self.config.frame_stride][: self.config.max_frames]
        frames = [read_picture(self.root / file) for file in files]
        for file, frame in zip(files, frames, strict=True):
            if frame.shape != frames[0].shape:
                here, first = frame.shape, frames[0].shape
                raise DataError(
                    f"{self.root / file}: {here[1]}x{here[0]}, the video's first frame {first[1]}x{first[0]}; "
                    f"all must have one size; leave the folder out"
                )
        return Clip(key=key, frames=np.stack(frames), metadata={"file": files[0]})

    def _split(self, split: str) -> dict[str, None]:
        if split not in self._splits:
            videos = self._all()
            names = [files[0] for files in videos.values()]
            self._splits[split] = dict.fromkeys(split_of(self.root, split, names, list(videos), self.config.validation_share))
        return self._splits[split]

    def _all(self) -> dict[str, tuple[str, ...]]:
        """The files of each video by key."""
        if self._videos is None:
            files = list_files(self.root, ENDINGS)
            if self.config.layout == "images":
                keys = safe_keys([file.rpartition(".")[0] for file in files])
                self._videos = {key: (file,) for key, file in zip(keys, files, strict=True)}
            else:
                folders = group_frames(self.root, files)
                self._videos = dict(zip(safe_keys(list(folders)), folders.values(), strict=True))
        return self._videos


def group_frames(root: Path, files: list[str]) -> dict[str, tuple[str, ...]]:
    """Pictures by folder, in the order of the numbers in their names. Raises DataError for a loose or doubled picture."""
    folders: dict[str, list[str]] = {}
    for file in files:
        folders.setdefault(str(PurePosixPath(file).parent), []).append(file)
    if "." in folders:
        raise DataError(
            f"{root / folders['.'][0]} lies in no folder of its own; with source.layout=frame_folders each folder is a video; "
            f"move it or set source.layout=images"
        )
    for names in folders.values():
        names.sort(key=natural)
        stems = [PurePosixPath(name).stem for name in names]
        doubled = next((name for name, stem in zip(names, stems, strict=True) if stems.count(stem) > 1), None)
        if doubled:
            raise DataError(f"{root / doubled}: the frame is there with two endings; each must be there once; remove one")
    return {folder: tuple(names) for folder, names in folders.items()}


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key by which frame_9 comes before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_picture(path: Path) -> np.ndarray:
    """RGB pixels, uint8 (H, W, 3), upright. Raises DataError for a damaged file and for more than 8 bits a value.

    Differs: an alpha channel is dropped, not blended with a colour that no one asked for.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            picture.verify()  # a PNG's checksums, which decoding alone ignores
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"mode {picture.mode} has more than 8 bits a value")
            picture.load()
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        Image.DecompressionBombError,
    ) as error:
        reason = "file not found" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"{path}: unreadable picture, {reason}; copy the file again or leave it out") from error
