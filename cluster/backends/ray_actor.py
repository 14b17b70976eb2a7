"""What Ray runs on a node: an actor that keeps one agent process. Nothing of ours is imported there.

The class travels by value (`ray.cloudpickle`), so the node needs no import of this module; the agent program it starts is found
through the checkout's path on the shared file system. No signal handlers here: an actor's belong to Ray.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Run in the new process before the agent. It asks the kernel to be killed with the actor, and holds signals back until the agent
# can handle them. (A function between fork and exec would do the same, but this process has Ray's threads.)
PREPARE = """
import ctypes, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2))
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
RAYS_OWN = ("RAY_", "OMP_NUM_THREADS")  # the second: Ray sets it to the actor's CPUs, but several ranks share them


class AgentHost:
    """Starts the agent `words` with `environment` beyond the node's; `mark` finds what a killed agent left."""

    def __init__(self, words: list[str], environment: dict[str, str], mark: dict[str, str]) -> None:
        self._mark = mark
        self._process: Any = None
        self._problem = ""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the actor
        host = socket.gethostname()
        if not os.path.exists(words[1]):
            self._problem = f"cannot start: {host} has no {words[1]}; the checkout must be on a file system that all nodes share"
            return
        python = words[0] if os.path.exists(words[0]) else sys.executable
        kept = {key: value for key, value in os.environ.items() if not key.startswith(RAYS_OWN)}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", PREPARE, str(os.getpid()), python, *words[1:]],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env={**kept, **environment},
                start_new_session=True,
            )
        except OSError as error:
            self._problem = f"cannot start on {host}: {error}"

    def poll(self) -> tuple[str, str]:
        """(id of the Ray node, why the agent is gone as the end of a sentence: "" while it runs)."""
        import ray

        return ray.get_runtime_context().get_node_id(), self._why_gone()

    def _why_gone(self) -> str:
        code = None if self._process is None else self._process.poll()
        if code is None:
            return self._problem
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - 2000))
        said = self._output.read().decode("utf-8", "replace").strip().splitlines()
        return f"ended with exit code {code}" + (f": {said[-1]}" if said else "")

    def signal(self, number: int) -> None:
        """Signal the agent's group; no error when it has ended."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def end(self) -> None:
        """Kill the agent and whatever it left: its ranks die with it, their helpers may not."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        marks = {f"{key}={value}".encode() for key, value in self._mark.items()}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if marks <= set((entry / "environ").read_bytes().split(b"\0")):
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue  # ended meanwhile, or another user's
