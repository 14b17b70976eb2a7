"""Target files: whole at any moment, known by their run, there while the process lives, cleared when nobody refreshes them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.commands import monitor
from data_pipeline import targets
from data_pipeline.targets import Listing


def groups(count: int = 2) -> list[dict[str, Any]]:
    return [targets.target_group(f"127.0.0.1:{9000 + rank}", run="r", attempt=1, node="a", rank=rank) for rank in range(count)]


def list_of(run: Path, name: str = "targets.json") -> Path:
    return run / "monitoring" / name


def unheard(text: str) -> None:
    raise AssertionError(text)


def test_file_is_what_file_sd_reads(tmp_path):
    path = list_of(tmp_path / "run")
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


def test_a_list_is_there_until_it_is_taken_back(tmp_path):
    path, watched = list_of(tmp_path / "runs" / "my run"), tmp_path / "watched"
    listing = Listing(path, groups(), str(watched), unheard)
    (copy,) = watched.iterdir()
    assert json.loads(copy.read_text()) == json.loads(path.read_text()) == groups()
    assert copy == listing.copy and copy.suffix == ".json" and " " not in copy.name
    listing.close()
    listing.close()
    assert not copy.exists() and not path.exists()


def test_a_live_process_keeps_its_list_fresh_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "REFRESH_S", 0.01)
    watched = tmp_path / "watched"
    listing = Listing(list_of(tmp_path / "run"), groups(), str(watched), unheard)
    (copy,) = watched.iterdir()
    for harm in (lambda: os.utime(copy, (1, 1)), copy.unlink):
        harm()
        deadline = time.monotonic() + 30
        while not (copy.exists() and time.time() - copy.stat().st_mtime < 100):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    listing.close()
    assert not list(watched.iterdir())


def test_a_monitor_that_comes_later_finds_the_run(tmp_path):
    listing = Listing(list_of(tmp_path / "runs" / "early"), groups(), None, unheard)
    assert listing.copy is None
    (tmp_path / "runs" / targets.SHARED).mkdir()
    listing.refresh()
    assert listing.copy is not None and json.loads(listing.copy.read_text()) == groups()
    listing.close()
    assert not list((tmp_path / "runs" / targets.SHARED).iterdir())


def test_a_new_attempt_takes_the_place_of_a_list_that_was_left_over(tmp_path):
    path, watched = list_of(tmp_path / "run"), tmp_path / "watched"
    Listing(path, groups(2), str(watched), unheard)._ended.set()  # killed: it takes nothing back
    listing = Listing(path, groups(3), str(watched), unheard)
    (copy,) = watched.iterdir()
    assert json.loads(copy.read_text()) == groups(3)
    listing.close()


@pytest.mark.parametrize("place", ["own", "watched"])
def test_a_folder_that_cannot_be_written_is_one_line_and_the_other_list_is_there(tmp_path, place):
    """A file where the folder should be: that stops a superuser, too."""
    path, watched = list_of(tmp_path / "run"), tmp_path / "watched"
    path.parent.parent.mkdir()
    (path.parent if place == "own" else watched).write_text("in the way")
    said: list[str] = []
    listing = Listing(path, groups(), str(watched), said.append)
    (line,) = said
    assert "cannot be written" in line and str(path if place == "own" else watched) in line and "\n" not in line
    assert (watched.is_dir() and list(watched.iterdir())) if place == "own" else path.exists()
    listing.close()


def test_an_evaluation_of_a_run_that_trains_has_a_list_of_its_own(tmp_path):
    run, watched = tmp_path / "run", tmp_path / "watched"
    both = [Listing(list_of(run, name), groups(), str(watched), unheard) for name in ("targets.json", "targets_evaluate.json")]
    assert len(list(watched.iterdir())) == 2
    both[1].close()
    assert [path.name for path in run.rglob("*.json")] == ["targets.json"] and len(list(watched.iterdir())) == 1
    both[0].close()


def test_runs_of_one_name_in_two_places_do_not_overwrite_each_other(tmp_path):
    first, second = (targets.watched_file(list_of(tmp_path / place / "demo"), tmp_path) for place in "ab")
    assert first != second


def test_only_our_stale_files_are_cleared(tmp_path):
    names = ["slotstream-old-1.json", "slotstream-new-2.json", "other.json"]
    for name in names:
        (tmp_path / name).write_text("[]")
    for name in (names[0], names[2]):
        os.utime(tmp_path / name, (1, 1))
    assert [file.name for file in targets.clean_stale(tmp_path)] == [names[0]]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names[1:])


def test_a_monitor_clears_what_the_next_run_would(tmp_path):
    """Two programs that may not import each other keep the same rule."""
    assert (monitor.TARGETS, monitor.STALE_S) == (targets.SHARED, targets.STALE_S)
    for name, age in (("slotstream-dead-1.json", 2), ("slotstream-live-2.json", 0.5), ("other.json", 9)):
        (tmp_path / name).write_text("[]")
        when = time.time() - age * targets.STALE_S
        os.utime(tmp_path / name, (when, when))
    assert monitor.clear_dead(tmp_path) == ["slotstream-dead-1.json"] and monitor.clear_dead(tmp_path) == []
    assert targets.clean_stale(tmp_path) == [] and len(list(tmp_path.iterdir())) == 2
