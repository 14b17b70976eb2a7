"""One node's agent: a NodeTask (its command line) in; the node's ranks run, are watched and ended; one event line per rank out.

The same program on every backend. It asks ranks to stop with SIGTERM and kills what is left after the grace time:
when a rank fails, when it is told to (SIGTERM, SIGINT; a second SIGINT kills at once), and when its launcher has died.
SIGUSR2 goes to the ranks as it is: save, exit 75.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder cluster/ must not be where modules are looked for
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cluster.layout import NodeTask, full_environment
from cluster.processes import SignalPipe, die_with_parent, ended, exit_of, kill_processes_with, signal_group, signal_process
from cluster.verdict import REQUEUE, SETTLE, blames_peer, last_lines

GRACE_AFTER_FAILURE = 10.0  # ranks whose peer is gone have nothing to save together
TICK = 0.5


class Rank:
    """A rank's process, in a process group of its own."""

    def __init__(self, task: NodeTask, local_rank: int) -> None:
        self.number = task.node * task.ranks + local_rank
        self.log = task.log(self.number)
        self._pumps: list[threading.Thread] = []
        with open(self.log, "ab", buffering=0) as log:
            outputs = ConsoleOutputs() if self.number == 0 and task.local else None
            stdout, stderr = outputs.descriptors if outputs else (log.fileno(), log.fileno())
            self.process = subprocess.Popen(
                task.rank_command(),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=full_environment(task, local_rank, os.environ),
                start_new_session=True,
                preexec_fn=die_with_parent(),  # safe: no thread has been started yet
            )
        self._outputs = outputs

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
        return code


class ConsoleOutputs:
    """Rank 0's stdout and stderr: copied to ours as they come, and to the log.

    Where ours is a terminal the rank gets one too (a pseudo-terminal), so that its progress bar stays a bar. Where both of
    ours lead to the same place, so do the rank's: the order of its lines stays right.
    """

    def __init__(self) -> None:
        self._copies: list[tuple[int, int]] = []  # (read end, our descriptor)
        self._terminals: list[tuple[int, int]] = []  # (the rank's, ours)
        self._write_ends: list[int] = []
        out = self._open(sys.stdout.fileno())
        err = out if _same_file(1, 2) else self._open(sys.stderr.fileno())
        self.descriptors = (out, err)
        self.match_size()

    def match_size(self) -> None:
        for theirs, ours in self._terminals:
            with contextlib.suppress(OSError):
                fcntl.ioctl(theirs, termios.TIOCSWINSZ, fcntl.ioctl(ours, termios.TIOCGWINSZ, b"\0" * 8))

    def _open(self, ours: int) -> int:
        if os.isatty(ours):
            read, write = pty.openpty()
            _quiet_terminal(write)
            self._terminals.append((os.dup(read), ours))
        else:
            read, write = os.pipe()
        self._copies.append((read, ours))
        self._write_ends.append(write)
        return write

    def start(self, log: Path) -> list[threading.Thread]:
        for descriptor in self._write_ends:
            os.close(descriptor)
        threads = [threading.Thread(target=pump, args=(read, log, ours), daemon=True) for read, ours in self._copies]
        for thread in threads:
            thread.start()
        return threads


def _same_file(first: int, second: int) -> bool:
    a, b = os.fstat(first), os.fstat(second)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def _quiet_terminal(descriptor: int) -> None:
    """No echo and no newline translation: the real terminal does that, and the log should have plain lines."""
    modes = termios.tcgetattr(descriptor)
    modes[1] &= ~termios.OPOST
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSANOW, modes)


def pump(source: int, log: Path, console: int) -> None:
    """Copy `source` to the console as it comes and to the log by whole lines, until its last writer is gone.

    Whole lines, because stdout and stderr may come through two pumps. A console that went away is left out.
    """
    heard = True
    held = b""
    with open(log, "ab", buffering=0) as stream:
        while True:
            try:
                data = os.read(source, 65536)
            except OSError:  # how a pseudo-terminal says that nobody writes to it any more
                break
            if not data:
                break
            heard = heard and _write_all(console, data)
            held += data
            cut = max(held.rfind(b"\n"), held.rfind(b"\r")) + 1
            _write_all(stream.fileno(), held[:cut])  # a full disk must not block the rank: False is no error here
            held = held[cut:]
        _write_all(stream.fileno(), held)
    os.close(source)


def _write_all(descriptor: int, data: bytes) -> bool:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # somebody made the terminal non-blocking
            select.select([], [descriptor], [], 1.0)
        except OSError:
            return False
    return True


class Agent:
    def __init__(self, task: NodeTask) -> None:
        self.task = task
        self.alive: list[Rank] = []
        self.exit_code = 0
        self.stopping = False
        self._stop_at: float | None = None
        self._grace = task.grace
        self._kill_at: float | None = None
        self._events = open(task.events, "a", buffering=1)  # noqa: SIM115 - open as long as the agent lives

    def run(self) -> int:
        """Start the ranks, see them to their end; return 0 or the code of the first that did not end well."""
        signals = SignalPipe((signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2))
        launcher: int | None = sys.stdin.fileno() if self.task.local else None
        self._spawn()
        while self.alive:
            numbers, launcher_gone = signals.wait(self._until_next(), launcher)
            for number in numbers:
                self._on_signal(number)
            if launcher_gone:
                launcher = None
                self._report("launcher_gone")
                self.stop_within(0.0, min(self.task.grace, GRACE_AFTER_FAILURE))
            self._reap()
            self._act()
            for rank in self.alive:
                rank.match_terminal()
        kill_processes_with({"SLOTSTREAM_RUN_DIR": self.task.run_dir, "SLOTSTREAM_ATTEMPT": str(self.task.attempt),
                             "NODE_RANK": str(self.task.node)})  # fmt: skip
        self._report("end", code=self.exit_code)
        return self.exit_code

    def _spawn(self) -> None:
        for local_rank in range(self.task.ranks):
            try:
                rank = Rank(self.task, local_rank)
            except OSError as error:
                number = self.task.node * self.task.ranks + local_rank
                self.task.log(number).write_text(f"cannot start: {error}\n")
                self._note_exit(number, 127, None, lost_peer=False)
                break
            self.alive.append(rank)
        for rank in self.alive:
            rank.start_pumps()
        self._report("started", pids={rank.number: rank.process.pid for rank in self.alive})

    def stop_within(self, delay: float, grace: float) -> None:
        """Ask the ranks to stop after `delay` seconds, unless that is to happen earlier; kill what is left after `grace` more."""
        at = time.monotonic() + delay
        if self._stop_at is None or at < self._stop_at:
            self._stop_at, self._grace = at, grace

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGUSR2:
            self._send(signal.SIGUSR2)
        elif number == signal.SIGINT and self.stopping:
            self._kill_at = time.monotonic()
        elif number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.stop_within(0.0, self.task.grace)
            self._act()  # a second SIGINT that came together with the first must find us stopping

    def _until_next(self) -> float:
        times = [at for at in (None if self.stopping else self._stop_at, self._kill_at) if at is not None]
        return min([TICK, *(at - time.monotonic() for at in times)])

    def _act(self) -> None:
        now = time.monotonic()
        if self._stop_at is not None and now >= self._stop_at and not self.stopping:
            self.stopping = True
            self._kill_at = now + self._grace
            self._send(signal.SIGTERM)
            self._send(signal.SIGCONT)  # a suspended rank would not see it
        if self._kill_at is not None and now >= self._kill_at:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for rank in self.alive:
            rank.send(number)

    def _reap(self) -> None:
        for rank in [rank for rank in self.alive if ended(rank.process.pid)]:
            self.alive.remove(rank)
            code, signal_name = exit_of(rank.collect())
            self._note_exit(rank.number, code, signal_name, lost_peer=code != 0 and blames_peer(last_lines(rank.log)))

    def _note_exit(self, number: int, code: int, signal_name: str | None, *, lost_peer: bool) -> None:
        self._report("exit", rank=number, code=code, signal=signal_name, stopped=self.stopping, lost_peer=lost_peer)
        self.exit_code = self.exit_code or code
        if code == REQUEUE:
            self.stop_within(self.task.grace, GRACE_AFTER_FAILURE)
        elif code != 0:
            self.stop_within(SETTLE if lost_peer else 0.0, min(self.task.grace, GRACE_AFTER_FAILURE))

    def _report(self, event: str, **facts: Any) -> None:
        self._events.write(json.dumps({"event": event, "node": self.task.node, "time": time.time(), **facts}) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    return Agent(NodeTask.parse(sys.argv[1:] if argv is None else argv)).run()


if __name__ == "__main__":
    sys.exit(main())
