"""Slot contrast: the same slot in two neighbouring frames is a pair, every other slot of the batch is not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.config import SlotContrastConfig
from trainer.objective.terms import TermValue, term
from trainer.precision import at_least_float32, full_precision


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
