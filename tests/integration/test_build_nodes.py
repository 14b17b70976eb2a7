"""Shards built by several ranks under the launcher: the same bytes as one process, whatever is killed or stopped on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.build_chaos import SMALL, digests, torment
from cluster.processes import processes_with

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("SLOTSTREAM_BUILD_KILLS", "6"))  # python benchmarks/build_chaos.py --kills 50 is the long form
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
RANKS = ["cluster/launch.py", "--nodes", "2", "--ranks-per-node", "2", "--gpus-per-node", "0"]
TINY = [*SMALL, "source.num_train=7", "source.num_validation=3", "source.num_frames=4"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)


def logs(runs: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(runs.glob("*/attempts/*/rank_*.log")))


@pytest.mark.timeout(900)
def test_kills_leave_no_trace_in_the_bytes(tmp_path: Path) -> None:
    said: list[str] = []
    tally = torment(KILLS, seed=7, folder=tmp_path, settings=SMALL, say=said.append)
    assert tally.identical and sum(tally.kills.values()) == KILLS == len(said), (tally, said)


def test_nodes_build_what_one_process_builds_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    launch = [*RANKS, "--runs", str(tmp_path / "runs"), "build-shards", *TINY, f"out={tmp_path / 'ranks'}"]
    dry = run(*launch[:7], "--dry-run", *launch[7:])
    assert dry.returncode == 0, dry.stderr
    assert "rank 3: " in dry.stdout and "train: 7 videos of about 4 frames" in dry.stdout and "free for" in dry.stdout
    assert list(tmp_path.iterdir()) == []
    done = run(*launch)
    assert done.returncode == 0, done.stderr
    assert "built 6 shards of 10 videos, 40 frames" in done.stdout
    alone = run("-m", "data_pipeline.build", *TINY, f"out={tmp_path / 'alone'}", "workers=1")
    assert alone.returncode == 0, alone.stderr
    assert digests(tmp_path / "ranks") == digests(tmp_path / "alone")
    assert run("-m", "data_pipeline.verify", str(tmp_path / "ranks")).returncode == 0


def test_a_mistake_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    launch = [*RANKS, "--runs", str(tmp_path / "runs"), "build-shards", *TINY, f"out={tmp_path / 'out'}"]
    failed = run(*launch, "codec=int3")
    assert failed.returncode == 2 and "codec='int3'" in failed.stderr
    assert not (tmp_path / "out").exists() and "Traceback" not in logs(tmp_path / "runs") + failed.stderr


@pytest.mark.parametrize("form", ["launcher", "workers"])
def test_ctrl_c_leaves_whole_shards_and_no_traceback(tmp_path: Path, form: str) -> None:
    out, mark = tmp_path / "out", {"BUILD_NODES_TEST": str(tmp_path)}
    settings = [*SMALL, "source.num_train=200", "source.num_validation=2", f"out={out}"]
    words = [*RANKS, "--runs", str(tmp_path / "runs"), "build-shards", *settings, "workers=1"]
    if form == "workers":
        words = ["-m", "data_pipeline.build", *settings, "workers=2"]
    command = [sys.executable, *words]
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in a shell's background inherit that Ctrl-C is ignored
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT | mark, text=True, start_new_session=True, preexec_fn=heard, **streams
    )
    deadline = time.monotonic() + 100
    while not list(out.rglob("*.tar")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # the terminal's Ctrl-C reaches the workers too
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said + logs(tmp_path / "runs") and "interrupted" in said
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("index.json")) and not processes_with(mark)
    for sidecar in out.rglob("*-*.json"):  # a shard without one is made anew by the next build
        assert json.loads(sidecar.read_text())["bytes"] == sidecar.with_suffix(".tar").stat().st_size


@pytest.mark.parametrize("when", ["work", "start"])
def test_a_build_that_is_asked_to_stop_says_so_and_asks_to_be_started_again(tmp_path: Path, when: str) -> None:
    out = tmp_path / "out"
    words = ["-m", "data_pipeline.build", *SMALL, "source.num_train=200", f"out={out}", "workers=1"]
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE)
    sign = "*.tar" if when == "work" else "settings.json"
    deadline = time.monotonic() + 100
    while not list(out.rglob(sign)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert said.splitlines()[-1] == "stopped; finished shards are kept; run the same command again to go on"
    assert not list(out.rglob(".*.tmp"))
