"""What `doctor` looks at on one machine: a folder of runs in, Checks out. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.commands.doctor_software import (
    COMPARED,
    OK,
    PROBLEM,
    WARNING,
    Check,
    Imports,
    describe_gpus,
    devices_check,
    imports_checks,
    package_versions,
    packages_check,
    python_check,
)
from cluster.commands.tables import size
from cluster.layout import ROOT, usable_cores

WRITE_BYTES, WRITE_SECONDS = 64 << 20, 2.0
SLOW_DISK = 50e6  # bytes per second
LITTLE_SPACE, NO_SPACE = 20 << 30, 1 << 30
OPEN_FILES = 4096
SHARED_MEMORY = 1 << 30


def local_checks(runs: Path, *, backend: str = "auto", address: str | None = None) -> tuple[list[Check], dict[str, Any]]:
    """(all checks of this machine, the facts that must be the same on all nodes)."""
    imports = Imports()
    versions = package_versions(COMPARED)
    checks: list[Check] = []
    for name, check in (
        ("python", python_check),
        ("packages", lambda: packages_check(ROOT / "constraints.txt")),
        ("cores and memory", cores_check),
        ("open files", open_files_check),
        ("shared memory", shared_memory_check),
        ("run folder", lambda: folder_check(runs)),
        ("network", network_check),
        ("slurm", lambda: slurm_check(wanted=backend == "slurm")),
        ("ray", lambda: ray_check(address or os.environ.get("RAY_ADDRESS"), wanted=backend == "ray")),
    ):
        checks += _guarded(name, check)
    gpus = describe_gpus()
    found = imports.collect()
    checks += _guarded("imports", lambda: imports_checks(found, bool(gpus)))
    checks += _guarded("devices", lambda: devices_check(gpus, found))
    facts = {"python": ".".join(map(str, sys.version_info[:3])), **versions, "devices": ", ".join(gpus) or "CPU"}
    return checks, facts


def _guarded(name: str, check: Callable[[], Check | list[Check]]) -> list[Check]:
    """A check that cannot be made is a finding, not the end of the others."""
    try:
        found = check()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return [Check(name, PROBLEM, f"cannot be checked: {error}", "mend what the message names")]
    return [found] if isinstance(found, Check) else found


def cores_check() -> Check:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Check("cores and memory", OK, f"{usable_cores()} cores, {size(memory)}")


def open_files_check() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    value = f"{'unlimited' if soft == unlimited else soft} (hard limit {'none' if hard == unlimited else hard})"
    if soft != unlimited and soft < OPEN_FILES:
        return Check("open files", WARNING, value, f"ulimit -n {OPEN_FILES} before the launch, or with --setup")
    return Check("open files", OK, value)


def shared_memory_check() -> Check:
    try:
        space = shutil.disk_usage("/dev/shm")
    except OSError:
        return Check("shared memory", WARNING, "there is no /dev/shm", "mount a tmpfs there; NCCL and gloo use it")
    value = f"/dev/shm {size(space.total)}, {size(space.free)} free"
    if space.free < SHARED_MEMORY:
        return Check(
            "shared memory", WARNING, value, f"give it {size(SHARED_MEMORY)} or more (containers: --shm-size, or --ipc=host)"
        )
    return Check("shared memory", OK, value)


def folder_check(runs: Path) -> list[Check]:
    """Create, write, rename and lock in the folder of runs; its speed with fsync; its room."""
    made = [folder for folder in (runs, *runs.parents) if not os.path.exists(folder)]
    probe = runs / f".doctor.{socket.gethostname()}.{os.getpid()}"
    try:
        probe.mkdir(parents=True)
        checks = [_lock_check(probe), *_disk_checks(probe)]
    except OSError as error:
        return [Check("run folder", PROBLEM, f"{runs}: {error.strerror}", "give a folder that can be written: --runs DIR")]
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        for folder in made:  # leave nothing behind
            with contextlib.suppress(OSError):  # it is not empty, was never made, or lies where we may not look
                folder.rmdir()
    kind = file_system_of(runs)
    known = Check("run folder", OK, f"{runs} on {kind or 'an unknown file system'}: written, renamed and locked")
    if kind == "tmpfs":
        known = Check("run folder", WARNING, f"{runs} is in memory (tmpfs)", "checkpoints there end with the machine; --runs DIR")
    bad = [check for check in checks if check.name == "run folder" and check.result != OK]
    return [*(bad or [known]), *(check for check in checks if check.name != "run folder")]


def _lock_check(probe: Path) -> Check:
    (probe / "a").write_text("old")
    (probe / "b").write_text("new")
    os.replace(probe / "b", probe / "a")
    if (probe / "a").read_text() != "new":
        return Check("run folder", PROBLEM, "a renamed file still has its old content", "use a file system with atomic rename")
    with open(probe / "lock", "w") as first, open(probe / "lock", "w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            advice = "two launches on one run are then kept apart by owner.json alone; mount it with locks (Lustre: flock)"
            return Check("run folder", WARNING, f"no file locks: {error.strerror}", advice)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return Check("run folder", OK, "")
    return Check("run folder", WARNING, "file locks do not exclude", "mount it with locks (Lustre: flock)")


def _disk_checks(probe: Path) -> list[Check]:
    block, written, begun = os.urandom(4 << 20), 0, time.monotonic()
    with open(probe / "data", "wb", buffering=0) as stream:
        while written < WRITE_BYTES and time.monotonic() - begun < WRITE_SECONDS:
            written += stream.write(block)
        os.fsync(stream.fileno())
    speed = written / max(1e-6, time.monotonic() - begun)
    value = f"{speed / 1e6:,.0f} MB/s ({size(written)} with fsync)"
    slow = Check("disk speed", WARNING, value, "checkpoints take long there; use a faster file system")
    free = shutil.disk_usage(probe).free
    room = f"{size(free)} free"
    space = Check("disk space", OK, room)
    if free < LITTLE_SPACE:
        result = PROBLEM if free < NO_SPACE else WARNING
        space = Check("disk space", result, room, "free space, or keep fewer checkpoints: checkpoint.keep=2")
    return [slow if speed < SLOW_DISK else Check("disk speed", OK, value), space]


def file_system_of(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Type of the file system that holds `path`; "" when that cannot be told."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    where = os.path.realpath(path)
    holding = [line for line in lines if len(line) > 2 and (where + "/").startswith(line[1].rstrip("/") + "/")]
    return max(holding, key=lambda line: len(line[1]))[2] if holding else ""


def own_address() -> str:
    """The address that this machine would use to reach others; loopback without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def network_check() -> Check:
    """A port opened on the machine's own address, and reached through it."""
    address = own_address()
    try:
        with socket.create_server((address, 0)) as server:
            server.settimeout(5)
            with socket.create_connection(server.getsockname()[:2], timeout=5) as client, server.accept()[0] as accepted:
                client.sendall(b"x")
                accepted.settimeout(5)
                if accepted.recv(1) != b"x":
                    raise OSError("a byte did not arrive")
    except OSError as error:
        return Check("network", PROBLEM, f"{address}: {error}", "open the firewall between nodes, or choose --interface IF")
    if address.startswith("127."):
        return Check(
            "network", WARNING, "only loopback", "other nodes cannot reach this one; choose --interface IF or --listen ADDR"
        )
    return Check("network", OK, f"{address} ({socket.gethostname()})")


def slurm_check(*, wanted: bool) -> Check:
    if not shutil.which("sbatch"):
        value = "sbatch is not installed"
        return (
            Check("slurm", PROBLEM, value, "run this on a login node")
            if wanted
            else Check("slurm", OK, f"{value}; not needed here")
        )
    advice = "ask the cluster's administrator; see scontrol ping" if wanted else "no matter without --backend slurm"
    result = PROBLEM if wanted else OK
    quiet = "the client is installed; no controller answers"
    try:
        answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=8)
    except subprocess.TimeoutExpired:
        return Check("slurm", result, quiet, advice)
    said = " ".join((answer.stdout or answer.stderr).split())
    up = answer.returncode == 0 and " is UP" in said.replace(" are ", " is ")
    return Check("slurm", OK, said) if up else Check("slurm", result, f"{quiet}: {said[:100]}" if wanted else quiet, advice)


def ray_check(address: str | None, *, wanted: bool) -> Check:
    there = package_versions(("ray",)).get("ray")
    if there is None:
        value = "not installed"
        return Check("ray", PROBLEM, value, "pip install ray") if wanted else Check("ray", OK, f"{value}; not needed here")
    if not address or address in ("auto", "local"):
        return Check("ray", OK, there)
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return Check("ray", OK, f"{there}; {address} can be reached")
    except (OSError, ValueError) as error:
        advice = "start the cluster, or mend --address HOST:PORT"
        return Check("ray", PROBLEM if wanted else WARNING, f"{there}; {address}: {error}", advice)
