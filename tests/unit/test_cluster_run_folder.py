"""The run folder: numbered attempts, events, records without secrets, target lists that go away."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.run_folder import (
    EventLog,
    clean_environment,
    clean_word,
    make_attempt,
    newest_checkpoint,
    next_attempt,
    withdraw_targets,
    write_job,
    write_launch_record,
)


def test_attempts_count_up_and_never_share_a_folder(tmp_path: Path) -> None:
    assert next_attempt(tmp_path) == 1
    assert [make_attempt(tmp_path) for _ in range(3)] == [1, 2, 3]
    (tmp_path / "attempts" / "11").mkdir()
    (tmp_path / "attempts" / "3x").mkdir()
    assert make_attempt(tmp_path) == 12


def test_events_are_lines_and_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path, "s1")
    log.write("session", None, nodes=2)
    log.write("exit", 3, rank=1)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(line["event"], line["attempt"], line["session"]) for line in lines] == [("session", None, "s1"), ("exit", 3, "s1")]
    EventLog(Path("/dev/full/x"), "s1").write("exit", 1)


def test_the_job_is_recorded_without_secrets(tmp_path: Path) -> None:
    write_job(tmp_path / "run", "slurm", "4711", ["--nodes", "2", "data.api_key=s3cret"])
    job = json.loads((tmp_path / "run" / "job.json").read_text())
    assert (job["backend"], job["id"], job["words"]) == ("slurm", "4711", ["--nodes", "2", "data.api_key=<hidden>"])


def test_progress_is_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == -1
    for name, complete in (("step_00000010", True), ("step_00000200", True), ("step_00000300", False), ("step_x", True)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if complete:
            (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert newest_checkpoint(tmp_path) == 200


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
