"""Why a session is to end before its work is done: signals, deadlines, a lost folder in; orders to ranks, an exit code out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from cluster.config import LaunchConfig
from cluster.supervision.group import Group
from cluster.verdict import CODES_OF_REASONS, REQUEUE, Verdict

STOP_REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung_up"}
PLATFORM_MARGIN = 10.0  # seconds beyond the grace time that are kept free before the platform's end
LOST_FOLDER = 1  # exit code of a session whose run folder has been taken over


class Stopping:
    """What is wanted of the session; the first reason counts."""

    def __init__(self, config: LaunchConfig, note: Callable[..., None], say: Callable[[str], None]) -> None:
        self.reason: str | None = None  # interrupted | terminated | hung_up | out_of_time | preempted
        self.fenced = False  # the run folder is another session's now
        self._config, self._note, self._say = config, note, say
        self._group: Group | None = None
        self._told = False  # the ranks have been told to stop, or would have been
        self._max_time_at = None if config.max_time is None else time.time() + config.max_time

    @property
    def wanted(self) -> bool:
        return self.reason is not None or self.fenced

    def begin(self, group: Group) -> None:
        """An attempt has been started: what is wanted from now on concerns its ranks."""
        self._group = group

    def end(self) -> None:
        self._group = None

    def on_signal(self, number: int) -> None:
        """A signal to the supervisor's own process."""
        if number == signal.SIGUSR2:
            self.preempt(number, "the launcher")
        elif number in STOP_REASONS:
            self._stop(STOP_REASONS[signal.Signals(number)])

    def preempt(self, number: int, where: str) -> None:
        """The platform will take a node, or everything, away. SIGUSR2 leaves time for a save; after SIGTERM a kill follows."""
        if self.reason is None:
            self._note("preempted", signal=signal.Signals(number).name, where=where)
            self._say(f"{signal.Signals(number).name} at {where}: saving")
        if number != signal.SIGUSR2:
            self._stop("terminated", preempted=True)
            return
        self.reason = self.reason or "preempted"
        if self._group is not None:
            self._group.save_and_end()

    def check_time(self, platform_ends_at: float | None) -> None:
        """Have the ranks save and end when --max-time is over, or the platform's time (seconds since the epoch) soon will be.

        Also after a SIGUSR2, which sets no limit: ranks may still be in a long evaluation when the end comes.
        """
        now = time.time()
        if self._told:
            return
        if platform_ends_at is not None and now >= platform_ends_at - self._config.grace - PLATFORM_MARGIN:
            self._note("preempted", where="the platform's time limit")
            self._say("the platform's time limit is near: saving")
            self._stop("out_of_time", preempted=True)
        elif self._max_time_at is not None and now >= self._max_time_at:
            self._stop("out_of_time")

    def lose_folder(self, owner: str) -> None:
        """The run folder has another owner: the ranks must not write there any more."""
        self.fenced = True
        self._note("taken_over", owner=owner)
        folder = self._config.run_dir
        what = f"was taken over by {owner}" if os.path.isdir(folder) else "is gone"
        self._say(f"run folder {folder} {what}: ending the ranks of this session at once")
        if self._group is not None:
            self._group.kill()

    def final_code(self, verdict: Verdict) -> int:
        """The session's exit code after its last attempt. What the platform took away may always be started again."""
        if self.fenced:
            return LOST_FOLDER
        taken_away = self.reason == "preempted" and verdict.outcome != "done" and verdict.exit_code != 2
        return REQUEUE if taken_away else verdict.exit_code

    def code_without_group(self, attempts: int) -> int:
        """The session's exit code when no ranks were there; after an attempt all that counts has been saved."""
        if self.fenced:
            return LOST_FOLDER
        reason = self.reason or "terminated"
        self._say(reason.replace("_", " ") + (" before the next attempt" if attempts else " before any rank was started"))
        if reason == "preempted" or (attempts and reason != "interrupted"):
            return REQUEUE
        return CODES_OF_REASONS[reason]

    def _stop(self, reason: str, preempted: bool = False) -> None:
        again = self._told and reason == "interrupted"
        self._told = True
        self._note("stopping", reason=reason)  # from here on `status` says that the run saves
        if reason == "interrupted":
            self._say(
                "killing now" if again else f"stopping: ranks have {self._config.grace:g} s to save (Ctrl-C again: kill now)"
            )
        self.reason = self.reason or ("preempted" if preempted else reason)
        if self._group is None:
            return
        if again:
            self._group.kill()
        else:
            self._group.stop(reason, self._config.grace)
