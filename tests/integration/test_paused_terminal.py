"""A terminal that its user pauses with Ctrl-S: the run goes on, its log is whole."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
PAUSE, GO_ON = b"\x13", b"\x11"

# Writes far more than a terminal holds, and again when the file "go_on" is there.
TALK = """
import os, time
from pathlib import Path
run = Path(os.environ["SLOTSTREAM_RUN_DIR"])
print("begun", flush=True)
while not (run / "paused").exists():
    time.sleep(0.02)
for number in range(20000):
    print("line", number, flush=True)
(run / "talked").touch()
while not (run / "go_on").exists():
    time.sleep(0.02)
print("last words", flush=True)
"""


def read_until(terminal: int, word: bytes) -> bytes:
    seen = b""
    while word not in seen:
        assert select.select([terminal], [], [], PATIENCE)[0], seen[-200:]
        seen += os.read(terminal, 4096)
    return seen


def test_a_paused_terminal_holds_up_no_rank(tmp_path: Path) -> None:
    script, run = tmp_path / "program.py", tmp_path / "runs" / "run"
    script.write_text(TALK)
    command = [sys.executable, str(ROOT / "cluster" / "launch.py"), "--backend", "local", "--max-restarts", "0"]
    command += ["--runs", str(tmp_path / "runs"), "--command", str(script)]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    try:
        read_until(ours, b"begun")
        os.write(ours, PAUSE)
        (run / "paused").touch()
        deadline = time.monotonic() + PATIENCE
        while not (run / "talked").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.write(ours, GO_ON)
        (run / "go_on").touch()
        assert b"bytes are left out here" in read_until(ours, b"last words")
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
    lines = (run / "attempts" / "1" / "rank_0.log").read_text().splitlines()
    assert lines == ["begun", *(f"line {number}" for number in range(20000)), "last words"]
