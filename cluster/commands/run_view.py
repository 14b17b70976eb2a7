"""One run as `status` shows it: a run folder (and, where it must be asked, its backend) in, a RunView out. Writes nothing."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.commands.run_reader import (
    Progress,
    SavedStep,
    config_values,
    job_record,
    main_job,
    newest_attempt,
    newest_checkpoint,
    number,
    progress,
    read_json,
    tail_objects,
    text,
    whole,
)
from cluster.commands.tables import span
from cluster.config import JOBS
from cluster.owner import DEAD_AFTER, boot_id, owner_file
from cluster.run_folder import job_file
from cluster.verdict import CODES_OF_REASONS, REQUEUE, how_it_ended

HERE_SILENT = 6.0  # seconds without a beat after which the process table is asked, where the owner is on this machine
START_SLACK = 3.0  # owners write whole seconds
LIVE = ("queued", "running", "saving")
NOT_OVER = (*LIVE, "unknown")  # none of these may be taken for ended: a second launch could meet the first
STATE_OF_OUTCOME = {"done": "done", "failed": "failed", "requeue": "stopped (requeue)", "interrupted": "stopped",
                    "terminated": "stopped", "hung_up": "stopped", "out_of_time": "stopped (requeue)"}  # fmt: skip
OUTCOME_OF_CODE = {0: "done", REQUEUE: "requeue", **{code: name for name, code in CODES_OF_REASONS.items()}}
TROUBLE = (
    "hang",
    "straggler",
    "disk",
    "lost",
    "taken_over",
    "cannot_start",
    "restart",
)  # events that say that something went wrong
RECENT_TROUBLE = 900.0  # seconds for which it is shown while the run goes on
STOPPING = ("preempted", "stopping", "regroup")  # events after which a live run saves and ends
SWEEP_FILE = "sweep.json"
RECORDS = tuple(path(Path(), job).name for job in JOBS for path in (job_file, owner_file))
MARKS = ("config.yaml", "events.jsonl", "metrics.jsonl", "attempts", *RECORDS)  # what makes a folder a run

Ask = Callable[[Mapping[str, Any]], str]  # job.json -> queued | running | ended | unknown


@dataclass(frozen=True, kw_only=True)
class RunView:
    name: str
    path: str
    state: str  # new | queued | running | saving | stopped (requeue) | stopped | done | failed | lost | unknown
    backend: str | None = None
    job: str | None = None  # the backend's id of it
    nodes: int | None = None
    ranks_per_node: int | None = None
    attempt: int | None = None
    restarts: int = 0
    step: int | None = None
    steps: int | None = None
    clips_per_s: float | None = None
    eta_s: float | None = None
    data_wait: float | None = None  # share of the time, 0 to 1
    checkpoint: int | None = None  # step of the newest one that is whole
    checkpoint_age_s: float | None = None
    event: str | None = None
    event_age_s: float | None = None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Facts:
    """What was read, once, so that all that is said comes from the same look."""

    run_dir: Path
    now: float
    job: dict[str, Any]
    owner: dict[str, Any]
    events: list[dict[str, Any]]
    verdict: dict[str, Any]
    attempt: int | None
    launch: dict[str, Any]
    progress: Progress
    done: bool


def name_of(run_dir: Path) -> tuple[str, Path]:
    """(the name that the commands know a run by, the folder of runs): that of a sweep's point is SWEEP/POINT."""
    folder = run_dir.absolute()
    if os.path.isfile(folder.parent / SWEEP_FILE):
        return f"{folder.parent.name}/{folder.name}", folder.parent.parent
    return folder.name, folder.parent


def is_run(folder: Path) -> bool:
    """False also of a folder that is not ours to read: in shared ones there are such. Path.exists would raise."""
    return any(os.path.exists(folder / name) for name in MARKS)


def read_run(run_dir: Path, now: float, ask: Ask | None = None) -> RunView:
    """The state of a run at `now` (seconds since the epoch). `ask` is called only where the folder cannot say it."""
    job, attempt = main_job(run_dir), newest_attempt(run_dir)
    folder = run_dir / "attempts" / str(attempt)
    facts = _Facts(
        run_dir=run_dir,
        now=now,
        job=read_json(job_record(run_dir)),
        owner=read_holder(run_dir, job),
        events=_events(run_dir, job),
        verdict=read_json(folder / "verdict.json") if attempt else {},
        attempt=attempt,
        launch=read_json(folder / "launch.json") if attempt else {},
        progress=progress(run_dir),
        done=os.path.exists(run_dir / "DONE"),
    )
    state = _state(facts, ask)
    at, launch = facts.progress, facts.launch
    steps = _int(config_values(run_dir / "config.yaml", ["optim.max_steps"]).get("optim.max_steps"))
    saved, damage = newest_checkpoint(run_dir)
    last = facts.events[-1] if facts.events else {}
    moving = state in ("running", "saving")
    left = None if steps is None or at.step is None else max(0, steps - at.step)
    return RunView(
        name=name_of(run_dir)[0],
        path=str(run_dir),
        state=state,
        backend=text(facts.job, "backend") or text(launch, "backend"),
        job=_job_id(facts.job),
        nodes=whole(launch, "nodes"),
        ranks_per_node=whole(launch, "ranks_per_node"),
        attempt=attempt,
        restarts=_restarts(facts),
        step=at.step,
        steps=steps,
        clips_per_s=at.clips_per_s if moving else None,
        eta_s=left * at.seconds_per_step if moving and left is not None and at.seconds_per_step else None,
        data_wait=at.data_wait if moving else None,
        checkpoint=saved.step if saved else None,
        checkpoint_age_s=_age(saved, now),
        event=text(last, "event"),
        event_age_s=None if number(last, "time") is None else max(0.0, now - last["time"]),
        problem=_problem(facts, state, damage),
    )


def _events(run_dir: Path, job: str) -> list[dict[str, Any]]:
    """What happened to `job`, oldest first. In older folders events do not say whose they are: they are the main job's."""
    found = tail_objects(run_dir / "events.jsonl")
    return [event for event in found if text(event, "event") and (text(event, "job") or job) == job]


def _int(value: str | None) -> int | None:
    try:
        return int((value or "").replace("_", ""))
    except ValueError:
        return None


def _age(saved: SavedStep | None, now: float) -> float | None:
    return None if saved is None else max(0.0, now - saved.time)


def _job_id(job: Mapping[str, Any]) -> str | None:
    value = job.get("id")
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) and value != "" else None


def _restarts(facts: _Facts) -> int:
    return sum(event["event"] in ("restart", "requeue") for event in facts.events)


def read_holder(run_dir: Path, job: str) -> dict[str, Any]:
    """The record of the launcher that runs `job` there, with "beat": its last sign of life. {} where there is none."""
    path = owner_file(run_dir, job)
    record = read_json(path)
    try:
        return {**record, "beat": path.stat().st_mtime} if record else {}
    except OSError:  # given up just now
        return {}


def owner_lives(owner: Mapping[str, Any], now: float) -> bool | None:
    """True: somebody holds the run and says so; False: somebody held it and is gone; None: nobody holds it."""
    beat, pid = number(owner, "beat"), whole(owner, "pid")
    if beat is None:
        return None
    if text(owner, "host") == socket.gethostname() and text(owner, "boot") == boot_id() and pid is not None:
        return now - beat <= HERE_SILENT or is_process(pid, _seconds(text(owner, "since")))
    return now - beat <= DEAD_AFTER


def _seconds(stamp: str | None) -> float | None:
    try:
        return datetime.strptime(stamp or "", "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def is_process(pid: int, by: float | None) -> bool:
    """True when the process lives and had begun at the time `by`: a later bearer of its number is another one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text().split()[0])
        began = time.time() - up + int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return fields[0] not in ("Z", "X") and (by is None or began <= by + START_SLACK)
    except (OSError, ValueError, IndexError):
        return False


def _state(facts: _Facts, ask: Ask | None) -> str:
    lives = owner_lives(facts.owner, facts.now)
    if lives:
        return "saving" if _is_stopping(facts.events) else "running"
    if facts.done:
        return "done"
    outcome = _outcome(facts)
    backend, said = text(facts.job, "backend"), None
    if ask is not None and backend not in (None, "local") and outcome not in ("done", "failed"):
        said = ask(facts.job)
        if said in ("queued", "running"):
            return said
    if lives is False:
        return "lost"
    if outcome is None and said == "unknown":
        return "unknown"
    if outcome is not None:
        return STATE_OF_OUTCOME.get(outcome, "stopped")
    if not facts.job and not facts.launch:  # no launcher of ours: python -m trainer.main, or nothing was started yet
        return ("running" if _was_active(facts) else "stopped") if facts.attempt is not None else "new"
    return "lost"


def _was_active(facts: _Facts) -> bool:
    logged = facts.progress.logged
    return logged is not None and facts.now - logged < DEAD_AFTER


def _is_stopping(events: list[dict[str, Any]]) -> bool:
    for event in reversed(events):
        if event["event"] in STOPPING:
            return True
        if event["event"] in ("session", "attempt", "end"):
            return False
    return False


def _outcome(facts: _Facts) -> str | None:
    """How the newest session ended: its last event, else (without any events) the newest verdict; None when it did not end."""
    if not facts.events:
        return text(facts.verdict, "outcome")
    code, said = None, None
    for event in reversed(facts.events):
        if event["event"] == "end" and code is None:
            code = whole(event, "code")
        elif event["event"] == "verdict":
            said = said or text(event, "outcome")
        if event["event"] == "session" or (event["event"] == "attempt" and code is None):
            break
    if code is None:
        return None
    if code == 0 or said != "failed":
        return OUTCOME_OF_CODE.get(code, "failed")
    return "requeue" if code == REQUEUE else "failed"


def _problem(facts: _Facts, state: str, damage: str | None) -> str | None:
    if state == "lost":
        return _why_lost(facts)
    if state == "unknown":
        return f"{text(facts.job, 'backend')} does not say what became of job {_job_id(facts.job)}; see whether it can be reached"
    if state == "failed":
        return _why_ended(facts) or verdict_line(facts.verdict) or "it failed; its verdict cannot be read"
    trouble = _trouble(facts) if state in LIVE else None
    return trouble or damage


def _why_ended(facts: _Facts) -> str | None:
    """What ended the session beside its ranks: a folder that is not shared, nodes that did not come."""
    last = facts.events[-1] if facts.events else {}
    return text(last, "why") if last.get("event") == "end" else None


def _why_lost(facts: _Facts) -> str:
    name, runs = name_of(facts.run_dir)
    where = "" if runs == Path("runs").absolute() else f" --runs {runs}"
    resume = f"python cluster/launch.py resume {name}{where}"
    host, pid = text(facts.owner, "host"), whole(facts.owner, "pid")
    if host is None:
        return f"it ended without a verdict; start it again: {resume}"
    beat = number(facts.owner, "beat")
    silent = "" if beat is None else f", last sign of life {span(facts.now - beat)} ago"
    return f"its launcher (process {pid} on {host}) is gone{silent}; start it again: {resume}"


def verdict_line(verdict: Mapping[str, Any]) -> str | None:
    """Who failed, how, and its last words, in one line."""
    if verdict.get("outcome") != "failed":
        return None
    rank, node = whole(verdict, "rank"), whole(verdict, "node")
    who = f"the agent of node {node}" if rank is None else f"rank {rank} (node {node})"
    after = number(verdict, "after_seconds")
    when = "" if after is None else f" after {span(after)}"
    code = whole(verdict, "rank_exit_code")
    if code is None:
        code = whole(verdict, "exit_code")
    lines = verdict.get("last_lines")
    words = [line for line in lines if isinstance(line, str) and line.strip()] if isinstance(lines, list) else []
    if why := text(verdict, "why"):
        return f"{text(verdict, 'cause') or 'failed'}: {why}"
    return f"{who} {how_it_ended(code, text(verdict, 'signal'))}{when}" + (f": {words[-1].strip()}" if words else "")


def _trouble(facts: _Facts) -> str | None:
    """The newest trouble of a run that goes on, in words; what is long ago does not count."""
    for event in reversed(facts.events):
        when = number(event, "time")
        if when is None or facts.now - when > RECENT_TROUBLE or event["event"] == "session":
            return None
        if event["event"] in TROUBLE:
            slot = whole(event, "slot")
            where = "" if slot is None else f" node {slot}"
            said = text(event, "why")
            return f"{event['event']}{where} {span(facts.now - when)} ago" + (f": {said}" if said else "")
    return None
