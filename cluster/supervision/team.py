"""The agents of a session: placed, known when they report, given up when they are gone, placed again. No ranks here."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from typing import Any

from cluster.hub import Hub
from cluster.layout import NodeFacts
from cluster.placement import Placement

SILENCE = 15.0  # seconds without an answer after which an agent is lost: frozen, or its link is down
REASON_WITHIN = 1.0  # a connection that closes is known before the platform says why
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # between attempts to place a slot
TRIES = 3  # deaths of a slot's agent before its first word, or claims that failed, after which the slot is hopeless


class Team:
    """What is known of each slot. A slot is up from its agent's hello until it is lost."""

    def __init__(self, nodes: int, placement: Placement, hub: Hub) -> None:
        self.nodes = nodes
        self.up: dict[int, NodeFacts] = {}
        self.since: dict[int, float] = {}  # when a slot that is up came up
        self.known: dict[int, NodeFacts] = {}  # of lost slots, too
        self.absent: dict[int, str] = {}  # why a slot is not up
        self._placement, self._hub = placement, hub
        self._again: dict[int, float] = {}  # when to place a lost slot again
        self._deaths: dict[int, int] = dict.fromkeys(range(nodes), 0)  # in a row, without a hello
        self._closed: dict[int, float] = {}  # connections that ended, for which the reason is not known yet
        self._failed: dict[int, list[str]] = {}  # why claims failed, in a row

    def place_all(self) -> None:
        for slot in range(self.nodes):
            self.absent[slot] = "has not reported yet"
            self._placement.place(slot)

    @property
    def fit(self) -> dict[int, NodeFacts]:
        """The slots that are up and can be given work."""
        return {slot: facts for slot, facts in self.up.items() if len(self._failed.get(slot, ())) < TRIES}

    @property
    def complete(self) -> bool:
        return len(self.fit) == self.nodes

    def claim_failed(self, slot: int, why: str) -> None:
        """The slot's agent came, but did not get ready for an attempt."""
        self._failed.setdefault(slot, []).append(why)

    def started(self, slot: int) -> None:
        """The slot has a place in an attempt."""
        self._failed.pop(slot, None)

    def missing(self) -> dict[int, str]:
        """Why slots cannot be given work, as ends of sentences."""
        failed = {slot: whys[-1] for slot, whys in self._failed.items() if len(whys) >= TRIES}
        return dict(sorted({**failed, **self.absent}.items()))

    def hello(self, slot: int, message: Mapping[str, Any]) -> None:
        """An agent has reported. One of a slot that is not ours, or that talks nonsense, is dropped."""
        try:
            facts = NodeFacts.from_message(message)
        except (TypeError, KeyError, ValueError):
            facts = None
        if facts is None or slot >= self.nodes:
            self._hub.drop(slot)
            return
        if slot in self.known and self.known[slot].host != facts.host:
            self._failed.pop(slot, None)  # another node: what was wrong with the one before is not its fault
        self.up[slot] = self.known[slot] = facts
        self.since[slot] = time.monotonic()
        self._deaths[slot] = 0
        for book in (self.absent, self._again, self._closed):
            book.pop(slot, None)

    def gone(self, slot: int) -> None:
        """The connection of a slot's agent has ended."""
        if slot in self.up:
            self._closed.setdefault(slot, time.monotonic())

    def turn(self) -> list[tuple[int, str]]:
        """(slot, why) of the slots that were up and are lost now. Lost ones are placed again, with growing pauses."""
        now = time.monotonic()
        lost = []
        for slot in range(self.nodes):
            why = self._why_lost(slot, now)
            if why is not None:
                if slot in self.up:
                    lost.append((slot, why))
                self.lose(slot, why)
        due = [slot for slot, at in self._again.items() if time.monotonic() >= at]
        if due:  # one a turn: it may take seconds, and agents that nobody hears meanwhile would count as silent
            del self._again[due[0]]
            self._placement.place(due[0])
        return lost

    def hopeless(self) -> list[int]:
        """The slots whose agent has never come, though it was started several times, or never gets ready."""
        dead = {slot for slot, deaths in self._deaths.items() if deaths >= TRIES and slot not in self.known}
        return sorted(dead | {slot for slot, whys in self._failed.items() if len(whys) >= TRIES})

    def _why_lost(self, slot: int, now: float) -> str | None:
        if slot in self._again:
            return None  # known already
        why = self._placement.lost(slot)
        if slot not in self.up or why is not None:
            return why
        if slot in self._closed:
            return "closed its connection" if now > self._closed[slot] + REASON_WITHIN else None
        return f"gave no answer for {SILENCE:.0f} s" if self._hub.silence(slot) > SILENCE else None

    def lose(self, slot: int, why: str) -> None:
        """Give up the slot's agent; it is placed again in a later turn."""
        self._hub.drop(slot)
        self._placement.signal(slot, signal.SIGKILL)  # it may be frozen, or cut off: two of a slot must not be
        self._deaths[slot] += slot not in self.up
        self.up.pop(slot, None)
        self._closed.pop(slot, None)
        self.absent[slot] = why
        pause = 0.0 if not self._deaths[slot] else min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self._deaths[slot] - 1))
        self._again[slot] = time.monotonic() + pause
