"""Faults and restarts: every line of the launcher's record ends up as a sentence, in order, and nothing in it breaks the page."""

from __future__ import annotations

import json
import re
import time

import pytest
from html_page import Page, write_events, write_run

from trainer.report.events import NOTICE, ROUTINE, TROUBLE, describe, severity
from trainer.report.page import write_report
from trainer.report.run import read_run, state_of
from trainer.report.timeline import attempts_of, lanes_of

KILLED = {"outcome": "failed", "cause": "signal", "rank": 1, "node": 0, "code": 137, "why": ""}
STORY = (
    {"event": "session", "attempt": None, "backend": "local", "nodes": 1, "host": "h", "pid": 1},
    {"event": "attempt", "attempt": 1, "nodes": 1, "ranks": 2, "after": 1},
    {"event": "straggler", "attempt": 1, "ranks": [0], "why": "rank 0 is slow at its data", "after": 20},
    {"event": "exit", "attempt": 1, "rank": 1, "node": 0, "code": 137, "signal": "SIGKILL", "stopped": False, "after": 50},
    {"event": "exit", "attempt": 1, "rank": 0, "node": 0, "code": 143, "signal": "SIGTERM", "stopped": True, "after": 52},
    {"event": "verdict", "attempt": 1, **KILLED, "after": 53},
    {"event": "restart", "attempt": None, "delay": 5.0, "why": "rank 1 was killed; it had saved step 40", "after": 54},
    {"event": "attempt", "attempt": 2, "nodes": 1, "ranks": 2, "after": 60},
    {"event": "exit", "attempt": 2, "rank": 0, "node": 0, "code": 0, "signal": None, "stopped": False, "after": 100},
    {"event": "verdict", "attempt": 2, "outcome": "done", "code": 0, "after": 101},
    {"event": "end", "attempt": None, "code": 0, "reason": None, "after": 102},
)


def tell(folder, *events):
    write_events(folder, *({**event} for event in events))
    return folder


def page_of(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_killed_rank_and_the_restart_are_told_in_order(tmp_path):
    page = page_of(tell(tmp_path / "run", *STORY))
    assert "2 attempts, 1 failed; 1 restart; 2 min from" in page.words
    told = [row[4] for row in page.rows if len(row) == 5 and row[3] in ("fault", "notice")]
    first_four = told[:4]
    assert first_four[0] == "straggler: rank 0 is slow at its data"
    assert first_four[1] == "rank 1 (node 0) was killed by SIGKILL"
    assert first_four[2] == "failed (signal, rank 1 at fault, exit code 137)"
    assert first_four[3] == "starting again in 5 s: rank 1 was killed; it had saved step 40"
    assert "All 11 events" in page.words


def test_each_mark_on_the_line_has_its_number_in_the_list(tmp_path):
    page = page_of(tell(tmp_path / "run", *STORY))
    marks = re.findall(r'class="mark (\w+)" style="left:([\d.]+)%;top:(\d+)px">(\d+)<', page.content)
    assert [mark[3] for mark in marks] == ["1", "2", "3", "4"]
    assert [mark[0] for mark in marks] == ["notice", "trouble", "trouble", "notice"]
    assert len({mark[2] for mark in marks[1:]}) == 3  # three in four seconds would cover one another
    assert all(0 <= float(mark[1]) <= 100 for mark in marks)


def test_attempts_have_their_lengths_and_ends(tmp_path):
    first, second = attempts_of(read_run(tell(tmp_path / "run", *STORY)))
    assert (first.outcome, second.outcome) == ("failed", "done")
    assert first.ended is not None and first.ended - first.began == pytest.approx(52) and first.where == "2 ranks on 1 node"


def test_a_launcher_that_was_lost_leaves_an_attempt_without_an_end(tmp_path):
    again = [{**event, "after": event.get("after", 0) + 500} for event in (STORY[0], {**STORY[1], "attempt": 2}, *STORY[9:])]
    first, second = attempts_of(read_run(tell(tmp_path / "run", *STORY[:3], *again)))
    assert first.ended is None and "launcher was lost" in first.why and second.outcome == "done"
    bars = re.findall(r'class="bar \w+" style="left:([\d.]+)%;width:([\d.]+)%', page_of(tmp_path / "run").content)
    assert len(bars) == 2 and float(bars[0][0]) + float(bars[0][1]) <= float(bars[1][0]) + 0.1


def test_a_hang_shows_the_stacks_and_the_last_words(tmp_path):
    folder = tell(tmp_path / "run", *STORY[:2], {"event": "hang", "attempt": 1, "why": "rank 1 sleeps", "after": 9})
    attempt = folder / "attempts" / "1"
    attempt.mkdir(parents=True)
    (attempt / "hang.json").write_text(json.dumps({"why": "rank 1 sleeps", "stacks": {"0": "File a.py", "1": ["File b.py"]}}))
    (attempt / "verdict.json").write_text(json.dumps({"outcome": "failed", "cause": "hang", "rank": 1, "last_lines": ["bye"]}))
    words = page_of(folder).words
    assert "hang: rank 1 sleeps" in words and "File a.py" in words and "File b.py" in words
    assert "last words of rank 1" in words and "bye" in words


def test_without_events_the_attempts_records_speak(tmp_path):
    folder = write_run(tmp_path / "run")
    for number, started in ((1, "2026-11-21T07:21:06+0000"), (2, "2026-11-21T09:21:06+0200")):
        (folder / "attempts" / str(number)).mkdir(parents=True)
        record = {"started": started, "world_size": 1, "host": "vm"}
        (folder / "attempts" / str(number) / "provenance.json").write_text(json.dumps(record))
    page = page_of(folder)
    assert "No events.jsonl" in page.words
    first, second = attempts_of(read_run(folder))
    assert first.began == second.began and first.where == "1 rank (vm)"  # one moment in two time zones


@pytest.mark.parametrize("text", ["", "not json\n", "[]\n", '{"event": 3, "time": 1}\n', '{"event": "x"}\n', '{"time": 1}\n'])
def test_lines_that_are_no_events_are_passed_over(tmp_path, text):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "events.jsonl").write_text(text + '{"event": "attempt", "attempt": 1, "time": 5}\n{"event": "exi')
    assert [event["event"] for event in read_run(folder).events] == ["attempt"]
    page_of(folder)


def test_an_event_that_is_not_known_is_shown_with_its_facts():
    event = {"event": "eclipse", "time": 1.0, "session": "s", "attempt": 1, "share": 0.5}
    assert describe(event) == "eclipse share 0.5" and severity(event) == ROUTINE


NAMES = "session attempt exit verdict restart preempted stopping lost cannot_start taken_over regroup end hang straggler disk"


@pytest.mark.parametrize("name", NAMES.split())
def test_an_event_without_its_facts_is_still_a_line(tmp_path, name):
    assert describe({"event": name})
    page_of(tell(tmp_path / "run", {"attempt": None, "event": name}))


def test_what_is_routine_and_what_is_not():
    assert severity({"event": "exit", "code": 75}) == severity({"event": "exit", "code": 143, "stopped": True}) == ROUTINE
    assert (
        severity({"event": "exit", "code": 1}) == severity({"event": "lost"}) == severity({"event": "end", "code": 2}) == TROUBLE
    )
    assert severity({"event": "verdict", "outcome": "requeue"}) == ROUTINE and severity({"event": "preempted"}) == NOTICE


def test_a_run_knows_whether_it_goes_on(tmp_path):
    folder = tmp_path / "run"
    assert state_of(read_run(folder))[0] == "new"
    write_events(folder, {**STORY[0]}, {**STORY[1]}, start=time.time() - 20)
    assert state_of(read_run(folder))[0] == "running"
    assert state_of(read_run(folder), now=time.time() + 600)[0] == "lost"
    (folder / "owner.json").write_text("{}")
    assert state_of(read_run(folder), now=time.time() + 30)[0] == "running"  # its launcher gives signs of life
    write_events(folder, *({**event} for event in STORY[:6]), {"event": "end", "code": 137, "after": 60})
    assert state_of(read_run(folder)) == ("failed", "failed (signal, rank 1 at fault, exit code 137)")
    write_events(folder, {**STORY[0]}, {"event": "end", "code": 2, "why": "no node came"})
    assert state_of(read_run(folder)) == ("failed", "failed: the launcher ends with code 2: no node came")
    write_events(folder, *({**event} for event in STORY[:2]), {"event": "end", "code": 75, "after": 60})
    assert state_of(read_run(folder))[0] == "stopped"


def test_marks_that_are_close_take_lanes_of_their_own():
    assert lanes_of([0, 1, 2, 10, 11, 50], apart=5) == [0, 1, 2, 0, 1, 0] and lanes_of([]) == []
