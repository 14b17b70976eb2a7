"""When a job is started again, after how long, and when it is given up."""

from __future__ import annotations

import dataclasses

import pytest

from cluster.supervision.policy import NO_STORAGE, Ending, History

DIED = Ending(outcome="failed", cause="signal", code=137, applied=True, saved_step=-1)


def test_what_has_ended_well_or_was_stopped_stays_ended() -> None:
    for outcome in ("done", "stopped", "saved"):
        assert History(10).decide(Ending(outcome=outcome)).action == "end"


def test_ranks_that_saved_for_a_new_group_start_again_at_no_cost() -> None:
    history = History(0)
    decision = history.decide(Ending(outcome="saved", regroup=True))
    assert (decision.action, decision.delay_s, history.used) == ("restart", 0.0, 0)


def test_pauses_grow_without_progress_and_the_budget_ends() -> None:
    history = History(9)
    decisions = [history.decide(DIED) for _ in range(10)]
    assert [decision.delay_s for decision in decisions[:9]] == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert [decision.action for decision in decisions] == ["restart"] * 9 + ["end"]
    assert "9 restarts without a newer checkpoint; --max-restarts 9" in decisions[-1].why


def test_a_newer_checkpoint_refills_the_budget_and_an_older_one_does_not() -> None:
    history = History(2, saved_step=10)
    assert [history.decide(dataclasses.replace(DIED, saved_step=step)).delay_s for step in (10, 20, 20)] == [0, 0, 1]
    assert history.decide(dataclasses.replace(DIED, saved_step=5)).action == "end"
    assert all(history.decide(dataclasses.replace(DIED, saved_step=step)).action == "restart" for step in (30, 40, 50))


def test_no_restart_at_all_can_be_asked_for() -> None:
    assert History(0).decide(DIED).action == "end"


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (Ending(outcome="failed", code=2, applied=True), "a setting or a file"),
        (Ending(outcome="failed", code=1, applied=False), "before its first step"),
        (Ending(outcome="failed", code=1, applied=True, complete=True), "complete"),
        (Ending(outcome="failed", cause="signal", code=139, complete=True), "complete"),
    ],
)
def test_what_would_fail_again_is_given_up_at_once(ending: Ending, words: str) -> None:
    decision = History(10).decide(ending)
    assert decision.action == "end" and words in decision.why


@pytest.mark.parametrize("cause", ["lost_peer", "signal", "lost_node", "hang"])
def test_what_came_from_outside_is_tried_again_even_before_the_first_step(cause: str) -> None:
    assert History(10).decide(Ending(outcome="failed", cause=cause, code=1)).action == "restart"


def test_the_same_error_twice_at_one_step_is_given_up_and_others_are_not() -> None:
    error = Ending(outcome="failed", code=1, error="ValueError: x", step=7, applied=True)
    for second in (dataclasses.replace(error, step=8), dataclasses.replace(error, error="OSError: y"), DIED):
        history = History(10)
        assert [history.decide(item).action for item in (error, second, error)] == ["restart"] * 3
    history = History(10)
    assert history.decide(error).action == "restart"
    again = history.decide(error)
    assert again.action == "end" and "the same error twice at step 7" in again.why


def test_a_disk_that_refuses_checkpoints_is_tried_again_and_waited_for() -> None:
    full = Ending(outcome="failed", code=NO_STORAGE, error="StorageError: no room", step=7, applied=False)
    history = History(4)
    assert [history.decide(full).delay_s for _ in range(4)] == [0, 1, 2, 4]
    assert history.decide(full).action == "end"


def test_ranks_and_policy_mean_the_same_code() -> None:
    from data_pipeline import compose

    assert compose.NO_STORAGE == NO_STORAGE
