"""What a user reads while a run works, in a file and in a terminal."""

from __future__ import annotations

import errno
import io
import re

import pytest

from trainer.observe.console import Console, format_seconds, format_table
from trainer.report.score_table import score_table

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


def test_restarts_are_in_the_line_where_there_were_any():
    lines = []
    for restarts in (0, 1, 2):
        stream = io.StringIO()
        Console(10, stream=stream, restarts=restarts).update(1, VALUES)
        lines.append(stream.getvalue())
    assert "restart" not in lines[0] and "· 1 restart ·" in lines[1] and "· 2 restarts ·" in lines[2]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (200, "loss 0.1235 · rec 0.1 bound 0.25 · 123 clips/s · data wait 15 % · 3 restarts ·"),
        (100, "loss 0.1235 · 123 clips/s · data wait 15 % · 3 restarts ·"),
        (80, "loss 0.1235 · 123 clips/s · 3 restarts ·"),
        (66, "loss 0.1235 · 123 clips/s ·"),
        (50, "loss 0.1235 ·"),
    ],
)
def test_a_narrow_terminal_goes_without_the_least_wanted(monkeypatch, columns, shown):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    console = Console(1000, stream=stream, restarts=3, clock=iter(range(100)).__next__)
    console.start()
    console.update(500, VALUES)
    console.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = [line for line in re.split(r"[\r\n]", text) if "500/1000" in line][-1]
    assert last.partition("500/1000 ")[2].startswith(shown) and last.rstrip().endswith("to go")


def test_a_terminal_is_drawn_a_few_times_a_second(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream, now = Terminal(), [0.0]
    console = Console(1000, stream=stream, clock=lambda: now[0])
    console.start()
    for step in range(1, 101):
        now[0] += 0.01  # a second in all
        console.update(step, VALUES)
    drawn = stream.getvalue().count("/1000")
    console.close()
    assert 3 <= drawn <= 6 and "100/1000" in stream.getvalue()


def test_the_summary_says_what_this_attempt_did():
    now, stream = [0.0], io.StringIO()
    console = Console(400, stream=stream, clock=lambda: now[0], restarts=1)
    console.start(100)
    for step, speed in ((200, 10.0), (400, 20.0)):  # 100 and 200 updates of 200 ms
        now[0] += 30.0
        console.update(
            step, VALUES | {"speed/clips_per_s": speed, "mem/peak_gib": 1.5 if step == 200 else 1.25, "data/skipped": 2}
        )
    console.summary("run demo is done", [("folder", "runs/demo")])
    text = stream.getvalue().partition("run demo is done\n")[2]
    assert "updates  300 behind 100 of earlier attempts in 1:00, 1 restart\n" in text
    assert "speed    16.7 clips/s, 15 % of the time waiting for data\n" in text
    assert "memory   1.50 GiB" in text and "loss     0.1235 · rec 0.1 bound 0.25\n" in text
    assert "replaced on rank 0: 2\n" in text and "folder   runs/demo\n" in text


def test_a_summary_of_nothing_has_no_empty_rows():
    stream = io.StringIO()
    Console(400, stream=stream).summary("run demo is done")
    assert [line.split()[0] for line in stream.getvalue().split("\n") if line] == ["run", "updates"]


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


class Gone(Terminal):
    """A terminal, or a file on a disk, that takes no more from some time on."""

    taken = True

    def write(self, text: str) -> int:
        if not self.taken:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_an_output_that_takes_no_more_ends_no_run(terminal, monkeypatch):
    monkeypatch.setattr(Gone, "isatty", lambda self: terminal)
    now, stream = [0.0], Gone()
    console = Console(400, stream=stream, clock=lambda: now[0])
    console.start(0)
    stream.taken = False
    for step in (100, 200):
        now[0] += 10.0
        console.update(step, VALUES)
        console.note("a note")
    console.summary("the end")
    console.close()
