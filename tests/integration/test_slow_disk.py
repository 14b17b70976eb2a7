"""A checkpoint that takes longer than every limit for ranks that do nothing: it moves, so it is waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.tiny_run import arguments, lines, make_shards

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "integration" / "slow_disk_worker.py"
LIMIT_S = 7.0  # of a hang and of a collective; ranks that wait for a save hear of it every five seconds


def test_a_save_that_outlasts_hang_and_collective_limits_is_no_failure(tmp_path: Path) -> None:
    settings = ["optim.max_steps=3", "checkpoint.every_steps=100", f"parallel.timeout_s={LIMIT_S:.0f}"]
    words = arguments(make_shards(tmp_path / "data"), tmp_path / "runs", "run", *settings)[2:]
    command = [
        sys.executable, "cluster/launch.py", "--backend", "local", "--ranks-per-node", "2", "--gpus-per-node", "0",
        "--max-restarts", "0", "--hang-after", str(LIMIT_S), "--command", f"{WORKER} 2.0 4", *words,
    ]  # fmt: skip
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    run = tmp_path / "runs" / "run"
    assert ended.returncode == 0, ended.stderr[-3000:]
    (saved,) = [line["checkpoint/seconds"] for line in lines(run / "metrics.jsonl") if "checkpoint/seconds" in line]
    assert saved > 1.5 * LIMIT_S and (run / "DONE").is_file()
    assert [event["event"] for event in map(json.loads, (run / "events.jsonl").read_text().splitlines())].count("hang") == 0
