"""Slurm's own client programs: words in, their answer out. State comes from scontrol: it needs no accounting database."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from cluster.flags import LaunchError

TRIES, PAUSE = 4, 2.0  # of a controller that does not answer: about half a minute, for each command tries for a while itself
PATIENCE = 60.0  # seconds for one command
NOTHING = "nothing is submitted; see scontrol ping"
AWAY = re.compile(r"Unable to contact slurm controller|Socket timed out|Connection (?:refused|timed out)|temporarily unable"
                  r"|Unable to (?:allocate resources|confirm allocation)[^\n]*(?:contact|timed out)", re.IGNORECASE)  # fmt: skip
DOWN = ("DOWN", "FAIL", "NOT_RESPONDING", "POWERED_DOWN", "UNKNOWN")
NOISE = re.compile(r"^(?:sbatch|scontrol|squeue|srun|scancel|sinfo): (?:error: |fatal: )?"
                   r"|^(?:allocation failure|Batch job submission failed): ", re.IGNORECASE)  # fmt: skip


class SlurmError(RuntimeError):
    """A command of Slurm failed; the message is what it said, on one line."""


class Unreachable(SlurmError):
    """The controller does not answer: the same command may work later."""


def run(*words: str, environment: Mapping[str, str] | None = None, patience: float = PATIENCE, given: str = "") -> str:
    """Standard output of one command that reads `given`.

    Raises: Unreachable when the controller does not answer, SlurmError for any other failure.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=patience, env=environment, input=given)
    except FileNotFoundError:
        raise SlurmError(f"{words[0]} is not installed here; run this on a node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{words[0]} had no answer within {patience:.0f} s") from None
    if done.returncode:
        text = one_line(done.stderr or done.stdout) or f"exit code {done.returncode}"
        raise (Unreachable if AWAY.search(done.stderr) else SlurmError)(text)
    # --test-only says what would happen on the error stream
    return done.stdout or done.stderr


def patiently(action: Callable[[], str], say: Callable[[str], None], left: str = NOTHING) -> str:
    """The result of `action`, tried again while the controller does not answer.

    Raises: LaunchError when it does not answer at all; `left` says what is then there and what to do.
    """
    tries = TRIES
    for attempt in range(1, tries + 1):
        try:
            return action()
        except Unreachable as error:
            if attempt == tries:
                raise LaunchError(f"Slurm's controller does not answer: {error}; tried {tries} times, {left}") from None
            if attempt == 1:
                say(f"Slurm's controller does not answer: {error}; trying again")
            time.sleep(PAUSE * min(attempt, 4))
    raise AssertionError("not reached")


def one_line(text: str) -> str:
    """What a command said, without its prefixes and repetitions."""
    lines: list[str] = []
    for line in text.splitlines():
        line = NOISE.sub("", NOISE.sub("", line.strip())).strip()
        if line and line not in lines:
            lines.append(line)
    return "; ".join(lines[-3:])


def job_fields(job: str, patience: float = PATIENCE) -> dict[str, str] | None:
    """What `scontrol show job -o` says of one job; None when Slurm knows it no more. Raises: SlurmError."""
    try:
        text = run("scontrol", "show", "job", "-o", job, patience=patience)
    except Unreachable:
        raise
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return fields(text.splitlines()[0])


def fields(line: str) -> dict[str, str]:
    """`Key=Value` pairs of a line of scontrol; a value with spaces is cut at the first."""
    return dict(re.findall(r"(?:^|\s)([A-Z][\w/:]*)=(\S*)", line))


def node_address(node: str) -> str:
    """The address that Slurm's own daemons use for a node: its name alone may resolve nowhere. Raises: SlurmError."""
    return fields(run("scontrol", "show", "node", "-o", node)).get("NodeAddr") or node


def host_names(node_list: str) -> list[str]:
    """n1, n2, n3 of n[1-3]. Raises: SlurmError."""
    return run("scontrol", "show", "hostnames", node_list).split()


def live_nodes(nodes: Sequence[str], patience: float = PATIENCE) -> list[str]:
    """Those of the nodes that are not down and whose slurmd answers. Raises: SlurmError."""
    listed = run("scontrol", "show", "node", "-o", ",".join(nodes), patience=patience).splitlines()
    found = [fields(line) for line in listed]
    states = {item["NodeName"]: item.get("State", "") for item in found if "NodeName" in item}
    return [node for node in nodes if not _is_down(states.get(node, ""))]


def _is_down(state: str) -> bool:
    """Of a node's state as scontrol writes it; a final * is for a slurmd that does not answer."""
    return state.endswith("*") or any(word in state for word in DOWN)


def partitions() -> dict[str, int]:
    """Each partition's number of nodes, the default one also under ''. Raises: SlurmError."""
    found: dict[str, int] = {}
    for line in run("sinfo", "--noheader", "--summarize", "--format=%P %D").splitlines():
        name, count = line.split()[:2]
        found[name.rstrip("*")] = int(re.sub(r"\D", "", count) or 0)
        if name.endswith("*"):
            found[""] = found[name.rstrip("*")]
    return found


def live_jobs(mark: str) -> list[str]:
    """Ids of this user's jobs with `mark` in their comment that wait or run: of a submission without an answer.

    One that was cancelled and is being cleared away does not count. Raises: SlurmError.
    """
    lines = run("squeue", "--noheader", "--me", "--states=PENDING,RUNNING,SUSPENDED", "--format=%F %k").splitlines()
    return sorted({line.split()[0] for line in lines if mark in line})


def without_outer_job(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment to submit from: what an allocation around us set would change the new job."""
    drop = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SUBMITIT_")
    keep = ("SLURM_CONF", "SLURM_TIME_FORMAT", "SLURM_CONF_SERVER")
    return {key: value for key, value in environment.items() if key in keep or not key.startswith(drop)}


def signal_job(job: str, number: str, *, batch: bool) -> None:
    """scancel --signal of the batch process alone, or of all steps. A job that is gone is no error."""
    words: Sequence[str] = ("--batch",) if batch else ()
    try:
        run("scancel", *words, f"--signal={number}", job)
    except SlurmError as error:
        if isinstance(error, Unreachable) or not re.search(r"Invalid job id|already completing|completed", str(error)):
            raise
