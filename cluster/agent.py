"""One node's agent: the supervisor's orders in; the node's ranks run, are watched and ended; reports out.

The same program on every backend, one a node, for all attempts of a session. It asks ranks to stop with SIGTERM and kills what
is left after the grace time: when one of its ranks fails, when it is told to, and when the supervisor is gone. A signal of the
platform (SIGTERM, SIGUSR2: this node is about to be taken away) is reported: what follows is the supervisor's decision.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder cluster/ must not be where modules are looked for
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cluster.binding import bind_rank, cores_of_rank
from cluster.console import ConsoleOutputs
from cluster.heartbeats import RankBeats
from cluster.hub import Link, Message, parse_address
from cluster.layout import TOKEN, NodeFacts, NodeTask, full_environment
from cluster.processes import (
    Port,
    SignalPipe,
    die_with_parent,
    ended,
    exit_of,
    kill_processes_with,
    signal_group,
    signal_process,
)
from cluster.verdict import REQUEUE, SETTLE, blames_peer, last_lines

GRACE_AFTER_FAILURE = 10.0  # ranks whose peer is gone have nothing to save together
TICK = 0.25
BEAT_EVERY = 0.5
CONNECT_WITHIN = 30.0
HUB_SILENCE = 45.0  # an owner counts as dead after 60 s without a sign of life: its ranks must be gone by then
STACKS_WITHIN = 4.0  # for all ranks of the node
SHARED_WITHIN = 5.0  # a network file system shows a new file a little later elsewhere


class Rank:
    """A rank's process, in a process group of its own."""

    def __init__(self, task: NodeTask, local_rank: int, beats: RankBeats) -> None:
        self.number = task.node * task.ranks + local_rank
        self.local_rank = local_rank
        self.log = task.log(self.number)
        self._pumps: list[threading.Thread] = []
        self._outputs = ConsoleOutputs() if self.number == 0 and task.console else None
        try:
            self.process = self._start(task, beats)
        except BaseException:
            self._close_outputs()
            raise

    def _start(self, task: NodeTask, beats: RankBeats) -> subprocess.Popen[bytes]:
        with open(self.log, "ab", buffering=0) as log:
            stdout, stderr = self._outputs.descriptors if self._outputs else (log.fileno(), log.fileno())
            return subprocess.Popen(
                task.rank_command(),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**full_environment(task, self.local_rank, os.environ), **beats.environment(self.local_rank)},
                cwd=task.folder if task.folder and Path(task.folder).is_dir() else None,
                start_new_session=True,
                preexec_fn=_before_start(cores_of_rank(task.bind, task.cores, self.local_rank, task.ranks)),
            )

    def start_pumps(self) -> None:
        """Begin to copy the output to console and log. After the last fork: threads and forks do not mix."""
        if self._outputs is not None:
            self._pumps = self._outputs.start(self.log)

    def send(self, number: int) -> None:
        """SIGKILL goes to the whole group; all else to the rank alone, which may need its helpers to save."""
        (signal_group if number == signal.SIGKILL else signal_process)(self.process.pid, number)

    def match_terminal(self) -> None:
        """Give the rank's terminal the size of ours."""
        if self._outputs is not None:
            self._outputs.match_size()

    def collect(self) -> int:
        """End what the ended rank left in its group, drain its output, reap it; return subprocess's code."""
        self.send(signal.SIGKILL)
        code = self.process.wait()
        for pump in self._pumps:
            pump.join(timeout=2.0)
        self._close_outputs()
        return code

    def _close_outputs(self) -> None:
        if self._outputs is not None:
            self._outputs.close()


def _before_start(cores: Sequence[int]) -> Callable[[], None]:
    """What a rank's process does between fork and start."""
    die = die_with_parent()

    def prepare() -> None:
        die()
        bind_rank(cores)

    return prepare


class Attempt:
    """The ranks of this node in one attempt, from their start to the end of the last."""

    def __init__(self, task: NodeTask, send: Callable[[Message], None]) -> None:
        self.task = task
        self.alive: list[Rank] = []
        self.stopping = False
        self._send_message = send
        self._code = 0
        self._stop_at: float | None = None
        self._grace = task.grace
        self._kill_at: float | None = None
        self._beats = RankBeats(None, task.ranks)
        self._events = open(task.events, "ab", buffering=0)  # noqa: SIM115 - open until the attempt is over
        self._spawn()

    def _spawn(self) -> None:
        for local_rank in range(self.task.ranks):
            try:
                rank = Rank(self.task, local_rank, self._beats)
            except (OSError, subprocess.SubprocessError) as error:
                self._cannot_start(self.task.node * self.task.ranks + local_rank, error)
                break
            self.alive.append(rank)
        for rank in self.alive:
            rank.start_pumps()
        self._report("started", pids={str(rank.number): rank.process.pid for rank in self.alive})

    def _cannot_start(self, number: int, error: Exception) -> None:
        try:
            self.task.log(number).write_text(f"cannot start: {error}\n")
        except OSError as also:
            print(f"rank {number} cannot start: {error}; nor can its log be written: {also}", file=sys.stderr)
        self._note_exit(number, 127, None, lost_peer=False)

    def stop_within(self, delay: float, grace: float) -> None:
        """Ask the ranks to stop after `delay` seconds, unless that is to happen earlier; kill what is left after `grace` more."""
        at = time.monotonic() + delay
        if self._stop_at is None or at < self._stop_at:
            self._stop_at, self._grace = at, grace
        elif self.stopping and self._kill_at is not None:
            self._kill_at = min(self._kill_at, at + grace)

    def kill(self) -> None:
        self.stopping = True
        self._stop_at = self._kill_at = time.monotonic()

    def signal(self, number: int) -> None:
        for rank in self.alive:
            rank.send(number)

    def until_next(self) -> float:
        """Seconds until something falls due."""
        times = [at for at in (None if self.stopping else self._stop_at, self._kill_at) if at is not None]
        return min([TICK, *(at - time.monotonic() for at in times)])

    def turn(self) -> bool:
        """Do what falls due; True while a rank is alive."""
        self._reap()
        now = time.monotonic()
        if self._stop_at is not None and now >= self._stop_at and not self.stopping:
            self.stopping = True
            self._kill_at = now + self._grace
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)  # a suspended rank would not see it
        if self._kill_at is not None and now >= self._kill_at:
            self.signal(signal.SIGKILL)
        for rank in self.alive:
            rank.match_terminal()
        return bool(self.alive)

    def _reap(self) -> None:
        for rank in [rank for rank in self.alive if ended(rank.process.pid)]:
            self.alive.remove(rank)
            code, signal_name = exit_of(rank.collect())
            self._note_exit(rank.number, code, signal_name, lost_peer=code != 0 and blames_peer(last_lines(rank.log)))

    def _note_exit(self, number: int, code: int, signal_name: str | None, *, lost_peer: bool) -> None:
        self._report("exit", rank=number, code=code, signal=signal_name, stopped=self.stopping, lost_peer=lost_peer)
        self._code = self._code or code
        if code == REQUEUE:
            self.stop_within(self.task.grace, GRACE_AFTER_FAILURE)
        elif code != 0:
            self.stop_within(SETTLE if lost_peer else 0.0, min(self.task.grace, GRACE_AFTER_FAILURE))

    def beat(self) -> None:
        first = self.task.node * self.task.ranks
        ranks = [{**record, "rank": first + place} for place, record in enumerate(self._beats.read())]
        self._send_message({"type": "beat", "attempt": self.task.attempt, "ranks": ranks})

    def stacks(self) -> None:
        """Report the Python stacks of the living ranks."""
        deadline = time.monotonic() + STACKS_WITHIN
        texts = {}
        for rank in self.alive:
            left = deadline - time.monotonic()
            texts[str(rank.number)] = self._beats.stacks(rank.local_rank, min(2.0, max(0.2, left)))
        self._send_message({"type": "stacks", "attempt": self.task.attempt, "stacks": texts})

    def close(self) -> None:
        """End what ranks left behind outside their groups; say that nothing is left."""
        kill_processes_with({"SLOTSTREAM_RUN_DIR": self.task.run_dir, "SLOTSTREAM_ATTEMPT": str(self.task.attempt),
                             "NODE_RANK": str(self.task.node)})  # fmt: skip
        self._beats.close()
        self._report("end", code=self._code)
        with contextlib.suppress(OSError):  # a network file system may say only here that its disk is full
            self._events.close()

    def _report(self, event: str, **facts: Any) -> None:
        record = {"event": event, "node": self.task.node, "time": time.time(), **facts}
        line = json.dumps(record).encode() + b"\n"
        with contextlib.suppress(OSError):  # a full disk must not end the node: the supervisor hears it all the same
            written = self._events.write(line)
            if written < len(line):  # no half line, to which the next would stick
                self._events.truncate(self._events.tell() - written)
        self._send_message({"type": event, "attempt": self.task.attempt, **record})


class Agent:
    """Obeys the supervisor until it says "bye" or is gone."""

    def __init__(self, link: Link, slot: int, run_dir: str) -> None:
        self._link = link
        self._slot, self._run_dir = slot, run_dir
        self._attempt: Attempt | None = None
        self._port: Port | None = None
        self._leaving = False  # no new attempts; the process ends with the last rank
        self._next_beat = 0.0
        self._orders: dict[str, Callable[[Message], None]] = {
            "claim": self._claim,
            "start": self._start,
            "stop": lambda message: self._with_attempt(message, lambda it: it.stop_within(0.0, float(message["grace"]))),
            "signal": lambda message: self._with_attempt(message, lambda it: it.signal(int(message["number"]))),
            "kill": lambda message: self._with_attempt(message, Attempt.kill),
            "stacks": lambda message: self._with_attempt(message, Attempt.stacks),
            "bye": self._bye,
        }

    def run(self) -> int:
        signals = SignalPipe((signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2))
        self._link.hello(NodeFacts.of_this_node(self._slot, self._link.address).as_message())
        while not (self._leaving and self._attempt is None):
            wait = self._attempt.until_next() if self._attempt else TICK
            numbers, _ = signals.wait(wait, None if self._link.closed else self._link.fileno())
            for number in numbers:
                self._on_signal(number)
            for message in self._link.poll():
                self._orders.get(str(message.get("type")), lambda _: None)(message)
            self._check_hub()
            if self._attempt is not None:
                self._turn(self._attempt)
        if self._port is not None:
            self._port.close()
        self._link.flush()
        self._link.close()
        return 0

    def _turn(self, attempt: Attempt) -> None:
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT_EVERY
            attempt.beat()
        if not attempt.turn():
            self._attempt = None
            attempt.close()

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGCHLD:
            return
        self._link.send({"type": "signalled", "number": number})
        if self._link.closed and self._attempt is not None:
            self._attempt.stop_within(0.0, self._attempt.task.grace)

    def _check_hub(self) -> None:
        """Without a supervisor nobody can say what is to become of the ranks: they end."""
        if self._leaving or not (self._link.closed or time.monotonic() - self._link.heard > HUB_SILENCE):
            return
        self._link.close()
        self._leaving = True
        if self._attempt is not None:
            self._attempt.stop_within(0.0, min(self._attempt.task.grace, GRACE_AFTER_FAILURE))

    def _with_attempt(self, message: Message, act: Callable[[Attempt], None]) -> None:
        if self._attempt is not None and message.get("attempt") == self._attempt.task.attempt:
            act(self._attempt)

    def _claim(self, message: Message) -> None:
        """Answer with a port for rank 0, and whether this node sees the run folder of the supervisor.

        "why" says what is wrong where this node cannot run ranks; the port is then None.
        """
        if self._port is not None:
            self._port.close()
        self._port, why = None, self._why_not()
        if message.get("port") and not why:
            try:
                self._port = Port(self._link.address)
            except OSError as error:
                why = f"{socket.gethostname()}: {error}"
        port = self._port.number if self._port else 0
        shared = self._sees(str(message["file"]), str(message["session"]))
        answer = {"attempt": message["attempt"], "port": None if why else port, "shared": shared, "why": why}
        self._link.send({"type": "claimed", **answer})

    def _why_not(self) -> str:
        """Why this agent takes no ranks now; "" when it does."""
        if self._attempt is not None:
            return f"{socket.gethostname()}: ranks of attempt {self._attempt.task.attempt} have not ended yet"
        return f"{socket.gethostname()}: the agent was sent away" if self._leaving else ""

    def _sees(self, file: str, session: str) -> bool:
        deadline = time.monotonic() + SHARED_WITHIN
        while time.monotonic() < deadline:
            try:
                if json.loads(Path(file).read_text()).get("session") == session:
                    return True
            except (OSError, ValueError):
                pass
            time.sleep(0.1)
        return False

    def _start(self, message: Message) -> None:
        task = NodeTask.from_message(message["task"])
        why = self._why_not()
        if not why:
            try:
                self._begin(task)
            except OSError as error:
                why = f"{socket.gethostname()}: {error}"
        if why:  # else the other nodes wait for this one's ranks
            self._link.send({"type": "refused", "attempt": task.attempt, "why": why})

    def _begin(self, task: NodeTask) -> None:
        kill_processes_with({"SLOTSTREAM_SESSION": task.session, "SLOTSTREAM_SLOT": str(task.slot)})  # of a killed predecessor
        self._attempt = Attempt(task, self._link.send)

    def _bye(self, message: Message) -> None:
        self._leaving = True
        if self._attempt is not None:
            self._attempt.stop_within(0.0, min(self._attempt.task.grace, GRACE_AFTER_FAILURE))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cluster/agent.py", description="One node's agent; started by cluster/launch.py.")
    parser.add_argument("--hub", required=True, metavar="HOST:PORT", help="where the supervisor listens")
    parser.add_argument("--slot", type=int, required=True, help="this agent's place in the session")
    parser.add_argument("--run-dir", required=True, help="the run folder")
    flags = parser.parse_args(sys.argv[1:] if argv is None else argv)
    token = os.environ.pop(TOKEN, "")
    try:
        host, port = parse_address(flags.hub)
        link = Link(host, port, token, CONNECT_WITHIN)
    except (OSError, ValueError) as error:
        print(f"agent of slot {flags.slot} on {socket.gethostname()}: no supervisor at {flags.hub}: {error}", file=sys.stderr)
        return 1
    return Agent(link, flags.slot, flags.run_dir).run()


if __name__ == "__main__":
    sys.exit(main())
