"""The number of ranks and of micro-batches changes nothing of the mathematics."""

from __future__ import annotations

import json

import pytest

from tests.integration.forked_ranks import Job, errors, run_jobs, said
from tests.integration.ranks import run_ranks

# Number of ranks, of micro-batches, ZeRO stage
WORLDS = [(1, 1, 1), (1, 3, 1), (2, 1, 1), (3, 1, 0), (2, 2, 2), (2, 1, 3), (3, 2, 0), (4, 1, 1), (8, 1, 0)]


def steps(tmp_path, world: int, accumulation: int = 1, stage: int = 1, global_batch: int = 5, **more) -> Job:
    options = {"stage": stage, "accumulation": accumulation, "global_batch": global_batch, "steps": 3, **more}
    folder = str(tmp_path / f"w{world}a{accumulation}s{stage}")
    return Job(world, "tests.integration.steps_worker", [json.dumps(options)], folder)


def results_of(*jobs: Job) -> list[dict]:
    """What rank 0 of each job says; the others must hold the same weights."""
    for job, codes in zip(jobs, run_jobs(list(jobs)), strict=True):
        assert not any(codes), errors(job)
        weights = [result["weights"] for result in said(job)]
        assert all(other == weights[0] for other in weights[1:]), "ranks must hold the same weights"
    return [said(job)[0] for job in jobs]


def assert_same(one: dict, other: dict, tolerance: float = 1e-6) -> None:
    for first, second in zip(one["reports"], other["reports"], strict=True):
        assert first["terms"].keys() == second["terms"].keys()
        assert first["total"] == pytest.approx(second["total"], rel=tolerance)
        for name, value in first["terms"].items():
            assert second["terms"][name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    assert one["norms"] == pytest.approx(other["norms"], rel=1e-5)
    for name, values in one["weights"].items():
        assert other["weights"][name] == pytest.approx(values, abs=tolerance), name


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    return dict(zip(WORLDS, results_of(*(steps(folder, *world) for world in WORLDS)), strict=True))


@pytest.fixture(scope="module")
def reference(worlds):
    return worlds[1, 1, 1]


def test_the_reference_exercises_every_term(reference):
    assert set(reference["reports"][0]["terms"]) == {"feature_reconstruction", "slot_contrast"}
    assert set(reference["reports"][2]["terms"]) == {
        "feature_reconstruction",
        "slot_contrast",
        "ssync_boundary",
        "ssync_interior",
    }
    assert all(value > 0 for value in reference["reports"][2]["terms"].values())


@pytest.mark.parametrize("world", WORLDS[1:], ids=str)
def test_ranks_micro_batches_and_stages_agree(worlds, reference, world):
    assert_same(reference, worlds[world])


def test_recomputed_frames_over_ranks_and_micro_batches(tmp_path, reference):
    """ZeRO-3 gathers weights around a module's call, and once more where the backward computes again."""
    assert_same(reference, *results_of(steps(tmp_path, 2, accumulation=2, stage=3, model={"recompute_frames": 2})))


def test_a_decoder_that_waits_for_its_own_maps_over_ranks(tmp_path):
    assert_same(*results_of(steps(tmp_path, 1, merged_by="D"), steps(tmp_path, 2, stage=3, merged_by="D")))


def test_more_ranks_than_clips(tmp_path):
    assert_same(*results_of(steps(tmp_path, world=1, global_batch=2), steps(tmp_path, world=3, global_batch=2)))


def test_images_are_clips_of_one_frame(tmp_path):
    """The predictor gets no gradient then, and slot contrast has nothing to compare."""
    one, two = results_of(steps(tmp_path, 1, frames=1), steps(tmp_path, 2, frames=1))
    assert [report["terms"]["slot_contrast"] for report in one["reports"]] == [0, 0, 0]
    assert_same(one, two)


def test_video_scope_needs_no_other_rank(tmp_path):
    assert_same(*results_of(steps(tmp_path, 1, scope="video"), steps(tmp_path, 2, scope="video")))


@pytest.fixture(scope="module")
def srl_reference(tmp_path_factory):
    (result,) = results_of(steps(tmp_path_factory.mktemp("srl"), world=1, srl=True, ssync_from=1.0))
    return result


def test_srl_stages_follow_the_step(srl_reference):
    """Flattening in steps 0 and 1, the encoder's ranking after 0, the decoder's after 1."""
    base = {"feature_reconstruction", "slot_contrast"}
    found = [set(report["terms"]) - base for report in srl_reference["reports"]]
    assert found == [{"srl_regulariser"}, {"srl_regulariser", "srl_encoder"}, {"srl_encoder", "srl_decoder"}]


def test_srl_over_ranks_micro_batches_and_stages(tmp_path, srl_reference):
    assert_same(srl_reference, *results_of(steps(tmp_path, world=2, accumulation=2, stage=3, srl=True, ssync_from=1.0)))


def test_a_stop_request_of_one_rank_reaches_all(tmp_path):
    options = {"stage": 1, "accumulation": 1, "global_batch": 4, "steps": 1, "stop_rank": 1}
    results = run_ranks(2, ["-m", "tests.integration.steps_worker", json.dumps(options)], tmp_path)
    assert [result["reports"][0]["stop"] for result in results] == [True, True]


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update(tmp_path):
    options = {"stage": 1, "accumulation": 1, "global_batch": 4, "steps": 2, "poison": 3}
    results = run_ranks(2, ["-m", "tests.integration.steps_worker", json.dumps(options)], tmp_path)
    for result in results:
        assert result["unchanged"], "weights must be as before the bad step"
        assert "step 1 on ranks [1]" in result["error"]
        assert "feature_reconstruction=nan" in result["error"]
