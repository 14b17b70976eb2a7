"""One node of a Ray cluster that a launcher started: `ray start` runs, and ends with the launcher.

In: what to start, on the command line; the cluster's secret, in the environment. Out: a raylet (and the cluster's head process)
until standard input ends, a signal comes or Ray itself ends; then nothing is left, neither process nor file. `ray stop` is not
used: it ends every Ray process of the host by name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder of backends must not be where modules are looked for
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cluster.processes import Port, SignalPipe, die_with_parent, kill_processes_with, signal_process
from cluster.verdict import last_lines

MARK = "SLOTSTREAM_RAY_NODE"  # in the environment of all that runs on this node, also of ranks: nothing is missed at the end
OBJECT_STORE = 80 * 2**20  # bytes; Ray's least, about: nothing of ours travels through it
# Seconds until a node that died is known to be dead: 15 by Ray's defaults.
HEALTH = {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
          "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "3"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node; return 0 when it was told to end, else 1 with Ray's last words on stderr."""
    flags = _parser().parse_args(argv)
    signals = SignalPipe((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD))
    folder = Path(flags.folder or tempfile.mkdtemp(prefix="ss-ray-", dir="/tmp"))  # sockets lie in it: paths end at 107 bytes
    folder.mkdir(parents=True, exist_ok=True)
    mark = {MARK: uuid.uuid4().hex}
    ports = [Port() for _ in range(4)]  # Ray's own choices are the same for all heads, or meet when two nodes start at once
    node = _start(flags, folder, mark, ports)
    try:
        code = _watch(node, signals)
    finally:
        _end(node, mark)
        for port in ports:
            port.close()
    if code:
        print(f"ray start ended by itself: {_last_words(folder)}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if flags.folder:
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # the last node out, where the launcher was killed and cannot do it
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cluster/backends/ray_node.py", description="One node of a Ray cluster of a launcher.")
    parser.add_argument("--head", action="store_true", help="start the cluster's head, too")
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="where the head is, or with --head is to be")
    parser.add_argument("--ip", metavar="ADDR", help="this node's own address (default: Ray finds it)")
    parser.add_argument("--folder", metavar="DIR", help="for sockets and logs, removed at the end (default: a new one in /tmp)")
    parser.add_argument("--cpus", type=int, metavar="N", help="CPUs of this node (default: Ray counts them)")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of this node (default: Ray counts them)")
    return parser


def ray_command(flags: argparse.Namespace, folder: Path, ports: Sequence[int]) -> list[str]:
    """The words of `ray start` for this node."""
    where = ["--head", "--port", flags.address.rpartition(":")[2]] if flags.head else ["--address", flags.address]
    words = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        *where,
        "--temp-dir",
        str(folder),
        "--disable-usage-stats",
        "--log-color",
        "false",
    ]
    words += ["--include-log-monitor", "false", "--object-store-memory", str(OBJECT_STORE)]
    words += ["--node-manager-port", str(ports[0]), "--object-manager-port", str(ports[1])]
    words += ["--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"]
    if flags.head:
        words += ["--ray-client-server-port", str(ports[2]), "--dashboard-port", str(ports[3]), "--include-dashboard", "false"]
    for flag, value in (("--node-ip-address", flags.ip), ("--num-cpus", flags.cpus), ("--num-gpus", flags.gpus)):
        words += [] if value is None else [flag, str(value)]
    return words


def _start(flags: argparse.Namespace, folder: Path, mark: dict[str, str], ports: Sequence[Port]) -> subprocess.Popen[bytes]:
    with open(folder / "start.log", "ab") as log:
        return subprocess.Popen(
            ray_command(flags, folder, [port.number for port in ports]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **HEALTH, "RAY_USAGE_STATS_ENABLED": "0", **mark},
            start_new_session=True,
            preexec_fn=die_with_parent(),  # Ray passes that on: raylet and head end with `ray start`
        )


def _watch(node: subprocess.Popen[bytes], signals: SignalPipe) -> int:
    """0 when standard input ended or a signal came, 1 when Ray ended. A drained raylet ends without `ray start` minding."""
    started = False
    while node.poll() is None:
        numbers, readable = signals.wait(1.0, sys.stdin.fileno())
        if set(numbers) - {signal.SIGCHLD} or (readable and not os.read(sys.stdin.fileno(), 4096)):
            return 0
        there = any(_name(pid) == "raylet" for pid in _session(node.pid))
        if started and not there:
            return 1
        started = started or there
    return 1


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _last_words(folder: Path) -> str:
    """What `ray start` said last, and what its raylet died of."""
    said = last_lines(folder / "start.log", 1)
    for log in folder.glob("session_2*/logs/raylet.out"):
        cause = [line for line in last_lines(log, 200) if "what():" in line or "Check failed" in line]
        said += cause[:1]
    return "; ".join(line[:300] for line in said)


def _end(node: subprocess.Popen[bytes], mark: dict[str, str]) -> None:
    """Kill all of it. Ray's helpers overwrite their environment with a title: those are known by their session."""
    deadline = time.monotonic() + 5.0
    node.send_signal(signal.SIGKILL)
    while (left := _session(node.pid)) and time.monotonic() < deadline:
        for pid in left:
            signal_process(pid, signal.SIGKILL)
        time.sleep(0.02)
    node.wait()  # not earlier: until it is reaped, its number means this session and no other
    kill_processes_with(mark)


def _session(leader: int) -> list[int]:
    """The living processes of a session but its leader."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) == leader and int(entry.name) != leader and state not in "ZX":
            found.append(int(entry.name))
    return found


if __name__ == "__main__":
    sys.exit(main())
