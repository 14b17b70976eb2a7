"""Which slots of a clip are redundant and what each becomes: SSync's merging.

Logit maps and label maps come in, a map from slot to slot goes out. Tensors of fixed shape, nothing read back.
Source: SSync, Eq. 7 and 8, and its released code, which the defaults follow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config import MergeConfig
from trainer.kernels.choice import use_triton
from trainer.patches import ALONE, PatchGroup

AREA_EPS = 1e-6  # added to every area, so that two empty masks overlap by 0


def reads_object_logits(config: MergeConfig) -> bool:
    """False where the attention map alone decides what is merged: then the decoder need not have run yet."""
    return config.mode != "none" and config.source != "A"


def merge_slots(
    attn_logits: Tensor,
    object_logits: Tensor | None,
    attn_labels: Tensor,
    config: MergeConfig,
    kernels: str = "torch",
    patches: PatchGroup = ALONE,
) -> Tensor:
    """Which slot each slot becomes, per clip over all its frames and patches. (B, S) int64

    Shapes: logits (B, T, S, P), attn_labels (B, T, P), P this rank's patches; `patches`: who holds the others.
    `object_logits` may be None unless reads_object_logits(config).
    """
    clips, _, num_slots, _ = attn_logits.shape
    identity = torch.arange(num_slots, device=attn_logits.device).expand(clips, -1)
    if config.mode == "none":
        return identity
    edges = redundancy_edges(attn_logits, object_logits, config, patches)
    areas = patches.total(slot_areas(attn_labels, num_slots))
    if config.mode == "pairwise":
        return _largest_direct_neighbour(edges, areas, identity)
    if use_triton(attn_logits, kernels):
        from trainer.kernels import ssync_triton

        return ssync_triton.largest_of_component(edges, areas)
    return _largest_of_component(edges, areas)


def slot_areas(labels: Tensor, num_slots: int) -> Tensor:
    """Patches of the whole clip that carry each label: (B, T, P) -> (B, S) int64"""
    flat = labels.flatten(1).long()
    return flat.new_zeros(flat.shape[0], num_slots).scatter_add_(1, flat, torch.ones_like(flat))


def redundancy_edges(
    attn_logits: Tensor, object_logits: Tensor | None, config: MergeConfig, patches: PatchGroup = ALONE
) -> Tensor:
    """Pairs of different slots that cover the same patches: IoU above config.threshold. (B, S, S) bool, symmetric"""
    as_probs = config.space == "probs"
    wanted = [attn_logits] if config.source != "D" else []
    if config.source != "A":
        assert object_logits is not None, f"objective.ssync.merge.source={config.source} reads the decoder's logits"
        wanted.append(object_logits)
    if config.source == "avg_map":  # logits of the two maps have no common scale, so this one averages probabilities
        edges = mean_iou((wanted[0].softmax(dim=2) + wanted[1].softmax(dim=2)) / 2, patches) > config.threshold
    else:
        overlaps = [mean_iou(logits.softmax(dim=2) if as_probs else logits, patches) for logits in wanted]
        if config.source == "avg_iou":
            overlaps = [(overlaps[0] + overlaps[1]) / 2]
        edges = overlaps[0] > config.threshold
        if config.source == "A_or_D":
            edges = edges | (overlaps[1] > config.threshold)
        elif config.source == "A_and_D":
            edges = edges & (overlaps[1] > config.threshold)
    return edges & ~torch.eye(edges.shape[1], dtype=torch.bool, device=edges.device)


@torch.no_grad()
def mean_iou(values: Tensor, patches: PatchGroup = ALONE) -> Tensor:
    """Each slot covers the patches where it lies above its own mean over the clip; IoU of all pairs, mean over frames.

    Shapes: (B, T, S, P) -> (B, S, S). A frame in which both masks are empty counts as 0, as released.
    """
    covered = torch.gt(values, patches.mean_over_clip(values), out=torch.empty_like(values))  # 0 or 1
    shared = patches.total(covered @ covered.mT)  # whole numbers, exact in float32
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
