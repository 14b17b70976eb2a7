"""The run folder as the launcher sees it: who holds it, the next attempt, and a record of how the attempt was started."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.config import LaunchError
from cluster.layout import ROOT
from cluster.processes import write_json

RECORDED_PREFIXES = ("CUDA", "DS_", "GLOO_", "HYDRA_", "LC_", "MKL_", "NCCL_", "NVIDIA_", "OMP_", "OPENBLAS_", "PYTHON",
                     "PYTORCH", "RAY_", "SLOTSTREAM_", "SLURM_", "SUBMITIT_", "TORCH", "TRITON_", "UCX_", "XFORMERS")  # fmt: skip
RECORDED_NAMES = ("LANG", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "TERM", "VIRTUAL_ENV")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|PRIVATE|JWT|SIGNATURE", re.IGNORECASE)
LOGIN_IN_URL = re.compile(r"(\w+://)[^/@\s]+@")
QUERY_IN_URL = re.compile(r"(\w+://[^?\s,\]}]*)\?[^\s,\]}]+")  # an access token often stands there
HIDDEN = "<hidden>"


class FolderLock:
    """Sole use of a run folder by one job kind. The kernel frees it when the launcher and its agents have ended."""

    def __init__(self, run_dir: Path, job: str) -> None:
        """Raises: LaunchError that names the holder when the folder is in use."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._stream = open(run_dir / f"{job}.lock", "a+")  # noqa: SIM115 - lives as long as the lock
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = self._holder()
            self._stream.close()
            raise LaunchError(
                f"run folder {run_dir} is in use by {holder}; one launcher at a time; stop that one or choose another name=..."
            ) from None
        self._stream.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": now()}, self._stream)
        self._stream.flush()

    def _holder(self) -> str:
        self._stream.seek(0)
        try:
            holder = json.load(self._stream)
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (ValueError, KeyError, TypeError):
            return "another launcher"

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()


def next_attempt(run_dir: Path) -> int:
    """The number after the highest under attempts/; 1 in a new folder."""
    taken = [int(entry.name) for entry in (run_dir / "attempts").glob("[0-9]*") if entry.name.isdigit()]
    return max(taken, default=0) + 1


def make_attempt(run_dir: Path) -> int:
    """Create the next attempts/<n>. Two jobs in one folder (evaluate beside train) never get the same number."""
    while True:
        number = next_attempt(run_dir)
        try:
            (run_dir / "attempts" / str(number)).mkdir(parents=True)
            return number
        except FileExistsError:
            continue


def withdraw_targets(run_dir: Path, watched: str | None) -> None:
    """Take away the target lists of a run that has ended, in case rank 0 was killed before it could do so itself.

    `watched` is the folder of observe.targets_dir where the command gave one; the run's copy there has the same content.
    """
    own = run_dir / "monitoring" / "targets.json"
    try:
        content = own.read_bytes()
    except FileNotFoundError:
        return
    for copy in Path(watched).glob("*.json") if watched else ():
        try:
            if copy.read_bytes() == content:
                copy.unlink()
        except FileNotFoundError:
            continue
    own.unlink(missing_ok=True)


def write_launch_record(folder: Path, argv: Sequence[str], environment: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """launch.json: the command, where and when it started, the code's commit, and the environment without secrets."""
    record = {
        "command": [clean_word(word) for word in argv],
        **facts,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "working_folder": os.getcwd(),
        "started": now(),
        "git": git_state(),
        "environment": clean_environment(environment),
    }
    write_json(folder / "launch.json", record)


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that can change a run, none that can hold a secret."""
    kept = {k: v for k, v in sorted(environment.items()) if k in RECORDED_NAMES or k.startswith(RECORDED_PREFIXES)}
    return {key: HIDDEN if SECRET.search(key) else LOGIN_IN_URL.sub(rf"\1{HIDDEN}@", value) for key, value in kept.items()}


def clean_word(word: str) -> str:
    """A command-line word without the value of a key that sounds secret, and without a URL's login and query."""
    key, equals, _ = word.partition("=")
    if equals and SECRET.search(key.rpartition(".")[2]):
        return f"{key}={HIDDEN}"
    return QUERY_IN_URL.sub(rf"\1?{HIDDEN}", LOGIN_IN_URL.sub(rf"\1{HIDDEN}@", word))


def git_state(root: Path = ROOT) -> dict[str, Any] | None:
    """Commit of the checkout and whether files differ from it; None for an installed package or without git."""
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        return {"commit": commit, "changed": bool(_git(root, "status", "--porcelain", "--untracked-files=no").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True).stdout


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
