"""The run folder as the launcher sees it: attempts, events, the job, and a record of how each attempt was started."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.layout import ROOT
from cluster.processes import write_json

RECORDED_PREFIXES = ("CUDA", "DS_", "GLOO_", "HYDRA_", "LC_", "MKL_", "NCCL_", "NVIDIA_", "OMP_", "OPENBLAS_", "PYTHON",
                     "PYTORCH", "RAY_", "SLOTSTREAM_", "SLURM_", "SUBMITIT_", "TORCH", "TRITON_", "UCX_", "XFORMERS")  # fmt: skip
RECORDED_NAMES = ("LANG", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "TERM", "VIRTUAL_ENV")
NEVER_RECORDED = ("RAY_JOB_CONFIG_JSON_ENV_VAR",)  # of `ray job submit`: all env_vars of the job, as JSON
SECRET = re.compile(
    r"(?<!QUERY_)KEY|TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|PRIVATE|JWT|SIGNATURE", re.IGNORECASE
)
# KEY= wherever it stands in a word: an override, `export KEY=`, export=ALL,KEY=; in {KEY: ...} and "KEY: ..." a colon.
SECRET_GIVEN = re.compile(rf"((?:{SECRET.pattern})[\w@\[\]'\"-]*\W*?(?:=|:(?=\s|.*\}}))).+", re.IGNORECASE | re.DOTALL)
LOGIN_IN_URL = re.compile(r"(\w+://)[^/\s]+@")
QUERY_IN_URL = re.compile(r"(\w+://[^?\s,\]}]*)\?[^\s,\]}]+")  # an access token often stands there
HIDDEN = "<hidden>"


class EventLog:
    """runs/<name>/events.jsonl: what happened to a run, one JSON object a line, over all its sessions."""

    def __init__(self, run_dir: Path, session: str) -> None:
        self._path = run_dir / "events.jsonl"
        self._session = session

    def write(self, event: str, attempt: int | None, **facts: Any) -> None:
        """Add a line. A full disk is no reason to end a run: the line is then missing."""
        record = {"time": round(time.time(), 3), "event": event, "session": self._session, "attempt": attempt, **facts}
        with contextlib.suppress(OSError), open(self._path, "a") as stream:
            stream.write(json.dumps(record) + "\n")


def job_file(run_dir: Path, job: str) -> Path:
    """job.json is the training's; scoring beside it has a record of its own, as it has an owner file."""
    return run_dir / ("job.json" if job == "train" else f"job_{job}.json")


def write_job(run_dir: Path, job: str, backend: str, job_id: str, words: Sequence[str]) -> None:
    """The job's file: how status and cancel find it again. `job_id` is the backend's."""
    record = {"backend": backend, "id": job_id, "host": socket.gethostname(), "pid": os.getpid(),
              "words": [clean_word(word) for word in words], "submitted": now()}  # fmt: skip
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(job_file(run_dir, job), record)


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; -1 where there is none. It may be damaged: this is a measure of progress only."""
    steps = [entry.parent.name.removeprefix("step_") for entry in (run_dir / "checkpoints").glob("step_*/manifest.json")]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


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


def withdraw_targets(run_dir: Path, watched: str | None, name: str = "targets.json") -> None:
    """Take away the target list `name` of a job that has ended, in case rank 0 was killed before it could do so itself.

    `watched` is the folder of observe.targets_dir where the command gave one, else a monitor's beside the run folder; the run's
    copy there has the same content.
    """
    own = run_dir / "monitoring" / name
    try:
        content = own.read_bytes()
    except FileNotFoundError:
        return
    for copy in Path(watched or run_dir.parent / ".targets").glob("*.json"):
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
    """The variables that can change a run, none that can hold a secret: a value that is JSON may hold others' variables."""
    kept = {k: v for k, v in sorted(environment.items()) if k in RECORDED_NAMES or k.startswith(RECORDED_PREFIXES)}
    return {
        key: HIDDEN if SECRET.search(key) or value.lstrip().startswith("{") else clean_word(value)
        for key, value in kept.items()
        if key not in NEVER_RECORDED
    }


def clean_word(word: str) -> str:
    """A command-line word without what follows a key that sounds secret, and without a URL's login and query.

    The word's whole rest goes: where a value ends is told by rules of the shell, of Slurm or of Hydra, and it may hold commas,
    spaces and quotes.
    """
    word = SECRET_GIVEN.sub(rf"\1{HIDDEN}", word)
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
