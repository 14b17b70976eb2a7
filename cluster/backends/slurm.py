"""The Slurm backend: a LaunchConfig in; a submitted job that is watched, asked, stopped, and requeues itself, out.

Submission goes through submitit, with the same directives and the same program as the plain script that --dry-run prints.
In the job this module is the placement's frame: the supervisor runs in the batch step, agents come by srun (srun.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.backends import JobState
from cluster.backends import slurm_commands as slurm
from cluster.backends.slurm_job import InJob
from cluster.backends.slurm_script import Directives, agent_words, command, directives, folder, host_python, preamble, script
from cluster.backends.slurm_session import in_job
from cluster.backends.slurm_watch import Watch, job_state
from cluster.config import LaunchConfig
from cluster.flags import LaunchError
from cluster.layout import ROOT, agent_command
from cluster.run_folder import job_file, write_job

Points = Sequence[tuple[LaunchConfig, Sequence[str]]]
ASKED = ("nodes", "partition", "account", "qos", "constraint", "time", "mem", "cpus-per-task", "gpus-per-node", "exclusive",
         "nodelist")  # fmt: skip


# -- the backend's four functions --------------------------------------------------------------------------------------


def render(config: LaunchConfig, words: Sequence[str]) -> str:
    """The batch script, and what it starts on each node."""
    options, agent = agent_words(config, agent_command("HOST:PORT", 0, config.run_dir))
    start = shlex.join(["srun", "--nodes=1", "--ntasks=1", "--overlap", *options, *agent])
    return script(config, words, os.getcwd()) + f"\n# on each node: {start}"


def launch(config: LaunchConfig, words: Sequence[str]) -> int:
    """Submit and watch; in the job (--in-job) supervise. Returns the exit code. Raises: LaunchError."""
    if config.in_job:
        return in_job(config, words)
    if config.script is not None:
        return write_script(config, words, Path(config.script))
    run_dir = Path(config.run_dir)
    refuse_second(run_dir, config.job)
    job = submit_array([(config, words)])[0]
    say(f"{config.run_dir}: submitted as job {job}")
    if config.detach:
        say(f"follow it with: tail -F {folder(run_dir)}/job_{job}.log; stop it with: scancel --batch --signal=USR2 {job}")
        return 0
    return Watch(job, run_dir, lambda now: cancel({"id": job}, now), say).run()


def state(job: Mapping[str, Any]) -> JobState:
    """Of a run's job.json."""
    return job_state(str(job.get("id", "")))[0]


def cancel(job: Mapping[str, Any], now: bool) -> None:
    """Ask a job to save and stop, for good; `now`: end it. A job that waits has nothing to save.

    Raises: LaunchError when Slurm does not answer.
    """
    name = str(job["id"])
    try:
        found = slurm.job_fields(name)
        if found is None:
            return
        if now or found.get("JobState") != "RUNNING":
            slurm.run("scancel", name)
        else:
            slurm.run("scontrol", "update", f"jobid={name}", "requeue=0")  # what the batch step asks before it requeues itself
            slurm.signal_job(name, "USR2", batch=True)
    except slurm.SlurmError as error:
        raise LaunchError(f"job {name} cannot be stopped: {error}; try again, or scancel {name}") from None


# -- submission --------------------------------------------------------------------------------------------------------


def write_script(config: LaunchConfig, words: Sequence[str], path: Path) -> int:
    text = script(config, words, os.getcwd())
    if not path.parent.is_dir():
        raise LaunchError(f"--script {path}; {path.parent} is no folder; make it first")
    _make_folder(config)  # Slurm ends a job whose output has no folder
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
    say(f"wrote {path}; submit it with: sbatch {shlex.quote(str(path))}")
    return 0


def refuse_second(run_dir: Path, job_name: str) -> None:
    """Raises: LaunchError when a submitted job of this kind in the run folder still waits or runs."""
    try:
        job = json.loads(job_file(run_dir, job_name).read_text())
    except (OSError, ValueError):
        return
    if not isinstance(job, dict) or job.get("backend") != "slurm":
        return
    now, _ = job_state(str(job.get("id")))
    if now.name in ("queued", "running"):
        raise LaunchError(f"run folder {run_dir} is in use: {now.detail}; scancel it or choose another name=...")


def check(config: LaunchConfig, words: Sequence[str]) -> None:
    """Let Slurm say whether the job could ever run. Writes nothing. Raises: LaunchError with its reason."""
    text = script(config, words, os.getcwd())
    environment = slurm.without_outer_job(os.environ)
    try:
        slurm.patiently(lambda: slurm.run("sbatch", "--test-only", environment=environment, given=text), say)
    except slurm.SlurmError as error:
        raise refusal(config, str(error)) from None


def refusal(config: LaunchConfig, said: str) -> LaunchError:
    """Slurm's refusal in one line, with what there is in place of what was asked for."""
    try:
        there = slurm.partitions()
    except slurm.SlurmError:
        there = {}
    names = ", ".join(sorted(name for name in there if name))
    most = there.get(config.partition or "")
    if config.partition and there and config.partition not in there:
        return LaunchError(f"--partition {config.partition} is not known to Slurm; it has {names}; choose one of them")
    if most is not None and config.nodes > most:
        where = f"partition {config.partition}" if config.partition else "the default partition"
        return LaunchError(f"--nodes {config.nodes}; {where} has {most}, so the job would wait for ever; give at most {most}")
    asked = " ".join(f"--{key} {value}".strip() for key, value in directives(config, ".").items() if key in ASKED)
    return LaunchError(f"Slurm refuses the job: {said}; it was asked for {asked}; see sinfo --Node --long")


def submit_array(points: Points, parallel: int | None = None) -> list[str]:
    """Submit one job, or several as a job array; returns their ids ("12", or "12_0", "12_1", ...) in the order of `points`.

    All ask Slurm for what the first asks for. At most `parallel` run at a time. Each run folder gets its job.json. Either all
    are submitted or none: a submission whose answer was lost is found again by a mark in the job's comment.

    Raises: LaunchError when Slurm refuses it or does not answer, or when a job.json cannot be written.
    """
    first, words = points[0]
    check(first, words)
    where = folder(first.run_dir)
    wanted = directives(first, os.getcwd())
    mark = f"slotstream {secrets.token_hex(6)}"
    wanted["comment"] = f"{wanted.get('comment', '')} {mark}".strip()
    if len(points) > 1:
        wanted["output"] = wanted["output"].replace("%j", "%A_%a")
    before = set(where.glob("*"))
    try:
        ids = slurm.patiently(lambda: "\n".join(_submit(points, wanted, mark, parallel)), say).split("\n")
        for job, (config, own) in zip(ids, points, strict=True):
            write_job(Path(config.run_dir), config.job, "slurm", job, own)
    except (slurm.SlurmError, LaunchError) as error:  # _submit has withdrawn what there was, or says that it could not
        _remove_new(where, before)
        raise (error if isinstance(error, LaunchError) else refusal(first, str(error))) from None
    except BaseException as error:
        _withdraw(mark, where, before)
        if isinstance(error, OSError):
            raise LaunchError(f"the job cannot be recorded: {error}; it is withdrawn; mend that and launch again") from None
        raise
    return ids


def _make_folder(config: LaunchConfig) -> None:
    """For the owner's eyes alone: the job needs its words and its script as they are, with secrets that may be in them."""
    path = folder(config.run_dir)
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)


def _submit(points: Points, wanted: Directives, mark: str, parallel: int | None) -> list[str]:
    """One try with submitit; one that fails leaves no job. Raises: SlurmError, Unreachable, LaunchError when that is not sure."""
    try:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError as error:
        raise LaunchError(f"submitit is not installed ({error}); pip install it, or --script FILE and sbatch FILE") from None
    for config, _ in points:  # a try that failed took its own away
        _make_folder(config)
    config = points[0][0]
    where = folder(config.run_dir)
    before = set(where.iterdir())
    extra = {key: value or True for key, value in wanted.items()}
    lines = [*preamble(config), f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    try:
        with _submission_environment():
            executor = submitit.SlurmExecutor(folder=where, python=f"exec {shlex.quote(host_python(config))}")
            executor.update_parameters(job_name=None, time=None, wckey=None, use_srun=False, stderr_to_stdout=True, setup=lines,
                                       array_parallelism=parallel or len(points), additional_parameters=extra)  # fmt: skip
            several = len(points) > 1
            calls = [InJob(command(item, words), str(folder(item.run_dir)) if several else None) for item, words in points]
            with executor.batch():
                jobs = [executor.submit(call) for call in calls]
            return [str(job.job_id) for job in jobs]
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError, OSError) as error:
        said = str(error)
        _withdraw(mark, where, before)  # it may have been submitted although we were told otherwise: there must never be two
        kind = slurm.Unreachable if slurm.AWAY.search(said) else slurm.SlurmError
        raise kind(slurm.one_line(re.sub(r"^.*?stderr:?", "", said, flags=re.DOTALL)) or said) from None


@contextlib.contextmanager
def _submission_environment() -> Any:
    """submitit runs sbatch in our own environment: what an allocation around us set there would change the new job."""
    kept = dict(os.environ)
    os.environ.clear()
    os.environ.update(slurm.without_outer_job(kept))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _withdraw(mark: str, where: Path, before: set[Path]) -> None:
    """Take back what was submitted: after Ctrl-C, when the answer was lost, or when the job could not be recorded.

    Raises: LaunchError with the mark when Slurm does not say that nothing is left: a second job would then be one too many.
    """
    left = f"a job may be submitted; look for {mark!r} in squeue --me --format='%i %k' and scancel it"
    try:
        slurm.patiently(lambda: _cancel_marked(mark), say, left)
    except (slurm.SlurmError, KeyboardInterrupt) as error:
        raise LaunchError(f"Slurm does not say what is submitted: {str(error) or 'interrupted'}; {left}") from None
    finally:
        _remove_new(where, before)


def _cancel_marked(mark: str) -> str:
    """Raises: Unreachable, also while a job with the mark is left."""
    if taken := slurm.live_jobs(mark):
        slurm.run("scancel", *taken)
        if left := slurm.live_jobs(mark):
            raise slurm.Unreachable(f"job {', '.join(left)} was cancelled and is still there")
    return ""


def _remove_new(where: Path, before: set[Path]) -> None:
    for path in set(where.glob("*")) - before:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # folders that were there before are not empty
        where.rmdir()
        where.parent.rmdir()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
