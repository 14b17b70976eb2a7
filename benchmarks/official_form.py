"""The decoder as SlotContrast and SSync released it, for comparison: no algebra, every hidden tensor stored, plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from trainer.model.decoder import MLPDecoder


def decode(decoder: MLPDecoder, slots: Tensor, band: slice | None = None) -> tuple[Tensor, Tensor]:
    """With the weights of ours. Shapes: slots (N, S, D) -> reconstruction (N, P, E), object_logits (N, S, P).

    Source: SlotContrast, released code: slots copied to every patch, positions added, an MLP on S*P rows, whose E + 1 outputs
    are features and logit; the mixture is taken over features.
    """
    hidden = slots[:, :, None] + (decoder.positions if band is None else decoder.positions[band])
    for index in range(decoder.num_layers - 1):
        hidden = torch.relu(linear(hidden, *decoder.layer(index)))
    out = linear(hidden, *decoder.layer(decoder.num_layers - 1))
    features, logits = out.split([decoder.feature_dim, 1], dim=3)
    maps = logits.softmax(dim=1)
    return (features * maps).sum(dim=1), logits.squeeze(3)


class OfficialDecoder(MLPDecoder):
    """An MLPDecoder that runs as released."""

    def _whole(self, slots: Tensor, band: slice | None = None) -> tuple[Tensor, Tensor]:
        return decode(self, slots, band)


def adopt(decoder: MLPDecoder) -> None:
    """From now on a decoder of path "plain" runs as released; its parameters stay the same objects."""
    decoder.__class__ = OfficialDecoder
