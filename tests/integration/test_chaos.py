"""benchmarks/chaos.py in small: what a few faults make of a run is what no fault makes of it, and the harness can tell."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import chaos, chaos_faults, chaos_places, chaos_run

pytestmark = pytest.mark.slow


def test_faults_leave_no_trace_in_weights_and_order(tmp_path: Path) -> None:
    kinds = ["newest checkpoint flipped", "kill -9 of the launcher"]
    said: list[str] = []
    with chaos_places.local_place(2) as place:
        result = chaos.soak(place, kinds, 1, tmp_path, said.append, steps_per_fault=15)
    assert result.problems == [], "\n".join(said)
    assert [fault.kind for fault in result.faults] == kinds
    assert result.attempts == 1 + len(kinds)
    assert result.starts >= 2


def make_run(folder: Path, name: str) -> chaos_run.Run:
    """What a run of two steps by two ranks leaves behind."""
    place = chaos_places.Place("local", 1, [], {})
    run = chaos_run.Run(folder, name, 2, place, "unused")
    for rank in (0, 1):
        path = run.run_dir / "order" / f"rank{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"step": step, "ids": [step * 7 + rank], "positions": [2 * (step - 1) + rank]} for step in (1, 2)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = run.checkpoints / "step_00000002"
    last.mkdir(parents=True)
    (last / "model.safetensors").write_bytes(b"weights")
    (last / "optimizer.safetensors").write_bytes(b"moments")
    (run.run_dir / "DONE").touch()
    return run


def problems(calm: chaos_run.Run, run: chaos_run.Run, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(run, "exit_code", lambda: 0)
    result = chaos.Soak()
    chaos.compare(calm, run, result)
    return "; ".join(result.problems)


def test_the_comparison_finds_what_is_not_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm, run = make_run(tmp_path, "calm"), make_run(tmp_path, "chaos")
    assert problems(calm, run, monkeypatch) == ""
    assert run.step() == 2
    record = run.run_dir / "order" / "rank1.jsonl"
    whole = record.read_text()
    record.write_text(whole + whole.splitlines(keepends=True)[1])
    assert "exactly once" in problems(calm, run, monkeypatch)
    record.write_text(whole.replace('"ids": [8]', '"ids": [9]'))
    assert "the order differs from the undisturbed run's at 1 steps, first [1]" in problems(calm, run, monkeypatch)
    record.write_text(whole)
    chaos_faults._flip(run.checkpoints / "step_00000002" / "model.safetensors", [3])
    assert "the weights differ" in problems(calm, run, monkeypatch)
    (run.run_dir / "DONE").unlink()
    assert "no DONE" in problems(calm, run, monkeypatch)


def test_every_kind_comes_as_often_as_the_others() -> None:
    planned = chaos.plan(["a", "b", "c"], 8, seed=3)
    assert sorted(planned.count(kind) for kind in "abc") == [2, 3, 3]
    assert planned == chaos.plan(["a", "b", "c"], 8, seed=3)


def test_damage_hits_a_file_of_the_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, "run")
    monkeypatch.setattr(chaos_faults, "kill_rank", lambda *_: "rank 0")
    (run.checkpoints / "step_00000001").mkdir()
    before = run.digests()
    said = chaos_faults.flip_newest(run, random.Random(0))
    assert said.startswith("step_00000002/")
    assert run.digests() != before
    size = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    chaos_faults.truncate_newest(run, random.Random(0))
    assert sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file()) < size
