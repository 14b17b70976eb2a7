"""What runs where: a LaunchConfig and the nodes' facts in, one NodeTask per node and one environment per rank out."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import LaunchConfig, LaunchError

ROOT = Path(__file__).resolve().parent.parent  # holds cluster/ and, in a checkout, trainer/ and data_pipeline/
AGENT = ROOT / "cluster" / "agent.py"
TOKEN = "SLOTSTREAM_TOKEN"
STALE_PREFIXES = ("TORCHELASTIC_",)  # of a launcher around ours: torch would wait for its store
STALE_NAMES = (
    "LOCAL_SIZE",  # DeepSpeed would take the ranks of several "nodes" on one machine for one shared-memory group
    "GROUP_RANK",
    "ROLE_RANK",
    TOKEN,
)


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What an agent says about its node when it reports."""

    slot: int
    host: str
    address: str  # its own side of the connection to the hub: where other nodes reach it
    pid: int = 0
    cores: tuple[int, ...] = ()  # ids that its ranks may run on
    usable: int = 1  # cores worth of time: fewer than `cores` where a control group's quota says so
    gpus: tuple[str, ...] = ()
    python: str = ""

    @classmethod
    def of_this_node(cls, slot: int, address: str) -> NodeFacts:
        return cls(
            slot=slot,
            host=socket.gethostname(),
            address=address,
            pid=os.getpid(),
            cores=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (),
            usable=usable_cores(),
            gpus=tuple(gpu_ids(os.environ)),
            python=platform.python_version(),
        )

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> NodeFacts:
        """Raises TypeError, KeyError or ValueError where the message is not what `as_message` makes."""
        values: dict[str, Any] = {item.name: message[item.name] for item in dataclasses.fields(cls)}
        return cls(**{**values, "cores": tuple(values["cores"]), "gpus": tuple(values["gpus"])})

    def as_message(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class NodeTask:
    """All that one node's agent must know of an attempt; travels as one JSON object."""

    node: int
    name: str
    nodes: int
    ranks: int  # of this node; every node has as many
    run_dir: str
    attempt: int
    master_addr: str
    master_port: int
    threads: int  # OMP_NUM_THREADS of a rank where the user set none
    slot: int = 0
    session: str = ""
    gpus: tuple[str, ...] = ()  # device ids of this node; (): CPU
    cores: tuple[int, ...] = ()  # to bind ranks to; (): no binding
    bind: str = "none"
    grace: float = 30.0
    console: bool = False  # rank 0's output also goes to the agent's own: it has the user's terminal
    folder: str = ""  # working folder of the ranks; "": the agent's
    environment: tuple[tuple[str, str], ...] = ()  # for the ranks, beyond the agent's own
    command: tuple[str, ...] = ()  # of a rank, after the Python interpreter

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks

    @property
    def attempt_dir(self) -> Path:
        return Path(self.run_dir) / "attempts" / str(self.attempt)

    def log(self, rank: int) -> Path:
        return self.attempt_dir / f"rank_{rank}.log"

    @property
    def events(self) -> Path:
        """Where the agent writes what happens to its ranks, one JSON object per line."""
        return self.attempt_dir / f"node_{self.node}.jsonl"

    def rank_command(self) -> list[str]:
        return [sys.executable, *self.command]

    def as_message(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> NodeTask:
        """The inverse of `as_message`, also after a way through JSON."""
        values = {item.name: message[item.name] for item in dataclasses.fields(cls)}
        values["environment"] = tuple((str(key), str(value)) for key, value in values["environment"])
        for name in ("gpus", "cores", "command"):
            values[name] = tuple(values[name])
        return cls(**values)


def agent_command(hub: str, slot: int, run_dir: str) -> list[str]:
    """The words that start a node's agent. The token is not among them: see `agent_environment`."""
    return [sys.executable, str(AGENT), "--hub", hub, "--slot", str(slot), "--run-dir", run_dir]


def agent_environment(token: str) -> dict[str, str]:
    """What the environment of an agent must have. The agent takes the token out before it starts ranks."""
    return {TOKEN: token}


def node_tasks(
    config: LaunchConfig, team: Sequence[NodeFacts], *, known: Sequence[NodeFacts] = (), attempt: int, master_port: int,
    session: str = "", local: bool = True,
) -> list[NodeTask]:  # fmt: skip
    """One task per node of `team`, numbered in its order. `known`: every node that ever reported, the lost ones too.

    Nodes that report the same host, cores and GPUs are places on one machine and share them. A lost one keeps its share.

    Raises: LaunchError when --gpus-per-node asks for more GPUs than there are.
    """
    everyone = {facts.slot: facts for facts in [*known, *team]}
    shares = [_share(config, facts, list(everyone.values())) for facts in team]
    ranks = config.ranks_per_node or min(len(gpus) for gpus, _, _ in shares) or 1
    return [
        NodeTask(
            node=node,
            name=f"node{node}" if local or len({item.host for item in team}) < len(team) else facts.host,
            nodes=len(team),
            ranks=ranks,
            run_dir=config.run_dir,
            attempt=attempt,
            master_addr=team[0].address,
            master_port=master_port,
            threads=max(1, usable // ranks),
            slot=facts.slot,
            session=session,
            gpus=gpus[:ranks],
            cores=cores if config.bind != "none" else (),
            bind=config.bind,
            grace=config.grace,
            console=local and node == 0,
            folder=os.getcwd(),
            environment=tuple(forwarded(config, os.environ).items()),
            command=config.job_command,
        )
        for node, (facts, (gpus, cores, usable)) in enumerate(zip(team, shares, strict=True))
    ]


def _share(config: LaunchConfig, own: NodeFacts, everyone: Sequence[NodeFacts]) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """(GPUs, core ids, cores' worth of time) of one node."""
    beside = sorted(it.slot for it in everyone if (it.host, it.cores, it.gpus) == (own.host, own.cores, own.gpus))
    place, sharing = beside.index(own.slot), len(beside)
    count = gpus_of_a_node(config, len(own.gpus), sharing)
    width = max(1, len(own.cores) // sharing)
    first = min(place * width, max(0, len(own.cores) - width))
    return own.gpus[place * count : (place + 1) * count], own.cores[first : first + width], max(1, own.usable // sharing)


def gpus_of_a_node(config: LaunchConfig, there: int, sharing: int) -> int:
    """GPUs of each of the `sharing` nodes on a machine that has `there`; 0 is CPU.

    Only a number that the user asked for can be an error.
    """
    asked = config.gpus_per_node
    if asked is not None and asked * sharing > there:
        raise LaunchError(
            f"--gpus-per-node {asked} on {_count(sharing, 'node')} = {asked * sharing} GPUs; this machine has {there}; "
            "give fewer, or --gpus-per-node 0 for CPU"
        )
    if asked is not None:
        return asked
    if config.ranks_per_node is not None:
        return config.ranks_per_node if sharing * config.ranks_per_node <= there else 0
    return there // sharing


def forwarded(config: LaunchConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for all ranks: those of --export, and the network interface for gloo and NCCL."""
    chosen = {name: environment[name] for name in config.export if name in environment}
    if config.interface:
        chosen |= {"GLOO_SOCKET_IFNAME": config.interface, "NCCL_SOCKET_IFNAME": config.interface}
    return chosen


def rank_environment(task: NodeTask, local_rank: int, base: Mapping[str, str]) -> dict[str, str]:
    """What a rank's environment has that `base` has not (or not so)."""
    changes = {
        **dict(task.environment),
        "RANK": str(task.node * task.ranks + local_rank),
        "WORLD_SIZE": str(task.world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(task.ranks),
        "NODE_RANK": str(task.node),
        "MASTER_ADDR": task.master_addr,
        "MASTER_PORT": str(task.master_port),
        "SLOTSTREAM_NODE": task.name,
        "SLOTSTREAM_RUN_DIR": task.run_dir,
        "SLOTSTREAM_ATTEMPT": str(task.attempt),
        "SLOTSTREAM_SESSION": task.session,
        "SLOTSTREAM_SLOT": str(task.slot),
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(task.gpus),  # empty hides them: DeepSpeed and torch then agree on CPU
    }
    if not task.gpus:
        changes["DS_ACCELERATOR"] = "cpu"
    if not base.get("OMP_NUM_THREADS") and "OMP_NUM_THREADS" not in changes:
        changes["OMP_NUM_THREADS"] = str(task.threads)
    path = checkout_path(base.get("PYTHONPATH"))
    return changes if path is None else {**changes, "PYTHONPATH": path}


def full_environment(task: NodeTask, local_rank: int, base: Mapping[str, str]) -> dict[str, str]:
    """`base` with a rank's changes and without what an outer launcher left in it."""
    kept = {key: value for key, value in base.items() if key not in STALE_NAMES and not key.startswith(STALE_PREFIXES)}
    return {**kept, **rank_environment(task, local_rank, base)}


def checkout_path(current: str | None, root: Path = ROOT) -> str | None:
    """PYTHONPATH that finds the checkout's packages from any working folder; None when they are installed.

    An installation folder must not go there: it would stand before the standard library.
    """
    if not (root / "setup.py").exists() and not (root / "pyproject.toml").exists():
        return None
    parts = [part for part in (current or "").split(os.pathsep) if part]
    return os.pathsep.join([str(root), *(part for part in parts if part != str(root))])


def usable_cores() -> int:
    """Cores that this process may use: its affinity, bounded by the control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def gpu_ids(environment: Mapping[str, str]) -> list[str]:
    """Ids of the GPUs that a rank may use: CUDA_VISIBLE_DEVICES where it is set, else what the driver lists."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        ids = [part.strip() for part in visible.split(",") if part.strip()]
        return [] if ids[:1] == ["-1"] else ids
    if not shutil.which("nvidia-smi"):
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU ")) if line]


def headline(tasks: Sequence[NodeTask], backend: str) -> str:
    first = tasks[0]
    device = "a GPU each" if first.gpus else "CPU"
    return f"{_count(first.nodes, 'node')} x {_count(first.ranks, 'rank')} on {device}, backend {backend}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def describe(tasks: Sequence[NodeTask], backend: str, hub: str, base: Mapping[str, str]) -> str:
    """What a dry run prints. Of the environment it shows only what the launcher sets, never what it inherits."""
    first = tasks[0]
    lines = [f"run folder {first.run_dir}, attempt {first.attempt}", headline(tasks, backend)]
    for task in tasks:
        lines.append(f"node {task.node} ({task.name}): {shlex.join(agent_command(hub, task.slot, task.run_dir))}")
        for local_rank in range(task.ranks):
            changes = dict(rank_environment(task, local_rank, base))
            if "PYTHONPATH" in changes:
                changes["PYTHONPATH"] = str(ROOT) + (":$PYTHONPATH" if base.get("PYTHONPATH") else "")
            changes |= {name: f"${name}" for name, _ in task.environment if not name.endswith("_SOCKET_IFNAME")}
            words = " ".join(f"{key}={_quote(value)}" for key, value in changes.items())
            lines.append(f"  rank {changes['RANK']}: {words} {shlex.join(task.rank_command())}")
    return "\n".join(lines)


def _quote(value: str) -> str:
    return value if value.endswith(":$PYTHONPATH") or value.startswith("$") or not value else shlex.quote(value)
