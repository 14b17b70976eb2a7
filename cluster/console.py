"""Rank 0's output on its way to the user: copied from a rank to our terminal and its log, or read from a log on a shared disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import stat
import sys
import termios
import threading
import time
import weakref
from pathlib import Path

PATIENCE = 1.0  # seconds in which a terminal or pipe may be slow to take what is written
BACKLOG = 1 << 20  # bytes of a log that a slow console may be behind; of more the newest are shown
AT_ONCE = 1 << 16


class Console:
    """Our end of a terminal, pipe or file of the user's. It takes what that takes: one that is paused holds nobody up.

    What was not taken within PATIENCE is the caller's to leave out or to offer again, and is not waited for a second time: until
    all that is offered is taken, only what finds room is written.
    """

    def __init__(self, descriptor: int) -> None:
        self.gone = False  # its reader, that is
        self._descriptor, self._piece = _own_end(descriptor)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)
        self._behind = False
        self._left_out = 0
        self._note = b""  # what is still to be said of bytes that were left out
        weakref.finalize(self, os.close, self._descriptor)

    def write(self, data: bytes) -> int:
        """Write from the beginning of `data` what is taken; return how many bytes that is."""
        until, taken = time.monotonic() + PATIENCE, 0
        try:
            while taken < len(data) and self._is_ready(until):
                taken += self._write(data[taken : taken + self._piece])
        except OSError:
            self.gone = True
        self._behind = taken < len(data)
        return taken

    def leave_out(self, count: int) -> None:
        """So many bytes will never be written: said before the next that are."""
        self._left_out += count

    def _is_ready(self, until: float) -> bool:
        left = until - time.monotonic()
        return left > 0 and bool(self._poll.poll(0 if self._behind else 1000 * left))

    def _write(self, piece: bytes) -> int:
        if self._left_out and not self._note:
            self._note = b"\n[%d bytes are left out here; the log has them]\n" % self._left_out
            self._left_out = 0
        try:
            if not self._note:
                return os.write(self._descriptor, piece)
            self._note = self._note[os.write(self._descriptor, self._note[: self._piece]) :]
        except BlockingIOError:  # another's output took the room
            time.sleep(0.01)
        return 0


def _own_end(descriptor: int) -> tuple[int, int]:
    """(descriptor of the same terminal, pipe or file, bytes to write to it at once).

    A terminal or pipe is opened again, not to block: set on the user's own descriptor that would hold for all who share it. What
    cannot be opened again (a socket, another user's terminal) is written so little at once that it does not block when poll() has
    found room: in a terminal that may be one byte.
    """
    if stat.S_ISREG(os.fstat(descriptor).st_mode):  # opened again it would be written from its beginning
        return os.dup(descriptor), AT_ONCE
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY), AT_ONCE
    except OSError:
        return os.dup(descriptor), 1 if os.isatty(descriptor) else select.PIPE_BUF


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

    def close(self) -> None:
        """Close what is open here; the pumps close their ends themselves."""
        for descriptor in [*self._write_ends, *(end for end, _ in [*self._copies, *self._terminals])]:
            os.close(descriptor)
        self._write_ends, self._copies, self._terminals = [], [], []

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
        self._write_ends, self._copies = [], []
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
    """Copy `source` to the log by whole lines and to the console as it comes, until its last writer is gone.

    Whole lines, because stdout and stderr may come through two pumps. The log first: it must have all, the console may be paused
    or gone.
    """
    shown = Console(console)
    held = b""
    with open(source, "rb", buffering=0) as reader, open(log, "ab", buffering=0) as stream:
        while data := _read(reader.fileno()):
            held += data
            cut = max(held.rfind(b"\n"), held.rfind(b"\r")) + 1
            _write_all(stream.fileno(), held[:cut])
            held = held[cut:]
            if not shown.gone:
                shown.leave_out(len(data) - shown.write(data))
        _write_all(stream.fileno(), held)


def _read(source: int) -> bytes:
    try:
        return os.read(source, AT_ONCE)
    except OSError:  # how a pseudo-terminal says that nobody writes to it any more
        return b""


def _write_all(log: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # a full disk must not block the rank
        while data:
            data = data[os.write(log, data) :]


class LogTail:
    """A log that grows on a shared disk, copied to a descriptor as it grows."""

    def __init__(self, path: Path, console: int) -> None:
        self._path, self._console = path, Console(console)
        self._offset = 0

    def copy(self) -> None:
        """Write what has come since the last call: the newest BACKLOG bytes of it, within PATIENCE; the rest waits for the next.

        A log that is not there yet, and a console that went away, are no errors.
        """
        if self._console.gone:
            return
        with contextlib.suppress(OSError), open(self._path, "rb") as stream:
            old = os.fstat(stream.fileno()).st_size - BACKLOG - self._offset
            if old > 0:
                self._console.leave_out(old)
                self._offset += old
            stream.seek(self._offset)
            self._offset += self._console.write(stream.read(BACKLOG))
