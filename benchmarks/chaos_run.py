"""A small training run under the launcher, seen from outside: its command, its processes, its newest step, what it left.

Comes in: where it runs (a Place) and how long. Goes out: what the faults and the verdict need. Nothing here asks the launcher:
processes are found by their environment and command line, steps by the record of applied updates.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos_places import Place
from cluster.processes import kill_processes_with, processes_with
from tests.integration.faulty_server import FaultyServer
from tests.integration.tiny_run import applied_ids, arguments, write_split

ROOT = Path(__file__).resolve().parent.parent
NUM_SHARDS, GLOBAL_BATCH, SAVE_EVERY = 8, 4, 4
DISK = "32m"  # of the checkpoints, where one can be mounted
POLL_S = 0.05


class ChaosError(RuntimeError):
    """The run did not do what it must."""


@dataclass
class Run:
    """One run folder and the command that makes it go on."""

    folder: Path
    name: str
    steps: int
    place: Place
    data: str  # URL of the shards
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    starts: int = 0

    def __post_init__(self) -> None:
        self.run_dir = self.folder / "runs" / self.name
        self.cache = self.folder / "cache"
        self.console = self.folder / f"{self.name}.console"
        self.process: subprocess.Popen[bytes] | None = None
        self._mounted = False

    # -- the command -----------------------------------------------------------------------------------------------------

    def command(self) -> list[str]:
        settings = arguments(Path("unused"), self.folder, self.name, *self._settings())[2:]
        words = [word for word in settings if not word.startswith("runs=")]
        return [
            sys.executable,
            str(ROOT / "cluster" / "launch.py"),
            *self.place.flags,
            "--runs",
            str(self.run_dir.parent),
            *words,
        ]

    def _settings(self) -> list[str]:
        reproducible = (ROOT / "configs" / "parallel" / "reproducible.yaml").is_file()
        return [
            *(["parallel=reproducible"] if reproducible else []),
            f"data.root={self.data}", f"data.remote.cache_dir={self.cache}", "data.remote.stall_s=3", "data.lanes=4",
            f"optim.max_steps={self.steps}", f"optim.decay_steps={self.steps}", f"optim.global_batch={GLOBAL_BATCH}",
            f"checkpoint.every_steps={SAVE_EVERY}", "checkpoint.keep=3", "observe.log_every=5",
        ]  # fmt: skip

    def start(self) -> None:
        """Type the command, for the first time or again."""
        environment = {**self.place.environment, "SLOTSTREAM_CHAOS": self.mark, "OMP_NUM_THREADS": "1", "no_proxy": "*"}
        with self.console.open("ab") as output:
            self.process = subprocess.Popen(self.command(), cwd=ROOT, env=environment, stdout=output, stderr=output, stdin=-3)
        self.starts += 1

    def exit_code(self) -> int | None:
        return None if self.process is None else self.process.poll()

    def close(self) -> None:
        """End what is left of it."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        kill_processes_with({"SLOTSTREAM_CHAOS": self.mark})
        if self._mounted:
            subprocess.run(["umount", "--lazy", str(self.checkpoints)], check=False)

    # -- what it is doing ------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def step(self) -> int:
        """The newest applied update that rank 0 has recorded; 0 before the first."""
        try:
            with (self.run_dir / "order" / "rank0.jsonl").open("rb") as stream:
                stream.seek(0, os.SEEK_END)
                stream.seek(max(0, stream.tell() - 4096))
                found = re.findall(rb'^\{"step": (\d+),.*\}$', stream.read(), re.MULTILINE)
        except FileNotFoundError:
            return 0
        return int(found[-1]) if found else 0

    def attempt(self) -> int:
        taken = [int(path.name) for path in (self.run_dir / "attempts").glob("*") if path.name.isdigit()]
        return max(taken, default=0)

    def has_reached(self, step: int) -> bool:
        return self.step() >= step

    def ranks(self) -> dict[int, int]:
        """Process id of each living rank."""
        found = {}
        for pid in processes_with({"SLOTSTREAM_RUN_DIR": str(self.run_dir)}):
            rank = re.search(rb"\0RANK=(\d+)\0", b"\0" + read_proc(pid, "environ"))
            if rank and b"trainer.main" in read_proc(pid, "cmdline"):
                found[int(rank[1])] = pid
        return found

    def agents(self) -> list[int]:
        words = str(self.run_dir).encode()
        running = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        lines = {pid: read_proc(pid, "cmdline").split(b"\0") for pid in running}  # srun's line names the agent, too
        return [pid for pid, line in lines.items() if words in line and len(line) > 1 and line[1].endswith(b"cluster/agent.py")]

    def left(self) -> list[int]:
        """Processes of this run that live, whoever started them."""
        return sorted({*processes_with({"SLOTSTREAM_CHAOS": self.mark}), *self.ranks().values(), *self.agents()})

    def newest_checkpoint(self) -> Path | None:
        found = sorted(path for path in self.checkpoints.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))
        return found[-1] if found else None

    def until(self, happens: Callable[[], Any], what: str, patience_s: float) -> None:
        """Raises: ChaosError after `patience_s`, or when the command ends though nobody ended it."""
        deadline = time.monotonic() + patience_s
        while not happens():
            if self.exit_code() not in (None, 0):
                raise ChaosError(f"the command ended with {self.exit_code()} while waiting: {what}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ChaosError(f"not within {patience_s:.0f} s: {what} (step {self.step()})\n{self.tail()}")
            time.sleep(POLL_S)

    def tail(self, lines: int = 25) -> str:
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return "\n".join(text.replace("\r", "\n").splitlines()[-lines:])

    # -- what came of it -------------------------------------------------------------------------------------------------

    def small_disk(self) -> None:
        """Give the checkpoints a small disk of their own. Raises: ChaosError where that cannot be done."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "slotstream-chaos", str(self.checkpoints)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise ChaosError(f"no small disk: {done.stderr.strip()}")
        self._mounted = True

    def order(self) -> dict[int, list[int]]:
        """Sample ids of every applied update, in the order of the stream."""
        return applied_ids(self.run_dir, len(list((self.run_dir / "order").glob("rank*.jsonl"))))

    def positions(self) -> list[int]:
        """Stream positions of all applied updates, sorted: exactly once is 0, 1, 2, ..."""
        logs = (self.run_dir / "order").glob("rank*.jsonl")
        return sorted(at for log in logs for line in log.read_text().splitlines() for at in json.loads(line)["positions"])

    def digests(self) -> dict[str, str]:
        """sha256 of the last checkpoint's tensors."""
        folder = self.checkpoints / f"step_{self.steps:08d}"
        return {name: sha256(folder / name) for name in ("model.safetensors", "optimizer.safetensors")}


def read_proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "absent"


@contextmanager
def served_shards(folder: Path, place: Place) -> Iterator[str]:
    """Shards behind HTTP, so that a damaged one in the cache is mended by fetching it again."""
    write_split(folder / "data", "train", frames=((4, 6),) * NUM_SHARDS)
    with FaultyServer(folder / "data", address=place.address) as server:
        yield server.url
