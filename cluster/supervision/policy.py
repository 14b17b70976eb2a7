"""What to do when an attempt has ended: endings in, one Decision out. Pure functions and numbers."""

from __future__ import annotations

from dataclasses import dataclass

USER_ERROR = 2  # exit code of a rank: a setting or a file is wrong, another start would say the same
NO_STORAGE = 74  # of a rank: the disk refuses checkpoints; somebody may mend that, so the same error twice means nothing
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an attempt ended, as far as the policy needs it."""

    outcome: str  # done | saved | stopped (somebody wanted it) | failed
    cause: str = "exit"  # of a failure: exit (a rank's own exit code) | lost_peer | signal | lost_node | hang
    code: int = 0
    error: str = ""  # last line of what the rank said
    step: int | None = None  # the furthest that a rank was seen at; None: unknown
    applied: bool = False  # this session has applied a step
    saved_step: int = -1  # newest checkpoint when the attempt ended
    regroup: bool = False  # it was asked to save so that the group can be formed anew
    complete: bool = False  # the run folder has DONE


@dataclass(frozen=True, kw_only=True)
class Decision:
    action: str  # restart | end
    delay_s: float = 0.0
    why: str = ""
    counted: bool = True  # a restart that uses up the budget


@dataclass
class History:
    """What the policy remembers of a session."""

    max_restarts: int
    saved_step: int = -1  # newest checkpoint when the last attempt started
    used: int = 0  # restarts since a checkpoint last became newer
    last: Ending | None = None  # failure before this one

    def decide(self, ending: Ending) -> Decision:
        """The decision on an attempt that has just ended; remembers it."""
        progress = ending.saved_step > self.saved_step
        if progress:
            self.used = 0
        decision = self._decide(ending, progress)
        self.saved_step = max(self.saved_step, ending.saved_step)
        self.last = ending if ending.outcome == "failed" else None
        self.used += decision.action == "restart" and decision.counted
        return decision

    def _decide(self, ending: Ending, progress: bool) -> Decision:
        if ending.outcome == "saved" and ending.regroup:
            return Decision(action="restart", why="all nodes are there again", counted=False)
        if ending.outcome != "failed":
            return Decision(action="end")
        hopeless = self._hopeless(ending)
        if hopeless:
            return Decision(action="end", why=hopeless)
        if self.used >= self.max_restarts:
            gone = "without a newer checkpoint" if self.used else "allowed"
            return Decision(action="end", why=f"{_times(self.used)} {gone}; --max-restarts {self.max_restarts}")
        delay = 0.0 if progress or self.used == 0 else min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self.used - 1))
        return Decision(action="restart", delay_s=delay, why=f"restart {self.used + 1} of at most {self.max_restarts}")

    def _hopeless(self, ending: Ending) -> str:
        """Why another start would end the same way; "" when it may not."""
        if ending.complete:
            return "the run is complete"
        if ending.cause != "exit":
            return ""
        if ending.code == USER_ERROR:
            return "a setting or a file is wrong: another start would fail the same way"
        if ending.code == NO_STORAGE:
            return ""
        if not ending.applied:
            return "it failed before its first step: another start would fail the same way"
        before = self.last
        if before and before.cause == "exit" and ending.error and (before.error, before.step) == (ending.error, ending.step):
            where = "" if ending.step is None else f" at step {ending.step}"
            return f"the same error twice{where}: another start would fail the same way"
        return ""


def _times(count: int) -> str:
    return "no restart is" if count == 0 else f"{count} restart{'s' if count > 1 else ''}"
