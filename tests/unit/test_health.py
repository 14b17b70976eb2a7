"""Heartbeats from both ends, and what is made of them: hangs and stragglers, on beats that are made up."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import heartbeats
from cluster.heartbeats import WINDOW_STEPS, RankBeats
from cluster.supervision.health import Finding, Watcher
from trainer import heartbeat

# -- the record ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def beats(tmp_path: Path) -> Iterator[RankBeats]:
    made = RankBeats(tmp_path, 2)
    yield made
    made.close()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def beat(beats: RankBeats, monkeypatch: pytest.MonkeyPatch) -> heartbeat.Heartbeat:
    """The heartbeat of local rank 1, in this process."""
    monkeypatch.setattr(heartbeat, "_mine", heartbeat.Heartbeat())
    monkeypatch.setenv("SLOTSTREAM_HEARTBEAT", beats.environment(1)["SLOTSTREAM_HEARTBEAT"])
    return heartbeat.start()


@pytest.mark.parametrize(
    "name", ["PHASES", "OPERATIONS", "RECORD", "WINDOW", "WINDOW_STEPS", "WINDOWS", "WINDOWS_AT", "FILE_BYTES"]
)
def test_writer_and_reader_have_one_layout(name: str) -> None:
    assert getattr(heartbeat, name) == getattr(heartbeats, name)


def test_parts_of_the_file_do_not_overlap() -> None:
    assert struct.calcsize(heartbeats.RECORD) <= heartbeats.WINDOWS_AT
    assert heartbeats.WINDOWS_AT + heartbeats.WINDOWS * struct.calcsize(heartbeats.WINDOW) <= heartbeats.FILE_BYTES


def test_a_rank_that_has_not_begun_has_no_pid(beats: RankBeats) -> None:
    assert [(record["pid"], record["phase"], record["recent"]) for record in beats.read()] == [(0, "start", [])] * 2
    assert beats.stacks(0).startswith("(none")


def test_what_a_killed_agent_left_is_swept_away_and_the_living_are_let_be(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from cluster.heartbeats import RankBeats\n"
    program += "beats = RankBeats(Path(sys.argv[1]), 1); print(1, flush=True); sys.stdin.read()"
    agents = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for agent in agents:
            assert agent.stdout is not None and agent.stdout.readline()
        agents[0].kill()
        agents[0].wait()
        assert len(list(tmp_path.iterdir())) == 2
        RankBeats(tmp_path, 1).close()
        (left,) = tmp_path.iterdir()
        assert f"_{agents[1].pid}_" in left.name
    finally:
        for agent in agents:
            agent.kill()
            agent.communicate()


def test_what_the_rank_does_is_read(beats: RankBeats, beat: heartbeat.Heartbeat) -> None:
    beat.step(7)
    beat.allow("data", 600.0)
    beat.phase("data")
    assert beats.read()[1]["allowed"] == 600.0
    beat.phase("exchange")
    assert beats.read()[1]["allowed"] == 0.0
    beat.enter(1 + heartbeat.OPERATIONS.index("all_gather"))
    first, record = beats.read()
    assert first["pid"] == 0
    expected = {
        "pid": os.getpid(),
        "step": 7,
        "phase": "exchange",
        "in_collective": True,
        "operation": "all_gather",
        "collective": 1,
    }
    assert {key: record[key] for key in expected} == expected
    assert record["state"] == "R" and 0 <= record["age"] < 60
    beat.leave()
    with heartbeat.during("save"):
        assert beats.read()[1]["phase"] == "save"
    record = beats.read()[1]
    assert (record["phase"], record["in_collective"], record["operation"], record["collective"]) == ("exchange", False, "", 1)


def test_seconds_go_where_they_were_spent(beats: RankBeats, beat: heartbeat.Heartbeat, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    beat.step(0)
    for number in range(WINDOW_STEPS + 1):
        beat.phase("data")
        spend(1)
        beat.phase("forward")
        spend(2)
        beat.phase("exchange")
        beat.enter(1)
        spend(4)
        beat.leave()
        spend(8)
        with heartbeat.during("save"):
            spend(16)
            beat.enter(1)
            spend(32)
            beat.leave()
        with heartbeat.during("evaluate"):
            beat.enter(1)
            spend(64)
            beat.leave()
        beat.step(number + 1)
    record = beats.read()[1]
    steps = WINDOW_STEPS + 1
    each = {"data": 1, "compute": 10, "communication": 36, "save": 16, "evaluate": 64, "total": 127}
    assert {name: record[name] for name in each} == pytest.approx({name: value * steps for name, value in each.items()})
    assert (record["steps"], record["step"]) == (steps, steps)
    assert record["recent"] == [[1, *(pytest.approx(value * WINDOW_STEPS) for value in (1, 10, 36, 16))]]


def test_only_the_last_groups_are_kept_in_order(beats: RankBeats, beat: heartbeat.Heartbeat) -> None:
    groups = heartbeats.WINDOWS + 3
    for number in range(1 + groups * WINDOW_STEPS):
        beat.step(number)
    assert [row[0] for row in beats.read()[1]["recent"]] == list(range(4, groups + 1))


def test_a_reader_never_sees_half_a_record(beats: RankBeats) -> None:
    """Step, phase and collective are written together: a mixture would show."""
    program = """
import sys
from trainer import heartbeat
beat = heartbeat.start()
print("begun", flush=True)
number = 0
while True:
    number += 1
    beat._collective = number
    beat._phase = number % 10
    beat.step(number)
"""
    environment = {**os.environ, **beats.environment(0)}
    writer = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None and writer.stdout.readline()
        seen: set[int] = set()
        deadline = time.monotonic() + 60
        while len(seen) < 100:
            assert time.monotonic() < deadline
            record = beats.read()[0]
            assert (
                record["collective"] == max(record["step"], 0) and record["phase"] == heartbeats.PHASES[record["collective"] % 10]
            )
            seen.add(record["step"])
    finally:
        writer.kill()
        writer.communicate()


def test_a_record_left_half_written_is_read_all_the_same(beats: RankBeats, beat: heartbeat.Heartbeat) -> None:
    beat.step(3)
    with open(beats.environment(1)["SLOTSTREAM_HEARTBEAT"], "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        struct.pack_into("<Q", memory, 0, 1)  # stopped between two writes
    assert beats.read()[1]["step"] == 3


@pytest.mark.parametrize("path", ["", "/nowhere/at/all"])
def test_without_a_file_nothing_happens(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_mine", heartbeat.Heartbeat())
    monkeypatch.setenv("SLOTSTREAM_HEARTBEAT", path)
    quiet = heartbeat.start()
    quiet.step(1)
    with heartbeat.during("save"), quiet.reading_device():
        pass
    assert not quiet.alive


ASLEEP = """
import threading, time
for _ in range(4):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
from trainer import heartbeat, process
process.answer_stack_requests()
heartbeat.start().step(0)
def sleeps_here():
    print("ready", flush=True)
    time.sleep(600)
sleeps_here()
"""


@pytest.fixture
def rank(beats: RankBeats) -> Iterator[Callable[[str], subprocess.Popen]]:
    """Starts a program as local rank 0."""
    started = []

    def start(program: str) -> subprocess.Popen:
        environment = {**os.environ, **beats.environment(0)}
        started.append(subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE))
        stdout = started[0].stdout
        assert stdout is not None and stdout.readline()
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_stopped_rank_is_seen_and_tells_where_it_was(beats: RankBeats, rank: Callable[[str], subprocess.Popen]) -> None:
    process = rank(ASLEEP)
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    for _ in range(2):  # each dump is given once
        assert beats.read()[0]["state"] == "T"
        assert beats.stacks(0).count("in sleeps_here") == 1
        os.waitpid(process.pid, os.WUNTRACED)  # asking has set it going only for a moment
    assert process.poll() is None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert beats.read()[0]["state"] == "Z"
    process.wait()
    assert beats.read()[0]["state"] == "" and beats.stacks(0).startswith("(none")


def test_a_program_that_would_die_of_the_signal_is_not_sent_it(beats: RankBeats, rank: Callable[[str], subprocess.Popen]) -> None:
    process = rank(ASLEEP.replace("process.answer_stack_requests()", ""))
    assert beats.stacks(0).startswith("(none") and process.poll() is None


COLLECTIVES = """
import torch, torch.distributed as dist
from trainer import distributed, heartbeat, patches
beat = heartbeat.start()
heartbeat.count_collectives()
heartbeat.count_collectives()
distributed.start(torch.device("cpu"), 60)
ones, seen = torch.ones(2), []
def counted(call):
    before = beat._collective
    call()
    assert not beat.waits
    return beat._collective - before
assert counted(lambda: dist.all_reduce(ones)) == 1
assert counted(lambda: dist.all_reduce(ones, async_op=True).wait()) == 1
assert counted(lambda: dist.all_gather_into_tensor(torch.ones(2), ones)) == 1
assert counted(lambda: dist.barrier()) == 1
assert counted(lambda: dist.all_gather_object([None], "x")) == 2
assert counted(lambda: dist.broadcast_object_list(["x"], src=0)) == 2
from trainer.engine import _import_deepspeed
deepspeed = _import_deepspeed(torch.device("cpu"))
assert counted(lambda: deepspeed.comm.all_reduce(ones)) == 1
beat.step(0)
print("ok", flush=True)
import time; time.sleep(600)
"""


def test_every_collective_is_counted_once(beats: RankBeats, rank: Callable[[str], subprocess.Popen]) -> None:
    """Whoever calls it; one that is built of others counts as these."""
    rank(COLLECTIVES)
    record = beats.read()[0]
    assert (record["collective"], record["step"], record["in_collective"]) == (9, 0, False)


# -- hangs ---------------------------------------------------------------------------------------------------------------------


def ranks(count: int, **fields: Any) -> dict[int, dict[str, Any]]:
    """Beats of ranks that have made many steps of 0.1 s and now wait in step 50's first all-reduce."""
    usual = {
        "pid": 100, "state": "S", "step": 50, "phase": "exchange", "in_collective": True, "operation": "all_reduce",
        "collective": 500, "age": 0.0, "allowed": 0.0, "steps": 50, "moved": 0, "save": 0.0,
        "recent": [[number, 0.0, 0.3, 0.1, 0.0] for number in range(4, 12)],
    }  # fmt: skip
    return {rank: {**usual, **fields} for rank in range(count)}


def stuck(phase: str, **fields: Any) -> dict[str, Any]:
    return {"phase": phase, "in_collective": False, "operation": "", **fields}


def verdict(beats: dict[int, dict[str, Any]], age: float = 16.0, hang_after: float = 15.0) -> Finding | None:
    watcher = Watcher(hang_after)
    for beat in beats.values():
        beat["age"] = age
    found = watcher.see(1000.0, beats)
    assert watcher.see(1001.0, beats) == []  # said once
    return found[0] if found else None


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"state": "T"}, "stopped"),
        (stuck("forward", state="T"), "stopped"),
        (stuck("data"), "loader"),
        (stuck("save"), "save"),
        (stuck("forward"), "compute"),
        (stuck("backward"), "compute"),
        (stuck("optimizer", collective=505), "compute"),
        ({"phase": "backward", "operation": "all_reduce"}, "skipped collective"),  # 500 came later than the others'
        ({"collective": 499}, "skipped collective"),
        ({"step": 51, "collective": 510}, "skipped collective"),
        ({"operation": "barrier"}, "extra collective"),
        ({"collective": 501}, "extra collective"),
    ],
)
@pytest.mark.parametrize("culprit", [0, 2])
def test_the_rank_that_holds_up_the_others_is_named(fields: dict[str, Any], cause: str, culprit: int) -> None:
    beats = ranks(4)
    beats[culprit].update(fields)
    found = verdict(beats, age=31.0)
    assert found is not None and (found.kind, found.culprits, found.cause) == ("hang", (culprit,), cause)
    assert f"rank {culprit} " in found.why
    assert set(found.ranks) == {"0", "1", "2", "3"} and found.ranks["1"]["collective"] == 500


def test_of_two_ranks_in_different_collectives_neither_is_accused_alone() -> None:
    beats = ranks(2)
    beats[1]["collective"] = 499
    found = verdict(beats)
    assert found is not None and (found.culprits, found.cause) == ((0, 1), "skipped or extra collective")


def test_all_in_the_same_collective_is_the_connection() -> None:
    watcher, beats = Watcher(15), ranks(3, age=20.0)
    (found,) = watcher.see(0.0, beats, {0: 0.001, 1: 3.0, 2: 0.002})
    assert (found.culprits, found.cause, found.node) == ((), "communication", 1)


def test_where_nobody_waits_in_a_collective_the_last_hold_up_the_rest() -> None:
    beats = ranks(3)
    for beat in beats.values():
        beat.update(stuck("forward"))
    beats[1].update(stuck("data"))
    found = verdict(beats)
    assert found is not None and (found.culprits, found.cause) == ((1,), "loader")


@pytest.mark.parametrize(
    ("fields", "age", "hangs"),
    [
        ({}, 14.0, False),
        ({"recent": [[1, 0.0, 2.0 * WINDOW_STEPS, 0.0, 0.0]]}, 19.0, False),  # steps of 2 s
        ({"recent": [[1, 0.0, 2.0 * WINDOW_STEPS, 0.0, 0.0]]}, 21.0, True),
        ({"steps": 0, "recent": []}, 100.0, False),
        ({"steps": 0, "recent": []}, 121.0, True),
        (stuck("load", steps=0), 299.0, False),
        (stuck("load", steps=0), 301.0, True),
        (stuck("data", allowed=600.0), 500.0, False),  # a server that does not answer is waited for
        (stuck("data", allowed=600.0), 601.0, True),
        (stuck("evaluate"), 200.0, False),
        (stuck("save"), 29.0, False),
        (stuck("save"), 31.0, True),
        (stuck("save", save=0.5), 16.0, True),
        (stuck("save", save=9.0), 80.0, False),
        ({"state": "T", "steps": 0}, 16.0, True),
        ({"pid": 0}, 1000.0, False),  # a program that knows nothing of heartbeats
        ({"state": "Z"}, 1000.0, False),
    ],
)
def test_how_long_is_a_hang(fields: dict[str, Any], age: float, hangs: bool) -> None:
    assert (verdict(ranks(3, **fields), age) is not None) == hangs


def test_zero_switches_hangs_off() -> None:
    assert verdict(ranks(2), age=1e6, hang_after=0.0) is None


def test_one_rank_that_goes_on_is_no_hang() -> None:
    beats = ranks(3, age=100.0)
    beats[2]["age"] = 1.0
    assert Watcher(15).see(0.0, beats) == []


def test_a_long_save_whose_bytes_move_is_no_hang() -> None:
    watcher, beats = Watcher(15), ranks(3)
    for second in range(300):
        beats[0].update(stuck("save", moved=second * 10**6 if second < 200 else 2 * 10**8))
        for beat in beats.values():
            beat["age"] = float(second)
        found = watcher.see(float(second), beats)
        assert not found or second > 225, second
        if found:
            assert (found[0].culprits, found[0].cause) == ((0,), "save")
            return
    raise AssertionError("a save that stands still is a hang")


def test_ranks_that_have_gone_are_left_out() -> None:
    beats = ranks(3)
    beats[1].update(stuck("data"))
    beats[2].update(state="Z", phase="finish")
    found = verdict(beats)
    assert found is not None and found.culprits == (1,) and set(found.ranks) == {"0", "1"}


# -- stragglers ----------------------------------------------------------------------------------------------------------------

BASE = {"data": 0.002, "compute": 0.06, "communication": 0.02, "save": 0.0}


class Steps:
    """Ranks that make steps together: each waits in communication for the slowest."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.random = count, random.Random(seed)
        self.step = 0
        self._groups: dict[int, list[list[float]]] = {rank: [] for rank in range(count)}
        self._open = {rank: [0.0] * 4 for rank in range(count)}

    def run(self, extra: Callable[[int, int, str], float] = lambda step, rank, part: 0.0, noise: bool = True) -> None:
        rows = {}
        for rank in range(self.count):
            parts = {part: (seconds * self._jitter() if noise else seconds) for part, seconds in BASE.items()}
            rows[rank] = {part: seconds + extra(self.step, rank, part) for part, seconds in parts.items()}
        slowest = max(sum(row.values()) for row in rows.values())
        for rank, row in rows.items():
            row["communication"] += slowest - sum(row.values())
            for index, part in enumerate(("data", "compute", "communication", "save")):
                self._open[rank][index] += row[part]
        self.step += 1
        if self.step % WINDOW_STEPS == 0:
            for rank, seconds in self._open.items():
                self._groups[rank] = [*self._groups[rank], [self.step // WINDOW_STEPS, *seconds]][-heartbeats.WINDOWS :]
                self._open[rank] = [0.0] * 4

    def _jitter(self) -> float:
        """Log-normal, and one step in a hundred takes up to thirty times as long."""
        spike = self.random.paretovariate(1.1) if self.random.random() < 0.01 else 1.0
        return (
            self.random.lognormvariate(0.0, 0.15) * min(3 * spike, 30.0) if spike > 1 else self.random.lognormvariate(0.0, 0.15)
        )

    def beats(self) -> dict[int, dict[str, Any]]:
        return {rank: {**ranks(1)[0], "steps": self.step, "recent": self._groups[rank]} for rank in range(self.count)}


def findings(steps: Steps, watcher: Watcher, count: int, *extra: Any, beat_every: int = 6) -> list[tuple[int, Finding]]:
    """(step at which it was said, finding) of `count` more steps."""
    found = []
    for _ in range(count):
        steps.run(*extra)
        if steps.step % beat_every == 0:
            found += [(steps.step, finding) for finding in watcher.see(steps.step * 0.1, steps.beats())]
    return found


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), beat_every=st.sampled_from([1, 6, 30]))
def test_2000_clean_steps_of_8_ranks_with_heavy_tails_alarm_nobody(seed: int, beat_every: int) -> None:
    assert findings(Steps(8, seed), Watcher(15), 2000, beat_every=beat_every) == []


@pytest.mark.parametrize("part", ["data", "compute", "save"])
@pytest.mark.parametrize("count", [2, 8])
def test_a_slow_rank_is_named_with_its_cause_within_20_steps_and_once(part: str, count: int) -> None:
    steps, watcher = Steps(count), Watcher(15)
    assert findings(steps, watcher, 101) == []  # the fault begins in the middle of a group

    def slow(step: int, rank: int, which: str) -> float:
        return 0.06 if (rank, which) == (1, part) else 0.0

    ((said, found),) = findings(steps, watcher, 400, slow, beat_every=1)
    assert (found.kind, found.culprits, found.cause) == ("straggler", (1,), part)
    assert said - 101 <= 20


def test_an_episode_ends_and_a_second_one_is_said_again() -> None:
    steps, watcher = Steps(4), Watcher(15)

    def slow(step: int, rank: int, which: str) -> float:
        return 0.05 if (rank, which) == (3, "compute") else 0.0

    said = [finding.kind for _ in range(2) for more in ([slow], []) for _, finding in findings(steps, watcher, 60, *more)]
    assert said == ["straggler", "recovered"] * 2


def test_between_slow_and_calm_nothing_is_said() -> None:
    """Once named, a rank that wavers around the limit is not named again and again."""
    steps, watcher = Steps(4), Watcher(15)

    def wavers(step: int, rank: int, which: str) -> float:
        return (0.045 if step // 40 % 2 == 0 else 0.023) if (rank, which) == (2, "compute") else 0.0

    assert [finding.kind for _, finding in findings(steps, watcher, 400, wavers)] == ["straggler"]


def test_a_millisecond_is_not_worth_a_word() -> None:
    steps, watcher = Steps(4), Watcher(15)
    assert findings(steps, watcher, 200, lambda step, rank, part: 0.004 if (rank, part) == (1, "data") else 0.0) == []


def test_rank_0_may_write_for_all_until_its_saves_get_slow() -> None:
    steps, watcher = Steps(4), Watcher(15)

    def writes(seconds: float) -> Callable[[int, int, str], float]:
        return lambda step, rank, part: seconds if (rank, part) == (0, "save") and step % 2 == 0 else 0.0

    assert findings(steps, watcher, 200, writes(0.2)) == []
    (found,) = [finding for _, finding in findings(steps, watcher, 40, writes(1.5))]
    assert (found.culprits, found.cause) == ((0,), "save")


def test_a_slow_link_is_named_where_communication_rules() -> None:
    def see(communication: float, rtt: dict[int, float]) -> list[Finding]:
        steps, watcher, found = Steps(4), Watcher(15), []
        for _ in range(40):
            steps.run(lambda step, rank, part: communication if part == "communication" else 0.0)
            found += watcher.see(steps.step * 0.1, steps.beats(), rtt)
        return found

    far = {0: 0.001, 1: 0.001, 2: 0.05, 3: 0.001}
    (found,) = see(0.3, far)
    assert (found.kind, found.node, found.cause) == ("straggler", 2, "communication")
    assert see(0.0, far) == []  # nobody waits for it
    assert see(0.3, {**far, 2: 0.004}) == []
    assert see(0.3, {0: 0.05}) == []


def test_a_group_that_one_rank_lost_is_passed_over() -> None:
    steps, watcher = Steps(3), Watcher(15)

    def slow(step: int, rank: int, which: str) -> float:
        return 0.06 if (rank, which) == (1, "compute") else 0.0

    said: list[Finding] = []
    for _ in range(30 * WINDOW_STEPS):
        steps.run(slow)
        beats = steps.beats()
        beats[2]["recent"] = [row for row in beats[2]["recent"] if row[0] % 3]
        said += watcher.see(0.0, beats)
    assert [finding.culprits for finding in said] == [(1,)]
