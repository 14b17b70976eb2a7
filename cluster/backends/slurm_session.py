"""The batch step of a job: one supervised session, then the decision whether Slurm starts the job again.

In: the configuration and Slurm's environment. Out: the exit code; after code 75 a requeued job, within a limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.backends import slurm_commands as slurm
from cluster.backends.slurm_script import folder, job_words
from cluster.backends.srun import SrunPlacement
from cluster.config import LaunchConfig
from cluster.flags import LaunchError
from cluster.placement import Session
from cluster.processes import write_json
from cluster.run_folder import job_file, newest_checkpoint, write_job
from cluster.verdict import REQUEUE

OWNER_PATIENCE = 120.0  # seconds in which a first start of this job, on a node whose slurmd died, must have ended
REQUEUE_PATIENCE = 600.0  # seconds of a controller that does not answer
KILL_PATIENCE = 60.0  # seconds from our requeue to the end that Slurm makes
HELD = (signal.SIGTERM, signal.SIGUSR2)
IN_USE = "is in use by"


def in_job(config: LaunchConfig, words: Sequence[str]) -> int:
    """The batch step: supervise one session; after code 75 have Slurm start the job again. Raises: LaunchError."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise LaunchError("--in-job outside a job; it is what the batch script runs; use sbatch, or --backend slurm")
    try:
        nodes = slurm.host_names(os.environ["SLURM_JOB_NODELIST"])
        config = _as_allocated(config, nodes)
    except slurm.SlurmError as error:
        raise LaunchError(f"Slurm does not say which nodes job {job} has: {error}") from None
    name = array_name(os.environ) or job
    if recorded_job(job_file(Path(config.run_dir), config.job)) != name:  # a plain script that was submitted by hand
        write_job(Path(config.run_dir), config.job, "slurm", name, job_words(words))
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)  # the supervisor unblocks them: what comes until then waits
    if was_cancelled(job):
        say("the job was asked to stop before it began")
        return REQUEUE
    started = time.time()
    code = _supervise(config, job, nodes, words)
    if code != REQUEUE or (config.max_time is not None and time.time() - started >= config.max_time):
        return code
    return start_again(config, job, name)


def recorded_job(path: Path) -> str | None:
    """The id in a job's file."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return str(record.get("id")) if isinstance(record, dict) else None


def was_cancelled(job: str) -> bool:
    """`cancel` forbids the requeue before it signals: a signal that came too early for anybody to hear it is not lost."""
    with contextlib.suppress(slurm.SlurmError):
        return (slurm.job_fields(job) or {}).get("Requeue") == "0"
    return False


def _as_allocated(config: LaunchConfig, nodes: Sequence[str]) -> LaunchConfig:
    """The configuration on these nodes: the address for the agents, and as many nodes as Slurm gave."""
    changes: dict[str, Any] = {}
    if len(nodes) != config.nodes:
        say(f"{len(nodes)} nodes were allocated, --nodes says {config.nodes}: using {len(nodes)}")
        changes["nodes"] = len(nodes)
        if config.min_nodes is not None:
            changes["min_nodes"] = min(config.min_nodes, len(nodes))
    if config.listen is None and config.interface is None:
        changes["listen"] = slurm.node_address(os.environ.get("SLURMD_NODENAME", nodes[0]))
    return dataclasses.replace(config, **changes)


def _supervise(config: LaunchConfig, job: str, nodes: Sequence[str], words: Sequence[str]) -> int:
    """One session. After a requeue the one before may still live where its slurmd died; it ends itself, so it is waited for.

    A node that is dead before its agent has reported is Slurm's to replace: the job is started again, on others.
    """
    from cluster.supervision.supervisor import supervise

    def make(session: Session) -> SrunPlacement:
        return SrunPlacement(session, job, nodes)

    deadline = time.monotonic() + OWNER_PATIENCE
    while True:
        try:
            return supervise(config, "slurm", make, words)
        except LaunchError as error:
            if IN_USE not in str(error) and (dead := down_nodes(nodes)):
                say(f"{error}; {', '.join(dead)} of this job is down")
                return REQUEUE
            again = os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and IN_USE in str(error)
            if not again or time.monotonic() > deadline:
                raise
            time.sleep(2.0)


def down_nodes(nodes: Sequence[str]) -> list[str]:
    """Those of the nodes that Slurm has lost; none when it cannot be asked."""
    with contextlib.suppress(slurm.SlurmError):
        live = slurm.live_nodes(nodes)
        return [node for node in nodes if node not in live]
    return []


def array_name(environment: Mapping[str, str]) -> str | None:
    """12_3 for a task of a job array."""
    parent, index = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{parent}_{index}" if parent and index else None


def start_again(config: LaunchConfig, job: str, name: str) -> int:
    """`scontrol requeue`, unless Slurm does it itself, the job was cancelled, or it has gone on too long without progress."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)  # Slurm's own, for the end of this start
    with contextlib.suppress(slurm.SlurmError):
        if not is_ours(slurm.job_fields(job) or {}, os.environ):
            return REQUEUE
    if was_cancelled(job):
        say("saved; the job was asked to stop, so it is not started again")
        return REQUEUE
    if not count_requeue(config, name):
        say(f"started again {config.max_requeues} times without a newer checkpoint (--max-requeues); the job ends here, saved")
        return REQUEUE
    deadline = time.monotonic() + REQUEUE_PATIENCE
    while True:
        try:
            slurm.run("scontrol", "requeue", job)
            break
        except slurm.Unreachable as error:
            if time.monotonic() > deadline:
                say(f"saved, but Slurm's controller does not answer, so the job is not started again: {error}")
                return REQUEUE
            time.sleep(2.0)
        except slurm.SlurmError as error:
            if not _requeued_meanwhile(job):
                say(f"saved, but Slurm does not start the job again: {error}; submit it again")
            return REQUEUE
    say("saved; Slurm starts the job again")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    time.sleep(KILL_PATIENCE)  # it ends this start now; an end of our own would race with that
    return REQUEUE


def is_ours(found: Mapping[str, str], environment: Mapping[str, str]) -> bool:
    """True when nobody else decides what becomes of the job: it runs, or has just met its time limit."""
    if found.get("Restarts", "0") != environment.get("SLURM_RESTART_COUNT", "0"):
        return False
    return found.get("JobState") in ("RUNNING", "TIMEOUT")


def _requeued_meanwhile(job: str) -> bool:
    with contextlib.suppress(slurm.SlurmError):
        return not is_ours(slurm.job_fields(job) or {}, os.environ)
    return False


def count_requeue(config: LaunchConfig, name: str) -> bool:
    """Count one more start of this job in the run folder; False when the budget is used up. A newer checkpoint refills it."""
    path = folder(config.run_dir) / "requeues.json"
    newest = newest_checkpoint(Path(config.run_dir))
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = {}
    before = before if isinstance(before, dict) else {}
    same = before.get("job") == name and before.get("newest") == newest
    count = int(before.get("count", 0)) + 1 if same else 1
    if count > config.max_requeues:
        return False
    with contextlib.suppress(OSError):  # a full disk: one start too many is better than a saved job that ends
        write_json(path, {"job": name, "newest": newest, "count": count})
    return True


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
