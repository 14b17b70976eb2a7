"""A job seen from where it was submitted: its state by scontrol and its output file, to the console.

In: a job's id and a run folder. Out: lines as they come, and the exit code of the launch. Ctrl-C asks the job to save and stop,
a second one ends it; a closed terminal or SIGTERM leaves it running, because it is Slurm's and not ours.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster.backends import JobState
from cluster.backends import slurm_commands as slurm
from cluster.backends.slurm_script import folder
from cluster.console import LogTail
from cluster.flags import LaunchError
from cluster.processes import SignalPipe
from cluster.verdict import INTERRUPTED, REQUEUE

TICK, LOOK_EVERY = 0.2, 2.0
QUIET = 90.0  # seconds of a running job without a line here: then the folder is probably not the same one
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
NO_OUTPUT = "0:53"  # slurmd could not open the job's output file


def job_state(job: str) -> tuple[JobState, dict[str, str]]:
    """The state of a job by its id, with scontrol's fields. Never raises: what cannot be asked is unknown."""
    try:
        found = slurm.job_fields(job)
    except slurm.SlurmError as error:
        return JobState("unknown", str(error)), {}
    if found is None:
        return JobState("ended", "Slurm knows it no more"), {}
    return describe(found), found


def describe(found: dict[str, str]) -> JobState:
    """A job's state in a few words."""
    state, reason = found.get("JobState", "UNKNOWN"), found.get("Reason", "None")
    why = "" if reason in ("None", "") else f" ({reason})"
    if state in QUEUED:
        again = ", to be started again" if found.get("Restarts", "0") != "0" or reason == "BeginTime" else ""
        return JobState("queued", f"job {found['JobId']} is {state}{why}{again}")
    if state in RUNNING:
        return JobState("running", f"job {found['JobId']} is {state} on {found.get('NodeList', '?')}")
    return JobState("ended", f"job {found['JobId']} is {state}{why}, exit code {found.get('ExitCode', '?')}")


class Watch:
    """Follows one job to its end, over all its requeues."""

    def __init__(self, job: str, run_dir: Path, cancel: Callable[[bool], None], say: Callable[[str], None]) -> None:
        self._job, self._run_dir, self._cancel, self._say = job, run_dir, cancel, say
        self._log = folder(run_dir) / f"job_{job}.log"
        self._tail = LogTail(self._log, sys.stdout.fileno())
        self._stops = 0
        self._last = ""
        self._running_since: float | None = None
        self._warned = False

    def run(self) -> int:
        """Until the job has ended for good, or we are told to let it be: the exit code."""
        signals = SignalPipe((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        next_look = 0.0
        while True:
            for number in signals.wait(TICK)[0]:
                if number != signal.SIGINT:
                    self._say(f"job {self._job} goes on without this terminal; to stop it: scancel {self._job}")
                    return 0
                self._stop()
                next_look = 0.0
            self._tail.copy()
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_EVERY
                code = self._look()
                if code is not None:
                    return INTERRUPTED if self._stops else code

    def _stop(self) -> None:
        self._stops += 1
        what = "asking job {} to save and stop; Ctrl-C again ends it now" if self._stops == 1 else "ending job {}"
        self._say(what.format(self._job))
        try:
            self._cancel(self._stops > 1)
        except LaunchError as error:
            self._say(str(error))

    def _look(self) -> int | None:
        """Ask Slurm, say what is new; the exit code once the job has ended."""
        state, found = job_state(self._job)
        if state.detail != self._last:
            self._last = state.detail
            self._say(state.detail)
        self._warn_of_silence(state)
        if state.name != "ended":
            return None
        self._tail.copy()
        return self._ended(found)

    def _warn_of_silence(self, state: JobState) -> None:
        now = time.monotonic()
        self._running_since = (self._running_since or now) if state.name == "running" else None
        if self._running_since is None or self._warned or now - self._running_since < QUIET:
            return
        self._warned = True
        if not self._log.exists():
            self._say(
                f"job {self._job} runs but {self._log} is not there; the run folder must be shared with the nodes; see --runs"
            )

    def _ended(self, found: dict[str, str]) -> int:
        code = int(found.get("ExitCode", "1:0").split(":")[0])
        state = found.get("JobState")
        if found.get("ExitCode") == NO_OUTPUT or (state == "FAILED" and not self._log.exists()):
            self._say(f"job {self._job} could not write {self._log}; the run folder must be shared with the nodes; see --runs")
        if state == "FAILED" and code == REQUEUE:
            self._say("stopped and saved; the same command goes on")
        return 0 if state == "COMPLETED" else code or 1
