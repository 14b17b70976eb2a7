"""SSync: attention maps and object maps teach each other, each where it is the better one.

Logit maps come in; where to learn what, and what it costs, goes out. Redundant slots are merged into one label, then patches
are chosen: at label boundaries of the attention map the decoder learns from it (boundary), inside regions of the object map
slot attention learns from that (interior).
Source: SSync, Eq. 5 to 15, and its released code, which the defaults follow; every fork between the two is a flag.
Everything is tensors of fixed shape, labels are one byte: no loop over clips, frames or patches, nothing read back from the
device. By default the boundary needs the attention map alone and the interior only the decoder's labels, so neither has to
wait for, or keep, the decoder's logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config import SSyncConfig
from trainer.kernels.choice import use_triton
from trainer.kernels.label_error import label_error
from trainer.objective.slot_merging import merge_slots
from trainer.objective.terms import TermValue, term
from trainer.patches import ALONE, PatchGroup
from trainer.precision import at_least_float32, full_precision

NEIGHBOURS = 10  # eight around a patch, the same patch one frame before and one after


class Targets(NamedTuple):
    """What one map teaches the other. Shapes: labels int8 (B, T, P), after merging; chosen bool (B, T, P): where it teaches."""

    labels: Tensor
    chosen: Tensor


class Selection(NamedTuple):
    """What SSync makes of a clip's two maps.

    Shapes: labels int8 (B, T, P), argmax over slots, before and after merging; boundary (from the attention labels) and
    interior (from the object labels) bool (B, T, P), after merging; slot_map int64 (B, S): the slot that each slot became.
    """

    attn_labels: Tensor
    object_labels: Tensor
    merged_attn_labels: Tensor
    merged_object_labels: Tensor
    boundary: Tensor
    interior: Tensor
    slot_map: Tensor


@torch.no_grad()
def select(
    attn_logits: Tensor, object_logits: Tensor, grid: tuple[int, int], config: SSyncConfig, patches: PatchGroup = ALONE
) -> Selection:
    """Merge redundant slots and choose the patches. Shapes: logits (B, T, S, P), P = Y*X = product of `grid`.

    Where ranks share the patches, `patches` is their group, and P and `grid` are this rank's band; so in all that follows.
    """
    with full_precision(attn_logits):
        attn_logits, object_logits = at_least_float32(attn_logits), at_least_float32(object_logits)
        attn_labels, object_labels = (hard_labels(logits, config.kernels) for logits in (attn_logits, object_logits))
        slot_map = merge_slots(attn_logits, object_logits, attn_labels, config.merge, config.kernels, patches)
    boundary = boundary_of(attn_labels, slot_map, grid, config, patches)
    interior = interior_targets(object_labels, slot_map, grid, config, patches)
    return Selection(attn_labels, object_labels, boundary.labels, interior.labels, boundary.chosen, interior.chosen, slot_map)


@torch.no_grad()
def boundary_targets(
    attn_logits: Tensor,
    grid: tuple[int, int],
    config: SSyncConfig,
    object_logits: Tensor | None = None,
    patches: PatchGroup = ALONE,
) -> tuple[Targets, Tensor]:
    """What the decoder learns and where, and slot_map (B, S) for interior_targets.

    Shapes: logits (B, T, S, P). `object_logits` is read only where slot_merging.reads_object_logits(config.merge).
    """
    with full_precision(attn_logits):
        attn_logits = at_least_float32(attn_logits)
        labels = hard_labels(attn_logits, config.kernels)
        objects = None if object_logits is None else at_least_float32(object_logits)
        slot_map = merge_slots(attn_logits, objects, labels, config.merge, config.kernels, patches)
    return boundary_of(labels, slot_map, grid, config, patches), slot_map


def boundary_of(
    attn_labels: Tensor, slot_map: Tensor, grid: tuple[int, int], config: SSyncConfig, patches: PatchGroup = ALONE
) -> Targets:
    """Merged attention labels, and the patches beside a border between two of them."""
    least = config.min_different + 1 if config.boundary_strict else config.min_different
    bounds = (least, config.min_equal, NEIGHBOURS + 1)
    return _targets(attn_labels, slot_map, grid, config, bounds, patches)


def interior_targets(
    object_labels: Tensor, slot_map: Tensor, grid: tuple[int, int], config: SSyncConfig, patches: PatchGroup = ALONE
) -> Targets:
    """What slot attention learns and where: merged object labels, and the patches away from their borders.

    Shapes: object_labels (B, T, P), argmax over slots of the decoder's logits, before merging; slot_map (B, S).
    """
    return _targets(object_labels, slot_map, grid, config, (0, 0, config.max_different), patches)


def _targets(
    labels: Tensor,
    slot_map: Tensor,
    grid: tuple[int, int],
    config: SSyncConfig,
    bounds: tuple[int, int, int],
    patches: PatchGroup,
) -> Targets:
    """Merged labels of the band, and the patches chosen. The rows next to it are looked at, too; what is counted there, at a
    border that is none, is dropped."""
    wider, wider_grid, own = patches.with_next_rows(labels, grid)
    merged, chosen = _merged_and_chosen(wider, slot_map, wider_grid, config, *bounds)
    return Targets(merged[:, :, own], chosen[:, :, own])


def _merged_and_chosen(
    labels: Tensor, slot_map: Tensor, grid: tuple[int, int], config: SSyncConfig, least: int, least_equal: int, below: int
) -> tuple[Tensor, Tensor]:
    """Merged labels, and where at least `least` and fewer than `below` neighbours differ and at least `least_equal` agree."""
    if use_triton(labels, config.kernels):
        from trainer.kernels import ssync_triton

        return ssync_triton.merged_and_chosen(labels, slot_map, grid, config.border == "clamp", least, least_equal, below)
    merged = relabel(labels, slot_map)
    different, equal = count_neighbours(merged, grid, config.border)
    return merged, (different >= least) & (equal >= least_equal) & (different < below)


def boundary_term(object_logits: Tensor, selection: Selection, config: SSyncConfig) -> TermValue:
    """The decoder learns the attention map's labels at boundary patches; the count is the number of those patches."""
    return label_term(object_logits, Targets(selection.merged_attn_labels, selection.boundary), config)


def interior_term(attn_logits: Tensor, selection: Selection, config: SSyncConfig) -> TermValue:
    """Slot attention learns the object map's labels at interior patches; the count is the number of those patches."""
    return label_term(attn_logits, Targets(selection.merged_object_labels, selection.interior), config)


def label_term(logits: Tensor, targets: Targets, config: SSyncConfig) -> TermValue:
    """Squared distance between softmax over slots and the one-hot label, over the chosen patches.

    Differs from SSync Eq. 13 and 14: class_reduction="mean" divides by S as released; "sum" is the equations.
    An empty set gives sum 0 and count 0; what the step makes of 0/0 is its business (see Objective.nan_when_empty).
    """
    with full_precision(logits):
        total = label_error(at_least_float32(logits), targets.labels, targets.chosen, config.temperature, config.kernels)
        return term(total * class_share(logits.shape[2], config), targets.chosen.sum())


def class_share(num_slots: int, config: SSyncConfig) -> float:
    """What multiplies a patch's squared distance: 1/S as released, 1 as printed."""
    return 1 / num_slots if config.class_reduction == "mean" else 1.0


@torch.no_grad()
def hard_labels(logits: Tensor, kernels: str = "torch") -> Tensor:
    """Argmax over slots, the first of equals, one byte each: (B, T, S, P) -> int8 (B, T, P); int16 above 127 slots."""
    num_slots = logits.shape[2]
    dtype = torch.int8 if num_slots < 128 else torch.int16
    if use_triton(logits, kernels):
        from trainer.kernels import ssync_triton

        return ssync_triton.label_map(logits, dtype)
    first_wins = torch.arange(num_slots, 0, -1, dtype=logits.dtype, device=logits.device)
    # floats all the way: argmax would write eight bytes a patch and cannot be vectorised across rows, a bool mask neither
    is_top = torch.eq(logits, logits.amax(dim=2, keepdim=True), out=torch.empty_like(logits))
    labels = num_slots - is_top.mul_(first_wins[:, None]).amax(dim=2)
    return labels.clamp_(max=num_slots - 1).to(dtype)  # NaN equals nothing: some slot, and a loss that is NaN, not a wrong index


def relabel(labels: Tensor, slot_map: Tensor) -> Tensor:
    """labels (B, T, P) through slot_map (B, S), of the labels' type"""
    return slot_map.to(labels.dtype).gather(1, labels.flatten(1).long()).view_as(labels)


def count_neighbours(labels: Tensor, grid: tuple[int, int], border: str) -> tuple[Tensor, Tensor]:
    """How many of a patch's ten neighbours (eight around it, the same patch one frame before and after) carry another label
    and how many the same. (B, T, P) -> two int8 (B, T, P)

    border="clamp": a coordinate outside becomes the nearest inside, each axis for itself, so a corner's neighbours repeat
    and may be the patch itself, which agrees. border="ignore": what lies outside is in neither count.
    Each pair of neighbours is compared once and counted at both ends.
    """
    cells = labels.unflatten(2, grid)
    different = torch.zeros_like(cells, dtype=torch.int8)
    for step in _STEPS:
        _count_unlike(_ends(cells, step), _ends(different, step))
    different_of_ten = different.flatten(2)
    if border == "ignore":
        return different_of_ten, _neighbours_inside(labels.shape[1], grid, labels.device).flatten(1) - different_of_ten
    for dim in (2, 3):  # outside a row's or column's end, a diagonal neighbour is the straight one along that edge
        for edge in (0, -1):
            line, count = cells.select(dim, edge), different.select(dim, edge)
            _count_unlike(_ends(line, (0, 1)), _ends(count, (0, 1)))
    return different_of_ten, NEIGHBOURS - different_of_ten


_STEPS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 1, -1))  # to half of the ten neighbours: the others look back


def _ends(values: Tensor, step: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """All pairs of cells that lie `step` apart, as two views. (B, ...), one entry of `step` for each axis after the first"""
    near = far = values
    for dim, along in enumerate(step, start=1):
        if along:
            length = values.shape[dim] - 1
            near, far = near.narrow(dim, int(along < 0), length), far.narrow(dim, int(along > 0), length)
    return near, far


def _count_unlike(labels: tuple[Tensor, Tensor], counts: tuple[Tensor, Tensor]) -> None:
    unlike = labels[0] != labels[1]
    for count in counts:
        count += unlike


def _neighbours_inside(frames: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """How many of a patch's ten neighbours lie inside the clip. int8 (T, Y, X)"""
    in_time, rows, columns = (
        (3 - (place == 0).to(torch.int8) - (place == size - 1).to(torch.int8))
        for size, place in ((size, torch.arange(size, device=device)) for size in (frames, *grid))
    )
    return (in_time - 1)[:, None, None] + rows[:, None] * columns - 1
