"""What the launcher noted, in words: a line of events.jsonl comes in, a sentence and how bad it is go out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TROUBLE, NOTICE, ROUTINE = "trouble", "notice", "routine"
REQUEUE = 75  # exit code: saved, start me again
_TROUBLE = ("hang", "lost", "cannot_start", "taken_over", "disk")
_NOTICE = ("straggler", "recovered", "preempted", "regroup", "restart", "stopping")
_OUTCOMES = {
    "done": "done",
    "requeue": "saved and stopped, to be started again",
    "interrupted": "interrupted",
    "terminated": "terminated",
    "hung_up": "stopped: the terminal was closed",
    "out_of_time": "stopped: its time was over",
}


def severity(event: Mapping[str, Any]) -> str:
    """trouble: something broke; notice: something was done about it, or asked for; routine: all is well."""
    name = event.get("event")
    if name == "verdict":
        return TROUBLE if event.get("outcome") == "failed" else ROUTINE
    if name == "exit":
        return TROUBLE if event.get("code") not in (0, REQUEUE) and not event.get("stopped") else ROUTINE
    if name == "end":
        return TROUBLE if event.get("code") in (1, 2) else ROUTINE
    return TROUBLE if name in _TROUBLE else NOTICE if name in _NOTICE else ROUTINE


def describe(event: Mapping[str, Any]) -> str:
    """One line for a person. An event of a kind that is not known here is shown with its facts."""
    name = str(event.get("event"))
    made = {
        "session": lambda: f"launched on {event.get('host')} ({event.get('backend')}, {event.get('nodes')} node(s))",
        "attempt": lambda: f"attempt begins: {event.get('ranks')} rank(s) on {event.get('nodes')} node(s)",
        "exit": lambda: _exit(event),
        "verdict": lambda: _verdict(event),
        "restart": lambda: _restart(event),
        "preempted": lambda: f"asked to save and stop: {event.get('signal') or 'the time limit'} at {event.get('where')}",
        "stopping": lambda: f"saving and stopping: {event.get('reason')}",
        "lost": lambda: f"node {event.get('slot')}: its agent {event.get('why')}",
        "cannot_start": lambda: f"an attempt cannot begin: {event.get('why')}",
        "taken_over": lambda: f"another launcher took the run over: {event.get('owner')}",
        "regroup": lambda: f"saving, to go on with node(s) {_numbers(event.get('slots'))} as well",
        "end": lambda: _end(event),
    }.get(name)
    if made is not None:
        return made()
    if isinstance(event.get("why"), str):  # findings of the watcher: hang, straggler, recovered, disk
        return f"{name}: {event['why']}"
    facts = {key: value for key, value in event.items() if key not in ("event", "time", "session", "attempt")}
    return f"{name} " + ", ".join(f"{key} {value}" for key, value in facts.items())


def _exit(event: Mapping[str, Any]) -> str:
    rank, node = event.get("rank"), event.get("node")
    who = f"the agent of node {node}" if rank is None else f"rank {rank} (node {node})"
    if event.get("why"):
        return f"{who} {event['why']}"
    asked = ", as asked" if event.get("stopped") else ""
    lost = ", after it lost another rank" if event.get("lost_peer") else ""
    return f"{who} {_ended(event.get('code'), event.get('signal'))}{asked}{lost}"


def _ended(code: Any, signal: Any) -> str:
    if signal:
        return f"was killed by {signal}"
    return {0: "ended well", REQUEUE: "saved and ended"}.get(code, f"failed with exit code {code}")


def _verdict(event: Mapping[str, Any]) -> str:
    outcome = str(event.get("outcome"))
    if outcome != "failed":
        return _OUTCOMES.get(outcome, outcome)
    rank, node, why = event.get("rank"), event.get("node"), event.get("why")
    who = f"node {node}" if rank is None else f"rank {rank}"
    where = "" if rank is None and node is None else f", {who} at fault"
    code = "" if event.get("cause") in ("hang", "lost_node") else f", exit code {event.get('code', event.get('exit_code'))}"
    return f"failed ({event.get('cause') or 'unknown cause'}{where}{code})" + (f": {why}" if why else "")


def _restart(event: Mapping[str, Any]) -> str:
    delay = event.get("delay")
    after = f" in {delay:.0f} s" if isinstance(delay, int | float) and delay else ""
    return f"starting again{after}: {event.get('why')}"


def _end(event: Mapping[str, Any]) -> str:
    words = event.get("why") or event.get("reason")
    return f"the launcher ends with code {event.get('code')}" + (f": {words}" if words else "")


def _numbers(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list) else str(values)
