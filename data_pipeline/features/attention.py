"""One attention for the whole project: queries, keys, values -> mixed values.

xformers computes it on CUDA devices where it truly works, PyTorch's own fused attention everywhere else. Both give the same
numbers up to rounding, forward and backward. Which one a device uses is found out once, by a tiny call, and logged once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger(__name__)

# xformers' kernels take these; float64 and integers always go to PyTorch.
_XFORMERS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T) v, softmax over the keys.

    Shapes: q (B, heads, N, d), k and v (B, heads, M, d) -> (B, heads, N, d), in q's dtype.
    `scale` is what the products are multiplied by; None is d ** -0.5.
    """
    kernel = _xformers_kernel(q.device.type, q.device.index) if q.is_cuda else _cpu_kernel()
    if kernel is None or not _fits_xformers(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, scale=scale)
    # xformers wants (B, N, heads, d); the kernel's p is dropout, its scale has the meaning of ours.
    mixed = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return mixed.transpose(1, 2)


def implementation(device: torch.device | str) -> str:
    """Which implementation `attention` uses on this device: "xformers" or "sdpa"."""
    device = torch.device(device)
    if device.type != "cuda":
        return "sdpa"
    return "sdpa" if _xformers_kernel(device.type, device.index) is None else "xformers"


def _fits_xformers(q: Tensor, k: Tensor, v: Tensor) -> bool:
    # The kernels load aligned vectors: a head width that is not a multiple of 8 is refused there.
    return q.dtype in _XFORMERS_DTYPES and q.dtype == k.dtype == v.dtype and q.shape[-1] % 8 == 0


@functools.cache
def _cpu_kernel() -> None:
    logger.info("attention on cpu: torch scaled_dot_product_attention (xformers has no cpu kernels)")
    return None


@functools.cache
def _xformers_kernel(device_type: str, index: int | None) -> Callable[..., Tensor] | None:
    """xformers' attention if a tiny call on this device gives the right values and gradients, else None.

    Listed is not usable: a wheel built for another torch lists operators that fail when called, so it is called.
    """
    device = torch.device(device_type if index is None else f"{device_type}:{index}")
    try:
        from xformers.ops import memory_efficient_attention

        _probe(memory_efficient_attention, device)
    except Exception as error:  # whatever goes wrong in a foreign library, PyTorch's attention does the work
        reason = str(error).strip().splitlines()
        logger.warning(
            "attention on %s: torch scaled_dot_product_attention; xformers is not usable here: %s",
            device,
            f"{type(error).__name__}: {reason[0] if reason else 'no message'}",
        )
        return None
    logger.info("attention on %s: xformers memory_efficient_attention", device)
    return memory_efficient_attention


def _probe(kernel: Callable[..., Tensor], device: torch.device) -> None:
    """Run `kernel` forward and backward on few numbers; raise unless values and gradients are those of PyTorch."""
    # First use may fall in an extractor's no_grad or under autocast: neither may decide what the probe sees.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        steps = torch.arange(2 * 8 * 2 * 16, dtype=torch.float32, device=device)
        ours = [torch.sin(steps * rate).view(2, 8, 2, 16).requires_grad_() for rate in (0.3, 0.5, 0.7)]
        theirs = [item.detach().clone().requires_grad_() for item in ours]
        mixed = kernel(*ours, scale=0.25)
        q, k, v = (item.transpose(1, 2) for item in theirs)
        expected = functional.scaled_dot_product_attention(q, k, v, scale=0.25).transpose(1, 2)
        our_grads = torch.autograd.grad(mixed.square().sum(), ours)
        their_grads = torch.autograd.grad(expected.square().sum(), theirs)
        pairs = zip((mixed, *our_grads), (expected, *their_grads), strict=True)
        if not all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in pairs):  # tensor cores may round to TF32
            raise RuntimeError("a probe gave other numbers than scaled_dot_product_attention")
