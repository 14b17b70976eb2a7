"""Memory of batches, used again. Part of data_pipeline.loader.

Comes in: the shape of a batch. Goes out: tensors that are nobody else's for as long as anyone holds them, or a view of them.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor


class BatchBuffers:
    """A ring of buffers by ownership: a buffer comes back when the last tensor that shows it is gone, not a moment earlier.

    So a batch that somebody keeps is never overwritten; the ring just grows by one. Fresh memory costs more than the copy into it
    (the system hands it out page by page), which is why it is kept: at most `keep` buffers.
    Pinned memory comes from torch's own ring, which also waits for copies to a device that are still under way.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, keep: int, pinned: bool) -> None:
        self.shape, self.dtype, self.pinned = shape, dtype, pinned
        self._torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        self._free: deque[np.ndarray] = deque(maxlen=keep)

    def take(self) -> Tensor:
        """A tensor with any content."""
        if self.pinned:
            return torch.empty(self.shape, dtype=self._torch_dtype, pin_memory=True)
        try:
            memory = self._free.pop()  # the last that came back: it may still be in the processor's cache
        except IndexError:
            memory = np.empty(self.shape, self.dtype)
        # The tensor's storage holds this view, and nobody else does: the view dies with the storage.
        view = memory.view()
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.from_numpy(view)


__all__ = ["BatchBuffers"]
