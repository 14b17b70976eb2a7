"""Slot attention: mapped features and queries come in, corrected slots and attention logits go out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.patches import ALONE, PatchGroup

EPS = 1e-8  # keeps the renormalisation over patches finite where a slot gets nothing


class ResidualMLP(nn.Module):
    """x + W2 relu(W1 LayerNorm(x) + b1) + b2, hidden width 4 D."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(self.expand(self.norm(x)).relu())


class SlotAttention(nn.Module):
    """Slots compete for patches over a few iterations that share their weights.

    Source: Locatello et al. 2020; SlotContrast, released code.
    Differs from Locatello et al.: with gru_hidden="normed" the recurrent state of the GRU is LayerNorm(slots), not the
    slots, as in the released code, whose weights need it; "raw" is the paper. The softmax scale is folded into q.
    """

    def __init__(self, dim: int, gru_hidden: str = "normed", query_key_gain: float = 1.0, patch_maps: bool = False):
        super().__init__()
        self.norm_features = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = ResidualMLP(dim)
        self.gru_reads_normed = gru_hidden == "normed"
        self.makes_patch_maps = patch_maps
        self.scale = dim**-0.5
        for layer in (self.to_q, self.to_k):
            layer.weight.data.mul_(query_key_gain)

    def keys_values(self, mapped: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of any number of frames at once: (..., P, D) -> two of (..., P, D)."""
        normed = self.norm_features(mapped)
        return self.to_k(normed), self.to_v(normed)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, num_iters: int, patches: PatchGroup = ALONE
    ) -> tuple[Tensor, ...]:
        """One frame, or this rank's band of it: then the ranks of `patches` go through the iterations together.

        Shapes: queries (B, S, D), keys and values (B, P, D) -> slots (B, S, D), attn_logits (B, S, P) of the last
        iteration, scaled, from the slots *before* that iteration's update; and, with patch_maps, softmax over patches of the
        logits, mean over the iterations (B, S, P).
        """
        slots = queries
        patch_maps = []
        for _ in range(num_iters):
            normed = self.norm_slots(slots)
            attn_logits = (self.to_q(normed) * self.scale) @ keys.mT
            attn_maps = attn_logits.softmax(dim=1)
            if self.makes_patch_maps:
                patch_maps.append(attn_logits.softmax(dim=2))
            updates = _mean_values(attn_maps + EPS, values, patches)
            hidden = normed if self.gru_reads_normed else slots
            updated = self.gru(updates.flatten(0, 1), hidden.flatten(0, 1)).view_as(slots)
            slots = self.mlp(updated)
        return (slots, attn_logits, torch.stack(patch_maps).mean(dim=0)) if patch_maps else (slots, attn_logits)


def _mean_values(weights: Tensor, values: Tensor, patches: PatchGroup) -> Tensor:
    """Each slot's weighted mean over all patches: weights (B, S, P), values (B, P, D) -> (B, S, D)"""
    sums, total = weights @ values, weights.sum(dim=2, keepdim=True)
    if patches.size > 1:  # one sum over the ranks for both
        sums, total = patches.sum(torch.cat([sums, total], dim=2)).split([values.shape[2], 1], dim=2)
    return sums / total
