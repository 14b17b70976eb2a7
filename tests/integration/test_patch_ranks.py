"""Ranks that share the patches of the same clips change nothing of the mathematics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.integration.ranks import finish, run_ranks, start_ranks
from tests.integration.tiny_run import applied_ids, arguments, losses, make_shards

SAME_AS_PLAIN_RUN = {"in two parts": "updates", "frames again": "updates"}  # another way to the same numbers
SCENARIOS = {
    "updates": {},
    "plain decoder": {"path": "plain"},
    "merged by the decoder": {"merged_by": "D", "border": "ignore"},
    "a row each": {"grid": (4, 3)},
    "clips for one group": {"global_batch": 1},
    "in two parts": {"accumulation": 2},
    "frames again": {"model": {"recompute_frames": 2}},
    "ZeRO-0": {"stage": 0},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
}
WORLDS = {"2 ranks": (2, 2), "4 ranks": (4, 4), "2 groups of 2 ranks": (4, 2)}  # ranks, ranks of a group
ON_FOUR = ("updates", "merged by the decoder", "a row each")  # the others say nothing new there


def is_run(world: str, name: str) -> bool:
    """Not everything everywhere: DeepSpeed takes long to start."""
    if name.startswith("ZeRO"):
        return world == "2 groups of 2 ranks"
    return world != "4 ranks" or name in ON_FOUR


def run_all(ranks: int, scenarios: dict[str, dict], folder: Path) -> dict[str, dict]:
    results = run_ranks(ranks, ["-m", "tests.integration.patch_worker", json.dumps(scenarios)], folder)
    for result in results[1:]:
        for name, found in result.items():
            assert found["weights"] == results[0][name]["weights"], f"{name}: ranks must hold the same weights"
    return results[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    wanted = {name: options for name, options in SCENARIOS.items() if name not in SAME_AS_PLAIN_RUN}
    return run_all(1, wanted, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[tuple[str, str], dict]:
    found = {}
    for ranks in (2, 4):
        wanted = {
            f"{world}/{name}": {**options, "patch_ranks": patch_ranks}
            for world, (size, patch_ranks) in WORLDS.items()
            for name, options in SCENARIOS.items()
            if size == ranks and is_run(world, name)
        }
        for key, result in run_all(ranks, wanted, tmp_path_factory.mktemp(f"over_{ranks}")).items():
            world, name = key.split("/")
            found[world, name] = result
    return found


def test_the_reference_merges_slots_and_chooses_patches_in_every_row(alone):
    """So also beside every cut between two bands."""
    for name in ("updates", "merged by the decoder"):
        assert alone[name]["merged"] > 0
        assert min(alone[name]["boundary"]) > 0 and min(alone[name]["interior"]) > 0
        assert set(alone[name]["terms"][2]) == {"feature_reconstruction", "slot_contrast", "ssync_boundary", "ssync_interior"}
        assert all(value > 0 for value in alone[name]["terms"][2].values())


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in WORLDS for name in SCENARIOS if is_run(world, name)])
def test_shared_patches_change_nothing(alone, shared, world, name):
    """Terms, gradient norms and weights of three updates; the first weight update carries every gradient."""
    one, other = alone[SAME_AS_PLAIN_RUN.get(name, name)], shared[world, name]
    tolerance = 1e-6 if name.startswith("ZeRO") else 1e-10
    for first, second in zip(one["terms"], other["terms"], strict=True):
        assert second == pytest.approx(first, rel=tolerance, abs=tolerance)
    assert other["norms"] == pytest.approx(one["norms"], rel=1e-5 if name.startswith("ZeRO") else 1e-10)
    assert other["weights"].keys() == one["weights"].keys()
    for key, values in one["weights"].items():
        assert other["weights"][key] == pytest.approx(values, abs=tolerance), key


def test_ranks_that_read_different_clips_stop_before_the_update(tmp_path):
    scenarios = {"stray": {"patch_ranks": 2, "stray": 1}}
    codes = finish(start_ranks(2, ["-m", "tests.integration.patch_worker", json.dumps(scenarios)], tmp_path))
    assert all(codes)
    for rank in range(2):
        assert (
            "ranks that share clips read different ones at step 0; nothing was updated"
            in (tmp_path / f"rank{rank}.err").read_text()
        )


def test_a_run_goes_on_where_ranks_share_nothing(tmp_path):
    """Ten updates by two ranks that share clips, the last five again by one rank: the same clips, losses within rounding."""
    data, run = make_shards(tmp_path / "data"), tmp_path / "runs" / "shared"

    def train(ranks: int) -> None:
        words = arguments(data, tmp_path / "runs", "shared", "checkpoint.every_steps=5", f"parallel.patch_ranks={ranks}")
        codes = finish(start_ranks(ranks, words, tmp_path / f"logs{ranks}"))
        assert codes == [0] * ranks, (tmp_path / f"logs{ranks}" / "rank0.err").read_text()[-2000:]

    train(2)
    assert [path.name for path in (run / "order").iterdir()] == ["rank0.jsonl"], "the first of a group speaks for all"
    first_losses, first_ids = losses(run), applied_ids(run, 1)
    assert all(len(ids) == 4 for ids in first_ids.values()), "every rank of the group has all clips of the batch"
    shutil.rmtree(run / "checkpoints" / "step_00000010")
    (run / "DONE").unlink()
    train(1)
    assert applied_ids(run, 1) == first_ids
    assert losses(run) == pytest.approx(first_losses, rel=1e-5)
