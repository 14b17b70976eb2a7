"""What `doctor` makes of several nodes: their reports and answers in, Checks out. It reads only the files that nodes wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.commands.doctor_software import OK, PROBLEM, WARNING, Check
from cluster.commands.tables import size

SKEW_WARNING, SKEW_PROBLEM = 1.0, 30.0  # seconds between two clocks
SLOW_SIGHT = 2.0  # seconds until a node sees what another wrote
SLOW_NETWORK = 0.1  # GB/s of an all-reduce's busiest link


def compare(reports: Mapping[int, Mapping[str, Any]], world: int) -> list[Check]:
    """Whether all nodes have the same versions and devices."""
    facts = {f"node {said['node']}": said["facts"] for said in reports.values() if "facts" in said}
    if len(facts) < 2:
        return []
    names = sorted({name for said in facts.values() for name in said})
    found = []
    for name in names:
        values = {node: said.get(name, "not installed") for node, said in facts.items()}
        if len(set(values.values())) > 1:
            told = _by_value(values)
            result, advice = (WARNING, "the slowest GPU sets the pace; ask for nodes of one kind") if name == "devices" else (
                PROBLEM, "install the same versions on all nodes, or use one environment on the shared file system")  # fmt: skip
            found.append(Check(f"same {name}", result, told, advice))
    return found or [Check("same versions", OK, f"{len(names)} versions and devices are equal on {len(facts)} nodes")]


def _by_value(values: Mapping[str, str]) -> str:
    grouped: dict[str, list[str]] = {}
    for node, value in values.items():
        grouped.setdefault(value, []).append(node)
    return "; ".join(f"{value} on {', '.join(nodes)}" for value, nodes in grouped.items())


def skew(ahead: Mapping[int, float]) -> list[Check]:
    """The widest distance between two nodes' clocks."""
    if not ahead:
        return []
    values = {0: 0.0, **ahead}
    latest, earliest = max(values, key=lambda rank: values[rank]), min(values, key=lambda rank: values[rank])
    width = values[latest] - values[earliest]
    value = f"{width * 1000:.1f} ms between the clocks of ranks {earliest} and {latest}"
    if width < SKEW_WARNING:
        return [Check("clocks", OK, value)]
    return [Check("clocks", PROBLEM if width > SKEW_PROBLEM else WARNING, value, "run an NTP service (chrony) on all nodes")]


def shared_folder(seen: Mapping[int, Mapping[str, Any]], place: Callable[[str], Path]) -> list[Check]:
    """Whether all nodes see the same run folder, soon, with locks that exclude and times that agree."""
    if not seen:
        return []
    blind = [rank for rank, said in seen.items() if said.get("seen") is None]
    if blind:
        value = f"the nodes of ranks {_listed(blind)} do not see a file that rank 0 wrote"
        return [Check("shared folder", PROBLEM, value, "--runs must be a folder on a file system that all nodes mount")]
    unread = [rank for rank, said in seen.items() if _content(place(said["reply"])) != said["expected"]]
    if unread:
        value = f"rank 0 does not see the files of ranks {_listed(unread)}"
        return [Check("shared folder", PROBLEM, value, "--runs must be a folder on a file system that all nodes mount")]
    slowest = max(said["seen"] for said in seen.values())
    value = f"seen from {len(seen) + 1} nodes within {slowest * 1000:.0f} ms, renamed files too"
    checks = [Check("shared folder", WARNING if slowest > SLOW_SIGHT else OK, value,
                    "mount it with a shorter attribute cache (NFS: actimeo=1)" if slowest > SLOW_SIGHT else "")]  # fmt: skip
    open_locks = [rank for rank, said in seen.items() if said.get("excluded") is not True]
    if open_locks:
        value = f"a lock of rank 0 does not exclude the nodes of ranks {_listed(open_locks)}"
        checks.append(
            Check("file locks", WARNING, value, "owner.json keeps launches apart then; better mount with locks (Lustre: flock)")
        )
    else:
        checks.append(Check("file locks", OK, "exclude across nodes"))
    drift = max(abs(said["mtime"] - said["written"]) for said in seen.values())
    value = f"the file server's clock is {drift:.1f} s from a node's"
    checks.append(Check("file times", WARNING, value, "run an NTP service on the file server, too") if drift > 2 else
                  Check("file times", OK, f"within {max(0.1, drift):.1f} s of the nodes' clocks"))  # fmt: skip
    return checks


def _content(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown + (" ..." if ranks[8:] else "")


def speed(measured: Mapping[str, Any]) -> list[Check]:
    """The all-reduce's time and the bytes per second on its busiest link: 2 (n - 1) / n of the tensor pass through it."""
    if "error" in measured:
        advice = "see that nodes reach each other on all ports; choose the network with --interface IF"
        return [Check("all-reduce", PROBLEM, str(measured["error"]), advice)]
    world = int(measured["world"])
    gigabytes = 2 * (world - 1) / world * measured["bytes"] / measured["seconds"] / 1e9
    value = (
        f"{measured['backend']}, {world} ranks: {size(measured['bytes'])} in {measured['seconds'] * 1000:.1f} ms"
        f" ({gigabytes:.2f} GB/s), 4 bytes in {measured['latency'] * 1e6:.0f} us; joined in {measured['joined']:.1f} s"
    )
    if world > 1 and gigabytes < SLOW_NETWORK:
        return [Check("all-reduce", WARNING, value, "slow: choose the fast network with --interface IF")]
    return [Check("all-reduce", OK, value)]
