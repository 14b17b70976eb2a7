"""One attempt, over all its nodes: orders to the agents in, a Verdict out. Restarting is not its business."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.config import LaunchConfig
from cluster.hub import Hub, Message
from cluster.layout import NodeTask
from cluster.processes import write_json
from cluster.supervision.health import Watcher
from cluster.supervision.stragglers import Finding
from cluster.verdict import REQUEUE, SETTLE, RankExit, Verdict, judge, last_lines

GRACE_AFTER_FAILURE = 10.0  # ranks whose peer is gone have nothing to save together
AGENT_PATIENCE = 10.0  # seconds beyond the grace time in which an agent must have ended its ranks
STACKS_WITHIN = 8.0
WATCH_EVERY = 0.5
LOST_CODE = 137  # of a node: its ranks were killed

Say = Callable[[str], None]
Note = Callable[..., None]  # (event, **facts)


class Group:
    """The ranks of an attempt, seen through their agents, from `start` until `over`."""

    def __init__(self, config: LaunchConfig, tasks: Sequence[NodeTask], hub: Hub, note: Note, say: Say) -> None:
        self.tasks = {task.slot: task for task in tasks}
        self.exits: list[RankExit] = []
        self.stop_reason: str | None = None
        self.regrouping = False
        self.steps = 0  # most steps that a rank has finished in this attempt
        self.step: int | None = None  # furthest step seen
        self.stuck: dict[int, str] = {}  # slots whose agent did not get rid of its ranks, and the end of a sentence about it
        self._config, self._hub, self._note, self._say = config, hub, note, say
        self._first = tasks[0]
        self._started = time.time()
        self._running = set(self.tasks)  # slots whose agent has not said that all its ranks are gone
        self._watcher = Watcher(config.hang_after)
        self._beats: dict[int, Mapping[str, Any]] = {}
        self._next_watch = 0.0
        self._hang: Finding | None = None
        self._stacks: dict[str, str] = {}
        self._stacks_from: set[int] = set()
        self._stacks_until: float | None = None
        self._stop_at: float | None = None
        self._stop_sent: float | None = None
        self._grace = config.grace
        self._kill_sent: float | None = None

    @property
    def over(self) -> bool:
        return not self._running

    @property
    def attempt(self) -> int:
        return self._first.attempt

    def start(self) -> None:
        for slot, task in self.tasks.items():
            self._hub.send(slot, {"type": "start", "task": task.as_message()})

    # What the user and the platform want

    def stop(self, reason: str, grace: float) -> None:
        """Have the ranks save and end; kill what is left after `grace` seconds."""
        if self.stop_reason is None and not any(item.failed for item in self.exits):
            self.stop_reason = reason
        self._send_stop(grace)

    def save_and_end(self) -> None:
        """Ask the ranks for a checkpoint and exit code 75, without a time limit."""
        self._send({"type": "signal", "number": int(signal.SIGUSR2)})

    def regroup(self) -> None:
        self.regrouping = True
        self.save_and_end()

    def kill(self) -> None:
        self._stop_sent = self._stop_sent or time.monotonic()
        self._kill_sent = self._kill_sent or time.monotonic()
        self._send({"type": "kill"})

    # What happens

    def hear(self, slot: int, message: Message) -> None:
        """An agent's message. One of another attempt, or of a slot that is not in this group, is old news."""
        kind = message.get("type")
        if message.get("attempt") != self.attempt or slot not in self.tasks:
            return
        if kind == "exit":
            facts = {key: message[key] for key in ("rank", "code", "signal", "stopped", "lost_peer")}
            self._add(RankExit(**facts, node=self.tasks[slot].node, time=time.time()))  # our clock: those of nodes may differ
        elif kind == "end":
            self._running.discard(slot)
        elif kind == "refused":
            self.lost(slot, f"could not start its ranks: {message.get('why')}")
        elif kind == "beat":
            self._hear_beats(message["ranks"])
        elif kind == "stacks":
            self._stacks.update(message["stacks"])
            self._stacks_from.add(slot)

    def lost(self, slot: int, why: str) -> None:
        """The slot's agent is gone, and its ranks with it."""
        if slot in self._running:
            self._running.discard(slot)
            killed = "SIGKILL" if "SIGKILL" in why else None
            node = self.tasks[slot].node
            stopped = self._stop_sent is not None
            self._add(RankExit(rank=None, node=node, code=LOST_CODE, signal=killed, time=time.time(), stopped=stopped, why=why))

    def turn(self) -> None:
        """Do what falls due."""
        now = time.monotonic()
        if now >= self._next_watch and self._hang is None and self._stop_sent is None and self._stop_at is None:
            self._next_watch = now + WATCH_EVERY
            self._watch(now)
        if self._stacks_until is not None and (self._stacks_from >= self._running or now >= self._stacks_until):
            self._stacks_until = None
            self._record_hang()
            self.kill()
        if self._stop_at is not None and now >= self._stop_at and self._stop_sent is None:
            self._send_stop(self._grace)
        if self._stop_sent is not None and self._kill_sent is None and now >= self._stop_sent + self._grace + AGENT_PATIENCE:
            self.kill()
        if self._kill_sent is not None and now >= self._kill_sent + AGENT_PATIENCE:
            why = f"did not end its ranks within {AGENT_PATIENCE:.0f} s of being told to kill them"
            self.stuck = dict.fromkeys(self._running, why)
            for slot in self.stuck:
                self.lost(slot, why)

    def verdict(self) -> Verdict:
        done = self._config.job == "train" and os.path.exists(f"{self._first.run_dir}/DONE")  # others run beside an old one
        hang = (next(iter(self._hang.culprits), None), self._hang.why) if self._hang else None
        verdict = judge(
            self.exits, started=self._started, ended=time.time(), stop_reason=self.stop_reason, done_file=done, hang=hang
        )
        if verdict.rank is not None and not hang:
            verdict.last_lines.extend(last_lines(self._first.log(verdict.rank)))
        return verdict

    def _add(self, item: RankExit) -> None:
        self.exits.append(item)
        self._note("exit", **{key: value for key, value in dataclasses.asdict(item).items() if key != "time"})
        if item.failed:
            self._stop_within(SETTLE if item.lost_peer else 0.0, min(self._config.grace, GRACE_AFTER_FAILURE))
        elif item.code == REQUEUE:
            self._stop_within(self._config.grace, self._config.grace)

    def _stop_within(self, delay: float, grace: float) -> None:
        at = time.monotonic() + delay
        if self._stop_at is None or at < self._stop_at:
            self._stop_at, self._grace = at, grace

    def _send_stop(self, grace: float) -> None:
        self._stop_sent, self._grace = time.monotonic(), grace
        self._send({"type": "stop", "grace": grace})

    def _send(self, message: Message) -> None:
        for slot in self._running:
            self._hub.send(slot, {**message, "attempt": self.attempt})

    def _hear_beats(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            self._beats[int(record["rank"])] = record
            if record["pid"]:
                self.steps = max(self.steps, int(record["steps"]))
                self.step = max(-1 if self.step is None else self.step, int(record["step"]))

    def _watch(self, now: float) -> None:
        rtt = {task.node: self._hub.rtt[slot] for slot, task in self.tasks.items() if slot in self._hub.rtt}
        for finding in self._watcher.see(now, self._beats, rtt):
            self._note(finding.kind, ranks=list(finding.culprits), node=finding.node, cause=finding.cause, why=finding.why)
            self._say(f"{finding.kind}: {finding.why}")
            if finding.kind == "hang":
                self._hang = finding
                self._stacks_until = now + STACKS_WITHIN
                self._send({"type": "stacks"})

    def _record_hang(self) -> None:
        """hang.json, before anything is killed."""
        assert self._hang is not None
        record = {**dataclasses.asdict(self._hang), "time": time.time(), "attempt": self.attempt, "stacks": self._stacks}
        try:
            write_json(self._first.attempt_dir / "hang.json", record)
        except OSError as error:
            self._say(f"hang.json cannot be written: {error}")
