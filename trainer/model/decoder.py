"""Broadcast decoder: slots of a frame come in, reconstructed features and object logits of every patch go out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trainer.kernels.fused_decoder import Settings, Weights, carry, decode, learn
from trainer.kernels.products import choose_products
from trainer.model.outputs import Decoded, DecoderTask
from trainer.precision import at_least_float32


def fourier_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Sines and cosines of y and x at every patch centre, k half periods across the picture, k = 1, 2, ...

    Shapes: (P, D), P = Y*X row-major. Units: each channel lies in [-1, 1], about the scale of a slot's channel.
    """
    y, x = (((torch.arange(side) + 0.5) / side) for side in grid)
    y_of_patch, x_of_patch = (axis.flatten() for axis in torch.meshgrid(y, x, indexing="ij"))
    angles = math.pi * torch.arange(1, dim // 4 + 2)
    waves = [wave(where[:, None] * angles) for where in (y_of_patch, x_of_patch) for wave in (torch.sin, torch.cos)]
    return torch.stack(waves, dim=2).flatten(1)[:, :dim].contiguous()


class MLPDecoder(nn.Module):
    """An MLP reads slot + position at every patch; its last row is the slot's object logit there, softmax over slots mixes.

    Source: SlotContrast, released code (the same function, the same weights).
    Differs in how it is computed, exactly up to rounding: the first layer is linear in slot + position, so both are
    projected alone and added; the mixture is taken over the last hidden layer and projected once, which the maps allow
    because they sum to one over the slots. With path="fused" the same is done chunk by chunk (see kernels/fused_decoder.py).
    The weights lie on this module, not on child layers: ZeRO-3 gathers what belongs to the module that runs.
    """

    def __init__(
        self,
        dim: int,
        feature_dim: int,
        hidden: Sequence[int],
        grid: tuple[int, int],
        positions: str = "normal",
        path: str = "plain",
        chunk_rows: int = 0,
        products: str = "auto",
    ):
        super().__init__()
        self.feature_dim = feature_dim
        self.path, self.chunk_rows, self.products = path, chunk_rows, products
        num_patches = grid[0] * grid[1]
        start = fourier_positions(grid, dim) if positions == "fourier" else torch.randn(num_patches, dim) * dim**-0.5
        self.positions = nn.Parameter(start)
        widths = [dim, *hidden, feature_dim + 1]
        self.num_layers = len(widths) - 1
        for layer, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            bound = fan_in**-0.5  # PyTorch's own for a linear layer, biases too, which is what the released code ends with
            self.register_parameter(f"weight_{layer}", nn.Parameter(torch.empty(fan_out, fan_in).uniform_(-bound, bound)))
            self.register_parameter(f"bias_{layer}", nn.Parameter(torch.empty(fan_out).uniform_(-bound, bound)))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return getattr(self, f"weight_{index}"), getattr(self, f"bias_{index}")

    @overload
    def forward(self, slots: Tensor, *, band: slice | None = None) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, slots: Tensor, task: DecoderTask | Decoded, target: Tensor, band: slice | None = None
    ) -> tuple[Tensor, Decoded]: ...
    def forward(self, slots, task=None, target=None, band=None):
        """Shapes: slots (N, S, D), N frames -> reconstruction (N, P, E), object_logits (N, S, P), at least float32.

        With a task, one pass that also learns: slots (B, T, S, D), target (B, T, P, E) -> a scalar of value 0 that carries the
        gradient, and what was found. Without grad mode the gradients are in what was found; handed in as the task, they are
        carried into another graph. With `band`, P stands for these patches of a frame alone, and positions of others get no
        gradient.
        """
        if task is None and self.path == "plain":
            return self._whole(slots, band)
        weights, settings = self._weights(band), self._settings(slots)
        if task is None:
            return decode(weights, slots, settings)
        decoded = task
        if isinstance(task, DecoderTask):
            decoded = learn(weights, slots.detach(), target, task, settings)
            if band is not None:
                decoded = decoded._replace(gradients=self._of_all_positions(decoded.gradients, band))
        if not torch.is_grad_enabled():
            return slots.new_zeros(()), decoded
        return carry(decoded.gradients, slots, list(self.parameters())), decoded._replace(gradients=())

    def _of_all_positions(self, gradients: tuple[Tensor, ...], band: slice) -> tuple[Tensor, ...]:
        """The same gradients with zeros for the positions outside the band."""
        of_slots, of_band, *rest = gradients
        whole = torch.zeros_like(self.positions)
        whole[band] = of_band
        return (of_slots, whole, *rest)

    def _positions(self, band: slice | None) -> Tensor:
        return self.positions if band is None else self.positions[band]

    def _weights(self, band: slice | None = None) -> Weights:
        return Weights(self._positions(band), tuple(self.layer(index) for index in range(self.num_layers)))

    def _settings(self, slots: Tensor) -> Settings:
        device = slots.device
        bf16 = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if bf16 else slots.dtype
        return Settings(self.chunk_rows, dtype, choose_products(self.products, device))

    def _whole(self, slots: Tensor, band: slice | None = None) -> tuple[Tensor, Tensor]:
        """The plain twin: every hidden tensor whole, autograd keeps them."""
        positions = self._positions(band)
        weight, bias = self.layer(0)
        from_slots, from_positions = linear(slots, weight, bias), linear(positions, weight)
        hidden = (from_slots[:, None] + from_positions[:, None]).relu()  # (N, P, S, H)
        for index in range(1, self.num_layers - 1):
            hidden = linear(hidden, *self.layer(index)).relu()
        weight, bias = self.layer(self.num_layers - 1)
        rows = [self.feature_dim, 1]
        (to_features, to_logit), (features_bias, logit_bias) = weight.split(rows), bias.split(rows)
        object_logits = at_least_float32(linear(hidden, to_logit, logit_bias)).squeeze(3)
        object_maps = object_logits.softmax(dim=2)
        mixed = (object_maps.to(hidden.dtype)[:, :, None] @ hidden).squeeze(2)  # (N, P, H)
        return linear(mixed, to_features, features_bias), object_logits.transpose(1, 2)
