"""Ranks that meet, ranks that must not, and ranks that are asked to stop while they wait."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.integration.ranks import ROOT, free_port, rank_environment


@pytest.fixture(scope="module")
def scenes() -> dict:
    """Everything of this file from one process, see rendezvous_worker.py."""
    command = [sys.executable, "-m", "tests.integration.rendezvous_worker"]
    environment = rank_environment(0, 1, free_port())
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def error_of(outcome: dict) -> str:
    told = [line for line in outcome["said"].splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "Traceback" not in outcome["said"], outcome["said"]
    return told[0]


@pytest.mark.parametrize(
    ("who", "words"),
    [
        ("old", ["attempt 2", "rank 1 of run mine, attempt 1"]),
        ("other_run", ["belongs to run mine", "of run theirs"]),
        ("larger", ["world size 2", "world size 4"]),
        ("second_first", ["MASTER_PORT", "taken"]),
    ],
)
def test_a_stranger_is_refused(scenes, who, words):
    outcome = scenes["strangers"][who]
    assert outcome["code"] == 1
    assert all(word in error_of(outcome) for word in words), outcome


def test_the_right_ranks_meet_all_the_same(scenes):
    for who in ("first", "right"):
        assert scenes["strangers"][who]["code"] == 0 and "sum 2.0" in scenes["strangers"][who]["said"]


def test_a_stop_request_ends_the_wait_for_others(scenes):
    """Of those that wait together one is asked: all leave, with the code that asks to be started again."""
    for outcome in (scenes["stopped"]["alone"], *scenes["stopped"]["waiting"]):
        assert outcome["code"] == 75 and "error" not in outcome["said"], outcome


@pytest.mark.parametrize(
    ("scene", "code", "words"),
    [
        ("name", 2, ["MASTER_ADDR=no-such-host.invalid", "does not resolve"]),
        ("port", 2, ["MASTER_PORT='many'"]),
        ("interface", 2, ["GLOO_SOCKET_IFNAME=nosuch0", "lo"]),
        ("no_first", 1, ["did not answer within 1 s", "refused", "rank 1"]),
        ("no_second", 1, ["ranks [1, 2] of 3 did not come"]),
    ],
)
def test_what_cannot_work_is_one_line(scenes, scene, code, words):
    outcome = scenes["wrong"][scene]
    assert outcome["code"] == code
    assert all(word in error_of(outcome) for word in words), outcome


def test_every_group_gives_up_on_a_frozen_rank(scenes):
    """Groups that DeepSpeed makes would wait for torch's 30 minutes; the private call that shortens it must go on working."""
    outcome = scenes["frozen"]
    assert outcome["code"] == 0, outcome
    (groups,) = [int(line.split()[1]) for line in outcome["said"].splitlines() if line.startswith("groups ")]
    assert groups >= 2, "DeepSpeed makes a group of its own"
    assert outcome["said"].count("gave up: ") == groups


def test_a_request_that_comes_inside_a_collective_counts_right_after_it(scenes):
    for outcome in scenes["blocked"]:
        assert outcome["code"] == 0 and "agreed to go on: False" in outcome["said"], outcome


def test_a_stop_request_while_a_new_run_loads_leaves_nothing(scenes):
    loading = scenes["training"]["loading"]
    assert [rank["code"] for rank in loading["ranks"]] == [75, 75], loading
    assert loading["checkpoints"] == []


def test_a_stop_request_within_a_step_is_kept_at_its_end(scenes):
    """Update 4 was under way: it is applied, and in the checkpoint."""
    stopped = scenes["training"]["step"]
    assert [rank["code"] for rank in stopped["ranks"]] == [75, 75], stopped
    assert stopped["checkpoints"] == ["step_00000004"]


def test_a_stop_request_while_a_run_loads_leaves_its_checkpoint_alone(scenes):
    before, after = scenes["training"]["step"], scenes["training"]["loading_again"]
    assert [rank["code"] for rank in after["ranks"]] == [75, 75], after
    assert after["written"] == before["written"]
