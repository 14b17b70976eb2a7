"""A real Slurm on this host for tests: munged, slurmctld and one slurmd per node, all in one temporary folder.

In: how many nodes, what each has, the partitions. Out: an environment in which `sbatch`, `srun`, `squeue`, `scontrol` talk to
this cluster and no other. Needs the Debian packages slurmctld, slurmd, slurm-client and munge; no service, no accounting
database, no cgroup, no systemd. Two clusters run beside each other. Everything that was started ends with the block, jobs too.

    with SlurmCluster(num_nodes=8) as cluster:
        job = cluster.sbatch("#!/bin/bash\\nsrun hostname\\n", "--nodes=2")
        cluster.wait_for_state(job, "COMPLETED")
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from cluster.processes import die_with_parent, kill_processes_with, processes_with, signal_process

PROGRAMS = ("munged", "slurmctld", "slurmd", "scontrol", "sbatch", "srun", "squeue", "scancel", "sinfo")
PATIENCE = 120.0  # seconds for anything that takes a few here; a busy machine must not fail a test
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")
# Inherited variables that would change what a client does: a test may itself run inside a Slurm job.
FOREIGN = ("SLURM_", "SLURMD_", "SBATCH_", "SQUEUE_", "SALLOC_", "SCANCEL_", "SINFO_", "MUNGE_")
NOISE = re.compile(r"pmix|differs from hardware|CPU frequency|state file|backup state|munged: Info|[Pp]lugin")
T = TypeVar("T")


class SlurmFault(RuntimeError):
    """The cluster did not do what was asked; the message ends with its logs."""


@dataclass(frozen=True)
class Partition:
    """One partition over all nodes. A job in a higher tier takes nodes from a lower one, whose jobs are requeued."""

    name: str
    priority_tier: int = 1
    grace_time_s: int = 0


@dataclass(frozen=True)
class Job:
    """What `scontrol show job -o` says, and the fields that tests ask for most."""

    fields: dict[str, str]

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.fields["Restarts"])

    @property
    def exit_code(self) -> int:
        return int(self.fields["ExitCode"].split(":")[0])


PARTITIONS = (Partition("normal", 1), Partition("urgent", 10))


def missing_programs() -> list[str]:
    """What of Slurm and munge is not installed."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def require_slurm() -> None:
    """Skip the calling test where Slurm cannot run."""
    if missing := missing_programs():
        pytest.skip(f"slurm: {', '.join(missing)} not installed; apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid() != 0:
        pytest.skip("slurm: a cluster for tests is started by root only")


def begun(pid: int) -> int:
    """When a process was started, in ticks since boot; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


class SlurmCluster:
    """A context manager that runs one cluster. Nodes are named n1 ... nN and share this host's cores and file system.

    Units: *_s in seconds. slurmd_timeout_s is how long a silent slurmd is believed; its node is DOWN about 8 s after that.
    Raises: SlurmFault with the end of every log when a daemon ends or something does not happen in time.
    """

    def __init__(
        self,
        num_nodes: int = 8,
        cpus_per_node: int = 2,
        gpus_per_node: int = 0,
        partitions: Sequence[Partition] = PARTITIONS,
        slurmd_timeout_s: int = 8,
        kill_wait_s: int = 3,
        cred_expire_s: int = 5,
    ) -> None:
        self.nodes = tuple(f"n{i + 1}" for i in range(num_nodes))
        self.cpus_per_node, self.gpus_per_node, self.partitions = cpus_per_node, gpus_per_node, tuple(partitions)
        self.slurmd_timeout_s, self.kill_wait_s, self.cred_expire_s = slurmd_timeout_s, kill_wait_s, cred_expire_s
        self.startup_s = self.shutdown_s = float("nan")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # -- life ----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> SlurmCluster:
        began = time.monotonic()
        # Not pytest's folder: unix sockets lie in it and their paths end at 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.environment = self._environment()
        try:
            self._configure()
            self._start()
        except BaseException:
            self.close()
            raise
        self.startup_s = time.monotonic() - began
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything and remove the folder. Asks nobody: it also ends a cluster that is broken."""
        began = time.monotonic()
        for name in ("slurmctld", *self.nodes):  # the controller first, so that nothing is requeued meanwhile
            self._kill(name)
        kill_processes_with(self._mark, patience=PATIENCE)  # steps and jobs live on without their slurmd
        self._kill("munged")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.shutdown_s = time.monotonic() - began

    @property
    def _mark(self) -> dict[str, str]:
        """Every process of this cluster and of its jobs carries this: daemons by us, jobs because Slurm sets it."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def processes(self) -> list[int]:
        """Ids of all processes of the cluster, of its jobs and of commands run in its environment."""
        return processes_with(self._mark)

    def _environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        return {**kept, "PATH": kept.get("PATH", os.defpath) + ":/usr/sbin:/sbin", **self._mark}

    def _start(self) -> None:
        socket_path, folder = self.folder / "munge.sock", self.folder
        paths = [f"--{name}-file={folder / ('munge.' + name)}" for name in ("key", "pid", "seed")]
        self._spawn("munged", "munged", "--foreground", "--force", f"--socket={socket_path}", *paths)
        self.until(lambda: socket_path.exists(), "munged's socket appears")
        self._spawn("slurmctld", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_slurmd(node)
        self.wait_for_nodes("IDLE", *self.nodes)

    def _spawn(self, name: str, *argv: str) -> None:
        """A daemon in the foreground, so that its id is known, in a session of its own; it ends when the test process does."""
        node = {"SLURMD_NODENAME": name} if name in self.nodes else {}  # its steps inherit it, jobs get it from Slurm
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            (self.folder / "log" / f"{name}.log").touch()
            self._daemons[name] = subprocess.Popen(
                argv,
                env={**self.environment, **node},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    def _kill(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()

    # -- configuration -------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        self.folder.chmod(0o711)
        for sub in ("state", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / sub).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        (self.folder / "slurm.conf").write_text("\n".join(self._slurm_conf()) + "\n")
        if self.gpus_per_node:
            self._pretend_gpus()
        major, minor = re.findall(r"\d+", self.run("slurmctld", "-V"))[:2]
        if (int(major), int(minor)) >= (23, 11):  # older ones ask for no cgroup here and do not know the word
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")

    def _pretend_gpus(self) -> None:
        """Links stand for devices: Slurm counts them and sets CUDA_VISIBLE_DEVICES as it does for real ones."""
        for index in range(self.gpus_per_node):
            (self.folder / f"gpu{index}").symlink_to("/dev/null")
        files = f"{self.folder}/gpu[0-{self.gpus_per_node - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-{len(self.nodes)}] Name=gpu File={files}\n")

    def _slurm_conf(self) -> Iterator[str]:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        ports = free_ports(len(self.nodes) + 1)
        yield from (
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            "SlurmUser=root",
            # A requeued job waits until its old credential has expired: 120 s by default.
            f"AuthInfo=socket={folder}/munge.sock,cred_expire={self.cred_expire_s}",
            "MpiDefault=none",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool/%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd.%n.pid",
            f"SlurmctldLogFile={folder}/log/slurmctld.log",
            f"SlurmdLogFile={folder}/log/%n.log",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "JobRequeue=1",
            "ReturnToService=2",
            f"KillWait={self.kill_wait_s}",
            f"SlurmdTimeout={self.slurmd_timeout_s}",
            "MessageTimeout=5",  # how long each unanswered question to a dead slurmd takes, on top of SlurmdTimeout
            "MinJobAge=300",  # a finished job can be asked for during the whole test
            "SlurmdParameters=config_overrides",  # nodes may have more cores and memory together than the host
        )
        gres = f" Gres=gpu:{self.gpus_per_node}" if self.gpus_per_node else ""
        if gres:
            yield "GresTypes=gpu"
        shape = (
            f"CPUs={self.cpus_per_node} SocketsPerBoard=1 CoresPerSocket={self.cpus_per_node} ThreadsPerCore=1 RealMemory=4000"
        )
        for node, port in zip(self.nodes, ports[1:], strict=True):
            yield f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {shape}{gres}"
        for index, part in enumerate(self.partitions):
            default = "YES" if index == 0 else "NO"
            times = f"MaxTime=INFINITE GraceTime={part.grace_time_s}"
            yield f"PartitionName={part.name} Nodes=ALL Default={default} PriorityTier={part.priority_tier} {times} State=UP"

    # -- use -----------------------------------------------------------------------------------------------------------

    def run(self, *argv: str, check: bool = True) -> str:
        """Run a command in the cluster's environment; its standard output.

        Raises: SlurmFault when it fails, unless check is False.
        """
        done = subprocess.run(argv, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE)
        if check and done.returncode:
            raise SlurmFault(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()}\n{self.logs()}")
        return done.stdout

    def sbatch(self, script: str, *options: str) -> str:
        """Submit the text of a script; the job's id. Without --output its output is <folder>/job-<id>.out, see `output`."""
        path = self.folder / f"script-{time.monotonic_ns()}.sh"
        path.write_text(script)
        return self.run(
            "sbatch", "--parsable", f"--output={self.folder}/job-%j.out", "--open-mode=append", *options, str(path)
        ).strip()

    def output(self, job: str) -> str:
        """What the job has written so far, over all its attempts."""
        path = self.folder / f"job-{job}.out"
        return path.read_text() if path.exists() else ""

    def job(self, job: str) -> Job:
        """All that slurmctld knows of a job; a finished one stays known for 300 s."""
        return Job(parse_fields(self.run("scontrol", "show", "job", "-o", job).splitlines()[0]))

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, ..."""
        return self.job(job).state

    def node_state(self, node: str) -> str:
        """IDLE, MIXED, ALLOCATED, DOWN, ..., with flags after + and a final * while slurmd does not answer."""
        return parse_fields(self.run("scontrol", "show", "node", "-o", node))["State"]

    def until(self, happens: Callable[[], T], what: str, patience: float = PATIENCE) -> T:
        """Ask again until the answer is true, and return it.

        Raises: SlurmFault after `patience` seconds, or at once when a daemon that we did not kill has ended.
        """
        deadline = time.monotonic() + patience
        while not (answer := happens()):
            if dead := [name for name, daemon in self._daemons.items() if daemon.poll() is not None]:
                raise SlurmFault(f"{', '.join(dead)} ended while waiting: {what}\n{self.logs()}")
            if time.monotonic() > deadline:
                raise SlurmFault(f"not within {patience:.0f} s: {what}\n{self.logs()}")
            time.sleep(0.1)
        return answer

    def wait_for_state(self, job: str, *states: str, patience: float = PATIENCE) -> Job:
        """The job once it is in one of these states; a job that ended in another way is a fault at once."""

        def reached() -> Job | None:
            now = self.job(job)
            if now.state in ENDED and now.state not in states:
                raise SlurmFault(f"job {job} ended as {now.state}, not {' or '.join(states)}\n{self.output(job)}\n{self.logs()}")
            return now if now.state in states else None

        return self.until(reached, f"job {job} is {' or '.join(states)}", patience)  # type: ignore[return-value]

    def wait_for_nodes(self, state: str, *nodes: str, patience: float = PATIENCE) -> None:
        """Wait until each of these nodes is in this state, with no flag, and answers."""
        listed = (
            "sinfo",
            "--noheader",
            "--Node",
            f"--nodes={','.join(nodes)}",
            f"--partition={self.partitions[0].name}",
            "--format=%T",
        )
        wanted = [state.lower()] * len(nodes)
        self.until(lambda: self.run(*listed, check=False).split() == wanted, f"nodes {' '.join(nodes)} are {state}", patience)

    # -- faults --------------------------------------------------------------------------------------------------------

    def start_slurmd(self, node: str) -> None:
        """Start a node's slurmd, first or again."""
        self._spawn(node, "slurmd", "-D", "-N", node)

    def kill_slurmd(self, node: str) -> None:
        """kill -9 of a node's slurmd; slurmctld finds out about 8 s after slurmd_timeout_s and requeues its jobs.

        Its tasks go on, beside those of the next attempt. `kill_node` before `start_slurmd` is a node that was rebooted.
        """
        self._kill(node)

    def kill_node(self, node: str) -> None:
        """A node without power: its slurmd and all of its tasks are gone at once."""
        self._kill(node)
        mine = {**self._mark, "SLURMD_NODENAME": node}
        there = sorted(processes_with(mine), key=begun)
        for pid in there:  # none must see another's end and act on it, as srun's second process would
            signal_process(pid, signal.SIGSTOP)
        for pid in reversed(there):  # a stopped process whose parent ends would be woken by the kernel
            signal_process(pid, signal.SIGKILL)
        kill_processes_with(mine, patience=PATIENCE)

    def stop_controller(self) -> None:
        """An orderly end of slurmctld: clients get `Unable to contact slurm controller`, jobs go on.

        Not kill -9: it saves its state up to 5 s late, so a new job would be forgotten and its id given out again.
        """
        daemon = self._daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait(PATIENCE)

    def start_controller(self) -> None:
        """Start slurmctld again, with the jobs of its saved state, and wait until it answers."""
        self._spawn("slurmctld", "slurmctld", "-D")
        self.until(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld answers")

    def end_in(self, job: str, seconds: int) -> None:
        """Give a running job a time limit in seconds (Slurm's own is in minutes).

        slurmctld looks at limits and at `--signal=X@T` every 30 s only, so the job ends up to 30 s later than asked.
        """
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
        self.run("scontrol", "update", f"jobid={job}", f"EndTime={moment}")

    def drain(self, node: str) -> None:
        """No new job on this node; those that run there go on."""
        self.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")

    def down(self, node: str) -> None:
        """End the node's jobs as NODE_FAIL. It is idle again within seconds when its slurmd lives (ReturnToService=2)."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def resume(self, node: str) -> None:
        """Take a drained or downed node back."""
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    # -- diagnosis -----------------------------------------------------------------------------------------------------

    def logs(self, lines: int = 15) -> str:
        """The last lines of every log that has any, for the message of a failure."""
        parts = []
        for path in sorted([*(self.folder / "log").glob("*.log"), *self.folder.glob("job-*.out")]):
            # What a daemon prints is in its log again, unless it ended before it had one.
            source = path if path.stat().st_size else path.with_suffix(".out")
            text = [line for line in source.read_text(errors="replace").splitlines() if not NOISE.search(line)]
            parts += ["\n".join([f"--- {source.name}", *text[-lines:]])] if text else []
        return "\n".join(parts)


def parse_fields(line: str) -> dict[str, str]:
    """`Key=Value` pairs of one line of scontrol; a value with spaces is cut at the first."""
    return dict(re.findall(r"(?:^|\s)([A-Z][\w/:]*)=(\S*)", line))


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that the system hands to clients, so that none is taken before its use."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 30_000), 2_000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise SlurmFault(f"fewer than {count} free ports between 10000 and 30000")
