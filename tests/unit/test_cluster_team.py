"""Agents that come, go, and do not get ready: what the team makes of it, without a process."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from cluster.layout import NodeFacts
from cluster.owner import Owner
from cluster.supervision import claim as claims
from cluster.supervision.claim import Claim
from cluster.supervision.team import SILENCE, TRIES, Team

FACTS = NodeFacts(slot=0, host="h", address="10.0.0.1", cores=(0, 1))


class FakeHub:
    def __init__(self) -> None:
        self.sent: list[tuple[int, dict[str, Any]]] = []
        self.quiet: dict[int, float] = {}

    def send(self, slot: int, message: dict[str, Any]) -> None:
        self.sent.append((slot, message))

    def silence(self, slot: int) -> float:
        return self.quiet.get(slot, 0.0)

    def drop(self, slot: int) -> None:
        pass


class FakePlacement:
    replaces, ends_at = True, None

    def __init__(self, hub: FakeHub) -> None:
        self.hub, self.placed, self.killed = hub, [], []
        self.gone: dict[int, str] = {}

    def place(self, slot: int) -> None:
        """As slow as a platform that does not answer: whoever is there counts as silent a little more."""
        self.placed.append(slot)
        self.gone.pop(slot, None)
        self.hub.quiet = {other: self.hub.silence(other) + 5.0 for other in range(8)}

    def lost(self, slot: int) -> str | None:
        return self.gone.get(slot)

    def signal(self, slot: int, number: int) -> None:
        assert number == signal.SIGKILL
        self.killed.append(slot)

    def close(self) -> None:
        pass


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
def placement(hub: FakeHub) -> FakePlacement:
    return FakePlacement(hub)


@pytest.fixture
def team(hub: FakeHub, placement: FakePlacement) -> Team:
    made = Team(8, placement, hub)  # type: ignore[arg-type]
    made.place_all()
    placement.placed.clear()
    hub.quiet = {}
    for slot in range(8):
        made.hello(slot, {**FACTS.as_message(), "slot": slot})
    return made


def test_nodes_lost_together_are_replaced_one_a_turn_and_the_others_stay(hub, placement, team) -> None:
    placement.gone = dict.fromkeys((1, 2, 3, 4), "is on a node that is down")
    assert [slot for slot, _ in team.turn()] == [1, 2, 3, 4] and placement.placed == [1]
    for count in (2, 3, 4):
        hub.quiet = {}  # the supervisor listens between two turns
        assert team.turn() == [] and len(placement.placed) == count
    assert sorted(team.up) == [0, 5, 6, 7] and placement.killed == [1, 2, 3, 4]
    hub.quiet = {5: SILENCE + 1}
    assert [slot for slot, _ in team.turn()] == [5]


def test_a_slot_that_never_gets_ready_is_left_out(team) -> None:
    for _ in range(TRIES - 1):
        team.claim_failed(3, "did not get ready")
    assert team.complete and team.hopeless() == []
    team.claim_failed(3, "does not see the run folder any more")
    assert not team.complete and 3 in team.up and 3 not in team.fit and team.hopeless() == [3]
    assert team.missing() == {3: "does not see the run folder any more"}
    team.hello(3, {**FACTS.as_message(), "slot": 3})  # another agent on that node is no other node
    assert team.hopeless() == [3]
    team.hello(3, {**FACTS.as_message(), "slot": 3, "host": "spare"})
    assert team.hopeless() == [] and team.complete


def test_a_start_in_between_clears_the_account(team) -> None:
    for _ in range(2 * TRIES):
        team.claim_failed(3, "was killed by SIGKILL while it was to get ready")
        team.started(3)
    assert team.complete and team.missing() == {}


def answers(tmp_path, hub: FakeHub, *given: dict[str, Any]) -> Claim:
    owner = Owner(tmp_path, "train")
    owner.close()
    facts = [NodeFacts.from_message({**FACTS.as_message(), "slot": slot}) for slot in (2, 5)]
    claim = Claim(7, facts, hub, owner)  # type: ignore[arg-type]
    for slot, answer in zip((2, 5), given, strict=False):
        claim.hear(slot, {"type": "claimed", "attempt": 7, **answer})
    return claim


def test_a_claim_is_over_when_all_have_answered(tmp_path, hub) -> None:
    claim = answers(tmp_path, hub, {"port": 4000, "shared": True}, {"port": 0, "shared": True})
    assert [(slot, message["port"]) for slot, message in hub.sent] == [(2, True), (5, False)]
    assert not claim.open({2: FACTS, 5: FACTS}) and claim.not_ready({}) == {} and claim.port == 4000 and claim.blind() is None


def test_an_answer_to_an_earlier_question_does_not_count(tmp_path, hub) -> None:
    claim = answers(tmp_path, hub, {"port": 4000, "shared": True}, {"attempt": 6, "port": 0, "shared": True})
    assert claim.open({2: FACTS, 5: FACTS})


@pytest.mark.parametrize(
    ("answer", "absent", "why"),
    [
        ({"port": None, "shared": True, "why": "no free port"}, {}, "did not get ready: no free port"),
        ({"port": 0, "shared": False}, {}, "does not see the run folder any more"),
        (None, {5: "was killed by SIGKILL"}, "was killed by SIGKILL while it was to get ready"),
        ({"port": 0, "shared": True}, {5: "gave no answer for 15 s"}, "gave no answer for 15 s while it was to get ready"),
    ],
)  # fmt: skip
def test_why_a_node_is_not_ready(tmp_path, hub, answer, absent, why) -> None:
    claim = answers(tmp_path, hub, {"port": 4000, "shared": True}, *([answer] if answer else []))
    assert not claim.open({slot: FACTS for slot in (2, 5) if slot not in absent}) and claim.not_ready(absent) == {5: why}


def test_who_never_answers_is_not_ready(tmp_path, hub, monkeypatch) -> None:
    monkeypatch.setattr(claims, "WITHIN", 0.0)
    claim = answers(tmp_path, hub, {"port": 4000, "shared": True})
    assert not claim.open({2: FACTS, 5: FACTS}) and claim.not_ready({}) == {5: "did not get ready within 0 s"}
