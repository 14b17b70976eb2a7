"""SRL's two ranking losses the direct way, for comparison: whole matrices of all pairs of tokens, and autograd over them.

Source: SRL, deblurring and denoising losses, without the factor temperature / 0.07.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def decoder_ranking(features: Tensor, targets: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Shapes: features, targets (G, N, D), labels (G, N). Half the weight on a token's own target, half on its label's mean."""
    logits = normalize(features, dim=2) @ normalize(targets, dim=2).mT / temperature
    same = (labels[:, :, None] == labels[:, None]).to(logits.dtype)
    likely = logits.log_softmax(dim=2)
    own = likely.diagonal(dim1=1, dim2=2)
    return -(own / 2 + (likely * same).sum(dim=2) / same.sum(dim=2) / 2).sum()


def encoder_ranking(features: Tensor, criterion: Tensor, labels: Tensor, temperature: float, num_neighbours: int) -> Tensor:
    """Shapes: features (G, N, D), criterion (G, N, E), labels (G, N). A token is neither its own pair nor its own rival."""
    alone = torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    unit = normalize(criterion, dim=2)
    similar = unit @ unit.mT
    near = (similar >= similar.topk(num_neighbours, dim=2).values[..., -1:]) & ~alone
    same = (labels[:, :, None] == labels[:, None]) & ~alone
    directions = normalize(features, dim=2)
    likely = (directions @ directions.mT / temperature).masked_fill(alone, -torch.inf).log_softmax(dim=2)
    likely = likely.masked_fill(alone, 0.0)
    means = [(likely * pairs).sum(dim=2) / pairs.sum(dim=2).clamp(min=1) for pairs in (near, same)]
    return -((means[0] + means[1]) / 2).sum()
