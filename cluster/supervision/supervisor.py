"""One session of a job: agents placed, attempts made, watched, judged and repeated, until the work is done or cannot go on."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.config import LaunchConfig, LaunchError, override_value
from cluster.console import Console, LogTail
from cluster.hub import Hub, Message
from cluster.layout import NodeFacts, NodeTask, headline, node_tasks
from cluster.network import hub_address, reachable
from cluster.owner import Owner
from cluster.placement import Placement, Session
from cluster.processes import SignalPipe, write_json
from cluster.run_folder import EventLog, make_attempt, newest_checkpoint, withdraw_targets, write_launch_record
from cluster.supervision.claim import Claim
from cluster.supervision.group import Group
from cluster.supervision.policy import Decision, Ending, History
from cluster.supervision.stopping import Stopping
from cluster.supervision.team import Team
from cluster.verdict import Verdict, explain

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
TARGETS = {  # by job: the setting that names a watched folder, and the list in the run folder
    "train": ("observe.targets_dir", "targets.json"),
    "evaluate": ("", "targets_evaluate.json"),
    "build-shards": ("targets_dir", "targets.json"),
}
TICK = 0.1
TAKE_LEAVE_WITHIN = 15.0  # agents end their ranks in ten seconds when they are sent away
SETTLED_AFTER = 5.0  # a node that came back must stay so long before the others are interrupted for it
RETRY_AFTER = 10.0


def supervise(
    config: LaunchConfig, backend_name: str, make_placement: Callable[[Session], Placement], words: Sequence[str]
) -> int:
    """Run one session to its end in this process; return the exit code (0 done, 75 saved: start again, else failure).

    Takes ownership of the run folder, opens the hub at config.listen (else the address of config.interface, else loopback for
    the local backend and this host's own address for others), makes the placement, then supervises. `words` is the command
    line, for the record. Signals to this process: SIGINT stop (again: kill), SIGTERM save and stop, SIGUSR2 save and exit 75.

    Raises: LaunchError when the folder is in use, not shared between the nodes, or the nodes cannot hold what was asked for.
    """
    signals = SignalPipe(SIGNALS)  # first: a Ctrl-C from here on must not leave agents alone
    run_dir = Path(config.run_dir)
    owner = Owner(run_dir, config.job)
    try:
        address = hub_address(config, backend_name)
        try:
            hub = Hub(address, token := secrets.token_hex(16))
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise LaunchError(f"cannot listen at {address}: {why}; --listen takes an address of this host") from None
        session = Session(
            config=config, hub=reachable(address, hub.port), token=token, name=owner.session, lock=owner.fileno()
        )  # fmt: skip
        with contextlib.closing(hub):
            placement = make_placement(session)
            try:
                return Supervisor(config, backend_name, placement, hub, owner, signals, words).run()
            finally:
                try:
                    take_leave(hub)
                finally:
                    placement.close()
    finally:
        owner.close()


def take_leave(hub: Hub) -> None:
    """Send all agents away and wait until they have closed their connections."""
    for slot in hub.connected:
        hub.send(slot, {"type": "bye"})
    deadline = time.monotonic() + TAKE_LEAVE_WITHIN
    while hub.connected and time.monotonic() < deadline:
        for slot, message in hub.poll(TICK):
            if message.get("type") == "hello":  # it comes when all are going
                hub.send(slot, {"type": "bye"})


class Supervisor:
    """A session from the first agent's placement to the last attempt's end."""

    def __init__(
        self, config: LaunchConfig, backend: str, placement: Placement, hub: Hub, owner: Owner, signals: SignalPipe,
        words: Sequence[str],
    ) -> None:  # fmt: skip
        self._config, self._backend, self._words = config, backend, list(words)
        self._placement, self._hub, self._owner, self._signals = placement, hub, owner, signals
        self._run_dir = Path(config.run_dir)
        self._team = Team(config.nodes, placement, hub)
        self._group: Group | None = None
        self._tail: LogTail | None = None
        self._claims = 0
        self._claim: Claim | None = None  # the latest
        self._log = EventLog(self._run_dir, owner.session)
        self._history = History(config.max_restarts, newest_checkpoint(self._run_dir))
        self._saved_at_start = self._history.saved_step
        self._applied = False
        self._attempts = 0
        self._stopping = Stopping(config, self._note, say)

    def run(self) -> int:
        """The session's exit code. Raises LaunchError for what another start cannot mend."""
        self._note("session", backend=self._backend, nodes=self._config.nodes, host=os.uname().nodename, pid=os.getpid())
        try:
            code = self._run()
        except (LaunchError, OSError) as error:
            self._note("end", code=error.code if isinstance(error, LaunchError) else 1, why=str(error))
            raise
        self._note("end", code=code, reason=self._stopping.reason)
        return code

    def _run(self) -> int:
        self._team.place_all()
        while True:
            group = self._gather_and_start()
            if group is None:
                return self._stopping.code_without_group(self._attempts)
            verdict = self._watch(group)
            decision = self._decide(group, verdict)
            if decision is None:
                return self._stopping.final_code(verdict)
            if decision.action == "end":
                if decision.why:
                    say(f"not started again: {decision.why}")
                return verdict.session_code
            self._note("restart", delay=decision.delay_s, why=decision.why)
            say(f"starting again{f' in {decision.delay_s:.0f} s' if decision.delay_s else ''}: {decision.why}")
            self._wait(decision.delay_s)

    # Before an attempt

    def _gather_and_start(self) -> Group | None:
        """The next attempt's group, started; None when the session is to stop before that."""
        while not self._stopping.wanted:
            team = self._gather()
            if not team:
                return None
            port = self._claim_port(team)
            if port is None or self._stopping.wanted:
                continue
            try:
                return self._start(team, port)
            except OSError as error:
                if not self._attempts:
                    raise
                self._note("cannot_start", why=str(error))  # a full disk, for one: it worked before, so it may again
                say(f"cannot begin an attempt: {error}; trying again in {RETRY_AFTER:.0f} s")
                self._wait(RETRY_AFTER)
        return None

    def _gather(self) -> list[NodeFacts]:
        """The nodes to run on, in slot order: all, or after a while those that are there; [] when the session is to stop.

        Raises: LaunchError when too few report in time, or too many never get ready.
        """
        began = time.monotonic()
        patience = self._config.start_timeout if not self._attempts else self._config.node_patience
        while not self._stopping.wanted:
            waited = time.monotonic() - began
            possible = self._config.nodes - len(self._team.hopeless())
            fit = len(self._team.fit)
            if self._team.complete or (fit >= self._config.least_nodes and (waited >= patience or fit == possible)):
                break
            if waited >= max(patience, self._config.start_timeout) or possible < self._config.least_nodes:
                raise self._too_few(waited)
            self._turn()
        return [] if self._stopping.wanted else [facts for _, facts in sorted(self._team.fit.items())]

    def _too_few(self, waited: float) -> LaunchError:
        missing = "; ".join(f"the agent of node {slot} {why}" for slot, why in self._team.missing().items())
        count = f"{len(self._team.fit)} of {self._config.nodes} nodes are there after {waited:.0f} s"
        needed = f"{self._config.least_nodes} are needed"
        error = LaunchError(f"{count}, {needed}: {missing}; see what they said above, --start-timeout and --min-nodes")
        if self._attempts:
            error.code = 1  # it worked before: nothing that was asked for is wrong
        return error

    def _claim_port(self, team: Sequence[NodeFacts]) -> int | None:
        """A port that the first node's agent keeps for rank 0; None when a node did not get ready.

        Raises: LaunchError when a node does not see the run folder and none ever did.
        """
        self._claims += 1
        self._claim = claim = Claim(self._claims, team, self._hub, self._owner)
        while claim.open(self._team.up):
            if self._stopping.wanted:
                return None
            self._turn()
        blind = claim.blind()
        if blind is not None and not self._attempts:
            raise LaunchError(
                f"run folder {self._run_dir} is not shared: {blind.host} (node {blind.slot}) does not see what was written "
                "there; all nodes must see one folder; choose --runs on a shared disk"
            )
        not_ready = claim.not_ready(self._team.absent)
        for slot, why in not_ready.items():
            self._note("not_ready", slot=slot, why=why)
            say(f"the agent of node {slot} {why}")
            self._team.claim_failed(slot, why)
        return None if not_ready else claim.port

    def _start(self, team: Sequence[NodeFacts], port: int) -> Group | None:
        number = make_attempt(self._run_dir)
        try:
            known = list(self._team.known.values())
            tasks = node_tasks(
                self._config, team, known=known, attempt=number, master_port=port, session=self._owner.session,
                local=self._backend == "local",
            )  # fmt: skip
            if not self._owner.set_attempt(number):
                self._stopping.lose_folder(self._owner.taken_by())
                return None
            self._record(tasks, team, port)
        except (OSError, LaunchError):
            (self._run_dir / "attempts" / str(number)).rmdir()
            raise
        self._attempts += 1
        say(f"{self._run_dir} (attempt {number}): {headline(tasks, self._backend)}")
        self._note("attempt", attempt=number, nodes=len(tasks), ranks=tasks[0].world_size, slots=[task.slot for task in tasks])
        group = Group(self._config, tasks, self._hub, lambda event, **facts: self._note(event, attempt=number, **facts), say)
        self._tail = None if self._backend == "local" else LogTail(tasks[0].log(0), sys.stdout.fileno())
        for task in tasks:
            self._team.started(task.slot)
        group.start()
        return group

    def _record(self, tasks: Sequence[NodeTask], team: Sequence[NodeFacts], port: int) -> None:
        first = tasks[0]
        facts = {"job": self._config.job, "backend": self._backend, "session": self._owner.session, "nodes": first.nodes,
                 "ranks_per_node": first.ranks, "gpus_per_node": len(first.gpus), "master_addr": first.master_addr,
                 "master_port": port, "agents": [item.as_message() for item in team]}  # fmt: skip
        write_launch_record(first.attempt_dir, [sys.executable, "cluster/launch.py", *self._words], os.environ, facts)

    # During and after it

    def _watch(self, group: Group) -> Verdict:
        """See the group to its end; write, say and return the verdict."""
        self._group = group
        self._stopping.begin(group)
        while not group.over:
            self._turn()
            group.turn()
            self._grow(group)
        self._group = None
        self._stopping.end()
        for slot, why in group.stuck.items():  # what holds on to dead ranks would not take new ones
            self._team.lose(slot, why)
        if self._tail is not None:
            self._tail.copy()
        verdict = group.verdict()
        folder = self._run_dir / "attempts" / str(group.attempt)
        try:
            write_json(folder / "verdict.json", verdict.as_dict())
            key, name = TARGETS[self._config.job]
            withdraw_targets(self._run_dir, override_value(self._config.overrides, key), name)
        except OSError as error:
            say(f"the verdict cannot be written: {error}")
        self._note("verdict", attempt=group.attempt, outcome=verdict.outcome, code=verdict.exit_code, cause=verdict.cause,
                   rank=verdict.rank, node=verdict.node, why=verdict.why)  # fmt: skip
        say(explain(verdict, None if verdict.rank is None else folder / f"rank_{verdict.rank}.log", folder))
        return verdict

    def _decide(self, group: Group, verdict: Verdict) -> Decision | None:
        """What follows an attempt; None when somebody wanted the session to end."""
        saved = newest_checkpoint(self._run_dir)
        self._applied = self._applied or group.steps > 0 or saved > self._saved_at_start
        outcomes = {"done": "done", "failed": "failed", "requeue": "saved"}
        ending = Ending(
            outcome=outcomes.get(verdict.outcome, "stopped"),
            cause=verdict.cause,
            code=verdict.exit_code,
            error=verdict.last_lines[-1] if verdict.last_lines else "",
            step=group.step,
            applied=self._applied,
            saved_step=saved,
            regroup=group.regrouping,
            complete=verdict.done_file,
        )
        return None if self._stopping.wanted else self._history.decide(ending)

    def _grow(self, group: Group) -> None:
        """Have the ranks save when a missing node is back, so that the next attempt has it."""
        now = time.monotonic()
        back = [slot for slot, since in self._team.since.items() if slot in self._team.fit and now - since > SETTLED_AFTER]
        missing = [slot for slot in back if slot not in group.tasks]
        if missing and not group.regrouping and not self._stopping.wanted:
            self._note("regroup", attempt=group.attempt, slots=missing)
            say(f"node {', '.join(map(str, missing))} is back: saving, to go on with {len(self._team.fit)} nodes")
            group.regroup()

    # What comes in

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._stopping.wanted:
            self._turn()

    def _turn(self) -> None:
        """Take in what has come: messages, signals, losses, the passing of time. Waits a tick when there is nothing."""
        for slot, message in self._hub.poll(TICK, (self._signals.fileno(),)):
            self._hear(slot, message)
        for number in self._signals.read():
            self._stopping.on_signal(number)
        for slot, why in self._team.turn():
            self._note("lost", slot=slot, why=why)
            if self._group is not None:
                self._group.lost(slot, why)
        if not self._stopping.fenced and not self._owner.beat():
            self._stopping.lose_folder(self._owner.taken_by())
        self._stopping.check_time(self._placement.ends_at)
        if self._tail is not None:
            self._tail.copy()

    def _hear(self, slot: int, message: Message) -> None:
        kind = message.get("type")
        if kind == "hello":
            self._team.hello(slot, message)
        elif kind == "gone":
            self._team.gone(slot)
        elif kind == "signalled":
            self._stopping.preempt(int(message.get("number", signal.SIGTERM)), f"node {slot}")
        elif kind == "claimed" and self._claim is not None:
            self._claim.hear(slot, message)
        elif self._group is not None:
            self._group.hear(slot, message)

    def _note(self, event: str, attempt: int | None = None, **facts: Any) -> None:
        number = attempt if attempt is not None else self._group.attempt if self._group else None
        self._log.write(event, number, job=self._config.job, **facts)


def say(text: str) -> None:
    """A line for the user. A terminal that is paused, or went away, is no reason to end a run."""
    with contextlib.suppress(OSError):
        console, line = _stderr(), f"{text}\n".encode(errors="backslashreplace")
        console.leave_out(len(line) - console.write(line))


@functools.cache
def _stderr() -> Console:
    return Console(sys.stderr.fileno())
