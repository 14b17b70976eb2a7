"""Starts a node's agent and, after it, sees whether the first node is dead: `slurm_guard.py HUB JOB AGENT-WORDS...`, a program.

A job with --no-kill outlives its nodes, its first one too; but with that the batch step is gone, and Slurm would keep the other
nodes idle until the time limit. Any agent's guard then has Slurm start the job again. It runs where --min-nodes is given.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: this folder must not be where modules are looked for
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cluster.backends import slurm_commands as slurm
from cluster.hub import parse_address
from cluster.processes import exit_of

LOOK_EVERY = 5.0


def main(argv: Sequence[str]) -> int:
    """The agent's exit code, once the supervisor answers, the job has ended, or has been requeued."""
    hub, job, *words = argv
    for number in (signal.SIGTERM, signal.SIGUSR2):  # the agent gets them, too, and decides
        signal.signal(number, signal.SIG_IGN)
    code, _ = exit_of(subprocess.call(words))
    while not answers(hub):
        with contextlib.suppress(slurm.SlurmError):
            found = slurm.job_fields(job) or {}
            if found.get("JobState") != "RUNNING" or found.get("Restarts", "0") != os.environ.get("SLURM_RESTART_COUNT", "0"):
                break
            if found.get("BatchHost") not in slurm.host_names(found["NodeList"]):
                slurm.run("scontrol", "requeue", job)
                break
        time.sleep(LOOK_EVERY)
    return code


def answers(hub: str) -> bool:
    """Whether the supervisor still listens."""
    try:
        socket.create_connection(parse_address(hub), timeout=LOOK_EVERY).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
