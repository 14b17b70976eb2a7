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
from typing import Any

from cluster import site_flags
from cluster.flags import LaunchError, build_parser, known_flags


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
BINDINGS = ("none", "cores", "numa")
RAY_NODES = ("local", "slurm")
CONTAINER_RUNTIMES = ("apptainer", "pyxis")


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
    detach: bool = False  # start or submit, then return
    multirun: bool = False  # overrides hold lists of values: one run per point
    cluster: str | None = None  # configs/cluster/NAME.yaml gives flags their defaults
    command: tuple[str, ...] = ()  # run this in place of the job (tests)

    # Supervision
    max_restarts: int = 10  # without progress; a newer checkpoint refills the budget
    min_nodes: int | None = None  # None: as many as nodes
    node_patience: float = 60.0  # seconds to wait for a lost node before going on with fewer
    start_timeout: float = 300.0  # seconds in which the agents of a started job must report
    hang_after: float = 15.0  # least seconds without any progress that are a hang; 0: never

    # Ranks and network
    listen: str | None = None  # address that agents connect to; None: loopback on one machine, else this host's own
    interface: str | None = None  # network interface of hub, gloo and NCCL
    wrap: str | None = None  # prefix of each local agent's command; {slot} is its number
    bind: str = "none"  # bind ranks to cores: none, cores, numa
    export: tuple[str, ...] = ()  # names of environment variables that ranks on other nodes get, too

    # Slurm
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None  # as Slurm writes it, or 8h
    mem: str | None = None
    cpus_per_task: int | None = None
    exclusive: bool = False
    container: str | None = None
    container_runtime: str | None = None  # apptainer | pyxis
    setup: tuple[str, ...] = ()  # shell lines before anything else runs on a node
    sbatch: tuple[str, ...] = ()  # KEY=VALUE lines for the batch script
    srun: tuple[str, ...] = ()  # KEY=VALUE of the srun that starts an agent
    python: str | None = None  # the nodes' or the image's Python; None: this one
    max_requeues: int = 10  # without progress; a newer checkpoint refills the budget
    script: str | None = None  # write the batch script there, submit nothing
    in_job: bool = False  # this is the batch step: supervise here

    # Ray
    address: str | None = None
    ray_nodes_from: str = "local"  # where a cluster that we start gets its nodes: local | slurm

    def __post_init__(self) -> None:
        _check_range("--nodes", self.nodes, 1)
        _check_range("--gpus-per-node", self.gpus_per_node, 0)
        _check_range("--ranks-per-node", self.ranks_per_node, 1)
        _check_range("--grace", self.grace, 0)
        _check_range("--max-time", self.max_time, 1)
        _check_range("--max-restarts", self.max_restarts, 0)
        _check_range("--min-nodes", self.min_nodes, 1)
        _check_range("--node-patience", self.node_patience, 0)
        _check_range("--start-timeout", self.start_timeout, 1)
        _check_range("--hang-after", self.hang_after, 0)
        _check_range("--cpus-per-task", self.cpus_per_task, 1)
        check_known("--backend", self.backend, BACKEND_NAMES)
        check_known("--bind", self.bind, BINDINGS)
        check_known("--ray-nodes-from", self.ray_nodes_from, RAY_NODES)
        if self.container_runtime is not None:
            check_known("--container-runtime", self.container_runtime, CONTAINER_RUNTIMES)
        check_known("job", self.job, JOBS)
        if self.least_nodes > self.nodes:
            raise LaunchError(f"--min-nodes {self.min_nodes} with --nodes {self.nodes}; it can be that at most; change one")
        _check_range("--max-requeues", self.max_requeues, 0)
        for flag, entries in (("--sbatch", self.sbatch), ("--srun", self.srun)):
            for entry in entries:
                if "=" not in entry:
                    raise LaunchError(f"{flag} {entry!r}; KEY=VALUE is needed; for example --sbatch mail-type=END")
        gpus, ranks = self.gpus_per_node, self.ranks_per_node
        if gpus and ranks and gpus != ranks:
            raise LaunchError(f"--gpus-per-node {gpus} with --ranks-per-node {ranks}; a GPU serves one rank; leave one out")

    @property
    def least_nodes(self) -> int:
        """Nodes without which the job does not go on."""
        return self.nodes if self.min_nodes is None else self.min_nodes

    @property
    def job_command(self) -> tuple[str, ...]:
        """What follows the Python interpreter in a rank's command line."""
        return (*(self.command or ("-m", JOBS[self.job].module)), *self.overrides)


def parse(argv: Sequence[str]) -> LaunchConfig:
    """LaunchConfig of a command line.

    Raises: LaunchError for an unknown flag, job or backend, a value out of range, or a run name that is no folder name.
    """
    parser = build_parser()
    chosen = parser.parse_known_args(list(argv))[0].cluster
    if chosen is not None:  # flags beat the file, the file beats the defaults
        parser.set_defaults(**_site_defaults(chosen, parser))
    flags, words = parser.parse_known_args(list(argv))
    job, overrides = _split_words(words, known_flags(parser))
    values = vars(flags)
    runs = values.pop("runs")
    for name in ("max_time", "node_patience", "start_timeout", "hang_after"):
        values[name] = None if values[name] is None else duration(str(values[name]), "--" + name.replace("_", "-"))
    for name in ("export", "setup", "sbatch", "srun"):
        values[name] = tuple(values[name] or ())
    values["command"] = tuple(shlex.split(values["command"] or ""))
    return LaunchConfig(
        job=job,
        overrides=tuple(word for word in overrides if word.partition("=")[0] not in OWN_KEYS.get(job, ())),
        run_dir=str(run_folder(job, overrides, runs)),
        **values,
    )


def _site_defaults(name: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Defaults of flags from configs/cluster/NAME.yaml; keys as the flags are written, without the dashes before them."""
    known = [flag.removeprefix("--") for flag in known_flags(parser) if flag not in ("-h", "--help", "--cluster")]
    defaults = {}
    for key, value in site_flags.read(name).items():
        check_known(f"--cluster {name}: key", key, known)
        defaults[key.replace("-", "_")] = value
    return defaults


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


def duration(text: str, flag: str = "--max-time") -> float:
    """Seconds of "90", "90s", "45m", "8h", "2d" or "1:30:00"."""
    if re.fullmatch(r"\d+(:\d{1,2}){1,2}", text):
        seconds = 0.0
        for part in text.split(":"):
            seconds = seconds * 60 + int(part)
        return seconds
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not match:
        raise LaunchError(f"{flag} {text}; a duration is needed; for example 90, 45m, 8h or 1:30:00")
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
