"""A folder of runs that several users share: what is another's and closed breaks no command of mine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
# Root may look everywhere, so it becomes somebody else, once all modules are loaded: the checkout may be closed to that one.
COMMAND = f"""
import os, sys
from cluster import launch
from cluster.commands import control, logs, profiling, status, sweep
if os.geteuid() == 0:
    os.seteuid({NOBODY})
sys.exit(launch.main(sys.argv[1:]))
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """Mine: a run and a sweep. Theirs: a run and a sweep behind closed doors, a sweep that can be read and not listed."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to other users
        runs = Path(name)
        for run in ("mine", "theirs", "lr/00_x1", "closed/00_x1", "hidden/00_x1"):
            (runs / run).mkdir(parents=True)
            (runs / run / "config.yaml").write_text("optim:\n  max_steps: 7\n")
        point = '{"number": 0, "name": "00_x1", "overrides": ["x=1"]}'
        for sweep in ("lr", "closed", "hidden"):
            (runs / sweep / "sweep.json").write_text(f'{{"format": "slotstream-sweep/1", "fixed": [], "points": [{point}]}}')
        closed = {"theirs": 0, "closed": 0, "hidden": 0o111, "hidden/00_x1": 0, "lr/00_x1": 0}
        for place in sorted(closed, reverse=True):
            (runs / place).chmod(closed[place])
        runs.chmod(0o755)
        yield runs
        for place in sorted(closed):
            (runs / place).chmod(0o755)


def run(shared: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", COMMAND, *words, "--runs", str(shared)], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_status_shows_what_may_be_read(shared: Path):
    code, out, err = run(shared, "status")
    assert code == 0 and not err, err
    assert "mine" in out and "lr  sweep of 1 points: 1 waiting" in out and "hidden  sweep of 1" in out
    assert "theirs" not in out and "closed" not in out
    assert run(shared, "status", "--json")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("status", "mime"), "did you mean mine?"),
        (("status", "theirs"), "theirs: no such run"),
        (("logs", "closed"), "closed: no such run"),
        (("cancel", "theirs/x"), "no such run"),
        (("resume", "hidden/00_x1"), "no such run"),
        (("profile", "lr/00_x1"), "no such run"),
        (("logs", "hidden"), "hidden is a sweep"),
        (("logs", "mine"), "has no attempt yet"),
    ],
)
def test_a_command_is_refused_in_one_line(shared: Path, words: tuple[str, ...], said: str):
    code, out, err = run(shared, *words)
    assert code == 2 and said in err and len(err.splitlines()) == 1 and not out, err
