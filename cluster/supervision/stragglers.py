"""Stragglers from heartbeats: groups of a few steps go in, who was slow in nearly all of the last ones comes out. Pure.

A rank is slow by its own work: the seconds of a step that it does not spend in collectives, where all wait for the slowest. A
node is slow by its link: it answers late while steps are mostly communication.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from cluster.heartbeats import WINDOW_STEPS

Beats = Mapping[int, Mapping[str, Any]]

SLOWER = 1.5  # own seconds against the median of the others
CALM = 1.25  # an episode is over below this
LEAST_EXCESS_S = 0.005  # a step
LEAST_SAVE_S = 0.005  # less was no save, only a look whether one is due
# Slow in so many of so many groups of WINDOW_STEPS. Short groups, so that one long step (a page fault, a neighbour on the host)
# spoils one of them and no more; one group may be missed, so that a slow rank is named within 20 steps on a busy host, too.
PERSISTENT = {"work": (6, 7), "save": (6, 6)}
LINK_SLOWER, LINK_LEAST_S, LINK_SAMPLES = 5.0, 0.010, (6, 6)  # round-trip times; samples
COMMUNICATION_SHARE = 0.5  # of a step, above which a slow link matters
# What a rank does by itself; the rest of a step is waiting for others. Saves apart: rank 0 may write for all, and most steps save
# nothing.
TRACKS = {"work": ("data", "compute"), "save": ("save",)}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to say, once: kind "hang", "straggler" or "recovered" (a straggler that is none any more).

    `cause`: of a hang stopped, loader, save, compute, evaluate, start, skipped collective, extra collective, communication; of a
    straggler data, compute, save or communication. `node` is set where a link, not a rank, is at fault. `ranks`: of a hang the
    state of every rank, by rank.
    """

    kind: str
    culprits: tuple[int, ...]
    cause: str
    why: str
    node: int | None = None
    ranks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "culprits": list(self.culprits)}


def median_of_others(ordered: Sequence[float], own: float) -> float:
    """The median of all values but one `own`; `ordered`: two or more values, sorted once for all who ask, own among them."""
    place = bisect_left(ordered, own)
    low, high = (len(ordered) - 2) // 2, (len(ordered) - 1) // 2  # of the others: the two in the middle, or twice the middle
    return (ordered[low + (low >= place)] + ordered[high + (high >= place)]) / 2


class Stragglers:
    """Ranks whose own work takes longer than the others', by groups of steps that all ranks have finished."""

    def __init__(self) -> None:
        self._groups: dict[int, dict[int, list[float]]] = {}
        self._done = 0
        self._episodes = {track: _Episodes(*PERSISTENT[track]) for track in TRACKS}
        self._first_saves: list[float] = []  # of rank 0
        self.communication_share = 0.0

    @property
    def suspects(self) -> bool:
        """A rank's own work is, or may be, what slows the others."""
        return any(episodes.open or episodes.begun for episodes in self._episodes.values())

    def see(self, beats: Beats) -> list[Finding]:
        for rank, beat in beats.items():
            for number, *seconds in beat["recent"]:
                if number > self._done:
                    self._groups.setdefault(number, {})[rank] = [value / WINDOW_STEPS for value in seconds]
        findings: list[Finding] = []
        for number in sorted(self._groups):
            if beats.keys() <= self._groups[number].keys():
                self._done = number
                findings += self._weigh(self._groups[number])
        self._groups = {number: group for number, group in self._groups.items() if number > self._done}
        return findings

    def _weigh(self, group: Mapping[int, list[float]]) -> list[Finding]:
        parts = {rank: dict(zip(("data", "compute", "communication", "save"), row, strict=True)) for rank, row in group.items()}
        total = sum(map(sum, group.values()))
        self.communication_share = sum(part["communication"] for part in parts.values()) / total if total else 0.0
        findings = []
        for track, names in TRACKS.items():
            own = {rank: sum(part[name] for name in names) for rank, part in parts.items()}
            if max(own.values()) * WINDOW_STEPS > LEAST_SAVE_S and len(own) > 1:  # most steps save nothing
                findings += self._compare(track, own, parts)
        return findings

    def _compare(self, track: str, own: Mapping[int, float], parts: Mapping[int, Mapping[str, float]]) -> list[Finding]:
        findings = []
        ordered = sorted(own.values())
        for rank in sorted(own):
            others = median_of_others(ordered, own[rank])
            least = max(others, self._usual_save(own[rank])) if (track, rank) == ("save", 0) else others
            excess = own[rank] - least
            slow = own[rank] > SLOWER * least and excess > LEAST_EXCESS_S
            calm = own[rank] < CALM * least or excess < LEAST_EXCESS_S / 2
            change = self._episodes[track].count(rank, slow, calm)
            if change == "begins":
                findings.append(_straggler(rank, TRACKS[track], parts))
            elif change == "ends":
                findings.append(Finding("recovered", (rank,), track, f"rank {rank} keeps up with the others again"))
        return findings

    def _usual_save(self, seconds: float) -> float:
        """What rank 0, which may write for all, may take: twice its first saves."""
        if len(self._first_saves) < 5:
            self._first_saves.append(seconds)
            return seconds
        return 2 * median(self._first_saves)


class _Episodes:
    """Who is slow in `needed` of the last `of` counts, and later calm as often: said once each."""

    def __init__(self, needed: int, of: int) -> None:
        self._needed = needed
        self._slow: defaultdict[int, deque[bool]] = defaultdict(lambda: deque(maxlen=of))
        self._calm: defaultdict[int, deque[bool]] = defaultdict(lambda: deque(maxlen=of))
        self.open: set[int] = set()

    @property
    def begun(self) -> bool:
        """Somebody was slow at the last count."""
        return any(counts and counts[-1] for counts in self._slow.values())

    def count(self, who: int, slow: bool, calm: bool) -> str:
        """ "begins", "ends" or ""."""
        self._slow[who].append(slow)
        self._calm[who].append(calm)
        if who not in self.open and slow and sum(self._slow[who]) >= self._needed:
            self.open.add(who)
            return "begins"
        if who in self.open and sum(self._calm[who]) >= self._needed:
            self.open.remove(who)
            return "ends"
        return ""


def _straggler(rank: int, names: Iterable[str], parts: Mapping[int, Mapping[str, float]]) -> Finding:
    usual = {name: median(part[name] for other, part in parts.items() if other != rank) for name in names}
    cause = max(usual, key=lambda name: parts[rank][name] - usual[name])
    own, others = parts[rank][cause], usual[cause]
    return Finding(
        "straggler", (rank,), cause, f"rank {rank}: {1000 * own:.0f} ms of {cause} a step, the others {1000 * others:.0f} ms"
    )


class Links:
    """Nodes that answer much later than the others, while steps are mostly communication."""

    def __init__(self) -> None:
        self._episodes = _Episodes(*LINK_SAMPLES)
        self.far: list[int] = []

    def see(self, rtt: Mapping[int, float], ranks: Stragglers) -> list[Finding]:
        findings = []
        matters = ranks.communication_share > COMMUNICATION_SHARE and not ranks.suspects
        self.far = []
        ordered = sorted(rtt.values())
        for node in sorted(rtt) if len(rtt) > 1 else []:
            others = median_of_others(ordered, rtt[node])
            far = rtt[node] > LINK_SLOWER * others and rtt[node] > LINK_LEAST_S
            self.far += [node] * far
            change = self._episodes.count(node, far and matters, not far)
            told = f"node {node} answers after {1000 * rtt[node]:.1f} ms, the others after {1000 * others:.1f} ms"
            if change:
                kind = "straggler" if change == "begins" else "recovered"
                findings.append(Finding(kind, (), "communication", told, node=node))
        return findings
