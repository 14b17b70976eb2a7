"""SSync's selection and losses as four Triton kernels. Same tensors in and out as the plain functions named at each.

On a GPU the plain functions are some three hundred launches of little work each. Here labels, neighbours and losses read their
map once, and the merge of a clip is one program. This module imports triton: it is loaded only where choice.py says so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # patches of a program


def label_map(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """ssync.hard_labels"""
    clips, frames, num_slots, num_patches = logits.shape
    labels = torch.empty(clips, frames, num_patches, dtype=dtype, device=logits.device)
    _label_map[_blocks(clips * frames, num_patches)](
        logits, labels, num_slots, num_patches, frames, *logits.stride(), SLOTS=triton.next_power_of_2(num_slots), BLOCK=BLOCK
    )
    return labels


def merged_and_chosen(
    labels: Tensor, slot_map: Tensor, grid: tuple[int, int], clamp: bool, least: int, least_equal: int, below: int
) -> tuple[Tensor, Tensor]:
    """ssync._merged_and_chosen: labels after merging; at least `least` and fewer than `below` different, `least_equal` equal"""
    labels, slot_map = labels.contiguous(), slot_map.contiguous()
    merged, chosen = torch.empty_like(labels), torch.empty_like(labels, dtype=torch.bool)
    clips, frames, num_patches = labels.shape
    _merged_and_chosen[_blocks(clips, frames * num_patches)](
        labels, slot_map, merged, chosen, slot_map.shape[1], frames, *grid, least, least_equal, below, CLAMP=clamp, BLOCK=BLOCK
    )
    return merged, chosen


def largest_of_component(edges: Tensor, areas: Tensor) -> Tensor:
    """slot_merging._largest_of_component, with the visiting order that ends a tie"""
    clips, num_slots = areas.shape
    slot_map = torch.empty_like(areas)
    _largest_of_component[(clips,)](
        edges.contiguous(), areas.contiguous(), slot_map, num_slots, SLOTS=triton.next_power_of_2(num_slots)
    )
    return slot_map


def label_error(
    logits: Tensor, labels: Tensor, chosen: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """label_error.label_error: its sum, added up in a fixed order, and its gradient"""
    clips, frames, num_slots, num_patches = logits.shape
    blocks = _blocks(clips * frames, num_patches)
    sums = logits.new_zeros(blocks)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if with_gradient else None
    _label_error[blocks](
        logits,
        labels.contiguous(),
        chosen.contiguous(),
        sums if gradient is None else gradient,
        sums,
        num_slots,
        num_patches,
        frames,
        *logits.stride(),
        1.0 / temperature,
        WITH_GRADIENT=with_gradient,
        SLOTS=triton.next_power_of_2(num_slots),
        BLOCK=BLOCK,
    )
    return sums.sum(), gradient


def _blocks(rows: int, num_patches: int) -> tuple[int, int]:
    return rows, triton.cdiv(num_patches, BLOCK)


@triton.jit
def _load_maps(logits, frame, patches, inside, num_slots, frames, by_clip, by_frame, by_slot, by_patch, SLOTS: tl.constexpr):
    """One block of a frame's logits, -inf beyond the last slot, 0 beyond the last patch. (SLOTS, BLOCK)"""
    slots = tl.arange(0, SLOTS)
    start = logits + (frame // frames).to(tl.int64) * by_clip + (frame % frames).to(tl.int64) * by_frame
    where = slots[:, None] * by_slot + patches[None, :] * by_patch
    real = (slots < num_slots)[:, None]
    return tl.where(real, tl.load(start + where, mask=real & inside[None, :], other=0.0).to(tl.float32), -float("inf"))


@triton.jit
def _label_map(
    logits, labels, num_slots, num_patches, frames, by_clip, by_frame, by_slot, by_patch, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    frame = tl.program_id(0)
    patches = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = patches < num_patches
    maps = _load_maps(logits, frame, patches, inside, num_slots, frames, by_clip, by_frame, by_slot, by_patch, SLOTS)
    top = tl.minimum(tl.argmax(maps, axis=0), num_slots - 1)  # NaN may leave the slots that there are
    tl.store(labels + frame.to(tl.int64) * num_patches + patches, top, mask=inside)


@triton.jit
def _merged_and_chosen(
    labels,
    slot_map,
    merged,
    chosen,
    num_slots,
    frames,
    rows,
    columns,
    least,
    least_equal,
    below,
    CLAMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    clip = tl.program_id(0).to(tl.int64)
    cells = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = frames * rows * columns
    valid = cells < total
    labels += clip * total
    slot_map += clip * num_slots
    t, y, x = cells // (rows * columns), cells // columns % rows, cells % columns
    own = tl.load(slot_map + tl.load(labels + cells, mask=valid, other=0).to(tl.int32))
    different = tl.zeros([BLOCK], dtype=tl.int32)
    inside = tl.zeros([BLOCK], dtype=tl.int32)
    for step in tl.static_range(11):  # nine places in the frame, of which the middle agrees with itself, then before and after
        at_t = t + (2 * step - 19 if step > 8 else 0)
        at_y = y + (step // 3 - 1 if step < 9 else 0)
        at_x = x + (step % 3 - 1 if step < 9 else 0)
        held_t = tl.minimum(tl.maximum(at_t, 0), frames - 1)
        held_y = tl.minimum(tl.maximum(at_y, 0), rows - 1)
        held_x = tl.minimum(tl.maximum(at_x, 0), columns - 1)
        there = (held_t == at_t) & (held_y == at_y) & (held_x == at_x)
        near = tl.load(labels + (held_t * rows + held_y) * columns + held_x, mask=valid, other=0).to(tl.int32)
        unlike = tl.load(slot_map + near) != own
        different += (unlike & (there | CLAMP)).to(tl.int32)
        inside += (there | CLAMP).to(tl.int32)
    equal = inside - 1 - different
    tl.store(merged + clip * total + cells, own, mask=valid)
    take = (different >= least) & (equal >= least_equal) & (different < below)
    tl.store(chosen + clip * total + cells, take, mask=valid)


@triton.jit
def _largest_of_component(edges, areas, slot_map, num_slots, SLOTS: tl.constexpr):
    clip = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    real = slots < num_slots
    square = clip * num_slots * num_slots + slots[:, None] * num_slots + slots[None, :]
    joined = tl.load(edges + square, mask=real[:, None] & real[None, :], other=0) != 0
    last_push = tl.zeros([SLOTS], dtype=tl.int32)
    order = tl.where(real, -1, SLOTS)  # what is not there counts as visited
    for step in range(num_slots):  # see slot_merging.visiting_order
        priority = tl.where(last_push > 0, last_push * SLOTS + slots, -1 - slots)
        newest = tl.argmax(tl.where(order < 0, priority, -1 - SLOTS), axis=0)
        order = tl.where((slots == newest) & (order < 0), step, order)
        pushed = tl.sum((joined & (slots == newest)[:, None]).to(tl.int32), axis=0) > 0
        last_push = tl.where(pushed, step + 1, last_push)
    area = tl.load(areas + clip * num_slots + slots, mask=real, other=0)
    rank = tl.where(real, area * SLOTS + (SLOTS - 1 - order), -1)
    best = rank
    for _ in range(num_slots):  # the largest rank travels one edge a turn
        best = tl.maximum(best, tl.max(tl.where(joined, best[None, :], -1), axis=1))
    winner = tl.sum(tl.where(best[:, None] == rank[None, :], slots[None, :], 0), axis=1)  # ranks differ: one term
    tl.store(slot_map + clip * num_slots + slots, winner, mask=real)


@triton.jit
def _label_error(
    logits,
    labels,
    chosen,
    gradient,
    sums,
    num_slots,
    num_patches,
    frames,
    by_clip,
    by_frame,
    by_slot,
    by_patch,
    sharpness,
    WITH_GRADIENT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    frame = tl.program_id(0)
    patches = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = patches < num_patches
    slots = tl.arange(0, SLOTS)
    maps = _load_maps(logits, frame, patches, inside, num_slots, frames, by_clip, by_frame, by_slot, by_patch, SLOTS) * sharpness
    weights = tl.exp(maps - tl.max(maps, axis=0)[None, :])
    maps = weights / tl.sum(weights, axis=0)[None, :]
    place = frame.to(tl.int64) * num_patches + patches
    label = tl.load(labels + place, mask=inside, other=0).to(tl.int32)
    take = tl.load(chosen + place, mask=inside, other=0).to(tl.float32)
    error = maps - (slots[:, None] == label[None, :]).to(tl.float32)
    squared = tl.sum(error * error, axis=0) * take
    tl.store(sums + frame * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.where(inside, squared, 0.0), axis=0))
    if WITH_GRADIENT:
        inner = tl.sum(maps * error, axis=0)
        slope = 2.0 * sharpness * take[None, :] * maps * (error - inner[None, :])
        where = (frame.to(tl.int64) * num_slots + slots[:, None]) * num_patches + patches[None, :]
        tl.store(gradient + where, slope, mask=(slots < num_slots)[:, None] & inside[None, :])
