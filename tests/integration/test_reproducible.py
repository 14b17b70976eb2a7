"""Reproducible mode: one set of bits for every number of ranks, also where ranks die and others go on."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from tests.integration.forked_ranks import Job, errors, run_jobs, said
from tests.integration.tiny_run import applied_ids, arguments, lines, losses, make_shards, moments, weights

SSYNC = {"steps": 10, "global_batch": 5, "frames": 2}
SRL = {"steps": 3, "global_batch": 3, "frames": 3, "srl": True, "ssync_from": 1.0, "scope": "video"}
WORLDS = (1, 2, 4, 8)
# Two lanes: ranks then take every other clip. int8 features, merging of slots and slot contrast over all clips.
RUN = ["parallel=reproducible", "optim.global_batch=6", "data.lanes=2", "checkpoint.every_steps=4", "evaluate.at_end=true"]


def steps(folder, world: int, name: str, options: dict, **more) -> Job:
    options = {"stage": 0, "accumulation": 1, "reproducible": True} | options | more
    return Job(world, "tests.integration.steps_worker", [json.dumps(options)], str(folder / f"{name}{world}"))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All worlds of this file in one go: name -> job; and the runs folder."""
    folder = tmp_path_factory.mktemp("reproducible")
    data, runs = make_shards(folder / "data", codec="int8"), folder / "runs"

    def training(world: int, name: str, log: str, **more) -> Job:
        return Job(world, "trainer.main", arguments(data, runs, name, *RUN)[2:], str(folder / log), **more)

    jobs = {f"ssync{world}": steps(folder, world, "ssync", SSYNC) for world in WORLDS}
    jobs["micro"] = steps(folder, 2, "micro", SSYNC, accumulation=2)
    jobs |= {f"srl{world}": steps(folder, world, "srl", SRL) for world in (1, 2)}
    jobs["normal"] = steps(folder, 1, "normal", SSYNC, reproducible=False)
    jobs["whole"] = training(1, "whole", "whole")
    jobs["killed"] = training(3, "moved", "killed", kill_at=(str(runs / "moved"), 4))
    jobs["moved"] = training(2, "moved", "moved")
    for (name, job), codes in zip(jobs.items(), run_jobs(list(jobs.values())), strict=True):
        assert codes == ([-9] * 3 if name == "killed" else [0] * job.world), f"{name}: {codes}\n{errors(job)}"
    return jobs, runs


def digest(result: dict) -> str:
    return hashlib.sha256(json.dumps([result["weights"], result["reports"], result["norms"]]).encode()).hexdigest()


def test_weights_losses_and_norms_are_the_same_bits_for_every_world(done):
    """5 clips over 2, 4 and 8 ranks: no number divides them, and three ranks of the eight have none."""
    jobs, _ = done
    reports = said(jobs["ssync1"])[0]["reports"]
    assert set(reports[-1]["terms"]) == {"feature_reconstruction", "slot_contrast", "ssync_boundary", "ssync_interior"}
    assert len({report["total"] for report in reports}) == SSYNC["steps"], "a model that stands still proves nothing"
    for name in ("ssync1", "ssync2", "ssync4", "ssync8", "micro"):
        assert {digest(result) for result in said(jobs[name])} == {digest(said(jobs["ssync1"])[0])}, name


def test_srl_whose_terms_are_taken_clip_by_clip(done):
    jobs, _ = done
    assert set(said(jobs["srl1"])[0]["reports"][-1]["terms"]) >= {"srl_decoder", "srl_encoder", "slot_contrast"}
    assert len({digest(result) for name in ("srl1", "srl2") for result in said(jobs[name])}) == 1


def test_it_is_the_same_training_as_the_normal_mode(done):
    jobs, _ = done
    exact, normal = said(jobs["ssync2"])[0], said(jobs["normal"])[0]
    assert exact["norms"] == pytest.approx(normal["norms"], rel=1e-4)
    for name, values in normal["weights"].items():
        assert exact["weights"][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


def test_killed_on_three_ranks_and_gone_on_with_two_equals_one_rank_undisturbed(done):
    _, runs = done
    for read in (weights, moments):
        one, other = read(runs / "whole", 10), read(runs / "moved", 10)
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].tobytes() == other[key].tobytes(), key
    assert losses(runs / "moved") == losses(runs / "whole")
    order = applied_ids(runs / "whole", 1)
    assert applied_ids(runs / "moved", 3).items() >= {step: order[step] for step in (9, 10)}.items()
    assert scores(runs / "moved") == scores(runs / "whole")


def scores(run) -> dict:
    found = {key: value for line in lines(run / "metrics.jsonl") for key, value in line.items() if key.startswith("metric/")}
    assert found and all(np.isfinite(value) for value in found.values())
    return found
