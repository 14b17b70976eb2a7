"""Command: this machine's rates, measured in about two seconds. Nothing comes in, one line of JSON goes out (rates.Rates)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from trainer.plan.rates import Rates, as_json

ROUNDS = 5


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median over rounds after one that does not count."""
    taken = []
    for _ in range(ROUNDS + 1):
        before = _now(device)
        call()
        taken.append(_now(device) - before)
    return statistics.median(taken[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _matmul(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> float:
    left, right = (torch.randn(size, width, device=device).to(dtype) for size in (rows, width))
    return 2 * rows * width**2 / seconds(lambda: left @ right, device)


def _memory(device: torch.device, numbers: int) -> float:
    source, target = (torch.ones(numbers, device=device) for _ in range(2))
    return 2 * 4 * numbers / seconds(lambda: target.copy_(source), device)


def _call(device: torch.device) -> float:
    """A chain of small operations, each of which needs the one before."""
    start, length = torch.ones(8, device=device), 200

    def chain() -> Tensor:
        value = start
        for _ in range(length):
            value = value + 1
        return value

    return seconds(chain, device) / length


def measure() -> Rates:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    rows, width, numbers = (16384, 1024, 2**28) if cuda else (1024, 1024, 2**24)
    half, single = (_matmul(device, dtype, rows, width) for dtype in (torch.bfloat16, torch.float32))
    return Rates(
        name="measured: " + (torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"),
        matmul_half=half,
        matmul_float=single,
        memory=_memory(device, numbers),
        call=_call(device),
        memory_gib=torch.cuda.mem_get_info()[1] / 2**30 if cuda else None,
        node_link=450e9 if cuda else 5e9,
    )


if __name__ == "__main__":
    print(as_json(measure()))
