"""Segmentation scores of label maps: in come annotated ids and predicted labels of whole videos, out come mean FG-ARI,
ARI, mBO and mIoU, per frame and per video. Last arrow of the trace but one: maps -> label map -> scores.

Everything is computed from one integer table per frame, (objects, slots) -> pixels; a video's table is their sum.
Words: id 0 is the background where the dataset annotates it (`background_labelled`), otherwise it means "not annotated".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.errors import DataError, check_choice

SCORES = ("fg_ari", "ari", "mbo", "miou")
LEVELS = ("video", "frame")
EMPTY_FOREGROUND = ("one", "skip")

# Values are added up in steps of this size. Sums of fewer than 2**17 such values are exact in float64, so the mean does
# not depend on the order of videos nor on how ranks shared them; it costs at most 2**-37 < 1e-11 of a score.
_STEP = 2.0**-36
# Ids below this index tables directly; larger ones are renumbered first.
_SMALL_IDS = 256

State = dict[str, tuple[float, float]]


class TableScores(NamedTuple):
    """Scores of one sample (a frame or a video); None where the sample has nothing to score."""

    fg_ari: float | None
    ari: float | None
    mbo: float | None
    miou: float | None


# ---------------------------------------------------------------- label maps


def label_map(maps: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Which slot owns each pixel: soft maps brought to `size` bilinearly, then arg-max over slots.

    Shapes: maps (T, S, P) with P = grid[0] * grid[1], row-major, softmax already taken over S; result int32 (T, H, W).
    One frame at a time, so that memory stays at S * H * W floats.
    Source: SlotContrast, released code (align_corners off, no antialiasing, arg-max after upsampling). Differs: nothing.
    """
    num_frames, num_slots, num_patches = maps.shape
    if num_patches != grid[0] * grid[1]:
        raise DataError(f"maps have {num_patches} patches, the grid {grid[0]}x{grid[1]}; both must agree; check model.grid")
    labels = torch.empty((num_frames, *size), dtype=torch.int32, device=maps.device)
    for frame in range(num_frames):
        planes = maps[frame].detach().float().view(1, num_slots, *grid)
        pixels = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)
        labels[frame] = pixels[0].argmax(dim=0)
    return labels


def resize_ids(ids: Tensor | np.ndarray, size: tuple[int, int]) -> Tensor:
    """Ids (T, h, w) of any integer type brought to `size`, each pixel taking the id under its centre ("nearest-exact").

    Source: SlotContrast's mask transform, released code. Differs: nothing in the result; integers are gathered instead
    of being sent through floats.
    """
    ids = torch.as_tensor(ids)
    if ids.dtype == torch.uint16:
        ids = ids.int()  # torch cannot gather from uint16
    if tuple(ids.shape[-2:]) == tuple(size):
        return ids
    rows = _nearest(ids.shape[-2], size[0]).to(ids.device)
    columns = _nearest(ids.shape[-1], size[1]).to(ids.device)
    return ids[:, rows[:, None], columns[None, :]]


def upsample_labels(labels: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Labels of patches (T, P) as labels of pixels (T, H, W): every pixel has the label of the patch it lies in."""
    return resize_ids(labels.view(labels.shape[0], *grid), size)


def _nearest(old: int, new: int) -> Tensor:
    """Source index of each of `new` places; asking torch itself keeps its rounding."""
    return F.interpolate(torch.arange(old, dtype=torch.float32).view(1, 1, old), size=new, mode="nearest-exact").view(-1).long()


# ---------------------------------------------------------------- one sample


def contingency(true: np.ndarray, pred: np.ndarray, ignore: np.ndarray | None = None) -> np.ndarray:
    """How many pixels of each frame have true id c and label k; pixels in `ignore` are not counted.

    Shapes: all (T, H, W); result int64 (T, C, K), row 0 is id 0. Ids and labels may have been renumbered (order kept),
    which no score notices.
    """
    true, pred = _renumber(true), _renumber(pred)
    num_true, num_pred = int(true.max(initial=0)) + 1, int(pred.max(initial=0)) + 1
    tables = np.empty((len(true), num_true, num_pred), dtype=np.int64)
    for frame in range(len(true)):  # frame by frame: the index fits in the cache
        index = true[frame].astype(np.int64) * num_pred + pred[frame]
        index = index.ravel() if ignore is None else index[~ignore[frame]]
        tables[frame] = np.bincount(index, minlength=num_true * num_pred).reshape(num_true, num_pred)
    return tables


def _renumber(ids: np.ndarray) -> np.ndarray:
    """Ids made dense where they are large; 0 stays 0."""
    top = int(ids.max(initial=0))
    if top < _SMALL_IDS:
        return ids
    if top > 4 * ids.size:
        values, dense = np.unique(ids, return_inverse=True)
        return dense.reshape(ids.shape) + (values[0] != 0)
    present = np.zeros(top + 1, dtype=bool)
    present[ids] = True
    present[0] = True
    return (np.cumsum(present) - 1)[ids]


def adjusted_rand(table: np.ndarray) -> float:
    """Adjusted Rand index of a contingency table (C, K); 1 where it is undefined (no pair of points, or one cluster each).

    Range: at most 1, about 0 by chance, slightly below 0 possible.
    Source: Hubert and Arabie 1985, in the form of SlotContrast's released code. Differs: the quotient is formed from exact
    integers and rounded once, so renaming clusters cannot move the last bit.
    """
    same = _pairs(table)
    true, pred = _pairs(table.sum(axis=1)), _pairs(table.sum(axis=0))
    every = _pairs(table.sum(keepdims=True))
    above_chance = 2 * (same * every - true * pred)
    possible = (true + pred) * every - 2 * true * pred
    return above_chance / possible if possible else 1.0


def _pairs(counts: np.ndarray) -> int:
    """Ordered pairs of points inside the same cell, as an unbounded integer."""
    return int((counts * (counts - 1)).sum())


def object_ious(table: np.ndarray) -> np.ndarray:
    """IoU in float64 of every object with at least one counted pixel (id 0 is none) and every label: (O, K).

    A label's area counts all its pixels, those over background and unannotated ones too.
    """
    areas = table.sum(axis=1)
    present = np.flatnonzero(areas[1:]) + 1
    inside = table[present]
    union = areas[present, None] + table.sum(axis=0)[None, :] - inside
    return inside / union


def score_table(table: np.ndarray, *, empty_foreground: str = "one", background_labelled: bool = True) -> TableScores:
    """All scores of one sample from its table (C, K), row 0 being id 0.

    fg_ari: pixels of objects only. ari: background is one more class; None where the dataset does not label it.
    mbo: mean over objects of the best IoU of any label, labels may serve twice. miou: the same under the best one-to-one
    assignment. A sample without any annotation has no score at all; one that is all annotated background has no IoU, and
    its fg_ari is 1 (`empty_foreground="one"`) or None ("skip").
    Source: SlotContrast, released code. Differs: "skip" is ours.
    """
    if not (table if background_labelled else table[1:]).any():
        return TableScores(None, None, None, None)
    foreground = table[1:]
    ari = adjusted_rand(table) if background_labelled else None
    if not foreground.any():
        return TableScores(1.0 if empty_foreground == "one" else None, ari, None, None)
    ious = object_ious(table)
    pairs = linear_sum_assignment(ious, maximize=True)
    return TableScores(adjusted_rand(foreground), ari, float(ious.max(axis=1).mean()), float(ious[pairs].sum() / len(ious)))


# ---------------------------------------------------------------- many samples


class SegmentationScores:
    """Means over videos (`video_*`) and over frames (`frame_*`) of the four scores, as sums and counts.

    A video's scores treat its T*H*W pixels as one set, so a label must mean the same object in all frames; a frame's
    scores do not care. Means are unweighted: every video, or every frame, that has a score counts once.

        scores = SegmentationScores()
        scores.add(true_ids, label_map(maps, grid, size))
        states = gather(scores.state())                            # from all ranks
        result = SegmentationScores().merge(states).result()

    Raises: ConfigError for an unknown `empty_foreground`.
    Source: SlotContrast, released code: VideoARI, ImageARI, VideoIoU and ImageIoU with matching "overlap" and "hungarian".
    Differs: inputs are label maps instead of one-hot masks; sums do not depend on order (see `_STEP`).
    """

    def __init__(self, empty_foreground: str = "one", background_labelled: bool = True) -> None:
        check_choice("evaluate.empty_foreground", empty_foreground, EMPTY_FOREGROUND)
        self.empty_foreground = empty_foreground
        self.background_labelled = background_labelled
        self._state: State = {f"{level}_{name}": (0.0, 0.0) for level in LEVELS for name in SCORES}

    def add(self, true: Tensor | np.ndarray, pred: Tensor | np.ndarray, ignore: Any = None) -> dict[str, float | None]:
        """Count one video and return its own scores (frame scores: mean over its frames); None where it has none.

        Shapes: true (T, H, W) ids, pred (T, H, W) labels, integers of any type; ignore bool (T, H, W): pixels that count
        nowhere, neither as truth nor as prediction.
        Raises: DataError where shapes differ or ids are negative or no integers.
        """
        tables = contingency(*_checked(true, pred, ignore))
        rules: dict[str, Any] = {"empty_foreground": self.empty_foreground, "background_labelled": self.background_labelled}
        samples = {
            "video": [score_table(tables.sum(axis=0), **rules)],
            "frame": [score_table(table, **rules) for table in tables],
        }
        return {
            f"{level}_{name}": self._count(f"{level}_{name}", [getattr(sample, name) for sample in samples[level]])
            for level in LEVELS
            for name in SCORES
        }

    def _count(self, key: str, values: list[float | None]) -> float | None:
        found = [value for value in values if value is not None]
        if not found:
            return None
        total, count = self._state[key]
        self._state[key] = (total + sum(round(value / _STEP) * _STEP for value in found), count + len(found))
        return sum(found) / len(found)

    def state(self) -> State:
        """(sum, count) of every score, the same keys on every rank and at any time."""
        return dict(self._state)

    def merge(self, states: Iterable[Mapping[str, tuple[float, float]]]) -> SegmentationScores:
        """Add other states to this one and return it. To join ranks, start from a fresh object and pass all states."""
        for other in states:
            for key, (total, count) in self._state.items():
                self._state[key] = (total + other[key][0], count + other[key][1])
        return self

    def result(self) -> dict[str, float | None]:
        """Mean of every score; None where nothing was counted."""
        return {key: total / count if count else None for key, (total, count) in self._state.items()}


def _checked(true: Any, pred: Any, ignore: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    arrays = {"annotated ids": _array(true), "predicted labels": _array(pred)}
    shape = arrays["annotated ids"].shape
    for what, array in arrays.items():
        if array.ndim != 3 or array.shape != shape:
            raise DataError(
                f"{what} have shape {list(array.shape)} beside annotated ids {list(shape)}; both must be [T, H, W] of one size; "
                f"bring ids to the size of the maps first (resize_ids)"
            )
        if array.dtype.kind not in "iu" or array.min(initial=0) < 0:
            raise DataError(f"{what} are {array.dtype} with least value {array.min(initial=0)}; integers from 0 on are needed")
    if ignore is None:
        return arrays["annotated ids"], arrays["predicted labels"], None
    ignore = _array(ignore)
    if ignore.shape != shape or ignore.dtype != bool:
        raise DataError(f"ignore mask is {ignore.dtype}{list(ignore.shape)}; bool{list(shape)}, as the ids, is needed")
    return arrays["annotated ids"], arrays["predicted labels"], ignore


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
