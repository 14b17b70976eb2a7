"""Restarts, lost and returning nodes, ownership and preemption with real processes: small programs stand in for the trainer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.owner import DEAD_AFTER
from tests.integration.test_launch_local import Launched, launcher, wait_until

__all__ = ["launcher"]  # the fixture
pytestmark = pytest.mark.slow

# Counts steps; rank 0 saves each as a checkpoint's manifest; all go on from the newest. Steps wait for a file "go".
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
run, rank, attempt = Path(os.environ["SLOTSTREAM_RUN_DIR"]), int(os.environ["RANK"]), os.environ["SLOTSTREAM_ATTEMPT"]
asked = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: asked.append(number))
saved = sorted((run / "checkpoints").glob("step_*/manifest.json"))
step = int(saved[-1].parent.name[5:]) if saved else 0
def fault(step): pass
#FAULT
(run / f"ready_{attempt}_{rank}").touch()
print("begin at", step, "world", os.environ["WORLD_SIZE"], flush=True)
while step < 6:
    while step >= 3 and not (run / "go").exists() and not asked:
        time.sleep(0.02)
    if asked:
        print("saved on", signal.Signals(asked[0]).name, flush=True)
        os._exit(75)
    step += 1
    if rank == 0:
        place = run / "checkpoints" / f"step_{step:08d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "manifest.json").touch()
    fault(step)
if rank == 0:
    (run / "DONE").touch()
"""
GO_ON = ("--max-restarts", "10")


def train(fault: str = "") -> str:
    return TRAIN.replace("#FAULT", fault)


def ready(run: Launched, attempt: int, *ranks: int) -> None:
    wait_until(lambda: all((run.run_dir / f"ready_{attempt}_{rank}").exists() for rank in ranks), f"attempt {attempt}: {ranks}")


def go(run: Launched) -> None:
    (run.run_dir / "go").touch()


def events(run: Launched, kind: str) -> list[dict[str, Any]]:
    lines = (run.run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def agent_of(run: Launched, slot: int) -> int:
    return next(pid for pid in run.agents() if f"--slot\0{slot}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes())


def assert_nothing_left(run: Launched) -> None:
    attempts = [int(path.name) for path in (run.run_dir / "attempts").iterdir()]
    assert [run.left(attempt) for attempt in attempts] == [[]] * len(attempts) and run.agents() == []
    assert not (run.run_dir / "owner.json").exists()


def test_a_killed_rank_is_restarted_from_the_checkpoint(launcher: Callable[..., Launched]) -> None:
    run = launcher(*GO_ON, "--nodes", "2", "--ranks-per-node", "2", program=train())
    ready(run, 1, 0, 1, 2, 3)
    wait_until(lambda: (run.run_dir / "checkpoints" / "step_00000003").exists(), "step 3")
    os.kill(run.pids()[3], signal.SIGKILL)
    ready(run, 2, 0, 1, 2, 3)
    go(run)
    code, out, err = run.end()
    assert code == 0, err
    assert "rank 3 (node 1) was killed by SIGKILL" in err and "starting again: restart 1 of at most 10" in err
    assert "begin at 3 world 4" in out and (run.verdict(1)["cause"], run.verdict(2)["outcome"]) == ("signal", "done")
    assert [event["attempt"] for event in events(run, "attempt")] == [1, 2] and events(run, "end")[0]["code"] == 0
    ports = [json.loads((run.run_dir / "attempts" / n / "launch.json").read_text())["master_port"] for n in ("1", "2")]
    assert ports[0] != ports[1]
    assert_nothing_left(run)


def test_a_killed_agent_is_replaced(launcher: Callable[..., Launched]) -> None:
    run = launcher(*GO_ON, "--nodes", "2", "--grace", "1", program=train())
    ready(run, 1, 0, 1)
    os.kill(agent_of(run, 1), signal.SIGKILL)
    ready(run, 2, 0, 1)
    go(run)
    code, _, err = run.end()
    assert code == 0 and "the agent of node 1 was killed by SIGKILL" in err
    assert events(run, "lost")[0]["slot"] == 1 and run.verdict(1)["cause"] == "lost_node"
    assert_nothing_left(run)


def test_a_node_lost_beside_done_is_no_failure(launcher: Callable[..., Launched]) -> None:
    run = launcher(*GO_ON, "--nodes", "2", "--grace", "1", program=train() + "time.sleep(500)\n")
    ready(run, 1, 0, 1)
    go(run)
    wait_until((run.run_dir / "DONE").exists, "DONE")
    os.kill(agent_of(run, 1), signal.SIGKILL)
    code, _, err = run.end()
    assert code == 0 and "the run is complete" in err and len(events(run, "attempt")) == 1, err
    assert events(run, "end")[0]["code"] == 0 and run.verdict(1)["cause"] == "lost_node"
    assert_nothing_left(run)


def test_a_frozen_agent_is_lost_too(launcher: Callable[..., Launched]) -> None:
    run = launcher(*GO_ON, "--nodes", "2", "--grace", "1", program=train())
    ready(run, 1, 0, 1)
    os.kill(agent_of(run, 0), signal.SIGSTOP)
    ready(run, 2, 0, 1)
    go(run)
    code, _, err = run.end()
    assert code == 0 and "the agent of node 0 gave no answer" in err
    assert_nothing_left(run)


def test_it_goes_on_with_fewer_nodes_and_grows_again(launcher: Callable[..., Launched], tmp_path: Path) -> None:
    script = tmp_path / "node.sh"
    script.write_text(f'test -e "{tmp_path}/down_$1" && exit 7\nshift\nexec "$@"\n')
    run = launcher(*GO_ON, "--nodes", "3", "--min-nodes", "2", "--node-patience", "1", "--grace", "1",
                   "--wrap", f"sh {script} {{slot}}", program=train())  # fmt: skip
    ready(run, 1, 0, 1, 2)
    wait_until(lambda: "world" in run.log(0), "its agent has copied what rank 0 said")
    (tmp_path / "down_0").touch()
    os.kill(agent_of(run, 0), signal.SIGKILL)
    ready(run, 2, 0, 1)  # numbered anew
    assert events(run, "attempt")[1]["slots"] == [1, 2]
    (tmp_path / "down_0").unlink()
    ready(run, 3, 0, 1, 2)
    go(run)
    code, _, err = run.end()
    assert code == 0, err
    worlds = [run.log(0, attempt).partition("world ")[2][:1] for attempt in (1, 2, 3)]
    assert worlds == ["3", "2", "3"] and "saved on SIGUSR2" in run.log(0, 2)
    assert_nothing_left(run)


def test_without_enough_nodes_it_ends_and_says_who_is_missing(launcher: Callable[..., Launched], tmp_path: Path) -> None:
    run = launcher(*GO_ON, "--nodes", "2", "--wrap", "sh -c 'test {slot} = 1 && exit 9; exec \"$@\"' x", program=train())
    code, _, err = run.end()
    assert code == 2 and "the agent of node 1 ended with exit code 9" in err and "1 of 2 nodes" in err
    assert not (run.run_dir / "attempts").exists() and run.agents() == []


def can_unshare() -> bool:
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0 if shutil.which("unshare") else False


@pytest.mark.skipif(not can_unshare(), reason="needs a mount namespace of its own: root")
def test_a_run_folder_that_a_node_does_not_see_is_refused(launcher: Callable[..., Launched], tmp_path: Path) -> None:
    script = tmp_path / "node.sh"
    script.write_text(f'test "$1" = 1 && mount -t tmpfs none {tmp_path}/runs\nshift\nexec "$@"\n')
    run = launcher(*GO_ON, "--nodes", "2", "--wrap", f"unshare -m sh {script} {{slot}}", program=train())
    code, _, err = run.end()
    assert code == 2 and "is not shared" in err and "(node 1)" in err
    assert not (run.run_dir / "attempts").exists() and run.agents() == []


@pytest.mark.skipif(not can_unshare(), reason="needs a mount namespace of its own: root")
@pytest.mark.parametrize("least", ["1", "2"])
def test_a_node_that_loses_the_run_folder_is_left_out_or_named(
    launcher: Callable[..., Launched], tmp_path: Path, least: str
) -> None:
    script = tmp_path / "node.sh"
    script.write_text(f'test -e "{tmp_path}/blind_$1" && mount -t tmpfs none {tmp_path}/runs\nshift\nexec "$@"\n')
    run = launcher(*GO_ON, "--nodes", "2", "--min-nodes", least, "--node-patience", "100", "--grace", "1",
                   "--wrap", f"unshare -m sh {script} {{slot}}", program=train())  # fmt: skip
    ready(run, 1, 0, 1)
    (tmp_path / "blind_1").touch()
    os.kill(agent_of(run, 1), signal.SIGKILL)
    if least == "1":
        ready(run, 2, 0)
        go(run)
    code, _, err = run.end()
    assert code == (0 if least == "1" else 1), err
    assert err.count("the agent of node 1 does not see the run folder any more\n") == 3 and "Traceback" not in err
    assert len(events(run, "not_ready")) == 3 and [event["slots"] for event in events(run, "attempt")][1:] == [[0]][: code == 0]
    assert_nothing_left(run)


@pytest.mark.skipif(not can_unshare(), reason="needs a mount of its own: root")
def test_a_disk_that_is_full_for_a_while_is_waited_for(launcher: Callable[..., Launched], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path / "runs")], check=True)
    try:
        run = launcher(*GO_ON, "--nodes", "2", "--grace", "1", program=train())
        ready(run, 1, 0, 1)
        filler = tmp_path / "runs" / "filler"
        with contextlib.suppress(OSError), open(filler, "wb") as stream:
            while True:
                stream.write(b"x" * 4096)
                stream.flush()
        os.kill(run.pids()[1], signal.SIGKILL)
        stderr = run.process.stderr
        assert stderr is not None
        said = ""
        while "No space left on device; trying again" not in said:
            assert (line := stderr.readline()), said
            said += line
        filler.unlink()
        ready(run, 2, 0, 1)
        go(run)
        assert run.end()[0] == 0
        assert run.verdict(2)["outcome"] == "done"
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "runs")], check=True)


def test_a_folder_of_a_living_owner_elsewhere_is_refused_and_of_a_dead_one_taken(launcher: Callable[..., Launched]) -> None:
    run = launcher(program="pass")
    assert run.end()[0] == 0
    run_dir = run.run_dir
    record = {"session": "s", "pid": 77, "host": "other", "boot": "b", "job_id": "4711", "attempt": 5, "since": "noon"}
    (run_dir / "owner.json").write_text(json.dumps(record))
    code, _, err = launcher(program="pass").end()
    assert code == 2 and "in use by process 77 on other, job 4711 (attempt 5) since noon" in err and err.count("\n") == 1
    past = time.time() - 2 * DEAD_AFTER
    os.utime(run_dir / "owner.json", (past, past))
    assert launcher(program="pass").end()[0] == 0


def test_a_session_whose_folder_was_taken_over_ends_its_ranks(launcher: Callable[..., Launched]) -> None:
    run = launcher(*GO_ON, "--nodes", "2", "--grace", "500", program="import signal\n" + train("asked = ()"))
    ready(run, 1, 0, 1)
    owner = run.run_dir / "owner.json"
    assert json.loads(owner.read_text())["attempt"] == 1
    record = {"session": "s", "pid": 77, "host": "other", "boot": "b", "job_id": None, "attempt": 2, "since": "noon"}
    owner.write_text(json.dumps(record))
    code, _, err = run.end()
    assert code == 1 and "taken over by process 77 on other" in err and run.left(1) == []
    assert json.loads(owner.read_text())["pid"] == 77  # the new owner's record stays


@pytest.mark.parametrize(("number", "to_agent"), [(signal.SIGUSR2, False), (signal.SIGUSR2, True), (signal.SIGTERM, True)])
def test_a_preempted_session_saves_and_is_not_restarted(
    launcher: Callable[..., Launched], number: signal.Signals, to_agent: bool
) -> None:
    run = launcher(*GO_ON, "--nodes", "2", program=train())
    ready(run, 1, 0, 1)
    os.kill(agent_of(run, 1) if to_agent else run.process.pid, number)
    code, _, err = run.end()
    assert code == 75, err
    assert all(f"saved on {number.name}" in run.log(rank) for rank in (0, 1))
    assert events(run, "preempted") and len(events(run, "attempt")) == 1
    assert_nothing_left(run)


@pytest.mark.parametrize(
    ("fault", "attempts", "code", "words"),
    [
        ("if rank == 1: sys.exit(2)", 1, 2, "a setting or a file is wrong"),
        ("raise ValueError('no such thing')", 1, 1, "before its first step"),
        ("if rank == 1: time.sleep(0.5); raise ValueError('always here')", 2, 1, "same error twice"),
        ("if int(attempt) > 0: os.kill(os.getpid(), signal.SIGKILL)", 3, 137, "2 restarts without a newer checkpoint"),
    ],
)  # fmt: skip
def test_what_another_start_cannot_mend_is_given_up(
    launcher: Callable[..., Launched], fault: str, attempts: int, code: int, words: str
) -> None:
    run = launcher("--max-restarts", "2", "--ranks-per-node", "2", "--grace", "1", program=train(fault))
    found, _, err = run.end()
    assert (found, len(events(run, "attempt"))) == (code, attempts), err
    assert words in err and "cluster/supervision/supervisor.py" not in err
    assert_nothing_left(run)


def test_ctrl_c_between_two_attempts(launcher: Callable[..., Launched]) -> None:
    run = launcher(*GO_ON, program="import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    path = run.run_dir / "events.jsonl"
    wait_until(lambda: path.exists() and any(event["delay"] > 1 for event in events(run, "restart")), "a pause")
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.end()
    assert code == 130 and "Traceback" not in err
    assert_nothing_left(run)


@pytest.mark.parametrize("after", [0.0, 0.05, 0.1, 0.2, 0.4])
def test_ctrl_c_at_any_moment_leaves_nothing(launcher: Callable[..., Launched], after: float) -> None:
    run = launcher(*GO_ON, "--nodes", "2", "--grace", "5", program=train())
    wait_until((run.run_dir / "train.lock").exists, "the launcher has begun")
    time.sleep(after)
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.end()
    assert code == 130 and "Traceback" not in err, err
    wait_until(lambda: not run.agents() and not run.left(1), "nothing left")
    assert not (run.run_dir / "owner.json").exists()
