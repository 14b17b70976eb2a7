"""Runs that hang in four ways: each time the right rank and cause are named, all stacks are kept, the run goes on by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tiny_run import arguments, lines, losses, make_shards

pytestmark = pytest.mark.timeout(900)  # five starts of three ranks, on a machine that may have other work
ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "integration" / "hang_worker.py"
PATIENCE = 800.0
STEPS = 40
KINDS = {  # fault: (rank, cause, what the culprit's stacks show)
    "stop": (1, "stopped", "stop_itself"),
    "skip": (2, "skipped collective", "backward"),
    "loader": (1, "loader", "wait_for_nothing"),
    "save": (0, "save", "lock_twice"),
}


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of one run of three ranks that hung once in each way, attempt after attempt, and then ended."""
    folder = tmp_path_factory.mktemp("hangs")
    settings = arguments(make_shards(folder / "data"), folder / "runs", "run", f"optim.max_steps={STEPS}")[2:]
    faults = ",".join(f"{kind}:{rank}" for kind, (rank, _, _) in KINDS.items())
    command = [
        sys.executable, "cluster/launch.py", "--backend", "local", "--ranks-per-node", "3", "--gpus-per-node", "0",
        "--hang-after", "3", "--command", f"{WORKER} {faults}", *settings,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder / "runs" / "run"


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in lines(run / "events.jsonl") if event["event"] == name]


@pytest.mark.parametrize("kind", KINDS)
def test_rank_and_cause_are_named_and_every_rank_tells_where_it_was(hung: Path, kind: str) -> None:
    attempt = 1 + list(KINDS).index(kind)
    rank, cause, place = KINDS[kind]
    found = json.loads((hung / "attempts" / str(attempt) / "hang.json").read_text())
    assert (found["culprits"], found["cause"]) == ([rank], cause), found["why"]
    assert set(found["ranks"]) == set(found["stacks"]) == {"0", "1", "2"}
    assert found["ranks"][str(rank)]["state"] == ("T" if kind == "stop" else "S")
    assert place in found["stacks"][str(rank)]
    assert all("train_loop.py" in text for text in found["stacks"].values())
    (said,) = [event for event in events(hung, "hang") if event["attempt"] == attempt]
    assert (said["ranks"], said["cause"]) == ([rank], cause)


def test_the_run_went_on_after_each_hang_and_lost_no_step(hung: Path) -> None:
    assert sorted(path.name for path in (hung / "attempts").iterdir()) == ["1", "2", "3", "4", "5"]
    assert (hung / "DONE").read_text() == f"step {STEPS}\n"
    assert sorted(losses(hung)) == list(range(1, STEPS + 1))
    assert not events(hung, "straggler")
