"""Start real ranks: one process each, gloo, one thread, a rendezvous port of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What the launcher sets for a rank, on a machine where one thread is a rank's share."""
    own = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        "DS_ACCELERATOR": "cpu",
    }
    kept = {
        key: value for key, value in os.environ.items() if key not in ("LOCAL_SIZE", "SLOTSTREAM_RUN_DIR", "SLOTSTREAM_ATTEMPT")
    }
    return kept | {key: str(value) for key, value in own.items()}


def start_ranks(world_size: int, command: list[str], folder: Path) -> list[subprocess.Popen]:
    """`python <command>` once per rank; stdout and stderr of rank r in folder/rank<r>.{out,err}."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(world_size):
        with (folder / f"rank{rank}.out").open("w") as out, (folder / f"rank{rank}.err").open("w") as err:
            environment = rank_environment(rank, world_size, port)
            processes.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=out, stderr=err))
    return processes


def finish(processes: list[subprocess.Popen], timeout: float = 120) -> list[int]:
    """Exit codes; nothing outlives the call."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def run_ranks(world_size: int, command: list[str], folder: Path) -> list[Any]:
    """Run to the end; each rank's last line of stdout as JSON. Fails with a rank's stderr when one fails."""
    codes = finish(start_ranks(world_size, command, folder))
    errors = [(folder / f"rank{rank}.err").read_text()[-3000:] for rank in range(world_size)]
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(errors)
    return [json.loads((folder / f"rank{rank}.out").read_text().strip().splitlines()[-1]) for rank in range(world_size)]
