"""How one agent per node gets onto the nodes. Placement only: what an agent does there is the same everywhere.

A backend is a function (tasks, lock) -> list[NodeHandle], or a Planned that says what is there in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.backends.local import start_local
from cluster.config import LaunchError
from cluster.layout import NodeTask
from cluster.run_folder import FolderLock


class NodeHandle(Protocol):
    """A started agent, as the launcher sees it."""

    node: int

    def poll(self) -> int | None:
        """subprocess's return code, None while the agent runs."""

    def send(self, number: int) -> None:
        """Signal the agent; no error when it has ended."""


Backend = Callable[[Sequence[NodeTask], FolderLock], "list[NodeHandle]"]


@dataclass(frozen=True)
class Planned:
    """A backend that a later version brings: every use of it is refused in one line."""

    name: str

    def __call__(self, tasks: Sequence[NodeTask], lock: FolderLock) -> list[NodeHandle]:
        raise LaunchError(
            f"--backend {self.name} is not in this version; it has local (all nodes on this machine); use --backend local or auto"
        )


BACKENDS: dict[str, Backend] = {"local": start_local, "slurm": Planned("slurm"), "ray": Planned("ray")}


def choose_backend(name: str) -> str:
    """The backend's name for --backend: auto is local.

    Raises: LaunchError for a backend that is not there yet.
    """
    chosen = "local" if name == "auto" else name
    backend = BACKENDS[chosen]
    if isinstance(backend, Planned):
        backend((), None)  # type: ignore[arg-type]
    return chosen
