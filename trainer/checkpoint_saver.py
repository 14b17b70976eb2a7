"""Saver: when checkpoints of a running engine are written, and from when on they count. Every method is collective.

The training loop waits only for the snapshot into rank 0's host memory; a thread of rank 0 writes it. One save is in flight at
most: the next one waits for it, so that memory is bounded by one snapshot (12 bytes a weight). A checkpoint counts once it lies
on the disk and all ranks know: rank 0 says so in the exchange that every update ends with, or at the next save.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet  # another class than the built-in one before Python 3.11
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import StateError, StorageError
from trainer import checkpoint, distributed, heartbeat
from trainer.checkpoint_write import Saved, publish
from trainer.config import CheckpointConfig
from trainer.engine import Engine
from trainer.snapshot import Snapshot, SnapshotTaker
from trainer.state import TrainState

LAST_WAIT_S = 60.0  # how long an attempt that ends with an error still waits for a save in flight
LOOK_EVERY_S = 5.0  # ranks that wait for a save hear so often that it goes on: a large one outlasts any collective's timeout
STALLED_S = 10.0  # a save of which nothing has reached the disk for so long goes on no more: who waits for it then hangs, visibly


class Told(Protocol):
    """Who learns of it, on every rank."""

    def saved(self, step: int, num_bytes: int, seconds: float, stall_s: float) -> None: ...
    def save_failed(self, step: int, why: str, in_a_row: int) -> None: ...
    def verify_failed(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a save ended. `why` is a line where it failed; `fatal`: trying again is of no use."""

    step: int
    seconds: float
    saved: Saved | None = None
    why: str = ""
    fatal: bool = False


class Saver:
    """`step`: of the checkpoint that the run went on from, -1 for none.

    `saved_step` is the newest step whose checkpoint lies on the disk, `good_step` the newest of them whose weights have given a
    finite loss since; -1: none.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        engine: Engine,
        told: Told,
        step: int = -1,
        probe: checkpoint.ProbeOf | None = None,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self.root, self.config, self.told = root, config, told
        self.saved_step = self.good_step = step
        self._probe, self._fence = probe, fence
        self._snapshots = SnapshotTaker(engine)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._begun: int | None = None  # step of the save in flight
        self._moved_at = 0.0  # when more of it had reached the disk
        self._stall_s = 0.0  # how long the training loop waited for it
        self._future: Future[Outcome] | None = None  # on rank 0
        self._found: list[str] = []  # damaged checkpoints that the thread came across
        self._failures = 0  # in a row
        self._unproven: Saved | None = None

    def save(self, state: TrainState, final: bool = False) -> None:
        """Have the engine's state saved. `final`: return when it lies on the disk.

        Raises StateError on every rank when a save failed and was final, or the last one that checkpoint.max_failures allows, or
        failed for another reason than the disk. Older checkpoints are untouched.
        """
        if self._begun != state.step:
            self._settle(give_up=not final)
            if self.saved_step == state.step:
                return
            self._begin(state)
        elif not final:
            return
        if final or not self.config.asynchronous:
            self._settle(give_up=True, final=final)

    @property
    def in_flight(self) -> int | None:
        """Rank 0: the step whose checkpoint is being written."""
        return self._begun if self._future is not None and not self._future.done() else None

    def has_news(self) -> bool:
        """Rank 0: a save has ended that the others do not know of. Not collective."""
        return self._future is not None and self._future.done()

    def stepped(self, step: int, news: bool) -> None:
        """Update number `step` (1 is the first) was applied, so the weights before it have given a finite loss. `news`: some
        rank's has_news."""
        if news:
            self._settle(give_up=True)
        if self._unproven is not None and self.saved_step < step:
            self.prove()

    def prove(self) -> None:
        """The newest checkpoint works: older ones may go."""
        newest, self._unproven = self._unproven, None
        if newest is None:
            return
        self.good_step = self.saved_step
        if distributed.is_main():
            done = self._writer.submit(self._retire, newest.path)
            if not self.config.asynchronous:
                done.result()

    def finish(self) -> None:
        """Nothing is saved after this: return when older checkpoints are gone."""
        self.prove()
        self._writer.shutdown(wait=True)
        self._report()

    def close(self) -> None:
        """Give a save in flight the time to end, whatever ended the attempt. Not collective; may be called twice."""
        if self._future is not None:
            with contextlib.suppress(NotYet), heartbeat.during("save"):
                self._future.exception(LAST_WAIT_S)
        self._writer.shutdown(wait=False, cancel_futures=True)

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _begin(self, state: TrainState) -> None:
        began = time.perf_counter()
        snapshot = self._snapshots.take()
        self._begun = state.step
        if snapshot is not None:
            self._moved()
            self._future = self._writer.submit(self._write, snapshot, state, began)
        self._stall_s = time.perf_counter() - began

    def _write(self, snapshot: Snapshot, state: TrainState, began: float) -> Outcome:
        """In rank 0's thread: no collectives, no heartbeat, no shared random numbers."""
        saved, why, fatal = None, "", False
        try:
            saved = publish(self.root, snapshot, state, self._probe, self._fence, self._moved)
        except Exception as error:  # whatever it is, the ranks must learn of it where they meet
            why = checkpoint.cannot_write(state.step, self.root, error)
            fatal = not isinstance(error, OSError)
        return Outcome(state.step, time.perf_counter() - began, saved, why, fatal)

    def _moved(self) -> None:
        self._moved_at = time.monotonic()

    def _retire(self, trusted: Path) -> None:
        """What could not be removed now is tried again after the next save; by the folder's new owner where there is one."""
        with contextlib.suppress(OSError, StateError):
            self._fence()
            checkpoint.retire(self.root, self.config.keep, trusted, self._found.append)

    def _settle(self, give_up: bool, final: bool = False) -> None:
        """Wait for the save in flight; all ranks learn how it ended. Where it failed: raise, if there is no use in going on."""
        if self._begun is None:
            return
        waited = time.perf_counter()
        while (outcome := distributed.from_main(self._awaited())) is None:
            pass
        stall_s = self._stall_s + time.perf_counter() - waited
        self._begun = self._future = None
        self._report()
        if outcome.saved is not None:
            self.saved_step, self._unproven, self._failures = outcome.step, outcome.saved, 0
            self.told.saved(outcome.step, outcome.saved.num_bytes, outcome.seconds, stall_s)
            return
        self._failures += 1
        self.told.save_failed(outcome.step, outcome.why, self._failures)
        if outcome.fatal:
            raise StateError(outcome.why)
        if final:
            raise StorageError(outcome.why)
        if give_up and self._failures >= self.config.max_failures:
            raise StorageError(f"{outcome.why}; {self._failures} saves in a row failed (checkpoint.max_failures)")

    def _awaited(self) -> Outcome | None:
        """On rank 0: how the save in flight ended, or None when it goes on after a while."""
        if self._future is None:
            return None
        while True:
            try:
                return self._future.result(LOOK_EVERY_S)
            except NotYet:
                if time.monotonic() - self._moved_at < STALLED_S:
                    return None

    def _report(self) -> None:
        found, self._found = self._found, []
        for text in found:
            self.told.verify_failed(text)


def owner_fence(run: Path, attempt: int) -> Callable[[], None]:
    """A check that the run folder still belongs to this attempt: its launcher writes the attempt that may publish to owner.json.

    The check raises StateError that names the new owner, and OSError when the record cannot be read.
    """

    def check() -> None:
        try:
            record = json.loads((run / "owner.json").read_text())
            owner = int(record["attempt"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return  # started without a launcher
        if owner > attempt:
            raise StateError(
                f"run folder {run} belongs to attempt {owner} by now (process {record.get('pid')} on {record.get('host')}), "
                f"this is attempt {attempt}; nothing was published; it must end"
            )

    return check
