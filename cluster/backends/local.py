"""The local backend: every node is an agent process on this machine, in a session of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.backends import JobState
from cluster.config import LaunchConfig
from cluster.heartbeats import sweep
from cluster.layout import AGENT, NodeFacts, NodeTask, describe, node_tasks
from cluster.network import hub_address
from cluster.placement import Session
from cluster.processes import Port, exit_of, kill_processes_with, signal_group, signal_process
from cluster.run_folder import job_file, next_attempt, write_job
from cluster.supervision.supervisor import supervise

HELD = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2}
CLOSE_WITHIN = 1.0  # for agents that have been sent away; one that never reported has no ranks
DETACHED_LOG = "launch.log"
LAUNCHER = AGENT.with_name("launch.py")


class LocalPlacement:
    """Agents as child processes. See cluster/placement.py."""

    ends_at: float | None = None
    replaces = True

    def __init__(self, session: Session) -> None:
        self._session = session
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def place(self, slot: int) -> None:
        self._end(slot)
        wrap = shlex.split((self._session.config.wrap or "").replace("{slot}", str(slot)))
        # An agent unblocks signals when it can handle them: one that comes before must wait, not end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        try:
            self._processes[slot] = subprocess.Popen(
                [*wrap, *self._session.words(slot)],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self._session.environment()},
                start_new_session=True,  # the terminal's Ctrl-C reaches the launcher alone
                pass_fds=() if self._session.lock is None else (self._session.lock,),  # locked until the last agent has ended
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def lost(self, slot: int) -> str | None:
        process = self._processes.get(slot)
        code = None if process is None else process.poll()
        if code is None:
            return None
        shell_code, name = exit_of(code)
        return f"was killed by {name}" if name else f"ended with exit code {shell_code}"

    def signal(self, slot: int, number: int) -> None:
        process = self._processes.get(slot)
        if process is not None and process.poll() is None:
            signal_group(process.pid, number)

    def close(self) -> None:
        deadline = time.monotonic() + CLOSE_WITHIN
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes.values()):
            time.sleep(0.02)
        for slot in list(self._processes):
            self._end(slot)
        sweep()  # an agent that was killed cleared nothing away

    def _end(self, slot: int) -> None:
        """End the slot's agent and whatever it left: its ranks die with it, their helpers may not."""
        process = self._processes.pop(slot, None)
        if process is None:
            return
        if process.poll() != 0:
            signal_group(process.pid, signal.SIGKILL)
            process.wait()
            kill_processes_with({"SLOTSTREAM_SESSION": self._session.name, "SLOTSTREAM_SLOT": str(slot)})


def local_tasks(config: LaunchConfig, attempt: int, port: int) -> list[NodeTask]:
    """What would run. Raises: LaunchError when this machine cannot hold it."""
    address = hub_address(config, "local")
    nodes = [NodeFacts.of_this_node(slot, address) for slot in range(config.nodes)]
    return node_tasks(config, nodes, attempt=attempt, master_port=port)


def render(config: LaunchConfig, words: Sequence[str]) -> str:
    port = Port()
    try:
        tasks = local_tasks(config, next_attempt(Path(config.run_dir)), port.number)
        return describe(tasks, "local", f"{tasks[0].master_addr}:PORT", os.environ)
    finally:
        port.close()


def launch(config: LaunchConfig, words: Sequence[str]) -> int:
    local_tasks(config, 1, 0)  # an impossible layout is refused before anything is created
    if config.detach:
        return detach(config, words)

    def make(session: Session) -> LocalPlacement:
        write_job(Path(config.run_dir), config.job, "local", str(os.getpid()), words)
        return LocalPlacement(session)

    return supervise(config, "local", make, words)


def detach(config: LaunchConfig, words: Sequence[str], backend: str = "local") -> int:
    """Start a launcher of its own session, with its output in a file; return when it owns the run folder. Ctrl-C ends it."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir / DETACHED_LOG
    rest = [word for word in words if word != "--detach"]
    # A Ctrl-C waits until there is a process to end.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with open(log, "ab") as stream:
            place = stream.tell()
            process = subprocess.Popen(
                [sys.executable, str(LAUNCHER), "--backend", backend, *rest],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before),
            )
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if _await_owner(job_file(run_dir, config.job), process):
                print(f"started as process {process.pid}; output in {log}", file=sys.stderr)
                return 0
        except BaseException:
            _end_launcher(process, config.grace + CLOSE_WITHIN)
            raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with open(log, "rb") as said:  # it ended before it owned the folder, or at once
        said.seek(place)
        sys.stderr.write(said.read().decode("utf-8", "replace"))
    return exit_of(process.returncode)[0]


def _await_owner(record: Path, process: subprocess.Popen[bytes]) -> bool:
    """True when the launcher owns the run folder and has written its record, False when it has ended before."""
    while process.poll() is None:
        if _is_job(record, process.pid):
            return True
        time.sleep(0.05)
    return False


def _end_launcher(process: subprocess.Popen[bytes], grace: float) -> None:
    """SIGTERM, and SIGKILL after `grace` seconds or a Ctrl-C more; its agents end with it."""
    process.terminate()
    try:
        process.wait(grace)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def _is_job(record: Path, pid: int) -> bool:
    try:
        return f'"id": "{pid}"' in record.read_text()
    except OSError:
        return False


def state(job: Mapping[str, Any]) -> JobState:
    """Of a launcher on this machine; one on another host is unknown here."""
    where = f"process {job.get('id')} on {job.get('host')}"
    if job.get("host") != os.uname().nodename:
        return JobState("unknown", where)
    return JobState("running" if _is_launcher(str(job.get("id"))) else "ended", where)


def cancel(job: Mapping[str, Any], now: bool) -> None:
    """SIGTERM: save and stop. `now`: two times SIGINT, no save."""
    if state(job).name != "running":
        return
    pid = int(job["id"])
    if not now:
        signal_process(pid, signal.SIGTERM)
        return
    for _ in range(2):
        signal_process(pid, signal.SIGINT)
        time.sleep(0.5)


def _is_launcher(pid: str) -> bool:
    """The number may be another process's by now."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return pid.isdigit() and b"launch" in words
