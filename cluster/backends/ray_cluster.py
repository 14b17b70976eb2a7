"""The Ray backend: one agent per node of a Ray cluster, placed by an actor; the supervisor runs here, in the driver.

In: a LaunchConfig; with --address (or RAY_ADDRESS) a cluster that is there, else one is started for the launch. Out: the exit
code. A drained node ends a session as every preemption does (all ranks save); the next session, on other nodes, starts at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.backends import JobState, local
from cluster.backends.ray_placement import RayPlacement
from cluster.backends.ray_started import StartedCluster, in_allocation, srun_words
from cluster.config import LaunchConfig, LaunchError
from cluster.layout import agent_command
from cluster.network import LOOPBACK
from cluster.placement import Session
from cluster.run_folder import write_job
from cluster.supervision.supervisor import say, supervise
from cluster.verdict import REQUEUE

REACH_WITHIN = 3.0  # seconds for a connection to the address
PROBE_WITHIN = 20.0  # for the first word with a Ray there; most of it is the import of ray
TELL_AFTER = 5.0
TICK = 0.2


@dataclass(frozen=True)
class Reservation:
    group: Any  # Ray's placement group: bundle k is slot k's place
    nodes: int
    bundle: dict[str, float]


def render(config: LaunchConfig, words: Sequence[str]) -> str:
    """What would run. Nothing is started or asked: how many CPUs and GPUs a node has is known only by the cluster."""
    address = given_address(config)
    if address is not None:
        where = f"Ray cluster at {address}"
    elif in_allocation(config, os.environ):
        where = f"a Ray cluster of its own: head here, nodes by {shlex.join(srun_words(config))}"
    else:
        where = f"a Ray cluster of its own on this machine: a head and {config.nodes} nodes"
    gpus = "all GPUs" if config.gpus_per_node is None else f"{config.gpus_per_node} GPUs"
    cpus = f"{config.cpus_per_task} CPUs" if config.cpus_per_task else "all CPUs"
    lines = [
        f"run folder {config.run_dir}",
        where,
        f"placement group STRICT_SPREAD of {config.nodes} bundles: {cpus}, {gpus} each",
    ]
    for slot in range(config.nodes):
        lines.append(f"node {slot}: {shlex.join(agent_command('HUB:PORT', slot, config.run_dir))}")
    return "\n".join([*lines, f"each rank: {shlex.join([sys.executable, *config.job_command])}"])


def launch(config: LaunchConfig, words: Sequence[str]) -> int:
    """Run the job to its end. Raises LaunchError for a cluster that cannot be reached or is too small."""
    if config.detach:
        return local.detach(config, words, "ray")
    address = given_address(config)
    if address is not None:
        check_reachable(address)
    cluster = None
    try:
        if address is None:
            cluster = StartedCluster(config)
        elif address != "auto" and not is_member(address):
            cluster = StartedCluster(config, address)
        return _drive(config, words, cluster.address if cluster else str(address), cluster)
    finally:
        _disconnect()
        if cluster is not None:
            cluster.close()


def _drive(config: LaunchConfig, words: Sequence[str], address: str, cluster: StartedCluster | None) -> int:
    """Sessions until one ends for another reason than a drained node."""
    own = connect(address)
    started_here = cluster is not None and not cluster.on_slurm and given_address(config) is None
    listen = config.listen or (None if config.interface else LOOPBACK if started_here else own)
    config = replace(config, listen=listen)
    check = cluster.check if cluster else lambda: None
    mend = cluster.mend if cluster else lambda: None
    least = config.nodes
    while True:
        ordinary_signals()
        place = reserve(config, least, check)
        placements: list[RayPlacement] = []
        try:
            make = _maker(config, words, place, placements, mend)
            code = supervise(replace(config, nodes=place.nodes), "ray", make, words)
        finally:
            release(place)
        if not (code == REQUEUE and placements[0].drained and ended_by_drain(Path(config.run_dir), config.job)):
            return code
        say("a Ray node is being drained: going on without it")
        least, check, mend = config.least_nodes, (lambda: None), (lambda: None)


def _maker(
    config: LaunchConfig, words: Sequence[str], place: Reservation, made: list[RayPlacement], mend: Callable[[], None]
) -> Callable[[Session], RayPlacement]:
    """What the supervisor calls once it owns the run folder; the placement is also left in `made`."""

    def make(session: Session) -> RayPlacement:
        write_job(Path(config.run_dir), config.job, "ray", str(os.getpid()), words)
        made.append(RayPlacement(session, place.group, place.bundle, mend))
        return made[-1]

    return make


def given_address(config: LaunchConfig) -> str | None:
    """HOST:PORT or "auto" of a cluster that is there; None: start one.

    Raises: LaunchError for an address that is neither.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        return None
    if address != "auto" and not re.fullmatch(r"[^/\s]+:\d{1,5}", address):
        raise LaunchError(
            f"--address {address}; HOST:PORT of a cluster's head or auto is needed (ray start --head prints it); a ray:// client "
            "cannot hold a placement group for agents"
        )
    return address


def check_reachable(address: str) -> None:
    """Ray itself tries for minutes, and cannot be interrupted. Raises: LaunchError where no Ray answers at the address."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_WITHIN).close()
        except (OSError, OverflowError) as error:
            raise LaunchError(
                f"no Ray cluster at {address}: {getattr(error, 'strerror', None) or error}; give the address that "
                "ray start --head printed, or leave --address out to start one"
            ) from None
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "health-check",
        *(["--address", address] if address != "auto" else []),
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_WITHIN, start_new_session=True)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"what listens at {address} does not answer as a Ray cluster; check --address") from None
    if answer.returncode:
        said = (answer.stderr or answer.stdout).strip().splitlines()
        raise LaunchError(f"no Ray cluster at {address}: {said[-1] if said else 'no answer'}; check --address and Ray's versions")


def is_member(address: str) -> bool:
    """True when a node of that cluster runs on this machine: a driver needs one."""
    port = address.rpartition(":")[2]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"/raylet") and any(
            word.startswith(b"--gcs-address=") and word.endswith(f":{port}".encode()) for word in words
        ):
            return True
    return False


def connect(address: str) -> str:
    """Become a driver of the cluster; return this machine's address in it. Raises: LaunchError when Ray refuses."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns; agents hide GPUs themselves
    try:
        import ray
    except ImportError:
        raise LaunchError("--backend ray; Ray is not installed here; pip install 'ray>=2.60', or use another backend") from None
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LaunchError(f"cannot join the Ray cluster at {address}: {str(error).splitlines()[0]}; check --address") from None
    # Twenty lines of stack trace on standard output for each raylet that dies, whatever log_to_driver says.
    vars(ray._private.worker)["print_to_stdstream"] = lambda *_, **__: None
    return str(ray.util.get_node_ip_address())


def _disconnect() -> None:
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def ordinary_signals() -> None:
    """Ctrl-C and SIGTERM end a wait for nodes. Ray has taken the second, an earlier session both."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def reserve(config: LaunchConfig, least: int, check: Callable[[], None]) -> Reservation:
    """Places for the nodes: all of them, or `least` and more where that many are all that is left.

    Waits --start-timeout; says what the cluster has while it waits. Raises: LaunchError when it has no room by then.
    """
    import ray

    began, told, reservation = time.monotonic(), False, None
    while True:
        check()
        waited = time.monotonic() - began
        bundle, fit = share(config)
        wanted = config.nodes if fit >= config.nodes or waited < config.node_patience else max(fit, least)
        if bundle and fit >= wanted and (reservation is None or (reservation.nodes, reservation.bundle) != (wanted, bundle)):
            release(reservation)
            group = ray.util.placement_group([bundle] * wanted, strategy="STRICT_SPREAD")
            reservation = Reservation(group, wanted, bundle)
        if reservation is not None and reservation.group.wait(TICK):
            return reservation
        if waited > config.start_timeout:
            release(reservation)
            hint = "give fewer --nodes, CPUs or GPUs, or a longer --start-timeout"
            raise LaunchError(f"{too_small(config)} after {waited:.0f} s; {hint}")
        if waited > TELL_AFTER and not told:
            told = True
            say(f"waiting for nodes: {too_small(config)}")
        time.sleep(TICK)


def release(place: Reservation | None) -> None:
    import ray

    if place is not None and ray.is_initialized():
        ray.util.remove_placement_group(place.group)


def usable_nodes() -> list[dict[str, Any]]:
    """Resources of the nodes that can take work: alive, not draining, with CPUs."""
    import ray
    from ray._private.state import state

    draining = state.get_draining_nodes()
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    return [node["Resources"] for node in alive if node["Resources"].get("CPU")]


def share(config: LaunchConfig) -> tuple[dict[str, float], int]:
    """(what each bundle takes, how many nodes could hold one). Unasked, a bundle takes as much as the nodes all have."""
    nodes = usable_nodes()

    def common(name: str) -> float:
        """The most that as many nodes as are wanted have."""
        amounts = sorted((resources.get(name, 0.0) for resources in nodes), reverse=True)[: config.nodes]
        return amounts[-1] if amounts else 0.0

    cpus = float(config.cpus_per_task or common("CPU"))
    gpus = float(common("GPU") if config.gpus_per_node is None else config.gpus_per_node)
    bundle = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    fit = sum(all(resources.get(name, 0.0) >= amount for name, amount in bundle.items()) for resources in nodes)
    return (bundle if cpus else {}), fit


def too_small(config: LaunchConfig) -> str:
    """What is wanted and what is there, in a line."""
    nodes = usable_nodes()
    there = ", ".join(f"{resources.get('CPU', 0):g} CPUs {resources.get('GPU', 0):g} GPUs" for resources in nodes[:8])
    more = ", ..." if len(nodes) > 8 else ""
    each = [f"{config.cpus_per_task} CPUs"] if config.cpus_per_task else []
    each += [f"{config.gpus_per_node} GPUs"] if config.gpus_per_node else []
    wanted = f"--nodes {config.nodes}" + (f" with {' and '.join(each)} each" if each else "")
    if not nodes:
        return f"{wanted}; the Ray cluster has no node"
    return f"{wanted}; the Ray cluster has {len(nodes)} nodes ({there}{more}), which must be free"


def ended_by_drain(run_dir: Path, job: str) -> bool:
    """The job's last session ended because of the platform, not because a user wanted it to."""
    try:
        events = map(json.loads, reversed((run_dir / "events.jsonl").read_text().splitlines()))
        last = next(event for event in events if event.get("job") == job)  # another job may have ended in the folder since
    except (OSError, ValueError, StopIteration):
        return False
    return last.get("event") == "end" and last.get("reason") == "preempted"


def state(job: Mapping[str, Any]) -> JobState:
    return local.state(job)  # the launcher is the job


def cancel(job: Mapping[str, Any], now: bool) -> None:
    local.cancel(job, now)
