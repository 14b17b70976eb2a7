"""Slots through time: first queries, correction by slot attention frame after frame, prediction of the next queries.

Mapped features of a clip come in, slots and attention logits of every frame go out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from data_pipeline.features.attention import attention
from trainer.model.slot_attention import SlotAttention
from trainer.patches import ALONE, PatchGroup


class LearnedQueries(nn.Module):
    """S learned first queries, the same for every clip: N(0, 1/D)."""

    def __init__(self, num_slots: int, dim: int):
        super().__init__()
        self.slots = nn.Parameter(torch.randn(num_slots, dim) * dim**-0.5)

    def forward(self, num_clips: int) -> Tensor:
        return self.slots.expand(num_clips, -1, -1).clone()  # a copy: ZeRO-3 takes the parameter's memory back after this call


class Predictor(nn.Module):
    """One pre-norm transformer block over the slots of a frame; makes the next frame's queries.

    Source: SlotContrast, released code.
    Differs from a standard block: with scale="official_inverted" the logits are q.k * sqrt(d) instead of q.k / sqrt(d),
    because the released code divides the query by d^-1/2; published weights need it.
    """

    def __init__(self, dim: int, num_heads: int, scale: str = "official_inverted"):
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.scale = head_dim**0.5 if scale == "official_inverted" else head_dim**-0.5
        self.norm_attention = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)
        bound = math.sqrt(6 / (2 * dim))  # Xavier as if q, k and v were three square matrices
        nn.init.uniform_(self.qkv.weight, -bound, bound)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, slots: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)"""
        clips, num_slots, dim = slots.shape
        qkv = self.qkv(self.norm_attention(slots)).view(clips, num_slots, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = attention(query, key, value, scale=self.scale)
        slots = slots + self.out(mixed.transpose(1, 2).flatten(2))
        return slots + self.contract(self.expand(self.norm_mlp(slots)).relu())


class SlotRecurrence(nn.Module):
    """Scan over the frames of a clip.

    Differs: the released code also predicts after the last frame and discards the result; here that call is left out,
    so a clip of one frame gives the predictor no gradient in either.
    """

    def __init__(self, slot_attention: SlotAttention, predictor: Predictor, iters_first: int, iters_next: int):
        super().__init__()
        self.slot_attention = slot_attention
        self.predictor = predictor
        self.iters_first = iters_first
        self.iters_next = iters_next

    def forward(self, queries: Tensor, mapped: Tensor, first: bool = True, patches: PatchGroup = ALONE) -> tuple[Tensor, ...]:
        """queries (B, S, D), mapped (B, T, P, D) -> slots (B, T, S, D), attn_logits (B, T, S, P), perhaps patch_maps (B, T, S, P)

        With first=False the frames go on from those before, whose last slots are the queries.
        """
        keys, values = self.slot_attention.keys_values(mapped)
        frames: list[tuple[Tensor, ...]] = []
        # Each frame's queries come from the frame before: this loop cannot go. unbind, because the gradient of indexing a
        # frame is as large as all frames, and T of those are quadratic in T.
        for frame, (frame_keys, frame_values) in enumerate(zip(keys.unbind(1), values.unbind(1), strict=True)):
            begins = first and frame == 0
            if not begins:
                queries = self.predictor(frames[-1][0] if frames else queries)
            num_iters = self.iters_first if begins else self.iters_next
            frames.append(self.slot_attention(queries, frame_keys, frame_values, num_iters, patches))
        return tuple(torch.stack(made, dim=1) for made in zip(*frames, strict=True))
