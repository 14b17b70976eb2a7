"""What recording costs a step: the trainer's own observer, on and off in turns, in one process. Settings in, rows out.

python -m benchmarks.observe_cost [--shape demo] [--pairs 300]

Of each two updates one is recorded as a run does it by default: counters and histograms for Prometheus, each 50th time a line of
metrics.jsonl and of the console. Scrapes come from another process, one each 5 s of updates, as prometheus.yml has it. Figures
are CPU time of all threads of this process, which does its arithmetic in one.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

from benchmarks.shapes import QUICK, SHAPES, Shape, compose_run
from benchmarks.table import Row, render

ASKED = 0.005  # share of a step
LOG_EVERY = 50  # the trainer's default
SCRAPE_EVERY_S = 5.0
WARM_UP = 4
# reads a line, asks once, answers with a line
SCRAPER = """import sys, urllib.request
for _ in sys.stdin:
    print(len(urllib.request.urlopen(sys.argv[1]).read()), flush=True)"""


class Cost(NamedTuple):
    """CPU seconds. `plain`, `recorded`: of updates; `recording`: of the recording in each recorded one; `scrapes`: each."""

    plain: list[float]
    recorded: list[float]
    recording: list[float]
    scrapes: list[float]
    walls: list[float]  # of plain updates


def rows(shape: Shape, name: str, pairs: int) -> list[Row]:
    """Medians of updates; of recording the mean, log lines and scrapes with it, over the mean plain update."""
    cost = measure(shape, pairs)
    plain = statistics.fmean(cost.plain)
    scrape = statistics.fmean(cost.scrapes)
    per_update = statistics.fmean(cost.recording) + scrape * statistics.fmean(cost.walls) / SCRAPE_EVERY_S
    pair = [one - other for one, other in zip(cost.recorded, cost.plain, strict=True)]
    error = statistics.stdev(pair) / len(pair) ** 0.5 / plain
    share = per_update / plain
    lines = sorted(cost.recording)[-max(1, len(cost.recording) // LOG_EVERY) :]
    section = f"recording, {name}: {pairs} updates with and {pairs} without, in turns, one thread"
    verdict = f"asked < {100 * ASKED:g} %: {'yes' if share < ASKED else 'NO'}"
    ratio = 1 + statistics.median(pair) / statistics.median(cost.plain)
    return [
        Row(section=section, name="update without recording", cpu_ms=1e3 * statistics.median(cost.plain),
            wall_ms=1e3 * statistics.median(cost.walls)),
        Row(section=section, name="update with recording", cpu_ms=1e3 * statistics.median(cost.recorded), ratio=ratio,
            beside=f"{100 * (ratio - 1):+.2f} % by the median pair; a mean of pairs is known to {100 * error:.2f} %"),
        Row(section=section, name="recording alone, with its share of all below", cpu_ms=1e3 * per_update, share=share,
            beside=verdict),
        Row(section=section, name=f"  a log line, each {LOG_EVERY}th update", cpu_ms=1e3 * statistics.median(lines)),
        Row(section=section, name=f"  a scrape, each {SCRAPE_EVERY_S:g} s", cpu_ms=1e3 * scrape),
    ]  # fmt: skip


def measure(shape: Shape, pairs: int) -> Cost:
    import torch

    from benchmarks.step_cost import feature_batch
    from data_pipeline.order import World
    from trainer import distributed
    from trainer.build import build_model, build_objective
    from trainer.config import ParallelConfig
    from trainer.engine import Engine
    from trainer.observe.observer import Observer
    from trainer.step import train_step

    device = torch.device("cpu")
    run = compose_run(shape)
    run.observe.log_every = LOG_EVERY
    distributed.start(device, 120)
    engine = Engine(build_model(run.model, seed=0), run.optim, ParallelConfig(device="cpu"), device)
    objective, batch, loader = build_objective(run), feature_batch(run, shape), _Loader()
    cost = Cost([], [], [], [], [])
    with tempfile.TemporaryDirectory() as folder:
        observer = Observer(run, World(0, 1), Path(folder), attempt=1)
        observer.console.stream = io.StringIO()
        observer.started(0, loader, 1)  # type: ignore[arg-type]
        assert observer.exporter is not None
        scraper = _Scraper(f"http://{observer.exporter.server.target}/metrics")
        try:
            for step in range(1, 2 * (pairs + WARM_UP) + 1):
                recorded, counts = step % 4 in (2, 3), step > 2 * WARM_UP  # ABBA: neither is always the second
                began, wall = time.process_time(), time.perf_counter()
                report = train_step(engine, objective, batch, [shape.clips], step, lr=run.optim.lr)
                between = time.process_time()
                if recorded:
                    observer.stepped((step + 1) // 2, report, batch, 0.001, run.optim.lr, engine, loader)  # type: ignore[arg-type]
                ended = time.process_time()
                if counts:
                    (cost.recorded if recorded else cost.plain).append(ended - began)
                    (cost.recording if recorded else cost.walls).append(
                        ended - between if recorded else time.perf_counter() - wall
                    )
            for _ in range(20):
                began = time.process_time()
                scraper.scrape()
                cost.scrapes.append(time.process_time() - began)
        finally:
            scraper.close()
            observer.close()
    return cost


class _Loader:
    """What the observer asks a loader."""

    position, skipped = 0, 0

    def __init__(self) -> None:
        from data_pipeline.shard_files import FileCounters

        self.file_counters = FileCounters()
        self.skip_reasons: dict[str, str] = {}
        self.dataset = type("Dataset", (), {"__len__": lambda self: 1, "index": SimpleNamespace(shards=[])})()

    def queue_depth(self) -> int:
        return 2


class _Scraper:
    """A process that asks for the metrics when it is told to: its own work is not counted here."""

    def __init__(self, url: str) -> None:
        words = [sys.executable, "-c", SCRAPER, url]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.scrape()

    def scrape(self) -> None:
        to, back = _pipes(self._process)
        to.write("\n")
        to.flush()
        if not back.readline():
            raise RuntimeError("the scraper has died; see above")

    def close(self) -> None:
        to, back = _pipes(self._process)
        to.close()
        self._process.wait()
        back.close()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.observe_cost", allow_abbrev=False)
    parser.add_argument("--shape", choices=[*SHAPES, "quick"], default="demo", help="default: demo, the shortest update of all")
    parser.add_argument("--pairs", type=int, default=300, help="updates with and without recording, each (default 300)")
    options = parser.parse_args(argv)
    if options.pairs < 2:
        parser.error(f"--pairs={options.pairs}; it must be at least 2")
    from benchmarks.single import prepare_environment

    prepare_environment(1)
    import torch

    from benchmarks import machine

    torch.set_num_threads(1)
    shape = QUICK if options.shape == "quick" else SHAPES[options.shape]
    found = rows(shape, options.shape, options.pairs)
    print(f"{machine.line(machine.describe(1, 'cpu'))}\n")
    print(render(found), flush=True)
    share: Any = found[2].share
    return 0 if share < ASKED or options.shape == "quick" else 1


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # as the trainer's ranks end: gloo's threads now and then abort the interpreter's teardown
