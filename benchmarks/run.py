"""Command: measure the parts of Slotstream on this machine and print one table. `python benchmarks/run.py`, or `make bench`.

Comes in: a shape by name. Goes out: the table on stdout, and the same figures as JSON with --json. Nothing else is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # as a script: this folder's modules are benchmarks.*, and shadow nobody else's

from benchmarks.shapes import QUICK, SHAPES, Shape, compose_run  # noqa: E402
from benchmarks.single import prepare_environment  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.table import Row

# parts of the table, in its order; those of benchmarks/targets.py and growth are left out of --quick unless asked for
OWN_SECTIONS = ("parts", "memory", "selection", "loader", "recording", "ranks")
TARGET_SECTIONS = ("decoder", "step", "ssync", "srl", "long_clip", "plan")
SECTIONS = (*TARGET_SECTIONS, "growth", *OWN_SECTIONS)

NOTES = """\
Each figure is a median of {steps} rounds after a warm-up; a step's shares are of {share_of}, means over the rounds.
CPU ms: processor time of all threads of the process. wall ms: elapsed time, which other programs on the machine lengthen.
training step: the trainer's own step (trainer.step.train_step) under DeepSpeed ZeRO-{stage}, {precision}, on random features.
  The frozen backbone is no part of it: its features come from shards. SSync's losses are on. "rest" is what no row claims:
  DeepSpeed's own work, agreeing on the loss counts, the host's one read, slot contrast's gradient with respect to the slots.
tensors: the most that torch's allocator held at once, exact, touched or not. Resident memory has besides what libraries use
  as scratch space and what the allocator keeps.
SSync alone: selection, both losses and their gradient with respect to the two logit maps; both maps are there before.
published code: constants, not measured in this run (benchmarks/published.py); seconds are multiplied by how much longer the
  decoder in its released form takes here and now.
loading: {videos} videos of six clips, features only, just written (page cache, no disk). ClipLoader reads a clip's window with
  {threads} threads and checks CRC-32C; webdataset reads and decodes whole videos in one thread and checks nothing; the copy is
  a memcpy of the same bytes of the shards into as many batches. Ratios to the copy are of speed, to webdataset of CPU time.
recording: every second update is recorded as a run does it by default, metrics, log lines, scrapes from another process
  (benchmarks/observe_cost.py)."""
CUDA_NOTE = "\nThe device is waited for at the ends of each part: parts that could overlap do not."


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/run.py",
        description="Measure a training step by part, its memory, SSync's memory as clips grow, the loader, a second rank.",
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="movi_c_small", help="widths and grid (default: movi_c_small, MOVi-C at 224 pixels)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--steps", type=int, default=7, help="measured rounds of each figure (default: 7)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: shows that it runs, figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="PART", help=f"parts of the table: {', '.join(SECTIONS)}")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="also write the figures there, as JSON and Markdown by date and CPU"
    )
    parser.add_argument("--no-ranks", action="store_true", help="leave out the rows that start other processes")
    options = parser.parse_args(argv)
    for name in ("threads", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}; it must be at least 1")
    if options.results and not options.results.is_dir():
        parser.error(f"--results={options.results}; no such folder; make it first")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json={options.json}; its folder does not exist; make it first")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    prepare_environment(options.threads)
    report = measure_all(options)
    from benchmarks import machine
    from benchmarks.table import render

    print(f"{machine.line(report['machine'])}\nshape {report['shape']}\n")
    print(render(report["rows"]))
    print(f"\n{report['notes']}", flush=True)
    if options.json:
        plain = report | {"rows": [asdict(row) for row in report["rows"]], "notes": report["notes"].splitlines()}
        options.json.write_text(json.dumps(plain, indent=1) + "\n")
    if options.results:
        from benchmarks.results_files import write

        write(options.results, report, options.steps)
    return 0


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, one part after the other, so that none disturbs another."""
    import torch

    from benchmarks import loader_cost, machine, observe_cost, rank_cost, ssync_cost, step_cost

    torch.set_num_threads(options.threads)
    shape = QUICK if options.quick else SHAPES[options.shape]
    steps = 2 if options.quick else options.steps
    chosen = set(options.only or (OWN_SECTIONS if options.quick else SECTIONS)) - ({"ranks"} if options.no_ranks else set())
    run = compose_run(shape)
    rows: list[Row] = []
    _say("parts of a training step")
    step = step_cost.StepUnderTest(run, shape, options.device)
    about = machine.describe(options.threads, step.device.type)
    if device_is_cpu := step.device.type == "cpu":
        from benchmarks import growth, targets

        rows += targets.rows([name for name in TARGET_SECTIONS if name in chosen], steps, _say)
    if device_is_cpu and "growth" in chosen:
        _say("growth")
        rows += growth.rows(steps)
    if "parts" in chosen:
        rows += step_cost.time_rows(step, steps)
    if "memory" in chosen:
        _say("memory of a step")
        rows += step_cost.memory_rows(step)
    device, precision = step.device, step.engine.precision
    del step
    if "selection" in chosen:
        _say("SSync alone")
        rows += ssync_cost.rows(run.objective, run.model.num_slots, shape, steps, device)
    if "loader" in chosen:
        _say("loader")
        rows += loader_cost.rows(shape, run.model.feature_dim, steps)
    if "recording" in chosen and device.type == "cpu":
        _say("recording")
        name = "quick" if options.quick else "demo"  # the shortest update of all: what recording takes is the same for every one
        rows += observe_cost.rows(QUICK if options.quick else SHAPES[name], name, 30 * steps)
    if "ranks" in chosen:
        _say("ranks")
        rows += rank_cost.rows(5 * steps, run.parallel.zero_stage)
    return {
        "machine": about,
        "shape": _shape_text("quick" if options.quick else options.shape, run, shape),
        "rows": rows,
        "notes": _notes(run, shape, device.type, precision, steps),
    }


def _notes(run: Any, shape: Shape, device: str, precision: str, steps: int) -> str:
    cuda = device == "cuda"
    return NOTES.format(
        steps=steps,
        share_of="wall time" if cuda else "CPU time",
        stage=run.parallel.zero_stage,
        precision=precision,
        videos=shape.loader_videos,
        threads=run.data.read_threads,
    ) + (CUDA_NOTE if cuda else "")


def _shape_text(name: str, run: Any, shape: Shape) -> str:
    model = run.model
    return (
        f"{name}: B={shape.clips} T={shape.frames} P={model.grid[0]}x{model.grid[1]} E={model.feature_dim} S={model.num_slots} "
        f"D={model.slot_dim} decoder {'-'.join(map(str, model.decoder_hidden))}"
    )


def _say(what: str) -> None:
    """Progress, only where a person watches."""
    if sys.stderr.isatty():
        print(f"measuring: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    parse(sys.argv[1:])  # --help and misspelt options are answered before anything heavy is imported
    from data_pipeline.compose import run_command

    code = run_command(main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as the trainer's ranks end: gloo's threads now and then abort the interpreter's teardown
