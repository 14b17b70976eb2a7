"""What Slurm is asked for: a LaunchConfig and its words in, sbatch's directives and the batch script out. Pure functions."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster import site_flags
from cluster.config import LaunchConfig
from cluster.flags import LaunchError
from cluster.layout import ROOT
from cluster.run_folder import clean_word

LAUNCHER = ROOT / "cluster" / "launch.py"
SIGNAL_LEAD = 120  # seconds before the limit at which Slurm warns; the supervisor plans for the limit by itself
NOT_IN_JOB = ("--detach", "--dry-run", "--in-job")
NOT_IN_JOB_VALUES = ("--script", "--cluster")
OURS = ("nodes", "ntasks", "ntasks-per-node", "array", "output", "error", "open-mode", "requeue", "no-requeue", "chdir", "wrap",
        "gpus-per-node", "parsable", "test-only", "wait")  # fmt: skip
# As Slurm writes them: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]; and 8h, 45m, 90s, 2d.
SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d{1,2}){0,2})")
UNIT_TIME = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[smhd])")
Directives = dict[str, str]  # "" for an option without a value


def seconds_of(text: str) -> int:
    """Seconds of --time.

    Raises: LaunchError for what is no time.
    """
    if match := UNIT_TIME.fullmatch(text):
        return int(float(match["number"]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match["unit"]])
    match = SLURM_TIME.fullmatch(text)
    if not match:
        raise LaunchError(f"--time {text}; a time limit is needed; for example 8h, 45m, 90 (minutes), 1:30:00 or 1-12:00:00")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return hours * 3600 + minutes * 60 + seconds


def written(seconds: int) -> str:
    """A time limit as Slurm writes it."""
    days, rest = divmod(seconds, 86400)
    return f"{days}-{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def folder(run_dir: str | Path) -> Path:
    """Where this backend keeps its things in a run folder."""
    return Path(run_dir) / "slurm"


def directives(config: LaunchConfig, cwd: str) -> Directives:
    """sbatch's options. The same for the plain script and for submitit.

    Raises: LaunchError for a value that cannot be, or an option that the launcher sets itself.
    """
    limit = None if config.time is None else seconds_of(config.time)
    if limit == 0:
        raise LaunchError(f"--time {config.time}; the job would end at once; give at least a minute")
    # Never more than a quarter of the job: a warning at its start would be all that it ever does.
    lead = SIGNAL_LEAD if limit is None else max(1, min(SIGNAL_LEAD, limit // 4))
    found: Directives = {
        "job-name": Path(config.run_dir).name,
        "nodes": str(config.nodes),
        "ntasks-per-node": "1",
        "requeue": "",
        "open-mode": "append",  # else a requeue begins the log anew
        "signal": f"B:USR2@{lead}",  # B: to the batch process, which is the supervisor
        "output": str(folder(config.run_dir)).replace("%", "%%") + "/job_%j.log",
        "chdir": cwd,
    }
    if config.least_nodes < config.nodes:
        found["no-kill"] = ""  # a dead node then ends its own agent alone
    if limit is not None:
        found["time"] = written(limit)
    if config.gpus_per_node:
        found["gpus-per-node"] = str(config.gpus_per_node)
    if config.exclusive:
        found["exclusive"] = ""
    for key in ("partition", "account", "qos", "constraint", "mem", "cpus_per_task"):
        if (value := getattr(config, key)) is not None:
            found[key.replace("_", "-")] = str(value)
    found.update(more_options("--sbatch", config.sbatch, refuse=OURS))
    return found


def more_options(flag: str, entries: Sequence[str], refuse: Sequence[str] = ()) -> Directives:
    """KEY=VALUE entries as options; KEY= is an option without a value."""
    found: Directives = {}
    for entry in entries:
        key, _, value = entry.partition("=")
        key = key.strip().lstrip("-").replace("_", "-")
        shown = clean_word(entry)
        if key in refuse:
            raise LaunchError(f"{flag} {shown}; the launcher sets {key} itself; use its own flag or leave it out")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or "\n" in value:
            raise LaunchError(f"{flag} {shown!r}; KEY is a long option of {flag[2:]}, VALUE one line; such as mail-type=END")
        found[key] = value
    return found


def job_words(words: Sequence[str]) -> list[str]:
    """The words that the job starts the launcher with: the user's, a site's file written out."""
    kept: list[str] = []
    of_site: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in NOT_IN_JOB_VALUES:
            value = value if equals else rest.pop(0)
            of_site += site_words(value) if name == "--cluster" else []
        elif word not in NOT_IN_JOB:
            kept.append(word)
    return [*of_site, *kept]


def site_words(name: str) -> list[str]:
    """A site's file as flags, so that a submitted script does not change with the file."""
    found: list[str] = []
    for key, value in site_flags.read(name).items():
        if isinstance(value, bool):
            found += [f"--{key}"] if value else []
        else:
            found += [f"--{key}={item}" for item in (value if isinstance(value, list) else [value])]
    return found


def host_python(config: LaunchConfig) -> str:
    """The interpreter of the batch step: --python names the image's where there is one."""
    return config.python if config.python and not config.container else sys.executable


def command(config: LaunchConfig, words: Sequence[str]) -> list[str]:
    """What runs in the batch step of the first node."""
    return [host_python(config), str(LAUNCHER), "--in-job", *job_words(words)]


def preamble(config: LaunchConfig) -> list[str]:
    """The script's lines before the launcher. A warning that comes before it listens must not end the job."""
    return ["trap '' USR2", *config.setup, "trap '' TERM"]


def script(config: LaunchConfig, words: Sequence[str], cwd: str) -> str:
    """The plain batch script: `sbatch FILE` is all that it needs. `exec`, so that Slurm's signals reach the supervisor."""
    lines = ["#!/bin/bash", f"# slotstream: {config.run_dir}; submit with `sbatch FILE` from anywhere"]
    lines += [directive_line(key, value) for key, value in sorted(directives(config, cwd).items())]
    lines += ["", *preamble(config), f"exec {shlex.join(command(config, words))}", ""]
    return "\n".join(lines)


def directive_line(key: str, value: str) -> str:
    return f"#SBATCH --{key}" + (f"={shlex.quote(value)}" if value else "")


def parsed(text: str) -> Directives:
    """The directives of a batch script: what a test compares."""
    found: Directives = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH --"):
            key, _, value = line[len("#SBATCH --") :].partition("=")
            found[key] = "".join(shlex.split(value))
    return found


def agent_words(config: LaunchConfig, agent: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options of srun, command) that start an agent on its node, in a container where there is one.

    Apptainer: https://apptainer.org/docs/user/main/cli/apptainer_exec.html; Pyxis: https://github.com/NVIDIA/pyxis
    """
    python = config.python or agent[0]
    words = [python, *agent[1:]]
    seen = list(dict.fromkeys((str(ROOT), config.run_dir)))
    if config.container is None:
        return [], words
    if config.container_runtime == "pyxis":
        mounts = ",".join(f"{path}:{path}" for path in seen)
        return [f"--container-image={config.container}", f"--container-mounts={mounts}"], words
    binds = [word for path in seen for word in ("--bind", path)]
    gpu = ["--nv"] if config.gpus_per_node != 0 else []
    return [], ["apptainer", "exec", *gpu, *binds, config.container, *words]


def visible_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of an agent's srun: memory is asked for by an option, and Slurm refuses it twice."""
    return {key: value for key, value in environment.items() if key not in ("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU")}
