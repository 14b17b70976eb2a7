"""The local launcher with real processes: small Python programs stand in for the trainer."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.processes import processes_with

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, str(ROOT / "cluster" / "launch.py")]
PATIENCE = 60.0

# Says its environment as JSON into the run folder.
TELL = """
import json, os, sys
from pathlib import Path
out = Path(os.environ["SLOTSTREAM_RUN_DIR"]) / f"told_{os.environ['RANK']}.json"
out.write_text(json.dumps({"env": dict(os.environ), "args": sys.argv[1:], "group": os.getpgrp(), "pid": os.getpid()}))
print("hello from", os.environ["RANK"], flush=True)
print("complaint from", os.environ["RANK"], file=sys.stderr, flush=True)
"""

# Starts a helper that leaves the rank's group and one that stays, says so, and waits.
WAIT = """
import os, signal, subprocess, sys, time
from pathlib import Path
for detach in (False, True):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=detach)
rank = os.environ["RANK"]
def ready():
    (Path(os.environ["SLOTSTREAM_RUN_DIR"]) / f"ready_{rank}").touch()
"""
STUBBORN = WAIT + "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('stubborn', flush=True); ready(); time.sleep(600)"
SAVES = (
    WAIT
    + """
def stop(number, frame):
    print("saved on", signal.Signals(number).name, flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR2, stop)
ready()
time.sleep(600)
"""
)
PLAIN = WAIT + "ready(); time.sleep(600)"


class Launched:
    """A launcher that a test started."""

    def __init__(self, folder: Path, *words: str, program: str, stdout: Any = subprocess.PIPE, **more: Any) -> None:
        script = folder / "program.py"
        script.write_text(program)
        self.run_dir = folder / "runs" / "run"
        command = [*LAUNCH, "--backend", "local", "--max-restarts", "0"]  # one attempt; how it goes on: test_supervisor.py
        command += ["--runs", str(folder / "runs"), "--command", str(script), *words]
        env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
        env = {**env, "CUDA_VISIBLE_DEVICES": "", **more.pop("env", {})}
        stderr = more.pop("stderr", subprocess.PIPE)
        self.process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=env, text=True, **more)

    def wait_for(self, *ranks: int) -> None:
        """Until these ranks have said that they are ready."""
        wait_until(lambda: all((self.run_dir / f"ready_{rank}").exists() for rank in ranks), f"ranks {ranks} ready")

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err

    def verdict(self, attempt: int = 1) -> dict[str, Any]:
        return json.loads((self.run_dir / "attempts" / str(attempt) / "verdict.json").read_text())

    def log(self, rank: int, attempt: int = 1) -> str:
        return (self.run_dir / "attempts" / str(attempt) / f"rank_{rank}.log").read_bytes().decode()

    def pids(self, attempt: int = 1) -> dict[int, int]:
        """Process id of each rank, from the agents' event files."""
        found = {}
        for path in (self.run_dir / "attempts" / str(attempt)).glob("node_*.jsonl"):
            started = json.loads(path.read_text().splitlines()[0])
            found.update({int(rank): pid for rank, pid in started["pids"].items()})
        return found

    def left(self, attempt: int = 1) -> list[int]:
        """Ranks and their helpers that still live."""
        return processes_with({"SLOTSTREAM_RUN_DIR": str(self.run_dir), "SLOTSTREAM_ATTEMPT": str(attempt)})

    def agents(self) -> list[int]:
        """Agents of this run folder that still live."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            except OSError:
                continue
            if str(self.run_dir) in words and any(word.endswith("cluster/agent.py") for word in words):
                found.append(int(entry.name))
        return found


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts launchers; after the test none of them, and nothing of theirs, may be left."""
    started: list[Launched] = []

    def start(*words: str, program: str, **more: Any) -> Launched:
        started.append(Launched(tmp_path, *words, program=program, **more))
        return started[-1]

    yield start
    for item in started:
        if item.process.poll() is None:
            item.process.kill()
        item.process.wait(PATIENCE)
        for stream in (item.process.stdout, item.process.stderr):
            if stream is not None:
                stream.close()
        wait_until(lambda item=item: not item.left() and not item.agents(), "nothing left")


def test_two_nodes_of_two_ranks_get_their_environment_and_logs(launcher: Callable[..., Launched]) -> None:
    extra = {"LOCAL_SIZE": "4", "MY_TOKEN": "s3cret"}
    run = launcher("--nodes", "2", "--ranks-per-node", "2", "a=1", "b='x y'", program=TELL, env=extra)
    code, out, err = run.end()
    assert code == 0, err
    told = [json.loads((run.run_dir / f"told_{rank}.json").read_text()) for rank in range(4)]
    for rank, item in enumerate(told):
        env = item["env"]
        assert item["args"] == ["a=1", "b='x y'"]
        expected = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2, "NODE_RANK": rank // 2,
                    "MASTER_ADDR": "127.0.0.1", "SLOTSTREAM_NODE": f"node{rank // 2}", "SLOTSTREAM_RUN_DIR": run.run_dir,
                    "SLOTSTREAM_ATTEMPT": 1, "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": 1}  # fmt: skip
        assert {key: env.get(key) for key in expected} == {key: str(value) for key, value in expected.items()}
        assert int(env["OMP_NUM_THREADS"]) >= 1 and "LOCAL_SIZE" not in env
        assert f"hello from {rank}" in run.log(rank) and f"complaint from {rank}" in run.log(rank)
        assert item["group"] == item["pid"]  # a group of its own: nothing else is hit when it is killed
    assert len({item["env"]["MASTER_PORT"] for item in told}) == 1
    assert "hello from 0" in out and "hello from 1" not in out + err and "complaint from 0" in err
    record = json.loads((run.run_dir / "attempts" / "1" / "launch.json").read_text())
    assert (record["nodes"], record["ranks_per_node"], record["backend"]) == (2, 2, "local")
    assert "s3cret" not in json.dumps(record)
    assert run.verdict()["outcome"] == "done"


def test_a_second_start_is_the_next_attempt_and_keeps_the_first_ones_logs(launcher: Callable[..., Launched]) -> None:
    assert launcher(program="print('one')").end()[0] == 0
    run = launcher(program="print('two')")
    assert run.end()[0] == 0
    assert (run.log(0, 1), run.log(0, 2)) == ("one\n", "two\n")


def test_the_first_failure_is_reported_with_rank_and_last_lines_and_all_is_gone(launcher: Callable[..., Launched]) -> None:
    program = STUBBORN.replace(
        "print('stubborn'", "\nif rank == '2': print('line\\n' * 30 + 'the reason', flush=True); sys.exit(3)\nprint('stubborn'"
    )
    run = launcher("--nodes", "2", "--ranks-per-node", "2", "--grace", "1", program=program)
    code, _, err = run.end()
    assert code == 3
    assert re.search(r"rank 2 \(node 1\) failed with exit code 3 after \d+ s; last lines of \S*rank_2.log:", err)
    assert err.count("| line") == 19 and "| the reason" in err
    verdict = run.verdict()
    assert (verdict["rank"], verdict["node"], verdict["rank_exit_code"], verdict["exit_code"]) == (2, 1, 3, 3)
    assert verdict["last_lines"][-1] == "the reason" and len(verdict["last_lines"]) == 20
    assert set(verdict["killed"]) <= {0, 1, 3}
    assert run.left() == [] and run.agents() == []


def test_a_rank_that_lost_its_peer_is_a_consequence(launcher: Callable[..., Launched]) -> None:
    program = """
import os, sys, time
if os.environ["RANK"] == "0":
    print("RuntimeError: Connection reset by peer", file=sys.stderr)
    sys.exit(1)
time.sleep(0.7)
print("ValueError: the cause")
sys.exit(4)
"""
    run = launcher("--nodes", "2", program=program)
    code, _, err = run.end()
    assert code == 4 and "rank 1 (node 1) failed with exit code 4" in err and "consequence" in err
    assert [item["rank"] for item in run.verdict()["consequences"]] == [0]


def test_a_killed_rank_is_reported_as_killed(launcher: Callable[..., Launched]) -> None:
    run = launcher("--nodes", "2", "--ranks-per-node", "2", program=PLAIN)
    run.wait_for(0, 1, 2, 3)
    os.kill(run.pids()[1], signal.SIGKILL)
    code, _, err = run.end()
    assert code == 137 and "rank 1 (node 0) was killed by SIGKILL" in err
    assert run.verdict()["signal"] == "SIGKILL"
    assert run.left() == [] and run.agents() == []


def test_the_target_lists_of_a_killed_run_are_taken_away(launcher: Callable[..., Launched], tmp_path: Path) -> None:
    program = """
import os, signal
from pathlib import Path
run, watched = Path(os.environ["SLOTSTREAM_RUN_DIR"]), Path(__file__).parent / "watched"
for path in (run / "monitoring" / "targets.json", watched / "mine.json"):
    path.parent.mkdir(parents=True)
    path.write_text("[]")
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = launcher(f"observe.targets_dir={tmp_path / 'watched'}", program=program)
    assert run.end()[0] == 137
    assert not list((run.run_dir / "monitoring").iterdir()) and not list((tmp_path / "watched").iterdir())


def test_a_suspended_rank_does_not_stay(launcher: Callable[..., Launched]) -> None:
    run = launcher("--ranks-per-node", "2", "--grace", "1", program=STUBBORN)
    run.wait_for(0, 1)
    os.kill(run.pids()[0], signal.SIGSTOP)
    os.kill(run.pids()[1], signal.SIGKILL)
    assert run.end()[0] == 137
    assert run.verdict()["killed"] == [0] and run.left() == []


def test_a_killed_agent_takes_its_ranks_along(launcher: Callable[..., Launched]) -> None:
    run = launcher("--nodes", "2", "--grace", "1", program=PLAIN)
    run.wait_for(0, 1)
    agent = next(pid for pid in run.agents() if b"--slot\0001\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(agent, signal.SIGKILL)
    code, _, err = run.end()
    assert code == 137 and "the agent of node 1 was killed by SIGKILL" in err
    assert run.left() == [] and run.agents() == []


def test_ctrl_c_lets_ranks_save_and_leaves_nothing(launcher: Callable[..., Launched]) -> None:
    run = launcher("--nodes", "2", program=SAVES)
    run.wait_for(0, 1)
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.end()
    assert code == 130 and "interrupted" in err and "Traceback" not in err
    assert "saved on SIGTERM" in out and "saved on SIGTERM" in run.log(1)
    assert run.verdict()["outcome"] == "interrupted"
    assert run.left() == [] and run.agents() == []


def test_a_second_ctrl_c_kills_at_once(launcher: Callable[..., Launched]) -> None:
    run = launcher("--nodes", "2", "--grace", "500", program=STUBBORN)
    run.wait_for(0, 1)
    run.process.send_signal(signal.SIGINT)
    wait_until(lambda: bool(select.select([run.process.stderr], [], [], 0)[0]), "the launcher says that it stops")
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.end()
    assert code == 130 and "killing now" in err
    assert sorted(run.verdict()["killed"]) == [0, 1] and run.left() == []


def test_ctrl_c_while_agents_start_is_clean(launcher: Callable[..., Launched]) -> None:
    run = launcher("--nodes", "3", program=SAVES)
    wait_until(lambda: bool(run.agents()), "a first agent")
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.end()
    assert code == 130 and "Traceback" not in err
    assert run.left() == [] and run.agents() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_preempted_run_that_saved_exits_75(launcher: Callable[..., Launched], number: signal.Signals) -> None:
    run = launcher("--nodes", "2", program=SAVES)
    run.wait_for(0, 1)
    run.process.send_signal(number)
    code, _, err = run.end()
    assert code == 75 and "start the same command again" in err
    assert f"saved on {number.name}" in run.log(1)
    assert run.verdict()["outcome"] == "requeue"


def test_max_time_asks_for_a_save(launcher: Callable[..., Launched]) -> None:
    run = launcher("--max-time", "6", program=SAVES)
    assert run.end()[0] == 75 and "saved on SIGTERM" in run.log(0)


def test_ranks_are_bound_to_cores_of_their_own(launcher: Callable[..., Launched]) -> None:
    count = len(os.sched_getaffinity(0))
    if count < 2:
        pytest.skip("one core cannot be divided")
    run = launcher("--ranks-per-node", "2", "--bind", "cores", program="import os; print(sorted(os.sched_getaffinity(0)))")
    assert run.end()[0] == 0
    first, second = (set(json.loads(run.log(rank))) for rank in (0, 1))
    assert first and second and not first & second and first | second <= os.sched_getaffinity(0)


def test_a_detached_launcher_goes_on_by_itself(launcher: Callable[..., Launched]) -> None:
    run = launcher("--detach", program=SAVES)
    assert run.end()[0] == 0
    job = json.loads((run.run_dir / "job.json").read_text())
    run.wait_for(0)
    os.kill(int(job["id"]), signal.SIGTERM)
    verdict = run.run_dir / "attempts" / "1" / "verdict.json"
    wait_until(lambda: verdict.exists() and not run.agents(), "the detached launcher has ended")
    assert run.verdict()["exit_code"] == 75 and "stopped and saved" in (run.run_dir / "launch.log").read_text()


@pytest.mark.parametrize("stubborn", [False, True])
def test_ctrl_c_while_a_detached_launcher_starts_ends_it(
    launcher: Callable[..., Launched], tmp_path: Path, stubborn: bool
) -> None:
    """It has a session of its own, so the terminal does not tell it. Here it starts for ever, before it owns the run folder."""
    started = tmp_path / "started"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys, time\n"
        "if '--detach' not in sys.orig_argv and any(word.endswith('launch.py') for word in sys.orig_argv):\n"
        f"    signal.signal(signal.SIGTERM, signal.{'SIG_IGN' if stubborn else 'SIG_DFL'})\n"
        f"    open({str(started)!r} + '.part', 'w').write(str(os.getpid()))\n"
        f"    os.rename({str(started)!r} + '.part', {str(started)!r})\n"
        "    time.sleep(120)\n"
    )
    run = launcher("--detach", "--grace", "0", program=PLAIN, env={"PYTHONPATH": str(tmp_path)})
    wait_until(started.exists, "the detached launcher has started")
    child = int(started.read_text())
    assert Path(f"/proc/{child}").exists()
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.end()
    assert code == 130 and "Traceback" not in err
    assert not Path(f"/proc/{child}").exists() and not (run.run_dir / "job.json").exists() and not run.agents()


def test_exit_75_of_all_ranks_is_75(launcher: Callable[..., Launched]) -> None:
    assert launcher("--nodes", "2", program="import sys; sys.exit(75)").end()[0] == 75


def test_nothing_outlives_a_killed_launcher_and_the_folder_stays_locked_until_then(launcher: Callable[..., Launched]) -> None:
    run = launcher("--nodes", "2", "--ranks-per-node", "2", "--grace", "3", program=STUBBORN)
    run.wait_for(0, 1, 2, 3)
    run.process.kill()
    run.process.wait(PATIENCE)
    assert run.agents(), "the agents still wait for their stubborn ranks"
    second = launcher(program="print('second')")
    code, _, err = second.end()
    assert code == 2 and "in use" in err
    wait_until(lambda: not run.left() and not run.agents(), "ranks, helpers and agents gone")
    assert launcher(program="print('third')").end()[0] == 0


def test_a_run_folder_in_use_is_refused(launcher: Callable[..., Launched]) -> None:
    run = launcher(program=PLAIN)
    run.wait_for(0)
    code, out, err = launcher(program=PLAIN).end()
    assert (code, out) == (2, "")
    assert f"in use by process {run.process.pid} on " in err and err.count("\n") == 1
    assert [path.name for path in (run.run_dir / "attempts").iterdir()] == ["1"]


def test_rank_0_writes_to_a_terminal_when_the_launcher_does(launcher: Callable[..., Launched]) -> None:
    ours, theirs = pty.openpty()
    program = "import os, sys; print(os.isatty(1), os.isatty(2), flush=True); print('10%\\r50%\\r90%', file=sys.stderr)"
    run = launcher("--nodes", "2", program=program, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], PATIENCE)[0]:
        try:
            data = os.read(ours, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert run.process.wait(PATIENCE) == 0
    assert b"True True" in shown and b"10%\r50%\r90%" in shown and b"False" not in shown
    assert run.log(0) == "True True\n10%\r50%\r90%\n" and run.log(1).startswith("False False")


def test_a_reader_that_goes_away_does_not_end_the_run(launcher: Callable[..., Launched]) -> None:
    program = "import time\nfor i in range(40): print('word ' * 2000, flush=True); time.sleep(0.01)\nprint('end')"
    run = launcher(program=program)
    run.process.stdout.close()  # type: ignore[union-attr]
    run.process.stdout = None
    assert run.process.wait(PATIENCE) == 0
    assert run.log(0).endswith("end\n")


def test_a_dry_run_starts_and_creates_nothing(tmp_path: Path, launcher: Callable[..., Launched]) -> None:
    run = launcher("--nodes", "2", "--dry-run", program=TELL, env={"MY_TOKEN": "s3cret"})
    code, out, err = run.end()
    assert code == 0 and not (tmp_path / "runs").exists()
    assert out.count("cluster/agent.py") == 2 and "rank 1: RANK=1 WORLD_SIZE=2" in out and "s3cret" not in out + err


def test_help_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    for words in (LAUNCH, [sys.executable, "-m", "cluster.launch"]):
        command = [words[0], "-X", "importtime", *words[1:], "--help"]
        answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in answer.stderr.splitlines() if "|" in line}
        assert answer.returncode == 0 and "--nodes" in answer.stdout
        assert not imported & {"torch", "numpy", "hydra", "omegaconf", "ray", "submitit", "yaml", "trainer", "data_pipeline"}
