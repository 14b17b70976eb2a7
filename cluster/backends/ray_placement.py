"""Agents on the nodes of a Ray cluster: one actor per slot, on its bundle of a STRICT_SPREAD placement group.

In: a session and a reserved group. Out: a Placement (cluster/placement.py). When a node is gone Ray moves its bundle to another
one, if there is one; a new actor waits for that. Actors are never restarted by Ray: the supervisor decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.backends import ray_actor
from cluster.placement import Session

ASK_EVERY = 0.3  # seconds between two looks at an actor
LOOK_EVERY = 1.0  # at the cluster's nodes
UNAVAILABLE_FOR = 3.0  # Ray cannot tell a short break of the network from the death of a node any earlier
END_WITHIN = 10.0


@dataclass
class Seat:
    """One actor and what is known of it."""

    actor: Any
    answer: Any = None  # the reference of a question under way
    asked: float = 0.0
    silent: float | None = None  # since when Ray cannot reach it
    gone: str | None = None
    node: str = ""  # id of its node, once known


@dataclass
class Nodes:
    """What Ray says of the cluster's nodes, asked now and then."""

    seen: float = 0.0
    alive: dict[str, bool] = field(default_factory=dict)
    draining: dict[str, int] = field(default_factory=dict)  # id -> deadline in ms, 0: none

    def look(self) -> None:
        if time.monotonic() < self.seen + LOOK_EVERY:
            return
        import ray
        from ray._private.state import state  # the only way in 2.60 that needs no dashboard; a test holds it fast

        self.seen = time.monotonic()
        self.alive = {node["NodeID"]: node["Alive"] for node in ray.nodes()}
        self.draining = state.get_draining_nodes()


class RayPlacement:
    """See cluster/placement.py. `mend` is called before a slot is placed again: a cluster of ours starts dead nodes anew."""

    replaces = True

    def __init__(self, session: Session, group: Any, bundle: dict[str, float], mend: Callable[[], None]) -> None:
        import ray

        ray.cloudpickle.register_pickle_by_value(ray_actor)
        self.drained = False  # a node of ours is to be taken away: the session ends, the next one avoids that node
        self._session, self._group, self._bundle, self._mend = session, group, bundle, mend
        self._seats: dict[int, Seat] = {}
        self._nodes = Nodes()
        self._ends_at: float | None = None

    @property
    def ends_at(self) -> float | None:
        """Now, once a node of ours is draining: Ray moves its bundle only when the whole group is asked for anew."""
        return self._ends_at

    def place(self, slot: int) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if slot in self._seats:
            self._end([slot])
            self._mend()
        options = {
            "num_cpus": self._bundle["CPU"],
            "num_gpus": self._bundle.get("GPU", 0),
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=slot),
        }
        mark = {"SLOTSTREAM_SESSION": self._session.name, "SLOTSTREAM_SLOT": str(slot)}
        host = ray.remote(ray_actor.AgentHost).options(**options)
        self._seats[slot] = Seat(host.remote(self._session.words(slot), self._session.environment(), mark))

    def lost(self, slot: int) -> str | None:
        seat = self._seats.get(slot)
        if seat is None:
            return None
        self._nodes.look()
        self._ask(seat)
        if seat.gone is None and seat.node and self._nodes.alive.get(seat.node) is False:
            seat.gone = f"was on Ray node {seat.node[:12]}, which is dead"
        if seat.node in self._nodes.draining and not self.drained:
            self.drained, self._ends_at = True, time.time()
        return seat.gone

    def _ask(self, seat: Seat) -> None:
        """Take the answer that has come; ask again when it is time."""
        import ray

        if seat.gone is not None:
            return
        if seat.answer is None:
            if time.monotonic() > seat.asked + ASK_EVERY:
                seat.asked, seat.answer = time.monotonic(), seat.actor.poll.remote()
            return
        if not ray.wait([seat.answer], timeout=0)[0]:
            return
        answer, seat.answer = seat.answer, None
        try:
            seat.node, why = ray.get(answer)
            seat.gone, seat.silent = why or None, None
        except ray.exceptions.ActorUnavailableError:
            seat.silent = seat.silent or time.monotonic()
            if time.monotonic() > seat.silent + UNAVAILABLE_FOR:
                seat.gone = "cannot be reached through Ray"
        except ray.exceptions.RayError as error:
            seat.gone = f"has lost its Ray actor ({_why_died(error)})"

    def signal(self, slot: int, number: int) -> None:
        if slot in self._seats:
            self._seats[slot].actor.signal.remote(number)

    def close(self) -> None:
        self._end(list(self._seats))

    def _end(self, slots: list[int]) -> None:
        """End these agents and their actors; of one that does not answer, Ray kills the actor and the kernel the agent."""
        import ray

        seats = [self._seats.pop(slot) for slot in slots]
        answers = [seat.actor.end.remote() for seat in seats if seat.gone is None or seat.silent is None and seat.node]
        if answers:
            ray.wait(answers, num_returns=len(answers), timeout=END_WITHIN if len(slots) > 1 else 2.0)
        for seat in seats:
            ray.kill(seat.actor, no_restart=True)


def _why_died(error: Exception) -> str:
    """One line of Ray's many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "cause" in line.lower() or "died" in line.lower()] or lines
    return (told[0] if told else type(error).__name__)[:200].rstrip(".")
