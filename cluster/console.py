"""Rank 0's output on its way to the user: copied from a rank to our terminal and its log, or read from a log on a shared disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import sys
import termios
import threading
from pathlib import Path


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


class LogTail:
    """A log that grows on a shared disk, copied to a descriptor as it grows."""

    def __init__(self, path: Path, console: int) -> None:
        self._path, self._console = path, console
        self._offset = 0
        self._heard = True

    def copy(self) -> None:
        """Write what has come since the last call. A log that is not there yet, and a console that went away, are no errors."""
        try:
            with open(self._path, "rb") as stream:
                stream.seek(self._offset)
                while self._heard and (data := stream.read(1 << 16)):
                    self._offset += len(data)
                    self._heard = _write_all(self._console, data)
        except OSError:
            return
