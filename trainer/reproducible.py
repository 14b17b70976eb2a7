"""Sums that come out the same to the last bit, whatever number of ranks share the clips (parallel.reproducible).

Floating-point sums depend on their order, and the order on how clips are dealt out. So every clip goes through the network
alone, in shapes that no number of ranks changes, and what is added up over clips is added up exactly: gradients as whole
numbers, losses by math.fsum. Then no order is left to depend on, and padding adds nothing. Slot contrast, which couples clips,
is taken by every rank of all clips in stream order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from data_pipeline.batch import ClipBatch
from trainer import distributed

COARSE = 2.0**16  # a gradient is coarse / COARSE + fine / (COARSE * FINE): whole numbers of 46 and 42 bits
FINE = 2.0**42
LIMIT = 2.0**30  # of one clip's gradient; so many clips may reach it that no sum of 64 bits overflows: 2**17


def one_clip_each(batch: ClipBatch) -> list[ClipBatch]:
    """The real clips, each a batch of its own; a rank without any keeps one of padding, to take part in all collectives.

    Features are copied: where a clip lies in its batch must not decide how its memory is aligned, and so which kernel reads it.
    """
    parts = list(batch.split(batch.size))[: max(1, batch.num_real)]
    return [replace(part, features=part.features.clone()) for part in parts]


class ExactGradient:
    """Gradients of any number of clips on any number of ranks, added up exactly.

    A value is rounded once, to a multiple of 2**-58 (3.5e-18), which depends on nothing but itself; whole numbers are added
    from there on. Memory: 16 bytes a parameter. A clip's gradient that is not below 2**30 makes the sum NaN.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._lengths = [parameter.numel() for parameter in self._parameters]
        self._reached = [False] * len(self._parameters)
        size, device = sum(self._lengths), self._parameters[0].device
        self._words = torch.zeros(2 * size + 1, dtype=torch.int64, device=device)  # coarse, fine, and how many were too large
        self._coarse, self._fine, self._too_large = self._words.split([size, size, 1])

    @torch.no_grad()
    def take(self) -> None:
        """Add what lies in the parameters' `grad`, and clear it."""
        pieces = zip(self._parameters, self._coarse.split(self._lengths), self._fine.split(self._lengths), strict=True)
        for number, (parameter, coarse, fine) in enumerate(pieces):
            if parameter.grad is None:
                continue
            value = parameter.grad.flatten().double()
            self._too_large += (~(value.abs() < LIMIT)).any()  # NaN is not below anything
            value *= COARSE
            whole = value.trunc()
            coarse += whole.long()
            fine += (value - whole).mul_(FINE).round_().long()
            parameter.grad, self._reached[number] = None, True

    @torch.no_grad()
    def give(self) -> None:
        """The sum over all that was taken, on all ranks, into the parameters' `grad`; begins anew. Collective."""
        distributed.all_sum(self._words)
        pieces = zip(self._parameters, self._coarse.split(self._lengths), self._fine.split(self._lengths), strict=True)
        for number, (parameter, coarse, fine) in enumerate(pieces):
            if self._reached[number]:
                value = (fine.double() / FINE + coarse.double()) / COARSE
                value.masked_fill_(self._too_large > 0, math.nan)
                parameter.grad = value.to(parameter.dtype).view_as(parameter)
        self._words.zero_()
        self._reached = [False] * len(self._parameters)


def sums_over_clips(rows: Tensor, padded: int) -> list[float]:
    """Column sums of all ranks' `rows` (n, terms), n <= padded, rounded once. Collective; reads the device."""
    everyone = distributed.gather_clips(rows, padded).flatten(0, 1)
    return [math.fsum(column) if all(map(math.isfinite, column)) else sum(column) for column in everyone.T.tolist()]


def in_stream_order(own: Tensor, positions: Sequence[int], padded: int, real_per_rank: Sequence[int]) -> tuple[Tensor, Tensor]:
    """All ranks' clips as the stream has them, and where in there this rank's are: own (n, ...) -> (N, ...), int64 (n,).

    `positions`: of this rank's clips in the stream; () where ranks follow one another there. Collective.
    """
    number, rank = own.shape[0], torch.distributed.get_rank()
    first = sum(real_per_rank[:rank])
    places = torch.tensor(positions[:number] or range(first, first + number), dtype=torch.int64, device=own.device)
    found = zip(distributed.gather_clips(own, padded), distributed.gather_clips(places, padded), real_per_rank, strict=True)
    clips, where = zip(*((rows[:count], at[:count]) for rows, at, count in found), strict=True)
    order = torch.cat(where).argsort()
    return torch.cat(clips)[order], torch.searchsorted(torch.cat(where)[order], places)
