"""One node's agent without its supervisor: what it answers, what it writes and what it leaves open."""

from __future__ import annotations

import json
import os
import pty
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import agent as agent_module
from cluster.agent import Agent, Attempt, Rank
from cluster.heartbeats import RankBeats
from cluster.hub import Message
from cluster.layout import NodeTask


class FakeLink:
    """Keeps what is sent."""

    closed = False

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.address = address
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., NodeTask]:
    """Makes the task of an attempt whose ranks run a line of Python."""

    def make(program: str = "pass", attempt: int = 1, **more: Any) -> NodeTask:
        made = NodeTask(
            node=0, name="n0", nodes=1, ranks=1, run_dir=str(tmp_path), attempt=attempt, master_addr="127.0.0.1", master_port=1,
            threads=1, session="unit", command=("-c", program), **more,
        )  # fmt: skip
        made.attempt_dir.mkdir(parents=True, exist_ok=True)
        return made

    return make


@pytest.fixture
def busy(task: Callable[..., NodeTask]) -> Iterator[tuple[Agent, FakeLink]]:
    """An agent whose rank of attempt 1 is still there."""
    link = FakeLink()
    agent = Agent(link, 0, "")  # type: ignore[arg-type]
    agent._start({"task": task("import time; time.sleep(600)").as_message()})
    attempt = agent._attempt
    assert attempt is not None
    link.sent.clear()
    yield agent, link
    attempt.kill()
    see_through(attempt)


def see_through(attempt: Attempt) -> None:
    deadline = time.monotonic() + 20
    while attempt.turn():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    attempt.close()


def claim(tmp_path: Path) -> Message:
    file = tmp_path / "owner.json"
    file.write_text(json.dumps({"session": "unit"}))
    return {"type": "claim", "attempt": 4, "port": True, "file": str(file), "session": "unit"}


def test_a_start_is_refused_while_ranks_are_still_there(busy: tuple[Agent, FakeLink], task: Callable[..., NodeTask]) -> None:
    agent, link = busy
    agent._start({"task": task(attempt=2).as_message()})
    (answer,) = link.sent
    assert (answer["type"], answer["attempt"]) == ("refused", 2)
    assert answer["why"].endswith("ranks of attempt 1 have not ended yet")


def test_a_claim_is_answered_with_why_while_ranks_are_still_there(busy: tuple[Agent, FakeLink], tmp_path: Path) -> None:
    agent, link = busy
    agent._claim(claim(tmp_path))
    (answer,) = link.sent
    assert {key: answer[key] for key in ("type", "attempt", "port", "shared")} == {
        "type": "claimed", "attempt": 4, "port": None, "shared": True,
    }  # fmt: skip
    assert answer["why"].endswith("ranks of attempt 1 have not ended yet")


def test_a_claim_is_answered_with_a_port(tmp_path: Path) -> None:
    link = FakeLink()
    agent = Agent(link, 0, "")  # type: ignore[arg-type]
    agent._claim(claim(tmp_path))
    agent._claim({**claim(tmp_path), "port": False})
    first, second = link.sent
    assert first["port"] >= 10000 and (second["port"], second["why"], first["why"]) == (0, "", "")


def test_a_claim_without_a_free_port_is_answered_with_why(tmp_path: Path) -> None:
    link = FakeLink("192.0.2.1")  # not of this machine
    Agent(link, 0, "")._claim(claim(tmp_path))  # type: ignore[arg-type]
    (answer,) = link.sent
    assert (answer["type"], answer["attempt"], answer["port"], answer["shared"]) == ("claimed", 4, None, True)
    assert "no free TCP port at 192.0.2.1" in answer["why"] and "\n" not in answer["why"]


def test_a_full_disk_does_not_end_the_agent(task: Callable[..., NodeTask]) -> None:
    link, mine = FakeLink(), task()
    mine.events.symlink_to("/dev/full")
    see_through(Attempt(mine, link.send))
    assert [message["type"] for message in link.sent] == ["started", "exit", "end"]


def test_what_did_not_fit_leaves_no_half_line(task: Callable[..., NodeTask]) -> None:
    link, mine = FakeLink(), task()
    attempt = Attempt(mine, link.send)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (mine.events.stat().st_size + 10, before[1]))
        attempt._report("cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    see_through(attempt)
    assert [json.loads(line)["event"] for line in mine.events.read_text().splitlines()] == ["started", "exit", "end"]


@pytest.mark.parametrize("terminals", [1, 2])  # one for both outputs, one for each
def test_ranks_on_a_terminal_leave_nothing_open(
    terminals: int, task: Callable[..., NodeTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [pty.openpty() for _ in range(terminals)]
    files = [open(theirs, "w") for _, theirs in pairs]  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", files[0])
    monkeypatch.setattr(sys, "stderr", files[-1])
    monkeypatch.setattr("cluster.console._same_file", lambda *_: terminals == 1)
    mine = task("print('word')", console=True)
    beats = RankBeats(None, 1)
    open_after = []
    for _ in range(20):
        rank = Rank(mine, 0, beats)
        rank.start_pumps()
        assert rank.collect() in (0, -9)
        open_after.append(len(os.listdir("/proc/self/fd")))
    beats.close()
    for (ours, _), file in zip(pairs, files, strict=True):
        file.close()
        os.close(ours)
    assert len(set(open_after)) == 1, open_after


def test_a_rank_that_cannot_start_leaves_nothing_open(task: Callable[..., NodeTask], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "bind_rank", lambda _: 1 / 0)
    mine = task(console=True)
    open_after = []
    for _ in range(3):
        see_through(Attempt(mine, lambda _: None))
        open_after.append(len(os.listdir("/proc/self/fd")))
    assert len(set(open_after)) == 1, open_after
