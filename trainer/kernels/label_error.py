"""Squared distance between softmax over slots and a one-hot label, its gradient taken along. Logits and labels in, a sum out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.kernels.choice import use_triton


def label_error(logits: Tensor, labels: Tensor, chosen: Tensor, temperature: float, kernels: str = "torch") -> Tensor:
    """Sum over the chosen patches of |softmax_S(logits / temperature) - onehot(label)|^2, a scalar.

    Shapes: logits (B, T, S, P), at least float32; labels, any integer, and chosen, bool: (B, T, P).
    The gradient is formed beside the value, where the maps are at hand: one tensor like `logits` stays for the backward
    instead of the four that autograd would keep.
    """
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    return _LabelError.apply(logits, labels, chosen, temperature, kernels, with_gradient)


class _LabelError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, chosen: Tensor, temperature: float, kernels: str, with_gradient: bool
    ) -> Tensor:
        if use_triton(logits, kernels):
            from trainer.kernels import ssync_triton

            total, gradient = ssync_triton.label_error(logits, labels, chosen, temperature, with_gradient)
        else:
            total, gradient = _in_torch(logits, labels, chosen, temperature, with_gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None, None


def _in_torch(
    logits: Tensor, labels: Tensor, chosen: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum, and its gradient if asked for: the plain twin of the Triton kernel."""
    error = (logits if temperature == 1 else logits / temperature).softmax(dim=2)
    where = labels.long().unsqueeze(2)
    error.scatter_add_(2, where, torch.full_like(where, -1, dtype=error.dtype))  # g = M - e, e the one-hot label
    work = error.square()
    squared = work.sum(dim=2, keepdim=True)
    total = (squared.squeeze(2) * chosen).sum()
    if with_gradient:
        # 2/temperature * M * (g - sum_S M g), with M = g + e and sum_S M g = |g|^2 + g_label: nothing cancels
        at_label = error.gather(2, where)
        inner = squared + at_label
        torch.sub(error, inner, out=work).mul_(error).scatter_add_(2, where, at_label - inner)
        return total, work.mul_((chosen * (2.0 / temperature)).to(work.dtype).unsqueeze(2))
    return total, None
