"""The Slurm backend on a real Slurm: what is submitted, how it ends, and that it comes back after every kind of interruption.

Small Python programs stand in for the trainer, but for one run. All jobs of the module are started together on their own nodes,
and their faults are made as soon as they run: a requeue takes Slurm some 15 s, whatever the job does.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from cluster.backends import slurm, slurm_commands
from cluster.backends.slurm_script import parsed
from cluster.config import LaunchError, parse
from cluster.processes import processes_with, signal_process
from tests.integration.slurm_cluster import SlurmCluster, require_slurm
from tests.integration.tiny_run import applied_ids, arguments, make_shards, weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, str(ROOT / "cluster" / "launch.py")]

# Counts steps, saves on SIGTERM and SIGUSR2 after a while, goes on where it was; ends 10 steps after an attempt that followed.
COUNTS = """
import os, signal, sys, time
from pathlib import Path
run, rank = Path(os.environ["SLOTSTREAM_RUN_DIR"]), os.environ["RANK"]
asked = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: asked.append(number))
state, applied = run / f"state_{rank}", run / f"applied_{rank}"
first = step = int(state.read_text()) if state.exists() else 0
always = "always" in sys.argv[1:]
def save():
    part = state.with_suffix(".part")
    part.write_text(str(step))
    os.replace(part, state)
def finished():
    return (run / "finish").exists() or (first and step >= first + 10)
(run / f"ready_{os.environ['SLOTSTREAM_ATTEMPT']}_{rank}").touch()
while not asked and not finished():
    time.sleep(0.1)
    step += 1
    with open(applied, "a") as stream:
        stream.write(f"{step}\\n")
    if always:
        save()
if asked:
    time.sleep(0.5)
    save()
    print("saved", step, flush=True)
    os._exit(75)
print("finished at", step, "world", os.environ["WORLD_SIZE"], flush=True)
"""


class Launched:
    """A launch in the cluster's environment; its run folder is <folder>/runs/<name>."""

    def __init__(self, cluster: SlurmCluster, folder: Path, name: str, *words: str, command: str | None = "always") -> None:
        self.cluster, self.name, self.run_dir = cluster, name, folder / "runs" / name
        program = folder / "counts.py"
        program.write_text(COUNTS)
        ours = ["--backend", "slurm", "--gpus-per-node", "0", "--runs", str(folder / "runs")]
        ours += ["--command", f"{program} {command}"] if command is not None else []
        self.words = [*ours, *words, f"name={name}"]
        self.output = folder / f"{name}.out"
        with self.output.open("w") as stream:
            self.process = subprocess.Popen(
                [*LAUNCH, *self.words], cwd=folder, env=environment(cluster), stdout=stream, stderr=stream
            )

    @property
    def job(self) -> str:
        return json.loads((self.run_dir / "job.json").read_text())["id"]

    def wait_for(self, attempt: int, *ranks: int) -> None:
        paths = [self.run_dir / f"ready_{attempt}_{rank}" for rank in ranks]
        self.cluster.until(lambda: all(path.exists() for path in paths), f"{self.name}: attempt {attempt} runs\n{self.said()}")
        time.sleep(0.3)

    def said(self) -> str:
        return self.output.read_text()

    def end(self) -> int:
        return self.process.wait(120)

    def applied(self, rank: int = 0) -> list[int]:
        return [int(word) for word in (self.run_dir / f"applied_{rank}").read_text().split()]

    def events(self, kind: str) -> list[dict]:
        lines = (self.run_dir / "events.jsonl").read_text().splitlines()
        return [event for line in lines if (event := json.loads(line))["event"] == kind]

    def pids(self, attempt: int = 1) -> dict[int, int]:
        found: dict[int, int] = {}
        for path in (self.run_dir / "attempts" / str(attempt)).glob("node_*.jsonl"):
            found.update({int(rank): pid for rank, pid in json.loads(path.read_text().splitlines()[0])["pids"].items()})
        return found


def environment(cluster: SlurmCluster) -> dict[str, str]:
    dropped = ("CUDA_VISIBLE_DEVICES", "SLOTSTREAM_RUN_DIR", "SLOTSTREAM_ATTEMPT")
    return {**{key: value for key, value in cluster.environment.items() if key not in dropped}, "OMP_NUM_THREADS": "1"}


def agent_of(launched: Launched, slot: int) -> int:
    """Process id of the agent of a slot; the srun that started it carries the same words."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:
            continue
        if (
            words[1:2]
            and words[1].endswith("cluster/agent.py")
            and str(launched.run_dir) in words
            and f"--slot\0{slot}\0" in "\0".join(words)
        ):
            return int(entry.name)
    raise AssertionError(f"no agent of slot {slot}")


# -- the module's jobs ---------------------------------------------------------------------------------------------------


def on(nodes: str, *more: str) -> tuple[str, ...]:
    return ("--nodes", "2", "--sbatch", f"nodelist={nodes}", "--time", "30", *more)


FREE = ("--sbatch", "exclude=n[5-14]")  # for the jobs that have no fault: no node that dies


def preempt(cluster: SlurmCluster, job: str) -> None:
    cluster.sbatch("#!/bin/bash\nsleep 1\n", "--nodelist=n7,n8", "--nodes=2", "--exclusive", "--partition=urgent")


INTERRUPTIONS: Mapping[str, Callable[[SlurmCluster, str], object]] = {
    "signal_to_the_steps": lambda cluster, job: cluster.run("scancel", "--signal=USR2", job),
    "signal_to_the_batch_step": lambda cluster, job: cluster.run("scancel", "--batch", "--signal=USR2", job),
    "requeue": lambda cluster, job: cluster.run("scontrol", "requeue", job),
    "preempted": preempt,
    "limit": lambda cluster, job: cluster.end_in(job, 60),
}
PLACES = {"preempted": on("n7,n8", "--exclusive")}


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    require_slurm()
    with SlurmCluster(num_nodes=14, cpus_per_node=8, gpus_per_node=1, slurmd_timeout_s=5, kill_wait_s=10) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module", autouse=True)
def jobs(cluster: SlurmCluster, folder: Path) -> dict[str, Launched]:
    """All jobs whose faults are Slurm's business, with their faults made."""
    found = {name: Launched(cluster, folder, name, *PLACES.get(name, on("n1,n2")), command="") for name in INTERRUPTIONS}
    found["killed_rank"] = Launched(cluster, folder, "killed_rank", *on("n3,n4"))
    found["killed_agent"] = Launched(cluster, folder, "killed_agent", *on("n3,n4"))
    found["lost_slurmd"] = Launched(cluster, folder, "lost_slurmd", *on("n5,n6"))
    shrinking = ("--min-nodes", "1", "--node-patience", "1")
    found["lost_node"] = Launched(cluster, folder, "lost_node", *on("n9,n10"), *shrinking)
    found["lost_first_node"] = Launched(cluster, folder, "lost_first_node", *on("n11,n12"), *shrinking)
    for launched in found.values():
        launched.wait_for(1, 0, 1)
    found["dead_at_start"] = late = Launched(cluster, folder, "dead_at_start", *on("n13,n14"))
    (late.run_dir / "finish").parent.mkdir(parents=True, exist_ok=True)
    (late.run_dir / "finish").touch()
    cluster.kill_node("n14")  # before the job is there; Slurm finds out some 13 s later
    for name, interrupt in INTERRUPTIONS.items():
        interrupt(cluster, found[name].job)
    signal_process(found["killed_rank"].pids()[1], signal.SIGKILL)
    signal_process(agent_of(found["killed_agent"], 1), signal.SIGKILL)
    cluster.kill_slurmd("n6")
    cluster.kill_node("n10")
    cluster.kill_node("n11")
    return found


@pytest.fixture(scope="module", autouse=True)
def trained(jobs: dict[str, Launched], cluster: SlurmCluster, folder: Path) -> dict[str, Launched]:
    """The same small training on Slurm and on this machine, beside everything else."""
    data = make_shards(folder / "data")
    overrides = [
        word
        for word in arguments(data, folder / "runs", "x", "optim.max_steps=4")[2:]
        if word.partition("=")[0] not in ("name", "runs")
    ]
    words = ("--nodes", "4", *overrides)
    return {
        name: Launched(cluster, folder, name, *where, *words, command=None)
        for name, where in {"trained_slurm": FREE, "trained_local": ("--backend", "local")}.items()
    }


# -- what the jobs show --------------------------------------------------------------------------------------------------


def test_the_script_is_what_runs_and_runs_alone(
    cluster: SlurmCluster, folder: Path, monkeypatch: pytest.MonkeyPatch, jobs: dict[str, Launched]
) -> None:
    path = folder / "job.sh"
    words = ["--backend", "slurm", "--runs", str(folder / "runs"), "--gpus-per-node", "0", "--nodes", "2", "--time", "5"]
    words += [*FREE, "--setup", "export MARK=here", "--command", f"{folder / 'counts.py'} always", "name=alone"]
    monkeypatch.chdir(folder)
    assert slurm.launch(parse(["--script", str(path), *words]), ["--script", str(path), *words]) == 0
    assert slurm.render(parse(words), words).startswith(path.read_text())
    assert "export MARK=here" in path.read_text().splitlines()
    (folder / "runs" / "alone" / "finish").touch()
    job = cluster.run("sbatch", "--parsable", str(path)).strip()
    cluster.wait_for_state(job, "COMPLETED")
    log = (folder / "runs" / "alone" / "slurm" / f"job_{job}.log").read_text()
    assert "2 nodes x 1 rank on CPU, backend slurm" in log and "finished at 0 world 2" in log
    assert json.loads((folder / "runs" / "alone" / "job.json").read_text())["id"] == job
    submitted = Launched(cluster, folder, "alone", *words[6:-3], "--sbatch", "comment=c", command="always")
    assert submitted.end() == 0, submitted.said()
    ran = parsed((submitted.run_dir / "slurm" / f"{submitted.job}_submission.sh").read_text())
    assert ran.pop("comment").startswith("c slotstream ") and ran == parsed(path.read_text())


def test_bad_input_is_one_line_and_nothing_is_submitted(
    cluster: SlurmCluster, folder: Path, monkeypatch: pytest.MonkeyPatch, jobs: dict[str, Launched]
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    before = cluster.run("squeue", "--noheader", "--format=%i")
    for asked, says in {
        ("--nodes", "15"): "--nodes 15; the default partition has 14",
        ("--partition", "nromal"): "--partition nromal is not known to Slurm; it has normal, urgent",
        ("--gpus-per-node", "2"): "Slurm refuses the job: Requested node configuration is not available",
        ("--constraint", "none"): "Slurm refuses the job: Invalid feature specification",
        ("--time", "soon"): "--time soon; a time limit is needed",
        ("--sbatch", "array=3"): "the launcher sets array itself",
    }.items():
        words = ["--backend", "slurm", "--runs", str(folder / "runs"), *asked, "name=refused"]
        with pytest.raises(LaunchError) as refused:
            slurm.launch(parse(words), words)
        assert says in str(refused.value) and "\n" not in str(refused.value)
    assert not (folder / "runs" / "refused").exists()
    assert set(cluster.run("squeue", "--noheader", "--format=%i").split()) <= set(before.split())


def test_a_second_job_for_the_folder_is_refused_and_ctrl_c_saves_for_good(cluster: SlurmCluster, folder: Path) -> None:
    first = Launched(cluster, folder, "stopped", "--nodes", "1", *FREE, command="")
    first.wait_for(1, 0)
    second = Launched(cluster, folder, "stopped", "--nodes", "1", *FREE, command="")
    assert second.end() == 2 and f"is in use: job {first.job} is RUNNING" in second.said(), second.said()
    assert second.said().count("\n") == 1
    first.process.send_signal(signal.SIGINT)
    assert first.end() == 130, first.said()
    assert cluster.wait_for_state(first.job, "FAILED").exit_code == 75
    assert int((first.run_dir / "state_0").read_text()) == first.applied()[-1] and cluster.job(first.job).restarts == 0


def test_detached_jobs_are_asked_and_stopped_by_their_record(
    cluster: SlurmCluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    launched = Launched(cluster, folder, "detached", "--nodes", "1", *FREE, "--detach", command="")
    assert launched.end() == 0 and "follow it with" in launched.said()
    record = json.loads((launched.run_dir / "job.json").read_text())
    launched.wait_for(1, 0)
    assert slurm.state(record).name == "running"
    slurm.cancel(record, False)
    cluster.until(lambda: slurm.state(record).name == "ended", "it ends")
    assert (launched.run_dir / "state_0").exists()
    waiting = cluster.sbatch("#!/bin/bash\n", "--begin=now+1hour")
    assert slurm.state({"id": waiting}).name == "queued"
    slurm.cancel({"id": waiting}, False)
    assert slurm.state({"id": waiting}).name == "ended" and slurm.state({"id": "999999"}).name == "ended"


def test_an_array_runs_each_point_in_its_folder(cluster: SlurmCluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(cluster).items():
        monkeypatch.setenv(name, value)
    points = []
    for number in range(2):
        words = [*FREE, "--runs", str(folder / "runs"), "--gpus-per-node", "0", "--command", f"{folder / 'counts.py'} always"]
        points.append((parse([*words, f"name=point{number}"]), [*words, f"name=point{number}"]))
        (folder / "runs" / f"point{number}").mkdir(parents=True)
        (folder / "runs" / f"point{number}" / "finish").touch()
    ids = slurm.submit_array(points)
    assert [number.partition("_")[2] for number in ids] == ["0", "1"]
    for (config, _), job in zip(points, ids, strict=True):
        cluster.until(lambda job=job: slurm.state({"id": job}).name == "ended", f"{job} ends")
        assert "finished at 0" in (Path(config.run_dir) / "slurm" / f"job_{job}.log").read_text()
        assert json.loads((Path(config.run_dir) / "job.json").read_text())["id"] == job


def test_a_killed_rank_or_agent_is_replaced_within_the_job(cluster: SlurmCluster, jobs: dict[str, Launched]) -> None:
    for name, cause in {"killed_rank": "signal", "killed_agent": "lost_node"}.items():
        launched = jobs[name]
        assert launched.end() == 0, launched.said()
        assert launched.events("verdict")[0]["cause"] == cause and cluster.job(launched.job).restarts == 0
        assert launched.applied() == list(range(1, len(launched.applied()) + 1))


def test_a_dead_node_is_left_out(cluster: SlurmCluster, jobs: dict[str, Launched]) -> None:
    """Elastic: --min-nodes 1 goes on with the node that is left, in the same job."""
    launched = jobs["lost_node"]
    assert launched.end() == 0, launched.said()
    assert launched.said().rstrip().rpartition("finished")[2].split()[:4] == ["at", str(launched.applied()[-1]), "world", "1"]
    assert cluster.job(launched.job).restarts == 0 and launched.events("lost")


def test_training_on_slurm_equals_training_here(trained: dict[str, Launched]) -> None:
    for launched in trained.values():
        assert launched.end() == 0, launched.said()[-3000:]
    here, there = trained["trained_local"].run_dir, trained["trained_slurm"].run_dir
    assert applied_ids(here, 4) == applied_ids(there, 4) and len(applied_ids(here, 4)) == 4
    left, right = weights(here, 4), weights(there, 4)
    assert left.keys() == right.keys()
    assert all((left[key] == right[key]).all() for key in left)


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interruption_is_saved_requeued_and_resumed(cluster: SlurmCluster, jobs: dict[str, Launched], name: str) -> None:
    launched = jobs[name]
    assert launched.end() == 0, launched.said()
    assert cluster.job(launched.job).restarts == 1
    assert len(launched.events("session")) == 2
    for rank in (0, 1):  # each step was applied once: nothing was lost, nothing done twice
        assert launched.applied(rank) == list(range(1, len(launched.applied(rank)) + 1))


def test_a_lost_slurmd_starts_the_job_again(cluster: SlurmCluster, jobs: dict[str, Launched]) -> None:
    launched = jobs["lost_slurmd"]
    cluster.until(lambda: cluster.job(launched.job).restarts == 1, "its job is requeued")
    cluster.until(lambda: len(launched.events("end")) == 1, "its first session has ended")
    cluster.kill_node("n6")
    cluster.start_slurmd("n6")
    assert launched.end() == 0, launched.said()
    assert launched.applied() == list(range(1, len(launched.applied()) + 1))


def test_a_dead_first_node_starts_the_job_again(cluster: SlurmCluster, jobs: dict[str, Launched]) -> None:
    """With --min-nodes Slurm lets the job outlive its batch step, and would keep the other node for nothing."""
    launched = jobs["lost_first_node"]
    cluster.until(lambda: cluster.job(launched.job).restarts == 1, "its job is requeued")
    cluster.start_slurmd("n11")
    assert launched.end() == 0, launched.said()
    assert launched.applied() == list(range(1, len(launched.applied()) + 1))


def test_a_node_that_is_dead_at_the_start_is_slurms_to_replace(cluster: SlurmCluster, jobs: dict[str, Launched]) -> None:
    launched = jobs["dead_at_start"]
    cluster.until(lambda: cluster.node_state("n14").startswith("DOWN"), "n14 is down")
    cluster.start_slurmd("n14")
    assert launched.end() == 0, launched.said()
    assert cluster.job(launched.job).restarts >= 1 and not launched.events("attempt")[1:]


def test_nothing_is_left(cluster: SlurmCluster, jobs: dict[str, Launched], trained: dict[str, Launched]) -> None:
    for launched in (*jobs.values(), *trained.values()):
        assert launched.process.poll() is not None
        assert not processes_with({"SLOTSTREAM_RUN_DIR": str(launched.run_dir)}), launched.name
    cluster.until(lambda: not cluster.run("squeue", "--noheader"), "the queue is empty")


def test_a_controller_that_is_away_gets_a_clear_error(
    cluster: SlurmCluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test: the controller comes back for the fixture's end only."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setattr(slurm_commands, "TRIES", 1)
    words = ["--runs", str(folder / "runs"), "name=away"]
    cluster.stop_controller()
    with pytest.raises(LaunchError, match="Slurm's controller does not answer: .*; tried 1 times, nothing is submitted"):
        slurm.launch(parse(words), words)
    assert not (folder / "runs" / "away" / "job.json").exists()
    cluster.start_controller()
