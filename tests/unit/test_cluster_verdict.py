"""Why an attempt ended: the cause among several failures, exit codes, and the words that a person reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.verdict import RankExit, Verdict, blames_peer, explain, judge, last_lines


def rank_exit(rank: int | None, code: int, at: float, **more: object) -> RankExit:
    facts: dict = {"node": 0 if rank is None else rank // 2, "signal": None, **more}
    return RankExit(rank=rank, code=code, time=at, **facts)


def verdict_of(*exits: RankExit, stop: str | None = None, done: bool = False) -> Verdict:
    return judge(exits, started=100.0, ended=120.0, stop_reason=stop, done_file=done)


def test_all_zero_is_done() -> None:
    verdict = verdict_of(rank_exit(0, 0, 110), rank_exit(1, 0, 111))
    assert (verdict.exit_code, verdict.outcome, verdict.duration_seconds) == (0, "done", 20.0)


def test_the_first_failure_by_time_is_the_cause_and_the_others_its_consequences() -> None:
    verdict = verdict_of(rank_exit(0, 1, 112.5), rank_exit(3, 3, 112.0), rank_exit(2, 143, 113, stopped=True, signal="SIGTERM"))
    assert (verdict.exit_code, verdict.rank, verdict.node, verdict.rank_exit_code, verdict.after_seconds) == (3, 3, 1, 3, 12.0)
    assert [item["rank"] for item in verdict.consequences] == [0]


def test_a_rank_that_lost_its_peer_is_not_the_cause_though_it_ended_first() -> None:
    verdict = verdict_of(rank_exit(0, 1, 110.0, lost_peer=True), rank_exit(1, 5, 111.0))
    assert (verdict.rank, verdict.exit_code) == (1, 5)
    assert verdict_of(rank_exit(0, 1, 110.0, lost_peer=True), rank_exit(1, 0, 111.0)).rank == 0  # nobody else to blame


def test_a_killed_rank_is_reported_with_its_signal() -> None:
    verdict = verdict_of(rank_exit(2, 137, 101, signal="SIGKILL"), rank_exit(0, 1, 101.2, lost_peer=True))
    assert (verdict.exit_code, verdict.signal, verdict.rank_exit_code) == (137, "SIGKILL", None)
    assert "rank 2 (node 1) was killed by SIGKILL" in explain(verdict, Path("/x/rank_2.log"), Path("/x"))


def test_75_asks_for_a_restart_unless_a_failure_came_first() -> None:
    assert verdict_of(rank_exit(0, 75, 110), rank_exit(1, 75, 110)).exit_code == 75
    assert verdict_of(rank_exit(0, 75, 110), rank_exit(1, 1, 111)).outcome == "requeue"
    assert verdict_of(rank_exit(0, 75, 112, stopped=True), rank_exit(1, 4, 111)).exit_code == 4
    assert verdict_of(rank_exit(0, 75, 112), rank_exit(1, 1, 111, lost_peer=True)).exit_code == 75


@pytest.mark.parametrize(
    ("reason", "code", "saved"),
    [("interrupted", 130, 130), ("terminated", 143, 75), ("out_of_time", 124, 75), ("hung_up", 129, 75)],
)
def test_being_asked_to_stop(reason: str, code: int, saved: int) -> None:
    died = rank_exit(0, 143, 110, stopped=True, signal="SIGTERM")
    assert verdict_of(died, stop=reason).exit_code == code
    assert verdict_of(rank_exit(0, 75, 110, stopped=True), stop=reason).exit_code == saved
    assert verdict_of(rank_exit(0, 3, 105), died, stop=reason).exit_code == 3  # it had failed before


def test_ranks_that_had_to_be_killed_are_named() -> None:
    verdict = verdict_of(rank_exit(1, 137, 110, stopped=True, signal="SIGKILL"), stop="interrupted")
    assert verdict.killed == [1]
    assert "ranks 1" in explain(verdict, None, Path("/x"))


def test_a_lost_agent_is_named_by_its_node() -> None:
    verdict = verdict_of(RankExit(rank=None, node=2, code=137, signal="SIGKILL", time=104.0))
    assert verdict.exit_code == 137
    assert explain(verdict, None, Path("/x")).startswith("the agent of node 2 was killed by SIGKILL")


def test_a_hang_outweighs_the_ends_that_it_brought() -> None:
    killed = rank_exit(1, 137, 110, stopped=True, signal="SIGKILL")
    verdict = judge([killed], started=100.0, ended=120.0, stop_reason=None, hang=(1, "rank 1 stuck in phase data"))
    assert (verdict.outcome, verdict.cause, verdict.rank, verdict.exit_code) == ("failed", "hang", 1, 1)
    assert "hung after 20 s: rank 1 stuck in phase data" in explain(verdict, None, Path("/x"))


def test_causes_have_names() -> None:
    assert verdict_of(rank_exit(0, 1, 110)).cause == "exit"
    assert verdict_of(rank_exit(0, 1, 110, lost_peer=True)).cause == "lost_peer"
    assert verdict_of(rank_exit(0, 137, 110, signal="SIGKILL")).cause == "signal"
    lost = verdict_of(RankExit(rank=None, node=1, code=137, signal=None, time=104.0, why="is on node n3, which is down"))
    assert lost.cause == "lost_node"
    assert "the agent of node 1 is on node n3, which is down after 4 s" in explain(lost, None, Path("/x"))


def test_what_is_lost_beside_done_is_no_failure_of_the_run() -> None:
    lost = RankExit(rank=None, node=1, code=137, signal=None, time=104.0, why="is on node n3, which is down")
    for outside in (lost, rank_exit(0, 139, 110, signal="SIGSEGV"), rank_exit(0, 1, 110, lost_peer=True)):
        assert verdict_of(outside, done=True).session_code == 0
        assert verdict_of(outside).session_code == outside.code
    hang = judge([], started=100.0, ended=120.0, stop_reason=None, done_file=True, hang=(0, "stopped"))
    assert hang.session_code == 0
    assert verdict_of(rank_exit(0, 1, 110), done=True).session_code == 1  # its own error: the report, for one, is not there
    assert verdict_of(rank_exit(0, 0, 110, stopped=True), stop="interrupted").session_code == 130


def test_the_text_has_rank_node_code_time_and_last_lines() -> None:
    verdict = verdict_of(rank_exit(3, 3, 112.0), done=True)
    verdict.last_lines.extend(["one", "two"])
    text = explain(verdict, Path("/x/rank_3.log"), Path("/x"))
    first = "rank 3 (node 1) failed with exit code 3 after 12 s; last lines of /x/rank_3.log:"
    assert text.splitlines()[:3] == [first, "  | one", "  | two"]
    assert "DONE" in text


def test_last_lines_are_what_a_person_saw(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"early\n" * 50 + b"10%\r50%\r\x1b[32m100%\x1b[0m\r\nlast \xff\n\n")
    assert last_lines(log, 3) == ["early", "100%", "last \ufffd"]
    assert last_lines(tmp_path / "none") == []


def test_words_of_a_lost_peer() -> None:
    assert blames_peer(["x", "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"])
    assert blames_peer(
        ["RuntimeError: Timed out waiting 10000ms for recv operation to complete", "EADDRINUSE, address already in use"]
    )
    assert not blames_peer(["ValueError: a value", "loss is nan"])
