"""A Ray cluster that lives as long as its launcher: head and nodes on this machine, or nodes in the Slurm allocation around us.

In: how many nodes with what. Out: an address for `ray.init`. Each node is a guardian (cluster/backends/ray_node.py) with a pipe
to this process: when this process ends, however it ends, the guardians end and leave nothing. The head has no CPUs, so that no
agent is placed on it and the launcher's own connection outlives every node. Ray listens on all interfaces whatever it is told;
a random token (Ray's token authentication) is what keeps others out.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.config import LaunchConfig, LaunchError
from cluster.layout import ROOT, gpu_ids, gpus_of_a_node, usable_cores
from cluster.network import own_address
from cluster.processes import Port

GUARDIAN = ROOT / "cluster" / "backends" / "ray_node.py"
HEAD_WITHIN = 120.0
END_WITHIN = 15.0
TRIES = 3  # Ray gives a node 30 s to start, which an overloaded machine may need more than once


class StartedCluster:
    """Guardians of the head and of the nodes. `close` ends them all. May be used without a head, to join a cluster elsewhere."""

    def __init__(self, config: LaunchConfig, address: str | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ss-ray-", dir="/tmp"))
        self._port = Port(own_address())
        self.address = address or f"{own_address()}:{self._port.number}"
        self._commands: dict[str, list[str]] = {}
        self._guardians: dict[str, subprocess.Popen[bytes]] = {}
        self._deaths = 0
        self._environment: dict[str, dict[str, str]] = {}
        self.on_slurm = address is None and in_allocation(config, os.environ)
        try:
            if address is None:
                os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
                self._start("head", ["--head", "--cpus", "0", "--gpus", "0"])
                self._wait_for_head()
                self._start_nodes(config)
            else:
                self._start("launcher", ["--cpus", "0", "--gpus", "0"])  # a driver needs a Ray node on its own machine
        except BaseException:
            self.close()
            raise

    def _start_nodes(self, config: LaunchConfig) -> None:
        if self.on_slurm:
            words = srun_words(config)
            self._commands["srun"] = [*words, sys.executable, str(GUARDIAN), "--address", self.address]
            self.mend()
            return
        ids = [] if config.gpus_per_node == 0 else gpu_ids(os.environ)
        each = gpus_of_a_node(config, len(ids), config.nodes)
        cpus = config.cpus_per_task or max(1, usable_cores() // config.nodes)
        for node in range(config.nodes):
            self._environment[f"n{node}"] = {"CUDA_VISIBLE_DEVICES": ",".join(ids[node * each : (node + 1) * each])}
            self._start(f"n{node}", ["--cpus", str(cpus), "--gpus", str(each)])

    def _start(self, name: str, words: Sequence[str]) -> None:
        place = ["--address", self.address, "--folder", str(self.folder / name), "--ip", own_address()]
        self._commands[name] = [sys.executable, str(GUARDIAN), *place, *words]
        self.mend()

    def mend(self) -> None:
        """Start what has a command and does not run: at first, and a node that died. The head does not come back."""
        for name, command in self._commands.items():
            guardian = self._guardians.get(name)
            if guardian is not None and (guardian.poll() is None or name in ("head", "srun")):
                continue
            shutil.rmtree(self.folder / name, ignore_errors=True)
            self._guardians[name] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end tells the guardian that we are gone
                env={**os.environ, **self._environment.get(name, {})},
                start_new_session=True,  # the terminal's Ctrl-C reaches the launcher alone
            )

    def check(self) -> None:
        """While the cluster starts: what ended is started again. Raises: LaunchError when that does not help."""
        for name, guardian in list(self._guardians.items()):
            if guardian.poll() is None:
                continue
            self._deaths += 1
            if self._deaths > TRIES or name in ("head", "srun"):
                raise LaunchError(f"the Ray cluster's {name} ended while it started; see above; try again, or use --address")
            self.mend()

    def _wait_for_head(self) -> None:
        host, _, port = self.address.rpartition(":")
        deadline = time.monotonic() + HEAD_WITHIN
        while time.monotonic() < deadline:
            self.check()
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise LaunchError(f"the Ray cluster's head did not start within {HEAD_WITHIN:.0f} s; is the machine overloaded?")

    def close(self) -> None:
        """End all of it; return when nothing is left."""
        self._commands.clear()
        guardians = list(self._guardians.values())
        for guardian in guardians:
            if guardian.stdin is not None:
                guardian.stdin.close()
        deadline = time.monotonic() + END_WITHIN
        for guardian in guardians:
            try:
                guardian.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                guardian.kill()
                guardian.wait()
        self._guardians.clear()
        self._port.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def in_allocation(config: LaunchConfig, environment: Mapping[str, str]) -> bool:
    """True when the nodes are to be those of the Slurm job around this launcher.

    Raises: LaunchError for --ray-nodes-from slurm outside of one.
    """
    inside = "SLURM_JOB_ID" in environment
    if config.ray_nodes_from == "slurm" and not inside:
        raise LaunchError("--ray-nodes-from slurm; no Slurm allocation is around this launcher; start it by sbatch or salloc")
    return inside and (config.ray_nodes_from == "slurm" or int(environment.get("SLURM_JOB_NUM_NODES", "1")) > 1)


def srun_words(config: LaunchConfig) -> list[str]:
    """One guardian on each of the allocation's nodes: spares beyond --nodes, too."""
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", str(config.nodes))
    return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=0",
            "--wait=0", "--mpi=none", "--input=all"]  # fmt: skip
