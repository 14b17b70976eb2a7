"""Which cores a rank runs on: a node's cores in, each rank's out. Pure, but for the last function and the kernel's NUMA list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def cores_of_rank(bind: str, cores: Sequence[int], local_rank: int, ranks: int, root: Path = Path("/sys")) -> tuple[int, ...]:
    """The cores of one rank; () leaves it unbound, also where there are fewer cores than ranks.

    "cores": equal neighbouring parts. "numa": whole memory nodes, spread over the ranks in order; a node with more ranks than
    memory nodes gives several ranks the same one.
    """
    if bind == "none" or len(cores) < ranks:
        return ()
    if bind == "numa":
        nodes = [part for part in numa_nodes(root) if set(part) & set(cores)]
        if len(nodes) > 1:
            return tuple(core for core in nodes[local_rank * len(nodes) // ranks] if core in set(cores))
    width = len(cores) // ranks
    return tuple(cores[local_rank * width : (local_rank + 1) * width])


def numa_nodes(root: Path = Path("/sys")) -> list[tuple[int, ...]]:
    """Core ids of each memory node; [] where the kernel does not tell."""
    found = []
    folders = (root / "devices/system/node").glob("node[0-9]*")
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("node"))):
        try:
            found.append(core_list((folder / "cpulist").read_text()))
        except (OSError, ValueError):
            continue
    return [cores for cores in found if cores]


def core_list(text: str) -> tuple[int, ...]:
    """Core ids of the kernel's notation, for example "0-3,8"."""
    cores: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cores += range(int(first), int(last or first) + 1)
    return tuple(cores)


def bind_rank(cores: Sequence[int]) -> None:
    """Bind this process; () and cores that are not ours leave it as it is."""
    if cores and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, cores)
        except OSError:
            return
