"""Rank 0's output on its way to terminals and pipes that are read, paused, slow or gone."""

from __future__ import annotations

import os
import pty
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import console
from cluster.console import BACKLOG, Console, LogTail, pump

AT_ONCE = 0.5  # seconds: less than PATIENCE, more than a busy machine needs
SOON = console.PATIENCE + 2.0
LINES = b"".join(b"line %06d\n" % number for number in range(40_000))  # more than any of them holds


class End:
    """Something to write to, and its other side."""

    def __init__(self, kind: str) -> None:
        if kind == "terminal":
            self.ours, self.theirs = pty.openpty()
        elif kind == "pipe":
            self.ours, self.theirs = os.pipe()
        else:
            ours, theirs = socket.socketpair()
            self.ours, self.theirs = ours.detach(), theirs.detach()

    def read(self, until: Callable[[bytes], bool], pause: float = 0.0) -> bytes:
        """Read until that is so of all that came."""
        seen, deadline = b"", time.monotonic() + 20
        while not until(seen):
            assert time.monotonic() < deadline, seen[-200:]
            time.sleep(pause)
            seen = (seen + self._more(0.2)).replace(b"\r\n", b"\n")
        return seen

    def empty(self, wait: float = 0.2) -> bytes:
        """Read what is there."""
        seen = b""
        while more := self._more(wait):
            seen += more
        return seen.replace(b"\r\n", b"\n")

    def _more(self, wait: float) -> bytes:
        return os.read(self.ours, 4096) if select.select([self.ours], [], [], wait)[0] else b""

    def close(self) -> None:
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture(params=["terminal", "pipe", "socket"])
def end(request: pytest.FixtureRequest) -> Iterator[End]:
    made = End(request.param)
    yield made
    made.close()


@pytest.fixture(params=["opened again", "shared"])
def any_end(end: End, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> End:
    """As `end`; also where it cannot be opened again."""
    if request.param == "shared":
        monkeypatch.setattr(console.os, "open", no_opening)
    return end


def no_opening(*_: object) -> int:
    raise PermissionError


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "rank_0.log"


def seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


class Pumped:
    """A pump at work between a pipe and an end."""

    def __init__(self, log: Path, shown: int) -> None:
        source, self.rank = os.pipe()
        self.log = log
        self.thread = threading.Thread(target=pump, args=(source, log, shown), daemon=True)
        self.thread.start()

    def write(self, data: bytes) -> None:
        """Until all of it is in the log."""
        goal = self.log.stat().st_size + len(data) if self.log.exists() else len(data)
        while data:
            data = data[os.write(self.rank, data) :]
        while not self.log.exists() or self.log.stat().st_size < goal:
            time.sleep(0.01)

    def end(self) -> bytes:
        os.close(self.rank)
        self.thread.join(SOON)
        assert not self.thread.is_alive()
        return self.log.read_bytes()


def test_nothing_blocks_where_nobody_reads(any_end: End) -> None:
    shown = Console(any_end.theirs)
    taken = 0

    def write() -> None:
        nonlocal taken
        taken = shown.write(LINES)

    assert seconds(write) < SOON and 0 < taken < len(LINES)
    assert seconds(lambda: shown.write(LINES)) < AT_ONCE  # it is not waited for again
    assert os.get_blocking(any_end.theirs) and not shown.gone
    any_end.empty()
    assert shown.write(b"again\n") == 6 and any_end.empty().endswith(b"again\n")


def test_the_rank_and_its_log_go_on_while_nobody_reads(any_end: End, log: Path) -> None:
    pumped = Pumped(log, any_end.theirs)
    assert seconds(lambda: pumped.write(LINES)) < SOON
    time.sleep(0.1)  # the log comes first
    before = any_end.empty()
    pumped.write(b"again\n")
    after = any_end.read(lambda seen: b"again\n" in seen)
    assert pumped.end() == LINES + b"again\n"
    said = f"[{len(LINES) - len(before)} bytes are left out here; the log has them]\n".encode()
    assert LINES.startswith(before) and after == b"\n" + said + b"again\n"


def test_a_paused_terminal_goes_on_later(log: Path) -> None:
    end = End("terminal")
    pumped = Pumped(log, end.theirs)
    pumped.write(b"before\n")
    assert end.read(lambda seen: b"before\n" in seen) == b"before\n"
    os.write(end.ours, b"\x13")  # Ctrl-S
    assert seconds(lambda: pumped.write(LINES)) < SOON
    assert end.empty() == b""
    os.write(end.ours, b"\x11")  # Ctrl-Q
    pumped.write(b"again\n")
    assert b"are left out here" in end.read(lambda seen: seen.endswith(b"again\n"))
    assert pumped.end() == b"before\n" + LINES + b"again\n"
    end.close()


def test_a_slow_reader_misses_nothing(end: End, log: Path) -> None:
    pumped = Pumped(log, end.theirs)
    data = LINES[: 12 * 16_000]
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: seen.append(end.read(lambda it: len(it) >= len(data), pause=0.02)))
    reader.start()
    pumped.write(data)
    reader.join(20)
    assert pumped.end() == data and seen == [data]


def test_a_reader_that_goes_away_ends_nothing(end: End, log: Path) -> None:
    pumped = Pumped(log, end.theirs)
    pumped.write(b"before\n")
    end.read(lambda seen: b"before\n" in seen)
    os.close(end.ours)
    assert seconds(lambda: pumped.write(LINES)) < SOON
    assert pumped.end() == b"before\n" + LINES
    end.ours = os.dup(end.theirs)  # for close()


def test_a_file_is_written_where_it_ends(tmp_path: Path, log: Path) -> None:
    with open(tmp_path / "out", "wb", buffering=0) as out:
        out.write(b"first\n")
        pumped = Pumped(log, out.fileno())
        pumped.write(LINES)
        assert pumped.end() == LINES
        out.write(b"last\n")
    assert (tmp_path / "out").read_bytes() == b"first\n" + LINES + b"last\n"


def test_a_full_disk_under_the_log_does_not_hide_the_output(tmp_path: Path) -> None:
    end, log = End("pipe"), Path("/dev/full")
    source, rank = os.pipe()
    thread = threading.Thread(target=pump, args=(source, log, end.theirs), daemon=True)
    thread.start()
    os.write(rank, b"word\n")
    assert end.read(lambda seen: seen.endswith(b"\n")) == b"word\n"
    os.close(rank)
    thread.join(SOON)
    end.close()


def test_a_tail_goes_on_where_the_console_stopped(any_end: End, log: Path) -> None:
    log.write_bytes(LINES)
    tail = LogTail(log, any_end.theirs)
    assert seconds(tail.copy) < SOON
    assert seconds(tail.copy) < AT_ONCE
    seen = b""
    deadline = time.monotonic() + 20
    while len(seen) < len(LINES):
        assert time.monotonic() < deadline
        seen += any_end.empty(0.01)
        tail.copy()
    assert seen == LINES  # late, but whole


def test_a_tail_that_is_far_behind_shows_the_newest_and_how_much_it_left_out(end: End, log: Path) -> None:
    log.write_bytes(b"a" * 1000)
    tail = LogTail(log, end.theirs)
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: seen.append(end.read(lambda it: it.endswith(b"end\n"))))
    reader.start()
    tail.copy()
    with open(log, "ab") as stream:
        stream.write(b"b" * (BACKLOG + 500) + b"c" * (BACKLOG - 4) + b"end\n")
    while reader.is_alive():
        tail.copy()
        reader.join(0.01)
    said = f"\n[{BACKLOG + 500} bytes are left out here; the log has them]\n".encode()
    assert seen == [b"a" * 1000 + said + b"c" * (BACKLOG - 4) + b"end\n"]


def test_a_log_that_grows_all_the_time_does_not_keep_the_caller(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes what there was, however much comes meanwhile."""
    write = Console.write

    def meanwhile(shown: Console, data: bytes) -> int:
        stream.write(LINES)
        return write(shown, data)

    monkeypatch.setattr(Console, "write", meanwhile)
    with open(tmp_path / "out", "wb") as out, open(log, "ab", buffering=0) as stream:
        stream.write(LINES)
        LogTail(log, out.fileno()).copy()
    assert (tmp_path / "out").stat().st_size == len(LINES)


def test_a_tail_leaves_nothing_open(end: End, log: Path) -> None:
    log.write_bytes(b"word\n")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        LogTail(log, end.theirs).copy()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_log_that_is_not_there_yet_is_waited_for(end: End, log: Path) -> None:
    tail = LogTail(log, end.theirs)
    tail.copy()
    log.write_bytes(b"word\n")
    tail.copy()
    assert end.empty() == b"word\n"
