"""The run folder: one launcher at a time, numbered attempts, records without secrets, target lists that go away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.config import LaunchError
from cluster.run_folder import (
    FolderLock,
    clean_environment,
    clean_word,
    make_attempt,
    next_attempt,
    withdraw_targets,
    write_launch_record,
)


def test_attempts_count_up_and_never_share_a_folder(tmp_path: Path) -> None:
    assert next_attempt(tmp_path) == 1
    assert [make_attempt(tmp_path) for _ in range(3)] == [1, 2, 3]
    (tmp_path / "attempts" / "11").mkdir()
    (tmp_path / "attempts" / "3x").mkdir()
    assert make_attempt(tmp_path) == 12


def test_a_folder_in_use_is_refused_with_its_holder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "run", "train")
    with pytest.raises(LaunchError, match=r"in use by process \d+ on .* since"):
        FolderLock(tmp_path / "run", "train")
    FolderLock(tmp_path / "run", "evaluate").close()  # scoring beside training is fine
    lock.close()
    FolderLock(tmp_path / "run", "train").close()


def test_records_hold_what_changes_a_run_and_no_secret(tmp_path: Path) -> None:
    environment = {"OMP_NUM_THREADS": "2", "HF_TOKEN": "s3cret", "RAY_AUTH_TOKEN": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret",
                   "NCCL_PROXY": "http://me:s3cret@host/x", "MY_THING": "s3cret"}  # fmt: skip
    write_launch_record(tmp_path, ["launch.py", "data.api_key=s3cret", "data.root=s3://me:s3cret@b/x"], environment, {"nodes": 2})
    text = (tmp_path / "launch.json").read_text()
    assert "s3cret" not in text
    record = json.loads(text)
    assert record["environment"]["OMP_NUM_THREADS"] == "2" and record["nodes"] == 2
    assert {"command", "host", "pid", "started", "git"} <= set(record)


def test_names_of_secrets() -> None:
    assert clean_word("a.password=x") == "a.password=<hidden>"
    assert clean_word("optim.lr=1") == "optim.lr=1"
    assert clean_word("data.root=https://host/shards?sig=s3cret") == "data.root=https://host/shards?<hidden>"
    assert clean_environment({"SLURM_JWT": "x", "LANG": "C"}) == {"LANG": "C", "SLURM_JWT": "<hidden>"}


def test_target_lists_of_an_ended_run_go_and_no_others(tmp_path: Path) -> None:
    own, watched = tmp_path / "run" / "monitoring" / "targets.json", tmp_path / "watched"
    own.parent.mkdir(parents=True)
    watched.mkdir()
    own.write_text("[1]")
    (watched / "mine.json").write_text("[1]")
    (watched / "other.json").write_text("[2]")
    withdraw_targets(tmp_path / "run", str(watched))
    assert not own.exists() and [path.name for path in watched.iterdir()] == ["other.json"]
    withdraw_targets(tmp_path / "run", None)
