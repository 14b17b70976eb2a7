"""SSync's selection and losses the direct way, for comparison: a copy of the labels for each neighbour, one-hot maps, a search
with a stack for each clip, autograd. What the released code does in shape and storage, less the masks that it never uses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

OFFSETS = [(0, y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x] + [(-1, 0, 0), (1, 0, 0)]


def loss(attn_logits: Tensor, object_logits: Tensor, grid: tuple[int, int], threshold: float) -> Tensor:
    """Boundary plus interior loss with the released defaults. Shapes: logits (B, T, S, P)."""
    with torch.no_grad():
        attn, objects = attn_logits.argmax(dim=2), object_logits.argmax(dim=2)  # int64
        slot_maps = [_merge(clip, labels, threshold) for clip, labels in zip(attn_logits, attn, strict=True)]
        attn, objects = (
            torch.stack([slots[clip] for slots, clip in zip(slot_maps, labels, strict=True)]) for labels in (attn, objects)
        )
        different = _different(attn, grid)
        boundary = (different >= 1) & (different <= 9)
        interior = _different(objects, grid) < 1
    return _error(object_logits, attn, boundary) + _error(attn_logits, objects, interior)


def _different(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Of ten neighbours, how many carry another label: all ten copies at once, coordinates clamped at the border."""
    frames = labels.shape[1]
    sizes = (frames, *grid)
    where = torch.meshgrid(*(torch.arange(size, device=labels.device) for size in sizes), indexing="ij")
    cells = labels.unflatten(2, grid)
    copies = [
        cells[(slice(None), *((axis + step).clamp(0, size - 1) for axis, step, size in zip(where, offset, sizes, strict=True)))]
        for offset in OFFSETS
    ]
    return (torch.stack(copies, dim=-1) != cells[..., None]).sum(dim=-1).flatten(2)


def _error(logits: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
    maps = logits.softmax(dim=2).transpose(2, 3)
    error = (maps - one_hot(labels, logits.shape[2]).to(maps.dtype)).square().mean(dim=3)
    return (error * chosen).sum() / chosen.sum().clamp(min=1)


def _merge(logits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Which slot each becomes: the largest of its component, (S,). The host reads the graph and walks it."""
    num_slots = logits.shape[1]
    covered = (logits > logits.mean(dim=(0, 2), keepdim=True)).float()
    shared = (covered[:, :, None] * covered[:, None]).sum(dim=3)  # (T, S, S) from (T, S, S, P)
    areas = covered.sum(dim=2) + 1e-6
    overlap = (shared / (areas[:, :, None] + areas[:, None] - shared)).mean(dim=0)
    neighbours = [[other for other in range(num_slots) if row[other] > threshold] for row in overlap.tolist()]
    sizes = torch.bincount(labels.flatten(), minlength=num_slots).tolist()
    becomes, seen = list(range(num_slots)), set()
    for start in range(num_slots):
        stack, component = [start], []
        while stack:
            slot = stack.pop()
            if slot in seen:
                continue
            seen.add(slot)
            component.append(slot)
            stack += [other for other in neighbours[slot] if other not in seen]
        for slot in component:
            becomes[slot] = max(component, key=lambda one: sizes[one])
    return torch.tensor(becomes, device=logits.device)
