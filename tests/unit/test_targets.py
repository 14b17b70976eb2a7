"""Target files: whole at any moment, known by their run, cleared when nobody refreshes them."""

from __future__ import annotations

import json
import os
import time

import pytest

from data_pipeline import targets


def groups(count: int = 2) -> list[dict]:
    return [targets.target_group(f"127.0.0.1:{9000 + rank}", run="r", attempt=1, node="a", rank=rank) for rank in range(count)]


def test_file_is_what_file_sd_reads(tmp_path):
    path = tmp_path / "run" / "monitoring" / "targets.json"
    targets.write_targets(path, groups(3))
    content = json.loads(path.read_text())
    assert content[2] == {"targets": ["127.0.0.1:9002"], "labels": {"run": "r", "attempt": "1", "node": "a", "rank": "2"}}
    assert all(isinstance(value, str) for group in content for value in group["labels"].values())


def test_a_failing_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "targets.json"
    targets.write_targets(path, groups(2))

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        targets.write_targets(path, groups(5))
    assert len(json.loads(path.read_text())) == 2 and [file.name for file in tmp_path.iterdir()] == ["targets.json"]


def test_link_heartbeat_and_remove(tmp_path):
    path, watched = tmp_path / "runs" / "my run" / "monitoring" / "targets.json", tmp_path / "watched"
    targets.write_targets(path, groups())
    copy = targets.link_into(path, watched)
    assert json.loads(copy.read_text()) == groups() and copy.suffix == ".json" and " " not in copy.name
    os.utime(copy, (1, 1))
    targets.heartbeat(path, watched)
    assert time.time() - copy.stat().st_mtime < 100
    copy.unlink()
    targets.heartbeat(path, watched)
    assert copy.exists()
    targets.remove(path, watched)
    targets.remove(path, watched)
    assert not copy.exists() and not path.exists()


def test_runs_of_one_name_in_two_places_do_not_overwrite_each_other(tmp_path):
    first, second = (targets.watched_file(tmp_path / place / "demo" / "monitoring" / "targets.json", tmp_path) for place in "ab")
    assert first != second


def test_only_our_stale_files_are_cleared(tmp_path):
    names = ["slotstream-old-1.json", "slotstream-new-2.json", "other.json"]
    for name in names:
        (tmp_path / name).write_text("[]")
    for name in (names[0], names[2]):
        os.utime(tmp_path / name, (1, 1))
    assert [file.name for file in targets.clean_stale(tmp_path)] == [names[0]]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names[1:])
