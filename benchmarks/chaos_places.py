"""Where the soak's runs run: on hosts of this machine, in a Slurm of its own, in a Ray cluster that the launcher starts.

Comes in: a number of nodes. Goes out: a Place, which is launcher flags, an environment, and what faults may take hold of.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from tests.integration.netns_hosts import NetnsHosts, why_not

FLAGS = ("--grace", "5", "--node-patience", "6", "--hang-after", "15", "--gpus-per-node", "0")


@dataclass
class Place:
    """Launcher flags, environment, and what faults may take hold of."""

    backend: str
    nodes: int
    flags: list[str]
    environment: dict[str, str]
    address: str = "127.0.0.1"  # at which the ranks reach this process
    hosts: NetnsHosts | None = None
    slurm: Any = None  # the SlurmCluster


def _flags(backend: str, nodes: int) -> list[str]:
    return ["--backend", backend, "--nodes", str(nodes), "--min-nodes", str(max(1, nodes // 2)), *FLAGS]


@contextmanager
def local_place(nodes: int) -> Iterator[Place]:
    """Nodes of the local backend, as hosts with links of their own where that can be."""
    flags, environment = _flags("local", nodes), dict(os.environ)
    if why_not():
        yield Place("local", nodes, flags, environment)
        return
    with NetnsHosts(nodes) as hosts:
        flags += ["--wrap", hosts.wrap, "--listen", hosts.bridge_address, "--interface", "eth0"]
        yield Place("local", nodes, flags, environment, hosts.bridge_address, hosts)


@contextmanager
def slurm_place(nodes: int) -> Iterator[Place]:
    """A real Slurm with one node to spare, so that a job that lost one can start again at once."""
    from tests.integration.slurm_cluster import SlurmCluster

    with SlurmCluster(num_nodes=nodes + 1, slurmd_timeout_s=10) as cluster:
        yield Place("slurm", nodes, _flags("slurm", nodes), cluster.environment, slurm=cluster)


@contextmanager
def ray_place(nodes: int) -> Iterator[Place]:
    """The launcher starts the cluster, its nodes on this machine."""
    yield Place("ray", nodes, _flags("ray", nodes), {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})


PLACES: dict[str, Callable[[int], AbstractContextManager[Place]]] = {
    "local": local_place,
    "slurm": slurm_place,
    "ray": ray_place,
}
