"""The command behind benchmarks.step, .decoder, .ssync and .srl: one shape, its paths side by side in one process.

A benchmark is a function that makes something ready to be called: Case -> call. Its command line comes in; a table, or one
JSON object, goes out. Memory is taken in a fresh process for each path, where nothing else has left its mark.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.case import HELP_PATHS, Case, add_shape_flags, case_of

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
Prepare = Callable[[Case], Callable[[], object]]
FRESH_TIMEOUT_S = 1800


def main(module: str, paths: Sequence[str], argv: Sequence[str] | None = None) -> int:
    """`module` has `prepare`; `paths` are those that it knows, the first one the fast one."""
    options = _parser(module, paths).parse_args(argv)
    prepare_environment(options.threads)
    chosen = options.path or list(paths)
    report = measure(module, [case_of(options, path) for path in chosen], options.steps, options.threads, options.no_memory)
    print(json.dumps(report) if options.json else _text(report), flush=True)
    return 0


def _parser(module: str, paths: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {module}", allow_abbrev=False)
    add_shape_flags(parser)
    parser.add_argument("--path", choices=paths, nargs="+", help=f"which of {', '.join(paths)} (default: all). {HELP_PATHS}")
    parser.add_argument("--steps", type=int, default=5, help="measured rounds, after one that does not count (default 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="more settings of the run")
    return parser


def prepare_environment(threads: int) -> None:
    """Before torch is imported. This is a single rank, whatever launcher variables are around."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("DS_BUILD_OPS", "0")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory; its own messages are of no use here
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def measure(module: str, cases: Sequence[Case], rounds: int, threads: int = 1, no_memory: bool = False) -> dict[str, Any]:
    """Figures of each case: {"machine", "shape", "cases": [...]}. Seconds are medians; rounds are interleaved."""
    import torch

    from benchmarks import machine

    torch.set_num_threads(threads)
    seconds = interleaved(importlib.import_module(module).prepare, cases, rounds)
    figures = []
    for case, (cpu, wall) in zip(cases, seconds, strict=True):
        memory = {} if no_memory else fresh_memory(module, case, threads)
        figures.append({"name": case.name, **asdict(case), "cpu_s": cpu, "wall_s": wall, **memory})
    return {"machine": machine.describe(threads, cases[0].device), "shape": cases[0].shape_text, "cases": figures}


def interleaved(prepare: Prepare, cases: Sequence[Case], rounds: int) -> list[tuple[float, float]]:
    """(CPU s, wall s) of each case, medians: in a round each is called once, so all of a round saw the same machine."""
    import torch

    from benchmarks.measure import Seconds, median_of, timed

    calls = [prepare(case) for case in cases]
    readings: list[list[Seconds]] = [[] for _ in cases]
    for number in range(rounds + 1):
        for call, case, taken in zip(calls, cases, readings, strict=True):
            reading = timed(call, torch.device(case.device))
            if number:
                taken.append(reading)
    medians = [median_of(taken) for taken in readings]
    return [(median.cpu, median.wall) for median in medians]


# glibc keeps small freed blocks for later; with these it gives every large one back, so that resident memory is what is in use
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def fresh_memory(
    module: str, case: Case, threads: int = 1, *, give_back: bool = False, calls: int = 2, resident_only: bool = False
) -> dict[str, float | None]:
    """Peak memory above parameters and inputs, by a process of its own. Units: MiB. `give_back`: see GIVE_BACK."""
    command = [sys.executable, "-m", "benchmarks.fresh", module, case.to_json(), str(threads), str(calls)]
    environment = os.environ | (GIVE_BACK if give_back else {})
    words = [*command, *(["resident"] if resident_only else [])]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=FRESH_TIMEOUT_S, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{module} {case.name} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def small(case: Case) -> Case:
    """The same code on next to nothing: what it loads and sets up once is then no part of a measurement."""
    return replace(case, batch=1, frames=min(case.frames, 2), patches=16, width=32, hidden=64, slots=min(case.slots, 4))


def _text(report: dict[str, Any]) -> str:
    from benchmarks import machine
    from benchmarks.table import Row, render

    first = report["cases"][0]
    rows = []
    for one in report["cases"]:
        ratios = [f"{one['cpu_s'] / first['cpu_s']:.2f}x the time"] if one is not first else []
        if one is not first and one.get("tensors_mib"):
            ratios.append(f"{one['tensors_mib'] / first['tensors_mib']:.1f}x the tensors")
        rows.append(
            Row(
                section=report["shape"],
                name=one["name"],
                cpu_ms=one["cpu_s"] * 1e3,
                wall_ms=one["wall_s"] * 1e3,
                peak_mib=one.get("resident_mib") or one.get("tensors_mib"),
                beside=", ".join(ratios + ([f"tensors {one['tensors_mib']:.1f} MiB"] if "tensors_mib" in one else [])),
            )
        )
    return f"{machine.line(report['machine'])}\n{render(rows)}"
