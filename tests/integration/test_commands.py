"""The commands around runs, with real launches: small Python programs stand in for the trainer, one test trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.processes import processes_with
from tests.integration.slurm_cluster import SlurmCluster, require_slurm
from tests.integration.tiny_run import arguments, make_shards

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, str(ROOT / "cluster" / "launch.py")]
PATIENCE = 90.0
TIMEOUT = 120.0

# Takes steps, writes what a trainer writes, saves on request; fail=S: rank 1 raises at step S.
STEPS = """
import json, os, signal, sys, time
from pathlib import Path
run, rank, stop = Path(os.environ["SLOTSTREAM_RUN_DIR"]), os.environ["RANK"], []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
signal.signal(signal.SIGUSR2, lambda *_: stop.append(1))
words = dict(word.split("=", 1) for word in sys.argv[1:])
steps = int(words.get("steps", 5))
if rank == "0":
    (run / "config.yaml").write_text(f"name: x\\noptim:\\n  max_steps: {steps}\\n")
for step in range(1, steps + 1):
    if words.get("fail") == str(step):
        if rank == "1":
            raise ValueError("the loss is a fish")
        while not stop:
            time.sleep(0.02)
    if rank == "0":
        line = {"step": step, "time": time.time(), "time/step_ms": 20.0, "metric/video_fg_ari": float(words.get("lr", 0))}
        with open(run / "metrics.jsonl", "a") as log:
            log.write(json.dumps(line) + "\\n")
    print("rank", rank, "step", step, flush=True)
    if stop:
        print("rank", rank, "saved", flush=True)
        sys.exit(75)
    time.sleep(0.02)
if rank == "0":
    (run / "DONE").touch()
"""

# Stands in for the evaluation: scores until a file `scored` is there.
SCORES = """
import time
from pathlib import Path
while not Path("scored").exists():
    time.sleep(0.02)
"""
EVALUATE = ("--backend", "local", "--command", "scores.py", "evaluate", "run=runs/a")
# Stands in for the build of shards, which writes no config.yaml.
BUILDS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("building", flush=True)
time.sleep(float(sys.argv[1].partition("=")[2]))
"""
# Python runs it before the launcher's first line: a point's launcher that takes long to begin, as on a slow disk.
LATE = """
import sys, time
if any(word.startswith("name=0") for word in sys.orig_argv):
    time.sleep(1000)
"""


class Commands:
    """Runs launcher commands in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.started: list[subprocess.Popen[str]] = []
        for name, text in (("steps.py", STEPS), ("scores.py", SCORES), ("builds.py", BUILDS)):
            (folder / name).write_text(text)
        kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "SLURM_CONF")}
        self.environment = {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def __call__(self, *words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*LAUNCH, *words], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        return done.returncode, done.stdout, done.stderr

    def start(self, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([*LAUNCH, *words], cwd=self.folder, env=self.environment, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
        self.started.append(process)
        return process

    def launch(self, *words: str) -> tuple[int, str, str]:
        return self("--backend", "local", "--command", "steps.py", *words)

    def status(self, *names: str) -> list[dict]:
        code, out, err = self("status", *names, "--json")
        assert code == 0, err
        return json.loads(out)

    def state(self, name: str) -> str:
        return self.status(name)[0]["state"]

    def until(self, happens: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not happens():
            assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {what}"
            time.sleep(0.05)

    def left(self) -> list[int]:
        """Ranks of any run here that still live."""
        folders = {str(path.parent) for path in self.runs.rglob("attempts")}
        return [pid for folder in folders for pid in processes_with({"SLOTSTREAM_RUN_DIR": folder})]


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    made = Commands(tmp_path)
    yield made
    (made.folder / "scored").touch()
    for job in made.runs.rglob("job*.json"):  # a Slurm cluster has ended its jobs with itself
        if json.loads(job.read_text())["backend"] == "local":
            made("cancel", str(job.parent), "--now")
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.communicate()
    made.until(lambda: not made.left(), "nothing left")


def test_a_run_is_watched_cancelled_resumed_and_read(commands: Commands) -> None:
    code, _, err = commands.launch("--detach", "--nodes", "2", "name=a", "steps=100000")
    assert code == 0, err
    commands.until(lambda: (commands.status("a")[0]["step"] or 0) > 3, "steps")
    [view] = commands.status("a")
    assert (view["state"], view["backend"], view["nodes"], view["ranks_per_node"]) == ("running", "local", 2, 1)
    assert view["steps"] == 100000 and view["eta_s"] > 1
    code, _, err = commands("resume", "a")
    assert code == 2 and "is running" in err
    follower = commands.start("logs", "a", "--follow", "--lines", "1")
    code, _, err = commands("cancel", "a")
    assert code == 0 and "stopped (requeue)" in err, err
    out, _ = follower.communicate(timeout=PATIENCE)
    assert out.splitlines()[-1] == "rank 0 saved"
    assert commands.state("a") == "stopped (requeue)" and not commands.left()
    code, out, err = commands("resume", "steps=3", "a")
    assert code == 0, err
    [view] = commands.status("a")
    assert (view["state"], view["attempt"], view["steps"]) == ("done", 2, 3)
    code, _, err = commands("resume", "a")
    assert code == 2 and "is done" in err and len(err.splitlines()) == 1
    code, out, _ = commands("logs", "a", "--all", "--lines", "1")
    assert out.splitlines() == ["[0] rank 0 step 3", "[1] rank 1 step 3"]
    code, out, _ = commands("logs", "a", "--attempt", "1", "--rank", "1", "--lines", "1")
    assert out == "rank 1 saved\n"


def test_a_failed_run_says_why_and_a_killed_launcher_is_noticed(commands: Commands) -> None:
    code, *_ = commands.launch("--ranks-per-node", "2", "name=bad", "fail=2")
    assert code == 1
    code, out, _ = commands("status")
    assert "failed" in out and "rank 1 (node 0)" in out and "the loss is a fish" in out
    code, out, _ = commands("logs", "bad")
    assert out.splitlines()[-1] == "ValueError: the loss is a fish"  # of the rank that failed
    launcher = commands.start("--backend", "local", "--command", "steps.py", "name=lost", "steps=100000")
    commands.until(lambda: (commands.runs / "lost" / "metrics.jsonl").exists() and commands.state("lost") == "running", "running")
    launcher.kill()
    launcher.wait()
    commands.until(lambda: commands.state("lost") == "lost", "lost")
    assert "resume lost" in commands.status("lost")[0]["problem"]
    commands.until(lambda: not commands.left(), "its ranks ended")


def test_the_commands_act_on_the_training_beside_an_evaluation(commands: Commands) -> None:
    """The evaluation begins while the training lives, outlives its end, and another one is made before it goes on."""
    run = commands.runs / "a"
    code, _, err = commands.launch("--detach", "name=a", "steps=100000")
    assert code == 0, err
    commands.until(lambda: (commands.status("a")[0]["step"] or 0) > 3, "steps")
    scoring = commands.start(*EVALUATE)
    commands.until(lambda: (run / "attempts" / "2" / "rank_0.log").exists(), "an evaluation beside it")
    [view] = commands.status("a")
    assert (view["state"], view["attempt"], view["event"]) == ("running", 1, "attempt")
    assert json.loads((run / "job_evaluate.json").read_text())["pid"] == scoring.pid != int(view["job"])
    code, out, _ = commands("logs", "a", "--lines", "1")
    assert code == 0 and out.startswith("rank 0 step")
    code, _, err = commands("cancel", "a")
    assert code == 0 and "a: stopped (requeue)" in err, err
    assert scoring.poll() is None and commands.state("a") == "stopped (requeue)"
    (commands.folder / "scored").touch()
    _, err = scoring.communicate(timeout=PATIENCE)
    assert scoring.returncode == 0, err
    assert commands(*EVALUATE)[0] == 0
    [view] = commands.status("a")
    assert (view["state"], view["attempt"], view["event"]) == ("stopped (requeue)", 1, "end")
    code, _, err = commands("cancel", "a")
    assert code == 0 and "is not running: stopped (requeue)" in err
    code, _, err = commands("resume", "a", "steps=3")
    assert code == 0 and "steps.py" in err and "evaluate" not in err, err
    [view] = commands.status("a")
    assert (view["state"], view["attempt"]) == ("done", 4)


def test_a_failed_evaluation_is_no_failure_of_the_training(commands: Commands) -> None:
    assert commands.launch("name=a", "steps=3")[0] == 0
    (commands.folder / "scores.py").write_text("raise SystemExit(3)")
    assert commands(*EVALUATE, "--max-restarts", "0")[0] == 3
    [view] = commands.status("a")
    assert (view["state"], view["attempt"], view["problem"]) == ("done", 1, None)


def test_a_detached_evaluation_returns_once_it_is_recorded(commands: Commands) -> None:
    assert commands.launch("name=a", "steps=3")[0] == 0
    code, _, err = commands("--detach", *EVALUATE)
    assert code == 0 and "started as process" in err
    pid = json.loads((commands.runs / "a" / "job_evaluate.json").read_text())["pid"]
    (commands.folder / "scored").touch()
    commands.until(lambda: ended_elsewhere(pid), "its end")


def ended_elsewhere(pid: int) -> bool:
    """Of a process that is no child of ours: where nobody reaps it, it stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


def test_a_folder_whose_only_job_builds_shards_is_commanded_by_it(commands: Commands) -> None:
    words = ("--backend", "local", "--command", "builds.py", "build-shards")
    code, _, err = commands("--detach", *words, "seconds=1000", "name=b")
    assert code == 0, err
    commands.until(lambda: "building" in commands("logs", "b")[1], "a log")
    [view] = commands.status()
    assert (view["name"], view["state"], view["attempt"]) == ("b", "running", 1)
    code, _, err = commands("resume", "b")
    assert code == 2 and "b is running" in err
    code, _, err = commands("cancel", "b")
    assert code == 0 and "b: stopped (requeue)" in err and not (commands.runs / "b" / "job.json").exists(), err
    record = commands.runs / "b" / "job_build-shards.json"
    record.write_text(record.read_text().replace("seconds=1000", "seconds=0"))
    code, _, err = commands("resume", "b")
    assert code == 0, err
    [view] = commands.status("b")
    assert (view["state"], view["attempt"]) == ("done", 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("status", "demo1"), "no such run"),
        (("status", "--runs", "nowhere"), "no such folder"),
        (("logs", "a", "--rank", "9"), "rank"),
        (("logs", "a", "--attempt", "9"), "attempt"),
        (("logs",), "--help"),
        (("cancel", "a", "b"), "b"),
        (("resume", "a", "name=c"), "name=c"),
        (("resume", "a", "--fast"), "--fast"),
        (("doctor", "--nodez", "3"), "--nodez"),
        (("--multirun", "seed=1,2"), "name="),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(commands: Commands, words: tuple[str, ...], said: str) -> None:
    folder = commands.runs / "a" / "attempts" / "1"
    folder.mkdir(parents=True)
    (folder / "rank_0.log").write_text("x\n")
    code, out, err = commands(*words)
    assert code == 2 and said in err and len(err.splitlines()) == 1 and not out, err


def test_a_sweep_goes_on_where_it_was_interrupted(commands: Commands) -> None:
    words = ["--multirun", "--backend", "local", "--command", "steps.py", "name=s", "lr=0.1,0.3,0.2", "--parallel", "2"]
    sweep = commands.start(*words, "steps=100000")
    first = commands.runs / "s" / "00_lr0.1"
    commands.until(
        lambda: (first / "metrics.jsonl").exists() and (commands.runs / "s" / "01_lr0.3" / "metrics.jsonl").exists(), "two"
    )
    code, _, err = commands(*words, "steps=100000")
    assert code == 2 and "one at a time" in err
    sweep.send_signal(signal.SIGINT)
    out, err = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 130 and "stopped" in out, err
    assert not commands.left() and not (commands.runs / "s" / "02_lr0.2").exists()
    code, _, err = commands(*words, "steps=7")
    assert code == 2 and "another sweep" in err
    [view] = commands.status("s")
    assert [point["state"] for point in view["sweep"]][2] == "waiting"
    code, _, err = commands("cancel", "s")
    assert code == 0 and "no point of s is running" in err


SWEEP = ("--multirun", "--backend", "local", "--command", "steps.py", "name=s", "lr=0.1,0.3,0.2", "steps=100000")


def test_a_cancelled_sweep_starts_no_further_point(commands: Commands) -> None:
    first, others = commands.runs / "s" / "00_lr0.1", ("01_lr0.3", "02_lr0.2")
    for attempt, words in ((1, SWEEP), (2, ("resume", "s"))):  # what was cancelled goes on
        sweep = commands.start(*words)
        commands.until(lambda n=attempt: (first / "attempts" / str(n) / "rank_0.log").exists(), "the first point's steps")
        commands.until(lambda: commands.state("s/00_lr0.1") == "running", "its own word")
        code, _, err = commands("cancel", "s")
        assert code == 0 and "00_lr0.1: stopped (requeue)" in err and "no further point starts" in err, err
        assert sweep.poll() is not None  # cancel has waited for it
        out, err = sweep.communicate(timeout=PATIENCE)
        assert sweep.returncode == 75 and "2 do not start" in err, err
        assert "sweep of 3 points: 1 stopped (requeue), 2 waiting" in out and not commands.left()
        assert not any((commands.runs / "s" / name).exists() for name in others)


def test_a_point_whose_launcher_just_begins_is_cancelled_with_its_sweep(commands: Commands) -> None:
    (commands.folder / "sitecustomize.py").write_text(LATE)
    commands.environment["PYTHONPATH"] = str(commands.folder)
    sweep = commands.start(*SWEEP)
    commands.until(lambda: (commands.runs / "s" / "00_lr0.1" / "launch.log").exists(), "the first point")
    code, _, err = commands("cancel", "s")
    assert code == 0 and "no further point starts" in err, err
    out, err = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 75 and "sweep of 3 points: 3 waiting" in out, err
    assert not list((commands.runs / "s").glob("*/attempts"))


def test_a_sweep_runs_all_points_and_repeats_only_failed_ones(commands: Commands) -> None:
    words = [
        "--multirun",
        "--ranks-per-node",
        "2",
        "--command",
        "steps.py",
        "--backend",
        "local",
        "name=s",
        "lr=0.1,0.3",
        "fail=9,2",
    ]
    code, out, err = commands(*words)
    assert code == 1, err
    rows = [line.split() for line in out.splitlines() if line[:2].isdecimal()]
    assert [(row[0], row[3]) for row in rows][:1] == [("02", "done")] and sum(row[3] == "failed" for row in rows) == 2
    assert "the loss is a fish" in out and (commands.runs / "s" / "sweep.csv").read_text().count("\n") == 5
    code, out, err = commands(*words)
    assert code == 1 and "2 done already, 2 to start" in err
    attempts = {path.parent.name: len(list(path.iterdir())) for path in (commands.runs / "s").glob("*/attempts")}
    assert sorted(attempts.values()) == [1, 1, 2, 2]
    code, _, err = commands(*words, "--keep-failed")
    assert code == 1 and "0 to start" in err
    code, out, _ = commands("status")
    assert "sweep of 4 points: 2 done, 2 failed" in out


def test_a_sweep_on_slurm_is_one_job_array(commands: Commands) -> None:
    require_slurm()
    with SlurmCluster(num_nodes=2) as cluster:
        commands.environment |= {
            key: value for key, value in cluster.environment.items() if key.startswith("SLURM") or key == "PATH"
        }
        words = ["--multirun", "--backend", "slurm", "--ranks-per-node", "1", "--command", "steps.py", "name=s", "lr=0.1,0.3"]
        code, out, err = commands(*words, "--parallel", "1")
        assert code == 0, err
        assert "2 points are job" in err and "sweep of 2 points: 2 done" in out
        jobs = {json.loads(path.read_text())["id"].partition("_")[0] for path in (commands.runs / "s").glob("*/job.json")}
        assert len(jobs) == 1
        code, _, err = commands(*words)
        assert code == 0 and "2 done already, 0 to start" in err
        code, _, err = commands(*words[1:-2], "--detach", "name=long", "steps=100000")
        assert code == 0, err
        commands.until(lambda: (commands.status("long")[0]["step"] or 0) > 0, "steps")
        code, _, err = commands("cancel", "long")
        assert code == 0 and commands.state("long") == "stopped (requeue)", err


def test_the_doctor_looks_at_two_nodes_and_between_them(commands: Commands) -> None:
    code, out, err = commands("doctor", "--nodes", "2", "--backend", "local", "--ranks-per-node", "1", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert code == 0, [check for check in checks.values() if check["result"] == "problem"]
    for name in ("same versions", "clocks", "shared folder", "file locks", "all-reduce"):
        assert checks[name]["result"] == "ok", checks[name]
    assert "gloo, 2 ranks" in checks["all-reduce"]["value"]
    assert list(commands.runs.iterdir()) == []  # nothing stays


def test_the_doctor_finds_a_folder_that_cannot_be_written(commands: Commands) -> None:
    commands.environment["SLURM_CONF"] = str(commands.folder / "none.conf")
    (commands.folder / "file").write_text("")
    code, out, _ = commands("doctor", "--runs", "file/runs", "--backend", "slurm")
    assert code == 1
    problems = [line for line in out.splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 2 and "run folder" in problems[0] and "slurm" in problems[1]


def test_a_training_as_status_shows_it(commands: Commands) -> None:
    data = make_shards(commands.folder / "data")
    words = arguments(data, commands.runs, "tiny", "evaluate.at_end=true", "evaluate.baselines=false")[2:]
    code, _, err = commands("--backend", "local", *words)
    assert code == 0, err
    [view] = commands.status("tiny")
    assert (view["state"], view["step"], view["steps"], view["checkpoint"], view["problem"]) == ("done", 10, 10, 10, None)


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "resume", "profile", "doctor", "--multirun"])
def test_help_needs_no_heavy_library(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *LAUNCH[1:], command, "--help"], capture_output=True, text=True, check=True
    )
    loaded = {
        line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    assert "cluster" in loaded and not loaded & {"torch", "ray", "hydra", "omegaconf", "yaml", "numpy", "submitit"}
    assert done.stdout.startswith(("usage: python cluster/launch.py", "python cluster/launch.py --multirun"))
