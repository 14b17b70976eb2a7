"""The broadcast decoder chunk by chunk: nothing of size slots x patches x hidden width is ever kept.

Slots and the decoder's weights come in. Either the losses are known (`learn`): value and gradient are taken in one pass, chunk
after chunk, without stored activations and without recomputation. Or they are not (`decode`): reconstruction and logits come
out, and the backward computes each chunk once more. Both share one chunk's forward and one chunk's backward.

A row is one slot at one patch; a chunk holds all slots of its patches. First layer: linear in slot + position, so both are
projected alone. Last layer: the mixture is taken over the last hidden layer and projected once, since maps sum to one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.kernels.products import Products
from trainer.model.outputs import Decoded, DecoderTask
from trainer.precision import at_least_float32, full_precision

CPU_ROWS, CUDA_ROWS = 704, 32768  # a CPU chunk stays in its cache; a GPU wants large products


class Settings(NamedTuple):
    """How chunks are computed: rows of one (0: what suits the device), the dtype of wide products, whose products."""

    rows: int
    dtype: torch.dtype
    products: Products


class Weights(NamedTuple):
    """The decoder's parameters as its forward reads them.

    Shapes: positions (P, D); layers: (weight (O, K), bias (O)) of each linear layer in order, the last with E + 1 rows, the
    object logit's at the end.
    """

    positions: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def of(flat: Sequence[Tensor]) -> Weights:
        """From positions, weight_0, bias_0, weight_1, ..."""
        return Weights(flat[0], tuple(zip(flat[1::2], flat[2::2], strict=True)))


class Chunk(NamedTuple):
    """Frames and patches of one chunk; its rows run over frames, patches, slots."""

    frames: slice
    patches: slice


class Activations(NamedTuple):
    """What a chunk's backward needs of its forward.

    Shapes: hidden: (n, p, S, H) of each hidden layer, in the products' dtype; logits and maps (n, p, S), at least float32;
    mixed (n, p, H).
    """

    hidden: list[Tensor]
    logits: Tensor
    maps: Tensor
    mixed: Tensor


def chunks(num_frames: int, num_patches: int, num_slots: int, rows: int) -> Iterator[Chunk]:
    """All frames and patches in chunks of about `rows` rows, equal in size but for rounding."""
    patches = min(num_patches, max(1, rows // num_slots))
    pieces = -(-num_patches // patches)
    frames = max(1, rows // (num_patches * num_slots)) if pieces == 1 else 1
    for first in range(0, num_frames, frames):
        for piece in range(pieces):
            cut = slice(num_patches * piece // pieces, num_patches * (piece + 1) // pieces)
            yield Chunk(slice(first, min(first + frames, num_frames)), cut)


class ChunkedDecoder:
    """A decoder's weights and slots, ready for chunks. Lives for one pass, outside autograd.

    Shapes: slots (N, S, D).
    """

    def __init__(self, weights: Weights, slots: Tensor, settings: Settings) -> None:
        self.weights, self.slots, self.settings = weights, slots, settings
        self.products = settings.products
        rows = settings.rows or (CUDA_ROWS if slots.is_cuda else CPU_ROWS)
        self.chunks = list(chunks(slots.shape[0], weights.positions.shape[0], slots.shape[1], rows))
        first_weight, first_bias = weights.layers[0]
        self.from_slots = slots @ first_weight.t() + first_bias  # (N, S, H)
        dtype = settings.dtype  # weights are cast once a pass, not once a chunk
        self.hidden_layers = [(weight.to(dtype), bias.to(dtype)) for weight, bias in weights.layers[1:-1]]
        weight, bias = weights.layers[-1]
        self.to_features, self.features_bias = weight[:-1].to(dtype), bias[:-1].to(dtype)
        self.to_logit, self.logit_bias = weight[-1].to(dtype), bias[-1]

    def forward(self, chunk: Chunk) -> Activations:
        # projected again for every frame: little arithmetic, where (P, H) and its gradient would be the largest tensors kept
        from_positions = (self.weights.positions[chunk.patches] @ self.weights.layers[0][0].t())[None, :, None]
        from_slots = self.from_slots[chunk.frames, None]
        shape = torch.broadcast_shapes(from_slots.shape, from_positions.shape)
        first = torch.empty(shape, dtype=self.settings.dtype, device=from_slots.device)
        hidden = [torch.add(from_slots, from_positions, out=first).relu_()]
        for weight, bias in self.hidden_layers:
            rows = self.products.linear(hidden[-1].flatten(0, 2), weight, bias, relu=True)
            hidden.append(rows.view(*shape[:3], -1))
        last = hidden[-1]
        logits = (last @ self.to_logit).to(self.logit_bias.dtype) + self.logit_bias
        maps = logits.softmax(dim=2)
        mixed = (maps.to(last.dtype)[:, :, None] @ last).squeeze(2)
        return Activations(hidden, logits, maps, mixed)

    def reconstruction(self, state: Activations) -> Tensor:
        """(n, p, E), in the logits' dtype"""
        rows = self.products.linear(state.mixed.flatten(0, 1), self.to_features, self.features_bias)
        return rows.view(*state.mixed.shape[:2], -1).to(state.logits.dtype)


class Gradients:
    """Gradients of a ChunkedDecoder, summed over its chunks, in the weights' own dtype (float32 under bf16 products)."""

    def __init__(self, decoder: ChunkedDecoder) -> None:
        self.decoder = decoder
        layers = decoder.weights.layers
        self.layers = [(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in layers]
        self.from_slots, self.positions = torch.zeros_like(decoder.from_slots), torch.zeros_like(decoder.weights.positions)

    def add(self, chunk: Chunk, state: Activations, grad_reconstruction: Tensor, grad_logits: Tensor | None) -> None:
        """One chunk's backward. Shapes: grad_reconstruction (n, p, E); grad_logits (n, p, S), beside what the reconstruction
        sends through the maps, or None: nothing."""
        decoder, last, maps = self.decoder, state.hidden[-1], state.maps
        grad_weight, grad_bias = self.layers[-1]
        rows = grad_reconstruction.flatten(0, 1).to(last.dtype)
        decoder.products.add_outer(grad_weight[:-1], rows, state.mixed.flatten(0, 1))
        grad_bias[:-1] += grad_reconstruction.sum(dim=(0, 1))
        grad_mixed = decoder.products.through(rows, decoder.to_features).view_as(state.mixed)
        grad_maps = (grad_mixed[:, :, None] @ last.mT).squeeze(2).to(maps.dtype)
        through_maps = maps * (grad_maps - (maps * grad_maps).sum(dim=2, keepdim=True))
        grad_logits = through_maps if grad_logits is None else grad_logits + through_maps
        narrow = grad_logits.to(last.dtype)
        grad_weight[-1] += narrow.flatten() @ last.flatten(0, 2)
        grad_bias[-1] += grad_logits.sum()
        grad = maps.to(last.dtype)[..., None] * grad_mixed[:, :, None]  # (n, p, S, H)
        self._add_hidden(chunk, state, grad.addcmul_(narrow[..., None], decoder.to_logit))

    def _add_hidden(self, chunk: Chunk, state: Activations, grad: Tensor) -> None:
        """Down the hidden layers; `grad` is that of the last one's output, and is overwritten."""
        mask_relu(grad, state.hidden[-1])
        for (weight, _), below, (grad_weight, grad_bias) in zip(
            reversed(self.decoder.hidden_layers), reversed(state.hidden[:-1]), reversed(self.layers[1:-1]), strict=True
        ):
            rows = grad.flatten(0, 2)
            self.decoder.products.add_outer(grad_weight, rows, below.flatten(0, 2))
            grad_bias += rows.sum(dim=0, dtype=grad_bias.dtype)
            grad = self.decoder.products.through(rows, weight).view_as(below)
            mask_relu(grad, below)
        self.from_slots[chunk.frames] += grad.sum(dim=1, dtype=self.from_slots.dtype)
        from_positions = grad.sum(dim=(0, 2), dtype=self.positions.dtype)  # (p, H)
        first_weight, positions = self.decoder.weights.layers[0][0], self.decoder.weights.positions
        self.positions[chunk.patches].addmm_(from_positions, first_weight)
        self.layers[0][0].addmm_(from_positions.t(), positions[chunk.patches])

    def finish(self) -> tuple[Tensor, ...]:
        """Of slots, then of positions, weight_0, bias_0, weight_1, ..."""
        weights, slots = self.decoder.weights, self.decoder.slots
        first_weight, _ = weights.layers[0]
        grad_weight, grad_bias = self.layers[0]
        rows = self.from_slots.flatten(0, 1)
        grad_weight.addmm_(rows.t(), slots.flatten(0, 1))
        torch.sum(rows, dim=0, out=grad_bias)
        flat = [tensor for layer in self.layers for tensor in layer]
        return (self.from_slots @ first_weight, self.positions, *flat)


def mask_relu(grad: Tensor, output: Tensor) -> None:
    """A ReLU's backward, in place: 0 where its output is 0."""
    torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)


@torch.no_grad()
def learn(weights: Weights, slots: Tensor, target: Tensor, task: DecoderTask, settings: Settings) -> Decoded:
    """Errors, labels and the gradient of the task's loss, in one pass over the first `task.num_real` clips.

    Shapes: slots (B, T, S, D), target (B, T, P, E) of any float dtype, read chunk by chunk.
    The gradient is taken whatever autograd's mode: call `decode` where none is needed.
    """
    clips, frames, num_slots, _ = slots.shape
    num_patches = weights.positions.shape[0]
    with full_precision(slots):
        own, wanted = slots[: task.num_real].flatten(0, 1), target[: task.num_real].flatten(0, 1)
        decoder = ChunkedDecoder(weights, own, settings)
        gradients = Gradients(decoder)
        scale = task.reconstruction * 2 / target.shape[3]
        labels = torch.zeros(clips * frames, num_patches, dtype=label_dtype(num_slots), device=slots.device)
        errors = slots.new_zeros(2, dtype=torch.float64)
        for chunk in decoder.chunks:
            state = decoder.forward(chunk)
            labels[chunk] = state.logits.argmax(dim=2).to(labels.dtype)
            difference = decoder.reconstruction(state).sub_(wanted[chunk])
            errors[0] += difference.flatten().dot(difference.flatten())
            grad_logits = _boundary(errors[1], state, chunk, task)
            gradients.add(chunk, state, difference.mul_(scale), grad_logits)
        errors[0] /= target.shape[3]
        taken = _with_padding(gradients.finish(), clips, frames)
    return Decoded(labels.unflatten(0, (clips, frames)), errors[0], errors[1], taken)


def label_dtype(num_slots: int) -> torch.dtype:
    return torch.int8 if num_slots <= torch.iinfo(torch.int8).max else torch.int16


def _with_padding(taken: tuple[Tensor, ...], clips: int, frames: int) -> tuple[Tensor, ...]:
    """The gradient of slots as (B, T, S, D), 0 for padding."""
    slots, *rest = taken
    whole = slots if slots.shape[0] == clips * frames else slots.new_zeros((clips * frames, *slots.shape[1:]))
    whole[: slots.shape[0]] = slots
    return (whole.unflatten(0, (clips, frames)), *rest)


def _boundary(total: Tensor, state: Activations, chunk: Chunk, task: DecoderTask) -> Tensor | None:
    """Adds the chunk's |softmax(logits / temperature) - onehot(label)|^2 over chosen patches; its gradient in the logits."""
    if task.labels is None:
        return None
    assert task.chosen is not None
    labels, chosen = (each.flatten(0, 1)[chunk] for each in (task.labels, task.chosen))
    maps = state.maps if task.temperature == 1 else (state.logits / task.temperature).softmax(dim=2)
    where = labels.long().unsqueeze(2)
    error = maps.scatter_add(2, where, maps.new_full((), -1).expand(where.shape)) * chosen.unsqueeze(2)
    total += error.square().sum()
    error *= task.boundary * (2 / task.temperature)
    return maps * (error - (maps * error).sum(dim=2, keepdim=True))


def decode(weights: Weights, slots: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Reconstruction (N, P, E) and object logits (N, S, P) of slots (N, S, D), differentiable; the backward runs the chunks
    again, so nothing but these two is kept."""
    flat = [tensor for layer in weights.layers for tensor in layer]
    return _Recomputed.apply(settings, slots, weights.positions, *flat)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, slots: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
        ctx.settings = settings
        ctx.save_for_backward(slots, *flat)
        weights = Weights.of(flat)
        width, num_patches = weights.layers[-1][0].shape[0] - 1, weights.positions.shape[0]
        reconstruction = slots.new_empty(slots.shape[0], num_patches, width, dtype=settings.dtype)
        logits = slots.new_empty(slots.shape[0], num_patches, slots.shape[1])
        with full_precision(slots):
            decoder = ChunkedDecoder(weights, slots, settings)
            for chunk in decoder.chunks:
                state = decoder.forward(chunk)
                logits[chunk], reconstruction[chunk] = state.logits, decoder.reconstruction(state)
        return reconstruction, logits.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_reconstruction: Tensor, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        slots, *flat = ctx.saved_tensors
        with full_precision(slots):
            decoder = ChunkedDecoder(Weights.of(flat), slots, ctx.settings)
            gradients = Gradients(decoder)
            of_patches = grad_logits.transpose(1, 2)
            for chunk in decoder.chunks:
                grad = at_least_float32(grad_reconstruction[chunk])
                gradients.add(chunk, decoder.forward(chunk), grad, of_patches[chunk])
        return (None, *gradients.finish())


def carry(gradients: tuple[Tensor, ...], slots: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """A scalar of value 0 whose backward hands these gradients to slots and weights, once; it scales them in place."""
    return _Carrier.apply(gradients, slots, *weights)


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return inputs[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the fused decoder's gradient was taken twice; it is handed over once and not kept")
        for gradient in gradients:
            gradient.mul_(grad)
        return (None, *gradients)
