"""COCO 2017: images with instance masks, each a clip of one frame.

Comes in: a folder with annotations/instances_{train,val}2017.json beside {train,val}2017/. Goes out: Clip with T = 1; instance
ids 1..n stand for the annotations of an image in the order of their ids, whatever their class. Crowd annotations are left out;
where masks overlap the higher id wins. An image without annotations has ids of 0 only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.clip import Clip
from data_pipeline.config import CocoSource
from data_pipeline.errors import ConfigError, DataError, unknown_key
from data_pipeline.sources.ytvis import draw_ids, read_frames

SPLITS = {"train": "train2017", "validation": "val2017"}
REMEDY = "mend the annotation or leave the image out"


class Annotation(NamedTuple):
    """One object: its outline is a list of polygons (arrays x0 y0 x1 y1 ...) or a run-length encoded mask."""

    number: int
    image: int
    category: int
    crowd: bool
    outline: Any


class Picture(NamedTuple):
    """An image of the file, its annotations in the order of their ids."""

    number: int
    file_name: str
    size: tuple[int, int]  # height, width
    annotations: tuple[Annotation, ...]


class CocoImages:
    """Source of COCO 2017. Key: the image id in twelve digits, as in the file names."""

    background_labelled = False

    def __init__(self, config: CocoSource, root: str | None) -> None:
        if root is None:
            raise ConfigError("root=null; source coco reads a folder with annotations, train2017 and val2017; add root=FOLDER")
        self.root = Path(root)
        self._splits: dict[str, dict[str, Picture]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The annotations are read again in another process: sending them costs more."""
        return {**self.__dict__, "_splits": {}}

    def keys(self, split: str) -> list[str]:
        return list(self._split(split))

    def read(self, split: str, key: str) -> Clip:
        pictures = self._split(split)
        if key not in pictures:
            raise unknown_key("image", key, split, self.root)
        picture = pictures[key]
        path = self.root / SPLITS[split] / picture.file_name
        frames = read_frames([path])
        if frames.shape[1:3] != picture.size:
            listed, found = picture.size, frames.shape[1:3]
            raise DataError(
                f"{path}: {found[1]}x{found[0]}, its annotations {listed[1]}x{listed[0]}; both must have one size; copy it again"
            )
        ids = paint(picture, f"{_annotation_file(self.root, split)}, image {picture.number}")
        metadata = {
            "image_id": picture.number,
            "num_instances": len(picture.annotations),
            "categories": [annotation.category for annotation in picture.annotations],
        }
        return Clip(key=key, frames=frames, instance_ids=ids, metadata=metadata)

    def _split(self, split: str) -> dict[str, Picture]:
        if split not in SPLITS:
            raise DataError(f"split={split!r} is not in {self.root}; it has {', '.join(SPLITS)}; change splits")
        if split not in self._splits:
            if not (self.root / SPLITS[split]).is_dir():
                raise DataError(f"{self.root / SPLITS[split]} is not a folder; the images must lie there; change root or splits")
            self._splits[split] = load_pictures(_annotation_file(self.root, split))
        return self._splits[split]


def load_pictures(path: Path) -> dict[str, Picture]:
    """Every image of an annotation file in file order, by key. Raises DataError with the file and the faulty entry."""
    try:
        content = json.loads(path.read_bytes(), object_hook=_shrink)
        annotations = _by_image(content["annotations"])
        pictures = [_picture(item, annotations) for item in content["images"]]
    except OSError as error:
        raise DataError(f"{path}: cannot be read, {error.strerror or error}; change root or copy it again") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: {type(error).__name__} {error}; these are not COCO instances; copy it again") from None
    by_key = {f"{picture.number:012d}": picture for picture in pictures}
    if len(by_key) < len(pictures):
        raise DataError(f"{path}: {len(pictures)} images with {len(by_key)} ids; ids must differ; copy it again")
    if not by_key:
        raise DataError(f"{path}: no images; at least one is needed; copy it again")
    return by_key


def paint(picture: Picture, where: str) -> np.ndarray:
    """The instance ids of an image: (1, H, W), 0 = none, k = annotation k-1; a later one covers an earlier one."""
    masks = tuple(
        {"id": annotation.number, "segmentations": [_run_lengths(annotation, picture.size, where)]}
        for annotation in picture.annotations
    )
    return draw_ids(masks, (1, *picture.size), where)


def _run_lengths(annotation: Annotation, size: tuple[int, int], where: str) -> dict[str, Any]:
    """An outline as a run-length encoded mask; polygons are filled by pycocotools, as COCO's own scores do."""
    if not isinstance(annotation.outline, list):
        return annotation.outline  # checked where it is decoded
    from pycocotools import mask as coco

    _check_polygons(annotation.outline, size, f"{where}, annotation {annotation.number}")
    polygons = [polygon for polygon in annotation.outline if polygon.size >= 6]  # fewer than three corners enclose nothing
    if not polygons:
        return {"size": list(size), "counts": [size[0] * size[1]]}
    merged = coco.merge(coco.frPyObjects(polygons, *size))
    return {"size": list(size), "counts": merged["counts"].decode("ascii")}


def _check_polygons(polygons: list[Any], size: tuple[int, int], where: str) -> None:
    """pycocotools takes any numbers, and memory by the length of a side: refuse what cannot be an outline in this image."""
    for polygon in polygons:
        if not isinstance(polygon, np.ndarray) or polygon.ndim != 1 or polygon.size % 2:
            raise DataError(f"{where}: a polygon must be a list of numbers x0, y0, x1, y1, ...; {REMEDY}")
        if not (np.abs(polygon) <= 2 * max(size)).all():  # also false for NaN
            raise DataError(f"{where}: a polygon leaves the image of {size[1]}x{size[0]} pixels; {REMEDY}")


def _shrink(item: dict[str, Any]) -> Any:
    """What is kept of an object while the file is read: all polygons of COCO as lists of numbers would take gigabytes."""
    if "segmentation" not in item:
        return item
    outline = item["segmentation"]
    if isinstance(outline, list):
        outline = [_coordinates(polygon) for polygon in outline]
    number, image, category = (int(item[name]) for name in ("id", "image_id", "category_id"))
    return Annotation(number, image, category, bool(item.get("iscrowd", 0)), outline)


def _coordinates(polygon: Any) -> Any:
    """An array; anything else stays as it is until its image is read."""
    try:
        return np.array(polygon, np.float64)
    except (TypeError, ValueError, OverflowError):
        return polygon


def _by_image(annotations: list[Annotation]) -> dict[int, list[Annotation]]:
    """Annotations that count, by image id, each list in the order of annotation ids."""
    grouped: dict[int, list[Annotation]] = defaultdict(list)
    for annotation in sorted(annotations, key=lambda item: item.number):
        if not annotation.crowd:
            grouped[annotation.image].append(annotation)
    return grouped


def _picture(item: dict[str, Any], annotations: dict[int, list[Annotation]]) -> Picture:
    number, file_name = int(item["id"]), str(item["file_name"])
    if number < 0 or Path(file_name).name != file_name:
        raise ValueError(f"image id={number} has file_name={file_name!r}; an id from 0 on and a plain name are needed")
    return Picture(number, file_name, (int(item["height"]), int(item["width"])), tuple(annotations.get(number, ())))


def _annotation_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{SPLITS[split]}.json"
