"""SRL's two ranking losses with memory linear in the number of tokens. Features and labels come in, a sum over tokens goes out.

Both compare every token of a group with every other. Here a block of rows is compared at a time, and the closed-form gradient
is formed while the block is at hand: what stays for the backward has the size of the features. Unit vectors bound the logits
by 1/temperature, so their exponentials are summed without a running maximum (the configuration keeps temperature >= 0.02).
Source: SRL, deblurring and denoising losses, released code; the factor temperature/0.07 is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.kernels.products import Products, choose_products

NORM_EPS = 1e-12  # a zero vector stays zero, as in torch.nn.functional.normalize
CPU_TILE, CUDA_TILE = (512, 1024), (4096, 8192)  # rows, columns of the decoder's loss: a CPU tile stays in its cache
CPU_ROW_BLOCK, CUDA_ROW_BLOCK = 2**21, 2**26  # numbers in a block of whole rows of the encoder's loss


def decoder_ranking(features: Tensor, targets: Tensor, labels: Tensor, num_labels: int, temperature: float) -> Tensor:
    """Each token's feature shall find its own target first, then those of its label, before all others. A scalar, the sum.

    Shapes: features, targets (G, N, D), not normalised; labels (G, N), any integer below num_labels; G groups of N tokens.
    With unit vectors u, v and tau the temperature, each token i adds
    log sum_j exp(u_i v_j / tau) - (u_i v_i + mean over the tokens j of its label of u_i v_j) / (2 tau).
    The gradient goes to `features` alone.
    """
    with_gradient = torch.is_grad_enabled() and features.requires_grad
    return _Ranking.apply(features, _decoder_group, (targets, labels), (num_labels, temperature), with_gradient)


def encoder_ranking(
    features: Tensor, criterion: Tensor, labels: Tensor, num_labels: int, temperature: float, num_neighbours: int
) -> Tensor:
    """Each token's feature shall find its nearest neighbours by `criterion`, and those of its label, first. A scalar, the sum.

    Shapes: features (G, N, D) and criterion (G, N, E), not normalised; labels (G, N). Neighbours: as similar as the
    `num_neighbours`-th most similar token, the token itself among those counted but not among the neighbours.
    The gradient goes to both sides of every pair of `features`, none to `criterion`.
    """
    with_gradient = torch.is_grad_enabled() and features.requires_grad
    sizes = (num_labels, temperature, num_neighbours)
    return _Ranking.apply(features, _encoder_group, (criterion, labels), sizes, with_gradient)


class _Ranking(torch.autograd.Function):
    """Sum over groups of `of_group`, which writes its gradient into the view it is given."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, of_group: Any, tensors: Any, sizes: Any, with_gradient: bool) -> Tensor:
        total = features.new_zeros(())
        gradient = torch.empty_like(features, memory_format=torch.contiguous_format) if with_gradient else None
        for group in range(features.shape[0]):  # a group is a chunk: nothing is compared across
            into = None if gradient is None else gradient[group]
            total += of_group(features[group], *(tensor[group] for tensor in tensors), *sizes, into)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


class _Labels(NamedTuple):
    """Sum of the members' unit vectors for each token's label (N, D), how many they are (N, 1)."""

    sums: Tensor
    labels: Tensor
    counts: Tensor

    def of(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self.sums[self.labels[rows]], self.counts[self.labels[rows]]


def _label_sums(vectors: Tensor, scale: Tensor | None, labels: Tensor, num_labels: int) -> _Labels:
    """By a product with one-hot labels: the same bits at every run, which scattered additions on a GPU are not."""
    labels = labels.long()
    onehot = (labels == torch.arange(num_labels, device=labels.device)[:, None]).to(vectors.dtype)
    counts = onehot.sum(dim=1, keepdim=True)
    return _Labels((onehot if scale is None else onehot.mul_(scale)) @ vectors, labels, counts)


def _decoder_group(
    features: Tensor, targets: Tensor, labels: Tensor, num_labels: int, temperature: float, gradient: Tensor | None
) -> Tensor:
    """One group: (N, D), (N, D), (N) -> scalar; the gradient goes into `gradient` (N, D)."""
    products = choose_products("auto", features.device)
    row_size, column_size = CUDA_TILE if features.is_cuda else CPU_TILE
    scale = 1 / targets.norm(dim=1).clamp(min=NORM_EPS)
    same_label = _label_sums(targets, scale, labels, num_labels)
    total = features.new_zeros(())
    for rows in _slices(features.shape[0], row_size):
        norms = features[rows].norm(dim=1, keepdim=True).clamp(min=NORM_EPS)
        units = features[rows] / norms
        partition, mixed = _partition(units / temperature, targets, scale, column_size, gradient is not None, products)
        sums, counts = same_label.of(rows)
        positive = (targets[rows] * scale[rows, None] + sums / counts) / 2
        total += (partition.log() - (units * positive).sum(dim=1, keepdim=True) / temperature).sum()
        if gradient is not None:
            gradient[rows] = _before_norm((mixed / partition - positive) / temperature, units, norms)
    return total


def _partition(
    queries: Tensor, targets: Tensor, scale: Tensor, column_size: int, with_mixed: bool, products: Products
) -> tuple[Tensor, Tensor]:
    """Over all targets, tile after tile: sum of exp(query . unit target) (R, 1), and that sum weighted by targets (R, D)."""
    partition, mixed = queries.new_zeros(queries.shape[0], 1), torch.zeros_like(queries)
    for columns in _slices(targets.shape[0], column_size):
        units = targets[columns] * scale[columns, None]
        weights = products.through(queries, units.t()).exp_()
        partition += weights.sum(dim=1, keepdim=True)
        if with_mixed:
            mixed += products.through(weights, units)
    return partition, mixed


def _encoder_group(
    features: Tensor,
    criterion: Tensor,
    labels: Tensor,
    num_labels: int,
    temperature: float,
    num_neighbours: int,
    gradient: Tensor | None,
) -> Tensor:
    """One group: (N, D), (N, E), (N) -> scalar; the gradient goes into `gradient` (N, D)."""
    products = choose_products("auto", features.device)
    num_tokens = features.shape[0]
    norms = features.norm(dim=1, keepdim=True).clamp(min=NORM_EPS)
    units = features / norms
    scale = 1 / criterion.norm(dim=1).clamp(min=NORM_EPS)
    same_label = _label_sums(units, None, labels, num_labels)
    total, pull = features.new_zeros(()), torch.zeros_like(units)
    numbers = CUDA_ROW_BLOCK if features.is_cuda else CPU_ROW_BLOCK
    for rows in _slices(num_tokens, max(16, numbers // max(num_tokens, 1))):
        near = _neighbours(products.through(criterion[rows], criterion.t()).mul_(scale), rows, num_neighbours)
        logits = products.through(units[rows] / temperature, units.t())
        num_near = near.sum(dim=1, keepdim=True)
        per_near = 0.5 / num_near.clamp(min=1)  # an empty set contributes nothing, as released
        near_loss = torch.dot(near.mul_(per_near).flatten(), logits.flatten())
        weights = logits.exp_()
        weights.diagonal(rows.start).zero_()
        partition = weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        sums, counts = same_label.of(rows)
        sums, num_same = sums - units[rows], counts - 1
        per_same = 0.5 / num_same.clamp(min=1)
        share = num_near * per_near + num_same * per_same
        same_logits = (units[rows] * sums).sum(dim=1, keepdim=True) / temperature
        total += (share * partition.log() - same_logits * per_same).sum() - near_loss
        if gradient is not None:
            # d loss / d logits; both ends of a pair learn from it. Same-label pairs weigh alike at both ends: twice the sum
            pairs = weights.mul_(share / partition).sub_(near)
            pull.addmm_(pairs.t(), units[rows])
            pull[rows] += products.through(pairs, units) - 2 * per_same * sums
    if gradient is not None:
        gradient.copy_(_before_norm(pull.div_(temperature), units, norms))
    return total


def _neighbours(similar: Tensor, rows: slice, num_neighbours: int) -> Tensor:
    """1 where a row's entry reaches its `num_neighbours`-th largest, 0 elsewhere and on the diagonal. In place. (R, N)"""
    near = torch.ge(similar, kth_largest(similar, num_neighbours), out=similar)
    near.diagonal(rows.start).zero_()
    return near


def kth_largest(values: Tensor, k: int) -> Tensor:
    """Each row's k-th largest entry, exactly. (R, N) -> (R, 1)

    The k largest lie in those k groups of columns whose maxima are largest: maxima are quick to take, and only the groups'
    members are sorted.
    """
    num_columns = values.shape[1]
    size = int((num_columns / k) ** 0.5)
    if size < 2:
        return values.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    whole = num_columns // size * size
    groups = values[:, :whole].unflatten(1, (size, -1))  # a group is every (whole / size)-th column: its maximum vectorises
    best = groups.amax(dim=1).topk(k, dim=1, sorted=False).indices
    members = groups.gather(2, best.unsqueeze(1).expand(-1, size, -1)).flatten(1)
    members = torch.cat([members, values[:, whole:]], dim=1)
    return members.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def _before_norm(grad: Tensor, units: Tensor, norms: Tensor) -> Tensor:
    """Gradient with respect to x from that with respect to x / |x|. In place where it can be."""
    return grad.sub_(units * (units * grad).sum(dim=1, keepdim=True)).div_(norms)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
