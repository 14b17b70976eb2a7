"""Whatever happens to the newest checkpoint: all ranks load the same older one, or all say that there is none. Never a split."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.integration.ranks import ROOT, rank_environment

OLDER = 20
SEEN_BY_ONE, EVERYTHING = "damaged as rank 1 alone sees it", "every checkpoint damaged"


def cases(part: str, folder) -> list[dict]:
    command = [sys.executable, "-m", "tests.integration.checkpoint_cases", part, str(folder), "few"]
    environment = {key: value for key, value in rank_environment(0, 1, 0).items() if key != "MASTER_PORT"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    return cases("damage", tmp_path_factory.mktemp("damage"))


def test_every_damage_was_done_on_some_stage_and_every_stage_was_damaged(found):
    told = [case for case in found if "damage" in case]
    assert len({case["damage"] for case in told}) == 30
    assert {case["stage"] for case in told} == {1, 2, 3}


def test_all_ranks_load_the_same_older_step(found):
    for case in found:
        if "damage" in case and case["damage"] != EVERYTHING:
            assert case["loaded"] == [OLDER, OLDER] and case["same"] and case["right"], case
            assert len(case["said"]) == 1 and "step_00000030 does not verify" in case["said"][0], case


def test_where_none_is_left_all_ranks_say_so(found):
    none = [case for case in found if case.get("damage") == EVERYTHING]
    assert [case["stage"] for case in none] == [1, 2, 3]
    for case in none:
        assert case["loaded"] == [-1, -1] and case["same"] and len(case["said"]) == 3, case


def test_what_is_damaged_is_left_as_it_is(found):
    assert all(case["untouched"] for case in found if "damage" in case)


def test_what_one_rank_alone_cannot_read_is_read_by_none(found):
    told = [case["said"][0] for case in found if case.get("damage") == SEEN_BY_ONE]
    assert told and all("Stale file handle" in said for said in told)


def test_the_engine_holds_what_was_loaded(found):
    assert [case["engine_holds_what_was_loaded"] for case in found if "damage" not in case] == [True] * 3


def test_another_number_of_ranks_and_another_stage_go_on_as_if_nothing_had_changed(tmp_path):
    """All 30 combinations, 8 ranks to 5 among them: python -m tests.integration.checkpoint_cases matrix FOLDER"""
    told = cases("matrix", tmp_path)
    assert [case["ranks"] for case in told] == [[2, 1], [2, 3], [3, 2], [1, 4]]
    assert {stage for case in told for stage in case["stages"]} == {1, 2, 3}
    for case in told:
        assert case["difference"] <= 1e-6, case


def test_kill_nine_at_any_moment_of_a_background_write_loses_nothing_that_was_there(tmp_path):
    """Training was going on meanwhile; the next save clears what the killed one left."""
    told = cases("killed", tmp_path)
    assert {case["expected"] for case in told} == {10, 20}
    for case in told:
        assert case["loaded"] == case["expected"], case
        assert all(name.startswith("step_") or name == "newest.json" for name in case["names"]), case
