"""How long fetching goes on: waits between attempts grow, a server's wish is heard, and there is an end.

Comes in: what went wrong. Goes out: a wait, or the error that ends the fetch.
"""

from __future__ import annotations

import logging
import random
import threading
import time

from data_pipeline.config import RemoteConfig
from data_pipeline.errors import FetchError
from data_pipeline.progress import format_seconds
from data_pipeline.remote.fetch import Broken

PROGRESS_BYTES = 1 << 20  # so much starts the count of attempts and the deadline anew
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
logger = logging.getLogger(__name__)


class Patience:
    """Of one fetch. `stop` ends every wait: the reader is closing."""

    def __init__(self, config: RemoteConfig, where: str, stop: threading.Event, attempts: int | None = None) -> None:
        self.where, self._stop, self._deadline_s = where, stop, config.deadline_s
        self._attempts = config.attempts if attempts is None else min(attempts, config.attempts)
        self._begin()

    def _begin(self) -> None:
        self._failures, self._received, self._began = 0, 0, time.monotonic()

    def received(self, num_bytes: int) -> None:
        self._received += num_bytes
        if self._received >= PROGRESS_BYTES:
            self._begin()

    def wait(self, error: Broken) -> None:
        """Sleep before the next attempt. Raises FetchError when there is none."""
        self._failures += 1
        # Half of the wait is chance: readers that failed together should not come back together.
        wait = min(FIRST_WAIT_S * 2 ** (self._failures - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
        wait = max(wait, error.wait_s)
        spent = time.monotonic() - self._began
        if self._failures >= self._attempts or spent + wait > self._deadline_s:
            asked = f", the server asks for {format_seconds(error.wait_s)} more" if error.wait_s else ""
            raise FetchError(
                f"{self.where}: {error}; {self._failures} attempts in {format_seconds(spent)} brought nothing{asked}; "
                f"the server must answer; check it and the network, or raise data.remote.attempts and data.remote.deadline_s"
            )
        logger.warning("%s: %s; attempt %d follows in %.1f s", self.where, error, self._failures + 1, wait)
        if self._stop.wait(wait):
            raise FetchError(f"{self.where}: given up while waiting for the server, because the reader was closed")


__all__ = ["Patience"]
