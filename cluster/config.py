"""The launcher's settings: command-line words in, a checked LaunchConfig out. Standard library only."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


class LaunchError(ValueError):
    """A launch cannot go on. The message is one line: what is wrong, the rule, what to do."""


@dataclass(frozen=True)
class Job:
    module: str  # run as python -m MODULE
    tells_plan: bool = False  # True: with --dry-run it says what it would do


JOBS = {
    "train": Job("trainer.main"),
    "evaluate": Job("trainer.evaluate"),
    "build-shards": Job("data_pipeline.build", tells_plan=True),
}
OWN_KEYS = {"build-shards": ("name", "runs")}  # say where the run folder is; the job itself knows none and would refuse them
BACKEND_NAMES = ("auto", "local", "slurm", "ray")

HELP = """Start a job on N nodes, watch it, and leave nothing behind.

  JOB        train (default), evaluate or build-shards; or plan: what a run would need, starts nothing (plan --help)
  key=value  everything after the flags goes to the job as it is: experiment=ssync_movi_c optim.lr=1e-3 ...

The run folder is RUNS/NAME: NAME from name=..., else from experiment=..., else "run". Each start is an attempt in it:
attempts/<n>/{launch.json,rank_<r>.log,verdict.json}.
Exit code: 0 done, 75 stopped and saved (start again to go on), 130 Ctrl-C, 2 wrong command, else that of the first rank
that failed."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    nodes: int = 1
    gpus_per_node: int | None = None  # None: as many as there are, spread over the nodes; 0: CPU
    ranks_per_node: int | None = None  # None: one per GPU, or one without GPUs
    backend: str = "auto"
    job: str = "train"
    overrides: tuple[str, ...] = ()
    run_dir: str = "runs/run"  # absolute once parsed
    grace: float = 30.0  # seconds between asking ranks to stop and killing them
    max_time: float | None = None  # seconds after which the job is asked to save and stop
    dry_run: bool = False
    command: tuple[str, ...] = ()  # run this in place of the job (tests)

    def __post_init__(self) -> None:
        _check_range("--nodes", self.nodes, 1)
        _check_range("--gpus-per-node", self.gpus_per_node, 0)
        _check_range("--ranks-per-node", self.ranks_per_node, 1)
        _check_range("--grace", self.grace, 0)
        _check_range("--max-time", self.max_time, 1)
        check_known("--backend", self.backend, BACKEND_NAMES)
        check_known("job", self.job, JOBS)
        gpus, ranks = self.gpus_per_node, self.ranks_per_node
        if gpus and ranks and gpus != ranks:
            raise LaunchError(f"--gpus-per-node {gpus} with --ranks-per-node {ranks}; a GPU serves one rank; leave one out")

    @property
    def job_command(self) -> tuple[str, ...]:
        """What follows the Python interpreter in a rank's command line."""
        return (*(self.command or ("-m", JOBS[self.job].module)), *self.overrides)


def parse(argv: Sequence[str]) -> LaunchConfig:
    """LaunchConfig of a command line.

    Raises: LaunchError for an unknown flag, job or backend, a value out of range, or a run name that is no folder name.
    """
    parser = build_parser()
    flags, words = parser.parse_known_args(list(argv))
    job, overrides = _split_words(words, known_flags(parser))
    return LaunchConfig(
        nodes=flags.nodes,
        gpus_per_node=flags.gpus_per_node,
        ranks_per_node=flags.ranks_per_node,
        backend=flags.backend,
        job=job,
        overrides=tuple(word for word in overrides if word.partition("=")[0] not in OWN_KEYS.get(job, ())),
        run_dir=str(run_folder(job, overrides, flags.runs)),
        grace=flags.grace,
        max_time=None if flags.max_time is None else duration(flags.max_time),
        dry_run=flags.dry_run,
        command=tuple(shlex.split(flags.command or "")),
    )


def build_parser() -> argparse.ArgumentParser:
    """The flags of the launcher. Words that are no flags are left over for `parse`."""
    parser = _Parser(
        prog="cluster/launch.py",
        usage="python cluster/launch.py [flags] [JOB] [key=value ...]",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="one rank per GPU; 0: CPU (default: all that are there)")
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="ranks of a node (default: one per GPU, or 1)")
    parser.add_argument("--backend", default="auto", metavar="B", help="auto, local, slurm or ray (default auto)")
    parser.add_argument("--runs", metavar="DIR", help="folder of run folders (default: runs)")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="seconds to save in before a kill (default 30)")
    parser.add_argument("--max-time", metavar="T", help="ask the job to save and stop after T: 90 (seconds), 45m, 8h, 1:30:00")
    parser.add_argument("--dry-run", action="store_true", help="print every agent's and rank's command; start nothing")
    parser.add_argument("--command", help=argparse.SUPPRESS)  # arguments for Python in place of the job; for tests
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse that raises in place of printing its usage and leaving, so that an error is one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise LaunchError(f"{message}; see --help")


def known_flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings if action.help != argparse.SUPPRESS]


def _split_words(words: Sequence[str], flags: Iterable[str]) -> tuple[str, list[str]]:
    """(job, overrides) of the words that argparse left. A word that looks like a flag is a typing error, not an override."""
    words = [word for word in words if word != "--"]
    for word in words:
        if word.startswith("-"):
            raise unknown("flag", word.partition("=")[0], flags)
    job = "train"
    if words and not _is_override(words[0]):
        job, words = words[0], words[1:]
        check_known("job", job, JOBS)
    for word in words:
        if not _is_override(word):
            raise LaunchError(f"{word!r} is neither a flag nor key=value; settings of the job are written key=value; see --help")
    return job, words


def _is_override(word: str) -> bool:
    return "=" in word or word.startswith("~")  # ~key removes a key (Hydra)


def override_value(overrides: Iterable[str], key: str) -> str | None:
    """The value of the last override of `key`, without quotes; None where there is none."""
    found = None
    for override in overrides:
        name, equals, value = override.partition("=")
        if equals and name.lstrip("+") == key:
            found = value.strip().strip("'\"")
    return found


def run_name(job: str, overrides: Sequence[str]) -> str:
    """Folder name of the run: name=..., else experiment=..., else "run" (or the job's own name where it does not train)."""
    given = override_value(overrides, "name")
    if given is None:
        experiment = override_value(overrides, "experiment")
        return experiment.replace("/", "_") if experiment and experiment != "null" else ("run" if job == "train" else job)
    if not given or "/" in given or given.startswith(".") or "${" in given:
        raise LaunchError(f"name={given!r}; a plain folder name is needed; for example name=movi_c_seed0")
    return given


def run_folder(job: str, overrides: Sequence[str], runs_flag: str | None) -> Path:
    """Absolute run folder. `evaluate run=FOLDER` works in the folder that it scores."""
    scored = override_value(overrides, "run") if job == "evaluate" else None
    if scored is not None:
        if not Path(scored).is_dir():
            raise LaunchError(f"run={scored}; no such folder; give the folder of a run, for example run=runs/demo")
        return Path(os.path.abspath(scored))
    runs = override_value(overrides, "runs")
    if runs is not None and runs_flag is not None and os.path.abspath(runs) != os.path.abspath(runs_flag):
        raise LaunchError(f"--runs {runs_flag} with runs={runs}; the run folder would be in two places; leave one of them out")
    return Path(os.path.abspath(runs or runs_flag or "runs")) / run_name(job, overrides)


def duration(text: str) -> float:
    """Seconds of "90", "90s", "45m", "8h", "2d" or "1:30:00"."""
    if re.fullmatch(r"\d+(:\d{1,2}){1,2}", text):
        seconds = 0.0
        for part in text.split(":"):
            seconds = seconds * 60 + int(part)
        return seconds
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not match:
        raise LaunchError(f"--max-time {text}; a duration is needed; for example 90, 45m, 8h or 1:30:00")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def unknown(what: str, value: str, known: Iterable[str]) -> LaunchError:
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return LaunchError(f"{what} {value!r} is not known; choose one of {', '.join(names)}{hint}")


def check_known(what: str, value: str, known: Iterable[str]) -> None:
    names = list(known)
    if value not in names:
        raise unknown(what, value, names)


def _check_range(flag: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise LaunchError(f"{flag} {value}; it must be at least {least}; change {flag}")
