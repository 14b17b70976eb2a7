"""How one agent per node gets onto the nodes. Placement only: what an agent does there is the same everywhere.

A backend is a module beside this one with four functions; it is loaded when it is chosen, not before.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import LaunchConfig

SLURM_FILES = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf")


@dataclass(frozen=True)
class JobState:
    name: str  # queued | running | ended | unknown
    detail: str = ""  # for a person: "process 4711 on host a", "PENDING (Priority)"


@dataclass(frozen=True)
class Backend:
    render: Callable[[LaunchConfig, Sequence[str]], str]  # for --dry-run: everything that would run; starts nothing
    launch: Callable[[LaunchConfig, Sequence[str]], int]  # start, watch to the end (unless config.detach): exit code
    state: Callable[[Mapping[str, Any]], JobState]  # of a run's job.json
    cancel: Callable[[Mapping[str, Any], bool], None]  # of a run's job.json; True: now, without a save


def _lazy(module: str) -> Backend:
    """The backend of `cluster.backends.<module>`, imported by its first use."""

    def function(name: str) -> Callable[..., Any]:
        return lambda *arguments: getattr(importlib.import_module(f"cluster.backends.{module}"), name)(*arguments)

    return Backend(function("render"), function("launch"), function("state"), function("cancel"))


BACKENDS: dict[str, Backend] = {"local": _lazy("local"), "slurm": _lazy("slurm"), "ray": _lazy("ray_cluster")}


def choose_backend(config: LaunchConfig, environment: Mapping[str, str] = os.environ) -> str:
    """The backend's name: what --backend says; auto: ray where an address is given, slurm on a login node, else local."""
    if config.in_job:
        return "slurm"
    if config.backend != "auto":
        return config.backend
    if config.address or environment.get("RAY_ADDRESS"):
        return "ray"
    return "slurm" if "SLURM_JOB_ID" not in environment and slurm_is_here(environment) else "local"


def slurm_is_here(environment: Mapping[str, str]) -> bool:
    """True where jobs can be submitted. The programs alone are not enough: a laptop may have them without any cluster."""
    if not shutil.which("sbatch", path=environment.get("PATH")):
        return False
    if environment.get("SLURM_CONF") or any(Path(name).exists() for name in SLURM_FILES):
        return True
    try:
        return subprocess.run(["scontrol", "ping"], capture_output=True, timeout=5).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False
