"""Full precision for the pieces that need it. Tensors come in, perhaps under bf16 autocast; at least float32 goes out."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Autocast off on the device of `tensor`, for the parts whose rounding decides labels: attention, softmax, losses."""
    return torch.autocast(tensor.device.type, enabled=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
