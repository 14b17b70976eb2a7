"""The way of batches from host to device.

Comes in: a loader's batches in pinned memory. Goes out: the same batches on the device, in the same order, still as they are
stored. On CUDA the next batch is copied on a stream of its own while the step computes; elsewhere batches pass as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from data_pipeline.batch import ClipBatch


class Loader(Protocol):
    """`ready()` is the very batch that `next` will give, or None as long as that would wait."""

    def __next__(self) -> ClipBatch: ...

    def ready(self) -> ClipBatch | None: ...


class _Copy(NamedTuple):
    """A batch, and its copy on the device, which is whole once `done` has come."""

    source: ClipBatch
    copy: ClipBatch
    done: torch.cuda.Event


class DeviceFeed:
    """Iterates over `loader`. The loader's own position stays that of what was handed out: a copy ahead counts nothing.

    It never waits for a batch that the step does not need yet: what is not read when a step begins is copied before the next.
    """

    def __init__(
        self, loader: Loader, device: torch.device, wanted: Callable[[ClipBatch], ClipBatch] = lambda batch: batch
    ) -> None:
        """`wanted`: what of a batch goes to the device."""
        self._loader, self._device, self._wanted = loader, device, wanted
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: _Copy | None = None

    def __iter__(self) -> Iterator[ClipBatch]:
        return self

    def __next__(self) -> ClipBatch:
        batch = next(self._loader)
        if self._stream is None:
            return self._wanted(batch)
        ahead = self._ahead
        if ahead is None or ahead.source is not batch:
            ahead = self._start(batch, self._stream)
        upcoming = self._loader.ready()
        self._ahead = None if upcoming is None else self._start(upcoming, self._stream)
        return self._hand_over(ahead)

    def _start(self, batch: ClipBatch, stream: torch.cuda.Stream) -> _Copy:
        with torch.cuda.stream(stream):
            copy = self._wanted(batch).to(self._device)
        return _Copy(batch, copy, stream.record_event())

    def _hand_over(self, ahead: _Copy) -> ClipBatch:
        """The step's stream waits for the copy, the host does not."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(ahead.done)
        for tensor in (ahead.copy.features, ahead.copy.statistics):
            if tensor is not None:
                # It was allocated on the copying stream: its memory must not go back there before the step is through with it.
                tensor.record_stream(current)
        return ahead.copy


__all__ = ["DeviceFeed"]
