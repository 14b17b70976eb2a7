"""What runs where: a LaunchConfig and this machine in, one NodeTask per node and one environment per rank out."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config import LaunchConfig, LaunchError

ROOT = Path(__file__).resolve().parent.parent  # holds cluster/ and, in a checkout, trainer/ and data_pipeline/
AGENT = ROOT / "cluster" / "agent.py"
STALE_PREFIXES = ("TORCHELASTIC_",)  # of a launcher around ours: torch would wait for its store
STALE_NAMES = (
    "LOCAL_SIZE",  # DeepSpeed would take the ranks of several "nodes" on one machine for one shared-memory group
    "GROUP_RANK",
    "ROLE_RANK",
)


@dataclass(frozen=True, kw_only=True)
class NodeTask:
    """All that one node's agent must know; travels as its command line, so that it can be read and repeated by hand."""

    node: int
    name: str
    nodes: int
    ranks: int  # of this node; every node has as many
    run_dir: str
    attempt: int
    master_addr: str
    master_port: int
    threads: int  # OMP_NUM_THREADS of a rank where the user set none
    gpus: tuple[str, ...] = ()  # device ids of this node; (): CPU
    grace: float = 30.0
    local: bool = False  # started by a launcher on this machine: standard input ends when that launcher does
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

    def agent_command(self) -> list[str]:
        words = [sys.executable, str(AGENT)]
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            flag = "--" + item.name.replace("_", "-")
            if item.name == "gpus":
                words += [flag, ",".join(value)] if value else []
            elif item.name == "local":
                words += [flag] if value else []
            elif item.name != "command":
                words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
        return [*words, "--", *self.command]

    @classmethod
    def parse(cls, argv: Sequence[str]) -> NodeTask:
        """The inverse of `agent_command`."""
        parser = argparse.ArgumentParser(prog="cluster/agent.py", description="One node's ranks; started by cluster/launch.py.")
        for name in ("node", "nodes", "ranks", "attempt", "master-port", "threads"):
            parser.add_argument(f"--{name}", type=int, required=True)
        for name in ("name", "run-dir", "master-addr"):
            parser.add_argument(f"--{name}", required=True)
        parser.add_argument("--gpus", default="")
        parser.add_argument("--grace", type=float, default=30.0)
        parser.add_argument("--local", action="store_true")
        words = list(argv)
        cut = words.index("--") if "--" in words else len(words)
        values = vars(parser.parse_args(words[:cut]))
        values["gpus"] = tuple(gpu for gpu in values["gpus"].split(",") if gpu)
        return cls(**values, command=tuple(words[cut + 1 :]))


def node_tasks(config: LaunchConfig, *, attempt: int, master_port: int, gpus: Sequence[str], cores: int) -> list[NodeTask]:
    """One task per node when all nodes share this machine, its `gpus` and its `cores`.

    Raises: LaunchError when --gpus-per-node asks for more GPUs than there are.
    """
    per_node = gpus_of_a_node(config, len(gpus))
    ranks = config.ranks_per_node or per_node or 1
    return [
        NodeTask(
            node=node,
            name=f"node{node}",
            nodes=config.nodes,
            ranks=ranks,
            run_dir=config.run_dir,
            attempt=attempt,
            master_addr="127.0.0.1",
            master_port=master_port,
            threads=max(1, cores // (config.nodes * ranks)),
            gpus=tuple(gpus[node * per_node : (node + 1) * per_node]),
            grace=config.grace,
            local=True,
            command=config.job_command,
        )
        for node in range(config.nodes)
    ]


def gpus_of_a_node(config: LaunchConfig, there: int) -> int:
    """GPUs of each node; 0 is CPU. Only a number that the user asked for can be an error."""
    asked = config.gpus_per_node
    if asked is not None and asked * config.nodes > there:
        raise LaunchError(
            f"--gpus-per-node {asked} on {config.nodes} nodes = {asked * config.nodes} GPUs; this machine has {there}; "
            "give fewer, or --gpus-per-node 0 for CPU"
        )
    if asked is not None:
        return asked
    if config.ranks_per_node is not None:
        return config.ranks_per_node if config.nodes * config.ranks_per_node <= there else 0
    return there // config.nodes


def rank_environment(task: NodeTask, local_rank: int, base: Mapping[str, str]) -> dict[str, str]:
    """What a rank's environment has that `base` has not (or not so)."""
    changes = {
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
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(task.gpus),  # empty hides them: DeepSpeed and torch then agree on CPU
    }
    if not task.gpus:
        changes["DS_ACCELERATOR"] = "cpu"
    if not base.get("OMP_NUM_THREADS"):
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


def describe(tasks: Sequence[NodeTask], backend: str, base: Mapping[str, str]) -> str:
    """What a dry run prints. Of the environment it shows only what the launcher sets, never what it inherits."""
    first = tasks[0]
    lines = [f"run folder {first.run_dir}, attempt {first.attempt}", headline(tasks, backend)]
    for task in tasks:
        lines.append(f"node {task.node} ({task.name}): {shlex.join(task.agent_command())}")
        for local_rank in range(task.ranks):
            changes = dict(rank_environment(task, local_rank, base))
            if "PYTHONPATH" in changes:
                changes["PYTHONPATH"] = str(ROOT) + (":$PYTHONPATH" if base.get("PYTHONPATH") else "")
            words = " ".join(f"{key}={_quote(value)}" for key, value in changes.items())
            lines.append(f"  rank {changes['RANK']}: {words} {shlex.join(task.rank_command())}")
    return "\n".join(lines)


def _quote(value: str) -> str:
    return value if value.endswith(":$PYTHONPATH") or not value else shlex.quote(value)
