"""Agents on the nodes of a Slurm allocation: one `srun` of one task per slot, each a step of its own.

A step per slot, so that a lost agent can be started again on a live node and a dead node costs one slot only.
In: the session and the allocation's nodes. Out: agents that report to the hub. Runs in the batch step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from cluster.backends import slurm_commands as slurm
from cluster.backends.slurm_script import agent_words, folder, more_options, visible_environment
from cluster.placement import Session
from cluster.processes import exit_of, signal_process

GUARD = str(Path(__file__).with_name("slurm_guard.py"))
ASK_AGAIN = 15.0  # seconds between two looks at the end time: an administrator may move it
CLOSE_WITHIN = 15.0  # agents that were sent away end in ten
KILL_WITHIN = 5.0
CONTROLLER_WITHIN = 5.0  # the supervisor has other things to do than to wait for Slurm
# A step outlives an srun that was killed, so it is the step that is killed; its id is known only to Slurm.
KILL_STEP = """squeue --noheader --steps --jobs="$1" --format='%i %j' | while read -r step name; do
[ "$name" = "$2" ] && scancel --signal=KILL "$step"; done"""


class EndTime:
    """When this job ends. Asked beside the supervisor's work: a controller that is away must not hold it up."""

    def __init__(self, job: str) -> None:
        given = os.environ.get("SLURM_JOB_END_TIME", "")
        self.seconds = float(given) if given.isdigit() else None
        self._restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        self._words = ["scontrol", "show", "job", "-o", job]
        self._environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
        self._asking: subprocess.Popen[str] | None = None
        self._asked = float("-inf")

    def look(self) -> float | None:
        """The newest answer there is: seconds since the epoch, None without a limit.

        The job's own past end once Slurm has started it again without us: this node's slurmd is dead, so nobody told us.
        """
        now = time.monotonic()
        if self._asking is None and now - self._asked >= ASK_AGAIN:
            self._asked = now
            self._asking = subprocess.Popen(self._words, env=self._environment, text=True, stdin=subprocess.DEVNULL,
                                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
        elif self._asking is not None and self._asking.poll() is not None:
            found = slurm.fields(self._asking.communicate()[0])
            self._asking = None
            if found.get("Restarts", self._restarts) != self._restarts:
                self.seconds = 0.0
            elif found.get("JobState") == "RUNNING":
                end = found.get("EndTime", "")
                self.seconds = float(end) if end.isdigit() else None
        return self.seconds

    def close(self) -> None:
        if self._asking is not None:
            self._asking.kill()
            self._asking.communicate()
            self._asking = None


class SrunPlacement:
    """A Placement: see cluster/placement.py."""

    replaces = True

    def __init__(self, session: Session, job: str, nodes: Sequence[str]) -> None:
        self._session, self._job, self._nodes = session, job, list(nodes)
        self._where = dict(enumerate(self._nodes))
        self._steps: dict[int, subprocess.Popen[bytes]] = {}
        self._names: dict[int, str] = {}
        self._nowhere: dict[int, str] = {}  # slots without a node that could take them
        self._past: list[subprocess.Popen[bytes]] = []  # sruns of earlier agents, and errands
        self._count = 0
        self._end = EndTime(job)
        folder(session.config.run_dir).mkdir(parents=True, exist_ok=True)

    @property
    def ends_at(self) -> float | None:
        return self._end.look()

    def place(self, slot: int) -> None:
        if slot in self._steps:
            self.signal(slot, signal.SIGKILL)
            self._past.append(self._steps.pop(slot))
            self._choose_node(slot)
        elif slot in self._nowhere:
            self._choose_node(slot)
        if slot in self._nowhere:
            return
        self._count += 1
        self._names[slot] = f"agent{slot}.{self._count}"
        self._steps[slot] = subprocess.Popen(
            self.words(slot),
            env={**visible_environment(os.environ), **self._session.environment()},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def words(self, slot: int) -> list[str]:
        """The srun of a slot. Bound to nothing and with all of the node's memory: the agent shares those out itself."""
        config = self._session.config
        options, command = agent_words(config, self._session.words(slot))
        if config.least_nodes < config.nodes and not options:  # not inside Pyxis: there is no Slurm in the image
            command = [sys.executable, GUARD, self._session.hub, self._job, *command]
        more = [f"--{key}={value}" if value else f"--{key}" for key, value in more_options("--srun", config.srun).items()]
        return [
            "srun", "--nodes=1", "--ntasks=1", f"--nodelist={self._where[slot]}", "--overlap", "--no-kill", "--mem=0",
            "--cpu-bind=none", "--kill-on-bad-exit=0", "--unbuffered", "--quiet", "--input=none", "--export=ALL",
            f"--job-name={self._names.get(slot, f'agent{slot}')}", f"--output={self.log(slot)}", "--open-mode=append",
            *([f"--cpus-per-task={config.cpus_per_task}"] if config.cpus_per_task else []), *more, *options, *command,
        ]  # fmt: skip

    def log(self, slot: int) -> str:
        """What the agent itself says; ranks have logs of their own, srun speaks in the job's."""
        return str(folder(self._session.config.run_dir)).replace("%", "%%") + f"/agent_{self._job}_{slot}.log"

    def lost(self, slot: int) -> str | None:
        if slot in self._nowhere:
            return self._nowhere[slot]
        step = self._steps.get(slot)
        code = None if step is None else step.poll()
        return None if code is None else f"on node {self._where[slot]} ended, srun's exit code {exit_of(code)[0]}"

    def signal(self, slot: int, number: int) -> None:
        """srun passes on what it gets; SIGKILL it cannot."""
        step = self._steps.get(slot)
        if step is None or step.poll() is not None:
            return
        if number == signal.SIGKILL:
            errand = ["sh", "-c", KILL_STEP, "sh", self._job, self._names[slot]]
            self._past.append(subprocess.Popen(errand, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        else:
            signal_process(step.pid, number)

    def close(self) -> None:
        if not _all_ended(self._steps.values(), CLOSE_WITHIN):
            for slot in self._steps:
                self.signal(slot, signal.SIGKILL)
            _all_ended(self._steps.values(), KILL_WITHIN)
        _all_ended(self._past, KILL_WITHIN)
        for process in (*self._steps.values(), *self._past):  # the end of the job ends what may be left on the nodes
            if process.poll() is None:
                process.kill()
                process.wait()
        self._steps.clear()
        self._past.clear()
        self._end.close()

    def _choose_node(self, slot: int) -> None:
        """The node of a slot that is placed again: the same while it lives, else one of the allocation that has no agent."""
        self._nowhere.pop(slot, None)
        try:
            live = self._live_nodes()
        except slurm.SlurmError:
            return  # nobody knows better than before
        here = self._where[slot]
        if here in live:
            return
        taken = {self._where[other] for other, step in self._steps.items() if step.poll() is None}
        free = [node for node in live if node not in taken]
        if free:
            self._where[slot] = free[0]
        else:
            self._nowhere[slot] = f"was on node {here}, which is down"

    def _live_nodes(self) -> list[str]:
        """Nodes that the job still has and that answer."""
        job = slurm.job_fields(self._job, CONTROLLER_WITHIN) or {}
        mine = slurm.host_names(job["NodeList"]) if job.get("NodeList", "(null)") != "(null)" else self._nodes
        return slurm.live_nodes(mine, CONTROLLER_WITHIN)


def _all_ended(processes: Collection[subprocess.Popen[bytes]], patience: float) -> bool:
    """Wait for these; False when one still runs after `patience` seconds."""
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
