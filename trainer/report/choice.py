"""Which videos a report shows: the best and the worst by score, chosen while the videos pass, so that few pictures are held.

Comes in: each video's number and scores. Goes out: the numbers to show, best first. No torch, no pictures of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

Picture = TypeVar("Picture")


def merit(scores: Mapping[str, float | None]) -> float | None:
    """Mean of a video's FG-ARI and mBO, in [0, 1]; None where it has no object to be scored on."""
    pair = scores.get("video_fg_ari"), scores.get("video_mbo")
    return None if pair[0] is None or pair[1] is None else (pair[0] + pair[1]) / 2


def best_and_worst(merits: Mapping[int, float | None], num_shown: int) -> list[int]:
    """Numbers of the best and the worst videos, half of `num_shown` each (the best have the odd one), best first.

    Equal merits keep the videos' order. Where no video has a merit, the first ones are shown.
    """
    known = {number: value for number, value in merits.items() if value is not None}
    if not known:
        return sorted(merits)[:num_shown]
    ordered = sorted(known, key=lambda number: (-known[number], number))
    if len(ordered) <= num_shown:
        return ordered
    num_worst = num_shown // 2
    return ordered[: num_shown - num_worst] + ordered[len(ordered) - num_worst :]


class Candidates(Generic[Picture]):
    """Pictures of those of one rank's videos that may still be among the best or the worst of all."""

    def __init__(self, num_shown: int) -> None:
        self._num_shown = num_shown
        self._merits: dict[int, float | None] = {}
        self.pictures: dict[int, Picture] = {}

    def offer(self, number: int, merit_of_it: float | None, draw: Callable[[], Picture]) -> None:
        """`draw` is called only for a video that may be shown."""
        self._merits[number] = merit_of_it
        kept = set(best_and_worst(self._merits, self._num_shown))
        self._merits = {number: self._merits[number] for number in kept}  # the others can never come back
        self.pictures = {number: picture for number, picture in self.pictures.items() if number in kept}
        if number in kept:
            self.pictures[number] = draw()
