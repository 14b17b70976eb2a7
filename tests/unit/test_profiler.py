"""When a rank profiles itself, and what it writes; how runs are profiled is in tests/integration/test_profile.py."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.commands import profiling
from data_pipeline.errors import ConfigError
from trainer.observe import profiler
from trainer.observe.profile_window import MAX_STEPS, parse_request, parse_window
from trainer.observe.profiler import Profiler
from trainer.observe.recording import Recording, free_bytes, resident_bytes
from trainer.observe.trace_summary import summarise
from trainer.step import Clock


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert Clock.watcher is None and not torch.autograd._profiler_enabled()


def made(run: Path, clock: list[float], **more) -> Profiler:
    return Profiler(run, clock=lambda: clock[0], **more)


def take(profile: Profiler, first: int, last: int) -> list[int]:
    """Updates first..last-1 of a toy; after which of them the profiler took time of its own."""
    took = []
    for step in range(first, last):
        phase = Clock("forward")
        torch.ones(8, 8).sum()
        phase.enter("optimizer")
        phase.stop()
        if profile.stepped(step + 1):
            took.append(step + 1)
    return took


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "profile").iterdir()) if (run / "profile").is_dir() else []


def traced(run: Path, name: str) -> list[str]:
    with gzip.open(run / "profile" / f"{name}.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    return [event["name"] for event in sorted(events, key=lambda one: one.get("ts", 0)) if event.get("cat") == "user_annotation"]


def test_a_window_is_traced_update_by_update(tmp_path, clock):
    said: list[str] = []
    profile = made(tmp_path, clock, window="steps[2:4]", say=said.append)
    profile.stepped(0)
    assert take(profile, 0, 6) == [2, 4]
    name = "steps_00000002_00000004_rank0"
    assert files(tmp_path) == ["last.json", *(f"{name}.{end}" for end in ("memory.json", "operators.txt", "trace.json.gz"))]
    assert traced(tmp_path, name) == ["step 3", "forward", "optimizer", "step 4", "forward", "optimizer"]
    assert len(said) == 1 and f"{name}.trace.json.gz" in said[0]
    assert json.loads((tmp_path / "profile" / "last.json").read_text())["steps"] == [2, 4]


def test_other_ranks_profile_only_where_all_are_asked(tmp_path, clock):
    assert take(made(tmp_path, clock, rank=1, window="steps[1:2]"), 0, 3) == []
    assert take(made(tmp_path, clock, rank=1, window="steps[1:2]", all_ranks=True), 0, 3) == [1, 2]
    assert files(tmp_path) == [
        f"steps_00000001_00000002_rank1.{end}" for end in ("memory.json", "operators.txt", "trace.json.gz")
    ]


def test_a_resumed_run_takes_what_is_left_of_a_window(tmp_path, clock):
    late = made(tmp_path, clock, window="steps[2:6]")
    late.stepped(4)
    take(late, 4, 8)
    assert "steps_00000004_00000006_rank0.trace.json.gz" in files(tmp_path)
    after = made(tmp_path / "after", clock, window="steps[2:6]")
    assert not after.stepped(6) and take(after, 6, 9) == [] and files(tmp_path / "after") == []


def test_a_run_that_ends_in_a_window_leaves_what_was_done(tmp_path, clock):
    profile = made(tmp_path, clock, window="steps[1:9]")
    take(profile, 0, 3)
    profile.close()
    profile.close()
    assert "steps_00000001_00000003_rank0.trace.json.gz" in files(tmp_path)
    profile = made(tmp_path / "none", clock, window="steps[1:9]")
    take(profile, 0, 1)
    profile.close()
    assert files(tmp_path / "none") == [], "no update was done in it"


def test_a_profile_stops_before_a_pause(tmp_path, clock):
    profile = made(tmp_path, clock, window="steps[2:9]", stops_at=lambda step: step + 4 - step % 4)
    assert take(profile, 0, 9) == [2, 4]


def test_a_profile_ends_before_it_fills_the_memory(tmp_path, clock, monkeypatch):
    monkeypatch.setattr("trainer.observe.recording.free_bytes", lambda: 100.0)
    sizes = iter([0, 2, 4, 6, 8, 10])  # each update adds two bytes, which sixteen are needed for: half of 100 is short of 64
    monkeypatch.setattr("trainer.observe.recording.resident_bytes", lambda: next(sizes))
    assert take(made(tmp_path, clock, window="steps[1:9]"), 0, 9) == [1, 5]
    assert "steps_00000001_00000005_rank0.trace.json.gz" in files(tmp_path)


def test_free_memory_is_known_here():
    assert 0 < free_bytes() < float("inf") and resident_bytes() > 10**7


def test_a_request_is_seen_within_a_second_and_taken_once(tmp_path, clock):
    profile = made(tmp_path, clock)
    assert take(profile, 0, 2) == []
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "request").write_text("steps=2\n")
    assert take(profile, 2, 4) == [], "it looks once a second"
    clock[0] += profiler.LOOK_S
    assert take(profile, 4, 9) == [5, 7]
    assert "request" not in files(tmp_path) and "steps_00000005_00000007_rank0.trace.json.gz" in files(tmp_path)


def test_a_request_to_all_ranks_stays_until_each_has_seen_it(tmp_path, clock):
    first, second = made(tmp_path, clock), made(tmp_path, clock, rank=1)
    (tmp_path / "profile").mkdir()
    request = tmp_path / "profile" / "request"
    request.write_text("steps=1 ranks=all")
    assert take(first, 0, 3) == [1, 2]
    clock[0] += profiler.LOOK_S
    assert take(second, 3, 6) == [4, 5] and request.exists()
    clock[0] += profiler.KEPT_S + 1
    assert take(second, 6, 9) == [] and request.exists(), "rank 0 takes it away"
    assert take(first, 6, 9) == [] and not request.exists()


@pytest.mark.parametrize("text", ["steps=0", "steps=51", "steps=-1", "steps=many", "step=5", "\xff\xfe", "ranks=2", "steps[9:5]"])
def test_a_request_that_makes_no_sense_is_a_warning(tmp_path, clock, capsys, text):
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "request").write_bytes(text.encode("latin-1"))
    assert take(made(tmp_path, clock), 0, 3) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "training goes on" in line and files(tmp_path) == ["last.json"]
    assert json.loads((tmp_path / "profile" / "last.json").read_text())["error"]


def test_a_request_for_the_past_is_answered(tmp_path, clock, capsys):
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "request").write_text("steps[1:3]")
    assert take(made(tmp_path, clock), 5, 8) == []
    assert "6 updates are done" in capsys.readouterr().err


def test_whatever_fails_the_updates_go_on(tmp_path, clock, monkeypatch, capsys):
    (tmp_path / "profile").write_text("in the way")
    assert take(made(tmp_path, clock, window="steps[1:2]"), 0, 4) == [1, 2]
    profile = made(tmp_path / "other", clock, window="steps[1:2]")
    with monkeypatch.context() as broken:
        broken.setattr("torch.profiler.profile.start", lambda self: (_ for _ in ()).throw(RuntimeError("kineto is busy")))
        assert take(profile, 0, 4) == [1]
    with monkeypatch.context() as broken:
        broken.setattr(Recording, "_write_memory", lambda self, path, found: (_ for _ in ()).throw(OSError(28, "no space left")))
        assert take(made(tmp_path / "full", clock, window="steps[1:2]"), 0, 4) == [1, 2]
    assert files(tmp_path / "full") == ["last.json"], "half a profile is none"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all("has no profile" in line for line in told) and "kineto is busy" in told[1]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Of two tensors and a product, in an operator of our own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        first = torch.zeros(1000, dtype=torch.float64)
        second = torch.zeros(500, dtype=torch.float64)
        del first
        with torch.profiler.record_function("ours"):
            torch.mm(second.view(20, 25), second.view(25, 20))
        torch.mm(second.view(20, 25), second.view(25, 20))
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    return tmp_path / "trace.json"


def test_memory_on_a_cpu_is_what_tensors_of_the_profile_took(trace):
    memory = summarise(trace).memory()
    assert memory["peak_bytes"] == 12000 and memory["end_bytes"] == 4000
    assert [point[1] for point in memory["curve_us_bytes"]] == [0, 8000, 12000, 4000, 7200, 4000, 7200, 4000]
    made = {one["name"]: one["self_bytes"] for one in memory["operators"]}
    assert made == {"aten::empty": 12000, "aten::mm": 6400}


def test_operators_have_the_time_that_is_their_own(trace):
    found = summarise(trace)
    by_name = {one.name: one for one in found.host}
    assert by_name["aten::mm"].calls == 2 and by_name["ours"].calls == 1 and found.device == []
    events = json.loads(trace.read_text())["traceEvents"]
    whole = next(event for event in events if event["name"] == "ours")
    end = whole["ts"] + whole["dur"]
    inside = [event for event in events if event.get("cat") == "cpu_op" and whole["ts"] < event["ts"] < end]
    outermost = [one for one in inside if not any(o["ts"] < one["ts"] < o["ts"] + o["dur"] for o in inside)]
    assert {one["name"] for one in inside} >= {"aten::view", "aten::mm"}
    assert by_name["ours"].self_us == pytest.approx(whole["dur"] - sum(one["dur"] for one in outermost), abs=0.01)
    assert sum(one.self_us for one in found.host) == pytest.approx(
        sum(event["dur"] for event in events if event.get("cat") == "cpu_op" and event not in inside
            and not any(o["ts"] < event["ts"] < o["ts"] + o["dur"] for o in events if o.get("cat") == "cpu_op"))
        + whole["dur"], abs=0.01)  # fmt: skip
    lines = found.table().splitlines()
    assert lines[0].startswith("operators of the host") and any(line.endswith("  aten::mm") for line in lines)


def test_a_damaged_trace_is_read_as_far_as_it_goes(trace):
    text = trace.read_text()
    trace.write_text(text.replace('"name": "ours"', '"name": "ours', 1)[:-300])
    names = {one.name for one in summarise(trace).host}
    assert "ours" not in names and "aten::mm" in names


@pytest.mark.parametrize("text", ["steps[3]", "steps[5:5]", "steps[6:5]", "steps[0:51]", "10:20", "", "steps[-1:4]"])
def test_windows_that_are_refused(text):
    with pytest.raises(ConfigError, match=r"observe.profile=.*; steps\[a:b\] is needed"):
        parse_window("observe.profile", text)


def test_windows_and_requests_that_are_understood():
    assert parse_window("observe.profile", " steps[10:60] ") == (10, 60)
    assert parse_request("", 7) == (7, 27, False)
    assert parse_request("steps=5 ranks=all\n", 7) == (7, 12, True)
    assert parse_request("ranks=0 steps[100:120]", 7) == (100, 120, False)


def test_the_launcher_knows_the_same_limit():
    assert profiling.MAX_STEPS == MAX_STEPS
