"""A run that was stopped, killed or damaged goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.integration.ranks import ROOT, finish, start_ranks
from tests.integration.tiny_run import applied_ids, arguments, lines, losses, make_shards, moments, weights, write_split


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def whole(request, data, tmp_path_factory):
    """An undisturbed run of ten steps: (world size, runs folder)."""
    runs = tmp_path_factory.mktemp(f"runs{request.param}")
    run_to_end(request.param, data, runs, "whole", runs / "logs")
    return request.param, runs


def run_to_end(world: int, data: Path, runs: Path, name: str, logs: Path, *more: str, expect: int = 0) -> str:
    codes = finish(start_ranks(world, arguments(data, runs, name, *more), logs))
    errors = "\n".join((logs / f"rank{rank}.err").read_text()[-2000:] for rank in range(world))
    assert codes == [expect] * world, f"{codes}\n{errors}"
    return errors


def assert_same_end(runs: Path, world: int, name: str) -> None:
    """Weights, moments, losses and sample ids bit for bit those of the undisturbed run."""
    for read in (weights, moments):
        one, other = read(runs / "whole", 10), read(runs / name, 10)
        assert one.keys() == other.keys()
        for key in one:
            assert np.array_equal(one[key], other[key]), key
    assert losses(runs / name) == losses(runs / "whole")
    assert applied_ids(runs / name, world) == applied_ids(runs / "whole", world)
    assert (runs / name / "DONE").is_file()


def test_stop_at_five_and_go_on(whole, data, tmp_path):
    """SIGTERM to one rank: all save at one step boundary and leave with 75; the second attempt ends as if there had been one."""
    world, runs = whole
    # a log line after each step lets the test see step 5 come; the slow validation-free run has no other pause
    processes = start_ranks(world, arguments(data, runs, "stopped"), tmp_path)
    wait_for_step(runs / "stopped", 4, processes)
    processes[-1].send_signal(signal.SIGTERM)
    codes = finish(processes)
    assert codes in ([75] * world, [0] * world)  # 0: the ten steps were over before the signal arrived
    run_to_end(world, data, runs, "stopped", tmp_path / "again")
    assert_same_end(runs, world, "stopped")


def test_a_stop_request_ends_the_last_evaluation_too(whole, data, tmp_path):
    """Scoring at 3000 pixels takes long; all ranks leave it between two videos, and the next attempt does it from the start."""
    world, runs = whole
    more = ["evaluate.at_end=true", "evaluate.mask_size=3000", "evaluate.baselines=false"]
    processes = start_ranks(world, arguments(data, runs, "scoring", *more), tmp_path)
    wait_for_step(runs / "scoring", 10, processes)
    processes[0].send_signal(signal.SIGTERM)
    assert finish(processes) == [75] * world
    assert not (runs / "scoring" / "DONE").exists()
    run_to_end(world, data, runs, "scoring", tmp_path / "again", "evaluate.at_end=true", "evaluate.baselines=false")
    assert_same_end(runs, world, "scoring")


def test_an_evaluation_that_was_cut_off_is_made_up_for(whole, data, tmp_path):
    """Save and evaluation fall due at step 5; the run is stopped in the evaluation, and goes on from that very step."""
    world, runs = whole
    more = ["evaluate.every_steps=5", "checkpoint.every_steps=5", "evaluate.baselines=false"]
    processes = start_ranks(world, arguments(data, runs, "scores", *more, "evaluate.mask_size=3000"), tmp_path)
    wait_for_step(runs / "scores", 5, processes)
    processes[0].send_signal(signal.SIGTERM)
    assert finish(processes) == [75] * world
    assert not scored(runs / "scores")
    run_to_end(world, data, runs, "scores", tmp_path / "again", *more)
    assert scored(runs / "scores") == [5]
    assert_same_end(runs, world, "scores")


def scored(run: Path) -> list[int]:
    return [line["step"] for line in lines(run / "metrics.jsonl") if "evaluate/seconds" in line]


def test_five_and_five_equal_ten(whole, data, tmp_path):
    world, runs = whole
    run_to_end(world, data, runs, "halves", tmp_path / "a", "checkpoint.every_steps=5")
    for path in (runs / "halves" / "checkpoints").glob("step_00000010*"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (runs / "halves" / "DONE").unlink()
    run_to_end(world, data, runs, "halves", tmp_path / "b", "checkpoint.every_steps=5")
    assert_same_end(runs, world, "halves")


@pytest.mark.parametrize("delay", [0.02, 0.11, 0.23])
def test_kill_nine_at_any_moment(whole, data, tmp_path, delay):
    """SIGKILL to every rank some time after the first checkpoint, again and again until the run gets through."""
    world, runs = whole
    name = f"killed_{delay}"
    for attempt in range(2):
        processes = start_ranks(world, arguments(data, runs, name), tmp_path / str(attempt))
        wait_for_step(runs / name, 1 + 3 * attempt, processes)
        time.sleep(delay)
        for process in processes:
            process.kill()
        finish(processes)
    run_to_end(world, data, runs, name, tmp_path / "last")
    assert_same_end(runs, world, name)


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen], timeout: float = 60) -> None:
    """Until the checkpoint of `step` (or a later one) is published, or a rank has ended."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and all(process.poll() is None for process in processes):
        if any(int(path.name[5:]) >= step for path in (run / "checkpoints").glob("step_????????")):
            return
        time.sleep(0.005)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(whole, data, tmp_path):
    world, runs = whole
    run_to_end(world, data, runs, "damaged", tmp_path / "a")
    newest = runs / "damaged" / "checkpoints" / "step_00000010" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(bytes(content))
    said = run_to_end(world, data, runs, "damaged", tmp_path / "b")
    assert "step_00000010 does not verify" in said and "sha256" in said
    assert_same_end(runs, world, "damaged")
    assert (runs / "damaged" / "checkpoints" / "step_00000010.set_aside_1").is_dir()


def test_another_world_size_goes_on(whole, data, tmp_path):
    """Half a run on one number of ranks and ZeRO stage, half on others: the same order of samples, losses within rounding."""
    world, runs = whole
    other = 3 - world
    processes = start_ranks(world, arguments(data, runs, "resized"), tmp_path / "a")
    wait_for_step(runs / "resized", 4, processes)
    for process in processes:
        process.kill()
    finish(processes)
    run_to_end(other, data, runs, "resized", tmp_path / "b", "parallel.zero_stage=3")
    one, two = losses(runs / "whole"), losses(runs / "resized")
    assert one.keys() == two.keys()
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-3)


def single(data: Path, runs: Path, name: str, *more: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return subprocess.run(
        [sys.executable, *arguments(data, runs, name, *more)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """A run of three steps by one process without any launcher."""
    runs = tmp_path_factory.mktemp("begun")
    result = single(data, runs, "run", "optim.max_steps=3")
    assert result.returncode == 0, result.stderr
    return runs


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["optim.lr=0.1"], ["optim.lr=0.1", "begun with 0.004", "another name"]),
        (["model.num_slots=5"], ["model.num_slots=5", "begun with 4"]),
        (["seed=3"], ["seed=3", "begun with 0"]),
    ],
)
def test_other_settings_in_a_begun_run_are_refused(begun, data, more, words):
    before = sorted(path.stat().st_mtime_ns for path in (begun / "run" / "checkpoints").rglob("*"))
    result = single(data, begun, "run", "optim.max_steps=3", *more)
    assert_one_line(result, words)
    assert before == sorted(path.stat().st_mtime_ns for path in (begun / "run" / "checkpoints").rglob("*"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["data.root=/nowhere/at/all"], ["/nowhere/at/all", "data.root"]),
        (["optim.lrr=1"], ["optim.lrr", "optim.lr"]),
        (["optim.lr=much"], ["optim.lr=much"]),
        (["data.features=dinov2_vits14"], ["dinov2_vits14", "fake"]),
        (["data.layer=keys"], ["keys", "last_block"]),
        (["model.feature_dim=6"], ["model.feature_dim=6", "width 5"]),
        (["model.grid=[3,3]"], ["model.grid=[3, 3]", "[2, 3]"]),
        (["data.clip_len=99"], ["data.clip_len=99"]),
        (["parallel.device=cuda"], ["parallel.device=cuda", "cpu"]),
        (["evaluate.maps=[alpha]"], ["alpha", "object"]),
        (["evaluate.at_end=true", "data.val_split=test"], ["test", "data.root"]),
    ],
)
def test_a_users_mistake_is_one_line(data, tmp_path, more, words):
    result = single(data, tmp_path, "mistake", *more)
    assert_one_line(result, words)
    assert not list(tmp_path.rglob("step_*"))


def assert_one_line(result: subprocess.CompletedProcess, words: list[str]) -> None:
    assert result.returncode == 2, result.stderr
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in told[0], told[0]


def test_checkpoints_none_of_which_verifies_stop_the_run(begun, data, tmp_path):
    shutil.copytree(begun / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step_*/model.safetensors"):
        path.write_bytes(b"")
    result = single(data, tmp_path, "run", "optim.max_steps=3")
    assert result.returncode == 1
    assert "none of 2 checkpoints" in result.stderr and "left as they are" in result.stderr


def test_the_run_folder_explains_itself(begun):
    run = begun / "run"
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["seed"] == 0 and provenance["world_size"] == 1 and provenance["versions"]["torch"]
    assert "optim.max_steps=3" in provenance["command"]
    assert (run / "config.yaml").is_file() and (run / "metrics.jsonl").is_file() and (run / "DONE").is_file()
    assert {path.name for path in (run / "checkpoints").glob("step_*")} == {"step_00000002", "step_00000003"}


def test_validation_features_of_another_extractor_are_refused_before_the_first_step(tmp_path):
    root = tmp_path / "data"
    write_split(root, "train", frames=((4, 6), (8,)))
    write_split(root, "validation", frames=((4,),), fingerprint="e" * 64)
    result = single(root, tmp_path, "mixed", "evaluate.at_end=true")
    assert_one_line(result, ["fingerprint", "eeeeeeeeeeee", "ffffffffffff", "one command"])


def test_a_run_that_blows_up_keeps_a_checkpoint_that_works(data, tmp_path):
    """Weights may be finite and dead all the same: the checkpoint before them is named, and still there with keep=1."""
    more = ["optim.lr=1e30", "checkpoint.keep=1", "optim.warmup_steps=0"]
    result = single(data, tmp_path, "blown", *more)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    told = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    good = re.search(r"last good checkpoint: step (\d+)", told)
    there = {int(path.name[5:]) for path in (tmp_path / "blown" / "checkpoints").glob("step_*")}
    assert "not finite" in told and (not good or int(good[1]) in there), (told, there)
    again = single(data, tmp_path, "blown", *more)
    assert again.returncode == 1 and "Traceback" not in again.stderr, again.stderr


def test_shards_may_move_between_attempts(begun, data, tmp_path):
    shutil.copytree(data, tmp_path / "moved")
    shutil.copytree(begun / "run", tmp_path / "run")
    result = single(tmp_path / "moved", tmp_path, "run", "optim.max_steps=3", "data.prefetch_steps=3")
    assert result.returncode == 0, result.stderr
    assert "going on from checkpoint of step 3" in result.stderr
