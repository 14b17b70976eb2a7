"""The files through which a Prometheus finds the ranks of a run, or a build (`file_sd`).

Comes in: the host:port of every rank. Goes out: `<run>/monitoring/targets.json`, written by rename, and a copy in a folder
that a long-lived Prometheus watches. A copy, not a link: Prometheus notices changes in the folder it watches, not behind links.
A copy that nobody has touched for ten minutes belongs to a run that died unheard: the next run, or a monitor, clears it away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomically

REFRESH_S = 60.0  # a live process touches its copy so often, whatever else it does
STALE_S = 600.0  # cluster/commands/monitor.py has the same; clocks of hosts and file servers may differ by minutes
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


def watched_file(path: Path | str, directory: Path | str) -> Path:
    """The list's copy in a watched folder. Runs of one name in two places get two files, a run always the same one."""
    run_dir, which = Path(path).absolute().parent.parent, Path(path).stem.removeprefix("targets")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", run_dir.name + which)
    digest = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]
    return Path(directory) / f"{_PREFIX}{name}-{digest}.json"


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


class Listing:
    """A process's list of targets, kept alive by a thread until `close`. It stops no run: what goes wrong is told to `warn`.

    `path` is the run's monitoring/targets.json; `in_run_folder` False: there is none, the copy in the watched folder is the only
    list. A monitor that is started later finds the run within a minute.
    """

    def __init__(
        self,
        path: Path,
        groups: Sequence[dict[str, Any]],
        asked: str | None,
        warn: Callable[[str], None],
        in_run_folder: bool = True,
    ) -> None:
        self._path, self._groups, self._asked = path, groups, asked
        self._ended, self._writing = threading.Event(), threading.Lock()
        for place in ([path] if in_run_folder else []) + ([copy] if (copy := self.copy) else []):
            try:
                write_targets(place, groups)
            except OSError as error:
                warn(cannot_list(place, error))
        self._thread = threading.Thread(target=self._keep_fresh, name="targets", daemon=True)
        self._thread.start()

    @property
    def copy(self) -> Path | None:
        """Where a long-lived Prometheus finds this list; None where there is none."""
        watched = watched_folder(self._path.parent.parent, self._asked)
        return None if watched is None else watched_file(self._path, watched)

    def refresh(self) -> None:
        """Say that this process lives: touch the copy, or put it there anew; clear away what dead ones left. Raises OSError."""
        copy = self.copy
        if copy is None:
            return
        with self._writing:
            try:
                os.utime(copy)
            except FileNotFoundError:
                write_targets(copy, self._groups)
        clean_stale(copy.parent)

    def close(self) -> None:
        """Take the list back, here and in the watched folder."""
        self._ended.set()
        self._thread.join()
        for place in (self.copy, self._path):
            if place is not None:
                with contextlib.suppress(OSError):
                    place.unlink()

    def _keep_fresh(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self.refresh()
            if self._ended.wait(REFRESH_S):
                return


def cannot_list(place: Path, error: OSError) -> str:
    """One line about a list that could not be written."""
    return (
        f"{place} cannot be written: {error.strerror}; Prometheus finds these metrics through it; "
        "mend the folder or set observe.targets_dir; the work goes on"
    )


__all__ = ["SHARED", "STALE_S", "Listing", "clean_stale", "target_group", "watched_file", "watched_folder", "write_targets"]
