"""The Slurm of slurm_cluster.py is a real one: jobs, signals, requeues, preemption, limits, lost daemons; it leaves nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from cluster.processes import processes_with
from tests.integration.slurm_cluster import SlurmCluster, SlurmFault, parse_fields, require_slurm

pytestmark = pytest.mark.slow

# Says which attempt it is, then waits for a signal in a step: what a training job looks like from outside.
WAITS = """#!/bin/bash
echo "attempt ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"
srun bash -c 'trap "echo task $SLURM_PROCID got USR2; exit 7" USR2; echo task $SLURM_PROCID waits; while :; do sleep 0.1; done'
echo "step ended with $?"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    require_slurm()
    with SlurmCluster(num_nodes=8, cpus_per_node=4, gpus_per_node=2, slurmd_timeout_s=5) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def job_with_a_limit(cluster: SlurmCluster) -> str:
    """Limits are looked at every 30 s; so this job runs, on a node of its own, while the other tests do."""
    job = cluster.sbatch(
        "#!/bin/bash\ntrap 'echo got TERM' TERM\nwhile :; do sleep 0.1; done\n", "--nodelist=n8", "--exclusive", "--time=9"
    )
    cluster.wait_for_state(job, "RUNNING")
    cluster.end_in(job, 5)
    return job


@pytest.fixture(scope="module", autouse=True)
def job_without_a_slurmd(cluster: SlurmCluster) -> str:
    """A lost slurmd is noticed after some 13 s, so it is killed before the other tests."""
    job = waiting_job(cluster, "--nodes=2", "--nodelist=n6,n7", "--exclusive")
    cluster.kill_slurmd("n6")
    return job


def waiting_job(cluster: SlurmCluster, *options: str, tasks: int = 2) -> str:
    """A job whose tasks all wait for a signal."""
    job = cluster.sbatch(WAITS, *options)
    cluster.until(lambda: cluster.output(job).count("waits") == tasks, f"all tasks of job {job} wait")
    return job


def test_a_job_runs_its_tasks_on_its_nodes(cluster: SlurmCluster) -> None:
    script = "#!/bin/bash\nsrun bash -c 'echo $SLURM_PROCID $SLURMD_NODENAME $SLURM_LOCALID $CUDA_VISIBLE_DEVICES'\n"
    job = cluster.sbatch(script, "--nodes=2", "--ntasks-per-node=2", "--nodelist=n2,n3", "--gpus-per-node=2")
    assert cluster.wait_for_state(job, "COMPLETED").exit_code == 0
    assert sorted(cluster.output(job).splitlines()) == ["0 n2 0 0,1", "1 n2 1 0,1", "2 n3 0 0,1", "3 n3 1 0,1"]


def test_squeue_shows_the_end_time_and_a_signal_reaches_the_step(cluster: SlurmCluster) -> None:
    job = waiting_job(cluster, "--nodes=2", "--time=30")
    start, end = (field.split("T")[0] for field in cluster.run("squeue", "-h", "-j", job, "-o", "%S %e").split())
    assert start <= end and parse_fields(cluster.run("scontrol", "show", "job", "-o", job))["TimeLimit"] == "00:30:00"
    cluster.run("scancel", "--signal=USR2", job)
    cluster.wait_for_state(job, "COMPLETED")
    said = cluster.output(job)
    assert "task 0 got USR2" in said and "task 1 got USR2" in said and "step ended with 7" in said


def test_requeue_starts_the_same_job_again(cluster: SlurmCluster) -> None:
    job = waiting_job(cluster, "--nodes=2")
    cluster.run("scontrol", "requeue", job)
    cluster.until(lambda: "attempt 1" in cluster.output(job), "the second attempt starts")
    assert cluster.output(job).startswith("attempt 0") and cluster.job(job).restarts == 1
    cluster.run("scancel", job)
    cluster.wait_for_state(job, "CANCELLED")


def test_a_higher_partition_takes_the_nodes(cluster: SlurmCluster) -> None:
    where = ("--nodelist=n4,n5", "--nodes=2", "--exclusive")
    low = waiting_job(cluster, *where, "--partition=normal")
    high = cluster.sbatch("#!/bin/bash\necho here\n", *where, "--partition=urgent")
    cluster.wait_for_state(high, "COMPLETED")
    cluster.until(lambda: "attempt 1 on n[4-5]" in cluster.output(low), "the preempted job comes back")
    assert cluster.job(low).restarts == 1
    cluster.run("scancel", low)


def test_what_cannot_run_is_refused_or_waits_for_ever(cluster: SlurmCluster) -> None:
    for option in ("--gpus-per-node=3", "--partition=none", "--constraint=none"):
        with pytest.raises(SlurmFault, match="sbatch: error"):
            cluster.sbatch("#!/bin/bash\n", option)
    with pytest.raises(SlurmFault, match="Requested node configuration is not available"):
        cluster.sbatch("#!/bin/bash\n", "--nodes=9", "--test-only")
    job = cluster.sbatch("#!/bin/bash\n", "--nodes=9")  # Slurm's default is to take it: nodes may be added one day
    waiting = cluster.job(job)  # the reason is PartitionNodeLimit, or PartitionConfig while a node is not available
    assert waiting.state == "PENDING" and waiting.fields["Reason"].startswith("Partition")
    cluster.run("scancel", job)


def test_a_failed_job_is_told_with_its_output(cluster: SlurmCluster) -> None:
    job = cluster.sbatch("#!/bin/bash\necho the reason\nexit 5\n")
    with pytest.raises(SlurmFault, match=rf"job {job} ended as FAILED, not COMPLETED\nthe reason"):
        cluster.wait_for_state(job, "COMPLETED")
    assert cluster.job(job).exit_code == 5


def test_a_drained_node_gets_no_job(cluster: SlurmCluster) -> None:
    cluster.drain("n1")
    cluster.wait_for_nodes("DRAINED", "n1")
    job = cluster.sbatch("#!/bin/bash\ntrue\n", "--nodelist=n1")
    cluster.until(lambda: cluster.job(job).fields["Reason"] not in ("None", "Priority"), "the job is looked at")
    assert cluster.state(job) == "PENDING"
    cluster.resume("n1")
    cluster.wait_for_state(job, "COMPLETED")


def test_nothing_is_left_even_after_an_exception(cluster: SlurmCluster) -> None:
    """A second cluster beside the first; its job has left its session and has a child that is nobody's."""
    with pytest.raises(KeyError, match="ours"), SlurmCluster(num_nodes=1) as second:
        assert {"n1"} == set(second.run("sinfo", "-h", "-N", "-o", "%N").split())
        job = second.sbatch("#!/bin/bash\nsetsid sleep 4242 &\necho started\nsleep 4242\n")
        second.until(lambda: "started" in second.output(job), "the job runs")
        second.kill_node("n1")
        survivors = second.processes()
        assert len(survivors) >= 2 and not any(b"sleep" in argv(pid) for pid in survivors)
        second.start_slurmd("n1")
        raise KeyError("ours")
    assert not second.processes() and not second.folder.exists()
    assert len(cluster.nodes) + 2 <= len(cluster.processes())


def argv(pid: int) -> bytes:
    return subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True).stdout


def test_time_limits_in_seconds(cluster: SlurmCluster, job_with_a_limit: str) -> None:
    cluster.wait_for_state(job_with_a_limit, "TIMEOUT")
    assert "got TERM" in cluster.output(job_with_a_limit)
    assert not processes_with({"SLURM_JOB_ID": job_with_a_limit, "SLURM_CONF": cluster.environment["SLURM_CONF"]})


def test_a_lost_slurmd_takes_its_node_down_and_requeues_its_job(cluster: SlurmCluster, job_without_a_slurmd: str) -> None:
    cluster.until(lambda: cluster.node_state("n6").startswith("DOWN"), "n6 is down")
    cluster.until(lambda: cluster.job(job_without_a_slurmd).restarts == 1, "its job is requeued")
    cluster.kill_node("n6")  # its tasks of the first attempt live on; a slurmd that finds them ends the second attempt for them
    cluster.start_slurmd("n6")
    cluster.until(lambda: "attempt 1" in cluster.output(job_without_a_slurmd), "the second attempt starts")
    cluster.run("scancel", job_without_a_slurmd)


def test_the_controller_can_be_away_and_remembers(cluster: SlurmCluster) -> None:
    job = waiting_job(cluster, "--nodes=1", tasks=1)
    cluster.stop_controller()
    with pytest.raises(SlurmFault, match="Unable to contact slurm controller"):
        cluster.sbatch("#!/bin/bash\n")
    cluster.start_controller()
    assert cluster.state(job) == "RUNNING"
    cluster.run("scancel", job)
