"""Profiles of real runs: asked for by a setting and while they run; the weights are the same with and without."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.ranks import ROOT, finish, start_ranks
from tests.integration.tiny_run import arguments, make_shards, weights

pytestmark = pytest.mark.slow
LAUNCH = [sys.executable, str(ROOT / "cluster" / "launch.py")]
PATIENCE = 120.0
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("profile") / "data")


def train(world: int, data: Path, runs: Path, name: str, *more: str) -> Path:
    codes = finish(start_ranks(world, arguments(data, runs, name, *more), runs.parent / "logs" / name))
    assert not any(codes), (runs.parent / "logs" / name / "rank0.err").read_text()[-3000:]
    return runs / name


def marks(trace: Path) -> list[str]:
    """What the trace says was done, in order: updates and their phases."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    named = [event for event in events if event.get("cat") == "user_annotation" and ":" not in event["name"]]
    return [event["name"] for event in sorted(named, key=lambda event: event["ts"]) if "#" not in event["name"]]


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def test_a_profile_of_every_rank_changes_no_weight(data: Path, tmp_path: Path) -> None:
    plain = train(2, data, tmp_path / "runs", "plain")
    run = train(2, data, tmp_path / "runs", "profiled", "observe.profile=steps[3:6]", "observe.profile_all_ranks=true")
    assert equal(weights(plain, 10), weights(run, 10))
    for rank in range(2):
        base = run / "profile" / f"steps_00000003_00000006_rank{rank}"
        found = marks(base.with_suffix(".trace.json.gz"))
        assert [name for name in found if name.startswith("step")] == ["step 4", "step 5", "step 6"]
        assert {"data", "forward", "exchange", "backward", "optimizer"} <= set(found)
        memory = json.loads(base.with_suffix(".memory.json").read_text())
        assert memory["peak_bytes"] > 0 and memory["curve_us_bytes"] and memory["operators"]
        assert "aten::mm" in base.with_suffix(".operators.txt").read_text()
    told = (tmp_path / "logs" / "profiled" / "rank0.err").read_text()
    assert "profile of updates 3 to 6" in told and not (plain / "profile").exists()


def test_a_profile_holds_no_evaluation_and_ends_with_the_run(data: Path, tmp_path: Path) -> None:
    more = ("observe.profile=steps[5:40]", "evaluate.every_steps=7", "evaluate.baselines=false")
    run = train(1, data, tmp_path / "runs", "evaluates", *more)
    (trace,) = (run / "profile").glob("*.trace.json.gz")
    assert trace.name == "steps_00000005_00000007_rank0.trace.json.gz"
    run = train(1, data, tmp_path / "runs", "ends", "observe.profile=steps[8:40]")
    assert (run / "profile" / "steps_00000008_00000010_rank0.trace.json.gz").is_file()


def test_a_folder_that_cannot_be_written_is_a_warning(data: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "full").mkdir(parents=True)
    (tmp_path / "runs" / "full" / "profile").write_text("a file is in the way")
    run = train(1, data, tmp_path / "runs", "full", "observe.profile=steps[3:6]")
    told = (tmp_path / "logs" / "full" / "rank0.err").read_text()
    assert (run / "DONE").is_file() and told.count("has no profile") == 1 and "Traceback" not in told


def test_a_window_that_makes_no_sense_is_refused_in_a_line(data: Path, tmp_path: Path) -> None:
    for window in ("steps[6:3]", "steps[0:51]", "steps[3]", "10:20"):
        words = arguments(data, tmp_path / "runs", "refused", f"observe.profile={window}")
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 2 and f"observe.profile={window}; steps[a:b] is needed" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_live_run_is_profiled_by_a_command_and_goes_on(data: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = arguments(data, runs, "live", "optim.max_steps=1000000", "checkpoint.every_steps=1000000")[2:]
    with (tmp_path / "run.log").open("w") as log:
        command = [*LAUNCH, "--ranks-per-node", "2", "--gpus-per-node", "0", *words]
        run = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (runs / "live" / "metrics.jsonl").is_file():
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "run.log").read_text()[-3000:]
            time.sleep(0.2)
        for flags, ranks in ((["--steps", "3"], 1), (["--steps", "2", "--all-ranks"], 2)):
            done = profile(runs, "live", *flags)
            assert done.returncode == 0, done.stderr + (tmp_path / "run.log").read_text()[-2000:]
            trace, *others = map(Path, done.stdout.splitlines())
            assert len(others) == 2 and all(path.is_file() for path in (trace, *others))
            assert len([name for name in marks(trace) if name.startswith("step")]) == int(flags[1])
            while len(list(trace.parent.glob("*rank1.trace.json.gz"))) < ranks - 1:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        (runs / "live" / "profile" / "request").write_text("steps=many\n")
        while (runs / "live" / "profile" / "request").exists():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        refused = profile(runs, "live", "--steps", "0")
        assert refused.returncode == 2 and "--steps 0" in refused.stderr
        assert run.poll() is None, "it goes on"
    finally:
        run.terminate()
        assert run.wait(PATIENCE) == 75
    assert profile(runs, "live").returncode == 2  # a run that has ended
    assert "steps=many" in (tmp_path / "run.log").read_text()


def profile(runs: Path, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCH, "profile", name, "--runs", str(runs), *flags]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
