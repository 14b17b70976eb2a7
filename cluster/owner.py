"""Sole ownership of a run folder by one session, also between hosts: a folder in, an Owner or a refusal that names it out.

Two means, because neither is enough alone. A file lock: the kernel frees it when the last process that holds it has ended, but
on some network file systems it counts on one host only. A record, owner.json, that its owner touches every two seconds: an owner
that does not is dead, however it died. Ages are differences of the file system's own times, so the hosts' clocks do not matter.
An owner that was taken for dead and is not finds another's record at its next beat and must end its ranks at once.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.config import LaunchError
from cluster.processes import write_json

BEAT_EVERY = 2.0
DEAD_AFTER = 60.0  # seconds without a beat
SELF_FENCE_AFTER = 40.0  # an owner that cannot write its beat so long must end its ranks: others will take over soon
SETTLE = 1.0  # two that take over at once: the second writer is the owner, the first finds that out within this time


def owner_file(run_dir: Path, job: str) -> Path:
    """The trainer reads that of its run (owner.json) before it publishes a checkpoint; scoring beside training has its own."""
    return run_dir / ("owner.json" if job == "train" else f"owner_{job}.json")


class Owner:
    """Ownership, from construction to `close`."""

    def __init__(self, run_dir: Path, job: str, environment: Mapping[str, str] = os.environ) -> None:
        """Raises: LaunchError that names the holder when the folder is in use, and why when it cannot be written."""
        self.path = owner_file(run_dir, job)
        self.session = secrets.token_hex(8)
        self._record: dict[str, Any] = {
            "session": self.session,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "boot": boot_id(),
            "job_id": environment.get("SLURM_JOB_ID"),
            "job_restarts": environment.get("SLURM_RESTART_COUNT", "0"),
            "attempt": 0,
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        self._next_beat = 0.0
        self._last_beat = time.monotonic()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._lock = open(run_dir / f"{job}.lock", "a+")  # noqa: SIM115 - lives as long as the ownership
            try:
                self._take(self._lock_file(run_dir))
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise LaunchError(
                f"run folder {run_dir} cannot be written: {why}; it must be a folder on a disk with room that all nodes see; "
                "choose another with --runs or name="
            ) from None

    def fileno(self) -> int:
        return self._lock.fileno()

    def set_attempt(self, number: int) -> bool:
        """Write the attempt that may publish checkpoints from now on; False when the folder is another's by now."""
        if not self._is_mine():
            return False
        self._record["attempt"] = number
        self._write()
        return True

    def beat(self) -> bool:
        """Sign of life, at most every BEAT_EVERY seconds; False when the folder has another owner, or may soon have one."""
        now = time.monotonic()
        if now < self._next_beat:
            return True
        self._next_beat = now + BEAT_EVERY
        try:
            if not self._is_mine():
                return False
            os.utime(self.path)
            self._last_beat = now
        except OSError:
            return now - self._last_beat < SELF_FENCE_AFTER
        return True

    def taken_by(self) -> str:
        """Who has the folder now, for a message."""
        try:
            return describe(read_owner(self.path))
        except OSError:  # a disk that has not been answering, which may be why we ask
            return describe(None)

    def close(self) -> None:
        try:
            if self._is_mine():
                self.path.unlink()
        except OSError:
            pass
        self._lock.close()

    def _lock_file(self, run_dir: Path) -> bool:
        """True when we hold the lock, False where the file system has none. Raises LaunchError when another holds it."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise self._refusal(run_dir, read_owner(self.path), "") from None

    def _take(self, locked: bool) -> None:
        holder = read_owner(self.path)
        if holder is None and self._create():
            return
        holder = read_owner(self.path) or {}
        if not (self._is_dead(holder, locked)):
            age = age_of(self.path)
            if age < DEAD_AFTER:
                said = f", whose last sign of life was {age:.0f} s ago (it counts as dead after {DEAD_AFTER:.0f} s)"
                raise self._refusal(self.path.parent, holder, said)
        self._write()
        if not self._is_dead(holder, locked):
            time.sleep(SETTLE)
        if not self._is_mine():
            raise self._refusal(self.path.parent, read_owner(self.path), "")

    def _is_dead(self, holder: Mapping[str, Any], locked: bool) -> bool:
        """True when the holder certainly lives no more: the kernel that would hold its lock gave it to us, or it belongs to an
        earlier run of this job, which Slurm has ended before it started this one."""
        same_kernel = locked and holder.get("boot") == self._record["boot"]
        own = self._record
        same_job = own["job_id"] is not None and holder.get("job_id") == own["job_id"]
        return same_kernel or (same_job and holder.get("job_restarts") != own["job_restarts"])

    def _create(self) -> bool:
        """Write the record where there is none; False when another was quicker."""
        temporary = self.path.with_name(f".{self.path.name}.{self.session}.tmp")
        write_json(temporary, self._record)
        try:
            os.link(temporary, self.path)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            self._write()
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def _write(self) -> None:
        write_json(self.path, self._record)
        self._last_beat = time.monotonic()

    def _is_mine(self) -> bool:
        record = read_owner(self.path)
        return record is not None and record.get("session") == self.session

    def _refusal(self, run_dir: Path, holder: Mapping[str, Any] | None, said: str) -> LaunchError:
        return LaunchError(
            f"run folder {run_dir} is in use by {describe(holder)}{said}; one launcher at a time; "
            "stop that one or choose another name=..."
        )


def read_owner(path: Path) -> dict[str, Any] | None:
    """The record of an owner, {} when it cannot be understood, None where there is none. Raises OSError of a broken disk."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def describe(holder: Mapping[str, Any] | None) -> str:
    """A holder's name for a message."""
    if not holder or not {"pid", "host", "since", "attempt"} <= holder.keys():
        return "another launcher"
    job = f", job {holder['job_id']}" if holder.get("job_id") else ""
    return f"process {holder['pid']} on {holder['host']}{job} (attempt {holder['attempt']}) since {holder['since']}"


def age_of(path: Path) -> float:
    """Seconds since the file was touched, by the clock of the file system that holds it; 0 when that cannot be told."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.probe")
    try:
        with open(path) as stream, open(probe, "w") as fresh:  # opened anew: a network file system then asks its server
            fresh.write("x")
            fresh.flush()
            os.fsync(fresh.fileno())
            os.utime(probe)
            return max(0.0, os.fstat(fresh.fileno()).st_mtime - os.fstat(stream.fileno()).st_mtime)
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


def boot_id() -> str:
    """Of the running kernel: two processes with the same one share their locks."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as stream:
            return stream.read().strip()
    except OSError:
        return ""
