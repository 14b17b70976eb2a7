"""Whether a Triton kernel takes the place of its plain twin. A tensor and the setting come in, yes or no goes out."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError


def use_triton(tensor: Tensor, kernels: str) -> bool:
    """auto: on CUDA where triton is installed. torch: never. triton: always, with TRITON_INTERPRET=1 on a CPU, too.

    The kernels compute in float32: float64 stays with the plain functions, and so does a batch of no clips.
    """
    if kernels == "torch" or tensor.dtype == torch.float64 or tensor.numel() == 0:
        return False
    if kernels == "triton" and not _is_installed():
        raise ConfigError("objective.ssync.kernels=triton; triton is not installed; pip install triton, or set it to auto")
    return kernels == "triton" or (tensor.is_cuda and _is_installed())


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None
