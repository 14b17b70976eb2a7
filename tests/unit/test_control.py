"""What `cancel` and `resume` refuse, and the words that a run is started again with."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path

import pytest

from cluster import launch
from cluster.backends import BACKENDS
from cluster.commands import control
from cluster.commands.sweep_points import CANCELLED, expand, fix_sweep
from cluster.flags import LaunchError


def make_run(folder: Path, words: list[str] | None, **job: object) -> Path:
    folder.mkdir(parents=True)
    record = {"backend": "local", "id": "1", "host": socket.gethostname(), **job}
    (folder / "job.json").write_text(json.dumps(record if words is None else {**record, "words": words}))
    (folder / "events.jsonl").write_text('{"event": "end", "time": 1.0, "code": 75}\n')
    return folder


def test_a_run_is_started_again_with_its_words_backend_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(
        tmp_path / "runs" / "a", ["--nodes", "2", "--runs", "old", "--backend", "auto", "name=a", "x=1"], backend="slurm"
    )
    (run / "attempts" / "1").mkdir(parents=True)
    began = tmp_path / "began"
    began.mkdir()
    (run / "attempts" / "1" / "launch.json").write_text(json.dumps({"working_folder": str(began)}))
    seen: list[tuple[list[str], str]] = []
    monkeypatch.setattr(launch, "main", lambda words: seen.append((list(words), os.getcwd())) or 7)
    monkeypatch.chdir(tmp_path)
    assert control.resume(["x=2", "a"]) == 7
    runs = str((tmp_path / "runs").absolute())
    assert seen == [(["--backend", "slurm", "--runs", runs, "--nodes", "2", "name=a", "x=1", "x=2"], str(began))]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (None, "does not say how"),
        (["name=a", "store.token=<hidden>"], "without its secret"),
        (["x=https://h/a?<hidden>"], "secret"),
    ],
)
def test_what_was_not_recorded_cannot_be_repeated(tmp_path: Path, words: list[str] | None, said: str):
    make_run(tmp_path / "a", words)
    with pytest.raises(LaunchError, match=said):
        control.resume(["a", "--runs", str(tmp_path)])


def test_a_local_run_of_another_host_is_cancelled_there(tmp_path: Path):
    run = make_run(tmp_path / "a", [], host="elsewhere")
    (run / "owner.json").write_text(json.dumps({"pid": 1, "host": "elsewhere", "boot": "x"}))
    with pytest.raises(LaunchError, match="runs on elsewhere"):
        control.cancel(["a", "--runs", str(tmp_path)])


def test_points_that_cannot_be_reached_leave_none_of_the_others_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, stopped = tmp_path / "s", []
    points = fix_sweep(folder, expand(["x=1,2,3"])).points
    for point, host in zip(points, ("elsewhere", socket.gethostname(), "far"), strict=True):
        run = make_run(folder / point.name, [], host=host, id=point.name)
        (run / "owner.json").write_text(json.dumps({"pid": 1, "host": "any", "boot": "x"}))

    def stop(job: dict[str, str], now: bool) -> None:
        assert (folder / CANCELLED).exists()  # before anything is signalled
        stopped.append(job["id"])
        (folder / job["id"] / "owner.json").unlink()

    monkeypatch.setitem(BACKENDS, "local", dataclasses.replace(BACKENDS["local"], cancel=stop))
    with pytest.raises(LaunchError) as refusal:
        control.cancel(["s", "--runs", str(tmp_path)])
    assert stopped == [points[1].name]
    first, last = str(refusal.value).splitlines()
    assert first.startswith(f"{points[0].name} runs on elsewhere") and last.startswith(f"{points[2].name} runs on far")


def test_one_run_at_a_time(tmp_path: Path):
    make_run(tmp_path / "a", [])
    for words in (["a", "b"], ["x=1"], ["a", "runs=elsewhere"]):
        with pytest.raises(LaunchError):
            control.resume([*words, "--runs", str(tmp_path)])


def test_the_words_are_shown_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    make_run(tmp_path / "a", ["name=a"], backend="local")
    seen: list[str] = []
    monkeypatch.setattr(launch, "main", lambda words: seen.extend(words) or 0)
    given = "data.root=https://me:s3cret@host/x?sig=s3cret"
    assert control.resume(["a", given, "--runs", str(tmp_path)]) == 0
    assert given in seen
    said = capsys.readouterr().err
    assert "s3cret" not in said and "python cluster/launch.py --backend local" in said and "@host/x" in said
