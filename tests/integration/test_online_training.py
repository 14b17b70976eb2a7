"""Training on frames, with the extractor in the loop, is training on the features that it would have stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build import build, compose_build
from tests.integration.ranks import finish, start_ranks
from tests.integration.tiny_run import arguments, lines, losses, weights

STEPS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Pictures as png and patch features as float32, so that both ways start from the same numbers."""
    out = tmp_path_factory.mktemp("data") / "shards"
    words = "source=synthetic source.num_train=6 source.num_validation=2 source.num_frames=6 source.image_size=32 features=patch "
    words += "features.num_random=8 features.num_components=4 features.num_fit_clips=3 samples_per_shard=2 workers=1 "
    words += "codec=float32 frames=png"
    build(compose_build([*words.split(), f"out={out}"]))
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


SLOW_READS = """
import sys, time
from data_pipeline.store import ShardDataset
read = ShardDataset.read_features
ShardDataset.read_features = lambda *arguments: (time.sleep(0.05), read(*arguments))
from trainer.main import main
from trainer.process import run_as_rank
run_as_rank(main)
"""


def train(shards: Path, runs: Path, name: str, world: int, *more: str, expect: int = 0, script: str = "") -> str:
    sized = ("data.features=patch", "data.layer=slow", "data.image_size=32", "model.feature_dim=10", "model.grid=[4,4]")
    ended = (f"optim.max_steps={STEPS}", "evaluate.at_end=true", "evaluate.baselines=false", "objective.ssync.start_fraction=0.3")
    logs = runs / "logs" / name
    command = arguments(shards, runs, name, *sized, *ended, *more)
    codes = finish(start_ranks(world, ["-c", script, *command[2:]] if script else command, logs))
    errors = "\n".join((logs / f"rank{rank}.err").read_text()[-2000:] for rank in range(world))
    assert codes == [expect] * world, f"{codes}\n{errors}"
    return errors


def scores(run: Path) -> dict[str, float]:
    return {key: value for line in lines(run / "metrics.jsonl") for key, value in line.items() if key.startswith("metric/")}


@pytest.fixture(scope="module")
def stored(shards, runs) -> Path:
    train(shards, runs, "stored", 1)
    return runs / "stored"


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1)])
def test_the_same_losses_scores_and_weights(stored, shards, runs, world, accumulation):
    name = f"frames{world}"
    train(shards, runs, name, world, "data.input=frames", f"parallel.accumulation={accumulation}", "checkpoint.keep=3")
    mine, theirs = losses(runs / name), losses(stored)
    assert mine.keys() == theirs.keys() == set(range(1, STEPS + 1))
    assert all(abs(mine[step] - theirs[step]) <= 1e-5 * abs(theirs[step]) for step in mine)
    assert scores(runs / name) == pytest.approx(scores(stored), abs=1e-3)
    states = [json.loads(next((run / "checkpoints").glob("*3/state.json")).read_text())["train"] for run in (runs / name, stored)]
    assert states[0]["features"] == states[1]["features"] != ""


def test_a_run_goes_on_with_the_same_extractor_or_not_at_all(shards, runs):
    """After step 2 of 3: bit for bit as if nothing had happened; another projection is refused."""
    whole, same = runs / "frames1", ("data.input=frames", "parallel.accumulation=2", "checkpoint.keep=3")
    if not whole.is_dir():
        train(shards, runs, whole.name, 1, *same)
    for name in ("resumed", "other"):
        shutil.copytree(whole, runs / name)
        shutil.rmtree(runs / name / "checkpoints" / "step_00000003")
        (runs / name / "DONE").unlink()
    train(shards, runs, "resumed", 1, *same)
    assert losses(runs / "resumed") == losses(whole)
    for name, value in weights(whole, STEPS).items():
        assert np.array_equal(weights(runs / "resumed", STEPS)[name], value), name
    other = runs / "elsewhere"
    words = "source=synthetic source.num_train=2 source.num_validation=1 source.num_frames=2 source.image_size=32 features=patch "
    words += "features.num_random=8 features.num_components=4 features.num_fit_clips=2 features.seed=1 workers=1"
    build(compose_build([*words.split(), f"out={other}"]))
    said = train(shards, runs, "other", 1, *same, f"data.online.weights={other}", expect=2)
    assert "makes features with fingerprint" in said and "data.online.weights" in said


def test_a_checkpoint_is_scored_on_frames_as_on_features(stored, shards, tmp_path, capsys):
    from trainer.evaluate import main

    found = {}
    for kind in ("features", "frames"):
        main([f"run={stored}", f"input={kind}", "baselines=true", "device=cpu", f"out={tmp_path / kind}.json"])
        found[kind] = json.loads((tmp_path / f"{kind}.json").read_text())
    capsys.readouterr()
    assert found["frames"]["scores"] == pytest.approx(found["features"]["scores"], abs=1e-3)
    assert found["frames"]["baselines"]["k_means"] == pytest.approx(found["features"]["baselines"]["k_means"], abs=1e-2)


def times(run: Path) -> tuple[list[float], list[float]]:
    """Of every step in the run log: milliseconds of the whole step, and of its wait for data."""
    logged = [line for line in lines(run / "metrics.jsonl") if "time/step_ms" in line]
    return [line["time/step_ms"] for line in logged], [line["time/data_wait_ms"] for line in logged]


def test_the_run_log_says_how_long_steps_waited_for_a_slow_reader(stored, shards, runs):
    """Four reads of 50 ms a step, by one thread: what the steps' own work does not cover is waited for."""
    settings = ("data.read_threads=1", "checkpoint.every_steps=100", "evaluate.at_end=false")
    train(shards, runs, "slow", 1, *settings, script=SLOW_READS)
    whole, waits = times(runs / "slow")
    assert len(waits) == STEPS and sum(waits) >= 4 * 50 * STEPS - (sum(whole) - sum(waits))
    assert np.median(times(stored)[1]) < np.median(waits)
