"""What a user reads while a run works, in a file and in a terminal."""

from __future__ import annotations

import io

import pytest

from trainer.observe.console import Console, format_seconds, format_table
from trainer.observe.score_table import score_table

VALUES = {
    "loss/total": 0.123456,
    "loss/feature_reconstruction": 0.1,
    "loss/ssync_boundary": 0.25,
    "speed/clips_per_s": 123.4,
    "time/step_ms": 200.0,
    "time/data_wait_ms": 30.0,
    "optim/lr": 1e-3,
}
SCORES = {
    "metric/video_fg_ari": 0.4523,
    "metric/frame_mbo": 0.3,
    "metric/attn_video_fg_ari": 0.46,
    "metric/object_count": 3.0,
    "baseline/k_means/video_fg_ari": 0.544,
    "baseline/grid/video_fg_ari": 0.401,
    "loss/total": 0.1,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_plain_line_says_step_loss_terms_speed_wait_and_time_to_go():
    now = [100.0]
    stream = io.StringIO()
    console = Console(400, stream=stream, clock=lambda: now[0])
    console.start(100)
    now[0] = 150.0
    console.update(200, VALUES)
    (line,) = stream.getvalue().splitlines()
    for part in ("200/400", "50 %", "loss 0.1235", "rec 0.1", "bound 0.25", "123 clips/s", "data wait 15 %", "1:40 to go"):
        assert part in line
    assert "[##########..........]" in line and "\x1b" not in line


def test_resumed_steps_do_not_count_as_speed():
    now = [0.0]
    stream = io.StringIO()
    console = Console(1000, stream=stream, clock=lambda: now[0])
    console.start(900)
    now[0] = 10.0
    console.update(910, {})
    assert "1:30 to go" in stream.getvalue()


def test_other_ranks_say_nothing():
    stream = io.StringIO()
    console = Console(10, enabled=False, stream=stream)
    console.start()
    console.update(3, VALUES)
    console.note("hello")
    assert "method" in console.table("t", ["method"], [["a"]])
    console.close()
    assert stream.getvalue() == ""


def test_a_terminal_gets_one_bar_and_clean_lines_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    console = Console(10, stream=stream)
    console.start()
    console.update(4, VALUES)
    console.note("a note [not markup]")
    console.close()
    text = stream.getvalue()
    assert "4/10" in text and "loss 0.1235" in text and "a note [not markup]" in text


def test_table_columns_align():
    text = format_table("title", ["", "a", "long name"], [["first", 1.23456, None], ["second row", 10, "x"]])
    title, head, rule, first, second = text.splitlines()
    assert title == "title" and len(rule) == len(head) == len(first) == len(second)
    assert first.endswith("–") and "1.235" in first and head.endswith("long name")


def test_score_table_has_the_model_first_and_percent():
    stream = io.StringIO()
    text = Console(1, stream=stream).score_table(SCORES)
    rows = [line for line in text.splitlines() if line[:1].isalpha()][1:]
    names = [row.split("  ")[0] for row in rows]
    assert names == ["model", "model, attention maps", "k-means on the same features", "grid of blocks"]
    assert "45.2" in rows[0] and "30.0" in rows[0] and "54.4" in rows[2] and "–" in rows[2]
    assert "object" not in text and text in stream.getvalue()


def test_score_table_parts():
    table = score_table(SCORES)
    assert table.columns == ("video FG-ARI", "frame mBO") and table.num_model_rows == 2
    assert table.rows[0] == ("model", (0.4523, 0.3)) and table.rows[-1] == ("grid of blocks", (0.401, None))
    assert score_table({}).rows == ()


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (0, "0:00"), (65.4, "1:05"), (3723, "1:02:03"), (3599.7, "1:00:00")])
def test_seconds_as_text(seconds, text):
    assert format_seconds(seconds) == text
