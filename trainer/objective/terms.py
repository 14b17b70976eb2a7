"""TermValue: what every term of the objective hands back, a sum and what it is a sum over."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TermValue(NamedTuple):
    """The loss is weight * sum / count once sums and counts of all ranks and micro-batches are added up.

    Shapes: both scalar. `sum` carries the gradient; `count` is float64 and carries none.
    """

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a term


def term(total: Tensor, count: int | Tensor) -> TermValue:
    """`count` as float64 beside the sum, on its device; a Python count is written there without reading anything back."""
    if isinstance(count, Tensor):
        return TermValue(total, count.detach().to(torch.float64))
    return TermValue(total, torch.full((), count, dtype=torch.float64, device=total.device))
