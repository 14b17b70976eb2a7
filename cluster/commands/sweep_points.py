"""A sweep's points: words of a command line in; every combination, with a folder name each, out; kept in sweep.json.

`optim.lr=1e-3,1e-4 seed=range(3)` are six points. Hydra's own parser says what a list of values is; the last key varies fastest.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.commands.run_reader import read_json
from cluster.commands.run_view import SWEEP_FILE
from cluster.config import LaunchError
from cluster.processes import write_json
from cluster.run_folder import clean_word

FORMAT = "slotstream-sweep/1"
MAX_POINTS = 10_000
NAME_LENGTH = 80
LOCK = "sweep.lock"  # held by the process that starts the points
CANCELLED = "cancelled"  # a file: that process starts no more points


@dataclass(frozen=True)
class Point:
    number: int
    name: str  # of its run folder, in the sweep's
    overrides: tuple[str, ...]  # only what differs between points


@dataclass(frozen=True)
class Sweep:
    fixed: tuple[str, ...]  # job and overrides that all points share
    points: tuple[Point, ...]


def expand(words: Sequence[str]) -> Sweep:
    """The points of a job's words (job name and overrides, no flags, no name=).

    Raises: LaunchError for a word that Hydra cannot read, a sweep without an end (interval, glob), or equal points.
    """
    fixed, axes = [], []
    for word in words:
        values = _values(word)
        if values is None:
            fixed.append(word)
        else:
            axes.append(values)
    if not axes:
        raise LaunchError(
            "--multirun without a list of values; at least one key needs several; for example optim.lr=1e-3,1e-4 or seed=range(3)"
        )
    total = math.prod(len(values) for values in axes)
    if total > MAX_POINTS:
        raise LaunchError(f"--multirun of {total:,} points; at most {MAX_POINTS:,} in a sweep; give fewer values")
    combinations = list(itertools.product(*axes))
    twice = [key for key, seen in Counter(combinations).items() if seen > 1]
    if twice:
        raise LaunchError(f"--multirun has {' '.join(twice[0])} twice; each point is a run of its own; leave one out")
    if len({_cleaned(item) for item in combinations}) < total:
        raise LaunchError("--multirun over a key that sounds secret; sweep.json keeps no secrets; set it in the environment")
    digits = max(2, len(str(total - 1)))
    keys = _short_keys([values[0].partition("=")[0] for values in axes])
    points = [Point(place, point_name(place, digits, keys, item), item) for place, item in enumerate(combinations)]
    return Sweep(tuple(fixed), tuple(points))


def _values(word: str) -> list[str] | None:
    """One override for each value of a list; None for a word that has one value."""
    if "=" not in word:  # the job's name, or ~key
        return None
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
        if not override.is_sweep_override():
            return None
        if not override.is_discrete_sweep():
            raise LaunchError(f"{word}; a sweep needs values that can be counted; list them, or use range(first,end,step)")
        key = override.get_key_element()
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    except HydraException as error:
        if "ConfigLoader" in str(error):
            raise LaunchError(f"{word}; glob() is not supported here; list the names") from None
        if "sweep to str" in str(error):
            raise LaunchError(
                f"{word}; a sweep needs values that can be counted; list them, or use range(first,end,step)"
            ) from None
        raise LaunchError(
            f"{word}; Hydra cannot read it: {str(error).splitlines()[0]}; quote values with special letters"
        ) from None


def _short_keys(keys: Sequence[str]) -> list[str]:
    """The last part of each key where that names it alone, else the whole key."""
    names = [key.lstrip("+") for key in keys]
    last = [name.rpartition(".")[2] for name in names]
    return [short if last.count(short) == 1 else name for short, name in zip(last, names, strict=True)]


def point_name(number: int, digits: int, keys: Sequence[str], overrides: Sequence[str]) -> str:
    """Such as 03_lr1e-4_seed2: its number makes it the only one, the rest is for the reader."""
    parts = [f"{key}{override.partition('=')[2]}" for key, override in zip(keys, overrides, strict=True)]
    text = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-") for part in parts)
    return f"{number:0{digits}d}_{text}"[:NAME_LENGTH].rstrip("._-")


def read_sweep(folder: Path) -> Sweep | None:
    """The sweep that a folder holds; None when it holds none, or one that cannot be read."""
    content = read_json(folder / SWEEP_FILE)
    if content.get("format") != FORMAT:
        return None
    try:
        points = tuple(
            Point(int(item["number"]), str(item["name"]), tuple(map(str, item["overrides"]))) for item in content["points"]
        )
        return Sweep(tuple(map(str, content["fixed"])), points)
    except (KeyError, TypeError, ValueError):
        return None


def is_started(folder: Path) -> bool:
    """True while a process starts the sweep's points; False also where the file system has no locks."""
    try:
        with open(folder / LOCK) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def fix_sweep(folder: Path, sweep: Sweep) -> Sweep:
    """Write sweep.json, or find that the same sweep is in it already; return the sweep with that file's order and names.

    Raises: LaunchError when the folder holds another sweep or a run.
    """
    if not (folder / SWEEP_FILE).exists():
        if any((folder / name).exists() for name in ("config.yaml", "attempts", "metrics.jsonl")):
            raise LaunchError(f"{folder} is the folder of a run; a sweep needs one of its own; choose another name=...")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SWEEP_FILE, _as_json(sweep))
        return sweep
    before = read_sweep(folder)
    if before is None:
        raise LaunchError(
            f"{folder / SWEEP_FILE} cannot be read; it fixes the points of the sweep; restore it, or choose another name=..."
        )
    change = _difference(before, sweep)
    if change:
        raise LaunchError(
            f"{folder} holds another sweep: {change}; a sweep goes on with its points; choose another name=..., or the old words"
        )
    own = {_cleaned(point.overrides): point.overrides for point in sweep.points}  # the file has no secrets, the words may
    points = tuple(Point(point.number, point.name, own[point.overrides]) for point in before.points)
    return Sweep(sweep.fixed, points)


def _difference(before: Sweep, after: Sweep) -> str:
    for what, old, new in (
        ("settings", set(before.fixed), set(_cleaned(after.fixed))),
        ("points", {p.overrides for p in before.points}, {_cleaned(p.overrides) for p in after.points}),
    ):
        gone, come = sorted(old - new, key=str), sorted(new - old, key=str)
        if gone or come:
            shown = [*(f"{_words(item)} is gone" for item in gone[:1]), *(f"{_words(item)} is new" for item in come[:1])]
            return f"{what} differ ({', '.join(shown)})"
    return ""


def _words(item: str | Sequence[str]) -> str:
    return item if isinstance(item, str) else " ".join(item)


def _cleaned(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(map(clean_word, words))


def _as_json(sweep: Sweep) -> dict[str, Any]:
    points = [{"number": p.number, "name": p.name, "overrides": list(_cleaned(p.overrides))} for p in sweep.points]
    return {"format": FORMAT, "fixed": list(_cleaned(sweep.fixed)), "points": points}
