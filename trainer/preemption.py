"""A request to stop: a signal sets a flag, the training loop asks at each step boundary. Handlers do nothing else."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Interrupted(Exception):
    """All ranks left what they were doing, because one was asked to stop."""


class StopRequest:
    """`requested` turns true once SIGTERM, SIGUSR2 or SIGINT came. No handler is installed outside the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self.kind = ""

    def install(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.kind = signal.Signals(number).name
