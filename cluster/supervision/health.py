"""Hangs (here) and stragglers (stragglers.py): the ranks' heartbeats go in, findings come out. Pure: no clock, no I/O.

Beats are the dicts of `heartbeats.RankBeats.read`, keyed by global rank. Their ages were measured on the ranks' own hosts, so
clocks need not agree, and news that come late are no hang: an agent that keeps silent is the supervisor's business.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

from cluster.heartbeats import PHASES, WINDOW_STEPS
from cluster.supervision.stragglers import LEAST_SAVE_S, Beats, Finding, Links, Stragglers

# Floors in seconds where there is no step time yet to judge by, or none that says anything.
START_S = 300.0  # start and load: imports from a shared disk, a checkpoint that is read, shards that are fetched
FIRST_STEP_S = 120.0  # the first step, and finish: compilation, allocation, first connections; the report
FIRST_SAVE_S = 30.0  # until a save has been seen; bytes that move count as progress, so a large one may take longer
EVALUATE_S = 300.0  # between two videos
STEPS_TO_A_HANG = 10  # times the usual step; the same of saves
MOVED_BYTES = 2**20  # so much read or written is progress where files are: a console line is not

GONE = ("", "Z", "X")
STOPPED = ("T", "t")


class Watcher:
    """Watches the ranks of one attempt. `hang_after_s`: least seconds without progress that are a hang; 0: none is ever found."""

    def __init__(self, hang_after_s: float) -> None:
        self._hang_after_s = hang_after_s
        self._hung = False
        self._pace = _Pace()
        self._moved = _Moved()
        self._stragglers = Stragglers()
        self._links = Links()

    def see(self, now: float, beats: Beats, rtt_by_node: Mapping[int, float] | None = None) -> list[Finding]:
        """What is new at `now` (monotonic seconds). Call it with each round of beats; ranks may be missing.

        `rtt_by_node`: seconds of the supervisor's last round trip to each node's agent. A hang is said once.
        """
        living = {rank: beat for rank, beat in sorted(beats.items()) if beat["pid"] and beat["state"] not in GONE}
        if not living:
            return []
        self._pace.see(living)
        self._moved.see(now, living)
        findings = self._stragglers.see(living)
        findings += self._links.see(rtt_by_node or {}, self._stragglers)
        hang = self._hang(now, living)
        return findings + ([hang] if hang else [])

    def limit_s(self, beats: Beats) -> float:
        """Seconds without any change that are a hang now: the longest of what the ranks' phases allow."""
        if _stopped(beats):
            return self._hang_after_s
        return max(self._allowed(beat) for beat in beats.values())

    def _allowed(self, beat: Mapping[str, Any]) -> float:
        phase, floor = beat["phase"], max(self._hang_after_s, beat["allowed"])
        if phase in ("start", "load"):
            return max(floor, START_S)
        if phase == "evaluate":
            return max(floor, EVALUATE_S)
        if phase == "save":
            return max(floor, self._pace.usual_save() * STEPS_TO_A_HANG or FIRST_SAVE_S)
        if phase == "finish" or not beat["steps"]:
            return max(floor, FIRST_STEP_S)
        return max(floor, self._pace.usual_step() * STEPS_TO_A_HANG)

    def _hang(self, now: float, beats: Beats) -> Finding | None:
        idle = min(*(beat["age"] for beat in beats.values()), self._moved.seconds(now))
        if not self._hang_after_s or self._hung or idle <= self.limit_s(beats):
            return None
        self._hung = True
        found = judge(beats)
        return replace(found, node=self._links.far[0]) if not found.culprits and len(self._links.far) == 1 else found


# -- hangs ---------------------------------------------------------------------------------------------------------------------

HANG_CAUSES = {"start": "start", "load": "start", "data": "loader", "save": "save", "evaluate": "evaluate", "finish": "start"}
SHOWN = ("step", "phase", "in_collective", "operation", "collective", "age", "state", "pid")


def judge(beats: Beats) -> Finding:
    """Who holds up all the others, of beats that no longer change."""
    for rule in (_stopped, _outside, _out_of_step, _behind):
        found = rule(beats)
        if found is not None:
            break
    else:
        found = (), "communication", "all ranks wait in the same collective: the connection between them does not carry"
    culprits, cause, why = found
    ranks = {str(rank): {key: beat[key] for key in SHOWN} for rank, beat in beats.items()}
    return Finding("hang", tuple(culprits), cause, why, ranks=ranks)


Verdict = tuple[Iterable[int], str, str]


def _stopped(beats: Beats) -> Verdict | None:
    found = [rank for rank, beat in beats.items() if beat["state"] in STOPPED]
    if not found:
        return None
    return found, "stopped", f"{_names(found)} was stopped by a signal (process state T) {_place(beats[found[0]])}"


def _outside(beats: Beats) -> Verdict | None:
    """Some wait in a collective for others that are not in any."""
    found = [rank for rank, beat in beats.items() if not beat["in_collective"]]
    if not found or len(found) == len(beats):
        return None
    return _by_phase(beats, found, f"while {len(beats) - len(found)} wait in a collective")


def _out_of_step(beats: Beats) -> Verdict | None:
    """All wait in collectives, but not in the same one."""
    places = {rank: (*_order(beat), beat["operation"]) for rank, beat in beats.items()}
    counts = Counter(places.values())
    if len(counts) == 1 or not all(beat["in_collective"] for beat in beats.values()):
        return None
    common, most = counts.most_common(1)[0]
    found = [rank for rank, place in places.items() if place != common]
    usual = next(rank for rank, place in places.items() if place == common)
    why = f"{_names(found)} in {_collective(beats[found[0]])}, the others in {_collective(beats[usual])}"
    if most * 2 <= len(beats):  # as many here as there: who strayed cannot be told
        return list(beats), "skipped or extra collective", why
    strayed = places[found[0]]
    further = (strayed[:2], -strayed[2]) > (common[:2], -common[2])  # in the same place with fewer collectives: one was left out
    return found, "skipped collective" if further else "extra collective", why


def _behind(beats: Beats) -> Verdict | None:
    """Nobody is in a collective: those that are furthest behind hold up the rest."""
    if any(beat["in_collective"] for beat in beats.values()):
        return None
    first = min(map(_order, beats.values()))
    found = [rank for rank, beat in beats.items() if _order(beat) == first]
    return _by_phase(beats, found, "and nobody waits in a collective")


def _by_phase(beats: Beats, found: list[int], rest: str) -> Verdict:
    beat = beats[found[0]]
    cause = HANG_CAUSES.get(beat["phase"], "compute")
    disk = ", in uninterruptible sleep: its storage or driver does not answer" if beat["state"] == "D" else ""
    return found, cause, f"{_names(found)} stuck for {beat['age']:.0f} s {_place(beat)}{disk}, {rest}"


def _names(ranks: Iterable[int]) -> str:
    listed = [str(rank) for rank in ranks]
    return f"rank{'s' * (len(listed) > 1)} {', '.join(listed)}"


def _order(beat: Mapping[str, Any]) -> tuple[int, int, int]:
    return beat["step"], PHASES.index(beat["phase"]), beat["collective"]


def _place(beat: Mapping[str, Any]) -> str:
    return f"in step {beat['step']}, phase {beat['phase']}"


def _collective(beat: Mapping[str, Any]) -> str:
    return f"collective {beat['collective']} ({beat['operation']}, step {beat['step']}, phase {beat['phase']})"


# -- pace ----------------------------------------------------------------------------------------------------------------------


class _Pace:
    """How long steps and saves usually take in this attempt, in seconds."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=50)
        self._saves: deque[float] = deque(maxlen=20)
        self._last_group = 0
        self._save_sum: dict[int, float] = {}

    def see(self, beats: Beats) -> None:
        first = next(iter(beats.values()))
        for number, *seconds in first["recent"]:
            if number > self._last_group:
                self._last_group = number
                self._steps.append(sum(seconds) / WINDOW_STEPS)
        grown = [beat["save"] - self._save_sum.get(rank, 0.0) for rank, beat in beats.items()]
        self._save_sum = {rank: beat["save"] for rank, beat in beats.items()}
        if max(grown) > LEAST_SAVE_S:
            self._saves.append(max(grown))

    def usual_step(self) -> float:
        return median(self._steps) if self._steps else 0.0

    def usual_save(self) -> float:
        return median(self._saves) if self._saves else 0.0


class _Moved:
    """Progress that no record shows: a rank in a long read or write."""

    def __init__(self) -> None:
        self._bytes: dict[int, int] = {}
        self._since: float | None = None

    def see(self, now: float, beats: Beats) -> None:
        for rank, beat in beats.items():
            if beat["moved"] - self._bytes.setdefault(rank, beat["moved"]) >= MOVED_BYTES:
                self._bytes[rank] = beat["moved"]
                if beat["phase"] in ("start", "load", "save"):
                    self._since = now

    def seconds(self, now: float) -> float:
        """Since bytes moved last; without end where they never did."""
        return float("inf") if self._since is None else now - self._since
