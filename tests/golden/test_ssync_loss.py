"""SSync's selection and losses against the released code: label maps and sets exactly, losses and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_files import assert_gradient, assert_values, load, names
from torch import Tensor

from trainer.config import MergeConfig, SSyncConfig
from trainer.objective.slot_merging import mean_iou, slot_areas
from trainer.objective.ssync import boundary_term, interior_term, select
from trainer.objective.terms import TermValue


def config_of(meta: dict[str, Any], **merge: Any) -> SSyncConfig:
    return SSyncConfig(
        min_different=meta.get("n_bd", 1),
        min_equal=meta.get("n_noise", 1),
        max_different=meta.get("n_nbd", 1),
        temperature=meta.get("temperature", 1.0),
        merge=MergeConfig(threshold=meta["thr"], **merge),
    )


def mean_of(value: TermValue) -> Tensor:
    """The step's rule with empty="zero"."""
    return value.sum / value.count.clamp(min=1).to(value.sum.dtype)


def as_grid(values: Tensor, meta: dict[str, Any]) -> Tensor:
    return values.unflatten(2, (meta["H"], meta["W"]))


def test_every_file_is_here() -> None:
    assert len(names("ssync_loss")) == 14


@pytest.mark.parametrize("file", names("ssync_loss"))
def test_labels_and_sets_exactly(file: str) -> None:
    tensors, meta = load(f"ssync_loss/{file}")
    grid = (meta["H"], meta["W"])
    chosen = select(tensors["A"], tensors["D"], grid, config_of(meta))
    found = {
        "grp_labels": chosen.attn_labels,
        "dec_labels": chosen.object_labels,
        "grp_labels_merged": chosen.merged_attn_labels,
        "dec_labels_merged": chosen.merged_object_labels,
        "boundary": chosen.boundary,
        "interior": chosen.interior,
    }
    unmerged = select(tensors["A"], tensors["D"], grid, config_of(meta, mode="none"))
    found |= {"boundary_before_merge": unmerged.boundary, "interior_before_merge": unmerged.interior}
    for name, value in found.items():
        assert torch.equal(as_grid(value, meta).to(tensors[name].dtype), tensors[name]), name
    assert torch.equal(slot_areas(chosen.attn_labels, meta["S"]).float(), tensors["slot_area"].float())
    off_diagonal = ~torch.eye(meta["S"], dtype=torch.bool)
    assert_values(mean_iou(tensors["A"])[:, off_diagonal], tensors["slot_iou"][:, off_diagonal], "slot_iou")


@pytest.mark.parametrize("file", names("ssync_loss"))
def test_losses_and_gradients(file: str) -> None:
    """Where a set is empty the released loss is NaN with a zero gradient; ours is 0 with a zero gradient."""
    tensors, meta = load(f"ssync_loss/{file}")
    attn, obj = tensors["A"].requires_grad_(), tensors["D"].requires_grad_()
    config = config_of(meta)
    selection = select(attn, obj, (meta["H"], meta["W"]), config)
    boundary, interior = boundary_term(obj, selection, config), interior_term(attn, selection, config)
    assert boundary.count == meta["n_boundary"] and interior.count == meta["n_interior"]
    (mean_of(boundary) + mean_of(interior)).backward()
    for name, value in {"loss_bd": boundary, "loss_nbd": interior}.items():
        expected = tensors[name]
        assert bool(expected.isnan()) == bool(value.count == 0)
        assert_values(mean_of(value).detach(), expected.nan_to_num(0.0), name)
    assert_gradient(attn.grad, tensors["grad_A"], "A")
    assert_gradient(obj.grad, tensors["grad_D"], "D")


def waves_on_a_grid() -> tuple[Tensor, Tensor]:
    """Two videos, three frames, six slots, 8 x 8 patches, in float64."""
    b, t, s, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (2, 3, 6, 8, 8)), indexing="ij")

    def wave(a: float, ky: float, c: float, kx: float, kt: float) -> Tensor:
        down = torch.sin(0.7 * s + ky * y * (1 + 0.3 * s) + 0.2 * b)
        across = torch.cos(kx * x * (1 + 0.2 * s) - kt * t + 0.3 * s * b)
        return (a * down + c * across).flatten(3)

    return wave(2.0, 0.35, 1.5, 0.45, 0.5), wave(1.2, 0.33, 1.6, 0.4, 0.45)


@pytest.mark.parametrize(
    ("threshold", "sizes", "relabelled", "expected"),
    [
        (0.4, (0, 384), (223, 182), (math.nan, 0.1125470971)),
        (0.5, (196, 215), (138, 103), (0.0850721260, 0.0863435731)),
        (0.6, (319, 86), (0, 0), (0.0842928715, 0.0317780634)),
        (0.9, (319, 86), (0, 0), (0.0842928715, 0.0317780634)),
    ],
)
def test_numbers_in_float64(
    threshold: float, sizes: tuple[int, int], relabelled: tuple[int, int], expected: tuple[float, float]
) -> None:
    attn, obj = waves_on_a_grid()
    config = SSyncConfig(merge=MergeConfig(threshold=threshold))
    chosen = select(attn, obj, (8, 8), config)
    assert (int(chosen.boundary.sum()), int(chosen.interior.sum())) == sizes
    moved = ((chosen.attn_labels != chosen.merged_attn_labels), (chosen.object_labels != chosen.merged_object_labels))
    assert tuple(int(part.sum()) for part in moved) == relabelled
    for value, number in zip((boundary_term(obj, chosen, config), interior_term(attn, chosen, config)), expected, strict=True):
        if math.isnan(number):
            assert value.sum == 0 and value.count == 0
        else:
            assert float(value.sum / value.count) == pytest.approx(number, abs=1e-8)


def test_labels_left_after_merging() -> None:
    attn, obj = waves_on_a_grid()
    chosen = select(attn, obj, (8, 8), SSyncConfig(merge=MergeConfig(threshold=0.5)))
    both = torch.stack([chosen.merged_attn_labels, chosen.merged_object_labels], dim=1)
    assert [clip.unique().tolist() for clip in both] == [[0, 3, 5], [0, 3, 4, 5]]
