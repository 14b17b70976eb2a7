"""The files through which a Prometheus finds the ranks of a run, or a build (`file_sd`).

Comes in: the host:port of every rank. Goes out: `<run>/monitoring/targets.json`, written by rename, and a copy in a folder
that a long-lived Prometheus watches. A copy, not a link: Prometheus notices changes in the folder it watches, not behind links.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomically

STALE_S = 3600.0  # a live run refreshes its file every minute or so; one this old belongs to a run that died unheard
_PREFIX = "slotstream-"
SHARED = ".targets"  # beside run folders: `cluster/launch.py monitor` makes it, and all runs there list themselves in it


def watched_folder(run_dir: Path, asked: str | None) -> Path | None:
    """The folder that a long-lived Prometheus watches: the one asked for, else the one of a monitor beside the run folder."""
    if asked:
        return Path(asked)
    beside = run_dir.absolute().parent / SHARED
    return beside if beside.is_dir() else None


def target_group(target: str, *, run: str, attempt: int | str, node: str, rank: int, **more: object) -> dict[str, Any]:
    """One rank's entry. Labels are strings, as Prometheus wants them."""
    labels = {"run": run, "attempt": attempt, "node": node, "rank": rank, **more}
    return {"targets": [target], "labels": {key: str(value) for key, value in labels.items()}}


def write_targets(path: Path | str, groups: Sequence[dict[str, Any]]) -> None:
    """Write `path` (the run's monitoring/targets.json) so that a reader sees the old list or the new one."""
    write_atomically(Path(path), (json.dumps(list(groups), indent=1) + "\n").encode())


def link_into(path: Path | str, directory: Path | str) -> Path:
    """Copy the run's target file into a watched folder, and clear away what dead runs left there."""
    copy = watched_file(path, directory)
    write_atomically(copy, Path(path).read_bytes())
    clean_stale(directory)
    return copy


def watched_file(path: Path | str, directory: Path | str) -> Path:
    """The run's file in a watched folder. Runs of one name in two places get two files, a run always the same one."""
    run_dir = Path(path).absolute().parent.parent
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", run_dir.name)
    digest = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]
    return Path(directory) / f"{_PREFIX}{name}-{digest}.json"


def heartbeat(path: Path | str, directory: Path | str) -> None:
    """Say that the run still lives; without it another run clears the copy away after an hour."""
    copy = watched_file(path, directory)
    if copy.exists():
        os.utime(copy)
    else:
        link_into(path, directory)


def remove(path: Path | str, directory: Path | str | None = None) -> None:
    """Take the run's targets back, here and in the watched folder; nothing happens where there are none."""
    if directory is not None:
        watched_file(path, directory).unlink(missing_ok=True)
    Path(path).unlink(missing_ok=True)


def clean_stale(directory: Path | str, older_than_s: float = STALE_S) -> list[Path]:
    """Remove our files (no others) that nobody refreshed for `older_than_s` seconds; return them."""
    gone = []
    for file in sorted([*Path(directory).glob(f"{_PREFIX}*.json"), *Path(directory).glob(f".{_PREFIX}*.tmp")]):
        try:
            if time.time() - file.stat().st_mtime > older_than_s:
                file.unlink()
                gone.append(file)
        except FileNotFoundError:  # another run was faster
            continue
    return gone


__all__ = [
    "SHARED",
    "STALE_S",
    "clean_stale",
    "heartbeat",
    "link_into",
    "remove",
    "target_group",
    "watched_file",
    "watched_folder",
    "write_targets",
]
