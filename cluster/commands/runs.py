"""Runs by name: the words of a command in, run folders out; a name that is not there is answered with the nearest one."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.commands.run_view import SWEEP_FILE, is_run
from cluster.flags import LaunchError, Parser

MAX_LISTED = 10_000


class CommandParser(Parser):
    """The words of a command about runs."""

    def __init__(self, command: str, usage: str, description: str) -> None:
        super().__init__(
            prog=f"cluster/launch.py {command}",
            usage=f"python cluster/launch.py {command} {usage}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--runs", default="runs", metavar="DIR", help="folder of run folders (default: runs)")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The values of a command line, flags and names in any order. Raises LaunchError."""
        return self.parse_intermixed_args(list(words))


def is_sweep(folder: Path) -> bool:
    return os.path.isfile(folder / SWEEP_FILE)  # False where we may not look; Path.is_file would raise


def all_folders(runs: Path) -> list[Path]:
    """Runs and sweeps in a folder of runs, by name. Raises LaunchError when there is no such folder."""
    try:
        entries = sorted(entry for entry in runs.iterdir() if not entry.name.startswith("."))
    except FileNotFoundError:
        raise LaunchError(f"--runs {runs}; no such folder; nothing was started here yet, or give --runs DIR") from None
    except OSError as error:
        raise LaunchError(f"--runs {runs}; {error.strerror}; give a folder that can be read") from None
    return [entry for entry in entries[:MAX_LISTED] if is_sweep(entry) or is_run(entry)]


def names_in(folder: Path) -> list[str]:
    """What is in a folder, by name; nothing where we may not look."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def find(runs: Path, name: str) -> Path:
    """The folder of a run or sweep: by its name, SWEEP/POINT, or as a path.

    Raises: LaunchError that names the nearest run there is.
    """
    candidates = [runs / name, Path(name)] if not Path(name).is_absolute() else [Path(name)]
    for folder in candidates:
        if is_sweep(folder) or is_run(folder):
            return folder.absolute()
    known = {folder.name: folder for folder in all_folders(runs)}
    names = list(known)
    for folder in known.values():
        if is_sweep(folder):
            names += [f"{folder.name}/{name}" for name in names_in(folder) if is_run(folder / name)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4) or [item for item in names if name in item][:1]
    hint = f"did you mean {near[0]}?" if near else f"{runs} has {', '.join(names[:8])}" if names else f"{runs} has no runs yet"
    raise LaunchError(f"{name}: no such run in {runs}; {hint}")


def backend_state(job: Mapping[str, Any]) -> str:
    """What the run's backend says: queued, running, ended or unknown. A backend that cannot be asked is no error."""
    try:
        from cluster.backends import BACKENDS

        backend: Any = BACKENDS[str(job.get("backend"))]
        return str(backend.state(job).name)
    except (LaunchError, OSError, KeyError, ValueError, AttributeError, ImportError):
        return "unknown"


def remembering(ask: Callable[[Mapping[str, Any]], str]) -> Callable[[Mapping[str, Any]], str]:
    """`ask`, asked once per job, and not again about other jobs where a backend gave no answer: each may take a minute."""
    known: dict[str, str] = {}
    silent: set[object] = set()

    def answer(job: Mapping[str, Any]) -> str:
        backend = job.get("backend")
        key = f"{backend} {job.get('id')}"
        if key not in known:
            known[key] = "unknown" if backend in silent else ask(job)
            silent.update([backend] if known[key] == "unknown" else [])
        return known[key]

    return answer


def folders_of(runs: Path, names: Sequence[str]) -> list[Path]:
    return [find(runs, name) for name in names] if names else all_folders(runs)
