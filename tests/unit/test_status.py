"""What `status` says of run folders of every kind, whole and damaged."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.run_reader import config_values, job_record, main_job, newest_attempt, newest_checkpoint, progress
from cluster.commands.run_view import read_run
from cluster.commands.runs import find, remembering
from cluster.commands.status import render
from cluster.commands.tables import Column, shorten, span, table
from cluster.flags import LaunchError
from cluster.owner import boot_id

NOW = time.time()


class Folder:
    """A run folder made by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)

    def write(self, name: str, content: Any) -> Folder:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content if isinstance(content, str) else json.dumps(content))
        return self

    def events(self, *events: dict[str, Any]) -> Folder:
        return self.write("events.jsonl", "".join(json.dumps({"time": NOW - 30, **event}) + "\n" for event in events))

    def started(self, backend: str = "local") -> Folder:
        self.write("job.json", {"backend": backend, "id": "17", "host": socket.gethostname(), "words": []})
        self.write("attempts/2/launch.json", {"nodes": 2, "ranks_per_node": 4, "backend": backend})
        return self.events({"event": "session"}, {"event": "restart", "why": "rank 1 died"}, {"event": "attempt", "attempt": 2})

    def owned(self, age: float, host: str | None = None, pid: int | None = None) -> Folder:
        record = {"pid": pid or os.getpid(), "host": host or socket.gethostname(), "boot": boot_id(), "attempt": 2}
        self.write(
            "owner.json", {**record, "since": "2026-01-01T00:00:00+0000" if host else time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        )
        os.utime(self.path / "owner.json", (NOW - age, NOW - age))
        return self

    def add_event(self, **event: Any) -> Folder:
        with open(self.path / "events.jsonl", "a") as stream:
            stream.write(json.dumps({"time": NOW - 5, **event}) + "\n")
        return self


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "runs" / "x")


def state(folder: Folder, said: str = "unknown") -> str:
    return read_run(folder.path, NOW, lambda job: said).state


def test_every_state(folder: Folder):
    assert state(folder) == "new"
    folder.write("job.json", {"backend": "slurm", "id": "9"})
    assert state(folder, "queued") == "queued" and state(folder, "unknown") == "unknown"
    folder.started("slurm").owned(3, host="elsewhere")
    assert state(folder, "ended") == "running"
    folder.add_event(event="stopping")
    assert state(folder) == "saving"
    folder.owned(500, host="elsewhere")
    assert state(folder, "ended") == "lost" and state(folder, "queued") == "queued"
    (folder.path / "owner.json").unlink()
    assert state(folder, "ended") == "lost"  # no word at its end
    folder.add_event(event="verdict", outcome="requeue").add_event(event="end", code=75)
    assert state(folder, "ended") == "stopped (requeue)" and state(folder, "queued") == "queued"
    folder.add_event(event="end", code=130)
    assert state(folder, "ended") == "stopped"
    folder.add_event(event="verdict", outcome="failed").add_event(event="end", code=143)
    assert state(folder, "ended") == "failed"
    folder.write("DONE", "")
    assert state(folder, "running") == "done"


def test_an_owner_on_this_machine_is_looked_up(folder: Folder):
    folder.started().owned(30)
    assert state(folder) == "running"  # silent for long, but the process is there: a busy disk
    folder.owned(30, pid=2**22 - 1)
    assert state(folder) == "lost"
    folder.owned(1, pid=2**22 - 1)
    assert state(folder) == "running"  # just now: in another container


def test_a_process_that_came_later_is_not_the_owner(folder: Folder):
    folder.started().owned(30)
    record = json.loads((folder.path / "owner.json").read_text())
    folder.write("owner.json", {**record, "since": "2001-01-01T00:00:00+0000"})
    os.utime(folder.path / "owner.json", (NOW - 30, NOW - 30))
    assert state(folder) == "lost"


def test_figures(folder: Folder):
    folder.started().owned(1).write("config.yaml", "name: x\noptim:\n  lr: 0.1\n  max_steps: 1000\n")
    lines = [
        {"step": step, "time": NOW - 100 + step, "time/step_ms": 500.0, "time/data_wait_ms": 50.0, "speed/clips_per_s": 12.0}
        for step in range(10, 101, 10)
    ]
    folder.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    view = read_run(folder.path, NOW)
    assert (view.step, view.steps, view.clips_per_s, view.nodes, view.ranks_per_node) == (100, 1000, 12.0, 2, 4)
    assert view.eta_s == pytest.approx(900.0) and view.data_wait == pytest.approx(0.1)
    assert (view.attempt, view.restarts, view.event) == (2, 1, "attempt")
    assert "rank 1 died" in (view.problem or "")


def test_a_failure_is_explained(folder: Folder):
    verdict = {"rank": 3, "node": 1, "signal": "SIGKILL", "after_seconds": 12.3, "last_lines": ["step 7", ""]}
    folder.started().write("attempts/2/verdict.json", {"outcome": "failed", **verdict})
    folder.add_event(event="end", code=137)
    problem = read_run(folder.path, NOW).problem or ""
    assert "rank 3 (node 1) was killed by SIGKILL" in problem and problem.endswith("after 12 s: step 7")
    folder.add_event(event="end", code=2, why="run folder is not shared")
    assert read_run(folder.path, NOW).problem == "run folder is not shared"


def test_the_newest_whole_checkpoint_counts(folder: Folder):
    for step in (10, 20, 30):
        name = f"checkpoints/step_{step:08d}"
        folder.write(f"{name}/model.bin", "12345").write(f"{name}/manifest.json", {"files": {"model.bin": {"bytes": 5}}})
    assert newest_checkpoint(folder.path)[0].step == 30 and newest_checkpoint(folder.path)[1] is None
    folder.write("checkpoints/step_00000030/model.bin", "123")
    (folder.path / "checkpoints" / "step_00000020" / "manifest.json").write_text("{")
    saved, damage = newest_checkpoint(folder.path)
    assert saved.step == 10 and damage == "checkpoint step_00000030 is damaged: model.bin has 3 bytes, its manifest says 5"


def test_an_evaluation_beside_a_training_changes_nothing_of_what_is_said(folder: Folder):
    """Its session ends with 0, its attempt is the newest, it holds a file of its own. Events without a job are older."""
    folder.started().owned(1).add_event(event="stopping")
    before = read_run(folder.path, NOW)
    assert before.state == "saving"
    folder.write("job_evaluate.json", {"backend": "slurm", "id": "18"}).write("owner_evaluate.json", {"pid": 1, "host": "h"})
    folder.write("attempts/3/launch.json", {"job": "evaluate", "nodes": 9})
    for event in ("session", "attempt", "restart", "end"):
        folder.add_event(event=event, job="evaluate", code=0)
    assert read_run(folder.path, NOW) == before
    (folder.path / "owner.json").unlink()
    folder.add_event(event="end", job="train", code=75).add_event(event="stopping", job="evaluate")
    assert state(folder) == "stopped (requeue)"


def test_an_attempt_that_is_being_made_is_nobodys_yet(folder: Folder):
    folder.started().write("attempts/3/.launch.json.x.tmp", "{")
    (folder.path / "attempts" / "4").mkdir()
    assert newest_attempt(folder.path) == 2


@pytest.mark.parametrize("record", ["job.json", "job_build-shards.json"])
def test_a_folder_with_one_job_is_shown_by_it(folder: Folder, record: str):
    """Also one from before jobs had records of their own."""
    made = {"backend": "local", "id": "17", "words": ["build-shards"]}
    mark = {} if record == "job.json" else {"job": "build-shards"}
    folder.write(record, made).owned(1)
    (folder.path / "owner.json").rename(folder.path / "owner_build-shards.json")
    assert find(folder.path.parent, "x") == folder.path and state(folder) == "running"
    assert job_record(folder.path) == folder.path / record
    folder.write("attempts/1/launch.json", {"job": "build-shards", "nodes": 3}).events({"event": "attempt", **mark})
    assert main_job(folder.path) == "build-shards" and state(folder) == "running"
    (folder.path / "owner_build-shards.json").unlink()
    folder.add_event(event="verdict", outcome="requeue", **mark).add_event(event="end", code=75, **mark)
    view = read_run(folder.path, NOW)
    assert (view.state, view.job, view.nodes, view.attempt) == ("stopped (requeue)", "17", 3, 1)
    folder.write("config.yaml", "name: x\n")  # and is trained in now
    assert main_job(folder.path) == "train"


def test_a_training_without_a_launcher_that_is_scored_by_one_is_a_training(folder: Folder):
    folder.write("config.yaml", "name: x\n").write("attempts/1/provenance.json", {}).write("job_evaluate.json", {})
    folder.write("attempts/2/launch.json", {"job": "evaluate"}).events({"event": "end", "code": 0, "job": "evaluate"})
    view = read_run(folder.path, NOW)
    assert (view.state, view.attempt, view.backend) == ("stopped", 1, None)


GARBAGE = [
    "",
    "{",
    "[1, 2]",
    "null",
    "\x00\xff\x00",
    '"text"',
    '{"event": 3, "step": "x", "time": "y", "pid": "z", "nodes": []}\n{"st',
]
NAMES = ["job.json", "owner.json", "events.jsonl", "metrics.jsonl", "config.yaml", "attempts/2/verdict.json",
         "attempts/2/launch.json", "checkpoints/step_00000001/manifest.json"]  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE)
def test_damaged_files_never_break_it(folder: Folder, garbage: str):
    for name in NAMES:
        folder.started().owned(1)
        folder.write(name, garbage)
        assert render([read_run(folder.path, NOW, lambda job: "unknown")], 80)
    for name in NAMES:
        folder.write(name, garbage)
    assert render([read_run(folder.path, NOW, lambda job: "unknown")], 80)
    for name in NAMES:  # and folders where files should be
        (folder.path / name).unlink()
        (folder.path / name).mkdir()
    assert render([read_run(folder.path, NOW, lambda job: "unknown")], 80)


def test_a_line_that_is_being_written_is_passed_over(folder: Folder):
    folder.write("metrics.jsonl", '{"step": 3, "time": 1.0}\n{"step": 4, "ti')
    assert progress(folder.path).step == 3


def test_config_values_without_a_yaml_library(folder: Folder):
    folder.write("config.yaml", "a:\n  b:\n    c: 5\n  d: 'x'\nlist:\n- c: 1\noptim:\n  max_steps: 7\n")
    assert config_values(folder.path / "config.yaml", ["a.b.c", "a.d", "optim.max_steps", "c"]) == {
        "a.b.c": "5", "a.d": "x", "optim.max_steps": "7"}  # fmt: skip


@pytest.mark.parametrize("width", [80, 140, None])
def test_lines_fit_the_terminal(folder: Folder, width: int | None):
    folder.started().owned(1).write("config.yaml", "optim:\n  max_steps: 100000\n")
    folder.add_event(
        event="hang", why="rank 3 has been in the collective 12 of step 400 for 40 s, its stack stands in hang.json " * 2
    )
    lines = render([read_run(folder.path, NOW)], width)
    assert all(len(line) <= (width or 10_000) for line in lines)
    assert "running" in lines[1] and "hang" in lines[2]


def test_a_backend_that_does_not_answer_is_asked_once():
    asked = []
    ask = remembering(lambda job: asked.append(job["id"]) or {"1": "queued"}.get(job["id"], "unknown"))
    answers = [ask({"backend": "slurm", "id": number}) for number in ("1", "1", "2", "3")]
    assert answers == ["queued", "queued", "unknown", "unknown"] and asked == ["1", "2"]


def test_names_are_completed(folder: Folder):
    folder.started()
    runs = folder.path.parent
    assert find(runs, "x") == folder.path and find(runs, str(folder.path)) == folder.path
    Folder(runs / "movi_c_seed0").started()
    with pytest.raises(LaunchError, match="did you mean movi_c_seed0"):
        find(runs, "movi_seed0")
    with pytest.raises(LaunchError, match="no such folder"):
        find(runs / "nowhere", "x")


def test_tables_and_words():
    columns = (Column("run"), Column("b", 1), Column("n", 2, True))
    assert table(columns, [["one", "x", "1"], ["three", "", "22"]], None) == [
        ["run    b   n"],
        ["one    x   1"],
        ["three     22"],
    ]
    assert table(columns, [["one", "x", "1"], ["three", "", "22"]], 8)[1] == ["one    x"]
    assert shorten("abcdefghij", 5) == "ab…ij" and shorten("abc", 3) == "abc"
    assert [span(value) for value in (None, 3, 119, 7300, 200_000)] == ["", "3 s", "1 min", "2 h 1 min", "2 d 7 h"]
