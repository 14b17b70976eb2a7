"""SSync: attention maps and object maps teach each other, each where it is the better one.

ModelOutput's two logit maps come in. Redundant slots are merged into one label, then patches are chosen: at label
boundaries of the attention map the decoder learns from it (boundary), inside regions of the object map slot attention
learns from that (interior).
Source: SSync, Eq. 5 to 15, and its released code, which the defaults follow; every fork between the two is a flag.
Everything is tensors of fixed shape: no loop over clips, frames or patches, and nothing is read back from the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config import MergeConfig, SSyncConfig
from trainer.objective.terms import TermValue, term
from trainer.precision import at_least_float32, full_precision

AREA_EPS = 1e-6  # added to every area, so that two empty masks overlap by 0


class Selection(NamedTuple):
    """What SSync makes of a clip's two maps.

    Shapes: labels int64 (B, T, P), argmax over slots, before and after merging; boundary (from the attention labels) and
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
def select(attn_logits: Tensor, object_logits: Tensor, grid: tuple[int, int], config: SSyncConfig) -> Selection:
    """Merge redundant slots and choose the patches. Shapes: logits (B, T, S, P), P = Y*X = product of `grid`."""
    with full_precision(attn_logits):
        attn_logits, object_logits = at_least_float32(attn_logits), at_least_float32(object_logits)
        attn_labels, object_labels = attn_logits.argmax(dim=2), object_logits.argmax(dim=2)
        slot_map = merge_slots(attn_logits, object_logits, attn_labels, config.merge)
        merged_attn, merged_object = relabel(attn_labels, slot_map), relabel(object_labels, slot_map)
        different, equal = count_neighbours(merged_attn, grid, config.border)
        least = config.min_different + 1 if config.boundary_strict else config.min_different
        boundary = (different >= least) & (equal >= config.min_equal)
        different, _ = count_neighbours(merged_object, grid, config.border)
        interior = different < config.max_different
    return Selection(attn_labels, object_labels, merged_attn, merged_object, boundary, interior, slot_map)


def boundary_term(object_logits: Tensor, selection: Selection, config: SSyncConfig) -> TermValue:
    """The decoder learns the attention map's labels at boundary patches; the count is the number of those patches."""
    return _label_error(object_logits, selection.merged_attn_labels, selection.boundary, config)


def interior_term(attn_logits: Tensor, selection: Selection, config: SSyncConfig) -> TermValue:
    """Slot attention learns the object map's labels at interior patches; the count is the number of those patches."""
    return _label_error(attn_logits, selection.merged_object_labels, selection.interior, config)


def _label_error(logits: Tensor, labels: Tensor, chosen: Tensor, config: SSyncConfig) -> TermValue:
    """Squared distance between softmax over slots and the one-hot label, over the chosen patches.

    Differs from SSync Eq. 13 and 14: class_reduction="mean" divides by S as released; "sum" is the equations.
    An empty set gives sum 0 and count 0; what the step makes of 0/0 is its business (see Objective.nan_when_empty).
    """
    with full_precision(logits):
        maps = (at_least_float32(logits) / config.temperature).softmax(dim=2)
        wanted = torch.zeros_like(maps).scatter_(2, labels.unsqueeze(2), 1.0)
        error = (maps - wanted).square().sum(dim=2)
        if config.class_reduction == "mean":
            error = error / logits.shape[2]
        return term(torch.where(chosen, error, 0.0).sum(), chosen.sum())


def merge_slots(attn_logits: Tensor, object_logits: Tensor, attn_labels: Tensor, config: MergeConfig) -> Tensor:
    """Which slot each slot becomes, per clip over all its frames. (B, S) int64"""
    clips, _, num_slots, _ = attn_logits.shape
    identity = torch.arange(num_slots, device=attn_logits.device).expand(clips, -1)
    if config.mode == "none":
        return identity
    edges = redundancy_edges(attn_logits, object_logits, config)
    areas = slot_areas(attn_labels, num_slots)
    if config.mode == "pairwise":
        return _largest_direct_neighbour(edges, areas, identity)
    return _largest_of_component(edges, areas)


def slot_areas(labels: Tensor, num_slots: int) -> Tensor:
    """Patches of the whole clip that carry each label: (B, T, P) -> (B, S) int64"""
    flat = labels.flatten(1)
    return flat.new_zeros(flat.shape[0], num_slots).scatter_add_(1, flat, torch.ones_like(flat))


def redundancy_edges(attn_logits: Tensor, object_logits: Tensor, config: MergeConfig) -> Tensor:
    """Pairs of different slots that cover the same patches: IoU above config.threshold. (B, S, S) bool, symmetric"""
    as_probs = config.space == "probs"
    if config.source == "avg_map":  # logits of the two maps have no common scale, so this one averages probabilities
        edges = mean_iou((attn_logits.softmax(dim=2) + object_logits.softmax(dim=2)) / 2) > config.threshold
    else:
        wanted = {"A": [attn_logits], "D": [object_logits]}.get(config.source, [attn_logits, object_logits])
        overlaps = [mean_iou(logits.softmax(dim=2) if as_probs else logits) for logits in wanted]
        if config.source == "avg_iou":
            overlaps = [(overlaps[0] + overlaps[1]) / 2]
        edges = overlaps[0] > config.threshold
        if config.source == "A_or_D":
            edges = edges | (overlaps[1] > config.threshold)
        elif config.source == "A_and_D":
            edges = edges & (overlaps[1] > config.threshold)
    return edges & ~torch.eye(edges.shape[1], dtype=torch.bool, device=edges.device)


def mean_iou(values: Tensor) -> Tensor:
    """Each slot covers the patches where it lies above its own mean over the clip; IoU of all pairs, mean over frames.

    Shapes: (B, T, S, P) -> (B, S, S). A frame in which both masks are empty counts as 0, as released.
    """
    covered = (values > values.mean(dim=(1, 3), keepdim=True)).to(values.dtype)
    shared = covered @ covered.mT  # whole numbers, exact in float32
    areas = shared.diagonal(dim1=2, dim2=3) + AREA_EPS
    return (shared / (areas.unsqueeze(3) + areas.unsqueeze(2) - shared)).mean(dim=1)


def _largest_direct_neighbour(edges: Tensor, areas: Tensor, identity: Tensor) -> Tensor:
    """Each slot becomes the largest of its direct neighbours that are larger than itself; chains are not followed."""
    larger = edges & (areas.unsqueeze(1) > areas.unsqueeze(2))  # [b, s, n]: n is larger than s
    best = areas.unsqueeze(1).where(larger, -1).argmax(dim=2)
    return best.where(larger.any(dim=2), identity)


def _largest_of_component(edges: Tensor, areas: Tensor) -> Tensor:
    """Each slot becomes the slot with the most patches of its connected component; ties go to the first in visiting order."""
    num_slots = edges.shape[1]
    reached = edges | torch.eye(num_slots, dtype=torch.bool, device=edges.device)
    for _ in range(max(num_slots - 1, 1).bit_length()):  # paths twice as long each time
        reached = (reached.float() @ reached.float()) > 0.5
    rank = areas * num_slots + (num_slots - 1 - visiting_order(edges))  # area first, then whoever is visited earlier
    return rank.unsqueeze(1).where(reached, -1).argmax(dim=2)


def visiting_order(edges: Tensor) -> Tensor:
    """When a depth-first search with a stack visits each slot; within a component only the order matters. (B, S) int64

    The released search starts at the lowest unvisited slot, takes the newest entry of the stack and pushes its unvisited
    neighbours in ascending order. Here a slot's last push is kept as a number, so that the newest entry is a maximum:
    S steps of a few tensor operations for all clips at once.
    """
    clips, num_slots, _ = edges.shape
    slots = torch.arange(num_slots, device=edges.device)
    last_push = torch.zeros(clips, num_slots, dtype=torch.int64, device=edges.device)
    order = torch.full_like(last_push, -1)
    for step in range(num_slots):
        newest = last_push * num_slots + slots  # pushed later first, then the higher slot
        unpushed = -1 - slots  # nothing on the stack: the lowest slot
        priority = newest.where(last_push > 0, unpushed).where(order < 0, -1 - num_slots)
        chosen = priority.argmax(dim=1, keepdim=True)
        order = order.scatter(1, chosen, step)
        neighbours = edges.gather(1, chosen.unsqueeze(2).expand(-1, -1, num_slots)).squeeze(1)
        last_push = last_push.masked_fill(neighbours, step + 1)
    return order


def relabel(labels: Tensor, slot_map: Tensor) -> Tensor:
    """labels (B, T, P) through slot_map (B, S)"""
    return slot_map.gather(1, labels.flatten(1)).view_as(labels)


def count_neighbours(labels: Tensor, grid: tuple[int, int], border: str) -> tuple[Tensor, Tensor]:
    """How many of a patch's ten neighbours (eight around it, the same patch one frame before and after) carry another label
    and how many the same. (B, T, P) -> two int8 (B, T, P)

    border="clamp": a coordinate outside becomes the nearest inside, each axis for itself, so a corner's neighbours repeat
    and may be the patch itself, which agrees. border="ignore": what lies outside is in neither count.
    """
    centre = labels.to(torch.int16).unflatten(2, grid)  # a quarter of the traffic of the ten comparisons
    padded = _pad(centre, outside=-1 if border == "ignore" else None)
    frames, (rows, columns) = labels.shape[1], grid
    different = torch.zeros_like(centre, dtype=torch.int8)
    equal = torch.zeros_like(different)
    for t, y, x in _OFFSETS:
        neighbour = padded[:, 1 + t : 1 + t + frames, 1 + y : 1 + y + rows, 1 + x : 1 + x + columns]
        same = neighbour == centre
        equal += same
        different += ~same & (neighbour >= 0)
    return different.flatten(2), equal.flatten(2)


_OFFSETS = [(0, y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)] + [(-1, 0, 0), (1, 0, 0)]


def _pad(labels: Tensor, outside: int | None) -> Tensor:
    """One cell more at both ends of T, Y and X: `outside`, or the nearest label when None. (B, T, Y, X) -> (B, T+2, Y+2, X+2)"""
    for dim in (1, 2, 3):
        first, last = labels.narrow(dim, 0, 1), labels.narrow(dim, -1, 1)
        if outside is not None:
            first = last = torch.full_like(first, outside)
        labels = torch.cat([first, labels, last], dim=dim)
    return labels
