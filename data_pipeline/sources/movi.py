"""MOVi-A to MOVi-F as TFDS wrote them: features.json and dataset_info.json beside TFRecord files.

Comes in: a TFDS directory. Goes out: Clip, with the rendered instance ids (0 = background, k = instance k-1 of the record).
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.clip import Clip
from data_pipeline.config import MoviSource
from data_pipeline.errors import ConfigError, DataError, unknown_key
from data_pipeline.sources.tfrecord import Feature, Record, index_records, parse_example, read_record

INFO, FEATURES = "dataset_info.json", "features.json"
DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # what TFDS used before it wrote the template down
DEPTH_BELOW_ROOT = 3  # <data_dir>/<dataset>/<config>/<version>
KEY_PATTERN = re.compile(r"(?P<split>.+)-(?P<shard>\d{5,})-(?P<record>\d{4,})")

VIDEO, SEGMENTATIONS = "video", "segmentations"
NAME, NUM_INSTANCES = "metadata/video_name", "metadata/num_instances"
EXTRAS = {"background": "background", "instances/category": "categories", "instances/is_dynamic": "is_dynamic"}
WANTED = frozenset([VIDEO, SEGMENTATIONS, NAME, NUM_INSTANCES, *EXTRAS])
GREY_MODES = {"L": np.uint8, "I;16": np.uint16}


@dataclass(frozen=True)
class Split:
    """The files of a split, in order, and how many records each holds."""

    files: tuple[Path, ...]
    lengths: tuple[int, ...]


class MoviVideos:
    """Source of a MOVi dataset. Key: split, number of the file, number of the record in it."""

    background_labelled = True

    def __init__(self, config: MoviSource, root: str | None) -> None:
        if root is None:
            raise ConfigError("root=null; source movi reads a TFDS directory; add root=FOLDER")
        self.root = Path(root)
        self.variant = config.variant
        self._splits: dict[str, Split] | None = None
        self._records: dict[Path, list[Record]] = {}

    def keys(self, split: str) -> list[str]:
        lengths = self._split(split).lengths
        return [f"{split}-{shard:05d}-{record:04d}" for shard, length in enumerate(lengths) for record in range(length)]

    def read(self, split: str, key: str) -> Clip:
        record, path = self._locate(split, key)
        where = f"{path}, record at byte offset {record.offset}"
        features = parse_example(read_record(path, record), WANTED, where)
        frames = _stack(_pngs(features, VIDEO, where), "RGB", f"{where}, {VIDEO}")
        ids = _stack(_pngs(features, SEGMENTATIONS, where), "grey", f"{where}, {SEGMENTATIONS}")
        _check_same_size(frames, ids, where)
        return Clip(key=key, frames=frames, instance_ids=ids, metadata=_metadata(features))

    def _locate(self, split: str, key: str) -> tuple[Record, Path]:
        wanted = self._split(split)
        match = KEY_PATTERN.fullmatch(key)
        if match and match["split"] == split:
            shard, number = int(match["shard"]), int(match["record"])
            if shard < len(wanted.files) and number < wanted.lengths[shard]:
                path = wanted.files[shard]
                return self._records_of(path, wanted.lengths[shard])[number], path
        raise unknown_key("record", key, split, self.root)

    def _records_of(self, path: Path, expected: int) -> list[Record]:
        """The file's records, found once for each file."""
        if path not in self._records:
            records = index_records(path)
            if len(records) != expected:
                raise DataError(f"{path}: {len(records)} records; {INFO} says {expected}; copy the file again")
            self._records[path] = records
        return self._records[path]

    def _split(self, split: str) -> Split:
        if self._splits is None:
            self._splits = read_splits(find_dataset(self.root, self.variant))
        if split not in self._splits:
            raise DataError(f"split={split!r} is not in {self.root}; it has {', '.join(self._splits) or 'none'}; change splits")
        return self._splits[split]


def find_dataset(root: Path, variant: str | None) -> Path:
    """The one folder at or below `root` that holds a TFDS dataset with videos and segmentations.

    Raises: DataError when there is none, ConfigError with the list when there are several.
    """
    if not root.is_dir():
        raise DataError(f"root={root} is not a folder; it must be a TFDS directory of MOVi; change root")
    levels = ["*/" * depth + INFO for depth in range(DEPTH_BELOW_ROOT + 1)]
    folders = sorted({path.parent for level in levels for path in root.glob(level) if _has_videos(path.parent)})
    chosen = [folder for folder in folders if variant in (None, _json(folder / INFO).get("name"))]
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        listed = ", ".join(str(folder.relative_to(root)) for folder in chosen)
        raise ConfigError(f"root={root} holds {len(chosen)} datasets: {listed}; one is needed; set root to one of these folders")
    if folders:
        names = ", ".join(sorted({str(_json(folder / INFO).get("name")) for folder in folders}))
        raise ConfigError(f"source.variant={variant}; below root={root} lies {names}; change source.variant or root")
    raise DataError(
        f"root={root}: no {INFO} beside a {FEATURES} with '{VIDEO}' and '{SEGMENTATIONS}'; "
        f"<data_dir>/movi_c/<resolution>/1.0.0 or a folder above it is needed; change root"
    )


def read_splits(folder: Path) -> dict[str, Split]:
    """The splits that dataset_info.json lists, with the paths of their files. Raises DataError when a field is amiss."""
    path = folder / INFO
    info = _json(path)
    kind = info.get("fileFormat", "tfrecord")
    if kind != "tfrecord":
        raise DataError(f"{path}: fileFormat={kind}; only tfrecord is read; convert the dataset")
    try:
        return {str(item["name"]): _files_of(folder, str(info["name"]), item) for item in info["splits"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: {type(error).__name__} {error} in splits; name and shardLengths are needed") from None


def _files_of(folder: Path, dataset: str, split: dict[str, Any]) -> Split:
    lengths = tuple(int(length) for length in split["shardLengths"])
    template = split.get("filepathTemplate") or DEFAULT_TEMPLATE
    names = []
    for shard in range(len(lengths)):
        fields = {
            "DATASET": dataset,
            "SPLIT": split["name"],
            "FILEFORMAT": "tfrecord",
            "SHARD_INDEX": f"{shard:05d}",
            "NUM_SHARDS": f"{len(lengths):05d}",
            "SHARD_X_OF_Y": f"{shard:05d}-of-{len(lengths):05d}",
        }
        names.append(re.sub(r"\{(\w+)\}", lambda match, fields=fields: fields[match[1]], template))
    return Split(tuple(folder / name for name in names), lengths)


def _has_videos(folder: Path) -> bool:
    if not (folder / FEATURES).is_file():
        return False
    tree = _json(folder / FEATURES).get("featuresDict")
    features = tree.get("features") if isinstance(tree, dict) else None
    return isinstance(features, dict) and VIDEO in features and SEGMENTATIONS in features


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read, {error.strerror or error}; copy it again") from error
    except ValueError as error:
        raise DataError(f"{path}: broken JSON, {error}; copy it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: a {type(content).__name__}; a JSON object is needed; copy it again")
    return content


def _pngs(features: dict[str, Feature], name: str, where: str) -> list[bytes]:
    """The encoded pictures of a feature; at least one."""
    value = features.get(name)
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: no pictures in feature {name!r}; a list of PNG bytes is needed; use a MOVi dataset")
    return value


def _stack(encoded: list[bytes], kind: str, where: str) -> np.ndarray:
    """Decode pictures of one size: (T, H, W, 3) for RGB, (T, H, W) in uint8 or uint16 for grey."""
    pictures = []
    for number, data in enumerate(encoded):
        pictures.append(_decode(data, kind, f"{where}, frame {number}"))
        if pictures[-1].shape != pictures[0].shape or pictures[-1].dtype != pictures[0].dtype:
            raise DataError(f"{where}, frame {number}: {_size(pictures[-1])}, frame 0 {_size(pictures[0])}; all must be alike")
    return np.stack(pictures)


def _decode(data: bytes, kind: str, where: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
            mode, pixels = picture.mode, np.asarray(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not a readable PNG, {error}; the record was written wrongly; leave the video out") from error
    if kind == "grey" and mode in GREY_MODES:
        return pixels.astype(GREY_MODES[mode])
    if kind == mode == "RGB":
        return pixels
    raise DataError(f"{where}: a PNG of mode {mode}; {kind} is needed; use a MOVi dataset")


def _check_same_size(frames: np.ndarray, ids: np.ndarray, where: str) -> None:
    if frames.shape[0] != ids.shape[0]:
        raise DataError(f"{where}: {len(frames)} frames, {len(ids)} segmentations; both must be as many; leave the video out")
    if frames.shape[1:3] != ids.shape[1:3]:
        raise DataError(f"{where}: frames are {_size(frames[0])}, segmentations {_size(ids[0])}; both must have one size")


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]} {picture.dtype}"


def _metadata(features: dict[str, Feature]) -> dict[str, Any]:
    """What is cheap and useful to keep; features that this variant does not have are left out."""
    names = {NAME: "video_name", NUM_INSTANCES: "num_instances", **EXTRAS}
    kept = {name: _plain(features[path]) for path, name in names.items() if path in features}
    for name in ("video_name", "num_instances", "background"):  # scalars
        if isinstance(kept.get(name), list) and len(kept[name]) == 1:
            kept[name] = kept[name][0]
    return kept


def _plain(value: Feature) -> list[Any]:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [item.decode("utf-8", "replace") for item in value]
