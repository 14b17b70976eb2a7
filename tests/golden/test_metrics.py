"""Scores beside those of the official metric classes, on recorded one-hot masks; and a closed-form case."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.metrics.segmentation import SegmentationScores

FOLDER = Path(__file__).parent / "metrics"
FILES = sorted(path.stem for path in FOLDER.glob("*.npz") if path.stem != "lr_schedules")

# official name -> ours. "fg": their first class is background and left out. "all": every class is an object.
OURS = {
    "video_ari": "video_fg_ari",
    "image_ari": "frame_fg_ari",
    "video_iou_overlap": "video_mbo",
    "image_iou_overlap": "frame_mbo",
    "video_iou_hungarian": "video_miou",
    "image_iou_hungarian": "frame_miou",
}
COVERED = {f"{name}_{classes}" for name in OURS for classes in ("fg", "all")}
# Recorded, but this package has no such score (region and contour similarity, identification, fragmentation).
JF_PARTS = ("j_and_f", "jaccard", "boundary_f_measure")
NOT_OURS = {f"{level}_jf_{classes}/{part}" for level in ("video", "image") for classes in ("fg", "all") for part in JF_PARTS} | {
    "identification",
    "fragmentation",
    "fragmentation_onlycorrect",
    "slot_iou_fragmentation",
    "unused_max_iou",
    "unused_fg_coverage",
}


class Golden:
    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        self.meta = json.loads(str(arrays["meta_json"]))
        self.expected = {key.removeprefix("expect/"): value for key, value in arrays.items() if key.startswith("expect/")}
        self.batches = [(arrays[f"true{i}"], arrays[f"pred{i}"]) for i in range(self.meta["n_batches"])]


def scored(batches: list[tuple[np.ndarray, np.ndarray]], *, background: bool) -> dict[str, float | None]:
    """Our scores of one-hot masks (B, T, C, H, W). `background`: class 0 becomes id 0; otherwise ids count from 1."""
    scores = SegmentationScores(background_labelled=background)
    for true, pred in batches:
        owners = true.sum(axis=2)
        ids = true.argmax(axis=2) + (0 if background else 1)
        ids[owners == 0] = 0
        if background:
            assert (owners == 1).all(), "only one-hot truth has a background class"
        for video in range(len(true)):
            scores.add(ids[video], pred[video].argmax(axis=1), ignore=owners[video] > 1)
    return scores.result()


def close(value: float | None, expected: float) -> bool:
    return np.isnan(expected) if value is None else abs(value - expected) <= 1e-9


def test_all_files_are_here() -> None:
    assert len(FILES) == 10


@pytest.mark.parametrize("name", FILES)
def test_nothing_recorded_is_overlooked(name: str) -> None:
    golden = Golden(name)
    assert set(golden.expected) <= COVERED | NOT_OURS
    missing = COVERED - set(golden.expected)
    assert missing <= set(golden.meta["rejected_by_official"])


@pytest.mark.parametrize("name", FILES)
def test_scores_equal_the_official_ones(name: str) -> None:
    golden = Golden(name)
    groups = [[batch] for batch in golden.batches] + [golden.batches]
    compared = 0
    for classes in ("fg", "all"):
        keys = [key for key in OURS if f"{key}_{classes}" in golden.expected]
        for index, group in enumerate(groups if keys else []):
            ours = scored(group, background=classes == "fg")
            for key in keys:
                expected = float(golden.expected[f"{key}_{classes}"][index])
                assert close(ours[OURS[key]], expected), (key, classes, index, ours[OURS[key]], expected)
                compared += 1
    assert compared >= 6 * len(groups)


@pytest.mark.parametrize("name", FILES)
def test_ari_with_background_is_ari_over_all_classes(name: str) -> None:
    golden = Golden(name)
    if "video_ari_fg" not in golden.expected:
        assert golden.meta["rejected_by_official"]  # no background class in this file
        return
    ours = scored(golden.batches, background=True)
    assert close(ours["video_ari"], float(golden.expected["video_ari_all"][-1]))
    assert close(ours["frame_ari"], float(golden.expected["image_ari_all"][-1]))


def test_drawn_discs_and_boxes() -> None:
    """Values that the official classes give in float64 for shapes written as formulas."""
    t, y, x = np.meshgrid(np.arange(3), np.arange(48), np.arange(48), indexing="ij")
    true = np.zeros((3, 48, 48), dtype=np.uint8)
    true[(y - 14 - 2 * t) ** 2 + (x - 15) ** 2 < 90] = 1
    true[(y - 30) ** 2 + (x - 30 - t) ** 2 < 110] = 2
    true[2][true[2] == 2] = 0
    pred = np.zeros((3, 48, 48), dtype=np.uint8)
    pred[(y - 15 - 2 * t) ** 2 + (x - 16) ** 2 < 110] = 1
    pred[(y > 22) & (y < 40) & (x > 20) & (x < 31)] = 2
    pred[(y > 22) & (y < 40) & (x >= 31) & (x < 42)] = 3
    scores = SegmentationScores().add(true, pred)
    expected = {
        "video_fg_ari": 0.7258582914,
        "video_ari": 0.6622397884,
        "frame_fg_ari": 0.4149386886,
        "video_mbo": 0.5727882531,
        "video_miou": 0.5727882531,
        "frame_mbo": 0.6856318971,
    }
    for key, value in expected.items():
        assert scores[key] == pytest.approx(value, abs=1e-9), key
