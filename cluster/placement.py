"""What a backend must be able to do: get agents onto nodes, say when one is gone, end them. All else is the supervisor's.

A placement is made by the backend's `make_placement(session)`; the supervisor asks it for one agent per slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cluster.config import LaunchConfig
from cluster.layout import agent_command, agent_environment


@dataclass(frozen=True, kw_only=True)
class Session:
    """All that a placement needs to know."""

    config: LaunchConfig
    hub: str  # HOST:PORT that agents connect to
    token: str  # a secret: it travels in the agent's environment, never on its command line, never into a log
    name: str  # of this session, unique
    lock: int | None = None  # descriptor that keeps the run folder locked while a process on this machine holds it

    def words(self, slot: int) -> list[str]:
        """The agent's command line."""
        return agent_command(self.hub, slot, self.config.run_dir)

    def environment(self) -> dict[str, str]:
        """What the agent's environment must have beyond its node's own."""
        return agent_environment(self.token)


class Placement(Protocol):
    """Agents on nodes. A slot is a place for one agent, 0 <= slot < nodes; a node's number may differ between attempts."""

    replaces: bool  # a lost slot may come back, perhaps on another node

    @property
    def ends_at(self) -> float | None:
        """Seconds since the epoch at which the platform ends everything, None where it does not. It may change."""

    def place(self, slot: int) -> None:
        """Start the agent of a slot, or start it again; return at once. The agent reports to the hub by itself.

        An agent of this slot that still runs is ended first. Raises LaunchError only for what can never work.
        """

    def lost(self, slot: int) -> str | None:
        """Why the agent is gone or cannot come, as the end of a sentence ("was killed by SIGKILL", "is on node n3, which is
        down"); None while it runs or may still come."""

    def signal(self, slot: int, number: int) -> None:
        """Signal the agent without the hub, for the case that its connection is gone; no error when it has ended."""

    def close(self) -> None:
        """End everything that was placed; return when nothing is left. May be called twice."""
