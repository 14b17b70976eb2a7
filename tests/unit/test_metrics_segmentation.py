"""FG-ARI, ARI, mBO and mIoU: cases counted by hand, invariants, and a slow twin on one-hot masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from data_pipeline.errors import ConfigError, DataError
from trainer.metrics.segmentation import (
    SegmentationScores,
    adjusted_rand,
    contingency,
    label_map,
    object_ious,
    resize_ids,
    score_table,
    upsample_labels,
)

KEYS = {f"{level}_{name}" for level in ("video", "frame") for name in ("fg_ari", "ari", "mbo", "miou")}


def ids(*frames: str) -> np.ndarray:
    """Frames drawn as rows of digits: ids("01 22", "00 11") is (2, 2, 2)."""
    return np.array([[[int(digit) for digit in row] for row in frame.split()] for frame in frames])


@st.composite
def videos(draw: st.DrawFn, max_id: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """true, pred, ignore of one small video, with empty frames, lone pixels and unused labels now and then."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 5)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    true = rng.integers(0, draw(st.integers(1, max_id + 1)), shape)
    pred = rng.integers(0, draw(st.integers(1, max_id + 2)), shape)
    true[rng.random(shape[0]) < 0.2] = 0
    return true, pred, rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.95]))


# ---------------------------------------------------------------- a slow twin


def slow_ari(true: np.ndarray, pred: np.ndarray) -> float:
    """By counting pairs of points one by one."""
    points = list(zip(true.tolist(), pred.tolist(), strict=True))
    pairs = list(itertools.permutations(points, 2))
    both = sum(a[0] == b[0] and a[1] == b[1] for a, b in pairs)
    in_true = sum(a[0] == b[0] for a, b in pairs)
    in_pred = sum(a[1] == b[1] for a, b in pairs)
    chance = in_true * in_pred / max(len(pairs), 1)
    possible = (in_true + in_pred) / 2 - chance
    return 1.0 if abs(possible) < 1e-9 else (both - chance) / possible


def slow_overlaps(true: np.ndarray, pred: np.ndarray) -> tuple[float, float] | None:
    """mBO and mIoU from boolean masks, trying every assignment."""
    objects = [true == value for value in np.unique(true) if value != 0]
    if not objects:
        return None
    labels = [pred == value for value in range(int(pred.max()) + 1)]
    labels += [np.zeros_like(true, dtype=bool)] * max(len(objects) - len(labels), 0)
    iou = [[(one & other).sum() / (one | other).sum() for other in labels] for one in objects]
    best = [max(row) for row in iou]
    ways = itertools.permutations(range(len(labels)), len(objects))
    matched = max(sum(row[way[i]] for i, row in enumerate(iou)) for way in ways)
    return sum(best) / len(objects), matched / len(objects)


def slow_scores(true: np.ndarray, pred: np.ndarray, ignore: np.ndarray) -> tuple[float | None, ...]:
    """One sample: fg_ari, ari, mbo, miou with labelled background."""
    true, pred = true[~ignore], pred[~ignore]
    if not true.size:
        return None, None, None, None
    overlaps = slow_overlaps(true, pred) or (None, None)
    return slow_ari(true[true != 0], pred[true != 0]), slow_ari(true, pred), *overlaps


@settings(max_examples=60, deadline=None)
@given(videos())
def test_equals_the_slow_twin(video: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    true, pred, ignore = video
    scores = SegmentationScores()
    ours = scores.add(true, pred, ignore)
    assert scores.result() == pytest.approx(ours, abs=1e-10)
    samples = {"video": [slow_scores(true, pred, ignore)], "frame": [slow_scores(*frame) for frame in zip(*video, strict=True)]}
    for level, per_sample in samples.items():
        for name, values in zip(("fg_ari", "ari", "mbo", "miou"), zip(*per_sample, strict=True), strict=True):
            found = [value for value in values if value is not None]
            expected = np.mean(found) if found else None
            assert ours[f"{level}_{name}"] == (None if expected is None else pytest.approx(expected, abs=1e-9)), (level, name)


# ---------------------------------------------------------------- by hand


def test_counts_made_by_hand() -> None:
    scores = SegmentationScores().add(ids("0112 0112"), ids("0012 0012"))
    # objects: 1 with 4 pixels (2 under label 0, 2 under label 1), 2 with 2 pixels, both under label 2
    assert scores["video_mbo"] == pytest.approx((2 / 4 + 1) / 2)
    assert scores["video_miou"] == pytest.approx((2 / 4 + 1) / 2)
    # ordered pairs: same 2+2+2=6; true 12+2=14; pred 2+2+2=6; all 30; chance 14*6/30=2.8
    assert scores["video_fg_ari"] == pytest.approx((6 - 2.8) / ((14 + 6) / 2 - 2.8))
    # with background: same 2+2+2+2=8; true 2+12+2=16; pred 12+2+2=16; all 56; chance 32/7
    assert scores["video_ari"] == pytest.approx((8 - 32 / 7) / (16 - 32 / 7))


def test_one_label_may_serve_two_objects_only_for_mbo() -> None:
    scores = SegmentationScores().add(ids("1122"), ids("0000"))
    assert scores["video_mbo"] == 0.5
    assert scores["video_miou"] == 0.25


def test_a_label_swap_costs_the_video_and_not_the_frames() -> None:
    scores = SegmentationScores().add(ids("1122", "1122"), ids("0011", "1100"))
    assert scores["frame_fg_ari"] == scores["frame_mbo"] == scores["frame_miou"] == 1
    assert scores["video_mbo"] == pytest.approx(1 / 3)
    assert scores["video_fg_ari"] == pytest.approx(-1 / 6)


def test_predictions_over_background_cost_iou_and_not_fg_ari() -> None:
    scores = SegmentationScores().add(ids("1100"), ids("1111"))
    assert scores["video_fg_ari"] == 1
    assert scores["video_mbo"] == 0.5


def test_ignored_pixels_count_nowhere() -> None:
    ignore = ids("0011") > 0
    scores = SegmentationScores().add(ids("1120"), ids("1111"), ignore)
    assert scores["video_mbo"] == scores["video_miou"] == scores["video_fg_ari"] == scores["video_ari"] == 1


def test_a_lone_object_pixel_scores_ari_one() -> None:
    scores = SegmentationScores().add(ids("100 000"), ids("000 000"))
    assert scores["video_fg_ari"] == 1
    assert scores["video_mbo"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(("rule", "expected"), [("one", 1.0), ("skip", None)])
def test_empty_foreground(rule: str, expected: float | None) -> None:
    scores = SegmentationScores(empty_foreground=rule)
    assert scores.add(ids("0000"), ids("0123"))["video_fg_ari"] == expected
    result = scores.result()
    assert result["frame_fg_ari"] == expected
    assert result["video_ari"] == 0
    assert result["video_mbo"] is None
    assert result["video_miou"] is None


def test_an_empty_frame_of_a_video_with_objects() -> None:
    true, pred = ids("1200", "0000"), ids("1100", "0011")
    assert SegmentationScores().add(true, pred)["frame_fg_ari"] == pytest.approx((0 + 1) / 2)
    assert SegmentationScores("skip").add(true, pred)["frame_fg_ari"] == 0
    assert SegmentationScores().add(true, pred)["frame_mbo"] == 0.5


@pytest.mark.parametrize("rule", ["one", "skip"])
def test_without_labelled_background_zero_is_unannotated(rule: str) -> None:
    scores = SegmentationScores(empty_foreground=rule, background_labelled=False)
    assert set(scores.add(ids("00"), ids("01")).values()) == {None}
    found = scores.add(ids("0120", "0000"), ids("0122", "0011"))
    assert found["video_fg_ari"] == found["frame_fg_ari"] == 1
    assert found["video_ari"] is None
    assert scores.state()["video_fg_ari"] == (1.0, 1.0)
    assert scores.state()["frame_mbo"] == (0.75, 1.0)


def test_a_sample_that_is_ignored_whole_is_skipped() -> None:
    scores = SegmentationScores()
    assert set(scores.add(ids("01"), ids("01"), np.ones((1, 1, 2), dtype=bool)).values()) == {None}
    assert set(scores.result().values()) == {None}


def test_means_are_over_videos_whatever_their_length() -> None:
    scores = SegmentationScores()
    scores.add(ids("12", "12", "12"), ids("00", "00", "00"))
    scores.add(ids("12"), ids("01"))
    result = scores.result()
    assert result["video_miou"] == pytest.approx((0.25 + 1) / 2)
    assert result["frame_miou"] == pytest.approx((3 * 0.25 + 1) / 4)


# ---------------------------------------------------------------- invariants


@settings(max_examples=40, deadline=None)
@given(videos(), st.permutations(range(6)), st.permutations(range(1, 6)))
def test_names_of_labels_and_objects_do_not_matter(video: tuple[np.ndarray, ...], labels: list[int], objects: list[int]) -> None:
    true, pred, ignore = video
    other = SegmentationScores().add(np.array([0, *objects])[true], np.array(labels)[pred], ignore)
    assert other == pytest.approx(SegmentationScores().add(true, pred, ignore), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(videos(), st.booleans())
def test_a_perfect_prediction_scores_one(video: tuple[np.ndarray, ...], background: bool) -> None:
    true, _, ignore = video
    scores = SegmentationScores(background_labelled=background).add(true, 5 - true, ignore)
    assert set(scores.values()) <= {1.0, None}


@settings(max_examples=40, deadline=None)
@given(videos(), st.sampled_from([7, 300, 10**9]))
def test_large_ids_change_nothing(video: tuple[np.ndarray, ...], factor: int) -> None:
    true, pred, ignore = video
    assert SegmentationScores().add(true * factor, pred * factor + factor, ignore) == SegmentationScores().add(true, pred, ignore)


@settings(max_examples=30, deadline=None)
@given(st.lists(videos(), min_size=1, max_size=6), st.randoms(use_true_random=False), st.integers(1, 4))
def test_any_split_over_ranks_gives_the_same_bits(all_videos: list, random: object, num_ranks: int) -> None:
    whole = SegmentationScores()
    for video in all_videos:
        whole.add(*video)
    shuffled = list(all_videos)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    ranks = [SegmentationScores() for _ in range(num_ranks)]
    for video in shuffled:
        ranks[random.randrange(num_ranks)].add(*video)  # type: ignore[attr-defined]
    states = [rank.state() for rank in ranks]
    assert {frozenset(state) for state in states} == {frozenset(KEYS)}
    assert SegmentationScores().merge(states).result() == whole.result()


@settings(max_examples=40, deadline=None)
@given(videos())
def test_order_among_scores(video: tuple[np.ndarray, ...]) -> None:
    scores = SegmentationScores().add(*video)
    if scores["video_mbo"] is not None:
        assert 0 <= scores["video_miou"] <= scores["video_mbo"] + 1e-12 <= 1 + 2e-12
    assert all(value is None or -0.5 <= value <= 1 for value in scores.values())


def test_many_pixels_do_not_overflow() -> None:
    table = np.array([[10**9, 0], [0, 10**9]], dtype=np.int64)
    assert adjusted_rand(table) == 1.0
    assert adjusted_rand(np.array([[10**9, 10**9]])) == 0.0


def test_table_and_ious() -> None:
    table = contingency(ids("0112", "0033"), ids("1112", "0000"))
    assert table.shape == (2, 4, 3)
    assert table[0].tolist() == [[0, 1, 0], [0, 2, 0], [0, 0, 1], [0, 0, 0]]
    assert object_ious(table[0]).tolist() == [[0, 2 / 3, 0], [0, 0, 1]]
    assert score_table(table[1]).mbo == 0.5


# ---------------------------------------------------------------- inputs


def test_tensors_of_any_integer_type_are_taken() -> None:
    true, pred = ids("0112"), ids("0112")
    for kind in (torch.uint8, torch.int16, torch.int32, torch.int64):
        scores = SegmentationScores().add(
            torch.from_numpy(true).to(kind), torch.from_numpy(pred).to(kind), torch.zeros(1, 1, 4) > 0
        )
        assert scores["video_mbo"] == 1


@pytest.mark.parametrize("value", [1, 300, 65535])
def test_an_object_that_fills_the_frame_is_no_background(value: int) -> None:
    scores = SegmentationScores().add(np.full((1, 16, 16), value, dtype=np.uint16), np.zeros((1, 16, 16), dtype=np.uint8))
    assert scores["video_mbo"] == 1


@pytest.mark.parametrize(
    ("true", "pred", "ignore", "word"),
    [
        (ids("01"), ids("012"), None, "predicted labels"),
        (ids("01")[0], ids("01")[0], None, r"\[T, H, W\]"),
        (ids("01").astype(float), ids("01"), None, "float64"),
        (ids("01"), ids("01") - 1, None, "least value -1"),
        (ids("01"), ids("01"), ids("01"), "ignore mask"),
    ],
)
def test_wrong_inputs_are_refused(true: np.ndarray, pred: np.ndarray, ignore: np.ndarray | None, word: str) -> None:
    scores = SegmentationScores()
    with pytest.raises(DataError, match=word):
        scores.add(true, pred, ignore)
    assert set(scores.result().values()) == {None}


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty_foreground"):
        SegmentationScores(empty_foreground="zero")


# ---------------------------------------------------------------- maps to labels


def test_label_map_equals_upsampling_all_at_once() -> None:
    maps = torch.randn(3, 4, 30, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    labels = label_map(maps, (5, 6), (17, 29))
    whole = F.interpolate(maps.view(3, 4, 5, 6), size=(17, 29), mode="bilinear", align_corners=False, antialias=False)
    assert labels.dtype == torch.int32
    assert torch.equal(labels.long(), whole.argmax(dim=1))


def test_label_map_compares_after_upsampling() -> None:
    # Half way between two patches slot 2 wins although it wins neither of them.
    maps = torch.tensor([[[0.55, 0.0], [0.0, 0.55], [0.45, 0.45]]])
    assert label_map(maps, (1, 2), (1, 8))[0, 0].tolist() == [0, 0, 0, 2, 2, 1, 1, 1]


def test_label_map_takes_half_precision_and_gradients() -> None:
    maps = torch.rand(2, 3, 20, dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(label_map(maps, (4, 5), (8, 5)), label_map(maps.detach().float(), (4, 5), (8, 5)))


def test_label_map_refuses_another_grid() -> None:
    with pytest.raises(DataError, match="30 patches"):
        label_map(torch.rand(2, 3, 30), (5, 5), (10, 10))


@pytest.mark.parametrize(("old", "new"), [((4, 6), (9, 5)), ((7, 7), (7, 21)), ((48, 64), (336, 336)), ((11, 3), (1, 1))])
def test_resize_ids_is_nearest_exact(old: tuple[int, int], new: tuple[int, int]) -> None:
    values = torch.randint(0, 50_000, (2, *old), generator=torch.Generator().manual_seed(1))
    expected = F.interpolate(values[None].double(), size=new, mode="nearest-exact")[0].long()
    assert torch.equal(resize_ids(values, new), expected)
    assert torch.equal(resize_ids(values.numpy().astype(np.uint16), new).long(), expected)


def test_upsample_labels_repeats_patches() -> None:
    labels = torch.tensor([[0, 1, 2, 3, 4, 5]])
    assert upsample_labels(labels, (2, 3), (4, 3))[0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
