"""Slot contrast: the same slot in two neighbouring frames is a pair, every other slot of the batch is not.

Slots of all candidate clips come in, the term of some of them goes out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from trainer.config import SlotContrastConfig
from trainer.objective.terms import TermValue, term
from trainer.precision import at_least_float32, full_precision

BASE_TEMPERATURE = 0.07  # supervised contrast's convention: losses are multiplied by temperature / 0.07
BLOCK = 2**22  # logits of the form supcon that are held at once


def slot_contrast(slots: Tensor, own: slice, config: SlotContrastConfig) -> TermValue:
    """InfoNCE over neighbouring frames, summed over the anchors that lie in the clips `own`.

    Shapes: slots (N, T, S, D), all clips whose slots are candidates. The softmax runs over the candidates: all N*S slots of
    the other frame, or the clip's own S with scope="video".
    Source: SlotContrast, Eq. 4 and released code.
    Differs: the released code anchors at the later frame and draws candidates from the earlier one, its paper the other way
    round (axis). A clip of one frame has no pair: sum 0 and count 0 where the released code gives NaN. Candidates of all
    ranks are possible (scope="global"); the released code sees those of one rank.
    """
    with full_precision(slots):
        unit = normalize(at_least_float32(slots), dim=3, eps=1e-12)
        if config.form == "supcon":
            return _tracks(unit, own, config)
        anchors, candidates = unit[own, 1:], unit[:, :-1]
        if config.axis == "paper_earlier_anchor":
            anchors, candidates = unit[own, :-1], unit[:, 1:]
        if config.scope == "video":
            losses = _own_video(anchors, candidates[own], config.temperature)
        else:
            losses = _all_videos(anchors, candidates, own.indices(slots.shape[0])[0], config.temperature)
        return term(losses.sum(), losses.numel())


def _own_video(anchors: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """anchors, candidates (N, T-1, S, D) -> (N, T-1, S)"""
    logits = anchors @ candidates.mT / temperature
    return logits.logsumexp(dim=3) - logits.diagonal(dim1=2, dim2=3)


def _all_videos(anchors: Tensor, candidates: Tensor, first: int, temperature: float) -> Tensor:
    """anchors (n, T-1, S, D), candidates (N, T-1, S, D), anchor clip i = candidate clip first + i -> (T-1, n*S)"""
    num_slots = anchors.shape[2]
    anchors, candidates = (part.transpose(0, 1).flatten(1, 2) for part in (anchors, candidates))
    logits = anchors @ candidates.mT / temperature  # (T-1, n*S, N*S)
    positive = torch.diagonal(logits, offset=first * num_slots, dim1=1, dim2=2)
    return logits.logsumexp(dim=2) - positive


def _tracks(unit: Tensor, own: slice, config: SlotContrastConfig) -> TermValue:
    """Every slot of every frame is an anchor; the same slot one frame before and after are its positives.

    Compared with: its positives and all frames of all other slots, not its own other frames. Mean over all anchors.
    Source: SRL, released code, whose factor temperature/0.07 is kept. With one frame there are no positives: 0.
    Differs in memory: anchors are taken some clips at a time, each computed again in the backward.
    """
    anchors, first = unit[own], own.indices(unit.shape[0])[0]
    count, temperature = anchors.shape[:3].numel(), config.temperature
    total = (anchors * 0).sum()
    if unit.shape[1] > 1 and config.scope == "video":
        total = _track_losses(anchors.unsqueeze(1), anchors.unsqueeze(1), 0, temperature)
    elif unit.shape[1] > 1:
        clips = max(1, BLOCK // unit.shape[:3].numel() // unit.shape[1:3].numel())
        for begin in range(0, anchors.shape[0], clips):
            part = anchors[None, begin : begin + clips]
            total = total + checkpoint(_track_losses, part, unit[None], first + begin, temperature, use_reentrant=False)
    return term(total * (temperature / BASE_TEMPERATURE), count)


def _track_losses(anchors: Tensor, candidates: Tensor, first: int, temperature: float) -> Tensor:
    """Sum over anchors. anchors (G, n, T, S, D), candidates (G, N, T, S, D); anchor clip i is candidate clip first + i."""
    clips, others = (torch.arange(size, device=anchors.device) for size in (anchors.shape[1], candidates.shape[1]))
    frame, slot = (torch.arange(size, device=anchors.device) for size in anchors.shape[2:4])
    adjacent = ((frame[:, None] - frame).abs() == 1)[:, None, None, :, None]  # axes of both masks: n, T, S, N, T, S
    same_track = (clips[:, None] + first == others)[:, None, None, :, None, None] & (slot[:, None] == slot)[:, None, None]
    logits = torch.einsum("gntsd,gmuvd->gntsmuv", anchors, candidates) / temperature
    positives = (same_track & adjacent).to(logits.dtype)
    positive = (logits * positives).sum(dim=(4, 5, 6)) / positives.sum(dim=(3, 4, 5))
    return (logits.masked_fill(same_track & ~adjacent, -torch.inf).logsumexp(dim=(4, 5, 6)) - positive).sum()
