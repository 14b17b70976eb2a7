"""Before an attempt: each of its nodes says whether it sees the run folder, and the first one keeps a port for rank 0."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from cluster.hub import Hub, Message
from cluster.layout import NodeFacts
from cluster.owner import Owner

WITHIN = 30.0


class Claim:
    """One question to the nodes of an attempt, and their answers."""

    def __init__(self, number: int, team: Sequence[NodeFacts], hub: Hub, owner: Owner) -> None:
        """Asks. Answers to a claim of another number are not counted."""
        self._number, self._team = number, list(team)
        self._answers: dict[int, Message] = {}
        self._until = time.monotonic() + WITHIN
        file = str(owner.path.absolute())
        for facts in team:
            question = {"type": "claim", "attempt": number, "file": file, "session": owner.session, "port": facts is team[0]}
            hub.send(facts.slot, question)

    def hear(self, slot: int, message: Message) -> None:
        if message.get("attempt") == self._number:
            self._answers[slot] = message

    def open(self, up: Mapping[int, NodeFacts]) -> bool:
        """True while answers may still come: nobody was lost, and there is time."""
        waiting = {facts.slot for facts in self._team} - self._answers.keys()
        return bool(waiting) and all(facts.slot in up for facts in self._team) and time.monotonic() < self._until

    def not_ready(self, absent: Mapping[int, str]) -> dict[int, str]:
        """Why slots did not get ready, as ends of sentences; `absent`: those that are lost, and why. {} when all are."""
        return {facts.slot: why for facts in self._team if (why := self._why_not(facts.slot, absent))}

    def blind(self) -> NodeFacts | None:
        """A node that does not see the run folder."""
        return next((facts for facts in self._team if not self._answers.get(facts.slot, {"shared": True})["shared"]), None)

    @property
    def port(self) -> int:
        """The first node's, when all are ready."""
        return int(self._answers[self._team[0].slot]["port"])

    def _why_not(self, slot: int, absent: Mapping[int, str]) -> str:
        answer = self._answers.get(slot)
        if slot in absent:
            return f"{absent[slot]} while it was to get ready"
        if answer is None:
            return f"did not get ready within {WITHIN:.0f} s" if time.monotonic() >= self._until else ""
        if answer.get("why"):
            return f"did not get ready: {answer['why']}"
        return "" if answer["shared"] else "does not see the run folder any more"
