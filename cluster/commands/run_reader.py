"""What a run folder says, read without trust: every file may be absent, cut short or damaged, another user's, and may change
under the reader.

A folder in; plain values out, None (or nothing) for whatever cannot be read. Nothing but the standard library is needed.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import JOBS
from cluster.owner import owner_file
from cluster.run_folder import job_file

TAIL = 256 * 1024  # bytes of a log's end that are read
RECENT = 20  # logged steps that speed and remaining time are taken from
KEY = re.compile(r"^( *)([A-Za-z_][\w.]*):(?: +(.*))?$")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def tail_objects(path: Path, reach: int = TAIL) -> list[dict[str, Any]]:
    """The JSON objects on the last lines of a file, oldest first; lines that are none are passed over."""
    try:
        with open(path, "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - reach))
            raw = stream.read().split(b"\n")
    except OSError:
        return []
    found = []
    for text in raw[1:] if size > reach else raw:
        try:
            item = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError):
            continue
        if isinstance(item, dict):
            found.append(item)
    return found


def number(source: Mapping[str, Any], key: str) -> float | None:
    """source[key] when it is a finite number."""
    value = source.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
    return value if usable else None


def whole(source: Mapping[str, Any], key: str) -> int | None:
    value = number(source, key)
    return None if value is None else int(value)


def text(source: Mapping[str, Any], *keys: str) -> str | None:
    """The first of these keys that holds a non-empty string."""
    return next((value for key in keys if isinstance(value := source.get(key), str) and value), None)


def config_values(path: Path, keys: Iterable[str]) -> dict[str, str]:
    """Single values of the resolved config.yaml that the trainer wrote, by dotted key, as they stand there."""
    wanted, found = set(keys), {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    above: list[tuple[int, str]] = []
    for line in lines:
        match = KEY.match(line)
        if not match:
            continue
        indent = len(match[1])
        above = [item for item in above if item[0] < indent]
        name = ".".join([*(key for _, key in above), match[2]])
        if name in wanted and match[3] is not None:
            found[name] = match[3].strip().strip("'\"")
        above.append((indent, match[2]))
    return found


@dataclass(frozen=True)
class Progress:
    """Where the training is, from metrics.jsonl."""

    step: int | None = None
    logged: float | None = None  # seconds since the epoch of the newest line
    clips_per_s: float | None = None
    seconds_per_step: float | None = None
    data_wait: float | None = None  # share of a step's time, 0 to 1


def progress(run_dir: Path) -> Progress:
    lines = [line for line in tail_objects(run_dir / "metrics.jsonl") if whole(line, "step") is not None]
    if not lines:
        return Progress()
    steps = [line for line in lines if number(line, "time/step_ms")][-RECENT:]
    shares = [(number(line, "time/data_wait_ms") or 0.0) / line["time/step_ms"] for line in steps]
    speeds = [speed for line in steps if (speed := number(line, "speed/clips_per_s")) is not None]
    return Progress(
        step=int(lines[-1]["step"]),
        logged=number(lines[-1], "time"),
        clips_per_s=statistics.median(speeds) if speeds else None,
        seconds_per_step=_seconds_per_step(steps),
        data_wait=min(1.0, statistics.median(shares)) if shares else None,
    )


def _seconds_per_step(lines: list[dict[str, Any]]) -> float | None:
    """By the clock, with saves and evaluations; of a gap between two attempts the median takes no notice."""
    rates = []
    for before, after in zip(lines, lines[1:], strict=False):
        steps, start, end = after["step"] - before["step"], number(before, "time"), number(after, "time")
        if steps > 0 and start is not None and end is not None and end > start:
            rates.append((end - start) / steps)
    if rates:
        return statistics.median(rates)
    return lines[-1]["time/step_ms"] / 1000 if lines else None


def scores(run_dir: Path) -> dict[str, float]:
    """The newest number of every metric/ key."""
    found: dict[str, float] = {}
    for line in tail_objects(run_dir / "metrics.jsonl"):
        found.update({key: value for key in line if key.startswith("metric/") and (value := number(line, key)) is not None})
    return found


def main_job(run_dir: Path) -> str:
    """The job that a run's name stands for: train where anything tells of one, else the job that is alone in the folder.

    job.json comes last: before other jobs had records of their own, all wrote that one.
    """
    if any(os.path.exists(run_dir / name) for name in ("config.yaml", "owner.json")):
        return "train"
    jobs = [job for number in _attempts(run_dir) if (job := _job_of(run_dir, number))]
    others = [job for job in JOBS if job != "train"]
    jobs = jobs or [job for job in others if any(os.path.exists(path(run_dir, job)) for path in (owner_file, job_file))]
    return "train" if "train" in jobs or not jobs else jobs[0]


def job_record(run_dir: Path) -> Path:
    """The file that says how the folder's main job was started."""
    own = job_file(run_dir, main_job(run_dir))
    return own if os.path.exists(own) else job_file(run_dir, "train")


def newest_attempt(run_dir: Path) -> int | None:
    """Of the folder's main job: an evaluation beside a training has attempts there as well."""
    job = main_job(run_dir)
    return next((number for number in _attempts(run_dir) if _job_of(run_dir, number) == job), None)


def _attempts(run_dir: Path) -> list[int]:
    """Of all jobs, newest first."""
    try:
        return sorted((int(name) for name in os.listdir(run_dir / "attempts") if name.isdigit()), reverse=True)
    except OSError:
        return []


def _job_of(run_dir: Path, attempt: int) -> str | None:
    """The job of an attempt, train where nothing says it; None as long as its record is not there: a launcher just makes it."""
    folder = run_dir / "attempts" / str(attempt)
    try:
        begun = any(not name.startswith(".") for name in os.listdir(folder))
    except OSError:
        return None
    return (text(read_json(folder / "launch.json"), "job") or "train") if begun else None


@dataclass(frozen=True)
class SavedStep:
    step: int
    time: float  # seconds since the epoch


def newest_checkpoint(run_dir: Path) -> tuple[SavedStep | None, str | None]:
    """(the newest checkpoint whose files are there in full, what is wrong with one that is newer or None).

    Sizes are compared with the manifest. The trainer compares every byte before it loads one.
    """
    try:
        folders = sorted((p for p in (run_dir / "checkpoints").iterdir() if re.fullmatch(r"step_\d{8}", p.name)), reverse=True)
    except OSError:
        return None, None
    damage = None
    for folder in folders:
        wrong = _damage(folder)
        if wrong is None:
            try:
                return SavedStep(int(folder.name[5:]), (folder / "manifest.json").stat().st_mtime), damage
            except OSError:  # taken away meanwhile: there is a newer one
                continue
        if os.path.isdir(folder):  # else it was an old one, just being removed
            damage = damage or f"checkpoint {folder.name} is damaged: {wrong}"
    return None, damage


def _damage(folder: Path) -> str | None:
    files = read_json(folder / "manifest.json").get("files")
    if not isinstance(files, dict) or not files:
        return "its manifest.json is missing or cannot be read"
    for name, entry in files.items():
        expected = whole(entry, "bytes") if isinstance(entry, dict) else None
        try:
            there = (folder / str(name)).stat().st_size
        except OSError:
            return f"{name} is missing"
        if expected is not None and there != expected:
            return f"{name} has {there} bytes, its manifest says {expected}"
    return None
