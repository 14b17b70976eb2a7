"""How an attempt ended and why: what happened to its ranks in, one Verdict and its text out. Pure functions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUEUE = 75  # a rank's exit code: saved, start me again
INTERRUPTED = 130
TERMINATED = 143
OUT_OF_TIME = 124
CODES_OF_REASONS = {"interrupted": INTERRUPTED, "terminated": TERMINATED, "out_of_time": OUT_OF_TIME, "hung_up": 129}
LAST_LINES = 20
SETTLE = 2.0  # seconds from the end of a rank that lost its peer to the stop of all: the cause may end after it
# What a rank says that ended because another one had ended first. The words are those of gloo, NCCL and torch's store.
LOST_PEER = re.compile(
    r"connection (?:was )?(?:reset|closed|refused)|broken pipe|recvvalue failed|socket (?:timeout|closed)"
    r"|remote (?:process|peer) exited|ncclRemoteError|nccl communicator was aborted|DistNetworkError|DistStoreError"
    r"|timed out waiting \d+ ?ms|collective operation timeout"
    r"|address already in use",  # somebody else took rank 0's port: nobody's fault either, and gone with the next attempt
    re.IGNORECASE,
)
TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07")


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """One rank's end, or (rank None) the loss of a node."""

    rank: int | None
    node: int
    code: int  # shell style: 128 + signal when killed by one
    signal: str | None
    time: float  # seconds since the epoch
    stopped: bool = False  # it had been asked to stop before it ended
    lost_peer: bool = False  # its last lines say that another rank went away
    why: str = ""  # of a lost node: the end of a sentence about its agent

    @property
    def failed(self) -> bool:
        return self.code not in (0, REQUEUE) and not self.stopped


@dataclass(frozen=True, kw_only=True)
class Verdict:
    exit_code: int
    outcome: str  # done | requeue | failed | interrupted | terminated | out_of_time | hung_up
    duration_seconds: float
    cause: str = ""  # of a failure: exit | lost_peer | signal | lost_node | hang
    why: str = ""  # of a lost node or a hang, for a person
    rank: int | None = None  # the cause of a failure
    node: int | None = None
    rank_exit_code: int | None = None
    signal: str | None = None
    after_seconds: float | None = None
    last_lines: list[str] = dataclasses.field(default_factory=list)
    consequences: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # failed after the cause
    killed: list[int] = dataclasses.field(default_factory=list)  # ranks that did not stop when asked
    done_file: bool = False  # a training run has DONE: its work is complete, whatever happened at the exit

    @property
    def session_code(self) -> int:
        """What the launcher ends with when no attempt follows: a node or a rank that is lost beside DONE has lost no work."""
        return 0 if self.done_file and self.cause not in ("", "exit") else self.exit_code

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def judge(
    exits: Sequence[RankExit],
    *,
    started: float,
    ended: float,
    stop_reason: str | None,
    done_file: bool = False,
    hang: tuple[int | None, str] | None = None,
) -> Verdict:
    """The verdict on an attempt.

    `stop_reason`: why the launcher was asked to stop ("interrupted", "terminated", "hung_up", "out_of_time"), or None.
    `hang`: (rank at fault or None, why) when the attempt was ended because it hung.
    A failure before the stop outweighs it. The cause is the rank that ended first, but one whose last words are that a peer
    went away gives way to one that says something else: a rank that raises closes its connections a second before it is gone.
    """
    ordered = sorted(exits, key=lambda item: item.time)
    common: dict[str, Any] = {
        "duration_seconds": round(ended - started, 3),
        "killed": [item.rank for item in ordered if item.stopped and item.signal == "SIGKILL" and item.rank is not None],
        "done_file": done_file,
    }
    cause = find_cause(ordered)
    if hang is not None:
        return Verdict(exit_code=1, outcome="failed", cause="hang", why=hang[1], rank=hang[0], **common)
    if cause is not None and cause.failed:
        return Verdict(exit_code=cause.code, outcome="failed", **_blame(cause, ordered, started), **common)
    saved = any(item.code == REQUEUE for item in ordered)
    clean = all(item.code in (0, REQUEUE) for item in ordered)
    if stop_reason == "interrupted" and not (done_file and ordered and all(item.code == 0 for item in ordered)):
        return Verdict(exit_code=INTERRUPTED, outcome="interrupted", **common)
    if saved and (clean or stop_reason is None):
        return Verdict(exit_code=REQUEUE, outcome="requeue", **common)
    if clean:
        return Verdict(exit_code=0, outcome="done", **common)
    reason = stop_reason or "terminated"
    return Verdict(exit_code=CODES_OF_REASONS[reason], outcome=reason, **common)


def find_cause(ordered: Sequence[RankExit]) -> RankExit | None:
    """The first rank that did not end with 0, preferring those that do not blame a peer; None when there is none."""
    ends = [item for item in ordered if item.failed or (item.code == REQUEUE and not item.stopped)]
    own = [item for item in ends if not item.lost_peer]
    return next(iter(own or ends), None)


def _blame(cause: RankExit, ordered: Sequence[RankExit], started: float) -> dict[str, Any]:
    kind = "lost_node" if cause.rank is None else "signal" if cause.signal else "lost_peer" if cause.lost_peer else "exit"
    return {
        "cause": kind,
        "why": cause.why,
        "rank": cause.rank,
        "node": cause.node,
        "rank_exit_code": None if cause.signal else cause.code,
        "signal": cause.signal,
        "after_seconds": round(cause.time - started, 3),
        "consequences": [_consequence(item, started) for item in ordered if item.failed and item is not cause],
    }


def _consequence(item: RankExit, started: float) -> dict[str, Any]:
    after = round(item.time - started, 3)
    return {"rank": item.rank, "node": item.node, "exit_code": item.code, "signal": item.signal, "after_seconds": after}


def explain(verdict: Verdict, log: Path | None, attempt_dir: Path) -> str:
    """What the launcher prints at the end."""
    if verdict.outcome == "done":
        return f"done after {verdict.duration_seconds:.0f} s; logs in {attempt_dir}"
    if verdict.outcome != "failed":
        words = {
            "requeue": "stopped and saved; start the same command again to go on",
            "interrupted": "interrupted",
            "terminated": "terminated",
            "hung_up": "stopped: the terminal was closed",
            "out_of_time": "stopped: --max-time is over",
        }[verdict.outcome]
        killed = f"; killed because they did not stop in time: ranks {_numbers(verdict.killed)}" if verdict.killed else ""
        return f"{words} after {verdict.duration_seconds:.0f} s{killed}; logs in {attempt_dir}"
    lines = [_headline(verdict, log)]
    lines += [f"  | {line}" for line in verdict.last_lines]
    if verdict.consequences:
        ranks = [item["rank"] for item in verdict.consequences if item["rank"] is not None]
        lines.append(f"as a consequence ended: ranks {_numbers(ranks)}" if ranks else "as a consequence other agents ended")
    if verdict.done_file:
        lines.append("the run has its DONE file: its work was complete before this")
    return "\n".join(lines)


def _headline(verdict: Verdict, log: Path | None) -> str:
    if verdict.cause == "hang":
        return f"hung after {verdict.duration_seconds:.0f} s: {verdict.why}; stacks of all ranks in hang.json"
    if verdict.rank is None:
        how = verdict.why or how_it_ended(verdict.rank_exit_code, verdict.signal)
        return f"the agent of node {verdict.node} {how} after {verdict.after_seconds:.0f} s"
    how = how_it_ended(verdict.rank_exit_code, verdict.signal)
    return f"rank {verdict.rank} (node {verdict.node}) {how} after {verdict.after_seconds:.0f} s; {_where(verdict, log)}"


def how_it_ended(code: int | None, signal_name: str | None) -> str:
    if signal_name == "SIGKILL":
        return "was killed by SIGKILL (by hand, or by the kernel when memory ran out)"
    return f"was killed by {signal_name}" if signal_name else f"failed with exit code {code}"


def _where(verdict: Verdict, log: Path | None) -> str:
    if log is None:
        return "it left no log"
    return f"last lines of {log}:" if verdict.last_lines else f"{log} is empty"


def _numbers(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in sorted(ranks))


def last_lines(path: Path, count: int = LAST_LINES, reach: int = 64 * 1024) -> list[str]:
    """The last lines of a log as a person saw them: of a line that was redrawn only its last state, no colour codes."""
    try:
        with open(path, "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - reach))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    shown = [_last_state(line) for line in text.replace("\r\n", "\n").split("\n")]
    while shown and not shown[-1].strip():
        shown.pop()
    return shown[-count:]


def _last_state(line: str) -> str:
    states = [TERMINAL_CODES.sub("", part) for part in line.split("\r")]
    return next((state for state in reversed(states) if state.strip()), "").rstrip()


def blames_peer(lines: Sequence[str]) -> bool:
    """True when a log's last lines say that another rank or its connection went away."""
    return any(LOST_PEER.search(line) for line in lines)
