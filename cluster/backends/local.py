"""The local backend: every node is an agent process on this machine, in a session of its own."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from cluster.layout import NodeTask
from cluster.processes import kill_processes_with, signal_group
from cluster.run_folder import FolderLock

HELD = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2}


class LocalNode:
    """An agent process. Its standard input is a pipe from the launcher: when the launcher dies it reads the end of it."""

    def __init__(self, task: NodeTask, lock: FolderLock) -> None:
        self.node = task.node
        self._task = task
        # An agent unblocks signals when it can handle them: one that comes before must wait, not end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        try:
            self._process = subprocess.Popen(
                task.agent_command(),
                stdin=subprocess.PIPE,
                start_new_session=True,  # the terminal's Ctrl-C reaches the launcher alone
                pass_fds=(lock.fileno(),),  # the folder stays locked until the last agent has ended, also without the launcher
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None and self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
            self._sweep()
        return code

    def send(self, number: int) -> None:
        if self._process.poll() is None:
            signal_group(self._process.pid, number)

    def _sweep(self) -> None:
        """End what an agent left that was itself killed (its ranks die with it, their helpers may not)."""
        kill_processes_with({"SLOTSTREAM_RUN_DIR": self._task.run_dir, "SLOTSTREAM_ATTEMPT": str(self._task.attempt),
                             "NODE_RANK": str(self._task.node)})  # fmt: skip


def start_local(tasks: Sequence[NodeTask], lock: FolderLock) -> list[Any]:
    """Start an agent per task. When one cannot be started, those before it are ended."""
    nodes: list[LocalNode] = []
    try:
        for task in tasks:
            nodes.append(LocalNode(task, lock))
    except OSError:
        for node in nodes:
            node.send(signal.SIGTERM)
        raise
    return nodes
