"""Who owns a run folder: one session, named to others, also when file locks do not reach the other host."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import owner as module
from cluster.config import LaunchError
from cluster.owner import DEAD_AFTER, Owner, age_of


def elsewhere(path: Path, *, age: float = 0.0, **more: Any) -> None:
    """The record of a session on another host, whose lock this file system does not show."""
    record = {"session": "s", "pid": 77, "host": "other", "boot": "b", "job_id": None, "attempt": 5, "since": "noon", **more}
    path.write_text(json.dumps(record))
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_folder_in_use_is_refused_with_its_holder(tmp_path: Path) -> None:
    first = Owner(tmp_path / "run", "train", {"SLURM_JOB_ID": "12"})
    assert first.set_attempt(3) and first.beat()
    with pytest.raises(LaunchError, match=rf"in use by process {os.getpid()} on \S+, job 12 \(attempt 3\) since"):
        Owner(tmp_path / "run", "train", {})
    Owner(tmp_path / "run", "evaluate", {}).close()  # scoring beside training is fine
    assert json.loads((tmp_path / "run" / "owner.json").read_text())["attempt"] == 3
    first.close()
    assert [path.name for path in (tmp_path / "run").glob("owner*")] == []
    Owner(tmp_path / "run", "train", {}).close()


def test_a_killed_owner_of_this_host_gives_way_at_once(tmp_path: Path) -> None:
    elsewhere(tmp_path / "owner.json", boot=module.boot_id())  # its lock is free: the kernel says that it is dead
    taken = Owner(tmp_path, "train", {})
    assert json.loads((tmp_path / "owner.json").read_text())["session"] == taken.session
    taken.close()


def test_an_owner_elsewhere_counts_as_alive_for_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE", 0.0)
    elsewhere(tmp_path / "owner.json", age=DEAD_AFTER - 10)
    with pytest.raises(LaunchError, match="process 77 on other.*last sign of life was 50 s ago"):
        Owner(tmp_path, "train", {})
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == 77
    elsewhere(tmp_path / "owner.json", age=DEAD_AFTER + 1)
    Owner(tmp_path, "train", {}).close()


def test_the_same_job_started_again_by_the_scheduler_need_not_wait(tmp_path: Path) -> None:
    elsewhere(tmp_path / "owner.json", job_id="12", job_restarts="1")
    with pytest.raises(LaunchError, match="process 77 on other, job 12"):  # a second launcher in one allocation
        Owner(tmp_path, "train", {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"})
    Owner(tmp_path, "train", {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}).close()


def test_an_owner_finds_out_that_it_is_none_any_more(tmp_path: Path) -> None:
    first = Owner(tmp_path, "train", {})
    assert first.beat()
    elsewhere(tmp_path / "owner.json")
    first._next_beat = 0.0
    assert not first.beat() and not first.set_attempt(2)
    assert "process 77 on other" in first.taken_by()
    first.close()
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == 77


def test_an_owner_whose_disk_is_gone_ends_in_time_and_names_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    owner = Owner(tmp_path, "train", {})
    monkeypatch.setattr(module, "read_owner", broken)
    monkeypatch.setattr(module, "BEAT_EVERY", 0.0)
    assert owner.beat()
    monkeypatch.setattr(module, "SELF_FENCE_AFTER", 0.0)
    assert not owner.beat() and owner.taken_by() == "another launcher"
    owner.close()


def test_of_two_that_take_over_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE", 0.3)
    monkeypatch.setattr(Owner, "_lock_file", lambda *_: False)  # a file system whose locks do not reach other hosts
    elsewhere(tmp_path / "owner.json", age=DEAD_AFTER * 2)
    results: list[Any] = []

    def take() -> None:
        try:
            results.append(Owner(tmp_path, "train", {}))
        except LaunchError as error:
            results.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [item for item in results if isinstance(item, Owner)]
    assert len(winners) == 1 and winners[0]._is_mine()
    winners[0].close()


def test_ages_are_measured_by_the_file_systems_clock(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    os.utime(path, (time.time() - 30, time.time() - 30))
    assert 29 < age_of(path) < 60
    assert age_of(tmp_path / "none") == float("inf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_record_that_cannot_be_read_is_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "owner.json").write_text("{")
    with pytest.raises(LaunchError, match="in use by another launcher"):
        Owner(tmp_path, "train", {})


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(LaunchError, match=r"runs/a cannot be written: Not a directory; .*--runs"):
        Owner(tmp_path / "runs" / "a", "train")
