"""Command: break a training run again and again, and compare the result with an undisturbed one: `python -m benchmarks.chaos`.

Comes in: a number of faults, a seed, a backend. Goes out: a line for each fault, a table by kind and the verdict: the run ended
by itself, every sample of the stream was applied exactly once and in the same order, the weights are the same bytes, no process
is left. Exit code 1 if any of it is not so. Recovery is counted from the fault (for one that lasts: from its end) to the first
step beyond those before it, less the time that a clean start takes.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # as a script: this folder's modules are benchmarks.*

from benchmarks.chaos_faults import FAULTS
from benchmarks.chaos_places import PLACES, Place
from benchmarks.chaos_run import ChaosError, Run, served_shards

STEPS_PER_FAULT = 20
PATIENCE_S = 240.0  # for one recovery; a run that needs longer is taken for dead


@dataclass
class Injected:
    """One fault and how the run got over it."""

    kind: str
    what: str
    step: int
    recovery_s: float  # until the first new step


@dataclass
class Soak:
    """What a soak found. `problems` is empty when all is well."""

    startup_s: float = 0.0
    faults: list[Injected] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    starts: int = 0
    attempts: int = 0

    def beyond_startup(self, fault: Injected) -> float:
        return max(0.0, fault.recovery_s - self.startup_s)


def soak(
    place: Place,
    kinds: Sequence[str],
    seed: int,
    folder: Path,
    say: Callable[[str], None] = print,
    steps_per_fault: int = STEPS_PER_FAULT,
) -> Soak:
    """The undisturbed run, the one with these faults, and the comparison."""
    result, draw, steps = Soak(), random.Random(seed), steps_per_fault * (len(kinds) + 1)
    with ExitStack() as stack:
        data = stack.enter_context(served_shards(folder, place))
        runs = [Run(folder, name, steps, place, data) for name in ("calm", "chaos")]
        for run in runs:
            stack.callback(run.close)
        calm, run = runs
        result.startup_s = undisturbed(calm, say)
        if any(FAULTS[kind].needs == "disk" for kind in kinds):
            run.small_disk()
        try:
            torment(run, kinds, draw, result, say)
            run.until(lambda: run.exit_code() is not None, "the run ends", PATIENCE_S)
        except ChaosError as error:
            result.problems.append(str(error))
        compare(calm, run, result)
    return result


def possible(place: Place) -> list[str]:
    """Faults that can be had in this place."""
    there = {"": True, "hosts": place.hosts is not None, "disk": os.geteuid() == 0, place.backend: True}
    return [kind for kind, fault in FAULTS.items() if there.get(fault.needs, False)]


def plan(kinds: Sequence[str], faults: int, seed: int) -> list[str]:
    """Kinds in random order, each as often as the others."""
    planned: list[str] = []
    draw = random.Random(seed)
    while len(planned) < faults:
        planned += draw.sample(list(kinds), len(kinds))
    return planned[:faults]


def undisturbed(run: Run, say: Callable[[str], None]) -> float:
    """Train without a fault; seconds from the command to the first step."""
    began = time.monotonic()
    run.start()
    run.until(lambda: run.step() > 0, "the first step", PATIENCE_S)
    startup_s = time.monotonic() - began
    run.until(lambda: run.exit_code() is not None, "the undisturbed run ends", 3 * PATIENCE_S)
    say(f"undisturbed: {run.steps} steps in {time.monotonic() - began:.0f} s, the first after {startup_s:.1f} s")
    return startup_s


def torment(run: Run, kinds: Sequence[str], draw: random.Random, result: Soak, say: Callable[[str], None]) -> None:
    """Start the run and break it once for each of `kinds`, at steps spread over its whole length."""
    run.start()
    spacing = run.steps // (len(kinds) + 1)
    for number, kind in enumerate(kinds):
        at = int((number + draw.uniform(0.25, 0.95)) * spacing)
        run.until(partial(run.has_reached, at), f"step {at}", PATIENCE_S)
        time.sleep(draw.uniform(0.0, 0.3))
        recovery = Recovery(run, FAULTS[kind].restarts)
        began = time.monotonic()
        what = FAULTS[kind].do(run, draw)
        if not FAULTS[kind].restarts:
            began = time.monotonic()
        step = max(recovery.last, run.step())
        run.until(recovery.reached, f"a step beyond {step} after: {kind} ({what})", PATIENCE_S)
        result.faults.append(Injected(kind, what, step, time.monotonic() - began))
        say(f"{len(result.faults):3d} step {step:5d}  {result.faults[-1].recovery_s:5.1f} s  {kind}: {what}")


class Recovery:
    """Tells when a run is beyond where a fault met it: where an attempt must follow, by a step of that attempt."""

    def __init__(self, run: Run, restarts: bool) -> None:
        self._run, self._restarts, self._restarted = run, restarts, False
        self._attempt, self.last = run.attempt(), run.step()

    def reached(self) -> bool:
        step = self._run.step()
        if self._restarts and not self._restarted:  # ranks may go on for a while after their agent
            self.last = max(self.last, step)
            self._restarted = self._run.attempt() != self._attempt
            return False
        return step > self.last


def compare(calm: Run, run: Run, result: Soak) -> None:
    """Everything that must be equal, or gone; what is not goes into `result.problems`."""
    problems = result.problems
    result.starts, result.attempts = run.starts, run.attempt()
    if run.exit_code() != 0:
        problems.append(f"exit code {run.exit_code()}, not 0\n{run.tail()}")
    if not (run.run_dir / "DONE").is_file():
        problems.append("no DONE in the run folder")
    if run.positions() != list(range(len(run.positions()))):
        problems.append("the stream's positions were not applied exactly once each")
    if run.order() != calm.order():
        wrong = [step for step, ids in calm.order().items() if run.order().get(step) != ids]
        problems.append(f"the order differs from the undisturbed run's at {len(wrong)} steps, first {wrong[:3]}")
    if run.digests() != calm.digests() or "absent" in run.digests().values():
        problems.append(f"the weights differ: {run.digests()} and undisturbed {calm.digests()}")
    deadline = time.monotonic() + 5
    while (left := run.left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        problems.append(f"processes left: {left}")


def table(result: Soak) -> str:
    """By kind: how many, and the seconds beyond a clean start."""
    rows = [f"{'fault':34s} {'times':>5s} {'median s':>9s} {'longest s':>10s}"]
    for kind in dict.fromkeys(fault.kind for fault in result.faults):
        beyond = [result.beyond_startup(fault) for fault in result.faults if fault.kind == kind]
        rows.append(f"{kind:34s} {len(beyond):5d} {statistics.median(beyond):9.1f} {max(beyond):10.1f}")
    if result.faults:
        beyond = [result.beyond_startup(fault) for fault in result.faults]
        rows.append(f"{'all':34s} {len(beyond):5d} {statistics.median(beyond):9.1f} {max(beyond):10.1f}")
    rows.append(f"seconds beyond a clean start, which takes {result.startup_s:.1f} s from the command to the first step")
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=(*PLACES, "all"), default="local")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--steps-per-fault", type=int, default=STEPS_PER_FAULT, help="few faults need more: some last for 15 s")
    parser.add_argument(
        "--kind", action="append", choices=list(FAULTS), metavar="KIND", help=f"only this; repeatable: {'; '.join(FAULTS)}"
    )
    parser.add_argument("--keep", type=Path, help="a new folder for the runs, which stays")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is taken away
    failed = False
    for name in PLACES if options.backend == "all" else [options.backend]:
        with ExitStack() as stack:
            folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slotstream_chaos_")))
            folder = (folder / name).absolute()
            folder.mkdir(parents=True)
            place = stack.enter_context(PLACES[name](options.nodes))
            kinds = plan(options.kind or possible(place), options.faults, options.seed)
            say = partial(print, flush=True)
            result = soak(place, kinds, options.seed, folder, say, options.steps_per_fault)
        failed |= bool(verdict(name, result, options.faults))
    return 1 if failed else 0


def verdict(backend: str, result: Soak, asked: int) -> list[str]:
    """Prints the table and the verdict; returns the problems."""
    print(f"\nbackend {backend}\n{table(result)}")
    if len(result.faults) < asked:
        result.problems.append(f"{len(result.faults)} of {asked} faults were survived")
    print(f"{len(result.faults)} faults, {result.attempts} attempts, the command given {result.starts} times")
    for problem in result.problems:
        print(f"WRONG: {problem}")
    if not result.problems:
        print("ended unattended; order exactly once and equal; weights equal, byte for byte; processes left: 0")
    return result.problems


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
