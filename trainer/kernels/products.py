"""Matrix products of the chunked decoder: torch's own, or oneDNN's where they are faster. Matrices in, matrices out.

torch multiplies float32 on a CPU with MKL, which keeps AMD processors off its fastest code; oneDNN does not. torch reaches
oneDNN's float32 products only through a private operator, so it is tried once, against torch's own, before it is used.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SMALLEST = 1 << 22  # multiplications below which oneDNN's start-up costs more than it gains


class Products:
    """torch's own products: any device and dtype."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
        """x (R, K), weight (O, K), bias (O) -> x weight^T + bias, perhaps with its negative entries set to 0. (R, O)"""
        out = torch.addmm(bias, x, weight.t())
        return out.relu_() if relu else out

    def through(self, grad: Tensor, weight: Tensor) -> Tensor:
        """grad (R, O), weight (O, K) -> grad weight (R, K)"""
        return grad @ weight

    def add_outer(self, total: Tensor, grad: Tensor, x: Tensor) -> None:
        """total (O, K) += grad^T x, with grad (R, O) and x (R, K). A float32 total keeps its precision over many chunks."""
        if grad.dtype == total.dtype:
            total.addmm_(grad.t(), x)
        elif grad.is_cuda:
            total.add_(torch.mm(grad.t(), x, out_dtype=total.dtype))
        else:
            total.add_(grad.t() @ x)


class OneDnnProducts(Products):
    """oneDNN's float32 products on a CPU; torch's own for small matrices and other dtypes."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
        if _suits(x, weight.shape[0]):
            return _pointwise(x, weight, bias, relu)
        return super().linear(x, weight, bias, relu)

    def through(self, grad: Tensor, weight: Tensor) -> Tensor:
        return _pointwise(grad, weight.t()) if _suits(grad, weight.shape[1]) else super().through(grad, weight)

    def add_outer(self, total: Tensor, grad: Tensor, x: Tensor) -> None:
        if total.dtype == torch.float32 and _suits(grad.t(), x.shape[1]):
            total.add_(_pointwise(grad.t(), x.t()))
        else:
            super().add_outer(total, grad, x)


def choose_products(name: str, device: torch.device) -> Products:
    """`auto`: oneDNN's on AMD's CPUs where the operator is there and right. `onednn`: wherever it is right; else torch's own.

    Never chosen by a stopwatch: two ranks, or a run and its resumption, must round alike.
    """
    wanted = name == "onednn" or (name == "auto" and _is_amd())
    return OneDnnProducts() if wanted and device.type == "cpu" and onednn_is_right() else Products()


@cache
def onednn_is_right() -> bool:
    """The private operator exists, takes what is asked of it, and agrees with torch's own product."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((48, 40), (56, 40), (56,)))
    wanted = x.double() @ weight.double().t()
    try:
        found = [_pointwise(x, weight, bias, relu=True), _pointwise(x.t(), wanted.t().float()), _pointwise(x, weight.t().t())]
    except (AttributeError, RuntimeError, TypeError):
        return False
    expected = [(wanted + bias).relu(), x.double().t() @ wanted, wanted]
    return all(
        mine.shape == theirs.shape and bool((mine - theirs).abs().max() <= 1e-5 * theirs.abs().max())
        for mine, theirs in zip(found, expected, strict=True)
    )


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")


def _suits(x: Tensor, columns: int) -> bool:
    return x.dtype == torch.float32 and not x.requires_grad and x.shape[0] * x.shape[1] * columns >= SMALLEST


@cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
