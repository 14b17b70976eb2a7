"""`cluster/launch.py plan ...`: what a run would need, before anything starts. Words in, a table (or JSON) and exit code out.

The figures come from the trainer's own planner, run as a process: nothing here knows torch, models or settings.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from cluster.config import LaunchError
from cluster.layout import ROOT, checkout_path, gpu_ids

PLANNER = "trainer.plan"
HELP = """python cluster/launch.py plan [--nodes N] [--gpus-per-node G | --ranks-per-node R] [flags] experiment=NAME [key=value]

Prints, and starts nothing: memory of a rank by tensor, arithmetic and time of an update, bytes of features per second and node,
storage, communication, which of them binds, and at how many ranks it stops scaling. --gpus-per-node 0 plans for CPU ranks.
The other flags are the planner's:
"""
VALUE_FLAGS = ("--runs", "--backend", "--command", "--grace", "--max-time")  # a word after one of these is its value


def is_plan(words: Sequence[str]) -> bool:
    """True when the job word is `plan`."""
    return any(word == "plan" and (place == 0 or words[place - 1] not in VALUE_FLAGS) for place, word in enumerate(words))


def main(words: Sequence[str]) -> int:
    """Run the planner with the launcher's flags in its terms; return its exit code. Raises LaunchError."""
    rest = list(words)
    rest.remove("plan")
    if "-h" in rest or "--help" in rest:
        print(HELP, flush=True)
        return run_planner(["--help"])
    return run_planner(planner_words(rest, os.environ))


def planner_words(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """--gpus-per-node becomes --ranks-per-node or --cpu; all other words stay as they are."""
    rest = list(words)
    gpus, ranks = take_number(rest, "--gpus-per-node"), take_number(rest, "--ranks-per-node")
    if gpus and ranks and gpus != ranks:
        raise LaunchError(f"--gpus-per-node {gpus} with --ranks-per-node {ranks}; a GPU serves one rank; leave one out")
    if gpus is None and ranks is None:
        gpus = len(gpu_ids(environment))
    layout = ["--ranks-per-node", str(ranks or gpus or 1)]
    return [*layout, *(["--cpu"] if not gpus and gpus is not None else []), *rest]


def take_number(words: list[str], flag: str) -> int | None:
    """Remove `flag N` or `flag=N` from the words; N, or None where the flag is not there."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name != flag:
            continue
        text = value if equals else words[place + 1] if place + 1 < len(words) else ""
        if not text.isdecimal():
            raise LaunchError(f"{flag} {text!r}; a whole number from 0 is needed; change {flag}")
        del words[place : place + (1 if equals else 2)]
        return int(text)
    return None


def run_planner(words: Sequence[str]) -> int:
    path = checkout_path(os.environ.get("PYTHONPATH"), ROOT)
    environment = {**os.environ, **({} if path is None else {"PYTHONPATH": path})}
    return subprocess.run([sys.executable, "-m", PLANNER, *words], env=environment, check=False).returncode
